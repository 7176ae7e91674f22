"""The resumable state of a run: it is written regularly, and checked and restored after a stop.

The state before the newest one is kept beside it, as state-before.pt. The network may be sharded
over the ranks (plumbing.dist.distribute). A state holds whole tensors, so the number of ranks may
change from one part of a run to the next.
"""
import os
import shutil
import sys
from pathlib import Path

import torch

from plumbing import dist
from plumbing.files import check_shapes, first_line, read_pt, shapes_of, write_pt
from plumbing.folder import shown

# Options that a resumed run may change. They do not change what is computed, only how.
FREE = {"save_every", "keep", "device", "micro", "compile", "checkpointing", "offload",
        "world_size", "eval_every", "eval_images", "eval_steps", "track", "dry_run"}
# With the objective "released" these may not change: its loss averages over the images of one
# forward pass.
PART_OF_RELEASED = {"micro", "world_size"}

# What AdamW keeps for each weight, in the weight's shape. It also has "step", a single number.
MOMENTS = ("exp_avg", "exp_avg_sq")
# The files that this process could not read. The states before them must not be lost.
UNREADABLE = set()


def states():
    """torch's functions for the states of nets that may be sharded, and two ways to call them.

    whole gives whole tensors on the CPU of rank 0, also if the net is sharded. partial takes whole
    tensors, and not for all weights. It takes a second to import them, which eval.py does not need.
    """
    from torch.distributed.checkpoint import state_dict as dcp
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    partial = dcp.StateDictOptions(full_state_dict=True, strict=False)
    return dcp, whole, partial


def learning(net):
    """{name: parameter} of all parameters of a net that learn."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def weights(net):
    """The trainable tensors of a net, whole and on the CPU. A sharded net is gathered first.

    Every rank has to call it; rank 0 gets {name: tensor}.
    """
    learns = learning(net)
    dcp, whole, _ = states()
    tensors = dcp.get_model_state_dict(net, options=whole)
    return {name: tensor for name, tensor in tensors.items() if name in learns}


def save_state(path, net, opt, rank, **fields):
    """Write a resumable state: the weights that learn, the optimiser's state, and the fields.

    Every rank has to call it; rank 0 writes. resume expects the fields iter, settings and base.
    """
    dcp, whole, _ = states()
    state = {"weights": weights(net)}
    state["opt"] = dcp.get_optimizer_state_dict(net, opt, options=whole)
    state.update(fields)
    if rank == 0:
        write_state(path, state)


def before(path):
    return Path(path).with_stem(Path(path).stem + "-before")


def write_state(path, state):
    """Write a state, and keep the one that was there as the one before it.

    At every moment there is a whole state in path. ValueError if the disk is full.
    """
    path = Path(path)
    try:
        if path.exists() and path not in UNREADABLE:
            keep_before(path)
        write_pt(path, state)
    except (OSError, RuntimeError) as error:            # torch.save hides an OSError in its own
        free = shutil.disk_usage(path.parent).free
        reason = getattr(error.__context__ or error, "strerror", None) or first_line(error)
        raise ValueError(f"{path}: cannot be written ({reason}); it takes "
                         f"{shown(bytes_in(state))}, and {shown(free)} are free there. What was "
                         "saved before is whole: with more room, the same command goes on"
                         ) from None
    UNREADABLE.discard(path)


def keep_before(path):
    """Give the file a second name, which stays when the next state replaces it."""
    before(path).unlink(missing_ok=True)
    try:
        before(path).hardlink_to(path)
    except OSError:                                     # a disk without second names
        path.replace(before(path))


def bytes_in(state):
    """The size of all tensors in nested dicts."""
    if isinstance(state, dict):
        return sum(bytes_in(value) for value in state.values())
    return state.nbytes if torch.is_tensor(state) else 0


def check_tensors(want, tensors, path, prefix=""):
    """ValueError unless tensors has exactly the names and shapes of want, and all are finite.

    want: {name: shape}; tensors: {name: tensor}.
    """
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path}: expected tensors with names, got something else {prefix}")
    check_shapes(want, shapes_of(tensors), path, prefix)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor '{prefix}{name}' has a number that is not finite")


def check_optimiser(want, opt, path):
    """ValueError unless AdamW's state has its tensors for exactly the weights in want."""
    expected, found = {}, {}
    for name, shape in want.items():
        expected[f"{name}.step"] = ()
        expected.update({f"{name}.{moment}": shape for moment in MOMENTS})
    try:
        for name, slots in opt["state"].items():
            found.update({f"{name}.{slot}": tensor for slot, tensor in slots.items()})
        listed = [name for group in opt["param_groups"] for name in group["params"]]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: expected the state of AdamW under 'opt'") from None
    check_tensors(expected, found, path, "opt.")
    if sorted(map(str, listed)) != sorted(want):
        raise ValueError(f"{path}: its optimiser is for other weights than those that learn")


