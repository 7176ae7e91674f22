"""Processes: torch.distributed with one rank per GPU (or CPU core), or one plain process."""
import math
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from plumbing import missing
from plumbing.health import not_finite


def choose_device(device, world_size, local_ranks):
    """Turn "auto" into "cuda" if each local rank has a GPU, else "mps" or "cpu". Check the rest."""
    gpus = torch.cuda.device_count()
    if device == "auto":
        if gpus >= local_ranks:
            return "cuda"
        if gpus and os.environ.get("RANK", "0") == "0":
            print(f"{local_ranks} ranks, but {gpus} GPU(s): all run on the CPU. Start one rank a "
                  f"GPU (torchrun --nproc_per_node={gpus}, make RANKS={gpus})", file=sys.stderr)
        return "mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu"
    if device not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {device}: expected auto, cuda, mps or cpu "
                         "(choose a GPU with CUDA_VISIBLE_DEVICES)")
    if device == "cuda" and gpus < local_ranks:
        raise ValueError(f"--device cuda: {local_ranks} rank(s) here, but this machine (or this "
                         f"build of torch) has {gpus} CUDA device(s); use --device cpu")
    if device == "mps" and world_size > 1:
        raise ValueError("--device mps: torch.distributed has no backend for it; "
                         "run one process, or use --device cpu")
    return device


# A rank that waits this long for another gives up. Loading, text encoding and compiling take
# minutes, and ranks begin them together. A rank that starts later than START is not coming.
TIMEOUT = timedelta(minutes=10)
START = timedelta(minutes=5)


def open_store(rank, world_size):
    """Where the ranks find each other: a store that is new in each start of torchrun.

    ValueError that names the ranks that did not come. torchrun keeps one store for all its
    restarts, with the addresses of the dead ranks in it. So a restart has its own prefix there.
    Nodes count restarts differently, so several nodes need a new store in each start.
    """
    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    nodes = int(env.get("GROUP_WORLD_SIZE", 1))
    if shared and nodes > 1 and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError(f"--max-restarts on {nodes} nodes: torchrun would keep the addresses of "
                         "dead ranks; expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and "
                         "--rdzv-backend=c10d")
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size,
                          is_master=rank == 0 and not shared, timeout=START, wait_for_workers=False)
    restart = env["TORCHELASTIC_RESTART_COUNT"] if shared else 0
    store = dist.PrefixStore(f"start-{restart}", store)
    store.set(f"here-{rank}", "")
    everyone = [f"here-{other}" for other in range(world_size)]
    try:
        store.wait(everyone, START)
    except dist.DistStoreError:
        missing = [other for other, key in enumerate(everyone) if not store.check([key])]
        raise ValueError(f"rank(s) {missing} of {world_size} did not start within {START}; "
                         "expected WORLD_SIZE processes, as torchrun starts them") from None
    return store


