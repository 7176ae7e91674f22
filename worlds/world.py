"""What a world is: the prompts of some tasks, the judges of their pictures, and a model.

A world is where a model lives: the tiny one (tiny.py) or Stable Diffusion 3.5's (sd3.py). The
training scripts know only this interface. A new world is a subclass of World. It also needs a line
in WORLDS (worlds/__init__.py), and a line in each script's PRESETS. If its files do not name the
world in their metadata, world_name (worlds/__init__.py) needs a rule for them.
"""
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch

from model import MMDiT
from worlds.prompts import read_prompt_folders
from worlds.vae import VAE

EVAL_SEED = 20260508     # seed of evaluation's own prompts


@dataclass
class Model:
    """A base and what goes with it, on one device."""
    mmdit: MMDiT
    vae: VAE
    # The text encoder: B strings -> context (B, L, context_dim), pooled (B, pooled_dim). A run
    # first calls text.prepare(prompts, rank, world_size) with all prompts that it will use.
    text: object
    resolution: int          # side of the images, in pixels
    file: str                # path of the transformer's file

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
    """Tasks, prompts, judges and a model.

    A subclass must define load, own_prompt, detect and read. It may define quality, preference and
    check_meta.
    A prompt is a dict: "prompt", "task", "tag" and what its judge needs (worlds/prompts.py).
    prompts: ["TASK=DIR", ...], folders whose prompts replace the world's own (--prompts).
    """
    name = ""
    tasks = ()               # those with prompts or a reward here
    # GenEval's tags. eval.py reports each, and asks for two images a tag.
    tags = ()
    # Rank and alpha of a new adapter, if --lora-r and --lora-alpha are not given.
    lora = (16, 32.0)
    ratio = {}               # task -> its share of stage 2's prompts
    # The default reward of each task's teacher, in the form that rewards.parse_reward reads.
    reward = {}
    # The reward that never looks at the prompt. If stage 1 trains several tasks, every
    # default reward gets 0.2 of it.
    judge = "quality"
    score = {}               # task -> the reward that eval.py reports

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

    def preference(self, images, metas):
        """images (N, 3, H, W), N prompts -> (N,) scores of taste that read the prompt."""
        raise ValueError(f"reward preference: the world '{self.name}' has none of its own; "
                         "expected pickscore, hpsv2, imagereward, ...")

    def check_meta(self, meta):
        """ValueError if a GenEval prompt names what this world's detector does not know."""

    # The same for all

    @property
    def prompts_digest(self):
        """{task: a short hash of its folder's prompts}. It shows a run that a file was edited."""
        digests = {}
        for task, splits in self.folders.items():
            digests[task] = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
        return digests

    def draw_prompt(self, rng, task, split, tags=None):
        """One prompt: of the task's folder if there is one, else the world's own."""
        rows = self.folders.get(task, {}).get(split)
        if rows:
            return rows[rng.integers(len(rows))]
        return self.draw_own(rng, task, split, tags)

    def draw_own(self, rng, task, split, tags=None):
        """A prompt of the world's own that is not in the task's folder.

        If the folder lacks a split, the world draws it. That split must not repeat the folder's
        prompts.
        """
        for _ in range(1000):
            meta = self.own_prompt(rng, task, split, tags)
            if meta["prompt"] not in self.known.get(task, ()):
                return meta
        raise ValueError(f"--prompts {task}: the folder holds each of 1000 prompts that the world "
                         f"drew for its split '{split}'; expected a folder with that split")

    def own_eval_prompts(self, task, n, split):
        """n prompts of the world's own, with GenEval's tags in equal numbers."""
        rng = np.random.default_rng(EVAL_SEED)
        metas = []
        for i in range(n):
            tags = {self.tags[i % len(self.tags)]: 1} if task == "geneval" else None
            metas.append(self.draw_own(rng, task, split, tags))
        return metas

    def eval_prompts(self, task, n, split="eval"):
        """n fixed prompts, the same for every model.

        A folder with enough prompts is sampled evenly. A smaller one is repeated. The split "train"
        gives training prompts, on which settings are chosen without use of the held-out ones.
        """
        rows = self.folders.get(task, {}).get(split)
        if not rows:
            return self.own_eval_prompts(task, n, split)
        if n < len(rows):
            return [rows[j * len(rows) // n] for j in range(n)]
        return [rows[j % len(rows)] for j in range(n)]

    def batch(self, pattern, n, seed, it, mix):
        """The n prompts of iteration it, the same list on every rank.

        pattern: tasks that take turns, e.g. ["geneval", "geneval", "ocr"].
        mix: the task changes from prompt to prompt ("batch"), or from iteration to iteration
        ("alternate").
        """
        rng = np.random.default_rng((seed, it))
        if mix == "alternate":
            tasks = [pattern[it % len(pattern)]] * n
        else:
            tasks = [pattern[(it * n + j) % len(pattern)] for j in range(n)]
        return [self.draw_prompt(rng, task, "train") for task in tasks]

    def check_prompts(self, tasks, split="train"):
        """ValueError if a task has no prompts. A run calls this before any work starts."""
        for task in tasks:
            self.draw_prompt(np.random.default_rng(0), task, split)

    def tasks_with_prompts(self, split):
        """The tasks that have prompts of this split, the world's own or a folder's."""
        found = []
        for task in self.tasks:
            try:
                self.check_prompts([task], split)
            except ValueError:
                continue
            found.append(task)
        return found
