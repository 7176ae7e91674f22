"""
Stage 2: Flow-OPD. One student learns from all teachers, on the states that it visits itself.

    python train_opd.py --teachers ckpt/*.pt                                # -> runs/opd/student.pt
    torchrun --nproc_per_node=2 train_opd.py --teachers ckpt/*.pt           # OMP_NUM_THREADS=1
    torchrun --nproc_per_node=8 train_opd.py --teachers ckpt/*.pt           # eight GPUs
    torchrun --nproc_per_node=8 train_opd.py --model stable-diffusion-3.5-medium \\
        --teachers geneval=DIR ocr=DIR quality=DIR --anchor quality         # SD3.5

A run that was stopped goes on where it was when the same command is given again. All that it
writes is in runs/NAME/.

One iteration: the student samples trajectories. At every supervised state that it visited, the
prompt's own teacher says where it would go next. So does one more teacher, the anchor, whatever
the prompt. The loss pulls the student's step there. No image is scored.

How to pull is where the paper, its code and its followers differ. Fix a state x. The student goes
to x_next ~ p_S(.|x), a Gaussian. The teacher's p_T has the same variance, so D = KL(p_S || p_T) is
known in closed form: D = w(t) |v_S - v_T|^2. The objectives are losses at this x. No gradient flows
through x or v_T; "sg" stops the gradient too:

    objective               the loss, or A in -ratio A                  its expected gradient
    kl                      D                                           grad D, no variance at x
    velocity                |v_S - v_T|^2                               grad D / w(t)
    pg, dense, step         A = sg(-D), the paper's text                0 while the ratio is 1
    pg, sampled, step       A = sg(log p_T(x_next) - log p_S(x_next))   grad D, plus noise
    pg, sampled, future     A = the sum of those from this step on      grad KL of the whole window
    pg, dense, future       A = sg(-the sum of D from this step on)     that minus the sum of grad D
    released                A = -D dt, not stopped, the released code   dt grad D, plus noise

docs/method.md derives this table, and tests/test_objectives.py shows it on a policy whose
expectations are known.

Papers: Flow-OPD arXiv 2605.08063; sampled: Thinking Machines 2025; closed form: DiffusionOPD arXiv
2605.15055; one state, velocity: DanceOPD arXiv 2606.27377; both branches: PDM arXiv 2607.24731;
folding, extrapolation: GFD-OPD arXiv 2609.39692.
"""
import copy
import time
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoints.cold_start import cold_start, cold_start_whole
from checkpoints.formats import save_trained, split_label
from checkpoints.teachers import attach, find_anchor, read_teachers
from model import Route
from plumbing import cli, dist
from plumbing.log import Log
from plumbing.state import restore, resume, save_state
from sampler import (
    Policy,
    Sampler,
    check_window,
    clipped,
    draw_noise,
    encode,
    kl,
    likelihood_ratio,
    log_prob,
    ratio_summary,
    schedule,
    visited,
)
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
    # TASK=DIR: the task's prompts come from this folder, not from the world (worlds/prompts.py).
    prompts: list[str] = field(default_factory=list)
    # TASK=N: the share of each task in the prompts, e.g. geneval=3 ocr=1 quality=1 (default: the
    # world's).
    ratio: list[str] = field(default_factory=list)
    # How tasks take turns. batch: prompt by prompt; alternate: iteration by iteration, as released.
    mix: Literal["alternate", "batch"] = "batch"
    # The task whose teacher anchors all prompts (default: the teacher that is marked so).
    anchor: str = ""
    # Name of the run.
    name: str = "opd"

    # --- rollout
    # Number of iterations. Each has one rollout of --batch images.
    iters: int = 100
    # Images per iteration, over all ranks.
    batch: int = 64
    # Images per prompt (G).
    group: int = 4
    # Steps of a rollout (K).
    steps: int = 8
    # Steps FROM TO (exclusive) that take noise. The others follow the ODE.
    noisy: list[int] = field(default_factory=lambda: [0, 5])
    # Steps FROM TO (exclusive) whose states are supervised (default: the noisy ones).
    supervised: list[int] = field(default_factory=list)
    # Supervise only one of these steps per trajectory. Beta(5, 2) draws it, mostly at low noise.
    one: bool = False
    # How a noisy step adds noise: sde (Flow-GRPO) or cps. With ode no step does.
    rollout: Literal["sde", "cps", "ode"] = "sde"
    # Noise level.
    a: float = 0.7
    # Guidance scale, in rollouts and updates, of student and teachers alike.
    guidance: float = 1.0

    # --- student
    # Cold start. merge: the exact average of the teachers; truncate: that, cut to --lora-r;
    # factors: A and B averaged apart, as released; none: the base; or a checkpoint (train_sft.py).
    init: str = "merge"
    # Rank of the LoRA, for --init none and truncate. The ranks of a merge add up.
    lora_r: int | None = None
    # Alpha of the LoRA, for --init none and truncate. Its scale is alpha / r.
    lora_alpha: float | None = None
    # Train the whole transformer instead of an adapter.
    full: bool = False

    # --- loss
    # The loss at a state: one of OBJECTIVES, see above.
    objective: str = "kl"
    # For pg: the reward of a step. dense is -D, sampled is log(p_T / p_S) at the sampled x_next.
    step_reward: Literal["dense", "sampled"] = "dense"
    # For pg: a step's own reward, or that of all supervised later steps too.
    credit: Literal["step", "future"] = "step"
    # For pg and released: clip range of PPO. With --updates above 1, watch clip_frac in the log.
    clip: float = 1e-4
    # What is compared. guided: the guided velocities; branches: those with and without the prompt;
    # fold: the student's with the prompt and the teacher's guided one. The student then needs no
    # guidance (eval.py --guidance 1).
    match: Literal["guided", "branches", "fold"] = "guided"
    # Target = base + this * (teacher - base): beyond the teacher if above 1.
    extrapolate: float = 1.0
    # Target = (1 - this) * own teacher + this * mean of the others. 0 is hard routing.
    blend: float = 0.0
    # Weight of the KL to the anchor (MAR, manifold anchor regularization). 0 turns it off.
    lam: float = 0.02

    # --- optimiser
    # Learning rate of AdamW (default: by world, and lower with --full; see LR in this file).
    # It decays linearly to zero.
    lr: float | None = None
    # Optimiser steps per rollout, each on an equal share of the batch.
    updates: int = 4
    # Images per forward pass, in rollouts and updates. Fewer need less memory.
    micro: int = 96

    # --- machine
    # Save memory: keep fewer activations, and compute them again in the backward pass.
    checkpointing: bool = False
    # Side of the images in pixels (default: 32 in the tiny world).
    size: int | None = None
    # Tokens of SD3.5's T5: 128 or 256. The word zeros leaves T5 out.
    t5: str = ""
    # Dtype of the weights that do not learn.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Also write the student every KEEP iterations, as runs/NAME/student-ITER (0: never).
    keep: int = 0
    # Iterations between resumable states.
    save_every: int = 10
    # Compile the blocks of the transformer with torch.compile.
    compile: bool = False
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


