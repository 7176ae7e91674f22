"""Kill training runs with kill -9, start them again, and compare with an undisturbed run.

    python -m experiments.kills --trials 200 --seed 0          # -> results/kills.jsonl (resumable)
    python -m experiments.kills --ranks 2 --elastic            # torchrun starts the ranks anew
    python -m experiments.kills --soak 60                      # one long run, a kill in two minutes

A trial starts a short run and kills it at random moments. The whole run is killed, and the same
command is given again. With --elastic one rank is killed instead, and torchrun --max-restarts must
do the rest. A trial passes if the run ends, its weights and its optimiser are bit for bit those of
an undisturbed run, its log has every iteration once, and no temporary file is left.
"""
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from plumbing import cli
from plumbing.files import read_pt
from worlds.tiny_prompts import TASKS

ROOT = Path(__file__).resolve().parent.parent
MODEL = f"--model {ROOT}/ckpt/tiny.safetensors --device cpu --name run --save-every 1"
TEACHERS = " ".join(f"{ROOT}/ckpt/{task}.pt" for task in TASKS)
# What each stage runs: {iters} iterations of a few images, with a state after each.
STAGES = {
    "grpo": f"train_grpo {MODEL} --tasks ocr --iters {{iters}} --batch 8 --group 4 --steps 4 "
            "--noisy 0 3 --lora-r 4 --lora-alpha 8",
    "opd": f"train_opd {MODEL} --teachers {TEACHERS} --iters {{iters}} --batch 8 --group 2 "
           "--steps 4 --noisy 0 4 --updates 1",
    "sft": f"train_sft {MODEL} --teachers {TEACHERS} --iters {{iters}} --batch 8 --samples 24 "
           "--steps 4",
    "base": "worlds.tiny_base --device cpu --out runs/tiny/base.safetensors --save-every 1 "
            "--steps {iters} --pool 512 --vae-steps 10 --text-steps 10 --batch 16 --width 64 "
            "--depth 2",
}
TORCHRUN = ("torch.distributed.run --standalone --max-restarts={restarts} "
            "--nproc_per_node={ranks} -m")
# Iterations that a soak does not reach.
MANY = 50000


@dataclass
class Config:
    # Trials in all. Those that --out has already are not repeated.
    trials: int = 20
    # Seed of the moments and victims.
    seed: int = 0
    # Stages to train: grpo, opd, sft, base. Trials take turns.
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    # Numbers of ranks. Trials take turns.
    ranks: list[int] = field(default_factory=lambda: [1, 2])
    # Kill one rank, and let torchrun start the ranks anew (runs of one rank use torchrun too).
    elastic: bool = False
    # Trials at the same time.
    jobs: int = 1
    # Iterations of a run.
    iters: int = 6
    # Kills in a trial, at most. A run that ends before its moment has fewer.
    kills: int = 4
    # Seconds after which a start counts as hung.
    limit: int = 300
    # Where the runs live. Those of trials that pass are removed.
    folder: str = "runs/kills"
    # JSON lines, one a trial.
    out: str = "results/kills.jsonl"
    # Instead of trials: one run of so many minutes, in which a rank is killed every two minutes.
    soak: float = 0.0


# ------------------------------------------------------------------ processes


def start(cfg, stage, ranks, folder, iters, restarts=0):
    """Give the command of a stage in folder. Returns the process. What it prints is appended."""
    command = STAGES[stage].format(iters=iters)
    if ranks > 1 or cfg.elastic:
        command = f"{TORCHRUN.format(ranks=ranks, restarts=restarts)} {command}"
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen([sys.executable, "-m", *command.split()], cwd=folder, env=env,
                                stdout=output, stderr=output)


def children(pid):
    """The processes that a process of this machine has started, and those that they started."""
    try:
        direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:                                     # it has ended
        return []
    return [found for child in direct for found in [int(child), *children(child)]]


def kill(pid):
    """kill -9. Returns whether there was such a process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_all(process):
    """kill -9 of a process and all that it has started."""
    for pid in [process.pid, *children(process.pid)]:
        kill(pid)
    process.wait()


def ranks_of(process):
    """{rank: pid} of the ranks that a torchrun has started."""
    found = {}
    for pid in children(process.pid):
        try:
            env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for entry in env:
            if entry.startswith(b"RANK="):
                found.setdefault(int(entry[5:]), pid)   # the parent comes before its children
    return found


def finish(process, limit):
    """Wait for a process. Returns its exit code, or None if it hung and was killed."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        kill_all(process)
        return None


# ------------------------------------------------------------------ comparing


