"""The forms of a checkpoint (the table in __init__.py), in and out.

The transformer's q, k and v are one matrix here and three in diffusers. Our adapters keep three
pairs of factors beside the one matrix, so nothing is lost either way. In a merged file W + scale
B A is computed in float32 and rounded to the dtype of the file: only that step is not exact.
"""
import dataclasses
import json
from pathlib import Path

import torch

from model import MMDiTConfig, load_mmdit, part_prefix
from plumbing.files import (
    check_shapes,
    is_finite,
    open_tensors,
    parse_json,
    read_json,
    read_pt,
    shapes_of,
    write_pt,
    write_tensors,
    write_text,
)
from plumbing.state import weights
from worlds.paths import download, on_hub

# ------------------------------------------------------------------ our own form

# What each of our files holds, and of which types. r is the rank; alpha / r scales B A.
FIELDS = {"task": (str,), "anchor": (bool,), "base": (str,), "r": (int,), "alpha": (int, float),
          "tensors": (dict,), "settings": (dict,)}


def save_adapter(path, rank=0, **fields):
    """Write an adapter. fields has every key of FIELDS and may have more.

    Rank 0 writes; all get the path.
    """
    assert set(FIELDS) <= set(fields), f"an adapter has {', '.join(FIELDS)}"
    if rank == 0:
        write_pt(path, fields)
    return Path(path)


def read_adapter(path, base):
    """Read what save_adapter wrote.

    ValueError if it is something else, or if it belongs to another base. base: a fingerprint, or
    None to read what an older version wrote, without a digest and with another fingerprint.
    """
    adapter = read_pt(path, FIELDS, ours=base is not None)
    for key, types in FIELDS.items():
        if not isinstance(adapter[key], types):
            got = type(adapter[key]).__name__
            expected = " or ".join(one.__name__ for one in types)
            raise ValueError(f"{path}: '{key}' is of type {got}, expected {expected}")
    check_scale(adapter["r"], adapter["alpha"], path)
    check_finite(adapter["tensors"], path)
    if base and adapter["base"] != base:
        raise ValueError(f"{path}: is an adapter of base {adapter['base']}, but --model has "
                         f"fingerprint {base}; an adapter fits the base it was trained on")
    return adapter


def check_finite(tensors, path):
    """ValueError names the first of {name: tensor} that is no tensor of finite numbers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not is_finite(tensor):
            raise ValueError(f"{path}: '{name}' is not a tensor of finite numbers")


# ------------------------------------------------------------------ the names in diffusers

# Our layer name -> the names of the same modules in diffusers.
THEIRS = {
    "x_block.attn.qkv": ("to_q", "to_k", "to_v"),
    "x_block.attn.proj": ("to_out.0",),
    "context_block.attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "context_block.attn.proj": ("to_add_out",),
}
TARGETS = sorted(f"attn.{name}" for names in THEIRS.values() for name in names)


def their_modules(layer):
    """"joint_blocks.3.x_block.attn.qkv" -> ["transformer_blocks.3.attn.to_q", "....to_k", ...]."""
    _, block, part = layer.split(".", 2)
    return [f"transformer_blocks.{block}.attn.{name}" for name in THEIRS[part]]


def to_diffusers(tensors):
    """The tensors of an adapter under the names that diffusers and PEFT give them.

    {layer.A (n, r, D), layer.B (n, D, r)} ->
    {module.lora_A.weight (r, D), module.lora_B.weight (D, r)}, n modules a layer.
    """
    theirs = {}
    for name, tensor in tensors.items():
        layer, factor = name.rsplit(".", 1)
        for module, part in zip(their_modules(layer), tensor):
            theirs[f"{module}.lora_{factor}.weight"] = part.contiguous()
    return theirs


def from_diffusers(theirs, net, r, path):
    """The way back. ValueError names a tensor that does not fit an adapter of rank r."""
    layers = net.lora_layers()
    want = {}
    for layer, linear in layers.items():
        for module in their_modules(layer):
            want[f"{module}.lora_A.weight"] = (r, linear.in_features)
            want[f"{module}.lora_B.weight"] = (linear.in_features, r)
    try:
        check_shapes(want, shapes_of(theirs), path)
    except ValueError as error:
        targets = ", ".join(TARGETS)
        raise ValueError(f"{error}: an adapter has rank {r} here, on {targets} of every block, "
                         "as Flow-GRPO trains") from None
    check_finite(theirs, path)
    ours = {}
    for layer in layers:
        for factor in "AB":
            parts = [theirs[f"{module}.lora_{factor}.weight"] for module in their_modules(layer)]
            ours[f"{layer}.{factor}"] = torch.stack(parts).float()
    return ours


def read_tensors(path):
    """A safetensors file -> {name: tensor} and its metadata. The tensors are memory-mapped."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, file.metadata() or {}


