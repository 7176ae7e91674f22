"""
Stage 1: a teacher by Flow-GRPO. One reward makes a teacher. Several make GRPO-Mix, the baseline.

    python train_grpo.py --tasks ocr                              # -> runs/grpo-ocr/adapter.pt
    torchrun --nproc_per_node=2 train_grpo.py --tasks geneval     # on CPUs: OMP_NUM_THREADS=1
    python train_grpo.py --tasks quality --anchor                 # to anchor all in stage 2
    python train_grpo.py --tasks geneval ocr quality --ratio geneval=3 ocr=1 quality=1   # a mix
    torchrun --nproc_per_node=8 train_grpo.py --model stable-diffusion-3.5-medium --tasks ocr

A run that was stopped goes on where it was when the same command is given again. Its log and its
resumable state are in runs/NAME/.

One iteration: the policy samples G images per prompt with the SDE. A reward scores each final
image, and each is compared with the others of its prompt. The steps that led to the better ones
become more likely.

Papers: Flow-GRPO arXiv 2505.05470, GRPO arXiv 2402.03300, PPO arXiv 1707.06347.
"""
import copy
import time
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import scorers
from checkpoints.formats import save_trained
from plumbing import cli, dist
from plumbing.log import Log
from plumbing.state import restore, resume, save_state
from rewards import Judge, check_rewards, parse_reward
from sampler import (
    Policy,
    Sampler,
    check_window,
    clipped,
    draw_noise,
    encode,
    kl,
    likelihood_ratio,
    ratio_summary,
    schedule,
    visited,
)
from worlds import open_world, presets
from worlds.prompts import read_mix


@dataclass
class Config:
    # --- what
    # The tasks to train on: one for a teacher, several for GRPO-Mix.
    tasks: list[str] = field(default_factory=lambda: ["geneval"])
    # The base: a safetensors file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # The folder of SD3.5's text encoders, if they are not beside the model.
    text_encoders: str = ""
    # TASK=DIR: the task's prompts come from this folder, not from the world (worlds/prompts.py).
    prompts: list[str] = field(default_factory=list)
    # TASK=N: the share of each task in the prompts, e.g. geneval=3 ocr=1 quality=1 (default:
    # equal shares).
    ratio: list[str] = field(default_factory=list)
    # How tasks take turns. batch: prompt by prompt; alternate: iteration by iteration, as released.
    mix: Literal["alternate", "batch"] = "alternate"
    # A reward for each task, such as "geneval=0.5,ocr=0.5" (default: the world's; in a mix 0.8 of
    # it and 0.2 of quality, as released).
    reward: list[str] = field(default_factory=list)
    # Mark the result as the quality teacher that anchors all prompts (MAR).
    anchor: bool = False
    # Name of the run (default: grpo-TASKS).
    name: str = ""
    # File of the result (default: runs/NAME/adapter.pt).
    out: str = ""

    # --- rollout
    # Number of iterations. Each has one rollout of --batch images.
    iters: int = 300
    # Images per iteration, over all ranks.
    batch: int = 96
    # Images per prompt (G).
    group: int = 12
    # Steps of a rollout (K).
    steps: int = 8
    # Steps FROM TO (exclusive) that take noise and are trained. The others follow the ODE.
    noisy: list[int] = field(default_factory=lambda: [0, 5])
    # How a noisy step adds noise: sde (Flow-GRPO) or cps.
    rollout: Literal["sde", "cps"] = "sde"
    # Noise level.
    a: float = 0.7
    # Guidance scale, in rollouts and updates alike.
    guidance: float = 1.0

    # --- policy
    # Rank of the LoRA.
    lora_r: int = 16
    # Alpha of the LoRA. Its scale is alpha / r.
    lora_alpha: float = 32.0
    # Train the whole transformer instead of an adapter.
    full: bool = False

    # --- loss
    # Weight of the KL to the base.
    beta: float = 0.01
    # Clip range of PPO (sampler.log_prob says why it is so small).
    clip: float = 1e-4
    # Advantages are divided by the std of all rewards, of their task's, or of their group's.
    adv_std: Literal["batch", "task", "group"] = "batch"

    # --- optimiser
    # Learning rate of AdamW (default: by world, and lower with --full; see LR in this file).
    lr: float | None = None
    # Optimiser steps per rollout, each on an equal share of the batch.
    updates: int = 1
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
    # Move reward networks to the CPU while the policy trains (memory).
    offload: bool = False
    # Also write the result every KEEP iterations, as runs/NAME/adapter-ITER (0: never).
    keep: int = 0
    # Iterations between resumable states.
    save_every: int = 25
    # Compile the blocks of the transformer with torch.compile.
    compile: bool = False
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


