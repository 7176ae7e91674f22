"""The speedrun: with how few forward passes does stage 2 reach 95% of every teacher's gain?

    python -m experiments.speedrun default --seeds 0 1 2 3 4    # train an entry and judge it
    python -m experiments.speedrun default --out runs/speedrun  # the same, again and apart
    python -m experiments.speedrun default --screen             # one seed, on training prompts
    python -m experiments.speedrun --tables                     # only the page, from the results

An entry is a name with options of train_opd.py, in results/speedrun/entries.json. It starts from
the shipped teachers. Its student is judged only at the end of the run, on held-out prompts with
fixed noise. The base and the teachers were judged once, on the same prompts and noise (goal.json).
For each task and seed, the margin is

    student - base - 0.95 (teacher - base)

and an entry is a record if the mean margin of each task is above 0 with p < 0.01, by a one-sided
t-test over its seeds. docs/speedrun.md has the rules and the records. A run that was stopped goes
on when the same command is given again.
"""
import json
import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import train_opd
from checkpoints.cold_start import MERGES
from checkpoints.teachers import attach, policy_of, read_teachers
from eval import ALL_SCORES, TABLE
from experiments.intervals import show_mean
from experiments.jobs import ROUTED, TEACHERS
from experiments.passes import passes
from experiments.reproduce import commit, launch
from experiments.tables import grid
from experiments.unseen import BASE
from plumbing import cli
from plumbing.files import write_text
from sampler import Policy, draw, schedule
from worlds import open_world

OUT = Path("results/speedrun")
PAGE = Path("docs/speedrun.md")
ENOUGH = 0.95                                   # the part of a teacher's gain to reach
SURE = 0.01                                     # the largest p of a record
# Held-out images of each task. GenEval's gain is small against its noise, so it has most.
IMAGES = {"geneval": 2400, "ocr": 300, "preference": 300}
# Images of each task on training prompts, for --screen.
SCREENED = {"geneval": 162, "ocr": 48, "preference": 48}


@dataclass
class Config:
    # --- what
    # Names of entries in results/speedrun/entries.json.
    entries: list[str] = field(default_factory=list)
    # Seeds of training. A record needs at least three.
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    # Train with the first seed only, and compare on training prompts. Search by this alone.
    screen: bool = False
    # Only write the tables of docs/speedrun.md, from the results.
    tables: bool = False

    # --- how
    # Number of processes of a run: 1 or 2.
    ranks: int = 2
    # Folder of the results. A seed whose result is there is not run again.
    out: str = str(OUT)


def read_entries():
    """{name: {"options", "date", "why"}}, in the order of the file."""
    return json.loads((OUT / "entries.json").read_text())


def run_name(name, seed):
    """The name of a run: its folder is runs/NAME."""
    return f"speedrun-{name}-s{seed}"


def command(name, seed):
    """The training command of an entry, as a list of words."""
    options = shlex.split(read_entries()[name]["options"])
    return ["train_opd.py", "--teachers", *TEACHERS.values(), "--seed", str(seed),
            "--name", run_name(name, seed), *options]


def student(name, seed):
    """The path of an entry's student: an adapter, or with --full a whole transformer."""
    path = Path("runs") / run_name(name, seed) / "student.pt"
    return path if path.exists() else path.with_suffix(".safetensors")


# ------------------------------------------------------------------ statistics


def p_value(margins):
    """One-sided t-test: how probable is so high a mean of margins (S,) if the true one is 0?

    ValueError for fewer than three seeds.
    """
    n = len(margins)
    if n < 3:
        raise ValueError(f"{n} seeds: expected at least 3, for a test over seeds")
    t = float(np.mean(margins) / (np.std(margins, ddof=1) / math.sqrt(n)))
    df = n - 1
    # Half of Student's density, integrated from 0 to |t|: with x = sqrt(df) tan(a) it is
    # proportional to cos(a)^(df - 1).
    a = np.linspace(0, math.atan(abs(t) / math.sqrt(df)), 10001)
    constant = math.gamma((df + 1) / 2) / (math.sqrt(math.pi) * math.gamma(df / 2))
    inside = constant * np.trapezoid(np.cos(a) ** (df - 1), a)
    return float(0.5 - math.copysign(inside, t))


def margins(results, goal, task):
    """(S,): how far the student of each seed is above the score to reach."""
    base = goal["base"][task]
    to_reach = base + ENOUGH * (goal["teachers"][task] - base)
    return np.array([result["scores"][task][0] - to_reach for result in results])


def shares(results, goal, task):
    """(S,): the part of the teacher's gain that the student of each seed has."""
    base = goal["base"][task]
    gain = goal["teachers"][task] - base
    return np.array([(result["scores"][task][0] - base) / gain for result in results])


def is_record(results, goal):
    """Does every task reach its score, with p < 0.01 over the seeds?"""
    return len(results) >= 3 and all(p_value(margins(results, goal, task)) < SURE
                                     for task in ROUTED)


