"""
Rewards: one number for an image. GenEval's and OCR's rules are here, the networks in scorers/.

    spec = parse_reward("deqa=0.4,pickscore=0.6")
    total = score(spec, images, metas, world)["total"]       # (N,): what a policy is trained on

images are (N, 3, H, W) in [0, 1]. metas are the prompts with what they ask for, one dict an image
(worlds/prompts.py). The tiny world's rewards, GenEval and OCR ask the world what it sees in them
(worlds/world.py).
`python -m scorers NAME IMAGES PROMPTS` scores a folder of images.

Sources: GenEval (arXiv 2310.11513, djghosh13/geneval evaluation/evaluate_images.py); Flow-GRPO
(arXiv 2505.05470, yifan123/flow_grpo flow_grpo/ocr.py; its training form of GenEval is in
yifan123/reward-server reward_server/gen_eval.py).
"""
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

import scorers
from plumbing import dist
from worlds.prompts import RELATIONS, check_geneval_meta, ocr_target

GENEVAL_FORMS = ("soft", "strict", "benchmark")

# ------------------------------------------------------------------ GenEval


def relative_position(a, b) -> set[str]:
    """The relations for which "a is <relation> b" holds: none, one, or two near the diagonal.

    a and b are objects with a "box". y points down.
    """
    box_a = np.reshape(a["box"], (2, 2))                 # rows (x0, y0), (x1, y1)
    box_b = np.reshape(b["box"], (2, 2))
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)     # (2,), between the centres
    sizes = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    # A tenth of the sizes is slack: large objects have to be further apart to be clearly beside.
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    # The norm is taken before the slack, so the slack counts against both axes.
    dx, dy = clear / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def most_confident_first(objects, name):
    """The objects of a class, by falling score.

    Among equal scores the last object comes first, because the original reverses an argsort.
    """
    found = [obj for obj in objects if obj["class"] == name]
    found.sort(key=lambda obj: obj["score"])
    return found[::-1]


def score_clause(clause, found, groups):
    """How well the objects found match one clause of a prompt.

    groups: the objects of each earlier clause, None where it failed.
    Returns the parts of the soft score, and whether all is right.
    """
    wanted = clause["count"]
    parts = [1 - abs(wanted - len(found)) / wanted]
    right = len(found) == wanted
    # A wrong count costs one 0 part, even if the clause asks for colour and position.
    if not right and ("color" in clause or "position" in clause):
        parts.append(0.0)
    if right and "color" in clause:
        n_color = sum(obj["color"] == clause["color"] for obj in found)
        parts.append(1 - abs(wanted - n_color) / wanted)
        right = n_color == wanted
    if right and "position" in clause:
        relation, index = clause["position"]
        others = groups[index]
        if others is None:                               # the other object failed itself
            parts.append(0.0)
            return parts, False
        right = all(relation in relative_position(a, b) for a in found for b in others)
        # The released reward adds a 0 and a 1 for a wrong position (gen_eval.py:254 and 258). Two
        # misplaced objects score 3/4, not 2/3. We keep this, so that rewards compare.
        parts += [1.0] if right else [0.0, 1.0]
    return parts, right


def geneval_score(objects, meta, form="soft") -> float:
    """How well the objects found in one image match the prompt.

    soft: in (-inf, 1], the training reward: the mean of the parts, 1 each if all is right. An
        object too many costs as much as one too few, so a crowd makes it negative.
    strict: 0 or 1, all counts, colours and positions exactly right.
    benchmark: 0 or 1, GenEval's own rule, the one to report. It looks at the wanted number of most
        confident boxes, and forgives others unless an exclude clause forbids them.
    """
    if form not in GENEVAL_FORMS:
        raise ValueError(f"GenEval form: got {form!r}, expected one of {GENEVAL_FORMS}")
    check_geneval_meta(meta)
    parts = []
    groups = []
    for clause in meta["include"]:
        found = most_confident_first(objects, clause["class"])
        if form == "benchmark":
            found = found[:clause["count"]]
        its_parts, right = score_clause(clause, found, groups)
        parts += its_parts
        groups.append(found if right else None)
    if form == "soft":
        return sum(parts) / len(parts)
    correct = None not in groups
    if form == "benchmark":
        for clause in meta.get("exclude", []):
            n = sum(obj["class"] == clause["class"] for obj in objects)
            correct = correct and n < clause["count"]
    return float(correct)


