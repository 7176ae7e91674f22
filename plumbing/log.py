"""The log of a run.

Each iteration is one line on the screen (4 significant digits) and one in DIR/log.jsonl (8
decimals). With --track, TensorBoard or Weights & Biases get the same numbers, and pictures.
"""
import importlib
import json
import time
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.files import file_size, first_line, write_text
from plumbing.picture import to_bytes

# ------------------------------------------------------------------ seconds


class Clock:
    """The seconds of each phase of an iteration. Name a phase when it begins.

    A GPU works behind the program's back. So the clock waits for it, a few times an iteration.
    """

    def __init__(self, device):
        self.device = device
        self.begun = {}                 # phase -> when it began, in order

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.begun[phase] = time.perf_counter()

    def row(self, images):
        """What the log says: "s/PHASE" of all phases since the last row, "s/it", "images/s"."""
        self("end")
        names, times = list(self.begun), list(self.begun.values())
        self.begun = {}
        row = {f"s/{name}": after - at for name, at, after in zip(names, times, times[1:])}
        seconds = times[-1] - times[0]
        return {"s/it": seconds, "images/s": images / seconds, **row}


# ------------------------------------------------------------------ trackers

# The bytes of the largest log.jsonl that is read.
LARGEST = 2**30
# --track -> the module that it needs. Its package has the name of the tracker.
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def import_tracker(track):
    """The module of a --track, or None without one. ValueError if its package is missing."""
    if not track:
        return None
    try:
        return importlib.import_module(TRACKERS[track])
    except ImportError as error:
        raise ValueError(f"--track {track}: its package cannot be imported "
                         f"({first_line(error)}); pip install {track}") from None


class TensorBoard:
    """Writes to DIR/tensorboard. Points of iterations that the run repeats are hidden."""

    def __init__(self, module, folder, config, resume_at):
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def __call__(self, it, numbers, pictures):
        """pictures: {name: (image, caption)}, as Log takes them."""
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, it)
        for name, (image, caption) in pictures.items():
            self.writer.add_image(name, to_bytes(image), it, dataformats="HWC")
            self.writer.add_text(name, caption, it)
        self.writer.flush()


class WandB:
    """Logs to the project flow-opd. A resumed run goes on as the same one: DIR/wandb-id has its id.

    wandb keeps the first point of an iteration. It drops those that the run repeats, with a
    warning.
    """

    def __init__(self, module, folder, config, resume_at):
        self.image = module.Image
        id_file = folder / "wandb-id"
        if not resume_at or not id_file.exists():
            write_text(id_file, uuid.uuid4().hex)
        try:
            self.run = module.init(project="flow-opd", name=folder.name, dir=str(folder),
                                   config=config, id=id_file.read_text(), resume="allow")
        except module.Error as error:                   # no key, no network, no such run, ...
            raise ValueError(f"--track wandb: did not start ({first_line(error)}); expected "
                             "`wandb login` before, or WANDB_MODE=offline") from None

    def __call__(self, it, numbers, pictures):
        images = {name: self.image(to_bytes(image), caption=caption)
                  for name, (image, caption) in pictures.items()}
        self.run.log({**numbers, **images}, step=it)


# ------------------------------------------------------------------ the log


def row_of(line):
    """The row in a line of the log, or None if the line is damaged (by a kill, or by the disk)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("iter")) is not int:
        return None
    return row


def read_log(path):
    """The rows of a log.jsonl, and the number of lines that are damaged and left out."""
    file_size(path, LARGEST)                            # a named pipe would block
    lines = Path(path).read_text("utf-8", "replace").splitlines()
    rows = [row_of(line) for line in lines]
    whole = [row for row in rows if row is not None]
    return whole, len(rows) - len(whole)


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stored(value):
    return round(value, 8) if isinstance(value, float) else value


class Log:
    """Writes the log on rank 0, and the settings of the run to DIR/config.json.

    resume_at: the iterations that are done already, 0 in a new run.
    track: "", "tensorboard" or "wandb". ValueError if its package is missing.
    """

    def __init__(self, folder, rank, config, resume_at=0, track=""):
        self.path = Path(folder) / "log.jsonl"
        self.on = rank == 0
        if not self.on:
            return
        module = import_tracker(track)
        if resume_at:
            done = "is finished" if resume_at == config.get("iters") else "goes on"
            print(f"{folder}: {done}, at iteration {resume_at}. If the code has changed since, "
                  "give --name NEW to train anew.")
        # A resumed run drops the lines of iterations that it will repeat.
        rows, damaged = [], 0
        if resume_at and self.path.exists():
            rows, damaged = read_log(self.path)
        if damaged:
            print(f"{self.path}: {damaged} damaged line(s) dropped")
        kept = [json.dumps(row) + "\n" for row in rows if row["iter"] <= resume_at]
        write_text(self.path, "".join(kept))
        write_text(self.path.parent / "config.json", json.dumps(config, indent=1))
        self.track = None
        if track:
            kind = {"tensorboard": TensorBoard, "wandb": WandB}[track]
            self.track = kind(module, self.path.parent, config, resume_at)

    def __call__(self, row, pictures=None):
        """row: a dict of numbers with "iter".

        pictures: {name: (image (3, H, W) in [0, 1], caption)}, for the tracker alone.
        """
        if not self.on:
            return
        line = json.dumps({key: stored(value) for key, value in row.items()})
        with open(self.path, "a") as file:
            file.write(line + "\n")
        on_screen = [key for key in row if key == "s/it" or not key.startswith("s/")]
        tqdm.write(" ".join(f"{key} {shown(row[key])}" for key in on_screen))
        if self.track:
            numbers = {key: value for key, value in row.items()
                       if key != "iter" and isinstance(value, (int, float))}
            self.track(row["iter"], numbers, pictures or {})
