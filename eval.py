"""
Evaluation: any set of checkpoints on all tasks, with the same prompts and the same noise for every model.

    python eval.py --ckpts base ckpt/*.pt merge=runs/opd/init.pt student=runs/opd/student.pt --out runs/opd/eval
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 eval.py ...                 # the same numbers on two cores

Writes OUT.md (a table), OUT.json (all numbers) and OUT.png (rows prompts, columns models). A checkpoint is a path, LABEL=path, or
"base". Prompts are the held-out ones (tiny.py says how), images are the ODE's.

Scores: geneval is the benchmark's own rule, the mean of the six tags' means; ocr 1 - edits / length; quality is prompt-free, on its own
prompts (and, in the JSON, on the other tasks' images too). average is formed as the paper forms it: the mean of the tasks' scores,
each scaled to at most 1 (GenEval and OCR as they are, DeQA / 5, PickScore / 26; the tiny world's quality is in [0, 1] already).
Standard errors are over images. A second table sets the last model beside every other one, image by image.
"""
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import model as models
import util
from rewards import score, world_of
from sampler import draw_noise, encode, sample, schedule


@dataclass
class Config:
    ckpts: list[str] = field(default_factory=lambda: ["base"])           # what to evaluate: "base", paths of adapters, LABEL=path
    model: str = "ckpt/tiny.safetensors"                                 # the base
    per_task: int = 600                                                  # images a task
    steps: int = 20                                                      # ODE steps
    guidance: float = 1.0                                                # w
    batch: int = 100                                                     # images a forward pass
    split: Literal["eval", "train"] = "eval"                             # "train" for choosing settings without looking at the held-out prompts
    rows: int = 12                                                       # prompts in the picture
    out: str = "runs/eval"                                               # where to write OUT.md, OUT.json, OUT.png
    seed: int = 0                                                        # of the noise
    device: str = "auto"                                                 # auto, cuda, mps, cpu


def read_models(cfg, net, fingerprint):
    """Attach every checkpoint to the base. Returns label -> adapter name (None for the base)."""
    labels = {}
    for spec in cfg.ckpts:
        label, path = spec.split("=", 1) if "=" in spec else (Path(spec).stem, spec)
        if label in labels:
            raise ValueError(f"--ckpts {spec}: a second model called '{label}'; write LABEL={path}")
        labels[label] = None
        if path != "base":
            adapter = util.read_adapter(path, fingerprint)
            labels[label] = f"m{len(labels)}"
            net.add_adapter(labels[label], adapter["r"], adapter["alpha"], adapter["tensors"])
    return labels


