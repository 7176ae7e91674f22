"""
Stage 1: a teacher by Flow-GRPO. One reward makes a teacher; several with a ratio are GRPO-Mix, the baseline the paper beats.

    python train_grpo.py --tasks ocr                                      # -> ckpt/ocr.pt, log and resumable state in runs/grpo-ocr/
    torchrun --nproc_per_node=2 train_grpo.py --tasks geneval             # two ranks (on CPU: OMP_NUM_THREADS=1, one rank a core)
    python train_grpo.py --tasks quality --anchor                         # marked as the teacher that anchors all prompts in stage 2
    python train_grpo.py --tasks geneval ocr quality --ratio 3 1 1        # GRPO-Mix -> runs/grpo-geneval-ocr-quality/adapter.pt
    torchrun --nproc_per_node=8 train_grpo.py --model stable-diffusion-3.5-medium --tasks ocr --prompts ocr=DIR      # SD3.5

A run that was stopped goes on where it was when the same command is given again.

One iteration: sample G images a prompt by the SDE, score the last one, compare each with its group, and make the steps that led to
the better ones more likely. Papers: Flow-GRPO arXiv 2505.05470, GRPO arXiv 2402.03300, PPO arXiv 1707.06347.
"""
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import adapters
import model as models
import util
from prompts import check_prompts, world_of
from rewards import check_rewards, offload, parse_reward, score
from sampler import Trajectory, draw_noise, encode, gaussian_kl, log_prob, rollout, schedule, step, velocity


@dataclass
class Config:
    model: str = "ckpt/tiny.safetensors"                                 # the base: the tiny world's file, or SD3.5's folder or hub name
    prompts: list[str] = field(default_factory=list)                     # TASK=DIR: that folder's prompts (prompts.py) instead of the world's own
    tasks: list[str] = field(default_factory=lambda: ["geneval"])        # one task: a teacher; several: GRPO-Mix
    ratio: list[int] = field(default_factory=list)                       # prompts of each task, e.g. 3 1 1 (default: all alike)
    reward: list[str] = field(default_factory=list)                      # a reward for each task, e.g. "geneval=0.5,ocr=0.5" (default: the world's REWARD)
    anchor: bool = False                                                 # mark the result as the task-agnostic quality teacher (MAR)
    name: str = ""                                                       # run name (default: grpo-TASKS)
    out: str = ""                                                        # result (default: ckpt/TASK.pt, or runs/NAME/adapter.pt for a mix)
    iters: int = 300                                                     # iterations, each one rollout of `batch` images
    batch: int = 96                                                      # images an iteration, over all ranks
    group: int = 12                                                      # G, images a prompt
    steps: int = 8                                                       # K, steps of a rollout
    noisy: list[int] = field(default_factory=lambda: [0, 5])             # steps FROM TO (exclusive) take noise and are trained; the rest are ODE
    rollout: Literal["sde", "cps"] = "sde"                               # how noise is added
    a: float = 0.7                                                       # noise level
    guidance: float = 1.0                                                # w, in rollouts and updates alike
    lora_r: int = 16                                                     # LoRA rank
    lora_alpha: float = 32.0                                             # LoRA scale is alpha / r
    full: bool = False                                                   # train the whole transformer instead of an adapter
    lr: float = 5e-4                                                     # AdamW
    beta: float = 0.01                                                   # weight of the KL to the base
    clip: float = 1e-4                                                   # PPO clip range (see sampler.log_prob for why so small)
    adv_std: Literal["batch", "group"] = "batch"                         # what advantages are divided by: all rewards' std, or the group's
    updates: int = 1                                                     # optimiser steps a rollout, each on its share of the batch
    micro: int = 96                                                      # images a forward pass, in rollouts and updates (memory)
    checkpointing: bool = False                                          # keep fewer activations and compute them again (memory)
    size: int | None = None                                              # side of the images in pixels (default: the tiny world's 32)
    t5: str = ""                                                         # SD3.5's T5: 128 or 256 tokens, or zeros (left out)
    dtype: Literal["float32", "bfloat16"] = "float32"                    # of weights that do not learn
    offload: bool = False                                                # move reward models to the CPU while the policy trains (memory)
    keep: int = 0                                                        # also write the policy every so many iterations, as runs/NAME/adapter-ITER
    save_every: int = 25                                                 # iterations between resumable states
    compile: bool = False                                                # torch.compile the blocks
    seed: int = 0                                                        # of everything
    device: str = "auto"                                                 # auto, cuda, mps, cpu


