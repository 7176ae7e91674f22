"""Facts about model.py: the MMDiT against a second one, its shapes, its adapters, its file."""
import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import (
    PREFIX,
    LoRALinear,
    MMDiT,
    MMDiTConfig,
    load_mmdit,
    sincos_table,
    timestep_embedding,
    unpatchify,
)
from plumbing.files import fingerprint, shapes_of

TINY = MMDiTConfig(depth=3, width=64, head_dim=32, channels=4, patch=2, pos_max=8, context_dim=12,
                   pooled_dim=10, dual=2)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


PLAIN = tiny(dual=0, qk_norm=False, head_dim=64, width=128)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_net(cfg, seed=0, dtype=torch.float64):
    """An MMDiT, random in EVERY weight: modulations, biases, norms, the position table."""
    g = torch.Generator().manual_seed(seed)
    net = MMDiT(cfg)
    weights = {}
    for name, weight in net.state_dict().items():
        std = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        mean = 1 if name.endswith(("ln_q.weight", "ln_k.weight")) else 0
        weights[name] = torch.randn(weight.shape, generator=g) * std + mean
    net.load_state_dict(weights)
    return net.to(dtype).requires_grad_(False)


def inputs(cfg, B=2, h=6, w=10, seed=1, dtype=torch.float64):
    """x, t, context, pooled."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(cfg.channels, h, w), (3, cfg.context_dim), (cfg.pooled_dim,)]
    x, context, pooled = (torch.randn(B, *shape, generator=g, dtype=dtype) for shape in shapes)
    return x, torch.linspace(0.02, 0.97, B, dtype=dtype), context, pooled


def with_adapters(net, **ranks):
    """Attach random adapters (A and B both random), scale 1.5."""
    for name, r in ranks.items():
        net.add_adapter(name, r, 1.5 * r)
        for layer in net.lora_layers().values():
            torch.nn.init.normal_(layer.B[name], std=0.1)
    return net.to(net.x_embedder.proj.weight.dtype).requires_grad_(False)


# ------------------------------------------------------------------ a second MMDiT


def silu(y):
    return y / (1 + torch.exp(-y))


def gelu(y):
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))


def layer_norm(y):
    y = y - y.mean(-1, keepdim=True)
    return y / torch.sqrt((y ** 2).mean(-1, keepdim=True) + 1e-6)


class SecondMMDiT:
    """The MMDiT written from its description (the SD3 paper), for ONE sample.

    It goes token by token and head by head. p: a state dict.
    """

    def __init__(self, p, head_dim, patch=2):
        self.p = p
        self.head_dim = head_dim
        self.patch = patch
        self.D = p["x_embedder.proj.weight"].shape[0]
        self.side = math.isqrt(p["pos_embed"].shape[1])
        self.depth = len({name.split(".")[1] for name in p if name.startswith("joint_blocks.")})

    def linear(self, name, y):
        return y @ self.p[name + ".weight"].T + self.p[name + ".bias"]

    def embed(self, name, y):
        hidden = silu(self.linear(f"{name}.mlp.0", y))
        return self.linear(f"{name}.mlp.2", hidden)

    def mlp(self, name, y):
        hidden = gelu(self.linear(f"{name}.fc1", y))
        return self.linear(f"{name}.fc2", hidden)

    def rms_norm(self, y, name):
        if name not in self.p:
            return y
        return y / torch.sqrt((y ** 2).mean(-1, keepdim=True) + 1e-6) * self.p[name]

    def qkv(self, name, y):
        """A list of (q, k, v), one a head."""
        y = self.linear(f"{name}.qkv", y)
        heads = []
        for start in range(0, self.D, self.head_dim):
            q = y[:, start:start + self.head_dim]
            k = y[:, self.D + start:self.D + start + self.head_dim]
            v = y[:, 2 * self.D + start:2 * self.D + start + self.head_dim]
            q = self.rms_norm(q, f"{name}.ln_q.weight")
            k = self.rms_norm(k, f"{name}.ln_k.weight")
            heads.append((q, k, v))
        return heads

    def attention(self, heads):
        out = []
        for q, k, v in heads:
            out.append(torch.softmax(q @ k.T / math.sqrt(self.head_dim), -1) @ v)
        return torch.cat(out, -1)

    def tokens(self, x):
        """x (C, H, W) -> one token a patch, with its place in the middle of the table."""
        h = x.shape[1] // self.patch
        w = x.shape[2] // self.patch
        top = (self.side - h) // 2
        left = (self.side - w) // 2
        tokens = []
        for i in range(h):
            for j in range(w):
                rows = slice(self.patch * i, self.patch * (i + 1))
                cols = slice(self.patch * j, self.patch * (j + 1))
                token = (self.p["x_embedder.proj.weight"] * x[:, rows, cols]).sum((1, 2, 3))
                token = token + self.p["x_embedder.proj.bias"]
                place = (top + i) * self.side + left + j
                tokens.append(token + self.p["pos_embed"][0, place])
        return torch.stack(tokens)

    def condition(self, t, pooled):
        angles = [1000 * t.item() * 10000 ** (-i / 128) for i in range(128)]
        wave = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        wave = torch.tensor(wave, dtype=pooled.dtype)
        return silu(self.embed("t_embedder", wave) + self.embed("y_embedder", pooled))

    def block(self, i, image, text, c):
        bx = f"joint_blocks.{i}.x_block"
        bc = f"joint_blocks.{i}.context_block"
        # Rows: shift, scale, gate, ...
        mx = self.linear(f"{bx}.adaLN_modulation.1", c).view(-1, self.D)
        mc = self.linear(f"{bc}.adaLN_modulation.1", c).view(-1, self.D)
        heads_c = self.qkv(f"{bc}.attn", layer_norm(text) * (1 + mc[1]) + mc[0])
        heads_x = self.qkv(f"{bx}.attn", layer_norm(image) * (1 + mx[1]) + mx[0])
        joint = []
        for head_c, head_x in zip(heads_c, heads_x):
            joint.append([torch.cat(pair) for pair in zip(head_c, head_x)])
        out = self.attention(joint)
        new = image + mx[2] * self.linear(f"{bx}.attn.proj", out[len(text):])
        if f"{bx}.attn2.qkv.weight" in self.p:
            heads = self.qkv(f"{bx}.attn2", layer_norm(image) * (1 + mx[7]) + mx[6])
            new = new + mx[8] * self.linear(f"{bx}.attn2.proj", self.attention(heads))
        image = new + mx[5] * self.mlp(f"{bx}.mlp", layer_norm(new) * (1 + mx[4]) + mx[3])
        if i < self.depth - 1:
            text = text + mc[2] * self.linear(f"{bc}.attn.proj", out[:len(text)])
            text = text + mc[5] * self.mlp(f"{bc}.mlp", layer_norm(text) * (1 + mc[4]) + mc[3])
        return image, text

    def __call__(self, x, t, context, pooled):
        """x (C, H, W) -> (C, H, W)."""
        image = self.tokens(x)
        c = self.condition(t, pooled)
        text = self.linear("context_embedder", context)
        for i in range(self.depth):
            image, text = self.block(i, image, text, c)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).view(2, self.D)
        image = self.linear("final_layer.linear", layer_norm(image) * (1 + scale) + shift)
        patch = self.patch
        w = x.shape[2] // patch
        v = torch.empty_like(x)
        for n, token in enumerate(image):
            i, j = divmod(n, w)
            pixels = token.view(patch, patch, -1).permute(2, 0, 1)
            v[:, patch * i:patch * (i + 1), patch * j:patch * (j + 1)] = pixels
        return v


def second(net, sample):
    """The velocities of the second MMDiT, with the weights of net, for a batch."""
    one = SecondMMDiT(net.state_dict(), net.cfg.head_dim)
    return torch.stack([one(*row) for row in zip(*sample)])


@pytest.mark.parametrize("cfg", [
    TINY, tiny(qk_norm=False), tiny(dual=0), tiny(depth=1, dual=1), tiny(dual=3, width=96),
], ids=["medium", "no_qk_norm", "no_dual", "one_block", "all_dual"])
def test_mmdit_equals_a_second_one_written_from_the_description(cfg):
    net = random_net(cfg)
    sample = inputs(cfg)
    expected = second(net, sample)
    assert (net(*sample) - expected).norm() < 1e-5 * expected.norm()


def test_mmdit_in_float32_equals_the_second_one():
    net = random_net(TINY, dtype=torch.float32)
    sample = inputs(TINY, dtype=torch.float32)
    expected = second(net, sample)
    assert (net(*sample) - expected).norm() < 1e-4 * expected.norm()


# ------------------------------------------------------------------ its parts


def test_timestep_embedding_is_cosines_then_sines_of_1000_t():
    times = [0, 0.25, 1]
    got = timestep_embedding(torch.tensor(times))
    for t, row in zip(times, got.tolist()):
        angles = [1000 * t / 10000 ** (i / 128) for i in range(128)]
        wave = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        assert row == pytest.approx(wave, abs=1e-4)


def test_unpatchify_inverts_patchify():
    for B, C, h, w, p in [(2, 4, 3, 5, 2), (1, 3, 2, 2, 3), (3, 16, 1, 4, 1)]:
        x = torch.randn(B, C, h * p, w * p)
        patches = x.unfold(2, p, p).unfold(3, p, p)              # (B, C, h, w, p, q)
        tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(B, h * w, -1)
        assert torch.equal(unpatchify(tokens, h, w, p), x)


@pytest.mark.parametrize("side, h, w", [(8, 8, 8), (8, 2, 4), (8, 3, 6), (7, 4, 7), (7, 1, 2)])
def test_position_table_is_cropped_about_its_centre(side, h, w):
    net = MMDiT(tiny(pos_max=side, depth=1))
    table = torch.arange(side * side).float().view(1, -1, 1)
    net.pos_embed = table.expand(-1, -1, TINY.width)
    rows = [(side - h) // 2 + i for i in range(h)]
    cols = [(side - w) // 2 + i for i in range(w)]
    expected = [side * row + col for row in rows for col in cols]
    assert net.positions(h, w)[0, :, 0].tolist() == expected
    centre = (side - 1) / 2
    assert abs(centre - (rows[0] + rows[-1]) / 2) <= 0.5
    assert abs(centre - (cols[0] + cols[-1]) / 2) <= 0.5


def test_image_larger_than_the_position_table_is_refused():
    net = random_net(TINY)
    message = "^latents of 3 x 9 patches: the position table holds 8 x 8; expected no more$"
    with pytest.raises(ValueError, match=message):
        net(*inputs(TINY, h=6, w=18))


def test_new_position_table_is_sincos_of_the_column_then_of_the_row():
    table = sincos_table(5, 16).view(5, 5, 16)
    freq = [10000 ** (-i / 4) for i in range(4)]
    waves = []
    for n in range(5):
        waves.append([math.sin(n * f) for f in freq] + [math.cos(n * f) for f in freq])
    for row in range(5):
        for col in range(5):
            expected = waves[col] + waves[row]
            assert table[row, col].tolist() == pytest.approx(expected, abs=1e-6)


def test_zero_initialised_output_means_v_is_0_and_blocks_are_the_identity():
    net = MMDiT(TINY).init_weights()
    x, t, context, pooled = inputs(TINY, dtype=torch.float32)
    assert (net(x, t, context, pooled) == 0).all()
    torch.nn.init.normal_(net.final_layer.linear.weight)
    v = net(x, t, context, pooled)
    assert (v != 0).any()
    # Gates are 0: no block lets the text through.
    assert torch.equal(v, net(x, t, context + 1, pooled))


@pytest.mark.parametrize("adapter", [None, "a"])
def test_sample_i_gradient_ignores_sample_j(adapter):
    net = with_adapters(random_net(TINY), a=2)
    leaves = [leaf.requires_grad_() for leaf in inputs(TINY, B=3)]
    net(*leaves, adapter)[1].square().sum().backward()
    for leaf in leaves:                                          # x, t, context, pooled
        assert (leaf.grad[[0, 2]] == 0).all() and (leaf.grad[1] != 0).any()


@pytest.mark.parametrize("adapter", [None, "a"])
def test_checkpointing_changes_neither_the_output_nor_a_gradient(adapter):
    net = with_adapters(random_net(TINY), a=2)
    results = []
    for checkpointing in (False, True):
        net.checkpointing = checkpointing
        leaves = [leaf.requires_grad_() for leaf in inputs(TINY)]
        v = net(*leaves, adapter)
        v.square().sum().backward()
        results.append([v, *(leaf.grad for leaf in leaves)])
    for plain, saving in zip(*results):
        assert torch.equal(plain, saving)


# ------------------------------------------------------------------ shapes and sizes


def shapes(module):
    return shapes_of(module.state_dict())


def test_defaults_are_sd35_medium():
    with torch.device("meta"):
        net = MMDiT(MMDiTConfig())
    shape = shapes(net)
    # As published, the position table apart.
    assert sum(p.numel() for p in net.parameters()) == 2_243_171_520
    assert shape["pos_embed"] == (1, 384 * 384, 1536)
    assert shape["joint_blocks.12.x_block.attn2.qkv.weight"] == (3 * 1536, 1536)
    attn2 = "joint_blocks.{}.x_block.attn2.qkv.weight"
    assert [i for i in range(24) if attn2.format(i) in shape] == list(range(13))
    modulation = "joint_blocks.{}.x_block.adaLN_modulation.1.weight"
    n_mods = [shape[modulation.format(i)][0] // 1536 for i in (0, 12, 13, 23)]
    assert n_mods == [9, 9, 6, 6]
    last = "joint_blocks.23.context_block."
    assert {k.removeprefix(last): v for k, v in shape.items() if k.startswith(last)} == {
        "attn.qkv.weight": (4608, 1536),
        "attn.qkv.bias": (4608,),
        "attn.ln_q.weight": (64,),
        "attn.ln_k.weight": (64,),
        "adaLN_modulation.1.weight": (2 * 1536, 1536),
        "adaLN_modulation.1.bias": (2 * 1536,),
    }


@pytest.mark.parametrize("name, expected", [
    ("x_embedder.proj.weight", (1536, 16, 2, 2)),
    ("t_embedder.mlp.0.weight", (1536, 256)),
    ("t_embedder.mlp.2.weight", (1536, 1536)),
    ("y_embedder.mlp.0.weight", (1536, 2048)),
    ("context_embedder.weight", (1536, 4096)),
    ("final_layer.linear.weight", (64, 1536)),
    ("final_layer.adaLN_modulation.1.bias", (3072,)),
    ("joint_blocks.0.context_block.attn.proj.weight", (1536, 1536)),
    ("joint_blocks.0.context_block.mlp.fc1.weight", (6144, 1536)),
    ("joint_blocks.0.x_block.mlp.fc2.bias", (1536,)),
])
def test_shape_in_sd35_medium_is(name, expected):
    with torch.device("meta"):
        assert shapes(MMDiT(MMDiTConfig()))[name] == expected


SIZES = {
    "tiny": TINY,
    "plain": PLAIN,
    "no_dual": tiny(dual=0),
    "no_qk_norm": dataclasses.replace(PLAIN, dual=1),
    "one_block": tiny(depth=1, dual=1),
    "sd35_medium": MMDiTConfig(),
    "sd35_large": MMDiTConfig(depth=38, width=2432, pos_max=192, dual=0),
    "sd3_medium": MMDiTConfig(pos_max=192, dual=0, qk_norm=False),
}


@pytest.mark.parametrize("cfg", SIZES.values(), ids=SIZES)
def test_config_read_off_the_shapes_equals_the_config_that_built_it(cfg):
    with torch.device("meta"):
        assert MMDiTConfig.from_shapes(shapes(MMDiT(cfg))) == cfg


# ------------------------------------------------------------------ adapters


def test_lora_layers_are_the_papers_eight_projections_a_block():
    with torch.device("meta"):
        layers = MMDiT(MMDiTConfig()).lora_layers()
    for i in range(24):
        block = f"joint_blocks.{i}."
        found = {k.removeprefix(block): m.n for k, m in layers.items() if k.startswith(block)}
        eight = {"x_block.attn.qkv": 3, "x_block.attn.proj": 1,
                 "context_block.attn.qkv": 3, "context_block.attn.proj": 1}
        if i == 23:
            # Nobody reads the output of the last context block.
            del eight["context_block.attn.proj"]
        assert found == eight
    assert sum(m.n for m in layers.values()) == 8 * 24 - 1


def test_new_adapter_equals_the_base_and_its_a_has_std_1_over_r():
    net = random_net(tiny(width=128)).float()
    sample = inputs(TINY, dtype=torch.float32)
    net.add_adapter("new", 16, 32, trainable=True)
    base = net(*sample)
    torch.testing.assert_close(net(*sample, "new"), base, rtol=1e-4, atol=1e-5)
    A = torch.cat([m.A["new"].flatten() for m in net.lora_layers().values()])
    assert A.std().item() * 16 == pytest.approx(1, abs=0.02)
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    assert {name.rsplit(".", 2)[1] for name in learning} == {"A", "B"}


def test_adapter_equals_a_base_with_scale_B_A_added_to_its_weights():
    net = with_adapters(random_net(TINY), a=2)
    sample = inputs(TINY)
    dense = random_net(TINY)
    tensors = net.adapter("a")
    for name, layer in dense.lora_layers().items():
        pairs = zip(tensors[f"{name}.B"], tensors[f"{name}.A"])
        layer.weight += 1.5 * torch.cat([B @ A for B, A in pairs])
    torch.testing.assert_close(net(*sample, "a"), dense(*sample))
    assert not torch.allclose(dense(*sample), net(*sample), rtol=0.01)


def test_a_merged_weight_gives_what_its_factors_give_with_the_same_gradients(monkeypatch):
    net = with_adapters(random_net(TINY), a=8)
    factors = []
    for layer in net.lora_layers().values():
        factors += [layer.A["a"].requires_grad_(), layer.B["a"].requires_grad_()]
    found = []
    for merged in (True, False):
        monkeypatch.setattr(LoRALinear, "merges", lambda self, x, a, how=merged: bool(a) and how)
        out = net(*inputs(TINY), "a")
        found.append([out, *torch.autograd.grad(out.square().sum(), factors)])
    for merged, applied in zip(*found):
        torch.testing.assert_close(merged, applied)


def test_a_weight_is_merged_in_float32_where_the_rank_is_not_small():
    net = with_adapters(random_net(TINY, dtype=torch.float32), a=TINY.width // 8, b=1)
    layer = net.joint_blocks[0].x_block.attn.qkv
    x = torch.zeros(1, 1, TINY.width)
    assert layer.merges(x, "a") and not layer.merges(x, "b")
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer.merges(x, "a")
    assert not layer.bfloat16().merges(x, "a")


def test_adapter_in_float32_works_on_a_base_in_bfloat16():
    """As add_adapter says. Rounding is the only difference."""
    net = random_net(TINY, dtype=torch.bfloat16)
    sample = inputs(TINY, dtype=torch.float32)
    net.add_adapter("a", 2, 4)
    assert torch.equal(net(*sample, "a"), net(*sample))


def test_adapter_tensors_survive_the_round_trip():
    net = with_adapters(random_net(TINY, dtype=torch.float32), a=3)
    other = random_net(TINY, dtype=torch.float32)
    tensors = net.adapter("a")
    assert tensors["joint_blocks.0.x_block.attn.qkv.A"].shape == (3, 3, 64)
    assert tensors["joint_blocks.0.context_block.attn.proj.B"].shape == (1, 64, 3)
    other.add_adapter("b", 3, 4.5, tensors)
    sample = inputs(TINY, dtype=torch.float32)
    assert torch.equal(other(*sample, "b"), net(*sample, "a"))
    tensors["joint_blocks.0.x_block.attn.qkv.A"].zero_()         # copies, both ways
    assert torch.equal(other(*sample, "b"), net(*sample, "a"))


@pytest.mark.parametrize("key, tensor, got", [
    ("joint_blocks.1.x_block.attn.proj.B", None, r"is missing, expected \(1, 64, 3\)"),
    ("joint_blocks.9.x_block.attn.qkv.A", torch.zeros(3, 3, 64),
     r"is \(3, 3, 64\), expected no such tensor"),
    ("joint_blocks.0.context_block.attn.qkv.A", torch.zeros(3, 4, 64),
     r"is \(3, 4, 64\), expected \(3, 3, 64\)"),
], ids=["missing", "superfluous", "misshapen"])
def test_adapter_tensor_that_does_not_fit_is_named(key, tensor, got):
    net = with_adapters(random_net(TINY), a=3)
    tensors = net.adapter("a")
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
    with pytest.raises(ValueError, match=f"adapter 'bad': tensor '{key}' {got}$"):
        net.add_adapter("bad", 3, 3, tensors)
    assert "bad" not in net.lora_layers()["joint_blocks.0.x_block.attn.qkv"].A


# ------------------------------------------------------------------ its file

OTHERS = {PREFIX["vae"] + "decoder.conv_in.bias": torch.zeros(3), "anything": torch.zeros(1)}


@pytest.fixture
def net():
    return random_net(TINY, dtype=torch.float32)


def write(net, path, prefix=PREFIX["mmdit"], **others):
    tensors = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    save_file({**tensors, **others}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_load_mmdit_gives_the_weights_of_the_file_in_the_dtype_asked_for(net, tmp_path, dtype):
    path = write(net.half(), tmp_path / "model.safetensors", **OTHERS)
    got = load_mmdit(path, dtype=dtype)
    assert got.cfg == TINY and not got.training
    assert not any(p.requires_grad for p in got.parameters())
    for name, weight in got.state_dict().items():
        expected = net.state_dict()[name].to(dtype or torch.float16)
        assert weight.dtype == expected.dtype and torch.equal(weight, expected), name


def test_a_file_of_the_transformer_alone_needs_no_prefix(net, tmp_path):
    path = write(net, tmp_path / "model.safetensors", prefix="")
    sample = inputs(TINY, dtype=torch.float32)
    assert torch.equal(load_mmdit(path)(*sample), net(*sample))


def test_fingerprint_is_of_the_file_and_not_of_the_dtype_it_is_loaded_in(net, tmp_path):
    weights = net.half().state_dict()
    path = write(net, tmp_path / "model.safetensors", **OTHERS)
    assert load_mmdit(path, dtype=torch.bfloat16).fingerprint == load_mmdit(path).fingerprint
    assert fingerprint(weights) == load_mmdit(path).fingerprint


@pytest.mark.parametrize("at", [0, 3, -1])
def test_one_flipped_bit_of_a_base_changes_its_fingerprint(net, tmp_path, at):
    path = write(net.half(), tmp_path / "model.safetensors")
    before = load_mmdit(path).fingerprint
    tensors = load_file(path)
    tensors[min(tensors)].view(torch.int16).flatten()[at] ^= 1
    save_file(tensors, path)
    assert load_mmdit(path).fingerprint != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_whose_numbers_are_not_finite_is_refused(net, tmp_path, value):
    path = write(net, tmp_path / "model.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].flatten()[-1] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"'{name}' is not a tensor of finite numbers$"):
        load_mmdit(path)


SOME = ["joint_blocks.1.x_block.attn.qkv.bias", "final_layer.linear.weight",
        "joint_blocks.1.context_block.attn.ln_k.weight"]
# These tell the architecture, and are read before check_shapes looks.
TELLING = ["x_embedder.proj.weight", "pos_embed", "context_embedder.weight",
           "y_embedder.mlp.0.weight"]


def broken_file(net, folder, name, change):
    """The file of net with one tensor changed, or without it."""
    path = write(net, folder / "broken.safetensors")
    tensors = load_file(path)
    old = tensors.pop(PREFIX["mmdit"] + name, None)
    new = change(old)
    if new is not None:
        tensors[PREFIX["mmdit"] + name] = new.contiguous()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", SOME + TELLING)
def test_missing_tensor_is_named(net, tmp_path, name):
    path = broken_file(net, tmp_path, name, lambda old: None)
    with pytest.raises(ValueError, match=rf"broken.safetensors[^\n]*{name}"):
        load_mmdit(path)


@pytest.mark.parametrize("name", SOME)
def test_misshapen_tensor_is_named(net, tmp_path, name):
    path = broken_file(net, tmp_path, name, lambda old: old.repeat_interleave(2, 0))
    message = rf"broken.safetensors: tensor '{PREFIX['mmdit']}{name}' is \(\d+.*, expected \(\d+"
    with pytest.raises(ValueError, match=message):
        load_mmdit(path)


@pytest.mark.parametrize("name", TELLING)
def test_tensor_without_its_dimensions_is_refused(net, tmp_path, name):
    path = broken_file(net, tmp_path, name, lambda old: old.flatten())
    with pytest.raises(ValueError, match=r"broken.safetensors: [^\n]+$"):
        load_mmdit(path)


@pytest.mark.parametrize("name", ["joint_blocks.0.context_block.attn2.qkv.weight",
                                  "joint_blocks.2.context_block.attn.proj.weight"])
def test_extra_tensor_is_named(net, tmp_path, name):
    path = broken_file(net, tmp_path, name, lambda old: torch.zeros(2))
    with pytest.raises(ValueError, match=rf"{name}' is \(2,\), expected no such tensor"):
        load_mmdit(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(OTHERS, path)
    message = rf"vae.safetensors: has no tensor '{PREFIX['mmdit']}joint_blocks[^\n]*'anything'$"
    with pytest.raises(ValueError, match=message):
        load_mmdit(path)


@pytest.mark.parametrize("part", [0, 1e-5, 1e-3, 0.5, 0.999999])
def test_truncated_file_is_refused(net, tmp_path, part):
    path = write(net, tmp_path / "short.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    with pytest.raises(ValueError, match="short.safetensors: expected a safetensors file"):
        load_mmdit(path)
