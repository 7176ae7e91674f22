"""
Checkpoints: every form in which a teacher or a student is read, and in which it is handed on.

    python adapters.py runs/opd/student.pt --to peft --out student-peft                          # a PEFT folder
    python adapters.py runs/opd/student.pt --to diffusers --out student-lora.safetensors         # pipeline.load_lora_weights(...)
    python adapters.py runs/opd/student.pt --to merged --out student.safetensors                 # a whole model, native layout (ComfyUI, Stability's code)
    python adapters.py DIR --task ocr --model stable-diffusion-3.5-medium --to pt --out ckpt/ocr.pt

| form | what it is | knows its base |
|---|---|---|
| FILE.pt | an adapter as train_grpo.py and train_opd.py write it: plain tensors, task, settings | yes |
| a folder | a PEFT adapter: adapter_model.safetensors + adapter_config.json, as released by Flow-GRPO and Flow-OPD | no |
| FILE.safetensors with lora_A, lora_B | the single file of diffusers' load_lora_weights | no |
| FILE.safetensors with a transformer | a fine-tuned or merged whole, in Stability's native layout | - |

Wherever a checkpoint is asked for (--teachers, --ckpts) each of them will do; TASK=PATH names the task of one that does not know it.

The transformer's q, k and v are one matrix here and three in diffusers; our adapters keep three pairs of factors beside the one matrix, so nothing is
lost either way. In a merged file W + scale * B A is computed in float32 and rounded to the file's dtype: that is the one step that is not exact.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

import model as models
import util

# ------------------------------------------------------------------ our own form

FIELDS = {"task": str, "anchor": bool, "base": str, "r": int, "alpha": (int, float), "tensors": dict, "settings": dict}


def save_adapter(path, rank=0, **fields):
    """Write a teacher or a student: plain tensors and containers, with FIELDS and any more. Only rank 0 writes. Returns the path."""
    assert not set(FIELDS) - set(fields)
    if rank == 0:
        util.save_atomic(fields, path)
    return Path(path)


def read_adapter(path, base):
    """Read what save_adapter wrote. ValueError if it is something else, or belongs to another base (its fingerprint)."""
    adapter = util.read_pt(path, FIELDS)
    for key, kind in FIELDS.items():
        if not isinstance(adapter[key], kind):
            raise ValueError(f"{path}: '{key}' is a {type(adapter[key]).__name__}, expected {kind}")
    finite(adapter["tensors"], path)
    if adapter["base"] != base:
        raise ValueError(f"{path}: is an adapter of base {adapter['base']}, but --model has fingerprint {base}; an adapter fits the base it was trained on")
    return adapter


def finite(tensors, path):
    for key, x in tensors.items():
        if not isinstance(x, torch.Tensor) or not x.isfinite().all():
            raise ValueError(f"{path}: '{key}' is not a tensor of finite numbers")


# ------------------------------------------------------------------ diffusers' names, PEFT's folder

THEIRS = {"x_block.attn.qkv": ("to_q", "to_k", "to_v"), "x_block.attn.proj": ("to_out.0",),
          "context_block.attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"), "context_block.attn.proj": ("to_add_out",)}
TARGETS = sorted(f"attn.{name}" for names in THEIRS.values() for name in names)
# What a PEFT config may hold and the product B A does not depend on; of everything else only "off" is accepted.
NEUTRAL = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha", "use_rslora",
           "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core",
           "qalora_group_size", "ensure_weight_tying"}


def their_modules(layer):
    """"joint_blocks.3.x_block.attn.qkv" -> ["transformer_blocks.3.attn.to_q", "....to_k", "....to_v"]."""
    _, block, part = layer.split(".", 2)
    return [f"transformer_blocks.{block}.attn.{name}" for name in THEIRS[part]]


def to_diffusers(tensors):
    """Ours {layer.A (n, r, D), layer.B (n, D, r)} -> theirs {module.lora_A.weight (r, D), module.lora_B.weight (D, r)}."""
    out = {}
    for key, x in tensors.items():
        layer, factor = key.rsplit(".", 1)
        for module, part in zip(their_modules(layer), x):
            out[f"{module}.lora_{factor}.weight"] = part.contiguous()
    return out


def from_diffusers(theirs, net, r, path):
    """The way back. ValueError names a module this adapter should have and has not, or should not have."""
    ours, left = {}, dict(theirs)
    for layer, m in net.lora_layers().items():
        for factor, shape in (("A", (r, m.in_features)), ("B", (m.in_features, r))):
            parts = [left.pop(f"{module}.lora_{factor}.weight", None) for module in their_modules(layer)]
            for module, part in zip(their_modules(layer), parts):
                if part is None or tuple(part.shape) != shape:
                    got = "missing" if part is None else tuple(part.shape)
                    raise ValueError(f"{path}: '{module}.lora_{factor}.weight' is {got}, expected {shape}: an adapter of rank {r} "
                                     f"on {', '.join(TARGETS)} of every block, as Flow-GRPO trains")
            ours[f"{layer}.{factor}"] = torch.stack(parts).float()
    if left:
        raise ValueError(f"{path}: '{sorted(left)[0]}' is not one of the layers that carry adapters here ({', '.join(TARGETS)})")
    finite(ours, path)
    return ours


def read_peft(folder, net):
    """A PEFT folder -> tensors, r, alpha (with our scale alpha / r, whichever way PEFT scales)."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        r, alpha = config["r"], config["lora_alpha"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}/adapter_config.json: expected a PEFT adapter's config: {type(e).__name__} {e}") from None
    if config.get("peft_type") != "LORA" or not (isinstance(r, int) and r > 0 and isinstance(alpha, (int, float))):
        raise ValueError(f"{folder}/adapter_config.json: peft_type {config.get('peft_type')}, r {r}, lora_alpha {alpha}; expected LORA and two numbers")
    for key, value in config.items():
        off = value in (None, False, "none") or value in ({}, []) or key == "init_lora_weights" and value in (True, "gaussian", "orthogonal")
        if key not in NEUTRAL and not off:
            raise ValueError(f"{folder}/adapter_config.json: {key} is {value!r}, which changes what the adapter computes; only plain LoRA is read here")
    models.open_file(folder / "adapter_model.safetensors")               # says so if it is not a whole one
    theirs = load_file(folder / "adapter_model.safetensors")
    tensors = from_diffusers({k.removeprefix("base_model.model."): x for k, x in theirs.items()}, net, r, folder)
    return {"tensors": tensors, "r": r, "alpha": alpha * r ** 0.5 if config.get("use_rslora") else alpha}      # rsLoRA's scale is alpha / sqrt(r)


