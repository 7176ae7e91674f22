"""The network's part of the benchmark (bench.py): speed beside diffusers + PEFT, and FLOPs."""
import dataclasses
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from checkpoints.formats import TARGETS, to_diffusers
from experiments import random_sd3
from experiments.turns import ratio, say, spread, take_turns, utilisation
from model import MMDiT, MMDiTConfig
from plumbing import dist

WIDTHS = [128, 384, 1536]

# ------------------------------------------------------------------ FLOPs


def block_flops(cfg, i, B, N, L):
    """Multiplications and additions of block i in a forward pass of its base: {part: FLOPs}.

    B images of N patches, L text tokens. Attention is counted whole. Sums, norms and activations
    are left out, as torch's counter does.
    """
    D = cfg.width
    last = i == cfg.depth - 1
    dual = i < cfg.dual
    square = 2 * B * D * D                              # one token of each image, D to D
    return {"qkv": 3 * square * (N + L),
            "attention": 4 * B * (N + L) ** 2 * D,
            "proj": square * (N + (0 if last else L)),
            "mlp": 8 * square * (N + (0 if last else L)),
            "attn2": (4 * square * N + 4 * B * N * N * D) if dual else 0,
            "modulation": square * ((9 if dual else 6) + (2 if last else 6))}


def lora_flops(cfg, i, B, N, L, r):
    """Those of the A factors of block i in a forward pass; B's are as many. (q, k, v), (proj)"""
    one = 2 * B * r * cfg.width
    return 3 * one * (N + L), one * (N + (0 if i == cfg.depth - 1 else L))


def forward_flops(cfg, B, N, L, r=0):
    """FLOPs of a forward pass of B images. r: the rank of an adapter."""
    D = cfg.width
    patch = cfg.patch ** 2 * cfg.channels
    total = 2 * B * (256 * D + D * D + cfg.pooled_dim * D + D * D)              # t and pooled
    total += 2 * B * (L * cfg.context_dim * D + N * patch * D)
    total += 2 * B * (2 * D * D + N * D * patch)                                # the last layer
    for i in range(cfg.depth):
        total += sum(block_flops(cfg, i, B, N, L).values())
        total += 2 * sum(lora_flops(cfg, i, B, N, L, r))
    return total


def training_flops(cfg, B, N, L, r):
    """FLOPs of a LoRA training step: forward and backward, the base frozen.

    A frozen layer passes the gradient on, which costs as much as its forward pass. Attention has
    two products forward and five backward, as it computes the scores again. In front of the first
    adapters nothing learns. So the first block's qkv and attn2, the modulations and the embeddings
    have no backward pass.
    """
    total = forward_flops(cfg, B, N, L, r)
    total += 2 * B * N * cfg.width * cfg.patch ** 2 * cfg.channels
    for i in range(cfg.depth):
        part = block_flops(cfg, i, B, N, L)
        into, out = lora_flops(cfg, i, B, N, L, r)
        total += 2.5 * part["attention"] + part["proj"] + part["mlp"]
        total += 3 * into + 4 * out                     # of A and B: their own gradients, and on
        if i > 0:
            attention = 4 * B * N * N * cfg.width if part["attn2"] else 0
            total += part["qkv"] + part["attn2"] + 1.5 * attention + into
    return total


def attention_flops(q, k, v, *rest, **options):
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad, q, k, v, *rest, **options):
    return sdpa_backward_flop_count(grad, q, k, v)


