"""Prompts as dicts, and folders of them, in the layout of flow_grpo.

A prompt is a dict with "prompt", "task" and "tag". GenEval's have more, in the schema of its files:

    {"tag": "position", "prompt": "a photo of a dog right of a cat",
     "include": [{"class": "cat", "count": 1},
                 {"class": "dog", "count": 1, "position": ["right of", 0]}],
     "exclude": [{"class": "cat", "count": 2}]}

A clause of "include" may also have a "color". A position is a relation and the index of an earlier
clause. "exclude" is optional. Its clause forbids "count" or more objects of a class.

    --prompts geneval=DIR     train_metadata.jsonl, test_metadata.jsonl: one JSON object a line
    --prompts ocr=DIR         train.txt, test.txt: one prompt a line
    --prompts geneval=FILE    GenEval's own evaluation_metadata.jsonl (a folder with it will do
                              too), for evaluation
    --prompts ocr=ORG/NAME    a dataset on the hub with the files of such a folder

All files are read and checked before the slow work starts. --prompts may also name a task that the
world does not have. That task then needs a --reward.

Sources: GenEval arXiv 2310.11513, djghosh13/geneval; Flow-GRPO arXiv 2505.05470,
yifan123/flow_grpo.
"""
import json
import math
from pathlib import Path

import numpy as np

from plumbing.files import read_text
from worlds.paths import download, on_hub

RELATIONS = ("left of", "right of", "above", "below")
# GenEval's kinds of prompt, and how often Flow-GRPO trains on each (on single_object never).
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TRAIN_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
# split -> the files that may hold it. The first one that exists is read.
FILES = {"train": ("train_metadata.jsonl", "train.txt"),
         "eval": ("test_metadata.jsonl", "test.txt", "evaluation_metadata.jsonl")}

# ------------------------------------------------------------------ for the worlds' own prompts


def with_article(name):
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def draw_tag(rng, tags):
    """Draw one tag at random. tags: {tag: weight}."""
    weights = np.array(list(tags.values()), float)
    return list(tags)[rng.choice(len(weights), p=weights / weights.sum())]


# ------------------------------------------------------------------ one prompt


def check_known(meta, clauses, key, known):
    """ValueError if a clause of a GenEval prompt names a class or a color (key) not in known."""
    for clause in clauses:
        if clause.get(key, known[0]) not in known:
            raise ValueError(f"GenEval prompt {meta['prompt']!r}: got {key} {clause[key]!r}, "
                             f"expected one of {', '.join(known)}")


def check_geneval_meta(meta):
    """ValueError unless meta is a prompt in GenEval's schema (see the top of this file)."""
    def expect(ok, got, expected):
        if not ok:
            raise ValueError(f"GenEval prompt {meta!r}: got {got}, expected {expected}")

    def expect_field(clause, name, ok, expected):
        expect(ok, f"{name} {clause.get(name)!r}", expected)

    expect(isinstance(meta, dict), type(meta).__name__, "a dict")
    include = meta.get("include")
    exclude = meta.get("exclude", [])
    expect(isinstance(include, list) and include, f"include {include!r}",
           "a list of at least one clause")
    expect(isinstance(exclude, list), f"exclude {exclude!r}", "a list of clauses")
    for clause in include + exclude:
        expect(isinstance(clause, dict), f"clause {clause!r}", "a dict")
        expect_field(clause, "class", isinstance(clause.get("class"), str), "a name")
        count = clause.get("count")
        expect_field(clause, "count", isinstance(count, int) and count >= 1, "an integer >= 1")
    for i, clause in enumerate(include):
        expect_field(clause, "color", isinstance(clause.get("color", ""), str), "a name")
        if "position" not in clause:
            continue
        position = clause["position"]
        pair = isinstance(position, (list, tuple)) and len(position) == 2
        expect(pair and position[0] in RELATIONS and position[1] in range(i),
               f"position {position!r} in clause {i}",
               f"[one of {RELATIONS}, index of an earlier clause]")


def ocr_target(prompt) -> str:
    """The text that the prompt asks for. It stands between the first pair of double quotes."""
    pieces = prompt.split('"')
    if len(pieces) < 3 or not pieces[1].replace(" ", ""):
        raise ValueError(f"OCR prompt: got {prompt!r}, expected the wanted text in straight double "
                         'quotes, as in: a sign saying "open"')
    return pieces[1]


