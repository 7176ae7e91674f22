"""What a world is: the prompts of some tasks, the judges of their pictures, and a model.

A world is where a model lives: the tiny one (tiny.py) or Stable Diffusion 3.5's (sd3.py). The
training scripts know only this interface. To add a world, write a subclass and name it in
worlds/__init__.py.
"""
from dataclasses import dataclass

import numpy as np
import torch

from model import MMDiT
from worlds.prompts import read_prompt_folders
from worlds.vae import VAE

EVAL_SEED = 20260508     # of the prompts for evaluation


@dataclass
class Model:
    """A base and what goes with it, on one device."""
    mmdit: MMDiT
    vae: VAE
    text: object             # (B strings) -> context (B, L, context_dim), pooled (B, pooled_dim)
    resolution: int          # side of the images, in pixels
    file: str                # the safetensors file that holds the transformer

    @property
    def fingerprint(self):
        return self.mmdit.fingerprint

    def latent_shape(self):
        """(C, H, W) of one image's latents."""
        side = self.resolution // self.vae.factor
        return self.mmdit.cfg.channels, side, side

    @torch.no_grad()
    def images(self, latents):
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        return self.vae.decode(latents).float() / 2 + 0.5


class World:
    """Tasks, prompts, judges and a model. What has no body here, a subclass must define.

    A prompt is a dict: "prompt", "task", "tag" and what its judge needs (worlds/prompts.py).
    prompts: ["TASK=DIR", ...], folders whose prompts replace the world's own (--prompts).
    """
    name = ""
    tasks = ()               # the tasks that have prompts or a reward here
    tags = ()                # GenEval's kinds of prompt
    lora = (16, 32.0)        # rank and alpha of a new adapter
    ratio = {}               # task -> its share of the prompts in stage 2
    reward = {}              # task -> what its teacher is trained on, as rewards.parse_reward reads
    score = {}               # task -> the reward that evaluation reports

    def __init__(self, prompts=()):
        # task -> split -> prompts
        self.folders = read_prompt_folders(prompts, self.check_meta)
        self.tasks += tuple(task for task in self.folders if task not in self.tasks)
        self.ratio = {**dict.fromkeys(self.tasks, 1), **self.ratio}
        self.known = {}                                  # task -> the texts of its folder
        for task, splits in self.folders.items():
            self.known[task] = {meta["prompt"] for metas in splits.values() for meta in metas}

    # Each world's own

    def load(self, path, device="cpu", dtype=torch.float32, size=None, t5="", text_encoders=""):
        """The Model of a file or folder. size: pixels; t5, text_encoders: for SD3.5 (sd3.py)."""
        raise NotImplementedError

    def own_prompt(self, rng, task, split, tags=None):
        """One prompt of the world's own. split: "train" or "eval"; tags: {tag: weight}."""
        raise NotImplementedError

    def detect(self, images, metas):
        """images (N, 3, H, W) in [0, 1] -> N lists of objects, each a dict with "class", "score",
        "box" (x0, y0, x1, y1) in pixels and "color" (or None)."""
        raise NotImplementedError

    def read(self, images):
        """images (N, 3, H, W) -> N strings, all the text of each image."""
        raise NotImplementedError

    def quality(self, images):
        """images (N, 3, H, W) -> (N,) scores that never look at the prompt."""
        raise ValueError(f"reward quality: the world '{self.name}' has none of its own; "
                         "expected deqa, pickscore, aesthetic, ...")

    def check_meta(self, meta):
        """ValueError if a GenEval prompt names what this world's detector does not know."""

    # The same for all

    def draw_prompt(self, rng, task, split, tags=None):
        """One prompt: of the task's folder if there is one, else the world's own."""
        rows = self.folders.get(task, {}).get(split)
        if rows:
            return rows[rng.integers(len(rows))]
        # A folder without this split leaves it to the world, which avoids what the folder has.
        while True:
            meta = self.own_prompt(rng, task, split, tags)
            if meta["prompt"] not in self.known.get(task, ()):
                return meta

    def own_eval_prompts(self, task, n, split):
        """n prompts of the world's own, with GenEval's tags in equal numbers."""
        rng = np.random.default_rng(EVAL_SEED)
        metas = []
        for i in range(n):
            tags = {self.tags[i % len(self.tags)]: 1} if task == "geneval" else None
            metas.append(self.own_prompt(rng, task, split, tags))
        return metas

    def eval_prompts(self, task, n, split="eval"):
        """n fixed prompts, the same for every model.

        A folder's are taken evenly, or, if n is more, all of them again and again. The split
        "train" gives prompts of training, to choose settings by without a look at those held out.
        """
        rows = self.folders.get(task, {}).get(split)
        if not rows:
            return self.own_eval_prompts(task, n, split)
        if n < len(rows):
            return [rows[j * len(rows) // n] for j in range(n)]
        return [rows[j % len(rows)] for j in range(n)]

    def batch(self, pattern, n, seed, it):
        """The n prompts of iteration it, the same list on every rank.

        pattern: tasks that take turns, e.g. ["geneval", "geneval", "ocr"].
        """
        rng = np.random.default_rng((seed, it))
        tasks = [pattern[(it * n + j) % len(pattern)] for j in range(n)]
        return [self.draw_prompt(rng, task, "train") for task in tasks]

    def check_prompts(self, tasks, split="train"):
        """Draw one prompt of each task, so that a task without prompts says so now."""
        for task in tasks:
            self.draw_prompt(np.random.default_rng(0), task, split)
