"""
Time and memory at full size: SD3.5-Medium with random bfloat16 weights, run by the real scripts.

    python -m experiments.fullsize                    # -> results/fullsize-DEVICE-SIZE.json
    python -m experiments.fullsize --size 512 --device cuda --parts step opd
    python -m experiments.fullsize --parts rewards    # -> results/rewards-DEVICE.json

Nothing here needs real weights. The first command makes the model (5.1 GB, once) and loads it. Then
it takes one guided step and one OPD update. The last command measures images per second of every
reward network at its published size.

The text encoders have only two layers (random_sd3.py). So these numbers contain no time or memory
of T5-XXL. Peak memory is read from /proc every 20 ms: "anonymous" is what the process allocated,
"file" is what it mapped (clean pages, which the kernel may drop). GPU memory is torch's own peak.
Run nothing else on the machine meanwhile.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from experiments import random_sd3
from model import MMDiTConfig
from plumbing import cli
from plumbing.files import write_text
from plumbing.folder import check_places
from rewards import REWARDS
from worlds.sd3 import check_size

ROOT = Path(__file__).parent.parent
PARTS = ["load", "step", "opd", "rewards"]
FACTOR = 8               # pixels of an image for one latent of SD3.5's VAE


@dataclass
class Config:
    # What to measure: some of load, step and opd; or rewards alone.
    parts: list[str] = field(default_factory=lambda: ["load", "step", "opd"])
    # For --parts rewards: the rewards to measure (default: all that have a network of their own).
    names: list[str] = field(default_factory=list)
    # Side of the images in pixels.
    size: int = 256
    # Number of CPU threads.
    threads: int = os.cpu_count()
    # Device: cpu or cuda.
    device: Literal["cpu", "cuda"] = "cpu"
    # Folder of the model. The model is made there if it is missing.
    folder: str = "runs/sd3.5-medium-random"
    # File of the results (default: a file in results/, see above).
    out: str = ""


# ------------------------------------------------------------------ a process and its memory


def memory_of(process):
    """(anonymous, file) memory of a running process in GB."""
    fields = {}
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
    return tuple(int(fields[name].split()[0]) / 1e6 for name in ("RssAnon", "RssFile"))


def watch(command, threads):
    """Run python with these arguments. Returns its output, and its seconds and peak memory."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": str(ROOT)}
    peak = {"anonymous": 0, "file": 0, "both": 0}
    start = time.time()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log,
                                   stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            try:
                anonymous, file = memory_of(process)
                for kind, gb in zip(peak, (anonymous, file, anonymous + file)):
                    peak[kind] = max(peak[kind], gb)
            except (KeyError, OSError):                 # the process has just ended
                pass
            time.sleep(0.02)
        seconds = time.time() - start
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise ValueError(f"{' '.join(command)[:200]} failed: {output[-2000:]}")
    peak = {kind: round(gb, 2) for kind, gb in peak.items()}
    return output, {"seconds": round(seconds, 1), "peak GB": peak}


# A program that loads the model, then reads every weight of the transformer.
LOAD = """
import time, torch
from model import load_mmdit
from worlds.vae import load_vae
start = time.time()
net = load_mmdit("{file}", "{device}", torch.{dtype})
vae = load_vae("{file}", "{device}", torch.{dtype})
seconds = time.time() - start
parameters = sum(p.numel() for p in net.parameters()) + net.pos_embed.numel()
print("LOADED", seconds, parameters, sum(p.numel() for p in vae.parameters()))
start = time.time()
total = sum(float(p.float().sum()) for p in net.parameters())
print("TOUCHED", time.time() - start)
"""
# A program that runs a script, and prints the GPU's peak memory at the end.
SCRIPT = """
import runpy, sys, torch
sys.argv = {argv}
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    if torch.cuda.is_available():
        print("GPU GB", torch.cuda.max_memory_allocated() / 1e9)
"""


def script(name, *options):
    argv = [name, *map(str, options)]
    return ["-c", SCRIPT.format(argv=argv, script=str(ROOT / name))]


def line_of(output, word):
    """The words that follow the first one, in the first line that starts with word."""
    for line in output.splitlines():
        if line.startswith(word):
            return line.split()[1:]
    raise AssertionError(f"no line {word} in {output}")


def gpu_lines(output):
    return [line for line in output.splitlines() if line.startswith("GPU")]


# ------------------------------------------------------------------ the parts


def measure_load(cfg, file, dtype):
    code = LOAD.format(file=file, device=cfg.device, dtype=dtype)
    output, seen = watch(["-c", code], cfg.threads)
    seconds, *parameters = line_of(output, "LOADED")
    parameters = [int(number) for number in parameters]
    size = 2 if dtype == "bfloat16" else 4
    return {"load seconds": round(float(seconds), 2),
            "then reading every weight": round(float(line_of(output, "TOUCHED")[0]), 2),
            "weights GB": round(sum(parameters) * size / 1e9, 2),
            "parameters": parameters,
            **seen}


def measure_step(cfg, common):
    """Seconds of a step: the difference between runs of three steps and of one, divided by 2.

    One more run goes first and is not counted: it encodes the prompt and leaves it on the disk.
    """
    seen = {}
    for steps in (1, 1, 3):
        command = script("eval.py", *common, "--prompt", "a red cat", "--steps", steps,
                         "--guidance", 4.5, "--out", "runs/bench")
        output, seen[steps] = watch(command, cfg.threads)
    seconds = (seen[3]["seconds"] - seen[1]["seconds"]) / 2
    return {"seconds a guided step (two forwards, batch 1)": round(seconds, 2),
            "whole command, 3 steps, decoded": seen[3],
            "gpu": gpu_lines(output)}


