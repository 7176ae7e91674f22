"""
The paper's findings on the tiny world, with seeds and error bars: runs everything, in parts, and writes the tables.

    python reproduce.py --dry-run                        # what would run, and how long it will take
    python reproduce.py                                  # all of it; stopped and started again, it goes on where it was
    python reproduce.py --parts main mar --seeds 0 1 2   # some of it
    python reproduce.py --tables                         # only the tables and curves, from the results that are there

A job is a training run and the evaluation of what came out, on the held-out prompts (600 images a task; noise seed = training seed, so jobs of one
seed are compared image by image) and on training prompts (150 a task, to choose settings by). Its numbers go to results/reproduce/JOB.json with the
command, seed, commit and seconds. Jobs that are there are not run again: the repo's folder is full, so give --out another one to run all afresh. The shipped
teachers (ckpt/) teach. Seconds in the cost table are from runs with --alone.

Parts: main (the table), cost (the teachers again, with snapshots, and students of theirs), seesaw, and at half of the budget mar, cold, objectives,
states, beyond; then curves (snapshots of main and cost, evaluated) and fixed (KL to the teachers at the same states for all).

Compute is counted in forward passes of the network for one image, a backward pass as two; scoring and the VAE are left out. GRPO: 8 rollout steps
and, on each of the 5 trained ones, policy (1 + 2) and reference (1): 28 an image. Distillation: 8 + 5 (teacher 1, anchor 1, student 1 + 2) = 33.
Variants get the default's passes in all (passes() below); what a cold start by SFT costs comes on top and is in the tables.
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
import torch
from tqdm import tqdm

import adapters
import model as models
import train_grpo
import train_opd
import train_sft
import util
from prompts import world_of
from sampler import draw_noise, encode, gaussian_kl, rollout, schedule, sde_step, velocity

ROOT = Path(__file__).parent
TEACHERS = {"geneval": "ckpt/geneval.pt", "ocr": "ckpt/ocr.pt", "quality": "ckpt/quality.pt"}
TASKS = tuple(TEACHERS)
SECOND = {f"{task}-second": f"runs/rep-{task}-again-s1/adapter.pt" for task in TASKS}       # second teachers: the part cost makes them
PARTS = ["main", "cost", "seesaw", "mar", "cold", "objectives", "states", "beyond", "curves", "fixed"]
HELD_OUT, TRAIN = "table: mean, standard error, n", "on training prompts (to choose settings by)"      # keys of a result
GRPO_PASSES, BUDGET = 28, 100 * 64 * 33                    # of distillation with its defaults: 100 iterations of 64 images
TEACHER_IMAGES = 250 * 192 + 225 * 96 + 50 * 96            # of the three shipped teachers
# Seconds on two cores with --compile (without: 1.5 times as long in training), to plan with.
SECONDS = {"opd": 200, "grpo image": 16 / 1000, "eval": 50, "sft": 120}


@dataclass
class Config:
    parts: list[str] = field(default_factory=list)         # main, cost, seesaw, mar, cold, objectives, states, beyond, curves, fixed (default: all)
    only: list[str] = field(default_factory=list)          # jobs by name, e.g. half-lam0-s1 (default: all of the parts)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])      # of everything in stage 2
    grpo_seeds: list[int] = field(default_factory=lambda: [0])       # of GRPO on several rewards (0 1 2: two hours more)
    ranks: int = 2                                         # processes
    compile: bool = False                                  # torch.compile in training (needs a C++ compiler): 1.5 times as fast on two CPU cores
    alone: bool = False                                    # nothing else runs on this machine, so that seconds mean something
    dry_run: bool = False                                  # only say what would run
    tables: bool = False                                   # only write the tables
    plot: bool = False                                     # only draw results/reproduce.png (needs matplotlib)
    out: str = "results/reproduce"                         # the results' folder; the repo's is full, so another one runs all afresh
    stop_after: int = 0                                    # start no job after so many minutes (0: no limit)


def opd(*more, passes=33, budget=BUDGET, teachers=TEACHERS):
    """Stage 2 for as many iterations as the budget (forward passes) pays for."""
    return ["train_opd.py", "--teachers", *teachers.values(), "--iters", round(budget / passes / 64), *more]


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
    # Of the several updates a rollout only the first has ratio 1: the paper's clip of 1e-4 would stop the others, so it is off here, or there is one.
    pg, sampled, future, no_clip = ("--objective", "pg"), ("--reward", "sampled"), ("--credit", "future"), ("--clip", 1)
    alone, slow = ("--lam", 0), ("--lr", "3e-4")           # a tenth of the default's rate, which is too high for a policy gradient's noise
    ode, plain, r48, r16 = ("--rollout", "ode"), ("--objective", "velocity"), ("--lora-r", 48, "--lora-alpha", 48), ("--lora-r", 16, "--lora-alpha", 16)
    sft = ("--init", "runs/rep-sft-s{seed}/student.pt")
    plan = {
        "cost": {                                          # the teachers once more, with another seed and snapshots on the way
            "quality-again": ["train_grpo.py", "--tasks", "quality", "--iters", 50, "--keep", 5],
            "ocr-again": ["train_grpo.py", "--tasks", "ocr", "--iters", 225, "--keep", 25],
            "geneval-again": ["train_grpo.py", "--tasks", "geneval", "--batch", 192, "--lr", "2e-3", "--iters", 250, "--keep", 25],
            "opd-second": opd("--anchor", "quality", "--keep", 5, teachers=SECOND),             # and students of theirs
            **SECOND, "merge-second": "runs/rep-opd-second-s{seed}/init.pt"},
        "main": {
            "opd-merge": opd("--keep", 5),
            "sft": ["train_sft.py", "--teachers", *TEACHERS.values(), *r48],
            "opd-sft": opd(*sft, "--keep", 5),
            "sft-equal": ["train_sft.py", "--teachers", *TEACHERS.values(), *r48, "--samples", 4320, "--iters", 650],      # off policy, distillation's compute
            "mix-small": mix(BUDGET / GRPO_PASSES),
            "mix-whole": mix(whole),
            "mix-whole-group": mix(whole) + ["--adv-std", "group"],
            "base": "base", **TEACHERS, "merge": "runs/rep-opd-merge-s{seed}/init.pt"},         # nothing to train
        "seesaw": {
            "mix-group": mix(BUDGET / GRPO_PASSES) + ["--adv-std", "group"],         # a task whose rewards differ little weighs as much as others
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
        "objectives": {                                    # without the anchor, whose weight beside the loss would differ from objective to objective
            "half-velocity-lam0": half(*plain, *alone, passes=28),
            "half-released-lam0": half("--objective", "released", *no_clip, *alone, passes=28),
            "half-slow-lam0": half(*alone, *slow, passes=28),
            "half-pg-dense-slow-lam0": half(*pg, *no_clip, *alone, *slow, passes=28),
            "half-pg-dense-future-slow-lam0": half(*pg, *future, *no_clip, *alone, *slow, passes=28),
            "half-pg-sampled-slow-lam0": half(*pg, *sampled, *no_clip, *alone, *slow, passes=28),
            "half-pg-sampled-future-slow-lam0": half(*pg, *sampled, *future, *no_clip, *alone, *slow, passes=28),
            "half-pg-dense-lam0": half(*pg, *no_clip, *alone, passes=28),                    # these two: what the default's rate does to them
            "half-pg-sampled-lam0": half(*pg, *sampled, *no_clip, *alone, passes=28),
            "half-paper": half(*pg, "--updates", 1),       # as printed: with the anchor, and the ratio is 1, so inside the clip range
            "half-paper-slow": half(*pg, "--updates", 1, *slow)},
        "states": {
            "half-cps": half("--rollout", "cps"),
            "half-ode": half(*ode, "--supervised", 0, 5),  # the default's states but for the noise
            "half-ode-all": half(*ode, passes=48),
            "half-all": half("--noisy", 0, 8, passes=48),
            "half-one": half(*ode, *plain, "--one", "--steps", 16, "--noisy", 0, 1, passes=21)},
        "beyond": {
            "half-extrapolate": half("--extrapolate", 1.25, passes=38),
            "half-blend": half("--blend", 0.1, passes=43)},
        "curves": {                                        # job: the iterations whose snapshots are evaluated
            "curve-quality-again": (5, 10, 20, 30, 40),
            "curve-ocr-again": (25, 50, 100, 150, 200),
            "curve-geneval-again": (25, 50, 100, 150, 200, 225),
            "curve-opd-merge": (25, 50, 75),
            "curve-opd-second": (25, 50, 75),
            "curve-opd-sft": (25, 50, 75)},
    }
    found = {}
    for part, named in plan.items():
        for name, what in named.items():
            again, rate = name.endswith("again"), name in ("half-pg-dense-lam0", "half-pg-sampled-lam0", "half-paper-slow")
            grpo = name in ("mix-whole", "mix-whole-group", "mix-group", "mix-geneval-ocr")
            for seed in [1] if again else [0] if rate else cfg.grpo_seeds if grpo else cfg.seeds:
                run, job = f"rep-{name}-s{seed}", {"part": part, "seed": seed, "command": [], "seconds": SECONDS["eval"]}
                if isinstance(what, list):                 # a command: train, then evaluate
                    of = "adapter" if what[0] == "train_grpo.py" else "student"
                    more = ["--seed", seed, "--name", run] + ["--out", f"runs/{run}/adapter.pt"] * (of == "adapter") + ["--compile"] * cfg.compile
                    job |= {"command": [str(x).replace("{seed}", str(seed)) for x in what + more], "ckpts": [f"it=runs/{run}/{of}.pt"]}
                    job["seconds"] += planned(job["command"])
                elif isinstance(what, str):                # a checkpoint: evaluate
                    job["ckpts"] = ["it=" + what.replace("{seed}", str(seed))]
                else:                                      # snapshots: evaluate them all on their own tasks
                    source = run.replace("curve-", "")
                    job |= {"ckpts": [f"{it}=runs/{source}/{'adapter' if again else 'student'}-{it}.pt" for it in what], "source": source,
                            "tasks": [name.split("-")[1]] if again else TASKS}
                    job["seconds"] = SECONDS["eval"] / 4 * len(job["ckpts"]) * len(job["tasks"])
                found[f"{name}-s{seed}"] = job
    return found


def commands():
    """job without its seed -> its training command, of any of its seeds."""
    return {name.rsplit("-s", 1)[0]: job["command"] for name, job in jobs(Config()).items() if job["command"]}


def planned(command):
    """Seconds of a training command on two cores."""
    def of(flag, default):
        return int(command[command.index(flag) + 1]) if flag in command else default

    slower = 1 if "--compile" in command else 1.5
    if command[0] == "train_grpo.py":
        return of("--iters", 0) * of("--batch", 96) * SECONDS["grpo image"] * slower
    return slower * (SECONDS["sft"] * of("--iters", 300) / 300 if command[0] == "train_sft.py" else SECONDS["opd"] * (0.5 if "rep-half" in " ".join(command) else 1))


def passes(command):
    """Forward passes of a training command, for one image each, a backward pass as two; by its options."""
    script = {"train_opd.py": train_opd, "train_grpo.py": train_grpo, "train_sft.py": train_sft}[command[0]]
    cfg = util.parse(script.Config, list(map(str, command[1:])))
    if script is train_sft:                                # the teachers' pictures, then an update on a batch each iteration
        return cfg.samples * cfg.steps + cfg.iters * cfg.batch * 3
    if script is train_grpo:                               # the rollout; on the noisy steps policy (1 + 2) and reference
        return cfg.iters * cfg.batch * (cfg.steps + (cfg.noisy[1] - cfg.noisy[0]) * (3 + (cfg.beta > 0)))
    first, end = cfg.supervised or (cfg.noisy if cfg.rollout != "ode" else (0, cfg.steps))
    targets = 1 + (cfg.blend > 0) * (len(cfg.teachers) - 1) + (cfg.extrapolate != 1) + (cfg.lam > 0)
    return cfg.iters * cfg.batch * (cfg.steps + (1 if cfg.one else end - first) * (targets + 3))


def launch(command, cfg):
    """Run a script on cfg.ranks processes, its output to runs/reproduce.log."""
    log = Path("runs/reproduce.log")
    log.parent.mkdir(exist_ok=True)
    how = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={cfg.ranks}"] if cfg.ranks > 1 else [sys.executable]
    with open(log, "a") as f:
        done = subprocess.run([*how, *command], stdout=f, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed; the end of {log}: {log.read_text().splitlines()[-1]}")


def evaluate(name, job, cfg, *more):
    """The JSON of eval.py."""
    out = f"runs/rep-{name}/eval"
    launch(["eval.py", "--ckpts", *job["ckpts"], "--seed", str(job["seed"]), "--out", out, *more], cfg)
    return json.loads(Path(out).with_suffix(".json").read_text())


def train_rows(run):
    """The log of a run, a dict an iteration."""
    return [json.loads(line) for line in Path(f"runs/{run}/log.jsonl").read_text().splitlines()]


def run(name, job, cfg):
    """Train, evaluate, and write NAME.json into cfg.out; what a stopped run left is gone on with (every script resumes)."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"job": name, "part": job["part"], "seed": job["seed"], "command": " ".join(job["command"]), "commit": commit, "cores": os.cpu_count(),
              "ranks": cfg.ranks}
    train = ["--split", "train", "--per-task", "150"]
    if "source" in job:
        curve = evaluate(name, job, cfg, "--tasks", *job["tasks"])
        source = json.loads((Path(cfg.out) / f"{job['source'][4:]}.json").read_text())
        result |= {"source": source["command"], "s/it": source.get("s/it, median"), "iteration -> table": curve[HELD_OUT]}
    else:
        if job["command"]:
            launch(job["command"], cfg)
            rows = train_rows(f"rep-{name}")
            result |= {"timed alone": cfg.alone, "s/it, median": float(np.median([r["s/it"] for r in rows])), "iterations": len(rows), "last logged": rows[-1]}
        held_out, chosen = evaluate(name, job, cfg, "--diversity"), evaluate(name, job, cfg, *train)
        result |= {HELD_OUT: held_out[HELD_OUT]["it"], "diversity": held_out["diversity"]["it"], "all scores": held_out["all scores: mean, standard error"]["it"],
                   TRAIN: chosen[HELD_OUT]["it"]}
    util.write_atomic(Path(cfg.out) / f"{name}.json", json.dumps(result, indent=1))


