"""Which noise decides a reward: the first, or that of the SDE's steps, which GRPO credits?

    PYTHONPATH=. python results/fair-world/credit.py MODEL

For 12 training prompts a task: 6 first noises, each with 6 draws of the steps' noise. It prints the
part of the reward's variance within a prompt that is left when the first noise is fixed.
"""
import sys

import numpy as np
import torch

from rewards import parse_reward, score
from sampler import Policy, Sampler, draw_noise, encode, schedule
from worlds import open_world

PROMPTS, FIRST, STEPS = 12, 6, 6

path = sys.argv[1]
world = open_world(path)
model = world.load(path)
sampler = Sampler(schedule(8), "sde", 0.7, range(5))
for task in ("ocr", "geneval"):
    spec = parse_reward(world.reward[task])
    rewards = np.zeros((PROMPTS, FIRST, STEPS))
    for p, meta in enumerate(world.eval_prompts(task, PROMPTS * 25, "train")[::25]):
        pairs = [(i, k) for i in range(FIRST) for k in range(STEPS)]
        noise = draw_noise([(p, i, k) for i, k in pairs], 8, model.latent_shape())
        noise[:, 0] = draw_noise([(p, i, 999) for i, _ in pairs], 8, model.latent_shape())[:, 0]
        text = encode(model.text, [meta["prompt"]] * len(pairs))
        with torch.no_grad():
            x = sampler.rollout(Policy(model.mmdit), noise, text).x[:, -1]
        total = score(spec, model.images(x), [meta] * len(pairs), world)["total"]
        rewards[p] = total.reshape(FIRST, STEPS)
    fixed = rewards.var(2, ddof=1).mean()
    whole = rewards.reshape(PROMPTS, -1).var(1, ddof=1).mean()
    print(f"{task}: mean {rewards.mean():.3f}, variance {whole:.4f}, "
          f"of the steps {fixed / whole:.2f}")
