"""The state of a run that was stopped: written on schedule, checked, and put back.

The network may be sharded over the ranks (plumbing.dist.distribute). A state holds whole tensors,
so the number of ranks may change from one part of a run to the next.
"""
from pathlib import Path

from torch.distributed.checkpoint import state_dict as dcp

from plumbing.files import read_pt, write_pt

# Whole tensors on the CPU of rank 0, however the ranks share them.
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

# Options that a resumed run may change: they decide how it computes, not what.
FREE = {"save_every", "keep", "device", "micro", "compile", "checkpointing", "offload",
        "world_size"}


def weights(net):
    """{name: tensor} of all that learns in a net, whole and on the CPU, be it sharded or not.

    Every rank has to call it; rank 0 gets the tensors.
    """
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    tensors = dcp.get_model_state_dict(net, options=WHOLE)
    return {name: tensor for name, tensor in tensors.items() if name in learns}


def save_state(path, net, opt, rank, **fields):
    """Write a resumable state: the weights that learn, their optimiser's state, and the fields.

    Every rank has to call it; rank 0 writes. resume expects the fields iter, settings and base.
    """
    state = {"weights": weights(net)}
    state["opt"] = dcp.get_optimizer_state_dict(net, opt, options=WHOLE)
    state.update(fields)
    if rank == 0:
        write_pt(path, state)


def restore(state, net, opt):
    """Put the weights and the optimiser's state back, on every rank.

    state: what resume gave; it is emptied, since with --full it is 30 GB. Returns the number of
    iterations that are done, 0 if state is None.
    """
    if state is None:
        return 0
    partial = dcp.StateDictOptions(full_state_dict=True, strict=False)
    dcp.set_model_state_dict(net, state["weights"], options=partial)
    full = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(net, opt, state["opt"], options=full)
    done = state["iter"]
    state.clear()
    return done
    done = state["iter"]
    state.clear()
    return done


def resume(path, settings, base, free=()):
    """The state of a stopped run, or None if there is none.

    ValueError if it was made with another base (a fingerprint) or other settings. FREE and `free`
    name those that may differ.
    """
    if not Path(path).exists():
        return None
    state = read_pt(path, ["iter", "settings", "base"])
    old = state["settings"]
    fixed = [name for name in settings if name not in FREE and name not in free]
    changed = [name for name in fixed if settings[name] != old.get(name)]
    if base != state["base"]:
        changed.append("model")
    if changed:
        raise ValueError(f"{path}: holds a run with another {', '.join(changed)}; "
                         f"give --name NEW, or delete {Path(path).parent} to start over")
    done = state["iter"]
    if done > settings.get("iters", done):
        raise ValueError(f"{path}: holds a run of {done} iterations, more than --iters "
                         f"{settings['iters']}; give --name NEW to make a shorter one")
    return state
