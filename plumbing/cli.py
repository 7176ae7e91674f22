"""A dataclass is the whole command line. Each field is a flag; the comment above it is its help.

    @dataclass
    class Config:
        # --- rollout
        # Steps of a rollout (K).
        steps: int = 8

A comment that starts with "# ---" opens a group of the help text.
"""
import argparse
import dataclasses
import errno
import inspect
import math
import os
import sys
import time
import types
import typing


def field_docs(cls):
    """Read the source of a dataclass. Returns {field: (its group, the comment above it)}."""
    docs = {}
    group = "options"
    comment = []
    for line in inspect.getsource(cls).splitlines():
        line = line.strip()
        name, colon, _ = line.partition(":")
        if line.startswith("# ---"):
            group = line.strip("# -")
        elif line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif colon and name.isidentifier():
            docs[name] = (group, " ".join(comment))
            comment = []
        else:
            comment = []
    return docs


def default_of(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def argument(kind):
    """The keywords of add_argument that follow from the type (kind) of a field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return dict(nargs="+", type=args[0])
    if kind is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if origin is typing.Literal:
        return dict(choices=args)
    if origin is types.UnionType:                       # "int | None" reads an int
        kind = next(arg for arg in args if arg is not type(None))
    return dict(type=kind)


def parse(cls, argv=None, presets=None, positional=()):
    """Parse the command line into a cls.

    presets: a function from the value of --model to {field: default}, for the fields whose default
    depends on the model. positional: the fields that are given without a flag. ValueError as in
    check_numbers.
    """
    docs = field_docs(cls)
    changed = {}
    if presets:
        peek = argparse.ArgumentParser(add_help=False)
        peek.add_argument("--model", default=cls.model)
        changed = presets(peek.parse_known_args(argv)[0].model)
        assert set(changed) <= set(docs), "a preset names a field that does not exist"
    spec = sys.modules["__main__"].__spec__               # python -m NAME has one, a file has none
    prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    parser = argparse.ArgumentParser(prog=prog, description=sys.modules[cls.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        group, doc = docs[field.name]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = changed.get(field.name, default_of(field))
        doc = f"{doc} (default: {default})".replace("%", "%%")
        how = dict(argument(hints[field.name]), default=default, help=doc)
        if field.name in positional:
            how["nargs"] = "*" if "nargs" in how else "?"
            groups[group].add_argument(field.name, **how)
        else:
            groups[group].add_argument("--" + field.name.replace("_", "-"), **how)
    cfg = cls(**vars(parser.parse_args(argv)))
    check_numbers(cfg)
    return cfg


# Reasons of the system why a file cannot be written, which are not a fault in the code.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def run(main, cls, **how):
    """Parse, run main, and turn a ValueError (bad input) into one line and exit code 2.

    So it does with a disk that is full or read-only. Ctrl-C is one line and exit code 130. DEBUG=1
    shows the whole traceback. The keywords are parse's.
    """
    rank = os.environ.get("RANK", "0")
    rank = int(rank) if rank.isdigit() else 0
    try:
        main(parse(cls, **how))
    except (ValueError, OSError) as error:
        bad_input = isinstance(error, ValueError) or error.errno in DISK
        if os.environ.get("DEBUG") or not bad_input:
            raise
        # Bad input usually stops every rank. The others wait, so that rank 0 alone prints the
        # error. Then torchrun ends them while they sleep.
        if rank > 0:
            time.sleep(5)
        who = f" (rank {rank})" if rank else ""
        end(f"error{who}: {error}", 2)
    except KeyboardInterrupt:                           # the loops have a plumbing.stop instead
        if os.environ.get("DEBUG"):
            raise
        end("" if rank else "stopped by Ctrl-C", 130)
    finally:
        # Not imported at the top, so that --help waits for no torch.
        if "torch" in sys.modules:
            from torch import distributed
            if distributed.is_initialized():
                distributed.destroy_process_group()
    # In two of about 70 evaluations rank 1 was aborted while Python ended it, with all work done
    # ("terminate called without an active exception"; the cause is not known). Only rank 0 writes.
    if rank > 0:
        end("", 0)


def end(line, code):
    """Print a line and end the process. It does not wait for other ranks."""
    if line:
        print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


# The most that an option may be, in every script. More is a slip: the run would not end, would not
# fit into memory, or would give numbers that are not finite.
MOST = {"lr": 10, "decay": 1, "clip": 1, "a": 100, "guidance": 1000, "extrapolate": 1000,
        "beta": 10**6, "lam": 10**6, "kl_scale": 10**6, "lora_r": 4096, "lora_alpha": 10**6,
        "iters": 10**6, "steps": 10**5, "eval_steps": 10**5, "vae_steps": 10**6, "batch": 10**6,
        "group": 10**6, "samples": 10**6, "pool": 10**8, "per_task": 10**5, "eval_images": 10**5,
        "each": 10**5, "rows": 1000, "width": 16384, "depth": 1000, "size": 16384,
        "seed": 2**63 - 1, "seeds": 2**63 - 1}
# The most that the shares of --ratio may add up to.
LARGEST_SHARES = 1000


def check_numbers(cfg):
    """ValueError unless all numbers, in lists too, are finite, at least 0 and at most MOST."""
    for name, value in vars(cfg).items():
        flag = "--" + name.replace("_", "-")
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (int, float)):
                continue
            if not 0 <= number < math.inf:
                raise ValueError(f"{flag} {number}: expected a finite number of 0 or more")
            if number > MOST.get(name, number):
                raise ValueError(f"{flag} {number}: expected at most {MOST[name]}")


def positive(cfg, *names):
    """ValueError as in check_numbers, or if one of the named options is 0."""
    check_numbers(cfg)
    for name in names:
        if getattr(cfg, name) == 0:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(cfg, name)}: expected a finite number greater "
                             "than 0")


def lora_defaults(cfg, lora, full=False):
    """Fill in --lora-r and --lora-alpha, lora by default. ValueError if given for no new adapter.

    lora: (rank, alpha); full: does the whole transformer learn, without an adapter?
    """
    if cfg.init in ("none", "truncate") and not full:
        r, alpha = lora
        cfg.lora_r = r if cfg.lora_r is None else cfg.lora_r
        cfg.lora_alpha = alpha if cfg.lora_alpha is None else cfg.lora_alpha
    elif cfg.lora_r is not None or cfg.lora_alpha is not None:
        raise ValueError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: are for a new "
                         f"adapter; with --init {cfg.init} --full {full} there is none whose "
                         "rank can be chosen")


def check_training(cfg):
    """ValueError unless the options that all training scripts share make sense."""
    if cfg.ema >= 1:
        raise ValueError(f"--ema {cfg.ema}: the decay of an average; expected 0 <= ema < 1")
    if not cfg.ema and cfg.ema_every != type(cfg).ema_every:
        raise ValueError(f"--ema-every {cfg.ema_every} --ema 0: there is no average to update; "
                         "expected --ema above 0")
    for name in ("keep", "eval_every"):
        every = getattr(cfg, name, 0)
        if every > cfg.iters:
            raise ValueError(f"--{name.replace('_', '-')} {every} --iters {cfg.iters}: would never "
                             "happen; expected no more than the iterations")
    check_shares(cfg.ratio)
    if cfg.amp == "float16" and getattr(cfg, "full", False):
        raise ValueError("--amp float16 --full: scaled losses are for adapters here; expected "
                         "--amp bfloat16 or float32")


def check_shares(items):
    """ValueError if the shares of --ratio are huge. A list of prompts has as many entries."""
    numbers = [item.partition("=")[2] for item in items]
    if sum(float(number) for number in numbers if number.isdecimal()) > LARGEST_SHARES:
        raise ValueError(f"--ratio {' '.join(items)}: expected shares that add up to at most "
                         f"{LARGEST_SHARES}")


def check_rollout(cfg, world_size):
    """ValueError unless the options of a rollout fit each other, in stage 1 (GRPO) or 2 (OPD)."""
    if cfg.batch % cfg.group:
        raise ValueError(f"--batch {cfg.batch} --group {cfg.group}: expected whole groups, so a "
                         f"batch that is a multiple of {cfg.group}")
    parts = world_size * cfg.updates
    if cfg.batch % parts:
        raise ValueError(f"--batch {cfg.batch} with {world_size} rank(s) and --updates "
                         f"{cfg.updates}: every rank has equally many images in every update, so "
                         f"the batch must be a multiple of {parts}")
    ode = cfg.rollout == "ode"
    ordered = len(cfg.noisy) == 2 and 0 <= cfg.noisy[0] < cfg.noisy[1] <= cfg.steps
    if not ode and not ordered:
        raise ValueError(f"--noisy {cfg.noisy}: expected FROM TO with "
                         f"0 <= FROM < TO <= --steps {cfg.steps}")
    if cfg.rollout == "cps" and cfg.a > 1:
        raise ValueError(f"--a {cfg.a} --rollout cps: expected 1 or less; std = t_next sin(a pi / "
                         "2), and at 1 all noise is new")
    if cfg.rollout == "cps" and cfg.noisy[1] == cfg.steps:
        raise ValueError(f"--noisy {cfg.noisy} --rollout cps: the last CPS step has no noise and "
                         f"so no density; end at {cfg.steps - 1}")
