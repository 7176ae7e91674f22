"""
Stage 2: Flow-OPD. One student learns from all teachers, on the states that it visits itself.

    python train_opd.py --teachers ckpt/*.pt                                # -> runs/opd/student.pt
    torchrun --nproc_per_node=8 train_opd.py --teachers ckpt/*.pt           # eight GPUs
    torchrun --nproc_per_node=8 train_opd.py --model stable-diffusion-3.5-medium \\
        --teachers geneval=DIR ocr=DIR quality=DIR --anchor quality         # SD3.5

A run that was stopped goes on where it was when the same command is given again. All that it
writes is in runs/NAME/.

One iteration: the student samples trajectories. At every supervised state that it visited, the
prompt's own teacher says where it would go next. So does the anchor, whatever the prompt: one of
the teachers, or the base. The loss pulls the student's step there. By default no image is scored.

The default loss is the KL of the two steps, w(t) |v_S - v_T|^2. The paper, its code and its
followers pull in other ways: see OBJECTIVES in this file.

Papers: Flow-OPD arXiv 2605.08063; sampled: Thinking Machines 2025; closed form: DiffusionOPD arXiv
2605.15055; one state, velocity: DanceOPD arXiv 2606.27377; both branches: PDM arXiv 2607.24731;
folding, extrapolation: GFD-OPD arXiv 2609.39692.
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

import math
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoints.cold_start import make_learner, read_weights
from checkpoints.formats import save_trained, split_label
from checkpoints.teachers import attach, find_anchor, policy_on, read_teachers
from plumbing import cli, dist, memory
from plumbing.average import Average
from plumbing.folder import check_places, check_room, prepare, run_folder
from plumbing.health import Health
from plumbing.log import Clock, Log
from plumbing.state import restore, resume, save_state
from plumbing.stop import Stop
from rewards import Judge, advantages, check_rewards, choose_rewards
from sampler import (
    Policy,
    Sampler,
    Trajectory,
    check_window,
    clipped,
    draw_noise,
    encode,
    kl,
    likelihood_ratio,
    log_prob,
    mean_of,
    noisy_steps,
    ratio_summary,
    regroup,
    sample,
    schedule,
    table,
    visited,
)
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
    # TASK=N: the share of each task in the prompts, e.g. geneval=3 ocr=1 quality=0 (default: the
    # world's, in which quality has none).
    ratio: list[str] = field(default_factory=list)
    # How tasks take turns. batch: prompt by prompt; alternate: iteration by iteration, as released.
    mix: Literal["alternate", "batch"] = "batch"
    # Rewards for mixed and --drop-equal, one for each teacher, in the order of --teachers, or of
    # --ratio if it is given (default: the world's).
    reward: list[str] = field(default_factory=list)
    # The task whose teacher anchors all prompts (default: the teacher that is marked so), or base.
    anchor: str = ""
    # Name of the run.
    name: str = "opd"

    # --- rollout
    # Number of iterations. Each has one rollout of --batch images.
    iters: int = 150
    # Images per iteration, over all ranks.
    batch: int = 32
    # Images per prompt (G). Rewards are compared within a group; a KL needs none.
    group: int = 1
    # Steps of a rollout (K).
    steps: int = 4
    # Steps FROM TO (exclusive) that take noise. The others follow the ODE.
    noisy: list[int] = field(default_factory=lambda: [1, 3])
    # Only so many of these steps, in a row; which ones is drawn for each iteration (0: all).
    window: int = 0
    # Steps FROM TO (exclusive) whose states are supervised (default: the noisy ones).
    supervised: list[int] = field(default_factory=list)
    # Supervise only one of these steps per trajectory. Beta(5, 2) draws it, mostly at low noise.
    one: bool = False
    # How a noisy step adds noise: sde (Flow-GRPO) or cps. With ode no step does.
    rollout: Literal["sde", "cps", "ode"] = "sde"
    # Whose states they are. student: its own, the method. For comparison, teacher: those that each
    # prompt's own teacher visits; pictures: its finished pictures, noised anew for each step.
    states: Literal["student", "teacher", "pictures"] = "student"
    # Noise level.
    a: float = 0.7
    # Guidance scale, in rollouts and updates, of student and teachers alike.
    guidance: float = 1.0

    # --- student
    # Cold start. merge: the exact average of the teachers; truncate: that, cut to --lora-r;
    # factors: A and B averaged apart, as released; none: the base; or a checkpoint (train_sft.py).
    init: str = "merge"
    # TASK=W: what each teacher's update is multiplied with in a merge (default: 1 / their number).
    merge: list[str] = field(default_factory=list)
    # Rank of the LoRA, for --init none and truncate. The ranks of a merge add up.
    lora_r: int | None = None
    # Alpha of the LoRA, for --init none and truncate. Its scale is alpha / r.
    lora_alpha: float | None = None
    # Train the whole transformer instead of an adapter.
    full: bool = False

    # --- loss
    # The loss at a state: one of OBJECTIVES, see below.
    objective: str = "kl"
    # For pg: the reward of a step. dense is -D, sampled is log(p_T / p_S) at the sampled x_next.
    step_reward: Literal["dense", "sampled"] = "dense"
    # For pg: a step's own reward, or that of all supervised later steps too.
    credit: Literal["step", "future"] = "step"
    # For pg, released and mixed: clip range of PPO. With --updates above 1, watch clip_frac.
    clip: float = 1e-4
    # What is compared. guided: the guided velocities; branches: those with and without the prompt;
    # fold: the student's with the prompt and the teacher's guided one. The student then needs no
    # guidance (eval.py --guidance 1).
    match: Literal["guided", "branches", "fold"] = "guided"
    # Target = base + this * (teacher - base): beyond the teacher if above 1.
    extrapolate: float = 1.0
    # Target = (1 - this) * own teacher + this * mean of the others. 0 is hard routing.
    blend: float = 0.0
    # For mixed: weight of the KL to the teacher, beside the policy gradient of the reward.
    kl_scale: float = 1.0
    # Leave out prompts whose images all have the same reward (nearly as released:
    # docs/departures.md). Images are then scored.
    drop_equal: bool = False
    # Weight of the KL to the anchor (MAR, manifold anchor regularization). 0 turns it off.
    lam: float = 0.02

    # --- optimiser
    # Learning rate of AdamW (default: by world, and lower with --full; see LR in this file).
    # It decays linearly to zero.
    lr: float | None = None
    # Optimiser steps per rollout, each on an equal share of the batch.
    updates: int = 4
    # Images of a rollout, or states of an update, per forward pass. Fewer need less memory.
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
    # Also write the student every KEEP iterations, as runs/NAME/student-ITER (0: never).
    keep: int = 0
    # Iterations between resumable states.
    save_every: int = 10
    # Compile the blocks of the transformer with torch.compile.
    compile: bool = False
    # Make all checks of the run, say what it would train and how much memory it needs, and end.
    dry_run: bool = False
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


# Defaults that follow from --model. For SD3.5 these are the released ones (preset mix_opd_8gpu):
# size, T5, steps, guidance, 16 groups of 16, two updates, rate, micro, tasks that alternate.
# DEVIATION: ours are iters (untried), lam (0.02, the text; they have 0.04), no weight decay (1e-4),
# a rate that decays (theirs is constant), and the merge, so rank 96 (theirs starts from the base,
# rank 32: --init none). Loss (--objective released), anchor (--anchor base --lam 0.04) and float16
# differ too: docs/departures.md.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5,
                       batch=256, group=16, updates=2, micro=4, mix="alternate", ema=0.9,
                       iters=300, save_every=5, eval_steps=40)}
# Learning rates: (world, --full) -> default. A whole transformer takes a lower one; ours, untuned.
LR = {("tiny", False): 3e-3, ("tiny", True): 1e-4, ("sd3", False): 1e-4, ("sd3", True): 1e-5}

# ------------------------------------------------------------------ the objectives, side by side

# Fix a state x. The student goes to x_next ~ p_S(.|x), a Gaussian. The teacher's p_T has the same
# variance, so D = KL(p_S || p_T) is known in closed form: D = w(t) |v_S - v_T|^2. The default is D.
# The others are its rivals in the paper, its code and its followers. In the table, sg stops the
# gradient, and A is the advantage in the loss -ratio A. No gradient flows through x or v_T.
#
#   objective               the loss, or A in -ratio A                  its expected gradient
#   kl                      D                                           grad D, no variance at x
#   velocity                |v_S - v_T|^2                               grad D / w(t)
#   pg, dense, step         A = sg(-D), the paper's text                0 while the ratio is 1
#   pg, sampled, step       A = sg(log p_T(x_next) - log p_S(x_next))   grad D, plus noise
#   pg, sampled, future     A = the sum of those from this step on      grad KL of the whole window
#   pg, dense, future       A = sg(-the sum of D from this step on)     grad KL minus sum of grad D
#   released                A = -D dt, not stopped, the released code   dt grad D, plus noise
#   mixed                   D, plus A = the reward's advantage          both, plus noise
#
# For pg the gradients are up to a factor 1/N, as ratio and A are both means over the N elements of
# a latent. Adam does not see this factor, but --lam does (docs/method.md, 5).
#
# docs/method.md derives this table, and tests/test_objectives.py shows all but the last row on a
# policy whose expectations are known.


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


def mixed(v, s, cfg):
    """The policy gradient of the task's own reward (as in stage 1), plus the KL to the teacher."""
    return clipped(likelihood_ratio(v, s), s.adv, cfg.clip) + cfg.kl_scale * kl(v, s.v_target, s)


