"""
Stage 2: Flow-OPD. One student learns from all teachers, on the states it visits itself.

    python train_opd.py --teachers ckpt/*.pt                                  # -> runs/opd/student.pt
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train_opd.py --teachers ckpt/*.pt       # two CPU cores
    torchrun --nproc_per_node=8 train_opd.py --teachers ckpt/*.pt             # eight GPUs
    torchrun --nproc_per_node=8 train_opd.py --model stable-diffusion-3.5-medium --teachers geneval=DIR ocr=DIR quality=DIR --anchor quality   # SD3.5

A run that was stopped goes on where it was when the same command is given again. All it writes is in runs/NAME/.

One iteration: the student samples trajectories; each prompt's teacher (by task), and the quality teacher as an anchor, say at the visited
states where they would have gone; the student's step is pulled there. No image is scored.

What "pulled" should mean is where the paper, its code and its followers differ. Fix a state x; the student goes to x_next ~ p_S(.|x), a Gaussian,
the teacher's is p_T with the same variance, and D = KL(p_S || p_T) = w |v_S - v_T|^2 is known in closed form. Then

    objective               loss at x, or A in -ratio A ("sg" stops the gradient)  its expected gradient
    kl                      D                                                      grad D, without any variance at x
    velocity                |v_S - v_T|^2                                          grad D / w: the same pull, early steps weigh more
    pg, dense, step         A = sg(-D) (the paper's text)                          0 while the ratio is 1: Adam walks on noise
    pg, sampled, step       A = sg(log p_T(x_next) - log p_S(x_next))              grad D, plus noise
    pg, sampled, future     A = the sum of those over this and later steps         grad KL of the whole supervised window
    pg, dense, future       A = sg(-sum of D over this and later steps)            that gradient less its direct part, the sum of grad D
    released                A = -D dt, not stopped (the released code)             dt grad D, plus noise

Why. (1) E[grad log p_S(x_next|x)] = grad of the integral of p_S = grad 1 = 0, so what does not depend on x_next, as D(x), is multiplied with 0 on
average. (2) grad D = grad E[log p_S - log p_T] = E[(log p_S - log p_T) grad log p_S] + E[grad log p_S], and the last is 0: the sampled form. (3) A
trajectory's log ratio is the sum over its steps; past steps' are constants to the later action, so of the sum only this and later steps' stay: the KL of
the window, given the state it starts from. Taking the expectation of each later one at its own state turns it into D there: dense and future, plus grad D
at this state itself. (4) w = dt / 2 (sigma_t (1 - t) / (2 t)
+ 1 / sigma_t)^2 with sigma_t = a sqrt(t / (1 - t)): as the noise a goes to 0, w -> dt (1 - t) / (2 a^2 t). An ODE rollout has no density, but its states can
be weighed like that (here: with the SDE's w at --a). Either way w grows hundreds of times towards the last step, and so does its say in the sum.
(5) All numbers here are averages over the N latent elements, so a pg's product of two of them has 1/N of the gradient above, and of that 1 - 1/G is left by
the group's mean (a baseline, not in the paper's text; --group 1 is without): the same direction, but beside it --lam weighs N / (1 - 1/G) times as much;
beside velocity it weighs w times, beside released 1 / dt times what it does beside kl.
tests/test_objectives.py shows all this on a linear-Gaussian policy, where every expectation is known.

--init, the cold start: merge (the exact average of the teachers), truncate (that, cut to --lora-r), factors (A and B averaged apart, as released), none (the
base), or a checkpoint such as train_sft.py's. --match: the guided outputs of both; both their branches, with and without the prompt; or fold, the
student's conditional branch with the teacher's guided output, so that the student then needs no guidance (eval.py --guidance 1).

Papers: Flow-OPD arXiv 2605.08063; sampled: Thinking Machines 2025; closed form: DiffusionOPD arXiv 2605.15055; one state, velocity: DanceOPD arXiv
2606.27377; both branches: PDM arXiv 2607.24731; folding, extrapolation: GFD-OPD (2026).
"""
import copy
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import adapters
import model as models
import util
from prompts import check_prompts, read_ratio, world_of
from sampler import Trajectory, branches, draw_noise, encode, gaussian_kl, log_prob, rollout, schedule, step, velocity


