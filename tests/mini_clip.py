"""For the tests of scorers/: small CLIPs with random weights, pictures, and resizing by hand."""
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from scorers.pixels import CLIP_MEAN, CLIP_STD

PROMPTS = [
    'A sign that says "Open"; it\'s 24/7!',
    "a red cat, left of a dog",
    "x " * 100,
    'A sign that says "Open"; it\'s 24/7!',
]


def find_bpe():
    """CLIP's merges, which the open_clip package has."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec else None


BPE = find_bpe()
needs_bpe = pytest.mark.skipif(BPE is None, reason="the open_clip package has CLIP's vocabulary")


def pictures(n=4, h=60, w=60):
    """Smooth shapes with noise, (n, 3, h, w) in [0, 1]."""
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 6, h), torch.linspace(0, 6, w), indexing="ij")
    phase = torch.rand(n, 3, 1, 1, generator=g) * 6
    shapes = (x * phase).sin() * (y + phase).cos() / 2 + 0.5
    return (shapes + 0.2 * torch.randn(n, 3, h, w, generator=g)).clamp(0, 1)


def randomized(named_shapes, seed=0):
    """A state dict in which the activations of a network stay of order 1.

    Gains are about 1, biases and embeddings small.
    """
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in named_shapes.items():
        noise = torch.randn(shape, generator=g)
        scale = 0.3
        if len(shape) > 1 and "embed" not in name:
            scale = 1.5 / math.prod(shape[1:]) ** 0.5
        state[name] = scale * noise
        if len(shape) == 1 and name.endswith("weight"):
            state[name] = 1 + 0.1 * noise
    return state


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def save_clip(folder, act, seed):
    """A CLIP of transformers with 2 layers, 3 x 3 patches of 14 and heads of 64, in a folder."""
    vision = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=256, image_size=42, patch_size=14, hidden_act=act)
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
                intermediate_size=128, hidden_act=act)
    net = CLIPModel(CLIPConfig(projection_dim=48, vision_config=vision, text_config=text)).eval()
    net.load_state_dict(randomized(shapes(net), seed) | {"logit_scale": torch.tensor(4.6052)})
    folder.mkdir(exist_ok=True)
    net.save_pretrained(folder)
    return net


def varied(scores, spread=1e-3):
    """Scores that would show an error: they differ by image and by prompt."""
    right_kind = scores.shape == (4,) and scores.dtype == torch.float32
    return scores.std() > spread and scores.isfinite().all() and right_kind


def affine(x, state, prefix=""):
    """The head by hand: one linear layer after the other."""
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"{prefix}layers.{i}.weight"].T + state[f"{prefix}layers.{i}.bias"]
    return x[:, 0]


# ------------------------------------------------------------------ pixels by hand


def levels(pixels):
    """Undo the normalisation: grey levels, 0 to 255."""
    mean = torch.tensor(CLIP_MEAN).reshape(3, 1, 1)
    std = torch.tensor(CLIP_STD).reshape(3, 1, 1)
    return (pixels * std + mean) * 255


def torchvision_box(h, w, size):
    """((height, width), top, left) of torchvision's Resize(size) and CenterCrop(size)."""
    if h <= w:
        height, width = size, int(size * w / h)
    else:
        height, width = int(size * h / w), size
    top = int(round((height - size) / 2.0))
    left = int(round((width - size) / 2.0))
    return (height, width), top, left


def resize_planes(array, height, width, resample):
    """(h, w, 3) grey levels -> (3, height, width), by Pillow in floating point."""
    planes = [Image.fromarray(array[:, :, c].astype("float32")) for c in range(3)]
    return np.stack([plane.resize((width, height), resample) for plane in planes])
