"""Cold starts: the weights that a student begins with, made of its teachers (--init).

| --init   | an adapter                               | a whole transformer (--full)      |
|----------|------------------------------------------|-----------------------------------|
| none     | a new one, which starts as the base      | the base                          |
| merge    | the exact average of the teachers'       | the average of the teachers'      |
|          | updates; the ranks add up                | whole weights                     |
| truncate | the best of rank r for that average      | -                                 |
| factors  | the averages of A and of B, as released  | -                                 |
| PATH     | that checkpoint                          | that checkpoint                   |

A merge adds the teachers' updates, each times its weight. None: each weighs 1 / their number, which
is the average. Weights may add up to more than 1: the student then goes further from the base.
"""
import copy

import torch

from checkpoints.formats import check_same, merged_weights, read
from plumbing import dist
from worlds.prompts import read_numbers

# ------------------------------------------------------------------ adapters


def merge_adapters(adapters, weights=None):
    """The exact sum of K adapters' updates, sum_k weight_k scale_k B_k A_k, by stacking factors.

    adapters: dicts with "tensors", "r" and "alpha", of any ranks. weights: K numbers, or None for
    the average. Returns one such dict, whose rank is the sum of theirs, with alpha = r (scale 1).
    DEVIATION: the released Flow-OPD code averages A and B apart, as merge_factors does. But
    mean(B) mean(A) is not mean(B A).
    """
    weights = weights or [1 / len(adapters)] * len(adapters)
    tensors = {}
    for name in adapters[0]["tensors"]:
        parts = [adapter["tensors"][name] for adapter in adapters]
        if name.endswith(".A"):
            tensors[name] = torch.cat(parts, dim=1)                     # (n, sum r, D)
        else:
            shares = [adapter["alpha"] / adapter["r"] * weight
                      for adapter, weight in zip(adapters, weights)]
            parts = [part * share for part, share in zip(parts, shares)]
            tensors[name] = torch.cat(parts, dim=2)                     # (n, D, sum r)
    r = sum(adapter["r"] for adapter in adapters)
    return {"tensors": tensors, "r": r, "alpha": r}


def truncate_adapter(adapter, r, alpha):
    """The adapter of rank r whose update is closest in least squares.

    Its update is the first r terms of the SVD of scale B A. Each factor takes the root of the
    singular values. With B = Q_B R_B and A^T = Q_A R_A, B A is Q_B (R_B R_A^T) Q_A^T. This QR keeps
    the SVD as small as the rank.
    """
    old = adapter["tensors"]
    scale = adapter["alpha"] / adapter["r"]
    tensors = {}
    for layer in [name.removesuffix(".A") for name in old if name.endswith(".A")]:
        Q_B, R_B = torch.linalg.qr(old[f"{layer}.B"])                   # (n, D, R), (n, R, R)
        Q_A, R_A = torch.linalg.qr(old[f"{layer}.A"].mT)
        U, s, Vh = torch.linalg.svd(R_B @ R_A.mT * (scale * r / alpha))
        root = s[:, :r].sqrt()
        tensors[f"{layer}.A"] = root[:, :, None] * (Vh[:, :r] @ Q_A.mT)
        tensors[f"{layer}.B"] = Q_B @ U[:, :, :r] * root[:, None]
    return {"tensors": tensors, "r": r, "alpha": alpha}


def merge_factors(adapters, weights=None):
    """As released: the average (or weighted sum) of the A and that of the B factors.

    For comparison: it is not that of the updates.
    """
    forms = {(adapter["r"], adapter["alpha"]) for adapter in adapters}
    if len(forms) > 1:
        raise ValueError("--init factors: averages factors of one rank and alpha, "
                         f"got {forms}; use --init merge")
    weights = weights or [1 / len(adapters)] * len(adapters)
    tensors = {}
    for name in adapters[0]["tensors"]:
        tensors[name] = sum(adapter["tensors"][name] * weight
                            for adapter, weight in zip(adapters, weights))
    return {**adapters[0], "tensors": tensors}


# ------------------------------------------------------------------ whole transformers


