"""
Stage 2: Flow-OPD. One student learns from all teachers, on the states it visits itself.

    python train_opd.py --teachers ckpt/*.pt                                  # -> runs/opd/student.pt
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train_opd.py --teachers ckpt/*.pt       # two CPU cores
    torchrun --nproc_per_node=8 train_opd.py --teachers ckpt/*.pt             # eight GPUs

A run that was stopped goes on where it was when the same command is given again. All it writes is in runs/NAME/.

One iteration: the student samples trajectories by its own SDE; each prompt's teacher (by task), and the quality teacher as an anchor,
say at every state where they would have gone; the student's step is pulled there. No reward is computed, no advantage, no ratio: the
per-step reward of the paper, r_t = -KL(student || teacher), is differentiated in closed form.

Papers: Flow-OPD arXiv 2605.08063; closed form: DiffusionOPD arXiv 2605.15055.
"""
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import model as models
import util
from rewards import world_of
from sampler import Trajectory, draw_noise, encode, gaussian_kl, rollout, schedule, step, velocity


@dataclass
class Config:
    teachers: list[str] = field(default_factory=list)                    # adapters written by train_grpo.py, one a task
    model: str = "ckpt/tiny.safetensors"                                 # the base, the same for all
    anchor: str = ""                                                     # the task whose teacher anchors all prompts (default: the file marked so)
    ratio: list[str] = field(default_factory=list)                       # prompts of each teacher's task (default: the world's, geneval=3 ocr=1 quality=1)
    init: Literal["merge", "none"] = "merge"                             # cold start: exact average of the teachers, or the base
    objective: Literal["kl"] = "kl"                                      # the per-step loss: KL(student || teacher) in closed form
    lam: float = 0.02                                                    # weight of the KL to the anchor (MAR); 0 turns it off
    name: str = "opd"                                                    # run name
    iters: int = 100                                                     # iterations, each one rollout of `batch` images
    batch: int = 64                                                      # trajectories an iteration, over all ranks
    group: int = 4                                                       # G, trajectories a prompt
    steps: int = 8                                                       # K, steps of a rollout
    noisy: list[int] = field(default_factory=lambda: [0, 5])             # steps FROM TO (exclusive) take noise and are supervised; the rest are ODE
    rollout: Literal["sde", "cps"] = "sde"                               # how noise is added
    a: float = 0.7                                                       # noise level
    guidance: float = 1.0                                                # w, in rollouts, student and teachers alike
    lora_r: int | None = None                                            # LoRA rank of the student, for --init none (a merge's ranks add up)
    lora_alpha: float | None = None                                      # LoRA scale is alpha / r, for --init none
    lr: float = 3e-3                                                     # AdamW, decays linearly to zero
    updates: int = 4                                                     # optimiser steps a rollout, each on its share of the batch
    micro: int = 96                                                      # images a forward pass, in rollouts, targets and updates (memory)
    save_every: int = 10                                                 # iterations between resumable states
    compile: bool = False                                                # torch.compile the blocks
    seed: int = 0                                                        # of everything
    device: str = "auto"                                                 # auto, cuda, mps, cpu


def opd_kl(v_student, v_target, x, t, t_next, kind, a, t_second):
    """KL(student || target) of one step from the visited states x, in closed form: (B,), nats per latent element, and a gradient.

    Both step from the same x with the same std; only the means differ, and they are affine in v:
    |mean_student - mean_target|^2 / (2 std^2) = w(t) |v_student - v_target|^2: Flow-OPD's dense reward with its sign turned.
    DEVIATION: the paper's text puts that reward, detached, into a clipped surrogate. It depends on x and not on the sampled x_next, so its
    expected policy gradient for this step is zero; here the KL itself is differentiated (the released code's "gkd").
    """
    mean_student, std = step(kind, x, v_student, t, t_next, a, t_second)
    mean_target, _ = step(kind, x, v_target, t, t_next, a, t_second)
    return gaussian_kl(mean_student, mean_target, std)


OBJECTIVES = {"kl": opd_kl}      # each: velocities of student and target at the visited states -> a loss for each state


