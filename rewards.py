"""Rewards: one number for an image. The logic of GenEval and OCR is here, the networks are in scorers.py, detectors.py and deqa.py.

    spec = parse_reward("deqa=0.4,pickscore=0.6")
    total = score(spec, images, metas, world)["total"]                       # (N,): what a policy is trained on

    python rewards.py pickscore IMAGES_DIR prompts.txt                       # score anybody's images -> IMAGES_DIR/pickscore.jsonl and a summary; resumes
    python rewards.py geneval_benchmark IMAGES_DIR evaluation_metadata.jsonl

| name | what it says | reported | weighed in a sum as |
|---|---|---|---|
| geneval, geneval_strict, geneval_benchmark | are the objects, counts, colours and places as the prompt asks (three forms, see geneval_score) | up to 1 | the same |
| ocr | 1 - edits / length of the text in the prompt's double quotes | 0 to 1 | the same |
| pickscore, clipscore | preference; agreement with the prompt | about 20 to 24; 25 to 35 | / 26, / 30 |
| hpsv2, imagereward, aesthetic | preference, preference, looks | about 0.3; -2 to 2; 1 to 10 | the same |
| deqa | looks, 1 to 5, 16 GB | 1 to 5 | / 5 |
| unifiedreward, qwenvl | a vision-language model's judgement, asked of an OpenAI-compatible endpoint: $UNIFIEDREWARD_URL, $QWENVL_URL (and ..._MODEL) | 1 to 5 | / 5 |
| jpeg_compressibility, jpeg_incompressibility | size of the file: no weights, for a first run | -kB, kB | / 500, the same |
| quality | the tiny world's own | 0 to 1 | the same |

Weights of networks are looked for in $REWARD_MODELS/NAME, then on the hub. They load once a process, at first use, in half precision on a GPU.

GenEval, OCR and quality ask a `world` (tiny.py, sd3.py), which has
    world.detect(images, metas) -> list (N) of lists of objects
    world.read(images)          -> list (N) of str, all the text of an image as one string
    world.quality(images)       -> (N,) array
An object is a dict {"class": str, "score": confidence, "box": (x0, y0, x1, y1) in pixels, "color": str or None}. A detector
returns only what it believes in: confidence thresholds and limits a class are its own. images are (N, 3, H, W) in [0, 1]; metas are the prompts
with what they ask for, a dict each, in the schema of GenEval's prompt files:
    {"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier clause]}],
     "exclude"?: [{"class", "count"}]}            (all but GenEval need only "prompt")

Sources: GenEval (arXiv 2310.11513, djghosh13/geneval evaluation/evaluate_images.py); Flow-GRPO (arXiv 2505.05470,
yifan123/flow_grpo flow_grpo/ocr.py, its training form of GenEval in yifan123/reward-server reward_server/gen_eval.py).
"""
import importlib
import json
import math
import os
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import util

RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_FORMS = ("soft", "strict", "benchmark")


def relative_position(a, b) -> set[str]:
    """The set of relations for which 'a is <relation> b' holds: none, one, or two near the diagonal. y points down."""
    box_a, box_b = np.reshape(a["box"], (2, 2)), np.reshape(b["box"], (2, 2))  # rows (x0, y0), (x1, y1)
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)                           # (2,), between the centres
    sizes = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])          # (2,), width and height, both objects
    # a tenth of the sizes is slack: beside means clearly beside, and large objects have to be further apart
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    dx, dy = clear / np.linalg.norm(offset)  # by the norm before the slack, so the slack counts against both axes
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def check_geneval_meta(meta):
    """Raise a ValueError unless meta is in GenEval's schema (see the top of this file)."""
    def expect(ok, got, expected):
        if not ok:
            raise ValueError(f"GenEval prompt {meta!r}: got {got}, expected {expected}")

    expect(isinstance(meta, dict), type(meta).__name__, "a dict")
    include, exclude = meta.get("include"), meta.get("exclude", [])
    expect(isinstance(include, list) and include, f"include {include!r}", "a list of at least one clause")
    expect(isinstance(exclude, list), f"exclude {exclude!r}", "a list of clauses")
    for clause in include + exclude:
        expect(isinstance(clause, dict), f"clause {clause!r}", "a dict")
        expect(isinstance(clause.get("class"), str), f"class {clause.get('class')!r}", "a name")
        expect(isinstance(clause.get("count"), int) and clause["count"] >= 1, f"count {clause.get('count')!r}", "an integer >= 1")
    for i, clause in enumerate(include):
        expect(isinstance(clause.get("color", ""), str), f"color {clause.get('color')!r}", "a name")
        if "position" in clause:
            position = clause["position"]
            ok = isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS and position[1] in range(i)
            expect(ok, f"position {position!r} in clause {i}", f"[one of {RELATIONS}, index of an earlier clause]")


