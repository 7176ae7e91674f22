"""Check a model, its teachers and its rewards before a long run: one line a check.

    python -m experiments.doctor                                    # or: make doctor
    python -m experiments.doctor --teachers ckpt/*.pt
    python -m experiments.doctor --model stable-diffusion-3.5-medium --tasks ocr --reward ocr=1

A line is "ok NAME: what was measured", or "FAIL NAME: what it means and what to do". The exit code
is 1 if a check fails. Nothing is left on the disk. The tiny world takes less than two minutes.
"""
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import sampler
from checkpoints.formats import read
from checkpoints.teachers import attach, read_teachers
from plumbing import cli, dist
from plumbing.folder import check_room, shown
from rewards import advantages, check_rewards, choose_rewards, score
from sampler import Policy, Sampler, draw_noise, encode, schedule, visited
from worlds import open_world, presets

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    # --- what
    # The base: a safetensors file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # Teachers to check: PATH or TASK=PATH.
    teachers: list[str] = field(default_factory=list)
    # The tasks to check (default: all that have prompts and a reward).
    tasks: list[str] = field(default_factory=list)
    # A reward for each task, such as "geneval=0.5,ocr=0.5" (default: the world's).
    reward: list[str] = field(default_factory=list)
    # TASK=DIR: the task's prompts come from this folder or hub dataset, not from the world.
    prompts: list[str] = field(default_factory=list)
    # The folder of SD3.5's text encoders, if they are not beside the model.
    text_encoders: str = ""

    # --- sampling
    # Prompts of each task.
    per_task: int = 12
    # Images per prompt (G).
    group: int = 4
    # Steps of a training rollout (K).
    steps: int = 8
    # Steps of the ODE and the SDE where their scores are compared.
    eval_steps: int = 20
    # Noise level.
    a: float = 0.7
    # Guidance scale.
    guidance: float = 1.0
    # Clip range of PPO, which the ratio's error must stay below.
    clip: float = 1e-4

    # --- over-fitting
    # Steps within which the KL to a target must halve.
    fit_steps: int = 30
    # Learning rate of these steps.
    lr: float = 3e-3

    # --- machine
    # Images per forward pass. Fewer need less memory.
    micro: int = 48
    # Side of the images in pixels (default: 32 in the tiny world).
    size: int | None = None
    # Tokens of SD3.5's T5: 128 or 256. The word zeros leaves T5 out.
    t5: str = ""
    # Dtype of the weights that do not learn.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Dtype of the computation on a GPU. On a CPU it is always float32.
    amp: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, guidance=4.5, per_task=4,
                       micro=4, lr=1e-3)}


