"""Intervals cover the truth as often as they say."""
import numpy as np
import pytest

from experiments.intervals import mean_interval, ratio_interval, show_mean


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
