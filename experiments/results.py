"""Read the results on the disk: the scores of models on the same prompts, drawn anew or not.

"found" is always what collect returns: {job without its seed: {seed: its result}}.
"""
import json
from functools import cache
from pathlib import Path

import numpy as np

from eval import SCORES
from experiments.intervals import DRAWS, ratio_interval
from experiments.jobs import TASKS, TEACHER_JOBS
from experiments.unseen import BASE
from worlds import open_world
from worlds.prompts import TAGS

# Keys of a result.
OF_BASE = "fingerprint of the base"
TRAIN = "on training prompts (to choose settings by)"
SNAPSHOTS = "iteration -> scores of each image"
UNSEEN = "what no reward sees"
SECONDS_IT = "s/it, median"


def collect(out):
    """Read all results in the folder out: {job without its seed: {seed: its result}}.

    ValueError if they are of different bases, as then the prompts may differ too.
    """
    found = {}
    bases = {}
    for file in sorted(Path(out).glob("*-s*.json")):
        name, seed = file.stem.rsplit("-s", 1)
        result = json.loads(file.read_text())
        found.setdefault(name, {})[int(seed)] = result
        bases.setdefault(result[OF_BASE], file)
    if len(bases) > 1:
        one, other, *_ = bases.values()
        raise ValueError(f"{one} and {other}: are of different bases; expected results of one "
                         "world")
    return found


def image_weights(tags, prompts, draws=DRAWS):
    """(1 + draws, n): how much each of n images counts in the mean over tags of each tag's mean.

    tags, prompts: what each image shows. Row 0 has all prompts as they are. In each other row the
    prompts of each tag were drawn anew, with replacement.
    """
    rng = np.random.default_rng(0)
    images = {}                                     # tag -> prompt -> its images
    for i, (tag, prompt) in enumerate(zip(tags, prompts)):
        images.setdefault(tag, {}).setdefault(prompt, []).append(i)
    table = np.zeros((1 + draws, len(tags)))
    for by_prompt in images.values():
        rows = list(by_prompt.values())
        repeats = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
        repeats = np.vstack([np.ones(len(rows)), repeats])                  # (1 + draws, prompts)
        counted = repeats @ np.array([len(row) for row in rows])            # images in each draw
        for row, repeat in zip(rows, repeats.T):
            table[:, row] = (repeat / counted / len(images))[:, None]
    return table


@cache
def weights(task, n):
    """The tags (n,) and image_weights of a task's n held-out images.

    Only GenEval's score is a mean over tags. Another task counts as one tag.
    """
    metas = open_world(BASE).eval_prompts(task, n)
    tags = np.array([meta["tag"] if task == "geneval" else task for meta in metas])
    return tags, image_weights(tags, [meta["prompt"] for meta in metas])


def scores(results, column):
    """(1 + DRAWS, S) scores of S results. column: a task, one of GenEval's tags, or average."""
    if column == "average":
        return np.mean([scores(results, task) for task in TASKS], axis=0)
    task = "geneval" if column in TAGS else column
    images = np.array([result[SCORES][task] for result in results])         # (S, n)
    tags, table = weights(task, images.shape[1])
    if column in TAGS:
        own = tags == column
        return table[:, own] * len(TAGS) @ images[:, own].T
    return table @ images.T


def pick(found, name, seeds):
    return [found[name][seed] for seed in seeds]


def shared_seeds(found, *names):
    """The seeds for which all of these models have a result."""
    return sorted(set.intersection(*(set(found.get(name, ())) for name in names)))


def minus(found, name, other, column, seeds):
    """Model minus other, (1 + DRAWS, S), with the same prompts and noise."""
    return scores(pick(found, name, seeds), column) - scores(pick(found, other, seeds), column)


def gains(found, name, task, seeds):
    """The gains of a model and of the task's teacher over the base, (1 + DRAWS, S) each."""
    base = scores(pick(found, "base", seeds), task)
    model = scores(pick(found, name, seeds), task) - base
    return model, scores(pick(found, TEACHER_JOBS[task], seeds), task) - base


# ------------------------------------------------------------------ curves


def snapshot(found, run, it, seeds):
    """The results of a run's snapshot at an iteration, as scores takes them. it: a string."""
    return [{SCORES: result[SNAPSHOTS][it]} for result in pick(found, f"curve-{run}", seeds)]


# Run -> the model that it starts from. Others start from the base.
START = {"opd": "merge", "opd-sft": "sft"}


def curve(found, name, task):
    """The part of the teacher's gain that a run has along its way: [(iteration, Interval)].

    It begins with what the run starts from, at iteration 0, and ends with its result.
    """
    start = START.get(name, "base")
    seeds = shared_seeds(found, name, f"curve-{name}", "base", start, TEACHER_JOBS[task])
    if not seeds:
        return []
    base = scores(pick(found, "base", seeds), task)
    goal = scores(pick(found, TEACHER_JOBS[task], seeds), task) - base
    ends = pick(found, name, seeds)
    images = {0: pick(found, start, seeds), ends[0]["iterations"]: ends}
    for it in found[f"curve-{name}"][seeds[0]][SNAPSHOTS]:
        images[int(it)] = snapshot(found, name, it, seeds)
    points = []
    for it in sorted(images):
        if task in images[it][0][SCORES]:
            gain = scores(images[it], task) - base
            points.append((it, ratio_interval(gain, goal)))
    return points


def reached(points, enough):
    """The first iteration from which all later points of a curve are at least enough, or None."""
    first = None
    for it, part in points:
        if part.mean < enough:
            first = None
        elif first is None:
            first = it
    return first
