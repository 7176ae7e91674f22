"""Facts about SD3.5's side: the networks, the text stack, a whole generation and the adapters against diffusers and PEFT (`make oracles`),
on random weights in the released layouts; loading, prompt folders, and the scripts with --model DIR."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters
import eval as evaluation
import mini_sd3
import model as models
import prompts
import rewards
import sd3
import train_grpo
import train_opd
from model import MMDiT, PREFIX, VAE, load_mmdit, load_vae
from sampler import draw_noise, encode, sample, schedule, velocity

ORACLES = "needs the oracles: make oracles"


def diffusers():
    return pytest.importorskip("diffusers", reason=ORACLES)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mini_sd3.write_folder(tmp_path_factory.mktemp("sd3") / "stable-diffusion-3.5-mini")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder, here):
    return models.load(folder, size=64)


def oracle_transformer(file, cfg):
    """diffusers' transformer with a native file's weights, by diffusers' own conversion."""
    diffusers()
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
    net = SD3Transformer2DModel(sample_size=32, patch_size=cfg.patch, in_channels=cfg.channels, num_layers=cfg.depth, attention_head_dim=cfg.head_dim,
                                num_attention_heads=cfg.width // cfg.head_dim, joint_attention_dim=cfg.context_dim, caption_projection_dim=cfg.width,
                                pooled_projection_dim=cfg.pooled_dim, out_channels=cfg.channels, pos_embed_max_size=cfg.pos_max,
                                dual_attention_layers=tuple(range(cfg.dual)), qk_norm="rms_norm" if cfg.qk_norm else None)
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith(PREFIX["vae"])}
    net.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(tensors))
    return net.eval().requires_grad_(False)


def oracle_vae(file, z):
    diffusers()
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    vae = AutoencoderKL(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=(128, 128),
                        layers_per_block=1, latent_channels=z, norm_num_groups=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                        use_post_quant_conv=False)
    tensors = {k: v for k, v in load_file(file).items() if k.startswith(PREFIX["vae"])}
    vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, vae.config))
    return vae.eval().requires_grad_(False)


def inputs(cfg, h=12, w=20, B=3, L=9):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(B, cfg.channels, h, w, generator=g), torch.tensor([1.0, 0.37, 0.0089])[:B], torch.randn(B, L, cfg.context_dim, generator=g),
            torch.randn(B, cfg.pooled_dim, generator=g))


# ------------------------------------------------------------------ the networks


@pytest.mark.parametrize("cfg", [mini_sd3.MEDIUM, mini_sd3.LARGE, mini_sd3.SD3], ids=["sd3.5-medium", "sd3.5-large", "sd3-medium"])
@pytest.mark.parametrize("h, w", [(12, 20), (24, 6), (16, 16)])
def test_mmdit_equals_diffusers(tmp_path, cfg, h, w):
    mini_sd3.write_file(tmp_path / "x.safetensors", cfg)
    net, (x, t, context, pooled) = load_mmdit(tmp_path / "x.safetensors"), inputs(cfg, h, w)
    assert net.cfg == cfg
    want = oracle_transformer(tmp_path / "x.safetensors", cfg)(x, context, pooled, 1000 * t, return_dict=False)[0]
    assert relative(net(x, t, context, pooled), want) < 1e-5


def test_vae_equals_diffusers(folder):
    file = folder / "sd3.5_medium.safetensors"
    vae, oracle = load_vae(file), oracle_vae(file, 4)
    images, z = torch.rand(2, 3, 20, 36) * 2 - 1, torch.randn(2, 4, 10, 18)
    posterior = oracle.encode(images).latent_dist
    assert relative(vae.encode(images), (posterior.mean - 0.0609) * 1.5305) < 1e-5
    decoded = oracle.decode(z / 1.5305 + 0.0609).sample
    assert decoded.abs().max() > 0.3 and relative(vae.decode(z), decoded.clamp(-1, 1)) < 1e-5
    drawn = (posterior.sample(torch.Generator().manual_seed(4)) - 0.0609) * 1.5305
    assert relative(vae.encode(images, torch.Generator().manual_seed(4)), drawn) < 1e-5