# ------------------------------------------------------------------ OCR


def edit_distance(a, b) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))                        # row[j]: from a, read so far, to b[:j]
    for i, char_a in enumerate(a, 1):
        above_left = row[0]
        row[0] = i
        for j, char_b in enumerate(b, 1):
            substituted = above_left + (char_a != char_b)
            above_left = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def ocr_score(read, prompt) -> float:
    """1 - edits / length of the wanted text, in [0, 1].

    Case and spaces do not count, and text around the wanted one does not either.
    """
    read = read.replace(" ", "").lower()
    target = ocr_target(prompt).replace(" ", "").lower()
    edits = 0 if target in read else edit_distance(read, target)
    return 1 - min(edits, len(target)) / len(target)


# ------------------------------------------------------------------ the one table


@dataclass
class Reward:
    """A line of the table.

    score: a function (images, metas, world) -> (N,) numbers, as the reward is reported.
    scale: the policy trains on the score divided by it. eval.py divides by it for the average.
    where: the network in scorers/ that gives the score, if there is one.
    cheap: the tiny world computes it without a network. So more prompts are checked at the start.
    """
    score: Callable
    scale: float = 1.0
    where: str = ""
    cheap: bool = False


def for_each_image(name, results, metas):
    """Pairs (result, meta). zip alone would drop images from the end without a word."""
    if len(results) != len(metas):
        raise ValueError(f"reward {name}: got results for {len(results)} images, "
                         f"expected {len(metas)}")
    return zip(results, metas)


def geneval(form):
    """A reward that scores detected objects by one of GENEVAL_FORMS."""
    name = "geneval" if form == "soft" else f"geneval_{form}"

    def reward(images, metas, world):
        found = for_each_image(name, world.detect(images, metas), metas)
        return [geneval_score(objects, meta, form) for objects, meta in found]
    return Reward(reward, cheap=True)


def ocr(images, metas, world):
    texts = for_each_image("ocr", world.read(images), metas)
    return [ocr_score(text, meta["prompt"]) for text, meta in texts]


def quality(images, metas, world):
    return world.quality(images)


def preference(images, metas, world):
    return world.preference(images, metas)


def network(where, scale=1.0):
    """A reward that a network of scorers/ gives, loaded at first use."""
    def reward(images, metas, world):
        prompts = [meta["prompt"] for meta in metas]
        return scorers.get(where, images.device)(images, prompts).numpy()
    return Reward(reward, scale, where)


def jpeg(sign, scale=1.0):
    """A reward by JPEG size. sign is 1 or -1."""
    def reward(images, metas, world):
        from scorers.jpeg import jpeg_incompressibility
        return sign * jpeg_incompressibility(images).numpy()
    return Reward(reward, scale)