# Defaults that follow from --model. For SD3.5 these are the released ones (preset mix_opd_8gpu):
# size, T5, steps, guidance, 16 groups of 16, two updates, rate, micro, tasks that alternate.
# DEVIATION: ours are iters (untried), lam (0.02, the text; they have 0.04), no weight decay (1e-4),
# a rate that decays (theirs is constant), and the merge, so rank 96 (theirs starts from the base,
# rank 32: --init none).
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5,
                       batch=256, group=16, updates=2, micro=4, mix="alternate", iters=300,
                       save_every=5)}
# Learning rates: (world, --full) -> default. A whole transformer takes a lower one; ours, untuned.
LR = {("tiny", False): 3e-3, ("tiny", True): 1e-4, ("sd3", False): 1e-4, ("sd3", True): 1e-5}

# ------------------------------------------------------------------ the objectives, side by side


def velocity_loss(v, s, cfg):
    """|v_S - v_T|^2 without w(t), averaged over elements: DanceOPD's."""
    return ((v - s.v_target) ** 2).flatten(1).mean(1)


def pg(v, s, cfg):
    """Flow-OPD eq. 9 as printed. The advantage (see credit_steps) does not depend on v."""
    return clipped(likelihood_ratio(v, s), s.adv, cfg.clip)


def released(v, s, cfg):
    """Like pg, but A = -D of this same forward pass, and the gradient flows through A too.

    As released, D is divided by sigma_t^2 instead of sigma_t^2 dt. A is (b, 1) and the ratio (b,),
    so each image gets the mean over its micro-batch. So --micro is part of the loss.
    """
    ratio = likelihood_ratio(v, s)
    adv = -(kl(v, s.v_target, s) * s.dt)[:, None]
    return clipped(ratio, adv, cfg.clip).mean(0)


