"""Facts about the tiny world's model file: what is written is loaded, and nothing else is."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import worlds
from model import PREFIX
from plumbing.files import fingerprint, shapes_of
from worlds.tiny_base import Base, Config, write_model
from worlds.tiny_prompts import VOCAB
from worlds.vae import VAE

META = {"world": "tiny", "resolution": "32", "vocab": json.dumps(VOCAB)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    base = Base(Config(width=64, depth=2))
    vae = VAE(ch=(8, 12), n_res=1, z=4)
    path = tmp_path_factory.mktemp("model") / "deep" / "tiny.safetensors"
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.1)
    write_model(base, vae, path)
    return base, vae, path


def test_load_gives_what_write_model_wrote(saved):
    base, vae, path = saved
    model = worlds.load(path)
    nets = [model.mmdit, model.vae, model.text]
    for got, wrote in zip(nets, [base.mmdit, vae, base.text]):
        assert shapes_of(got.state_dict()) == shapes_of(wrote.state_dict())
        assert not any(p.requires_grad for p in got.parameters())
        assert not got.training
        for name, tensor in wrote.state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor.half().float()), name
    assert model.mmdit.cfg == base.mmdit.cfg
    assert model.text.vocab == VOCAB
    assert worlds.world_name(path) == worlds.open_world(path).name == "tiny"
    assert (model.resolution, model.latent_shape()) == (32, (4, 16, 16))
    assert model.file == str(path)
    # No temporary file is left.
    assert [file.name for file in path.parent.iterdir()] == ["tiny.safetensors"]
    z = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(model.images(z), model.vae.decode(z) / 2 + 0.5)


def test_fingerprint_is_of_the_tensors_in_the_file(saved):
    tensors = {}
    for name, tensor in load_file(saved[2]).items():
        if name.startswith(PREFIX["mmdit"]):
            tensors[name.removeprefix(PREFIX["mmdit"])] = tensor
    assert fingerprint(tensors) == worlds.load(saved[2]).fingerprint


def broken_file(saved, tmp_path, change, meta=META):
    tensors = load_file(saved[2])
    change(tensors)
    save_file(tensors, tmp_path / "broken.safetensors", meta)
    return tmp_path / "broken.safetensors"


SOME = [
    "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.bias",
    "model.diffusion_model.final_layer.linear.weight",
    "text_encoder.pool.weight",
    "first_stage_model.decoder.up.0.block.1.conv2.bias",
    "model.diffusion_model.joint_blocks.1.context_block.attn.ln_k.weight",
]
# These tell the architecture, and are read before check_shapes looks.
TELLING = [
    "model.diffusion_model.x_embedder.proj.weight",
    "model.diffusion_model.pos_embed",
    "model.diffusion_model.context_embedder.weight",
    "model.diffusion_model.y_embedder.mlp.0.weight",
    "first_stage_model.decoder.conv_in.weight",
    "first_stage_model.encoder.down.1.block.0.conv1.weight",
    "text_encoder.place",
]
EXTRA = [
    "model.diffusion_model.joint_blocks.0.context_block.attn2.qkv.weight",
    "first_stage_model.post_quant_conv.weight",
    "text_encoder.lm_head",
    "model.diffusion_model.joint_blocks.1.context_block.attn.proj.weight",
]


def own_name(name):
    return next(name.removeprefix(p) for p in PREFIX.values() if name.startswith(p))


@pytest.mark.parametrize("name", SOME + TELLING)
def test_missing_tensor_is_named(saved, tmp_path, name):
    path = broken_file(saved, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"broken.safetensors.*{own_name(name)}"):
        worlds.load(path)


@pytest.mark.parametrize("name", SOME)
def test_misshapen_tensor_is_named(saved, tmp_path, name):
    def change(tensors):
        tensors[name] = tensors[name].repeat_interleave(2, 0)

    message = rf"broken.safetensors: tensor '.*{own_name(name)}' is \(\d+.*, expected \(\d+"
    with pytest.raises(ValueError, match=message):
        worlds.load(broken_file(saved, tmp_path, change))


@pytest.mark.parametrize("name", [name for name in TELLING if "block" not in name])
def test_tensor_without_its_dimensions_is_refused(saved, tmp_path, name):
    def change(tensors):
        tensors[name] = tensors[name].flatten()

    with pytest.raises(ValueError, match="broken.safetensors"):
        worlds.load(broken_file(saved, tmp_path, change))


@pytest.mark.parametrize("name", EXTRA)
def test_extra_tensor_is_named(saved, tmp_path, name):
    def change(tensors):
        tensors[name] = torch.zeros(2)

    with pytest.raises(ValueError, match=rf"{own_name(name)}' is \(2,\), expected no such tensor"):
        worlds.load(broken_file(saved, tmp_path, change))


@pytest.mark.parametrize("key", ["world", "resolution", "vocab"])
def test_file_without_its_metadata_is_refused(saved, tmp_path, key):
    meta = {name: value for name, value in META.items() if name != key}
    with pytest.raises(ValueError, match="broken.safetensors"):
        worlds.load(broken_file(saved, tmp_path, lambda tensors: None, meta))


def test_file_of_an_unknown_world_is_refused(saved, tmp_path):
    path = broken_file(saved, tmp_path, lambda tensors: None, {**META, "world": "flat"})
    with pytest.raises(ValueError, match="broken.safetensors: world 'flat': expected one of"):
        worlds.load(path)


@pytest.mark.parametrize("part", [0, 1e-5, 1e-3, 0.5, 0.999999])
def test_truncated_file_is_refused(saved, tmp_path, part):
    data = saved[2].read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:int(part * len(data))])
    with pytest.raises(ValueError, match="short.safetensors: expected a safetensors file"):
        worlds.load(tmp_path / "short.safetensors")


def test_path_without_a_file_is_refused(tmp_path):
    message = (r"none.safetensors: no such file or folder; expected a safetensors file \(the tiny "
               r"world's or SD3.5's\), SD3.5's published folder, or its name")
    with pytest.raises(ValueError, match=message):
        worlds.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("how", [dict(size=64), dict(t5="128"), dict(text_encoders="clip")])
def test_tiny_world_has_no_t5_one_size_and_its_own_text_encoder(saved, how):
    with pytest.raises(ValueError, match="are for SD3.5"):
        worlds.load(saved[2], **how)