# ------------------------------------------------------------------ held-out prompts


def evaluate(out, ckpts, tasks, ranks):
    """Judge checkpoints ({label: path}) on held-out prompts. Returns what eval.py writes.

    tasks: those with equally many images. The noise is always the same.
    """
    ckpts = [f"{label}={path}" for label, path in ckpts.items()]
    launch(["eval.py", "--ckpts", *ckpts, "--tasks", *tasks, "--per-task", str(IMAGES[tasks[0]]),
            "--diversity", "--out", out], ranks)
    return json.loads(Path(f"{out}.json").read_text())


def make_goal(ranks):
    """Judge the base on all tasks and each teacher on its own, and write goal.json."""
    goal = {"images": IMAGES, "commit": commit(), "base": {}, "teachers": {}, "errors": {}}
    for task in ROUTED:
        found = evaluate(f"runs/speedrun-goal-{task}", {"base": "base", task: TEACHERS[task]},
                         [task], ranks)[TABLE]
        goal["base"][task] = found["base"][task][0]
        goal["teachers"][task] = found[task][task][0]
        goal["errors"][task] = found[task][task][1]
    write_text(OUT / "goal.json", json.dumps(goal, indent=1))


def judge(name, seed, ranks):
    """The scores of an entry's student on held-out prompts, and what else to look at."""
    ckpts = {"student": student(name, seed)}
    out = f"runs/{run_name(name, seed)}/eval"
    geneval = evaluate(f"{out}-geneval", ckpts, ["geneval"], ranks)
    others = evaluate(f"{out}-others", ckpts, ["ocr", "preference"], ranks)
    table = {**others[TABLE]["student"], **geneval[TABLE]["student"]}
    return {"scores": {task: table[task] for task in ROUTED},
            "quality of GenEval's pictures": geneval[ALL_SCORES]["student"]["quality on geneval"],
            "diversity of GenEval's pictures": geneval["diversity"]["student"]["geneval"]}


def train(name, seed, ranks):
    """Run the training command of an entry. A run that was stopped goes on.

    Returns its passes, and the seconds of its iterations without start-up.
    """
    words = command(name, seed)
    launch(words, ranks)
    log = Path(f"runs/{run_name(name, seed)}/log.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    return {"command": " ".join(words), "passes": passes(words),
            "seconds": sum(row["s/it"] for row in rows), "log": rows}


