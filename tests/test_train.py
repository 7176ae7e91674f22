"""Facts about training: stage 1, stage 2 and SFT, on the shipped base with a few images."""
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    BASE,
    OPD,
    ROOT,
    distance,
    grpo,
    log,
    make_teacher,
    opd,
    random_like,
    tensors,
)

import sampler
import train_grpo
import train_opd
import train_sft
import worlds
from checkpoints.formats import read
from checkpoints.teachers import attach, read_teachers
from plumbing.files import read_pt
from rewards import advantages
from sampler import (
    Policy,
    Sampler,
    draw_noise,
    encode,
    kl,
    log_prob,
    schedule,
    velocity,
    visited,
)
from worlds.tiny_prompts import TASKS

# ------------------------------------------------------------------ GRPO


def test_advantages_sum_to_zero_in_each_group_and_equal_groups_are_dropped():
    reward = torch.tensor([0.0, 1.0, 0.5, 0.7, 0.7, 0.7])
    task = torch.tensor([0, 0, 0, 1, 1, 1])
    adv, signal = advantages(reward, task, 3, "batch")
    assert adv.view(-1, 3).sum(1).abs().max() < 1e-6
    assert adv[1] > 0 > adv[0]
    assert signal.tolist() == [True] * 3 + [False] * 3
    assert adv[1] == pytest.approx(0.5 / reward.std(unbiased=False).item(), rel=1e-3)
    own, _ = advantages(reward, task, 3, "group")
    assert own[1] == pytest.approx(0.5 / reward[:3].std(unbiased=False).item(), rel=1e-3)


def test_the_rate_of_stage_1_is_constant_and_then_falls_linearly_to_zero():
    cfg = train_grpo.Config(lr=2.0, iters=10, decay=0.4)
    rates = [train_grpo.rate(it, cfg) for it in range(10)]
    assert rates == pytest.approx([2] * 7 + [1.5, 1, 0.5])
    constant = train_grpo.Config(lr=2.0, iters=10)
    assert [train_grpo.rate(it, constant) for it in range(10)] == [2] * 10


def test_at_half_the_rate_the_same_iteration_moves_the_weights_half_as_far(here):
    grpo(iters=2, tasks=["ocr"], keep=1, name="constant")
    grpo(iters=2, tasks=["ocr"], keep=1, name="falling", decay=1.0)
    first = tensors("runs/constant/adapter-1.pt")
    constant = tensors("runs/constant/adapter-2.pt")
    falling = tensors("runs/falling/adapter-2.pt")
    for name, start in first.items():
        step = constant[name] - start
        assert torch.allclose(falling[name] - start, step / 2, atol=1e-6)
    assert distance(constant, first) > 1e-4


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_ratio_is_one_before_the_first_update(here, kind):
    grpo(iters=1, tasks=["ocr"], micro=3, rollout=kind, noisy=[0, 2], name="r")
    assert log("r")[0]["ratio_err"] < 1e-5


def test_grpo_update_makes_better_than_average_images_more_likely(here):
    """One small step raises the log-probability where the advantage is positive.

    That is against the actions with a negative one, on the very trajectories of the update.
    """
    grpo(iters=1, batch=16, group=8, lr=1e-3, tasks=["quality"], beta=0.0, name="u", out="u.pt")
    model = worlds.load(BASE)
    world = worlds.open_world(BASE)
    model.mmdit.add_adapter("policy", 4, 8.0, tensors("u.pt"))
    prompts = [prompt for prompt in world.batch(["quality"], 2, 0, 0, "batch") for _ in range(8)]
    text = encode(model.text, [prompt["prompt"] for prompt in prompts])
    noise = draw_noise([(0, "grpo", 0, i) for i in range(16)], 4, model.latent_shape())
    sde = Sampler(schedule(4), "sde", 0.7, range(3))
    trajectory = sde.rollout(Policy(model.mmdit), noise, text)
    reward = torch.from_numpy(world.quality(model.images(trajectory.x[:, -1])))
    adv, _ = advantages(reward, torch.zeros(16), 8, "batch")
    policy = Policy(model.mmdit, "policy")
    change = torch.zeros(16)
    with torch.no_grad():
        for s in visited(trajectory, torch.arange(3).expand(16, -1), torch.arange(16), sde):
            mean, std = s.gaussian(policy(s.x, s.t, text))
            change += log_prob(s.x_next, mean, std) - s.logp_old
    assert (adv * change).mean() > 0