def test_vae_of_the_released_shape_equals_diffusers(tmp_path):
    """84 M parameters: four levels, two resnets each, attention in the middle."""
    diffusers()
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    vae = mini_sd3.randomise(VAE())
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")                     # a file of its own, without the prefix
    oracle = AutoencoderKL(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                           block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    oracle.load_state_dict(convert_ldm_vae_checkpoint({PREFIX["vae"] + k: v for k, v in vae.state_dict().items()}, oracle.config))
    images, z = torch.rand(1, 3, 64, 40) * 2 - 1, torch.randn(1, 16, 8, 5)
    with torch.no_grad():
        assert relative(loaded.encode(images), (oracle.encode(images).latent_dist.mean - 0.0609) * 1.5305) < 1e-4
        assert relative(loaded.decode(z), oracle.decode(z / 1.5305 + 0.0609).sample.clamp(-1, 1)) < 1e-4


@pytest.mark.parametrize("n", [1, 4, 10, 28, 40])
def test_schedule_equals_diffusers(n):
    diffusers()
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    torch.testing.assert_close(schedule(n), scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * schedule(n)[:-1], scheduler.timesteps, rtol=0, atol=1e-3)


# ------------------------------------------------------------------ text, and a whole generation

PROMPTS = ["a red cat", "a photo of a red cat and a red bird " * 12, "", 'a sign that says "HAT"']       # the second is longer than 77 and than 128 tokens


def pipeline(folder, t5=True):
    diffusers()
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
    file = folder / "sd3.5_medium.safetensors"
    pipe = StableDiffusion3Pipeline(
        transformer=oracle_transformer(file, mini_sd3.MEDIUM), vae=oracle_vae(file, 4), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder"), tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"), tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(folder / "text_encoder_3") if t5 else None, tokenizer_3=AutoTokenizer.from_pretrained(folder / "tokenizer_3"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("t5", ["128", "256", "zeros"])
def test_text_equals_diffusers(folder, here, t5):
    pipe = pipeline(folder, t5 != "zeros")
    text = models.load(folder, size=64, t5=t5).text
    context, pooled = text(PROMPTS)
    with torch.no_grad():
        want, _, want_pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=256 if t5 == "zeros" else int(t5))
    assert context.shape == want.shape == (4, 77 + text.tokens, 96) and pooled.shape == (4, 80)
    assert relative(context, want) < 1e-5 and relative(pooled, want_pooled) < 1e-5
    assert (context[:, 77:].abs().max() == 0) == (t5 == "zeros")


@pytest.mark.parametrize("t5", ["128", "zeros"])
def test_whole_guided_generation_equals_diffusers(folder, here, t5):
    """Ten steps, w = 4.5, from the same noise, to the image."""
    pipe, model = pipeline(folder, t5 != "zeros"), models.load(folder, size=64, t5=t5)
    noise = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(3))
    assert model.latent_shape() == (4, 32, 32)
    want = pipe(["a red cat", "a bird"], height=64, width=64, num_inference_steps=10, guidance_scale=4.5, latents=noise, max_sequence_length=256 if t5 == "zeros" else 128,
                output_type="pt").images
    with torch.no_grad():
        got = model.images(sample(model.mmdit, noise, schedule(10), encode(model.text, ["a red cat", "a bird"]), 4.5))
    assert want.std() > 0.05 and relative(got, want) < 1e-4


def test_embeddings_are_computed_once_and_kept_on_the_disk(folder, here, monkeypatch):
    first = models.load(folder, size=64).text
    first.prepare(["a red cat"])
    context, pooled = first(["a red cat", ""])
    assert len(list(first.cache.iterdir())) == 2                          # the prompt and the empty one, no temporary file left

    def never(*args):
        raise AssertionError("encoded again")
    monkeypatch.setattr(sd3.SD3Text, "encoder", never)
    again = models.load(folder, size=64).text
    for got, want in zip(again(["a red cat", ""]), (context, pooled)):
        assert torch.equal(got, want)
    with pytest.raises(AssertionError, match="encoded again"):            # another length is another embedding
        models.load(folder, size=64, t5="256").text(["a red cat"])
    file = again.file("a red cat")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged.*delete it"):
        again(["a red cat"])


def test_ranks_together_encode_every_prompt_whoever_comes_late(folder, here):
    text, prompts = models.load(folder, size=64).text, list("abcdefghij")
    text.prepare(prompts, rank=1, world_size=2)
    assert sum(text.file(p).exists() for p in [*prompts, ""]) == 5
    text.prepare(prompts, rank=0, world_size=2)                           # lists what is missing after the other has written
    assert all(text.file(p).exists() for p in [*prompts, ""])


def test_embeddings_that_do_not_fit_the_disk_are_refused_beforehand(folder, here, monkeypatch):
    monkeypatch.setattr(sd3.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 ** 6})())
    with pytest.raises(ValueError, match="embeddings of about 3 prompts need .* are free"):
        models.load(folder, size=64).text.prepare(["a", "b"])


# ------------------------------------------------------------------ adapters


def random_adapter(net, r=3, alpha=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {f"{n}.{f}": torch.randn(m.n, *((r, m.in_features) if f == "A" else (m.in_features, r)), generator=g) / m.in_features ** 0.5
               for n, m in net.lora_layers().items() for f in "AB"}
    return {"tensors": tensors, "r": r, "alpha": alpha}


def peft_folder(path, net, rslora=False, seed=0, r=3, targets=adapters.TARGETS):
    """An adapter trained by PEFT on diffusers' transformer, as Flow-GRPO does and saves it; and that transformer."""
    peft = pytest.importorskip("peft", reason=ORACLES)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=r, lora_alpha=5, init_lora_weights="gaussian", target_modules=targets, use_rslora=rslora))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    wrapped.save_pretrained(path)
    return wrapped


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_adapter_on_and_off_equals_peft(folder, model, here, rslora):
    theirs = peft_folder(here / "teacher", oracle_transformer(folder / "sd3.5_medium.safetensors", mini_sd3.MEDIUM), rslora)
    teacher = adapters.read(here / "teacher", model.mmdit, "ocr")
    assert teacher["task"] == "ocr" and teacher["r"] == 3
    model.mmdit.add_adapter("ocr", teacher["r"], teacher["alpha"], teacher["tensors"])
    x, t, context, pooled = inputs(mini_sd3.MEDIUM)
    with torch.no_grad():
        on = theirs(x, context, pooled, 1000 * t, return_dict=False)[0]
        with theirs.disable_adapter():
            off = theirs(x, context, pooled, 1000 * t, return_dict=False)[0]
    assert relative(model.mmdit(x, t, context, pooled, "ocr"), on) < 1e-5 and relative(model.mmdit(x, t, context, pooled), off) < 1e-5
    assert relative(on, off) > 1e-2


