"""
The paper's findings on the tiny world, with seeds and error bars: runs everything, in parts, and writes the tables.

    python reproduce.py --dry-run                        # what would run, and how long it will take
    python reproduce.py                                  # all of it; stopped and started again, it goes on where it was
    python reproduce.py --parts main mar --seeds 0 1 2   # some of it
    python reproduce.py --tables                         # only results/reproduce.md from the results that are there

A job is a training run and the evaluation of its result on the held-out prompts (600 images a task; noise seed = training seed). Its numbers go to
results/reproduce/JOB.json with the command, seed, settings, commit and seconds. Jobs that are there are not run again. Shipped teachers (ckpt/) teach.

Compute is counted in forward passes of the network for one image, a backward pass as two. GRPO: 8 rollout steps and, on each of the 5 trained ones, policy
(1 + 2) and reference (1): 28 an image. Distillation: 8 + 5 (teacher 1, anchor 1, student 1 + 2) = 33. Variants get the default's passes in all.
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import util

ROOT, OUT = Path(__file__).parent, Path("results/reproduce")
TEACHERS = {"geneval": "ckpt/geneval.pt", "ocr": "ckpt/ocr.pt", "quality": "ckpt/quality.pt"}
TASKS = tuple(TEACHERS)
GRPO_PASSES, BUDGET = 28, 100 * 64 * 33                    # of distillation with its defaults: 100 iterations of 64 images
TEACHER_IMAGES = 250 * 192 + 225 * 96 + 50 * 96            # of the three shipped teachers
# Seconds on two cores, to plan with.
SECONDS = {"opd": 235, "grpo image": 18 * 60 / 48000, "eval": 50, "sft": 50}


@dataclass
class Config:
    parts: list[str] = field(default_factory=list)         # main, cold, mar, objectives, states, beyond, seesaw, cost (default: all)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])      # of everything in stage 2
    grpo_seeds: list[int] = field(default_factory=lambda: [0])       # of the long GRPO runs
    ranks: int = 2                                         # processes
    compile: bool = False                                  # torch.compile in training (needs a C++ compiler): 1.5 times as fast on two CPU cores
    alone: bool = False                                    # nothing else runs on this machine, so that seconds mean something
    dry_run: bool = False                                  # only say what would run
    tables: bool = False                                   # only write the tables
    stop_after: int = 0                                    # start no job after so many minutes (0: no limit)


def opd(*more, passes=33, budget=BUDGET):
    """Stage 2 for as many iterations as the budget (forward passes) pays for."""
    return ["train_opd.py", "--teachers", *TEACHERS.values(), "--iters", round(budget / passes / 64), *more]


def half(*more, passes=33):
    """At half of the default's budget, where what is slower still shows."""
    return opd(*more, passes=passes, budget=BUDGET / 2)


def mix(images, tasks=TASKS, batch=192, lr="2e-3"):
    """One GRPO run on several rewards."""
    ratio = [{"geneval": 3, "ocr": 1, "quality": 1}[t] for t in tasks]
    return ["train_grpo.py", "--tasks", *tasks, "--ratio", *ratio, "--batch", batch, "--lr", lr, "--iters", math.ceil(images / batch)]