def drop_prefix(prefix, named):
    return {name.removeprefix(prefix): value for name, value in named.items()}


# ------------------------------------------------------------------ PEFT's folder

PEFT_PREFIX = "base_model.model."
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
# These PEFT keys are harmless. Either B A does not depend on them, or the code below reads them.
NEUTRAL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode",
    "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "ensure_weight_tying",
}
# Every other key must have one of these values.
OFF = (None, False, "none", {}, [])
# init_lora_weights may also have these: they leave the base weights unchanged.
PLAIN_STARTS = (True, "gaussian", "orthogonal")


def read_peft_config(file):
    """The config of a PEFT adapter. ValueError if it asks for anything but plain LoRA."""
    try:
        config = read_json(file)
        r = config["r"]
        alpha = config["lora_alpha"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a PEFT adapter's config: "
                         f"{type(error).__name__} {error}") from None
    kind = config.get("peft_type")
    numbers = isinstance(r, int) and r > 0 and isinstance(alpha, (int, float))
    if kind != "LORA" or not numbers:
        raise ValueError(f"{file}: peft_type {kind}, r {r}, lora_alpha {alpha}; "
                         "expected LORA and two numbers")
    for key, value in config.items():
        plain_start = key == "init_lora_weights" and value in PLAIN_STARTS
        if key not in NEUTRAL and value not in OFF and not plain_start:
            raise ValueError(f"{file}: {key} is {value!r}, which changes what the adapter "
                             "computes; only plain LoRA is read here")
    return config


def check_scale(r, alpha, path):
    """ValueError unless r is a whole number and alpha a number, both finite and above 0."""
    numbers = type(r) is int and type(alpha) in (int, float)
    if not numbers or not 0 < r < 2**31 or not 0 < alpha < 1e6:
        raise ValueError(f"{path}: has rank {r!r:.40} and alpha {alpha!r:.40}, expected a whole "
                         "number and a number, both above 0")


def alpha_of(config, r, path):
    """alpha in our convention, where the scale is alpha / r. If the config has no alpha, it is r.

    rsLoRA's scale is alpha / sqrt(r).
    """
    alpha = config.get("lora_alpha", r)
    check_scale(r, alpha, path)
    if config.get("use_rslora"):
        alpha = alpha * r ** 0.5
    return alpha


def read_peft(folder, net):
    """A PEFT folder -> {"tensors", "r", "alpha"}."""
    folder = Path(folder)
    config_file, tensor_file = PEFT_FILES
    config = read_peft_config(folder / config_file)
    theirs, metadata = read_tensors(folder / tensor_file)
    r = config["r"]
    alpha = alpha_of(config, r, folder)
    # Of the config, only the scale changes what an adapter of this rank computes.
    if metadata.get("scale", repr(alpha / r)) != repr(alpha / r):
        raise ValueError(f"{folder}: {config_file} has another scale than the adapter was written "
                         f"with: {alpha / r}, expected {metadata['scale']}")
    tensors = from_diffusers(drop_prefix(PEFT_PREFIX, theirs), net, r, folder)
    return {"tensors": tensors, "r": r, "alpha": alpha}


