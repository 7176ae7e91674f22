"""The tables in results/reproduce.md and the generated parts of docs/results.md."""
import math
from pathlib import Path

import numpy as np

from experiments.intervals import ratio_interval, show_mean
from experiments.jobs import PARTS, TASKS, commands
from experiments.passes import passes
from experiments.results import (
    HELD_OUT,
    SECONDS_IT,
    TRAIN,
    collect,
    curve,
    gains,
    reached,
    read_fixed_states,
    score,
    shared_seeds,
    teachers_of,
)
from plumbing.files import write_text

# In this page each table is replaced between its marks: <!-- reproduce: NAME --> ... <!-- end -->
PAGE = "docs/results.md"

COLUMNS = (*TASKS, "average")
COLUMN_NAMES = ["GenEval", "OCR", "quality", "average"]
# Further columns that describe a run, besides the scores.
OWN_COLUMNS = ["quality reward of GenEval's pictures", "their diversity",
               "KL to the teachers at their states, 1e-3", "at the base's states"]
# Result -> its name in the tables. The order is that of the main table.
ROWS = {
    "base": "base",
    "geneval": "teacher `geneval`",
    "ocr": "teacher `ocr`",
    "quality": "teacher `quality`",
    "geneval-second": "`geneval`, a second run",
    "ocr-second": "`ocr`, a second run",
    "quality-second": "`quality`, a second run",
    "merge": "merge of the three",
    "merge-second": "merge of the second runs",
    "sft": "SFT on teachers' pictures (the cold start)",
    "sft-equal": "SFT, distillation's compute",
    "mix-geneval-ocr": "GRPO-Mix of GenEval and OCR",
    "mix-small": "GRPO-Mix, distillation's compute",
    "mix-group": "the same, `--adv-std group`",
    "mix-whole": "GRPO-Mix, compute of teachers + distillation",
    "mix-whole-group": "the same, `--adv-std group`",
    "opd-sft": "**Flow-OPD from SFT**",
    "opd-merge": "**Flow-OPD from merge**",
    "opd-second": "**Flow-OPD from merge, the second teachers**",
}


def title(name):
    """A result's name that is clear without the row above it: "the same" is written out."""
    if name == "mix-group":
        return ROWS[name].replace("the same", ROWS["mix-small"])
    if name == "mix-whole-group":
        return ROWS[name].replace("the same", ROWS["mix-whole"])
    return ROWS[name]


def grid(header, rows):
    """A Markdown table. header: list of strings; rows: list of such lists."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def own_cells(name, results, kls):
    """The cells of the OWN_COLUMNS. kls: the result of read_fixed_states."""
    quality = [result["all scores"]["quality on geneval"][0] for result in results.values()]
    diversity = [result["diversity"]["geneval"][0] for result in results.values()]
    cells = [show_mean(quality), show_mean(diversity)]
    known = [kls[f"{name}-s{seed}"] for seed in results if f"{name}-s{seed}" in kls]
    for states in ("teacher's states", "base's states"):
        distances = [1000 * np.mean(list(kl[states].values())) for kl in known]
        cells.append(show_mean(distances, ".2f") if known else "-")
    return cells


# ------------------------------------------------------------------ main


def own_passes():
    """{result: forward passes of its own training}. The passes of its teachers do not count."""
    own = {name: passes(command) for name, command in commands().items()}
    for task in TASKS:                                  # trained by the same commands
        own[task] = own[f"{task}-again"]
        own[f"{task}-second"] = own[f"{task}-again"]
    own["opd-sft"] += own["sft"]
    return own


def main_table(found, kls):
    own = own_passes()
    rows = []
    for name, label in ROWS.items():
        if name not in found:
            continue
        results = found[name]
        row = [label, str(len(results)), f"{own.get(name, 0) / 1e3:.0f}"]
        for column in COLUMNS:
            row.append(show_mean([score(result, column) for result in results.values()]))
        rows.append(row + own_cells(name, results, kls))
    header = ["model", "seeds", "own passes, thousand", *COLUMN_NAMES, *OWN_COLUMNS]
    return grid(header, rows)


def share_table(found):
    """The part of the teachers' gain that each model reaches: a ratio of sums over all seeds."""
    rows = []
    for name in ("mix-small", "mix-group", "mix-whole", "mix-whole-group", "sft-equal", "opd-sft",
                 "opd-merge", "opd-second"):
        seeds = shared_seeds(found, name, ["base", *teachers_of(name).values()])
        if not seeds:
            continue
        row = [title(name), str(len(seeds))]
        models = []
        teachers = []
        for task in TASKS:
            model, teacher = gains(found, name, seeds, task)
            row.append(ratio_interval(model, teacher).show(".2f"))
            models.append(model)
            teachers.append(teacher)
        rows.append([*row, ratio_interval(models, teachers).show(".2f")])
    header = ["part of the teacher's gain over the base", "seeds", "GenEval", "OCR", "quality",
              "mean"]
    return grid(header, rows)