def test_written_adapters_mean_the_same_to_peft_and_to_diffusers(folder, model, here):
    peft = pytest.importorskip("peft", reason=ORACLES)
    adapter = random_adapter(model.mmdit)
    model.mmdit.add_adapter("student", adapter["r"], adapter["alpha"], adapter["tensors"])
    x, t, context, pooled = inputs(mini_sd3.MEDIUM)
    want = model.mmdit(x, t, context, pooled, "student")
    assert relative(want, model.mmdit(x, t, context, pooled)) > 1e-2

    adapters.write_peft(here / "peft", adapter, "mini")
    theirs = peft.PeftModel.from_pretrained(oracle_transformer(folder / "sd3.5_medium.safetensors", mini_sd3.MEDIUM), here / "peft")
    assert relative(theirs(x, context, pooled, 1000 * t, return_dict=False)[0], want) < 1e-5

    adapters.write_diffusers(here / "lora.safetensors", adapter)
    pipe = pipeline(folder)
    pipe.load_lora_weights(here / "lora.safetensors")
    with torch.no_grad():
        assert relative(pipe.transformer(x, context, pooled, 1000 * t, return_dict=False)[0], want) < 1e-5


def test_adapter_comes_back_from_every_form(folder, model, here):
    adapter = random_adapter(model.mmdit, r=4, alpha=8.0)                 # alpha / r = 2: exact in floating point, wherever it is multiplied in
    adapters.write_peft(here / "peft", adapter, "mini")
    adapters.write_diffusers(here / "lora.safetensors", adapter)
    back = adapters.read(here / "peft", model.mmdit)
    assert (back["r"], back["alpha"]) == (4, 8.0) and back["tensors"].keys() == adapter["tensors"].keys()
    assert all(torch.equal(back["tensors"][k], x) for k, x in adapter["tensors"].items())
    file = adapters.read(here / "lora.safetensors", model.mmdit)
    assert all(torch.equal(file["alpha"] / file["r"] * file["tensors"][k], 2 * x) for k, x in adapter["tensors"].items() if k.endswith(".B"))
    assert all(torch.equal(file["tensors"][k], x) for k, x in adapter["tensors"].items() if k.endswith(".A"))


def test_diffusers_own_lora_file_is_read_with_its_alpha(folder, model, here):
    """As pipeline.save_lora_weights writes it, with the config in the file's metadata."""
    peft = pytest.importorskip("peft", reason=ORACLES)
    diffusers()
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    theirs = oracle_transformer(folder / "sd3.5_medium.safetensors", mini_sd3.MEDIUM)
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, target_modules=adapters.TARGETS, init_lora_weights=False))
    StableDiffusion3Pipeline.save_lora_weights(here, transformer_lora_layers=peft.get_peft_model_state_dict(theirs), **_collate_lora_metadata({"transformer": theirs}))
    got = adapters.read(here / "pytorch_lora_weights.safetensors", model.mmdit)
    assert (got["r"], got["alpha"]) == (3, 7)
    model.mmdit.add_adapter("x", got["r"], got["alpha"], got["tensors"])
    x, t, context, pooled = inputs(mini_sd3.MEDIUM)
    with torch.no_grad():
        assert relative(model.mmdit(x, t, context, pooled, "x"), theirs(x, context, pooled, 1000 * t, return_dict=False)[0]) < 1e-5


def test_merged_file_is_the_adapter_and_loads_everywhere(folder, model, here):
    adapter = random_adapter(model.mmdit)
    model.mmdit.add_adapter("student", adapter["r"], adapter["alpha"], adapter["tensors"])
    file = adapters.save_whole(here / "merged.safetensors", adapters.merged_weights(model.mmdit, adapter), model.file, task="ocr")
    assert {k: v.shape for k, v in load_file(file).items()} == {k: v.shape for k, v in load_file(model.file).items()}
    x, t, context, pooled = inputs(mini_sd3.MEDIUM)
    want = model.mmdit(x, t, context, pooled, "student")
    assert relative(load_mmdit(file)(x, t, context, pooled), want) < 1e-5
    assert relative(oracle_transformer(file, mini_sd3.MEDIUM)(x, context, pooled, 1000 * t, return_dict=False)[0], want) < 1e-5
    whole = adapters.read(file, model.mmdit)
    assert whole["task"] == "ocr" and relative(whole["net"](x, t, context, pooled), want) < 1e-5


