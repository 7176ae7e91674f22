"""
Scores any folder of images. IMAGES/NAME.jsonl gets a line for each image, and a summary beside it.

    python -m scorers pickscore IMAGES prompts.txt
    python -m scorers deqa=0.4,pickscore=0.6 IMAGES prompts.txt
    python -m scorers geneval_benchmark IMAGES evaluation_metadata.jsonl

NAME is a reward of rewards.py, or a weighted sum of rewards. A stopped run goes on where it was: an
image is not scored again if it has a line, and neither it nor its prompt has changed.
"""
import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from plumbing import cli, dist
from plumbing.files import file_size, one_line, read_text, write_text
from plumbing.folder import check_places
from rewards import parse_reward, score
from worlds import world_class
from worlds.prompts import read_file

USAGE = ("usage: python -m scorers NAME IMAGES PROMPTS, such as pickscore, a folder of images and "
         "a .txt of prompts (--help says more)")
# The largest image that is read, in bytes and in pixels.
LARGEST = 200 * 2**20
PIXELS = 100 * 10**6
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class Config:
    # --- what to score
    # A reward, or a sum such as deqa=0.4,pickscore=0.6.
    name: str = ""
    # Folder of images. They are sorted by the last number in their names, and go with the prompts
    # in order. With k times as many images as prompts, each prompt has k images.
    images: str = ""
    # A .txt with one prompt a line, or GenEval's .jsonl.
    prompts: str = ""
    # --- how
    # Whose detector and reader: sd3 or tiny.
    world: str = "sd3"
    # Where to write, if not to IMAGES/NAME.jsonl.
    out: str = ""
    # Images at a time.
    batch: int = 8
    # auto, cuda, mps or cpu.
    device: str = "auto"


# ------------------------------------------------------------------ images and their prompts


def read_image(path):
    """An image file as a tensor (3, H, W) in [0, 1]."""
    file_size(path, LARGEST)
    with one_line(path, "is not an image that Pillow reads"), Image.open(path) as image:
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1) / 255


def place(path):
    """The key that sorts images: the last number in a name (0009.png, PROMPT_000011.png), then
    the name."""
    numbers = re.findall(r"\d+", path.stem)
    number = int(numbers[-1]) if numbers else -1
    return number, path.name


def find_images(folder):
    files = [file for file in Path(folder).glob("*") if file.suffix.lower() in SUFFIXES]
    return sorted(files, key=place)


def task_of(spec):
    """The task whose prompts have what the rewards of spec ask for."""
    for task in ("geneval", "ocr"):
        if any(task in name for name in spec):
            return task
    return "prompt"


def read_prompts(path, spec, world):
    task = task_of(spec)
    if task == "geneval" and Path(path).suffix != ".jsonl":
        raise ValueError(f"{path}: GenEval needs more than prompts: what each picture has to show. "
                         "Expected its .jsonl metadata, such as evaluation_metadata.jsonl")
    return read_file(path, task, world.check_meta)