def read_teachers(cfg, base, world):
    """The teachers by task, and the anchor's task (None without MAR). ValueError if a file or the set of them will not do."""
    if not cfg.teachers:
        raise ValueError("--teachers: got none, expected adapters written by train_grpo.py, e.g. --teachers ckpt/*.pt")
    teachers, source = {}, {}
    for path in cfg.teachers:
        teacher = util.read_adapter(path, base)
        task = teacher["task"]
        if task not in world.TASKS:
            raise ValueError(f"{path}: is trained on '{task}', expected one of {', '.join(world.TASKS)}, to which prompts can be routed")
        if task in teachers:
            raise ValueError(f"{path}: is a second teacher of '{task}', after {source[task]}; a prompt is routed to one")
        teachers[task], source[task] = teacher, path
    marked = [task for task, teacher in teachers.items() if teacher["anchor"]]
    if cfg.anchor and (cfg.anchor not in teachers or not cfg.lam):
        raise ValueError(f"--anchor {cfg.anchor}: expected the task of a teacher ({', '.join(teachers)}), and --lam > 0; got --lam {cfg.lam}")
    if not cfg.lam:
        return teachers, None
    if not cfg.anchor and len(marked) != 1:
        raise ValueError(f"{len(marked)} of the teachers are marked as the anchor; expected one: say --anchor TASK, or --lam 0 for none")
    return teachers, cfg.anchor or marked[0]


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


