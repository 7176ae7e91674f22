"""
What full size costs: SD3.5-Medium with random bfloat16 weights, through the very scripts a user runs. Nothing here needs real weights.

    python bench.py                     # make the model (5.1 GB, once), load it, one guided step, one OPD update; -> results/fullsize-DEVICE-SIZE.json
    python bench.py --size 512 --device cuda --parts step opd
    python bench.py --parts rewards     # images a second of every reward network at its published size; -> results/rewards-DEVICE.json

The transformer and the VAE are of the published size. The text encoders have the published widths but two layers, since they run once a prompt and are
gone before training; so no time or memory of T5-XXL is in these numbers. Peak memory is read from /proc every 20 ms: "anonymous" is what the
process allocated, "file" what it mapped (clean pages, which the kernel may drop). On a GPU it is torch's own peak. Time nothing beside it.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

import adapters
import util
from model import MMDiT, MMDiTConfig, PREFIX, VAE

ROOT = Path(__file__).parent


@dataclass
class Config:
    parts: list[str] = field(default_factory=lambda: ["load", "step", "opd"])    # what to measure; rewards stands alone
    names: list[str] = field(default_factory=list)                               # for rewards: which (default: all)
    size: int = 256                                                              # side of the images in pixels
    threads: int = os.cpu_count()                                                # CPU threads
    device: Literal["cpu", "cuda"] = "cpu"                                       # where
    folder: str = "runs/sd3.5-medium-random"                                     # where the model is made, and found
    out: str = ""                                                                # default: results/fullsize-DEVICE-SIZE.json


def make(folder):
    """A folder as published: random bfloat16 weights, scaled so that signals neither vanish nor explode; and three random PEFT adapters of rank 32."""
    sys.path.insert(0, str(ROOT / "tests"))
    import mini_sd3
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    folder.mkdir(parents=True)
    tensors, g = {}, torch.Generator().manual_seed(0)
    with torch.device("meta"):
        parts = {"mmdit": MMDiT(MMDiTConfig()), "vae": VAE()}
    for part, net in parts.items():
        for k, v in net.state_dict().items():
            scale = 0.02 if v.dim() <= 1 else 0.5 * v[0].numel() ** -0.5
            tensors[PREFIX[part] + k] = (torch.randn(v.shape, generator=g) * scale + (v.dim() == 1 and k.endswith("weight"))).bfloat16()
    with torch.device("meta"):
        layers = MMDiT(MMDiTConfig())
    for task in ("geneval", "ocr", "quality"):
        lora = {f"{n}.{f}": torch.randn(m.n, *((32, m.in_features) if f == "A" else (m.in_features, 32)), generator=g) * (0.02 if f == "A" else 0.01)
                for n, m in layers.lora_layers().items() for f in "AB"}
        adapters.write_peft(folder / task, {"tensors": lora, "r": 32, "alpha": 64}, "stabilityai/stable-diffusion-3.5-medium")
    words, pieces = mini_sd3.write_tokenizers(folder)
    for name, width, heads in (("text_encoder", 768, 12), ("text_encoder_2", 1280, 20)):
        config = CLIPTextConfig(vocab_size=words, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=heads, projection_dim=width,
                                bos_token_id=0, pad_token_id=1, eos_token_id=2)
        CLIPTextModelWithProjection(config).bfloat16().save_pretrained(folder / name)
    T5EncoderModel(T5Config(vocab_size=pieces, d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64, feed_forward_proj="gated-gelu")).bfloat16().save_pretrained(
        folder / "text_encoder_3")
    save_file(tensors, folder / "sd3.5_medium.safetensors")      # last: a folder with it is whole


def watch(command, cfg):
    """Run a command; returns its output, wall-clock seconds and peak memory in GB."""
    env = {**os.environ, "OMP_NUM_THREADS": str(cfg.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    start, peak = time.time(), {"anonymous": 0, "file": 0, "both": 0}
    with open("/tmp/bench.log", "w+") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            try:
                kb = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line)
                anonymous, file = (int(kb[k].split()[0]) / 1e6 for k in ("RssAnon", "RssFile"))
                peak = {"anonymous": max(peak["anonymous"], anonymous), "file": max(peak["file"], file), "both": max(peak["both"], anonymous + file)}
            except (KeyError, OSError):
                pass
            time.sleep(0.02)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise ValueError(f"{' '.join(command)[:200]} failed: {output[-2000:]}")
    return output, {"seconds": round(time.time() - start, 1), "peak GB": {k: round(v, 2) for k, v in peak.items()}}


LOAD = """
import time, torch, model
start = time.time()
net, vae = model.load_mmdit("{file}", "{device}", torch.{dtype}), model.load_vae("{file}", "{device}", torch.{dtype})
print("LOADED", time.time() - start, sum(p.numel() for p in net.parameters()) + net.pos_embed.numel(), sum(p.numel() for p in vae.parameters()))
start = time.time()
total = sum(float(p.float().sum()) for p in net.parameters())
print("TOUCHED", time.time() - start)
"""
# The scripts themselves, with a line on the GPU's peak memory at the end.
SCRIPT = """
import runpy, sys, torch
sys.argv = {argv}
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    if torch.cuda.is_available():
        print("GPU GB", torch.cuda.max_memory_allocated() / 1e9)