def geneval_score(objects, meta, form="soft") -> float:
    """How well the objects found in one image match what its prompt asks for.

    soft: in (-inf, 1], training reward: the mean of the parts, 1 each if all is right. An object too many costs what one too
          few costs, so a crowd makes it negative.
    strict: 0 or 1, all counts, colours and positions exactly right.
    benchmark: 0 or 1, GenEval's own rule, the one to report.
    """
    if form not in GENEVAL_FORMS:
        raise ValueError(f"GenEval form: got {form!r}, expected one of {GENEVAL_FORMS}")
    check_geneval_meta(meta)
    parts, groups, correct = [], [], True  # groups: the objects of each clause, None where it failed
    for clause in meta["include"]:
        wanted = clause["count"]
        # most confident first; of equals the one found last, which is what the originals' reversed argsort gives
        found = sorted(reversed([o for o in objects if o["class"] == clause["class"]]), key=lambda o: -o["score"])
        # Where the forms differ: the benchmark looks at the wanted number of best boxes and forgives the others (unless an
        # exclude clause forbids them); soft and strict count every box and ignore exclude clauses.
        if form == "benchmark":
            found = found[:wanted]
        parts.append(1 - abs(wanted - len(found)) / wanted)
        right = len(found) == wanted
        if not right and ("color" in clause or "position" in clause):
            parts.append(0.0)  # one 0, even where both were asked for
        if right and "color" in clause:
            n_color = sum(o["color"] == clause["color"] for o in found)
            parts.append(1 - abs(wanted - n_color) / wanted)
            right = n_color == wanted
        if right and "position" in clause:
            relation, index = clause["position"]
            target = groups[index]
            right = target is not None and all(relation in relative_position(a, b) for a in found for b in target)
            # A wrong position adds a 0 AND a 1 in the released reward (gen_eval.py:254 and 258), so it scores 3/4 and not 2/3
            # of two objects in place; kept, so that rewards compare. A target that failed itself adds the 0 alone.
            parts += [1.0] if right else [0.0] if target is None else [0.0, 1.0]
        groups.append(found if right else None)
        correct = correct and right
    if form == "soft":
        return sum(parts) / len(parts)
    if form == "benchmark":
        for clause in meta.get("exclude", []):
            correct = correct and sum(o["class"] == clause["class"] for o in objects) < clause["count"]
    return float(correct)