# name -> the loss (b,) of velocities v (b, C, H, W) at a State s of b images.
# DEVIATION: the default is the KL itself, which the paper's text puts, detached, into pg.
OBJECTIVES = {"kl": lambda v, s, cfg: kl(v, s.v_target, s),
              "velocity": velocity_loss,
              "pg": pg,
              "released": released,
              "mixed": mixed}
SURROGATES = ("pg", "released", "mixed")            # those with a ratio, which need a density


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
    return log_prob(s.x_next, *s.gaussian(s.v_target)) - s.logp_old


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
    """The supervised steps (b, S) of this rank's images, in order. With --one S is 1."""
    first, end = cfg.supervised
    if cfg.window:
        window = noisy_steps(cfg, it)
        first, end = window.start, window.stop
    if not cfg.one:
        return torch.arange(first, end).expand(len(mine), -1)
    steps = []
    for i in mine:                                  # the same for any number of ranks
        way = np.random.default_rng((cfg.seed, it, i, 5, 2)).beta(5, 2)
        steps.append([first + min(int(way * (end - first)), end - first - 1)])
    return torch.tensor(steps)


def rollout_steps(cfg):
    """How many steps of a rollout are taken: no more than are read.

    A reward needs the image, and so does --states pictures. A surrogate needs the sample after the
    last supervised step, and the other objectives the state before it.
    """
    if scored(cfg) or cfg.states == "pictures":
        return cfg.steps
    return cfg.supervised[1] if cfg.objective in SURROGATES else cfg.supervised[1] - 1