# name -> the loss (b,) of velocities v (b, C, H, W) at a State s of b images.
# DEVIATION: the default is the KL itself, which the paper's text puts, detached, into pg.
OBJECTIVES = {"kl": lambda v, s, cfg: kl(v, s.v_target, s),
              "velocity": velocity_loss,
              "pg": pg,
              "released": released}
SURROGATES = ("pg", "released")                     # those with a ratio, which need a density


def checked(name):
    """The objective of this name, plus a check of its result: a mistake would train silently."""
    objective = OBJECTIVES[name]

    def loss(v, s, cfg):
        out = objective(v, s, cfg)
        if out.shape != (len(s.x),) or not out.requires_grad:
            raise ValueError(f"--objective {name}: gave a loss of shape {tuple(out.shape)} with "
                             f"requires_grad {out.requires_grad}, expected ({len(s.x)},), a number "
                             "for each state, and a gradient")
        return out

    return loss


def step_reward(s, kind):
    """The reward of b steps for pg: (b,), without a gradient.

    dense: -D(x), whatever x_next was. sampled: log p_T(x_next|x) - log p_S(x_next|x).
    """
    if kind == "dense":
        return -kl(s.v_old, s.v_target, s)
    logp_target = log_prob(s.x_next, *s.gaussian(s.v_target))
    return logp_target - log_prob(s.x_next, *s.gaussian(s.v_old))


def credited(reward, group, credit):
    """reward (B, S), steps in order -> adv (B, S).

    A step gets its own reward, or the sum of its own and all later ones, minus the mean of its
    group at that step. The mean is a baseline. The other trajectories' part of it changes nothing
    on average. The trajectory's own part, 1/G, shrinks the gradient by the factor 1 - 1/G. With
    --one, the states of a group are at different steps, so the baseline is worse.
    """
    adv = reward
    if credit == "future":
        adv = reward.flip(1).cumsum(1).flip(1)
    if group > 1:
        mean = adv.view(-1, group, adv.shape[1]).mean(1)
        adv = adv - mean.repeat_interleave(group, 0)
    return adv


def credit_steps(states, mine, S, cfg):
    """Give each state its advantage, for pg. mine: this rank's images; S: supervised steps."""
    reward = torch.zeros(len(mine), S, device=states[0].x.device)
    for s in states:
        reward[s.images, s.slot] = step_reward(s, cfg.step_reward)
    everyone = dist.gather_batch(reward, cfg.batch, cfg.updates)    # a group may span ranks
    adv = credited(everyone, cfg.group, cfg.credit)[mine]
    for s in states:
        s.adv = adv[s.images, s.slot]


# ------------------------------------------------------------------ states and targets


def choose(cfg, it, mine):
    """The supervised steps (B, S), in order: the whole window, or with --one S = 1."""
    first, end = cfg.supervised
    if not cfg.one:
        return torch.arange(first, end).expand(len(mine), -1)
    steps = []
    for i in mine:                                  # the same for any number of ranks
        way = np.random.default_rng((cfg.seed, it, i, 5, 2)).beta(5, 2)
        steps.append([first + min(int(way * (end - first)), end - first - 1)])
    return torch.tensor(steps)