class Patient:
    """What the checks share: world, model, prompts, rewards, and the images of each policy."""

    def __init__(self, cfg):
        _, world_size, self.device = dist.setup(cfg.device, cfg.seed)
        cli.positive(cfg, "per_task", "group", "steps", "eval_steps", "a", "clip", "fit_steps",
                     "lr", "micro")
        if world_size > 1 or cfg.group < 2 or cfg.per_task < 2 or cfg.steps < 2:
            raise ValueError(f"--per-task {cfg.per_task} --group {cfg.group} --steps {cfg.steps} "
                             f"on {world_size} rank(s): expected 2 or more of each, on one rank")
        self.cfg = cfg
        self.world = open_world(cfg.model, cfg.prompts)
        known = self.world.tasks_with_prompts("train")
        self.tasks = cfg.tasks or [task for task in known if task in self.world.reward]
        for task in self.tasks:
            if task not in known:
                raise ValueError(f"--tasks {task}: expected one of {', '.join(known)}")
        self.rewards = choose_rewards(self.tasks, cfg.reward, self.world, share=0)
        self.model = self.world.load(cfg.model, self.device, getattr(torch, cfg.dtype), cfg.size,
                                     cfg.t5, cfg.text_encoders)
        self.net = self.model.mmdit
        self.autocast = dist.autocast(self.device, cfg.amp)
        self.metas = {}                     # task -> its prompts, each G times
        for task in self.tasks:
            metas = self.world.eval_prompts(task, cfg.per_task, "train")
            self.metas[task] = [meta for meta in metas for _ in range(cfg.group)]
        texts = [meta["prompt"] for metas in self.metas.values() for meta in metas]
        self.model.text.prepare(list(dict.fromkeys(texts)))
        self.teachers = None                # {task: teacher}, once they are read
        self.scores = {}                    # what scored() has computed

    def policy(self, adapter=None):
        return Policy(self.net, adapter, self.cfg.guidance)

    def random_adapter(self, name, size=0.02):
        """Add a trainable adapter with random B. Its parameters are returned."""
        torch.manual_seed(self.cfg.seed + len(name))
        self.net.add_adapter(name, *self.world.lora, trainable=True)
        params = []
        for layer in self.net.lora_layers().values():
            torch.nn.init.normal_(layer.B[name], std=size)
            params += [layer.A[name], layer.B[name]]
        return params

    def states(self, policy):
        """The States of a few images of the first task at all noisy steps, and their Text."""
        metas = self.metas[self.tasks[0]][::self.cfg.group][:4]
        text = encode(self.model.text, [meta["prompt"] for meta in metas])
        noise = self.noise("states", len(metas), self.cfg.steps)
        way = Sampler(schedule(self.cfg.steps).to(self.device), "sde", self.cfg.a,
                      range(self.cfg.steps - 1))
        with self.autocast:
            trajectory = way.rollout(policy, noise, text)
        images = torch.arange(len(metas), device=self.device)
        steps = torch.arange(self.cfg.steps - 1, device=self.device).expand(len(metas), -1)
        return visited(trajectory, steps, images, way), text

    def noise(self, name, n, steps):
        keys = [(self.cfg.seed, "doctor", name, i) for i in range(n)]
        return draw_noise(keys, steps, self.model.latent_shape()).to(self.device)

    def scored(self, task, kind, adapter=None, net=None):
        """The scores {reward: (P, G)} of a task's images. They are computed once.

        kind: "train" (the SDE with --steps), "sde" or "ode" (both with --eval-steps).
        """
        key = (task, kind, adapter, net is not None)
        if key in self.scores:
            return self.scores[key]
        steps = self.cfg.steps if kind == "train" else self.cfg.eval_steps
        noisy = range(0) if kind == "ode" else range(5 * steps // 8)    # as in training
        way = Sampler(schedule(steps).to(self.device), "sde", self.cfg.a, noisy)
        policy = Policy(net or self.net, adapter, self.cfg.guidance)
        metas = self.metas[task]
        text = encode(self.model.text, [meta["prompt"] for meta in metas])
        noise = self.noise(task, len(metas), steps)
        images = []
        for part in torch.arange(len(metas), device=self.device).split(self.cfg.micro):
            with self.autocast:
                x = way.rollout(policy, noise[part.cpu()], text.rows(part)).x[:, -1]
            images.append(self.model.images(x))
        found = score(self.rewards[task], torch.cat(images), metas, self.world)
        self.scores[key] = {name: torch.as_tensor(values).view(-1, self.cfg.group)
                            for name, values in found.items()}
        return self.scores[key]


def difference(first, second):
    """Mean and standard error of first - second, (P, G) each, over the P prompts."""
    gap = (first - second).mean(1).double()
    return gap.mean().item(), gap.std().item() / len(gap) ** 0.5


# ------------------------------------------------------------------ the checks: each -> (ok, text)


def room(p):
    folder = Path("runs") if Path("runs").is_dir() else Path(".")
    learns = sum(np.prod(shape) for shape in p.net.adapter_shapes(p.world.lora[0]).values())
    try:
        check_room(folder, folder / "adapter.pt", int(learns), 0, average=True)
    except ValueError as error:
        return False, f"the disk is too small: {error}"
    text = f"{folder.absolute()} has room for two states of an adapter"
    if p.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(p.device)
        if free < total / 10:
            return False, (f"{shown(free)} of the GPU's {shown(total)} are free after loading; "
                           "end other programs, or use --dtype bfloat16 and a smaller --micro")
        text += f", and {shown(free)} of {shown(total)} are free on the GPU"
    return True, text


def adapters_fit(p):
    if not p.cfg.teachers:
        return True, "no --teachers were given, so nothing was checked"
    try:
        p.teachers = read_teachers(p.cfg.teachers, p.net, p.world.tasks,
                                   side=p.model.latent_shape()[-1])
    except ValueError as error:
        return False, f"a teacher does not belong to this base; use the base it was trained on: " \
                      f"{error}"
    attach(p.teachers, p.net)
    return True, f"{', '.join(p.teachers)} belong to the base {p.model.fingerprint[:12]}"


def ratio_is_one(p):
    p.random_adapter("ratio")
    policy = p.policy("ratio")
    states, text = p.states(policy)
    error = 0.0
    for s in states:
        with p.autocast:
            ratio = sampler.likelihood_ratio(policy(s.x, s.t, text), s)
        error = max(error, (ratio.detach() - 1).abs().max().item())
    if not error < p.cfg.clip:
        return False, (f"before any update it is off by {error:.1e}, expected less than the clip "
                       f"range {p.cfg.clip:.0e}; rollout and update compute different densities: "
                       "check their dtype, guidance, dropout and log_prob")
    return True, f"before any update it is off by at most {error:.1e}"


def sde_fits_ode(p):
    text = encode(p.model.text, [p.metas[p.tasks[0]][0]["prompt"]] * 2)
    noise = p.noise("a", 2, p.cfg.steps)
    times = schedule(p.cfg.steps).to(p.device)
    with p.autocast:
        still = Sampler(times, "sde", 0.0, range(p.cfg.steps)).rollout(p.policy(), noise, text)
        ode = sampler.sample(p.policy(), noise[:, 0], text, times)
    gap = ((still.x[:, -1] - ode).norm() / ode.norm()).item()
    if not gap < 1e-3:
        return False, (f"with a = 0 the SDE ends {gap:.1%} away from the ODE, expected the same "
                       "images; the drift or sigma_t of sde_step is wrong")
    # If all data is 0, then x = t eps and v = x / t. So x must keep the std t, whatever a is.
    way = Sampler(torch.linspace(0.9, 0.1, 401), "sde", p.cfg.a, range(400))
    generator = sampler.generator(p.cfg.seed, "doctor")
    x = 0.9 * torch.randn(1, 1, 128, 128, generator=generator)
    for k in range(400):
        mean, std = way.gaussian(x, x / way.times[k], k)
        x = mean + std * torch.randn(x.shape, generator=generator)
    error = x.std().item() / 0.1 - 1
    if not abs(error) < 0.05:
        return False, (f"the SDE's noise level is off by {error:+.1%} after 400 steps on known "
                       "data, expected 5% at most; sigma_t and the drift of sde_step do not match")
    return True, (f"a = 0 is {gap:.1e} from the ODE; with a = {p.cfg.a} the noise level on known "
                  f"data is off by {error:+.1%}")


def sde_scores_alike(p):
    found = []
    for task in p.tasks:
        gap, error = difference(p.scored(task, "sde")["total"], p.scored(task, "ode")["total"])
        found.append(f"{task} {gap:+.3f} +- {error:.3f}")
        if abs(gap) > 3 * error + 0.02:
            return False, (f"SDE minus ODE is {found[-1]}, more than three errors; training would "
                           "see other images than evaluation: check sde_step, lower --a, or use "
                           "more steps")
    return True, f"SDE minus ODE: {', '.join(found)}"


def kl_learns(p):
    params = p.random_adapter("kl")
    states, text = p.states(p.policy())
    s = states[len(states) // 2]
    with p.autocast:
        v = p.policy("kl")(s.x, s.t, text)
        with torch.no_grad():
            v_base = p.policy()(s.x, s.t, text)
        distance = sampler.kl(v, v_base, s).mean()
        itself = sampler.kl(v, v, s).abs().max().item()
    gradient = 0.0
    if distance.requires_grad:
        grads = torch.autograd.grad(distance, params, allow_unused=True)
        gradient = sum(g.norm().item() ** 2 for g in grads if g is not None) ** 0.5
    if not (0 < gradient < float("inf") and distance > 0 and itself == 0):
        return False, (f"the KL to another policy is {distance:.1e} with a gradient of "
                       f"{gradient:.1e}, and to itself {itself:.1e}; expected above 0, above 0 and "
                       "0: check that the adapter is used and that kl is not detached")
    return True, f"KL {distance:.1e} to the base, its gradient {gradient:.1e}; 0 to itself"


def rewards_differ(p):
    check_rewards(p.rewards, p.model, p.world, device=p.device)
    flat, seen = [], []
    for task in p.tasks:
        for name, values in p.scored(task, "train").items():
            if name == "total":
                continue
            if not torch.isfinite(values).all():
                return False, f"{task}'s {name} is not finite for some images; check its scorer"
            differ = (values.max(1).values > values.min(1).values).float().mean().item()
            seen.append(f"{task}'s {name} {values.mean():.2f} ({differ:.0%})")
            if differ == 0:
                flat.append(f"{task}'s {name} (always {values[0, 0]:.3g} for the first prompt)")
    if flat:
        return False, (f"{', '.join(flat)} is equal for all images of every prompt, so nothing can "
                       "be learned from it; look at images, or choose another reward")
    return True, f"mean (prompts whose images differ): {', '.join(seen)}"


def groups_have_signal(p):
    shares = []
    for n, task in enumerate(p.tasks):
        reward = p.scored(task, "train")["total"].flatten()
        _, signal = advantages(reward, torch.full((len(reward),), n), p.cfg.group, "batch")
        share = 1 - signal.float().mean().item()
        shares.append(f"{task} {share:.0%}")
        if share == 1:
            return False, (f"every group of {task} is without a signal: its {p.cfg.group} images "
                           "score the same; use a larger --group, easier prompts, or a softer "
                           "reward")
    return True, f"groups without a signal: {', '.join(shares)}"


def overfits(p):
    p.random_adapter("target", 0.05)
    params = p.random_adapter("pupil", 0.0)
    states, text = p.states(p.policy())
    s = states[len(states) // 2]
    with torch.no_grad(), p.autocast:
        target = p.policy("target")(s.x, s.t, text)
    opt = torch.optim.AdamW(params, lr=p.cfg.lr)
    first = last = None
    for _ in range(p.cfg.fit_steps):
        with p.autocast:
            loss = sampler.kl(p.policy("pupil")(s.x, s.t, text), target, s).mean()
        last = loss.item()
        first = last if first is None else first
        if last < first / 4 or not loss.requires_grad:
            break
        opt.zero_grad()
        loss.backward()
        opt.step()
    if not last < first / 2:
        return False, (f"the KL to one fixed target went from {first:.1e} to {last:.1e} in "
                       f"{p.cfg.fit_steps} steps, expected half; the adapter does not learn: "
                       "check its gradient and --lr")
    return True, f"the KL to one fixed target fell from {first:.1e} to {last:.1e}"


def teachers_are_better(p):
    found = []
    for task, teacher in (p.teachers or {}).items():
        if task not in p.tasks:
            continue
        whole = teacher.get("net")
        own = p.scored(task, "ode", None if whole else task, whole)["total"]
        gap, error = difference(own, p.scored(task, "ode")["total"])
        found.append(f"{task} {gap:+.3f} +- {error:.3f}")
        if gap < -2 * error:
            return False, (f"teacher minus base on its own task is {found[-1]}: it is worse than "
                           "the base; check its file, its TASK= and --guidance, or train it again")
        if gap <= 2 * error:
            found[-1] += " (cannot tell; use a larger --per-task)"
    return True, f"teacher minus base: {', '.join(found) or 'nothing to compare'}"


def one_update(p, ranks, folder):
    """The B tensors of an adapter after one update on the CPU: {name: tensor}."""
    model = str(Path(p.cfg.model).absolute())
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks > 1 else []), str(ROOT / "train_grpo.py"),
               *f"--tasks {p.world.judge} --iters 1 --batch 8 --group 4 --steps 4 --noisy 0 3 "
               f"--device cpu --name ranks-{ranks} --model".split(), model]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"{ranks} rank(s): {done.stderr.strip().splitlines()[-1]}")
    tensors = read(Path(folder) / f"runs/ranks-{ranks}/adapter.pt", p.net)["tensors"]
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".B")}


