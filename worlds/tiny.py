"""The tiny world, in which a training run takes minutes on two CPU cores.

Its pictures have 32 x 32 pixels (tiny_pictures.py). Its prompts name shapes, colours and words
(tiny_prompts.py). Its base is trained by tiny_base.py. Three tasks have the roles that the rewards
of the paper have:

    geneval   "a photo of a red circle and a blue square"
    ocr       'a sign that says "HAT"'
    quality   a score that never looks at the prompt

Quality rewards a cream background (weight 0.4) and an empty page (weight 0.6). One figure costs
nothing, and further ones lower the score. So quality conflicts with prompts that ask for two or
three objects or for a word. A human-preference reward conflicts with GenEval in the same way: in
the paper GRPO-PickScore lowers GenEval from 0.63 to 0.51.

The base is imperfect in the way SD3.5-Medium is. It draws crisply and often draws the wrong thing,
because in its training the picture did not always follow the caption (tiny_pictures.corrupt).
Reinforcement learning then has to choose the right mode, not to learn to draw.
"""
import json
import re

import torch
from torch import nn

from model import load_mmdit, load_part
from plumbing.files import open_tensors
from worlds import tiny_pictures, tiny_prompts
from worlds.prompts import TAGS
from worlds.vae import load_vae
from worlds.world import Model, World


class TinyText(nn.Module):
    """The text encoder. Each lower-case word, capital letter and other sign is one token.

    A token's embedding is its own vector plus a vector of its place. Context is left to the MMDiT,
    whose joint attention reads and rewrites the tokens in every block.
    """

    def __init__(self, vocab, length, dim):
        super().__init__()
        self.vocab = vocab                                       # vocab[0] is the padding
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.length = length
        self.embed = nn.Embedding(len(vocab), dim)
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
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

    def forward(self, prompts):
        """prompts, a list of B strings -> context (B, L, dim), pooled (B, dim)."""
        tokens = self.tokens(prompts)
        context = self.embed(tokens) + self.place
        used = (tokens > 0).unsqueeze(-1).to(context.dtype)
        mean = (context * used).sum(1) / used.sum(1).clamp(min=1)
        return context, self.pool(mean)


def load_text(path, vocab, device, dtype):
    """Load the text encoder of a tiny model's file, as model.load_part does."""
    def build(shapes):
        length, dim = shapes["place"]
        return TinyText(vocab, length, dim)

    return load_part(path, "text", build, "place", device, dtype)


class Tiny(World):
    name = "tiny"
    tasks = tiny_prompts.TASKS
    tags = TAGS
    lora = (16, 32.0)
    # The paper has GenEval 3 : OCR 1 : PickScore 1. Here quality has PickScore's role.
    ratio = {"geneval": 3, "ocr": 1, "quality": 1}
    # Half of GenEval's reward is the strict form. The soft form alone pays for pictures that are
    # half right, and can be gamed.
    reward = {"geneval": "geneval=0.5,geneval_strict=0.5", "ocr": "ocr", "quality": "quality"}
    judge = "quality"
    score = {"geneval": "geneval_benchmark", "ocr": "ocr", "quality": "quality"}

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
            raise ValueError(f"{path}: cannot read its text encoder, for want of {error}") from None
        return Model(mmdit=load_mmdit(path, device, dtype), vae=load_vae(path, device, dtype),
                     text=load_text(path, vocab, device, dtype), resolution=resolution,
                     file=str(path))

    def own_prompt(self, rng, task, split, tags=None):
        return tiny_prompts.draw_prompt(rng, task, split, tags)

    def detect(self, images, metas=None):
        return tiny_pictures.detect(images)

    def read(self, images):
        return tiny_pictures.read(images)

    def quality(self, images):
        return tiny_pictures.quality(images)
