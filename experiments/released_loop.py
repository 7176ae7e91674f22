"""
The training loop that the authors of Flow-OPD released, made again from this project's pieces.

    python -m experiments.released_loop --teachers ckpt/*.pt      # -> runs/released/log.jsonl

It is there to be timed beside train_opd.py (experiments/bench.py). So the network, the sampler's
formulas, the optimiser and the verifiers are this project's own, and only the loop is theirs. What
it does, with the line of CostaliyA/Flow-OPD 434ab16 (OPD: scripts/train_sd3_opd_mix.py, roll:
flow_grpo/diffusers_patch/sd3_pipeline_with_logprob.py, conf: config/grpo.py, base: config/base.py):

- Every teacher is a float32 copy of the whole transformer with its adapter, and so is the anchor,
  beside the student (OPD:893-924). All of them stay on the device. A teacher that only anchors is
  one copy, the anchor's.
- An iteration is of one task (OPD:1120). Each of its sampling batches has images of many prompts
  (OPD:111). Its prompts are encoded (OPD:1199-1205), all K steps take noise (roll:139-173), and its
  images are decoded at once (roll:181-184). Threads score them meanwhile (OPD:1246).
- Images whose advantage is 0 are left out (OPD:1446-1460); the others are shuffled (OPD:1469).
- Then, batch by batch, and in each batch step by step for all steps but the last (OPD:1494-1512):
  the student's forward pass, the teacher's (OPD:1565), the anchor's (OPD:1597-1664), and the
  backward pass (OPD:1803). So the targets are computed anew in every inner epoch. There are two
  optimiser steps (conf:102), and the moving average is called after every batch (OPD:1820).
- The teacher's advantage is not stopped, and no KL has dt (OPD:1667-1688, OPD:1754-1767).

Where there was a choice, the faster way was taken. Only the teacher of the iteration's task runs,
as released. The prompts' vectors come from the world; the released run keeps SD3.5's three text
encoders on the GPU. Teachers run under autocast here; released, they run outside of it (OPD:1068).
"""
import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoints.teachers import find_anchor, read_teachers
from plumbing import cli, dist
from plumbing.average import Average
from plumbing.files import write_text
from plumbing.folder import run_folder
from rewards import advantages, choose_rewards, score
from sampler import draw_noise, encode, log_prob, schedule, sde_step, velocity
from worlds import open_world, presets
from worlds.prompts import read_mix

LAST = 0.99              # of the K steps, the first int(0.99 K) are trained (conf:104)
CLIP = 1e-4              # base:99
MOST = 5.0               # an advantage is at most this (base:97)
A = 0.7                  # the SDE's noise level (base:61)


@dataclass
class Config:
    # --- what
    # The teachers, one per task: PATH or TASK=PATH.
    teachers: list[str] = field(default_factory=list)
    # The base: a safetensors file or SD3.5's folder.
    model: str = "ckpt/tiny.safetensors"
    # The task whose teacher anchors all prompts (default: the teacher that is marked so).
    anchor: str = ""
    # TASK=N: how many iterations of a cycle each task has (default: the world's).
    ratio: list[str] = field(default_factory=list)
    # Name of the run.
    name: str = "released"

    # --- loop
    # Number of iterations.
    iters: int = 4
    # Images per iteration.
    batch: int = 64
    # Images per prompt (G).
    group: int = 4
    # Images per forward pass (released: 4 on each of 8 GPUs).
    micro: int = 4
    # Steps of a rollout (K).
    steps: int = 8
    # Passes over the images of an iteration.
    inner_epochs: int = 1
    # Guidance scale.
    guidance: float = 1.0
    # Score the images, as released.
    score: bool = True
    # Leave out images whose advantage is 0, as released.
    drop: bool = True

    # --- student
    # Rank of the student's new LoRA.
    lora_r: int = 32
    # Alpha of that LoRA. Its scale is alpha / r.
    lora_alpha: float = 64.0
    # Weight of the KL to the anchor.
    beta: float = 0.04
    # Learning rate of AdamW.
    lr: float = 1e-4

    # --- machine
    # Side of the images in pixels (default: the world's).
    size: int | None = None
    # Dtype of the computation on a GPU. On a CPU it is always float32.
    amp: str = "float16"
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda or cpu.
    device: str = "auto"


PRESETS = {"sd3": dict(size=512, batch=256, group=16, steps=10, guidance=4.5)}

# ------------------------------------------------------------------ the loss


def released_kl(mean, mean_target, sigma):
    """OPD:1670: the KL of a step with sigma_t^2 where the variance is sigma_t^2 dt. (B, 1, 1, 1)"""
    difference = ((mean - mean_target) ** 2).mean(dim=(1, 2, 3), keepdim=True)
    return difference / (2 * sigma ** 2)


