"""Facts about plumbing/state.py: a run resumes from what fits it, at one iteration on all ranks."""
import pytest
import torch
from tiny_runs import ROOT, expect_success, torchrun
from torch import nn

from plumbing.files import write_pt
from plumbing.state import restore, resume, save_state

# What each of two nodes finds on its own disk: the iteration of a state, or None.
FOUND = {"only-first": (2, None), "only-second": (None, 2), "both": (4, 2), "same": (3, 3),
         "none": (None, None)}

NODES = """
import os
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from plumbing import dist
from plumbing.state import resume

rank, _, _ = dist.setup("cpu")
os.chdir(f"node{rank}")
for name in sys.argv[2:]:
    try:
        state = resume(f"runs/{name}/state.pt", {"lr": 1.0}, "base")
        said = str(state and state["iter"])
    except ValueError as error:
        said = str(error)
    Path(f"{name}.txt").write_text(said)
"""


def write_state(path, done, **settings):
    write_pt(path, {"iter": done, "settings": {"lr": 1.0, **settings}, "base": "base"})


def test_ranks_resume_at_one_iteration_or_all_stop_with_one_line(here):
    for name, found in FOUND.items():
        for rank, done in enumerate(found):
            (here / f"node{rank}").mkdir(exist_ok=True)
            if done:
                write_state(here / f"node{rank}/runs/{name}/state.pt", done)
    (here / "nodes.py").write_text(NODES)
    expect_success(torchrun(2, here / "nodes.py", str(ROOT), *FOUND))
    for name, found in FOUND.items():
        first, second = [(here / f"node{rank}/{name}.txt").read_text() for rank in (0, 1)]
        assert first == second, "every rank says the same"
        if found[0] == found[1]:
            assert first == str(found[0])
        else:
            assert first == (f"runs/{name}/state.pt: rank 0 resumes at iteration {found[0] or 0}, "
                             f"rank 1 at {found[1] or 0}; expected runs/{name} on a disk that all "
                             "nodes see")


def test_one_process_resumes_what_it_finds(tmp_path):
    path = tmp_path / "run" / "state.pt"
    assert resume(path, {"lr": 1.0}, "base") is None
    write_state(path, 5)
    assert resume(path, {"lr": 1.0}, "base")["iter"] == 5
    with pytest.raises(ValueError, match="holds a run of 5 iterations, more than --iters 4"):
        resume(path, {"lr": 1.0, "iters": 4}, "base", free=["iters"])


def test_a_run_with_another_base_says_model_once(tmp_path):
    path = tmp_path / "run" / "state.pt"
    write_state(path, 5, model="a")
    with pytest.raises(ValueError, match="holds a run with another model; give this run another"):
        resume(path, {"lr": 1.0, "model": "b"}, "another base")


@pytest.mark.parametrize("name", ["micro", "world_size"])
def test_the_images_of_a_forward_pass_are_fixed_where_they_are_part_of_the_loss(tmp_path, name):
    path = tmp_path / "run" / "state.pt"
    for objective in ("kl", "released"):
        settings = {"lr": 1.0, "objective": objective, name: 4}
        write_state(path, 5, **settings)
        assert resume(path, settings, "base")["iter"] == 5
        settings[name] = 2
        if objective == "kl":
            assert resume(path, settings, "base")["iter"] == 5
        else:
            with pytest.raises(ValueError, match=f"holds a run with another {name};"):
                resume(path, settings, "base")


def make_net():
    """Two layers, of which one learns, and its optimiser."""
    frozen = nn.Linear(2, 2).requires_grad_(False)
    net = nn.ModuleDict({"frozen": frozen, "learns": nn.Linear(2, 3)})
    opt = torch.optim.AdamW(net["learns"].parameters(), lr=1e-2)
    net["learns"](torch.ones(1, 2)).sum().backward()
    opt.step()
    return net, opt


@pytest.mark.parametrize("change, message", [
    (dict(drop="learns.bias"), r"state.pt: tensor 'learns.bias' is missing, expected \(3,\)"),
    (dict(add="learns.more"), r"state.pt: tensor 'learns.more' is \(1,\), expected no such tensor"),
    (dict(add="frozen.bias"), r"state.pt: tensor 'frozen.bias' is \(1,\), expected no such tensor"),
], ids=["missing", "superfluous", "frozen"])
def test_a_state_holds_exactly_the_weights_that_learn(tmp_path, change, message):
    path = tmp_path / "run" / "state.pt"
    net, opt = make_net()
    save_state(path, net, opt, 0, iter=5, settings={}, base="base")
    state = resume(path, {}, "base")
    assert restore(state, *make_net()) == 5 and not state
    state = resume(path, {}, "base")
    state["weights"].pop(change.get("drop"), None)
    if "add" in change:
        state["weights"][change["add"]] = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        restore(state, *make_net())