def jobs(cfg):
    """The plan: job -> its part, command, result and seconds. A name with -sN is that job with seed N."""
    whole = TEACHER_IMAGES + BUDGET / GRPO_PASSES          # images whose GRPO costs what the teachers and the distillation did
    # Of the several updates a rollout only the first has ratio 1: the paper's clip of 1e-4 would stop the others, so it is off here.
    pg, sampled, future, no_clip = ("--objective", "pg"), ("--reward", "sampled"), ("--credit", "future"), ("--clip", 1)
    ode, plain, r48, r16 = ("--rollout", "ode"), ("--objective", "velocity"), ("--lora-r", 48, "--lora-alpha", 48), ("--lora-r", 16, "--lora-alpha", 16)
    sft = ("--init", "runs/rep-sft-s{seed}/student.pt")
    plan = {
        "cost": {                                          # the teachers once more, with another seed and snapshots on the way
            "quality-again": ["train_grpo.py", "--tasks", "quality", "--iters", 50, "--keep", 5],
            "ocr-again": ["train_grpo.py", "--tasks", "ocr", "--iters", 225, "--keep", 25],
            "geneval-again": ["train_grpo.py", "--tasks", "geneval", "--batch", 192, "--lr", "2e-3", "--iters", 250, "--keep", 25]},
        "main": {
            "opd-merge": opd("--keep", 5),
            "sft": ["train_sft.py", "--teachers", *TEACHERS.values(), *r48],
            "opd-sft": opd(*sft, "--keep", 5),
            "mix-small": mix(BUDGET / GRPO_PASSES),
            "mix-whole": mix(whole)},
        "seesaw": {
            "mix-geneval-ocr": mix(48000, ("geneval", "ocr"))},
        "mar": {
            "half": half(),
            "half-lam0": half("--lam", 0, passes=28),
            "half-lam0.1": half("--lam", 0.1),
            "half-lam0.5": half("--lam", 0.5)},
        "cold": {
            "half-sft": half(*sft),
            "half-none": half("--init", "none", *r48),
            "half-truncate": half("--init", "truncate", *r16),
            "half-factors": half("--init", "factors")},
        "objectives": {
            "half-velocity": half(*plain),
            "half-pg-dense": half(*pg, *no_clip),
            "half-pg-dense-lam0": half(*pg, *no_clip, "--lam", 0, passes=28),
            "half-pg-dense-future": half(*pg, *future, *no_clip),
            "half-pg-sampled": half(*pg, *sampled, *no_clip),
            "half-pg-sampled-future": half(*pg, *sampled, *future, *no_clip),
            "half-released": half("--objective", "released", *no_clip)},
        "states": {
            "half-cps": half("--rollout", "cps"),
            "half-ode": half(*ode, passes=48),
            "half-ode-velocity": half(*ode, *plain, passes=48),
            "half-all": half("--noisy", 0, 8, passes=48),
            "half-one": half(*ode, *plain, "--one", "--steps", 16, "--noisy", 0, 1, passes=21)},
        "beyond": {
            "half-extrapolate": half("--extrapolate", 1.25, passes=38),
            "half-blend": half("--blend", 0.1, passes=43)},
    }
    found = {}
    for part, named in plan.items():
        for name, command in named.items():
            grpo = command[0] == "train_grpo.py"
            seeds = cfg.seeds if not grpo or name == "mix-small" else [s + name.endswith("again") for s in cfg.grpo_seeds]
            for seed in seeds:
                job = f"{name}-s{seed}"
                run = [str(x).replace("{seed}", str(seed)) for x in command] + ["--seed", str(seed), "--name", f"rep-{job}"] + ["--compile"] * cfg.compile
                images = int(run[run.index("--iters") + 1]) * int(run[run.index("--batch") + 1] if "--batch" in run else 96) if grpo else 0
                seconds = images * SECONDS["grpo image"] if grpo else SECONDS["sft"] if name == "sft" else SECONDS["opd"] * (1 - name.startswith("half") / 2)
                result = f"runs/rep-{job}/{'adapter' if grpo else 'student'}.pt"
                found[job] = {"part": part, "command": run + (["--out", result] if grpo else []), "result": result, "seconds": seconds + SECONDS["eval"]}
    return found


