"""Variants of both stages: where a run starts, which steps and images it trains on, its dtype."""
import pytest
import torch
from tiny_runs import (
    BASE,
    distance,
    expect_success,
    grpo,
    log,
    make_teacher,
    opd,
    tensors,
    torchrun,
)

import rewards
import train_grpo
import train_opd
import worlds
from checkpoints.teachers import attach, read_teachers
from plumbing import dist
from plumbing.files import read_pt
from sampler import Policy, Sampler, draw_noise, encode, noisy_steps, sample, schedule


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------ where a run starts


def test_grpo_goes_on_from_an_adapter_with_its_rank_and_alpha():
    teacher = make_teacher("ocr.pt", "ocr", r=4, alpha=8.0)
    grpo(tasks=["ocr"], init=teacher, lora_r=None, lora_alpha=None, lr=1e-9, iters=1)
    result = read_pt("runs/grpo-ocr/adapter.pt", ["r", "alpha"])
    assert (result["r"], result["alpha"]) == (4, 8.0)
    assert distance(tensors("runs/grpo-ocr/adapter.pt"), tensors(teacher)) < 1e-7


def test_a_weighted_merge_with_all_the_weight_on_one_teacher_starts_as_this_teacher():
    one = make_teacher("ocr.pt", "ocr", seed=1)
    two = make_teacher("quality.pt", "quality", seed=2, anchor=True)
    opd(teachers=[one, two], init="factors", merge=["ocr=1", "quality=0"], iters=1)
    assert distance(tensors("runs/opd/init.pt"), tensors(one)) == 0


def test_an_anchor_that_is_the_base_pulls_the_student_to_the_base():
    """All the weight on the anchor, so only the distance to the base is trained."""
    teacher = make_teacher("ocr.pt", "ocr")
    opd(teachers=[teacher], anchor="base", lam=1000.0, lr=1e-3, iters=4)
    rows = log("opd")
    assert rows[-1]["kl_anchor"] < 0.8 * rows[0]["kl_anchor"]
    assert rows[0]["kl"] < 1e-9 < rows[-1]["kl"], "it leaves the teacher that it started as"


# ------------------------------------------------------------------ a random window


def window_config(**options):
    return train_grpo.Config(**{"steps": 8, "noisy": [1, 6], "window": 2, **options})


def test_a_window_lies_in_the_noisy_steps_and_takes_every_place():
    cfg = window_config()
    drawn = [noisy_steps(cfg, it) for it in range(200)]
    assert {(steps.start, steps.stop) for steps in drawn} == {(1, 3), (2, 4), (3, 5), (4, 6)}
    assert drawn == [noisy_steps(cfg, it) for it in range(200)], "it depends on seed and iteration"
    assert noisy_steps(window_config(window=0), 7) == range(1, 6)


@pytest.mark.parametrize("stage", [grpo, opd])
def test_with_a_window_only_its_steps_are_trained(stage, monkeypatch):
    seen = []
    script = train_grpo if stage is grpo else train_opd
    real = script.visited

    def visited(trajectory, steps, images, sampler):
        moved = trajectory.logp.abs().sum(0) > 0             # a step with noise has a density
        seen.append((steps[0].tolist(), moved.nonzero().flatten().tolist()))
        return real(trajectory, steps, images, sampler)

    monkeypatch.setattr(script, "visited", visited)
    options = {"tasks": ["ocr"]} if stage is grpo else {"lam": 0.0, "teachers": ["ocr.pt"],
                                                                  "objective": "pg"}
    make_teacher("ocr.pt", "ocr")
    stage(**options, window=2, noisy=[0, 4], iters=6)
    assert all(trained == noisy and len(noisy) == 2 for trained, noisy in seen)
    assert len({tuple(trained) for trained, _ in seen}) > 1


def test_a_window_larger_than_the_noisy_steps_is_refused():
    with pytest.raises(ValueError, match="--window 5"):
        grpo(tasks=["ocr"], window=5)


@pytest.mark.parametrize("options, steps", [
    ({}, 4), ({"objective": "velocity"}, 4), ({"supervised": [0, 3]}, 2),
    ({"objective": "pg"}, 5), ({"objective": "released"}, 5), ({"objective": "mixed"}, 8),
    ({"drop_equal": True}, 8), ({"states": "pictures"}, 8), ({"states": "teacher"}, 4)])
def test_a_rollout_takes_the_steps_that_are_read_and_no_more(options, steps):
    """The KL needs the last supervised state, a ratio the sample after it, a reward the image."""
    cfg = train_opd.Config(**{"steps": 8, "supervised": [0, 5], **options})
    assert train_opd.rollout_steps(cfg) == steps


# ------------------------------------------------------------------ whose states