class Teachers:
    """Where b states should go: v_target, the velocity of each prompt's own teacher (routing).

    Teachers that are adapters share one base and one forward pass. A teacher that is a whole
    transformer runs on its own images. With cfg.blend the others have a say too, and with
    cfg.extrapolate the target lies beyond the teacher, away from the base.
    """

    def __init__(self, teachers, base, cfg):
        if cfg.blend and len(teachers) == 1:
            raise ValueError(f"--blend {cfg.blend}: there is one teacher, so none to blend it with")
        self.tasks = list(teachers)
        self.cfg = cfg
        self.base = Policy(base, None, cfg.guidance, both=cfg.match == "branches")
        self.whole = {}                             # index into tasks -> its Policy
        self.adapters = []                          # indices into tasks
        for n, teacher in enumerate(teachers.values()):
            if "net" in teacher:
                self.whole[n] = Policy(teacher["net"], None, cfg.guidance, both=self.base.both)
            else:
                self.adapters.append(n)

    def policy(self, task):
        """One teacher as a Policy."""
        n = self.tasks.index(task)
        if n in self.whole:
            return self.whole[n]
        return Policy(self.base.net, task, self.cfg.guidance, both=self.base.both)

    def routed(self, x, t, text, task):
        """The velocity of teacher task[i] at state i. task (b,): index into tasks."""
        parts = []                                  # (rows, the policy of these rows)
        names = [self.tasks[n] for n in self.adapters]
        theirs = torch.tensor(self.adapters, dtype=torch.long, device=x.device)
        rows, index = (task[:, None] == theirs).nonzero(as_tuple=True)
        parts.append((rows, Policy(self.base.net, Route(names, index), self.cfg.guidance,
                                   both=self.base.both)))
        for n, policy in self.whole.items():
            parts.append(((task == n).nonzero()[:, 0], policy))
        v = None
        for rows, policy in parts:
            if len(rows) == 0:
                continue
            its_v = policy(x[rows], t[rows], text.rows(rows))
            if v is None:
                v = its_v.new_empty(len(x), *its_v.shape[1:])
            v[rows] = its_v
        return v

    def __call__(self, x, t, text, task):
        v = self.routed(x, t, text, task)
        n_tasks = len(self.tasks)
        blend = self.cfg.blend
        if blend:                                   # sum_k alpha_k v_k with sum alpha = 1
            others = sum(self.routed(x, t, text, (task + k) % n_tasks) for k in range(1, n_tasks))
            v = (1 - blend) * v + blend * others / (n_tasks - 1)
        if self.cfg.extrapolate != 1:
            # p_T and p_base are Gaussians of equal variance. So p_T^e p_base^(1 - e) is one too,
            # up to a factor, and this velocity gives its mean (e: --extrapolate).
            v_base = self.base(x, t, text)
            v = v_base + self.cfg.extrapolate * (v - v_base)
        return v


# ------------------------------------------------------------------ checks


def check(cfg, world, world_size):
    """ValueError for all that can be known to be wrong before any time is spent.

    It also fills in the defaults that depend on others: lr, supervised, lora_r and lora_alpha.
    """
    if cfg.lr is None:
        cfg.lr = LR.get((world.name, cfg.full), LR["tiny", cfg.full])
    if cfg.objective not in OBJECTIVES:
        raise ValueError(f"--objective {cfg.objective}: expected one of {', '.join(OBJECTIVES)}")
    if not cfg.full and cfg.init in ("none", "truncate"):
        r, alpha = world.lora
        cfg.lora_r = r if cfg.lora_r is None else cfg.lora_r
        cfg.lora_alpha = alpha if cfg.lora_alpha is None else cfg.lora_alpha
    elif cfg.lora_r is not None or cfg.lora_alpha is not None:
        raise ValueError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: are for an adapter "
                         "from --init none or truncate; others keep the rank they have")
    cli.positive(cfg, "iters", "batch", "group", "steps", "a", "lr", "updates", "micro",
                 "save_every", "clip", "extrapolate", "lora_r", "lora_alpha")
    if cfg.blend >= 1:
        raise ValueError(f"--blend {cfg.blend}: the part of the other teachers in the target; "
                         "expected 0 <= blend < 1")
    if not cfg.supervised:
        cfg.supervised = [0, cfg.steps] if cfg.rollout == "ode" else list(cfg.noisy)
    cli.check_rollout(cfg, world_size)
    check_window(cfg)
    ordered = (len(cfg.supervised) == 2
               and 0 <= cfg.supervised[0] < cfg.supervised[1] <= cfg.steps)
    if not ordered:
        raise ValueError(f"--supervised {cfg.supervised}: expected FROM TO with "
                         f"0 <= FROM < TO <= --steps {cfg.steps}")
    check_combination(cfg)
    check_prompts(cfg, world)


def check_prompts(cfg, world):
    """ValueError if a task of the command line has no prompts. Nothing is loaded for this check."""
    if cfg.ratio:
        named = [item.partition("=")[0] for item in cfg.ratio if not item.endswith("=0")]
    else:
        named = [split_label(spec)[0] for spec in cfg.teachers]
        named = [task for task in named if world.ratio.get(task)]
    world.check_prompts([task for task in named if task in world.tasks])


