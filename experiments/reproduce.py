"""
Reproduce the paper's findings on the tiny world, with seeds and error bars: runs, then tables.

    python -m experiments.reproduce --dry-run                   # what would run, and how long
    python -m experiments.reproduce                             # all of it
    python -m experiments.reproduce --parts teachers main --seeds 0 1 2
    python -m experiments.reproduce --tables                    # only the tables, from the results

After a stop, the same command goes on where the run was. jobs.py has the plan. Each model is
evaluated on held-out prompts, 600 images per task. The seed of their noise is the seed of training,
so models with the same seed draw from the same noise. Each model is also evaluated on training
prompts, 150 images per task. Settings are chosen by those scores.

The numbers of a job go to results/reproduce/JOB.json, with its command, seed, commit and seconds.
A job whose file is there is not run again. The repository contains the files of all jobs: give
another --out to run them again.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from eval import ALL_SCORES, SCORES, TABLE
from experiments import jobs, plots, tables, unseen
from experiments.results import OF_BASE, SECONDS_IT, SNAPSHOTS, TRAIN, UNSEEN
from plumbing import cli
from plumbing.files import write_text
from plumbing.folder import check_writable


@dataclass
class Config:
    # --- which jobs
    # Parts of the plan, see jobs.py (default: all).
    parts: list[str] = field(default_factory=list)
    # Names of jobs, such as short-lam0-s1 (default: all jobs of the parts).
    only: list[str] = field(default_factory=list)
    # Seeds of the jobs.
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    # --- how they run
    # Number of processes of each run: 1 or 2.
    ranks: int = 2
    # Use torch.compile in runs that train for over five minutes: 1.5 times as fast on two CPU
    # cores. It needs a C++ compiler.
    compile: bool = False
    # Start no new job after this many minutes (0: no limit).
    stop_after: int = 0
    # Folder of the results.
    out: str = "results/reproduce"

    # --- instead of running
    # Only print what would run.
    dry_run: bool = False
    # Only write the tables, from the results in --out.
    tables: bool = False
    # Only draw OUT.png. It needs matplotlib.
    plot: bool = False


# ------------------------------------------------------------------ one job


def launch(command, ranks):
    """Run a script in this many processes. Its output goes to runs/reproduce.log."""
    log = Path("runs/reproduce.log")
    log.parent.mkdir(exist_ok=True)
    how = [sys.executable]
    if ranks > 1:
        how += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(log, "a") as file:
        done = subprocess.run([*how, *command], stdout=file, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        last = log.read_text().splitlines()[-1]
        raise ValueError(f"{' '.join(command)} failed; the end of {log}: {last}")


def evaluate(name, job, ranks, *options):
    """Run eval.py on the checkpoints of a job. Returns what it writes to its JSON file."""
    out = f"runs/rep-{name}/eval"
    ckpts = [f"{label}={path}" for label, path in job.checkpoints.items()]
    command = ["eval.py", "--ckpts", *ckpts, "--seed", str(job.seed), "--out", out, *options]
    launch(command, ranks)
    return json.loads(Path(out).with_suffix(".json").read_text())


def commit():
    """The short name of the commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def train(name, job, cfg):
    """Run the training command. A run that was stopped goes on, since every script resumes."""
    if job.before:
        launch(job.before, 1)
    launch(job.command, cfg.ranks)
    log = Path(f"runs/rep-{name}/log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {SECONDS_IT: float(np.median([row["s/it"] for row in rows])),
            "iterations": len(rows),
            "last logged": rows[-1]}


def evaluate_model(name, job, ranks):
    """Evaluate on held-out prompts, then on training prompts, then by what no reward sees."""
    held_out = evaluate(name, job, ranks, "--diversity")
    chosen = evaluate(name, job, ranks, "--split", "train", "--per-task", "150")
    return {OF_BASE: held_out["base"],
            TABLE: held_out[TABLE]["it"],
            "diversity": held_out["diversity"]["it"],
            ALL_SCORES: held_out[ALL_SCORES]["it"],
            TRAIN: chosen[TABLE]["it"],
            UNSEEN: unseen.measure(job.checkpoints["it"], job.seed),
            SCORES: held_out[SCORES]["it"]}


def evaluate_snapshots(name, job, cfg):
    """Evaluate the snapshots of a run. The result of that run must be in the results' folder."""
    evaluated = evaluate(name, job, cfg.ranks, "--tasks", *job.tasks)
    source = json.loads((Path(cfg.out) / f"{job.source}.json").read_text())
    return {OF_BASE: evaluated["base"],
            "source": source["command"],
            "s/it": source.get(SECONDS_IT),
            SNAPSHOTS: evaluated[SCORES]}


