"""Facts about plumbing/stop.py: a signal ends a run after its iteration, on all ranks."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ROOT, torchrun

from plumbing import stop as stopping
from plumbing.stop import SAME, SIGNALS, Stop

# A loop of short iterations. Rank 0 needs a second to save. With --suicide, a rank signals itself.
LOOP = f"""
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from plumbing import cli, dist
from plumbing.stop import Stop

@dataclass
class Config:
    # Rank that sends SIGTERM to itself: none of those there are.
    suicide: int = 9
    # Seconds of loading.
    load: float = 0.0

def main(cfg):
    rank, _, _ = dist.setup("cpu")
    print("loading", flush=True)
    time.sleep(cfg.load)
    stop = Stop()
    for it in range(200):
        Path(f"at{{rank}}").write_text(str(it))
        time.sleep(0.1)
        if rank == cfg.suicide and it == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.asked():
            if rank == 0:
                time.sleep(1)
            Path(f"saved{{rank}}").write_text(str(it + 1))
            stop.leave(it + 1, "state.pt", rank)

if __name__ == "__main__":
    cli.run(main, Config)
"""


@pytest.fixture
def ended(monkeypatch):
    """The codes of os._exit, which does nothing in the test."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def start(here, *argv, launch=()):
    (here / "loop.py").write_text(LOOP)
    command = [sys.executable, *launch, str(here / "loop.py"), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(path, process):
    for _ in range(600):
        if Path(path).exists():
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"no {path}: {process.communicate()}")


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_ends_a_run_after_its_iteration_with_one_line_and_its_code(here, signum):
    process = start(here)
    wait_for("at0", process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    done = Path("saved0").read_text()
    assert err == (f"stopped by {signum.name} after iteration {done}: state saved in state.pt; the "
                   "same command goes on\n")


def test_before_the_loop_ctrl_c_ends_a_run_at_once_with_one_line(here):
    process = start(here, "--load", "600")
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "stopped by Ctrl-C\n")


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(here):
    (here / "loop.py").write_text(LOOP)
    done = torchrun(2, here / "loop.py", "--suicide", "1")
    assert Path("saved0").read_text() == Path("saved1").read_text() == "3"
    assert done.stderr.count("stopped by SIGTERM after iteration 3:") == 1
    assert "exitcode  : 143" in done.stderr
    assert "Error" not in done.stderr.replace("ChildFailedError", "")


def test_torchrun_passes_a_signal_on_and_waits_until_the_ranks_have_saved(here):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
              "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    process = start(here, launch=launch)
    wait_for("at0", process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert Path("saved0").read_text() == Path("saved1").read_text()
    assert err.count("stopped by SIGTERM after iteration") == 1


def test_a_second_signal_ends_at_once_unless_it_is_the_first_one_again(ended):
    stop = Stop()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert not ended and stop.asked() and stop.signum == signal.SIGTERM
    stop.when -= SAME + 0.1
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_without_a_signal_nobody_is_asked_to_stop(ended):
    assert not Stop().asked()


@pytest.mark.parametrize("torchrun", [False, True])
def test_nohup_holds_except_under_torchrun_which_sends_signals_of_its_own(monkeypatch, torchrun):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = Stop()
    signal.raise_signal(signal.SIGHUP)
    assert stop.asked() == torchrun


@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_stop_when_torchrun_itself_is_gone(monkeypatch, torchrun):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = Stop()
    assert not stop.asked()
    monkeypatch.setattr(stopping.os, "getppid", lambda: stop.parent + 1)
    assert stop.asked() == torchrun, "a plain run outlives its shell"