def write_peft(folder, adapter, base_name):
    """Write what peft.PeftModel.from_pretrained(transformer, folder) reads."""
    folder = Path(folder)
    theirs = to_diffusers(adapter["tensors"])
    theirs = {PEFT_PREFIX + name: tensor for name, tensor in theirs.items()}
    config_file, tensor_file = PEFT_FILES
    scale = repr(adapter["alpha"] / adapter["r"])
    write_tensors(folder / tensor_file, theirs, {"format": "pt", "scale": scale})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": adapter["r"],
        "lora_alpha": adapter["alpha"],
        "lora_dropout": 0.0,
        "target_modules": TARGETS,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_text(folder / config_file, json.dumps(config, indent=2))


# ------------------------------------------------------------------ the single file of diffusers

DIFFUSERS_PREFIX = "transformer."
# These keys of the file's adapter config change the result. They must be absent or empty.
UNREAD = ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias")


def write_diffusers(path, adapter):
    """Write the single file that pipeline.load_lora_weights takes.

    A file without metadata means alpha = r, so the scale is multiplied into B.
    """
    scale = adapter["alpha"] / adapter["r"]
    scaled = {}
    for name, tensor in adapter["tensors"].items():
        scaled[name] = tensor * scale if name.endswith(".B") else tensor
    theirs = to_diffusers(scaled)
    theirs = {DIFFUSERS_PREFIX + name: tensor for name, tensor in theirs.items()}
    write_tensors(path, theirs, {"format": "pt"})


def config_in(metadata, path):
    """The adapter's config in a file's metadata, or {} if there is none."""
    text = metadata.get("lora_adapter_metadata", "{}")
    try:
        return drop_prefix(DIFFUSERS_PREFIX, parse_json(text, path))
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: its lora_adapter_metadata is {text[:80]!r}, expected a JSON "
                         "object") from None


def read_diffusers(path, net):
    """Such a file -> {"tensors", "r", "alpha"}.

    A file that says its alpha in its metadata is scaled by it; others mean alpha = r.
    """
    theirs, metadata = read_tensors(path)
    theirs = drop_prefix(DIFFUSERS_PREFIX, theirs)
    config = config_in(metadata, path)
    factors = (".lora_A.weight", ".lora_B.weight")
    odd = [name for name in theirs if not name.endswith(factors)]
    odd += [key for key in UNREAD if config.get(key)]
    if odd:
        raise ValueError(f"{path}: has '{odd[0]}', which is not read here; expected plain LoRA, "
                         "named transformer.transformer_blocks.*.attn.*.lora_A.weight")
    ranks = [sum(tensor.shape[:1]) for name, tensor in theirs.items()
             if name.endswith(".lora_A.weight")]
    r = ranks[0] if ranks else 0
    tensors = from_diffusers(theirs, net, r, path)
    return {"tensors": tensors, "r": r, "alpha": alpha_of(config, r, path)}


# ------------------------------------------------------------------ whole transformers


def merged_weights(net, adapter):
    """{name: W + alpha / r * B A} of every layer that the adapter changes, in float32.

    The n products of a layer (q, k and v) stand one below the other, as in its one matrix.
    """
    scale = adapter["alpha"] / adapter["r"]
    merged = {}
    for layer, linear in net.lora_layers().items():
        like = dict(device=linear.weight.device, dtype=torch.float32)
        A = adapter["tensors"][f"{layer}.A"].to(**like)                 # (n, r, D)
        B = adapter["tensors"][f"{layer}.B"].to(**like)                 # (n, D, r)
        update = scale * (B @ A).flatten(0, 1)                          # (n D, D)
        merged[f"{layer}.weight"] = linear.weight.float() + update
    return merged


def save_whole(path, changed, source, rank=0, **metadata):
    """Write a copy of a model's file in which some of the transformer's tensors are changed.

    source: the model's file. Its other networks are copied unchanged. changed: {name: tensor}; they
    are written in the file's dtype. metadata is added to the file's own. Rank 0 writes; all get
    the path.
    """
    if rank > 0:
        return Path(path)
    tensors, known = read_tensors(source)
    prefix = part_prefix(tensors, "mmdit")
    for name, tensor in changed.items():
        dtype = tensors[prefix + name].dtype
        tensors[prefix + name] = tensor.to("cpu", dtype).contiguous()
    known.update({key: str(value) for key, value in metadata.items()})
    write_tensors(path, tensors, known)
    return Path(path)


