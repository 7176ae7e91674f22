"""Read the results on the disk, and compute gains over the base and curves from them.

"found" is always what collect returns: {job without its seed: {seed: its result}}.
"""
import json
from pathlib import Path

import numpy as np

from experiments.intervals import ratio_interval
from experiments.jobs import SECOND, TASKS

# Keys of a result. The first is also a key of eval.py's JSON.
HELD_OUT = "table: mean, standard error, n"
TRAIN = "on training prompts (to choose settings by)"
ALL_SCORES = "all scores: mean, standard error"         # also a key of eval.py's JSON
SNAPSHOT_TABLES = "iteration -> table"
SECONDS_IT = "s/it, median"


def collect(out):
    """Read all results in the folder out: {job without its seed: {seed: its result}}."""
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
    """{job: {set of states: {task: KL}}}, or {} if fixed_states.py has not run yet."""
    file = fixed_states_file(out)
    return json.loads(file.read_text()) if file.exists() else {}


def score(result, column, table=HELD_OUT):
    """The mean of a column of a result's table."""
    return result[table][column][0]


def teachers_of(name):
    """{task: name of the teacher's result} for the teachers that a model is compared with.

    They are those that taught it, or else the shipped ones.
    """
    if name == "opd-second":
        return dict(zip(TASKS, SECOND))
    return dict(zip(TASKS, TASKS))


def shared_seeds(found, name, others):
    """The seeds for which the model and all others have a result."""
    seeds = []
    for seed in found.get(name, ()):
        if all(seed in found.get(other, ()) for other in others):
            seeds.append(seed)
    return seeds


def gains(found, name, seeds, task):
    """The gains of a model and of the task's teacher over the base: (S,) each, one per seed.

    For each seed all three have the same prompts and the same noise.
    """
    base = [score(found["base"][seed], task) for seed in seeds]
    model = [score(found[name][seed], task) for seed in seeds]
    teacher = [score(found[teachers_of(name)[task]][seed], task) for seed in seeds]
    return np.subtract(model, base), np.subtract(teacher, base)


# ------------------------------------------------------------------ curves

# Student -> the model that it starts from. Other runs start from the base.
START = {"opd-merge": "merge", "opd-second": "merge-second", "opd-sft": "sft"}


def curve(found, name):
    """The part of the teacher's gain that a run has reached: {task: [(iteration, Interval)]}.

    It goes from iteration 0 to the end of the run. A GRPO run is compared with its own end, so it
    ends at 1 by definition. A student is compared with the teachers that taught it.
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
    """[(iteration, scores of a task, one per seed)] of a run, in order of the iterations."""
    end = found[name][seeds[0]]["iterations"]
    scores = {0: [score(found[start][seed], task) for seed in seeds],
              end: [score(found[name][seed], task) for seed in seeds]}
    tables = {seed: found[f"curve-{name}"][seed][SNAPSHOT_TABLES] for seed in seeds}
    for it in tables[seeds[0]]:
        scores[int(it)] = [tables[seed][it][task][0] for seed in seeds]
    return sorted(scores.items())


def reached(points, enough=0.95):
    """The first iteration from which all later points of a curve are at least enough, or None."""
    first = None
    for it, part in points:
        if part.mean < enough:
            first = None
        elif first is None:
            first = it
    return first
