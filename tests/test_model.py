"""Facts about model.py: the MMDiT against a second one written from the description, adapters, VAE, text, and the file that holds them."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tiny
from adapters import merge_adapters
from tiny import TinyText
from model import (PREFIX, MMDiT, MMDiTConfig, Resample, Route, VAE, fingerprint, load, sincos_table,
                   timestep_embedding, unpatchify)

TINY = MMDiTConfig(depth=3, width=64, head_dim=32, channels=4, patch=2, pos_max=8, context_dim=12, pooled_dim=10, dual=2)
PLAIN = dataclasses.replace(TINY, dual=0, qk_norm=False, head_dim=64, width=128)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_net(cfg, seed=0, dtype=torch.float64):
    """An MMDiT, random in EVERY weight: modulations, biases, norms and the position table included."""
    g, net = torch.Generator().manual_seed(seed), MMDiT(cfg)
    net.load_state_dict({k: torch.randn(v.shape, generator=g) * (0.3 if v.dim() == 1 else v.shape[-1] ** -0.5) + k.endswith(("ln_q.weight", "ln_k.weight"))
                         for k, v in net.state_dict().items()})
    return net.to(dtype).requires_grad_(False)


def inputs(cfg, B=2, h=6, w=10, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, context, pooled = (torch.randn(B, *s, generator=g, dtype=dtype) for s in [(cfg.channels, h, w), (3, cfg.context_dim), (cfg.pooled_dim,)])
    return x, torch.linspace(0.02, 0.97, B, dtype=dtype), context, pooled


def with_adapters(net, **ranks):
    """Attach random adapters (A and B both random), scale 1.5."""
    for name, r in ranks.items():
        net.add_adapter(name, r, 1.5 * r)
        for m in net.lora_layers().values():
            torch.nn.init.normal_(m.B[name], std=0.1)
    return net.to(net.x_embedder.proj.weight.dtype).requires_grad_(False)


# ------------------------------------------------------------------ the MMDiT against a second one


def second_mmdit(p, x, t, context, pooled, head_dim, patch=2):
    """The forward of method.md section 7 for ONE sample, token by token and head by head. p: state dict; x (C, H, W) -> (C, H, W)."""
    def linear(name, y):
        return y @ p[name + ".weight"].T + p[name + ".bias"]

    def silu(y):
        return y / (1 + torch.exp(-y))

    def mlp(name, y, act):
        return linear(f"{name}2", act(linear(f"{name}0", y)))

    def gelu(y):
        return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))

    def layer_norm(y):
        y = y - y.mean(-1, keepdim=True)
        return y / torch.sqrt((y ** 2).mean(-1, keepdim=True) + 1e-6)

    def rms_norm(y, name):
        return y / torch.sqrt((y ** 2).mean(-1, keepdim=True) + 1e-6) * p[name] if name in p else y

    def qkv(name, y):                                            # a list of (q, k, v), one a head
        y = linear(f"{name}.qkv", y)
        heads = []
        for n in range(D // head_dim):
            q, k, v = (y[:, j * D + n * head_dim:j * D + (n + 1) * head_dim] for j in range(3))
            heads.append((rms_norm(q, f"{name}.ln_q.weight"), rms_norm(k, f"{name}.ln_k.weight"), v))
        return heads

    def attention(heads):
        return torch.cat([torch.softmax(q @ k.T / math.sqrt(head_dim), -1) @ v for q, k, v in heads], -1)

    (C, H, W), (D, *_) = x.shape, p["x_embedder.proj.weight"].shape
    h, w, side = H // patch, W // patch, math.isqrt(p["pos_embed"].shape[1])
    image = []
    for i in range(h):
        for j in range(w):
            pixels = x[:, patch * i:patch * (i + 1), patch * j:patch * (j + 1)]
            token = (p["x_embedder.proj.weight"] * pixels).sum((1, 2, 3)) + p["x_embedder.proj.bias"]
            image.append(token + p["pos_embed"][0, ((side - h) // 2 + i) * side + (side - w) // 2 + j])
    image = torch.stack(image)
    angles = [1000 * t.item() * 10000 ** (-i / 128) for i in range(128)]
    wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=x.dtype)
    c = silu(mlp("t_embedder.mlp.", wave, silu) + mlp("y_embedder.mlp.", pooled, silu))
    text = linear("context_embedder", context)
    depth = len({k.split(".")[1] for k in p if k.startswith("joint_blocks.")})
    for i in range(depth):
        bx, bc = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        mx, mc = (linear(f"{b}.adaLN_modulation.1", c).view(-1, D) for b in (bx, bc))        # rows: shift, scale, gate, ...
        heads_c = qkv(f"{bc}.attn", layer_norm(text) * (1 + mc[1]) + mc[0])
        heads_x = qkv(f"{bx}.attn", layer_norm(image) * (1 + mx[1]) + mx[0])
        out = attention([[torch.cat(pair) for pair in zip(a, b)] for a, b in zip(heads_c, heads_x)])
        new = image + mx[2] * linear(f"{bx}.attn.proj", out[len(text):])
        if f"{bx}.attn2.qkv.weight" in p:
            new = new + mx[8] * linear(f"{bx}.attn2.proj", attention(qkv(f"{bx}.attn2", layer_norm(image) * (1 + mx[7]) + mx[6])))
        hidden = gelu(linear(f"{bx}.mlp.fc1", layer_norm(new) * (1 + mx[4]) + mx[3]))
        image = new + mx[5] * linear(f"{bx}.mlp.fc2", hidden)
        if i < depth - 1:
            text = text + mc[2] * linear(f"{bc}.attn.proj", out[:len(text)])
            hidden = gelu(linear(f"{bc}.mlp.fc1", layer_norm(text) * (1 + mc[4]) + mc[3]))
            text = text + mc[5] * linear(f"{bc}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).view(2, D)
    image = linear("final_layer.linear", layer_norm(image) * (1 + scale) + shift)
    v = torch.empty_like(x)
    for i in range(h):
        for j in range(w):
            v[:, patch * i:patch * (i + 1), patch * j:patch * (j + 1)] = image[i * w + j].view(patch, patch, C).permute(2, 0, 1)
    return v


@pytest.mark.parametrize("cfg", [TINY, dataclasses.replace(TINY, qk_norm=False), dataclasses.replace(TINY, dual=0), dataclasses.replace(TINY, depth=1, dual=1),
                                 dataclasses.replace(TINY, dual=3, width=96)], ids=["medium", "no_qk_norm", "no_dual", "one_block", "all_dual"])
def test_mmdit_equals_a_second_one_written_from_the_description(cfg):
    net, (x, t, context, pooled) = random_net(cfg), inputs(cfg)
    expected = torch.stack([second_mmdit(net.state_dict(), *sample, cfg.head_dim) for sample in zip(x, t, context, pooled)])
    assert (net(x, t, context, pooled) - expected).norm() < 1e-5 * expected.norm()


def test_mmdit_in_float32_equals_the_second_one():
    net, sample = random_net(TINY, dtype=torch.float32), inputs(TINY, dtype=torch.float32)
    expected = torch.stack([second_mmdit(net.state_dict(), *one, TINY.head_dim) for one in zip(*sample)])
    assert (net(*sample) - expected).norm() < 1e-4 * expected.norm()


def test_timestep_embedding_is_cosines_then_sines_of_1000_t():
    got = timestep_embedding(torch.tensor([0, 0.25, 1]))
    for t, row in zip([0, 0.25, 1], got.tolist()):
        angles = [1000 * t / 10000 ** (i / 128) for i in range(128)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-4)


def test_unpatchify_inverts_patchify():
    for B, C, h, w, p in [(2, 4, 3, 5, 2), (1, 3, 2, 2, 3), (3, 16, 1, 4, 1)]:
        x = torch.randn(B, C, h * p, w * p)
        tokens = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).reshape(B, h * w, -1)        # (h w) (p q c)
        assert torch.equal(unpatchify(tokens, h, w, p), x)


@pytest.mark.parametrize("side, h, w", [(8, 8, 8), (8, 2, 4), (8, 3, 6), (7, 4, 7), (7, 1, 2)])
def test_position_table_is_cropped_about_its_centre(side, h, w):
    net = MMDiT(dataclasses.replace(TINY, pos_max=side, depth=1))
    net.pos_embed = torch.arange(side * side).float().view(1, -1, 1).expand(-1, -1, TINY.width)
    rows, cols = [[(side - n) // 2 + i for i in range(n)] for n in (h, w)]
    assert net.positions(h, w)[0, :, 0].tolist() == [side * r + c for r in rows for c in cols]
    assert abs((side - 1) / 2 - (rows[0] + rows[-1]) / 2) <= 0.5 and abs((side - 1) / 2 - (cols[0] + cols[-1]) / 2) <= 0.5


def test_image_larger_than_the_position_table_is_refused():
    net = random_net(TINY)
    with pytest.raises(AssertionError, match="3 x 9 patches, but the position table holds 8 x 8"):
        net(*inputs(TINY, h=6, w=18))


def test_new_position_table_is_sincos_of_the_column_then_of_the_row():
    table, freq = sincos_table(5, 16).view(5, 5, 16), [10000 ** (-i / 4) for i in range(4)]
    waves = [[math.sin(n * f) for f in freq] + [math.cos(n * f) for f in freq] for n in range(5)]
    for row in range(5):
        for col in range(5):
            assert table[row, col].tolist() == pytest.approx(waves[col] + waves[row], abs=1e-6)


def test_zero_initialised_output_means_v_is_0_and_blocks_are_the_identity():
    net, (x, t, context, pooled) = MMDiT(TINY).init_weights(), inputs(TINY, dtype=torch.float32)
    assert (net(x, t, context, pooled) == 0).all()
    torch.nn.init.normal_(net.final_layer.linear.weight)
    v = net(x, t, context, pooled)
    assert (v != 0).any() and torch.equal(v, net(x, t, context + 1, pooled))    # gates are 0: no block lets the text through


@pytest.mark.parametrize("adapter", [None, Route(["a", "b"], torch.tensor([1, -1, 0]))], ids=["base", "route"])
def test_sample_i_gradient_ignores_sample_j(adapter):
    net, leaves = with_adapters(random_net(TINY), a=2, b=3), [a.requires_grad_() for a in inputs(TINY, B=3)]
    net(*leaves, adapter)[1].square().sum().backward()
    for leaf in leaves:                                          # x, t, context, pooled
        assert (leaf.grad[[0, 2]] == 0).all() and (leaf.grad[1] != 0).any()


# ------------------------------------------------------------------ shapes and sizes


def shapes(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def test_defaults_are_sd35_medium():
    with torch.device("meta"):
        net = MMDiT(MMDiTConfig())
    shape, last = shapes(net), "joint_blocks.23.context_block."
    assert sum(p.numel() for p in net.parameters()) == 2_243_171_520            # as published, the position table apart
    assert shape["pos_embed"] == (1, 384 * 384, 1536)
    assert shape["joint_blocks.12.x_block.attn2.qkv.weight"] == (3 * 1536, 1536)
    assert [i for i in range(24) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shape] == list(range(13))
    assert [shape[f"joint_blocks.{i}.x_block.adaLN_modulation.1.weight"][0] // 1536 for i in (0, 12, 13, 23)] == [9, 9, 6, 6]
    assert {k.removeprefix(last): v for k, v in shape.items() if k.startswith(last)} == {
        "attn.qkv.weight": (4608, 1536), "attn.qkv.bias": (4608,), "attn.ln_q.weight": (64,), "attn.ln_k.weight": (64,),
        "adaLN_modulation.1.weight": (2 * 1536, 1536), "adaLN_modulation.1.bias": (2 * 1536,)}
    for name, wanted in {"x_embedder.proj.weight": (1536, 16, 2, 2), "t_embedder.mlp.0.weight": (1536, 256), "t_embedder.mlp.2.weight": (1536, 1536),
                         "y_embedder.mlp.0.weight": (1536, 2048), "context_embedder.weight": (1536, 4096), "final_layer.linear.weight": (64, 1536),
                         "final_layer.adaLN_modulation.1.bias": (3072,), "joint_blocks.0.context_block.attn.proj.weight": (1536, 1536),
                         "joint_blocks.0.context_block.mlp.fc1.weight": (6144, 1536), "joint_blocks.0.x_block.mlp.fc2.bias": (1536,)}.items():
        assert shape[name] == wanted, name


@pytest.mark.parametrize("cfg", [TINY, PLAIN, dataclasses.replace(TINY, dual=0), dataclasses.replace(PLAIN, dual=1), dataclasses.replace(TINY, depth=1, dual=1),
                                 MMDiTConfig(), MMDiTConfig(depth=38, width=2432, pos_max=192, dual=0), MMDiTConfig(pos_max=192, dual=0, qk_norm=False)],
                         ids=["tiny", "plain", "no_dual", "no_qk_norm", "one_block", "sd35_medium", "sd35_large", "sd3_medium"])
def test_config_read_off_the_shapes_equals_the_config_that_built_it(cfg):
    with torch.device("meta"):
        assert MMDiTConfig.from_shapes(shapes(MMDiT(cfg))) == cfg


# ------------------------------------------------------------------ adapters


def test_lora_layers_are_the_papers_eight_projections_a_block():
    with torch.device("meta"):
        layers = MMDiT(MMDiTConfig()).lora_layers()
    for i in range(24):
        names = {n.split(".", 2)[2]: m.n for n, m in layers.items() if n.startswith(f"joint_blocks.{i}.")}
        eight = {"x_block.attn.qkv": 3, "x_block.attn.proj": 1, "context_block.attn.qkv": 3, "context_block.attn.proj": 1}
        if i == 23:
            del eight["context_block.attn.proj"]                 # nobody reads the last context block's output
        assert names == eight
    assert sum(m.n for m in layers.values()) == 8 * 24 - 1


def test_new_adapter_equals_the_base_and_its_a_has_std_1_over_r():
    net, sample = random_net(dataclasses.replace(TINY, width=128)).float(), inputs(TINY, dtype=torch.float32)
    net.add_adapter("new", 16, 32, trainable=True)
    assert torch.equal(net(*sample, "new"), net(*sample))
    assert torch.equal(net(*sample, Route(["new"], torch.tensor([0, -1]))), net(*sample))
    A = torch.cat([m.A["new"].flatten() for m in net.lora_layers().values()])
    assert A.std().item() * 16 == pytest.approx(1, abs=0.02)
    assert {n.rsplit(".", 2)[1] for n, p in net.named_parameters() if p.requires_grad} == {"A", "B"}


def test_adapter_equals_a_base_with_scale_B_A_added_to_its_weights():
    net, sample = with_adapters(random_net(TINY), a=2), inputs(TINY)
    dense, tensors = random_net(TINY), net.adapter("a")
    for name, layer in dense.lora_layers().items():
        layer.weight += 1.5 * torch.cat([b @ a for a, b in zip(tensors[f"{name}.A"], tensors[f"{name}.B"])])
    torch.testing.assert_close(net(*sample, "a"), dense(*sample))
    assert not torch.allclose(dense(*sample), net(*sample), rtol=0.01)


def test_route_picks_per_sample_what_the_names_give_one_by_one():
    net, (x, t, context, pooled) = with_adapters(random_net(TINY), a=2, b=5, c=1), inputs(TINY, B=6)
    for names, index in [(["a", "b", "c"], [2, 0, -1, 1, 1, 0]), (["b"], [-1, 0, 0, -1, 0, 0]), (["c", "a"], [0] * 6), (["c", "b"], [-1] * 6)]:
        got = net(x, t, context, pooled, Route(names, torch.tensor(index)))
        for i, k in enumerate(index):
            alone = net(x[i:i + 1], t[i:i + 1], context[i:i + 1], pooled[i:i + 1], None if k < 0 else names[k])
            torch.testing.assert_close(got[i:i + 1], alone)


def test_route_sends_each_samples_gradient_to_its_own_adapter():
    net, sample = with_adapters(random_net(TINY), a=2, b=3, c=2), inputs(TINY, B=3)
    adapters = {k: [m.B[k].requires_grad_() for m in net.lora_layers().values()] for k in "abc"}
    net(*sample, Route(["a", "b", "c"], torch.tensor([2, 0, -1])))[:2].square().sum().backward()
    grads = {k: sum(p.grad.abs().sum().item() for p in ps if p.grad is not None) for k, ps in adapters.items()}
    assert grads["a"] > 0 and grads["c"] > 0 and grads["b"] == 0


def test_adapter_in_float32_works_on_a_base_in_bfloat16():
    """As add_adapter says. Rounding is the only difference."""
    net, sample = random_net(TINY, dtype=torch.bfloat16), inputs(TINY, dtype=torch.float32)
    net.add_adapter("a", 2, 4)
    assert torch.equal(net(*sample, Route(["a"], torch.tensor([0, 0]))), net(*sample))
    assert torch.equal(net(*sample, "a"), net(*sample))


def test_adapter_tensors_survive_the_round_trip():
    net, other = with_adapters(random_net(TINY, dtype=torch.float32), a=3), random_net(TINY, dtype=torch.float32)
    tensors = net.adapter("a")
    assert tensors["joint_blocks.0.x_block.attn.qkv.A"].shape == (3, 3, 64) and tensors["joint_blocks.0.context_block.attn.proj.B"].shape == (1, 64, 3)
    other.add_adapter("b", 3, 4.5, tensors)
    sample = inputs(TINY, dtype=torch.float32)
    assert torch.equal(other(*sample, "b"), net(*sample, "a"))
    tensors["joint_blocks.0.x_block.attn.qkv.A"].zero_()         # copies, both ways
    assert torch.equal(other(*sample, "b"), net(*sample, "a"))


@pytest.mark.parametrize("key, change, got", [
    ("joint_blocks.1.x_block.attn.proj.B", lambda t: t.pop("joint_blocks.1.x_block.attn.proj.B"), r"is missing, this model wants \(1, 64, 3\)"),
    ("joint_blocks.9.x_block.attn.qkv.A", lambda t: t.update({"joint_blocks.9.x_block.attn.qkv.A": torch.zeros(3, 3, 64)}),
     r"is \(3, 3, 64\), this model wants no such"),
    ("joint_blocks.0.context_block.attn.qkv.A", lambda t: t.update({"joint_blocks.0.context_block.attn.qkv.A": torch.zeros(3, 4, 64)}),
     r"is \(3, 4, 64\), this model wants \(3, 3, 64\)"),
], ids=["missing", "superfluous", "misshapen"])
def test_adapter_tensor_that_does_not_fit_is_named(key, change, got):
    net = with_adapters(random_net(TINY), a=3)
    tensors = net.adapter("a")
    change(tensors)
    with pytest.raises(ValueError, match=f"adapter 'bad': tensor '{key}' {got}"):
        net.add_adapter("bad", 3, 3, tensors)
    assert "bad" not in net.lora_layers()["joint_blocks.0.x_block.attn.qkv"].A


def as_dict(net, name, r):
    return {"tensors": net.adapter(name), "r": r, "alpha": 1.5 * r}


def updates(adapter):
    """scale B A of every layer, (n, D, D)."""
    t = adapter["tensors"]
    return {k[:-2]: adapter["alpha"] / adapter["r"] * t[k[:-2] + ".B"] @ t[k] for k in t if k.endswith(".A")}


def test_merge_is_exactly_the_mean_of_the_updates_and_not_of_the_factors():
    net = with_adapters(random_net(TINY), a=2, b=2, c=4)
    parts = [as_dict(net, "a", 2), as_dict(net, "b", 2), {**as_dict(net, "c", 4), "alpha": 2}]       # one of another rank and scale
    merged = merge_adapters(parts)
    assert merged["r"] == 8
    for layer, update in updates(merged).items():
        torch.testing.assert_close(update, sum(updates(p)[layer] for p in parts) / 3)
    a, b = parts[:2]
    factors = {**a, "tensors": {k: (a["tensors"][k] + b["tensors"][k]) / 2 for k in a["tensors"]}}
    for layer, update in updates(merge_adapters([a, b])).items():
        assert (update - updates(factors)[layer]).norm() > 0.1 * update.norm()


def test_merge_of_copies_and_of_one_is_the_adapter_itself_in_the_network():
    net, sample = with_adapters(random_net(TINY), a=2), inputs(TINY)
    for K in (1, 3):
        merged = merge_adapters([as_dict(net, "a", 2)] * K)
        net.add_adapter(f"merged{K}", merged["r"], merged["alpha"], merged["tensors"])
        torch.testing.assert_close(net.double()(*sample, f"merged{K}"), net(*sample, "a"), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ VAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(ch=(8, 12, 16), n_res=1, z=4).requires_grad_(False)


@pytest.mark.parametrize("ch, n_res, z", [((8, 12, 16), 1, 4), ((8, 16), 2, 3), ((128, 256, 512, 512), 2, 16)])
def test_vae_from_shapes_round_trip(ch, n_res, z):
    with torch.device("meta"):
        vae = VAE(ch, n_res, z)
        assert shapes(VAE.from_shapes(shapes(vae))) == shapes(vae)
    assert vae.factor == 2 ** (len(ch) - 1)


def test_vae_defaults_are_sd3s():
    with torch.device("meta"):
        vae = VAE()
    shape = shapes(vae)
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683 and vae.factor == 8        # as published
    for name in ("encoder.down.0.downsample.conv.weight", "encoder.mid.attn_1.proj_out.weight", "encoder.down.1.block.0.nin_shortcut.weight",
                 "decoder.up.3.upsample.conv.bias", "decoder.up.0.block.2.conv2.weight", "decoder.mid.block_2.norm1.weight", "decoder.norm_out.bias"):
        assert name in shape, name
    assert shape["encoder.conv_out.weight"] == (32, 512, 3, 3) and not any("quant_conv" in k for k in shape)


def test_vae_decode_sliced_equals_unsliced(vae):
    z = torch.randn(5, 4, 4, 6)
    whole = vae.decode(z)
    assert whole.shape == (5, 3, 16, 24) and whole.abs().max() <= 1
    images, calls = torch.rand(5, 3, 16, 24) * 2 - 1, []
    latents = vae.encode(images)
    vae.decoder.register_forward_pre_hook(lambda m, x: calls.append(len(x[0])))
    for n in (1, 2, 5):
        vae.pixels = n * 16 * 24             # room for n images at a time, of latents as of pixels
        torch.testing.assert_close(vae.decode(z), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.encode(images), latents, rtol=1e-5, atol=1e-5)
        assert max(calls) == n and sum(calls) == 5
        calls.clear()


def test_vae_latents_are_raw_less_0_0609_times_1_5305(vae):
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, logvar = vae.encoder(images).chunk(2, dim=1)
    torch.testing.assert_close(vae.encode(images), (mean - 0.0609) * 1.5305)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    drawn = vae.encode(images, torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, (mean + (logvar / 2).exp() * eps - 0.0609) * 1.5305)
    torch.testing.assert_close(vae.decode(vae.encode(images)), vae.decoder(mean).clamp(-1, 1))       # decode undoes the scaling


def test_vae_attention_lets_every_pixel_see_every_other(vae):
    attention = vae.encoder.mid["attn_1"]
    x = torch.randn(1, 16, 3, 4)
    q, k, v = (f(attention.norm(x))[0].flatten(1) for f in (attention.q, attention.k, attention.v))       # (C, H W)
    out = v @ torch.softmax(q.T @ k / 4, -1).T                   # 4 = sqrt(16 channels)
    expected = x + F.conv2d(out.view(1, 16, 3, 4), attention.proj_out.weight, attention.proj_out.bias)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_vae_halves_with_padding_on_the_right_and_below_and_doubles_by_repeating():
    x, down, up = torch.randn(1, 1, 4, 6), Resample(1, up=False), Resample(1, up=True)
    for conv, at in [(down.conv, 2), (up.conv, 1)]:              # a kernel that copies its last / its middle pixel
        conv.load_state_dict({"weight": torch.zeros(1, 1, 3, 3).index_fill_(2, torch.tensor(at), 1).mul(torch.eye(3)[at]), "bias": torch.zeros(1)})
    assert torch.equal(down(x), F.pad(x[..., 2::2, 2::2], (0, 1, 0, 1)))
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


# ------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return TinyText(tiny.VOCAB, tiny.LENGTH, 8).requires_grad_(False)


@pytest.mark.parametrize("prompt, word", [("a photo of a dog", "dog"), ('a sign that says "HATS OFF!"', "F"), ("a red circle!", "!"), ("a café", "caf"), ("two 2", "2")])
def test_unknown_word_is_named(text, prompt, word):
    with pytest.raises(ValueError, match=rf"the tiny world has no word '{word}'; it knows a an photo"):
        text([prompt])


def test_prompt_that_is_too_long_is_refused(text):
    assert text(["a " * tiny.LENGTH])[0].shape == (1, tiny.LENGTH, 8)
    with pytest.raises(ValueError, match="has 13 tokens, the tiny text encoder takes 12"):
        text(["a " * (tiny.LENGTH + 1)])


def test_tokens_are_words_and_capital_letters(text):
    tokens = text.tokens(['a sign that says "HAT"', "a red circle", ""]).tolist()
    assert [[tiny.VOCAB[i] for i in row if i] for row in tokens] == [["a", "sign", "that", "says", '"', "H", "A", "T", '"'], ["a", "red", "circle"], []]
    assert all(len(row) == tiny.LENGTH and not any(row[row.index(0):]) for row in tokens)         # padding only at the end


def test_pooled_text_is_the_mean_over_used_tokens_and_rows_do_not_mix(text):
    prompts = ["a red circle", "", 'a sign that says "HAT"']
    context, pooled = text(prompts)
    torch.testing.assert_close(pooled[0], text.pool(context[0, :3].mean(0)))
    torch.testing.assert_close(pooled[1], text.pool.bias)
    for i, p in enumerate(prompts):
        torch.testing.assert_close(text([p])[0][0], context[i])
        torch.testing.assert_close(text([p])[1][0], pooled[i])


# ------------------------------------------------------------------ one file

META = {"world": "tiny", "resolution": "32", "vocab": json.dumps(tiny.VOCAB)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    base, vae, path = tiny.Base(tiny.Config(width=64, depth=2)), VAE(ch=(8, 12), n_res=1, z=4), tmp_path_factory.mktemp("model") / "deep" / "tiny.safetensors"
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tiny.write_model(base, vae, path)
    return base, vae, path


def test_load_gives_what_write_model_wrote(saved):
    base, vae, path = saved
    model = load(path)
    for got, wrote in [(model.mmdit, base.mmdit), (model.vae, vae), (model.text, base.text)]:
        assert shapes(got) == shapes(wrote) and not any(p.requires_grad for p in got.parameters()) and not got.training
        for k, v in wrote.state_dict().items():
            assert torch.equal(got.state_dict()[k], v.half().float()), k
    assert model.mmdit.cfg == base.mmdit.cfg and model.text.vocab == tiny.VOCAB
    assert (model.world, model.resolution, model.latent_shape()) == ("tiny", 32, (4, 16, 16))
    assert [p.name for p in path.parent.iterdir()] == ["tiny.safetensors"]                 # no temporary file is left
    z = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(model.images(z), model.vae.decode(z) / 2 + 0.5)


def test_fingerprint_is_of_the_weights_and_not_of_their_dtype(saved):
    tensors = {k.removeprefix(PREFIX["mmdit"]): v for k, v in load_file(saved[2]).items() if k.startswith(PREFIX["mmdit"])}
    assert fingerprint(tensors) == fingerprint({k: v.double() for k, v in reversed(tensors.items())}) == load(saved[2]).fingerprint
    assert fingerprint({**tensors, "final_layer.linear.bias": tensors["final_layer.linear.bias"] + 0.01}) != fingerprint(tensors)


def broken_file(saved, tmp_path, change, meta=META):
    tensors = load_file(saved[2])
    change(tensors)
    save_file(tensors, tmp_path / "broken.safetensors", meta)
    return tmp_path / "broken.safetensors"


SOME = ["model.diffusion_model.joint_blocks.1.x_block.attn.qkv.bias", "model.diffusion_model.final_layer.linear.weight", "text_encoder.pool.weight",
        "first_stage_model.decoder.up.0.block.1.conv2.bias", "model.diffusion_model.joint_blocks.1.context_block.attn.ln_k.weight"]
# These tell the architecture, and are read before check_shapes looks.
TELLING = ["model.diffusion_model.x_embedder.proj.weight", "model.diffusion_model.pos_embed", "model.diffusion_model.context_embedder.weight",
           "model.diffusion_model.y_embedder.mlp.0.weight", "first_stage_model.decoder.conv_in.weight",
           "first_stage_model.encoder.down.1.block.0.conv1.weight", "text_encoder.place"]


def own_name(name):
    return next(name.removeprefix(p) for p in PREFIX.values() if name.startswith(p))


@pytest.mark.parametrize("name", SOME + TELLING)
def test_missing_tensor_is_named(saved, tmp_path, name):
    with pytest.raises(ValueError, match=f"broken.safetensors.*{own_name(name)}"):
        load(broken_file(saved, tmp_path, lambda t: t.pop(name)))


@pytest.mark.parametrize("name", SOME)
def test_misshapen_tensor_is_named(saved, tmp_path, name):
    with pytest.raises(ValueError, match=rf"broken.safetensors: tensor '.*{own_name(name)}' is \(\d+.*, expected \(\d+"):
        load(broken_file(saved, tmp_path, lambda t: t.update({name: t[name].repeat_interleave(2, 0)})))


@pytest.mark.parametrize("name", [n for n in TELLING if "block" not in n])
def test_tensor_without_its_dimensions_is_refused(saved, tmp_path, name):
    with pytest.raises(ValueError, match="broken.safetensors"):
        load(broken_file(saved, tmp_path, lambda t: t.update({name: t[name].flatten()})))


@pytest.mark.parametrize("name", ["model.diffusion_model.joint_blocks.0.context_block.attn2.qkv.weight", "first_stage_model.post_quant_conv.weight",
                                  "text_encoder.lm_head", "model.diffusion_model.joint_blocks.1.context_block.attn.proj.weight"])
def test_extra_tensor_is_named(saved, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{own_name(name)}' is \(2,\), expected no such tensor"):
        load(broken_file(saved, tmp_path, lambda t: t.update({name: torch.zeros(2)})))


@pytest.mark.parametrize("key", ["world", "resolution", "vocab"])
def test_file_without_its_metadata_is_refused(saved, tmp_path, key):
    with pytest.raises(ValueError, match="broken.safetensors"):
        load(broken_file(saved, tmp_path, lambda t: None, {k: v for k, v in META.items() if k != key}))


@pytest.mark.parametrize("part", [0, 1e-5, 1e-3, 0.5, 0.999999])
def test_truncated_file_is_refused(saved, tmp_path, part):
    data = saved[2].read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:int(part * len(data))])
    with pytest.raises(ValueError, match="short.safetensors: expected a safetensors file"):
        load(tmp_path / "short.safetensors")


def test_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.safetensors: expected the tiny world's safetensors file, SD3.5's published folder, or"):
        load(tmp_path / "none.safetensors")