def run(name, job, cfg):
    """Train, evaluate, and write results/reproduce/NAME.json; what a stopped run left is gone on with (every script resumes)."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={cfg.ranks}"] if cfg.ranks > 1 else [sys.executable]
    env, start = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}, time.time()
    log = Path("runs/reproduce.log")
    log.parent.mkdir(exist_ok=True)
    seed = job["command"][job["command"].index("--seed") + 1]
    evaluate = ["eval.py", "--ckpts", f"it={job['result']}", "--seed", seed, "--out", f"runs/rep-{name}/eval", "--diversity"]
    choose = ["eval.py", "--ckpts", f"it={job['result']}", "--seed", seed, "--out", f"runs/rep-{name}/train", "--split", "train", "--per-task", "150"]
    for command in (job["command"], evaluate, choose):
        with open(log, "a") as f:
            done = subprocess.run([*launch, *command], stdout=f, stderr=subprocess.STDOUT, env=env)
        if done.returncode:
            raise ValueError(f"{' '.join(command)} failed; the end of {log} says why")
        trained = time.time() - start if command is job["command"] else trained
    table, chosen = (json.loads(Path(f"runs/rep-{name}/{which}.json").read_text()) for which in ("eval", "train"))
    rows = [json.loads(line) for line in Path(f"runs/rep-{name}/log.jsonl").read_text().splitlines()]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    util.write_atomic(OUT / f"{name}.json", json.dumps({
        "job": name, "part": job["part"], "seed": int(seed), "command": " ".join(job["command"]), "commit": commit, "cores": os.cpu_count(), "ranks": cfg.ranks,
        "timed alone": cfg.alone,
        "training seconds (sum of the log)": sum(r["s/it"] for r in rows), "seconds, this start": trained, "iterations": len(rows),
        "table: mean, standard error, n": table["table: mean, standard error, n"]["it"], "diversity": table["diversity"]["it"],
        "on training prompts (to choose settings by)": chosen["table: mean, standard error, n"]["it"],
        "all scores": table["all scores: mean, standard error"]["it"], "last logged": rows[-1]}, indent=1))


# ------------------------------------------------------------------ tables


def t95(n):
    """Two-sided 95% point of Student's t with n - 1 degrees of freedom."""
    return {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}.get(n, 1.96)


def interval(values):
    """"mean ± half width of the 95% interval over seeds", or the bare number of one seed."""
    values = np.array(values, float)
    return f"{values.mean():.3f} ± {t95(len(values)) * values.std(ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def collect():
    """job without its seed -> its results, one a seed."""
    found = {}
    for file in sorted(OUT.glob("*-s*.json")):
        found.setdefault(file.stem.rsplit("-s", 1)[0], []).append(json.loads(file.read_text()))
    return found


def tables():
    """results/reproduce.md from what is in results/reproduce/."""
    found = collect()
    lines = ["Mean and 95% interval over seeds (Student's t; a number alone is one seed). Held-out prompts, 600 images a task and seed.",
             "Made by `python reproduce.py --tables`.", ""]
    columns = [*TASKS, "average"]
    lines += ["| run | part | seeds | " + " | ".join(columns) + " | diversity (GenEval prompts) | s, alone |", "|---" * (len(columns) + 5) + "|"]
    for name, results in sorted(found.items(), key=lambda item: (item[1][0]["part"], item[0])):
        cells = [interval([r["table: mean, standard error, n"][c][0] for r in results]) for c in columns]
        spread = interval([r["diversity"]["geneval"][0] for r in results])
        timed = [r["training seconds (sum of the log)"] for r in results if r["timed alone"]]
        seconds = f"{np.mean(timed):.0f}" if timed else "-"
        lines.append(f"| {name} | {results[0]['part']} | {len(results)} | " + " | ".join(cells) + f" | {spread} | {seconds} |")
    util.write_atomic("results/reproduce.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def main(cfg):
    todo = jobs(cfg)
    parts = {job["part"] for job in todo.values()}
    for part in cfg.parts:
        if part not in parts:
            raise ValueError(f"--parts {part}: expected some of {', '.join(sorted(parts))}")
    if cfg.tables:
        return tables()
    todo = {name: job for name, job in todo.items() if (not cfg.parts or job["part"] in cfg.parts) and not (OUT / f"{name}.json").exists()}
    left, begun = sum(job["seconds"] for job in todo.values()), time.time()
    print(f"{len(todo)} jobs to run, about {left / 3600:.1f} hours on two cores")
    for name, job in todo.items():
        print(f"{name:28s} {job['seconds'] / 60:5.1f} min   {' '.join(job['command'])}")
    if cfg.dry_run:
        return
    for n, (name, job) in enumerate(todo.items()):
        if cfg.stop_after and time.time() - begun > 60 * cfg.stop_after:
            return print(f"stopped after {cfg.stop_after} minutes, {len(todo) - n} jobs left; the same command goes on")
        start = time.time()
        run(name, job, cfg)
        left -= job["seconds"]
        print(f"[{n + 1}/{len(todo)}] {name}: {time.time() - start:.0f} s (planned {job['seconds']:.0f}); about {left / 3600:.1f} hours left", flush=True)
    tables()


if __name__ == "__main__":
    util.run(main, Config)
