"""
Evaluate checkpoints on all tasks, with the same prompts and the same noise for every model.

    python eval.py --ckpts base ckpt/*.pt student=runs/opd/student.pt --out runs/opd/eval
    torchrun --nproc_per_node=2 eval.py ...               # the same numbers (OMP_NUM_THREADS=1)
    python eval.py --prompt "a photo of a red bird" --ckpts base student=DIR     # just pictures

It writes OUT.md (tables), OUT.json (all numbers) and OUT.png (rows are prompts, columns are models;
models named after the tasks share one, "its teacher"). With --prompt it only writes pictures,
OUT/MODEL/0000.png, ... A checkpoint is a path, LABEL=path, or "base". Prompts are the held-out ones
of the world, or those of --prompts. Images are sampled with the ODE.

Scores: geneval follows the benchmark: first the mean of each tag, then the mean over tags. ocr is
1 - edits / length. preference reads the prompt loosely, and quality ignores it. average is the
paper's: the mean of the tasks' scores, each divided by its scale (rewards.py). Standard errors are
over images. A second table compares the last model with every other one, image by image.
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

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
from PIL import Image
from tqdm import tqdm

from checkpoints.formats import split_label
from checkpoints.teachers import policy_of
from plumbing import cli, dist
from plumbing.files import write_text
from plumbing.folder import check_writable
from plumbing.picture import draw_grid, to_bytes
from rewards import REWARDS, check_rewards, parse_reward, score
from sampler import draw, schedule
from watch import tag_rows
from worlds import open_world, presets
from worlds.prompts import read_file


@dataclass
class Config:
    # --- what
    # The models: "base", paths of checkpoints, or LABEL=path.
    ckpts: list[str] = field(default_factory=lambda: ["base"])
    # The base: a safetensors file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # The folder of SD3.5's text encoders, if they are not beside the model.
    text_encoders: str = ""
    # TASK=DIR: the task's prompts come from this folder or hub dataset, not from the world
    # (worlds/prompts.py).
    prompts: list[str] = field(default_factory=list)
    # Tasks to evaluate on (default: all that have prompts).
    tasks: list[str] = field(default_factory=list)
    # TASK=REWARD: the reward that scores a task (default: the world's; your own task has none).
    score: list[str] = field(default_factory=list)
    # Further rewards to compute for the images of every task.
    also: list[str] = field(default_factory=lambda: ["quality"])
    # Where to write OUT.md, OUT.json and OUT.png.
    out: str = "runs/eval"

    # --- sampling
    # Images per task.
    per_task: int = 600
    # ODE steps.
    steps: int = 20
    # Guidance scale.
    guidance: float = 1.0
    # Images per forward pass. Fewer need less memory.
    batch: int = 100
    # Prompts: eval (held out), or train, to choose settings without looking at the held-out ones.
    split: Literal["eval", "train"] = "eval"
    # Also measure how different the pictures of one prompt are, for OUT.json.
    diversity: bool = False
    # Number of prompts (rows) in OUT.png.
    rows: int = 6

    # --- just pictures
    # Prompts to draw. Then nothing is evaluated.
    prompt: list[str] = field(default_factory=list)
    # File of prompts to draw, one per line. Then nothing is evaluated.
    prompt_file: str = ""
    # Pictures per prompt.
    each: int = 1
    # Names of the pictures. numbers: 0000.png, ...; compbench: PROMPT_000000.png, in the folder
    # samples, as T2I-CompBench's scorers want them.
    layout: Literal["numbers", "compbench"] = "numbers"

    # --- machine
    # Side of the images in pixels (default: 32 in the tiny world).
    size: int | None = None
    # Tokens of SD3.5's T5: 128 or 256. The word zeros leaves T5 out.
    t5: str = ""
    # Dtype of the weights.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Seed of the noise. Each prompt has its own noise.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


# Keys of OUT.json, each {label: ...}.
TABLE = "table: mean, standard error, n"                # {column: ...}
ALL_SCORES = "all scores: mean, standard error"         # {"REWARD on TASK": ...}
SCORES = "scores of each image"                         # {task: [...]}, in the order of the prompts

# Defaults that follow from --model. GenEval has 553 prompts with 4 images each. That makes 2,212
# images, rounded down here to a multiple of 8 ranks.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=40, guidance=4.5, batch=8,
                       per_task=2208, also=[])}


def label_models(ckpts):
    """The values of --ckpts -> {label: path}."""
    if not ckpts:
        raise ValueError("--ckpts: got none, expected at least one model, e.g. "
                         "--ckpts base ckpt/*.pt")
    paths = {}
    for spec in ckpts:
        label, path = split_label(spec)
        label = label or Path(path).name.removesuffix(".pt").removesuffix(".safetensors")
        if label in paths:
            raise ValueError(f"--ckpts {spec}: a second model called '{label}'; "
                             f"write LABEL={path}")
        paths[label] = path
    return paths


def read_models(cfg, paths, base):
    """Read the checkpoints, {label: path} -> {label: Policy}. Adapters are added to base."""
    return {label: policy_of(path, base, f"model{n}", cfg.guidance)
            for n, (label, path) in enumerate(paths.items())}


# ------------------------------------------------------------------ numbers


def mean_se(scores):
    """The mean of scores (n,) and its standard error, which is nan for a single score."""
    if len(scores) < 2:
        return float(np.mean(scores)), float("nan")
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def summarise(scores, metas, world):
    """Scores of images {task: (n,)} -> {column: [mean, standard error, n]}.

    Columns are the tags, the tasks and the average. Scores may also be the differences of two
    models on the same prompts and noise. Then the errors are those of the paired difference.
    """
    out = {}
    tags = tag_rows(metas["geneval"], world) if "geneval" in scores else {}
    for tag, rows in tags.items():
        out[tag] = [*mean_se(scores["geneval"][rows]), len(rows)]
    for task in scores:
        out[task] = [*mean_se(scores[task]), len(metas[task])]
    if tags:                                        # first a mean per tag, then over tags
        out["geneval"][0] = float(np.mean([out[tag][0] for tag in tags]))
        out["geneval"][1] = math.sqrt(sum(out[tag][1] ** 2 for tag in tags)) / len(tags)
    means, errors = [], []
    for task in scores:
        scale = scale_of(task, world)
        means.append(out[task][0] / scale)
        errors.append(out[task][1] / scale)
    error = math.sqrt(sum(error ** 2 for error in errors)) / len(scores)
    out["average"] = [float(np.mean(means)), error, sum(len(rows) for rows in metas.values())]
    return out


def scale_of(task, world):
    """The number that divides the score of a task before the average (Reward.scale)."""
    return REWARDS[world.score[task]].scale


def gaps(scores, metas, world):
    """The last model minus each other one, paired image by image: {other: summary}."""
    *others, last = scores
    out = {}
    for other in others:
        difference = {task: scores[last][task] - scores[other][task] for task in metas}
        out[other] = summarise(difference, metas, world)
    return out


def spread(small, prompts):
    """How different the pictures of one prompt are: [mean, standard error, number of prompts].

    It is the root mean square difference of two pictures, averaged over pairs, then over prompts.
    small (n, 3, 32, 32); prompts: n strings. Only prompts that occur more than once count.
    """
    groups = {}
    for picture, prompt in zip(small.flatten(1), prompts):
        groups.setdefault(prompt, []).append(picture)
    apart = []
    for pictures in groups.values():
        if len(pictures) > 1:
            x = torch.stack(pictures)
            apart.append(torch.pdist(x).mean().item() / math.sqrt(x.shape[1]))
    if not apart:
        return [float("nan"), float("nan"), 0]
    return [*mean_se(apart), len(apart)]


def markdown(title, rows, columns, sign=""):
    """{label: {column: [mean, standard error, n]}} -> a Markdown table."""
    head = [title, *(column.replace("_", " ") for column in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, row in rows.items():
        cells = [f"{row[c][0]:{sign}.3f} ± {row[c][1]:.3f}" for c in columns]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines) + "\n\n"


def report(results, differences, last, tags, tasks):
    """The text of OUT.md, with both tables. It is also printed."""
    some = next(iter(results.values()))
    numbers = [f"{some[column][2]} {column.replace('_', ' ')}" for column in (*tags, *tasks)]
    text = markdown("model", results, [*tags, *tasks, "average"])
    text += "mean ± standard error; n = " + ", ".join(numbers) + ", per model\n"
    if differences:
        text += "\n" + markdown(f"{last} minus", differences, [*tasks, "average"], sign="+")
        text += "paired differences, image by image (same prompt, same noise)\n"
    return text


# ------------------------------------------------------------------ pictures


def picture_names(cfg, asked):
    """The file names of the pictures. ValueError if a prompt cannot be part of a file name."""
    if cfg.layout == "numbers":
        return [f"{i:04d}.png" for i in range(len(asked))]
    names = []
    for i, prompt in enumerate(asked):
        name = f"{prompt}_{i:06d}.png"
        if "/" in prompt or "_" in prompt or len(name.encode()) > 242:
            raise ValueError(f"--layout compbench: prompt {prompt!r} cannot be a file's name "
                             "there: expected no '/' or '_', and at most 230 bytes")
        names.append(f"samples/{name}")
    return names


def asked_prompts(cfg):
    """The prompts of --prompt and --prompt-file, each repeated for each of its pictures."""
    asked = list(cfg.prompt)
    if cfg.prompt_file:
        asked += [meta["prompt"] for meta in read_file(cfg.prompt_file, "prompt")]
    return [prompt for prompt in asked for _ in range(cfg.each)]


def to_lines(asked):
    """The content of OUT/prompts.txt."""
    return "".join(prompt + "\n" for prompt in asked)


def check_out(cfg, asked, labels):
    """ValueError if OUT is no folder to write to, or has pictures of another command.

    They would look like those of this one.
    """
    if cfg.tasks or cfg.score or cfg.diversity:
        raise ValueError("--tasks, --score and --diversity: are for an evaluation; with --prompt "
                         "or --prompt-file only pictures are drawn")
    for label in labels:
        if set(label) <= {"."} or "/" in label:
            raise ValueError(f"--ckpts {label}=...: expected a label that can be a folder's name")
    check_writable(Path(cfg.out))
    names = set(picture_names(cfg, asked))
    out = Path(cfg.out)
    listed = out / "prompts.txt"
    # With a prompts.txt, all folders beside it are checked. Without one, only these models' are.
    folders = [out / label for label in labels]
    same = False
    if listed.is_file():
        folders = [path for path in out.iterdir() if path.is_dir()]
        same = listed.read_text() == to_lines(asked)
    for folder in folders:
        for file in [*folder.glob("*.png"), *folder.glob("samples/*.png")]:
            if not same or str(file.relative_to(folder)) not in names:
                raise ValueError(f"--out {cfg.out}: holds {file}, a picture of other prompts or "
                                 "of another --layout than are asked for; give --out NEW, or "
                                 f"delete {folder}")


def generate(cfg, asked, model, policies, times, rank, world_size):
    """Draw a picture of each prompt with each model, from the same noise.

    OUT/prompts.txt is written first, so that a stopped command can be given again. With --layout
    compbench, T2I-CompBench's BLIP-VQA, UniDet and CLIP scorers can read the file names.
    """
    names = picture_names(cfg, asked)
    mine = torch.arange(len(asked))[rank::world_size]
    model.text.prepare(asked, *dist.local())
    dist.barrier()
    if rank == 0:
        write_text(Path(cfg.out) / "prompts.txt", to_lines(asked))
    bar = tqdm(total=len(policies) * len(mine), desc="draw", unit="image", disable=rank > 0)
    for label, policy in policies.items():
        for part in mine.split(cfg.batch) if len(mine) else ():
            keys = [(cfg.seed, "prompt", int(j)) for j in part]
            latents = draw(model, policy, [asked[j] for j in part], keys, times)
            for j, image in zip(part, model.images(latents)):     # the VAE computes in float32
                path = Path(cfg.out) / label / names[j]
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(to_bytes(image)).save(path)
            bar.update(len(part))
    bar.close()
    if rank == 0:
        print(f"wrote {cfg.out}/{{{','.join(policies)}}} and {cfg.out}/prompts.txt")


# ------------------------------------------------------------------ evaluation


def read_scores(items, world):
    """The world's {task: reward}, changed by the items of --score, ["TASK=REWARD", ...]."""
    named = {}
    for item in items:
        task, _, name = item.partition("=")
        if task not in world.tasks or name not in REWARDS or task in named:
            raise ValueError(f"--score {item}: expected TASK=REWARD, each task once; tasks are "
                             f"{', '.join(world.tasks)}, rewards {', '.join(REWARDS)}")
        named[task] = name
    return {**world.score, **named}