@dataclass
class Config:
    teachers: list[str] = field(default_factory=list)                    # one a task, PATH or TASK=PATH, in any form that adapters.py reads
    model: str = "ckpt/tiny.safetensors"                                 # the base, the same for all: the tiny world's file, or SD3.5's folder or hub name
    prompts: list[str] = field(default_factory=list)                     # TASK=DIR: that folder's prompts (prompts.py) instead of the world's own
    anchor: str = ""                                                     # the task whose teacher anchors all prompts (default: the file marked so)
    ratio: list[str] = field(default_factory=list)                       # prompts of each task (default: the world's, e.g. geneval=3 ocr=1 quality=1)
    init: str = "merge"                                                  # cold start: merge, truncate, factors, none, or a checkpoint (see above)
    objective: Literal["kl", "velocity", "pg", "released"] = "kl"        # the per-step loss, see above
    reward: Literal["dense", "sampled"] = "dense"                        # for pg: of a step
    credit: Literal["step", "future"] = "step"                           # for pg: a step's own reward, or that of all supervised later steps too
    clip: float = 1e-4                                                   # for pg and released: PPO's clip range (look at clip_frac if there are --updates)
    match: Literal["guided", "branches", "fold"] = "guided"              # which outputs of student and teacher (see above)
    extrapolate: float = 1.0                                             # target = base + this * (teacher - base): beyond the teacher if above 1
    blend: float = 0.0                                                   # target = (1 - this) * own teacher + this * mean of the others: 0 is hard routing
    lam: float = 0.02                                                    # weight of the KL to the anchor (MAR), see (5); 0 turns it off
    name: str = "opd"                                                    # run name
    iters: int = 100                                                     # iterations, each one rollout of `batch` images
    batch: int = 64                                                      # trajectories an iteration, over all ranks
    group: int = 4                                                       # G, trajectories a prompt
    steps: int = 8                                                       # K, steps of a rollout
    noisy: list[int] = field(default_factory=lambda: [0, 5])             # steps FROM TO (exclusive) that take noise; the rest are ODE
    supervised: list[int] = field(default_factory=list)                  # steps FROM TO (exclusive) whose states are supervised (default: the noisy ones)
    one: bool = False                                                    # of those only one a trajectory, drawn towards low noise: Beta(5, 2)
    rollout: Literal["sde", "cps", "ode"] = "sde"                        # how noise is added; ode: not at all
    a: float = 0.7                                                       # noise level
    guidance: float = 1.0                                                # w, in rollouts, student and teachers alike
    lora_r: int | None = None                                            # LoRA rank of the student, for --init none and truncate (a merge's ranks add up)
    lora_alpha: float | None = None                                      # LoRA scale is alpha / r, for --init none and truncate
    full: bool = False                                                   # the student is a whole transformer instead of an adapter
    lr: float = 3e-3                                                     # AdamW, decays linearly to zero
    updates: int = 4                                                     # optimiser steps a rollout, each on its share of the batch
    micro: int = 96                                                      # images a forward pass, in rollouts, targets and updates (memory)
    checkpointing: bool = False                                          # keep fewer activations and compute them again (memory)
    size: int | None = None                                              # side of the images in pixels (default: the tiny world's 32)
    t5: str = ""                                                         # SD3.5's T5: 128 or 256 tokens, or zeros (left out)
    dtype: Literal["float32", "bfloat16"] = "float32"                    # of weights that do not learn
    keep: int = 0                                                        # also write the student every so many iterations, as student-ITER
    save_every: int = 10                                                 # iterations between resumable states
    compile: bool = False                                                # torch.compile the blocks
    seed: int = 0                                                        # of everything
    device: str = "auto"                                                 # auto, cuda, mps, cpu


# Defaults that --model changes. For SD3.5 they are the released ones (preset mix_opd_8gpu); iters is ours and untried.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5, batch=256, group=16, updates=2,
                       lr=1e-4, micro=4, iters=300)}


# ------------------------------------------------------------------ the objectives, side by side: (B,) losses at B states


