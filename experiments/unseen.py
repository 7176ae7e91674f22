"""A model's pictures beyond the scores: numbers that no run was trained on.

    sharpness       share of pixels whose colour is one of the world's; the VAE blurs some
    distance        Fréchet distance to clean renderings of the prompts, over pictures of 8 x 8
    colours         bits of entropy of the colour of a figure whose prompt names none (most: 2.58)
    places          bits of entropy of its cell (most: 4)
    tones           standard deviation of the tone of its background (uniform: 0.29)
    alone           number of pictures, of 300, with just one figure, which the last three are of

Colours, places and tones are what a prompt leaves open, and reinforcement learning may close it.
Only the reward of preference has a wish there: it likes a bright background.
"""
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from checkpoints.teachers import policy_of
from sampler import draw, schedule
from worlds import open_world
from worlds.tiny_pictures import CELL, INK, RGB, background, detect, faithful, render, segment
from worlds.tiny_prompts import PROMPTS

BASE = "ckpt/tiny.safetensors"
STEPS = 20
NEAR = 12                                               # of 255: a pixel has a colour of the world


@torch.no_grad()
def pictures(model, policy, prompts, key):
    """One picture a prompt, in [0, 1]: (n, 3, 32, 32)."""
    images = []
    for part in torch.arange(len(prompts)).split(100):
        keys = [(*key, int(i)) for i in part]
        latents = draw(model, policy, [prompts[i] for i in part], keys, schedule(STEPS))
        images.append(model.images(latents))
    return torch.cat(images)


def sharpness(images):
    label, tone = segment(images)
    palette = np.array([(0, 0, 0), *RGB.values(), INK], float)
    nearest = palette[label]
    nearest[label == 0] = background(tone[label == 0][:, None])
    pixels = images.permute(0, 2, 3, 1).numpy() * 255
    return float((np.abs(pixels - nearest).max(-1) <= NEAR).mean())


def root(matrix):
    """The square root of a symmetric matrix with no negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet(one, other):
    """|mean - mean|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2). one, other (n, d)."""
    apart = one.mean(0) - other.mean(0)
    c1 = np.cov(one, rowvar=False)
    c2 = np.cov(other, rowvar=False)
    half = root(c1)
    both = root(half @ c2 @ half)
    return float(apart @ apart + np.trace(c1 + c2 - 2 * both))


def features(images):
    return F.adaptive_avg_pool2d(images, 8).flatten(1).double().numpy()


def entropy(counts):
    """Bits. A small sample has too few of them, which Miller and Madow's term corrects."""
    n = counts.total()
    if n == 0:
        return float("nan")
    share = np.array(list(counts.values())) / n
    return float(abs((share * np.log2(share)).sum()) + (len(counts) - 1) / (2 * n * np.log(2)))


def freedom(images):
    """What pictures of one figure have where the prompt leaves it open: bits, bits, spread."""
    colours = Counter()
    places = Counter()
    alone = []
    for i, objects in enumerate(detect(images)):
        if len(objects) == 1:
            alone.append(i)
            x, y = objects[0]["box"][:2]
            colours[objects[0]["color"]] += 1
            places[x // CELL, y // CELL] += 1
    label, tone = segment(images[alone])
    tones = [float(t[empty].mean()) for t, empty in zip(tone, label == 0) if empty.any()]
    return {"colours": entropy(colours), "places": entropy(places), "tones": float(np.std(tones)),
            "alone": len(alone)}


def measure(path, seed, n=600):
    """All numbers of a checkpoint (a path, or base) on n held-out GenEval prompts."""
    world = open_world(BASE)
    model = world.load(BASE)
    policy = policy_of(path, model.mmdit, "model")
    metas = world.eval_prompts("geneval", n)
    images = pictures(model, policy, [meta["prompt"] for meta in metas], (seed, "unseen"))
    rng = np.random.default_rng(seed)
    clean = np.stack([render(rng, faithful(rng, meta)) for meta in metas])
    clean = torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 255
    single = [meta["prompt"] for meta in PROMPTS["photo", "single_object", "eval"]]
    open_images = pictures(model, policy, single * (n // 2 // len(single)), (seed, "open"))
    return {"sharpness": sharpness(images),
            "distance": frechet(features(images), features(clean)),
            **freedom(open_images)}