def choose_tasks(cfg, world, rank):
    """The tasks of --tasks, or all that have prompts. It prints which tasks are left out."""
    if cfg.tasks:
        return cfg.tasks
    tasks = world.tasks_with_prompts(cfg.split)
    without = [task for task in world.tasks if task not in tasks]
    if without and rank == 0:
        print(f"left out: {', '.join(without)}, without prompts here (--prompts TASK=DIR)")
    return tasks


def check(cfg, world, tasks, world_size):
    """ValueError for all that can be known to be wrong before any time is spent."""
    if (cfg.each, cfg.layout) != (1, "numbers"):
        raise ValueError(f"--each {cfg.each} --layout {cfg.layout}: are for pictures of --prompt "
                         "or --prompt-file")
    if not Path(cfg.out).name:
        raise ValueError(f"--out {cfg.out!r}: expected the start of file names, such as runs/eval")
    check_writable(Path(cfg.out).parent)
    for task in tasks:
        if task not in world.tasks or tasks.count(task) > 1:
            raise ValueError(f"--tasks {task}: expected some of {', '.join(world.tasks)}, "
                             "each once")
        if task not in world.score:
            raise ValueError(f"--tasks {task}: has no score of its own; expected some of "
                             f"{', '.join(world.score)}, or --score {task}=REWARD")
    world.check_prompts(tasks, cfg.split)
    specs_of(cfg, tasks, world)                 # so that an unknown reward of --also is seen now
    if not len(tasks) <= cfg.rows <= cfg.per_task:
        raise ValueError(f"--rows {cfg.rows}: expected at least one a task ({len(tasks)}), "
                         f"at most --per-task {cfg.per_task}")
    least = 2 * len(world.tags)
    if cfg.per_task < least or cfg.per_task % world_size:
        raise ValueError(f"--per-task {cfg.per_task}: expected at least {least} images a task, "
                         f"a multiple of the {world_size} rank(s)")