REWARDS = {
    # name                                             # meaning; reported range
    "geneval": geneval("soft"),                        # what and where, in parts; at most 1
    "geneval_strict": geneval("strict"),               # all exactly right; 0 or 1
    "geneval_benchmark": geneval("benchmark"),         # GenEval's own rule; 0 or 1
    "ocr": Reward(ocr, cheap=True),                    # the quoted text; 0 to 1
    "quality": Reward(quality, cheap=True),            # the tiny world's own; 0 to 1
    "preference": Reward(preference, cheap=True),      # the tiny world's own; 0 to 1
    "pickscore": network("clip.PickScore", 26),        # preference; about 20 to 24
    "clipscore": network("clip.CLIPScore", 30),        # agreement with the prompt; 25 to 35
    "hpsv2": network("clip.HPSv2"),                    # preference; about 0.3
    "imagereward": network("imagereward.ImageReward"),  # preference; -2 to 2
    "aesthetic": network("clip.Aesthetic"),            # looks; 1 to 10
    "deqa": network("deqa.DeQA", 5),                   # looks; 1 to 5, 16 GB
    "unifiedreward": network("judge.UnifiedReward", 5),  # a judge at $UNIFIEDREWARD_URL; 1 to 5
    "qwenvl": network("judge.QwenVL", 5),              # a judge at $QWENVL_URL; 1 to 5
    "jpeg_compressibility": jpeg(-1, 500),             # minus the file's size; kB
    "jpeg_incompressibility": jpeg(1),                 # the file's size; kB
}


def parse_reward(spec: str) -> dict[str, float]:
    """"geneval" -> {"geneval": 1.0}; "geneval=0.5,ocr=0.5" -> {"geneval": 0.5, "ocr": 0.5}."""
    weights = {}
    for item in spec.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if name not in REWARDS:
            raise ValueError(f"reward {spec!r}: got {name!r}, expected one of {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"reward {spec!r}: got {name} twice, expected each name once")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"reward {spec!r}: got weight {weight!r} for {name}, "
                             "expected a positive, finite number")
    return weights


def choose_rewards(tasks, specs, world, share=0.2):
    """{task: spec} for the scripts' --reward (specs, one for each task, or none).

    By default it is the world's own; of several tasks 0.8 of it plus 0.2 of world.judge (share).
    ValueError if a task has no reward of its own, or if the numbers differ.
    """
    if specs and len(specs) != len(tasks):
        raise ValueError(f"--reward: got {len(specs)} values for {len(tasks)} tasks "
                         f"({' '.join(tasks)})")
    without = [task for task in tasks if task not in world.reward]
    if without and not specs:
        raise ValueError(f"tasks {' '.join(tasks)}: {', '.join(without)} has no reward of its own; "
                         "expected --reward, one for each of these tasks")
    if specs:
        return {task: parse_reward(spec) for task, spec in zip(tasks, specs)}
    rewards = {task: parse_reward(world.reward[task]) for task in tasks}
    if len(tasks) > 1 and share:
        for task, spec in rewards.items():
            rewards[task] = {name: (1 - share) * weight for name, weight in spec.items()}
            rewards[task][world.judge] = rewards[task].get(world.judge, 0) + share
    return rewards


def advantages(reward, task, group, adv_std):
    """How much better is an image than the others of its prompt?

    reward (B,): of all ranks, the images of a group one after another; task (B,). Returns adv (B,)
    and signal (B,), which is False where all rewards of a group are equal.
    adv = (reward - mean of the group) / std, clipped to +-5. The std is of all rewards, of those of
    the same task, or of those of the group.
    """
    grouped = reward.view(-1, group)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    std = torch.full_like(reward, reward.std(unbiased=False))
    if adv_std == "group":
        std = grouped.std(1, unbiased=False).repeat_interleave(group)
    if adv_std == "task":
        for n in task.unique():
            std[task == n] = reward[task == n].std(unbiased=False)
    adv = (centred / (std + 1e-4)).clamp(-5, 5)          # 1e-4 as released
    signal = grouped.max(1).values > grouped.min(1).values
    return adv, signal.repeat_interleave(group)


class DetectOnce:
    """This stands for the world while one batch is scored. Its detector runs at most once."""

    def __init__(self, world):
        self.world = world
        self.read = world.read
        self.quality = world.quality
        self.preference = world.preference
        self.found = None

    def detect(self, images, metas):
        if self.found is None:
            self.found = self.world.detect(images, metas)
        return self.found