# What a teacher must have in common with the base: the latents, and the text that it reads.
INTERFACE = ("channels", "context_dim", "pooled_dim")
SHAPE = [field.name for field in dataclasses.fields(MMDiTConfig)]


def differing(whole, net, names):
    """How two transformers differ in these fields: "depth 38, expected 24; ...", or ""."""
    parts = []
    for name in names:
        got = getattr(whole.cfg, name)
        expected = getattr(net.cfg, name)
        if got != expected:
            parts.append(f"{name} {got}, expected {expected}")
    return "; ".join(parts)


def check_same(whole, net, what):
    """ValueError unless a whole transformer has the base's shape, so that its weights can be used.

    what: what they are to be used for.
    """
    unlike = differing(whole, net, SHAPE)
    if unlike:
        raise ValueError(f"{what}: needs transformers of the shape of --model, got {unlike}; one "
                         "of another shape can teach and be evaluated, no more")


def read_whole(path, metadata, net, task):
    """A transformer of the base's latents and text -> {"task", "anchor", "net"}.

    It may have another size. It is put on the base's device, in its dtype.
    """
    weight = net.context_embedder.weight
    whole = load_mmdit(path, weight.device, weight.dtype)
    unlike = differing(whole, net, INTERFACE)
    if unlike:
        raise ValueError(f"{path}: is a transformer of other latents or another text than those "
                         f"of --model: {unlike}")
    trained_on = metadata.get("task") or task
    check_task(task, trained_on, path)
    return {"task": trained_on, "anchor": metadata.get("anchor") == "True", "net": whole}


# ------------------------------------------------------------------ what a script has trained


def save_trained(path, net, adapter, model, rank, **fields):
    """Write what was trained: an adapter, or a whole transformer.

    path: FILE.pt; a whole is written to FILE.safetensors beside it. adapter: its name in net, or
    None for a whole. model: the worlds.Model that it started from. fields: the rest of FIELDS; a
    whole keeps only its task and whether it is an anchor.
    Every rank has to call it; rank 0 writes. Returns the path.
    """
    if adapter is None:
        path = Path(path).with_suffix(".safetensors")
        return save_whole(path, weights(net), model.file, rank, task=fields["task"],
                          anchor=fields["anchor"])
    tensors = net.adapter(adapter)
    return save_adapter(path, rank, base=model.fingerprint, tensors=tensors, **fields)


# ------------------------------------------------------------------ any form


def check_task(task, trained_on, path):
    """ValueError if a checkpoint is called by one task and was trained on another."""
    if task and task != trained_on:
        raise ValueError(f"{task}={path}: is called '{task}', but was trained on '{trained_on}'")


def split_label(spec):
    """"ocr=path/to/it" -> ("ocr", "path/to/it"); without a label ("", path)."""
    label, equals, path = spec.partition("=")
    if equals and "/" not in label:
        return label, path
    return "", spec


def read(path, net, task=""):
    """A checkpoint in any form -> the dict of __init__.py.

    net: the base. task: the task of a checkpoint that does not know it. ValueError if it has none
    of the forms, does not fit the base, or was trained on another task. An adapter on the hub is
    downloaded.
    """
    unknown = {"task": task, "anchor": False}
    if on_hub(path):
        path = download(path, path, PEFT_FILES)
    if Path(path).is_dir():
        return {**unknown, **read_peft(path, net)}
    if Path(path).suffix != ".safetensors":
        adapter = read_adapter(path, net.fingerprint)
        check_shapes(net.adapter_shapes(adapter["r"]), shapes_of(adapter["tensors"]), path)
        check_task(task, adapter["task"], path)
        return adapter
    with open_tensors(path) as file:
        names = list(file.keys())
        metadata = file.metadata() or {}
    if any(".lora_" in name for name in names):
        return {**unknown, **read_diffusers(path, net)}
    return read_whole(path, metadata, net, task)