def counted(call):
    """FLOPs of a call, by torch's own counter. It does not know attention on the CPU by itself."""
    aten = torch.ops.aten
    cpu = {aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
           aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        call()
    return counter.get_total_flops()


def matmul(device, dtype):
    """A large matrix product, as a function, and its FLOPs."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n ** 3


# ------------------------------------------------------------------ the network, ours and theirs


@dataclass
class Shape:
    """A transformer, and a batch for it: B images, latents of side x side, L text tokens."""
    cfg: MMDiTConfig
    B: int
    side: int
    L: int

    @property
    def N(self):
        return (self.side // self.cfg.patch) ** 2


def shape_of(width, device):
    """The tiny world's, a quarter of SD3.5-Medium's width, or all of it, with a few blocks.

    On a GPU width 1536 has all its blocks, and 512 px instead of 256.
    """
    if width == 128:
        cfg = MMDiTConfig(depth=4, width=128, head_dim=32, channels=4, pos_max=8, context_dim=64,
                          pooled_dim=64, dual=2)
        return Shape(cfg, 32, 8, 20)
    side, B = (64, 8) if device == "cuda" else (32, 2)
    cfg = MMDiTConfig(width=width)
    if device == "cpu" or width < 1536:
        cfg = dataclasses.replace(cfg, depth=2, dual=1)
    return Shape(cfg, B if width == 1536 else 2 * B, side, 205)


def our_net(cfg, device, dtype, r=32):
    """Random weights, and an adapter "student" of rank r that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        net = MMDiT(cfg)
    weights = random_sd3.random_weights(net, "", generator)
    weights = {name: weight.to(device, dtype) for name, weight in weights.items()}
    net.load_state_dict(weights, assign=True)
    net.requires_grad_(False)
    adapter = random_sd3.random_adapter(net, generator, r)
    net.add_adapter("student", r, adapter["alpha"], adapter["tensors"], trainable=True)
    return net, weights, adapter


def their_net(cfg, weights, device, dtype):
    """diffusers' transformer with the same weights, by diffusers' own conversion."""
    try:
        import peft  # noqa: F401
        from diffusers import SD3Transformer2DModel
        from diffusers.loaders.single_file_utils import (
            convert_sd3_transformer_checkpoint_to_diffusers,
        )
    except ImportError as error:
        raise ValueError(f"--parts net compiled: {error}; expected diffusers and peft, which "
                         "`make oracles` installs; or other parts") from None
    net = SD3Transformer2DModel(
        sample_size=128, patch_size=cfg.patch, in_channels=cfg.channels, num_layers=cfg.depth,
        attention_head_dim=cfg.head_dim, num_attention_heads=cfg.width // cfg.head_dim,
        joint_attention_dim=cfg.context_dim, caption_projection_dim=cfg.width,
        pooled_projection_dim=cfg.pooled_dim, out_channels=cfg.channels,
        pos_embed_max_size=cfg.pos_max, dual_attention_layers=tuple(range(cfg.dual)),
        qk_norm="rms_norm")
    net.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(weights)))
    return net.to(device, dtype).eval().requires_grad_(False)


def add_their_adapter(net, adapter):
    """The same adapter by PEFT, as Flow-GRPO trains it: eight projections."""
    from peft import LoraConfig
    net.add_adapter(LoraConfig(r=adapter["r"], lora_alpha=adapter["alpha"],
                               target_modules=TARGETS))
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in to_diffusers(adapter["tensors"]).items():
            parameters[name.replace(".weight", ".default.weight")].copy_(tensor)


def pair(width, device):
    """{"ours", "theirs": functions of an adapter's name or None} on the same weights and inputs.

    Returns them, a function that gives theirs its adapter, the networks, and the Shape. None for
    theirs runs what it has: so the forward pass of the base comes before the adapter is given.
    """
    shape = shape_of(width, device)
    cfg = shape.cfg
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ours, weights, adapter = our_net(cfg, device, dtype)
    theirs = their_net(cfg, weights, device, dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape.B, cfg.channels, shape.side, shape.side, generator=generator),
              torch.rand(shape.B, generator=generator),
              torch.randn(shape.B, shape.L, cfg.context_dim, generator=generator),
              torch.randn(shape.B, cfg.pooled_dim, generator=generator)]
    x, t, context, pooled = (tensor.to(device) for tensor in inputs)
    autocast = dist.autocast(torch.device(device))

    def run_ours(adapter):
        with autocast:
            return ours(x, t, context, pooled, adapter)

    def run_theirs(adapter):
        with autocast:
            return theirs(x.to(dtype), context.to(dtype), pooled.to(dtype), 1000 * t,
                          return_dict=False)[0]

    runs = {"ours": run_ours, "theirs": run_theirs}
    return runs, lambda: add_their_adapter(theirs, adapter), (ours, theirs), shape


def agree(runs, adapter, width, dtype=torch.float32):
    """ValueError unless both outputs are the same, up to rounding. Returns their distance."""
    with torch.no_grad():
        a, b = (run(adapter).float() for run in runs.values())
    distance = ((a - b).norm() / b.norm()).item()
    most = 1e-4 if dtype == torch.float32 else 0.05
    if not distance < most:
        raise ValueError(f"width {width}: ours and diffusers' differ by {distance:.2g} of their "
                         f"norm; expected less than {most}")
    return distance