def check_combination(cfg):
    """ValueError for options that make no sense together, with the reason."""
    first, end = cfg.supervised
    noise = cfg.rollout != "ode" and cfg.noisy[0] <= first and end <= cfg.noisy[1]
    if cfg.objective in SURROGATES and not noise:
        raise ValueError(f"--objective {cfg.objective} --rollout {cfg.rollout} --noisy {cfg.noisy} "
                         f"--supervised {cfg.supervised}: a policy gradient needs a density at "
                         "every supervised step, so noise")
    if cfg.objective in SURROGATES and cfg.match == "branches":
        raise ValueError(f"--objective {cfg.objective} --match branches: the density is of the "
                         "guided output, not of its branches")
    if cfg.match != "guided" and cfg.guidance == 1:
        raise ValueError(f"--match {cfg.match} --guidance 1: without guidance there is one branch, "
                         "nothing to match or fold")
    if cfg.objective != "pg" and (cfg.step_reward, cfg.credit) != ("dense", "step"):
        raise ValueError(f"--step-reward {cfg.step_reward} --credit {cfg.credit}: are for "
                         "--objective pg")
    if cfg.credit == "future" and (cfg.one or end - first == 1):
        raise ValueError(f"--credit future --one {cfg.one} --supervised {cfg.supervised}: there "
                         "are no later supervised steps to credit")
    if cfg.rollout == "cps" and end == cfg.steps:
        raise ValueError(f"--rollout cps --supervised {cfg.supervised}: its last step has no "
                         "noise, so no KL")