@torch.no_grad()
def merge_whole(net, base, teachers, weights=None):
    """net, a copy of base, becomes base + sum_k weight_k (teacher_k - base): by default the mean.

    The parameters of a teacher are its own (a whole transformer of the base's shape), or
    W + scale B A (an adapter).
    """
    weights = weights or [1 / len(teachers)] * len(teachers)
    theirs = []
    for teacher in teachers:
        if "net" in teacher:
            check_same(teacher["net"], base, "an average of weights")
            theirs.append(dict(teacher["net"].named_parameters()))
        else:
            theirs.append(merged_weights(base, teacher))
    for name, p in net.named_parameters():
        parts = [its.get(name, p).float() * weight for its, weight in zip(theirs, weights)]
        p.copy_(p.float() * (1 - sum(weights)) + sum(parts))


# ------------------------------------------------------------------ by --init


MERGES = ("merge", "truncate", "factors")


def read_weights(items, tasks):
    """Read --merge, ["geneval=2", "ocr=1"] -> the weights in the order of tasks, or None for [].

    A teacher of weight 0 is left out of the merge.
    """
    if not items:
        return None
    numbers = read_numbers("--merge", items, tasks, float)
    return [numbers[task] for task in tasks]


def sources(init, base, teachers, weights):
    """The checkpoints that a student starts from, and their weights.

    teachers: a list of what formats.read gives, empty in a run without teachers. weights: one for
    each teacher, 0 or more, or None.
    """
    if init == "none":
        return [], None
    if init not in MERGES:
        start = [read(init, base)]
        weights = None
    elif not teachers:
        raise ValueError(f"--init {init}: merges teachers, and this run has none; expected none, "
                         "or the path of a checkpoint")
    elif weights:
        start = [teacher for teacher, weight in zip(teachers, weights) if weight]
        weights = [weight for weight in weights if weight]
    else:
        start = teachers
    for one in start:
        if "net" in one:
            check_same(one["net"], base, f"--init {init}")
    return start, weights


def cold_start(init, base, teachers, r, alpha, weights=None):
    """The adapter that a student starts as: "tensors" (None: a new adapter), "r" and "alpha".

    r, alpha: those of an adapter from --init none or truncate. weights: as in sources.
    """
    start, weights = sources(init, base, teachers, weights)
    if any("net" in one for one in start):
        raise ValueError(f"--init {init}: comes from a whole transformer, which no adapter "
                         "equals; use --full, or --init none")
    if init == "none":
        return {"r": r, "alpha": alpha, "tensors": None}
    if init == "merge":
        return merge_adapters(start, weights)
    if init == "factors":
        return merge_factors(start, weights)
    if init == "truncate":
        exact = merge_adapters(start, weights)
        if r > exact["r"]:
            raise ValueError(f"--init truncate --lora-r {r}: the exact merge has rank "
                             f"{exact['r']}; expected no more")
        return truncate_adapter(exact, r, alpha)
    return start[0]


def cold_start_whole(init, net, base, teachers, weights=None):
    """The same for a student that learns whole: net, a copy of base, is changed in place."""
    if init in ("truncate", "factors"):
        raise ValueError(f"--init {init} --full: is about an adapter's factors; a whole "
                         "transformer starts from merge, none, or a checkpoint")
    start, weights = sources(init, base, teachers, weights)
    if start:
        merge_whole(net, base, start, weights)


# ------------------------------------------------------------------ what learns


def make_learner(cfg, base, name, full, teachers=(), weights=None):
    """The net that learns, the name of its adapter (None: the whole net learns), its r and alpha.

    cfg: the options of a training script. name: for the adapter. full: the whole net learns.
    teachers: their checkpoints, for a cold start that is made of them; weights: as in sources.
    """
    net = copy.deepcopy(base).float().requires_grad_(True) if full else base
    torch.manual_seed(cfg.seed)
    adapter, r, alpha = None, None, None
    if full:
        cold_start_whole(cfg.init, net, base, teachers, weights)
    else:
        adapter = name
        start = cold_start(cfg.init, base, teachers, cfg.lora_r, cfg.lora_alpha, weights)
        r, alpha = start["r"], start["alpha"]
        net.add_adapter(adapter, r, alpha, start["tensors"], trainable=True)
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        dist.compile_blocks(net)
    return net, adapter, r, alpha