def tensors(x, name=""):
    """{name: tensor} of all tensors in nested dicts and lists."""
    if torch.is_tensor(x):
        return {name: x}
    items = []
    if isinstance(x, dict):
        items = x.items()
    if isinstance(x, list):
        items = enumerate(x)
    found = {}
    for key, value in items:
        found.update(tensors(value, f"{name}.{key}"))
    return found


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return tensors(read_pt(path, []))


def differences(folder, reference, iters):
    """What a finished run has that the undisturbed run has not: a list of sentences."""
    wrong = []
    want, = reference.glob("runs/*/log.jsonl")
    want = want.parent
    run = folder / "runs" / want.name
    for path in sorted([*want.glob("*.pt"), *want.glob("*.safetensors")]):
        if path.stem.endswith("-before"):
            continue                                    # a killed run may have had no such state
        if not (run / path.name).exists():
            wrong.append(f"{path.name} is missing")
            continue
        a, b = read(run / path.name), read(path)
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            wrong.append(f"{path.name} differs")
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    found = [json.loads(line)["iter"] for line in lines]
    if found != list(range(1, iters + 1)):
        wrong.append(f"the log has iterations {found}")
    left = [path.name for path in folder.rglob("*.tmp")]
    if left:
        wrong.append(f"temporary files are left: {left}")
    return wrong


# ------------------------------------------------------------------ trials


def make_reference(cfg, stage, ranks, iters):
    """An undisturbed run. Returns its folder and how many seconds it took."""
    folder = Path(cfg.folder) / f"{stage}-{ranks}-{iters}"
    seconds = folder / "seconds"
    if not seconds.exists():
        shutil.rmtree(folder, ignore_errors=True)
        began = time.time()
        code = finish(start(cfg, stage, ranks, folder, iters), None)
        if code:
            raise ValueError(f"{folder}/output.txt: the undisturbed run ended with {code}")
        seconds.write_text(str(time.time() - began))
    return folder, float(seconds.read_text())


def strike(cfg, process, n_ranks, rng, seconds):
    """Kill a run, or one rank of it, at a random moment. Returns what was killed, or None."""
    moment = seconds * rng.uniform(0.1, 1.0)
    try:
        process.wait(moment)
        return None                                     # it has ended before
    except subprocess.TimeoutExpired:
        pass
    if not cfg.elastic:
        kill_all(process)
        return {"victim": "all", "after": round(moment, 2)}
    ranks = {}
    while len(ranks) < n_ranks:                         # torchrun is starting them
        if process.poll() is not None:
            return None
        time.sleep(0.1)
        ranks = ranks_of(process)
    rank = int(rng.integers(n_ranks))
    hit = kill(ranks[rank])
    return {"victim": rank, "after": round(moment, 2)} if hit else None


def trial(cfg, n, stage, ranks, reference, seconds):
    """Returns the row of a trial: what was killed, exit code, seconds, what is wrong."""
    rng = np.random.default_rng((cfg.seed, n))
    folder = Path(cfg.folder) / f"trial-{cfg.elastic:d}-{n}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.time()
    hits = []
    process = start(cfg, stage, ranks, folder, cfg.iters, cfg.kills)
    for _ in range(cfg.kills):
        hit = strike(cfg, process, ranks, rng, seconds)
        if hit is None:
            break
        hits.append(hit)
        if not cfg.elastic:
            process = start(cfg, stage, ranks, folder, cfg.iters)
    code = finish(process, cfg.limit)
    if code is None:
        wrong = [f"hung: it had not ended after {cfg.limit} more seconds"]
    else:
        wrong = [f"exit code {code}"] if code else []
        wrong += differences(folder, reference, cfg.iters)
    if not wrong:
        shutil.rmtree(folder)
    return {"trial": n, "seed": cfg.seed, "stage": stage, "ranks": ranks, "elastic": cfg.elastic,
            "kills": hits, "code": code, "seconds": round(time.time() - began, 1), "wrong": wrong}


