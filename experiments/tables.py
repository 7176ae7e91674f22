"""The tables in results/reproduce.md and the generated parts of docs/results.md."""
from pathlib import Path

import numpy as np

from eval import ALL_SCORES
from experiments.intervals import mean_interval, ratio_interval, show_mean
from experiments.jobs import EARLY, ROUTED, TASKS, TEACHER_JOBS, TRAINED, commands
from experiments.passes import passes
from experiments.results import (
    SECONDS_IT,
    UNSEEN,
    collect,
    curve,
    gains,
    minus,
    pick,
    reached,
    scores,
    shared_seeds,
    snapshot,
)
from plumbing.files import write_text
from worlds.prompts import TAGS

# In this page each table is replaced between its marks: <!-- reproduce: NAME --> ... <!-- end -->
PAGE = "docs/results.md"

COLUMNS = (*TASKS, "average")
COLUMN_NAMES = ["GenEval", "OCR", "preference", "quality", "average"]
# Result -> its name in the tables. The order is that of the main table.
ROWS = {
    "base": "base",
    "teacher-geneval": "teacher `geneval`",
    "teacher-ocr": "teacher `ocr`",
    "teacher-preference": "teacher `preference`",
    "teacher-quality": "teacher `quality`",
    "mix": "GRPO-Mix, compute of teachers and student",
    "mix-batch": "GRPO-Mix, `--mix batch --adv-std group`",
    "mix-rank": "GRPO-Mix, rank 64",
    "sft": "SFT on the teachers' pictures",
    "sft-merge": "SFT from the average",
    "sft-long": "SFT on 4,000 pictures, 550 iterations",
    "sft-best": "SFT on 4,000 pictures, each the best of eight",
    "merge": "merge: the average of the teachers",
    "merge-sum": "merge: 0.75 of their sum",
    "opd-sft": "Flow-OPD from SFT",
    "opd": "Flow-OPD from the average",
    "opd-slow": "Flow-OPD from the average, half the rate",
    "opd-velocity": "Flow-OPD from the average, `velocity`",
    "opd-sum": "Flow-OPD from the sum, `velocity`",
}
# (model, other): a row of the differences, model minus other.
DIFFERENCES = [("opd", "mix"), ("opd", "mix-batch"), ("opd", "mix-rank"), ("opd", "sft"),
               ("opd", "sft-merge"), ("opd", "sft-long"), ("opd", "sft-best"), ("opd", "merge"),
               ("opd", "opd-sft"), ("opd-slow", "opd"), ("opd-slow", "mix"),
               ("opd-velocity", "opd"), ("opd-velocity", "opd-slow"), ("opd-velocity", "mix"),
               ("opd-velocity", "sft-merge"), ("sft-merge", "merge"),
               ("merge-sum", "merge"), ("merge-sum", "opd"), ("merge-sum", "opd-velocity"),
               ("merge-sum", "mix"), ("opd-sum", "merge-sum"), ("opd-sum", "opd-velocity"),
               ("alone-dense", "merge"), ("sft", "base"),
               *((name, "base") for name in TEACHER_JOBS.values()),
               ("mix", "seesaw-1"), ("seesaw-2", "seesaw-1"), ("seesaw-3", "seesaw-1")]
# Part -> the variant with which its variants are compared.
VARIANTS = {"objectives": "alone-kl", "states": "short", "mar": "short-lam0", "cold": "short",
            "targets": "short", "controls": "half"}
# Part -> further pairs (model, other). MAR: from the merge, with all iterations, and from the base.
FURTHER = {"mar": [("short", "short-lam0"), ("opd", "alone-kl"),
                   ("short-none", "short-none-lam0")]}