def write_peft(folder, adapter, base_name):
    """adapter_model.safetensors + adapter_config.json, for peft.PeftModel.from_pretrained(transformer, folder)."""
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{k}": x for k, x in to_diffusers(adapter["tensors"]).items()}, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_name, "r": adapter["r"], "lora_alpha": adapter["alpha"],
              "lora_dropout": 0.0, "target_modules": TARGETS, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": "gaussian",
              "inference_mode": True, "use_rslora": False,
              "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    util.write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2))


def write_diffusers(path, adapter):
    """The single file that pipeline.load_lora_weights takes. The scale is multiplied into B, since a file without metadata means alpha = r."""
    scaled = {k: x * (adapter["alpha"] / adapter["r"]) if k.endswith(".B") else x for k, x in adapter["tensors"].items()}
    write_tensors(path, {f"transformer.{k}": x for k, x in to_diffusers(scaled).items()}, {"format": "pt"})


def read_diffusers(path, theirs, metadata, net):
    """Such a file -> tensors, r, alpha. One that says its alpha (in diffusers' metadata) is scaled by it; others mean alpha = r."""
    theirs = {k.removeprefix("transformer."): x for k, x in theirs.items()}
    config = {k.removeprefix("transformer."): v for k, v in json.loads(metadata.get("lora_adapter_metadata", "{}")).items()}
    odd = [k for k in theirs if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    odd += [k for k in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias") if config.get(k)]
    if odd:
        raise ValueError(f"{path}: has '{odd[0]}', which is not read here; expected plain LoRA, named transformer.transformer_blocks.*.attn.*.lora_A.weight")
    r = next((x.shape[0] for k, x in theirs.items() if k.endswith(".lora_A.weight")), 0)
    alpha = config.get("lora_alpha", r) * (r ** 0.5 if config.get("use_rslora") else 1)
    return {"tensors": from_diffusers(theirs, net, r, path), "r": r, "alpha": alpha}


# ------------------------------------------------------------------ whole transformers


def save_whole(path, changed, source, rank=0, **metadata):
    """Write a model file like `source`, whatever is in it, with the transformer's tensors `changed`, in its dtype. Returns the path."""
    if rank > 0:
        return Path(path)
    with models.open_file(source) as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}      # mapped, not read
    prefix = models.PREFIX["mmdit"] if any(k.startswith(models.PREFIX["mmdit"]) for k in tensors) else ""
    for k, x in changed.items():
        tensors[prefix + k] = x.to("cpu", tensors[prefix + k].dtype).contiguous()
    return write_tensors(path, tensors, {**meta, **{k: str(v) for k, v in metadata.items()}})


def merged_weights(net, adapter):
    """{name: W + alpha / r * B A} of every layer that the adapter changes, in float32: q, k and v into the one matrix."""
    scale, out = adapter["alpha"] / adapter["r"], {}
    for layer, m in net.lora_layers().items():
        A, B = (adapter["tensors"][f"{layer}.{factor}"].to(m.weight.device, torch.float32) for factor in "AB")
        out[f"{layer}.weight"] = m.weight.float() + scale * (B @ A).flatten(0, 1)                                  # (n D, D)
    return out


# ------------------------------------------------------------------ cold starts of a student


def merge_adapters(adapters):
    """The exact average of K adapters' updates: mean_k scale_k B_k A_k, by stacking the factors (so the rank adds up).

    adapters: list of dicts with "tensors", "r", "alpha". Returns one such dict, with alpha = r (scale 1).
    DEVIATION: the released Flow-OPD code averages A and B apart; mean(B) mean(A) is not mean(B A). merge_factors does that.
    """
    K, tensors = len(adapters), {}
    for k in adapters[0]["tensors"]:
        if k.endswith(".A"):
            tensors[k] = torch.cat([a["tensors"][k] for a in adapters], dim=1)                                    # (n, sum r, D)
        else:
            tensors[k] = torch.cat([a["tensors"][k] * (a["alpha"] / a["r"] / K) for a in adapters], dim=2)        # (n, D, sum r)
    r = sum(a["r"] for a in adapters)
    return {"tensors": tensors, "r": r, "alpha": r}


def truncate_adapter(adapter, r, alpha):
    """The best adapter of rank r for another's update, in the least squares sense: the first r terms of the SVD of scale B A, shared evenly by the factors.

    B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T: the SVD is of a matrix as small as the rank.
    """
    out, scale = {}, adapter["alpha"] / adapter["r"]
    for k in (k.removesuffix(".A") for k in adapter["tensors"] if k.endswith(".A")):
        Q_B, R_B = torch.linalg.qr(adapter["tensors"][f"{k}.B"])                       # (n, D, R), (n, R, R)
        Q_A, R_A = torch.linalg.qr(adapter["tensors"][f"{k}.A"].mT)
        U, s, Vh = torch.linalg.svd(R_B @ R_A.mT * (scale * r / alpha))
        root = s[:, :r].sqrt()
        out[f"{k}.A"], out[f"{k}.B"] = root[:, :, None] * (Vh[:, :r] @ Q_A.mT), Q_B @ U[:, :, :r] * root[:, None]
    return {"tensors": out, "r": r, "alpha": alpha}


def merge_factors(adapters):
    """As released: the A and the B factors averaged apart, which is not the average of the updates. For comparison."""
    forms = {(a["r"], a["alpha"]) for a in adapters}
    if len(forms) > 1:
        raise ValueError(f"--init factors: averages factors of one rank and alpha, got {forms}; use --init merge")
    return {**adapters[0], "tensors": {k: sum(a["tensors"][k] for a in adapters) / len(adapters) for k in adapters[0]["tensors"]}}


@torch.no_grad()
def average_weights(net, base, teachers):
    """Make net, a copy of base, the average of the teachers: the mean of their whole weights, be they adapters (W + scale B A) or transformers."""
    theirs = [dict(teacher["net"].named_parameters()) if "net" in teacher else merged_weights(base, teacher) for teacher in teachers]
    for name, p in net.named_parameters():
        p.copy_(sum(w.get(name, p).float() for w in theirs) / len(theirs))


def cold_start(cfg, net, base, teachers):
    """How the student begins, by cfg.init: an adapter as a dict with "r", "alpha" and "tensors" (None: new), or, with cfg.full, net changed in place."""
    named = cfg.init in ("none", "merge", "truncate", "factors")
    start = [] if cfg.init == "none" else teachers if named else [read(cfg.init, base)]
    whole = any("net" in one for one in start)
    if cfg.full:
        if cfg.init in ("truncate", "factors"):
            raise ValueError(f"--init {cfg.init} --full: is about an adapter's factors; a whole transformer starts from merge, none, or a checkpoint")
        return average_weights(net, base, start) if start else None
    if whole:
        raise ValueError(f"--init {cfg.init}: comes from a whole transformer, which no adapter equals; use --full, or --init none")
    if cfg.init == "none":
        return {"r": cfg.lora_r, "alpha": cfg.lora_alpha, "tensors": None}
    if cfg.init == "factors":
        return merge_factors(start)
    if cfg.init == "truncate":
        if cfg.lora_r > sum(one["r"] for one in start):
            raise ValueError(f"--init truncate --lora-r {cfg.lora_r}: the exact merge has rank {sum(one['r'] for one in start)}; expected no more")
        return truncate_adapter(merge_adapters(start), cfg.lora_r, cfg.lora_alpha)
    return merge_adapters(start) if cfg.init == "merge" else start[0]


# ------------------------------------------------------------------ any form


def write_tensors(path, tensors, metadata):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, tmp, metadata)
    os.replace(tmp, path)
    return path