def fixed(cfg, per_task=60):
    """fixed-states.json: KL of every finished run to each prompt's own teacher, nats per latent element and step, at the SAME states for all.

    "Own" is of the shipped ones, so the second teachers and their students are left out. Two sets of states: trajectories of the base and of the
    teacher itself (the training rollout's SDE, its five noisy steps), on held-out prompts.
    """
    file = Path(cfg.out) / "fixed-states.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    todo = {name: job["ckpts"][0].split("=")[1] for name, job in jobs(cfg).items() if "source" not in job and name not in done and "second" not in name}
    todo = {name: path for name, path in todo.items() if path == "base" or Path(path).exists()}
    world = world_of("tiny", [])
    model = models.load("ckpt/tiny.safetensors", torch.device("cpu"))
    teachers, times, net = adapters.read_teachers(list(TEACHERS.values()), model, world), schedule(8), model.mmdit
    adapters.attach(teachers, net)
    states = []                                            # (set, task, x, x's t, t_next, text, v_T): one for every task, set and step
    for task in TASKS:
        metas = world.eval_prompts(task, per_task, "eval")
        text = encode(model.text, [meta["prompt"] for meta in metas])
        noise = draw_noise([("fixed", task, i) for i in range(per_task)], 8, model.latent_shape())
        for which, adapter in (("base", None), ("teacher", task)):
            x = rollout(net, noise, times, text, 1.0, adapter, "sde", 0.7, range(5)).x
            states += [(which, task, x[:, k], times[k].expand(per_task), times[k + 1].expand(per_task), text) for k in range(5)]
    with torch.no_grad():
        targets = [velocity(net, x, t, text, 1.0, task) for _, task, x, t, _, text in states]
        for name, path in tqdm(todo.items(), desc="fixed states"):
            found = adapters.read(path, net) if path != "base" else None
            if found:
                net.add_adapter(name.replace(".", "_"), found["r"], found["alpha"], found["tensors"])
            kls = {}
            for (which, task, x, t, t_next, text), v_T in zip(states, targets):
                v = velocity(net, x, t, text, 1.0, name.replace(".", "_") if found else None)
                mean, std = sde_step(x, v, t, t_next, 0.7, times[1])
                kl = gaussian_kl(mean, sde_step(x, v_T, t, t_next, 0.7, times[1])[0], std).mean().item()
                kls.setdefault(f"{which}'s states", {}).setdefault(task, []).append(kl)
            done[name] = {which: {task: float(np.mean(kl)) for task, kl in by.items()} for which, by in kls.items()}
            util.write_atomic(file, json.dumps(done, indent=1))