def test_average_weights_is_the_mean_of_adapters_and_whole_transformers(model):
    a, b = random_adapter(model.mmdit, seed=1), random_adapter(model.mmdit, r=2, seed=2)
    whole = mini_sd3.randomise(MMDiT(mini_sd3.MEDIUM), 9)
    net = mini_sd3.randomise(MMDiT(mini_sd3.MEDIUM), 0)
    base = dict(net.state_dict())
    base = {k: v.clone() for k, v in base.items()}
    adapters.average_weights(net, model.mmdit, [a, b, {"net": whole}])
    for k, v in net.named_parameters():
        want = (2 * base[k] + whole.state_dict()[k]) / 3
        layer = k.removesuffix(".weight")
        if f"{layer}.A" in a["tensors"]:
            want = want + sum(ad["alpha"] / ad["r"] * torch.cat([B @ A for A, B in zip(ad["tensors"][f"{layer}.A"], ad["tensors"][f"{layer}.B"])]) for ad in (a, b)) / 3
        torch.testing.assert_close(v, want, rtol=1e-4, atol=1e-5)


def test_convert_on_the_command_line(folder, model, here):
    adapters.write_peft(here / "peft", random_adapter(model.mmdit), "mini")
    adapters.main(adapters.Config(ckpt=str(here / "peft"), to="pt", out="ocr.pt", model=str(folder), task="ocr"))
    run = [sys.executable, str(evaluation.__file__).replace("eval.py", "adapters.py"), "ocr.pt", "--model", str(folder), "--to"]
    for to, out in (("diffusers", "lora.safetensors"), ("merged", "merged.safetensors"), ("peft", "again")):
        subprocess.run([*run, to, "--out", out], check=True, capture_output=True)
    assert load_file(here / "again/adapter_model.safetensors").keys() == load_file(here / "peft/adapter_model.safetensors").keys()
    assert load_mmdit(here / "merged.safetensors").cfg == mini_sd3.MEDIUM


# ------------------------------------------------------------------ bad input, one clear line each


def change_config(here, **changes):
    config = json.loads((here / "peft/adapter_config.json").read_text())
    (here / "peft/adapter_config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"rank_pattern": {"attn.to_q": 8}}, {"alpha_pattern": {"attn.to_q": 8}}, {"bias": "all"}, {"lora_bias": True},
                                     {"modules_to_save": ["norm_out"]}, {"init_lora_weights": "pissa"}, {"fan_in_fan_out": True}, {"layer_replication": [[0, 2]]},
                                     {"something_new": 3}], ids=lambda c: next(iter(c)))
def test_peft_config_that_changes_the_maths_is_refused_by_name(model, here, changes):
    adapters.write_peft(here / "peft", random_adapter(model.mmdit), "mini")
    change_config(here, **changes)
    with pytest.raises(ValueError, match=f"adapter_config.json: {next(iter(changes))} is .*, which changes"):
        adapters.read(here / "peft", model.mmdit)


def test_lora_of_another_rank_or_other_targets_is_refused(folder, model, here):
    adapters.write_peft(here / "peft", random_adapter(model.mmdit), "mini")
    change_config(here, r=16)
    with pytest.raises(ValueError, match=r"add_q_proj.lora_A.weight' is \(3, 128\), expected \(16, 128\): an adapter of rank 16"):
        adapters.read(here / "peft", model.mmdit)
    change_config(here, r=3)
    tensors = load_file(here / "peft/adapter_model.safetensors")
    name = "base_model.model.transformer_blocks.1.attn2.to_q.lora_A.weight"
    save_file({**tensors, name: torch.zeros(3, 128)}, here / "peft/adapter_model.safetensors")
    with pytest.raises(ValueError, match="'transformer_blocks.1.attn2.to_q.lora_A.weight' is not one of the layers"):
        adapters.read(here / "peft", model.mmdit)
    save_file({k: v for k, v in tensors.items() if ".2.attn.to_k" not in k}, here / "peft/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'transformer_blocks.2.attn.to_k.lora_A.weight' is missing, expected \(3, 128\)"):
        adapters.read(here / "peft", model.mmdit)
    save_file({k: v / 0 for k, v in tensors.items()}, here / "peft/adapter_model.safetensors")
    with pytest.raises(ValueError, match="not a tensor of finite numbers"):
        adapters.read(here / "peft", model.mmdit)
    (here / "peft/adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json: expected a PEFT adapter's config"):
        adapters.read(here / "peft", model.mmdit)


def test_transformer_of_another_shape_is_no_checkpoint_of_this_base(model, here):
    mini_sd3.write_file(here / "large.safetensors", mini_sd3.LARGE)
    with pytest.raises(ValueError, match="large.safetensors: is a transformer of another shape"):
        adapters.read(here / "large.safetensors", model.mmdit)


@pytest.mark.parametrize("missing", ["tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3", "sd3.5_medium.safetensors"])
def test_missing_part_of_the_folder_is_named(folder, here, missing):
    copy = here / "copy"
    copy.mkdir()
    for part in folder.iterdir():
        if part.name != missing:
            (copy / part.name).symlink_to(part)
    with pytest.raises(ValueError, match="sd3.5_medium.safetensors" if "medium" in missing else f"has no {missing}/.*published folder"):
        models.load(copy)
    if missing.endswith("_3"):                                            # T5 may be left out
        models.load(copy, size=64, t5="zeros").text(["a red cat"])