def test_grpo_writes_a_teacher_of_plain_tensors(here):
    grpo(iters=1, tasks=["quality"], anchor=True)
    assert not list(Path("ckpt").glob("*")), "the shipped teachers are written by --out alone"
    teacher = torch.load("runs/grpo-quality/adapter.pt", weights_only=True)
    assert teacher["task"] == "quality"
    assert teacher["anchor"]
    assert teacher["reward"] == {"quality": {"quality": 1.0}}
    assert teacher["base"] == worlds.load(BASE).fingerprint
    assert teacher["settings"]["lr"] == 5e-4


def test_grpo_mix_draws_prompts_in_the_ratio(here, monkeypatch):
    patterns = []
    real = worlds.world.World.batch

    def batch(self, pattern, n, seed, it, mix):
        prompts = real(self, pattern, n, seed, it, mix)
        patterns.append([prompt["task"] for prompt in prompts])
        return prompts

    monkeypatch.setattr(worlds.world.World, "batch", batch)
    grpo(iters=1, batch=20, group=2, tasks=["geneval", "ocr", "preference"],
         ratio=["geneval=3", "ocr=1", "preference=1"], mix="batch", name="mix")
    assert {"reward_geneval", "reward_ocr", "reward_preference"} <= set(log("mix")[0])
    counts = [patterns[-1].count(task) for task in ("geneval", "ocr", "preference")]
    assert counts == [6, 2, 2]
    assert Path("runs/mix/adapter.pt").exists()
    assert not list(Path("ckpt").glob("*.pt")), "a mix is no teacher"


# ------------------------------------------------------------------ OPD: gradients


def two_adapters(same):
    """The base with a teacher, and a student that is the same or another."""
    model = worlds.load(BASE)
    torch.manual_seed(0)
    net = model.mmdit
    net.add_adapter("seed", 4, 8.0)
    teacher = random_like(net.adapter("seed"))
    student = teacher if same else random_like(teacher)
    net.add_adapter("teacher", 4, 8.0, teacher)
    net.add_adapter("student", 4, 8.0, student, trainable=True)
    return model


def opd_gradient(model, kind="sde"):
    """The KL of the first three of four steps, and its gradient: every part that has one."""
    net = model.mmdit
    text = encode(model.text, ["a photo of a red circle", 'a sign that says "HAT"'])
    noise = draw_noise([(0,), (1,)], 4, model.latent_shape())
    stochastic = Sampler(schedule(4), kind, 0.7, range(4))
    student = Policy(net, "student")
    teacher = Policy(net, "teacher")
    trajectory = stochastic.rollout(student, noise, text)
    loss = 0
    for s in visited(trajectory, torch.arange(3).expand(2, -1), torch.arange(2), stochastic):
        v = student(s.x, s.t, text)
        with torch.no_grad():
            v_target = teacher(s.x, s.t, text)
        loss = loss + kl(v, v_target, s).sum()
    loss.backward()
    grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_student_equal_to_teacher_has_zero_opd_gradient(kind):
    loss, grad = opd_gradient(two_adapters(same=True), kind)
    assert loss == 0
    assert grad.abs().max() == 0
    loss, grad = opd_gradient(two_adapters(same=False), kind)
    assert loss > 0
    assert grad.abs().max() > 0


def test_only_the_student_gets_a_gradient():
    model = two_adapters(same=False)
    opd_gradient(model)
    named = model.mmdit.named_parameters()
    learn = {name.rsplit(".", 1)[1] for name, p in named if p.grad is not None}
    assert learn == {"student"}


# ------------------------------------------------------------------ OPD: whole runs


def test_opd_brings_the_student_to_its_teacher(here):
    """With one teacher and no anchor, the KL of a student from the base falls to a fraction."""
    teacher = str(ROOT / "ckpt/ocr.pt")
    opd(iters=25, batch=8, lr=2e-3, teachers=[teacher], init="none", lora_r=8, lam=0.0)
    kls = [row["kl"] for row in log("opd")]
    assert min(kls) > 0
    assert sum(kls[-3:]) < 0.5 * sum(kls[:3])