def restore(state, net, opt):
    """Put the weights and the optimiser's state back, on every rank.

    state: the result of resume. It is emptied here, because it takes 30 GB with --full.
    Returns the number of iterations that are done, which is 0 if state is None.
    """
    if state is None:
        return 0
    want = shapes_of(learning(net))
    for part in ("weights", "opt"):
        if part not in state:
            raise ValueError(f"{state['path']}: has no {part}; expected the state of a run")
    check_tensors(want, state["weights"], state["path"])
    check_optimiser(want, state["opt"], state["path"])
    dcp, _, partial = states()                          # no state contains the frozen weights
    dcp.set_model_state_dict(net, state["weights"], options=partial)
    full = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(net, opt, state["opt"], options=full)
    done = state["iter"]
    state.clear()
    return done


def check_ranks_agree(path, done, wrong=""):
    """ValueError on every rank unless all ranks have done equally many iterations (done).

    wrong: why this rank has no state. All ranks stop with it if any of them has such a reason.
    """
    found = dist.gather_objects((done, wrong))
    for _, why in found:
        if why:
            raise ValueError(why)
    first, *others = [done for done, _ in found]
    for rank, other in enumerate(others, 1):
        if other != first:
            raise ValueError(f"{path}: rank 0 resumes at iteration {first}, rank {rank} at "
                             f"{other}; expected {Path(path).parent} on a disk that all nodes see")


def read_state(path):
    """A state, or None if there is no such file. ValueError if it cannot be read."""
    if not path.exists():
        return None
    state = read_pt(path, ["iter", "settings", "base"])
    if not isinstance(state["iter"], int) or not isinstance(state["settings"], dict):
        raise ValueError(f"{path}: expected a number of iterations and settings, got other things")
    state["path"] = path
    return state


def newest(path):
    """The state in path. If it cannot be read or is not there, the one before it, or None."""
    try:
        state = read_state(path)
        if state or not before(path).exists():
            return state
        wrong = f"{path}: no such file"
    except ValueError as error:
        if not before(path).exists():
            raise
        wrong = str(error)
    state = read_state(before(path))
    UNREADABLE.add(path)
    if os.environ.get("RANK", "0") == "0":
        print(f"{wrong}; the run goes on from {before(path)}, iteration {state['iter']}",
              file=sys.stderr)
    return state


def resume(path, settings, base, free=()):
    """The state of a stopped run, or None if there is none. Every rank has to call it.

    A state that cannot be read falls back to the one before it. ValueError if there is none that
    can be read, if the state has another base (a fingerprint) or other settings, or more iterations
    than --iters, or if the ranks find different states. The settings in FREE and `free` may differ.
    """
    state = None
    wrong = ""
    try:
        state = newest(Path(path))
    except ValueError as error:
        wrong = str(error)
    done = state["iter"] if state else 0
    check_ranks_agree(path, done, wrong)
    if state is None:
        return None
    old = state["settings"]
    free = FREE.union(free)
    if settings.get("objective") == "released":
        free -= PART_OF_RELEASED
    fixed = [name for name in settings if name not in free]
    changed = [name for name in fixed if settings[name] != old.get(name)]
    if base != state["base"] and "model" not in changed:
        changed.append("model")
    if changed:
        raise ValueError(f"{path}: holds a run with another {', '.join(changed)}; give this run "
                         f"another name, or delete {Path(path).parent} to start over")
    if done > settings.get("iters", done):
        raise ValueError(f"{path}: holds a run of {done} iterations, more than --iters "
                         f"{settings['iters']}; give a shorter run another name")
    return state
