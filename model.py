"""
The network of Stable Diffusion 3 and 3.5, small enough to read in one sitting: MMDiT and LoRA.

    mmdit = load_mmdit("sd3.5_medium.safetensors", "cuda", torch.bfloat16)
    v = mmdit(x, t, context, pooled)              # the base
    v = mmdit(x, t, context, pooled, "ocr")       # the base with the adapter called "ocr"

Parameter names are those of Stability's own checkpoints. So a file loads strictly, and nothing is
renamed. The architecture is read off the shapes of the tensors: SD3-Medium, SD3.5-Medium,
SD3.5-Large and the tiny model in ckpt/ are one class and differ in numbers only.

Papers: SD3 / MMDiT arXiv 2403.03206; LoRA arXiv 2106.09685.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.files import (
    Fingerprint,
    check_shapes,
    first_line,
    is_finite,
    open_tensors,
    shapes_of,
)

# ------------------------------------------------------------------ LoRA


class LoRALinear(nn.Linear):
    """One linear layer that holds n projections of the same input.

    n = 3 for q, k and v; n = 1 for an output projection. Several adapters live on one base weight,
    and each has A and B for every projection: W x + scale * B A x, with scale = alpha / r,
    A (n, r, D) and B (n, D, r).
    `adapter` is a name, or None: the base.
    """

    def __init__(self, width, n):
        super().__init__(width, n * width)
        self.n = n
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        self.scale = {}

    def forward(self, x, adapter=None):
        """x (b, T, D) -> the n projections, a list of (b, T, D).

        Each is a product of its own. On a CPU that is up to a tenth faster than one product for all
        n, and what follows (RMSNorm) reads no strided slices.
        """
        weights = self.weight.chunk(self.n)                                     # (D, D) each
        biases = self.bias.chunk(self.n)
        if adapter is None:
            return [F.linear(x, W, bias) for W, bias in zip(weights, biases)]
        As = self.A[adapter]
        Bs = self.B[adapter] * self.scale[adapter]
        if self.merges(x, adapter):
            return [F.linear(x, W + B @ A, bias) for W, bias, A, B in zip(weights, biases, As, Bs)]
        projections = []
        for W, bias, A, B in zip(weights, biases, As, Bs):
            y = F.linear(x, W, bias)
            h = F.linear(x, A.to(y.dtype))                                      # (b, T, r)
            projections.append(y + F.linear(h, B.to(y.dtype)))
        return projections

    def merges(self, x, adapter):
        """Is W + B A made first, and then applied? Else W, and A and B, are applied to each token.

        A merged weight costs D products more a token in the backward pass; A and B cost 6 r in both
        passes, and run slower than their count says: here they count as 8 r. Half precision would
        round a small update of the weight away.
        """
        half = torch.is_autocast_enabled(x.device.type) or self.weight.dtype.itemsize < 4
        return 8 * self.A[adapter].shape[1] >= x.shape[-1] and not half


# ------------------------------------------------------------------ MMDiT


@dataclass
class MMDiTConfig:
    """The defaults are SD3.5-Medium's."""
    depth: int = 24
    width: int = 1536
    head_dim: int = 64
    channels: int = 16       # of the latents
    patch: int = 2
    pos_max: int = 384       # side of the position table, in patches
    context_dim: int = 4096
    pooled_dim: int = 2048
    dual: int = 13           # the first `dual` blocks have attn2
    qk_norm: bool = True

    @classmethod
    def from_shapes(cls, shape):
        """Read the architecture off a checkpoint's {name: shape}. KeyError if it is no MMDiT."""
        blocks = [int(name.split(".")[1]) for name in shape if name.startswith("joint_blocks.")]
        width, channels, patch, _ = shape["x_embedder.proj.weight"]
        q_norm = shape.get("joint_blocks.0.x_block.attn.ln_q.weight")
        return cls(depth=len(set(blocks)),
                   width=width,
                   head_dim=q_norm[0] if q_norm else 64,
                   channels=channels,
                   patch=patch,
                   pos_max=math.isqrt(shape["pos_embed"][1]),
                   context_dim=shape["context_embedder.weight"][1],
                   pooled_dim=shape["y_embedder.mlp.0.weight"][1],
                   dual=sum(name.endswith("x_block.attn2.qkv.weight") for name in shape),
                   qk_norm=q_norm is not None)


def modulate(x, shift, scale):
    """Scale and shift each token by the vectors of its image.

    x (B, T, D); shift and scale (B, D).
    """
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(x, gate, h):
    """x + gate h. x, h (B, T, D); gate (B, D)."""
    return torch.addcmul(x, gate[:, None], h)


