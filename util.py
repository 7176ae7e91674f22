"""The plumbing that teaches nothing: command line, process group, atomic files, metrics log."""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import sys
import time
import typing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from model import world_name

# ------------------------------------------------------------------ command line


def parse(cls, argv=None, presets=None, positional=()):
    """A dataclass is the whole command line: each field is a flag, its doc is the comment on its line in the class.

    presets: {world: {field: default}}, the defaults that follow from --model; positional: fields that need no flag.
    """
    docs, preset = field_docs(cls), {}
    if presets:
        peek = argparse.ArgumentParser(add_help=False)
        peek.add_argument("--model", default=cls.model)
        preset = presets.get(world_name(peek.parse_known_args(argv)[0].model), {})
        assert set(preset) <= set(docs), "a preset names a field that is none"
    p = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = preset.get(f.name, f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default)
        kind, flag = hints[f.name], "--" + f.name.replace("_", "-")
        doc = f"{docs.get(f.name, '')} (default: {default})".replace("%", "%%")
        if f.name in positional:
            p.add_argument(f.name, nargs="?", type=kind, default=default, help=doc)
        elif typing.get_origin(kind) is list:
            p.add_argument(flag, nargs="*", type=typing.get_args(kind)[0], default=default, help=doc)
        elif kind is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=doc)
        elif typing.get_origin(kind) is typing.Literal:
            p.add_argument(flag, choices=typing.get_args(kind), default=default, help=doc)
        else:
            kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind)      # "int | None" -> int
            p.add_argument(flag, type=kind, default=default, help=doc)
    return cls(**vars(p.parse_args(argv)))


def field_docs(cls):
    """field -> the comment behind it in the source of the dataclass."""
    import inspect
    docs = {}
    for line in inspect.getsource(cls).splitlines():
        name, colon, rest = line.strip().partition(":")
        if colon and name.isidentifier() and "#" in rest:
            docs[name] = rest.split("#", 1)[1].strip()
    return docs


def run(main, cls, **how):
    """Parse, run, and turn a ValueError (bad input) into one line and exit code 2. DEBUG=1 shows where it came from."""
    try:
        main(parse(cls, **how))
    except ValueError as e:
        if os.environ.get("DEBUG"):
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:                # most bad input is met by every rank; then rank 0 says so and torchrun ends this one in its sleep
            time.sleep(5)
        print(f"error: {e}" if rank == 0 else f"error (rank {rank}): {e}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)             # at once, so that no rank waits for another
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def positive(cfg, *names):
    """ValueError unless these options are greater than 0, and all other numbers finite and not negative."""
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and not (0 < value < math.inf or value == 0 and name not in names):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a finite number {'greater than 0' if name in names else 'of 0 or more'}")


def check_rollout(cfg, world_size):
    """What both training stages ask of a batch and of the steps that take noise."""
    unit = cfg.group * world_size * cfg.updates
    if cfg.batch % unit:
        raise ValueError(f"--batch {cfg.batch} with --group {cfg.group}, {world_size} rank(s) and --updates {cfg.updates}: groups are never split, "
                         f"so the batch must be a multiple of {unit}")
    if cfg.rollout != "ode" and (len(cfg.noisy) != 2 or not 0 <= cfg.noisy[0] < cfg.noisy[1] <= cfg.steps):
        raise ValueError(f"--noisy {cfg.noisy}: expected FROM TO with 0 <= FROM < TO <= --steps {cfg.steps}")
    if cfg.rollout == "cps" and cfg.a > 1:
        raise ValueError(f"--a {cfg.a} --rollout cps: expected 1 or less; std = t_next sin(a pi / 2), and at 1 all noise is new")
    if cfg.rollout == "cps" and cfg.noisy[1] == cfg.steps:
        raise ValueError(f"--noisy {cfg.noisy} --rollout cps: the last CPS step has no noise and so no density; end at {cfg.steps - 1}")


def finite(grad_norm, it):
    """Stop rather than train on: the gradient norm is the same on every rank, so all stop together, and the last saved state is sound."""
    if not math.isfinite(grad_norm):
        raise ValueError(f"iteration {it + 1}: the gradient is {grad_norm}; expected a finite one. Lower --lr or --a, or look at the rewards")


def ratio_stats(ratios, updates, clip):
    """ratios (images, S) of this rank's iteration -> what the log says of all ranks': the first update's largest distance from 1, the share out of range."""
    off = (gather(ratios) - 1).abs()
    first_update = gather(torch.arange(len(ratios), device=ratios.device)) < len(ratios) // updates
    return {"ratio_err": off[first_update].max().item(), "clip_frac": (off > clip).float().mean().item()}


# ------------------------------------------------------------------ process group


def setup(device="auto", seed=0):
    """Start torch.distributed if launched by torchrun. Returns rank, world size, device. Works unlaunched too (one rank)."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    cuda = torch.cuda.device_count()
    if device == "auto":              # one GPU a rank, or none at all
        device = "cuda" if cuda >= local else "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
        if 0 < cuda < local and rank == 0:
            print(f"{local} ranks, but {cuda} GPU(s): all run on the CPU. Start one rank a GPU (torchrun --nproc_per_node={cuda}, make RANKS={cuda})", file=sys.stderr)
    if device not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {device}: expected auto, cuda, mps or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)")
    if device == "cuda" and cuda < local:
        raise ValueError(f"--device cuda: {local} rank(s) here, but this machine (or this build of torch) has {cuda} CUDA device(s); use --device cpu")
    if device == "mps" and world > 1:
        raise ValueError("--device mps: torch.distributed has no backend for it; run one process, or use --device cpu")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=30))
    torch.manual_seed(seed)
    return rank, world, torch.device(device)


def sync_mean(x):
    """Average a tensor over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def gather(x):
    """Concatenate a tensor (the same shape on every rank) over the ranks, in rank order."""
    if not dist.is_initialized():
        return x
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


def barrier():
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def distribute(net, full):
    """What to call in an update, so that gradients are averaged over the ranks: DDP around an adapter's net; a net that learns whole is
    sharded (FSDP2), in place. Each rank then holds its part of weights, gradients and optimiser state, and a block's whole weights only while it runs.
    """
    if not dist.is_initialized():
        return net
    if not full:
        return DDP(net, broadcast_buffers=False)
    bfloat16 = torch.bfloat16 if net.pos_embed.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)      # x and t stay float32
    mesh = dist.init_device_mesh(net.pos_embed.device.type, (dist.get_world_size(),))
    for module in [*net.joint_blocks, net]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return net


