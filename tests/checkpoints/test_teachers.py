"""Facts about checkpoints/teachers.py: the names of teachers, the anchor, and other sizes."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from mini_sd3 import randomise
from safetensors.torch import save_file
from tiny_runs import BASE, log, make_teacher, opd

import worlds
from checkpoints.teachers import attach, find_anchor, read_teachers
from model import MMDiT, load_mmdit
from sampler import Policy, Text, draw_noise, encode
from train_opd import Config, Teachers


@pytest.mark.parametrize("task", ["ocr.v2", "student", "training", "base"])
def test_a_task_that_cannot_name_an_adapter_is_refused(here, task):
    net = worlds.load(BASE).mmdit
    path = make_teacher(here / "x.pt", task)
    message = f"x.pt: '{task}' cannot be the name of an adapter; expected a task of another name"
    with pytest.raises(ValueError, match=message):
        read_teachers([path], net, [task])


def test_teachers_are_attached_under_the_names_of_their_tasks(here):
    net = worlds.load(BASE).mmdit
    paths = [make_teacher(here / f"{task}.pt", task, seed) for seed, task in enumerate("ab")]
    teachers = read_teachers(paths, net, ["a", "b"])
    known = attach(teachers, net)
    assert list(known) == ["a", "b"] and known["a"] != known["b"]
    for layer in net.lora_layers().values():
        assert set(layer.A) == {"a", "b"}


def test_the_anchor_is_the_marked_teacher_or_the_one_that_is_named_or_the_base():
    teachers = {"ocr": {"anchor": False}, "quality": {"anchor": True}}
    assert find_anchor("", 0.1, teachers) == "quality"
    assert find_anchor("ocr", 0.1, teachers) == "ocr"
    assert find_anchor("base", 0.1, teachers) == "base"
    assert find_anchor("", 0, teachers) is None
    for name, lam in (("base", 0), ("geneval", 0.1)):
        with pytest.raises(ValueError, match=rf"^--anchor {name}: .*\(ocr, quality, base\), and"):
            find_anchor(name, lam, teachers)
    with pytest.raises(ValueError, match="^0 of the teachers are marked .*--anchor base, or"):
        find_anchor("", 0.1, {"ocr": {"anchor": False}})


# ------------------------------------------------------------------ teachers of another size


@pytest.fixture
def large(here):
    """The path of a teacher of ocr: a random transformer, wider and less deep than the base."""
    cfg = dataclasses.replace(load_mmdit(BASE).cfg, depth=2, width=192, head_dim=64, pos_max=5,
                              dual=0)
    path = here / "large.safetensors"
    save_file(randomise(MMDiT(cfg)).state_dict(), path, {"task": "ocr"})
    return str(path)


def test_states_are_routed_to_a_teacher_of_another_size(here, large):
    net = worlds.load(BASE).mmdit
    loaded = read_teachers([large, make_teacher(here / "q.pt", "quality")], net,
                           ["ocr", "quality"], side=8)
    attach(loaded, net)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=g)
    t = torch.tensor([0.9, 0.5, 0.3, 0.1])
    text = Text(*(torch.randn(4, *shape, generator=g)
                  for shape in ((3, 64), (64,), (3, 64), (64,))))
    own = load_mmdit(large)
    s = SimpleNamespace(x=x, t=t, images=torch.arange(4))
    task = torch.tensor([0, 1, 0, 1])                   # ocr, quality, ocr, quality
    v, _ = Teachers(loaded, net, None, Config(guidance=2.0))(s, text, task)
    for rows, policy in (([0, 2], Policy(own, None, 2.0)), ([1, 3], Policy(net, "quality", 2.0))):
        want = policy(x[rows], t[rows], text.rows(torch.tensor(rows)))
        torch.testing.assert_close(v[rows], want, rtol=1e-4, atol=1e-5)
    v_base = Policy(net, None, 2.0)(x, t, text)
    target, _ = Teachers(loaded, net, None, Config(guidance=2.0, extrapolate=1.5))(s, text, task)
    torch.testing.assert_close(target, v_base + 1.5 * (v - v_base))


@pytest.mark.parametrize("anchor, passes", [("quality", 5), ("base", 6), (None, 3)])
def test_target_and_anchor_are_each_asked_once_a_state(here, anchor, passes):
    """Where the anchor is the prompt's own teacher, that is one forward pass and not two."""
    net = worlds.load(BASE).mmdit
    paths = [make_teacher(here / f"{task}.pt", task) for task in ("ocr", "quality")]
    loaded = read_teachers(paths, net, ["ocr", "quality"])
    attach(loaded, net)
    teachers = Teachers(loaded, net, anchor, Config(micro=4))
    text = Text(*(torch.randn(3, *shape) for shape in ((3, 64), (64,), (3, 64), (64,))))
    s = SimpleNamespace(x=torch.randn(3, *worlds.load(BASE).latent_shape()), images=torch.arange(3),
                        t=torch.tensor([0.9, 0.5, 0.3]))
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    v, v_anchor = teachers(s, text, torch.tensor([0, 1, 0]))
    assert sum(sizes) == passes and max(sizes) <= 4
    close = dict(rtol=1e-4, atol=1e-5)
    by_name = {name: Policy(net, name)(s.x, s.t, text) for name in ("ocr", "quality")}
    torch.testing.assert_close(v[1], by_name["quality"][1], **close)
    torch.testing.assert_close(v[[0, 2]], by_name["ocr"][[0, 2]], **close)
    if anchor == "quality":
        torch.testing.assert_close(v_anchor, by_name["quality"], **close)
    if anchor == "base":
        torch.testing.assert_close(v_anchor, Policy(net)(s.x, s.t, text), **close)
    assert (v_anchor is None) == (anchor is None)


