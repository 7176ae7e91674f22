"""Facts about plumbing/missing.py: ranks that wait in vain say for whom, and end."""
import os
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed
from tiny_runs import ROOT

from plumbing import missing
from plumbing.missing import Roll, is_lost_exchange

GLOO = "[/third_party/gloo/gloo/transport/tcp/"
TIMED_OUT = RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv")
CLOSED = RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer")

# Ten updates of a tiny net. In the fourth, rank 1 signals itself between two exchanges, or in the
# backward pass whose gradients are exchanged. The time-out is 3 seconds.
LOOP = f"""
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
import torch
from plumbing import cli, dist
dist.TIMEOUT = timedelta(seconds=3)

@dataclass
class Config:
    # Signal that rank 1 sends to itself.
    signal: str = ""
    # Where: between, or backward.
    where: str = ""

def main(cfg):
    rank, _, device = dist.setup("cpu")
    net = dist.distribute(torch.nn.Linear(2, 2), full=False)
    opt = torch.optim.AdamW(net.parameters())

    def fall(where):
        if rank == 1 and it == 3 and where == cfg.where:
            os.kill(os.getpid(), getattr(signal, cfg.signal))

    for it in range(10):
        dist.sync_sum(torch.ones(1))
        fall("between")
        dist.reduce_now(net, True)
        loss = net(torch.ones(2, 2)).sum()
        fall("backward")
        loss.backward()
        dist.optimise(opt, dist.loss_scaler(device, "float32"), it)

if __name__ == "__main__":
    cli.run(main, Config)
"""


@pytest.fixture
def hook(monkeypatch):
    """Gives this process its own roll and excepthook back."""
    monkeypatch.setattr(missing, "ROLL", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(missing, "GRACE", 0.3)


def rolls(world_size, alive=()):
    """The rolls of some ranks in one store. Those in alive see an exchange fail."""
    store = torch.distributed.HashStore()
    found = [Roll(store, rank, world_size) for rank in range(world_size)]
    for rank in alive:
        store.set(f"alive-{rank}", "4")
    return found


@pytest.mark.parametrize("name, where, words, last", [
    ("SIGSTOP", "backward", "stuck: after 3 s in", "9 (gradients; last update: iteration 3). Look"),
    ("SIGKILL", "between", "gone: after 0 s in", "8 (sum; last update: iteration 3). See"),
])
def test_a_rank_that_is_stuck_or_dead_is_named_in_one_line(here, name, where, words, last):
    """Two processes without torchrun, which would end both and start them anew."""
    (here / "loop.py").write_text(LOOP)
    command = [sys.executable, here / "loop.py", "--signal", name, "--where", where]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
           "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank)}, text=True,
                              stderr=subprocess.PIPE) for rank in (0, 1)]
    try:
        _, err = ranks[0].communicate(timeout=120)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 1
    line = err.splitlines()[-1]
    assert line.startswith(f"error (rank 0): rank(s) [1] of 2 {words} exchange 9 (gradients; last ")
    assert f"process {ranks[1].pid}) is exchange {last}" in line
    assert "Traceback" not in err


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_the_lowest_rank_that_is_alive_names_all_that_are_missing(hook):
    four = rolls(4, alive=[1, 3])
    four[0].begin("gather")
    four[2].began = time.monotonic() - 600
    assert four[3].explain(TIMED_OUT) == ""
    line = four[1].explain(TIMED_OUT)
    assert line.startswith("rank(s) [0, 2] of 4 stuck: after 0 s in exchange 1 (start;")
    assert "is exchange 2 (gather; last update: iteration 0), rank 2 (" in line


def test_a_rank_whose_connection_is_closed_is_gone(hook):
    assert rolls(2)[0].explain(CLOSED).startswith("rank(s) [1] of 2 gone: ")


def test_where_all_ranks_answer_each_says_how_long_it_waited(hook):
    line = rolls(2, alive=[1])[0].explain(TIMED_OUT)
    assert line.startswith("an exchange failed, but all ranks answer: rank 0 waited 0 s in ")
    assert "rank 1 waited 4 s in exchange 1" in line


def test_a_store_that_is_gone_or_does_not_answer_is_said(hook, monkeypatch):
    monkeypatch.setattr(missing, "STORE", 0.3)
    gone, stopped = rolls(2)
    monkeypatch.setattr(gone, "look", lambda *_: missing.ignoring(fail))
    monkeypatch.setattr(stopped, "look", lambda *_: time.sleep(5))
    for roll in (gone, stopped):
        assert "the store cannot be reached: torchrun, or without it rank 0," in (
            roll.explain(TIMED_OUT))


def fail():
    raise torch.distributed.DistNetworkError("Broken pipe")


def test_a_store_that_is_gone_does_not_end_a_run_that_still_saves(hook, monkeypatch):
    roll, _ = rolls(2)
    monkeypatch.setattr(roll, "store", torch.distributed.PrefixStore("x", roll.store))
    monkeypatch.setattr(torch.distributed.PrefixStore, "set", lambda *_: fail())
    roll.begin("sum")
    roll.begin("sum")
    assert roll.store is None


def test_only_errors_of_an_exchange_are_explained(hook, monkeypatch, capsys):
    assert is_lost_exchange(CLOSED) and is_lost_exchange(torch.distributed.DistStoreError("x"))
    for error in (RuntimeError("shapes differ"), ValueError("/gloo/"), MemoryError()):
        assert not is_lost_exchange(error)
    missing.call_roll(torch.distributed.HashStore(), 0, 2)
    monkeypatch.setattr(missing.ROLL, "explain", lambda error: "rank(s) [1] of 2 gone")
    sys.excepthook(RuntimeError, RuntimeError("shapes differ"), None)
    assert capsys.readouterr().err == "RuntimeError: shapes differ\n"
    sys.excepthook(RuntimeError, CLOSED, None)
    assert capsys.readouterr().err == "error (rank 0): rank(s) [1] of 2 gone\n"