def test_cold_start_is_the_mean_of_the_teachers_updates(here, teachers):
    opd(iters=1, teachers=teachers)
    key = "joint_blocks.0.x_block.attn.qkv"

    def update(adapter, scale):
        return scale * adapter[key + ".B"] @ adapter[key + ".A"]

    mean = sum(update(tensors(path), 2.0) for path in teachers) / 4
    init = read_pt("runs/opd/init.pt", ["r"])
    assert init["r"] == 16
    assert torch.allclose(update(init["tensors"], init["alpha"] / init["r"]), mean, atol=1e-5)


def test_opd_leaves_the_teachers_alone(here, teachers):
    before = {path: Path(path).read_bytes() for path in teachers}
    opd(iters=1, teachers=teachers)
    assert sorted(str(path) for path in (here / "ckpt").glob("*")) == sorted(teachers)
    assert all(Path(path).read_bytes() == content for path, content in before.items())


ONLY_OCR = ["geneval=0", "ocr=1", "preference=0", "quality=0"]


@pytest.mark.parametrize("other", TASKS)
def test_a_prompt_is_pulled_to_the_teacher_of_its_own_task_and_to_no_other(here, teachers, other):
    """On OCR prompts and without an anchor, another OCR teacher makes another student.

    Another teacher of anything else does not.
    """
    options = dict(iters=1, teachers=teachers, init="none", lam=0.0, ratio=ONLY_OCR)
    opd(**options, name="before")
    make_teacher(here / f"ckpt/{other}.pt", other, seed=99)
    opd(**options, name="after")
    change = distance(tensors("runs/before/student.pt"), tensors("runs/after/student.pt"))
    if other == "ocr":
        assert change > 0
    else:
        assert change == 0


VARIANTS = [
    dict(objective="velocity"),
    dict(objective="pg"),
    dict(objective="pg", credit="future"),
    dict(objective="pg", step_reward="sampled"),
    dict(objective="pg", step_reward="sampled", credit="future"),
    dict(objective="released"),
    dict(rollout="ode"),
    dict(states="teacher"),
    dict(states="pictures"),
    dict(rollout="cps", noisy=[0, 2]),
    dict(rollout="ode", objective="velocity", one=True),
    dict(noisy=[0, 2], supervised=[1, 4]),
    dict(extrapolate=1.25),
    dict(blend=0.2),
    dict(guidance=2.0, match="fold"),
    dict(guidance=2.0, match="branches"),
    dict(init="truncate", lora_r=2),
    dict(init="factors"),
    dict(init="none"),
]


