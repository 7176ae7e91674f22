"""The loop's part of the benchmark (bench.py): an iteration beside the released one; its cost."""
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_opd
from checkpoints.formats import save_adapter
from experiments import fullsize, random_sd3, released_loop
from experiments.turns import ratio, say, spread
from model import PREFIX, MMDiT, load_mmdit
from plumbing.files import open_tensors, write_tensors
from worlds.tiny import Tiny
from worlds.tiny_prompts import TASKS

ROOT = Path(__file__).parent.parent
TINY = ROOT / "ckpt/tiny.safetensors"

# ------------------------------------------------------------------ a whole iteration


@dataclass
class World:
    """Where an iteration is timed: a base with its teachers, and the sizes of both loops."""
    model: Path
    teachers: list
    batch: int
    group: int
    micro: int
    steps: int
    guidance: float = 1.0
    size: int | None = None
    r: int = 16

    @property
    def ratio(self):
        """The share of each task. Quality has none: its teacher is the anchor only."""
        tasks = TASKS if self.model.is_file() else random_sd3.TASKS
        return [f"{task}={Tiny.ratio[task]}" for task in tasks]

    @property
    def noisy(self):
        """The first int(0.99 K) steps, which the released loop trains."""
        return [0, int(released_loop.LAST * self.steps)]


