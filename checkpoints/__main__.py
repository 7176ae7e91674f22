"""Convert a checkpoint from any form to another, or merge several into one.

    # a folder for PEFT
    python -m checkpoints runs/opd/student.pt --to peft --out student-peft
    # a file for pipeline.load_lora_weights(...) of diffusers
    python -m checkpoints runs/opd/student.pt --to diffusers --out student-lora.safetensors
    # a whole model in Stability's native layout, which their code and ComfyUI read
    python -m checkpoints runs/opd/student.pt --to merged --out student.safetensors
    # our own form, for --teachers
    python -m checkpoints DIR --task ocr --model stable-diffusion-3.5-medium --to pt --out ocr.pt
    # the exact average of several
    python -m checkpoints geneval.pt ocr.pt --to pt --out both.pt
    # the whole update of one, and half of the other's
    python -m checkpoints geneval.pt ocr.pt --weights 1 0.5 --to pt --out both.pt
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from checkpoints.cold_start import merge_adapters, merge_whole
from checkpoints.formats import (
    check_same,
    merged_weights,
    read,
    read_adapter,
    save_adapter,
    save_whole,
    split_label,
    write_diffusers,
    write_peft,
)
from model import load_mmdit
from plumbing import cli
from plumbing.files import check_shapes, shapes_of
from plumbing.folder import check_places, check_writable
from worlds.paths import find


@dataclass
class Config:
    # --- conversion
    # The checkpoint to convert: PATH or TASK=PATH, in any form. Several are merged exactly.
    ckpts: list[str] = field(default_factory=list)
    # What each one's update is multiplied with in the merge, above 0 (default: 1 / their number).
    weights: list[float] = field(default_factory=list)
    # The form to convert it to.
    to: Literal["pt", "peft", "diffusers", "merged"] = "peft"
    # Where to write.
    out: str = ""
    # The base: a file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # The task of what is written (kept by --to pt and merged), if it is not known. That of a merge
    # is by default all tasks, joined with "+".
    task: str = ""
    # Mark it as the quality teacher of all tasks (with --to pt or merged).
    anchor: bool = False


def check(cfg):
    """ValueError for all that can be known to be wrong before any file is read."""
    if not cfg.out or not cfg.ckpts:
        raise ValueError("expected a checkpoint and where to write: "
                         "python -m checkpoints CKPT --to peft --out DIR")
    if cfg.anchor and cfg.to in ("peft", "diffusers"):
        raise ValueError(f"--anchor --to {cfg.to}: this form cannot hold the mark; expected "
                         "--to pt or merged")
    if cfg.out == cfg.model:
        raise ValueError(f"--out {cfg.out}: is the base itself; expected another file")
    if cfg.to == "peft":
        check_writable(Path(cfg.out))
    else:
        check_places(Path(cfg.out).parent, cfg.out)
    positive = all(0 < weight < math.inf for weight in cfg.weights)
    if cfg.weights and (len(cfg.weights) != len(cfg.ckpts) or not positive):
        given = " ".join(str(weight) for weight in cfg.weights)
        raise ValueError(f"--weights {given}: expected {len(cfg.ckpts)} finite numbers above 0, "
                         "one for each checkpoint")


def read_all(cfg, net):
    """The checkpoints of a command. A single one may get its task from --task."""
    default = cfg.task if len(cfg.ckpts) == 1 else ""
    ckpts = []
    for spec in cfg.ckpts:
        label, path = split_label(spec)
        if cfg.to == "pt" and len(cfg.ckpts) == 1 and path.endswith(".pt"):
            # What an older version wrote has no digest, and its name for the base is another one.
            ckpts.append(read_adapter(path, None))
        else:
            ckpts.append(read(path, net, label or default))
    return ckpts


def merge(ckpts, weights, task, net):
    """Several checkpoints -> one. It is a whole transformer if one of them is."""
    if any("net" in ckpt for ckpt in ckpts):
        whole = copy.deepcopy(net)
        merge_whole(whole, net, ckpts, weights)
        merged = {"net": whole}
    else:
        merged = merge_adapters(ckpts, weights)
    tasks = list(dict.fromkeys(ckpt["task"] for ckpt in ckpts))
    if all(tasks):
        task = task or "+".join(tasks)
    return {**merged, "task": task, "anchor": False}


def write_merged(cfg, ckpt, net, file):
    if "net" in ckpt:
        check_same(ckpt["net"], net, "--to merged")
        weights = ckpt["net"].state_dict()
    else:
        weights = merged_weights(net, ckpt)
    marks = {"anchor": cfg.anchor or ckpt["anchor"]}
    if ckpt["task"]:
        marks["task"] = ckpt["task"]
    save_whole(cfg.out, weights, file, **marks)


def write_pt(cfg, ckpt, net):
    if not ckpt["task"]:
        raise ValueError(f"{' '.join(cfg.ckpts)}: does not say what it was trained on; expected "
                         "--task TASK")
    settings = {"from": cfg.ckpts, "weights": cfg.weights}
    check_shapes(net.adapter_shapes(ckpt["r"]), shapes_of(ckpt["tensors"]), cfg.out)
    fields = {"settings": settings, **ckpt, "base": net.fingerprint}
    fields["anchor"] = cfg.anchor or ckpt["anchor"]
    save_adapter(cfg.out, **fields)


def main(cfg):
    check(cfg)
    file = find(cfg.model, text_encoders=False)
    net = load_mmdit(file, dtype=None)
    ckpts = read_all(cfg, net)
    ckpt = ckpts[0] if len(ckpts) == 1 else merge(ckpts, cfg.weights, cfg.task, net)
    if cfg.to == "merged":
        write_merged(cfg, ckpt, net, file)
    elif "net" in ckpt:
        raise ValueError(f"{' '.join(cfg.ckpts)}: is a whole transformer, which no adapter "
                         "equals; expected --to merged")
    elif cfg.to == "pt":
        write_pt(cfg, ckpt, net)
    elif cfg.to == "peft":
        write_peft(cfg.out, ckpt, cfg.model)
    else:
        write_diffusers(cfg.out, ckpt)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config, positional=("ckpts",))
