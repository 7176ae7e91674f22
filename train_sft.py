"""
A cold start by supervised fine-tuning (SFT): a student learns from pictures of the teachers.

    python train_sft.py --teachers ckpt/*.pt                              # -> runs/sft/student.pt
    python train_opd.py --teachers ckpt/*.pt --init runs/sft/student.pt   # stage 2 from there
    python train_sft.py --teachers ckpt/*.pt --init merge --name imitate  # in place of stage 2

The other cold start is the merge. This one is off policy: the student is trained on noised pictures
of its teachers. Later it meets states of its own that it was never trained on. After a stop, the
same command goes on where the run was. The teachers' pictures are kept in runs/NAME/samples.pt.

Papers: Flow-OPD arXiv 2605.08063 (cold start). The loss is SD3's, arXiv 2403.03206:
|v(x_t, t) - (eps - x_0)|^2 with x_t = (1 - t) x_0 + t eps and logit-normal t. As in the released
Flow-OPD (scripts/train_sd3_sft.py:802-810), the times then go through the schedule's shift of 3.
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoints.cold_start import make_learner
from checkpoints.formats import save_trained
from checkpoints.teachers import attach, policy_on, read_teachers
from plumbing import cli, dist, memory
from plumbing.average import Average
from plumbing.files import read_pt, write_pt
from plumbing.folder import check_places, check_room, prepare, run_folder
from plumbing.health import Health
from plumbing.log import Clock, Log
from plumbing.state import restore, resume, save_state
from plumbing.stop import Stop
from rewards import check_rewards, choose_rewards, score
from sampler import Policy, draw_noise, encode, expand, sample, schedule
from watch import Watch, check_watch
from worlds import open_world, presets
from worlds.prompts import read_mix


@dataclass
class Config:
    # --- what
    # The teachers, one per task: PATH or TASK=PATH, in any form that checkpoints/ reads.
    teachers: list[str] = field(default_factory=list)
    # The base: a safetensors file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # The folder of SD3.5's text encoders, if they are not beside the model.
    text_encoders: str = ""
    # TASK=DIR: the task's prompts come from this folder or hub dataset, not from the world
    # (worlds/prompts.py).
    prompts: list[str] = field(default_factory=list)
    # TASK=N: the share of each teacher in the pictures, e.g. geneval=3 ocr=1 quality=0 (default:
    # the world's, in which quality has none).
    ratio: list[str] = field(default_factory=list)
    # Name of the run.
    name: str = "sft"

    # --- pictures
    # Number of pictures, by all teachers together.
    samples: int = 2000
    # Draw each picture so many times, and keep the one with the highest reward (best of N).
    best: int = 1
    # ODE steps per picture.
    steps: int = 20
    # Guidance scale of the teachers when they draw, and of the student in --eval-every.
    guidance: float = 1.0

    # --- student
    # Where it starts, as in train_opd.py: none (the base), merge, truncate, factors, or a
    # checkpoint.
    init: str = "none"
    # Rank of the LoRA, for --init none and truncate. The ranks of a merge add up.
    lora_r: int | None = None
    # Alpha of the LoRA, for --init none and truncate. Its scale is alpha / r.
    lora_alpha: float | None = None

    # --- optimiser
    # Number of iterations. Each is one optimiser step.
    iters: int = 300
    # Pictures per iteration, over all ranks.
    batch: int = 64
    # Distribution of the times t. schedule: logit t ~ N(ln 3, 1), as released; plain: N(0, 1).
    times: Literal["schedule", "plain"] = "schedule"
    # Share of prompts that become the empty prompt in training. Guidance needs a branch for it.
    drop: float = 0.0
    # Learning rate of AdamW. It decays linearly to zero.
    lr: float = 3e-3
    # Images per forward pass. Fewer need less memory.
    micro: int = 96
    # Decay of a moving average of what is trained, which is what is saved (0: none).
    ema: float = 0.0
    # Optimiser steps between updates of the average.
    ema_every: int = 8

    # --- watch
    # Iterations between small evaluations on held-out prompts, as eval.py scores them (0: none).
    eval_every: int = 0
    # Images per task in such an evaluation.
    eval_images: int = 48
    # ODE steps of such an evaluation.
    eval_steps: int = 20
    # Also send log and pictures to tensorboard or to wandb, which you install.
    track: Literal["", "tensorboard", "wandb"] = ""

    # --- machine
    # Save memory: keep fewer activations, and compute them again in the backward pass.
    checkpointing: bool = False
    # Side of the images in pixels (default: 32 in the tiny world).
    size: int | None = None
    # Tokens of SD3.5's T5: 128 or 256. The word zeros leaves T5 out.
    t5: str = ""
    # Dtype of the weights that do not learn.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Dtype of the computation on a GPU. On a CPU it is always float32.
    amp: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # Iterations between resumable states.
    save_every: int = 100
    # Compile the blocks of the transformer with torch.compile.
    compile: bool = False
    # Make all checks of the run, say what it would train and how much memory it needs, and end.
    dry_run: bool = False
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


# Defaults that follow from --model.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=40, guidance=4.5, drop=0.1,
                       samples=20000, iters=1000, lr=1e-4, micro=4, eval_steps=40)}
# The settings that the teachers' pictures depend on.
PICTURES = ("model", "text_encoders", "dtype", "amp", "teachers", "samples", "best", "steps",
            "guidance", "seed", "ratio", "prompts", "prompts_digest", "size", "t5")


def flow_loss(net, x_0, t, eps, text, adapter):
    """|v(x_t, t) - (eps - x_0)|^2 averaged over elements: (B,). x_0, eps (B, C, H, W); t (B,)."""
    x_t = (1 - expand(t, x_0)) * x_0 + expand(t, x_0) * eps
    v = net(x_t, t, text.context, text.pooled, adapter).float()
    return ((v - (eps - x_0)) ** 2).flatten(1).mean(1)


def draw_times(rng, n, times):
    """Draw n times in (0, 1), float32.

    A shift of 3 turns t into 3 t / (1 + 2 t). That adds ln 3 to the logit of t.
    """
    logit = torch.tensor(rng.standard_normal(n), dtype=torch.float32)
    if times == "schedule":
        logit = logit + math.log(3)
    return logit.sigmoid()


def draw_pictures(cfg, model, teachers, prompts, judge, rank, world_size, device):
    """Every teacher draws the prompts of its task. Returns latents (samples, C, H, W) on the CPU.

    They are in the order of the prompts. Picture i is the same for any number of ranks.
    judge(task, latents, prompts) gives the rewards by which the best of --best pictures is kept.
    """
    times = schedule(cfg.steps).to(device)
    shape = model.latent_shape()
    mine = dist.share(cfg.samples, 1, rank, world_size)
    latents = torch.zeros(len(mine), *shape)
    for task, teacher in teachers.items():
        policy = policy_on(model.mmdit, teacher, task, cfg.guidance)
        its = [j for j, i in enumerate(mine) if prompts[i]["task"] == task]
        parts = [its[k:k + cfg.micro] for k in range(0, len(its), cfg.micro)]
        for part in tqdm(parts, desc=f"{task} draws", disable=rank > 0):
            asked = [prompts[mine[j]] for j in part]
            text = encode(model.text, [prompt["prompt"] for prompt in asked])
            best = torch.full((len(part),), -math.inf)
            for n in range(cfg.best):
                keys = [(cfg.seed, "sft", mine[j], *([n] if n else [])) for j in part]
                noise = draw_noise(keys, 0, shape)[:, 0]
                with dist.autocast(device, cfg.amp):
                    drawn = sample(policy, noise.to(device), text, times)
                reward = judge(task, drawn, asked) if cfg.best > 1 else torch.zeros(len(part))
                better = reward > best
                latents[torch.tensor(part)[better]] = drawn[better.to(device)].cpu()
                best = torch.maximum(best, reward)
    return dist.gather_batch(latents.to(device), cfg.samples, 1).cpu()


def pictures(path, settings, rank, draw):
    """The pictures that a stopped run left in path, if its settings are these. Else new ones."""
    key = {name: settings[name] for name in PICTURES}
    kept = read_pt(path, ["latents", "settings"]) if path.exists() else {"settings": None}
    # Drawing gathers over the ranks. So all ranks draw, or none does.
    if all(dist.gather_objects(kept["settings"] == key)):
        return kept["latents"]
    latents = draw()
    if rank == 0:
        write_pt(path, {"latents": latents, "settings": key})
    return latents


def main(cfg):
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    world = open_world(cfg.model, cfg.prompts)
    check(cfg, world, world_size)
    check_watch(cfg, world, world.tasks)
    folder = run_folder(cfg.name)
    out = folder / "student.pt"
    check_places(folder, out)
    model = world.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5,
                       cfg.text_encoders)
    teachers = read_teachers(cfg.teachers, model.mmdit, world.tasks,
                             side=model.latent_shape()[-1])
    mix = read_mix(cfg.ratio, teachers, world.ratio)
    pattern = [task for task, n in mix.items() for _ in range(n)]
    world.check_prompts(set(pattern))
    rewards = {}
    if cfg.best > 1:
        asked = [task for task, n in mix.items() if n]
        rewards = choose_rewards(asked, [], world, share=0)
        check_rewards(rewards, model, world, device=device)
    taught_by = attach(teachers, model.mmdit)
    net, adapter, r, alpha = make_learner(cfg, model.mmdit, "student", full=False,
                                          teachers=list(teachers.values()))
    student = dist.distribute(net, full=False)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)
    settings = {**asdict(cfg), "teachers": taught_by, "prompts_digest": world.prompts_digest,
                "world_size": world_size}
    saved = resume(folder / "state.pt", settings, model.fingerprint)
    average = Average(net, cfg.ema, cfg.ema_every, saved)
    first = restore(saved, net, opt)
    autocast = dist.autocast(device, cfg.amp)
    scaler = dist.loss_scaler(device, cfg.amp)
    if cfg.dry_run:
        return memory.say_dry_run(cfg, model, net, rank, world_size, first, teachers)
    prepare(folder, out, rank)
    check_room(folder, out, sum(p.numel() for p in params), rank, cfg.ema > 0)
    watch = Watch(cfg, model, world, list(teachers), rank, world_size, device)
    log = Log(folder, rank, settings, first, cfg.track)
    health = Health(rank)

    # 1. Pictures. Every teacher draws the prompts of its task.
    rng = np.random.default_rng((cfg.seed, 1))
    tasks = [pattern[i % len(pattern)] for i in range(cfg.samples)]
    prompts = [world.draw_prompt(rng, task, "train") for task in tasks]
    model.text.prepare(watch.texts + [prompt["prompt"] for prompt in prompts], *dist.local())
    dist.barrier()

    def judge(task, latents, asked):
        return torch.from_numpy(score(rewards[task], model.images(latents), asked, world)["total"])

    def draw():
        return draw_pictures(cfg, model, teachers, prompts, judge, rank, world_size, device)

    latents = pictures(folder / "samples.pt", settings, rank, draw)
    dist.barrier()

    clock = Clock(device)
    stop = Stop()
    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, disable=rank > 0):
        # 2. A batch. Every rank draws the same one, and takes its own part of it.
        clock("batch")
        rng = np.random.default_rng((cfg.seed, 2, it))
        picked = rng.integers(cfg.samples, size=cfg.batch)
        drop = rng.random(cfg.batch) < cfg.drop
        t = draw_times(rng, cfg.batch, cfg.times)
        asked = ["" if drop[i] else prompts[picked[i]]["prompt"] for i in range(cfg.batch)]
        mine = torch.arange(cfg.batch).chunk(world_size)[rank]

        # 3. Update. Pull the student's velocity at noised pictures to the true one, eps - x_0.
        clock("update")
        for param_group in opt.param_groups:
            param_group["lr"] = cfg.lr * (1 - it / cfg.iters)
        losses = []
        parts = mine.split(cfg.micro)
        for part in parts:
            dist.reduce_now(student, part is parts[-1])           # once per update
            keys = [(cfg.seed, "sft eps", it, int(i)) for i in part]
            eps = draw_noise(keys, 0, model.latent_shape())[:, 0].to(device)
            x_0 = latents[picked[part]].to(device)
            text = encode(model.text, [asked[i] for i in part])
            with autocast:
                loss = flow_loss(student, x_0, t[part].to(device), eps, text, adapter)
            scaler.scale(loss.sum() / len(mine)).backward()       # ranks are averaged
            losses.append(loss.detach())
        grad_norm = dist.optimise(opt, scaler, it)                # clip, step, zero_grad
        average.step()

        # 4. Log and save.
        loss = dist.sync_mean(torch.cat(losses).mean()).item()
        policy = Policy(student, adapter, cfg.guidance)
        log({"iter": it + 1, "loss": loss, "grad_norm": grad_norm, **clock.row(cfg.batch),
             **watch(policy, average, it + 1)}, watch.pictures)
        health({"iter": it + 1, "loss": loss})
        stopping = stop.asked()
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters or stopping:
            save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings,
                       base=model.fingerprint, average=average.state())
        if stopping:
            stop.leave(it + 1, folder / "state.pt", rank)

    with average.applied():
        out = save_trained(out, net, adapter, model, rank, task="+".join(teachers),
                           anchor=False, r=r, alpha=alpha, settings=settings)
    if rank == 0:
        print(f"wrote {out}")


def check(cfg, world, world_size):
    """ValueError for all that can be known to be wrong before any time is spent.

    It also fills in the defaults that depend on the world: lora_r and lora_alpha.
    """
    cli.lora_defaults(cfg, world.lora)
    cli.positive(cfg, "samples", "best", "steps", "iters", "batch", "lora_r", "lora_alpha", "lr",
                 "micro", "save_every", "ema_every")
    cli.check_training(cfg)
    if cfg.batch % world_size or cfg.samples % world_size:
        raise ValueError(f"--batch {cfg.batch} --samples {cfg.samples}: expected multiples of the "
                         f"{world_size} rank(s)")
    if not 0 <= cfg.drop < 1:
        raise ValueError(f"--drop {cfg.drop}: expected 0 <= drop < 1")


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