# Defaults that follow from --model. For SD3.5 these are the released ones (preset geneval_sd3):
# size, T5, steps, guidance, 48 groups of 24, two updates, rank, alpha, rate; a mix takes --lr 1e-4.
# Ours are iters (their teachers took thousands), micro, save_every and dtype.
# The released KL to the base leaves out dt, with beta 0.04 (0.01 for PickScore). Ours has dt, for
# which their author used 0.004 (flow_grpo issue 22); so PickScore takes --beta 0.001.
# DEVIATION: the step that is not trained takes no noise here. There is no EMA of the adapter.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5,
                       batch=1152, group=24, updates=2, lora_r=32, lora_alpha=64.0, beta=0.004,
                       micro=8, iters=1000, save_every=5)}
# Learning rates: (world, --full) -> default. A whole transformer takes a lower one; ours, untuned.
LR = {("tiny", False): 5e-4, ("tiny", True): 1e-5, ("sd3", False): 3e-4, ("sd3", True): 1e-5}


def advantages(reward, task, group, adv_std):
    """How much better is an image than the others of its prompt?

    reward (B,): of all ranks, the images of a group one after another; task (B,). Returns adv (B,)
    and signal (B,), which is False where all rewards of a group are equal.
    adv = (reward - mean of the group) / std, clipped to +-5. The std is of all rewards, of those of
    the same task, or of those of the group.
    """
    grouped = reward.view(-1, group)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    std = torch.full_like(reward, reward.std(unbiased=False))
    if adv_std == "group":
        std = grouped.std(1, unbiased=False).repeat_interleave(group)
    if adv_std == "task":
        for n in task.unique():
            std[task == n] = reward[task == n].std(unbiased=False)
    adv = (centred / (std + 1e-4)).clamp(-5, 5)          # 1e-4 as released
    signal = grouped.max(1).values > grouped.min(1).values
    return adv, signal.repeat_interleave(group)


def check(cfg, world, world_size):
    """ValueError for all that can be known to be wrong before any time is spent.

    It also fills in the default of lr.
    """
    if cfg.lr is None:
        cfg.lr = LR.get((world.name, cfg.full), LR["tiny", cfg.full])
    cli.positive(cfg, "iters", "batch", "group", "steps", "a", "lora_r", "lora_alpha", "lr",
                 "updates", "micro", "save_every", "clip")
    for task in cfg.tasks:
        if task not in world.tasks:
            raise ValueError(f"--tasks {task}: unknown task; the world of this model has "
                             f"{', '.join(world.tasks)}; --prompts {task}=DIR makes a new one")
    if not cfg.tasks or len(set(cfg.tasks)) < len(cfg.tasks):
        raise ValueError(f"--tasks {' '.join(cfg.tasks)}: expected each task once, at least one")
    if cfg.reward and len(cfg.reward) != len(cfg.tasks):
        raise ValueError(f"--reward: got {len(cfg.reward)} values for {len(cfg.tasks)} tasks "
                         f"({' '.join(cfg.tasks)})")
    if cfg.group < 2:
        raise ValueError(f"--group {cfg.group}: an advantage compares images of one prompt, "
                         "so at least 2 are needed")
    without = [task for task in cfg.tasks if task not in world.reward]
    if without and not cfg.reward:
        raise ValueError(f"--tasks {' '.join(cfg.tasks)}: {', '.join(without)} has no reward of "
                         "its own; expected --reward, one a task")
    world.check_prompts(cfg.tasks)
    cli.check_rollout(cfg, world_size)
    check_window(cfg)