def measure_opd(cfg, common, folder):
    """One iteration on two images, one for each of two teachers; quality is only the anchor.

    A rollout has two steps. One of them is noisy and supervised.
    """
    name = f"bench-{os.getpid()}"
    teachers = [f"{task}={folder / task}" for task in random_sd3.TASKS]
    command = script("train_opd.py", *common, "--teachers", *teachers, "--anchor", "quality",
                     "--ratio", "geneval=1", "ocr=1", "quality=0", "--iters", 1, "--batch", 2,
                     "--group", 1, "--updates", 1, "--steps", 2, "--noisy", 0, 1, "--micro", 1,
                     "--checkpointing", "--name", name)
    output, seen = watch(command, cfg.threads)
    row = json.loads((Path("runs") / name / "log.jsonl").read_text())
    logged = {key: row[key] for key in ("s/it", "kl", "kl_anchor", "grad_norm")}
    return {**logged, "whole command": seen, "gpu": gpu_lines(output)}


def reward_networks():
    """{reward: the function that makes its network}, for all rewards with published weights.

    In the world of SD3.5 two networks score GenEval and OCR. Judges that run on a server are left
    out.
    """
    from experiments.random_scorers import RANDOM  # imports much of transformers
    networks = {"geneval": RANDOM["geneval.Detector"], "ocr": RANDOM["ocr.Reader"]}
    for name, reward in REWARDS.items():
        if reward.where in RANDOM:
            networks[name] = RANDOM[reward.where]
    return networks


# Reward -> a clearer name for it in the results.
LABELS = {"geneval": "geneval detector", "ocr": "ocr reader (server)", "deqa": "deqa (bfloat16)"}


@torch.no_grad()
def measure_reward(name, make, device):
    """Images per second at batch 8, 512 x 512, after one image to warm up.

    make: one of reward_networks().
    """
    dtype = torch.float32 if device == "cpu" else torch.float16
    scorer = make(torch.device(device), dtype)
    images = torch.rand(8, 3, 512, 512, device=device)
    meta = {"tag": "colors", "prompt": "a photo of a red cat",
            "include": [{"class": "cat", "count": 1, "color": "red"}]}
    prompts = [meta if name == "geneval" else meta["prompt"]] * 8
    scorer(images[:1], prompts[:1])
    start = time.time()
    scorer(images, prompts)
    if device == "cuda":
        torch.cuda.synchronize()
    parameters = sum(p.numel() for p in scorer.net.parameters())
    return {"images/s": round(8 / (time.time() - start), 3),
            "million parameters": round(parameters / 1e6)}


# ------------------------------------------------------------------ command


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "?"


def check(cfg):
    for part in cfg.parts:
        if part not in PARTS:
            raise ValueError(f"--parts {part}: expected some of {', '.join(PARTS)}")
    if "rewards" in cfg.parts and len(cfg.parts) > 1:
        raise ValueError(f"--parts {' '.join(cfg.parts)}: rewards are measured alone, into a file "
                         "of their own; expected --parts rewards, or parts without it")
    if cfg.names and "rewards" not in cfg.parts:
        raise ValueError(f"--names {' '.join(cfg.names)}: is for --parts rewards")
    cli.positive(cfg, "size", "threads")
    check_size(cfg.size, MMDiTConfig(), FACTOR)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine, or this build of torch, has no GPU; "
                         "expected --device cpu")
    out = out_file(cfg)
    check_places(out.parent, out)


def out_file(cfg):
    what = "rewards" if "rewards" in cfg.parts else "fullsize"
    size = "" if "rewards" in cfg.parts else f"-{cfg.size}"
    return Path(cfg.out or ROOT / f"results/{what}-{cfg.device}{size}.json")


def bench_rewards(cfg):
    networks = reward_networks()
    for name in cfg.names:
        if name not in networks:
            raise ValueError(f"--names {name}: unknown reward, or one without a network; "
                             f"expected one of {', '.join(networks)}")
    out = out_file(cfg)
    torch.set_num_threads(cfg.threads)
    measured = {}
    if out.exists() and cfg.names:                      # keep the numbers of the others
        measured = json.loads(out.read_text())["rewards"]
    for name in cfg.names or networks:
        label = LABELS.get(name, name)
        measured[label] = measure_reward(name, networks[name], cfg.device)
        print(label, measured[label], flush=True)
    results = {"settings": asdict(cfg), "torch": torch.__version__, "cpu": cpu_name(),
               "rewards": measured}
    write_text(out, json.dumps(results, indent=1))
    print(f"wrote {out}")


def bench_model(cfg):
    folder = Path(cfg.folder).resolve()
    file = folder / random_sd3.FILE
    results = {"settings": asdict(cfg), "torch": torch.__version__,
               "machine": os.uname().nodename, "cpu": cpu_name()}
    if cfg.device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
    if not file.exists():
        start = time.time()
        random_sd3.make(folder)
        print(f"made {folder} in {time.time() - start:.0f} s")

    def keep(name, numbers):
        results[name] = numbers
        print(name, numbers, flush=True)

    common = ["--model", folder, "--size", cfg.size, "--device", cfg.device]
    if "load" in cfg.parts:
        for dtype in ("bfloat16", "float32"):
            keep(f"load as {dtype}", measure_load(cfg, file, dtype))
    if "step" in cfg.parts:
        keep("guided step", measure_step(cfg, common))
    if "opd" in cfg.parts:
        keep("opd update", measure_opd(cfg, common, folder))
    out = out_file(cfg)
    write_text(out, json.dumps(results, indent=1))
    print(f"wrote {out}")


def main(cfg):
    check(cfg)
    if "rewards" in cfg.parts:
        bench_rewards(cfg)
    else:
        bench_model(cfg)


if __name__ == "__main__":
    cli.run(main, Config)
