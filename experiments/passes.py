"""Compute, counted in forward passes of the network for one image.

A backward pass counts as two. Scoring and the VAE are left out. With the defaults:
    GRPO           28 per image: 8 rollout steps; for each of the 5 trained steps, the policy
                   (1 + 2) and the reference (1)
    distillation   12 per image: 2 rollout steps, to the last supervised state; for each of the 2
                   supervised states, the teacher (1), the anchor (1) and the student (1 + 2)
Where the anchor is the prompt's own teacher, or with --blend one of the others, the script computes
one pass for both. They are counted as two here.
"""
import train_grpo
import train_opd
import train_sft
from plumbing import cli


def sft_passes(cfg):
    """A picture takes a pass per step of its teacher. An image of a batch takes 1 + 2."""
    return cfg.samples * cfg.best * cfg.steps + cfg.iters * cfg.batch * 3


def grpo_passes(cfg):
    first, end = cfg.noisy
    reference = 1 if cfg.beta > 0 else 0
    per_image = cfg.steps + (end - first) * (3 + reference)
    return cfg.iters * cfg.batch * per_image


def supervised_steps(cfg):
    """How many states of a trajectory are supervised. It fills in the default of --supervised."""
    if not cfg.supervised:
        cfg.supervised = [0, cfg.steps] if cfg.rollout == "ode" else list(cfg.noisy)
    first, end = cfg.supervised
    return 1 if cfg.one else end - first


def opd_passes(cfg):
    targets = 1                                         # the prompt's own teacher
    if cfg.blend > 0:
        targets += len(cfg.teachers) - 1
    if cfg.extrapolate != 1:
        targets += 1                                    # the base
    if cfg.lam > 0:
        targets += 1                                    # the anchor
    states = supervised_steps(cfg)
    per_image = train_opd.rollout_steps(cfg) + states * (targets + 3)
    return cfg.iters * cfg.batch * per_image


def passes(command):
    """The forward passes of a training command, computed from its options."""
    script, *options = map(str, command)
    if script == "train_sft.py":
        return sft_passes(cli.parse(train_sft.Config, options))
    if script == "train_grpo.py":
        return grpo_passes(cli.parse(train_grpo.Config, options))
    assert script == "train_opd.py", f"unknown script {script}"
    return opd_passes(cli.parse(train_opd.Config, options))
