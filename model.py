"""
The networks of Stable Diffusion 3 / 3.5, small enough to read in one sitting: MMDiT, LoRA, VAE, and the files they come from.

    model = load("ckpt/tiny.safetensors")                            # the tiny world: a file
    model = load("stable-diffusion-3.5-medium", "cuda")              # SD3.5: its published folder, or the hub's name of it
    context, pooled = model.text(["a photo of a red circle"])
    v = model.mmdit(x, t, context, pooled)                           # the base
    v = model.mmdit(x, t, context, pooled, "ocr")                    # the adapter called "ocr"

Parameter names are those of Stability's own checkpoints, so a file loads strictly and nothing is remapped. The architecture is
read off the tensors' shapes: SD3-Medium, SD3.5-Medium, SD3.5-Large and the tiny model in ckpt/ are one class and differ in numbers only.

Papers: SD3 / MMDiT arXiv 2403.03206; LoRA arXiv 2106.09685; latent diffusion (the VAE) arXiv 2112.10752.
"""
import hashlib
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ LoRA


@dataclass
class Route:
    """Which adapter each sample of a batch goes through: index (B,) into names, -1 for the base without an adapter."""
    names: list
    index: torch.Tensor


class LoRALinear(nn.Linear):
    """n projections of one input side by side (q, k, v: n = 3; an output projection: n = 1), each with its own adapters.

    W x + scale * B A x, scale = alpha / r, per projection: A (n, r, D) and B (n, D, r). Several adapters live on one base weight;
    `adapter` is None (base), a name (all samples), or a Route (each sample its own).
    """

    def __init__(self, width, n):
        super().__init__(width, n * width)
        self.n = n
        self.A, self.B, self.scale = nn.ParameterDict(), nn.ParameterDict(), {}

    def forward(self, x, adapter=None):                          # x (B, T, D) -> (B, T, n * D)
        y = F.linear(x, self.weight, self.bias)
        if adapter is None:
            return y
        if isinstance(adapter, str):
            A, B = self.A[adapter], self.B[adapter]
            h = F.linear(x, A.flatten(0, 1).to(x.dtype)).unflatten(-1, A.shape[:2])                    # (B, T, n, r)
            return y + self.scale[adapter] * torch.einsum("btnr,nor->btno", h, B.to(h.dtype)).flatten(-2)
        # Adapters of different rank are padded with zeros to the widest; index -1 picks the last entry, which is all zeros.
        r = max(self.A[k].shape[1] for k in adapter.names)
        A = torch.stack([F.pad(self.A[k], (0, 0, 0, r - self.A[k].shape[1])) for k in adapter.names])    # (K, n, r, D)
        B = torch.stack([F.pad(self.B[k] * self.scale[k], (0, r - self.B[k].shape[2])) for k in adapter.names])
        A = torch.cat([A, torch.zeros_like(A[:1])])[adapter.index].to(x.dtype)             # (B, n, r, D)
        B = torch.cat([B, torch.zeros_like(B[:1])])[adapter.index].to(x.dtype)             # (B, n, D, r)
        h = torch.einsum("btd,bnrd->btnr", x, A)
        return y + torch.einsum("btnr,bnor->btno", h, B).flatten(-2)


# ------------------------------------------------------------------ MMDiT


