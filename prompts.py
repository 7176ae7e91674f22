"""
Whose prompts: the world's own (tiny.py, sd3.py), or those of a folder in flow_grpo's layout.

    --prompts geneval=DIR     train_metadata.jsonl, test_metadata.jsonl: one JSON object a line, GenEval's schema (rewards.py), with "prompt"
    --prompts ocr=DIR         train.txt, test.txt: one prompt a line
    --prompts geneval=FILE    GenEval's own evaluation_metadata.jsonl (a folder with it will do too), for evaluation

All are read and checked before any time is spent. A task that is not one of the world's may be given so too; it then needs a --reward.
"""
import importlib
import json
from pathlib import Path

import numpy as np

from rewards import check_geneval_meta, ocr_target

FILES = {"train": ("train_metadata.jsonl", "train.txt"), "eval": ("test_metadata.jsonl", "test.txt", "evaluation_metadata.jsonl")}


def read_file(path, task, world=None):
    """A file of prompts -> list of dicts with "prompt", "task" and, as given, "tag", "include", "exclude". ValueError names the malformed line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as text: {e}") from None
    metas = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            meta = json.loads(line) if Path(path).suffix == ".jsonl" else {"prompt": line.strip()}
            if not isinstance(meta, dict) or not isinstance(meta.get("prompt"), str) or not meta["prompt"].strip():
                raise ValueError(f"got {line.strip()[:80]!r}, expected a JSON object with a \"prompt\"")
            if task == "geneval" or "include" in meta:
                check_geneval_meta(meta)
                getattr(world, "check_meta", lambda meta: None)(meta)      # are these things that this world's detector knows?
            if task == "ocr":
                ocr_target(meta["prompt"])
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}, line {number}: is not JSON ({e.msg} at column {e.colno}): {line.strip()[:80]!r}") from None
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}") from None
        metas.append({"tag": task, **meta, "task": task})
    if not metas:
        raise ValueError(f"{path}: has no prompts, expected one a line")
    return metas


def read_folder(path, task, world=None):
    """{split: prompts} of what a folder (or a single evaluation file) has."""
    if Path(path).is_file():
        return {"eval": read_file(path, task, world)}
    found = {split: [Path(path) / name for name in names if (Path(path) / name).is_file()] for split, names in FILES.items()}
    if not any(found.values()):
        raise ValueError(f"--prompts {task}={path}: expected a folder with {', '.join(n for names in FILES.values() for n in names)}, or such a file")
    return {split: read_file(files[0], task, world) for split, files in found.items() if files}


class Prompted:
    """A world in which some tasks' prompts are a folder's. All else is the world's."""

    def __init__(self, world, sets):
        self.world, self.sets = world, sets
        self.TASKS = (*world.TASKS, *(task for task in sets if task not in world.TASKS))
        self.taken = {task: {meta["prompt"] for metas in there.values() for meta in metas} for task, there in sets.items()}
        self.RATIO = {**dict.fromkeys(self.TASKS, 1), **world.RATIO}

    def __getattr__(self, name):
        return getattr(self.world, name)

    def draw_prompt(self, rng, task, split):
        """One of the folder's prompts. A folder without this split leaves them to the world, which then avoids the prompts of the other."""
        there = self.sets.get(task, {})
        if split in there:
            return there[split][rng.integers(len(there[split]))]
        while (meta := self.world.draw_prompt(rng, task, split))["prompt"] in self.taken.get(task, ()):
            pass
        return meta

    def eval_prompts(self, task, n, split="eval"):
        """n prompts: evenly from all of the file's, or, where n is more than there are, all of them again and again."""
        rows = self.sets.get(task, {}).get(split)
        if not rows:
            return self.world.eval_prompts(task, n, split)
        return [rows[j * len(rows) // n] if n < len(rows) else rows[j % len(rows)] for j in range(n)]


def read_ratio(ratio, teachers, default):
    """["geneval=3", "ocr=1"] -> {"geneval": 3, "ocr": 1}; without any, the default's numbers for the teachers there are."""
    counts = {}
    for item in ratio:
        task, _, n = item.partition("=")
        if task not in teachers or not n.isdigit() or task in counts:
            raise ValueError(f"--ratio {item}: expected TASK=N with a teacher's task ({', '.join(teachers)}), each at most once")
        counts[task] = int(n)
    if ratio and (set(counts) != set(teachers) or not any(counts.values())):
        raise ValueError(f"--ratio {' '.join(ratio)}: expected a number for each of {', '.join(teachers)} (0 leaves a task out), not all 0")
    return counts or {task: default[task] for task in teachers}


def world_of(name, prompts=()):
    """The world that pictures are judged in (the module with its prompts, detector, reader and quality score), with --prompts TASK=DIR's prompts.

    name: "tiny" or "sd3", as model.world_name(--model) says.
    """
    world, sets = importlib.import_module(name), {}
    for item in prompts:
        task, equals, path = item.partition("=")
        if not (task and equals and path) or task in sets:
            raise ValueError(f"--prompts {item}: expected TASK=DIR, each task once")
        sets[task] = read_folder(path, task, world)
    return Prompted(world, sets) if sets else world


def check_prompts(world, tasks, split="train"):
    """Draw one prompt of each task: a task that has none says so now."""
    for task in tasks:
        world.draw_prompt(np.random.default_rng(0), task, split)
