"""
Stage 2: Flow-OPD. One student learns from all teachers, on the states it visits itself.

    python train_opd.py --teachers ckpt/*.pt                                  # -> runs/opd/student.pt
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train_opd.py --teachers ckpt/*.pt       # two CPU cores
    torchrun --nproc_per_node=8 train_opd.py --teachers ckpt/*.pt             # eight GPUs
    torchrun --nproc_per_node=8 train_opd.py --model stable-diffusion-3.5-medium --teachers geneval=DIR ocr=DIR quality=DIR --anchor quality   # SD3.5

A run that was stopped goes on where it was when the same command is given again. All it writes is in runs/NAME/.

One iteration: the student samples trajectories by its own SDE; each prompt's teacher (by task), and the quality teacher as an anchor,
say at every state where they would have gone; the student's step is pulled there. No reward is computed, no advantage, no ratio: the
per-step reward of the paper, r_t = -KL(student || teacher), is differentiated in closed form.

Papers: Flow-OPD arXiv 2605.08063; closed form: DiffusionOPD arXiv 2605.15055.
"""
import copy
import importlib
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import adapters
import model as models
import util
from prompts import world_of
from sampler import Trajectory, draw_noise, encode, gaussian_kl, rollout, schedule, step, velocity


@dataclass
class Config:
    teachers: list[str] = field(default_factory=list)                    # one a task, PATH or TASK=PATH, in any form that adapters.py reads
    model: str = "ckpt/tiny.safetensors"                                 # the base, the same for all: the tiny world's file, or SD3.5's folder or hub name
    prompts: list[str] = field(default_factory=list)                     # TASK=DIR: that folder's prompts (prompts.py) instead of the world's own
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
    full: bool = False                                                   # the student is a whole transformer instead of an adapter
    lr: float = 3e-3                                                     # AdamW, decays linearly to zero
    updates: int = 4                                                     # optimiser steps a rollout, each on its share of the batch
    micro: int = 96                                                      # images a forward pass, in rollouts, targets and updates (memory)
    checkpointing: bool = False                                          # keep fewer activations and compute them again (memory)
    size: int | None = None                                              # side of the images in pixels (default: the tiny world's 32)
    t5: str = ""                                                         # SD3.5's T5: 128 or 256 tokens, or zeros (left out)
    dtype: Literal["float32", "bfloat16"] = "float32"                    # of weights that do not learn
    save_every: int = 10                                                 # iterations between resumable states
    compile: bool = False                                                # torch.compile the blocks
    seed: int = 0                                                        # of everything
    device: str = "auto"                                                 # auto, cuda, mps, cpu


# Defaults that --model changes. For SD3.5 they are the released ones (preset mix_opd_8gpu); iters is ours and untried.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5, batch=256, group=16, updates=2, lr=1e-4, micro=4, iters=300)}


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


def read_teachers(cfg, model, world):
    """The teachers by task, and the anchor's task (None without MAR). ValueError if a file or the set of them will not do."""
    if not cfg.teachers:
        raise ValueError("--teachers: got none, expected adapters written by train_grpo.py, e.g. --teachers ckpt/*.pt")
    teachers, source = {}, {}
    for spec in cfg.teachers:
        label, path = adapters.split_label(spec)
        teacher = adapters.read(path, model.mmdit, label)
        task = teacher["task"]
        if task not in world.TASKS:
            raise ValueError(f"{spec}: is trained on '{task}', expected one of {', '.join(world.TASKS)}, to which prompts can be routed" + "; say TASK=PATH" * (not task))
        if task in teachers:
            raise ValueError(f"{path}: is a second teacher of '{task}', after {source[task]}; a prompt is routed to one")
        teachers[task], source[task] = teacher, path
    marked = [task for task, teacher in teachers.items() if teacher["anchor"]]
    if cfg.anchor and (cfg.anchor not in teachers or not cfg.lam):
        raise ValueError(f"--anchor {cfg.anchor}: expected the task of a teacher ({', '.join(teachers)}), and --lam > 0; got --lam {cfg.lam}")
    if cfg.init == "merge" and not cfg.full and any("net" in teacher for teacher in teachers.values()):
        raise ValueError("--init merge: a teacher is a whole transformer, whose average with others is no adapter; use --full, or --init none")
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