def without_gradient(run, adapter):
    def call():
        with torch.no_grad():
            run(adapter)
    return call


def training_step(run, net):
    """Forward and backward, up to the gradients of A and B."""
    params = [p for p in net.parameters() if p.requires_grad]

    def call():
        run("student").float().square().mean().backward()
        for p in params:
            p.grad = None
    return call


def compile_both(ours, theirs):
    """Each block in place, both alike."""
    dist.compile_blocks(ours)
    for block in theirs.transformer_blocks:
        block.compile()


def bench_net(cfg, compiled):
    """One row for each width and operation."""
    rows = []
    dtype = torch.float32 if cfg.device == "cpu" else torch.bfloat16
    for width in cfg.widths:
        torch._dynamo.reset()                           # or sizes of the last width would be guards
        runs, give_adapter, nets, shape = pair(width, cfg.device)
        if compiled:
            compile_both(*nets)
        sizes = (shape.cfg, shape.B, shape.N, shape.L)
        operations = [("forward", None, forward_flops(*sizes)),
                      ("forward with LoRA", "student", forward_flops(*sizes, 32)),
                      ("LoRA training step", "student", training_flops(*sizes, 32))]
        for name, adapter, flops in operations:
            if name == "forward with LoRA":
                give_adapter()
            distance = agree(runs, adapter, width, dtype)
            product, product_flops = matmul(cfg.device, dtype)
            calls = {}
            for (who, run), net in zip(runs.items(), nets):
                calls[who] = without_gradient(run, adapter)
                if name == "LoRA training step":
                    calls[who] = training_step(run, net)
            seconds = take_turns({**calls, "product": product}, cfg.turns, cfg.device)
            used = {who: utilisation(flops, seconds[who], product_flops, seconds["product"])
                    for who in calls}
            rows.append({"width": width, "what": name, "images": shape.B,
                         "tokens": shape.N + shape.L, "blocks": shape.cfg.depth,
                         "seconds": {who: spread(seconds[who]) for who in calls},
                         "ratio": ratio(seconds["theirs"], seconds["ours"]),
                         "utilisation": used, "distance": float(f"{distance:.2g}")})
            say("net", rows[-1])
    return rows


def bench_flops(cfg):
    """Ours alone, so nothing else is needed."""
    rows = []
    dtype = torch.float32 if cfg.device == "cpu" else torch.bfloat16
    for width in cfg.widths:
        shape = shape_of(width, cfg.device)
        net, _, _ = our_net(shape.cfg, cfg.device, dtype)
        x = torch.randn(shape.B, shape.cfg.channels, shape.side, shape.side, device=cfg.device)
        t = torch.rand(shape.B, device=cfg.device)
        context = torch.randn(shape.B, shape.L, shape.cfg.context_dim, device=cfg.device)
        pooled = torch.randn(shape.B, shape.cfg.pooled_dim, device=cfg.device)
        autocast = dist.autocast(torch.device(cfg.device))

        def run(adapter, net=net, inputs=(x, t, context, pooled), autocast=autocast):
            with autocast:
                return net(*inputs, adapter)

        sizes = (shape.cfg, shape.B, shape.N, shape.L)
        product, product_flops = matmul(cfg.device, dtype)
        calls = {"forward": without_gradient(run, None),
                 "LoRA training step": training_step(run, net)}
        flops = {"forward": forward_flops(*sizes), "LoRA training step": training_flops(*sizes, 32)}
        seconds = take_turns({**calls, "product": product}, cfg.turns, cfg.device)
        product_rates = [product_flops / s / 1e9 for s in seconds["product"]]
        for name, call in calls.items():
            rows.append({"width": width, "what": name, "GFLOP": round(flops[name] / 1e9, 2),
                         "counter / formula": round(counted(call) / flops[name], 4),
                         "GFLOP/s": spread([flops[name] / s / 1e9 for s in seconds[name]]),
                         "product GFLOP/s": spread(product_rates),
                         "utilisation": utilisation(flops[name], seconds[name], product_flops,
                                                    seconds["product"])})
            say("flops", rows[-1])
    return rows