def grid(header, rows):
    """A Markdown table. header: list of strings; rows: list of such lists."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def title(name):
    return ROWS.get(name, f"`{name}`")


def own_passes():
    """{result: forward passes of its own training}. The passes of its teachers do not count."""
    own = {name: passes(command) for name, command in commands().items()}
    for name, command in commands().items():
        if "runs/rep-sft-" in " ".join(command):
            own[name] += own["sft"]
    return own


def difference(scores):
    """A cell: model minus model, bold if its interval does not contain 0."""
    interval = mean_interval(scores)
    cell = interval.show("+.3f")
    return f"**{cell}**" if interval.excludes_zero() else cell


# ------------------------------------------------------------------ main


def main_table(found):
    own = own_passes()
    rows = []
    for name, label in ROWS.items():
        results = list(found.get(name, {}).values())
        if results:
            cells = [show_mean(scores(results, column)) for column in COLUMNS]
            rows.append([label, str(len(results)), f"{own.get(name, 0) / 1e3:.0f}", *cells])
    return grid(["model", "seeds", "own passes, thousand", *COLUMN_NAMES], rows)


def share_table(found):
    """The part of each teacher's gain over the base, and of the routed tasks' gains together."""
    rows = []
    for name, label in ROWS.items():
        seeds = shared_seeds(found, name, "base", *TEACHER_JOBS.values())
        if not seeds or name == "base" or name.startswith("teacher-"):
            continue
        both = {task: gains(found, name, task, seeds) for task in TASKS}
        parts = [ratio_interval(*pair) for pair in both.values()]
        models, goals = zip(*(both[task] for task in ROUTED))
        parts.append(ratio_interval(sum(models), sum(goals)))
        rows.append([label, str(len(seeds)), *(part.show(".2f") for part in parts)])
    header = ["part of the teachers' gains over the base", "seeds", *COLUMN_NAMES[:-1],
              "the first three together"]
    return grid(header, rows)


def difference_rows(found, pairs):
    rows = []
    for name, other in pairs:
        seeds = shared_seeds(found, name, other)
        if seeds:
            cells = [difference(minus(found, name, other, column, seeds)) for column in COLUMNS]
            rows.append([f"{title(name)} minus {title(other)}", str(len(seeds)), *cells])
    return rows


def difference_table(found):
    """Model minus model, and the student minus each teacher on the teacher's own task."""
    rows = difference_rows(found, DIFFERENCES)
    for name in ("merge-sum", "opd", "opd-slow", "opd-velocity", "opd-sum", "opd-sft", "mix",
                 "mix-batch", "sft-long"):
        seeds = shared_seeds(found, name, *TEACHER_JOBS.values())
        if seeds:
            parts = [minus(found, name, TEACHER_JOBS[task], task, seeds) for task in TASKS]
            label = "each teacher on its own task (the last: of the first three)"
            rows.append(own_task_row(f"{title(name)} minus {label}", parts, seeds))
    return grid(["difference", "seeds", *COLUMN_NAMES], rows + early_rows(found))


def tag_table(found):
    """Model minus base by GenEval's tags: what an average hides."""
    rows = []
    for name, label in ROWS.items():
        seeds = shared_seeds(found, name, "base")
        if seeds and name != "base":
            cells = [difference(minus(found, name, "base", tag, seeds)) for tag in TAGS]
            rows.append([label, str(len(seeds)), *cells])
    return grid(["GenEval, minus the base", "seeds", *(tag.replace("_", " ") for tag in TAGS)],
                rows)


def own_task_row(label, parts, seeds):
    """A student minus each teacher on its own task, then the mean of these over ROUTED.

    parts: the differences, for the first of TASKS. The others have no number.
    """
    cells = [difference(part) for part in parts] + ["-"] * (len(TASKS) - len(parts))
    together = difference(np.mean(parts[:len(ROUTED)], axis=0))
    return [label, str(len(seeds)), *cells, together]


def early_rows(found):
    """The student of teachers that were stopped half-way, minus each of these on its own task."""
    seeds = shared_seeds(found, "opd-early", *(f"curve-{TEACHER_JOBS[task]}" for task in EARLY))
    if not seeds:
        return []
    parts = []
    for task, it in EARLY.items():
        teacher = snapshot(found, TEACHER_JOBS[task], str(it), seeds)
        parts.append(scores(pick(found, "opd-early", seeds), task) - scores(teacher, task))
    label = "half-way teachers minus each of these on its own task (the last: of the three)"
    return [own_task_row(f"Flow-OPD from {label}", parts, seeds)]