def make_base(path, width, depth, resolution):
    """A random base of another size for the tiny world, and a random teacher of each task."""
    with open_tensors(TINY) as file:
        metadata = {key: file.metadata()[key] for key in ("world", "vocab")}
    tensors = {name: tensor for name, tensor in load_file(TINY).items()
               if not name.startswith(PREFIX["mmdit"])}
    tiny = load_mmdit(TINY).cfg
    cfg = dataclasses.replace(tiny, width=width, depth=depth, dual=depth // 2)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        net = MMDiT(cfg)
    tensors |= random_sd3.random_weights(net, PREFIX["mmdit"], generator)
    write_tensors(path, tensors, {**metadata, "resolution": str(resolution)})
    return make_teachers(path)


def make_teachers(model, r=16):
    """A random adapter of each task, beside the base's file. Returns their paths."""
    net = load_mmdit(model)
    paths = []
    for seed, task in enumerate(TASKS):
        adapter = random_sd3.random_adapter(net, torch.Generator().manual_seed(seed), r)
        paths.append(save_adapter(model.with_name(f"{model.stem}-{task}.pt"), task=task,
                                  anchor=task == "quality", base=net.fingerprint, settings={},
                                  **adapter))
    return [str(path) for path in paths]


def worlds_of(cfg, folder):
    """The worlds of an iteration: {name: World}."""
    if cfg.device == "cuda":
        model = Path(cfg.folder)
        if not (model / random_sd3.FILE).exists():
            random_sd3.make(model)
        teachers = [f"{task}={model / task}" for task in random_sd3.TASKS]
        return {"SD3.5-Medium, 512 px": World(model, teachers, 8, 4, 2, 10, 4.5, 512, 32)}
    wide = folder / "wide.safetensors"
    return {"tiny": World(TINY, [str(ROOT / f"ckpt/{task}.pt") for task in TASKS], 32, 4, 16, 8),
            "width 768, 4 blocks": World(wide, make_base(wide, 768, 4, 32), 4, 2, 2, 4)}


def our_options(world, cfg, iters, name, **other):
    """The Config of train_opd.py with the released sizes."""
    options = dict(teachers=world.teachers, model=str(world.model), anchor="quality",
                   ratio=world.ratio, mix="alternate", name=name,
                   iters=iters, batch=world.batch, group=world.group, micro=world.micro,
                   steps=world.steps, noisy=world.noisy, guidance=world.guidance, init="none",
                   lora_r=world.r, lora_alpha=2.0 * world.r, updates=2, ema=0.9, save_every=iters,
                   size=world.size, device=cfg.device)
    if cfg.device == "cuda":
        options.update(dtype="bfloat16", t5="128")
    return {**options, **other}


def their_options(world, cfg, iters, name, **other):
    """The Config of the released loop. Nothing is dropped, so that both train on all images."""
    options = dict(teachers=world.teachers, model=str(world.model), anchor="quality",
                   ratio=world.ratio, name=name, iters=iters,
                   batch=world.batch, group=world.group, micro=world.micro, steps=world.steps,
                   guidance=world.guidance, lora_r=world.r, lora_alpha=2.0 * world.r, drop=False,
                   score=cfg.device == "cpu", size=world.size, device=cfg.device)
    if cfg.device == "cuda":
        options["amp"] = "bfloat16"
    return {**options, **other}


def run_script(script, options):
    """Run main() of a training script here, in the current folder, without its output.

    Returns its mean seconds of an iteration and of its phases, from its log.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        script.main(script.Config(**options))
    return logged(options["name"])


def logged(name):
    """{"s/it", "s/PHASE"}: mean seconds of all iterations but the first, from the log of a run."""
    rows = (Path("runs") / name / "log.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(row) for row in rows]
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]
            if key.startswith("s/")}


def flags_of(options):
    """{option: value} of a script -> its command line."""
    flags = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


class PassCounter:
    """Counts the images that go through an MMDiT, while a script runs."""

    def __init__(self):
        self.count = {"without gradient": 0, "with gradient": 0}

    def __enter__(self):
        self.real = MMDiT.forward

        def forward(net, x, *rest, **options):
            kind = "with gradient" if torch.is_grad_enabled() else "without gradient"
            self.count[kind] += len(x)
            return self.real(net, x, *rest, **options)

        MMDiT.forward = forward
        return self.count

    def __exit__(self, *error):
        MMDiT.forward = self.real


def passes_per_image(script, options):
    """(without, with a gradient): passes an image, counted over all of its iterations.

    One with a gradient has a backward pass too. The base is frozen, so that costs about as much
    as the forward pass (training_flops in bench_net.py).
    """
    with PassCounter() as count:
        run_script(script, options)
    images = options["batch"] * options["iters"]
    return tuple(round(n / images, 3) for n in count.values())


def peak_memory(script, options, cfg):
    """Peak GB of a script in a process of its own: of the GPU, or else of what it allocated."""
    name = str(Path(script.__file__).relative_to(ROOT))
    output, seen = fullsize.watch(fullsize.script(name, *flags_of(options)), cfg.threads)
    if cfg.device == "cuda":
        return float(fullsize.gpu_lines(output)[-1].split()[-1])
    return seen["peak GB"]["anonymous"]


def gigabytes_held(world, whole):
    """GB of weights, gradients and AdamW's two moments, from shapes.

    whole: the anchor and each teacher that has prompts are copies of the transformer in float32.
    """
    file = world.model if world.model.is_file() else world.model / random_sd3.FILE
    net = load_mmdit(file, dtype=None)
    base = sum(p.numel() for p in net.parameters())
    adapter = sum(torch.Size(shape).numel() for shape in net.adapter_shapes(world.r).values())
    student = 4 * adapter                               # weights, gradient, two moments
    if whole:
        copies = 1 + sum(not share.endswith("=0") for share in world.ratio)
        return 4 * (base + student + copies * (base + adapter)) / 1e9
    size = 2 if not world.model.is_file() else 4        # bfloat16 for SD3.5
    return (size * base + 4 * (student + len(world.teachers) * adapter)) / 1e9


# Who -> the script and its options.
LOOPS = {"ours": (train_opd, our_options), "theirs": (released_loop, their_options)}


def compare_loops(world, cfg, turns, micro):
    """Both in turns, each with a cycle of the five tasks after one iteration to warm up.

    micro: {who: images per forward pass}. Returns {who: [mean seconds of an iteration, ...]}, and
    the seconds of ours by phase.
    """
    taken = {who: [] for who in LOOPS}
    for turn in range(turns):
        for who, (script, options) in list(LOOPS.items())[::1 if turn % 2 == 0 else -1]:
            wanted = options(world, cfg, 6, f"{who}-{time.time_ns()}", micro=micro[who])
            taken[who].append(run_script(script, wanted))
    seconds = {who: [mean["s/it"] for mean in means] for who, means in taken.items()}
    phases = {phase: round(statistics.median(mean[phase] for mean in taken["ours"]), 3)
              for phase in taken["ours"][0] if phase != "s/it"}
    return seconds, phases


def bench_iteration(cfg, folder, turns):
    rows = []
    worlds = worlds_of(cfg, folder)
    for name, world in worlds.items():
        sizes = [dict.fromkeys(LOOPS, world.micro)]
        if name == "tiny":                              # and each at its own default
            sizes.insert(0, {"ours": train_opd.Config().micro,
                             "theirs": released_loop.Config().micro})
        for micro in sizes:
            seconds, phases = compare_loops(world, cfg, turns, micro)
            rows.append({"world": name, "micro": micro,
                         "images/s": {who: spread([world.batch / s for s in seconds[who]])
                                      for who in seconds},
                         "ratio": ratio(seconds["theirs"], seconds["ours"]),
                         "ours": phases})
            say("iteration", rows[-1])
        if name == list(worlds)[0]:
            rows[-1]["passes an image"] = count_passes(world, cfg)
            say("iteration", rows[-1])
    rows[-1]["memory GB"] = weigh(world, cfg)           # of the largest
    say("iteration", rows[-1])
    return rows


def count_passes(world, cfg):
    """{who: passes of a cycle of the tasks, for one image}."""
    passes = {}
    for who, (script, options) in LOOPS.items():
        forward, both = passes_per_image(script, options(world, cfg, 5, f"passes-{who}"))
        passes[who] = {"forward": forward, "forward and backward": both,
                       "in all": round(forward + 2 * both, 2)}
    return passes


def weigh(world, cfg):
    """Memory of both loops at equal sizes, beyond that of a process which has only imported."""
    start = 0.0                                         # a GPU counts what torch allocated
    if cfg.device == "cpu":
        imports = ["-c", "import train_opd, experiments.released_loop"]
        start = fullsize.watch(imports, cfg.threads)[1]["peak GB"]["anonymous"]
    peaks = {who: peak_memory(script, options(world, cfg, 2, f"memory-{who}"), cfg)
             for who, (script, options) in LOOPS.items()}
    held = {who: round(gigabytes_held(world, whole=who == "theirs"), 3) for who in LOOPS}
    return {"peak": peaks, "before the start": start, "weights and optimiser": held,
            "ours / theirs": round((peaks["ours"] - start) / (peaks["theirs"] - start), 3)}


# ------------------------------------------------------------------ cost


def cost_runs(cfg, folder):
    """{what: {value: options of train_opd.py}}. The first value of each is the same run."""
    world = World(TINY, [str(ROOT / f"ckpt/{task}.pt") for task in TASKS], 16, 4, 8, 8)
    large = folder / "large.safetensors"
    teachers = make_base(large, 128, 4, 32)

    def options(**other):
        return our_options(world, cfg, 3, "", anchor="base", mix="batch", **other)

    def of_teachers(n):
        return options(teachers=world.teachers[:n], ratio=[f"{task}=1" for task in TASKS[:n]])

    def of_side(side):
        file = large.with_name(f"side-{side}.safetensors")
        tensors = load_file(large)
        with open_tensors(large) as opened:
            metadata = {key: opened.metadata()[key] for key in ("world", "vocab")}
        write_tensors(file, tensors, {**metadata, "resolution": str(side)})
        return options(model=str(file), teachers=teachers)

    def of_steps(steps):
        return options(steps=steps, noisy=[0, steps // 2])

    return {"images (B)": {B: options(batch=B) for B in (8, 16, 32)},
            "steps (K), half of them supervised": {K: of_steps(K) for K in (4, 8, 16)},
            "teachers": {n: of_teachers(n) for n in (1, 2, 3, 4)},
            "side of the images": {side: of_side(side) for side in (32, 48, 64)}}


def seconds_with_ranks(options, ranks, threads):
    """Mean seconds of an iteration with torchrun, which shares the threads out."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    command = [sys.executable, *launch, str(ROOT / "train_opd.py"), *flags_of(options)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads // ranks), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{ranks} ranks failed: {done.stderr[-2000:]}")
    return logged(options["name"])["s/it"]


def bench_cost(cfg, folder, turns):
    """Each turn runs every value of every row once."""
    runs = cost_runs(cfg, folder)
    ranks = dict.fromkeys((1, 2), runs["images (B)"][16])
    seconds = {what: {value: [] for value in values}
               for what, values in {**runs, "ranks": ranks}.items()}
    for _ in range(turns):
        for what, values in runs.items():
            for value, options in values.items():
                taken = run_script(train_opd, {**options, "name": f"cost-{time.time_ns()}"})
                seconds[what][value].append(taken["s/it"] / options["batch"])
        for n, options in ranks.items():
            options = {**options, "name": f"cost-{time.time_ns()}"}
            taken = seconds_with_ranks(options, n, cfg.threads)
            seconds["ranks"][n].append(taken / options["batch"])
    rows = []
    for what, values in seconds.items():
        first = next(iter(values))
        for value, taken in values.items():
            relative = [a / b for a, b in zip(taken, values[first])]
            rows.append({"what": what, "value": value, "ms an image": spread(
                [1000 * s for s in taken]), "over the first": spread(relative)})
            say("cost", rows[-1])
    return rows