# ------------------------------------------------------------------ differences

# (model, other): the table shows model minus other. None: minus each teacher on its own task.
DIFFERENCES = [
    ("opd-merge", None),
    ("opd-second", None),
    ("opd-sft", None),
    ("half-extrapolate", None),
    ("mix-geneval-ocr", None),
    ("mix-whole", None),
    ("mix-whole-group", None),
    ("opd-merge", "mix-whole"),
    ("opd-second", "mix-whole"),
    ("opd-merge", "mix-whole-group"),
    ("opd-second", "mix-whole-group"),
    ("opd-merge", "mix-small"),
    ("opd-merge", "sft-equal"),
    ("half-none", "sft-equal"),
    ("opd-merge", "opd-sft"),
]
# Names of results that are not rows of the main table.
HALVES = {"half-extrapolate":
              "Flow-OPD from merge, half of the budget, `--extrapolate 1.25`,",
          "half-none": "Flow-OPD from the base, half of the budget,"}


def subtrahends(name, other):
    """{column: name of the result that is subtracted in this column}."""
    if other:
        return dict.fromkeys(COLUMNS, other)
    teachers = teachers_of(name)
    if name == "mix-geneval-ocr":                       # it was not trained on quality
        del teachers["quality"]
    return teachers


def difference_label(name, other):
    whose = HALVES.get(name) or title(name)
    what = title(other) if other else "each teacher on its own task"
    return f"{whose} minus {what}".replace("**", "")


def difference_table(found):
    """Model minus model, for each seed, with the same prompts and the same noise.

    With a single seed, the number in brackets is a 95% interval over its images only. It combines
    the errors of both models as if they were independent.
    """
    rows = []
    for name, other in DIFFERENCES:
        others = subtrahends(name, other)
        seeds = shared_seeds(found, name, others.values())
        if not seeds:
            continue
        row = [difference_label(name, other), str(len(seeds))]
        for column, subtrahend in others.items():
            differences = []
            for seed in seeds:
                mean, error, _ = found[name][seed][HELD_OUT][column]
                other_mean, other_error, _ = found[subtrahend][seed][HELD_OUT][column]
                differences.append(mean - other_mean)
            cell = show_mean(differences, "+.3f")
            if len(seeds) == 1:
                cell += f" (± {1.96 * math.hypot(error, other_error):.3f})"
            row.append(cell)
        without = len(COLUMNS) - len(others)
        rows.append(row + [""] * without)
    return grid(["difference", "seeds", *COLUMN_NAMES], rows)


def compared_with(name, part):
    """The run that is subtracted from a run at half of the budget (None: nothing is).

    Usually it is the default, half. For runs without the anchor, or with another weight of it, it
    is half-lam0. For runs without the anchor at the slow rate, it is half-slow-lam0.
    """
    special = {"half": None, "merge": "half-lam0", "half-lam0": "half",
               "half-slow-lam0": "half-lam0"}
    if name in special:
        return special[name]
    if name.endswith("slow-lam0"):
        return "half-slow-lam0"
    if part == "mar" or name.endswith("lam0"):
        return "half-lam0"
    return "half"


def ablation_label(name):
    labels = {"half": "`default`, not minus anything", "merge": "the merge, iteration 0"}
    return labels.get(name, f"`{name.removeprefix('half-')}`")


def ablation_row(found, name, other, kls):
    """One run minus another, for each seed. In the last cells nothing is subtracted."""
    results = found[name]
    form = ".3f"
    minus = "-"
    if other:
        results = {seed: result for seed, result in results.items() if seed in found.get(other, ())}
        form = "+.3f"
        minus = "default" if other == "half" else other.removeprefix("half-")
    row = [ablation_label(name), minus, str(len(results))]
    for table, column in [*((HELD_OUT, column) for column in COLUMNS), (TRAIN, "average")]:
        values = []
        for seed, result in results.items():
            value = score(result, column, table)
            if other:
                value -= score(found[other][seed], column, table)
            values.append(value)
        row.append(show_mean(values, form))
    return row + own_cells(name, results, kls)


def part_of(found, name):
    if name == "merge":                                 # start of the runs in that part
        return "objectives"
    return next(iter(found[name].values()))["part"]


