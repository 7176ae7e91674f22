"""The reward networks of scorers/ in their published sizes, with random weights."""
import functools
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerModel,
    PPOCRV5ServerDetConfig,
    PPOCRV5ServerDetForObjectDetection,
    PPOCRV5ServerRecConfig,
    PPOCRV5ServerRecForTextRecognition,
    SwinConfig,
)

from experiments.random_sd3 import write_tokenizers
from scorers.clip import Aesthetic, CLIPScore, HPSv2, PickScore
from scorers.deqa import DeQA, Owl2
from scorers.geneval import Detector, Mask2Former
from scorers.imagereward import ImageReward
from scorers.ocr import Reader, text_detector_input
from scorers.pixels import to_pil


def bare(cls, net, device, dtype=torch.float32, **attributes):
    """A scorer of class cls that loads no weights. Its net keeps the weights that it has."""
    scorer = object.__new__(cls)
    scorer.net = net.eval().requires_grad_(False).to(device, dtype)
    vars(scorer).update(attributes)
    return scorer


# ------------------------------------------------------------------ CLIP


@functools.cache
def clip_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(Path(folder))
        return AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")


def clip(width, layers, text_width, text_layers, out):
    vision = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=16,
                  intermediate_size=4 * width, patch_size=14, image_size=224)
    text = dict(hidden_size=text_width, num_hidden_layers=text_layers,
                num_attention_heads=text_width // 64, intermediate_size=4 * text_width)
    return CLIPModel(CLIPConfig(projection_dim=out, vision_config=vision, text_config=text))


def clip_large():
    return clip(1024, 24, 768, 12, 768)


def clip_huge():
    return clip(1280, 32, 1024, 24, 1024)


def score_head():
    """The head that the aesthetic predictor and ImageReward both have."""
    sizes = [768, 1024, 128, 64, 16, 1]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))


def pickscore(device, dtype):
    return bare(PickScore, clip_huge(), device, dtype, scale=100.0, tokenizer=clip_tokenizer())


def clipscore(device, dtype):
    return bare(CLIPScore, clip_large(), device, dtype, scale=100.0, tokenizer=clip_tokenizer())


def hpsv2(device, dtype):
    return bare(HPSv2, clip_huge(), device, dtype, tokenizer=clip_tokenizer())


def aesthetic(device, dtype):
    both = clip_large()
    net = nn.ModuleDict({"vision": both.vision_model, "projection": both.visual_projection,
                         "head": score_head()})
    return bare(Aesthetic, net, device)


# ------------------------------------------------------------------ ImageReward


def bert_tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += ["##" + letter for letter in letters]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def imagereward(device, dtype):
    vision = BlipVisionConfig(hidden_size=1024, num_hidden_layers=24, intermediate_size=4096,
                              num_attention_heads=16, patch_size=16, image_size=224)
    text = BlipTextConfig(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024,
                          num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12,
                          is_decoder=True)
    net = nn.ModuleDict({"vision": BlipVisionModel(vision),
                         "text": BlipTextModel(text, add_pooling_layer=False),
                         "head": score_head()})
    return bare(ImageReward, net, device, tokenizer=bert_tokenizer())


# ------------------------------------------------------------------ DeQA


def deqa(device, dtype):
    """It is in bfloat16 (16 GB). In float32 it did not fit the machine that it was written on."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 448, "patch_size": 14,
              "layer_norm_eps": 1e-6}
    abstractor = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
                  "num_attention_heads": 16, "num_learnable_queries": 64, "layer_norm_eps": 1e-6}
    config = {"model_type": "mplug_owl2", "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
              "rms_norm_eps": 1e-5,
              "visual_config": {"visual_model": vision, "visual_abstractor": abstractor}}
    with torch.device("meta"):
        net = Owl2(config)
    net = net.to(torch.bfloat16).to_empty(device=device)
    for tensor in net.state_dict().values():
        tensor.normal_(0, 0.02)
    return bare(DeQA, net, device, torch.bfloat16, batch=8)


# ------------------------------------------------------------------ GenEval's detector


def detector(device, dtype):
    swin = SwinConfig(image_size=384, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24],
                      window_size=7, out_features=["stage1", "stage2", "stage3", "stage4"])
    mask2former = Mask2Former.__new__(Mask2Former)
    nn.Module.__init__(mask2former)
    mask2former.model = Mask2FormerModel(Mask2FormerConfig(backbone_config=swin, num_labels=80))
    mask2former.class_predictor = nn.Linear(256, 81)
    net = nn.ModuleDict({"detector": mask2former, "clip": clip_large()})
    return bare(Detector, net, device, tokenizer=clip_tokenizer(), classifiers={})


# ------------------------------------------------------------------ OCR's reader


class TwoLines(Reader):
    """A Reader that always reads two lines of text in each image.

    The text detector runs, but its result is ignored: with random weights it means nothing.
    """

    def __call__(self, images, prompts):
        return super().__call__(images)

    def find_lines(self, pixels):
        net = self.net["det"]
        net(text_detector_input(pixels.to(net.device)))
        return [[to_pil(image[:, :48, :320])] * 2 for image in pixels]


def intraclass_blocks():
    """The intraclass_block_config of the text detector, which has no default in transformers."""
    config = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for name, k in (("long", 7), ("mid", 5), ("short", 3)):
        config[f"vertical_long_to_small_conv_{name}ratio"] = [[k, 1], [1, 1], [k // 2, 0]]
        config[f"horizontal_small_to_long_conv_{name}ratio"] = [[1, k], [1, 1], [0, k // 2]]
        config[f"symmetric_conv_long_{name}ratio"] = [[k, k], [1, 1], [k // 2, k // 2]]
    return config


def reader(device, dtype):
    config = PPOCRV5ServerDetConfig(intraclass_block_config=intraclass_blocks(),
                                    scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2])
    net = nn.ModuleDict({"det": PPOCRV5ServerDetForObjectDetection(config),
                         "rec": PPOCRV5ServerRecForTextRecognition(PPOCRV5ServerRecConfig())})
    return bare(TwoLines, net, device, characters=["a"] * 18385)


# Name of a scorer (see scorers.get) -> function (device, dtype) that makes it with random weights.
# Some functions ignore dtype, because their scorer computes in a fixed one.
RANDOM = {
    "clip.PickScore": pickscore,
    "clip.CLIPScore": clipscore,
    "clip.HPSv2": hpsv2,
    "clip.Aesthetic": aesthetic,
    "imagereward.ImageReward": imagereward,
    "deqa.DeQA": deqa,
    "geneval.Detector": detector,
    "ocr.Reader": reader,
}