# Defaults that --model changes. For SD3.5 they are the released ones (preset geneval_sd3: 48 groups of 24, two updates, all steps but the last).
# DEVIATION: the step that is not trained takes no noise here. EMA of the adapter is left out. iters is ours: teachers took thousands.
PRESETS = {"sd3": dict(size=512, t5="128", dtype="bfloat16", steps=10, noisy=[0, 9], guidance=4.5, batch=1152, group=24, updates=2,
                       lora_r=32, lora_alpha=64.0, lr=3e-4, beta=0.04, micro=8, iters=1000)}


def advantages(reward, group, adv_std, everyone):
    """reward (B,), a group's images in a row -> adv (B,), and keep (B,): False where a whole group's rewards are equal (no signal).

    adv = (reward - mean of the group) / std, clipped to +-5; std over `everyone`'s rewards (all ranks), or each group's own.
    """
    r = reward.view(-1, group)
    centred = r - r.mean(1, keepdim=True)
    scale = r.std(1, keepdim=True, unbiased=False) if adv_std == "group" else everyone.std(unbiased=False)
    keep = (r.max(1).values > r.min(1).values).repeat_interleave(group)
    return (centred / (scale + 1e-6)).clamp(-5, 5).flatten(), keep


def ppo_loss(logp, logp_old, adv, clip):
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A) for each image: (B,), and the ratio (B,)."""
    assert logp.shape == logp_old.shape == adv.shape, "logp, logp_old and adv are all (B,)"
    ratio = (logp - logp_old).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv), ratio


def check(cfg, world_size, world):
    """All that can be known to be wrong before any time is spent."""
    util.positive(cfg, "iters", "batch", "group", "steps", "a", "lora_r", "lora_alpha", "lr", "updates", "micro", "save_every", "clip")
    for task in cfg.tasks:
        if task not in world.TASKS:
            raise ValueError(f"--tasks {task}: unknown task; this model's world has {', '.join(world.TASKS)}")
    if not cfg.tasks or len(set(cfg.tasks)) < len(cfg.tasks):
        raise ValueError(f"--tasks {' '.join(cfg.tasks)}: expected each task once, and at least one")
    for flag, value in (("ratio", cfg.ratio), ("reward", cfg.reward)):
        if value and len(value) != len(cfg.tasks):
            raise ValueError(f"--{flag}: got {len(value)} values for {len(cfg.tasks)} tasks ({' '.join(cfg.tasks)})")
    if any(n < 1 for n in cfg.ratio):
        raise ValueError(f"--ratio {cfg.ratio}: expected whole numbers of at least 1")
    if cfg.group < 2:
        raise ValueError(f"--group {cfg.group}: an advantage compares images of one prompt, so at least 2 are needed")
    if not cfg.reward and not set(cfg.tasks) <= set(world.REWARD):
        own = [task for task in cfg.tasks if task not in world.REWARD]
        raise ValueError(f"--tasks {' '.join(cfg.tasks)}: {', '.join(own)} has no reward of its own; expected --reward, one a task")
    check_prompts(world, cfg.tasks)
    util.check_rollout(cfg, world_size)


def main(cfg):
    rank, world_size, device = util.setup(cfg.device, cfg.seed)
    world = world_of(models.world_name(cfg.model), cfg.prompts)
    check(cfg, world_size, world)
    rewards = {task: parse_reward(spec) for task, spec in zip(cfg.tasks, cfg.reward or [world.REWARD[t] for t in cfg.tasks])}
    model = models.load(cfg.model, device, getattr(torch, cfg.dtype), cfg.size, cfg.t5)
    check_rewards(rewards, model, world, device=device)
    if cfg.offload:
        offload()
    pattern = [task for task, n in zip(cfg.tasks, cfg.ratio or [1] * len(cfg.tasks)) for _ in range(n)]
    name = cfg.name or "grpo-" + "-".join(cfg.tasks)
    folder = Path("runs") / name
    out = Path(cfg.out or (f"ckpt/{cfg.tasks[0]}.pt" if len(cfg.tasks) == 1 else folder / "adapter.pt"))

    # The reference is the frozen base; the policy an adapter on it or, with --full, a whole transformer of its own.
    frozen, me = model.mmdit, None if cfg.full else "policy"
    net = copy.deepcopy(frozen).float().requires_grad_(True) if cfg.full else frozen
    if not cfg.full:
        torch.manual_seed(cfg.seed)
        net.add_adapter(me, cfg.lora_r, cfg.lora_alpha, trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        util.compile_blocks(net)
    policy = util.distribute(net, cfg.full)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    settings, first = {**asdict(cfg), "world_size": world_size}, 0
    state = util.resume(folder / "state.pt", settings, model.fingerprint, free=["iters"])
    if state:
        first = state["iter"]
        util.restore(state, net, opt)
        state.clear()                                                        # with --full it is 30 GB
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    times = schedule(cfg.steps).to(device)
    trained = range(*cfg.noisy)
    prompts, images = cfg.batch // cfg.group, cfg.batch // world_size        # prompts over all ranks, images on this one
    log = util.Log(folder, rank, settings, first)

    def draw(it):
        """The prompts of an iteration: the same list on every rank."""
        rng = np.random.default_rng((cfg.seed, it))
        return [world.draw_prompt(rng, pattern[(it * prompts + j) % len(pattern)], "train") for j in range(prompts)]

    def save(path):
        task = "+".join(cfg.tasks)
        if cfg.full:
            return adapters.save_whole(path.with_suffix(".safetensors"), util.weights(net), model.file, rank, task=task, anchor=cfg.anchor)
        return adapters.save_adapter(path, rank, task=task, reward=rewards, anchor=cfg.anchor, base=model.fingerprint, r=cfg.lora_r, alpha=cfg.lora_alpha,
                                     tensors=net.adapter(me), settings=settings)

    def rate(latents, metas):
        """Each image's score by its own task's reward: a list of dicts with every component as reported, and "total"."""
        pixels, rows = model.images(latents), [None] * len(metas)
        for task, spec in rewards.items():
            theirs = [j for j, meta in enumerate(metas) if meta["task"] == task]
            if theirs:
                scores = score(spec, pixels[theirs], [metas[j] for j in theirs], world)
                for n, j in enumerate(theirs):
                    rows[j] = {name: float(values[n]) for name, values in scores.items()}
        return rows

    judge = ThreadPoolExecutor(1)
    components = [(task, name) for task, spec in rewards.items() if len(spec) > 1 for name in spec]      # of the rewards that are sums
    model.text.prepare([meta["prompt"] for it in range(first, cfg.iters) for meta in draw(it)], rank, world_size)
    util.barrier()

    for it in tqdm(range(first, cfg.iters), initial=first, total=cfg.iters, desc=name, disable=rank > 0):
        start = time.time()
        # 1. Prompts: each rank takes whole groups.
        metas = draw(it)
        mine = util.share(cfg.batch, cfg.updates, rank, world_size)          # indices into the batch of all ranks
        metas = [metas[i // cfg.group] for i in mine]
        text = encode(model.text, [m["prompt"] for m in metas])

        # 2. Rollout: the current policy samples, and remembers every state and its log-probability. What is done is judged while the rest is sampled.
        noise = draw_noise([(cfg.seed, it, i) for i in mine], cfg.steps, model.latent_shape()).to(device)
        minibatches = [rows.split(cfg.micro) for rows in torch.arange(images, device=device).chunk(cfg.updates)]
        trajs, judged = [], []
        for i in (i for part in minibatches for i in part):                  # in the very pieces of the update: same shapes, same rounding
            with autocast:
                trajs.append(rollout(net, noise[i], times, text.rows(i), cfg.guidance, me, cfg.rollout, cfg.a, trained))
            judged.append(judge.submit(rate, trajs[-1].x[:, -1], [metas[j] for j in i]))
        traj = Trajectory(*(torch.cat(parts) for parts in zip(*trajs)))

        # 3. Reward of the final image, each by its own task's, and the advantage over the group.
        rated = [row for future in judged for row in future.result()]
        reward = torch.tensor([row["total"] for row in rated], device=device)
        everyone = util.gather(reward)
        adv, keep = advantages(reward, cfg.group, cfg.adv_std, everyone)
        if cfg.offload:
            offload()

        # 4. Update: each trained step of each trajectory, scored again under the policy that now learns.
        shape = (images, len(trained))
        ratios, kls, grad_norm = torch.ones(shape, device=device), torch.zeros(shape, device=device), 0.0
        for part in minibatches:
            kept = util.sync_mean(keep[torch.cat(part)].float().sum()) * world_size      # images with a signal, over all ranks
            if kept == 0:
                continue
            pieces = [(i, k) for i in part for k in trained]
            for n, (i, k) in enumerate(pieces):
                with util.no_sync(policy, skip=n < len(pieces) - 1), autocast:
                    x, x_next, sub, t, t_next = traj.x[i, k], traj.x[i, k + 1], text.rows(i), times[k].expand(len(i)), times[k + 1]
                    v = velocity(policy, x, t, sub, cfg.guidance, me).float()
                    mean, std = step(cfg.rollout, x, v, t, t_next, cfg.a, times[1])
                    logp = log_prob(x_next, mean, std)
                    loss, ratio = ppo_loss(logp, traj.logp[i, k], adv[i], cfg.clip)
                    kl = torch.zeros_like(logp)
                    if cfg.beta:
                        with torch.no_grad():
                            v_ref = velocity(frozen, x, t, sub, cfg.guidance, None).float()
                            mean_ref, _ = step(cfg.rollout, x, v_ref, t, t_next, cfg.a, times[1])
                        kl = gaussian_kl(mean, mean_ref, std)
                    loss = ((loss + cfg.beta * kl) * keep[i]).sum() / (kept * len(trained))
                    (loss * world_size).backward()                           # DDP averages over ranks; the loss above is a share of a sum
                ratios[i, k - trained[0]], kls[i, k - trained[0]] = ratio.detach(), kl.detach()
            grad_norm = util.clip(params)
            util.finite(grad_norm, it)
            opt.step()
            opt.zero_grad()

        # 5. Log and save.
        routed = util.gather(torch.tensor([cfg.tasks.index(m["task"]) for m in metas], device=device))
        by_task = {f"reward_{name}": everyone[routed == n].mean().item() for n, name in enumerate(cfg.tasks) if (routed == n).any()}
        parts = [[row[name] if meta["task"] == task else torch.nan for task, name in components] for row, meta in zip(rated, metas)]
        parts = util.gather(torch.tensor(parts, device=device)).nanmean(0).tolist()      # components of rewards that are sums, as reported
        by_part = {f"{task}/{name}": mean for (task, name), mean in zip(components, parts) if mean == mean}
        seconds = time.time() - start
        log({"iter": it + 1, **by_task, **by_part, "reward_std": everyone.std(unbiased=False).item(),
             "zero_std_ratio": 1 - util.sync_mean(keep.float().mean()).item(), **util.ratio_stats(ratios, cfg.updates, cfg.clip),
             "kl": util.gather(kls).mean().item(),
             "grad_norm": grad_norm, "s/it": seconds, "images/s": cfg.batch / seconds})
        if cfg.keep and (it + 1) % cfg.keep == 0:
            save(folder / f"adapter-{it + 1}.pt")
        if (it + 1) % cfg.save_every == 0 or it + 1 == cfg.iters:
            util.save_state(folder / "state.pt", net, opt, rank, iter=it + 1, settings=settings, base=model.fingerprint)

    out = save(out)
    if rank == 0:
        print(f"wrote {out}")


if __name__ == "__main__":
    util.run(main, Config, presets=PRESETS)
