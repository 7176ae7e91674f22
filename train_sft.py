"""
A cold start by supervised fine-tuning: the student imitates pictures that the teachers drew, each on its own prompts. The other cold start is the merge.

    python train_sft.py --teachers ckpt/*.pt                                  # -> runs/sft/student.pt
    python train_opd.py --teachers ckpt/*.pt --init runs/sft/student.pt       # stage 2 from there

This is off policy: the student is trained on noised teacher pictures, and later sees states of its own that it never trained on. A run that was stopped
goes on where it was; the teachers' pictures are kept in runs/NAME/samples.pt.

Papers: Flow-OPD arXiv 2605.08063 (cold start); the loss is SD3's, arXiv 2403.03206: x_t = (1 - t) x_0 + t eps, |v - (eps - x_0)|^2, t logit-normal.
"""
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import adapters
import model as models
import util
from prompts import check_prompts, read_ratio, world_of
from sampler import draw_noise, encode, expand, sample, schedule


@dataclass
class Config:
    teachers: list[str] = field(default_factory=list)                    # one a task, PATH or TASK=PATH, in any form that adapters.py reads
    model: str = "ckpt/tiny.safetensors"                                 # the base: the tiny world's file, or SD3.5's folder or hub name
    prompts: list[str] = field(default_factory=list)                     # TASK=DIR: that folder's prompts (prompts.py) instead of the world's own
    ratio: list[str] = field(default_factory=list)                       # pictures of each teacher (default: the world's, geneval=3 ocr=1 quality=1)
    name: str = "sft"                                                    # run name
    samples: int = 2000                                                  # pictures by all teachers together
    steps: int = 20                                                      # ODE steps of a picture
    guidance: float = 1.0                                                # w, of the teachers when they draw
    drop: float = 0.0                                                    # share of prompts left out in training, so that guidance keeps its other branch
    iters: int = 300                                                     # optimiser steps
    batch: int = 64                                                      # pictures a step, over all ranks
    lora_r: int = 16                                                     # LoRA rank of the student
    lora_alpha: float = 32.0                                             # LoRA scale is alpha / r
    lr: float = 1e-3                                                     # AdamW, decays linearly to zero
    micro: int = 96                                                      # images a forward pass (memory)
    checkpointing: bool = False                                          # keep fewer activations and compute them again (memory)
    size: int | None = None                                              # side of the images in pixels (default: the tiny world's 32)
    t5: str = ""                                                         # SD3.5's T5: 128 or 256 tokens, or zeros (left out)
    dtype: Literal["float32", "bfloat16"] = "float32"                    # of weights that do not learn
    save_every: int = 100                                                # iterations between resumable states
    compile: bool = False                                                # torch.compile the blocks
    seed: int = 0                                                        # of everything
    device: str = "auto"                                                 # auto, cuda, mps, cpu


# Defaults that --model changes.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=40, guidance=4.5, drop=0.1, samples=20000, iters=1000,
                       lora_r=32, lora_alpha=64.0, lr=1e-4, micro=4)}


def flow_loss(net, x_0, t, eps, text, adapter):
    """|v(x_t, t) - (eps - x_0)|^2 averaged over elements, x_t = (1 - t) x_0 + t eps: (B,). x_0, eps (B, C, H, W); t (B,)."""
    x_t = (1 - expand(t, x_0)) * x_0 + expand(t, x_0) * eps
    v = net(x_t, t, text.context, text.pooled, adapter).float()
    return ((v - (eps - x_0)) ** 2).flatten(1).mean(1)


