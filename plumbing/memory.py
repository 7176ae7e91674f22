"""How much memory will a run need? --dry-run prints it, part by part, for one rank.

Everything is computed from shapes: nothing is allocated, and no forward pass is made. Sizes are in
bytes, and in GB of 10^9 bytes where they are printed. tests/plumbing/test_memory.py compares them
with what autograd keeps on a CPU.

Not counted: CUDA itself (about 1 GB), gaps between the blocks of the allocator, the temporaries of
the optimiser's step, the workspaces of matrix products and attention, torch.compile, reward
networks.
"""
import os

import torch

# What autograd keeps of a joint block when an adapter learns, in vectors of width D a token. The
# weights of the base do not learn, so a layer without an adapter keeps no input.
# NORMS: the inputs of both LayerNorms; q and k before RMSNorm.
# OTHERS: the inputs of qkv and proj (2), q, k and v of the attention and its output (4), and the
# input of GELU (4).
NORMS, OTHERS = 4, 10
# attn2, for an image token: q and k before RMSNorm; v, the normalised q and k, and the output.
DUAL_NORMS, DUAL_OTHERS = 2, 4
# And when all weights learn: the outputs of LayerNorms (2) and RMSNorms (2), the inputs of the
# MLP's two layers (1 + 4), and what the gates multiply (2). For attn2 the same, without an MLP.
WHOLE, DUAL_WHOLE = 11, 6
# A forward pass without gradients holds about so many at its widest place, the MLP: the residual
# stream, the MLP's input, its hidden units before and after GELU. A backward pass holds as many.
WORKING = 12
# The widest place of the VAE's decoder: about so many feature maps.
VAE_MAPS = 4


def n_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept(cfg, n_text, n_image, width, norm_width, whole=False, checkpointing=False):
    """Bytes that autograd keeps of one sample's forward pass.

    cfg: an MMDiTConfig; n_text, n_image: tokens; width: bytes of a number; norm_width: of a number
    in a norm, which autocast computes in float32. whole: do all weights learn?
    """
    joint = NORMS * norm_width + (OTHERS + WHOLE * whole) * width
    dual = DUAL_NORMS * norm_width + (DUAL_OTHERS + DUAL_WHOLE * whole) * width
    block = (n_text + n_image) * joint * cfg.width
    extra = n_image * dual * cfg.width
    if checkpointing:                       # what enters each block, and the inside of one of them
        entering = cfg.depth * (n_text + n_image) * cfg.width * width
        return entering + block + extra * (cfg.dual > 0)
    return cfg.depth * block + cfg.dual * extra


def is_adapter(name):
    return ".A." in name or ".B." in name


def learner(net, full, ema, world_size, half):
    """{part: bytes} of what learns, with its optimiser.

    A whole net is sharded over the ranks by FSDP, so each part is divided by their number. half:
    does it compute in half precision, into which its float32 weights are then cast?
    """
    n = sum(p.numel() for p in net.parameters() if p.requires_grad)
    share = n / world_size if full else n
    parts = {"weights that learn": 4 * share,
             "gradients": 4 * share,
             "AdamW's two moments": 8 * share,
             "moving average": 4 * share if ema else 0}
    if world_size > 1 and not full:
        parts["gradients of all ranks (DDP)"] = 4 * n
    if full and world_size == 1 and half:
        parts["weights cast to half precision"] = 2 * n
    if full and world_size > 1:
        # Whole for a moment: the weights of a block and of the next one, the gradients of one, and
        # what is in no block.
        block = sum(p.numel() for p in net.joint_blocks[0].parameters())
        rest = n - sum(p.numel() for p in net.joint_blocks.parameters())
        parts["gathered blocks (FSDP)"] = (2 * block + rest) * (2 if half else 4) + 4 * block
    return parts


