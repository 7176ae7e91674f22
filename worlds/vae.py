"""The VAE of Stable Diffusion 3: pictures to latents and back. The tiny world has a small one.

Parameter names are those of Stability's own checkpoints, so a file loads strictly and nothing is
remapped. Paper: latent diffusion, arXiv 2112.10752.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model import load_part


def group_norm(ch):
    """32 groups from 128 channels on, as in all of SD's layers. Below that, 4 channels a group."""
    groups = 32 if ch >= 128 else ch // 4
    return nn.GroupNorm(groups, ch, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, ch_in, ch_out):
        super().__init__()
        self.norm1 = group_norm(ch_in)
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.norm2 = group_norm(ch_out)
        self.conv2 = nn.Conv2d(ch_out, ch_out, 3, padding=1)
        self.nin_shortcut = nn.Identity()
        if ch_in != ch_out:
            self.nin_shortcut = nn.Conv2d(ch_in, ch_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Attention of one head, in which every pixel sees every other."""

    def __init__(self, ch):
        super().__init__()
        self.norm = group_norm(ch)
        self.q = nn.Conv2d(ch, ch, 1)
        self.k = nn.Conv2d(ch, ch, 1)
        self.v = nn.Conv2d(ch, ch, 1)
        self.proj_out = nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        h = self.norm(x)
        tokens = []
        for project in (self.q, self.k, self.v):
            tokens.append(project(h).flatten(2).transpose(1, 2)[:, None])        # (B, 1, H W, C)
        h = F.scaled_dot_product_attention(*tokens)[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Down(nn.Module):
    """Halves height and width: stride 2, padded on the right and below as SD does."""

    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Doubles height and width: each pixel is repeated, then a convolution."""

    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """The coarsest level, the same in the encoder and in the decoder."""

    def __init__(self, ch):
        super().__init__()
        self.block_1 = ResnetBlock(ch, ch)
        self.attn_1 = AttnBlock(ch)
        self.block_2 = ResnetBlock(ch, ch)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


def level_blocks(ch_in, ch_out, n):
    """n residual blocks, of which the first changes the number of channels."""
    blocks = nn.ModuleList([ResnetBlock(ch_in, ch_out)])
    for _ in range(n - 1):
        blocks.append(ResnetBlock(ch_out, ch_out))
    return blocks


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> mean and log-variance of raw latents, (B, 2 z, h, w)."""

    def __init__(self, ch, n_res, z):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(ch):
            level = nn.Module()
            level.block = level_blocks(ch[max(i - 1, 0)], width, n_res)
            level.downsample = Down(width) if i < len(ch) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(ch[-1])
        self.norm_out = group_norm(ch[-1])
        self.conv_out = nn.Conv2d(ch[-1], 2 * z, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Raw latents (B, z, h, w) -> images (B, 3, H, W)."""

    def __init__(self, ch, n_res, z):
        super().__init__()
        self.conv_in = nn.Conv2d(z, ch[-1], 3, padding=1)
        self.mid = Middle(ch[-1])
        self.up = nn.ModuleList()                # up.0 is the finest level, and runs last
        for i, width in enumerate(ch):
            level = nn.Module()
            level.block = level_blocks(ch[min(i + 1, len(ch) - 1)], width, n_res + 1)
            level.upsample = Up(width) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = group_norm(ch[0])
        self.conv_out = nn.Conv2d(ch[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Images <-> latents. The defaults are SD3's: 8 times smaller, 16 channels."""

    # Scaled latents are z = (raw - shift) * scale.
    scale = 1.5305
    shift = 0.0609
    # The networks see at most this many pixels at a time (4 images of 512 x 512), so that memory
    # does not grow with the batch.
    pixels = 2 ** 20

    def __init__(self, ch=(128, 256, 512, 512), n_res=2, z=16):
        super().__init__()
        self.encoder = Encoder(ch, n_res, z)
        self.decoder = Decoder(ch, n_res, z)
        self.factor = 2 ** (len(ch) - 1)

    @classmethod
    def from_shapes(cls, shapes):
        """Read the architecture off the tensors of a checkpoint, {name: shape}."""
        levels = 0
        blocks = set()
        for name in shapes:
            part = name.split(".")
            if name.startswith("encoder.down."):
                levels = max(levels, 1 + int(part[2]))
            if name.startswith("encoder.down.0.block."):
                blocks.add(part[4])
        if not blocks:
            raise ValueError("no tensor 'encoder.down.0.block.0...'")
        ch = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return cls(ch, len(blocks), shapes["decoder.conv_in.weight"][1])

    def slices(self, x, factor=1):
        """Cut a batch x (B, C, h, w) into the parts that a network sees at a time.

        factor: the side of an image divided by the side of x. It is 1 if x holds images.
        """
        area = x.shape[-2] * x.shape[-1] * factor ** 2
        x = x.to(self.decoder.conv_in.weight.dtype)
        return x.split(max(1, self.pixels // area))

    def encode(self, images, generator=None):
        """images (B, 3, H, W) in [-1, 1] -> scaled latents (B, z, H / factor, W / factor).

        They are the mean of the distribution, or a random draw from it if a generator is given.
        """
        moments = torch.cat([self.encoder(x) for x in self.slices(images)])
        mean, logvar = moments.chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            mean = mean + noise.to(mean) * torch.exp(0.5 * logvar.clamp(-30, 20))
        return (mean - self.shift) * self.scale

    def decode(self, z):
        """Scaled latents (B, z, h, w) -> images (B, 3, h * factor, w * factor) in [-1, 1]."""
        raw = z / self.scale + self.shift
        images = torch.cat([self.decoder(x) for x in self.slices(raw, self.factor)])
        return images.clamp(-1, 1)


def load_vae(path, device="cpu", dtype=torch.float32):
    """Load the VAE from a model's file or from a separate file, as model.load_part does."""
    return load_part(path, "vae", VAE.from_shapes, "decoder.", device, dtype)
