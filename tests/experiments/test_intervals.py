"""Intervals cover the truth as often as they say."""
import numpy as np
import pytest

from experiments.intervals import mean_interval, ratio_interval, show_mean, student
from experiments.results import image_weights


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_the_mean_19_times_of_20(n):
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(4000):
        mean, half = mean_interval(rng.normal(0.7, 0.2, n))
        hits.append(abs(mean - 0.7) < half)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_interval():
    assert show_mean([0.5]) == "0.500"
    assert show_mean([0.5, 0.5, 0.5]) == "0.500 ± 0.000"


def test_a_ratio_of_noisy_gains_is_less_biased_than_the_mean_of_ratios_and_its_interval_covers():
    rng = np.random.default_rng(0)
    hits = []
    ratios = []
    means = []
    for _ in range(4000):
        base = rng.normal(0, 0.03, 3)                   # the same base under both
        above = 0.16 + rng.normal(0, 0.01, 3) - base
        below = 0.2 + rng.normal(0, 0.01, 3) - base
        ratio, half = ratio_interval(above, below)
        hits.append(abs(ratio - 0.8) < half)
        ratios.append(ratio)
        means.append(np.mean(above / below))
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)
    assert abs(np.mean(ratios) - 0.8) < 0.6 * abs(np.mean(means) - 0.8)


def test_the_interval_covers_the_mean_over_seeds_and_prompts_together():
    """Three seeds and 24 prompts with four images each: all of them shift a score."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(24), 4)
    weights = image_weights(["tag"] * 96, prompts.tolist(), draws=100)
    narrow = []
    hits = []
    for _ in range(1000):
        seeds = rng.normal(0, 0.02, (3, 1))
        images = 0.5 + seeds + rng.normal(0, 0.1, 24)[prompts] + rng.normal(0, 0.2, (3, 96))
        scores = weights @ images.T
        hits.append(abs(mean_interval(scores).mean - 0.5) < mean_interval(scores).half)
        narrow.append(abs(scores[0].mean() - 0.5) < mean_interval(scores[0]).half)
    assert 0.93 < np.mean(hits) < 0.99
    assert np.mean(narrow) < 0.9                        # what seeds alone would say


def test_drawn_again_all_images_of_a_prompt_stay_together_and_every_tag_keeps_its_share():
    weights = image_weights(["a"] * 4 + ["b"] * 2, [1, 1, 2, 3, 4, 5], draws=50)
    assert weights[0] == pytest.approx([1 / 8] * 4 + [1 / 4] * 2)
    assert weights[:, :4].sum(1) == pytest.approx(np.full(51, 0.5))
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[1:] != weights[0]).any(1).mean() > 0.5


def test_the_points_of_student_are_those_of_tables_and_fall_between_them():
    assert student(2) == 4.303
    assert 3.182 < student(2.5) < 4.303
    assert student(1e9) == pytest.approx(1.96, abs=1e-3)
