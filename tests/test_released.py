"""What the released codes do, re-created here from their sources, and that we do it too.

Sources: CostaliyA/Flow-OPD 434ab16, yifan123/flow_grpo ac4c86e. docs/departures.md has the table.
"""
import math

import numpy as np
import pytest
import torch
from tiny_runs import BASE, grpo, log, opd

import eval
import train_grpo
import train_opd
import train_sft
import worlds
from plumbing import dist
from rewards import advantages, choose_rewards
from sampler import schedule
from worlds.sd3 import SD3
from worlds.tiny_prompts import TASKS

# ------------------------------------------------------------------ SFT


def released_sft_times(n, seed):
    """scripts/train_sd3_sft.py:802-810: a logit-normal index into the scheduler's 1000 times."""
    u = torch.sigmoid(torch.randn(n, generator=torch.Generator().manual_seed(seed)))
    sigma = torch.linspace(1, 0.001, 1000)
    shifted = 3 * sigma / (1 + 2 * sigma)
    return shifted[(u * 1000).long().clamp(max=999)]


def quantiles(t):
    return torch.quantile(t.double(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())


def test_sft_times_have_the_distribution_of_the_released_ones():
    ours = train_sft.draw_times(np.random.default_rng(0), 200_000, "schedule")
    assert (quantiles(ours) - quantiles(released_sft_times(200_000, 0))).abs().max() < 0.004
    plain = train_sft.draw_times(np.random.default_rng(0), 200_000, "plain")
    expected = torch.tensor([0.162, 0.338, 0.5, 0.662, 0.838])
    assert (quantiles(plain) - expected).abs().max() < 0.005


# ------------------------------------------------------------------ advantages


def released_advantages(reward, group):
    """flow_grpo/stat_tracking.py with global_std, in float64."""
    reward = np.asarray(reward, dtype=np.float64)
    mean = reward.reshape(-1, group).mean(1).repeat(group)
    return (reward - mean) / (reward.std() + 1e-4)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-7])
def test_advantages_equal_the_released_ones(spread):
    reward = 0.7 + spread * torch.rand(24, generator=torch.Generator().manual_seed(0))
    adv, _ = advantages(reward, torch.zeros(24), 6, "batch")
    expected = torch.from_numpy(released_advantages(reward, 6)).float()
    torch.testing.assert_close(adv, expected, rtol=1e-3, atol=2e-3)


def test_rewards_equal_but_for_rounding_give_no_advantage():
    """With 1e-6 in place of the released 1e-4 they would be about 0.05 here."""
    reward = torch.tensor([0.7, 0.7, 0.7 + 6e-8, 0.7])
    adv, _ = advantages(reward, torch.zeros(4), 4, "batch")
    assert adv.abs().max() < 1e-3


def test_std_of_the_task_is_as_if_each_task_had_a_batch_of_its_own():
    reward = torch.rand(24, generator=torch.Generator().manual_seed(1))
    reward[12:] *= 0.1
    task = torch.tensor([0] * 12 + [1] * 12)
    adv, _ = advantages(reward, task, 6, "task")
    for half in (slice(0, 12), slice(12, 24)):
        alone, _ = advantages(reward[half], torch.zeros(12), 6, "batch")
        torch.testing.assert_close(adv[half], alone)


# ------------------------------------------------------------------ GRPO-Mix


def test_alternating_tasks_take_whole_iterations_in_their_ratio():
    """config/grpo.py, epochs_per_cycle: three of GenEval, one of OCR, one of the third task."""
    world = worlds.open_world(BASE)
    pattern = ["geneval"] * 3 + ["ocr", "preference"]
    seen = []
    for it in range(10):
        tasks = {prompt["task"] for prompt in world.batch(pattern, 4, 0, it, "alternate")}
        assert len(tasks) == 1
        seen += tasks
    assert seen == pattern * 2


def test_a_mix_trains_on_08_of_its_own_reward_and_02_of_quality():
    world = worlds.open_world(BASE)
    rewards = choose_rewards(TASKS, [], world)
    assert rewards["ocr"] == pytest.approx({"ocr": 0.8, "quality": 0.2})
    assert rewards["geneval"] == pytest.approx(
        {"geneval": 0.4, "geneval_strict": 0.4, "quality": 0.2})
    assert rewards["preference"] == pytest.approx({"preference": 0.8, "quality": 0.2})
    assert rewards["quality"] == pytest.approx({"quality": 1.0})
    alone = choose_rewards(["ocr"], [], world)
    assert alone == {"ocr": {"ocr": 1.0}}
    assert choose_rewards(["ocr", "quality"], ["ocr", "quality"], world)["ocr"] == {"ocr": 1.0}


def test_grpo_mix_alternates_by_default(here):
    grpo(iters=2, batch=8, group=4, tasks=["ocr", "quality"], name="mix")
    first, second = log("mix")
    assert "reward_ocr" in first and "reward_quality" not in first
    assert "reward_quality" in second and "reward_ocr" not in second


# ------------------------------------------------------------------ the KL to the base, CPS


def test_beta_of_sd3_is_the_authors_value_for_a_kl_with_dt():
    """The released KL leaves out dt. One beta would weigh ours by 1 / dt: 25 to 3.7 times."""
    times = schedule(10)
    factor = 1 / (times[:-1] - times[1:])[:9]
    expected = [25, 21, 18, 15, 12, 9.5, 7.3, 5.4, 3.7]
    assert factor.tolist() == pytest.approx(expected, rel=0.04)
    assert train_grpo.PRESETS["sd3"]["beta"] == 0.004


