"""Facts about plumbing/state.py: a run resumes from what fits it, at one iteration on all ranks."""
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT, expect_success, torchrun
from torch import nn

from plumbing import files
from plumbing import state as state_module
from plumbing.files import read_pt, write_pt
from plumbing.state import restore, resume, save_state, write_state

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


def write_old(path, done, **settings):
    write_pt(path, {"iter": done, "settings": {"lr": 1.0, **settings}, "base": "base"})


def test_ranks_resume_at_one_iteration_or_all_stop_with_one_line(here):
    for name, found in FOUND.items():
        for rank, done in enumerate(found):
            (here / f"node{rank}").mkdir(exist_ok=True)
            if done:
                write_old(here / f"node{rank}/runs/{name}/state.pt", done)
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
    write_old(path, 5)
    assert resume(path, {"lr": 1.0}, "base")["iter"] == 5
    with pytest.raises(ValueError, match="holds a run of 5 iterations, more than --iters 4"):
        resume(path, {"lr": 1.0, "iters": 4}, "base", free=["iters"])


def test_a_run_with_another_base_says_model_once(tmp_path):
    path = tmp_path / "run" / "state.pt"
    write_old(path, 5, model="a")
    with pytest.raises(ValueError, match="holds a run with another model; give this run another"):
        resume(path, {"lr": 1.0, "model": "b"}, "another base")


@pytest.mark.parametrize("name", ["micro", "world_size"])
def test_the_images_of_a_forward_pass_are_fixed_where_they_are_part_of_the_loss(tmp_path, name):
    path = tmp_path / "run" / "state.pt"
    for objective in ("kl", "released"):
        settings = {"lr": 1.0, "objective": objective, name: 4}
        write_old(path, 5, **settings)
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


def saved(path):
    """What resume gives of the state of make_net()."""
    save_state(path, *make_net(), 0, iter=5, settings={}, base="base")
    return resume(path, {}, "base")


def damage(state, change):
    """A change is (part, name or (name, slot), new tensor; None removes it, str renames it)."""
    part, name, new = change
    tensors = state[part]
    if part == "opt":
        tensors = tensors["state"]
        if isinstance(name, tuple):
            tensors = tensors[name[0]]
            name = name[1]
    old = tensors.pop(name, None)
    if isinstance(new, str):
        tensors[new] = old
    elif new is not None:
        tensors[name] = new


NAN = torch.tensor([0.0, float("nan"), 0.0])


@pytest.mark.parametrize("change, message", [
    (("weights", "learns.bias", None), r"tensor 'learns.bias' is missing, expected \(3,\)$"),
    (("weights", "learns.bias", "other"), r"tensor 'learns.bias' is missing, .*\(1 more do not"),
    (("weights", "learns.more", NAN), r"'learns.more' is \(3,\), expected no such tensor$"),
    (("weights", "frozen.bias", NAN), r"'frozen.bias' is \(3,\), expected no such tensor$"),
    (("weights", "learns.bias", NAN), r"'learns.bias' has a number that is not finite$"),
    (("weights", "learns.bias", 3), r"expected tensors with names, got something else"),
    (("opt", "learns.bias", None), r"'opt.learns.bias.exp_avg' is missing, expected \(3,\) \(2"),
    (("opt", "learns.bias", "other"), r"'opt.learns.bias.exp_avg' is missing, expected \(3,\)"),
    (("opt", ("learns.bias", "step"), None), r"'opt.learns.bias.step' is missing, expected \(\)$"),
    (("opt", ("learns.bias", "exp_avg"), NAN[:2]), r"exp_avg' is \(2,\), expected \(3,\)$"),
    (("opt", ("learns.bias", "exp_avg_sq"), NAN), r"exp_avg_sq' has a number that is not finite$"),
], ids=lambda value: "-".join(map(str, value[:2])) if isinstance(value, tuple) else "")
def test_a_state_holds_exactly_the_weights_that_learn_and_their_moments(tmp_path, change, message):
    path = tmp_path / "run" / "state.pt"
    state = saved(path)
    damage(state, change)
    net, opt = make_net()
    before = {name: p.clone() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"run/state\.pt: .*" + message):
        restore(state, net, opt)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), "nothing was put back"


@pytest.mark.parametrize("part", ["weights", "opt"])
@pytest.mark.parametrize("value", [{}, None, [1]], ids=str)
def test_a_state_without_weights_or_optimiser_is_refused(tmp_path, part, value):
    state = saved(tmp_path / "run" / "state.pt")
    state[part] = value
    with pytest.raises(ValueError, match=r"run/state\.pt: "):
        restore(state, *make_net())
    del state[part]
    with pytest.raises(ValueError, match=rf"run/state\.pt: has no {part}; expected the state of"):
        restore(state, *make_net())