def run(name, seed, ranks, out):
    """Train an entry with one seed, judge it, and write NAME-sSEED.json and its log to out."""
    result = {"entry": name, "seed": seed, "commit": commit(), "ranks": ranks,
              "cores": os.cpu_count(), **train(name, seed, ranks)}
    rows = result.pop("log")
    result |= judge(name, seed, ranks)
    write_text(Path(out) / f"{name}-s{seed}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(Path(out) / f"{name}-s{seed}.json", json.dumps(result, indent=1))


# ------------------------------------------------------------------ training prompts, to search by


@torch.no_grad()
def draw_task(model, policy, world, task):
    """Latents of a task's training prompts, drawn as eval.py draws: (n, C, H, W)."""
    metas = world.eval_prompts(task, SCREENED[task], "train")
    drawn = []
    for part in torch.arange(len(metas)).split(81):
        prompts = [metas[j]["prompt"] for j in part]
        keys = [("screen", task, int(j)) for j in part]
        drawn.append(draw(model, policy, prompts, keys, schedule(20)))
    return torch.cat(drawn)


def distances(student):
    """{task: |student's pictures - teacher's|^2 / |base's - teacher's|^2}, from the same noise.

    It is 1 for the base and 0 for the teacher. student: a checkpoint. A score of so few images
    would tell little; this distance ranks runs of one seed. Latents are compared.
    """
    world = open_world(BASE)
    model = world.load(BASE)
    attach(read_teachers(list(TEACHERS.values()), model.mmdit, world.tasks), model.mmdit)
    own = policy_of(student, model.mmdit, "student")
    far = {}
    for task in ROUTED:
        goal = draw_task(model, Policy(model.mmdit, task), world, task)
        base = draw_task(model, Policy(model.mmdit), world, task)
        distance = (draw_task(model, own, world, task) - goal).square().mean()
        far[task] = float(distance / (base - goal).square().mean())
    return far


def screen(name, seed, ranks, out):
    """Train an entry with one seed, and add its distances to screened.json in out."""
    result = train(name, seed, ranks)
    del result["log"]
    result["distances"] = distances(student(name, seed))
    file = Path(out) / "screened.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    write_text(file, json.dumps({**done, name: result}, indent=1))


# ------------------------------------------------------------------ the page


def collect(name, out):
    """The results of an entry on held-out prompts, in the order of their seeds."""
    found = []
    for file in Path(out).glob("*-s*.json"):
        entry, seed = file.stem.rsplit("-s", 1)
        if entry == name:
            found.append((int(seed), json.loads(file.read_text())))
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def record_table(entries, out):
    """The entries that were judged on held-out prompts, from most passes to fewest."""
    file = OUT / "goal.json"
    goal = json.loads(file.read_text()) if file.exists() else {}
    judged = {name: collect(name, out) for name in entries}
    judged = {name: results for name, results in judged.items() if results}
    rows = []
    for name in sorted(judged, key=lambda name: -judged[name][0]["passes"]):
        results = judged[name]
        row = [f"`{name}`", entries[name]["date"], f"{results[0]['passes'] / 1e3:.0f}",
               show_mean([result["seconds"] for result in results], ".0f"),
               " ".join(str(result["seed"]) for result in results)]
        for task in ROUTED:
            cell = show_mean(shares(results, goal, task), ".3f")
            if len(results) >= 3:
                cell += f" (p {p_value(margins(results, goal, task)):.4f})"
            row.append(cell)
        for rest in ("quality of GenEval's pictures", "diversity of GenEval's pictures"):
            row.append(show_mean([result[rest][0] for result in results], ".3f"))
        row.append("yes" if is_record(results, goal) else "no")
        row.append(f"[log](../{out}/{name}-s{results[0]['seed']}.jsonl)")
        rows.append([*row, f"`{entries[name]['options']}`", entries[name]["why"]])
    return grid(["entry", "date", "thousand passes", "seconds", "seeds", "GenEval", "OCR",
                 "preference", "quality reward of GenEval's pictures", "their diversity", "reached",
                 "log", "options", "what is new"], rows)


def tried_table(entries, out):
    """The entries that were screened on training prompts, in the order of their trial."""
    file = Path(out) / "screened.json"
    screened = json.loads(file.read_text()) if file.exists() else {}
    rows = []
    for name, result in screened.items():
        far = result["distances"]
        row = [f"`{name}`", f"`{entries[name]['options']}`", f"{result['passes'] / 1e3:.1f}"]
        row += [f"{far[task]:.3f}" for task in ROUTED]
        rows.append([*row, entries[name]["why"]])
    return grid(["entry", "options", "thousand passes", "GenEval", "OCR", "preference",
                 "what it is"], rows)


def make_tables(out):
    entries = read_entries()
    return {"records": record_table(entries, out), "tried": tried_table(entries, out)}


def write_tables(out):
    """Print the tables. Those of the repository's results also go into docs/speedrun.md."""
    tables = make_tables(out)
    print("\n\n".join(tables.values()))
    if Path(out) != OUT:
        return
    text = PAGE.read_text()
    for name, table in tables.items():
        start, end = f"<!-- speedrun: {name} -->\n", "<!-- end -->"
        head, rest = text.split(start, 1)
        text = head + start + table + "\n" + end + rest.split(end, 1)[1]
    write_text(PAGE, text)


# ------------------------------------------------------------------ all


def check_entry(name):
    """ValueError if an entry changes what all entries share, or starts from hidden training."""
    cfg = cli.parse(train_opd.Config, command(name, seed=0)[1:])
    for flag, given in (("--teachers", cfg.teachers != list(TEACHERS.values())),
                        ("--model", cfg.model != train_opd.Config.model),
                        ("--prompts", cfg.prompts),
                        ("--name or --seed", cfg.name != run_name(name, 0) or cfg.seed),
                        ("--init PATH", cfg.init not in ("none", *MERGES))):
        if given:
            raise ValueError(f"entry {name}: {flag} is not for an entry to change; expected other "
                             "options of train_opd.py (docs/speedrun.md: Rules)")


def check(cfg):
    """ValueError for an entry that does not exist or is against the rules, or a wrong number."""
    known = read_entries()
    for name in cfg.entries:
        if name not in known:
            raise ValueError(f"{name}: expected entries of {OUT}/entries.json, which are "
                             f"{', '.join(known)}")
        check_entry(name)
    if cfg.ranks not in (1, 2):
        raise ValueError(f"--ranks {cfg.ranks}: expected 1 or 2, which divide the batches of the "
                         "tiny world")
    if len(set(cfg.seeds)) < len(cfg.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, cfg.seeds))}: expected each seed once")


def main(cfg):
    check(cfg)
    if cfg.screen:
        for name in cfg.entries:
            screen(name, cfg.seeds[0], cfg.ranks, cfg.out)
    elif not cfg.tables:
        if not (OUT / "goal.json").exists():
            make_goal(cfg.ranks)
        for name in cfg.entries:
            for seed in cfg.seeds:
                if not (Path(cfg.out) / f"{name}-s{seed}.json").exists():
                    run(name, seed, cfg.ranks, cfg.out)
    write_tables(cfg.out)


if __name__ == "__main__":
    cli.run(main, Config, positional=("entries",))
