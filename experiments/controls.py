"""Write teachers that teach the wrong thing or nothing, to see what stage 2 takes from a teacher.

    python -m experiments.controls ckpt/*.pt --out runs/controls

For each task it writes, under the task's name:

    wrong-TASK.pt       the adapter of another task: that of the next one on the command line
    shuffled-TASK.pt    its own adapter, the numbers of each factor in random order: an update that
                        has learned nothing (its norm is 0.8 to 0.9 of the teacher's)
    noised-TASK.pt      its own adapter, each factor with Gaussian noise of half of its spread
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoints.formats import read_adapter, save_adapter
from model import load_mmdit
from plumbing import cli
from plumbing.folder import check_writable
from sampler import generator


@dataclass
class Config:
    # The teachers, in our own form, one a task.
    teachers: list[str] = field(default_factory=list)
    # The folder of the files to write.
    out: str = "runs/controls"
    # The base of the teachers.
    model: str = "ckpt/tiny.safetensors"
    # Seed of the order and of the noise.
    seed: int = 0


def shuffled(tensor, g):
    """The numbers of a tensor in random order."""
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=g)].view_as(tensor)


def noised(tensor, g):
    """A tensor with Gaussian noise, whose spread is half of the tensor's own."""
    return tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=g)


def controls(teachers, seed=0):
    """Adapters of several tasks -> {name of a control: an adapter with the task it pretends}."""
    found = {}
    for i, teacher in enumerate(teachers):
        task = teacher["task"]
        other = teachers[(i + 1) % len(teachers)]
        found[f"wrong-{task}"] = {**other, "task": task, "anchor": False}
        for name, change in {"shuffled": shuffled, "noised": noised}.items():
            g = generator(seed, name, i)
            tensors = {key: change(tensor, g) for key, tensor in teacher["tensors"].items()}
            found[f"{name}-{task}"] = {**teacher, "tensors": tensors, "anchor": False}
    return found


def main(cfg):
    if len(cfg.teachers) < 2:
        raise ValueError(f"--teachers {' '.join(cfg.teachers)}: expected two or more")
    check_writable(Path(cfg.out))
    base = load_mmdit(cfg.model, dtype=None).fingerprint
    teachers = [read_adapter(path, base) for path in cfg.teachers]
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for name, adapter in controls(teachers, cfg.seed).items():
        save_adapter(Path(cfg.out) / f"{name}.pt", **adapter)
    print(f"wrote the controls of {', '.join(t['task'] for t in teachers)} to {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config, positional=("teachers",))