def mean_se(scores):
    """Mean and its standard error."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else float("nan")


def summarise(scores, metas, world):
    """Per-image scores {task: (n,)} -> {column: [mean, standard error, n]}, with the six tags and the average.

    Given the difference of two models' scores on the same prompts and noise, the errors are those of the paired difference.
    """
    out, tags = {}, world.TAGS
    for tag in tags:
        rows = [i for i, m in enumerate(metas["geneval"]) if m["tag"] == tag]
        out[tag] = [*mean_se(scores["geneval"][rows]), len(rows)]
    out["geneval"] = [float(np.mean([out[t][0] for t in tags])), math.sqrt(sum(out[t][1] ** 2 for t in tags)) / len(tags), len(metas["geneval"])]
    for task in scores:
        if task != "geneval":
            out[task] = [*mean_se(scores[task]), len(metas[task])]
    out["average"] = [float(np.mean([out[t][0] for t in scores])), math.sqrt(sum(out[t][1] ** 2 for t in scores)) / len(scores),
                      sum(len(m) for m in metas.values())]
    return out


def markdown(title, rows, columns, sign=""):
    """rows: {label: {column: [mean, standard error, n]}} -> a Markdown table."""
    lines = [f"| {title} | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(f"{row[c][0]:{sign}.3f} ± {row[c][1]:.3f}" for c in columns) + " |" for label, row in rows.items()]
    return "\n".join(lines) + "\n\n"


def report(results, differences, last, tags, tasks):
    """Both tables, as printed and as written to OUT.md."""
    n = next(iter(results.values()))
    text = markdown("model", results, [*tags, *tasks, "average"])
    text += f"mean ± standard error; n = {n[tags[0]][2]} images a tag, " + ", ".join(f"{n[t][2]} {t}" for t in tasks) + ", per model\n"
    if differences:
        text += "\n" + markdown(f"{last} minus", differences, [*tasks, "average"], sign="+")
        text += "paired differences, image by image (same prompt, same noise)\n"
    return text


def gaps(scores, metas, world):
    """The last model minus every other one, paired image by image: {other: {column: [difference, standard error, n]}}."""
    *others, last = scores
    return {other: summarise({t: scores[last][t] - scores[other][t] for t in world.TASKS}, metas, world) for other in others}


def picture(shown, path, scale=3):
    """shown: {label: [(prompt, image (3, H, W))]} -> a PNG, rows prompts, columns models."""
    labels = list(shown)
    rows = len(shown[labels[0]])
    side, left, top, gap = shown[labels[0]][0][1].shape[-1] * scale, 330, 24, 6
    canvas = Image.new("RGB", (left + len(labels) * (side + gap), top + rows * (side + gap)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for c, label in enumerate(labels):
        pen.text((left + c * (side + gap), 4), label, fill="black", font=font)
        for r, (prompt, image) in enumerate(shown[label]):
            pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
            canvas.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (left + c * (side + gap), top + r * (side + gap)))
            if c == 0:
                pen.text((6, top + r * (side + gap) + side // 2 - 8), prompt, fill="black", font=font)
    canvas.save(path)


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    model = models.load(cfg.model, device)
    world = world_of(model)
    labels = read_models(cfg, model.mmdit, model.fingerprint)
    util.positive(cfg, "steps", "batch")
    if not labels:
        raise ValueError("--ckpts: got none, expected at least one model, e.g. --ckpts base ckpt/*.pt")
    if not len(world.TASKS) <= cfg.rows <= cfg.per_task:
        raise ValueError(f"--rows {cfg.rows}: expected at least one a task ({len(world.TASKS)}), at most --per-task {cfg.per_task}")
    if cfg.per_task < 2 * len(world.TAGS) or cfg.per_task % world_size:
        raise ValueError(f"--per-task {cfg.per_task}: expected at least {2 * len(world.TAGS)} images a task, a multiple of the {world_size} rank(s)")
    times, start = schedule(cfg.steps).to(device), time.time()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    metas = {task: world.eval_prompts(task, cfg.per_task, cfg.split) for task in world.TASKS}
    share = cfg.per_task // world_size
    mine = range(rank * share, (rank + 1) * share)
    with autocast:                    # every prompt once, for all models
        texts = {task: encode(model.text, [metas[task][j]["prompt"] for j in mine]) for task in world.TASKS}
    per_image, shown = {label: {task: {} for task in world.TASKS} for label in labels}, {label: [] for label in labels}
    bar = tqdm(total=len(labels) * len(world.TASKS) * share, desc="eval", unit="image", disable=rank > 0)
    for label, adapter in labels.items():
        for task in world.TASKS:
            spec = dict.fromkeys([world.SCORE[task], "quality"] + ["geneval_strict"] * (task == "geneval"), 1.0)
            parts = {name: [] for name in spec}
            wanted = (world.TASKS.index(task) + 1) * cfg.rows // len(world.TASKS)
            for i in torch.tensor(mine).split(cfg.batch):
                batch = [metas[task][j] for j in i]
                noise = draw_noise([(cfg.seed, "eval", task, int(j)) for j in i], 0, model.latent_shape()).to(device)
                with torch.no_grad(), autocast:
                    latents = sample(model.mmdit, noise, times, texts[task].rows(i - mine.start), cfg.guidance, adapter)
                images = model.images(latents)
                scores = score(spec, images, batch, world)
                for name in parts:
                    parts[name].append(scores[name])
                shown[label] += [(m["prompt"], image) for m, image in zip(batch, images)][:wanted - len(shown[label])]
                bar.update(len(i))
            for name, values in parts.items():
                per_image[label][task][name] = util.gather(torch.from_numpy(np.concatenate(values)).to(device)).cpu().numpy()
    bar.close()
    if rank > 0:
        return
    main_scores = {label: {task: per_image[label][task][world.SCORE[task]] for task in world.TASKS} for label in labels}
    results = {label: summarise(s, metas, world) for label, s in main_scores.items()}
    differences = gaps(main_scores, metas, world)
    last = list(labels)[-1]
    text = report(results, differences, last, world.TAGS, world.TASKS)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    numbers = {"settings": asdict(cfg), "world_size": world_size, "base": model.fingerprint, "torch": torch.__version__, "device": str(device),
               "seconds": time.time() - start, "table: mean, standard error, n": results, f"{last} minus: mean, standard error, n": differences,
               "all scores: mean, standard error": {label: {f"{name} on {task}": mean_se(v) for task, s in per_image[label].items() for name, v in s.items()}
                                                    for label in labels}}
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    picture(shown, out.with_suffix(".png"))
    print(f"\n{text}\nwrote {out}.md, {out}.json, {out}.png in {time.time() - start:.0f} s")


if __name__ == "__main__":
    util.run(main, Config)
