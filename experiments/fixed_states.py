"""KL of every model to the teachers, at the SAME states for all.

There are two sets of states, on held-out prompts. One is visited by the base, the other by the
teacher of the prompt's task. The rollout is that of training: the SDE and its five noisy steps.
The teachers are the shipped ones. So the second teachers and their students are not measured.
"""
import json
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from checkpoints.formats import read
from checkpoints.teachers import attach, read_teachers
from experiments.jobs import TASKS, TEACHERS
from plumbing.files import write_text
from sampler import Policy, Sampler, State, Text, draw_noise, encode, kl, schedule, visited
from worlds import open_world

BASE = "ckpt/tiny.safetensors"
STEPS = 8
NOISY = range(5)
NOISE_LEVEL = 0.7


@dataclass
class Fixed:
    """The states of one task's prompts at one step."""
    name: str                # "base's states" or "teacher's states"
    task: str
    state: State
    text: Text


@torch.no_grad()
def fixed_states(model, world, per_task):
    """A list of Fixed. The v_target of each state is the velocity of the task's teacher."""
    sampler = Sampler(schedule(STEPS), "sde", NOISE_LEVEL, NOISY)
    images = torch.arange(per_task)
    steps = torch.tensor(NOISY).expand(per_task, -1)    # (per_task, 5)
    fixed = []
    for task in TASKS:
        metas = world.eval_prompts(task, per_task)
        text = encode(model.text, [meta["prompt"] for meta in metas])
        keys = [("fixed", task, i) for i in range(per_task)]
        noise = draw_noise(keys, STEPS, model.latent_shape())
        teacher = Policy(model.mmdit, task)
        for name, policy in (("base's states", Policy(model.mmdit)), ("teacher's states", teacher)):
            trajectory = sampler.rollout(policy, noise, text)
            for state in visited(trajectory, steps, images, sampler):
                state.v_target = teacher(state.x, state.t, text)
                fixed.append(Fixed(name, task, state, text))
    return fixed


@torch.no_grad()
def distances(policy, fixed):
    """{set of states: {task: mean KL to its teacher}}, in nats per latent element and step."""
    steps = {}
    for one in fixed:
        v = policy(one.state.x, one.state.t, one.text)
        distance = kl(v, one.state.v_target, one.state).mean().item()
        steps.setdefault(one.name, {}).setdefault(one.task, []).append(distance)
    means = {}
    for name, by_task in steps.items():
        means[name] = {task: float(np.mean(values)) for task, values in by_task.items()}
    return means


def measure(file, checkpoints, per_task=60):
    """Measure the distances of checkpoints ({job: path or "base"}), and add them to the JSON file.

    per_task: prompts per task. Jobs that are in the file already are not measured again.
    """
    done = json.loads(file.read_text()) if file.exists() else {}
    todo = {job: path for job, path in checkpoints.items() if job not in done}
    if not todo:
        return
    world = open_world(BASE)
    model = world.load(BASE)
    net = model.mmdit
    attach(read_teachers(list(TEACHERS.values()), net, world.tasks), net)
    fixed = fixed_states(model, world, per_task)
    for job, path in tqdm(todo.items(), desc="fixed states"):
        adapter = None
        if path != "base":
            adapter = job.replace(".", "_")             # no dots in a module's name
            found = read(path, net)
            net.add_adapter(adapter, found["r"], found["alpha"], found["tensors"])
        done[job] = distances(Policy(net, adapter), fixed)
        write_text(file, json.dumps(done, indent=1))