def clip(params, most=1.0):
    """Clip the norm of the gradients of all params together; returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(params, most)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def compile_blocks(net):
    """torch.compile block by block, in place: parameter names stay, and what is alike is compiled once (20 s to minutes before the first step)."""
    torch._dynamo.config.recompile_limit = 64      # one graph for each kind of block, adapter (none, name, Route) and grad mode
    for block in net.joint_blocks:
        block.compile()


def share(batch, updates, rank, world):
    """Which of an iteration's images are this rank's: its part of the first minibatch, then of the second, ...

    So minibatch u holds the same images however many ranks there are.
    """
    return torch.arange(batch).view(updates, world, -1)[:, rank].flatten().tolist()


def no_sync(net, skip):
    """Inside: gradients are not yet averaged over the ranks (if skip, and if net is wrapped in DDP; a sharded net keeps no whole gradients to wait with)."""
    return net.no_sync() if skip and hasattr(net, "no_sync") else contextlib.nullcontext()


def generator(*key):
    """A CPU random generator from any key: the same key gives the same numbers on every machine, rank and resume."""
    plain = [k.item() if hasattr(k, "item") else k for k in key]          # 3, numpy's 3 and torch's 3 are one key
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ------------------------------------------------------------------ files


def save_atomic(obj, path):
    """torch.save to a temporary name, flushed to the disk, then renamed: the file is whole or it is the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        torch.save(obj, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_atomic(path, text):
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def read_pt(path, keys):
    """torch.load of plain tensors and containers (never pickled code), with the keys it must have."""
    try:
        obj = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds something other than plain tensors and containers (pickled code is refused), or is corrupt") from None
    except Exception as e:      # a damaged file can fail anywhere in the reader
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}: {(str(e).splitlines() or ['?'])[0]})") from None
    missing = [k for k in keys if not isinstance(obj, dict) or k not in obj]
    if missing:
        raise ValueError(f"{path}: expected a checkpoint with {', '.join(keys)}; it lacks {', '.join(missing)}")
    return obj


# Whole tensors on the CPU of rank 0, however the ranks share them.
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def weights(net):
    """What learns in a net, as whole tensors on the CPU, sharded or not: {name: tensor}. Every rank has to ask; rank 0 gets them."""
    learn = {name for name, p in net.named_parameters() if p.requires_grad}
    return {name: x for name, x in dcp.get_model_state_dict(net, options=WHOLE).items() if name in learn}


def save_state(path, net, opt, rank, **fields):
    """A resumable state: what learns, its optimiser, and the fields. Every rank has to call it; rank 0 writes."""
    state = {"weights": weights(net), "opt": dcp.get_optimizer_state_dict(net, opt, options=WHOLE), **fields}
    if rank == 0:
        save_atomic(state, path)


def restore(state, net, opt):
    """What save_state saved, back in its place on every rank."""
    dcp.set_model_state_dict(net, state["weights"], options=dcp.StateDictOptions(full_state_dict=True, strict=False))
    dcp.set_optimizer_state_dict(net, opt, state["opt"], options=dcp.StateDictOptions(full_state_dict=True))


def resume(path, settings, base, free=()):
    """The state of a stopped run, or None. ValueError if it was made by another base or other settings, but for the `free` ones."""
    if not Path(path).exists():
        return None
    state = read_pt(path, ["iter", "settings", "base"])
    free = {"save_every", "keep", "device", "micro", "compile", "checkpointing", "offload", "world_size", *free}
    changed = [k for k in settings if k not in free and settings[k] != state["settings"].get(k)] + ["model"] * (base != state["base"])
    if changed:
        raise ValueError(f"{path}: holds a run with another {', '.join(changed)}; give --name NEW, or delete {Path(path).parent} to start over")
    if state["iter"] > settings.get("iters", state["iter"]):
        raise ValueError(f"{path}: holds a run of {state['iter']} iterations, more than --iters {settings['iters']}; give --name NEW to make a shorter one")
    return state


class Log:
    """One line an iteration on the screen, the same dict as one line of JSON in DIR/log.jsonl. Only rank 0 writes."""

    def __init__(self, folder, rank, config, resume_at=0):
        self.on, self.path, self.start = rank == 0, Path(folder) / "log.jsonl", time.time()
        if self.on:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A resumed run forgets the lines after the checkpoint it goes on from, so that no iteration stands there twice.
            old = self.path.read_text().splitlines() if resume_at and self.path.exists() else []
            write_atomic(self.path, "".join(line + "\n" for line in old if self.iteration(line) <= resume_at))
            (self.path.parent / "config.json").write_text(json.dumps(config, indent=1))

    @staticmethod
    def iteration(line):
        try:
            return json.loads(line)["iter"]
        except json.JSONDecodeError:      # a line that a kill cut short
            return float("inf")

    def __call__(self, row):
        if self.on:
            with open(self.path, "a") as f:
                f.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            tqdm.write(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