class State(NamedTuple):
    """What the student did at B visited states: x -> x_next (B, C, H, W), from t to t_next (B,); of its own time, what an advantage needs."""
    x: torch.Tensor
    x_next: torch.Tensor
    t: torch.Tensor
    t_next: torch.Tensor
    t_second: torch.Tensor   # the schedule's second time
    kind: str                # of density: sde or cps
    a: float                 # noise level
    logp: torch.Tensor       # (B,) log p_S(x_next|x) in the rollout
    adv: torch.Tensor        # (B,), for pg


def gaussian(v, s):
    """(mean, std) of the step from the states s under velocity v (or under both branches', side by side)."""
    return step(s.kind, torch.cat([s.x] * (v.shape[1] // s.x.shape[1]), 1), v, s.t, s.t_next, s.a, s.t_second)


def kl(v, v_target, s, cfg=None):
    """D = KL(student || target) = |mean_S - mean_T|^2 / (2 std^2) = w(t) |v_S - v_T|^2, nats per latent element. The mean is affine in v."""
    mean, std = gaussian(v, s)
    return gaussian_kl(mean, gaussian(v_target, s)[0], std)


def velocity_loss(v, v_target, s, cfg):
    """|v_S - v_T|^2 without w(t), averaged over elements: DanceOPD's."""
    return ((v - v_target) ** 2).flatten(1).mean(1)


def likelihood_ratio(v, s):
    """p_S(x_next|x) now over what it was in the rollout: 1 before the first update."""
    return (log_prob(s.x_next, *gaussian(v, s)) - s.logp).exp()


def pg(v, v_target, s, cfg):
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A), Flow-OPD eq. 9 as printed. The advantage A (step_reward, credited) is a number, not a function of v."""
    ratio = likelihood_ratio(v, s)
    return -torch.min(ratio * s.adv, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * s.adv)


def released(v, v_target, s, cfg):
    """The same with A = -D of this very forward, through which the gradient flows too: grad D plus noise. As released, D is divided by sigma_t^2
    instead of sigma_t^2 dt, and is (B, 1) beside a ratio (B,): so each image gets the mean of its micro-batch, and --micro is part of the loss."""
    ratio = likelihood_ratio(v, s)
    A = -(kl(v, v_target, s) * (s.t - s.t_next))[:, None]
    return -torch.min(ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A).mean(0)


OBJECTIVES = {"kl": kl, "velocity": velocity_loss, "pg": pg, "released": released}
SURROGATES = ("pg", "released")                                              # those with a ratio


def step_reward(v, v_target, s, cfg):
    """The reward of B steps for pg, no gradient: (B,). dense: -D(x), whatever x_next was; sampled: log p_T(x_next|x) - log p_S(x_next|x)."""
    if cfg.reward == "dense":
        return -kl(v, v_target, s)
    return log_prob(s.x_next, *gaussian(v_target, s)) - log_prob(s.x_next, *gaussian(v, s))


def credited(reward, group, credit):
    """reward (B, S), steps in order -> adv (B, S): each step's own, or the sum of its own and all later ones; less the mean of the group at that step.

    The group's mean is a baseline: the other trajectories' part of it changes nothing on average, its own 1/G shrinks the gradient to 1 - 1/G of it.
    With --one the group's states are at different steps: a baseline still, and a worse one.
    """
    adv = reward.flip(1).cumsum(1).flip(1) if credit == "future" else reward
    return adv - adv.view(-1, group, adv.shape[1]).mean(1).repeat_interleave(group, 0) if group > 1 else adv


# ------------------------------------------------------------------ states and targets


def choose(cfg, it, mine):
    """Which steps' states are supervised: ks (B, S), in order. All of the window, or one a trajectory, Beta(5, 2) of the way through it."""
    first, end = cfg.supervised
    if not cfg.one:
        return torch.arange(first, end).expand(len(mine), -1)
    way = [np.random.default_rng((cfg.seed, it, i, 5, 2)).beta(5, 2) for i in mine]      # a trajectory's own draw, whatever the ranks
    return torch.tensor([[first + min(int(u * (end - first)), end - first - 1)] for u in way])


def outputs(net, x, t, text, guidance, match, adapter):
    """What is compared at B states (B, C, H, W): the guided output or, to match branches, the unconditional and the conditional one (B, 2 C, H, W)."""
    if match == "branches":
        return torch.cat(branches(net, x, t, text, adapter), 1).float()
    return velocity(net, x, t, text, guidance, adapter).float()


def routed_outputs(teachers, frozen, routed, x, t, text, guidance, match):
    """outputs of each image's own teacher. routed (B,): index into teachers.

    Teachers that are adapters share one base and one forward; one that is a whole transformer runs on its own images.
    """
    shared, v = [task for task, teacher in teachers.items() if "net" not in teacher], None
    for net, tasks in [(frozen, shared)] + [(teacher["net"], [task]) for task, teacher in teachers.items() if "net" in teacher]:
        theirs = torch.tensor([list(teachers).index(task) for task in tasks], device=x.device)
        rows, index = (routed[:, None] == theirs).nonzero(as_tuple=True)     # whose teacher is among these, and which one it is
        if len(rows):
            part = outputs(net, x[rows], t[rows], text.rows(rows), guidance, match, models.Route(tasks, index) if net is frozen else None)
            v = part.new_empty(len(x), *part.shape[1:]) if v is None else v
            v[rows] = part
    return v


def target(cfg, teachers, frozen, routed, x, t, text):
    """Where the B states should go: the own teacher's outputs (hard routing), blended with the others', extrapolated away from the base."""
    def of(routed):
        return routed_outputs(teachers, frozen, routed, x, t, text, cfg.guidance, cfg.match)

    v, K = of(routed), len(teachers)
    if cfg.blend:                        # v_target = sum_k alpha_k v_k, sum alpha = 1
        v = (1 - cfg.blend) * v + cfg.blend * sum(of((routed + k) % K) for k in range(1, K)) / (K - 1)
    if cfg.extrapolate != 1:             # Gaussians of one variance: p_T^e p_base^(1 - e) is one again, with this mean, so with this v
        base = outputs(frozen, x, t, text, cfg.guidance, cfg.match, None)
        v = base + cfg.extrapolate * (v - base)
    return v


def check(cfg, world_size, world):
    """All else that can be known to be wrong before any time is spent: numbers, and combinations that make no sense."""
    if not cfg.full and cfg.init in ("none", "truncate"):
        r, alpha = world.LORA
        cfg.lora_r, cfg.lora_alpha = r if cfg.lora_r is None else cfg.lora_r, alpha if cfg.lora_alpha is None else cfg.lora_alpha
    elif cfg.lora_r is not None or cfg.lora_alpha is not None:
        raise ValueError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: are for an adapter from --init none or truncate; others keep the rank they have")
    util.positive(cfg, "iters", "batch", "group", "steps", "a", "lr", "updates", "micro", "save_every", "clip", "extrapolate", "lora_r", "lora_alpha")
    if cfg.blend >= 1:
        raise ValueError(f"--blend {cfg.blend}: the part of the other teachers in the target; expected 0 <= blend < 1")
    cfg.supervised = cfg.supervised or (list(cfg.noisy) if cfg.rollout != "ode" else [0, cfg.steps])
    util.check_rollout(cfg, world_size)
    if len(cfg.supervised) != 2 or not 0 <= cfg.supervised[0] < cfg.supervised[1] <= cfg.steps:
        raise ValueError(f"--supervised {cfg.supervised}: expected FROM TO with 0 <= FROM < TO <= --steps {cfg.steps}")
    inside = cfg.rollout != "ode" and cfg.noisy[0] <= cfg.supervised[0] and cfg.supervised[1] <= cfg.noisy[1]
    surrogate = cfg.objective in SURROGATES
    for nonsense, reason in (
            (surrogate and not inside, f"--objective {cfg.objective} --rollout {cfg.rollout} --noisy {cfg.noisy} --supervised {cfg.supervised}: a policy gradient "
             "needs a density at every supervised step, so noise"),
            (surrogate and cfg.match == "branches", f"--objective {cfg.objective} --match branches: the density is of the guided output, not of its branches"),
            (cfg.match != "guided" and cfg.guidance == 1, f"--match {cfg.match} --guidance 1: without guidance there is one branch, nothing to match or fold"),
            (cfg.objective != "pg" and (cfg.reward, cfg.credit) != ("dense", "step"), f"--reward {cfg.reward} --credit {cfg.credit}: are for --objective pg"),
            (cfg.credit == "future" and (cfg.one or cfg.supervised[1] - cfg.supervised[0] == 1),
             f"--credit future --one {cfg.one} --supervised {cfg.supervised}: there are no later supervised steps to credit"),
            (cfg.rollout == "cps" and cfg.supervised[1] == cfg.steps, f"--rollout cps --supervised {cfg.supervised}: its last step has no noise, so no KL")):
        if nonsense:
            raise ValueError(reason)


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    world = world_of(models.world_name(cfg.model), cfg.prompts)
    check(cfg, world_size, world)
    model = models.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5)
    teachers = adapters.read_teachers(cfg.teachers, model, world)
    anchor = adapters.find_anchor(cfg.anchor, cfg.lam, teachers)
    ratio = read_ratio(cfg.ratio, teachers, world.RATIO)
    pattern = [task for task, n in ratio.items() for _ in range(n)]
    check_prompts(world, set(pattern))
    folder, names, objective, surrogate = Path("runs") / cfg.name, list(teachers), OBJECTIVES[cfg.objective], cfg.objective in SURROGATES

    # Teachers and anchor: adapters on one frozen base (or whole transformers beside it). The student: one more adapter, from a cold start;
    # with --full a whole transformer of its own.
    frozen, me = model.mmdit, None if cfg.full else "student"
    if cfg.blend and len(teachers) == 1:
        raise ValueError(f"--blend {cfg.blend}: there is one teacher, so none to blend it with")
    net = copy.deepcopy(frozen).float().requires_grad_(True) if cfg.full else frozen
    torch.manual_seed(cfg.seed)
    cold = adapters.cold_start(cfg, net, frozen, list(teachers.values()))
    taught_by = adapters.attach(teachers, frozen)
    if not cfg.full:
        net.add_adapter(me, cold["r"], cold["alpha"], cold["tensors"], trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        util.compile_blocks(net)
    student = util.distribute(net, cfg.full)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)
    settings, first = {**asdict(cfg), "teachers": taught_by, "world_size": world_size}, 0
    state = util.resume(folder / "state.pt", settings, model.fingerprint)
    if state:
        first = state["iter"]
        util.restore(state, net, opt)
        state.clear()                                                        # with --full it is 30 GB
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    times = schedule(cfg.steps).to(device)
    noisy, density = range(*cfg.noisy) if cfg.rollout != "ode" else range(0), "sde" if cfg.rollout == "ode" else cfg.rollout
    w = 1.0 if cfg.match == "fold" else cfg.guidance                         # the student's guidance; the teachers' is cfg.guidance
    prompts, images = cfg.batch // cfg.group, cfg.batch // world_size        # prompts over all ranks, images on this one
    latents = model.latent_shape()                                           # (C, H, W)
    quality = teachers[anchor].get("net") if anchor else None                # the anchor, if it is a whole transformer of its own
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
    if state is None:
        save("init")

    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, desc=cfg.name, disable=rank > 0):
        start = time.time()
        # 1. Prompts: each rank takes its own part of the images.
        metas = draw(it)
        mine = util.share(cfg.batch, cfg.updates, rank, world_size)          # indices into the batch of all ranks
        metas = [metas[i // cfg.group] for i in mine]
        text = encode(model.text, [m["prompt"] for m in metas])

        # 2. Rollout: on policy, by the student itself; and which of its states are supervised.
        noise = draw_noise([(cfg.seed, it, i) for i in mine], cfg.steps, latents).to(device)
        minibatches = [rows.split(cfg.micro) for rows in torch.arange(images, device=device).chunk(cfg.updates)]
        pieces = [i for part in minibatches for i in part]
        with autocast:
            trajs = [rollout(net, noise[i], times, text.rows(i), w, me, cfg.rollout, cfg.a, noisy) for i in pieces]
        traj = Trajectory(*(torch.cat(parts) for parts in zip(*trajs)))
        ks = choose(cfg, it, mine).to(device)                                                                # (B, S) step numbers
        S, shape = ks.shape[1], (images, ks.shape[1])

        def at(i, j):
            """The j-th supervised state of the trajectories i."""
            k = ks[i, j]
            return State(traj.x[i, k], traj.x[i, k + 1], times[k], times[k + 1], times[1], density, cfg.a, traj.logp[i, k], adv[i, j])

        # 3. Targets: at every supervised state, by the prompt's own teacher (routing), and by the anchor. For pg, the advantage of the step.
        routed = torch.tensor([names.index(m["task"]) for m in metas], device=device)                        # (B,), index into names
        v_target = torch.empty(*shape, latents[0] * (2 if cfg.match == "branches" else 1), *latents[1:], device=device)
        v_anchor, adv, reward = torch.empty_like(v_target) if anchor else None, torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        with torch.no_grad(), autocast:
            for i, j in product(pieces, range(S)):
                s, sub = at(i, j), text.rows(i)
                v_target[i, j] = target(cfg, teachers, frozen, routed[i], s.x, s.t, sub)
                if anchor:
                    v_anchor[i, j] = outputs(quality or frozen, s.x, s.t, sub, cfg.guidance, cfg.match, None if quality else anchor)
                if cfg.objective == "pg":
                    reward[i, j] = step_reward(traj.v[i, ks[i, j]], v_target[i, j], s, cfg)
        adv = credited(reward, cfg.group, cfg.credit)

        # 4. Update: pull each supervised step of each trajectory towards its teacher's, and a little towards the anchor's.
        kls, mar, ratios, grad_norm = torch.zeros(shape, device=device), torch.zeros(shape, device=device), torch.ones(shape, device=device), 0.0
        for group in opt.param_groups:
            group["lr"] = cfg.lr * (1 - it / cfg.iters)
        for part in minibatches:
            states = list(product(part, range(S)))
            for n, (i, j) in enumerate(states):
                with util.no_sync(student, skip=n < len(states) - 1), autocast:
                    s = at(i, j)
                    v = outputs(student, s.x, s.t, text.rows(i), w, cfg.match, me)
                    loss = objective(v, v_target[i, j], s, cfg)                                              # (B,)
                    if anchor:                                               # MAR: + lam KL(student || anchor), whatever the prompt's task
                        kl_anchor = kl(v, v_anchor[i, j], s)
                        loss, mar[i, j] = loss + cfg.lam * kl_anchor, kl_anchor.detach()
                    (loss.sum() / (images // cfg.updates * S)).backward()                                    # DDP averages over ranks
                kls[i, j] = kl(v.detach(), v_target[i, j], s)
                if surrogate:
                    ratios[i, j] = likelihood_ratio(v.detach(), s)
            grad_norm = util.clip(params)
            util.finite(grad_norm, it)
            opt.step()
            opt.zero_grad()

        # 5. Log and save.
        kls, mar, routed = util.gather(kls), util.gather(mar), util.gather(routed)
        by_task = {f"kl_{name}": kls[routed == n].mean().item() for n, name in enumerate(names) if (routed == n).any()}
        clipped = util.ratio_stats(ratios, cfg.updates, cfg.clip) if surrogate else {}
        seconds = time.time() - start
        log({"iter": it + 1, "kl": kls.mean().item(), **by_task, "kl_first": kls[:, 0].mean().item(), "kl_last": kls[:, -1].mean().item(),
             "kl_anchor": mar.mean().item(), **clipped, "grad_norm": grad_norm, "s/it": seconds, "images/s": cfg.batch / seconds})
        if cfg.keep and (it + 1) % cfg.keep == 0:
            save(f"student-{it + 1}")
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters:
            util.save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings, base=model.fingerprint)

    path = save("student")
    if rank == 0:
        print(f"wrote {path} (cold start: {path.with_stem('init')})")


if __name__ == "__main__":
    util.run(main, Config, presets=PRESETS)