def split_label(spec):
    """"ocr=path/to/it" -> ("ocr", "path/to/it"); without a label ("", path)."""
    label, equals, path = spec.partition("=")
    return (label, path) if equals and "/" not in label else ("", spec)


def read(path, net, task=""):
    """A checkpoint in any form -> dict with "task", "anchor" and either "r", "alpha", "tensors" (an adapter of net) or "net" (a whole transformer).

    net: the base; task: of one that does not know it. ValueError if it is none of the forms, does not fit the base, or knows itself as another task's.
    """
    unknown = {"task": task, "anchor": False}
    if Path(path).is_dir():
        return {**unknown, **read_peft(path, net)}
    if Path(path).suffix != ".safetensors":
        adapter = read_adapter(path, net.fingerprint)
        if task and task != adapter["task"]:
            raise ValueError(f"{task}={path}: is called '{task}', but was trained on '{adapter['task']}'")
        return adapter
    with models.open_file(path) as f:
        names, metadata = list(f.keys()), f.metadata() or {}
    if any(".lora_" in k for k in names):
        return {**unknown, **read_diffusers(path, load_file(path), metadata, net)}
    weight = net.context_embedder.weight
    whole = models.load_mmdit(path, weight.device, weight.dtype)
    if whole.cfg != net.cfg:
        raise ValueError(f"{path}: is a transformer of another shape ({whole.cfg}), expected that of --model ({net.cfg})")
    if task and metadata.get("task", task) != task:
        raise ValueError(f"{task}={path}: is called '{task}', but was trained on '{metadata['task']}'")
    return {"task": task or metadata.get("task", ""), "anchor": metadata.get("anchor") == "True", "net": whole}


