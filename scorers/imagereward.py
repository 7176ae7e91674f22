"""ImageReward: BLIP reads the prompt while it looks at the image (arXiv 2304.05977)."""
import math
import re

import torch
from torch import nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from plumbing.files import check_shapes, read_pt, shapes_of
from scorers.pixels import check_pairs, clip_pixels
from scorers.weights import count_layers, pretrained, rename, score_head, weights

VISION = "blip.visual_encoder."
TEXT = "blip.text_encoder."
HEAD = "mlp."
# BLIP's contrastive heads, which the score does not use.
UNUSED = r"blip\.(vision|text)_proj\."
# The tensors whose shapes tell the size of the network.
TELLING = (VISION + "patch_embed.proj.weight", VISION + "pos_embed",
           TEXT + "embeddings.word_embeddings.weight",
           TEXT + "embeddings.position_embeddings.weight",
           HEAD + "layers.0.weight")

# The name in ImageReward.pt -> transformers' name.
BLIP_VISION_NAMES = [
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^blocks", "encoder.layers"),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm(\d)", r".layer_norm\1"),
    (r"\.attn\.proj", ".self_attn.projection"),
    (r"\.attn\.qkv", ".self_attn.qkv"),
]


def split(state, path):
    """The three parts of ImageReward's state dict, without their prefixes: vision, text, head."""
    parts = {VISION: {}, TEXT: {}, HEAD: {}}
    unknown = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif not re.match(UNUSED, name):
            unknown[name] = tensor
    check_shapes({}, shapes_of(unknown), path)
    return parts.values()


def vision_config_of(state):
    """The config that fits the state dict of BLIP's ViT (THUDM/ImageReward models/BLIP/vit.py)."""
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    patches = state["pos_embed"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=count_layers(state, "blocks."),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=patch * math.isqrt(patches),
        layer_norm_eps=1e-6,
        hidden_act="gelu")


def text_config_of(state, image_width):
    """The config that fits BLIP's BERT (THUDM/ImageReward train/src/config/med_config.json)."""
    vocab, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        encoder_hidden_size=image_width,
        num_hidden_layers=count_layers(state, "encoder.layer."),
        num_attention_heads=width // 64,
        is_decoder=True,                                # this adds the cross-attention
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        hidden_act="gelu")


class ImageReward:
    """A linear head scores BLIP's [CLS]. The score is standardised over the authors' data."""
    # THUDM/ImageReward ImageReward/ImageReward.py:80.
    MEAN = 0.16717362830052426
    STD = 1.0333394966054072

    def __init__(self, device, dtype):
        path = weights("THUDM/ImageReward", "ImageReward.pt") / "ImageReward.pt"
        vision_state, text_state, head_state = split(read_pt(path, TELLING, ours=False), path)
        config = vision_config_of(vision_state)
        vision = pretrained(BlipVisionModel, path, config, rename(vision_state, BLIP_VISION_NAMES))
        text = pretrained(BlipTextModel, path, text_config_of(text_state, config.hidden_size),
                          text_state, add_pooling_layer=False)
        self.net = nn.ModuleDict({
            "vision": vision.to(dtype),
            "text": text.to(dtype),
            "head": score_head(head_state, path),       # stays float32, as in the original
        }).to(device)
        vocabulary = weights("google-bert/bert-base-uncased", "vocab.txt")
        self.tokenizer = BertTokenizer.from_pretrained(vocabulary)
        # BLIP adds these two. In a prompt, each of them is one token.
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)

    @torch.no_grad()
    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        vision = self.net["vision"]
        pixels = clip_pixels(images, vision.config.image_size, crop=round)
        image = vision(pixels.to(vision.device, vision.dtype)).last_hidden_state
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=35,
                                return_tensors="pt").to(vision.device)
        hidden = self.net["text"](tokens.input_ids, attention_mask=tokens.attention_mask,
                                  encoder_hidden_states=image).last_hidden_state
        score = self.net["head"](hidden[:, 0].float())[:, 0]
        return ((score - self.MEAN) / self.STD).cpu()
