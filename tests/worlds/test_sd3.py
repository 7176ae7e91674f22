"""Facts about SD3.5's side: networks, text and a whole generation against diffusers (`make
oracles`), on random weights in the released layouts; and what is loaded, from where, or refused."""
import dataclasses
import shutil

import mini_sd3
import pytest
import torch
from mini_sd3 import MEDIUM
from safetensors.torch import load_file, save_file

import worlds
from model import PREFIX, load_mmdit
from sampler import Policy, encode, sample, schedule
from worlds import sd3
from worlds.paths import find
from worlds.vae import VAE, load_vae

FILE = "sd3.5_medium.safetensors"


def diffusers():
    return pytest.importorskip("diffusers", reason="needs the oracles: make oracles")


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mini_sd3.write_folder(tmp_path_factory.mktemp("sd3") / "stable-diffusion-3.5-mini")


def oracle_transformer(file, cfg):
    """diffusers' transformer with a native file's weights, by diffusers' own conversion."""
    diffusers()
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
    net = SD3Transformer2DModel(
        sample_size=32, patch_size=cfg.patch, in_channels=cfg.channels, num_layers=cfg.depth,
        attention_head_dim=cfg.head_dim, num_attention_heads=cfg.width // cfg.head_dim,
        joint_attention_dim=cfg.context_dim, caption_projection_dim=cfg.width,
        pooled_projection_dim=cfg.pooled_dim, out_channels=cfg.channels,
        pos_embed_max_size=cfg.pos_max, dual_attention_layers=tuple(range(cfg.dual)),
        qk_norm="rms_norm" if cfg.qk_norm else None)
    tensors = load_file(file)
    tensors = {name: x for name, x in tensors.items() if not name.startswith(PREFIX["vae"])}
    net.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(tensors))
    return net.eval().requires_grad_(False)


def oracle_vae(tensors, widths, n_res, z):
    """diffusers' VAE with native tensors, by diffusers' own conversion."""
    diffusers()
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths), block_out_channels=widths,
        layers_per_block=n_res, latent_channels=z, norm_num_groups=32, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, vae.config))
    return vae.eval().requires_grad_(False)


def mini_oracle_vae(file):
    tensors = load_file(file)
    tensors = {name: x for name, x in tensors.items() if name.startswith(PREFIX["vae"])}
    return oracle_vae(tensors, (128, 128), n_res=1, z=4)