def test_an_optimiser_for_other_weights_is_refused(tmp_path):
    state = saved(tmp_path / "run" / "state.pt")
    state["opt"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="its optimiser is for other weights than those"):
        restore(state, *make_net())


def test_a_whole_state_is_put_back_and_emptied(tmp_path):
    state = saved(tmp_path / "run" / "state.pt")
    weight = state["weights"]["learns.weight"].clone()
    net, opt = make_net()
    assert restore(state, net, opt) == 5 and not state
    assert torch.equal(net["learns"].weight, weight)


# ------------------------------------------------------------------ the state before


def done_in(path):
    return read_pt(path, ["iter"])["iter"]


def numbered(done):
    return {"iter": done, "settings": {}, "base": "base", "weights": {}}


def test_the_state_before_the_newest_is_kept(tmp_path):
    path = tmp_path / "state.pt"
    for done in (1, 2, 3):
        write_state(path, numbered(done))
    assert (done_in(path), done_in(tmp_path / "state-before.pt")) == (3, 2)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_kill_at_any_moment_of_a_write_leaves_a_whole_state(tmp_path, monkeypatch, links):
    """A write makes four changes of files at most. It is cut before each of them in turn."""
    path = tmp_path / "state.pt"
    if not links:
        def refuse(*args):
            raise PermissionError("no links here")
        monkeypatch.setattr(state_module.Path, "hardlink_to", refuse)
    cuts = 0
    for cut in range(10):
        for old in tmp_path.iterdir():
            old.unlink()
        write_state(path, numbered(1))
        write_state(path, numbered(2))
        with monkeypatch.context() as patch:
            if not cut_write(patch, path, cut):
                break
        cuts += 1
        assert resume(path, {}, "base")["iter"] in (2, 3)
        write_state(path, numbered(4))
        assert resume(path, {}, "base")["iter"] == 4
    assert cuts >= 3


class Killed(BaseException):
    pass


def cut_write(patch, path, cut):
    """Write state 3, and stop before change number cut. Returns False if there were not so many."""
    changes = []

    def counted(real):
        def change(*args, **options):
            changes.append(real)
            if len(changes) == cut + 1:
                raise Killed
            return real(*args, **options)
        return change

    for name in ("unlink", "hardlink_to", "replace"):
        patch.setattr(state_module.Path, name, counted(getattr(state_module.Path, name)))
    patch.setattr(files.os, "replace", counted(files.os.replace))
    try:
        write_state(path, numbered(3))
    except Killed:
        return True
    return False


@pytest.mark.parametrize("content", [b"", b"half of a st", None], ids=["empty", "half", "missing"])
def test_a_state_that_cannot_be_read_falls_back_to_the_one_before_it(tmp_path, capsys, content):
    path = tmp_path / "state.pt"
    write_state(path, numbered(1))
    write_state(path, numbered(2))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert resume(path, {}, "base")["iter"] == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: ") and err.count("\n") == 1
    assert f"; the run goes on from {tmp_path}/state-before.pt, iteration 1" in err
    # The next write does not give up the only one that can be read.
    for cut in range(3):
        with pytest.MonkeyPatch.context() as patch:
            cut_write(patch, path, cut)
        assert done_in(tmp_path / "state-before.pt") == 1
    write_state(path, numbered(2))
    write_state(path, numbered(3))
    assert (done_in(path), done_in(tmp_path / "state-before.pt")) == (3, 2)


def test_a_damaged_state_with_none_before_it_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match="state.pt: "):
        resume(path, {}, "base")


@pytest.mark.parametrize("field, value", [("iter", "x"), ("settings", None)])
def test_a_state_with_odd_fields_is_refused(tmp_path, field, value):
    path = tmp_path / "state.pt"
    write_pt(path, {**numbered(1), field: value})
    with pytest.raises(ValueError, match="expected a number of iterations and settings"):
        resume(path, {}, "base")


def test_a_full_disk_is_one_line_and_the_old_state_stays(tmp_path):
    """A limit on the size of files acts like a full disk, in a process of its own."""
    (tmp_path / "full.py").write_text(FULL)
    done = subprocess.run([sys.executable, str(tmp_path / "full.py"), str(ROOT)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.startswith("state.pt: cannot be written (File too large); it takes 4.0 MB, ")
    assert "free there. What was saved before is whole: with more room, the sa" in done.stdout
    assert done.stdout.count("\n") == 1
    assert resume(tmp_path / "state.pt", {}, "base")["iter"] == 1
    assert not list(tmp_path.glob("*.tmp"))


FULL = """
import resource
import sys
sys.path.insert(0, sys.argv[1])
import torch
from plumbing.state import write_state

fields = {"settings": {}, "base": "base"}
write_state("state.pt", {"iter": 1, **fields})
resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
try:
    write_state("state.pt", {"iter": 2, "weights": {"a": torch.zeros(10 ** 6)}, **fields})
except ValueError as error:
    print(error)
"""
