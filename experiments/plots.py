"""The two charts of the results: what the gains cost, and what each model scores."""
import numpy as np

from experiments.intervals import mean_interval
from experiments.jobs import TASKS, TEACHER_JOBS, commands
from experiments.passes import passes
from experiments.results import collect, curve, scores
from experiments.tables import COLUMN_NAMES, ROWS, own_passes

COLOURS = dict(zip(TASKS, ("C0", "C1", "C2", "C3")))


def draw_line(axes, found, name, task, style, label, above=0):
    """The part of the teacher's gain that a run has, over its forward passes.

    The label stands so many points above the line's end, or right of it.
    """
    points = curve(found, name, task)
    if not points:
        return
    plan = commands()
    iters = next(iter(found[name].values()))["iterations"]
    whole = passes(plan[name])
    spent = np.array([it * whole / iters + own_passes()[name] - whole for it, _ in points]) / 1e3
    parts = [part.mean for _, part in points]
    axes.plot(np.maximum(spent, 1), parts, style, color=COLOURS[task])
    axes.annotate(label, (spent[-1], parts[-1]), xytext=(0 if above else 4, above),
                  textcoords="offset points", color=COLOURS[task], fontsize=8, va="center",
                  ha="center" if above else "left")


def draw_cost(axes, found):
    """Dashed: each teacher by GRPO. Solid: the one student that has all of their skills."""
    # Their ends lie beside each other, so their labels stand one above the other.
    for n, (task, name) in enumerate(TEACHER_JOBS.items()):
        draw_line(axes, found, name, task, "--", f"GRPO, {task}", above=8 + 12 * n)
        draw_line(axes, found, "opd", task, "-", "" if task != TASKS[0] else "Flow-OPD")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set_xscale("log")
    axes.set(xlabel="thousand forward passes of its own training (the start is drawn at 1)",
             ylabel="part of the teacher's gain over the base", ylim=(-0.05, 1.25))


def draw_scores(axes, found):
    """A row a model, a dot a task, with its interval."""
    names = [name for name in ROWS if name in found][::-1]
    for y, name in enumerate(names):
        for n, task in enumerate(TASKS):
            interval = mean_interval(scores(list(found[name].values()), task))
            axes.errorbar(interval.mean, y + 0.12 * (1.5 - n), xerr=np.nan_to_num(interval.half),
                          fmt="o", markersize=4, color=COLOURS[task],
                          label=COLUMN_NAMES[n] if y == 0 else None)
    axes.set_yticks(range(len(names)), [ROWS[name].replace("`", "") for name in names])
    axes.set(xlabel="score on held-out prompts", xlim=(0.3, 1.02))
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(axis="y", linewidth=0.3)


def plot(out):
    """Draw OUT.png from the results in the folder out. Only this function needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = collect(out)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    draw_cost(left, found)
    draw_scores(right, found)
    figure.tight_layout()
    figure.savefig(f"{out}.png", dpi=110)