def routed_velocity(teachers, frozen, routed, x, t, text, guidance):
    """The velocity of each image's own teacher. routed (B,): index into teachers; x (B, C, H, W), t (B,) -> (B, C, H, W).

    Teachers that are adapters share one base and one forward; one that is a whole transformer runs on its own images.
    """
    shared = [task for task, teacher in teachers.items() if "net" not in teacher]
    v = torch.empty_like(x)
    for net, tasks in [(frozen, shared)] + [(teacher["net"], [task]) for task, teacher in teachers.items() if "net" in teacher]:
        theirs = torch.tensor([list(teachers).index(task) for task in tasks], device=x.device)
        rows, index = (routed[:, None] == theirs).nonzero(as_tuple=True)     # whose teacher is among these, and which one it is
        if len(rows):
            route = models.Route(tasks, index) if net is frozen else None
            v[rows] = velocity(net, x[rows], t[rows], text.rows(rows), guidance, route).float()
    return v


def check(cfg, world_size, world):
    """All else that can be known to be wrong before any time is spent."""
    util.positive(cfg, "iters", "batch", "group", "steps", "a", "lr", "updates", "micro", "save_every")
    if cfg.init == "none" and not cfg.full:
        r, alpha = world.LORA
        cfg.lora_r, cfg.lora_alpha = r if cfg.lora_r is None else cfg.lora_r, alpha if cfg.lora_alpha is None else cfg.lora_alpha
        util.positive(cfg, "lora_r", "lora_alpha")
    elif cfg.lora_r is not None or cfg.lora_alpha is not None:
        raise ValueError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: are for an adapter from --init none; a merge has the sum of its teachers' ranks")
    if cfg.lam < 0:
        raise ValueError(f"--lam {cfg.lam}: expected 0 (no anchor) or more")
    util.check_rollout(cfg, world_size)


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    check(cfg, world_size, importlib.import_module(models.world_name(cfg.model)))
    model = models.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5)
    world = world_of(model, cfg.prompts)
    teachers, anchor = read_teachers(cfg, model, world)
    pattern = [task for task, n in read_ratio(cfg.ratio, teachers, world.RATIO).items() for _ in range(n)]
    folder, names, objective = Path("runs") / cfg.name, list(teachers), OBJECTIVES[cfg.objective]

    # Teachers and anchor: adapters on one frozen base (or whole transformers beside it). The student: one more adapter, a copy of their merge
    # (or new, for --init none); with --full a whole transformer of its own, from the average of theirs (or the base).
    frozen, me = model.mmdit, None if cfg.full else "student"
    net = copy.deepcopy(frozen).float().requires_grad_(True) if cfg.full else frozen
    if cfg.full and cfg.init == "merge":
        adapters.average_weights(net, frozen, list(teachers.values()))
    for task, teacher in teachers.items():
        if "net" not in teacher:
            frozen.add_adapter(task, teacher["r"], teacher["alpha"], teacher["tensors"])
    if not cfg.full:
        torch.manual_seed(cfg.seed)
        cold = models.merge_adapters(list(teachers.values())) if cfg.init == "merge" else {"r": cfg.lora_r, "alpha": cfg.lora_alpha, "tensors": None}
        net.add_adapter(me, cold["r"], cold["alpha"], cold["tensors"], trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        util.compile_blocks(net)
    student = util.distribute(net, cfg.full)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)
    taught_by = {task: teacher["net"].fingerprint if "net" in teacher else models.fingerprint(teacher["tensors"]) for task, teacher in teachers.items()}
    settings, first = {**asdict(cfg), "teachers": taught_by, "world_size": world_size}, 0
    state = util.resume(folder / "state.pt", settings, model.fingerprint)
    if state:
        first = state["iter"]
        util.restore(state, net, opt)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    times = schedule(cfg.steps).to(device)
    supervised = range(*cfg.noisy)
    prompts, images = cfg.batch // cfg.group, cfg.batch // world_size        # prompts over all ranks, images on this one
    log = util.Log(folder, rank, settings, first)

    def draw(it):
        """The prompts of an iteration: the same list on every rank."""
        rng = np.random.default_rng((cfg.seed, it))
        return [world.draw_prompt(rng, pattern[(it * prompts + j) % len(pattern)], "train") for j in range(prompts)]

    def save(name):
        task = "+".join(teachers)
        if cfg.full:
            return adapters.save_whole(folder / f"{name}.safetensors", util.weights(net), model.file, rank, task=task)
        return adapters.save_adapter(folder / f"{name}.pt", rank, task=task, anchor=False, base=model.fingerprint, r=cold["r"], alpha=cold["alpha"],
                                     tensors=net.adapter(me), settings=settings)

    model.text.prepare([meta["prompt"] for it in range(first, cfg.iters) for meta in draw(it)], rank, world_size)
    util.barrier()
    if not state:
        save("init")

    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, desc=cfg.name, disable=rank > 0):
        start = time.time()
        # 1. Prompts: each rank takes its own part of the images.
        metas = draw(it)
        mine = util.share(cfg.batch, cfg.updates, rank, world_size)          # indices into the batch of all ranks
        metas = [metas[i // cfg.group] for i in mine]
        text = encode(model.text, [m["prompt"] for m in metas])

        # 2. Rollout: on policy, the student's own SDE.
        noise = draw_noise([(cfg.seed, it, i) for i in mine], cfg.steps, model.latent_shape()).to(device)
        minibatches = [rows.split(cfg.micro) for rows in torch.arange(images, device=device).chunk(cfg.updates)]
        pieces = [i for part in minibatches for i in part]
        with autocast:
            trajs = [rollout(net, noise[i], times, text.rows(i), cfg.guidance, me, cfg.rollout, cfg.a, supervised) for i in pieces]
        traj = Trajectory(*(torch.cat(parts) for parts in zip(*trajs)))

        # 3. Targets: at every visited state, the velocity of the prompt's own teacher (hard routing), and of the anchor.
        routed = torch.tensor([names.index(m["task"]) for m in metas], device=device)                        # (B,), index into names
        v_teacher = torch.empty(images, cfg.steps, *model.latent_shape(), device=device)                     # (B, K, C, H, W)
        v_anchor = torch.empty_like(v_teacher) if anchor else None
        with torch.no_grad(), autocast:
            for i, k in product(pieces, supervised):
                x, t, sub = traj.x[i, k], times[k].expand(len(i)), text.rows(i)
                v_teacher[i, k] = routed_velocity(teachers, frozen, routed[i], x, t, sub, cfg.guidance)
                if anchor:
                    v_anchor[i, k] = routed_velocity(teachers, frozen, torch.full_like(routed[i], names.index(anchor)), x, t, sub, cfg.guidance)

        # 4. Update: pull each supervised step of each trajectory towards its teacher's, and a little towards the anchor's.
        kls, mar, grad_norm = torch.zeros(images, cfg.steps, device=device), torch.zeros(images, cfg.steps, device=device), 0.0
        for group in opt.param_groups:
            group["lr"] = cfg.lr * (1 - it / cfg.iters)
        for part in minibatches:
            states = list(product(part, supervised))
            for n, (i, k) in enumerate(states):
                with util.no_sync(student, skip=n < len(states) - 1), autocast:
                    x, t, t_next = traj.x[i, k], times[k].expand(len(i)), times[k + 1]
                    v = velocity(student, x, t, text.rows(i), cfg.guidance, me).float()
                    kl = objective(v, v_teacher[i, k], x, t, t_next, cfg.rollout, cfg.a, times[1])           # (B,)
                    loss = kl
                    if anchor:                                               # MAR: + lam KL(student || anchor), whatever the prompt's task
                        kl_anchor = opd_kl(v, v_anchor[i, k], x, t, t_next, cfg.rollout, cfg.a, times[1])    # (B,)
                        loss = kl + cfg.lam * kl_anchor
                        mar[i, k] = kl_anchor.detach()
                    (loss.sum() / (images // cfg.updates * len(supervised))).backward()                      # DDP averages over ranks
                kls[i, k] = kl.detach()
            grad_norm = util.clip(params)
            util.finite(grad_norm, it)
            opt.step()
            opt.zero_grad()

        # 5. Log and save.
        kls, mar, routed = util.gather(kls)[:, list(supervised)], util.gather(mar)[:, list(supervised)], util.gather(routed)
        by_task = {f"kl_{name}": kls[routed == n].mean().item() for n, name in enumerate(names) if (routed == n).any()}
        seconds = time.time() - start
        log({"iter": it + 1, "kl": kls.mean().item(), **by_task, "kl_first": kls[:, 0].mean().item(), "kl_last": kls[:, -1].mean().item(),
             "kl_anchor": mar.mean().item(), "grad_norm": grad_norm, "s/it": seconds, "images/s": cfg.batch / seconds})
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters:
            util.save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings, base=model.fingerprint)

    path = save("student")
    if rank == 0:
        print(f"wrote {path} (cold start: {path.with_stem('init')})")


if __name__ == "__main__":
    util.run(main, Config, presets=PRESETS)