def accept_all(meta):
    """The default check of a GenEval prompt: it accepts every prompt."""


def parse_line(line, is_json, task, check):
    """One line of a prompt file -> a dict, checked."""
    meta = {"prompt": line}
    if is_json:
        try:
            meta = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON ({error.msg} at column {error.colno}): "
                             f"{line[:80]!r}") from None
        except RecursionError:
            raise ValueError(f"is JSON that is nested too deeply: {line[:80]!r}") from None
    prompt = meta.get("prompt") if isinstance(meta, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'got {line[:80]!r}, expected a JSON object with a "prompt"')
    if task == "geneval" or "include" in meta:
        check_geneval_meta(meta)
        check(meta)
    if task == "ocr":
        ocr_target(prompt)
    return {"tag": task, **meta, "task": task}


# ------------------------------------------------------------------ files and folders


def read_file(path, task, check=accept_all):
    """A file of prompts -> a list of prompts of this task.

    check: raises ValueError for a GenEval prompt that the world's detector cannot judge.
    The ValueError for a malformed line names the line.
    """
    lines = read_text(path).splitlines()
    is_json = Path(path).suffix == ".jsonl"
    metas = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        try:
            metas.append(parse_line(line, is_json, task, check))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not metas:
        raise ValueError(f"{path}: has no prompts, expected one a line")
    return metas


def read_folder(path, task, check=accept_all):
    """The prompts of a folder, {split: prompts}. A single file holds the split "eval".

    The folder may be a dataset on the hub, which is downloaded.
    """
    if on_hub(path):
        wanted = [name for names in FILES.values() for name in names]
        path = download(path, f"--prompts {task}={path}", wanted, kind="dataset")
    if Path(path).is_file():
        return {"eval": read_file(path, task, check)}
    splits = {}
    for split, names in FILES.items():
        files = [Path(path) / name for name in names]
        there = [file for file in files if file.is_file()]
        if there:
            splits[split] = read_file(there[0], task, check)
    if not splits:
        names = ", ".join(FILES["train"] + FILES["eval"])
        raise ValueError(f"--prompts {task}={path}: expected a folder with {names}, "
                         "or such a file")
    return splits


def read_prompt_folders(items, check=accept_all):
    """--prompts, ["TASK=DIR", ...] -> {task: {split: prompts}}."""
    folders = {}
    for item in items:
        task, _, path = item.partition("=")
        if not task or not path or task in folders:
            raise ValueError(f"--prompts {item}: expected TASK=DIR, each task once")
        folders[task] = read_folder(path, task, check)
    return folders


def read_numbers(option, items, tasks, kind):
    """Read an option that gives each task a number: ["geneval=3", "ocr=1"] -> {task: number}.

    kind: int or float. ValueError unless every task has one number of 0 or more, not all 0.
    """
    names = ", ".join(tasks)
    what = "a whole number" if kind is int else "a number"
    numbers = {}
    for item in items:
        task, _, text = item.partition("=")
        try:
            number = kind(text)
        except ValueError:
            number = -1                                 # refused below
        if task not in tasks or not 0 <= number < math.inf or task in numbers:
            raise ValueError(f"{option} {item}: expected TASK=N with one of the tasks ({names}), "
                             f"each at most once, and {what} of 0 or more")
        numbers[task] = number
    if set(numbers) != set(tasks) or not any(numbers.values()):
        raise ValueError(f"{option} {' '.join(items)}: expected a number for each of {names} "
                         "(0 leaves a task out), not all 0")
    return numbers


def read_mix(items, tasks, default):
    """Read --ratio, the share of each task in a mix of prompts -> {task: whole number}.

    tasks: the tasks of the mix. default: {task: number}, used if items is empty. ValueError if all
    numbers are 0.
    """
    if items:
        return read_numbers("--ratio", items, tasks, int)
    mix = {task: default[task] for task in tasks}
    if not any(mix.values()):
        shares = " ".join(f"{task}=1" for task in tasks)
        raise ValueError(f"no prompt is routed to {', '.join(tasks)} by default; expected shares: "
                         f"--ratio {shares}")
    return mix