def specs_of(cfg, tasks, world):
    """The rewards to compute for each task's images: {task: spec}."""
    specs = {}
    for task in tasks:
        names = [world.score[task], *cfg.also]
        if task == "geneval":
            names.append("geneval_strict")
        specs[task] = parse_reward(",".join(dict.fromkeys(names)))
    return specs


class Evaluation:
    """Draws and scores images. It holds the prompts of all tasks, and this rank's share of them."""

    def __init__(self, cfg, model, world, tasks, times, rank, world_size):
        self.cfg = cfg
        self.model = model
        self.world = world
        self.times = times
        self.specs = specs_of(cfg, tasks, world)
        self.metas = {task: world.eval_prompts(task, cfg.per_task, cfg.split) for task in tasks}
        share = cfg.per_task // world_size
        self.mine = torch.arange(rank * share, (rank + 1) * share)
        self.thread = ThreadPoolExecutor(1)
        n_images = len(cfg.ckpts) * len(tasks) * share
        self.bar = tqdm(total=n_images, desc="eval", unit="image", disable=rank > 0)

    def draw(self, policy, task, part):
        """The images (b, 3, H, W) of a task's prompts. part (b,): the indices of the prompts."""
        prompts = [self.metas[task][j]["prompt"] for j in part]
        keys = [(self.cfg.seed, "eval", task, int(j)) for j in part]
        return self.model.images(draw(self.model, policy, prompts, keys, self.times))

    def task(self, policy, task):
        """Draw and score the images of one model on one task.

        Returns the scores of all ranks' images {reward: (n,)}, this rank's first cells for OUT.png
        [(prompt, image, score)], and the diversity (None without --diversity).
        """
        judged, images, small = [], [], []
        for part in self.mine.split(self.cfg.batch):
            batch = [self.metas[task][j] for j in part]
            drawn = self.draw(policy, task, part)
            # The images are scored while the next ones are sampled.
            job = self.thread.submit(score, self.specs[task], drawn, batch, self.world)
            judged.append(job)
            room = max(0, 4 * self.cfg.rows - len(images))        # OUT.png shows some of these
            images += list(drawn[:room].cpu())
            if self.cfg.diversity:
                small.append(F.adaptive_avg_pool2d(drawn, 32))
            self.bar.update(len(part))
        scores = {}
        for name in self.specs[task]:
            values = np.concatenate([job.result()[name] for job in judged])
            values = dist.gather(torch.from_numpy(values).to(self.times.device))
            scores[name] = values.cpu().numpy()
        own = scores[self.world.score[task]] / scale_of(task, self.world)
        cells = [(self.metas[task][j]["prompt"], image, own[j])
                 for j, image in zip(self.mine.tolist(), images)]
        apart = None
        if self.cfg.diversity:
            prompts = [meta["prompt"] for meta in self.metas[task]]
            apart = spread(dist.gather(torch.cat(small)).cpu(), prompts)
        return scores, cells, apart