def name_of(variant):
    return "-".join(f"{option}={value}" for option, value in variant.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_variant_trains(here, teachers, variant):
    """It runs, changes the student, and logs the closed-form KL of the states it supervised."""
    opd(**{"iters": 1, **variant}, teachers=teachers)
    row = log("opd")[0]
    assert row["kl"] > 0
    assert row["grad_norm"] > 0
    assert distance(tensors("runs/opd/init.pt"), tensors("runs/opd/student.pt")) > 0


def test_credit_and_the_groups_baseline_reach_the_update(here, teachers, monkeypatch):
    """Three policy gradients from the same rollout differ.

    They are of the own reward, of future rewards, and of the own one without a baseline.
    """
    options = dict(iters=1, teachers=teachers, objective="pg", step_reward="sampled", lam=0.0,
                   batch=2)
    opd(**options, name="own")
    opd(**options, name="future", credit="future")
    monkeypatch.setattr(train_opd, "credited", lambda reward, group, credit: reward)
    opd(**options, name="bare")
    own = tensors("runs/own/student.pt")
    assert distance(own, tensors("runs/future/student.pt")) > 0
    assert distance(own, tensors("runs/bare/student.pt")) > 0


@pytest.mark.parametrize("step_reward, credit", [("sampled", "future"), ("dense", "step")])
def test_policy_gradient_gets_each_supervised_steps_own_numbers(here, teachers, monkeypatch,
                                                                step_reward, credit):
    """Before the first update the ratio is 1 at every step.

    And the advantage is the credited reward of these very steps.
    """
    seen = []                       # (v, s), in the order of the steps

    def spy(v, s, cfg):
        seen.append((v.detach(), s))
        return train_opd.pg(v, s, cfg)

    monkeypatch.setitem(train_opd.OBJECTIVES, "pg", spy)
    cfg = train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers, objective="pg", credit=credit,
                           step_reward=step_reward, lam=0.0, supervised=[1, 4], micro=8)
    train_opd.main(cfg)
    states = [s for _, s in seen]
    assert [len(s.x) for s in states] == [8, 8, 8]
    assert all(torch.equal(s.x_next, later.x) for s, later in zip(states, states[1:]))
    rewards = []
    for v, s in seen:
        torch.testing.assert_close(log_prob(s.x_next, *s.gaussian(v)), s.logp_old)
        rewards.append(train_opd.step_reward(dataclasses.replace(s, v_old=v), step_reward))
    want = train_opd.credited(torch.stack(rewards, 1), 2, credit)
    got = torch.stack([s.adv for s in states], 1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    train_opd.main(dataclasses.replace(cfg, name="two", updates=2))
    row = log("two")[0]             # the second update's ratios are not 1
    assert row["ratio_err"] < 1e-5
    assert 0 < row["clip_frac"] <= 1


# ------------------------------------------------------------------ OPD: targets


def test_targets_are_the_routed_blended_and_extrapolated_velocities(here, teachers):
    model = worlds.load(BASE)
    net = model.mmdit
    loaded = {}
    for path in teachers:
        teacher = read(path, net)
        loaded[teacher["task"]] = teacher
        net.add_adapter(teacher["task"], teacher["r"], teacher["alpha"], teacher["tensors"])
    text = encode(model.text, ["a photo of a red circle"] * 4)
    x = torch.randn(4, *model.latent_shape())
    t = torch.full((4,), 0.6)
    task = torch.tensor([2, 0, 1, 3])

    def target(**options):
        cfg = train_opd.Config(guidance=2.0, **options)
        s = SimpleNamespace(x=x, t=t, images=torch.arange(4))
        return train_opd.Teachers(loaded, net, None, cfg)(s, text, task)[0]

    base = velocity(net, x, t, text, 2.0)
    by_task = torch.stack([velocity(net, x, t, text, 2.0, name) for name in loaded])
    own = by_task[task, torch.arange(4)]
    others = (by_task.sum(0) - own) / 3
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(), own, **close)
    torch.testing.assert_close(target(blend=0.3), 0.7 * own + 0.3 * others, **close)
    torch.testing.assert_close(target(extrapolate=1.5), base + 1.5 * (own - base), **close)
    null, cond = target(match="branches").chunk(2, 1)
    torch.testing.assert_close(null + 2.0 * (cond - null), own, **close)
    assert not torch.allclose(null, cond)


def test_folded_student_runs_without_guidance_and_its_teachers_with_it(here, teachers, monkeypatch):
    seen = set()                    # (guidance, who), of every velocity
    rolled = set()                  # the guidance of every rollout
    real_velocity = sampler.velocity
    real_rollout = Sampler.rollout

    def spy(net, x, t, text, guidance=1.0, adapter=None):
        seen.add((guidance, "student" if adapter == "student" else "teacher"))
        return real_velocity(net, x, t, text, guidance, adapter)

    def rollout(self, policy, *given):
        rolled.add((policy.guidance, policy.adapter))
        return real_rollout(self, policy, *given)

    monkeypatch.setattr(sampler, "velocity", spy)
    monkeypatch.setattr(Sampler, "rollout", rollout)
    opd(iters=1, teachers=teachers, guidance=2.0, match="fold")
    assert seen == {(1.0, "student"), (2.0, "teacher")}
    assert rolled == {(1.0, "student")}


def test_mar_is_felt_on_every_task_and_absent_without_lam(here, teachers):
    for lam in (0.0, 1.0):
        opd(iters=1, teachers=teachers, lam=lam, name=f"lam{lam}", ratio=ONLY_OCR)
    without = tensors("runs/lam0.0/student.pt")
    anchored = tensors("runs/lam1.0/student.pt")
    assert any(not torch.equal(without[name], anchored[name]) for name in without)
    assert log("lam0.0")[0]["kl_anchor"] == 0
    row = log("lam1.0")[0]
    assert row["kl_anchor"] > 0
    assert "kl_ocr" in row
    assert "kl_geneval" not in row


