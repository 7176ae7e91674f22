"""Signs that a run learns nothing or breaks: hopeless ones end it, doubtful ones are said once."""
import math
import statistics
import sys

from tqdm import tqdm

LAST = 10                               # iterations that are looked back on
FARTHEST = 0.1                          # a ratio that should be 1 and is further away is wrong
# The KL runs away if it is so many times its median of the last iterations. It was at most 5.1
# times that in our own runs (results/), where it grew from 0 to 700 times its first values.
JUMP = 10.0


def not_finite(what, value, it):
    """The words for a loss, a gradient or a KL that is no finite number. it: counted from 0."""
    return (f"iteration {it + 1}: the {what} is {value}; expected a finite number. This iteration "
            "was not saved, and the same command would end here again, as runs repeat exactly. "
            "Start a run of another --name with a lower --lr or --a, or --amp bfloat16")


class Health:
    """Call it with every row of the log. All ranks have the same row, so all ranks stop at once.

    rank: rank 0 prints the warnings. A row has "iter" and any of the other keys below.
    """

    def __init__(self, rank):
        self.rank = rank
        self.said = set()
        self.kls = []
        self.silent = 0                 # iterations without a signal, in a row

    def __call__(self, row):
        """ValueError if it makes no sense to go on."""
        for key, value in row.items():
            if key.startswith(("kl", "loss")) and not math.isfinite(value):
                raise ValueError(not_finite(key, value, row["iter"] - 1))
        far = row.get("ratio_err", 0.0)
        if not far <= FARTHEST:
            raise ValueError(f"iteration {row['iter']}: a ratio is {far:.3g} away from 1 before "
                             f"the first update, where it must be 1; expected at most {FARTHEST}. "
                             "The update does not compute what the rollout did: try "
                             "--amp float32, and no --compile")
        none = row.get("zero_std_ratio", 0.0) == 1.0
        self.silent = self.silent + 1 if none else 0
        if self.silent >= LAST:
            self.warn("signal", row, f"no group had a signal for {LAST} iterations in a row: all "
                      "images of a prompt get equal rewards, which teach nothing. Try other "
                      "prompts, more images a group, or another reward")
        kl = row.get("kl", 0.0)
        usual = statistics.median(self.kls) if len(self.kls) == LAST else 0.0
        if 0 < JUMP * usual < kl:
            self.warn("kl", row, f"the KL is {kl:.3g}, more than {JUMP:g} times its median of the "
                      f"last {LAST} iterations ({usual:.3g}). Look at the images; try a lower "
                      "--lr, or in stage 1 a higher --beta")
        self.kls = [*self.kls, kl][-LAST:]

    def warn(self, kind, row, text):
        """Print one line, once a kind."""
        if self.rank == 0 and kind not in self.said:
            tqdm.write(f"warning: iteration {row['iter']}: {text}", file=sys.stderr)
        self.said.add(kind)
