"""Fixtures of all tests."""
import pytest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs write to the current folder: a fresh one a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def teachers(here):
    """The paths of three random teachers of the tiny world. The one of quality is the anchor."""
    from tiny_runs import make_teacher

    from worlds.tiny_prompts import TASKS

    paths = []
    for seed, task in enumerate(TASKS):
        path = make_teacher(here / f"ckpt/{task}.pt", task, seed, anchor=task == "quality")
        paths.append(path)
    return paths
