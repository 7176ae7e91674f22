"""Means over seeds, with their 95% intervals."""
import math
from typing import NamedTuple

import numpy as np

# Number n of values -> two-sided 95% point of Student's t with n - 1 degrees of freedom.
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
T95_MORE = 2.2                                          # for more than 10 values, about


class Interval(NamedTuple):
    mean: float
    half: float                                         # half of the width; nan for one seed

    def show(self, form=".3f"):
        """"mean ± half", or only the mean if there is one seed."""
        text = f"{self.mean:{form}}"
        if math.isnan(self.half):
            return text
        return f"{text} ± {self.half:{form.lstrip('+')}}"


def mean_interval(values):
    """The mean of values (S,), one per seed, with its 95% interval."""
    values = np.array(values, float)
    mean = float(values.mean())
    n = len(values)
    if n < 2:
        return Interval(mean, math.nan)
    half = T95.get(n, T95_MORE) * values.std(ddof=1) / math.sqrt(n)
    return Interval(mean, float(half))


def ratio_interval(above, below):
    """The ratio sum(above) / sum(below), with its interval. above, below: (S,), one per seed.

    With (T, S) it is the mean of the T ratios. The interval is that of the mean of
    (above - ratio * below) / mean(below).
    """
    above = np.atleast_2d(np.array(above, float))
    below = np.atleast_2d(np.array(below, float))
    ratio = above.sum(1, keepdims=True) / below.sum(1, keepdims=True)
    residual = (above - ratio * below) / below.mean(1, keepdims=True)
    return Interval(float(ratio.mean()), mean_interval(residual.mean(0)).half)


def show_mean(values, form=".3f"):
    return mean_interval(values).show(form)