def check(cfg, world_size):
    """All else that can be known to be wrong before any time is spent."""
    util.positive(cfg, "iters", "batch", "group", "steps", "a", "lr", "updates", "micro", "save_every")
    if cfg.init == "none":
        cfg.lora_r, cfg.lora_alpha = cfg.lora_r or 16, cfg.lora_alpha or 32.0
        util.positive(cfg, "lora_r", "lora_alpha")
    elif cfg.lora_r is not None or cfg.lora_alpha is not None:
        raise ValueError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: are for --init none; a merge has the sum of its teachers' ranks")
    if cfg.lam < 0:
        raise ValueError(f"--lam {cfg.lam}: expected 0 (no anchor) or more")
    util.check_rollout(cfg, world_size)


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    model = models.load(cfg.model, device)
    world = world_of(model)
    check(cfg, world_size)
    teachers, anchor = read_teachers(cfg, model.fingerprint, world)
    pattern = [task for task, n in read_ratio(cfg.ratio, teachers, world.RATIO).items() for _ in range(n)]
    net, folder = model.mmdit, Path("runs") / cfg.name

    # Everybody is an adapter on the one base: the teachers frozen, the student a copy of their merge (or new, for --init none).
    for task, teacher in teachers.items():
        net.add_adapter(task, teacher["r"], teacher["alpha"], teacher["tensors"])
    torch.manual_seed(cfg.seed)
    cold = models.merge_adapters(list(teachers.values())) if cfg.init == "merge" else {"r": cfg.lora_r, "alpha": cfg.lora_alpha, "tensors": None}
    net.add_adapter("student", cold["r"], cold["alpha"], cold["tensors"], trainable=True)
    names, objective = list(teachers), OBJECTIVES[cfg.objective]
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)
    taught_by = {task: models.fingerprint(teacher["tensors"]) for task, teacher in teachers.items()}
    settings, first = {**asdict(cfg), "teachers": taught_by, "world_size": world_size}, 0
    state = util.resume(folder / "state.pt", settings, model.fingerprint)
    if state:
        first = state["iter"]
        net.load_state_dict(state["adapter"], strict=False)
        opt.load_state_dict(state["opt"])
    if cfg.compile:
        util.compile_blocks(net)
    student = DDP(net, broadcast_buffers=False) if world_size > 1 else net
    frozen = net                                                             # teachers and anchor: adapters that do not learn
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    times = schedule(cfg.steps).to(device)
    supervised = range(*cfg.noisy)
    prompts, images = cfg.batch // cfg.group, cfg.batch // world_size        # prompts over all ranks, images on this one
    log = util.Log(folder, rank, settings, first)

    def save(path):
        util.save_adapter(path, task="+".join(teachers), anchor=False, base=model.fingerprint, r=cold["r"], alpha=cold["alpha"],
                          tensors=net.adapter("student"), settings=settings)

    if rank == 0 and not state:
        save(folder / "init.pt")

    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, desc=cfg.name, disable=rank > 0):
        start = time.time()
        # 1. Prompts: the same list on every rank; each rank takes its own part of the images.
        rng = np.random.default_rng((cfg.seed, it))
        metas = [world.draw_prompt(rng, pattern[(it * prompts + j) % len(pattern)], "train") for j in range(prompts)]
        mine = util.share(cfg.batch, cfg.updates, rank, world_size)          # indices into the batch of all ranks
        metas = [metas[i // cfg.group] for i in mine]
        text = encode(model.text, [m["prompt"] for m in metas])

        # 2. Rollout: on policy, the student's own SDE.
        noise = draw_noise([(cfg.seed, it, i) for i in mine], cfg.steps, model.latent_shape()).to(device)
        minibatches = [rows.split(cfg.micro) for rows in torch.arange(images, device=device).chunk(cfg.updates)]
        pieces = [i for part in minibatches for i in part]
        with autocast:
            trajs = [rollout(net, noise[i], times, text.rows(i), cfg.guidance, "student", cfg.rollout, cfg.a, supervised) for i in pieces]
        traj = Trajectory(*(torch.cat(parts) for parts in zip(*trajs)))

        # 3. Targets: at every visited state, the velocity of the prompt's own teacher (hard routing), and of the anchor.
        routed = torch.tensor([names.index(m["task"]) for m in metas], device=device)                        # (B,), index into names
        v_teacher = torch.empty(images, cfg.steps, *model.latent_shape(), device=device)                     # (B, K, C, H, W)
        v_anchor = torch.empty_like(v_teacher) if anchor else None
        with torch.no_grad(), autocast:
            for i, k in product(pieces, supervised):
                x, t, sub = traj.x[i, k], times[k].expand(len(i)), text.rows(i)
                v_teacher[i, k] = velocity(frozen, x, t, sub, cfg.guidance, models.Route(names, routed[i])).float()
                if anchor:
                    v_anchor[i, k] = velocity(frozen, x, t, sub, cfg.guidance, anchor).float()

        # 4. Update: pull each supervised step of each trajectory towards its teacher's, and a little towards the anchor's.
        kls, mar, grad_norm = torch.zeros(images, cfg.steps, device=device), torch.zeros(images, cfg.steps, device=device), 0.0
        for group in opt.param_groups:
            group["lr"] = cfg.lr * (1 - it / cfg.iters)
        for part in minibatches:
            states = list(product(part, supervised))
            for n, (i, k) in enumerate(states):
                with util.no_sync(student, skip=n < len(states) - 1), autocast:
                    x, t, t_next = traj.x[i, k], times[k].expand(len(i)), times[k + 1]
                    v = velocity(student, x, t, text.rows(i), cfg.guidance, "student").float()
                    kl = objective(v, v_teacher[i, k], x, t, t_next, cfg.rollout, cfg.a, times[1])           # (B,)
                    loss = kl
                    if anchor:                                               # MAR: + lam KL(student || anchor), whatever the prompt's task
                        kl_anchor = opd_kl(v, v_anchor[i, k], x, t, t_next, cfg.rollout, cfg.a, times[1])    # (B,)
                        loss = kl + cfg.lam * kl_anchor
                        mar[i, k] = kl_anchor.detach()
                    (loss.sum() / (images // cfg.updates * len(supervised))).backward()                      # DDP averages over ranks
                kls[i, k] = kl.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
            util.finite(grad_norm, it)
            opt.step()
            opt.zero_grad()

        # 5. Log and save.
        kls, mar, routed = util.gather(kls)[:, list(supervised)], util.gather(mar)[:, list(supervised)], util.gather(routed)
        by_task = {f"kl_{name}": kls[routed == n].mean().item() for n, name in enumerate(names) if (routed == n).any()}
        seconds = time.time() - start
        log({"iter": it + 1, "kl": kls.mean().item(), **by_task, "kl_first": kls[:, 0].mean().item(), "kl_last": kls[:, -1].mean().item(),
             "kl_anchor": mar.mean().item(), "grad_norm": grad_norm, "s/it": seconds, "images/s": cfg.batch / seconds})
        if rank == 0 and ((it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters):
            util.save_atomic({"iter": it + 1, "adapter": {k: p for k, p in net.state_dict().items() if k.endswith(".student")},
                              "opt": opt.state_dict(), "settings": settings, "base": model.fingerprint}, folder / "state.pt")

    if rank == 0:
        save(folder / "student.pt")
        print(f"wrote {folder / 'student.pt'} (cold start: {folder / 'init.pt'})")


if __name__ == "__main__":
    util.run(main, Config)