def cps_weight(t, t_next, a):
    """The KL of a CPS step for |v_p - v_q| = 1, from the formulas of docs/method.md in float64."""
    std = t_next * math.sin(a * math.pi / 2)
    slope = -(1 - t_next) * t + math.sqrt(t_next ** 2 - std ** 2) * (1 - t)
    return slope ** 2 / (2 * std ** 2)


def test_cps_on_all_noisy_steps_of_sd3_is_refused_and_one_fewer_is_not():
    times = schedule(10).tolist()
    last = cps_weight(times[8], times[9], 0.7)
    others = [cps_weight(times[k], times[k + 1], 0.7) for k in range(8)]
    assert 500 < last < 600 and max(others) < 1
    cfg = train_opd.Config(rollout="cps", steps=10, noisy=[0, 9])
    with pytest.raises(ValueError, match=f"weighs {last / max(others):.0f} times .* end at 8"):
        train_opd.check_window(cfg)
    cfg.noisy = [0, 8]
    train_opd.check_window(cfg)


# ------------------------------------------------------------------ what a run draws and keeps


def test_stage_1_and_stage_2_draw_other_noise(here, teachers, monkeypatch):
    keys = {}
    for stage, module in (("grpo", train_grpo), ("opd", train_opd)):
        real = module.draw_noise

        def draw(wanted, *rest, stage=stage, real=real):
            keys.setdefault(stage, set()).update(map(tuple, wanted))
            return real(wanted, *rest)

        monkeypatch.setattr(module, "draw_noise", draw)
    grpo(iters=1, tasks=["quality"])
    opd(iters=1, teachers=teachers)
    assert keys["grpo"] and keys["opd"] and not keys["grpo"] & keys["opd"]


def test_images_without_a_signal_cost_no_forward_pass(here, monkeypatch):
    """Two groups, one of them with equal rewards: half of the states are scored again."""
    rows = []
    real = train_grpo.likelihood_ratio
    monkeypatch.setattr(train_grpo, "likelihood_ratio",
                        lambda v, s: rows.append(len(s.x)) or real(v, s))
    totals = train_grpo.Judge.totals
    monkeypatch.setattr(train_grpo.Judge, "totals",
                        lambda self: totals(self) and [0.5] * 4 + [0.1, 0.2, 0.3, 0.4])
    grpo(iters=1, batch=8, group=4, micro=4, tasks=["quality"])
    assert rows == [4, 4, 4]
    assert log("grpo-quality")[0]["zero_std_ratio"] == pytest.approx(0.5)


# ------------------------------------------------------------------ the presets


def released_epoch(gpus, images_a_gpu, group, groups):
    """config/grpo.py: batches of an epoch -> (images of all GPUs, optimiser steps)."""
    batches = int(groups / (gpus * images_a_gpu / group))
    return batches * gpus * images_a_gpu, batches // (batches // 2)


@pytest.mark.parametrize("script, rate, epoch", [
    (train_grpo, 3e-4, released_epoch(gpus=32, images_a_gpu=9, group=24, groups=48)),
    (train_opd, 1e-4, released_epoch(gpus=8, images_a_gpu=4, group=16, groups=16))])
def test_presets_of_sd3_have_the_released_numbers(script, rate, epoch):
    preset = script.PRESETS["sd3"]
    assert (preset["batch"], preset["updates"]) == epoch
    assert preset["noisy"] == [0, int(0.99 * preset["steps"])] == [0, 9]
    assert (preset["size"], preset["t5"], preset["guidance"]) == (512, "128", 4.5)
    assert script.LR["sd3", False] == rate and preset["ema"] == 0.9
    cfg = script.Config()
    assert (cfg.a, cfg.clip, cfg.ema_every, cfg.rollout) == (0.7, 1e-4, 8, "sde")
    assert SD3.lora == (32, 64.0)


def test_evaluation_of_sd3_has_the_released_steps_and_guidance():
    assert (eval.PRESETS["sd3"]["steps"], eval.PRESETS["sd3"]["guidance"]) == (40, 4.5)


def test_the_noise_that_our_last_step_leaves_out_is_small():
    """The released last step takes noise too. It is a 36th of what the step before leaves."""
    times = schedule(10)
    std = []
    for k in (8, 9):
        sigma = 0.7 * (times[k] / (1 - times[k])).sqrt()
        std.append((sigma * (times[k] - times[k + 1]).sqrt()).item())
    assert std == pytest.approx([0.2254, 0.0063], abs=1e-4)


# ------------------------------------------------------------------ any number of GPUs


def test_48_groups_of_24_on_32_ranks_cover_every_image_once():
    """The released set-up: 18 images a rank and update, so groups span ranks."""
    cfg = train_grpo.Config(**train_grpo.PRESETS["sd3"])
    train_grpo.cli.check_rollout(cfg, 32)
    images = [i for rank in range(32) for i in dist.share(cfg.batch, cfg.updates, rank, 32)]
    assert sorted(images) == list(range(1152))


def test_a_whole_transformer_takes_a_lower_rate_by_default(here):
    world = worlds.open_world(BASE)
    for script, tasks in ((train_grpo, dict(tasks=["ocr"])), (train_opd, {})):
        rates = []
        for full in (False, True):
            cfg = script.Config(full=full, **tasks)
            script.check(cfg, world, 1)
            rates.append(cfg.lr)
        assert 0 < rates[1] < rates[0] / 10
