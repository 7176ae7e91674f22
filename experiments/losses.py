"""One name, four losses: what is called Flow-OPD in four repositories, beside ours.

    python -m experiments.losses     # results/losses.json and a table: 100 seconds of a CPU core

A loss is a function of the student's velocity v (B, C, H, W) at a Step, B transitions of its own
rollout. It gives (B,), whose mean is the loss of the step. The transition, its density and PPO's
clip are sampler.py's. What the codes make of them is written out, and shares nothing with
train_opd.py, so that a test can compare the two. What is measured is the gradient with respect to
the student's LoRA in its first update (the merge of the teachers), beside the gradient of the
closed-form KL. docs/losses.md says what that means.
"""
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.cold_start import cold_start
from checkpoints.teachers import attach, read_teachers
from experiments.jobs import TASKS, TEACHERS
from experiments.results import BASE
from experiments.tables import grid
from plumbing import cli
from plumbing.files import write_text
from sampler import (
    Policy,
    Sampler,
    clipped,
    draw_noise,
    encode,
    gaussian_kl,
    generator,
    schedule,
    sde_step,
)
from sampler import log_prob as log_density
from worlds import open_world

# The rollout: its steps, which of them take noise and are supervised, and how much noise.
STEPS = 8
NOISY = range(5)
NOISE_LEVEL = 0.7
BATCH, GROUP = 64, 4                                    # images in all; images of one prompt
DRAWS = (10, 100)                                       # samples from every state, for SAMPLED


@dataclass
class Step:
    """B transitions x -> sample of the student. t, t_next, t_second (see sde_sigma): numbers."""
    v_teacher: Tensor        # (B, C, H, W), of each prompt's own teacher at x
    v_old: Tensor            # (B, C, H, W), the student's in the rollout
    x: Tensor                # (B, C, H, W)
    t: Tensor
    t_next: Tensor
    t_second: Tensor
    noise: Tensor            # (B, C, H, W), z in sample = mean + std z
    future: Tensor = None    # (B,), the sum of the KLs of all later supervised steps

    @property
    def sample(self):
        mean, std = gaussian(self.v_old, self)
        return mean + std * self.noise


def gaussian(v, s):
    """The mean of the transition under velocity v, and its std."""
    return sde_step(s.x, v, s.t, s.t_next, NOISE_LEVEL, s.t_second)


def mean_square(a):
    """(B, C, H, W) -> (B,): all codes here take the mean over elements, not the sum."""
    return (a ** 2).flatten(1).mean(1)


def log_prob(v, s):
    """log N(sample; mean, std^2), averaged over elements: (B,)."""
    return log_density(s.sample, *gaussian(v, s))


def ppo(v, s, adv, clip):
    """PPO's loss. adv: (B,), or (B, 1), which gives (B, B)."""
    return clipped((log_prob(v, s) - log_prob(s.v_old, s)).exp(), adv, clip)


def kl_times_dt(v, s):
    """The squared distance of the means over 2 sigma_t^2, where the variance is sigma_t^2 dt."""
    return kl(v, s) * (s.t - s.t_next)


# ------------------------------------------------------------------ ours


def kl(v, s):
    """D = KL(student || teacher) itself: train_opd.py --objective kl.

    So is what Flow-Factory merged (pull request 170, DiffusionOPD), with an SDE: 47a9d2b as in
    bwnzheng/Flow-Factory, src/flow_factory/trainers/opd/trainer.py:346-361.
    """
    mean, std = gaussian(v, s)
    return gaussian_kl(mean, gaussian(s.v_teacher, s)[0], std)


def velocity(v, s):
    """The squared distance of the velocities: train_opd.py --objective velocity.

    DanceOPD's own method: worldbench/DanceOPD 4440ab5, danceopd/core/loss.py:9, at one state of an
    ODE rollout, drawn in danceopd/core/timestep.py:53-60.
    """
    return mean_square(v - s.v_teacher)


def sampled(v, s):
    """A = log p_T(sample) - log p_S(sample): --objective pg --step-reward sampled --group 1."""
    return ppo(v, s, log_prob(s.v_teacher, s) - log_prob(s.v_old, s), clip=1e-4)


# ------------------------------------------------------------------ those called Flow-OPD


def flow_opd(v, s):
    """The authors': A = -D dt, not detached; each image gets the mean of its micro-batch.

    CostaliyA/Flow-OPD 434ab16, scripts/train_sd3_opd_mix.py: D 1670-1671, A 1681-1686, the loss
    1754-1761; kl_scale -1 and reward_mode kl_only in config/grpo.py:109-110.
    """
    return ppo(v, s, -kl_times_dt(v, s).clamp(max=5)[:, None], clip=1e-4).mean(0)