class Teachers:
    """Where states should go: v_target, the velocity of each prompt's own teacher, and v_anchor.

    Each of them sees the states that need it in one pass, and each state once. So does the base,
    where it is asked. Teachers that are adapters share the base's weights. With
    cfg.blend the other teachers have a say too, and with cfg.extrapolate the target lies beyond the
    teacher, away from the base.
    """

    def __init__(self, teachers, base, anchor, cfg):
        """teachers: {task: as read}; anchor: a task, "base" or None."""
        if cfg.blend and len(teachers) == 1:
            raise ValueError(f"--blend {cfg.blend}: there is one teacher, so none to blend it with")
        self.cfg = cfg
        self.both = cfg.match == "branches"
        self.policies = {}                          # the teachers in their order, then the base
        for task, teacher in teachers.items():
            self.policies[task] = policy_on(base, teacher, task, cfg.guidance, self.both)
        self.policies["base"] = Policy(base, None, cfg.guidance, self.both)
        self.anchor = list(self.policies).index(anchor) if anchor else None

    def __call__(self, s, text, task):
        """v_target and v_anchor (or None) of a State of b images. task (b,): index of a teacher."""
        states = torch.arange(len(task), device=task.device)
        n_tasks = len(self.policies) - 1
        # needed[i, n]: does state i need the answer of policy n?
        needed = torch.zeros(len(task), n_tasks + 1, dtype=torch.bool, device=task.device)
        needed[states, task] = True
        if self.cfg.blend:
            needed[:, :n_tasks] = True
        if self.cfg.extrapolate != 1:
            needed[:, -1] = True
        if self.anchor is not None:
            needed[:, self.anchor] = True

        channels = (2 if self.both else 1) * s.x.shape[1]
        answers = s.x.new_zeros(len(task), n_tasks + 1, channels, *s.x.shape[2:])
        for n, policy in enumerate(self.policies.values()):
            for i in needed[:, n].nonzero()[:, 0].split(self.cfg.micro):
                if len(i) > 0:
                    answers[i, n] = policy(s.x[i], s.t[i], text.rows(s.images[i]))

        v = answers[states, task]
        if self.cfg.blend:                          # sum_k alpha_k v_k with sum alpha = 1
            others = (answers[:, :n_tasks].sum(1) - v) / (n_tasks - 1)
            v = (1 - self.cfg.blend) * v + self.cfg.blend * others
        if self.cfg.extrapolate != 1:
            # p_T and p_base are Gaussians of equal variance. So p_T^e p_base^(1 - e) is one too,
            # up to a factor, and this velocity gives its mean (e: --extrapolate).
            v_base = answers[:, -1]
            v = v_base + self.cfg.extrapolate * (v - v_base)
        return v, None if self.anchor is None else answers[:, self.anchor]

    def rollout(self, noise, text, task, sampler):
        """Off-policy trajectories, for --states: as Sampler.rollout, of each prompt's own teacher.

        noise (B, K + 1, C, H, W); task (B,). They have no log_prob: the student did not take them.
        """
        x = torch.empty_like(noise)
        for n, policy in enumerate(self.policies.values()):
            i = (task == n).nonzero()[:, 0]
            if len(i) == 0:
                continue
            if self.cfg.states == "teacher":
                rows = text.rows(i)
                x[i] = sampler.rollout(policy, noise[i], rows, until=rollout_steps(self.cfg)).x
            else:
                x_0 = sample(policy, noise[i, 0], text.rows(i), sampler.times)[:, None]
                t = sampler.times.view(-1, 1, 1, 1)
                x[i] = (1 - t) * x_0 + t * noise[i]         # x_t = (1 - t) x_0 + t eps
        return Trajectory(x, x.new_full(x[:, 1:, 0, 0, 0].shape, math.nan), None)


