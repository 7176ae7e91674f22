"""Facts about checkpoints/formats.py, on random weights in the released layouts.

What is written means the same to PEFT and to diffusers (`make oracles` installs them), every form
comes back, and what does not fit is refused.
"""
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import mini_sd3
import pytest
import torch
from mini_sd3 import MEDIUM
from safetensors.torch import load_file, save_file
from tiny_runs import BASE, distance, make_teacher

import checkpoints.__main__ as convert
import worlds
from checkpoints import formats
from checkpoints.cold_start import (
    cold_start,
    cold_start_whole,
    merge_adapters,
    merge_whole,
)
from model import PREFIX, MMDiT, load_mmdit
from plumbing import cli
from plumbing.files import read_pt

ROOT = Path(__file__).parents[2]
ORACLES = "needs the oracles: make oracles"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As much of SD3.5's published folder as checkpoints need."""
    folder = tmp_path_factory.mktemp("sd3") / "stable-diffusion-3.5-mini"
    folder.mkdir()
    mini_sd3.write_file(folder / "sd3.5_medium.safetensors")
    return folder


@pytest.fixture(scope="module")
def file(folder):
    return folder / "sd3.5_medium.safetensors"


@pytest.fixture
def net(file):
    return load_mmdit(file)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, MEDIUM.channels, 12, 20, generator=g)
    context = torch.randn(3, 9, MEDIUM.context_dim, generator=g)
    pooled = torch.randn(3, MEDIUM.pooled_dim, generator=g)
    return x, torch.tensor([1.0, 0.37, 0.0089]), context, pooled


def random_adapter(net, r=3, alpha=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in net.lora_layers().items():
        D = layer.in_features
        tensors[f"{name}.A"] = torch.randn(layer.n, r, D, generator=g) / D ** 0.5
        tensors[f"{name}.B"] = torch.randn(layer.n, D, r, generator=g) / D ** 0.5
    return {"tensors": tensors, "r": r, "alpha": alpha}


def add(net, name, adapter):
    net.add_adapter(name, adapter["r"], adapter["alpha"], adapter["tensors"])


# ------------------------------------------------------------------ the oracles


def libraries():
    """diffusers and PEFT, or the test is skipped."""
    return [pytest.importorskip(name, reason=ORACLES) for name in ("diffusers", "peft")]


def oracle_transformer(file):
    """A transformer of diffusers with a native file's weights, by diffusers' own conversion."""
    libraries()
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders import single_file_utils
    net = SD3Transformer2DModel(
        sample_size=32,
        patch_size=MEDIUM.patch,
        in_channels=MEDIUM.channels,
        num_layers=MEDIUM.depth,
        attention_head_dim=MEDIUM.head_dim,
        num_attention_heads=MEDIUM.width // MEDIUM.head_dim,
        joint_attention_dim=MEDIUM.context_dim,
        caption_projection_dim=MEDIUM.width,
        pooled_projection_dim=MEDIUM.pooled_dim,
        out_channels=MEDIUM.channels,
        pos_embed_max_size=MEDIUM.pos_max,
        dual_attention_layers=tuple(range(MEDIUM.dual)),
        qk_norm="rms_norm")
    tensors = load_file(file)
    tensors = {name: x for name, x in tensors.items() if not name.startswith(PREFIX["vae"])}
    net.load_state_dict(
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(tensors))
    return net.eval().requires_grad_(False)


def run_oracle(net, x, t, context, pooled):
    with torch.no_grad():
        return net(x, context, pooled, 1000 * t, return_dict=False)[0]


def peft_folder(path, net, rslora):
    """An adapter by PEFT on a transformer of diffusers, as Flow-GRPO trains and saves it.

    Returns that transformer.
    """
    _, peft = libraries()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="gaussian",
                             target_modules=formats.TARGETS, use_rslora=rslora)
    wrapped = peft.get_peft_model(net, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    wrapped.save_pretrained(path)
    return wrapped


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_adapter_on_and_off_equals_peft(file, net, here, rslora):
    theirs = peft_folder(here / "teacher", oracle_transformer(file), rslora)
    teacher = formats.read(here / "teacher", net, "ocr")
    assert teacher["task"] == "ocr" and teacher["r"] == 3
    add(net, "ocr", teacher)
    sample = inputs()
    on = run_oracle(theirs, *sample)
    with theirs.disable_adapter():
        off = run_oracle(theirs, *sample)
    assert relative(net(*sample, "ocr"), on) < 1e-5
    assert relative(net(*sample), off) < 1e-5
    assert relative(on, off) > 1e-2


def test_written_adapters_mean_the_same_to_peft_and_to_diffusers(file, net, here):
    diffusers, peft = libraries()
    adapter = random_adapter(net)
    add(net, "student", adapter)
    sample = inputs()
    want = net(*sample, "student")
    assert relative(want, net(*sample)) > 1e-2

    formats.write_peft(here / "peft", adapter, "mini")
    theirs = peft.PeftModel.from_pretrained(oracle_transformer(file), here / "peft")
    assert relative(run_oracle(theirs, *sample), want) < 1e-5

    formats.write_diffusers(here / "lora.safetensors", adapter)
    others = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
                            "text_encoder_3", "tokenizer_3"])
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=oracle_transformer(file),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **others)
    pipe.load_lora_weights(here / "lora.safetensors")
    assert relative(run_oracle(pipe.transformer, *sample), want) < 1e-5