# ------------------------------------------------------------------ SFT


def test_sft_brings_the_student_to_its_teachers_pictures(here, teachers, monkeypatch):
    """The loss on the teachers' pictures falls below the base's.

    It resumes bit-exactly, and its result is a cold start of stage 2.
    """
    options = dict(model=BASE, teachers=teachers, samples=40, steps=3, iters=40, batch=16, lora_r=8,
                   lora_alpha=16.0, lr=3e-3, device="cpu", save_every=20)
    train_sft.main(train_sft.Config(**options))
    losses = [row["loss"] for row in log("sft")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    whole = tensors("runs/sft/student.pt")
    calls = []
    real = train_sft.flow_loss

    def stopped(*args):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_sft, "flow_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(train_sft.Config(**options, name="cut"))
    train_sft.main(train_sft.Config(**options, name="cut"))
    assert len(calls) == 25 + 20, "the second half only"
    assert distance(whole, tensors("runs/cut/student.pt")) == 0
    opd(iters=1, teachers=teachers, init="runs/sft/student.pt")
    assert distance(whole, tensors("runs/opd/init.pt")) == 0


def test_sft_from_the_merge_starts_where_stage_2_does(here, teachers):
    train_sft.main(train_sft.Config(model=BASE, teachers=teachers, samples=4, steps=2, iters=1,
                                    batch=4, init="merge", lr=1e-12, device="cpu"))
    opd(iters=1, teachers=teachers)
    assert distance(tensors("runs/sft/student.pt"), tensors("runs/opd/init.pt")) < 1e-6


def test_sft_leaves_out_a_task_without_a_share(here, teachers):
    """Its teacher draws nothing; nor does it on a rank that has none of its prompts."""
    options = dict(model=BASE, teachers=teachers, samples=6, steps=2, iters=1, batch=4, lora_r=2,
                   lora_alpha=4.0, device="cpu",
                   ratio=["geneval=0", "ocr=1", "preference=1", "quality=0"])
    train_sft.main(train_sft.Config(**options))
    assert log("sft")[0]["loss"] > 0
    assert len(read_pt("runs/sft/samples.pt")["latents"]) == 6


def test_of_n_pictures_of_a_prompt_the_one_with_the_highest_reward_is_kept(here):
    model = worlds.load(BASE)
    loaded = read_teachers([make_teacher(here / "t.pt", "ocr")], model.mmdit, ["ocr"])
    attach(loaded, model.mmdit)
    prompts = [{"prompt": f'a sign that says "{word}"', "task": "ocr"} for word in ("HAT", "TAX")]
    seen = []

    def judge(task, latents, asked):
        seen.append(latents)
        return latents.mean((1, 2, 3))

    cfg = train_sft.Config(samples=2, steps=2, best=4)
    kept = train_sft.draw_pictures(cfg, model, loaded, prompts, judge, 0, 1, torch.device("cpu"))
    drawn = torch.stack(seen)                                     # (4, 2, C, H, W)
    assert torch.equal(kept.mean((1, 2, 3)), drawn.mean((2, 3, 4)).max(0).values)
    one = train_sft.draw_pictures(train_sft.Config(samples=2, steps=2), model, loaded, prompts,
                                  None, 0, 1, torch.device("cpu"))
    assert torch.equal(one, drawn[0])


def test_flow_loss_is_zero_for_the_true_velocity():
    x_0 = torch.randn(3, 4, 8, 8)
    eps = torch.randn(3, 4, 8, 8)
    t = torch.tensor([0.1, 0.5, 0.9])

    def net(x_t, t, context, pooled, adapter):
        wide = t.view(3, 1, 1, 1)
        torch.testing.assert_close(x_t, (1 - wide) * x_0 + wide * eps)
        return eps - x_0

    text = encode(worlds.load(BASE).text, [""] * 3)
    assert train_sft.flow_loss(net, x_0, t, eps, text, None).abs().max() < 1e-10