# ------------------------------------------------------------------ the run


def scored(cfg):
    """Does a run score its images? By default stage 2 does not."""
    return cfg.objective == "mixed" or cfg.drop_equal


def make_judge(cfg, mix, model, world, device):
    """The Judge of the rewards of all tasks with a share of the mix, or None if none is scored."""
    if not scored(cfg):
        return None
    rewards = choose_rewards(list(mix), cfg.reward, world, share=0)
    rewards = {task: rewards[task] for task, n in mix.items() if n}
    check_rewards(rewards, model, world, device=device)
    return Judge(rewards, model, world)


def judged(judge, task, mine, cfg):
    """The advantage of each image by the reward of its task, and whether its group has a signal.

    Both are (b,). task (b,): of this rank's images. A group has no signal where all rewards of a
    prompt are equal. Without a judge, advantages are 0 and all groups have one.
    """
    if judge is None:
        return torch.zeros(task.shape, device=task.device), torch.ones_like(task, dtype=torch.bool)
    reward = torch.tensor(judge.totals(), device=task.device)
    reward = dist.gather_batch(reward, cfg.batch, cfg.updates)
    everyone = dist.gather_batch(task, cfg.batch, cfg.updates)
    adv, signal = advantages(reward, everyone, cfg.group, "task")
    return adv[mine], signal[mine]


