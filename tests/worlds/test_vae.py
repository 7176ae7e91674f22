"""Facts about the VAE. Against diffusers' it stands in test_sd3.py."""
import pytest
import torch
import torch.nn.functional as F

from plumbing.files import shapes_of
from worlds.vae import VAE, Down, Up


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(ch=(8, 12, 16), n_res=1, z=4).requires_grad_(False)


def shapes(module):
    return shapes_of(module.state_dict())


@pytest.mark.parametrize("ch, n_res, z", [((8, 12, 16), 1, 4), ((8, 16), 2, 3),
                                          ((128, 256, 512, 512), 2, 16)])
def test_vae_from_shapes_round_trip(ch, n_res, z):
    with torch.device("meta"):
        vae = VAE(ch, n_res, z)
        assert shapes(VAE.from_shapes(shapes(vae))) == shapes(vae)
    assert vae.factor == 2 ** (len(ch) - 1)


SOME_NAMES = [
    "encoder.down.0.downsample.conv.weight", "encoder.mid.attn_1.proj_out.weight",
    "encoder.down.1.block.0.nin_shortcut.weight", "decoder.up.3.upsample.conv.bias",
    "decoder.up.0.block.2.conv2.weight", "decoder.mid.block_2.norm1.weight",
    "decoder.norm_out.bias",
]


def test_vae_defaults_are_sd3s():
    with torch.device("meta"):
        vae = VAE()
    shape = shapes(vae)
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683        # as published
    assert vae.factor == 8
    for name in SOME_NAMES:
        assert name in shape, name
    assert shape["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert not any("quant_conv" in name for name in shape)


def test_vae_decode_sliced_equals_unsliced(vae):
    z = torch.randn(5, 4, 4, 6)
    whole = vae.decode(z)
    assert whole.shape == (5, 3, 16, 24)
    assert whole.abs().max() <= 1
    images = torch.rand(5, 3, 16, 24) * 2 - 1
    latents = vae.encode(images)
    calls = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for n in (1, 2, 5):
        # Room for n images at a time, of latents as of pixels.
        vae.pixels = n * 16 * 24
        torch.testing.assert_close(vae.decode(z), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.encode(images), latents, rtol=1e-5, atol=1e-5)
        assert max(calls) == n
        assert sum(calls) == 5
        calls.clear()
    hook.remove()
    del vae.pixels


def test_vae_latents_are_raw_less_0_0609_times_1_5305(vae):
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, logvar = vae.encoder(images).chunk(2, dim=1)
    latents = vae.encode(images)
    torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    drawn = vae.encode(images, torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, (mean + (logvar / 2).exp() * eps - 0.0609) * 1.5305)
    # decode undoes the scaling
    torch.testing.assert_close(vae.decode(latents), vae.decoder(mean).clamp(-1, 1))


def test_vae_attention_lets_every_pixel_see_every_other(vae):
    attention = vae.encoder.mid.attn_1
    x = torch.randn(1, 16, 3, 4)
    normed = attention.norm(x)
    q = attention.q(normed)[0].flatten(1)                        # (C, H W)
    k = attention.k(normed)[0].flatten(1)
    v = attention.v(normed)[0].flatten(1)
    out = v @ torch.softmax(q.T @ k / 4, -1).T                   # 4 = sqrt(16 channels)
    proj = attention.proj_out
    expected = x + F.conv2d(out.view(1, 16, 3, 4), proj.weight, proj.bias)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def copy_pixel(conv, at):
    """Make a 3 x 3 convolution of one channel copy the pixel (at, at) of its window."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, at, at] = 1
    conv.load_state_dict({"weight": weight, "bias": torch.zeros(1)})


def test_vae_halves_with_padding_on_the_right_and_below_and_doubles_by_repeating():
    x = torch.randn(1, 1, 4, 6)
    down = Down(1)
    copy_pixel(down.conv, 2)
    copied = x[..., 2::2, 2::2]
    assert torch.equal(down(x), F.pad(copied, (0, 1, 0, 1)))
    up = Up(1)
    copy_pixel(up.conv, 1)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