def loss_of(mean, logp, mean_teacher, mean_anchor, logp_old, sigma, beta):
    """OPD:1667-1767 with reward_mode kl_only and kl_scale -1. Means (B, C, H, W), logp (B,)."""
    kl = released_kl(mean, mean_teacher, sigma).squeeze(-1).squeeze(-1)         # (B, 1)
    adv = (-kl).clamp(-MOST, MOST)
    ratio = (logp - logp_old).exp()                                             # (B,)
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    return loss + beta * released_kl(mean, mean_anchor, sigma).mean()


# ------------------------------------------------------------------ the loop


class Loop:
    """The networks, the optimiser and the two halves of an iteration.

    model: a Model in float32; teachers: {task: adapter}; anchor: a task; mix: {task: its iterations
    in a cycle}; world: judges the images.
    """

    def __init__(self, model, world, teachers, anchor, mix, cfg):
        self.model = model
        self.world = world
        self.cfg = cfg
        self.tasks = list(teachers)
        self.times = schedule(cfg.steps).to(model.mmdit.pos_embed.device)
        self.trained = int(LAST * cfg.steps)
        self.teachers = {task: self.whole(teacher) for task, teacher in teachers.items()
                         if mix[task]}
        self.anchor = self.whole(teachers[anchor])
        self.student = model.mmdit
        self.student.add_adapter("student", cfg.lora_r, cfg.lora_alpha, trainable=True)
        self.params = [p for p in self.student.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(self.params, lr=cfg.lr, weight_decay=1e-4)
        self.average = Average(self.student, 0.9, 8)
        self.autocast = dist.autocast(self.times.device, cfg.amp)
        self.scaler = dist.loss_scaler(self.times.device, cfg.amp)
        self.threads = ThreadPoolExecutor(8)
        self.updates = 0

    def whole(self, teacher):
        """A copy of the whole transformer with the teacher's adapter on it."""
        net = copy.deepcopy(self.model.mmdit)
        net.add_adapter("teacher", teacher["r"], teacher["alpha"], teacher["tensors"])
        return net

    def step(self, net, adapter, x, k, text):
        """Mean and std of step k from x (b, C, H, W)."""
        t = self.times[k].expand(len(x))
        with self.autocast:
            v = velocity(net, x, t, text, self.cfg.guidance, adapter).float()
        return sde_step(x, v, self.times[k], self.times[k + 1], A, self.times[1])

    @torch.no_grad()
    def rollout(self, noise, text):
        """noise (b, K + 1, C, H, W) -> x (b, K + 1, C, H, W) and logp (b, K)."""
        xs = [noise[:, 0]]
        logps = []
        for k in range(self.cfg.steps):
            mean, std = self.step(self.student, "student", xs[-1], k, text)
            xs.append(mean + std * noise[:, k + 1])
            logps.append(log_prob(xs[-1], mean, std))
        return torch.stack(xs, 1), torch.stack(logps, 1)

    def sample(self, prompts, it):
        """Sampling batches one by one. prompts: one for each image, the G of a prompt in a row.

        Returns samples [(x, logp, text), ...] and rewards (B,), in the order of prompts. A batch
        has images of many prompts (OPD:111).
        """
        order = torch.randperm(len(prompts)).tolist()
        samples = [None] * len(prompts)
        scores = []
        spec = None
        if self.cfg.score:
            spec = choose_rewards([prompts[0]["task"]], [], self.world, share=0)[prompts[0]["task"]]
        for start in range(0, len(prompts), self.cfg.micro):
            at = order[start:start + self.cfg.micro]
            metas = [prompts[i] for i in at]
            text = encode(self.model.text, [meta["prompt"] for meta in metas])
            noise = draw_noise([(self.cfg.seed, it, i) for i in at], self.cfg.steps,
                               self.model.latent_shape())
            x, logp = self.rollout(noise.to(self.times.device), text)
            images = self.model.images(x[:, -1])
            if spec:
                scores.append(self.threads.submit(score, spec, images, metas, self.world))
            for row, i in enumerate(at):
                samples[i] = (x[row], logp[row], text.rows([row]))
        rewards = torch.zeros(len(prompts))
        if spec:
            scored = [torch.as_tensor(part.result()["total"]) for part in scores]
            rewards[order] = torch.cat(scored)
        return samples, rewards

    def kept(self, rewards):
        """The images that are trained on: those with an advantage, and some to fill the batches."""
        if not self.cfg.drop:
            return torch.arange(len(rewards))
        adv, _ = advantages(rewards, torch.zeros(len(rewards)), self.cfg.group, "batch")
        mask = adv != 0
        batches = len(rewards) // self.cfg.micro
        others = torch.where(~mask)[0]
        short = -int(mask.sum()) % batches
        if len(others) >= short:
            mask[others[torch.randperm(len(others))[:short]]] = True
        if not mask.any():
            raise ValueError("--drop: every image has the advantage 0, so none is left to train "
                             "on, and the released loop stops here too; expected --no-drop")
        return torch.where(mask)[0]

    def state_loss(self, part, k, task):
        """The loss of step k of a micro-batch: three forward passes. part: samples."""
        x, x_next, logp_old, text = together(part, k)
        mean, std = self.step(self.student, "student", x, k, text)
        logp = log_prob(x_next, mean, std)
        with torch.no_grad():
            mean_teacher, _ = self.step(self.teachers[task], "teacher", x, k, text)
            mean_anchor, _ = self.step(self.anchor, "teacher", x, k, text)
        sigma = std / (self.times[k] - self.times[k + 1]).sqrt()
        return loss_of(mean, logp, mean_teacher, mean_anchor, logp_old, sigma, self.cfg.beta)

    def train(self, samples, task):
        """One inner epoch: micro-batch by micro-batch, and in each step by step."""
        n = max(1, len(samples) // (self.cfg.batch // self.cfg.micro))
        order = torch.randperm(len(samples)).tolist()
        parts = [[samples[i] for i in order[at:at + n]] for at in range(0, len(order), n)]
        update = max(1, len(parts) // 2)                # micro-batches of an optimiser step
        for number, part in enumerate(parts):
            for k in range(self.trained):
                loss = self.state_loss(part, k, task)
                self.scaler.scale(loss / (update * self.trained)).backward()
            if (number + 1) % update == 0:
                dist.optimise(self.opt, self.scaler, self.updates)
                self.updates += 1
            self.average.step()

    def iteration(self, prompts, it):
        """prompts: one for each image, all of one task. Returns the part of images trained on."""
        samples, rewards = self.sample(prompts, it)
        samples = [samples[i] for i in self.kept(rewards).tolist()]
        for _ in range(self.cfg.inner_epochs):
            self.train(samples, prompts[0]["task"])
        return len(samples) / len(prompts)


def together(part, k):
    """samples -> their x, x_next (b, C, H, W), logp (b,) of step k, and Text."""
    x = torch.stack([x for x, _, _ in part])
    logp = torch.stack([logp for _, logp, _ in part])
    texts = [text for _, _, text in part]
    text = type(texts[0])(*(torch.cat(column) for column in zip(*texts)))
    return x[:, k], x[:, k + 1], logp[:, k], text


# ------------------------------------------------------------------ command


def check(cfg):
    cli.positive(cfg, "iters", "batch", "group", "micro", "steps", "inner_epochs", "lora_r",
                 "lora_alpha", "lr")
    if cfg.batch % cfg.group or cfg.batch % (2 * cfg.micro):
        raise ValueError(f"--batch {cfg.batch} --group {cfg.group} --micro {cfg.micro}: expected "
                         "whole groups, and an even number of forward passes of --micro images")
    if cfg.drop and not cfg.score:
        raise ValueError("--drop --no-score: without scores every advantage is 0; expected "
                         "--no-drop")


def main(cfg):
    """Returns the rows of the log."""
    check(cfg)
    _, _, device = dist.setup(cfg.device, cfg.seed)
    world = open_world(cfg.model)
    model = world.load(cfg.model, device, torch.float32, cfg.size)
    teachers = read_teachers(cfg.teachers, model.mmdit, world.tasks,
                             side=model.latent_shape()[-1])
    mix = read_mix(cfg.ratio, list(teachers), world.ratio)
    pattern = [task for task, n in mix.items() for _ in range(n)]
    anchor = find_anchor(cfg.anchor, cfg.beta, teachers)
    loop = Loop(model, world, teachers, anchor, mix, cfg)

    def draw(it):
        drawn = world.batch(pattern, cfg.batch // cfg.group, cfg.seed, it, "alternate")
        return [prompt for prompt in drawn for _ in range(cfg.group)]

    model.text.prepare([meta["prompt"] for it in range(cfg.iters) for meta in draw(it)])
    rows = []
    for it in range(cfg.iters):
        start = time.time()
        prompts = draw(it)
        part = loop.iteration(prompts, it)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.time() - start
        rows.append({"iter": it + 1, "task": prompts[0]["task"], "trained": part, "s/it": seconds,
                     "images/s": cfg.batch / seconds})
        print(rows[-1], flush=True)
    out = run_folder(cfg.name) / "log.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(out), "".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