"""


def script(name, *argv):
    return ["-c", SCRIPT.format(argv=[name, *map(str, argv)], script=str(ROOT / name))]


# ------------------------------------------------------------------ rewards


def bare(cls, net, device, dtype, **attributes):
    """A scorer without its weights: net as it was initialised."""
    one = object.__new__(cls)
    one.net = net.eval().requires_grad_(False).to(device, dtype)
    vars(one).update(attributes)
    return one


def reward_networks(device, dtype, tokenizer):
    """name -> function that makes the scorer at its published size with random weights, and what it is called with."""
    import deqa
    import detectors
    import scorers
    from transformers import (BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerModel,
                              PPOCRV5ServerDetConfig, PPOCRV5ServerDetForObjectDetection, PPOCRV5ServerRecConfig, PPOCRV5ServerRecForTextRecognition, SwinConfig)

    def clip(width, layers, heads, text_width, text_layers, out):
        return CLIPModel(CLIPConfig(projection_dim=out, vision_config=dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                                                                           patch_size=14, image_size=224),
                                    text_config=dict(hidden_size=text_width, num_hidden_layers=text_layers, num_attention_heads=text_width // 64, intermediate_size=4 * text_width)))

    def head():
        layers = [torch.nn.Linear(a, b) for a, b in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))]
        return torch.nn.Sequential(*layers)

    def large():
        return clip(1024, 24, 16, 768, 12, 768)

    def huge():
        return clip(1280, 32, 16, 1024, 24, 1024)

    def aesthetic():
        both = large()
        return bare(scorers.Aesthetic, torch.nn.ModuleDict({"vision": both.vision_model, "projection": both.visual_projection, "head": head()}), device, torch.float32)

    def imagereward():
        vision = BlipVisionModel(BlipVisionConfig(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, num_attention_heads=16, patch_size=16, image_size=224))
        text = BlipTextModel(BlipTextConfig(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12,
                                            is_decoder=True), add_pooling_layer=False)
        words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *("##" + c for c in "abcdefghijklmnopqrstuvwxyz")])}
        return bare(scorers.ImageReward, torch.nn.ModuleDict({"vision": vision, "text": text, "head": head()}), device, torch.float32, tokenizer=BertTokenizer(vocab=words))

    def detector():
        swin = SwinConfig(image_size=384, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=["stage1", "stage2", "stage3", "stage4"])
        mask2former = torch.nn.Module()
        mask2former.model, mask2former.class_predictor = Mask2FormerModel(Mask2FormerConfig(backbone_config=swin, num_labels=80)), torch.nn.Linear(256, 81)
        mask2former.forward = detectors.Mask2Former.forward.__get__(mask2former)
        return bare(detectors.Detector, torch.nn.ModuleDict({"detector": mask2former, "clip": large()}), device, torch.float32, tokenizer=tokenizer, classifiers={})

    def reader():      # how many boxes random weights see means nothing: the text detector, and two lines of text an image
        intraclass = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}      # transformers' config has no default for these
        for name, k in (("long", 7), ("mid", 5), ("short", 3)):
            intraclass[f"vertical_long_to_small_conv_{name}ratio"] = [[k, 1], [1, 1], [k // 2, 0]]
            intraclass[f"horizontal_small_to_long_conv_{name}ratio"] = [[1, k], [1, 1], [0, k // 2]]
            intraclass[f"symmetric_conv_long_{name}ratio"] = [[k, k], [1, 1], [k // 2, k // 2]]
        config = PPOCRV5ServerDetConfig(intraclass_block_config=intraclass, scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2])
        net = torch.nn.ModuleDict({"det": PPOCRV5ServerDetForObjectDetection(config), "rec": PPOCRV5ServerRecForTextRecognition(PPOCRV5ServerRecConfig())})
        one = bare(detectors.Reader, net, device, torch.float32, characters=["a"] * 18385)

        def read(images, prompts):
            one.net["det"](detectors.text_detector_input(detectors.grey_levels(images)).to(device))
            one.recognise([detectors.to_pil(image[:, :48, :320]) for image in detectors.grey_levels(images) for _ in range(2)])
        read.net = net
        return read

    def deqa_scorer():
        config = {"model_type": "mplug_owl2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
                  "visual_config": {"visual_model": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
                                                     "patch_size": 14, "layer_norm_eps": 1e-6},
                                    "visual_abstractor": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
                                                          "num_learnable_queries": 64, "layer_norm_eps": 1e-6}}}
        with torch.device("meta"):
            net = deqa.Owl2(config)
        net = net.to(torch.bfloat16).to_empty(device=device)      # 16 GB: float32 would not fit this machine
        for x in net.state_dict().values():
            x.normal_(0, 0.02)
        return bare(deqa.DeQA, net, device, torch.bfloat16, batch=8)

    def clip_logit(net, pixels):
        return lambda: bare(scorers.ClipLogit, net(), device, dtype, scale=100.0, tokenizer=tokenizer, pixels=pixels)

    return {"pickscore": clip_logit(huge, scorers.clip_pixels), "clipscore": clip_logit(large, scorers.clipscore_pixels), "hpsv2": lambda: bare(scorers.HPSv2, huge(), device, dtype, tokenizer=tokenizer),
            "aesthetic": aesthetic, "imagereward": imagereward, "geneval detector": detector, "ocr reader (server)": reader, "deqa (bfloat16)": deqa_scorer}


@torch.no_grad()
def rewards(cfg):
    """Images a second at batch 8, 512 x 512, after one image to warm up."""
    import tempfile
    sys.path.insert(0, str(ROOT / "tests"))
    import mini_sd3
    from transformers import AutoTokenizer
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        mini_sd3.write_tokenizers(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    images, results = torch.rand(8, 3, 512, 512, device=cfg.device), {}
    metas = [{"tag": "colors", "prompt": "a photo of a red cat", "include": [{"class": "cat", "count": 1, "color": "red"}]}] * 8
    networks = reward_networks(torch.device(cfg.device), torch.float32 if cfg.device == "cpu" else torch.float16, tokenizer)
    for name in cfg.names or networks:
        one = networks[name]()
        said = metas if name == "geneval detector" else [m["prompt"] for m in metas]
        one(images[:1], said[:1])
        start = time.time()
        one(images, said)
        if cfg.device == "cuda":
            torch.cuda.synchronize()
        results[name] = {"images/s": round(8 / (time.time() - start), 3), "million parameters": round(sum(p.numel() for p in one.net.parameters()) / 1e6)}
        print(name, results[name], flush=True)
        del one
    return results


def cpu_name():
    return next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")


def main(cfg):
    if "rewards" in cfg.parts:
        out = Path(cfg.out or ROOT / f"results/rewards-{cfg.device}.json")
        old = json.loads(out.read_text())["rewards"] if out.exists() and cfg.names else {}
        util.write_atomic(out, json.dumps({"settings": asdict(cfg), "torch": torch.__version__, "cpu": cpu_name(), "rewards": {**old, **rewards(cfg)}}, indent=1))
        return print(f"wrote {out}")
    folder, results = Path(cfg.folder).resolve(), {"settings": asdict(cfg), "torch": torch.__version__, "machine": os.uname().nodename}
    if not (folder / "sd3.5_medium.safetensors").exists():
        start = time.time()
        make(folder)
        print(f"made {folder} in {time.time() - start:.0f} s")
    results["cpu"] = cpu_name()
    if cfg.device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
    file, common = folder / "sd3.5_medium.safetensors", ["--model", folder, "--size", cfg.size, "--device", cfg.device]
    if "load" in cfg.parts:
        for dtype in ("bfloat16", "float32"):
            output, seen = watch(["-c", LOAD.format(file=file, device=cfg.device, dtype=dtype)], cfg)
            _, seconds, net, vae = next(line for line in output.splitlines() if line.startswith("LOADED")).split()
            touched = float(next(line for line in output.splitlines() if line.startswith("TOUCHED")).split()[1])
            size = 2 if dtype == "bfloat16" else 4
            results[f"load as {dtype}"] = {"load seconds": round(float(seconds), 2), "then reading every weight": round(touched, 2), "weights GB": round((int(net) + int(vae)) * size / 1e9, 2),
                                           "parameters": [int(net), int(vae)], **seen}
            print(f"load as {dtype}", results[f"load as {dtype}"], flush=True)
    if "step" in cfg.parts:         # prompts are encoded (and on the disk) after the first; two runs with one and three steps tell what a step takes
        seen = {}
        for steps in (1, 1, 3):
            output, seen[steps] = watch(script("eval.py", *common, "--prompt", "a red cat", "--steps", steps, "--guidance", 4.5, "--out", "runs/bench"), cfg)
        results["guided step"] = {"seconds a guided step (two forwards, batch 1)": round((seen[3]["seconds"] - seen[1]["seconds"]) / 2, 2), "whole command, 3 steps, decoded": seen[3],
                                  "gpu": [line for line in output.splitlines() if line.startswith("GPU")]}
        print("guided step", results["guided step"], flush=True)
    if "opd" in cfg.parts:          # one iteration, one image a teacher; two steps, of which one has noise and is supervised
        name = f"bench-{os.getpid()}"
        output, seen = watch(script("train_opd.py", *common, "--teachers", *(f"{t}={folder / t}" for t in ("geneval", "ocr", "quality")), "--anchor", "quality", "--ratio", "geneval=1",
                                    "ocr=1", "quality=0", "--iters", 1, "--batch", 2, "--group", 1, "--updates", 1, "--steps", 2, "--noisy", 0, 1, "--micro", 1, "--checkpointing",
                                    "--name", name), cfg)
        row = json.loads((Path("runs") / name / "log.jsonl").read_text())
        results["opd update"] = {**{k: row[k] for k in ("s/it", "kl", "kl_anchor", "grad_norm")}, "whole command": seen, "gpu": [line for line in output.splitlines() if line.startswith("GPU")]}
        print("opd update", results["opd update"], flush=True)
    out = Path(cfg.out or ROOT / f"results/fullsize-{cfg.device}-{cfg.size}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    util.run(main, Config)