def read_teachers(specs, model, world):
    """The teachers by task. ValueError if a file or the set of them will not do."""
    if not specs:
        raise ValueError("--teachers: got none, expected adapters written by train_grpo.py, e.g. --teachers ckpt/*.pt")
    teachers, source = {}, {}
    for spec in specs:
        label, path = split_label(spec)
        teacher = read(path, model.mmdit, label)
        task = teacher["task"]
        if task not in world.TASKS:
            raise ValueError(f"{spec}: is trained on '{task}', expected one of {', '.join(world.TASKS)}, to which prompts can be routed" +
                             "; say TASK=PATH" * (not task))
        if task in teachers:
            raise ValueError(f"{path}: is a second teacher of '{task}', after {source[task]}; a prompt is routed to one")
        teachers[task], source[task] = teacher, path
    return teachers


def attach(teachers, net):
    """Add the teachers that are adapters to net, each under its task's name. Returns {task: fingerprint} of all, by which a resumed run knows them."""
    for task, teacher in teachers.items():
        if "net" not in teacher:
            net.add_adapter(task, teacher["r"], teacher["alpha"], teacher["tensors"])
    return {task: teacher["net"].fingerprint if "net" in teacher else models.fingerprint(teacher["tensors"]) for task, teacher in teachers.items()}