def check(cfg, world_size):
    util.positive(cfg, "samples", "steps", "iters", "batch", "lora_r", "lora_alpha", "lr", "micro", "save_every")
    if cfg.batch % world_size or cfg.samples % world_size:
        raise ValueError(f"--batch {cfg.batch} --samples {cfg.samples}: expected multiples of the {world_size} rank(s)")
    if not 0 <= cfg.drop < 1:
        raise ValueError(f"--drop {cfg.drop}: expected 0 <= drop < 1")


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    check(cfg, world_size)
    world = world_of(models.world_name(cfg.model), cfg.prompts)
    model = models.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5)
    teachers = adapters.read_teachers(cfg.teachers, model, world)
    ratio = read_ratio(cfg.ratio, teachers, world.RATIO)
    pattern = [task for task, n in ratio.items() for _ in range(n)]
    check_prompts(world, set(pattern))
    net, folder = model.mmdit, Path("runs") / cfg.name
    taught_by = adapters.attach(teachers, net)
    torch.manual_seed(cfg.seed)
    net.add_adapter("student", cfg.lora_r, cfg.lora_alpha, trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        util.compile_blocks(net)
    student = util.distribute(net, full=False)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)
    settings, first = {**asdict(cfg), "teachers": taught_by, "world_size": world_size}, 0
    state = util.resume(folder / "state.pt", settings, model.fingerprint)
    if state:
        first = state["iter"]
        util.restore(state, net, opt)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    log = util.Log(folder, rank, settings, first)

    # 1. Pictures: every teacher draws its own prompts; picture i is the same whatever the number of ranks.
    rng = np.random.default_rng((cfg.seed, 1))
    metas = [world.draw_prompt(rng, pattern[i % len(pattern)], "train") for i in range(cfg.samples)]
    model.text.prepare([meta["prompt"] for meta in metas], rank, world_size)
    util.barrier()
    drawn = folder / "samples.pt"
    kept = util.read_pt(drawn, ["latents", "settings"]) if drawn.exists() else None
    key = {k: settings[k] for k in ("teachers", "samples", "steps", "guidance", "seed", "ratio", "prompts", "size", "t5")}
    if kept is None or kept["settings"] != key:
        times, mine = schedule(cfg.steps).to(device), range(rank, cfg.samples, world_size)
        latents = torch.zeros(len(mine), *model.latent_shape())
        for task, teacher in teachers.items():
            its, who = [j for j, i in enumerate(mine) if metas[i]["task"] == task], teacher.get("net", net)
            for part in tqdm([its[k:k + cfg.micro] for k in range(0, len(its), cfg.micro)], desc=f"{task} draws", disable=rank > 0):
                text = encode(model.text, [metas[mine[j]]["prompt"] for j in part])
                noise = draw_noise([(cfg.seed, "sft", mine[j]) for j in part], 0, model.latent_shape()).to(device)
                with torch.no_grad(), autocast:
                    latents[part] = sample(who, noise, times, text, cfg.guidance, None if "net" in teacher else task).cpu()
        everyone = util.gather(latents.to(device)).cpu()                         # rank by rank; back into the order of the prompts
        latents = torch.empty_like(everyone)
        latents[torch.cat([torch.arange(r, cfg.samples, world_size) for r in range(world_size)])] = everyone
        if rank == 0:
            util.save_atomic({"latents": latents, "settings": key}, drawn)
    else:
        latents = kept["latents"]

    # 2. Training.
    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, desc=cfg.name, disable=rank > 0):
        start, rng = time.time(), np.random.default_rng((cfg.seed, 2, it))
        picked = rng.integers(cfg.samples, size=cfg.batch)                       # the same on every rank; each takes its part
        drop, t = torch.tensor(rng.random(cfg.batch) < cfg.drop), torch.tensor(rng.standard_normal(cfg.batch), dtype=torch.float32).sigmoid()
        mine = torch.arange(cfg.batch).chunk(world_size)[rank]
        eps = draw_noise([(cfg.seed, "sft eps", it, int(i)) for i in mine], 0, model.latent_shape())[:, 0]
        losses = []
        for group in opt.param_groups:
            group["lr"] = cfg.lr * (1 - it / cfg.iters)
        pieces = torch.arange(len(mine)).split(cfg.micro)
        for n, piece in enumerate(pieces):
            rows = mine[piece]
            text = encode(model.text, ["" if drop[i] else metas[picked[i]]["prompt"] for i in rows])
            with util.no_sync(student, skip=n < len(pieces) - 1), autocast:
                loss = flow_loss(student, latents[picked[rows]].to(device), t[rows].to(device), eps[piece].to(device), text, "student")
                (loss.sum() / len(mine)).backward()
            losses.append(loss.detach())
        grad_norm = util.clip(params)
        util.finite(grad_norm, it)
        opt.step()
        opt.zero_grad()

        # 3. Log and save.
        seconds = time.time() - start
        log({"iter": it + 1, "loss": util.sync_mean(torch.cat(losses).mean()).item(), "grad_norm": grad_norm, "s/it": seconds, "images/s": cfg.batch / seconds})
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters:
            util.save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings, base=model.fingerprint)

    path = adapters.save_adapter(folder / "student.pt", rank, task="+".join(teachers), anchor=False, base=model.fingerprint, r=cfg.lora_r, alpha=cfg.lora_alpha,
                                 tensors=net.adapter("student"), settings=settings)
    if rank == 0:
        print(f"wrote {path}")


if __name__ == "__main__":
    util.run(main, Config, presets=PRESETS)
