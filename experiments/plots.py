"""The plot of the results: curves over compute, and the variants at half of the budget."""
import math

import numpy as np

from experiments.intervals import mean_interval
from experiments.jobs import PARTS, TASKS, commands
from experiments.passes import passes
from experiments.results import collect, curve, score
from experiments.tables import ROWS, part_of

# Run -> the style of its line.
STYLES = {"geneval-again": "--", "ocr-again": "--", "quality-again": "--",
          "opd-merge": "-", "opd-sft": ":"}


def draw_curves(axes, found):
    """Plot the part of the teacher's gain that a run has reached, over its forward passes."""
    plan = commands()
    for name, style in STYLES.items():
        if f"curve-{name}" not in found:
            continue
        whole = passes(plan[name])
        start = passes(plan["sft"]) if name == "opd-sft" else 0
        model = ROWS[name].strip("*") if name in ROWS else "GRPO"
        for task, points in curve(found, name).items():
            its = np.array([it for it, _ in points], float)
            parts = np.array([part.mean for _, part in points])
            halves = np.nan_to_num([part.half for _, part in points])
            spent = (its * whole / its[-1] + start) / 1e6
            axes.errorbar(spent, parts, halves, color=f"C{TASKS.index(task)}", linestyle=style,
                          capsize=2, label=f"{task}, {model}")
    axes.axhline(0.95, color="grey", linewidth=0.5)
    axes.set(xlabel="million forward passes of one image",
             ylabel="part of the teacher's gain over the base", ylim=(-0.4, 1.15))
    axes.set_xscale("symlog", linthresh=0.02)
    axes.set_xlim(left=-0.002)
    axes.legend(fontsize=7)


def draw_variants(axes, found):
    """Plot each variant's average score minus the default's.

    A point with a bar is the mean over seeds and its interval. Each tick is one seed.
    """
    names = [name for name in found if name.startswith("half-")]
    names.sort(key=lambda name: -PARTS.index(part_of(found, name)))
    default = found.get("half", {})
    for y, name in enumerate(names):
        differences = []
        for seed, result in found[name].items():
            if seed in default:
                differences.append(score(result, "average") - score(default[seed], "average"))
        mean, half = mean_interval(differences)
        error = 0 if math.isnan(half) else half
        axes.errorbar(mean, y, xerr=error, fmt="o", color="C0", capsize=3)
        axes.plot(differences, [y] * len(differences), "|", color="grey")
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(names)), [name.removeprefix("half-") for name in names])
    axes.set(xlabel="average score minus the default's, at half of the budget")
    axes.set_xscale("symlog", linthresh=0.02)


def plot(out):
    """Draw OUT.png from the results in the folder out. Only this function needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = collect(out)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5))
    draw_curves(left, found)
    draw_variants(right, found)
    figure.tight_layout()
    figure.savefig(f"{out}.png", dpi=110)
