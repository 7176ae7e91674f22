"""Estimates with 95% intervals that speak for other seeds and for other prompts.

The scores of a model are a matrix (1 + DRAWS, S), one column for each seed. Row 0 has its scores on
the prompts as they are. In each other row the prompts were drawn anew, with replacement, and the
same ones for all models and seeds (a bootstrap by prompt: all images of a prompt stay together).
A seed stands for teachers, training and noise together, as results/reproduce pairs them.

The variance of an estimate is the sum of two parts. Between seeds: the variance of the S values
over S, with S - 1 degrees of freedom. Between prompts: the variance of the mean over the DRAWS
rows. The noise of the images is in both, so an interval is rather too wide. Its half width is
Student's t times the root of the sum, with the degrees of freedom of Welch and Satterthwaite.
"""
import math
from typing import NamedTuple

import numpy as np

DRAWS = 400
# Degrees of freedom -> two-sided 95% point of Student's t. Between them 1 / dof is interpolated.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228,
       15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980, math.inf: 1.960}


class Interval(NamedTuple):
    mean: float
    half: float                                         # half of the width; nan if not known

    def show(self, form=".3f"):
        """"mean ± half", or only the mean if the width is not known."""
        text = f"{self.mean:{form}}"
        if math.isnan(self.half):
            return text
        return f"{text} ± {self.half:{form.lstrip('+')}}"

    def excludes_zero(self):
        return abs(self.mean) > self.half


def student(dof):
    """The two-sided 95% point of Student's t with so many degrees of freedom, also fractions."""
    inverse = [1 / n for n in reversed(T95)]
    return float(np.interp(1 / dof, inverse, list(reversed(T95.values()))))


def half_width(seeds, prompts):
    """Half of an interval. seeds: (S,) values; prompts: (DRAWS,) estimates, or empty."""
    between = np.var(seeds, ddof=1) / len(seeds) if len(seeds) > 1 else 0.0
    sampled = np.var(prompts, ddof=1) if len(prompts) > 1 else 0.0
    total = between + sampled
    if total == 0:
        return 0.0 if len(seeds) > 1 else math.nan
    dof = math.inf
    if between > 0:
        dof = total ** 2 / (between ** 2 / (len(seeds) - 1))
    return student(dof) * math.sqrt(total)


def mean_interval(scores):
    """The mean over seeds. scores (1 + DRAWS, S), or only (S,) if no prompts were drawn anew."""
    scores = np.atleast_2d(np.array(scores, float))
    return Interval(float(scores[0].mean()), half_width(scores[0], scores[1:].mean(1)))


def ratio_interval(above, below):
    """The ratio sum(above) / sum(below), over seeds. above, below: (1 + DRAWS, S) or (S,)."""
    above = np.atleast_2d(np.array(above, float))
    below = np.atleast_2d(np.array(below, float))
    ratio = above.sum(1) / below.sum(1)                                     # (1 + DRAWS,)
    # To first order a seed moves the ratio by (above - ratio * below) / mean(below).
    seeds = (above[0] - ratio[0] * below[0]) / below[0].mean()
    return Interval(float(ratio[0]), half_width(seeds, ratio[1:]))


def show_mean(scores, form=".3f"):
    return mean_interval(scores).show(form)