def off_policy(states):
    """The trajectories of three prompts, whose teachers are two random adapters, and both of them.

    Returns noise, text, the trajectories, {adapter: its rows}, the sampler and the net.
    """
    model = worlds.load(BASE)
    loaded = {}
    for n, task in enumerate(("ocr", "quality")):
        path = make_teacher(f"{task}.pt", task, seed=n)
        loaded |= read_teachers([path], model.mmdit, ["ocr", "quality"])
    attach(loaded, model.mmdit)
    cfg = train_opd.Config(states=states, steps=4, noisy=[0, 3], supervised=[0, 3])
    sampler = Sampler(schedule(4), "sde", 0.7, range(3))
    text = encode(model.text, ['a sign that says "HAT"', "a poster of a circle",
                               'a sign that says "TAX"'])
    noise = draw_noise([(0,), (1,), (2,)], 4, model.latent_shape())
    teachers = train_opd.Teachers(loaded, model.mmdit, None, cfg)
    with torch.no_grad():
        trajectory = teachers.rollout(noise, text, torch.tensor([0, 1, 0]), sampler)
    rows = {"ocr": torch.tensor([0, 2]), "quality": torch.tensor([1])}
    return noise, text, trajectory, rows, sampler, model.mmdit


def test_states_of_the_teachers_are_those_that_each_prompts_own_teacher_visits():
    noise, text, trajectory, rows, sampler, net = off_policy("teacher")
    for task, i in rows.items():
        own = sampler.rollout(Policy(net, task), noise[i], text.rows(i), until=2)
        assert torch.allclose(trajectory.x[i, :3], own.x[:, :3], atol=1e-5)


def test_states_of_pictures_are_the_finished_pictures_noised_to_the_time_of_the_step():
    noise, text, trajectory, rows, sampler, net = off_policy("pictures")
    for task, i in rows.items():
        drawn = sample(Policy(net, task), noise[i, 0], text.rows(i), sampler.times)
        for k, t in enumerate(sampler.times):
            x = (1 - t) * drawn + t * noise[i, k]
            assert torch.allclose(trajectory.x[i, k], x, atol=1e-5)


# ------------------------------------------------------------------ rewards in stage 2


def test_reward_names_every_teachers_task_and_those_without_a_share_are_not_judged():
    """One reward a teacher, as --reward says, also where --ratio leaves a task out."""
    model = worlds.load(BASE)
    world = worlds.open_world(BASE)
    cfg = train_opd.Config(objective="mixed", reward=["ocr", "quality"])
    judge = train_opd.make_judge(cfg, {"ocr": 1, "quality": 0}, model, world, "cpu")
    assert judge.rewards == {"ocr": {"ocr": 1.0}}


class FakeJudge(rewards.Judge):
    """The reward of image i is given by the test, in the order of submission."""
    given = None

    def totals(self):
        self.rows = [row for future in self.waiting for row in future.result()]
        self.waiting = []
        return [float(self.given[i]) for i in range(len(self.rows))]


def run_judged(monkeypatch, given, **options):
    monkeypatch.setattr(train_opd, "Judge", FakeJudge)
    monkeypatch.setattr(FakeJudge, "given", given)
    teacher = make_teacher("ocr.pt", "ocr")
    opd(teachers=[teacher], init="none", lam=0.0, iters=1, lr=1e-3, **options)
    result = tensors("runs/opd/student.pt")
    start = tensors("runs/opd/init.pt")
    return result, distance(result, start)


def test_prompts_whose_images_all_score_alike_teach_nothing_with_drop_equal(monkeypatch):
    _, moved = run_judged(monkeypatch, [0.5] * 8, drop_equal=True)
    assert moved == 0


def test_drop_equal_trains_on_the_other_prompts_as_if_they_were_alone(monkeypatch, tmp_path):
    """The gradient is the mean over the images that are kept, whatever the others are."""
    real = train_opd.kl
    weights = []

    def kl(v, v_target, s):
        out = real(v, v_target, s)
        if out.requires_grad:
            out.register_hook(lambda grad: weights.append(grad.tolist()))
        return out

    monkeypatch.setattr(train_opd, "kl", kl)
    monkeypatch.setitem(train_opd.OBJECTIVES, "kl", lambda v, s, cfg: kl(v, s.v_target, s))
    run_judged(monkeypatch, [0.5, 0.5, 0.1, 0.9, 0.5, 0.5, 0.5, 0.5], drop_equal=True)
    assert "reward_ocr" in log("opd")[0]
    share = 1 / (2 * 4)                                  # two images at four steps each
    assert weights == [[share] * 8], "the others have no forward pass"


