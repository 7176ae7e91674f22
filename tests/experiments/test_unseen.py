"""What no reward sees is measured as it is said."""
import numpy as np
import pytest
import torch

from experiments import unseen
from worlds.tiny_pictures import COLORS, Scene, render


def clean(n, tone=None, color=None):
    rng = np.random.default_rng(0)
    images = [render(rng, Scene([["circle", color or rng.choice(COLORS)]]), tone) for _ in range(n)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_clean_pictures_are_sharp_and_noisy_ones_are_not():
    images = clean(20)
    assert unseen.sharpness(images) == 1
    noisy = (images + 0.1 * torch.randn(images.shape)).clamp(0, 1)
    assert unseen.sharpness(noisy) < 0.5


def test_the_frechet_distance_of_gaussians_is_the_known_one():
    """N(0, I) and N(m, 4 I) in d dimensions are at m^2 + d (2 - 1)^2."""
    rng = np.random.default_rng(0)
    one = rng.normal(0, 1, (200000, 3))
    other = rng.normal(0, 2, (200000, 3)) + [1, 0, 0]
    assert unseen.frechet(one, other) == pytest.approx(1 + 3, rel=0.02)
    assert unseen.frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_what_a_prompt_leaves_open_has_the_entropy_of_a_uniform_choice_or_none():
    free = unseen.freedom(clean(1500))
    assert free["colours"] == pytest.approx(np.log2(6), abs=0.01)
    assert free["places"] == pytest.approx(4, abs=0.02)
    assert free["alone"] == 1500
    assert free["tones"] == pytest.approx(np.sqrt(1 / 12), abs=0.01)
    shut = unseen.freedom(clean(50, tone=0.5, color="red"))
    assert shut["colours"] == 0
    assert shut["tones"] < 0.01


def test_a_model_is_measured_on_its_own_pictures():
    found = unseen.measure("base", seed=0, n=40)
    assert 0 < found["sharpness"] < 1
    assert found == unseen.measure("base", seed=0, n=40)
    assert found != unseen.measure("base", seed=1, n=40)
