"""Runs of the scripts on the shipped base with a few images: what their tests share."""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import sampler
import train_grpo
import train_opd
import worlds
from checkpoints.formats import save_adapter
from plumbing.files import read_pt

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "ckpt/tiny.safetensors")
GRPO = dict(model=BASE, iters=2, batch=8, group=4, steps=4, noisy=[0, 3], lora_r=4, lora_alpha=8.0,
            device="cpu")
OPD = dict(model=BASE, iters=2, batch=8, group=2, steps=4, noisy=[0, 4], updates=1, device="cpu")


def grpo(**options):
    """A run of stage 1."""
    defaults = dict(GRPO)
    if options.get("full") or "init" in options:             # then there is no new adapter
        defaults.update(lora_r=None, lora_alpha=None)
    train_grpo.main(train_grpo.Config(**{**defaults, **options}))


def opd(**options):
    """A run of stage 2."""
    train_opd.main(train_opd.Config(**{**OPD, **options}))


def torchrun(ranks, script, *args):
    """A script on several ranks, one thread each. Returns the finished process."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
              "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *launch, str(ROOT / script), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def expect_success(done):
    assert done.returncode == 0, done.stderr[-2000:]


def random_like(tensors):
    return {name: 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}


def make_teacher(path, task, seed=0, anchor=False, **other):
    """A teacher with random factors (both A and B), so that it differs from the base."""
    model = worlds.load(BASE)
    torch.manual_seed(seed)
    model.mmdit.add_adapter("t", 4, 8.0)
    fields = dict(task=task, anchor=anchor, base=model.fingerprint, r=4, alpha=8.0, settings={},
                  tensors=random_like(model.mmdit.adapter("t")))
    save_adapter(path, **{**fields, **other})
    return str(path)


def log(name):
    """The rows that a run has logged."""
    return [json.loads(line) for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]


def tensors(path):
    """The tensors of an adapter, or what a whole transformer's differ in from the base's.

    The difference is of the numbers in the files, which are float16.
    """
    if path.endswith(".pt"):
        return read_pt(path, ["tensors"])["tensors"]
    base = load_file(BASE)
    whole = load_file(path)
    return {name: whole[name].float() - base[name].float()
            for name in base if "diffusion_model" in name}


def distance(a, b):
    """The largest difference between two sets of tensors."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


def interrupt():
    raise KeyboardInterrupt


def stop_at_rollout(monkeypatch, n, act=interrupt):
    """Call act, which raises KeyboardInterrupt, at rollout n of a run. Returns all rollouts' marks.
    """
    calls = []
    real = sampler.Sampler.rollout

    def rollout(self, *args, **options):
        calls.append(1)
        if len(calls) == n:
            act()
        return real(self, *args, **options)

    monkeypatch.setattr(sampler.Sampler, "rollout", rollout)
    return calls