def run(name, job, cfg):
    """Train, evaluate, and write NAME.json into the results' folder."""
    result = {"job": name, "part": job.part, "seed": job.seed, "command": " ".join(job.command),
              "commit": commit(), "cores": os.cpu_count(), "ranks": cfg.ranks}
    if job.source:
        result |= evaluate_snapshots(name, job, cfg)
    else:
        if job.command:
            result |= train(name, job, cfg)
        result |= evaluate_model(name, job, cfg.ranks)
    write_text(Path(cfg.out) / f"{name}.json", json.dumps(result))


# ------------------------------------------------------------------ all jobs


def check(cfg, plan):
    for part in cfg.parts:
        if part not in jobs.PARTS:
            raise ValueError(f"--parts {part}: expected some of {', '.join(jobs.PARTS)}")
    for name in cfg.only:
        if name not in plan:
            raise ValueError(f"--only {name}: expected some of {', '.join(plan)}")
    if cfg.ranks not in (1, 2):
        raise ValueError(f"--ranks {cfg.ranks}: expected 1 or 2, "
                         "which divide the batches of the tiny world")
    if len(set(cfg.seeds)) < len(cfg.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, cfg.seeds))}: expected each seed once")
    check_writable(Path(cfg.out))
    if cfg.plot and not find_spec("matplotlib"):
        raise ValueError("--plot: needs matplotlib; pip install matplotlib")


def missing_jobs(cfg, plan):
    """The jobs that are asked for and have no result yet."""
    todo = {}
    for name, job in plan.items():
        if cfg.parts and job.part not in cfg.parts:
            continue
        if cfg.only and name not in cfg.only:
            continue
        if not (Path(cfg.out) / f"{name}.json").exists():
            todo[name] = job
    return todo


def check_inputs(todo, plan, out):
    """ValueError if a job needs a file that is missing and that no job to run will make.

    The repository contains the results, but not the folder runs/.
    """
    made = {f"rep-{name}" for name, job in todo.items() if job.command}
    made |= {Path(job.before[-1]).name for job in todo.values() if job.before}
    results = {path for job in todo.values() if job.command for path in job.checkpoints.values()}
    for name, job in todo.items():
        for path in [*job.checkpoints.values(), *job.command]:
            if Path(path).exists() or path in results:
                continue
            if path.startswith("ckpt/"):
                raise ValueError(f"{name} needs {path}, a teacher: run part teachers too")
            if not path.startswith("runs/"):
                continue
            folder = Path(path).parts[1]
            if folder in made:
                continue
            source = folder.removeprefix("rep-")
            needs = f"{name} needs {path}, of {source}"
            if (Path(out) / f"{source}.json").exists():
                raise ValueError(f"{needs}, whose result is in {out} already: "
                                 "delete that, or choose another --out, to run it again")
            where = f"part {plan[source].part}" if source in plan else "with its seed"
            raise ValueError(f"{needs}: run that too ({where})")


def show_plan(todo, seconds):
    print(f"{len(todo)} jobs to run, about {seconds / 3600:.1f} hours on two cores")
    for name, job in todo.items():
        what = " ".join(job.command)
        if not what:
            what = "evaluation of " + " ".join(job.checkpoints.values())
        print(f"{name:28s} {job.seconds / 60:5.1f} min   {what}")


def run_all(todo, left, cfg):
    """Run the jobs one after another.

    left: the estimated seconds of all of them. Returns the names of the jobs that failed, or None
    if --stop-after left some out.
    """
    failed = []
    begun = time.time()
    for n, (name, job) in enumerate(todo.items()):
        start = time.time()
        if cfg.stop_after and start - begun > 60 * cfg.stop_after:
            print(f"stopped after {cfg.stop_after} minutes, {len(todo) - n} jobs left; "
                  "the same command goes on")
            return None
        try:
            run(name, job, cfg)
        except ValueError as error:                     # the others should still run
            failed.append(name)
            print(error)
        left -= job.seconds
        print(f"[{n + 1}/{len(todo)}] {name}: {time.time() - start:.0f} s "
              f"(planned {job.seconds:.0f}); about {left / 3600:.1f} hours left", flush=True)
    return failed


def main(cfg):
    plan = jobs.plan(cfg.seeds, cfg.compile)
    check(cfg, plan)
    page = tables.PAGE if cfg.out == Config.out else None
    if cfg.tables:
        return tables.write_tables(cfg.out, page)
    if cfg.plot:
        return plots.plot(cfg.out)
    todo = missing_jobs(cfg, plan)
    check_inputs(todo, plan, cfg.out)
    seconds = sum(job.seconds for job in todo.values())
    show_plan(todo, seconds)
    if cfg.dry_run:
        return
    failed = run_all(todo, seconds, cfg)
    if failed is None:
        return
    tables.write_tables(cfg.out, page)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    cli.run(main, Config)