def every_mean(scores):
    """All scores, for OUT.json: {label: {"REWARD on TASK": (mean, standard error)}}."""
    out = {}
    for label, tasks in scores.items():
        out[label] = {}
        for task, values in tasks.items():
            for name, value in values.items():
                out[label][f"{name} on {task}"] = mean_se(value)
    return out


def to_lists(own):
    """Scores {label: {task: (n,)}} as lists of numbers with four decimals, for OUT.json."""
    lists = {}
    for label, tasks in own.items():
        lists[label] = {task: [round(float(value), 4) for value in values]
                        for task, values in tasks.items()}
    return lists


def evaluate(run, policies, rank, world_size, start):
    """Draw and score the prompts of all tasks with each model, and write the report.

    run: an Evaluation; start: the time at which the command began.
    """
    cfg = run.cfg
    model = run.model
    world = run.world
    tasks = list(run.metas)
    tags = tag_rows(run.metas.get("geneval", ()), world)
    if "geneval" in tasks and not tags:
        raise ValueError(f"--prompts geneval=...: none of its prompts has a tag of "
                         f"{', '.join(world.tags)}")
    check_rewards(run.specs, model, world, cfg.split, run.times.device)
    texts = [meta["prompt"] for metas in run.metas.values() for meta in metas]
    model.text.prepare(texts, *dist.local())
    dist.barrier()

    scores = {}                     # label -> task -> reward -> (n,)
    shown = {}                      # label -> task -> cells
    diversity = {}                  # label -> task -> what spread() returns
    for label, policy in policies.items():
        scores[label], shown[label], diversity[label] = {}, {}, {}
        for task in tasks:
            scores[label][task], shown[label][task], diversity[label][task] = run.task(policy, task)
    run.bar.close()
    if rank > 0:
        return

    own = {}                        # label -> task -> (n,), own reward only
    for label in scores:
        own[label] = {task: scores[label][task][world.score[task]] for task in tasks}
    results = {label: summarise(own[label], run.metas, world) for label in own}
    differences = gaps(own, run.metas, world)
    last = list(policies)[-1]
    text = report(results, differences, last, tags, tasks)
    numbers = {"settings": asdict(cfg), "world_size": world_size, "base": model.fingerprint,
               "torch": torch.__version__, "device": str(run.times.device),
               "seconds": time.time() - start,
               TABLE: results,
               f"{last} minus: mean, standard error, n": differences,
               ALL_SCORES: every_mean(scores),
               SCORES: to_lists(own)}
    if cfg.diversity:
        numbers["diversity"] = diversity
    write_text(f"{cfg.out}.md", text)
    write_text(f"{cfg.out}.json", json.dumps(numbers, indent=1))
    draw_grid(shown, f"{cfg.out}.png", cfg.rows)
    print(f"\n{text}\nwrote {cfg.out}.md, .json and .png in {time.time() - start:.0f} s")


def main(cfg):
    start = time.time()
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    cli.positive(cfg, "steps", "batch", "each")
    paths = label_models(cfg.ckpts)
    asked = asked_prompts(cfg)
    world = open_world(cfg.model, cfg.prompts)
    if asked:
        check_out(cfg, asked, paths)
    else:
        world.score = read_scores(cfg.score, world)
        tasks = choose_tasks(cfg, world, rank)
        check(cfg, world, tasks, world_size)
    model = world.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5,
                       cfg.text_encoders)
    policies = read_models(cfg, paths, model.mmdit)
    times = schedule(cfg.steps).to(device)
    if asked:
        generate(cfg, asked, model, policies, times, rank, world_size)
    else:
        run = Evaluation(cfg, model, world, tasks, times, rank, world_size)
        evaluate(run, policies, rank, world_size, start)


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