# ------------------------------------------------------------------ tables


def t95(n):
    """Two-sided 95% point of Student's t with n - 1 degrees of freedom."""
    return {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}.get(n, 2.2)


def mean_half(values):
    """Mean, and half the width of the 95% interval over seeds (nan for one seed)."""
    values = np.array(values, float)
    return float(values.mean()), float(t95(len(values)) * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_half(above, below):
    """sum(above) / sum(below) over seeds (S,), and half the width of its 95% interval: that of the mean of (above - ratio * below) / mean(below).

    Of several rows (T, S), the mean of their ratios."""
    above, below = np.atleast_2d(np.array(above, float)), np.atleast_2d(np.array(below, float))
    ratio = above.sum(1, keepdims=True) / below.sum(1, keepdims=True)
    return float(ratio.mean()), mean_half(((above - ratio * below) / below.mean(1, keepdims=True)).mean(0))[1]


def show(mean, half_width, form=".3f"):
    """"mean ± half width of the 95% interval over seeds", or the bare number of one seed."""
    return f"{mean:{form}}" + ("" if math.isnan(half_width) else f" ± {half_width:{form.lstrip('+')}}")


def interval(values, form=".3f"):
    return show(*mean_half(values), form)


def collect(out):
    """job without its seed -> {seed: its results}, from the folder out."""
    found = {}
    for file in sorted(Path(out).glob("*-s*.json")):
        if file.stem != "fixed-states":
            name, seed = file.stem.rsplit("-s", 1)
            found.setdefault(name, {})[int(seed)] = json.loads(file.read_text())
    return found


def scores(result, column, table=HELD_OUT):
    return result[table][column][0]


def teachers_of(name):
    """task -> the result of the teacher that a model is measured by: the one that taught it."""
    return dict(zip(TASKS, SECOND if name == "opd-second" else TASKS))


def gains(found, name, seeds, task):
    """What a model and the task's teacher gain over the base, a list over seeds each: same prompts, same noise."""
    base = [scores(found["base"][s], task) for s in seeds]
    return [[scores(found[of][s], task) - b for s, b in zip(seeds, base)] for of in (name, teachers_of(name)[task])]


def grid(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|"] + ["| " + " | ".join(row) + " |" for row in rows])


ROWS = {"base": "base", "geneval": "teacher `geneval`", "ocr": "teacher `ocr`", "quality": "teacher `quality`",
        "geneval-second": "`geneval`, a second run", "ocr-second": "`ocr`, a second run", "quality-second": "`quality`, a second run",
        "merge": "merge of the three", "merge-second": "merge of the second runs",
        "sft": "SFT on teachers' pictures (the cold start)", "sft-equal": "SFT, distillation's compute",
        "mix-geneval-ocr": "GRPO-Mix of GenEval and OCR",
        "mix-small": "GRPO-Mix, distillation's compute", "mix-group": "the same, `--adv-std group`",
        "mix-whole": "GRPO-Mix, compute of teachers + distillation", "mix-whole-group": "the same, `--adv-std group`",
        "opd-sft": "**Flow-OPD from SFT**", "opd-merge": "**Flow-OPD from merge**", "opd-second": "**Flow-OPD from merge, the second teachers**"}
OWN_COLUMNS = ["quality reward of GenEval's pictures", "their diversity", "KL to the teachers at their states, 1e-3", "at the base's states"]


def title(name):
    return ROWS[name].replace("the same", ROWS["mix-whole" if "whole" in name else "mix-small"])


def own_cells(name, results, kls):
    """The cells under OWN_COLUMNS: what tells runs apart beside the scores."""
    known = [kls[f"{name}-s{seed}"] for seed in results if f"{name}-s{seed}" in kls]
    kl = [[1000 * np.mean(list(states[which].values())) for states in known] for which in ("teacher's states", "base's states")]
    return [interval([r["all scores"]["quality on geneval"][0] for r in results.values()]), interval([r["diversity"]["geneval"][0] for r in results.values()]),
            *(interval(values, ".2f") if values else "-" for values in kl)]


def main_table(found, kls):
    own = {name: passes(command) for name, command in commands().items() if name in ROWS or name.endswith("again")}
    own |= {name: own[f"{task}-again"] for task in TASKS for name in (task, f"{task}-second")} | {"opd-sft": own["opd-sft"] + own["sft"]}
    lines = [[ROWS[name], str(len(found[name])), f"{own.get(name, 0) / 1e3:.0f}",
              *(interval([scores(r, c) for r in found[name].values()]) for c in (*TASKS, "average")), *own_cells(name, found[name], kls)]
             for name in ROWS if name in found]
    return grid(["model", "seeds", "own passes, thousand", "GenEval", "OCR", "quality", "average", *OWN_COLUMNS], lines)


def share_table(found):
    """Parts of the teachers' gains: the gains of all seeds together over the teachers'."""
    lines = []
    for name in ("mix-small", "mix-group", "mix-whole", "mix-whole-group", "sft-equal", "opd-sft", "opd-merge", "opd-second"):
        seeds = [s for s in found.get(name, ()) if all(s in found.get(other, ()) for other in ("base", *teachers_of(name).values()))]
        if seeds:
            above, below = zip(*(gains(found, name, seeds, task) for task in TASKS))
            lines.append([title(name), str(len(seeds)),
                          *(show(*ratio_half(*both), ".2f") for both in zip(above, below)), show(*ratio_half(above, below), ".2f")])
    return grid(["part of the teacher's gain over the base", "seeds", "GenEval", "OCR", "quality", "mean"], lines)


def difference_table(found):
    """Model minus model, seed by seed: same prompts, same noise. A teachers' row (None) takes each task's own. In brackets: one seed, 95% over its images only."""
    lines, whole = [], [(name, other) for other in ("mix-whole", "mix-whole-group") for name in ("opd-merge", "opd-second")]
    for name, other in [("opd-merge", None), ("opd-second", None), ("opd-sft", None), ("half-extrapolate", None),
                        ("mix-geneval-ocr", None), ("mix-whole", None), ("mix-whole-group", None), *whole,
                        ("opd-merge", "mix-small"), ("opd-merge", "sft-equal"), ("half-none", "sft-equal"), ("opd-merge", "opd-sft")]:
        trained = TASKS[:2] if name == "mix-geneval-ocr" else TASKS
        others = {c: other for c in (*TASKS, "average")} if other else {task: teachers_of(name)[task] for task in trained}
        seeds = [s for s in found.get(name, ()) if all(s in found.get(o, ()) for o in others.values())]
        if not seeds:
            continue
        cells = []
        for c, o in others.items():
            pairs = [(found[name][s][HELD_OUT][c], found[o][s][HELD_OUT][c]) for s in seeds]             # (mean, standard error, n) each
            over_images = f" (± {1.96 * math.hypot(pairs[0][0][1], pairs[0][1][1]):.3f})"
            cells.append(interval([a[0] - b[0] for a, b in pairs], "+.3f") + (over_images if len(seeds) == 1 else ""))
        whose = {"half-extrapolate": "Flow-OPD from merge, half of the budget, `--extrapolate 1.25`,",
                 "half-none": "Flow-OPD from the base, half of the budget,"}.get(name) or title(name)
        label = f"{whose} minus {title(other) if other else 'each teacher on its own task'}".replace("**", "")
        lines.append([label, str(len(seeds)), *cells] + [""] * (4 - len(cells)))
    return grid(["difference", "seeds", "GenEval", "OCR", "quality", "average"], lines)


def compared_with(name, part):
    """What a run at half of the budget is shown minus: the default, or, if both are without the anchor, that one, at the same rate."""
    special = {"half": None, "merge": "half-lam0", "half-lam0": "half", "half-slow-lam0": "half-lam0"}
    if name in special:
        return special[name]
    return "half-slow-lam0" if name.endswith("slow-lam0") else "half-lam0" if part == "mar" or name.endswith("lam0") else "half"


def ablation_table(found, kls):
    """Runs at half of the budget minus what they are compared with, seed by seed; the last columns are each run's own."""
    lines = []
    for name in (n for n in found if n.startswith("half") or n == "merge"):
        part = next(iter(found[name].values()))["part"] if name != "merge" else "objectives"           # where they start
        other = compared_with(name, part)
        results = {s: r for s, r in found[name].items() if other is None or s in found.get(other, ())}
        cells = [interval([scores(r, c, which) - (scores(found[other][s], c, which) if other else 0) for s, r in results.items()], "+.3f" if other else ".3f")
                 for which, c in [(HELD_OUT, c) for c in (*TASKS, "average")] + [(TRAIN, "average")]]
        label = {"half": "`default`, not minus anything", "merge": "the merge, iteration 0"}.get(name, f"`{name[5:]}`")
        row = [label, other[5:] or "default" if other else "-", str(len(results)), *cells, *own_cells(name, results, kls)]
        lines.append((PARTS.index(part), name != "half", row))
    return grid(["run", "minus", "seeds", "GenEval", "OCR", "quality", "average", "the same on training prompts", *OWN_COLUMNS],
                [row for *_, row in sorted(lines, key=lambda line: line[:2])])


def curve(found, name):
    """Run NAME's part of the teacher's gain on the way: {task: [(iteration, ratio over seeds, half width)]}, from iteration 0 to its end.

    A GRPO run's own end is its 1; a distilled student is measured by the teachers that taught it.
    """
    shots, points = found[f"curve-{name}"], {}
    start = {"opd-merge": "merge", "opd-second": "merge-second", "opd-sft": "sft"}.get(name, "base")
    for task in [name.split("-")[0]] if name.endswith("again") else TASKS:
        goal = name if start == "base" else teachers_of(name)[task]
        seeds = [s for s in shots if all(s in found.get(of, ()) for of in (start, goal, "base", name))]
        scored = {0: [scores(found[start][s], task) for s in seeds], found[name][min(shots)]["iterations"]: [scores(found[name][s], task) for s in seeds]}
        for it in next(iter(shots.values()))["iteration -> table"]:
            scored[int(it)] = [shots[s]["iteration -> table"][it][task][0] for s in seeds]
        base, end = ([scores(found[of][s], task) for s in seeds] for of in ("base", goal))
        if seeds:
            points[task] = [(it, *ratio_half(np.subtract(by, base), np.subtract(end, base))) for it, by in sorted(scored.items())]
    return points


def reached(at):
    """The first iteration from which on every snapshot has 0.95 or more (None: there is none)."""
    first = None
    for it, part, _ in at:
        first = None if part < 0.95 else it if first is None else first
    return first


def cost_table(found):
    """Forward passes and seconds until 95% of the teacher's gain. A cold start's own are counted; the merge has none."""
    plan = commands()
    whole, lines, again = sum(passes(plan[f"{task}-again"]) for task in TASKS), [], [r for task in TASKS for r in found.get(f"{task}-again", {}).values()]
    if len(again) == 3:
        seconds = sum(r["s/it, median"] * r["iterations"] for r in again)
        lines.append(["GRPO, second runs", "all three, to their ends", "", "1.00", "", "", f"{whole / 1e3:.0f}", "100.0%", f"{seconds:.0f}"])
    for name in ("geneval-again", "ocr-again", "quality-again", "opd-merge", "opd-second", "opd-sft"):
        points = curve(found, name) if f"curve-{name}" in found else {}
        if len(points) > 1:
            points["all three"] = [(one[0], *min(points[task][k][1:] for task in TASKS)) for k, one in enumerate(points[TASKS[0]])]        # the one that has least
        runs, cold = list(found.get(name, {}).values()), passes(plan["sft"]) if name == "opd-sft" else 0
        for task, at in points.items():
            it, (end, part, _) = reached(at), at[-1]
            line = [title(name).replace("**", "") if name in ROWS else "GRPO, second run", task, str(end), f"{part:.2f}"]
            if it is None:
                lines.append([*line, "not reached", "-", "-", "-", "-"])
                continue
            spent = passes(plan[name]) / end * it + cold
            seconds = f"{it * np.mean([r['s/it, median'] for r in runs]):.0f}" if all(r["timed alone"] for r in runs) else "-"
            there = next(show(mean, half_width, ".2f") for k, mean, half_width in at if k == it)
            lines.append([*line, str(it), there, f"{spent / 1e3:.0f}", f"{spent / whole:.1%}", seconds])
    return grid(["run", "task", "iterations in all", "part of the gain at the end", "iterations to 0.95", "part there", "thousand passes",
                 f"of the teachers' {whole / 1e3:.0f}", "seconds"], lines)


def tables(out):
    """results/reproduce.md and the README's tables, from the results in the folder out."""
    found, file = collect(out), Path(out) / "fixed-states.json"
    kls = json.loads(file.read_text()) if file.exists() else {}
    made = {"main": main_table(found, kls), "share": share_table(found), "minus": difference_table(found), "cost": cost_table(found),
            "half": ablation_table(found, kls)}
    headings = {"main": "Main table", "share": "Part of the teachers' gains", "minus": "Differences, seed by seed", "cost": "Cost",
                "half": "Half of the budget: scores minus the default's, or lam0's, seed by seed; the last four columns are the run's own"}
    text = ("Mean and 95% interval over seeds (Student's t; a number alone is one seed). Held-out prompts, 600 images a task and seed.\n"
            "Made by `python reproduce.py --tables`.\n" + "".join(f"\n## {headings[key]}\n\n{table}\n" for key, table in made.items()))
    util.write_atomic(f"{out}.md", text)
    readme = Path("README.md").read_text()
    for key, table in made.items() if out == Config.out else ():
        start, end = f"<!-- reproduce: {key} -->\n", "<!-- end -->"
        if start in readme:
            head, rest = readme.split(start, 1)
            readme = head + start + table + "\n" + end + rest.split(end, 1)[1]
    util.write_atomic("README.md", readme)
    print(text)


def plot(out):
    """The folder's curves and ablations as a picture, OUT.png. Needs matplotlib, which nothing else does."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found, plan = collect(out), commands()
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5))
    for name, style in (("geneval-again", "--"), ("ocr-again", "--"), ("quality-again", "--"), ("opd-merge", "-"), ("opd-sft", ":")):
        if f"curve-{name}" not in found:
            continue
        whole, start = passes(plan[name]), passes(plan["sft"]) if name == "opd-sft" else 0
        for task, at in curve(found, name).items():
            it, part, half_width = (np.array(column, float) for column in zip(*at))
            left.errorbar((it * whole / it[-1] + start) / 1e6, part, np.nan_to_num(half_width), color=f"C{TASKS.index(task)}", linestyle=style, capsize=2,
                          label=f"{task}, {'GRPO' if style == '--' else ROWS[name].strip('*')}")
    left.axhline(0.95, color="grey", linewidth=0.5)
    left.set(xlabel="million forward passes of one image", ylabel="part of the teacher's gain over the base", ylim=(-0.4, 1.15))
    left.set_xscale("symlog", linthresh=0.02)
    left.set_xlim(left=-0.002)
    left.legend(fontsize=7)
    names = sorted((n for n in found if n.startswith("half-")), key=lambda n: -PARTS.index(next(iter(found[n].values()))["part"]))
    for y, name in enumerate(names):
        differences = [scores(found[name][s], "average") - scores(found["half"][s], "average") for s in found[name] if s in found["half"]]
        mean, half_width = mean_half(differences)
        right.errorbar(mean, y, xerr=0 if math.isnan(half_width) else half_width, fmt="o", color="C0", capsize=3)
        right.plot(differences, [y] * len(differences), "|", color="grey")
    right.axvline(0, color="grey", linewidth=0.5)
    right.set_yticks(range(len(names)), [n[5:] for n in names])
    right.set(xlabel="average score minus the default's, at half of the budget")
    right.set_xscale("symlog", linthresh=0.02)
    figure.tight_layout()
    figure.savefig(f"{out}.png", dpi=110)


def main(cfg):
    plan, out = jobs(cfg), Path(cfg.out)
    for part in cfg.parts:
        if part not in PARTS:
            raise ValueError(f"--parts {part}: expected some of {', '.join(PARTS)}")
    for name in cfg.only:
        if name not in plan:
            raise ValueError(f"--only {name}: expected some of {', '.join(plan)}")
    if cfg.ranks not in (1, 2):
        raise ValueError(f"--ranks {cfg.ranks}: expected 1 or 2, what the tiny world's batches divide by")
    if cfg.tables or cfg.plot:
        return tables(cfg.out) if cfg.tables else plot(cfg.out)
    todo = {name: job for name, job in plan.items()
            if (not cfg.parts or job["part"] in cfg.parts) and (not cfg.only or name in cfg.only) and not (out / f"{name}.json").exists()}
    made = {f"runs/rep-{name}/" for name, job in todo.items() if job["command"]}
    for name, job in todo.items():                         # results travel with the repo, runs/ does not
        for path in [c.split("=")[1] for c in job["ckpts"]] + job["command"]:
            if str(path).startswith("runs/") and not Path(path).exists() and not any(path.startswith(folder) for folder in made):
                of = Path(path).parts[1].removeprefix("rep-")
                if (out / f"{of}.json").exists():
                    raise ValueError(f"{name} needs {path}, of {of}, whose result is in {out} already: delete that, or choose another --out, to run it again")
                raise ValueError(f"{name} needs {path}, of {of}: run that too (" + (f"part {plan[of]['part']})" if of in plan else "with its seed)"))
    left, begun, failed = sum(job["seconds"] for job in todo.values()), time.time(), []
    print(f"{len(todo)} jobs to run, about {left / 3600:.1f} hours on two cores")
    for name, job in todo.items():
        print(f"{name:28s} {job['seconds'] / 60:5.1f} min   {' '.join(job['command']) or 'evaluation of ' + ' '.join(job['ckpts'])}")
    if cfg.dry_run:
        return
    for n, (name, job) in enumerate(todo.items()):
        if cfg.stop_after and time.time() - begun > 60 * cfg.stop_after:
            return print(f"stopped after {cfg.stop_after} minutes, {len(todo) - n} jobs left; the same command goes on")
        start = time.time()
        try:
            run(name, job, cfg)
        except ValueError as error:                        # one run that diverges should not stop the others
            failed.append(name)
            print(error)
        left -= job["seconds"]
        print(f"[{n + 1}/{len(todo)}] {name}: {time.time() - start:.0f} s (planned {job['seconds']:.0f}); about {left / 3600:.1f} hours left", flush=True)
    if "fixed" in cfg.parts or not cfg.parts + cfg.only:
        fixed(cfg)
    tables(cfg.out)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    util.run(main, Config)