def summary(minibatches, task, tasks, shape, kept, signal, judge, cfg):
    """What the log says of an iteration, over all ranks. shape: (b, S), kept (b,), of this rank."""
    row = {}
    task = dist.gather(task)
    if judge:
        reward = dist.gather(torch.tensor(judge.reported(), device=task.device))
        for n, name in enumerate(tasks):
            if (task == n).any():
                row[f"reward_{name}"] = reward[task == n].mean().item()
        row["zero_std_ratio"] = 1 - dist.gather(signal.float()).mean().item()
    kls = dist.gather(table(minibatches, "kl", *shape, kept))         # nan where none was computed
    row["kl"] = mean_of(kls)
    for n, name in enumerate(tasks):
        if (task == n).any():
            row[f"kl_{name}"] = mean_of(kls[task == n])
    row["kl_first"] = mean_of(kls[:, 0])
    row["kl_last"] = mean_of(kls[:, -1])
    row["kl_anchor"] = mean_of(dist.gather(table(minibatches, "kl_anchor", *shape, kept)))
    if cfg.objective in SURROGATES:
        row.update(ratio_summary(minibatches, cfg.clip))
    return row


def main(cfg):
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    world = open_world(cfg.model, cfg.prompts)
    check(cfg, world, world_size)
    folder = run_folder(cfg.name)
    out = folder / "student.pt"
    check_places(folder, out)
    model = world.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5,
                       cfg.text_encoders)
    loaded = read_teachers(cfg.teachers, model.mmdit, world.tasks,
                           side=model.latent_shape()[-1])
    tasks = list(loaded)
    anchor = find_anchor(cfg.anchor, cfg.lam, loaded)
    mix = read_mix(cfg.ratio, tasks, world.ratio)
    pattern = [task for task, n in mix.items() for _ in range(n)]
    world.check_prompts(set(pattern))
    judge = make_judge(cfg, mix, model, world, device)

    # Teachers and anchor: adapters on one frozen base, or whole transformers beside it. The
    # student: one more adapter, or a whole transformer of its own.
    # It is made first, since --full copies the base without any adapters.
    net, adapter, r, alpha = make_learner(cfg, model.mmdit, "student", cfg.full,
                                          list(loaded.values()), read_weights(cfg.merge, tasks))
    taught_by = attach(loaded, model.mmdit)
    student = Policy(dist.distribute(net, cfg.full, cfg.amp), adapter,
                     guidance=1.0 if cfg.match == "fold" else cfg.guidance,
                     both=cfg.match == "branches")
    teachers = Teachers(loaded, model.mmdit, anchor, cfg)
    objective = checked(cfg.objective)
    # An ODE rollout has no density. Its states are weighted as the SDE's would be.
    density = "sde" if cfg.rollout == "ode" else cfg.rollout
    sampler = Sampler(schedule(cfg.steps).to(device), density, cfg.a, noisy_steps(cfg, 0))
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0,
                            fused=device.type == "cuda")
    settings = {**asdict(cfg), "teachers": taught_by, "prompts_digest": world.prompts_digest,
                "world_size": world_size}
    saved = resume(folder / "state.pt", settings, model.fingerprint)
    average = Average(net, cfg.ema, cfg.ema_every, saved)
    first = restore(saved, net, opt)
    autocast = dist.autocast(device, cfg.amp)
    scaler = dist.loss_scaler(device, cfg.amp)
    if cfg.dry_run:
        return memory.say_dry_run(cfg, model, net, rank, world_size, first, loaded)
    prepare(folder, out, rank)
    check_room(folder, out, sum(p.numel() for p in params), rank, cfg.ema > 0,
               results=2 + (cfg.iters // cfg.keep if cfg.keep else 0))
    watch = Watch(cfg, model, world, tasks, rank, world_size, device)
    log = Log(folder, rank, settings, first, cfg.track)
    health = Health(rank)

    def draw(it):
        return world.batch(pattern, cfg.batch // cfg.group, cfg.seed, it, cfg.mix)

    def rollout(noise, text, task):
        if cfg.states != "student":                 # off policy, to see what on-policy is worth
            return teachers.rollout(noise, text, task, sampler)
        return sampler.rollout(student, noise, text, cfg.objective == "pg", rollout_steps(cfg))

    def save(path):
        with average.applied():
            return save_trained(path, net, adapter, model, rank, task="+".join(tasks),
                                anchor=False, r=r, alpha=alpha, settings=settings)

    texts = [prompt["prompt"] for it in range(first, cfg.iters) for prompt in draw(it)]
    model.text.prepare(watch.texts + texts, *dist.local())
    dist.barrier()
    if first == 0:
        save(folder / "init.pt")

    clock = Clock(device)
    stop = Stop()
    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, disable=rank > 0):
        # 1. Prompts. Every rank draws the same list, and takes its own share of the images.
        clock("prompts")
        prompts = draw(it)                                        # each is drawn G times
        mine = dist.share(cfg.batch, cfg.updates, rank, world_size)
        asked = [prompts[i // cfg.group] for i in mine]
        text = encode(model.text, [prompt["prompt"] for prompt in asked])
        task = torch.tensor([tasks.index(prompt["task"]) for prompt in asked], device=device)
        keys = [(cfg.seed, it, i) for i in mine]
        noise = draw_noise(keys, cfg.steps, model.latent_shape()).to(device)

        # 2. Rollout. The student itself samples: it will learn on the states that it visits.
        clock("rollout")
        states = []                                               # a State has b images at a step
        sampler.noisy = noisy_steps(cfg, it)
        steps = choose(cfg, it, mine).to(device)                  # (b, S), supervised
        for part in torch.arange(len(mine), device=device).split(cfg.micro):
            with autocast:
                trajectory = rollout(noise[part], text.rows(part), task[part])
            if judge:
                judge.submit(trajectory.x[:, -1], [asked[i] for i in part])
            states += visited(trajectory, steps[part], part, sampler)
        adv, signal = judged(judge, task, mine, cfg)              # (b,)
        kept = signal if cfg.drop_equal else torch.ones_like(signal)
        minibatches = []          # lists of States; ranks may have unequal numbers of them
        for images in torch.arange(len(mine), device=device).chunk(cfg.updates):
            counted = None if cfg.full else kept                  # a sharded net: all ranks alike
            minibatches.append(regroup(states, images, cfg.micro, counted,
                                       by_step=cfg.objective == "released"))

        # 3. Targets. Where would each prompt's own teacher go from these states, and the anchor?
        clock("targets")
        for s in chain(*minibatches):
            with torch.no_grad(), autocast:
                s.v_target, s.v_anchor = teachers(s, text, task[s.images])
            s.adv = adv[s.images]                                 # of its image, for mixed
        if cfg.objective == "pg":
            credit_steps(list(chain(*minibatches)), mine, steps.shape[1], cfg)

        # 4. Update. Pull the student's steps to their teachers', and a little to the anchor's.
        clock("update")
        grad_norm = 0.0
        for param_group in opt.param_groups:
            param_group["lr"] = cfg.lr * (1 - it / cfg.iters)
        for minibatch in minibatches:
            n_states = dist.sync_sum(sum(kept[s.images].float().sum() for s in minibatch))
            if n_states == 0:
                continue
            for s in minibatch:
                dist.reduce_now(student.net, s is minibatch[-1])  # once per update
                with autocast:
                    v = student(s.x, s.t, text.rows(s.images))
                    loss = objective(v, s, cfg)                   # (b,), by default KL to target
                    if cfg.lam:
                        kl_anchor = kl(v, s.v_anchor, s)
                        loss = loss + cfg.lam * kl_anchor         # MAR, whatever the task
                        s.kl_anchor = kl_anchor.detach()
                    loss = (loss * kept[s.images]).sum() / n_states
                scaler.scale(loss * world_size).backward()        # ranks are averaged, not summed
                s.kl = kl(v.detach(), s.v_target, s)
                if cfg.objective in SURROGATES:
                    s.ratio = likelihood_ratio(v.detach(), s)[kept[s.images]]
            grad_norm = dist.optimise(opt, scaler, it)            # clip, step, zero_grad
            average.step()

        # 5. Log and save.
        clock("summary")
        row = summary(minibatches, task, tasks, steps.shape, kept, signal, judge, cfg)
        log({"iter": it + 1, **row, "grad_norm": grad_norm, **clock.row(cfg.batch),
             **watch(student, average, it + 1)}, watch.pictures)
        health({"iter": it + 1, **row})
        if cfg.keep and (it + 1) % cfg.keep == 0:
            save(folder / f"student-{it + 1}.pt")
        stopping = stop.asked()
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters or stopping:
            save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings,
                       base=model.fingerprint, average=average.state())
        if stopping:
            stop.leave(it + 1, folder / "state.pt", rank)

    out = save(out)
    if rank == 0:
        print(f"wrote {out} (cold start: {out.with_stem('init')})")


# ------------------------------------------------------------------ checks


def check(cfg, world, world_size):
    """ValueError for all that can be known to be wrong before any time is spent.

    It also fills in the defaults that depend on others: lr, supervised, lora_r and lora_alpha.
    """
    if cfg.lr is None:
        cfg.lr = LR.get((world.name, cfg.full), LR["tiny", cfg.full])
    if cfg.objective not in OBJECTIVES:
        raise ValueError(f"--objective {cfg.objective}: expected one of {', '.join(OBJECTIVES)}")
    cli.lora_defaults(cfg, world.lora, cfg.full)
    cli.positive(cfg, "iters", "batch", "group", "steps", "a", "lr", "updates", "micro",
                 "save_every", "clip", "extrapolate", "lora_r", "lora_alpha", "ema_every")
    cli.check_training(cfg)
    if cfg.blend >= 1:
        raise ValueError(f"--blend {cfg.blend}: the part of the other teachers in the target; "
                         "expected 0 <= blend < 1")
    if not cfg.supervised:
        cfg.supervised = [0, cfg.steps] if cfg.rollout == "ode" else list(cfg.noisy)
    cli.check_rollout(cfg, world_size)
    check_window(cfg)
    check_watch(cfg, world, world.tasks)
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
    if cfg.window and (cfg.one or cfg.supervised != cfg.noisy):
        raise ValueError(f"--window {cfg.window} --one {cfg.one} --supervised {cfg.supervised}: a "
                         "window's steps are all supervised, and no others")
    if cfg.states != "student" and (cfg.objective in SURROGATES or scored(cfg)
                                    or cfg.match != "guided"):
        raise ValueError(f"--states {cfg.states} --objective {cfg.objective} --match {cfg.match} "
                         f"--drop-equal {cfg.drop_equal}: states of others have no ratio, no "
                         "reward and no branches of the student")
    if cfg.reward and not scored(cfg):
        raise ValueError(f"--reward {' '.join(cfg.reward)}: no image is scored here; it is for "
                         "--objective mixed and --drop-equal")
    if scored(cfg) and cfg.group < 2:
        raise ValueError(f"--group {cfg.group}: rewards are compared within a prompt, so at least "
                         "2 images are needed")
    if cfg.drop_equal and cfg.objective == "released":
        raise ValueError("--drop-equal --objective released: its loss of an image is a mean over "
                         "the whole micro-batch, so dropped images would still count")
    defaults = type(cfg)
    if cfg.objective != "mixed" and cfg.kl_scale != defaults.kl_scale:
        raise ValueError(f"--kl-scale {cfg.kl_scale} --objective {cfg.objective}: is for "
                         "--objective mixed")
    if cfg.objective not in SURROGATES and cfg.clip != defaults.clip:
        raise ValueError(f"--clip {cfg.clip} --objective {cfg.objective}: there is no ratio to "
                         f"clip; is for {', '.join(SURROGATES)}")
    if cfg.merge and cfg.init not in ("merge", "truncate", "factors"):
        raise ValueError(f"--merge {' '.join(cfg.merge)}: --init {cfg.init} merges no teachers")
    if cfg.rollout == "cps" and end == cfg.steps:
        raise ValueError(f"--rollout cps --supervised {cfg.supervised}: its last step has no "
                         "noise, so no KL")


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