def broken(here, change, **more):
    mini_sd3.write_file(here / "x.safetensors", **more)
    tensors = load_file(here / "x.safetensors")
    change(tensors)
    save_file(tensors, here / "x.safetensors")
    return here / "x.safetensors"


def test_native_file_with_or_without_its_prefix_is_the_same_transformer(here):
    mini_sd3.write_file(here / "with.safetensors")
    mini_sd3.write_file(here / "without.safetensors", vae=False, prefix="")
    one, two = load_mmdit(here / "with.safetensors"), load_mmdit(here / "without.safetensors")
    assert one.fingerprint == two.fingerprint and all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.diffusion_model.joint_blocks.1.x_block.attn2.ln_k.weight"), "'model.diffusion_model.joint_blocks.1.x_block.attn2.ln_k.weight' is missing"),
    (lambda t: t.update({"model.diffusion_model.x_embedder.bias": torch.zeros(3)}), r"'model.diffusion_model.x_embedder.bias' is \(3,\), expected no such tensor"),
    (lambda t: t.update({"model.diffusion_model.t_embedder.mlp.0.bias": torch.zeros(3)}), r"t_embedder.mlp.0.bias' is \(3,\), expected \(128,\)"),
    (lambda t: [t.update({k.replace("model.diffusion_model.", "transformer."): t.pop(k)}) for k in list(t)], "x.safetensors: has no tensor 'model.diffusion_model.joint_blocks"),
], ids=["missing", "extra", "misshapen", "wrong prefix"])
def test_native_file_is_loaded_strictly(here, change, message):
    with pytest.raises(ValueError, match=message):
        load_mmdit(broken(here, change, vae=False))