@dataclass
class MMDiTConfig:
    """The defaults are SD3.5-Medium's; the tiny model and the other SD3 sizes differ in numbers only."""
    depth: int = 24
    width: int = 1536
    head_dim: int = 64
    channels: int = 16       # of the latents
    patch: int = 2
    pos_max: int = 384       # side of the position table, in patches
    context_dim: int = 4096
    pooled_dim: int = 2048
    dual: int = 13           # the first `dual` blocks have a second, image-only attention (SD3.5-Medium's attn2)
    qk_norm: bool = True

    @classmethod
    def from_shapes(cls, shape):
        """Read the architecture off a checkpoint: shape maps a parameter's name to its shape. KeyError if it is no MMDiT."""
        blocks = [int(k.split(".")[1]) for k in shape if k.startswith("joint_blocks.")]
        width, channels, patch, _ = shape["x_embedder.proj.weight"]
        qk_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in shape
        return cls(depth=max(blocks) + 1, width=width, channels=channels, patch=patch, qk_norm=qk_norm,
                   head_dim=shape["joint_blocks.0.x_block.attn.ln_q.weight"][0] if qk_norm else 64,
                   pos_max=math.isqrt(shape["pos_embed"][1]), context_dim=shape["context_embedder.weight"][1],
                   pooled_dim=shape["y_embedder.mlp.0.weight"][1],
                   dual=sum(k.endswith("x_block.attn2.qkv.weight") for k in shape))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]             # x (B, T, D); shift, scale (B, D)


class Attention(nn.Module):
    def __init__(self, cfg, proj=True):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = LoRALinear(cfg.width, 3)
        if proj:
            self.proj = LoRALinear(cfg.width, 1)
        self.ln_q = nn.RMSNorm(cfg.head_dim, eps=1e-6) if cfg.qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(cfg.head_dim, eps=1e-6) if cfg.qk_norm else nn.Identity()

    def heads(self, x, adapter):
        q, k, v = self.qkv(x, adapter).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)    # (B, nh, T, hd) each
        return self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype), v


class Mlp(nn.Module):
    def __init__(self, d_in, d_hidden, d_out, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(d_in, d_hidden), nn.Linear(d_hidden, d_out), act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Stream(nn.Module):
    """One stream's half of a joint block; `dual` adds attn2, `last` is the final context block, whose output nobody reads."""

    def __init__(self, cfg, dual=False, last=False):
        super().__init__()
        self.last = last
        self.norm = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)      # no weights, so no name in the checkpoint
        self.attn = Attention(cfg, proj=not last)
        if dual:
            self.attn2 = Attention(cfg)
        if not last:
            self.mlp = Mlp(cfg.width, 4 * cfg.width, cfg.width, nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, (2 if last else 9 if dual else 6) * cfg.width))

    def before(self, x, c, adapter):
        """Modulated q, k, v of the joint attention, and the six or nine modulation vectors."""
        mod = self.adaLN_modulation(c).chunk(self.adaLN_modulation[1].out_features // x.shape[-1], dim=-1)
        return self.attn.heads(modulate(self.norm(x), mod[0], mod[1]), adapter), mod

    def after(self, x, attn, mod, adapter):
        if self.last:
            return None
        h = mod[2][:, None] * self.attn.proj(attn, adapter)
        if len(mod) == 9:                                        # attn2 reads the same x under its own modulation; the paper's LoRA leaves it alone
            q, k, v = self.attn2.heads(modulate(self.norm(x), mod[6], mod[7]), None)
            h = h + mod[8][:, None] * self.attn2.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + h
        return x + mod[5][:, None] * self.mlp(modulate(self.norm(x), mod[3], mod[4]))


class JointBlock(nn.Module):
    def __init__(self, cfg, i):
        super().__init__()
        self.context_block = Stream(cfg, last=i == cfg.depth - 1)
        self.x_block = Stream(cfg, dual=i < cfg.dual)

    def forward(self, x, context, c, adapter=None):
        qkv_c, mod_c = self.context_block.before(context, c, adapter)
        qkv_x, mod_x = self.x_block.before(x, c, adapter)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv_c, qkv_x))             # joint attention over [context, image]
        attn = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)    # (B, L + N, D)
        L = context.shape[1]
        return self.x_block.after(x, attn[:, L:], mod_x, adapter), self.context_block.after(context, attn[:, :L], mod_c, adapter)


class FinalLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(cfg.width, cfg.patch ** 2 * cfg.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Embed(nn.Module):
    """Holds `mlp` under the checkpoint's names (t_embedder.mlp.0, y_embedder.mlp.2, ...)."""

    def __init__(self, d_in, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


class PatchEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.channels, cfg.width, cfg.patch, cfg.patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)           # (B, N, D)


def timestep_embedding(t, dim=256):
    """Sinusoids of 1000 t, cosines first: t (B,) in [0, 1] -> (B, dim), float32."""
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    a = 1000 * t.float()[:, None] * freq
    return torch.cat([a.cos(), a.sin()], dim=-1)


def sincos_table(side, width):
    """The fixed 2-D position table a new model starts from: (1, side * side, width)."""
    freq = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    a = torch.arange(side)[:, None] * freq                       # (side, width / 4)
    a = torch.cat([a.sin(), a.cos()], dim=-1)                    # (side, width / 2)
    rows, cols = a[:, None].expand(-1, side, -1), a[None].expand(side, -1, -1)
    return torch.cat([cols, rows], dim=-1).reshape(1, side * side, width)


def unpatchify(x, h, w, patch):
    """(B, h * w, patch * patch * C) -> (B, C, h * patch, w * patch)."""
    B = x.shape[0]
    x = x.view(B, h, w, patch, patch, -1)                        # (h w) (p q c)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(B, -1, h * patch, w * patch)


class MMDiT(nn.Module):
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
        self.checkpointing = False       # True: keep only what goes in and out of a block, and compute its inside again on the way back

    def init_weights(self):
        """The reference initialisation: modulation and output start at zero, so that every block starts as the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in [self.final_layer.linear] + [m.adaLN_modulation[1] for m in self.modules() if hasattr(m, "adaLN_modulation")]:
            nn.init.zeros_(m.weight)
        return self

    def positions(self, h, w):
        """The table cropped around its centre: (1, h * w, D)."""
        side = self.cfg.pos_max
        assert h <= side and w <= side, f"{h} x {w} patches, but the position table holds {side} x {side}"
        top, left = (side - h) // 2, (side - w) // 2
        table = self.pos_embed.view(1, side, side, -1)[:, top:top + h, left:left + w]
        return table.reshape(1, h * w, -1)

    def forward(self, x, t, context, pooled, adapter=None):
        """Velocity dx/dt at (x, t).

        x (B, C, H, W) latents; t (B,) in [0, 1], 1 = noise; context (B, L, context_dim); pooled (B, pooled_dim);
        adapter: None (base), a name, or a Route. Returns v (B, C, H, W), in x's dtype.
        """
        h, w = x.shape[-2] // self.cfg.patch, x.shape[-1] // self.cfg.patch
        dtype = self.context_embedder.weight.dtype
        if torch.is_autocast_enabled(x.device.type):      # float32 weights then compute as bfloat16 ones do, residual stream included
            dtype = torch.get_autocast_dtype(x.device.type)
        c = self.t_embedder(timestep_embedding(t).to(dtype)) + self.y_embedder(pooled.to(dtype))     # (B, D)
        context = self.context_embedder(context.to(dtype))                                           # (B, L, D)
        y = self.x_embedder(x.to(dtype)) + self.positions(h, w).to(dtype)                            # (B, N, D)
        for block in self.joint_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                y, context = checkpoint(block, y, context, c, adapter, use_reentrant=False)
            else:
                y, context = block(y, context, c, adapter)
        return unpatchify(self.final_layer(y, c), h, w, self.cfg.patch).to(x.dtype)

    # Adapters: plain dicts of tensors "joint_blocks.0.x_block.attn.qkv.A" (3, r, D) and "....B" (3, D, r), and their alpha.

    def lora_layers(self):
        """The attention projections of both streams (to_q, to_k, to_v, to_out and add_*), without attn2: the paper's eight."""
        return {n: m for n, m in self.named_modules() if isinstance(m, LoRALinear) and ".attn." in n}

    def add_adapter(self, name, r, alpha, tensors=None, trainable=False):
        """Attach an adapter: from tensors, or new (A ~ N(0, 1/r^2) as PEFT's "gaussian", B = 0: it starts as the base).

        Raises ValueError if a tensor is missing, superfluous or of another shape.
        """
        layers = self.lora_layers()
        if tensors is not None:
            want = {f"{n}.{f}": (m.n, r, m.in_features) if f == "A" else (m.n, m.in_features, r) for n, m in layers.items() for f in "AB"}
            got = {k: tuple(v.shape) for k, v in tensors.items()}
            if want != got:
                k = sorted(set(want.items()) ^ set(got.items()))[0][0]
                raise ValueError(f"adapter '{name}': tensor '{k}' is {got.get(k, 'missing')}, this model wants {want.get(k, 'no such tensor')}")
        for n, m in layers.items():
            like = dict(device=m.weight.device, dtype=torch.float32)       # adapters train in float32 whatever the base is kept in
            A = torch.randn(m.n, r, m.in_features, **like) / r if tensors is None else tensors[f"{n}.A"].to(**like)
            B = torch.zeros(m.n, m.in_features, r, **like) if tensors is None else tensors[f"{n}.B"].to(**like)
            m.A[name] = nn.Parameter(A.clone(), requires_grad=trainable)
            m.B[name] = nn.Parameter(B.clone(), requires_grad=trainable)
            m.scale[name] = alpha / r

    def adapter(self, name):
        """The tensors of one adapter, detached and on the CPU, as add_adapter takes them."""
        return {f"{n}.{f}": getattr(m, f)[name].detach().cpu().clone() for n, m in self.lora_layers().items() for f in "AB"}


# ------------------------------------------------------------------ VAE


def group_norm(ch):
    return nn.GroupNorm(ch // 4 if ch < 128 else 32, ch, eps=1e-6)      # 32 groups, as SD, whose narrowest layer has 128 channels


class ResnetBlock(nn.Module):
    def __init__(self, ch_in, ch_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(ch_in), nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(ch_out), nn.Conv2d(ch_out, ch_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.norm = group_norm(ch)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(ch, ch, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))     # (B, 1, H W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Twice down (stride 2, padded on the right and below as SD does) or twice up (nearest, then a convolution)."""

    def __init__(self, ch, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(ch, ch, 3, padding=1) if up else nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


def middle(ch):
    return nn.ModuleDict({"block_1": ResnetBlock(ch, ch), "attn_1": AttnBlock(ch), "block_2": ResnetBlock(ch, ch)})


def run_middle(m, h):
    return m["block_2"](m["attn_1"](m["block_1"](h)))


class Encoder(nn.Module):
    def __init__(self, ch, n_res, z):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, c in enumerate(ch):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(ch[max(i - 1, 0)] if j == 0 else c, c) for j in range(n_res))
            level.downsample = Resample(c, up=False) if i < len(ch) - 1 else nn.Identity()
            self.down.append(level)
        self.mid, self.norm_out, self.conv_out = middle(ch[-1]), group_norm(ch[-1]), nn.Conv2d(ch[-1], 2 * z, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(run_middle(self.mid, h))))


class Decoder(nn.Module):
    def __init__(self, ch, n_res, z):
        super().__init__()
        self.conv_in, self.mid = nn.Conv2d(z, ch[-1], 3, padding=1), middle(ch[-1])
        self.up = nn.ModuleList()                                # up.0 is the finest level, and runs last
        for i, c in enumerate(ch):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(ch[min(i + 1, len(ch) - 1)] if j == 0 else c, c) for j in range(n_res + 1))
            level.upsample = Resample(c, up=True) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out, self.conv_out = group_norm(ch[0]), nn.Conv2d(ch[0], 3, 3, padding=1)

    def forward(self, z):
        h = run_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Images <-> latents. Defaults are SD3's: 8x smaller, 16 channels, scaled latents z = (raw - 0.0609) * 1.5305."""
    scale, shift = 1.5305, 0.0609
    pixels = 2 ** 20         # of the images that go through at a time (4 of 512 x 512), so that memory does not grow with the batch

    def __init__(self, ch=(128, 256, 512, 512), n_res=2, z=16):
        super().__init__()
        self.encoder, self.decoder = Encoder(ch, n_res, z), Decoder(ch, n_res, z)
        self.factor = 2 ** (len(ch) - 1)

    @classmethod
    def from_shapes(cls, shape):
        """Read the architecture off a checkpoint, as MMDiTConfig.from_shapes."""
        levels = 1 + max(int(k.split(".")[2]) for k in shape if k.startswith("encoder.down."))
        n_res = 1 + max(int(k.split(".")[4]) for k in shape if k.startswith("encoder.down.0.block."))
        ch = [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return cls(ch, n_res, shape["decoder.conv_in.weight"][1])

    def slices(self, x, factor=1):
        """A batch (B, C, h, w), cut into what goes through at a time."""
        return x.to(self.decoder.conv_in.weight.dtype).split(max(1, self.pixels // (x.shape[-2] * x.shape[-1] * factor ** 2)))

    def encode(self, images, generator=None):
        """images (B, 3, H, W) in [-1, 1] -> scaled latents (B, z, H / factor, W / factor); the mean, or a draw if a generator is given."""
        mean, logvar = torch.cat([self.encoder(x) for x in self.slices(images)]).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            mean = mean + noise * torch.exp(0.5 * logvar.clamp(-30, 20))
        return (mean - self.shift) * self.scale

    def decode(self, z):
        """scaled latents (B, z, h, w) -> images (B, 3, h * factor, w * factor) in [-1, 1]."""
        return torch.cat([self.decoder(x) for x in self.slices(z / self.scale + self.shift, self.factor)]).clamp(-1, 1)


# ------------------------------------------------------------------ files


@dataclass
class Model:
    """A base and what goes with it, on one device."""
    mmdit: MMDiT
    vae: VAE
    text: object             # prompts, a list of B strings -> context (B, L, context_dim), pooled (B, pooled_dim); text.prepare(prompts) beforehand
    world: str               # "tiny" or "sd3": where the training scripts find defaults, prompts and rewards
    resolution: int          # side of the images, in pixels
    file: str                # the safetensors file that transformer and VAE were read from

    @property
    def fingerprint(self):
        return self.mmdit.fingerprint

    def latent_shape(self):
        side = self.resolution // self.vae.factor
        return self.mmdit.cfg.channels, side, side

    @torch.no_grad()
    def images(self, latents):
        """scaled latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        return self.vae.decode(latents).float() / 2 + 0.5


PREFIX = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.", "text": "text_encoder."}


def open_file(path):
    """A safetensors file, memory-mapped. ValueError if it is none, or not a whole one."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: expected a safetensors file, got: {' '.join(str(e).split())}") from None


def check_shapes(module, got, path, prefix=""):
    """ValueError that names the first tensor of got, {name: shape}, that is missing, superfluous or of another shape than the module's."""
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    for k in sorted(want.keys() | got.keys()):
        if want.get(k) != got.get(k):
            raise ValueError(f"{path}: tensor '{prefix}{k}' is {got.get(k, 'missing')}, expected {want.get(k, 'no such tensor')}")


def load_part(path, part, build, marker, device="cpu", dtype=torch.float32):
    """One network out of a safetensors file: names with the part's PREFIX, or, in a file of its own, without. Strict.

    build: {name: shape} -> the module; marker: the start of a name that shows the part is there at all. The module is made without memory and then
    given the file's tensors one by one, each in its final dtype and on its device, so that there is never more than about one copy. On the CPU, in
    the file's own dtype (dtype None), there is not even that: the tensors are the mapped file. ValueError names the first tensor that does not fit.
    """
    with open_file(path) as f:
        names = list(f.keys())
        prefix = PREFIX[part] if any(n.startswith(PREFIX[part]) for n in names) else ""
        if not any(n.startswith(prefix + marker) for n in names):
            raise ValueError(f"{path}: has no tensor '{PREFIX[part]}{marker}...' or '{marker}...', expected Stability's native layout; it has "
                             f"'{min(names, default='nothing')}'")
        names = [n for n in names if n.startswith(prefix)]
        got = {n.removeprefix(prefix): tuple(f.get_slice(n).get_shape()) for n in names}
    try:
        with torch.device("meta"):
            module = build(got)
    except (KeyError, IndexError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path}: is not Stability's native layout of the {part}: {type(e).__name__} {e}") from None
    check_shapes(module, got, path, prefix)
    digest, tensors = Fingerprint(), {}
    for k in sorted(got):
        with open_file(path) as f:       # opened anew for each, so that the pages of what was copied leave memory
            tensor = f.get_tensor(prefix + k)
        digest.add(k, tensor)
        tensors[k] = tensor.to(device, dtype or tensor.dtype)
        del tensor
    module.load_state_dict(tensors, assign=True)
    module.fingerprint = digest.name()
    return module.eval().requires_grad_(False)


def load_mmdit(path, device="cpu", dtype=torch.float32):
    """The transformer of a file in Stability's native layout, as load_part: SD3-Medium, SD3.5-Medium, SD3.5-Large, the tiny world's."""
    return load_part(path, "mmdit", lambda shape: MMDiT(MMDiTConfig.from_shapes(shape)), "joint_blocks.", device, dtype)


def load_vae(path, device="cpu", dtype=torch.float32):
    """The VAE of the same file, or of one of its own, as load_part."""
    return load_part(path, "vae", VAE.from_shapes, "decoder.", device, dtype)


class Fingerprint:
    """A short name for a set of weights, the same whatever dtype they are later loaded in: a hash of names, shapes and samples."""

    def __init__(self):
        self.digest = hashlib.sha256()

    def add(self, name, tensor):
        flat = tensor.flatten()
        self.digest.update(f"{name}{tuple(tensor.shape)}".encode())
        self.digest.update(flat[:: max(1, flat.numel() // 64)].float().numpy().tobytes())

    def name(self):
        return self.digest.hexdigest()[:16]


def fingerprint(tensors):
    """The Fingerprint of {name: tensor}."""
    digest = Fingerprint()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.name()


def world_name(path):
    """"tiny" for a file, "sd3" for a folder or a name on the hub ("organisation/model"). ValueError if it is nothing of the kind."""
    if Path(path).is_file():
        return "tiny"
    if Path(path).is_dir() or len(Path(path).parts) == 2 and not Path(path).is_absolute() and not Path(path).suffix == ".safetensors":
        return "sd3"
    raise ValueError(f"--model {path}: expected the tiny world's safetensors file, SD3.5's published folder, or its name on the hub")


def find(path):
    """The safetensors file that --model means: itself, the one in SD3.5's folder, or the hub's, fetched with its text encoders. ValueError without."""
    folder = Path(path)
    if world_name(path) == "tiny":
        return folder
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["sd3*.safetensors", "text_encoder*/*", "tokenizer*/*"],
                                            ignore_patterns=["text_encoders/*", "*_incl_*", "*.fp16*"]))
        except Exception as e:      # whatever the hub client raises: no network, no such model, licence not accepted
            why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise ValueError(f"--model {path}: is no folder here, and the hub did not give it: {why}") from None
    files = sorted(f for f in folder.glob("sd3*.safetensors") if "_incl_" not in f.name)
    if len(files) != 1:
        raise ValueError(f"{folder}: has {', '.join(f.name for f in files) or 'no sd3*.safetensors'}, expected one file with transformer and VAE, "
                         "e.g. sd3.5_medium.safetensors")
    return files[0]


def load(path, device="cpu", dtype=torch.float32, size=None, t5=None):
    """A Model by its path (see world_name). size: side of the images in pixels; t5: how SD3.5's prompts are encoded (sd3.py)."""
    world = importlib.import_module(world_name(path))      # here and not above: the worlds build on this file
    return world.load(path, device, dtype, size, t5)