def attend(q, k, v):
    """Attention over all heads, which are then joined again.

    q, k, v (B, T, nh, hd) -> (B, T, D).
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The projections of one stream. The attention itself is over both streams (JointBlock)."""

    def __init__(self, cfg, proj=True):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = LoRALinear(cfg.width, 3)
        if proj:
            self.proj = LoRALinear(cfg.width, 1)
        self.ln_q = nn.RMSNorm(cfg.head_dim, eps=1e-6) if cfg.qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(cfg.head_dim, eps=1e-6) if cfg.qk_norm else nn.Identity()

    def heads(self, x, adapter):
        """x (B, T, D) -> q, k, v (B, T, nh, hd) each."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x, adapter))
        return self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype), v


class Mlp(nn.Module):
    def __init__(self, d_in, d_hidden, d_out, act):
        super().__init__()
        self.fc1 = nn.Linear(d_in, d_hidden)
        self.fc2 = nn.Linear(d_hidden, d_out)
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Stream(nn.Module):
    """One stream's half of a joint block.

    dual: the stream has attn2, a second attention over itself alone.
    last: this is the last context block. It has no output projection and no MLP, because nobody
        reads its output.
    """

    def __init__(self, cfg, dual=False, last=False):
        super().__init__()
        self.dual = dual
        self.last = last
        self.norm = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg, proj=not last)
        if dual:
            self.attn2 = Attention(cfg)
        if not last:
            self.mlp = Mlp(cfg.width, 4 * cfg.width, cfg.width, nn.GELU(approximate="tanh"))
        # Shift, scale and gate of the attention, of the MLP and, if dual, of attn2.
        self.n_mod = 6
        if last:
            self.n_mod = 2
        if dual:
            self.n_mod = 9
        self.adaLN_modulation = nn.Sequential(nn.SiLU(),
                                              nn.Linear(cfg.width, self.n_mod * cfg.width))

    def before(self, x, c, adapter):
        """q, k and v for the joint attention, and the modulation vectors, (B, D) each."""
        mod = self.adaLN_modulation(c).chunk(self.n_mod, dim=-1)
        return self.attn.heads(modulate(self.norm(x), mod[0], mod[1]), adapter), mod

    def after(self, x, attn, mod, adapter):
        """The residual stream after attention and MLP; None in the last context block.

        x, attn (B, T, D).
        """
        if self.last:
            return None
        y = gated(x, mod[2], self.attn.proj(attn, adapter)[0])
        if self.dual:                                    # attn2 reads the same x; it has no adapter
            q, k, v = self.attn2.heads(modulate(self.norm(x), mod[6], mod[7]), None)
            y = gated(y, mod[8], self.attn2.proj(attend(q, k, v))[0])
        return gated(y, mod[5], self.mlp(modulate(self.norm(y), mod[3], mod[4])))


class JointBlock(nn.Module):
    """Two streams, text and image, that attend to each other."""

    def __init__(self, cfg, i):
        super().__init__()
        self.context_block = Stream(cfg, last=i == cfg.depth - 1)
        self.x_block = Stream(cfg, dual=i < cfg.dual)

    def forward(self, x, context, c, adapter=None):
        """x (B, N, D), context (B, L, D), c (B, D) -> x and context after the block.

        The context is None after the last one.
        """
        qkv_context, mod_context = self.context_block.before(context, c, adapter)
        qkv_x, mod_x = self.x_block.before(x, c, adapter)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(qkv_context, qkv_x))
        attn = attend(q, k, v)                                                  # (B, L + N, D)
        L = context.shape[1]
        x = self.x_block.after(x, attn[:, L:], mod_x, adapter)
        context = self.context_block.after(context, attn[:, :L], mod_context, adapter)
        return x, context


class FinalLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.width, cfg.patch ** 2 * cfg.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))

    def forward(self, x, c):
        """x (B, N, D), c (B, D) -> (B, N, patch * patch * C), as unpatchify takes it."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Embed(nn.Module):
    """An MLP of two layers, under the checkpoint's names (t_embedder.mlp.0, ...)."""

    def __init__(self, d_in, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) -> one token a patch, (B, N, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.channels, cfg.width, cfg.patch, cfg.patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def timestep_embedding(t, dim=256):
    """Sinusoids of 1000 t, cosines first: t (B,) in [0, 1] -> (B, dim), float32."""
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    freq = torch.exp(-math.log(10000) * steps / half)
    angle = 1000 * t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_table(side, width):
    """The fixed 2-D position table that a new model starts from: (1, side * side, width)."""
    freq = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * freq                                  # (side, width / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)                        # (side, width / 2)
    rows = wave[:, None].expand(-1, side, -1)
    cols = wave[None].expand(side, -1, -1)
    return torch.cat([cols, rows], dim=-1).reshape(1, side * side, width)


def unpatchify(x, h, w, patch):
    """(B, h * w, patch * patch * C) -> (B, C, h * patch, w * patch)."""
    B = x.shape[0]
    x = x.view(B, h, w, patch, patch, -1)                                       # (h w) (p q c)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(B, -1, h * patch, w * patch)


class MMDiT(nn.Module):
    """The transformer: latents, time and text in; velocity out."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.register_buffer("pos_embed", sincos_table(cfg.pos_max, cfg.width))
        self.t_embedder = Embed(256, cfg.width)
        self.y_embedder = Embed(cfg.pooled_dim, cfg.width)
        self.context_embedder = nn.Linear(cfg.context_dim, cfg.width)
        self.joint_blocks = nn.ModuleList(JointBlock(cfg, i) for i in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        # Activation checkpointing: keep only what enters and leaves a block, and compute its
        # inside again in the backward pass.
        self.checkpointing = False

    def init_weights(self):
        """DiT's initialisation, adaLN-Zero (arXiv 2212.09748).

        Linear layers start as Xavier, with zero biases. Modulations and output start at zero, so
        each block is the identity.
        """
        zero = [self.final_layer.linear]
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            if hasattr(m, "adaLN_modulation"):
                zero.append(m.adaLN_modulation[1])
        for m in zero:
            nn.init.zeros_(m.weight)
        return self

    def positions(self, h, w):
        """The table cropped around its centre: (1, h * w, D)."""
        side = self.cfg.pos_max
        if h > side or w > side:
            raise ValueError(f"latents of {h} x {w} patches: the position table holds {side} x "
                             f"{side}; expected no more")
        top = (side - h) // 2
        left = (side - w) // 2
        table = self.pos_embed.view(1, side, side, -1)[:, top:top + h, left:left + w]
        return table.reshape(1, h * w, -1)

    def forward(self, x, t, context, pooled, adapter=None):
        """Velocity dx/dt at (x, t): (B, C, H, W), in the dtype of x.

        x (B, C, H, W) latents; t (B,) in [0, 1], 1 = noise; context (B, L, context_dim);
        pooled (B, pooled_dim); adapter: a name, or None: the base.
        """
        h = x.shape[-2] // self.cfg.patch
        w = x.shape[-1] // self.cfg.patch
        dtype = self.context_embedder.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            # Float32 weights then compute in its dtype, and the residual stream does too.
            dtype = torch.get_autocast_dtype(x.device.type)
        c = self.t_embedder(timestep_embedding(t).to(dtype))                    # (B, D)
        c = c + self.y_embedder(pooled.to(dtype))
        context = self.context_embedder(context.to(dtype))                      # (B, L, D)
        y = self.x_embedder(x.to(dtype)) + self.positions(h, w).to(dtype)       # (B, N, D)
        for block in self.joint_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                y, context = checkpoint(block, y, context, c, adapter, use_reentrant=False)
            else:
                y, context = block(y, context, c, adapter)
        return unpatchify(self.final_layer(y, c), h, w, self.cfg.patch).to(x.dtype)

    # Adapters are plain dicts of tensors, "joint_blocks.0.x_block.attn.qkv.A" (3, r, D) and
    # "... .B" (3, D, r), and an alpha.

    def lora_layers(self):
        """The layers that carry adapters: the attention projections of both streams.

        These are the paper's eight (to_q, to_k, to_v, to_out and add_*). attn2 is left out.
        """
        layers = {}
        for name, m in self.named_modules():
            if isinstance(m, LoRALinear) and ".attn." in name:
                layers[name] = m
        return layers

    def adapter_shapes(self, r):
        """{name: shape} of an adapter of rank r."""
        shapes = {}
        for name, m in self.lora_layers().items():
            shapes[f"{name}.A"] = (m.n, r, m.in_features)
            shapes[f"{name}.B"] = (m.n, m.in_features, r)
        return shapes

    def add_adapter(self, name, r, alpha, tensors=None, trainable=False):
        """Attach an adapter, from tensors or a new one.

        A new one starts as the base: A ~ N(0, 1 / r^2), which is PEFT's "gaussian", and B = 0.
        Raises ValueError if a tensor is missing, superfluous or of another shape.
        """
        if tensors is not None:
            check_shapes(self.adapter_shapes(r), shapes_of(tensors), f"adapter '{name}'")
        for layer, m in self.lora_layers().items():
            # Adapters train in float32, whatever dtype the base is kept in.
            like = dict(device=m.weight.device, dtype=torch.float32)
            if tensors is None:
                A = torch.randn(m.n, r, m.in_features, **like) / r
                B = torch.zeros(m.n, m.in_features, r, **like)
            else:
                A = tensors[f"{layer}.A"].to(**like)
                B = tensors[f"{layer}.B"].to(**like)
            m.A[name] = nn.Parameter(A.clone(), requires_grad=trainable)
            m.B[name] = nn.Parameter(B.clone(), requires_grad=trainable)
            m.scale[name] = alpha / r

    def adapter(self, name):
        """The tensors of one adapter, detached and on the CPU, as add_adapter takes them."""
        tensors = {}
        for layer, m in self.lora_layers().items():
            tensors[f"{layer}.A"] = m.A[name].detach().cpu().clone()
            tensors[f"{layer}.B"] = m.B[name].detach().cpu().clone()
        return tensors


# ------------------------------------------------------------------ files

# The first part of a tensor's name says which network of the file it belongs to.
PREFIX = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.", "text": "text_encoder."}


def part_prefix(names, part):
    """The prefix that a network's tensors have in a file of these names.

    A file that holds one network alone may leave it out.
    """
    if any(name.startswith(PREFIX[part]) for name in names):
        return PREFIX[part]
    return ""


def part_shapes(path, part, marker):
    """The tensors of one network in a file: {name without prefix: shape}, and the prefix.

    marker: a prefix of tensor names. If no name has it, the network is not in the file, which is a
    ValueError.
    """
    with open_tensors(path) as file:
        names = list(file.keys())
        prefix = part_prefix(names, part)
        if not any(name.startswith(prefix + marker) for name in names):
            raise ValueError(f"{path}: has no tensor '{PREFIX[part]}{marker}...' or '{marker}...', "
                             "expected Stability's native layout; it has "
                             f"'{min(names, default='nothing')}'")
        shapes = {}
        for name in names:
            if name.startswith(prefix):
                shape = file.get_slice(name).get_shape()
                shapes[name.removeprefix(prefix)] = tuple(shape)
    return shapes, prefix


def load_part(path, part, build, marker, device="cpu", dtype=torch.float32):
    """Load one network out of a safetensors file, strictly, and without gradients.

    build: {name: shape} -> the module; marker: as in part_shapes; dtype: None for the file's own.
    The module is built without memory. Tensors are then read one by one, so memory holds about one
    copy. On the CPU with dtype None, tensors stay mapped to the file, and no copy is made.
    The module gets a fingerprint of its own numbers in the file, which takes 1 s per GB.
    Raises ValueError that names the first tensor that does not fit or is not finite.
    """
    shapes, prefix = part_shapes(path, part, marker)
    try:
        with torch.device("meta"):
            module = build(shapes)
    except Exception as error:                          # odd names and shapes can fail anywhere
        raise ValueError(f"{path}: is not Stability's native layout of the {part}: "
                         f"{type(error).__name__} {first_line(error)}") from None
    check_shapes(shapes_of(module.state_dict()), shapes, path, prefix)
    digest = Fingerprint()
    tensors = {}
    for name in sorted(shapes):
        # Each tensor opens the file again. Closing it frees the mapped pages that were already
        # copied.
        with open_tensors(path, verify=False) as file:
            tensor = file.get_tensor(prefix + name)
        if not is_finite(tensor):
            raise ValueError(f"{path}: '{prefix + name}' is not a tensor of finite numbers")
        digest.add(name, tensor)
        tensors[name] = tensor.to(device, dtype or tensor.dtype)
        del tensor
    module.load_state_dict(tensors, assign=True)
    module.fingerprint = digest.name()
    return module.eval().requires_grad_(False)


def build_mmdit(shapes):
    return MMDiT(MMDiTConfig.from_shapes(shapes))


def load_mmdit(path, device="cpu", dtype=torch.float32):
    """The transformer of a file in Stability's native layout, as load_part loads it.

    Files of SD3-Medium, SD3.5-Medium, SD3.5-Large and of the tiny world are read.
    """
    return load_part(path, "mmdit", build_mmdit, "joint_blocks.", device, dtype)