def plan(cfg, model, net, world_size, wholes=(), device="cpu"):
    """{part: bytes} of a rank's memory in a run of a training script, and the bytes of its start.

    cfg: the script's options; model: a worlds.world.Model; net: what learns, or holds the adapter
    that does; wholes: the teachers that are whole transformers. The start holds the frozen weights
    and the text encoders, which are gone before training.
    """
    base = model.mmdit
    shape = base.cfg
    full = getattr(cfg, "full", False)
    rolls = hasattr(cfg, "group")                        # stage 1 and 2; train_sft.py does not
    half = torch.device(device).type == "cuda" and cfg.amp != "float32"
    width = 2 if half else base.context_embedder.weight.element_size()
    if full and not half:
        width = 4
    norm_width = 4 if half else width
    channels, side, _ = model.latent_shape()
    latents = 4 * channels * side ** 2
    n_image = (side // shape.patch) ** 2
    n_text, context_dim = model.text.shape()
    images = cfg.batch // world_size
    n_states = images                                    # of an update, which --micro cuts
    if rolls:
        first, end = getattr(cfg, "supervised", None) or cfg.noisy
        n_steps = 1 if getattr(cfg, "one", False) else cfg.window or end - first
        n_states = images * n_steps // cfg.updates
    micro = min(cfg.micro, max(images, n_states))

    frozen = [*base.parameters(), *base.buffers()]
    teachers = [p for name, p in base.named_parameters()
                if is_adapter(name) and not p.requires_grad]
    teachers += [tensor for whole in wholes for tensor in [*whole.parameters(), *whole.buffers()]]
    mine = {id(p) for p in teachers} | {id(p) for p in frozen if p.requires_grad}
    parts = {"frozen base": n_bytes(p for p in frozen if id(p) not in mine),
             "VAE": n_bytes(model.vae.parameters()),
             "teachers": n_bytes(teachers)}
    start = sum(parts.values()) + model.text.size()
    parts |= learner(net, full, cfg.ema, world_size, half)

    guided = cfg.guidance != 1 and rolls
    both = guided and getattr(cfg, "match", "") != "fold"     # does the update need both branches?
    sample = kept(shape, n_text, n_image, width, norm_width, full, cfg.checkpointing)
    parts["activations of an update"] = sample * min(micro, n_states) * (2 if both else 1)
    token = WORKING * shape.width * width
    parts["a pass's working memory"] = token * (n_text + n_image) * micro * (2 if guided else 1)
    if rolls:
        # Of each state x and x_next, twice while they are cut anew; in stage 2 two targets too.
        of_state = 4 + 2 * hasattr(cfg, "teachers")
        parts["noise and states"] = images * latents * (cfg.steps + 1 + of_state * n_steps)
    text = n_text * context_dim * base.context_embedder.weight.element_size()
    parts["text of the prompts"] = text * (images * rolls + 4 * micro)
    if judges(cfg):
        pixels = min(micro * model.resolution ** 2, max(model.vae.pixels, model.resolution ** 2))
        widest = model.vae.decoder.up[0].block[0].conv1
        parts["VAE's working memory"] = (VAE_MAPS * pixels * widest.in_channels
                                         * widest.weight.element_size())
    return {name: size for name, size in parts.items() if size}, start


def judges(cfg):
    """Does a run look at pictures?"""
    stage_1 = hasattr(cfg, "adv_std")
    scored = getattr(cfg, "drop_equal", False) or getattr(cfg, "objective", "") == "mixed"
    return stage_1 or scored or cfg.eval_every > 0


def of_device(device):
    """The device's memory in bytes, and what it is called."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.total_memory, found.name
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), f"this machine ({device.type})"


def table(columns):
    """The lines that --dry-run prints. columns: {place: (parts, start)}, as plan gives them."""
    names = list(dict.fromkeys(name for parts, _ in columns.values() for name in parts))
    rows = {name: [parts.get(name, 0) for parts, _ in columns.values()] for name in names}
    rows["sum"] = [sum(parts.values()) for parts, _ in columns.values()]
    rows["at the start, with text encoders"] = [start for _, start in columns.values()]
    longest = max(map(len, rows))
    lines = [" " * longest + "".join(f"{place:>12}" for place in columns)]
    for name, sizes in rows.items():
        lines.append(f"{name:{longest}}" + "".join(f"{size / 1e9:12.3f}" for size in sizes))
    return "\n".join(lines)


def say_dry_run(cfg, model, net, rank, world_size, done, teachers=None):
    """Say what a run would train, and the memory that it would need. All its checks have passed.

    On a CPU it also says what the same run would need on a GPU, where --amp counts. done:
    iterations; teachers: {task: as checkpoints.formats reads it}.
    """
    if rank > 0:
        return
    learns = sum(p.numel() for p in net.parameters() if p.requires_grad)
    wholes = [teacher["net"] for teacher in (teachers or {}).values() if "net" in teacher]
    device = model.mmdit.pos_embed.device
    columns = {}
    for place in dict.fromkeys((device.type, "cuda")):
        columns[place] = plan(cfg, model, net, world_size, wholes, place)
    total, name = of_device(device)
    print(f"memory of each of {world_size} rank(s), in GB; {name} has {total / 1e9:.1f}\n"
          f"{table(columns)}\n"
          f"dry run: all checks passed; {learns:,} numbers would learn, in iterations "
          f"{done + 1} to {cfg.iters}; nothing was written")
