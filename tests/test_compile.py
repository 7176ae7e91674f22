"""Facts about --compile: what it computes, and when it compiles."""
import functools

import pytest
import torch
from tiny_runs import grpo, log, opd

import train_grpo
import train_opd


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """torch.compile traces graphs and guards them as always, but runs them without a compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile",
                        functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    yield
    torch._dynamo.reset()


def graphs(monkeypatch, script):
    """A list that gets the number of graphs at the end of each iteration."""
    found = []
    real = script.Log.__call__

    def write(self, row, pictures=None):
        found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return real(self, row, pictures)

    monkeypatch.setattr(script.Log, "__call__", write)
    return found


@pytest.mark.parametrize("stage", [grpo, opd])
def test_nothing_is_compiled_anew_after_warm_up(stage, teachers, monkeypatch):
    """Pieces have many sizes. After two of them, a graph takes any size."""
    script, options = train_opd, {"teachers": teachers}
    if stage is grpo:
        script, options = train_grpo, {"tasks": ["ocr"]}
    found = graphs(monkeypatch, script)
    stage(**options, compile=True, iters=8, batch=24, micro=7, noisy=[0, 3], updates=2)
    assert found[0] > 0 and found[3] == found[-1], found


def test_a_compiled_run_is_the_same_run(teachers):
    for compile in (False, True):
        opd(teachers=teachers, compile=compile, iters=2, name=f"opd{compile:d}")
    for plain, compiled in zip(log("opd0"), log("opd1")):
        assert plain["kl"] == pytest.approx(compiled["kl"], rel=1e-4)
