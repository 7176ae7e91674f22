"""Fixtures of all tests."""
import signal

import pytest


@pytest.fixture(autouse=True)
def handlers():
    """Gives this process its signal handlers back. A run in it leaves those of a Stop.

    What nohup or a background shell ignores is listened to in a test, and in what it starts.
    """
    from plumbing.stop import SIGNALS

    kept = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in kept.items():
        if handler == signal.SIG_IGN:
            ordinary = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
            signal.signal(signum, ordinary)
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs write to the current folder: a fresh one a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def teachers(here):
    """The paths of random teachers, one of each task of the tiny world. Quality's is the anchor."""
    from tiny_runs import make_teacher

    from worlds.tiny_prompts import TASKS

    paths = []
    for seed, task in enumerate(TASKS):
        path = make_teacher(here / f"ckpt/{task}.pt", task, seed, anchor=task == "quality")
        paths.append(path)
    return paths