def ablation_table(found, kls):
    """Runs at half of the budget, sorted by part. The default comes first in its part."""
    names = [name for name in found if name.startswith("half") or name == "merge"]
    names.sort(key=lambda name: (PARTS.index(part_of(found, name)), name != "half"))
    rows = []
    for name in names:
        other = compared_with(name, part_of(found, name))
        rows.append(ablation_row(found, name, other, kls))
    header = ["run", "minus", "seeds", *COLUMN_NAMES, "the same on training prompts", *OWN_COLUMNS]
    return grid(header, rows)


# ------------------------------------------------------------------ cost


def teachers_cost(found, total):
    """[the row of the three second teachers together], or [] unless all three ran."""
    runs = []
    for task in TASKS:
        runs += found.get(f"{task}-again", {}).values()
    if len(runs) < 3:
        return []
    seconds = sum(run[SECONDS_IT] * run["iterations"] for run in runs)
    return [["GRPO, second runs", "all three, to their ends", "", "1.00", "", "",
             f"{total / 1e3:.0f}", "100.0%", f"{seconds:.0f}"]]


def cost_row(found, name, task, points, total):
    """Passes and seconds of a run until it has 95% of the teacher's gain.

    points: the run's curve on this task; total: forward passes of all three teachers.
    """
    plan = commands()
    runs = found.get(name, {}).values()
    label = title(name).replace("**", "") if name in ROWS else "GRPO, second run"
    end, at_end = points[-1]
    row = [label, task, str(end), f"{at_end.mean:.2f}"]
    it = reached(points)
    if it is None:
        return [*row, "not reached", "-", "-", "-", "-"]
    spent = passes(plan[name]) / end * it
    if name == "opd-sft":                               # the merge costs nothing
        spent += passes(plan["sft"])
    seconds = "-"
    if all(run["timed alone"] for run in runs):
        seconds = f"{it * np.mean([run[SECONDS_IT] for run in runs]):.0f}"
    part = dict(points)[it].show(".2f")
    return [*row, str(it), part, f"{spent / 1e3:.0f}", f"{spent / total:.1%}", seconds]


def least(points):
    """At each iteration the lowest of the tasks' points. points: {task: its curve}."""
    curves = zip(*(points[task] for task in TASKS))
    return [(together[0][0], min(part for _, part in together)) for together in curves]


def cost_table(found):
    """For each run: forward passes and seconds until it has 95% of the teacher's gain."""
    plan = commands()
    total = sum(passes(plan[f"{task}-again"]) for task in TASKS)
    rows = teachers_cost(found, total)
    for name in ("geneval-again", "ocr-again", "quality-again", "opd-merge", "opd-second",
                 "opd-sft"):
        if f"curve-{name}" not in found:
            continue
        points = curve(found, name)
        if len(points) == len(TASKS):
            points["all three"] = least(points)
        for task in points:
            rows.append(cost_row(found, name, task, points[task], total))
    header = ["run", "task", "iterations in all", "part of the gain at the end",
              "iterations to 0.95", "part there", "thousand passes",
              f"of the teachers' {total / 1e3:.0f}", "seconds"]
    return grid(header, rows)


# ------------------------------------------------------------------ files

HEADINGS = {
    "main": "Main table",
    "share": "Part of the teachers' gains",
    "minus": "Differences, seed by seed",
    "cost": "Cost",
    "half": "Half of the budget: scores minus the default's, or lam0's, seed by seed; "
            "the last four columns are the run's own",
}
INTRODUCTION = """\
Mean and 95% interval over seeds (Student's t; a number alone is one seed). Held-out prompts, \
600 images a task and seed.
Made by `python -m experiments.reproduce --tables`.
"""


def make_tables(out):
    """{name: Markdown table}, made from the results in the folder out."""
    found = collect(out)
    kls = read_fixed_states(out)
    return {"main": main_table(found, kls),
            "share": share_table(found),
            "minus": difference_table(found),
            "cost": cost_table(found),
            "half": ablation_table(found, kls)}


def fill(page, tables):
    """Put each table between its marks in the text of a page, if the page has those marks."""
    for name, table in tables.items():
        start = f"<!-- reproduce: {name} -->\n"
        end = "<!-- end -->"
        if start in page:
            head, rest = page.split(start, 1)
            tail = rest.split(end, 1)[1]
            page = head + start + table + "\n" + end + tail
    return page


def write_tables(out, page=None):
    """Write and print OUT.md. Also put the tables into the page, if it exists."""
    tables = make_tables(out)
    text = INTRODUCTION
    for name, table in tables.items():
        text += f"\n## {HEADINGS[name]}\n\n{table}\n"
    write_text(f"{out}.md", text)
    if page and Path(page).exists():
        write_text(page, fill(Path(page).read_text(), tables))
    print(text)
