"""Facts about scorers.get and scorers.offload: networks are loaded at first use, once a process."""
import importlib

import numpy as np
import pytest
import torch

import scorers
from rewards import REWARDS, parse_reward, score

META = {"prompt": "a photo of a cat"}
IMAGE = torch.zeros(1, 3, 8, 8)


class World:
    """Nobody asks this one."""
    read = detect = quality = preference = None


class Constant:
    """A scorer that gives every image the same."""

    def __init__(self, value):
        self.value = value
        self.net = torch.nn.Linear(1, 1)

    def __call__(self, images, prompts):
        assert len(images) == len(prompts) and all(isinstance(p, str) for p in prompts)
        return torch.full((len(images),), self.value)


CONSTANTS = {"deqa.DeQA": 4.0, "clip.PickScore": 13.0, "imagereward.ImageReward": 0.7}


@pytest.fixture
def constants(monkeypatch):
    """Scorers that are constants. Gives the list of those that were loaded."""
    made = []

    def maker(where, value):
        def make(device, dtype):
            made.append((where, str(device), dtype))
            return Constant(value)
        return make

    monkeypatch.setattr(scorers, "LOADED", {})
    for where, value in CONSTANTS.items():
        monkeypatch.setattr(f"scorers.{where}", maker(where, value))
    return made


def test_components_are_reported_as_published_and_weighed_on_the_peers_scale(constants):
    spec = parse_reward("deqa=0.4,pickscore=0.6,imagereward")
    got = score(spec, torch.zeros(2, 3, 8, 8), [META, META], World())
    assert got["deqa"].tolist() == [4, 4] and got["pickscore"].tolist() == [13, 13]
    total = 0.4 * 4 / 5 + 0.6 * 13 / 26 + 0.7
    np.testing.assert_allclose(got["total"], [total] * 2, rtol=1e-6)


def test_a_network_is_loaded_once_a_process_and_only_when_asked_for(constants):
    assert parse_reward("deqa,pickscore") and constants == []
    for _ in range(2):
        score({"deqa": 1.0}, IMAGE, [META], World())
    assert constants == [("deqa.DeQA", "cpu", torch.float32)]


def test_a_network_is_in_half_precision_on_a_gpu(constants, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "to", lambda net, device: net)
    scorers.get("clip.PickScore", "cuda:1")
    assert constants == [("clip.PickScore", "cuda:1", torch.float16)]


def test_offload_moves_every_loaded_scorer_off_and_the_next_use_brings_it_back(constants,
                                                                               monkeypatch):
    moves = []

    def watch(where):
        return lambda device: moves.append((where, str(device)))

    score({"deqa": 1.0, "pickscore": 1.0}, IMAGE, [META], World())
    for where, scorer in scorers.LOADED.items():
        monkeypatch.setattr(scorer.net, "to", watch(where))
    scorers.offload()
    assert sorted(moves) == [("clip.PickScore", "cpu"), ("deqa.DeQA", "cpu")]
    scorers.get("deqa.DeQA", "meta")
    assert moves[-1] == ("deqa.DeQA", "meta")


def test_every_published_reward_has_a_loader_and_the_loaders_names_exist():
    published = {"geneval", "ocr", "pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic",
                 "deqa", "unifiedreward", "qwenvl", "jpeg_compressibility",
                 "jpeg_incompressibility", "quality", "preference"}
    assert published <= set(REWARDS)
    places = {name: reward.where for name, reward in REWARDS.items() if reward.where}
    assert set(places) >= {"pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic", "deqa",
                           "unifiedreward", "qwenvl"}
    for where in (*places.values(), "geneval.Detector", "ocr.Reader"):
        module, name = where.split(".")
        assert callable(getattr(importlib.import_module(f"scorers.{module}"), name))


@pytest.mark.parametrize("where", [
    "clip.PickScore", "clip.CLIPScore", "clip.HPSv2", "clip.Aesthetic",
    "imagereward.ImageReward", "deqa.DeQA", "geneval.Detector", "ocr.Reader",
])
def test_missing_weights_are_one_line_that_says_where_they_were_looked_for(monkeypatch, tmp_path,
                                                                           where):
    if where == "clip.HPSv2":
        pytest.importorskip("ftfy")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(scorers, "LOADED", {})
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"REWARD_MODELS") as error:
        scorers.get(where, "cpu")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["unifiedreward", "qwenvl"])
def test_a_judge_without_an_endpoint_says_which_variable_to_set(monkeypatch, name):
    monkeypatch.setattr(scorers, "LOADED", {})
    monkeypatch.delenv(f"{name.upper()}_URL", raising=False)
    with pytest.raises(ValueError, match=rf"reward {name}: .*\${name.upper()}_URL is not set"):
        score({name: 1.0}, IMAGE, [META], World())


@pytest.mark.parametrize("name", ["quality", "preference"])
def test_what_the_tiny_world_alone_has_is_refused_for_real_pictures(name):
    from worlds.sd3 import SD3
    with pytest.raises(ValueError, match=f"^reward {name}: the world 'sd3' has none of its own"):
        score({name: 1.0}, IMAGE, [META], SD3())
