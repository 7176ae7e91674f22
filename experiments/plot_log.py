"""
Plot the logs of runs, to watch one or to compare several. A panel is a key, a line in it is a run.

    python -m experiments.plot_log runs/opd runs/opd-2                  # -> runs/plot.png
    python -m experiments.plot_log runs/opd --keys kl eval_ocr --smooth 20 --out opd.png

docs/files.md says what the keys mean. It needs matplotlib.
"""
import math
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from plumbing import cli
from plumbing.files import atomic
from plumbing.log import read_log

# Without --keys, those of the logs that match, in this order: at most PANELS.
DEFAULTS = ["eval_*", "reward_*", "loss", "kl", "kl_*", "grad_norm", "zero_std_ratio"]
PANELS = 6
GAP = 0.07               # least distance of two labels, as a part of a panel's height


@dataclass
class Config:
    # --- what
    # Folders of runs, or their log.jsonl.
    runs: list[str] = field(default_factory=list)
    # Keys of the logs, one panel each (default: what matters most in them, at most 6).
    keys: list[str] = field(default_factory=list)
    # Plot means over so many iterations.
    smooth: int = 1
    # The picture to write, a PNG.
    out: str = "runs/plot.png"


# ------------------------------------------------------------------ numbers


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_runs(paths):
    """Folders or logs -> {label: rows}. A label is a folder's name, or its path if two share one.
    """
    if not paths:
        raise ValueError("got no runs, expected folders, e.g. runs/opd")
    names = [Path(path).parent.name if Path(path).is_file() else Path(path).name for path in paths]
    runs = {}
    for path, name in zip(paths, names):
        file = Path(path) if Path(path).is_file() else Path(path) / "log.jsonl"
        if not file.is_file():
            raise ValueError(f"{path}: has no log.jsonl, expected the folder of a run")
        rows, damaged = read_log(file)
        if damaged:
            print(f"{file}: {damaged} damaged line(s) left out", file=sys.stderr)
        if not rows:
            raise ValueError(f"{file}: has no iterations yet")
        runs[path if names.count(name) > 1 else name] = rows
    return runs


def choose_keys(runs, wanted):
    """The keys to plot: those wanted, or the most important ones that the logs have."""
    known = {}                                           # a dict keeps their order
    for rows in runs.values():
        for row in rows:
            known.update({key: None for key in row if key != "iter" and is_number(row[key])})
    for key in wanted:
        if key not in known:
            raise ValueError(f"--keys {key}: no run has logged it; expected some of "
                             f"{', '.join(known)}")
    if wanted:
        return list(dict.fromkeys(wanted))
    found = [key for pattern in DEFAULTS for key in known if fnmatch(key, pattern)]
    return list(dict.fromkeys(found or known))[:PANELS]


def series(rows, key, smooth):
    """The iterations (n,) at which a run has logged a key, and its means (n,).

    A mean is over the values of the last `smooth` iterations. Numbers that are not finite are left
    out.
    """
    points = [(row["iter"], row[key]) for row in rows if is_number(row.get(key))]
    its = np.array([it for it, _ in points], int)
    values = np.array([value for _, value in points], float)
    starts = np.searchsorted(its, its - smooth, side="right")
    means = [values[start:end + 1].mean() for end, start in enumerate(starts)]
    return its, np.array(means)


def spread(heights):
    """Move the heights (n,) of labels up, so that any two are GAP or more apart, but not above 1.

    Their order stays.
    """
    out = np.array(heights, float)
    least = -math.inf
    for i in np.argsort(out, kind="stable"):
        out[i] = max(out[i], least)
        least = out[i] + GAP
    return out - max(0, out.max(initial=0) - 1)


# ------------------------------------------------------------------ the picture


def import_pyplot():
    """matplotlib.pyplot, without a window. ValueError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_panel(axes, runs, key, smooth):
    """One key: a line for each run, with its label at the line's end."""
    ends = []                                            # label, colour, iteration, value
    for n, (label, rows) in enumerate(runs.items()):
        its, values = series(rows, key, smooth)
        if not len(its):
            continue
        style = "o-" if len(its) <= 40 else "-"
        axes.plot(its, values, style, color=f"C{n}", markersize=3, linewidth=1.2)
        ends.append((label, f"C{n}", its[-1], values[-1]))
    axes.set_title(key, fontsize=10, loc="left")
    axes.set_xlabel("iteration", fontsize=8)
    axes.tick_params(labelsize=8)
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for *_, value in ends])
    for (label, color, _, _), height in zip(ends, heights):
        axes.text(1.01, height, label, color=color, fontsize=8, va="center",
                  transform=axes.transAxes)


def plot(plt, runs, keys, smooth, out):
    """Write the PNG."""
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False,
                                layout="constrained")
    for axes, key in zip(grid.flat, keys):
        draw_panel(axes, runs, key, smooth)
    for axes in grid.flat[len(keys):]:
        axes.remove()
    with atomic(out) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main(cfg):
    plt = import_pyplot()
    cli.positive(cfg, "smooth")
    if Path(cfg.out).suffix != ".png":
        raise ValueError(f"--out {cfg.out}: expected a name that ends in .png")
    runs = read_runs(cfg.runs)
    keys = choose_keys(runs, cfg.keys)
    plot(plt, runs, keys, cfg.smooth, cfg.out)
    print(f"wrote {cfg.out}: {', '.join(keys)}")


if __name__ == "__main__":
    cli.run(main, Config, positional=("runs",))