def test_truncated_file_and_file_without_a_vae_are_refused(here):
    mini_sd3.write_file(here / "x.safetensors", vae=False)
    with pytest.raises(ValueError, match="has no tensor 'first_stage_model.decoder"):
        load_vae(here / "x.safetensors")
    (here / "short.safetensors").write_bytes((here / "x.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="short.safetensors: expected a safetensors file"):
        load_mmdit(here / "short.safetensors")


def test_diffusers_vae_file_is_refused(here):
    diffusers()
    save_file(oracle_vae(mini_sd3.write_file(here / "x.safetensors") or here / "x.safetensors", 4).state_dict(), here / "vae.safetensors")
    with pytest.raises(ValueError, match="vae.safetensors: is not Stability's native layout of the vae"):
        load_vae(here / "vae.safetensors")


def test_dtype_of_the_file_and_of_the_memory_are_one_models(here):
    mini_sd3.write_file(here / "x.safetensors", dtype=torch.float16)
    exact, cast = load_mmdit(here / "x.safetensors", dtype=torch.float16), load_mmdit(here / "x.safetensors", dtype=torch.bfloat16)
    assert exact.fingerprint == cast.fingerprint                          # of the file, not of what it was cast to
    assert all(a.dtype == torch.float16 and b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b) for a, b in zip(exact.state_dict().values(), cast.state_dict().values()))


@pytest.mark.parametrize("how, message", [(dict(size=62), "--size 62: expected a multiple of 4, at most 96"), (dict(size=100), "at most 96"), (dict(t5="77"), "--t5 77: expected 128")])
def test_impossible_size_and_length_are_refused(folder, here, how, message):
    with pytest.raises(ValueError, match=message):
        models.load(folder, **how)


def test_tiny_world_has_no_t5_and_one_size():
    for how in (dict(size=64), dict(t5="128")):
        with pytest.raises(ValueError, match="are for SD3.5"):
            models.load("ckpt/tiny.safetensors", **how)


# ------------------------------------------------------------------ prompts


def test_prompts_made_here_keep_the_tag_mix_the_schema_and_their_hold_out():
    rng = np.random.default_rng(0)
    metas = [sd3.draw_prompt(rng, "geneval", "train") for _ in range(3400)]
    for meta in metas:
        rewards.check_geneval_meta(meta)
    share = {tag: sum(m["tag"] == tag for m in metas) / len(metas) * 17 for tag in sd3.TAGS}
    for tag, want in {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}.items():
        assert abs(share[tag] - want) < 0.5, (tag, share[tag])
    train, held = {m["prompt"] for m in metas}, {m["prompt"] for m in sd3.eval_prompts("geneval", 600)}
    assert not train & held
    assert all(rewards.ocr_target(m["prompt"]) for m in (sd3.draw_prompt(rng, "ocr", "train") for _ in range(300)))
    assert len(set(sd3.CLASSES)) == 80 and len(sd3.COLORS) == 10


def test_generated_prompts_read_as_genevals_own():
    """Lines of GenEval's evaluation_metadata.jsonl, rebuilt from their include clauses."""
    for seed in range(300):
        meta = sd3.geneval_prompt(np.random.default_rng(seed), sd3.TAGS[seed % 6])
        words, first = meta["prompt"].removeprefix("a photo of "), meta["include"][0]
        if meta["tag"] == "counting":
            assert words.startswith({2: "two ", 3: "three ", 4: "four "}[first["count"]] + first["class"]) and meta["exclude"] == [{**first, "count": first["count"] + 1}]
        elif meta["tag"] == "position":                                   # the second clause is the one that the sentence begins with
            second = meta["include"][1]
            assert words == f"{sd3.a(second['class'])} {second['position'][0]} {sd3.a(first['class'])}" and second["position"][1] == 0
        else:
            assert words == " and ".join(sd3.a(f"{c['color']} {c['class']}" if "color" in c else c["class"]) for c in meta["include"])
            assert not any("color" in c and c["class"] == "person" for c in meta["include"])


def test_prompt_folders_of_flow_grpo_and_of_geneval_are_read_as_they_are(here):
    line = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "prompt": "a photo of a dog and a cat"}
    (here / "geneval").mkdir()
    (here / "geneval/train_metadata.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "prompt": "another"}) + "\n")
    (here / "geneval/test_metadata.jsonl").write_text(json.dumps({**line, "prompt": "third"}) + "\n")
    (here / "ocr").mkdir()
    (here / "ocr/train.txt").write_text('a sign "open"\n\nanother "sign" \n')
    (here / "evaluation_metadata.jsonl").write_text(json.dumps({**line, "prompt": "benchmark"}) + "\n")

    world = prompts.world_of("sd3", ["geneval=geneval", "ocr=ocr", "mine=ocr"])
    rng = np.random.default_rng(0)
    assert {world.draw_prompt(rng, "geneval", "train")["prompt"] for _ in range(20)} == {"a photo of a dog and a cat", "another"}
    assert world.draw_prompt(rng, "geneval", "train")["task"] == "geneval" and world.draw_prompt(rng, "geneval", "train")["tag"] == "two_object"
    assert {world.draw_prompt(rng, "ocr", "train")["prompt"] for _ in range(20)} == {'a sign "open"', 'another "sign"'}
    assert [m["prompt"] for m in world.eval_prompts("geneval", 3)] == ["third"] * 3
    assert world.TASKS == (*sd3.TASKS, "mine") and world.draw_prompt(rng, "mine", "train")["task"] == "mine"
    only = prompts.world_of("sd3", ["geneval=evaluation_metadata.jsonl"])
    assert only.eval_prompts("geneval", 1)[0]["prompt"] == "benchmark" and only.draw_prompt(rng, "geneval", "train")["prompt"].startswith("a photo of")
    assert [m["prompt"] for m in world.eval_prompts("mine", 2, "train")] == ['a sign "open"', 'another "sign"']


def test_training_prompts_that_the_world_makes_are_not_those_of_the_evaluation_file():
    class World:
        TASKS, RATIO, drawn = ("t",), {}, iter("aabab")

        def draw_prompt(self, rng, task, split):
            return {"prompt": next(self.drawn)}
    world = prompts.Prompted(World(), {"t": {"eval": [{"prompt": "a"}]}})
    assert [world.draw_prompt(None, "t", "train")["prompt"] for _ in range(2)] == ["b", "b"]


@pytest.mark.parametrize("task, name, text, message", [
    ("geneval", "train_metadata.jsonl", '{"prompt": "a", "include": [{"class": "dog", "count": 1}]}\n{"prompt": "b", "include": [', "line 2: is not JSON"),
    ("geneval", "train_metadata.jsonl", '{"prompt": "a", "include": [{"class": "dog"}]}\n', "line 1: .*count None"),
    ("geneval", "test_metadata.jsonl", '{"include": [{"class": "dog", "count": 1}]}\n', 'line 1: .*expected a JSON object with a "prompt"'),
    ("geneval", "train_metadata.jsonl", '{"prompt": "a", "include": [{"class": "unicorn", "count": 1}]}\n', "line 1: .*got class 'unicorn'"),
    ("geneval", "train_metadata.jsonl", '{"prompt": "a", "include": [{"class": "dog", "count": 1, "color": "teal"}]}\n', "line 1: .*got color 'teal'"),
    ("ocr", "train.txt", 'a "good" one\n\na sign without quotes\n', "line 3: .*double quotes"), ("pickscore", "train.txt", "\n\n", "has no prompts"),
    ("pickscore", "prompts.csv", "a", "expected a folder with train_metadata.jsonl")])
def test_malformed_prompt_set_is_one_clear_line(here, task, name, text, message):
    (here / "set").mkdir()
    (here / "set" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prompts.read_folder(here / "set", task, sd3)


# ------------------------------------------------------------------ the scripts with --model DIR


def test_defaults_follow_from_the_model(folder):
    import util
    for script, want in ((train_grpo, dict(size=512, guidance=4.5, steps=10, lora_r=32, lora_alpha=64.0)), (train_opd, dict(size=512, guidance=4.5, steps=10)),
                         (evaluation, dict(size=512, guidance=4.5, steps=40))):
        theirs, tiny = (util.parse(script.Config, ["--model", m], script.PRESETS) for m in (str(folder), "ckpt/tiny.safetensors"))
        assert {k: getattr(theirs, k) for k in want} == want and tiny == script.Config()
        assert util.parse(script.Config, ["--model", str(folder), "--guidance", "2"], script.PRESETS).guidance == 2      # what is said outweighs the preset


SMALL = dict(iters=2, batch=4, group=2, steps=4, noisy=[0, 2], size=32, guidance=4.5, micro=4, updates=1, device="cpu", t5="128", dtype="float32")


@pytest.fixture
def bright(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "bright", lambda images, metas, world: images.mean((1, 2, 3)).cpu().numpy())


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_grpo_and_opd_run_on_sd3(folder, here, bright, full):
    """Teachers from both stages' own forms and a PEFT folder; checkpointing on; then pictures by all of them."""
    for task, prompt in (("geneval", []), ("ocr", [])):
        train_grpo.main(train_grpo.Config(**{**SMALL, "model": str(folder), "tasks": [task], "reward": ["bright"], "full": full and task == "ocr", "checkpointing": True}))
    model = models.load(folder, size=32)
    adapters.write_peft(here / "quality", random_adapter(model.mmdit), "mini")
    ocr = "ckpt/ocr.safetensors" if full else "ckpt/ocr.pt"
    train_opd.main(train_opd.Config(**{**SMALL, "model": str(folder), "teachers": ["ckpt/geneval.pt", ocr, "quality=quality"], "anchor": "quality", "full": full,
                                       "checkpointing": True, "dtype": "bfloat16"}))
    student = "runs/opd/student." + ("safetensors" if full else "pt")
    evaluation.main(evaluation.Config(model=str(folder), prompt=["a red cat", "a bird"], ckpts=["base", ocr, f"student={student}", "peft=quality"], size=32, steps=2,
                                      guidance=4.5, out="pictures", device="cpu"))
    assert sorted(p.name for p in (here / "pictures/student").iterdir()) == ["0000.png", "0001.png"]
    assert (here / "pictures/student/0000.png").read_bytes() != (here / "pictures/base/0000.png").read_bytes()
    rows = [json.loads(line) for line in (here / "runs/opd/log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(r["kl"]) and r["kl"] > 0 for r in rows)


def test_checkpointing_changes_memory_and_not_gradients(model):
    x, t, context, pooled = inputs(mini_sd3.MEDIUM)
    grads, runs = [], []
    for on in (False, True):
        net = mini_sd3.randomise(MMDiT(mini_sd3.MEDIUM)).requires_grad_(True)
        net.checkpointing = on
        runs.append(0)
        for block in net.joint_blocks:
            block.register_forward_pre_hook(lambda m, args: runs.__setitem__(-1, runs[-1] + 1))
        net(x, t, context, pooled).square().mean().backward()
        grads.append({k: p.grad for k, p in net.named_parameters()})
    assert runs == [4, 8]                                                 # every block again on the way back
    for k, g in grads[0].items():
        torch.testing.assert_close(grads[1][k], g, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_ratio_is_one_and_policy_is_the_base_under_autocast(folder, here, bright, monkeypatch, full):
    """The dtypes of a GPU, on the CPU: bfloat16 base, float32 adapter or float32 whole policy, bfloat16 autocast, guidance, checkpointing."""
    real = torch.autocast
    monkeypatch.setattr(train_grpo.torch, "autocast", lambda kind, dtype, enabled: real("cpu", torch.bfloat16))
    train_grpo.main(train_grpo.Config(**{**SMALL, "model": str(folder), "tasks": ["ocr"], "reward": ["bright"], "dtype": "bfloat16", "full": full, "checkpointing": True,
                                         "iters": 1}))
    row = json.loads((here / "runs/grpo-ocr/log.jsonl").read_text().splitlines()[0])
    assert row["ratio_err"] == 0 and row["kl"] == 0 and row["grad_norm"] > 0


def test_rewards_load_on_the_runs_device_before_anything_is_sampled(folder, here, monkeypatch):
    asked = []

    def load(device, dtype):
        asked.append((device.type, dtype))
        raise ValueError("no weights")
    monkeypatch.setitem(rewards.SCORERS, "pickscore", load)
    monkeypatch.setattr(rewards, "LOADED", {})
    for script in (train_grpo, evaluation):
        monkeypatch.setattr(script, "draw_noise", lambda *a: pytest.fail("sampled first"))
    with pytest.raises(ValueError, match="does not fit task 'ocr': no weights"):
        train_grpo.main(train_grpo.Config(**{**SMALL, "model": str(folder), "tasks": ["ocr"], "reward": ["pickscore"]}))
    (here / "set").mkdir()
    (here / "set/test.txt").write_text("a\n")
    with pytest.raises(ValueError, match="does not fit task 'pickscore': no weights"):
        evaluation.main(evaluation.Config(model=str(folder), tasks=["pickscore"], prompts=["pickscore=set"], per_task=12, rows=1, size=32, steps=1, also=[], device="cpu"))
    assert asked == [("cpu", torch.float32)] * 2


def test_evaluation_of_sd3_gives_a_table_of_the_tasks_and_tags_there_are(folder, here, monkeypatch):
    """With a detector that always sees one dog, and a prompt file without most tags."""
    monkeypatch.setattr(sd3, "detect", lambda images, metas: [[{"class": "dog", "score": 1.0, "box": (0, 0, 9, 9), "color": None}] for _ in metas])
    monkeypatch.setattr(sd3, "read", lambda images: ["open"] * len(images))
    line = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    (here / "evaluation_metadata.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "tag": "two_object", "include": line["include"] + [{"class": "cat", "count": 1}]}) + "\n")
    evaluation.main(evaluation.Config(model=str(folder), tasks=["geneval", "ocr"], prompts=["geneval=evaluation_metadata.jsonl"], per_task=12, rows=2, size=32, steps=1,
                                      batch=5, also=[], out="table", device="cpu", diversity=True))
    table = json.loads((here / "table.json").read_text())["table: mean, standard error, n"]["base"]
    assert (table["single_object"][0], table["two_object"][0], table["geneval"][0]) == (1.0, 0.0, 0.5) and "counting" not in table
    assert np.isfinite(table["average"][0]) and json.loads((here / "table.json").read_text())["diversity"]["base"]["geneval"][2] == 1
    with pytest.raises(ValueError, match="--tasks mine: has no score of its own"):
        (here / "set").mkdir()
        (here / "set/test.txt").write_text("a\n")
        evaluation.main(evaluation.Config(model=str(folder), tasks=["mine"], prompts=["mine=set"], size=32, device="cpu"))


def test_task_without_a_reward_or_prompts_is_refused_before_the_model_is_loaded(folder, here, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *a: pytest.fail("loaded first"))
    (here / "set").mkdir()
    (here / "set/train.txt").write_text("a\n")
    with pytest.raises(ValueError, match="mine has no reward of its own; expected --reward"):
        train_grpo.main(train_grpo.Config(**{**SMALL, "model": str(folder), "tasks": ["mine"], "prompts": ["mine=set"]}))
    with pytest.raises(ValueError, match="'pickscore' has no prompts of its own here, expected a folder"):
        train_grpo.main(train_grpo.Config(**{**SMALL, "model": str(folder), "tasks": ["pickscore"]}))


def test_whole_transformer_is_not_relabelled(folder, model, here):
    file = adapters.save_whole(here / "x.safetensors", {}, model.file, task="ocr")
    with pytest.raises(ValueError, match="is called 'geneval', but was trained on 'ocr'"):
        adapters.read(file, model.mmdit, "geneval")


def test_equal_prompt_and_seed_are_one_picture_whatever_the_batch(folder, here):
    pictures = []
    for batch in (1, 3):
        evaluation.main(evaluation.Config(model=str(folder), prompt=["a", "b", "c"], size=32, steps=2, batch=batch, out=f"by{batch}", device="cpu"))
        from PIL import Image
        pictures.append([np.asarray(Image.open(p)).astype(int) for p in sorted((here / f"by{batch}/base").iterdir())])
    for a, b in zip(*pictures):
        assert abs(a - b).max() <= 1
    assert abs(pictures[0][0] - pictures[0][1]).max() > 5


def test_t2i_compbench_finds_prompt_and_number_in_the_name(folder, here):
    """Its scorers take what is before the first "_" for the prompt and what is after the last for the number."""
    (here / "color_val.txt").write_text("a green bench and a blue bowl\na red cat\n")
    evaluation.main(evaluation.Config(model=str(folder), prompt_file="color_val.txt", each=2, layout="compbench", size=32, steps=1, batch=3, out="bench", device="cpu"))
    names = sorted(p.stem for p in (here / "bench/base/samples").iterdir())
    assert [(n.split("_")[0], int(n.split("_")[-1])) for n in names] == [("a green bench and a blue bowl", 0), ("a green bench and a blue bowl", 1), ("a red cat", 2),
                                                                         ("a red cat", 3)]
    assert (here / "bench/prompts.txt").read_text().splitlines()[1:3] == ["a green bench and a blue bowl", "a red cat"]
    with pytest.raises(ValueError, match="cannot be a file's name there"):
        evaluation.main(evaluation.Config(model=str(folder), prompt=["either/or"], layout="compbench", size=32, device="cpu"))


def test_average_is_of_scores_on_the_papers_scale():
    class World:
        TAGS, SCORE = (), {"pickscore": "pickscore", "quality": "deqa", "ocr": "ocr"}
    scores = {"pickscore": np.array([26.0, 13.0]), "quality": np.array([4.0, 5.0]), "ocr": np.array([1.0, 0.0])}
    got = evaluation.summarise(scores, {task: [{}, {}] for task in scores}, World)
    assert got["pickscore"][0] == 19.5 and got["average"][0] == pytest.approx((0.75 + 0.9 + 0.5) / 3)


def test_a_reward_that_fails_midway_stops_training_with_its_cause(folder, here, monkeypatch):
    calls = []

    def flaky(images, metas, world):
        calls.append(len(images))
        if len(calls) > 6:
            raise ValueError("judge x: got HTTP 500 (try 5 of 5)")
        return images.mean((1, 2, 3)).numpy()
    monkeypatch.setitem(rewards.REWARDS, "flaky", flaky)
    with pytest.raises(ValueError, match="got HTTP 500"):
        train_grpo.main(train_grpo.Config(**{**SMALL, "model": str(folder), "tasks": ["ocr"], "reward": ["flaky"], "iters": 99, "save_every": 1}))
    rows = (here / "runs/grpo-ocr/log.jsonl").read_text().splitlines()
    assert 0 < len(rows) < 7 and torch.load("runs/grpo-ocr/state.pt", weights_only=True)["iter"] == len(rows)      # what was done is kept
