"""Fixtures: a folder of published files in miniature, and the open_clip package."""
import gzip
import importlib.util
import json
import os
import sys
from unittest.mock import MagicMock

import pytest
from mini_clip import BPE


def clip_vocabulary(merges):
    """CLIP's tokens in their order (openai/CLIP clip/simple_tokenizer.py)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    ends = [letter + "</w>" for letter in letters]
    merged = ["".join(merge.split()) for merge in merges]
    return letters + ends + merged + ["<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """$REWARD_MODELS, with CLIP's real vocabulary and BERT's in miniature."""
    root = tmp_path_factory.mktemp("models")
    os.environ["REWARD_MODELS"] = str(root)
    if BPE:
        merges = gzip.open(BPE).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
        vocabulary = {token: i for i, token in enumerate(clip_vocabulary(merges))}
        for name in ("CLIP-ViT-H-14-laion2B-s32B-b79K", "clip-vit-large-patch14"):
            (root / name).mkdir()
            (root / name / "vocab.json").write_text(json.dumps(vocabulary))
            (root / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (root / "bert-base-uncased").mkdir()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat dog left of sign that says , \" x ##s ' !"
    (root / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words.split()))
    yield root
    del os.environ["REWARD_MODELS"]


@pytest.fixture(scope="session")
def open_clip():
    """The open_clip package.

    It imports torchvision, and ftfy wcwidth, for things that are not used here: stand-ins will do.
    """
    names = ["wcwidth", "torchvision", "torchvision.transforms",
             "torchvision.transforms.functional", "torchvision.ops", "torchvision.ops.misc"]
    names = [name for name in names if not importlib.util.find_spec(name.split(".")[0])]
    sys.modules.update({name: MagicMock() for name in names})
    try:
        return pytest.importorskip("open_clip", reason="the original that HPSv2 is compared with")
    finally:
        for name in names:
            del sys.modules[name]
