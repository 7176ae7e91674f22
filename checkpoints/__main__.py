"""Convert a checkpoint from any form to another.

    # a folder for PEFT
    python -m checkpoints runs/opd/student.pt --to peft --out student-peft
    # a file for pipeline.load_lora_weights(...) of diffusers
    python -m checkpoints runs/opd/student.pt --to diffusers --out student-lora.safetensors
    # a whole model in Stability's native layout, which their code and ComfyUI read
    python -m checkpoints runs/opd/student.pt --to merged --out student.safetensors
    # our own form, for --teachers
    python -m checkpoints DIR --task ocr --model stable-diffusion-3.5-medium --to pt --out ocr.pt
"""
from dataclasses import dataclass
from typing import Literal

from checkpoints.formats import (
    merged_weights,
    read,
    save_adapter,
    save_whole,
    write_diffusers,
    write_peft,
)
from model import load_mmdit
from plumbing import cli
from worlds.paths import find


@dataclass
class Config:
    # --- conversion
    # The checkpoint to convert, in any form.
    ckpt: str = ""
    # The form to convert it to.
    to: Literal["pt", "peft", "diffusers", "merged"] = "peft"
    # Where to write.
    out: str = ""
    # The base: a file, SD3.5's folder, or its name on the hub.
    model: str = "ckpt/tiny.safetensors"
    # The task of a checkpoint in a form that does not know it (kept by --to pt and merged).
    task: str = ""
    # Mark it as the quality teacher of all tasks (with --to pt or merged).
    anchor: bool = False


def write_merged(cfg, ckpt, net, file):
    if "net" in ckpt:
        weights = ckpt["net"].state_dict()
    else:
        weights = merged_weights(net, ckpt)
    marks = {"anchor": cfg.anchor or ckpt["anchor"]}
    if ckpt["task"]:
        marks["task"] = ckpt["task"]
    save_whole(cfg.out, weights, file, **marks)


def write_pt(cfg, ckpt, net):
    if not ckpt["task"]:
        raise ValueError(f"{cfg.ckpt}: does not say what it was trained on; expected --task TASK")
    fields = {"base": net.fingerprint, "settings": {"from": cfg.ckpt}, **ckpt}
    fields["anchor"] = cfg.anchor or ckpt["anchor"]
    save_adapter(cfg.out, **fields)


def main(cfg):
    if not cfg.out or not cfg.ckpt:
        raise ValueError("expected a checkpoint and where to write: "
                         "python -m checkpoints CKPT --to peft --out DIR")
    if cfg.anchor and cfg.to in ("peft", "diffusers"):
        raise ValueError(f"--anchor --to {cfg.to}: this form cannot hold the mark; expected "
                         "--to pt or merged")
    file = find(cfg.model, text_encoders=False)
    net = load_mmdit(file, dtype=None)
    ckpt = read(cfg.ckpt, net, cfg.task)
    if cfg.to == "merged":
        write_merged(cfg, ckpt, net, file)
    elif "net" in ckpt:
        raise ValueError(f"{cfg.ckpt}: is a whole transformer, which no adapter equals; "
                         "expected --to merged")
    elif cfg.to == "pt":
        write_pt(cfg, ckpt, net)
    elif cfg.to == "peft":
        write_peft(cfg.out, ckpt, cfg.model)
    else:
        write_diffusers(cfg.out, ckpt)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config, positional=("ckpt",))