def dance_opd(v, s):
    """DanceOPD's baseline: A = -D dt, detached, as the text of the Flow-OPD paper says.

    worldbench/DanceOPD 4440ab5, danceopd/core/flowopd.py: detached 76-78, A 79-81, the loss 82-85.
    """
    return ppo(v, s, -kl_times_dt(v, s).clamp(max=5).detach(), clip=1e-4)


def diffusion_opsd(v, s):
    """DiffusionOPSD's baseline: A = log p_T(sample) alone, standardised over the batch.

    worldbench/DiffusionOPSD 4562f0f, opd/train_flowopd_open3.py: the reward 37-58, the loss
    146-152; standardised in opd/opd_common.py:131-145; clip 0.2 in opd/configs/opd_config.py.
    DEVIATION: there log p_T is a mean over three teachers for every image, here of its own one.
    """
    reward = log_prob(s.v_teacher, s)
    return ppo(v, s, (reward - reward.mean()) / (reward.std() + 1e-4), clip=0.2)


def flow_factory(v, s):
    """Flow-Factory's maintainer, first: the authors' without the mean over the micro-batch.

    Jayce-Ping/Flow-Factory-Private cb2edde (branch flow-opd), src/flow_factory/trainers/opd.py: D
    453-459, A 463-464, the loss 470-477. Line 467 would detach A, and is a comment.
    """
    return ppo(v, s, -kl_times_dt(v, s).clamp(max=5), clip=1e-4)


def flow_factory_future(v, s):
    """Flow-Factory's maintainer, later: D, plus the sum of the later D times log p.

    Jayce-Ping/Flow-Factory-Private c950c65 (branch flow-opd-ours), in src/flow_factory: D
    trainers/opd/sde.py:470-489, the sum 611-617, the loss 1352-1357, coefficients 1 by default
    hparams/training_args.py:1614, 1641. log p is a mean over N elements by default
    (scheduler/abc.py:40), so the second term has 1/N of its due.
    """
    return kl(v, s) + s.future.detach() * log_prob(v, s)


def flow_factory_ode(v, s):
    """What Flow-Factory merged, with an ODE: half the squared distance of the means.

    The lines at kl; the denominator is 1 in src/flow_factory/scheduler/abc.py:196-197.
    """
    return mean_square((s.t - s.t_next) * (v - s.v_teacher)) / 2


LOSSES = {f.__name__: f for f in (kl, velocity, sampled, flow_opd, dance_opd, diffusion_opsd,
                                  flow_factory, flow_factory_future, flow_factory_ode)}
SAMPLED = ("sampled", "flow_opd", "dance_opd", "diffusion_opsd")     # measured with more draws too

# ------------------------------------------------------------------ the measurement


@dataclass
class Config:
    # --- what
    # Seeds of prompts and noise: one minibatch of 64 images each. The spread is over them.
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4, 5])
    # File of the results.
    out: str = "results/losses.json"


