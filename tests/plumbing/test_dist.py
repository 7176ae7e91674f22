"""Facts about plumbing/dist.py: how ranks find each other. Sums and shares are tested elsewhere."""
import pytest
import torch.distributed

from plumbing import dist


@pytest.fixture
def env(monkeypatch):
    """Sets variables of the environment that torchrun sets, and takes away all others of it."""
    def change(**variables):
        for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return change


@pytest.mark.parametrize("rank, world_size", [("-1", "2"), ("2", "2"), ("one", "2"), ("0", "0"),
                                              ("0", "2.5"), ("1", "1")])
def test_a_rank_that_cannot_be_is_refused(env, rank, world_size):
    env(RANK=rank, WORLD_SIZE=world_size)
    with pytest.raises(ValueError, match=f"^RANK={rank} WORLD_SIZE={world_size} in the env"):
        dist.ranks()


def test_without_torchrun_there_is_one_rank(env):
    env()
    assert dist.ranks() == (0, 1)


def test_a_rank_that_does_not_come_is_named_in_time(env, monkeypatch):
    monkeypatch.setattr(dist, "START", dist.timedelta(seconds=1))
    env(MASTER_ADDR="localhost", MASTER_PORT="0")
    with pytest.raises(ValueError, match=r"rank\(s\) \[1, 2\] of 3 did not start within 0:00:01"):
        dist.open_store(0, 3)


def test_a_restart_does_not_see_what_ranks_of_the_start_before_wrote(env, monkeypatch):
    """torchrun keeps its store. An address in it of a dead rank makes a restart hang."""
    agent = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env(MASTER_ADDR="localhost", MASTER_PORT=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0")
    dist.open_store(0, 1).set("address", "of the dead rank")
    assert dist.open_store(0, 1).check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not dist.open_store(0, 1).check(["address"])


def test_restarts_on_several_nodes_need_a_new_store_each(env):
    env(TORCHELASTIC_USE_AGENT_STORE="True", GROUP_WORLD_SIZE="2", TORCHELASTIC_MAX_RESTARTS="3")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        dist.open_store(0, 4)
