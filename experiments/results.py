"""Results on the disk, and what follows from them: gains over the base, curves.

"found" is everywhere what collect gives: job without its seed -> {seed: its result}.
"""
import json
from pathlib import Path

import numpy as np

from experiments.intervals import ratio_interval
from experiments.jobs import SECOND, TASKS

# Keys of a result. The first is also what eval.py calls its table.
HELD_OUT = "table: mean, standard error, n"
TRAIN = "on training prompts (to choose settings by)"
ALL_SCORES = "all scores: mean, standard error"         # eval.py's key
SNAPSHOT_TABLES = "iteration -> table"
SECONDS_IT = "s/it, median"


def collect(out):
    """Read the folder out."""
    found = {}
    for file in sorted(Path(out).glob("*-s*.json")):
        if file.stem == "fixed-states":
            continue
        name, seed = file.stem.rsplit("-s", 1)
        found.setdefault(name, {})[int(seed)] = json.loads(file.read_text())
    return found


def fixed_states_file(out):
    return Path(out) / "fixed-states.json"


def read_fixed_states(out):
    """{job: {set of states: {task: KL}}}, or {} before fixed_states.py ran."""
    file = fixed_states_file(out)
    return json.loads(file.read_text()) if file.exists() else {}


def score(result, column, table=HELD_OUT):
    """The mean of a column of a result's table."""
    return result[table][column][0]


def teachers_of(name):
    """{task: the result of the teacher that a model is measured by}: the one that taught it."""
    if name == "opd-second":
        return dict(zip(TASKS, SECOND))
    return dict(zip(TASKS, TASKS))


def shared_seeds(found, name, others):
    """The seeds of a model that all others have too."""
    seeds = []
    for seed in found.get(name, ()):
        if all(seed in found.get(other, ()) for other in others):
            seeds.append(seed)
    return seeds


def gains(found, name, seeds, task):
    """What a model gains over the base, and what the task's teacher does: (S,) over seeds each.

    Prompts and noise of a seed are the same for all three.
    """
    base = [score(found["base"][seed], task) for seed in seeds]
    model = [score(found[name][seed], task) for seed in seeds]
    teacher = [score(found[teachers_of(name)[task]][seed], task) for seed in seeds]
    return np.subtract(model, base), np.subtract(teacher, base)


# ------------------------------------------------------------------ curves

# What a student is at its iteration 0. Other runs begin as the base.
START = {"opd-merge": "merge", "opd-second": "merge-second", "opd-sft": "sft"}


def curve(found, name):
    """A run's part of the teacher's gain on the way: {task: [(iteration, Interval)]}.

    It begins with iteration 0 and ends with the run. A GRPO run ends at 1 by definition; a student
    is measured by the teachers that taught it.
    """
    start = START.get(name, "base")
    tasks = TASKS
    if name.endswith("again"):
        tasks = (name.removesuffix("-again"),)
    points = {}
    for task in tasks:
        goal = name if start == "base" else teachers_of(name)[task]
        seeds = shared_seeds(found, f"curve-{name}", (start, goal, "base", name))
        if seeds:
            base = [score(found["base"][seed], task) for seed in seeds]
            whole = [score(found[goal][seed], task) for seed in seeds]
            points[task] = []
            for it, scores in on_the_way(found, name, start, seeds, task):
                part = ratio_interval(np.subtract(scores, base), np.subtract(whole, base))
                points[task].append((it, part))
    return points


def on_the_way(found, name, start, seeds, task):
    """[(iteration, scores over seeds)] of a run, in order."""
    end = found[name][seeds[0]]["iterations"]
    scores = {0: [score(found[start][seed], task) for seed in seeds],
              end: [score(found[name][seed], task) for seed in seeds]}
    tables = {seed: found[f"curve-{name}"][seed][SNAPSHOT_TABLES] for seed in seeds}
    for it in tables[seeds[0]]:
        scores[int(it)] = [tables[seed][it][task][0] for seed in seeds]
    return sorted(scores.items())


def reached(points, enough=0.95):
    """The first iteration from which on all points of a curve are high enough, or None."""
    first = None
    for it, part in points:
        if part.mean < enough:
            first = None
        elif first is None:
            first = it
    return first