def find_anchor(name, lam, teachers):
    """The task whose teacher anchors all prompts (MAR), None without: the one that is named, or else the one that was trained as such."""
    marked = [task for task, teacher in teachers.items() if teacher["anchor"]]
    if name and (name not in teachers or not lam):
        raise ValueError(f"--anchor {name}: expected the task of a teacher ({', '.join(teachers)}), and --lam > 0; got --lam {lam}")
    if not lam:
        return None
    if not name and len(marked) != 1:
        raise ValueError(f"{len(marked)} of the teachers are marked as the anchor; expected one: say --anchor TASK, or --lam 0 for none")
    return name or marked[0]


# ------------------------------------------------------------------ command line


@dataclass
class Config:
    ckpt: str = ""                                                       # what to convert, in any form
    to: Literal["pt", "peft", "diffusers", "merged"] = "peft"            # into what
    out: str = ""                                                        # where to
    model: str = "ckpt/tiny.safetensors"                                 # the base: a file, SD3.5's folder, or its hub name
    task: str = ""                                                       # what it was trained on, for a form that does not know (with --to pt)
    anchor: bool = False                                                 # mark it as the quality teacher (with --to pt)


def main(cfg):
    if not cfg.out or not cfg.ckpt:
        raise ValueError("expected a checkpoint and where to write: python adapters.py CKPT --to peft --out DIR")
    file = models.find(cfg.model)
    net = models.load_mmdit(file, dtype=None)
    ckpt = read(cfg.ckpt, net, cfg.task)
    if cfg.to == "merged":
        save_whole(cfg.out, ckpt["net"].state_dict() if "net" in ckpt else merged_weights(net, ckpt), file, task=ckpt["task"])
    elif "net" in ckpt:
        raise ValueError(f"{cfg.ckpt}: is a whole transformer, which no adapter equals; expected --to merged")
    elif cfg.to == "pt":
        if not ckpt["task"]:
            raise ValueError(f"{cfg.ckpt}: does not say what it was trained on; expected --task TASK")
        save_adapter(cfg.out, **{"base": net.fingerprint, "settings": {"from": cfg.ckpt}, **ckpt, "anchor": cfg.anchor or ckpt["anchor"]})
    elif cfg.to == "peft":
        write_peft(cfg.out, ckpt, cfg.model)
    else:
        write_diffusers(cfg.out, ckpt)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    util.run(main, Config, positional=("ckpt",))