def ranks():
    """This process's rank and the number of ranks, from the environment that torchrun sets."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(number.isdecimal() for number in given) or not int(given[0]) < int(given[1]):
        raise ValueError(f"RANK={given[0]} WORLD_SIZE={given[1]} in the environment: expected "
                         "0 <= RANK < WORLD_SIZE, as torchrun sets them, or neither of them")
    return int(given[0]), int(given[1])


def setup(device="auto", seed=0):
    """Start torch.distributed if torchrun started several ranks, and seed torch.

    Returns rank, world size and device.
    """
    rank, world_size = ranks()
    device = choose_device(device, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        store = open_store(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=TIMEOUT)
        missing.call_roll(store, rank, world_size)
    torch.manual_seed(seed)
    return rank, world_size, torch.device(device)


def autocast(device, amp="bfloat16"):
    """The dtype amp on a GPU, "float16", "bfloat16" or "float32"; always float32 elsewhere."""
    half = device.type == "cuda" and amp != "float32"
    return torch.autocast(device.type, getattr(torch, amp) if half else None, enabled=half)


def loss_scaler(device, amp):
    """float16 has no small numbers. So the loss is scaled up before its backward pass.

    With any other dtype, the scaler does nothing.
    """
    return torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and amp == "float16")


# ------------------------------------------------------------------ between the ranks


def sync_mean(x):
    """Average a tensor over the ranks, in place."""
    if dist.is_initialized():
        missing.begin("mean")
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def sync_sum(x):
    """Sum a tensor over the ranks, in place."""
    if dist.is_initialized():
        missing.begin("sum")
        dist.all_reduce(x)
    return x


def gather(x):
    """Concatenate a tensor (the same shape on every rank) over the ranks, in rank order."""
    if not dist.is_initialized():
        return x
    missing.begin("gather")
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_batch(x, batch, updates):
    """Gather rows that are in the order of share(), and put them in the order of the batch."""
    everyone = gather(x)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    order = [i for rank in range(world_size) for i in share(batch, updates, rank, world_size)]
    out = torch.empty_like(everyone)
    out[torch.tensor(order, device=x.device)] = everyone
    return out


def local():
    """This rank's number on its own machine, and how many ranks run there."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gather_objects(x):
    """[x of rank 0, x of rank 1, ...], for small objects that are not tensors."""
    if not dist.is_initialized():
        return [x]
    missing.begin("gather of objects")
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def barrier():
    """Wait for all ranks."""
    if dist.is_initialized():
        missing.begin("barrier")
        dist.barrier()


def share(batch, updates, rank, world_size):
    """This rank's image indices, minibatch by minibatch.

    Minibatch u holds the same images for any number of ranks.
    """
    return torch.arange(batch).view(updates, world_size, -1)[:, rank].flatten().tolist()


# ------------------------------------------------------------------ the network


def distribute(net, full, amp="bfloat16"):
    """Wrap a net so that its gradients are averaged over the ranks.

    full: the whole net learns. FSDP2 then shards it in place: each rank holds its part of weights,
    gradients and optimiser state. A block's whole weights are there only while the block runs.
    Otherwise an adapter learns, and DDP wraps the net.
    """
    if not dist.is_initialized():
        return net
    if not full:
        return DDP(net, broadcast_buffers=False)
    # It takes a second to import, which only this needs.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    device = net.pos_embed.device.type
    half = getattr(torch, amp) if device == "cuda" and amp != "float32" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)     # x and t stay float32
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    for module in [*net.joint_blocks, net]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    return net


def reduce_now(net, now):
    """now: the next backward pass averages the gradients over the ranks, else a later one does.

    Call it before the forward pass. DDP then reduces once per update; its no_sync sets the same
    flag. FSDP keeps no whole gradients, so it reduces in every backward pass. The sum is equal.
    """
    missing.begin("gradients")
    net.require_backward_grad_sync = now


def clip_gradients(params, most=1.0):
    """Clip the norm of all gradients together to most. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(params, most)
    if hasattr(norm, "full_tensor"):                    # sharded
        norm = norm.full_tensor()
    return norm.item()


def optimise(opt, scaler, it):
    """Clip the gradients to norm 1, take one step and clear them. Returns the norm before clipping.

    ValueError if the gradient is not finite. A scaler instead skips such a step and scales less.
    """
    scaler.unscale_(opt)
    params = [p for group in opt.param_groups for p in group["params"]]
    grad_norm = clip_gradients(params)
    if not scaler.is_enabled() or scaler.get_scale() < 1:
        check_finite(grad_norm, it)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    missing.updated(it)
    return grad_norm


def check_finite(grad_norm, it):
    """ValueError if the gradient is not finite. All ranks see the same norm, so all stop."""
    if not math.isfinite(grad_norm):
        raise ValueError(not_finite("gradient", grad_norm, it))


def compile_blocks(net):
    """Compile each block in place, so that names stay the same. Equal blocks are compiled once.

    The first step then takes longer, by 20 seconds to some minutes.
    """
    # There is one graph for each combination of block kind, adapter (none or a name) and grad mode.
    torch._dynamo.config.recompile_limit = 64
    for block in net.joint_blocks:
        block.compile()
