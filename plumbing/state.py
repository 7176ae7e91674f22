"""The resumable state of a run: it is written regularly, and checked and restored after a stop.

The network may be sharded over the ranks (plumbing.dist.distribute). A state holds whole tensors,
so the number of ranks may change from one part of a run to the next.
"""
from pathlib import Path

from torch.distributed.checkpoint import state_dict as dcp

from plumbing import dist
from plumbing.files import check_shapes, read_pt, shapes_of, write_pt

# Gives whole tensors on the CPU of rank 0, also if the net is sharded.
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

# Options that a resumed run may change. They do not change what is computed, only how.
FREE = {"save_every", "keep", "device", "micro", "compile", "checkpointing", "offload",
        "world_size"}
# With the objective "released" these may not change: its loss averages over the images of one
# forward pass.
PART_OF_RELEASED = {"micro", "world_size"}


def learning(net):
    """{name: parameter} of all parameters of a net that learn."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def weights(net):
    """The trainable tensors of a net, whole and on the CPU. A sharded net is gathered first.

    Every rank has to call it; rank 0 gets {name: tensor}.
    """
    learns = learning(net)
    tensors = dcp.get_model_state_dict(net, options=WHOLE)
    return {name: tensor for name, tensor in tensors.items() if name in learns}


def save_state(path, net, opt, rank, **fields):
    """Write a resumable state: the weights that learn, the optimiser's state, and the fields.

    Every rank has to call it; rank 0 writes. resume expects the fields iter, settings and base.
    """
    state = {"weights": weights(net)}
    state["opt"] = dcp.get_optimizer_state_dict(net, opt, options=WHOLE)
    state.update(fields)
    if rank == 0:
        write_pt(path, state)


def restore(state, net, opt):
    """Put the weights and the optimiser's state back, on every rank.

    state: the result of resume. It is emptied here, because it takes 30 GB with --full.
    Returns the number of iterations that are done, which is 0 if state is None.
    """
    if state is None:
        return 0
    check_shapes(shapes_of(learning(net)), shapes_of(state["weights"]), state["path"])
    # Not strict, because a state does not contain the frozen weights.
    partial = dcp.StateDictOptions(full_state_dict=True, strict=False)
    dcp.set_model_state_dict(net, state["weights"], options=partial)
    full = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(net, opt, state["opt"], options=full)
    done = state["iter"]
    state.clear()
    return done


def check_ranks_agree(path, done):
    """ValueError on every rank unless all ranks have done equally many iterations (done)."""
    first, *others = dist.gather_objects(done)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise ValueError(f"{path}: rank 0 resumes at iteration {first}, rank {rank} at "
                             f"{other}; expected {Path(path).parent} on a disk that all nodes see")


def resume(path, settings, base, free=()):
    """The state of a stopped run, or None if there is none. Every rank has to call it.

    ValueError if the state has another base (a fingerprint) or other settings, or more iterations
    than --iters, or if the ranks find different states. The settings in FREE and `free` may differ.
    """
    state = None
    done = 0
    if Path(path).exists():
        state = read_pt(path, ["iter", "settings", "base"])
        done = state["iter"]
    check_ranks_agree(path, done)
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
    state["path"] = path
    return state