def inputs(cfg, h, w):
    """x, t, context and pooled of three samples."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, cfg.channels, h, w, generator=g)
    t = torch.tensor([1.0, 0.37, 0.0089])
    context = torch.randn(3, 9, cfg.context_dim, generator=g)
    return x, t, context, torch.randn(3, cfg.pooled_dim, generator=g)


# ------------------------------------------------------------------ the networks


@pytest.mark.parametrize("cfg", [MEDIUM, mini_sd3.LARGE, mini_sd3.SD3],
                         ids=["sd3.5-medium", "sd3.5-large", "sd3-medium"])
@pytest.mark.parametrize("h, w", [(12, 20), (24, 6), (16, 16)])
def test_mmdit_equals_diffusers(tmp_path, cfg, h, w):
    file = tmp_path / "x.safetensors"
    mini_sd3.write_file(file, cfg)
    net = load_mmdit(file)
    assert net.cfg == cfg
    x, t, context, pooled = inputs(cfg, h, w)
    oracle = oracle_transformer(file, cfg)
    want = oracle(x, context, pooled, 1000 * t, return_dict=False)[0]
    assert relative(net(x, t, context, pooled), want) < 1e-5


def test_vae_equals_diffusers(folder):
    vae = load_vae(folder / FILE)
    oracle = mini_oracle_vae(folder / FILE)
    images = torch.rand(2, 3, 20, 36) * 2 - 1
    posterior = oracle.encode(images).latent_dist
    assert relative(vae.encode(images), (posterior.mean - 0.0609) * 1.5305) < 1e-5
    drawn = (posterior.sample(torch.Generator().manual_seed(4)) - 0.0609) * 1.5305
    assert relative(vae.encode(images, torch.Generator().manual_seed(4)), drawn) < 1e-5
    z = torch.randn(2, 4, 10, 18)
    decoded = oracle.decode(z / 1.5305 + 0.0609).sample
    assert decoded.abs().max() > 0.3
    assert relative(vae.decode(z), decoded.clamp(-1, 1)) < 1e-5


def test_vae_of_the_released_shape_equals_diffusers(tmp_path):
    """84 M parameters: four levels, two resnets each, attention in the middle."""
    vae = mini_sd3.randomise(VAE())
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")      # a file of its own, without the prefix
    tensors = {PREFIX["vae"] + name: x for name, x in vae.state_dict().items()}
    oracle = oracle_vae(tensors, (128, 256, 512, 512), n_res=2, z=16)
    images = torch.rand(1, 3, 64, 40) * 2 - 1
    mean = oracle.encode(images).latent_dist.mean
    assert relative(loaded.encode(images), (mean - 0.0609) * 1.5305) < 1e-4
    z = torch.randn(1, 16, 8, 5)
    decoded = oracle.decode(z / 1.5305 + 0.0609).sample.clamp(-1, 1)
    assert relative(loaded.decode(z), decoded) < 1e-4


@pytest.mark.parametrize("n", [1, 4, 10, 28, 40])
def test_schedule_equals_diffusers(n):
    diffusers()
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    times = schedule(n)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * times[:-1], scheduler.timesteps, rtol=0, atol=1e-3)


# ------------------------------------------------------------------ text, and a whole generation

# The second is longer than 77 and than 128 tokens.
PROMPTS = ["a red cat", "a photo of a red cat and a red bird " * 12, "", 'a sign that says "HAT"']


def pipeline(folder, t5):
    """diffusers' whole pipeline on the folder's weights; without T5 for "zeros"."""
    diffusers()
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
    parts = {
        "transformer": oracle_transformer(folder / FILE, MEDIUM),
        "vae": mini_oracle_vae(folder / FILE),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder_3": None,
    }
    for part in ("", "_2", "_3"):
        parts[f"tokenizer{part}"] = AutoTokenizer.from_pretrained(folder / f"tokenizer{part}")
    for part in ("text_encoder", "text_encoder_2"):
        parts[part] = CLIPTextModelWithProjection.from_pretrained(folder / part)
    if t5 != "zeros":
        parts["text_encoder_3"] = T5EncoderModel.from_pretrained(folder / "text_encoder_3")
    pipe = StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("t5", ["128", "256", "zeros"])
def test_text_equals_diffusers(folder, here, t5):
    text = worlds.load(folder, size=64, t5=t5).text
    context, pooled = text(PROMPTS)
    assert text.tokens == (128 if t5 == "128" else 256)
    with torch.no_grad():
        want, _, want_pooled, _ = pipeline(folder, t5).encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=text.tokens)
    assert context.shape == want.shape == (4, 77 + text.tokens, 96)
    assert pooled.shape == (4, 80)
    assert relative(context, want) < 1e-5
    assert relative(pooled, want_pooled) < 1e-5
    assert (context[:, 77:].abs().max() == 0) == (t5 == "zeros")


@pytest.mark.parametrize("t5", ["128", "zeros"])
def test_whole_guided_generation_equals_diffusers(folder, here, t5):
    """Ten steps, w = 4.5, from the same noise, to the image."""
    pipe = pipeline(folder, t5)
    model = worlds.load(folder, size=64, t5=t5)
    assert model.latent_shape() == (4, 32, 32)
    prompts = ["a red cat", "a bird"]
    noise = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(3))
    want = pipe(prompts, height=64, width=64, num_inference_steps=10, guidance_scale=4.5,
                latents=noise, max_sequence_length=model.text.tokens, output_type="pt").images
    policy = Policy(model.mmdit, guidance=4.5)
    with torch.no_grad():
        latents = sample(policy, noise, encode(model.text, prompts), schedule(10))
    assert want.std() > 0.05
    assert relative(model.images(latents), want) < 1e-4


def test_embeddings_are_computed_once_and_kept_on_the_disk(folder, here, monkeypatch):
    first = worlds.load(folder, size=64).text
    first.prepare(["a red cat"])
    want = first(["a red cat", ""])
    # The prompt and the empty one, no temporary file left.
    assert len(list(first.cache.iterdir())) == 2

    def never(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(sd3.SD3Text, "encoder", never)
    again = worlds.load(folder, size=64).text
    got = again(["a red cat", ""])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    with pytest.raises(AssertionError, match="encoded again"):   # another length is another one
        worlds.load(folder, size=64, t5="256").text(["a red cat"])
    file = again.file("a red cat")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged.*delete it"):
        again(["a red cat"])


def test_ranks_together_encode_every_prompt_whoever_comes_late(folder, here):
    text = worlds.load(folder, size=64).text
    prompts = list("abcdefghij")
    every = [*prompts, ""]
    text.prepare(prompts, rank=1, world_size=2)
    assert sum(text.file(prompt).exists() for prompt in every) == 5
    # This one lists what is missing after the other has written.
    text.prepare(prompts, rank=0, world_size=2)
    assert all(text.file(prompt).exists() for prompt in every)


def test_embeddings_that_do_not_fit_the_disk_are_refused_beforehand(folder, here, monkeypatch):
    class Usage:
        free = 10 ** 6

    monkeypatch.setattr(sd3.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match="embeddings of about 3 prompts need .* are free"):
        worlds.load(folder, size=64).text.prepare(["a", "b"])


# ------------------------------------------------------------------ --model: a file or a folder


def same_model(one, two):
    """Do two models make the same of a prompt?"""
    prompts = ["a red cat", ""]
    for a, b in zip(one.text(prompts), two.text(prompts)):
        assert torch.equal(a, b)
    assert one.fingerprint == two.fingerprint
    assert one.vae.fingerprint == two.vae.fingerprint
    assert one.text.cache == two.text.cache
    return True


def test_file_with_the_text_encoders_beside_it_is_the_folders_model(folder, here):
    assert worlds.world_name(folder / FILE) == worlds.world_name(folder) == "sd3"
    by_file = worlds.load(folder / FILE, size=64)
    by_folder = worlds.load(folder, size=64)
    assert same_model(by_file, by_folder)
    assert by_file.file == by_folder.file == str(folder / FILE)
    assert find(folder) == find(folder / FILE) == folder / FILE


@pytest.mark.parametrize("name", ["sd3.5_medium.safetensors", "my finetune.safetensors"])
def test_file_elsewhere_takes_the_text_encoders_of_the_named_folder(folder, here, name):
    (here / "models").mkdir()
    file = here / "models" / name
    shutil.copy(folder / FILE, file)
    message = f"{name}: for its text, {here / 'models'} has no tokenizer/.*--text-encoders"
    with pytest.raises(ValueError, match=message):
        worlds.load(file, size=64)
    got = worlds.load(file, size=64, text_encoders=str(folder))
    assert same_model(got, worlds.load(folder, size=64))
    assert got.file == str(file)


def test_named_text_encoders_outweigh_those_in_the_folder(folder, here):
    other = mini_sd3.write_folder(here / "other", seed=1)

    def context(path, **how):
        return worlds.load(path, size=64, **how).text(["a red cat"])[0]

    got = context(folder, text_encoders=str(other))
    assert torch.equal(got, context(other))
    assert not torch.equal(got, context(folder))


def test_transformer_and_vae_of_one_file_without_metadata_are_sd3s(here):
    mini_sd3.write_file(here / "x.safetensors")
    assert isinstance(worlds.open_world(here / "x.safetensors"), sd3.SD3)


@pytest.mark.parametrize("name", ["none.safetensors", "no/such/folder", "/no/such.safetensors",
                                  "none"])
def test_path_that_does_not_exist_is_refused_by_load_and_not_before(here, name):
    assert worlds.world_name(name) == "sd3"              # so that --help works
    assert worlds.presets({"sd3": {"steps": 10}})(name) == {"steps": 10}
    with pytest.raises(ValueError, match=f"--model {name}: no such file or folder; expected a "):
        worlds.load(name)


def test_file_that_is_not_in_the_native_layout_is_refused(here):
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(3)}, here / "d.safetensors")
    with pytest.raises(ValueError, match="d.safetensors: has no tensor 'model.diffusion_model.join"
                                         ".*expected Stability's native layout; it has 'transf"):
        worlds.load(here / "d.safetensors", text_encoders=str(here))
    mini_sd3.write_file(here / "x.safetensors", vae=False)
    with pytest.raises(ValueError, match="x.safetensors: has no tensor 'first_stage_model.decoder"):
        worlds.load(here / "x.safetensors")
    (here / "model.ckpt").write_bytes(b"PK" * 100)
    with pytest.raises(ValueError, match="model.ckpt: expected a safetensors file"):
        worlds.load(here / "model.ckpt")


def test_hub_is_asked_for_the_text_encoders_only_if_they_are_not_elsewhere(folder, monkeypatch):
    import huggingface_hub
    asked = []

    def snapshot_download(name, allow_patterns, **others):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find("stabilityai/sd3") == folder / FILE
    assert find("stabilityai/sd3", text_encoders=False) == folder / FILE
    everything = ["sd3*.safetensors", "text_encoder*/*", "tokenizer*/*"]
    assert asked == [("stabilityai/sd3", everything), ("stabilityai/sd3", everything[:1])]


# ------------------------------------------------------------------ bad input, one clear line each

PARTS = ["tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2",
         "text_encoder_3", FILE]


@pytest.mark.parametrize("missing", PARTS)
def test_missing_part_of_the_folder_is_named(folder, here, missing):
    copy = here / "copy"
    copy.mkdir()
    for part in folder.iterdir():
        if part.name != missing:
            (copy / part.name).symlink_to(part)
    message = FILE if missing == FILE else f"has no {missing}/.*published folder"
    with pytest.raises(ValueError, match=message):
        worlds.load(copy)
    if missing.endswith("_3"):                           # T5 may be left out
        worlds.load(copy, size=64, t5="zeros").text(["a red cat"])


def test_text_encoders_of_another_width_are_refused(folder, here):
    wide = dataclasses.replace(MEDIUM, context_dim=64)
    mini_sd3.write_file(here / "x.safetensors", wide)
    with pytest.raises(ValueError, match="text encoders give context 96 and pooled 80, the "
                                         "transformer wants 64 and 80"):
        worlds.load(here / "x.safetensors", size=64, text_encoders=str(folder))


def broken(here, change):
    mini_sd3.write_file(here / "x.safetensors", vae=False)
    tensors = load_file(here / "x.safetensors")
    change(tensors)
    save_file(tensors, here / "x.safetensors")
    return here / "x.safetensors"


def test_native_file_with_or_without_its_prefix_is_the_same_transformer(here):
    mini_sd3.write_file(here / "with.safetensors")
    mini_sd3.write_file(here / "without.safetensors", vae=False, prefix="")
    one = load_mmdit(here / "with.safetensors")
    two = load_mmdit(here / "without.safetensors")
    assert one.fingerprint == two.fingerprint
    other = two.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in one.state_dict().items())


def drop(tensors):
    del tensors[PREFIX["mmdit"] + "joint_blocks.1.x_block.attn2.ln_k.weight"]


def add(tensors):
    tensors[PREFIX["mmdit"] + "x_embedder.bias"] = torch.zeros(3)


def misshape(tensors):
    tensors[PREFIX["mmdit"] + "t_embedder.mlp.0.bias"] = torch.zeros(3)


def rename(tensors):
    for name in list(tensors):
        tensors[name.replace(PREFIX["mmdit"], "transformer.")] = tensors.pop(name)


@pytest.mark.parametrize("change, message", [
    (drop, "'model.diffusion_model.joint_blocks.1.x_block.attn2.ln_k.weight' is missing"),
    (add, r"'model.diffusion_model.x_embedder.bias' is \(3,\), expected no such tensor"),
    (misshape, r"t_embedder.mlp.0.bias' is \(3,\), expected \(128,\)"),
    (rename, "x.safetensors: has no tensor 'model.diffusion_model.joint_blocks"),
], ids=["missing", "extra", "misshapen", "wrong prefix"])
def test_native_file_is_loaded_strictly(here, change, message):
    with pytest.raises(ValueError, match=message):
        load_mmdit(broken(here, change))


def test_truncated_file_and_file_without_a_vae_are_refused(here):
    mini_sd3.write_file(here / "x.safetensors", vae=False)
    with pytest.raises(ValueError, match="has no tensor 'first_stage_model.decoder"):
        load_vae(here / "x.safetensors")
    (here / "short.safetensors").write_bytes((here / "x.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="short.safetensors: expected a safetensors file"):
        load_mmdit(here / "short.safetensors")


def test_diffusers_vae_file_is_refused(folder, here):
    oracle = mini_oracle_vae(folder / FILE)
    save_file(oracle.state_dict(), here / "vae.safetensors")
    with pytest.raises(ValueError,
                       match="vae.safetensors: is not Stability's native layout of the vae"):
        load_vae(here / "vae.safetensors")


def test_dtype_of_the_file_and_of_the_memory_are_one_models(here):
    mini_sd3.write_file(here / "x.safetensors", dtype=torch.float16)
    exact = load_mmdit(here / "x.safetensors", dtype=torch.float16)
    cast = load_mmdit(here / "x.safetensors", dtype=torch.bfloat16)
    assert exact.fingerprint == cast.fingerprint         # of the file, not of what it was cast to
    other = cast.state_dict()
    for name, x in exact.state_dict().items():
        assert x.dtype == torch.float16
        assert other[name].dtype == torch.bfloat16
        assert torch.equal(x.bfloat16(), other[name])


@pytest.mark.parametrize("how, message", [
    (dict(size=62), "--size 62: expected a multiple of 4, at most 96"),
    (dict(size=100), "at most 96"), (dict(t5="77"), "--t5 77: expected 128")])
def test_impossible_size_and_length_are_refused(folder, here, how, message):
    with pytest.raises(ValueError, match=message):
        worlds.load(folder, **how)


def test_vae_is_float32_whatever_the_dtype(folder, here):
    model = worlds.load(folder, dtype=torch.bfloat16, size=64)
    assert model.mmdit.pos_embed.dtype == torch.bfloat16
    assert model.vae.decoder.conv_in.weight.dtype == torch.float32
    assert model.images(torch.zeros(1, *model.latent_shape()).bfloat16()).dtype == torch.float32


def test_detector_and_reader_are_the_scorers_on_the_images_device(monkeypatch):
    asked = []

    def get(where, device):
        asked.append((where, device))
        return lambda *args: args

    monkeypatch.setattr(sd3.scorers, "get", get)
    images = torch.zeros(2, 3, 8, 8)
    metas = [{}, {}]
    world = sd3.SD3()
    assert world.detect(images, metas) == (images, metas)
    assert world.read(images) == (images,)
    assert asked == [("geneval.Detector", images.device), ("ocr.Reader", images.device)]
    with pytest.raises(ValueError, match="reward quality: the world 'sd3' has none of its own"):
        world.quality(images)
    with pytest.raises(ValueError, match="reward preference: the world 'sd3' has none of its own"):
        world.preference(images, [])