def score(spec, images, metas, world) -> dict:
    """Score N images by every reward of spec, {name: weight}.

    Returns {name: (N,) float32 as reported, ..., "total": sum of weight * score / scale, (N,)}.
    DEVIATION: flow_grpo gives an image the lowest score when its reader fails. A reward that fails
    raises here, since a 0 that no image has earned would be trained on.
    """
    world = DetectOnce(world)
    parts = {}
    for name in spec:
        values = np.asarray(REWARDS[name].score(images, metas, world), dtype=np.float32)
        if values.shape != (len(metas),) or not np.isfinite(values).all():
            raise ValueError(f"reward {name}: got shape {values.shape}, "
                             f"{np.sum(~np.isfinite(values))} of its values not finite, "
                             f"expected ({len(metas)},) finite numbers")
        parts[name] = values
    total = sum(weight * parts[name] / REWARDS[name].scale for name, weight in spec.items())
    return {**parts, "total": total}


def check_rewards(rewards, model, world, split="train", device="cpu"):
    """Score grey images against some prompts of each task, on the device.

    This stops the run if a reward does not fit its task or cannot be reached. It also loads
    whatever has weights, before any time is spent on sampling. rewards: {task: spec}.
    """
    images = torch.full((4, 3, model.resolution, model.resolution), 0.5, device=device)
    for task, spec in rewards.items():
        metas = []
        for seed in range(16):
            metas.append(world.draw_prompt(np.random.default_rng(seed), task, split))
        if not all(REWARDS[name].cheap for name in spec):
            metas = metas[:4]
        try:
            for i in range(0, len(metas), 4):
                score(spec, images, metas[i:i + 4], world)
        except ValueError as error:
            raise ValueError(f"reward {'+'.join(spec)} does not fit task '{task}': "
                             f"{error}") from None


class Judge:
    """A thread scores each image by its task's reward, while the next images are sampled.

    rewards: {task: spec}. submit() takes the images of an iteration piece by piece, totals() waits
    for them.
    """

    def __init__(self, rewards, model, world):
        self.rewards = rewards
        self.model = model
        self.world = world
        self.thread = ThreadPoolExecutor(1)
        self.waiting = []
        self.rows = []               # of the last iteration: an image's task, components and total

    def rate(self, latents, metas):
        images = self.model.images(latents)
        rows = [None] * len(metas)
        for task, spec in self.rewards.items():
            theirs = [j for j, meta in enumerate(metas) if meta["task"] == task]
            if not theirs:
                continue
            scores = score(spec, images[theirs], [metas[j] for j in theirs], self.world)
            for n, j in enumerate(theirs):
                values = {name: float(column[n]) for name, column in scores.items()}
                rows[j] = {"task": task, **values}
        return rows

    def submit(self, latents, metas):
        """latents (b, C, H, W), b prompts."""
        self.waiting.append(self.thread.submit(self.rate, latents, metas))

    def totals(self):
        """The rewards of all images submitted since the last call, in their order."""
        self.rows = []
        for future in self.waiting:
            self.rows += future.result()
        self.waiting = []
        return [row["total"] for row in self.rows]

    def reported(self):
        """For the log, one number for each image of totals().

        It is the total, but of a reward that is no sum it is the score as reported, not scaled.
        """
        numbers = []
        for row in self.rows:
            (name, weight), *others = self.rewards[row["task"]].items()
            if weight == 1 and not others:
                numbers.append(row[name])
            else:
                numbers.append(row["total"])
        return numbers

    def components(self):
        """The mean over all ranks of each part of a reward that is a sum: {"TASK/NAME": mean}."""
        names = []
        for task, spec in self.rewards.items():
            if len(spec) > 1:
                names += [(task, name) for name in spec]
        table = []
        for row in self.rows:
            table.append([row[name] if row["task"] == task else math.nan for task, name in names])
        means = dist.gather(torch.tensor(table, device=self.model.mmdit.pos_embed.device))
        means = means.nanmean(0).tolist()
        return {f"{task}/{name}": mean for (task, name), mean in zip(names, means)
                if not math.isnan(mean)}
