"""The log of a run.

Each iteration is one line on the screen (4 significant digits) and one in DIR/log.jsonl (8
decimals).
"""
import json
from pathlib import Path

from tqdm import tqdm

from plumbing.files import write_text


def iteration_of(line):
    """The iteration of a line of the log. It is infinity if a kill cut the line short."""
    try:
        return json.loads(line)["iter"]
    except json.JSONDecodeError:
        return float("inf")


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stored(value):
    return round(value, 8) if isinstance(value, float) else value


class Log:
    """Writes the log on rank 0, and the settings of the run to DIR/config.json.

    resume_at: the iterations that are done already, 0 in a new run.
    """

    def __init__(self, folder, rank, config, resume_at=0):
        self.path = Path(folder) / "log.jsonl"
        self.on = rank == 0
        if not self.on:
            return
        if resume_at:
            done = "is finished" if resume_at == config.get("iters") else "goes on"
            print(f"{folder}: {done}, at iteration {resume_at}. If the code has changed since, "
                  "give --name NEW to train anew.")
        # A resumed run drops the lines of iterations that it will repeat.
        lines = []
        if resume_at and self.path.exists():
            lines = self.path.read_text().splitlines()
        kept = [line + "\n" for line in lines if iteration_of(line) <= resume_at]
        write_text(self.path, "".join(kept))
        write_text(self.path.parent / "config.json", json.dumps(config, indent=1))

    def __call__(self, row):
        """row: a dict of numbers with "iter"."""
        if not self.on:
            return
        line = json.dumps({key: stored(value) for key, value in row.items()})
        with open(self.path, "a") as file:
            file.write(line + "\n")
        tqdm.write(" ".join(f"{key} {shown(value)}" for key, value in row.items()))