class Bench:
    """The shipped base and teachers, and their merge as the student."""

    def __init__(self):
        self.world = open_world(BASE)
        self.model = self.world.load(BASE)
        net = self.model.mmdit
        teachers = read_teachers(list(TEACHERS.values()), net, self.world.tasks)
        start = cold_start("merge", net, list(teachers.values()), None, None)
        net.add_adapter("student", start["r"], start["alpha"], start["tensors"], trainable=True)
        attach(teachers, net)
        self.student = Policy(net, "student")
        self.teachers = {task: Policy(net, task) for task in TASKS}
        self.params = [p for p in net.parameters() if p.requires_grad]

    @torch.no_grad()
    def steps(self, seed):
        """The supervised Steps of the student's rollout on training prompts, and its text."""
        pattern = [task for task in TASKS for _ in range(self.world.ratio[task])]
        prompts = self.world.batch(pattern, BATCH // GROUP, seed, 0, "batch")
        prompts = [prompt for prompt in prompts for _ in range(GROUP)]
        text = encode(self.model.text, [prompt["prompt"] for prompt in prompts])
        keys = [("losses", seed, i) for i in range(BATCH)]
        noise = draw_noise(keys, STEPS, self.model.latent_shape())
        sampler = Sampler(schedule(STEPS), "sde", NOISE_LEVEL, NOISY)
        path = sampler.rollout(self.student, noise, text, keep_v=True, until=len(NOISY))
        steps = []
        for k in NOISY:
            t, t_next = sampler.times[k], sampler.times[k + 1]
            x = path.x[:, k]
            v_teacher = torch.empty_like(x)
            for task, teacher in self.teachers.items():
                mine = torch.tensor([prompt["task"] == task for prompt in prompts])
                if mine.any():
                    v_teacher[mine] = teacher(x[mine], t.expand(int(mine.sum())), text.rows(mine))
            steps.append(Step(v_teacher, path.v[:, k], x, t, t_next, sampler.times[1],
                              noise[:, k + 1]))
        total = torch.zeros(BATCH)
        for s in reversed(steps):
            s.future = total
            total = total + kl(s.v_old, s)
        return steps, text

    def measure(self, seed):
        """{loss: its gradient of each step (S, P)}, {(loss, n): with n samples, all steps (P,)}."""
        steps, text = self.steps(seed)
        one = {name: [] for name in LOSSES}
        many = dict.fromkeys([(name, n) for name in SAMPLED for n in DRAWS], 0)
        for k, s in enumerate(steps):
            v = self.student(s.x, s.t.expand(len(s.x)), text)
            for name, loss in LOSSES.items():
                one[name].append(self.by_lora(v, by_velocity(loss, s)))
            for name, n in many:
                g = generator("losses", seed, k)
                drawn = [replace(s, noise=torch.randn(v.shape, generator=g)) for _ in range(n)]
                by_v = sum(by_velocity(LOSSES[name], other) for other in drawn) / n
                many[name, n] = many[name, n] + self.by_lora(v, by_v)
        return {name: torch.stack(rows) for name, rows in one.items()}, many

    def by_lora(self, v, by_v):
        """The gradient by v (B, C, H, W) -> the one by the student's LoRA (P,)."""
        grads = torch.autograd.grad(v, self.params, by_v, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])


def by_velocity(loss, s):
    """The gradient of the mean loss by the student's velocity, at that of the rollout."""
    v = s.v_old.clone().requires_grad_(True)
    return torch.autograd.grad(loss(v, s).mean(), v)[0]


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def summary(runs):
    """{loss: {what: a number for each seed}}, from what measure gave for each. Norms: over KL's."""
    truths = [one["kl"].sum(0) for one, _ in runs]
    rows = {name: {} for name in LOSSES}
    for name, row in rows.items():
        totals = [one[name].sum(0) for one, _ in runs]
        row["cosine"] = [cosine(g, truth) for g, truth in zip(totals, truths)]
        row["cosine, other states"] = [cosine(g, sum(truths) - t) for g, t in zip(totals, truths)]
        row["norm"] = [(g.norm() / truth.norm()).item() for g, truth in zip(totals, truths)]
        row["shares"] = [(one[name] @ g / (g @ g)).tolist() for (one, _), g in zip(runs, totals)]
    for name, n in runs[0][1]:
        pairs = [(many[name, n], truth) for (_, many), truth in zip(runs, truths)]
        rows[name][f"cosine, {n} draws"] = [cosine(g, truth) for g, truth in pairs]
        rows[name][f"norm, {n} draws"] = [(g.norm() / truth.norm()).item() for g, truth in pairs]
    return rows


def spread(values):
    """mean ± standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def tables(rows):
    """The two tables of docs/losses.md: all losses with one draw, and SAMPLED with more."""
    one = []
    many = []
    for name, row in rows.items():
        shares = " ".join(str(round(100 * share)) for share in np.mean(row["shares"], 0))
        one.append([f"`{name}`", spread(row["cosine"]), spread(row["cosine, other states"]),
                    f"{np.mean(row['norm']):.3f}", shares])
        if name in SAMPLED:
            more = [f", {n} draws" for n in DRAWS]
            many.append([f"`{name}`", *(spread(row["cosine" + n]) for n in ("", *more)),
                         " ".join(f"{np.mean(row['norm' + n]):.4f}" for n in ("", *more))])
    draws = [f"{n} draws" for n in DRAWS]
    return [grid(["loss", "cosine, same states", "cosine, other states", "length",
                  "% of steps 0 to 4"], one),
            grid(["loss", "cosine, 1 draw", *draws, "lengths"], many)]


def main(cfg):
    if len(cfg.seeds) < 2:
        raise ValueError(f"--seeds {cfg.seeds}: expected at least two, as the spread is over them")
    bench = Bench()
    rows = summary([bench.measure(seed) for seed in tqdm(cfg.seeds)])
    write_text(Path(cfg.out), json.dumps({"seeds": cfg.seeds, "losses": rows}, indent=1))
    print(*tables(rows), sep="\n\n")


if __name__ == "__main__":
    cli.run(main, Config)