def pair(cfg, metas, prompts):
    """[(image file, its prompt), ...]. metas: the prompts in order. prompts: their file."""
    files = find_images(cfg.images)
    if not files or len(files) % len(metas):
        raise ValueError(f"{cfg.images}: has {len(files)} images for the {len(metas)} prompts of "
                         f"{prompts}; expected as many, or a whole multiple")
    each = len(files) // len(metas)
    return [(file, metas[i // each]) for i, file in enumerate(files)]


def check_beside(cfg, pairs):
    """ValueError if eval.py's prompts.txt, beside the folder of images, has other prompts."""
    folder = Path(cfg.images).resolve()
    if folder.name == "samples":                         # eval.py --layout compbench
        folder = folder.parent
    beside = folder.parent / "prompts.txt"
    if not beside.is_file():
        return
    drawn = pair(cfg, read_file(beside, "prompt"), beside)
    for (file, meta), (_, other) in zip(pairs, drawn):
        if meta["prompt"].strip() != other["prompt"]:
            raise ValueError(f"{cfg.prompts}: has {meta['prompt']!r} for {file.name}, but "
                             f"{beside} says {other['prompt']!r}; give that file, or move it "
                             "away if it is not of these images")


# ------------------------------------------------------------------ lines of the output


def stamp(path):
    """[size in bytes, time of change in ns]: another stamp means that the image has changed."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def read_rows(path):
    """{image: row} that a stopped run has left. A line that was cut short is ignored."""
    rows = {}
    lines = read_text(path).splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            rows[str(row["image"])] = row
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
    return rows


def is_done(row, file, meta, spec):
    same_prompt = row.get("prompt") == meta["prompt"]
    return same_prompt and row.get("stamp") == stamp(file) and set(spec) <= set(row)


def to_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def score_files(pairs, spec, world, device):
    """The rows of some (file, prompt) pairs. Neighbours of one size are scored as one batch."""
    rows = []
    read = [(read_image(file), file, meta) for file, meta in pairs]
    for _, same_size in groupby(read, key=lambda item: item[0].shape):
        images, files, metas = zip(*same_size)
        scores = score(spec, torch.stack(images).to(device), list(metas), world)
        for j, (file, meta) in enumerate(zip(files, metas)):
            row = {"image": file.name, "prompt": meta["prompt"], "tag": meta["tag"],
                   "stamp": stamp(file)}
            for name, column in scores.items():
                row[name] = float(column[j])
            rows.append(row)
    return rows


def summarize(rows, names):
    """{name: mean, standard error, number of images, and each tag's mean if there are several}."""
    tags = sorted({row["tag"] for row in rows})
    summary = {}
    for name in names:
        of_tag = {}
        for tag in tags:
            of_tag[tag] = np.array([row[name] for row in rows if row["tag"] == tag])
        values = np.concatenate(list(of_tag.values()))
        error = None
        if len(values) > 1:
            error = float(values.std(ddof=1) / len(values) ** 0.5)
        summary[name] = {"mean": float(values.mean()), "standard error": error,
                         "images": len(values)}
        if len(tags) > 1:
            means = {tag: float(some.mean()) for tag, some in of_tag.items()}
            summary[name]["mean of the tags' means"] = float(np.mean(list(means.values())))
            summary[name].update(means)
    return summary


def main(cfg):
    if not (cfg.name and cfg.images and cfg.prompts):
        raise ValueError(USAGE)
    cli.positive(cfg, "batch")
    spec = parse_reward(cfg.name)
    world = world_class(cfg.world)()
    pairs = pair(cfg, read_prompts(cfg.prompts, spec, world), cfg.prompts)
    check_beside(cfg, pairs)
    out = Path(cfg.out or Path(cfg.images) / f"{cfg.name}.jsonl")
    check_places(out.parent, out)
    _, _, device = dist.setup(cfg.device)

    found = read_rows(out)
    rows = {}
    todo = []
    for file, meta in pairs:
        row = found.get(file.name, {})
        if is_done(row, file, meta, spec):
            rows[file.name] = row
        else:
            todo.append((file, meta))
    write_text(out, to_lines(rows.values()))            # drops half a line at the end

    with tqdm(total=len(pairs), initial=len(rows), desc=cfg.name, unit="image") as bar:
        for i in range(0, len(todo), cfg.batch):
            scored = score_files(todo[i:i + cfg.batch], spec, world, device)
            with open(out, "a") as end:
                end.write(to_lines(scored))
            rows.update({row["image"]: row for row in scored})
            bar.update(len(scored))

    ordered = [rows[file.name] for file, _ in pairs]
    summary = json.dumps(summarize(ordered, (*spec, "total")), indent=1)
    write_text(out.with_suffix(".summary.json"), summary)
    print(summary, f"\nwrote {out} and {out.with_suffix('.summary.json')}")


if __name__ == "__main__":
    cli.run(main, Config, positional=("name", "images", "prompts"))
