"""
Evaluation: any set of checkpoints on all tasks, with the same prompts and the same noise for every model.

    python eval.py --ckpts base ckpt/*.pt merge=runs/opd/init.pt student=runs/opd/student.pt --out runs/opd/eval
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 eval.py ...                 # the same numbers on two cores
    python eval.py --model stable-diffusion-3.5-medium --prompt "a photo of a red bird" --ckpts base student=student-peft    # just pictures

Writes OUT.md (a table), OUT.json (all numbers) and OUT.png (rows prompts, columns models); with --prompt only pictures, OUT/MODEL/0000.png, ...
A checkpoint is a path, LABEL=path, or "base". Prompts are the held-out ones (tiny.py and sd3.py say how) or --prompts', images are the ODE's.

Scores: geneval is the benchmark's own rule, the mean of the six tags' means; ocr 1 - edits / length; quality is prompt-free, on its own
prompts (and, by --also, in the JSON, on the other tasks' images). average is formed as the paper forms it: the mean of the tasks' scores,
each scaled to at most 1 (GenEval and OCR as they are, DeQA / 5, PickScore / 26; the tiny world's quality is in [0, 1] already).
Standard errors are over images. A second table sets the last model beside every other one, image by image.
"""
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import adapters
import model as models
import util
from prompts import read_file, world_of
from rewards import SCALE, check_rewards, parse_reward, score
from sampler import draw_noise, encode, sample, schedule


@dataclass
class Config:
    ckpts: list[str] = field(default_factory=lambda: ["base"])           # what to evaluate: "base", paths of adapters, LABEL=path
    model: str = "ckpt/tiny.safetensors"                                 # the base: the tiny world's file, or SD3.5's folder or hub name
    prompt: list[str] = field(default_factory=list)                      # no evaluation: just draw these
    prompt_file: str = ""                                                # the same, one prompt a line
    each: int = 1                                                        # pictures of each prompt, for --prompt and --prompt-file
    layout: Literal["numbers", "compbench"] = "numbers"                  # their names: 0000.png, ... or PROMPT_000000.png, as T2I-CompBench's scorers want
    tasks: list[str] = field(default_factory=list)                       # what to evaluate on (default: all of the model's world)
    prompts: list[str] = field(default_factory=list)                     # TASK=DIR: that folder's prompts (prompts.py) instead of the world's own
    also: list[str] = field(default_factory=lambda: ["quality"])         # rewards to take of every task's images, besides the task's own
    per_task: int = 600                                                  # images a task
    steps: int = 20                                                      # ODE steps
    guidance: float = 1.0                                                # w
    batch: int = 100                                                     # images a forward pass
    split: Literal["eval", "train"] = "eval"                             # "train" for choosing settings without looking at the held-out prompts
    diversity: bool = False                                              # also how far pictures of one prompt are apart (in the JSON)
    rows: int = 12                                                       # prompts in the picture
    out: str = "runs/eval"                                               # where to write OUT.md, OUT.json, OUT.png
    seed: int = 0                                                        # of the noise; each prompt has its own noise
    size: int | None = None                                              # side of the images in pixels (default: the tiny world's 32)
    t5: str = ""                                                         # SD3.5's T5: 128 or 256 tokens, or zeros (left out)
    dtype: Literal["float32", "bfloat16"] = "float32"                    # of the weights
    device: str = "auto"                                                 # auto, cuda, mps, cpu


# Defaults that --model changes. GenEval has 553 prompts and takes 4 images of each, 2,212: rounded down for 8 ranks.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=40, guidance=4.5, batch=8, per_task=2208, also=[])}