def test_diffusers_own_lora_file_is_read_with_its_alpha(file, net, here):
    """As pipeline.save_lora_weights writes it, with the config in the file's metadata."""
    diffusers, peft = libraries()
    from diffusers.training_utils import _collate_lora_metadata
    theirs = oracle_transformer(file)
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, target_modules=formats.TARGETS,
                                       init_lora_weights=False))
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        here, transformer_lora_layers=peft.get_peft_model_state_dict(theirs),
        **_collate_lora_metadata({"transformer": theirs}))
    got = formats.read(here / "pytorch_lora_weights.safetensors", net)
    assert (got["r"], got["alpha"]) == (3, 7)
    add(net, "x", got)
    sample = inputs()
    assert relative(net(*sample, "x"), run_oracle(theirs, *sample)) < 1e-5


def test_merged_file_is_the_adapter_and_loads_everywhere(file, net, here):
    adapter = random_adapter(net)
    add(net, "student", adapter)
    changed = formats.merged_weights(net, adapter)
    merged = formats.save_whole(here / "merged.safetensors", changed, file, task="ocr")
    shapes = {name: x.shape for name, x in load_file(file).items()}
    assert {name: x.shape for name, x in load_file(merged).items()} == shapes
    sample = inputs()
    want = net(*sample, "student")
    assert relative(load_mmdit(merged)(*sample), want) < 1e-5
    whole = formats.read(merged, net)
    assert whole["task"] == "ocr"
    assert relative(whole["net"](*sample), want) < 1e-5
    assert relative(run_oracle(oracle_transformer(merged), *sample), want) < 1e-5


# ------------------------------------------------------------------ there and back


def test_adapter_comes_back_from_every_form(net, here):
    # alpha / r = 2 is exact in floating point, wherever it is multiplied in.
    adapter = random_adapter(net, r=4, alpha=8.0)
    formats.write_peft(here / "peft", adapter, "mini")
    formats.write_diffusers(here / "lora.safetensors", adapter)
    back = formats.read(here / "peft", net)
    assert (back["r"], back["alpha"]) == (4, 8.0)
    assert back["tensors"].keys() == adapter["tensors"].keys()
    single = formats.read(here / "lora.safetensors", net)
    scale = single["alpha"] / single["r"]
    for name, tensor in adapter["tensors"].items():
        assert torch.equal(back["tensors"][name], tensor)
        if name.endswith(".A"):
            assert torch.equal(single["tensors"][name], tensor)
        else:
            assert torch.equal(scale * single["tensors"][name], 2 * tensor)


def test_merge_whole_is_the_mean_of_adapters_and_whole_transformers(net):
    a = random_adapter(net, seed=1)
    b = random_adapter(net, r=2, seed=2)
    whole = mini_sd3.randomise(MMDiT(MEDIUM), 9)
    student = mini_sd3.randomise(MMDiT(MEDIUM), 0)
    base = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    merge_whole(student, net, [a, b, {"net": whole}])
    for name, weight in student.named_parameters():
        want = (2 * base[name] + whole.state_dict()[name]) / 3
        layer = name.removesuffix(".weight")
        if f"{layer}.A" in a["tensors"]:
            for adapter in (a, b):
                A = adapter["tensors"][f"{layer}.A"]
                B = adapter["tensors"][f"{layer}.B"]
                update = torch.cat([part_B @ part_A for part_A, part_B in zip(A, B)])
                want = want + adapter["alpha"] / adapter["r"] * update / 3
        torch.testing.assert_close(weight, want, rtol=1e-4, atol=1e-5)


