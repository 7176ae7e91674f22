"""The tiny world, in which a training run takes minutes on two CPU cores.

Its pictures have 32 x 32 pixels (tiny_pictures.py). Its prompts name shapes, colours and words
(tiny_prompts.py). Its base is trained by tiny_base.py. Its rewards have the roles of the paper's:

    geneval      "a photo of a red circle and a blue square"
    ocr          'a sign that says "HAT"'
    preference   PickScore's: reads the prompt loosely and likes a style, at odds with GenEval
    quality      DeQA's: never reads the prompt, full for a clean picture of anything

The base is imperfect in the way SD3.5-Medium is. It draws crisply and often draws the wrong thing,
because in its training the picture did not always follow the caption (tiny_pictures.corrupt).
Reinforcement learning then has to choose the right mode, not to learn to draw.
"""
import json
import re

import torch
from torch import nn

from model import Mlp, attend, load_mmdit, load_part
from plumbing.files import open_tensors
from worlds import tiny_pictures, tiny_prompts
from worlds.prompts import TAGS, check_known
from worlds.vae import load_vae
from worlds.world import Model, World


class TextBlock(nn.Module):
    """One layer of the text encoder: attention with two heads over all places, then an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, dim, nn.GELU())
        # A new layer changes nothing, so a model without it can be trained on with it.
        for last in (self.proj, self.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x):
        """x (B, L, dim) -> (B, L, dim)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).unbind(2)   # (B, L, 2, .)
        x = x + self.proj(attend(q, k, v))
        return x + self.mlp(self.norm2(x))


class TinyText(nn.Module):
    """The text encoder. Each lower-case word, capital letter and other sign is one token.

    A token's embedding is its own vector plus a vector of its place. The blocks then read the
    context. Without them, no relation is learned: what "circle" means in "a circle left of a
    square" depends on two other words (worlds/tiny_base.py, teach_text).
    """

    def __init__(self, vocab, length, dim, depth=2):
        super().__init__()
        self.vocab = vocab                                       # vocab[0] is the padding
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.length = length
        self.embed = nn.Embedding(len(vocab), dim)
        self.place = nn.Parameter(0.5 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(TextBlock(dim) for _ in range(depth))
        self.pool = nn.Linear(dim, dim)

    def prepare(self, prompts, rank=0, world_size=1):
        """Check the words of a run's prompts. SD3.5's world encodes the prompts at this point."""
        self.tokens(prompts)

    def shape(self):
        """Tokens of a prompt, and numbers of a token."""
        return tuple(self.place.shape)

    def size(self):
        """Its bytes in memory."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def row(self, prompt):
        """The padded ids of one prompt. ValueError if it has unknown words or too many tokens."""
        words = re.findall(r'[a-z]+|[A-Z]|[^\sa-zA-Z]', prompt)
        for word in words:
            if word not in self.ids:
                raise ValueError(f"prompt {prompt!r}: the tiny world has no word {word!r}; "
                                 f"it knows {' '.join(self.vocab[1:])}")
        if len(words) > self.length:
            raise ValueError(f"prompt {prompt!r} has {len(words)} tokens, "
                             f"the tiny text encoder takes {self.length}")
        ids = [self.ids[word] for word in words]
        return ids + [0] * (self.length - len(ids))

    def tokens(self, prompts):
        """prompts -> ids (B, L). An empty prompt is all padding."""
        return torch.tensor([self.row(prompt) for prompt in prompts], device=self.place.device)

    def words(self, tokens):
        """ids (B, L) -> the vectors without context, (B, L, dim)."""
        return self.embed(tokens) + self.place

    def forward(self, prompts):
        """prompts, a list of B strings -> context (B, L, dim), pooled (B, dim)."""
        tokens = self.tokens(prompts)
        context = self.words(tokens)
        for block in self.blocks:
            context = block(context)
        used = (tokens > 0).unsqueeze(-1).to(context.dtype)
        mean = (context * used).sum(1) / used.sum(1).clamp(min=1)
        return context, self.pool(mean)


def load_text(path, vocab, device, dtype):
    """Load the text encoder of a tiny model's file, as model.load_part does."""
    def build(shapes):
        length, dim = shapes["place"]
        depth = sum(name.endswith("qkv.weight") for name in shapes)
        return TinyText(vocab, length, dim, depth)

    return load_part(path, "text", build, "place", device, dtype)


class Tiny(World):
    name = "tiny"
    tasks = tiny_prompts.TASKS
    tags = TAGS
    lora = (16, 32.0)
    # The paper's. Quality anchors, and no prompt is routed to its teacher.
    ratio = {"geneval": 3, "ocr": 1, "preference": 1, "quality": 0}
    # Half of GenEval's reward is the strict form. The soft form alone pays for pictures that are
    # half right, and can be gamed.
    reward = {"geneval": "geneval=0.5,geneval_strict=0.5", "ocr": "ocr",
              "preference": "preference", "quality": "quality"}
    judge = "quality"
    score = {"geneval": "geneval_benchmark", "ocr": "ocr", "preference": "preference",
             "quality": "quality"}

    def load(self, path, device="cpu", dtype=torch.float32, size=None, t5="", text_encoders=""):
        """The Model of one file: its tensors have SD3.5's names, and it has the text encoder."""
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
        if metadata.get("world") != "tiny":
            raise ValueError(f"{path}: expected a model of the tiny world, "
                             "as `python -m worlds.tiny_base` makes it")
        if size not in (None, tiny_pictures.SIDE) or t5 or text_encoders:
            raise ValueError(f"--size {size} --t5 {t5} --text-encoders {text_encoders}: are for "
                             f"SD3.5; the tiny world's pictures have {tiny_pictures.SIDE} px, and "
                             "its text encoder is in the model's file and has no T5")
        try:
            vocab = json.loads(metadata["vocab"])
            resolution = int(metadata["resolution"])
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected 'vocab' (JSON) and 'resolution' in its metadata: "
                             f"{type(error).__name__} {error}") from None
        return Model(mmdit=load_mmdit(path, device, dtype), vae=load_vae(path, device, dtype),
                     text=load_text(path, vocab, device, dtype), resolution=resolution,
                     file=str(path))

    def own_prompt(self, rng, task, split, tags=None):
        return tiny_prompts.draw_prompt(rng, task, split, tags)

    def check_meta(self, meta):
        clauses = meta["include"] + meta.get("exclude", [])
        check_known(meta, clauses, "class", tiny_pictures.SHAPES)
        check_known(meta, clauses, "color", tiny_pictures.COLORS)

    def detect(self, images, metas):
        return tiny_pictures.detect(images)

    def read(self, images):
        return tiny_pictures.read(images)

    def quality(self, images):
        return tiny_pictures.quality(images)

    def preference(self, images, metas):
        return tiny_pictures.preference(images, metas)