def read_models(cfg, model):
    """Every checkpoint: label -> (net, adapter name), the name None for the base and for a whole transformer."""
    found, many = {}, 0
    for spec in cfg.ckpts:
        label, path = adapters.split_label(spec)
        label = label or Path(path).stem
        if label in found:
            raise ValueError(f"--ckpts {spec}: a second model called '{label}'; write LABEL={path}")
        found[label] = (model.mmdit, None)
        if path != "base":
            ckpt = adapters.read(path, model.mmdit)
            found[label] = (ckpt["net"], None) if "net" in ckpt else (model.mmdit, f"m{(many := many + 1)}")
            if "net" not in ckpt:
                model.mmdit.add_adapter(found[label][1], ckpt["r"], ckpt["alpha"], ckpt["tensors"])
    return found


def mean_se(scores):
    """Mean and its standard error."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else float("nan")


def summarise(scores, metas, world):
    """Per-image scores {task: (n,)} -> {column: [mean, standard error, n]}, with the six tags and the average.

    Given the difference of two models' scores on the same prompts and noise, the errors are those of the paired difference.
    """
    out = {}
    tags = [tag for tag in world.TAGS if any(meta["tag"] == tag for meta in metas["geneval"])] if "geneval" in scores else []      # those there are
    for tag in tags:
        rows = [i for i, m in enumerate(metas["geneval"]) if m["tag"] == tag]
        out[tag] = [*mean_se(scores["geneval"][rows]), len(rows)]
    for task in scores:
        out[task] = [*mean_se(scores[task]), len(metas[task])]
    if "geneval" in scores:
        out["geneval"][:2] = float(np.mean([out[t][0] for t in tags])), math.sqrt(sum(out[t][1] ** 2 for t in tags)) / len(tags)
    scaled = [[x / SCALE.get(world.SCORE.get(t), 1) for x in out[t][:2]] for t in scores]
    out["average"] = [float(np.mean([m for m, _ in scaled])), math.sqrt(sum(se ** 2 for _, se in scaled)) / len(scores), sum(len(m) for m in metas.values())]
    return out


def spread(small, prompts):
    """Diversity: root mean square difference of two pictures of one prompt, averaged over pairs, then prompts: [mean, standard error, prompts].

    small (n, 3, 32, 32); prompts: n strings, some of which come more than once.
    """
    groups = {}
    for picture, prompt in zip(small.flatten(1), prompts):
        groups.setdefault(prompt, []).append(picture)
    apart = []
    for pictures in groups.values():
        if len(pictures) > 1:
            x = torch.stack(pictures)
            apart.append(torch.pdist(x).mean().item() / math.sqrt(x.shape[1]))
    return [*mean_se(apart), len(apart)] if apart else [float("nan"), float("nan"), 0]


def markdown(title, rows, columns, sign=""):
    """rows: {label: {column: [mean, standard error, n]}} -> a Markdown table."""
    lines = [f"| {title} | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(f"{row[c][0]:{sign}.3f} ± {row[c][1]:.3f}" for c in columns) + " |" for label, row in rows.items()]
    return "\n".join(lines) + "\n\n"


def report(results, differences, last, tags, tasks):
    """Both tables, as printed and as written to OUT.md."""
    n = next(iter(results.values()))
    text = markdown("model", results, [*tags, *tasks, "average"])
    text += "mean ± standard error; n = " + ", ".join(f"{n[c][2]} {c.replace('_', ' ')}" for c in (*tags, *tasks)) + ", per model\n"
    if differences:
        text += "\n" + markdown(f"{last} minus", differences, [*tasks, "average"], sign="+")
        text += "paired differences, image by image (same prompt, same noise)\n"
    return text


def gaps(scores, metas, world):
    """The last model minus every other one, paired image by image: {other: {column: [difference, standard error, n]}}."""
    *others, last = scores
    return {other: summarise({t: scores[last][t] - scores[other][t] for t in metas}, metas, world) for other in others}


def to_bytes(image):
    """(3, H, W) in [0, 1] -> (H, W, 3), 0 to 255, as Pillow takes it."""
    return (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)


def picture(shown, path, scale=3):
    """shown: {label: [(prompt, image (3, H, W))]} -> a PNG, rows prompts, columns models."""
    labels = list(shown)
    rows = len(shown[labels[0]])
    side = shown[labels[0]][0][1].shape[-1]
    side, left, top, gap = side * scale if side < 128 else 256, 330, 24, 6
    canvas = Image.new("RGB", (left + len(labels) * (side + gap), top + rows * (side + gap)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for c, label in enumerate(labels):
        pen.text((left + c * (side + gap), 4), label, fill="black", font=font)
        for r, (prompt, image) in enumerate(shown[label]):
            canvas.paste(Image.fromarray(to_bytes(image)).resize((side, side), Image.NEAREST), (left + c * (side + gap), top + r * (side + gap)))
            if c == 0:
                pen.text((6, top + r * (side + gap) + side // 2 - 8), prompt, fill="black", font=font)
    canvas.save(path)


def generate(cfg, model, found, times, autocast, rank, world_size):
    """--prompt, --prompt-file: pictures by each model, from the same noise: OUT/MODEL/0000.png, ..., and OUT/prompts.txt (rewards.py takes the two).

    With --layout compbench OUT/MODEL/samples/PROMPT_000000.png, what T2I-CompBench's BLIP-VQA, UniDet and CLIP scorers read.
    """
    asked = [*cfg.prompt, *(meta["prompt"] for meta in read_file(cfg.prompt_file, "prompt"))] if cfg.prompt_file else cfg.prompt
    asked = [prompt for prompt in asked for _ in range(cfg.each)]
    names = [f"{i:04d}.png" if cfg.layout == "numbers" else f"samples/{prompt}_{i:06d}.png" for i, prompt in enumerate(asked)]
    for name, prompt in zip(names, asked):
        if cfg.layout == "compbench" and ("/" in prompt or "_" in prompt or len(name.encode()) > 250):
            raise ValueError(f"--layout compbench: prompt {prompt!r} cannot be a file's name there: expected no '/' or '_', and at most 230 bytes")
    mine = torch.arange(len(asked))[rank::world_size]
    model.text.prepare(asked, rank, world_size)
    util.barrier()
    bar = tqdm(total=len(found) * len(mine), desc="draw", unit="image", disable=rank > 0)
    for label, (net, adapter) in found.items():
        for i in mine.split(cfg.batch) if len(mine) else ():
            text = encode(model.text, [asked[j] for j in i])
            noise = draw_noise([(cfg.seed, "prompt", int(j)) for j in i], 0, model.latent_shape()).to(times.device)
            with torch.no_grad(), autocast:
                latents = sample(net, noise, times, text, cfg.guidance, adapter)
            images = model.images(latents)                               # the VAE computes in float32
            for j, image in zip(i, images):
                path = Path(cfg.out) / label / names[j]
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(to_bytes(image)).save(path)
            bar.update(len(i))
    bar.close()
    if rank == 0:
        util.write_atomic(Path(cfg.out) / "prompts.txt", "".join(prompt + "\n" for prompt in asked))
        print(f"wrote {cfg.out}/{{{','.join(found)}}} and {cfg.out}/prompts.txt")


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    util.positive(cfg, "steps", "batch", "each")
    world = world_of(models.world_name(cfg.model), cfg.prompts)
    tasks = cfg.tasks or world.TASKS
    model = models.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5)
    found = read_models(cfg, model)
    times, start = schedule(cfg.steps).to(device), time.time()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if not found:
        raise ValueError("--ckpts: got none, expected at least one model, e.g. --ckpts base ckpt/*.pt")
    if cfg.prompt or cfg.prompt_file:
        return generate(cfg, model, found, times, autocast, rank, world_size)
    for task in tasks:
        if task not in world.TASKS or tasks.count(task) > 1:
            raise ValueError(f"--tasks {task}: expected some of {', '.join(world.TASKS)}, each once")
        if task not in world.SCORE:
            raise ValueError(f"--tasks {task}: has no score of its own; expected some of {', '.join(world.SCORE)}. "
                             "Draw pictures (--prompt-file), then python rewards.py NAME ...")
    if not len(tasks) <= cfg.rows <= cfg.per_task:
        raise ValueError(f"--rows {cfg.rows}: expected at least one a task ({len(tasks)}), at most --per-task {cfg.per_task}")
    if cfg.per_task < 2 * len(world.TAGS) or cfg.per_task % world_size:
        raise ValueError(f"--per-task {cfg.per_task}: expected at least {2 * len(world.TAGS)} images a task, a multiple of the {world_size} rank(s)")
    specs = {task: parse_reward(",".join(dict.fromkeys([world.SCORE[task], *cfg.also] + ["geneval_strict"] * (task == "geneval")))) for task in tasks}
    metas = {task: world.eval_prompts(task, cfg.per_task, cfg.split) for task in tasks}
    tags = [tag for tag in world.TAGS if any(meta["tag"] == tag for meta in metas.get("geneval", ()))]
    if "geneval" in tasks and not tags:
        raise ValueError(f"--prompts geneval=...: none of its prompts has a tag of {', '.join(world.TAGS)}")
    check_rewards(specs, model, world, cfg.split, device)
    share = cfg.per_task // world_size
    mine = range(rank * share, (rank + 1) * share)
    model.text.prepare([meta["prompt"] for task in tasks for meta in metas[task]], rank, world_size)
    util.barrier()
    per_image, shown = {label: {task: {} for task in tasks} for label in found}, {label: [] for label in found}
    apart = {label: {} for label in found}
    judge = ThreadPoolExecutor(1)
    bar = tqdm(total=len(found) * len(tasks) * share, desc="eval", unit="image", disable=rank > 0)
    for label, (net, adapter) in found.items():
        for n, task in enumerate(tasks):
            wanted = (n + 1) * cfg.rows // len(tasks)
            batches, judged, small = torch.tensor(mine).split(cfg.batch), [], []
            for i in batches:
                batch = [metas[task][j] for j in i]
                text = encode(model.text, [m["prompt"] for m in batch])
                noise = draw_noise([(cfg.seed, "eval", task, int(j)) for j in i], 0, model.latent_shape()).to(device)
                with torch.no_grad(), autocast:
                    latents = sample(net, noise, times, text, cfg.guidance, adapter)
                images = model.images(latents)
                judged.append(judge.submit(score, specs[task], images, batch, world))      # while the next batch is sampled
                if cfg.diversity:
                    small.append(F.adaptive_avg_pool2d(images, 32))
                shown[label] += [(m["prompt"], image.cpu()) for m, image in zip(batch, images[:max(0, wanted - len(shown[label]))])]
                bar.update(len(i))
            parts = {name: [future.result()[name] for future in judged] for name in specs[task]}
            if cfg.diversity:
                apart[label][task] = spread(util.gather(torch.cat(small)).cpu(), [meta["prompt"] for meta in metas[task]])
            for name, values in parts.items():
                per_image[label][task][name] = util.gather(torch.from_numpy(np.concatenate(values)).to(device)).cpu().numpy()
    bar.close()
    if rank > 0:
        return
    main_scores = {label: {task: per_image[label][task][world.SCORE[task]] for task in tasks} for label in found}
    results = {label: summarise(s, metas, world) for label, s in main_scores.items()}
    differences = gaps(main_scores, metas, world)
    last = list(found)[-1]
    text = report(results, differences, last, tags, tasks)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    numbers = {"settings": asdict(cfg), "world_size": world_size, "base": model.fingerprint, "torch": torch.__version__, "device": str(device),
               "seconds": time.time() - start, "table: mean, standard error, n": results, f"{last} minus: mean, standard error, n": differences,
               "all scores: mean, standard error": {label: {f"{name} on {task}": mean_se(v) for task, s in per_image[label].items() for name, v in s.items()}
                                                    for label in found}, **({"diversity": apart} if cfg.diversity else {})}
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    picture(shown, out.with_suffix(".png"))
    print(f"\n{text}\nwrote {out}.md, {out}.json, {out}.png in {time.time() - start:.0f} s")


if __name__ == "__main__":
    util.run(main, Config, presets=PRESETS)