def run_trials(cfg):
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rows = [row for row in rows if (row["seed"], row["elastic"]) == (cfg.seed, cfg.elastic)]
    done = {(row["trial"], row["stage"], row["ranks"]) for row in rows}
    kinds = [(stage, ranks) for ranks in cfg.ranks for stage in cfg.stages]
    needed = kinds[:cfg.trials]
    references = {kind: make_reference(cfg, *kind, cfg.iters) for kind in needed}

    def one(n):
        kind = kinds[n % len(kinds)]
        row = trial(cfg, n, *kind, *references[kind])
        line = json.dumps(row)
        with open(out, "a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        return row

    with ThreadPoolExecutor(cfg.jobs) as pool:
        rows += pool.map(one, [n for n in range(cfg.trials)
                               if (n, *kinds[n % len(kinds)]) not in done])
    summarise(rows)


def summarise(rows):
    """Print how many trials of each kind passed. ValueError if one did not."""
    for kind in sorted({(row["stage"], row["ranks"], row["elastic"]) for row in rows}):
        mine = [row for row in rows if (row["stage"], row["ranks"], row["elastic"]) == kind]
        kills = sum(len(row["kills"]) for row in mine)
        passed = sum(not row["wrong"] for row in mine)
        print(f"{kind[0]:5} {kind[1]} rank(s){' elastic' if kind[2] else ''}: {passed} of "
              f"{len(mine)} trials passed, {kills} kills, median "
              f"{statistics.median(row['seconds'] for row in mine):.0f} s")
    bad = [row["trial"] for row in rows if row["wrong"]]
    if bad:
        raise ValueError(f"trials {bad} did not pass; see 'wrong' in the rows, and their output")


# ------------------------------------------------------------------ soak


def measure(process):
    """{who: [RSS in MB, open files, age in s]} of a torchrun and its ranks."""
    found = {}
    for who, pid in {"torchrun": process.pid, **ranks_of(process)}.items():
        proc = Path(f"/proc/{pid}")
        try:
            pages = int((proc / "statm").read_text().split()[1])
            files = len(os.listdir(proc / "fd"))
            age = time.time() - proc.stat().st_ctime
        except OSError:
            continue                                    # it has just ended
        found[who] = [round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6), files, round(age)]
    return found


def observe(cfg, processes, rng):
    """Watch {name: run} for the minutes of the soak, and kill a random rank of the first one.

    A row goes to the output every 20 seconds. A kill comes every two minutes. ValueError if a run
    ends by itself.
    """
    began = time.time()
    first = next(iter(processes.values()))
    kills = 0
    while (seconds := time.time() - began) < 60 * cfg.soak:
        time.sleep(20)
        row = {"seconds": round(seconds)}
        for name, process in processes.items():
            if process.poll() is not None:
                raise ValueError(f"{cfg.folder}/{name}/output.txt: the run ended with "
                                 f"{process.returncode}")
            row[name] = measure(process)
        ranks = ranks_of(first)
        if ranks and seconds > 120 * (kills + 1):
            row["kill"] = int(rng.choice(sorted(ranks)))
            kill(ranks[row["kill"]])
            kills += 1
        with open(cfg.out, "a") as file:
            file.write(json.dumps(row) + "\n")
    return kills


def iterations_of(folder):
    """The iterations that a run of stage 1 has logged."""
    rows = (folder / "runs/run/log.jsonl").read_text().splitlines()
    return [json.loads(row)["iter"] for row in rows]


def soak(cfg):
    """Two runs of stage 1 on two ranks, side by side; in one a rank is killed every two minutes.

    After the minutes of the soak both are asked to stop. Then both go on to the same iteration, and
    end there. So the two can be compared, and the machine's speed does not matter.
    """
    cfg.elastic = True                                  # torchrun starts them
    homes = {name: Path(cfg.folder) / name for name in ("killed", "undisturbed")}
    processes = {}
    for name, home in homes.items():
        shutil.rmtree(home, ignore_errors=True)
        processes[name] = start(cfg, "grpo", 2, home, MANY, restarts=1000)
    kills = observe(cfg, processes, np.random.default_rng(cfg.seed))
    for process in processes.values():
        process.terminate()
    codes = [process.wait(cfg.limit) for process in processes.values()]
    done = {name: len(iterations_of(home)) for name, home in homes.items()}
    print(f"{kills} kills; stopped with {codes} after iterations {done}", flush=True)
    end = max(done.values()) + 1
    wrong = []
    for name, home in homes.items():
        code = start(cfg, "grpo", 2, home, end, restarts=1000).wait()
        wrong += [f"{name} ended with {code}"] if code else []
    wrong += differences(homes["killed"], homes["undisturbed"], end)
    print(f"{end} iterations; wrong: {wrong or 'nothing'}; memory and open files: {cfg.out}")
    if wrong:
        raise ValueError(f"{homes['killed']}: {'; '.join(wrong)}")


def main(cfg):
    cli.positive(cfg, "trials", "jobs", "iters", "kills", "limit")
    for ranks in cfg.ranks:
        if not ranks:
            raise ValueError("--ranks 0: expected 1 or more ranks a run")
    for stage in cfg.stages:
        if stage not in STAGES:
            raise ValueError(f"--stages {stage}: expected some of {', '.join(STAGES)}")
    soak(cfg) if cfg.soak else run_trials(cfg)


if __name__ == "__main__":
    cli.run(main, Config)
