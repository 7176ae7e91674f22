"""
Stage 1: a teacher by Flow-GRPO. One task makes a teacher. Several make GRPO-Mix, the baseline.

    python train_grpo.py --tasks ocr                              # -> runs/grpo-ocr/adapter.pt
    torchrun --nproc_per_node=2 train_grpo.py --tasks geneval     # on CPUs: OMP_NUM_THREADS=1
    python train_grpo.py --tasks quality --anchor                 # to anchor all in stage 2
    python train_grpo.py --tasks geneval ocr preference --ratio geneval=3 ocr=1 preference=1  # mix
    torchrun --nproc_per_node=8 train_grpo.py --model stable-diffusion-3.5-medium --tasks ocr

A run that was stopped goes on where it was when the same command is given again. Its log and its
resumable state are in runs/NAME/.

One iteration: the policy samples G images per prompt with the SDE. A reward scores each final
image, and each is compared with the others of its prompt. The steps that led to the better ones
become more likely.

Papers: Flow-GRPO arXiv 2505.05470, GRPO arXiv 2402.03300, PPO arXiv 1707.06347.
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import scorers
from checkpoints.cold_start import make_learner
from checkpoints.formats import save_trained
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
    check_window,
    clipped,
    draw_noise,
    encode,
    kl,
    likelihood_ratio,
    mean_of,
    noisy_steps,
    ratio_summary,
    regroup,
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
    # The tasks to train on: one for a teacher, several for GRPO-Mix.
    tasks: list[str] = field(default_factory=lambda: ["geneval"])
    # The base: a safetensors file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # The folder of SD3.5's text encoders, if they are not beside the model.
    text_encoders: str = ""
    # TASK=DIR: the task's prompts come from this folder or hub dataset, not from the world
    # (worlds/prompts.py).
    prompts: list[str] = field(default_factory=list)
    # TASK=N: the share of each task in the prompts, e.g. geneval=3 ocr=1 (default: equal shares).
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
    # Only so many of these steps, in a row; which ones is drawn for each iteration (0: all).
    window: int = 0
    # How a noisy step adds noise: sde (Flow-GRPO) or cps.
    rollout: Literal["sde", "cps"] = "sde"
    # Noise level.
    a: float = 0.7
    # Guidance scale, in rollouts and updates alike.
    guidance: float = 1.0

    # --- policy
    # Start. none: the base; or a checkpoint in any form, whose rank and alpha the policy keeps.
    init: str = "none"
    # Rank of the LoRA, for --init none (default: by world).
    lora_r: int | None = None
    # Alpha of the LoRA, for --init none. Its scale is alpha / r.
    lora_alpha: float | None = None
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
    # Share of the iterations, at the end, in which the rate falls linearly to 0 (0: constant).
    decay: float = 0.0
    # Optimiser steps per rollout, each on an equal share of the batch.
    updates: int = 1
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
    # Move reward networks to the CPU while the policy trains (memory).
    offload: bool = False
    # Also write the result every KEEP iterations, as runs/NAME/adapter-ITER (0: never).
    keep: int = 0
    # Iterations between resumable states.
    save_every: int = 25
    # Compile the blocks of the transformer with torch.compile.
    compile: bool = False
    # Make all checks of the run, say what it would train and how much memory it needs, and end.
    dry_run: bool = False
    # Seed of everything.
    seed: int = 0
    # Device: auto, cuda, mps or cpu.
    device: str = "auto"


# Defaults that follow from --model. For SD3.5 these are the released ones (preset geneval_sd3):
# size, T5, steps, guidance, 48 groups of 24, two updates, rank, alpha, rate; a mix takes --lr 1e-4.
# Ours are iters (their teachers took thousands), micro, save_every and dtype.
# The released KL to the base leaves out dt, with beta 0.04 (0.01 for PickScore). Ours has dt, for
# which their author used 0.004 (flow_grpo issue 22); so PickScore takes --beta 0.001.
# DEVIATION: the step that is not trained takes no noise here. They compute in float16 (--amp).
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5,
                       batch=1152, group=24, updates=2, beta=0.004, ema=0.9, micro=8, iters=1000,
                       save_every=5, eval_steps=40)}
# Learning rates: (world, --full) -> default. A whole transformer takes a lower one; ours, untuned.
LR = {("tiny", False): 5e-4, ("tiny", True): 1e-5, ("sd3", False): 3e-4, ("sd3", True): 1e-5}


def summary(minibatches, kls, task, reward, signal, judge, cfg):
    """What the log says of an iteration.

    task, reward, signal: (B,), of all ranks; kls (b, S), of this rank.
    """
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
    row["kl"] = mean_of(dist.gather(kls))
    return row


def rate(it, cfg):
    """The learning rate of an iteration: constant, then falling linearly to 0 (--decay)."""
    if not cfg.decay:
        return cfg.lr
    return cfg.lr * min(1, (cfg.iters - it) / (cfg.decay * cfg.iters))


def main(cfg):
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    world = open_world(cfg.model, cfg.prompts)
    check(cfg, world, world_size)
    tasks = cfg.tasks
    rewards = choose_rewards(tasks, cfg.reward, world)
    mix = read_mix(cfg.ratio, tasks, dict.fromkeys(tasks, 1))
    pattern = [task for task, n in mix.items() for _ in range(n)]
    folder = run_folder(cfg.name or "grpo-" + "-".join(cfg.tasks))
    out = Path(cfg.out or folder / "adapter.pt")
    check_places(folder, out)
    model = world.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5,
                       cfg.text_encoders)
    check_rewards(rewards, model, world, device=device)
    if cfg.offload:
        scorers.offload()

    # The policy is an adapter on the frozen base or a whole transformer; the base is the reference.
    net, adapter, r, alpha = make_learner(cfg, model.mmdit, "policy", cfg.full)
    policy = Policy(dist.distribute(net, cfg.full, cfg.amp), adapter, cfg.guidance)
    reference = Policy(model.mmdit, None, cfg.guidance)
    sampler = Sampler(schedule(cfg.steps).to(device), cfg.rollout, cfg.a, noisy_steps(cfg, 0))
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=1e-4,
                            fused=device.type == "cuda")
    settings = {**asdict(cfg), "prompts_digest": world.prompts_digest, "world_size": world_size}
    # While the rate is constant, a run may be made longer.
    free = [] if cfg.decay else ["iters"]
    saved = resume(folder / "state.pt", settings, model.fingerprint, free)
    average = Average(net, cfg.ema, cfg.ema_every, saved)
    first = restore(saved, net, opt)
    autocast = dist.autocast(device, cfg.amp)
    scaler = dist.loss_scaler(device, cfg.amp)
    if cfg.dry_run:
        return memory.say_dry_run(cfg, model, net, rank, world_size, first)
    prepare(folder, out, rank)
    check_room(folder, out, sum(p.numel() for p in params), rank, cfg.ema > 0,
               results=1 + (cfg.iters // cfg.keep if cfg.keep else 0))
    watch = Watch(cfg, model, world, tasks, rank, world_size, device)
    log = Log(folder, rank, settings, first, cfg.track)
    health = Health(rank)
    judge = Judge(rewards, model, world)

    def draw(it):
        return world.batch(pattern, cfg.batch // cfg.group, cfg.seed, it, cfg.mix)

    def save(path):
        with average.applied():
            return save_trained(path, net, adapter, model, rank, task="+".join(tasks),
                                reward=rewards, anchor=cfg.anchor, r=r, alpha=alpha,
                                settings=settings)

    texts = [prompt["prompt"] for it in range(first, cfg.iters) for prompt in draw(it)]
    model.text.prepare(watch.texts + texts, *dist.local())
    dist.barrier()

    clock = Clock(device)
    stop = Stop()
    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, disable=rank > 0):
        # 1. Prompts. Every rank draws the same list, and takes its own share of the images.
        clock("prompts")
        prompts = draw(it)                                        # each is drawn G times
        mine = dist.share(cfg.batch, cfg.updates, rank, world_size)
        asked = [prompts[i // cfg.group] for i in mine]
        text = encode(model.text, [prompt["prompt"] for prompt in asked])
        task = torch.tensor([tasks.index(prompt["task"]) for prompt in prompts], device=device)
        task = task.repeat_interleave(cfg.group)                  # (B,), of all ranks
        keys = [(cfg.seed, "grpo", it, i) for i in mine]
        noise = draw_noise(keys, cfg.steps, model.latent_shape()).to(device)

        # 2. Rollout. The policy samples. Finished images are judged while it goes on.
        clock("rollout")
        states = []                                               # a State has b images at a step
        sampler.noisy = noisy_steps(cfg, it)
        steps = torch.tensor(sampler.noisy, device=device).expand(len(mine), -1)        # (b, S)
        for part in torch.arange(len(mine), device=device).split(cfg.micro):
            with autocast:
                trajectory = sampler.rollout(policy, noise[part], text.rows(part))
            judge.submit(trajectory.x[:, -1], [asked[i] for i in part])
            states += visited(trajectory, steps[part], part, sampler)

        # 3. Advantages. Is an image better than the others of its prompt? All its steps share that.
        clock("advantages")
        reward = torch.tensor(judge.totals(), device=device)
        reward = dist.gather_batch(reward, cfg.batch, cfg.updates)          # (B,), of all ranks
        adv, signal = advantages(reward, task, cfg.group, cfg.adv_std)
        my_adv, my_signal = adv[mine], signal[mine]               # (b,), of this rank
        if cfg.offload:
            scorers.offload()
        minibatches = []          # lists of States; ranks may have unequal numbers of them
        for images in torch.arange(len(mine), device=device).chunk(cfg.updates):
            counted = None if cfg.full else my_signal             # a sharded net: all ranks alike
            minibatches.append(regroup(states, images, cfg.micro, counted))

        # 4. Update. Make the steps that led to better images more likely, near the base.
        clock("update")
        grad_norm = 0.0
        for param_group in opt.param_groups:
            param_group["lr"] = rate(it, cfg)
        for minibatch in minibatches:
            n_states = dist.sync_sum(sum(my_signal[s.images].float().sum() for s in minibatch))
            if n_states == 0:
                continue
            for s in minibatch:
                dist.reduce_now(policy.net, s is minibatch[-1])   # once per update
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
                scaler.scale(loss * world_size).backward()        # ranks are averaged, not summed
                s.ratio = ratio.detach()[my_signal[s.images]]
            grad_norm = dist.optimise(opt, scaler, it)            # clip, step, zero_grad
            average.step()

        # 5. Log and save.
        clock("summary")
        kls = table(minibatches, "kl", *steps.shape, my_signal)
        row = summary(minibatches, kls, task, reward, signal, judge, cfg)
        log({"iter": it + 1, **row, "grad_norm": grad_norm, **clock.row(cfg.batch),
             **watch(policy, average, it + 1)}, watch.pictures)
        health({"iter": it + 1, **row})
        if cfg.keep and (it + 1) % cfg.keep == 0:
            save(folder / f"adapter-{it + 1}.pt")
        stopping = stop.asked()
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters or stopping:
            save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings,
                       base=model.fingerprint, average=average.state())
        if stopping:
            stop.leave(it + 1, folder / "state.pt", rank)

    out = save(out)
    if rank == 0:
        print(f"wrote {out}")


def check(cfg, world, world_size):
    """ValueError for all that can be known to be wrong before any time is spent.

    It also fills in the defaults of lr, lora_r and lora_alpha.
    """
    if cfg.lr is None:
        cfg.lr = LR.get((world.name, cfg.full), LR["tiny", cfg.full])
    cli.lora_defaults(cfg, world.lora, cfg.full)
    cli.positive(cfg, "iters", "batch", "group", "steps", "a", "lora_r", "lora_alpha", "lr",
                 "updates", "micro", "save_every", "clip", "ema_every")
    cli.check_training(cfg)
    for task in cfg.tasks:
        if task not in world.tasks:
            raise ValueError(f"--tasks {task}: unknown task; the world of this model has "
                             f"{', '.join(world.tasks)}; --prompts {task}=DIR makes a new one")
    if not cfg.tasks or len(set(cfg.tasks)) < len(cfg.tasks):
        raise ValueError(f"--tasks {' '.join(cfg.tasks)}: expected each task once, at least one")
    if cfg.group < 2:
        raise ValueError(f"--group {cfg.group}: an advantage compares images of one prompt, "
                         "so at least 2 are needed")
    world.check_prompts(cfg.tasks)
    cli.check_rollout(cfg, world_size)
    check_window(cfg)
    check_watch(cfg, world, cfg.tasks)


if __name__ == "__main__":
    cli.run(main, Config, presets=presets(PRESETS))