def test_convert_on_the_command_line(folder, net, here, monkeypatch):
    formats.write_peft(here / "peft", random_adapter(net), "mini")
    convert.main(convert.Config(ckpts=[str(here / "peft")], to="pt", out="ocr.pt",
                                model=str(folder), task="ocr"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "checkpoints", "ocr.pt", "--model", str(folder)]
    for to, out in (("diffusers", "lora.safetensors"), ("merged", "merged.safetensors"),
                    ("peft", "again")):
        subprocess.run([*command, "--to", to, "--out", out], check=True, capture_output=True)
    names = load_file(here / "peft/adapter_model.safetensors").keys()
    assert load_file(here / "again/adapter_model.safetensors").keys() == names
    assert load_mmdit(here / "merged.safetensors").cfg == MEDIUM


def test_conversion_asks_the_hub_for_no_text_encoders(file, net, here, monkeypatch):
    asked = []

    def find(path, text_encoders=True):
        asked.append((path, text_encoders))
        return file

    monkeypatch.setattr(convert, "find", find)
    formats.write_peft(here / "peft", random_adapter(net), "mini")
    convert.main(convert.Config(ckpts=["peft"], to="diffusers", out="x.safetensors",
                                model="org/sd3"))
    assert asked == [("org/sd3", False)]


def test_a_merged_file_keeps_the_task_and_the_mark_if_there_are_any(folder, net, here):
    formats.write_peft(here / "peft", random_adapter(net), "mini")

    def merged(ckpt, **options):
        convert.main(convert.Config(ckpts=[ckpt], to="merged", out="m.safetensors",
                                    model=str(folder), **options))
        return formats.read("m.safetensors", net)

    nameless = merged("peft")
    assert (nameless["task"], nameless["anchor"]) == ("", False)
    assert formats.read("m.safetensors", net, "ocr")["task"] == "ocr"
    named = merged("peft", task="ocr", anchor=True)
    assert (named["task"], named["anchor"]) == ("ocr", True)
    convert.main(convert.Config(ckpts=["peft"], to="pt", out="ocr.pt", model=str(folder),
                                task="ocr", anchor=True))
    marked = merged("ocr.pt")
    assert (marked["task"], marked["anchor"]) == ("ocr", True)
    with pytest.raises(ValueError, match="^--anchor --to peft: .*expected --to pt or merged$"):
        convert.main(convert.Config(ckpts=["ocr.pt"], to="peft", out="again", anchor=True))


def same_update(got, want, net):
    """Do two adapters change the base's weights alike?"""
    theirs = formats.merged_weights(net, want)
    for name, weight in formats.merged_weights(net, got).items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_several_adapters_are_merged_exactly_by_their_weights_and_then_written(folder, net, here):
    one, two = random_adapter(net, seed=1), random_adapter(net, r=2, seed=2)
    formats.write_peft("one", one, "mini")
    formats.write_diffusers("two.safetensors", two)
    want = merge_adapters([one, two], [2.0, 1.0])
    how = dict(ckpts=["ocr=one", "geneval=two.safetensors"], weights=[2.0, 1.0], model=str(folder))
    for to, out in (("pt", "x.pt"), ("peft", "x"), ("diffusers", "x.safetensors")):
        convert.main(convert.Config(to=to, out=out, **how))
        same_update(formats.read(out, net), want, net)
    assert formats.read("x.pt", net)["task"] == "ocr+geneval"
    convert.main(convert.Config(to="merged", out="whole.safetensors", **how))
    whole = formats.read("whole.safetensors", net)
    assert whole["task"] == "ocr+geneval"
    got = whole["net"].state_dict()
    for name, weight in formats.merged_weights(net, want).items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


def test_two_seeds_of_a_task_merge_into_that_task_and_strangers_need_a_name(folder, net, here):
    formats.write_peft("one", random_adapter(net), "mini")

    def task(*ckpts, **options):
        convert.main(convert.Config(ckpts=list(ckpts), to="pt", out="x.pt", model=str(folder),
                                    **options))
        return formats.read("x.pt", net)["task"]

    assert task("ocr=one", "ocr=one") == "ocr"
    assert task("ocr=one", "one", task="mine") == "mine"
    with pytest.raises(ValueError, match="^ocr=one one: does not say what it was trained on; exp"):
        task("ocr=one", "one")


def test_a_whole_transformer_among_several_makes_the_merge_a_whole(folder, file, net, here):
    mini_sd3.write_file(here / "whole.safetensors", seed=7)
    formats.write_peft("one", random_adapter(net), "mini")
    how = dict(ckpts=["ocr=one", "ocr=whole.safetensors"], weights=[0.25, 0.75], model=str(folder))
    convert.main(convert.Config(to="merged", out="x.safetensors", **how))
    one = {**net.state_dict(), **formats.merged_weights(net, formats.read("one", net))}
    whole = load_mmdit("whole.safetensors").state_dict()
    merged = formats.read("x.safetensors", net)
    assert merged["task"] == "ocr"
    for name, weight in merged["net"].named_parameters():
        torch.testing.assert_close(weight, (one[name] + 3 * whole[name]) / 4)
    with pytest.raises(ValueError, match="is a whole transformer, which no adapter equals"):
        convert.main(convert.Config(to="peft", out="x", **how))


def test_command_line_takes_several_checkpoints_and_their_weights():
    line = "a.pt b.pt --weights 2 1 --out x".split()
    cfg = cli.parse(convert.Config, line, positional=("ckpts",))
    assert (cfg.ckpts, cfg.weights) == (["a.pt", "b.pt"], [2.0, 1.0])
    assert cli.parse(convert.Config, [], positional=("ckpts",)).ckpts == []


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(weights):
    with pytest.raises(ValueError, match="^--weights 1.0.*: expected 2 finite numbers above"):
        convert.main(convert.Config(ckpts=["a.pt", "b.pt"], weights=weights, out="x"))


# ------------------------------------------------------------------ the hub


def hub(monkeypatch, folder):
    """A hub that gives this folder. Returns the list of what it is asked for."""
    asked = []

    def snapshot_download(name, repo_type, allow_patterns, ignore_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_an_adapter_on_the_hub_is_read_as_its_folder(net, here, monkeypatch):
    name = "jieliu/SD3.5M-FlowGRPO-GenEval"
    asked = hub(monkeypatch, here / "cache")
    formats.write_peft(here / "cache", random_adapter(net), "mini")
    teacher = formats.read(name, net, "geneval")
    assert asked == [(name, "model", ["adapter_config.json", "adapter_model.safetensors"])]
    assert teacher["task"] == "geneval"
    same_update(teacher, random_adapter(net), net)
    same_update(cold_start(name, net, [], None, None), teacher, net)
    assert len(asked) == 2
    formats.write_peft(name, random_adapter(net, r=2), "mini")
    assert formats.read(name, net)["r"] == 2 and len(asked) == 2           # the disk wins


def test_a_hub_that_gives_no_adapter_is_one_clear_line(net, monkeypatch):
    def no_network(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    refused(net, "org/name", "^org/name: is no file or folder here, and the hub did not give it: "
                             "ConnectionError: no route to host$")
    refused(net, "ckpt/missing.pt", "^ckpt/missing.pt: no such file$")


# ------------------------------------------------------------------ bad input, one clear line each


def change_config(here, **changes):
    path = here / "peft/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CHANGES = [
    {"use_dora": True},
    {"rank_pattern": {"attn.to_q": 8}},
    {"alpha_pattern": {"attn.to_q": 8}},
    {"bias": "all"},
    {"lora_bias": True},
    {"modules_to_save": ["norm_out"]},
    {"init_lora_weights": "pissa"},
    {"fan_in_fan_out": True},
    {"layer_replication": [[0, 2]]},
    {"something_new": 3},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_peft_config_that_changes_the_maths_is_refused_by_name(net, here, changes):
    formats.write_peft(here / "peft", random_adapter(net), "mini")
    change_config(here, **changes)
    key = next(iter(changes))
    with pytest.raises(ValueError, match=f"adapter_config.json: {key} is .*, which changes"):
        formats.read(here / "peft", net)


def refused(net, folder, message):
    with pytest.raises(ValueError, match=message):
        formats.read(folder, net)


def test_lora_of_another_rank_or_other_targets_is_refused(net, here):
    peft = here / "peft"
    weights = peft / "adapter_model.safetensors"
    formats.write_peft(peft, random_adapter(net), "mini")
    tensors = load_file(weights)
    save_file(tensors, weights)                          # as a file of others, without our digest

    change_config(here, r=16)
    refused(net, peft, r"add_k_proj.lora_A.weight' is \(3, 128\), expected \(16, 128\)"
                       r".*: an adapter has rank 16")
    change_config(here, r=3)

    name = "transformer_blocks.1.attn2.to_q.lora_A.weight"
    save_file({**tensors, f"base_model.model.{name}": torch.zeros(3, 128)}, weights)
    refused(net, peft, rf"'{name}' is \(3, 128\), expected no such tensor: an adapter has rank 3 "
                       "here, on attn.add_k_proj, ")
    without = {name: x for name, x in tensors.items() if ".2.attn.to_k" not in name}
    save_file(without, weights)
    refused(net, peft, r"'transformer_blocks.2.attn.to_k.lora_A.weight' is missing, "
                       r"expected \(3, 128\)")
    save_file({name: x / 0 for name, x in tensors.items()}, weights)
    refused(net, peft, "not a tensor of finite numbers")
    (peft / "adapter_config.json").unlink()
    refused(net, peft, "adapter_config.json: no such file")


@pytest.mark.parametrize("text", ["{broken", "[1]"])
def test_a_config_in_the_metadata_that_is_no_json_object_is_refused_by_the_path(net, here, text):
    formats.write_diffusers(here / "lora.safetensors", random_adapter(net))
    tensors = load_file(here / "lora.safetensors")
    save_file(tensors, here / "lora.safetensors", {"lora_adapter_metadata": text})
    refused(net, here / "lora.safetensors",
            r"lora.safetensors: its lora_adapter_metadata is '.*', expected a JSON object$")


def test_field_of_another_type_is_refused_with_the_types_that_do(net, here):
    fields = {"task": "ocr", "anchor": False, "base": net.fingerprint, "settings": {}}
    formats.save_adapter(here / "x.pt", **{**random_adapter(net), **fields, "alpha": "5"})
    refused(net, here / "x.pt", "x.pt: 'alpha' is of type str, expected int or float$")


def test_transformer_of_another_size_is_read_and_evaluated_but_nothing_starts_from_it(net, here,
                                                                                      folder):
    mini_sd3.write_file(here / "large.safetensors", mini_sd3.LARGE)
    large = formats.read(here / "large.safetensors", net, "ocr")
    sample = inputs()
    want = load_mmdit(here / "large.safetensors")(*sample)
    assert torch.equal(large["net"](*sample), want) and want.shape == sample[0].shape
    sizes = ("needs transformers of the shape of --model, got depth 5, expected 4; width 192, "
             "expected 128; pos_max 12, expected 24; dual 0, expected 2; one of another shape can "
             "teach and be evaluated, no more$")
    whole = copy.deepcopy(net)
    with pytest.raises(ValueError, match=f"^--init merge: {sizes}"):
        cold_start("merge", net, [large], None, None)
    with pytest.raises(ValueError, match=f"^--init large.safetensors: {sizes}"):
        cold_start_whole("large.safetensors", whole, net, [])
    with pytest.raises(ValueError, match=f"^an average of weights: {sizes}"):
        merge_whole(whole, net, [large])
    with pytest.raises(ValueError, match=f"^--to merged: {sizes}"):
        convert.main(convert.Config(ckpts=["large.safetensors"], to="merged",
                                    out="x.safetensors", model=str(folder)))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, net.state_dict()[name])


@pytest.mark.parametrize("name, value", [("channels", 8), ("context_dim", 64), ("pooled_dim", 64)])
def test_transformer_of_other_latents_or_another_text_is_no_checkpoint(net, here, name, value):
    cfg = dataclasses.replace(MEDIUM, **{name: value})
    mini_sd3.write_file(here / "other.safetensors", cfg, vae=False)
    refused(net, here / "other.safetensors", "is a transformer of other latents or another text "
            f"than those of --model: {name} {value}, expected {getattr(MEDIUM, name)}$")


def test_whole_transformer_is_not_relabelled(file, net, here):
    whole = formats.save_whole(here / "x.safetensors", {}, file, task="ocr")
    with pytest.raises(ValueError, match="is called 'geneval', but was trained on 'ocr'"):
        formats.read(whole, net, "geneval")


def test_an_adapter_of_an_older_version_is_converted_with_its_tensors(here):
    """Such a file has no digest, and its base is named by another fingerprint."""
    path = make_teacher("new.pt", "ocr")
    old = dict(read_pt(path, ["task"]), base="an old name")
    torch.save(old, "old.pt")
    with pytest.raises(ValueError, match="has no digest.*python -m checkpoints"):
        formats.read("old.pt", worlds.load(BASE).mmdit)
    convert.main(convert.Config(ckpts=["old.pt"], model=BASE, to="pt", out="again.pt"))
    again = formats.read("again.pt", worlds.load(BASE).mmdit)
    assert distance(again["tensors"], old["tensors"]) == 0
    assert (again["r"], again["alpha"], again["task"]) == (4, 8.0, "ocr")