def test_a_teacher_of_another_size_is_the_target_of_guided_folded_and_extrapolated_runs(large):
    """One iteration from a student that is the base. Its first states are noise, known here."""
    run = dict(teachers=[large], init="none", lora_r=4, lora_alpha=8.0, lam=0, guidance=2.0,
               iters=1, batch=4, steps=2, noisy=[0, 2])
    opd(name="guided", **run)
    opd(name="beyond", extrapolate=3.0, **run)
    opd(name="fold", match="fold", **run)
    kl = {name: log(name)[-1]["kl_first"] for name in ("guided", "beyond", "fold")}

    world = worlds.open_world(BASE)
    model = world.load(BASE)
    asked = [meta["prompt"] for meta in world.batch(["ocr"], 2, 0, 0, "batch") for _ in range(2)]
    text = encode(model.text, asked)
    x = draw_noise([(0, 0, i) for i in range(4)], 2, model.latent_shape())[:, 0]
    v_target = Policy(load_mmdit(large), None, 2.0)(x, torch.ones(4), text)
    guided = Policy(model.mmdit, None, 2.0)(x, torch.ones(4), text)
    unguided = Policy(model.mmdit, None, 1.0)(x, torch.ones(4), text)
    folded = (unguided - v_target).square().mean() / (guided - v_target).square().mean()
    assert kl["guided"] > 0
    assert kl["beyond"] == pytest.approx(9 * kl["guided"], rel=1e-3)
    assert kl["fold"] == pytest.approx(folded.item() * kl["guided"], rel=1e-3)


def test_a_teacher_that_cannot_see_the_latents_is_refused_early(large):
    net = worlds.load(BASE).mmdit
    for side in (12, 7):
        message = (f"large.safetensors: is a transformer with patches of 2 and a position table of "
                   f"5 x 5, into which latents of {side} x {side} do not fit$")
        with pytest.raises(ValueError, match=message):
            read_teachers([large], net, ["ocr"], side=side)
    assert list(read_teachers([large], net, ["ocr"], side=10)) == ["ocr"]


def test_no_student_starts_from_a_teacher_of_another_size(large):
    for full in (False, True):
        with pytest.raises(ValueError, match="^--init merge: needs transformers of the shape of"):
            opd(teachers=[large], lam=0, iters=1, full=full)