def two_ranks_are_one(p):
    if p.world.name != "tiny":
        return True, "skipped: it would load this model twice (the tiny world has this check)"
    with tempfile.TemporaryDirectory() as folder:
        one, two = (one_update(p, ranks, folder) for ranks in (1, 2))
    change = sum(B.norm().item() ** 2 for B in one.values()) ** 0.5
    apart = sum((B - two[name]).norm().item() ** 2 for name, B in one.items()) ** 0.5
    if not apart < 0.01 * change:
        return False, (f"after one update two ranks are {apart:.1e} from one, of a change of "
                       f"{change:.1e}, expected 1% at most; gradients are not averaged over ranks, "
                       "or ranks draw other prompts or noise")
    return True, f"after one update they are {apart:.1e} apart, of a change of {change:.1e}"


CHECKS = {"room": room, "adapters": adapters_fit, "ratio": ratio_is_one, "sde": sde_fits_ode,
          "kl": kl_learns, "overfit": overfits, "rewards": rewards_differ,
          "signal": groups_have_signal, "sde-scores": sde_scores_alike,
          "teachers": teachers_are_better, "ranks": two_ranks_are_one}


def examine(p):
    """Run all checks, print a line for each, and return how many failed."""
    failed = 0
    for name, check in CHECKS.items():
        try:
            ok, text = check(p)
        except (ValueError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            ok, text = False, f"could not be made: {' '.join(str(error).split())}"
        failed += not ok
        print(f"{'ok' if ok else 'FAIL'} {name}: {text}", flush=True)
    return failed


def main(cfg):
    if examine(Patient(cfg)):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