def make_student(cfg, base, teachers):
    """The net that learns, the name of its adapter (None: the whole net learns), its r and alpha.

    teachers: their checkpoints, for a cold start that is made of them.
    """
    net = copy.deepcopy(base).float().requires_grad_(True) if cfg.full else base
    torch.manual_seed(cfg.seed)
    adapter, r, alpha = None, None, None
    if cfg.full:
        cold_start_whole(cfg.init, net, base, teachers)
    else:
        adapter = "student"
        start = cold_start(cfg.init, base, teachers, cfg.lora_r, cfg.lora_alpha)
        r, alpha = start["r"], start["alpha"]
        net.add_adapter(adapter, r, alpha, start["tensors"], trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        dist.compile_blocks(net)
    return net, adapter, r, alpha


def summary(minibatches, task, tasks, cfg):
    """What the log says of an iteration, over all ranks."""
    states = list(chain(*minibatches))
    kls = dist.gather(torch.cat([s.kl for s in states]))
    slots = dist.gather(torch.cat([s.slot for s in states]))
    task = dist.gather(torch.cat([task[s.images] for s in states]))
    row = {"kl": kls.mean().item()}
    for n, name in enumerate(tasks):
        if (task == n).any():
            row[f"kl_{name}"] = kls[task == n].mean().item()
    row["kl_first"] = kls[slots == 0].mean().item()
    row["kl_last"] = kls[slots == slots.max()].mean().item()
    row["kl_anchor"] = dist.gather(torch.cat([s.kl_anchor for s in states])).mean().item()
    if cfg.objective in SURROGATES:
        row.update(ratio_summary(minibatches, cfg.clip))
    return row


def main(cfg):
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    world = open_world(cfg.model, cfg.prompts)
    check(cfg, world, world_size)
    model = world.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5,
                       cfg.text_encoders)
    loaded = read_teachers(cfg.teachers, model.mmdit, world.tasks)
    tasks = list(loaded)
    anchor_task = find_anchor(cfg.anchor, cfg.lam, loaded)
    mix = read_mix(cfg.ratio, tasks, world.ratio)
    pattern = [task for task, n in mix.items() for _ in range(n)]
    world.check_prompts(set(pattern))
    folder = Path("runs") / cfg.name

    # Teachers and anchor: adapters on one frozen base, or whole transformers beside it. The
    # student: one more adapter, or a whole transformer of its own.
    net, adapter, r, alpha = make_student(cfg, model.mmdit, list(loaded.values()))
    taught_by = attach(loaded, model.mmdit)
    student = Policy(dist.distribute(net, cfg.full), adapter,
                     guidance=1.0 if cfg.match == "fold" else cfg.guidance,
                     both=cfg.match == "branches")
    teachers = Teachers(loaded, model.mmdit, cfg)
    anchor = teachers.policy(anchor_task) if anchor_task else None
    objective = checked(cfg.objective)
    # An ODE rollout has no density. Its states are weighted as the SDE's would be.
    noisy = range(0) if cfg.rollout == "ode" else range(*cfg.noisy)
    density = "sde" if cfg.rollout == "ode" else cfg.rollout
    sampler = Sampler(schedule(cfg.steps).to(device), density, cfg.a, noisy)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)
    settings = {**asdict(cfg), "teachers": taught_by, "prompts_digest": world.prompts_digest,
                "world_size": world_size}
    saved = resume(folder / "state.pt", settings, model.fingerprint)
    first = restore(saved, net, opt)
    autocast = dist.autocast(device)
    log = Log(folder, rank, settings, first)

    def draw(it):
        return world.batch(pattern, cfg.batch // cfg.group, cfg.seed, it, cfg.mix)

    def save(path):
        return save_trained(path, net, adapter, model, rank, task="+".join(tasks), anchor=False,
                            r=r, alpha=alpha, settings=settings)

    texts = [prompt["prompt"] for it in range(first, cfg.iters) for prompt in draw(it)]
    model.text.prepare(texts, *dist.local())
    dist.barrier()
    if first == 0:
        save(folder / "init.pt")

    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, disable=rank > 0):
        start = time.time()
        # 1. Prompts. Every rank draws the same list, and takes its own share of the images.
        prompts = draw(it)                                        # each is drawn G times
        mine = dist.share(cfg.batch, cfg.updates, rank, world_size)
        asked = [prompts[i // cfg.group] for i in mine]
        text = encode(model.text, [prompt["prompt"] for prompt in asked])
        task = torch.tensor([tasks.index(prompt["task"]) for prompt in asked], device=device)
        keys = [(cfg.seed, it, i) for i in mine]
        noise = draw_noise(keys, cfg.steps, model.latent_shape()).to(device)

        # 2. Rollout. The student itself samples: it will learn on the states that it visits.
        minibatches = []                                          # lists of States
        steps = choose(cfg, it, mine).to(device)                  # (B, S), supervised
        for images in torch.arange(len(mine), device=device).chunk(cfg.updates):
            states = []
            for part in images.split(cfg.micro):                  # one forward pass each
                with autocast:
                    trajectory = sampler.rollout(student, noise[part], text.rows(part),
                                                 keep_v=cfg.objective == "pg")
                states += visited(trajectory, steps[part], part, sampler)
            minibatches.append(states)

        # 3. Targets. Where would each prompt's own teacher go from these states, and the anchor?
        with torch.no_grad(), autocast:
            for s in chain(*minibatches):
                s.v_target = teachers(s.x, s.t, text.rows(s.images), task[s.images])
                if anchor:
                    s.v_anchor = anchor(s.x, s.t, text.rows(s.images))
        if cfg.objective == "pg":                                 # the others need no advantage
            credit_steps(list(chain(*minibatches)), mine, steps.shape[1], cfg)

        # 4. Update. Pull the student's steps to their teachers', and a little to the anchor's.
        for param_group in opt.param_groups:
            param_group["lr"] = cfg.lr * (1 - it / cfg.iters)
        for states in minibatches:
            n_states = sum(len(s.x) for s in states)              # the same on every rank
            for s in states:
                dist.reduce_now(student.net, s is states[-1])     # once per update
                with autocast:
                    v = student(s.x, s.t, text.rows(s.images))
                    loss = objective(v, s, cfg)                   # (b,), by default KL to target
                    if anchor:
                        kl_anchor = kl(v, s.v_anchor, s)
                        loss = loss + cfg.lam * kl_anchor         # MAR, whatever the task
                        s.kl_anchor = kl_anchor.detach()
                (loss.sum() / n_states).backward()                # ranks are averaged
                s.kl = kl(v.detach(), s.v_target, s)
                if cfg.objective in SURROGATES:
                    s.ratio = likelihood_ratio(v.detach(), s)
            grad_norm = dist.clip_gradients(params)
            dist.check_finite(grad_norm, it)
            opt.step()
            opt.zero_grad()

        # 5. Log and save.
        row = summary(minibatches, task, tasks, cfg)
        seconds = time.time() - start
        log({"iter": it + 1, **row, "grad_norm": grad_norm, "s/it": seconds,
             "images/s": cfg.batch / seconds})
        if cfg.keep and (it + 1) % cfg.keep == 0:
            save(folder / f"student-{it + 1}.pt")
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters:
            save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings,
                       base=model.fingerprint)

    out = save(folder / "student.pt")
    if rank == 0:
        print(f"wrote {out} (cold start: {out.with_stem('init')})")


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