def variant_table(found):
    """Variants minus the one of their part that they are compared with."""
    own = own_passes()
    rows = []
    for part, other in VARIANTS.items():
        pairs = [(name, other) for name in TRAINED[part] if name != other]
        for name, other in pairs + FURTHER.get(part, []):
            for row in difference_rows(found, [(name, other)]):
                rows.append([part, *row, f"{own[name] / 1e3:.0f}"])
    return grid(["part", "difference", "seeds", *COLUMN_NAMES, "passes, thousand"], rows)


def unseen_table(found, names):
    """What no reward sees, and two numbers of eval.py: means and intervals over seeds."""
    rows = []
    for name in names:
        results = list(found.get(name, {}).values())
        if results:
            cells = []
            for key in ("sharpness", "distance", "colours", "places", "tones"):
                cells.append(show_mean([result[UNSEEN][key] for result in results]))
            cells.append(show_mean([result[UNSEEN]["alone"] for result in results], ".0f"))
            cells.append(show_mean([result["diversity"]["geneval"][0] for result in results]))
            quality = [result[ALL_SCORES]["quality on geneval"][0] for result in results]
            rows.append([title(name), *cells, show_mean(quality)])
    return grid(["model", "sharpness", "distance to clean pictures", "colours, bits",
                 "places, bits", "spread of tones", "of so many pictures (300 drawn)",
                 "diversity of GenEval's pictures", "their quality reward"], rows)


# ------------------------------------------------------------------ cost


def cost_rows(found, name, tasks):
    """Passes and seconds of a run until it has 95% and 99% of the teacher's gain."""
    plan = commands()
    runs = found[name].values()
    iters = next(iter(runs))["iterations"]
    whole = passes(plan[name])
    before = own_passes()[name] - whole                 # of a cold start
    seconds = np.mean([run[SECONDS_IT] for run in runs])
    rows = []
    for task in tasks:
        points = curve(found, name, task)
        if not points:
            continue
        row = [title(name), task, points[-1][1].show(".2f")]
        for enough in (0.95, 0.99):
            it = reached(points, enough)
            if it is None:
                row += ["not reached", "-", "-"]
            else:
                spent = whole / iters * it + before
                row += [str(it), f"{spent / 1e3:.0f}", f"{it * seconds:.0f}"]
        rows.append(row)
    return rows


def cost_table(found):
    rows = []
    for task, name in TEACHER_JOBS.items():
        if f"curve-{name}" in found:
            rows += cost_rows(found, name, (task,))
    for name in ("opd", "opd-sft"):
        if f"curve-{name}" in found:
            rows += cost_rows(found, name, TASKS)
    header = ["run", "task", "part of the gain at its end"]
    for enough in ("95%", "99%"):
        header += [f"first evaluated iteration with {enough}", "thousand passes",
                   "seconds of its iterations"]
    return grid(header, rows)


# ------------------------------------------------------------------ files

HEADINGS = {
    "main": "Main table",
    "share": "Part of the teachers' gains",
    "minus": "Differences",
    "tags": "GenEval by its tags",
    "variants": "Variants of stage 2",
    "unseen": "Beyond the scores (experiments/unseen.py)",
    "unseen-variants": "Beyond the scores: variants of stage 2",
    "cost": "Cost",
}
INTRODUCTION = """\
Held-out prompts, 600 images a task and seed. Mean and 95% interval over seeds (each with teachers \
of its own; for the base, noise of its own) and prompts (experiments/intervals.py); with one seed \
over prompts alone. The table beyond the scores: over seeds alone. Bold: a difference whose \
interval does not contain 0, as by chance one in twenty would be.
Made by `python -m experiments.reproduce --tables`.
"""


def make_tables(out):
    """{name: Markdown table}, made from the results in the folder out."""
    found = collect(out)
    variants = [name for part in VARIANTS for name in TRAINED[part]]
    made = {"main": main_table(found),
            "share": share_table(found),
            "minus": difference_table(found),
            "tags": tag_table(found),
            "variants": variant_table(found),
            "unseen": unseen_table(found, ROWS),
            "unseen-variants": unseen_table(found, variants),
            "cost": cost_table(found)}
    return {name: table if table.count("\n") > 1 else "No results yet."
            for name, table in made.items()}


def put(page, tables):
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
        write_text(page, put(Path(page).read_text(), tables))
    print(text)