def edit_distance(a, b) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of one character that turn a into b."""
    row = list(range(len(b) + 1))  # row[j]: distance between the part of a read so far and b[:j]
    for i, char_a in enumerate(a, 1):
        above_left, row[0] = row[0], i
        for j, char_b in enumerate(b, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (char_a != char_b))
    return row[-1]


def ocr_target(prompt) -> str:
    """The text that the prompt asks for: what stands between its first pair of double quotes."""
    pieces = prompt.split('"')
    if len(pieces) < 3 or not pieces[1].replace(" ", ""):
        raise ValueError(f'OCR prompt: got {prompt!r}, expected the wanted text in straight double quotes, as in: a sign saying "open"')
    return pieces[1]


def ocr_score(read, prompt) -> float:
    """1 - edits / length of the wanted text, in [0, 1]; case and spaces do not count, and nor does text around the wanted one."""
    read, target = (text.replace(" ", "").lower() for text in (read, ocr_target(prompt)))
    edits = 0 if target in read else edit_distance(read, target)
    return 1 - min(edits, len(target)) / len(target)


def one_each(name, results, metas):
    """Pairs (result, meta); zip alone would drop images from the end without a word."""
    if len(results) != len(metas):
        raise ValueError(f"reward {name}: got results for {len(results)} images, expected {len(metas)}")
    return zip(results, metas)


def geneval_reward(name, form):
    def reward(images, metas, world):
        pairs = one_each(name, world.detect(images, metas), metas)
        return np.array([geneval_score(objects, meta, form) for objects, meta in pairs], dtype=np.float32)
    return reward


def ocr_reward(images, metas, world):
    pairs = one_each("ocr", world.read(images), metas)
    return np.array([ocr_score(text, meta["prompt"]) for text, meta in pairs], dtype=np.float32)


def quality_reward(images, metas, world):
    if not hasattr(world, "quality"):
        raise ValueError("reward quality: is the tiny world's own; expected deqa, pickscore, aesthetic, ... for real pictures")
    return np.asarray(world.quality(images), dtype=np.float32)


# ------------------------------------------------------------------ networks and judges: loaded at first use


def judge(name, model):
    """A vision-language judge of scorers.py, where $NAME_URL says it is."""
    def make(device, dtype):
        import scorers
        url = os.environ.get(f"{name.upper()}_URL")
        if not url:
            raise ValueError(f"reward {name}: is asked of an OpenAI-compatible endpoint, but ${name.upper()}_URL is not set, e.g. http://127.0.0.1:8000/v1")
        how = scorers.UNIFIED_REWARD if name == "unifiedreward" else scorers.QWEN_VL
        return scorers.VLMJudge(url, os.environ.get(f"{name.upper()}_MODEL", model), **how)
    return make


def network(module, name):
    return lambda device, dtype: getattr(importlib.import_module(module), name)(device, dtype)


# name -> function (device, dtype) that loads it
SCORERS = {"detector": network("detectors", "Detector"), "reader": network("detectors", "Reader"), "deqa": network("deqa", "DeQA"),
           "pickscore": network("scorers", "PickScore"), "clipscore": network("scorers", "CLIPScore"), "hpsv2": network("scorers", "HPSv2"),
           "imagereward": network("scorers", "ImageReward"), "aesthetic": network("scorers", "Aesthetic"),
           "unifiedreward": judge("unifiedreward", "UnifiedReward-7b-v1.5"), "qwenvl": judge("qwenvl", "Qwen2.5-VL-7B-Instruct")}
LOADED = {}


def scorer(name, device):
    """The scorer called name, loaded once a process and then kept, on device."""
    device = torch.device(device)
    if name not in LOADED:
        LOADED[name] = SCORERS[name](device, torch.float16 if device.type == "cuda" else torch.float32)
    LOADED[name].net.to(device)          # free where it is there already
    return LOADED[name]


def offload():
    """Move all loaded scorers to the CPU, out of the policy's way. Their next use brings them back."""
    for one in LOADED.values():
        one.net.to("cpu")


def scorer_reward(name):
    def reward(images, metas, world):
        return scorer(name, images.device)(images, [meta["prompt"] for meta in metas]).numpy()
    return reward


def jpeg_reward(sign):
    def reward(images, metas, world):
        from scorers import jpeg_incompressibility
        return sign * jpeg_incompressibility(images).numpy()
    return reward