def choose_rewards(cfg, world):
    """{task: spec}, from --reward. By default the world's, in a mix 0.8 of it + 0.2 of quality."""
    if cfg.reward:
        return {task: parse_reward(spec) for task, spec in zip(cfg.tasks, cfg.reward)}
    rewards = {task: parse_reward(world.reward[task]) for task in cfg.tasks}
    if len(cfg.tasks) > 1:
        for task, spec in rewards.items():
            rewards[task] = {name: 0.8 * weight for name, weight in spec.items()}
            rewards[task][world.judge] = rewards[task].get(world.judge, 0) + 0.2
    return rewards


def make_policy(cfg, base):
    """The net that learns, and the name of its adapter (None: the whole net learns)."""
    net = copy.deepcopy(base).float().requires_grad_(True) if cfg.full else base
    torch.manual_seed(cfg.seed)
    adapter = None
    if not cfg.full:
        adapter = "policy"
        net.add_adapter(adapter, cfg.lora_r, cfg.lora_alpha, trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        dist.compile_blocks(net)
    return net, adapter


def summary(minibatches, task, reward, signal, judge, cfg):
    """What the log says of an iteration. task, reward, signal: (B,), of all ranks."""
    row = {}
    reported = torch.tensor(judge.reported(), device=reward.device)
    reported = dist.gather_batch(reported, cfg.batch, cfg.updates)
    for n, name in enumerate(cfg.tasks):
        if (task == n).any():
            row[f"reward_{name}"] = reported[task == n].mean().item()
    row.update(judge.components())
    row["reward_std"] = reward.std(unbiased=False).item()
    row["zero_std_ratio"] = 1 - signal.float().mean().item()
    row.update(ratio_summary(minibatches, cfg.clip))
    kls = torch.cat([s.kl for s in chain(*minibatches)])
    row["kl"] = dist.gather(kls).mean().item()
    return row


def main(cfg):
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    world = open_world(cfg.model, cfg.prompts)
    check(cfg, world, world_size)
    tasks = cfg.tasks
    mix = read_mix(cfg.ratio, tasks, dict.fromkeys(tasks, 1))
    pattern = [task for task, n in mix.items() for _ in range(n)]
    rewards = choose_rewards(cfg, world)
    model = world.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5,
                       cfg.text_encoders)
    check_rewards(rewards, model, world, device=device)
    if cfg.offload:
        scorers.offload()
    name = cfg.name or "grpo-" + "-".join(tasks)
    folder = Path("runs") / name
    out = Path(cfg.out or folder / "adapter.pt")

    # The policy is an adapter on the frozen base or a whole transformer; the base is the reference.
    net, adapter = make_policy(cfg, model.mmdit)
    policy = Policy(dist.distribute(net, cfg.full), adapter, cfg.guidance)
    reference = Policy(model.mmdit, None, cfg.guidance)
    sampler = Sampler(schedule(cfg.steps).to(device), cfg.rollout, cfg.a, range(*cfg.noisy))
    trained = torch.arange(*cfg.noisy, device=device)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=1e-4)
    settings = {**asdict(cfg), "prompts_digest": world.prompts_digest, "world_size": world_size}
    # The rate is constant, so a run may be made longer.
    saved = resume(folder / "state.pt", settings, model.fingerprint, free=["iters"])
    first = restore(saved, net, opt)
    autocast = dist.autocast(device)
    log = Log(folder, rank, settings, first)
    judge = Judge(rewards, model, world)

    def draw(it):
        return world.batch(pattern, cfg.batch // cfg.group, cfg.seed, it, cfg.mix)

    def save(path):
        return save_trained(path, net, adapter, model, rank, task="+".join(tasks),
                            reward=rewards, anchor=cfg.anchor, r=cfg.lora_r, alpha=cfg.lora_alpha,
                            settings=settings)

    texts = [prompt["prompt"] for it in range(first, cfg.iters) for prompt in draw(it)]
    model.text.prepare(texts, *dist.local())
    dist.barrier()

    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, disable=rank > 0):
        start = time.time()
        # 1. Prompts. Every rank draws the same list, and takes its own share of the images.
        prompts = draw(it)                                        # each is drawn G times
        mine = dist.share(cfg.batch, cfg.updates, rank, world_size)
        asked = [prompts[i // cfg.group] for i in mine]
        text = encode(model.text, [prompt["prompt"] for prompt in asked])
        task = torch.tensor([tasks.index(prompt["task"]) for prompt in prompts], device=device)
        task = task.repeat_interleave(cfg.group)                  # (B,), of all ranks
        keys = [(cfg.seed, "grpo", it, i) for i in mine]
        noise = draw_noise(keys, cfg.steps, model.latent_shape()).to(device)

        # 2. Rollout. The policy samples. Finished images are judged while it goes on.
        minibatches = []                                          # lists of States
        steps = trained.expand(len(mine), -1)                     # (B, S)
        for images in torch.arange(len(mine), device=device).chunk(cfg.updates):
            states = []
            for part in images.split(cfg.micro):                  # one forward pass each
                with autocast:
                    trajectory = sampler.rollout(policy, noise[part], text.rows(part))
                judge.submit(trajectory.x[:, -1], [asked[i] for i in part])
                states += visited(trajectory, steps[part], part, sampler)
            minibatches.append(states)

        # 3. Advantages. Is an image better than the others of its prompt? All its steps share that.
        reward = torch.tensor(judge.totals(), device=device)
        reward = dist.gather_batch(reward, cfg.batch, cfg.updates)          # (B,), of all ranks
        adv, signal = advantages(reward, task, cfg.group, cfg.adv_std)
        my_adv, my_signal = adv[mine], signal[mine]
        if cfg.offload:
            scorers.offload()

        # 4. Update. Make the steps that led to better images more likely, near the base.
        grad_norm = 0.0
        for states in minibatches:
            # Images without a signal are left out, so ranks have unequal numbers of states. A State
            # without any signal is skipped. But each rank runs at least one, for the all-reduce.
            n_states = dist.sync_sum(sum(my_signal[s.images].float().sum() for s in states))
            if n_states == 0:
                continue
            states = [s for s in states if my_signal[s.images].any()] or states[-1:]
            for s in states:
                dist.reduce_now(policy.net, s is states[-1])      # once per update
                with autocast:
                    v = policy(s.x, s.t, text.rows(s.images))
                    ratio = likelihood_ratio(v, s)
                    loss = clipped(ratio, my_adv[s.images], cfg.clip)       # (b,)
                    if cfg.beta:
                        with torch.no_grad():
                            v_base = reference(s.x, s.t, text.rows(s.images))
                        kl_base = kl(v, v_base, s)
                        loss = loss + cfg.beta * kl_base
                        s.kl = kl_base.detach()
                    loss = (loss * my_signal[s.images]).sum() / n_states
                (loss * world_size).backward()                    # ranks are averaged, not summed
                s.ratio = ratio.detach()[my_signal[s.images]]
            grad_norm = dist.clip_gradients(params)
            dist.check_finite(grad_norm, it)
            opt.step()
            opt.zero_grad()

        # 5. Log and save.
        row = summary(minibatches, task, reward, signal, judge, cfg)
        seconds = time.time() - start
        log({"iter": it + 1, **row, "grad_norm": grad_norm, "s/it": seconds,
             "images/s": cfg.batch / seconds})
        if cfg.keep and (it + 1) % cfg.keep == 0:
            save(folder / f"adapter-{it + 1}.pt")
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters:
            save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings,
                       base=model.fingerprint)

    out = save(out)
    if rank == 0:
        print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
