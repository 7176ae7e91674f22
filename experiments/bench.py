"""
How fast is this project? Ratios to diffusers and to the released loop, cost, and utilisation.

    python -m experiments.bench                        # all parts -> results/bench-MACHINE.json
    python -m experiments.bench --parts net flops      # some; the file keeps the other parts
    python -m experiments.bench --device cuda          # 512 px, guided, SD3.5-Medium's shape

| part | what |
|---|---|
| net | forward and LoRA training step beside diffusers + PEFT on the same weights |
| compiled | the same, with the blocks of both compiled |
| iteration | a whole iteration of train_opd.py beside the released loop; memory of both |
| cost | time per image against images, steps, teachers, image size and ranks |
| flops | FLOPs per second, over those of a large matrix product |

What is compared runs in turns in one process (ours, theirs, theirs, ours, ...). A ratio is theirs
over ours of one turn, so above 1 ours is faster; the table has the median and the quartiles of all
turns. Run nothing else on the machine meanwhile. net and compiled need `make oracles`.

docs/speed.md explains the results; bench_net.py and bench_loop.py measure. Times of the scripts at
full size are in fullsize.py.
"""
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from experiments import bench_loop, bench_net, fullsize
from experiments.bench_net import WIDTHS
from experiments.turns import table
from plumbing import cli
from plumbing.files import write_text
from plumbing.folder import check_places

ROOT = Path(__file__).parent.parent
PARTS = ["net", "compiled", "iteration", "cost", "flops"]


@dataclass
class Config:
    # What to measure: some of net, compiled, iteration, cost and flops.
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    # Widths of the transformers of net, compiled and flops: 128, 384, 1536.
    widths: list[int] = field(default_factory=lambda: list(WIDTHS))
    # How often what is compared takes turns.
    turns: int = 7
    # Number of CPU threads.
    threads: int = os.cpu_count()
    # Device: cpu or cuda.
    device: Literal["cpu", "cuda"] = "cpu"
    # Folder of SD3.5-Medium with random weights, for a GPU. It is made there if it is missing.
    folder: str = "runs/sd3.5-medium-random"
    # File of the results (default: results/bench-MACHINE.json).
    out: str = ""


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return fullsize.cpu_name()


def commit():
    """The commit that was measured, with a + if a tracked file differs from it."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("diff", "HEAD") else "")


def check(cfg):
    for part in cfg.parts:
        if part not in PARTS:
            raise ValueError(f"--parts {part}: expected some of {', '.join(PARTS)}; load, step, "
                             "opd and rewards are parts of python -m experiments.fullsize")
    for width in cfg.widths:
        if width not in WIDTHS:
            raise ValueError(f"--widths {width}: expected some of {', '.join(map(str, WIDTHS))}")
    cli.positive(cfg, "turns", "threads")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine, or this build of torch, has no GPU; "
                         "expected --device cpu")


def measure(part, cfg, folder):
    """The rows of a part. folder: for its files. Whole iterations take half of the turns."""
    turns = max(1, cfg.turns // 2)
    if part in ("net", "compiled"):
        return bench_net.bench_net(cfg, compiled=part == "compiled")
    if part == "flops":
        return bench_net.bench_flops(cfg)
    if part == "iteration":
        return bench_loop.bench_iteration(cfg, folder, turns)
    return bench_loop.bench_cost(cfg, folder, turns)


def main(cfg):
    check(cfg)
    name = re.sub(r"[^a-z0-9]+", "-", machine(cfg.device).lower()).strip("-")
    out = Path(cfg.out or ROOT / f"results/bench-{name}.json")
    check_places(out.parent, out)
    out = out.absolute()
    cfg.folder = str(Path(cfg.folder).absolute())       # parts run in a folder of their own
    torch.set_num_threads(cfg.threads)
    results = json.loads(out.read_text()) if out.exists() else {}
    os.environ["TQDM_DISABLE"] = "1"
    for part in cfg.parts:
        start = time.time()
        load = os.getloadavg()[0]                       # what else runs here
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            rows = measure(part, cfg, Path(folder))
        results[part] = {"machine": machine(cfg.device), "threads": cfg.threads,
                         "torch": torch.__version__, "commit": commit(),
                         "date": time.strftime("%Y-%m-%d %H:%M"),
                         "load before": round(load, 1),
                         "minutes": round((time.time() - start) / 60, 1),
                         "settings": asdict(cfg), "rows": rows}
        write_text(out, json.dumps(results, indent=1))
    for part in cfg.parts:
        print(f"\n{part}\n\n{table(results[part]['rows'])}")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    cli.run(main, Config)