# name -> function (images, metas, world) -> (N,) float32, as the score is reported
REWARDS = {
    "geneval": geneval_reward("geneval", "soft"),
    "geneval_strict": geneval_reward("geneval_strict", "strict"),
    "geneval_benchmark": geneval_reward("geneval_benchmark", "benchmark"),
    "ocr": ocr_reward,
    "quality": quality_reward,
    **{name: scorer_reward(name) for name in SCORERS if name not in ("detector", "reader")},
    "jpeg_compressibility": jpeg_reward(-1),
    "jpeg_incompressibility": jpeg_reward(1),
}
# What a score is divided by in a weighted sum, as the peers do (scorers.py says where), and in the average that eval.py forms.
SCALE = {"pickscore": 26, "clipscore": 30, "deqa": 5, "unifiedreward": 5, "qwenvl": 5, "jpeg_compressibility": 500}


CHEAP = {"geneval", "geneval_strict", "geneval_benchmark", "ocr", "quality"}      # in the tiny world; checked on more prompts


def parse_reward(spec: str) -> dict[str, float]:
    """'geneval' -> {'geneval': 1.0}; 'geneval=0.5,ocr=0.5' -> {'geneval': 0.5, 'ocr': 0.5}."""
    weights = {}
    for item in spec.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if name not in REWARDS:
            raise ValueError(f"reward {spec!r}: got {name!r}, expected one of {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"reward {spec!r}: got {name} twice, expected each name once")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"reward {spec!r}: got weight {weight!r} for {name}, expected a positive, finite number")
    return weights


class DetectOnce:
    """A world whose detector, the costly part, runs once on a batch however many GenEval forms the spec names."""

    def __init__(self, world):
        self.world, self.found = world, None

    def __getattr__(self, name):  # read and quality
        return getattr(self.world, name)

    def detect(self, images, metas):
        if self.found is None:
            self.found = self.world.detect(images, metas)
        return self.found


def score(spec: dict, images, metas, world) -> dict:
    """Every reward of spec, {name: weight}, on N images: {name: (N,) float32 as reported, ..., "total": sum of weight * score / SCALE, (N,) float32}.

    DEVIATION: flow_grpo gives an image the lowest score when its reader fails. A reward that fails raises here, since a 0 that
    no image has earned would be trained on.
    """
    world, parts = DetectOnce(world), {}
    for name in spec:
        values = REWARDS[name](images, metas, world)
        if values.shape != (len(metas),) or not np.isfinite(values).all():
            raise ValueError(f"reward {name}: got shape {values.shape}, {np.sum(~np.isfinite(values))} of its values not finite, "
                             f"expected ({len(metas)},) finite numbers")
        parts[name] = values
    return {**parts, "total": sum(weight * parts[name] / SCALE.get(name, 1) for name, weight in spec.items())}


def check_rewards(rewards, model, world, split="train", device="cpu"):
    """Score grey images, on the device, against some prompts of each task: a reward that does not fit its task, or can't be reached, stops here.

    rewards: {task: spec}. What has weights is loaded by this, before any time is spent on sampling.
    """
    images = torch.full((4, 3, model.resolution, model.resolution), 0.5, device=device)
    for task, spec in rewards.items():
        metas = [world.draw_prompt(np.random.default_rng(seed), task, split) for seed in range(16)]
        try:
            for i in range(0, 16, 4) if set(spec) <= CHEAP else (0,):
                score(spec, images, metas[i:i + 4], world)
        except ValueError as e:
            raise ValueError(f"--reward {'+'.join(spec)} does not fit task '{task}': {e}") from None


# ------------------------------------------------------------------ command line: score a folder


@dataclass
class Config:
    name: str = ""                    # a reward, or a sum such as deqa=0.4,pickscore=0.6
    images: str = ""                  # folder of images; in the order of their numbers they go with the prompts, k to each if there are k times as many
    prompts: str = ""                 # a .txt with one prompt a line, or GenEval's .jsonl
    world: str = "sd3"                # whose detector and reader: sd3 or tiny
    out: str = ""                     # where to (default: IMAGES/NAME.jsonl); rows of unchanged images in it are not scored again
    batch: int = 8                    # images at a time
    device: str = "auto"              # auto, cuda, mps, cpu


def read_image(path):
    """(3, H, W) in [0, 1]."""
    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    except OSError as e:
        raise ValueError(f"{path}: is not an image that Pillow reads: {e}") from None


def place(path):
    """Images are in the order of the last number in their names (0009.png, 10.png, PROMPT_000011.png), then of the names."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1, path.name


def stamp(path):
    """What tells that an image is still the one that was scored."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def already(path):
    """The rows that a stopped run has left, by image; a line that was cut short is forgotten."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row["image"]] = row
        except json.JSONDecodeError:
            pass
    return rows


def main(cfg):
    from prompts import read_file      # which imports this file
    _, _, device = util.setup(cfg.device)
    if not (cfg.name and cfg.images and cfg.prompts) or cfg.world not in ("sd3", "tiny") or cfg.batch < 1:
        raise ValueError(f"--world {cfg.world} --batch {cfg.batch}: expected python rewards.py NAME IMAGES_DIR PROMPTS_FILE, a world sd3 or tiny, "
                         "a batch of at least 1")
    spec, world = parse_reward(cfg.name), importlib.import_module(cfg.world)
    metas = read_file(cfg.prompts, next((task for task in ("geneval", "ocr") if any(task in name for name in spec)), "prompt"), world)
    files = sorted((f for f in Path(cfg.images).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")), key=place)
    if not files or len(files) % len(metas):
        raise ValueError(f"{cfg.images}: has {len(files)} images for the {len(metas)} prompts of {cfg.prompts}; expected as many, or a whole multiple")
    each, out = len(files) // len(metas), Path(cfg.out or Path(cfg.images) / f"{cfg.name}.jsonl")
    rows = already(out)
    def done(file, meta):
        row = rows.get(file.name, {})
        return row.get("prompt") == meta["prompt"] and row.get("stamp") == stamp(file) and set(spec) <= set(row)

    todo = [(file, metas[i // each]) for i, file in enumerate(files) if not done(file, metas[i // each])]
    rows = {file.name: rows[file.name] for i, file in enumerate(files) if done(file, metas[i // each])}
    util.write_atomic(out, "".join(json.dumps(row) + "\n" for row in rows.values()))      # what is kept, without a half line at its end
    bar = tqdm(total=len(files), initial=len(files) - len(todo), desc=cfg.name, unit="image")
    for chunk in (todo[i:i + cfg.batch] for i in range(0, len(todo), cfg.batch)):
        pairs = [(read_image(file), file, meta) for file, meta in chunk]
        for _, same in groupby(pairs, key=lambda pair: pair[0].shape):
            images, names, part = zip(*same)
            scores = score(spec, torch.stack(images).to(device), list(part), world)
            new = [{"image": file.name, "prompt": meta["prompt"], "tag": meta["tag"], "stamp": stamp(file),
                    **{name: float(v[j]) for name, v in scores.items()}} for j, (file, meta) in enumerate(zip(names, part))]
            with open(out, "a") as f:
                f.write("".join(json.dumps(row) + "\n" for row in new))
            rows.update({row["image"]: row for row in new})
            bar.update(len(new))
    bar.close()
    tags, summary = sorted({meta["tag"] for meta in metas}), {}
    for name in (*spec, "total"):
        values = {tag: np.array([rows[f.name][name] for f in files if rows[f.name]["tag"] == tag]) for tag in tags}
        both = np.concatenate(list(values.values()))
        summary[name] = {"mean": float(both.mean()), "standard error": float(both.std(ddof=1) / len(both) ** 0.5) if len(both) > 1 else None,
                         "images": len(both)}
        if len(tags) > 1:
            by_tag = {tag: float(v.mean()) for tag, v in values.items()}
            summary[name].update({"mean of the tags' means": float(np.mean(list(by_tag.values()))), **by_tag})
    util.write_atomic(out.with_suffix(".summary.json"), json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1), f"\nwrote {out} and {out.with_suffix('.summary.json')}")


if __name__ == "__main__":
    util.run(main, Config, positional=("name", "images", "prompts"))