def test_mixed_is_the_policy_gradient_of_the_reward_plus_the_kl(monkeypatch):
    """With equal rewards only the KL is left, and with --kl-scale 0 only the policy gradient."""
    same = [0.5] * 8
    mixed, moved = run_judged(monkeypatch, same, objective="mixed", name="opd")
    assert moved > 1e-5
    opd(teachers=["ocr.pt"], init="none", lam=0.0, iters=1, lr=1e-3, name="kl")
    assert distance(tensors("runs/kl/student.pt"), mixed) < 1e-6


def test_mixed_without_the_kl_is_the_gradient_of_stage_1(monkeypatch):
    """From the base, one update: the same images, advantages and ratio as in train_grpo."""
    given = [0.1, 0.9, 0.3, 0.2, 0.5, 0.5, 0.8, 0.0]
    monkeypatch.setattr(train_grpo, "Judge", FakeJudge)
    keys = train_grpo.draw_noise
    # The two stages have noise of their own; for this test stage 1 takes that of stage 2.
    monkeypatch.setattr(train_grpo, "draw_noise",
                        lambda names, K, shape: keys([(n[0], n[2], n[3]) for n in names], K, shape))
    mixed, moved = run_judged(monkeypatch, given, objective="mixed", kl_scale=0.0,
                               drop_equal=True)
    assert moved > 1e-5
    grpo(tasks=["ocr"], group=2, noisy=[0, 4], lora_r=16, lora_alpha=32.0, beta=0.0, lr=1e-3,
         iters=1, adv_std="task")
    ours = tensors("runs/grpo-ocr/adapter.pt")
    assert distance(ours, mixed) < 1e-6


def test_two_ranks_train_mixed_with_dropped_prompts_as_one_does():
    make_teacher("geneval.pt", "geneval", seed=1)
    make_teacher("ocr.pt", "ocr", seed=2)
    args = ["--model", BASE, "--teachers", "geneval.pt", "ocr.pt", "--lam", "0", "--iters", "2",
            "--batch", "16", "--group", "4", "--steps", "4", "--noisy", "0", "3", "--updates", "2",
            "--objective", "mixed", "--drop-equal", "--device", "cpu", "--ema", "0.5",
            "--ema-every", "1", "--clip", "1"]
    for ranks in (1, 2):
        expect_success(torchrun(ranks, "train_opd.py", *args, "--name", f"ranks-{ranks}"))
    one, two = log("ranks-1"), log("ranks-2")
    for name in ("kl", "kl_ocr", "grad_norm", "ratio_err"):
        assert one[-1][name] == pytest.approx(two[-1][name], rel=1e-3)
    apart = distance(tensors("runs/ranks-1/student.pt"), tensors("runs/ranks-2/student.pt"))
    assert apart < 1e-3                                  # Adam moved each number by up to 8e-3


# ------------------------------------------------------------------ float16


def one_step(scaler, grad):
    p = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([p], lr=1.0)
    loss = (p * grad).sum()
    scaler.scale(loss).backward()
    norm = dist.optimise(opt, scaler, 0)
    return p.detach(), norm


def test_a_scaled_loss_gives_the_step_and_the_norm_of_the_loss():
    grad = torch.tensor([0.1, -0.2, 0.3])
    plain, norm = one_step(torch.amp.GradScaler("cpu", enabled=False), grad)
    scaled, scaled_norm = one_step(torch.amp.GradScaler("cpu"), grad)
    torch.testing.assert_close(plain, 1 - grad)
    torch.testing.assert_close(scaled, plain)
    assert scaled_norm == pytest.approx(norm) == pytest.approx(grad.norm().item())


def test_a_scaler_skips_an_overflow_and_a_run_without_one_stops():
    grad = torch.tensor([0.1, float("inf"), 0.3])
    scaler = torch.amp.GradScaler("cpu")
    before = scaler.get_scale()
    kept, _ = one_step(scaler, grad)
    assert torch.equal(kept, torch.ones(3))
    assert scaler.get_scale() < before
    with pytest.raises(ValueError, match="iteration 1: the gradient is"):
        one_step(torch.amp.GradScaler("cpu", enabled=False), grad)


def test_float16_is_refused_for_a_whole_transformer():
    with pytest.raises(ValueError, match="--amp float16 --full"):
        grpo(tasks=["ocr"], full=True, lora_r=None, lora_alpha=None, amp="float16")


# ------------------------------------------------------------------ dry run


@pytest.mark.parametrize("stage", [grpo, opd])
def test_a_dry_run_makes_the_checks_and_writes_nothing(stage, capsys, tmp_path):
    teacher = make_teacher("ocr.pt", "ocr")
    options = {"tasks": ["ocr"]} if stage is grpo else {"lam": 0.0, "teachers": [teacher]}
    before = set(tmp_path.rglob("*"))
    stage(**options, dry_run=True)
    assert "dry run: all checks passed" in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
