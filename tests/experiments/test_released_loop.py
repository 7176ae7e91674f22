"""The released loop, made again: its loss is --objective released, and its batch order theirs."""
import json
from pathlib import Path

import pytest
import torch
from tiny_runs import BASE, make_teacher

import sampler
import train_opd
import worlds
from checkpoints.teachers import read_teachers
from experiments import bench, bench_loop, released_loop
from model import MMDiT
from worlds.prompts import read_mix
from worlds.tiny_prompts import TASKS

SIZES = dict(batch=8, group=2, micro=2, steps=4, lora_r=4, lora_alpha=8.0, score=False,
             drop=False, device="cpu")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return [make_teacher(folder / f"{task}.pt", task, seed, anchor=task == "quality")
            for seed, task in enumerate(TASKS)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_loop(teachers, **options):
    world = worlds.open_world(BASE)
    model = world.load(BASE)
    cfg = released_loop.Config(model=BASE, teachers=teachers, **{**SIZES, **options})
    read = read_teachers(teachers, model.mmdit, world.tasks)
    mix = read_mix(cfg.ratio, list(read), world.ratio)
    return released_loop.Loop(model, world, read, "quality", mix, cfg), world, read


def prompts_of(world, n=8):
    return [meta for meta in world.batch(["geneval"], n // 2, 0, 0, "batch") for _ in range(2)]


def gradients(params):
    return torch.cat([p.grad.flatten() for p in params])


def test_its_gradient_is_that_of_objective_released(teachers):
    """On the same states, with the anchor's KL as released: without dt."""
    loop, world, read = make_loop(teachers)
    with torch.no_grad():
        for p in loop.params:
            p.add_(0.02 * torch.randn_like(p))
    samples, _ = loop.sample(prompts_of(world), 0)
    part = samples[:2]
    for k in range(loop.trained):
        loss = loop.state_loss(part, k, "ocr")
        loss.backward()
        theirs = gradients(loop.params)
        loop.opt.zero_grad()

        x, x_next, logp_old, text = released_loop.together(part, k)
        steps = torch.full((2,), k)
        rule = sampler.Sampler(loop.times, "sde", released_loop.A, range(4))
        s = sampler.State(torch.arange(2), steps, steps, x, x_next, logp_old, rule)
        for task in ("ocr", "quality"):                 # as train_opd.py has them
            if task not in loop.student.lora_layers()["joint_blocks.0.x_block.attn.proj"].A:
                teacher = read[task]
                loop.student.add_adapter(task, teacher["r"], teacher["alpha"], teacher["tensors"])
        with torch.no_grad():
            s.v_target = sampler.Policy(loop.student, "ocr")(x, s.t, text)
            v_anchor = sampler.Policy(loop.student, "quality")(x, s.t, text)
        v = sampler.Policy(loop.student, "student")(x, s.t, text)
        cfg = train_opd.Config(objective="released")
        ours = train_opd.released(v, s, cfg).mean()
        ours = ours + loop.cfg.beta * (sampler.kl(v, v_anchor, s) * s.dt).mean()
        ours.backward()
        assert loss.item() == pytest.approx(ours.item(), rel=1e-4, abs=1e-9)
        distance = (gradients(loop.params) - theirs).norm() / theirs.norm()
        assert distance < 1e-3
        loop.opt.zero_grad()


def test_an_advantage_is_at_most_five():
    mean = torch.zeros(2, 1, 2, 2)
    far = torch.full_like(mean, 100.0)
    zeros = torch.zeros(2)
    loss = released_loop.loss_of(mean, zeros, far, mean, zeros, torch.tensor(1.0), beta=0.04)
    assert loss.item() == 5.0


def test_passes_are_three_a_trained_step_in_every_inner_epoch(teachers, monkeypatch):
    loop, world, _ = make_loop(teachers, inner_epochs=2)
    loop_nets = {id(loop.student): "student", id(loop.teachers["geneval"]): "teacher",
                 id(loop.anchor): "anchor"}
    seen = []
    real = MMDiT.forward

    def forward(net, x, *rest):
        seen.append((loop_nets[id(net)], len(x), torch.is_grad_enabled()))
        return real(net, x, *rest)

    monkeypatch.setattr(MMDiT, "forward", forward)
    loop.iteration(prompts_of(world), 0)
    rollout, training = seen[:16], seen[16:]            # 4 batches of 2, 4 steps
    assert rollout == [("student", 2, False)] * 16
    order = [("student", 2, True), ("teacher", 2, False), ("anchor", 2, False)]
    assert training == order * 3 * 4 * 2                # 3 trained steps, 4 batches, 2 epochs
    assert loop.updates == 4


def test_every_teacher_with_prompts_and_the_anchor_are_whole_copies_in_float32(teachers):
    loop, _, _ = make_loop(teachers)
    assert list(loop.teachers) == ["geneval", "ocr", "preference"], "quality has no prompts"
    nets = [loop.student, loop.anchor, *loop.teachers.values()]
    weights = [net.joint_blocks[0].x_block.mlp.fc1.weight for net in nets]
    assert len({weight.data_ptr() for weight in weights}) == 5
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_images_without_an_advantage_are_dropped_and_batches_stay_equal(teachers):
    loop, _, _ = make_loop(teachers, score=True, drop=True)
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 0])  # the first and third pair score alike
    assert loop.kept(rewards).tolist() == [2, 3, 6, 7]
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0])
    kept = loop.kept(rewards).tolist()                  # two more fill the four batches
    assert len(kept) == 4 and {2, 3} < set(kept)
    with pytest.raises(ValueError, match="--drop: every image has the advantage 0"):
        loop.kept(torch.zeros(8))


def test_a_run_writes_a_log_that_says_seconds_and_the_part_trained_on(teachers, here):
    rows = released_loop.main(released_loop.Config(model=BASE, teachers=teachers, iters=2,
                                                   **{**SIZES, "score": True}))
    written = Path("runs/released/log.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in written] == rows and len(rows) == 2
    assert rows[0]["trained"] == 1.0 and rows[0]["s/it"] > 0


def test_passes_of_both_loops_are_counted_on_the_real_scripts(teachers, here):
    """Ours may skip the last two steps, and the anchor where it is the image's own teacher."""
    world = bench_loop.World(Path(BASE), teachers, 8, 2, 2, 4, r=4)
    cfg = bench.Config()
    theirs = bench_loop.their_options(world, cfg, 5, "theirs")
    assert bench_loop.passes_per_image(released_loop, theirs) == (4 + 3 * 2, 3)
    routed = ["geneval=2", "ocr=1", "preference=1", "quality=1"]
    for name, ratio, least in (("ours", world.ratio, 2 + 3 * 2), ("routed", routed, 2 + 3 * 1.8)):
        ours = bench_loop.our_options(world, cfg, 5, name, ratio=ratio)
        forward, both = bench_loop.passes_per_image(train_opd, ours)
        assert both == 3 and least - 1e-9 <= forward <= 4 + 3 * 2


@pytest.mark.parametrize("options, message", [
    (dict(batch=6, group=4), "--batch 6 --group 4 --micro 2: expected whole groups"),
    (dict(batch=8, micro=8), "an even number of forward passes"),
    (dict(drop=True), "--drop --no-score: without scores every advantage is 0")])
def test_what_the_loop_cannot_do_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        released_loop.main(released_loop.Config(**{**SIZES, **options}))
