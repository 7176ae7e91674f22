"""Neural rewards from their published weights, on torch and transformers alone, and judges behind an OpenAI-compatible endpoint.

    scorer = PickScore("cuda", torch.float16)       # loads the weights: once a process
    scorer(images, prompts)                         # (N, 3, H, W) in [0, 1], N str -> (N,) float32 on the CPU, the score as it is reported
    scorer.net.to("cpu")                            # out of the policy's way; it scores wherever its net is

What is reported, and what flow_grpo trains on (yifan123/flow_grpo and CostaliyA/Flow-OPD, flow_grpo/*_scorer.py, rewards.py):
| scorer | reported | as a training reward |
|---|---|---|
| PickScore (arXiv 2305.01569) | logit scale * cosine, CLIP-H | / 26 |
| CLIPScore | logit scale * cosine, CLIP ViT-L/14 | / 30 |
| Aesthetic (LAION, sac+logos+ava1) | about 1 to 10 | the same |
| HPSv2 (v2.1, arXiv 2306.09341) | cosine, OpenCLIP ViT-H-14 | the same |
| ImageReward (arXiv 2304.05977) | standardised, about -2 to 2 | the same |
| VLMJudge | 1 to 5 | / 5 |
| jpeg_incompressibility (DDPO, arXiv 2305.13301) | kB | the same |
| jpeg_compressibility | -kB | / 500 (DDPO: the same) |
"""
import base64
import html
import http.client
import io
import json
import math
import os
import re
import threading
import unicodedata
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)  # openai/CLIP clip/clip.py
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)


# ------------------------------------------------------------------ weights: where they are found, and how they are loaded


def weights(repo, *files):
    """Path of the folder with the hub repository's files, each a name or a pattern such as "*.safetensors".

    It is $REWARD_MODELS/NAME, NAME the part of repo after the slash, if that folder is there; else they are downloaded, or found in
    huggingface_hub's cache.
    """
    from huggingface_hub import snapshot_download
    name, root = repo.split("/")[-1], os.environ.get("REWARD_MODELS")
    mend = f"put {', '.join(files)} of {repo} into $REWARD_MODELS/{name}, or give this machine a network"
    if root and (Path(root) / name).is_dir():
        folder = Path(root) / name
    else:
        looked = f"no folder {Path(root) / name}" if root else "no $REWARD_MODELS"
        try:
            folder = Path(snapshot_download(repo, allow_patterns=list(files)))
        except Exception as error:  # of the network, the hub, the disk: all of them mean that there are no weights
            why = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"weights of {repo}: got {looked}, and from the Hugging Face hub {type(error).__name__} ({why}); {mend}") from error
    missing = [file for file in files if not any(folder.glob(file))]
    if missing:
        raise ValueError(f"weights of {repo}: got no {', '.join(missing)} in {folder}; {mend}")
    return folder


def read_torch(path):
    """What a .pt or .pth file holds, read without running its pickle."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has its own class for each way in which a file can be broken
        why = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"weights {path}: got a file that torch.load(weights_only=True) refuses ({why}), expected the published one; "
                         "download it again") from error


def check_names(source, missing, extra, misshapen):
    """Raise a ValueError that names the tensors, three of a kind at most, unless there are none."""
    def some(kind, names):
        names = sorted(map(str, names))
        return [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"] if names else []

    wrong = some("missing", missing) + some("unknown", extra) + some("misshapen", misshapen)
    if wrong:
        raise ValueError(f"weights {source}: got {' and '.join(wrong)} tensors, expected those of the published file; download it again")


def pretrained(cls, folder, config=None, state=None, dtype=torch.float32, others=(), **options):
    """A transformers model from a folder, or from a config and a state dict that was read from folder; loaded strictly, but for tensors of other parts,
    whose names begin as in others."""
    net, info = cls.from_pretrained(folder if state is None else None, config=config, state_dict=state, dtype=dtype, use_safetensors=True,
                                    output_loading_info=True, ignore_mismatched_sizes=True, **options)  # mismatched ones are refused below
    extra = [name for name in info["unexpected_keys"] if not name.startswith(tuple(others))]
    check_names(folder, info["missing_keys"], extra, [name for name, *_ in info["mismatched_keys"]])
    return net.eval().requires_grad_(False)


def score_head(state, source):
    """The five linear layers, with no activation between them, that Aesthetic and ImageReward end in. state: "layers.0.weight", ..."""
    width = state["layers.0.weight"].shape[-1] if "layers.0.weight" in state else 768
    net = nn.ModuleDict({"layers": nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1))})  # the dropouts do nothing here but give the file's layers their numbers
    own = net.state_dict()
    check_names(source, own.keys() - state.keys(), state.keys() - own.keys(),
                [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape])
    net.load_state_dict(state)
    return net["layers"].eval().requires_grad_(False)


# ------------------------------------------------------------------ images and prompts, as the networks want them


def to_uint8(images):
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8 on the CPU, rounded as flow_grpo's rewards do: what a saved PNG would hold."""
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: got shape {tuple(images.shape)} of {images.dtype}, expected (N, 3, H, W) floats in [0, 1]")
    if not images.isfinite().all():
        raise ValueError("images: got values that are not finite, expected [0, 1]; look for the step of the sampler that made them")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def check_pairs(images, prompts):
    """One prompt an image: else the last operation of a scorer would broadcast without a word."""
    if len(images) != len(prompts) or isinstance(prompts, str):
        raise ValueError(f"scorer: got {len(prompts)} prompts for {len(images)} images, expected a list with one prompt an image")


def normalize(pixels):
    """(N, 3, H, W) in [0, 1] -> as CLIP and all that is built on it want it."""
    return (pixels - CLIP_MEAN) / CLIP_STD


def shortest_to(size, h, w):
    """(height, width) of an image whose shortest side becomes size; the other is rounded down, as transformers and torchvision do."""
    return size * h // min(h, w), size * w // min(h, w)


def clip_pixels(images, size, crop=math.floor):
    """CLIP's input (N, 3, size, size): shortest side to size by Pillow's bicubic, in grey levels; centre crop; normalise.

    crop rounds half a pixel: transformers' processor takes the floor, torchvision's CenterCrop rounds to even.
    """
    arrays = to_uint8(images)
    height, width = shortest_to(size, *arrays.shape[1:3])
    top, left = crop((height - size) / 2), crop((width - size) / 2)
    box = (left, top, left + size, top + size)
    pixels = np.stack([np.asarray(Image.fromarray(a).resize((width, height), Image.Resampling.BICUBIC).crop(box)) for a in arrays])
    return normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)


def as_floats(images):
    """The same grey levels as a saved PNG's, as ToTensor gives them: (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2) / 255


def resize_floats(pixels, height, width, mode):
    """As torchvision resizes tensors, smoothed first by default since 0.17; what overshoots [0, 1] stays."""
    return F.interpolate(pixels, (height, width), mode=mode, antialias=True) if pixels.shape[2:] != (height, width) else pixels


def clipscore_pixels(images, size):
    """flow_grpo's CLIPScore's input (N, 3, size, size): as CLIP's, but bilinear (torchvision's default) and on floats (flow_grpo/clip_scorer.py)."""
    pixels = as_floats(images)
    height, width = shortest_to(size, *pixels.shape[2:])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalize(resize_floats(pixels, height, width, "bilinear")[:, :, top:top + size, left:left + size])


def hps_pixels(images, size):
    """HPSv2's input (N, 3, size, size): LONGEST side to size, on floats, black bars (hpsv2/src/open_clip/transform.py, ResizeMaxSize)."""
    pixels = as_floats(images)
    scale = size / max(pixels.shape[2:])
    height, width = (round(side * scale) for side in pixels.shape[2:])
    left, top = (size - width) // 2, (size - height) // 2
    return normalize(F.pad(resize_floats(pixels, height, width, "bicubic"), (left, size - width - left, top, size - height - top)))


def clip_tokenizer(repo):
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(weights(repo, "vocab.json", "merges.txt"))


def clip_tokens(tokenizer, prompts):
    """(N, 77) token ids, cut to 77, padded with 0 as OpenCLIP does. With what does not matter: text attends backwards, and the vector
    of a prompt is that of its first end token."""
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return batch.input_ids * batch.attention_mask


# What ftfy.fix_text (OpenCLIP cleans prompts with it) does to well-encoded text: straight quotes, ASCII for full-width characters, letters for
# ligatures, no control characters. DEVIATION: it also mends mojibake, text that was decoded with the wrong table; this does not.
OPEN_CLIP_TABLE = {
    **{c: unicodedata.normalize("NFKC", chr(c)) for c in [*range(0xFF01, 0xFFF0), 0x3000, 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)]},
    **{c: text for c, text in zip(range(0xFB00, 0xFB07), ("ff", "fi", "fl", "ffi", "ffl", "ſt", "st"))}, 0x149: "'n",
    **{c: "'" for c in [0x2BC, *range(0x2018, 0x201C)]},
    **{c: '"' for c in range(0x201C, 0x2020)},
    **{c: None for c in [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]},
}


def open_clip_clean(prompt):
    """A prompt as OpenCLIP's tokenizer cleans it (hpsv2/src/open_clip/tokenizer.py, basic_clean and whitespace_clean)."""
    return " ".join(html.unescape(html.unescape(prompt)).translate(OPEN_CLIP_TABLE).split()).lower()  # NFC comes with transformers' tokenizer


# ------------------------------------------------------------------ CLIP and what is built on it


def cosine(net, pixels, ids):
    """Cosine of each image's and its prompt's embedding: (N,) float32 on the CPU. pixels (N, 3, S, S), ids (N, L)."""
    ids, at = ids.unique(dim=0, return_inverse=True)  # the images of one prompt share its embedding
    image = net.get_image_features(pixels.to(net.device, net.dtype)).pooler_output
    text = net.get_text_features(ids.to(net.device)).pooler_output
    return F.cosine_similarity(image.float(), text.float()[at.to(text.device)]).cpu()


class ClipLogit:
    """logit scale * cosine of a CLIP that transformers has. pixels: the pre-processing."""

    def __init__(self, repo, tokenizer_repo, pixels, device, dtype):
        from transformers import CLIPModel
        net = pretrained(CLIPModel, weights(repo, "config.json", "model.safetensors"))
        self.scale = net.logit_scale.exp().item()  # before half precision rounds the logarithm: 2e-3 there is 2e-3 of the score
        self.net, self.tokenizer, self.pixels = net.to(device, dtype), clip_tokenizer(tokenizer_repo), pixels

    @torch.no_grad()
    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        return self.scale * cosine(self.net, self.pixels(images, self.net.config.vision_config.image_size), clip_tokens(self.tokenizer, prompts))


class PickScore(ClipLogit):
    """CLIP-H fine-tuned on Pick-a-Pic (yuvalkirstain/PickScore README)."""

    def __init__(self, device, dtype):
        super().__init__("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", clip_pixels, device, dtype)


class CLIPScore(ClipLogit):
    """CLIP ViT-L/14 as it is (flow_grpo/clip_scorer.py)."""

    def __init__(self, device, dtype):
        super().__init__("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", clipscore_pixels, device, dtype)


class Aesthetic:
    """LAION's aesthetic predictor: a linear head on the normalised CLIP ViT-L/14 embedding. The prompt plays no part."""

    def __init__(self, device, dtype):
        from transformers import CLIPModel
        clip = pretrained(CLIPModel, weights("openai/clip-vit-large-patch14", "config.json", "model.safetensors"))
        file = "sac+logos+ava1-l14-linearMSE.pth"  # of christophschuhmann/improved-aesthetic-predictor on GitHub; this is its copy on the hub
        path = weights("camenduru/improved-aesthetic-predictor", file) / file
        self.net = nn.ModuleDict({"vision": clip.vision_model.to(dtype), "projection": clip.visual_projection.to(dtype),
                                  "head": score_head(read_torch(path), path)}).to(device)  # the head stays float32

    @torch.no_grad()
    def __call__(self, images, prompts=None):
        vision = self.net["vision"]
        pixels = clip_pixels(images, vision.config.image_size).to(vision.device, vision.dtype)
        image = self.net["projection"](vision(pixels).pooler_output).float()
        return self.net["head"](F.normalize(image, dim=-1))[:, 0].cpu()


def rename(state, table):
    """state under other names: every (pattern, replacement) of table is applied to each, in this order."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


OPEN_CLIP_NAMES = [
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),   # [sic]
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)", r".layer_norm\1"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"\.attn\.(in|out)_proj(_|\.)", r".self_attn.\1_proj."),
]


def clip_state_from_open_clip(state):
    """An OpenCLIP state dict under transformers' names: q, k and v apart, and the two projections, which multiply from the right, transposed."""
    named = {}
    for name, tensor in rename(state, OPEN_CLIP_NAMES).items():
        if ".in_proj." in name:
            named.update({name.replace(".in_proj.", f".{part}_proj."): piece for part, piece in zip("qkv", tensor.chunk(3))})
        else:
            named[name] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
    return named


def clip_config_of(state):
    """The config that fits an OpenCLIP ViT-H state dict. Its shapes tell all but the widths of the heads and the activation."""
    from transformers import CLIPConfig
    layers = {tower: len({name.split("resblocks.")[1].split(".")[0] for name in state if name.startswith(f"{tower}resblocks.")})
              for tower in ("visual.transformer.", "transformer.")}
    (width, _, _, patch), (vocab, text_width) = state["visual.conv1.weight"].shape, state["token_embedding.weight"].shape
    return CLIPConfig(
        projection_dim=state["visual.proj"].shape[1],
        vision_config=dict(hidden_size=width, num_hidden_layers=layers["visual.transformer."], intermediate_size=4 * width,
                           num_attention_heads=width // 80, patch_size=patch, hidden_act="gelu",  # model_configs/ViT-H-14.json: head_width 80
                           image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)),
        text_config=dict(hidden_size=text_width, num_hidden_layers=layers["transformer."], intermediate_size=4 * text_width,
                         num_attention_heads=text_width // 64, vocab_size=vocab, hidden_act="gelu",  # and 16 heads in a width of 1024
                         max_position_embeddings=len(state["positional_embedding"])))


class HPSv2:
    """Human Preference Score v2.1: the cosine of a fine-tuned OpenCLIP ViT-H-14, about 0.2 to 0.35 (tgxs002/HPSv2 hpsv2/img_score.py)."""

    def __init__(self, device, dtype):
        from transformers import CLIPModel
        path = weights("xswu/HPSv2", "HPS_v2.1_compressed.pt") / "HPS_v2.1_compressed.pt"
        state = read_torch(path).get("state_dict", {})
        check_names(path, {"visual.conv1.weight", "visual.proj", "visual.positional_embedding", "token_embedding.weight",
                           "positional_embedding"} - state.keys(), [], [])
        self.net = pretrained(CLIPModel, path, clip_config_of(state), clip_state_from_open_clip(state)).to(device, dtype)
        self.tokenizer = clip_tokenizer("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")

    @torch.no_grad()
    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        pixels = hps_pixels(images, self.net.config.vision_config.image_size)
        return cosine(self.net, pixels, clip_tokens(self.tokenizer, [open_clip_clean(prompt) for prompt in prompts]))


# ------------------------------------------------------------------ ImageReward


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


def blip_configs_of(vision, text):
    """The configs that fit the two state dicts of ImageReward's BLIP (THUDM/ImageReward train/src/config/med_config.json, models/BLIP/vit.py)."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def layers(state, prefix):
        return len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)})

    width, _, _, patch = vision["patch_embed.proj.weight"].shape
    vocab, text_width = text["embeddings.word_embeddings.weight"].shape
    vision_config = BlipVisionConfig(
        hidden_size=width, num_hidden_layers=layers(vision, "blocks."), intermediate_size=4 * width, num_attention_heads=width // 64,
        patch_size=patch, image_size=patch * math.isqrt(vision["pos_embed"].shape[1] - 1), layer_norm_eps=1e-6, hidden_act="gelu")
    text_config = BlipTextConfig(
        vocab_size=vocab, hidden_size=text_width, encoder_hidden_size=width, num_hidden_layers=layers(text, "encoder.layer."),
        intermediate_size=4 * text_width, num_attention_heads=text_width // 64, is_decoder=True,  # that is what adds the cross-attention
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]), layer_norm_eps=1e-12, hidden_act="gelu")
    return vision_config, text_config


class ImageReward:
    """BLIP reads the prompt while it looks at the image; a linear head scores its [CLS]. Standardised over the authors' data."""
    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # THUDM/ImageReward ImageReward/ImageReward.py:80

    def __init__(self, device, dtype):
        from transformers import BertTokenizer, BlipTextModel, BlipVisionModel
        path = weights("THUDM/ImageReward", "ImageReward.pt") / "ImageReward.pt"
        parts = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
        extra = []
        for name, tensor in read_torch(path).items():
            prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
            if prefix:
                parts[prefix][name.removeprefix(prefix)] = tensor
            elif not re.match(r"blip\.(vision|text)_proj\.", name):  # BLIP's contrastive heads: the score does not use them
                extra.append(name)
        vision, text, head = parts.values()
        check_names(path, ({"patch_embed.proj.weight", "pos_embed"} - vision.keys()) | (
            {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"} - text.keys()), extra, [])
        vision_config, text_config = blip_configs_of(vision, text)
        self.net = nn.ModuleDict({
            "vision": pretrained(BlipVisionModel, path, vision_config, rename(vision, BLIP_VISION_NAMES)).to(dtype),
            "text": pretrained(BlipTextModel, path, text_config, text, add_pooling_layer=False).to(dtype),
            "head": score_head(head, path)}).to(device)  # the head stays float32, as in the original
        self.tokenizer = BertTokenizer.from_pretrained(weights("google-bert/bert-base-uncased", "vocab.txt"))
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's own, one token each in a prompt

    @torch.no_grad()
    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        vision, text = self.net["vision"], self.net["text"]
        pixels = clip_pixels(images, vision.config.image_size, crop=round).to(vision.device, vision.dtype)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt").to(vision.device)
        hidden = text(tokens.input_ids, attention_mask=tokens.attention_mask,
                      encoder_hidden_states=vision(pixels).last_hidden_state).last_hidden_state
        return ((self.net["head"](hidden[:, 0].float())[:, 0] - self.MEAN) / self.STD).cpu()


# ------------------------------------------------------------------ vision-language models as judges, behind an endpoint


# What UnifiedReward-7b-v1.5 is asked in flow_grpo/rewards.py (unifiedreward_score_sglang), word for word, since the model was trained on this form
# and other words move its scores. There, too, the image is scaled to 512 x 512.
UNIFIED_REWARD = dict(
    question="<image>\nYou are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two "
             "key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of "
             "depicted objects, their relationships, and attributes as described in the caption.\n2. Overall Image Quality: Examine the visual "
             "quality of this image, including clarity, detail preservation, color accuracy, and overall aesthetic appeal.\nBased on the above "
             "criteria, assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]",
    answer=r"Final Score:[\s*]*(\d+(?:\.\d+)?)", size=512)

# For a general model such as Qwen2.5-VL; the prompt plays no part. DEVIATION: the five levels and the tags are those of flow_grpo/qwenvl.py, the
# wording is not, so compare scores with others asked in these words only.
QWEN_VL = dict(
    question="Judge the visual quality of this image, whatever it shows, on a scale from 1 to 5:\n"
             "1 = bad: very blurred or noisy, badly exposed, the subject cannot be made out, no composition.\n"
             "2 = poor: visibly blurred, flat light, pale colors, an awkward composition that cuts off its subject.\n"
             "3 = fair: in focus and well enough lit, but dull in color and plain in composition.\n"
             "4 = good: sharp and well exposed, with vivid colors and a composition that leads to its subject.\n"
             "5 = excellent: flawless in clarity and exposure, rich in color, and a composition that moves.\n"
             "First write down your reasons between <Thought> and </Thought>. Then give the score, one whole number, as in <Score>3</Score>.",
    answer=r"<Score>\s*(\d+(?:\.\d+)?)\s*</Score>")


class VLMJudge:
    """A score from 1 to 5 by a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang).

        judge = VLMJudge("http://127.0.0.1:17140/v1", "UnifiedReward-7b-v1.5", **UNIFIED_REWARD)

    question: what is asked of each image, {prompt} in it replaced; answer: the pattern whose first group is the score; size: scale images to size x
    size first; workers: requests at a time; timeout: seconds that the server may stay silent; tries: of a request, with pauses of pause, 2 pause,
    4 pause, ... seconds. The key, where the server wants one, is $OPENAI_API_KEY. An image that gets no score in all its tries raises.
    """

    def __init__(self, endpoint, model, question, answer, size=None, workers=16, timeout=120, tries=5, pause=1.0, max_tokens=2048):
        self.url = urlsplit(endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions")
        if self.url.scheme not in ("http", "https") or not self.url.hostname:
            raise ValueError(f"judge: got endpoint {endpoint!r}, expected a URL such as http://127.0.0.1:8000/v1")
        self.endpoint, self.model, self.question, self.answer, self.size = endpoint, model, question, answer, size
        self.workers, self.timeout, self.tries, self.pause, self.max_tokens = workers, timeout, tries, pause, max_tokens
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]*", self.key):  # http.client would refuse it, too, and print it
            raise ValueError("judge: got white space or other than ASCII inside $OPENAI_API_KEY, expected one word; set it anew")
        self.net = nn.Module()  # nothing to move; every scorer has one

    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        stop, pool = threading.Event(), ThreadPoolExecutor(self.workers)
        try:
            futures = [pool.submit(self.score_one, array, prompt, stop) for array, prompt in zip(to_uint8(images), prompts)]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises, where one failed
            return torch.tensor([future.result() for future in futures], dtype=torch.float32)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def score_one(self, array, prompt, stop):
        """Ask until there is a score. A server's refusal (400 to 499) is final, but for 408 and 429, which ask for patience."""
        body = self.body(array, prompt)
        for tried in range(1, self.tries + 1):
            status = cause = None
            try:
                status, text = self.post(body)
                if status == 200:
                    return self.parse(text)
                why = f"HTTP {status}: {text}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause, why = error, f"{type(error).__name__}: {error}"
            final = status is not None and 300 <= status < 500 and status not in (408, 429)
            if final or tried == self.tries or stop.wait(self.pause * 2 ** (tried - 1)):
                break
        raise ValueError(f"judge {self.model}: got {' '.join(why.split())[:300]} from {self.endpoint} (try {tried} of {self.tries}), expected a "
                         "score from 1 to 5; check that the server is up, serves this model, and accepts $OPENAI_API_KEY") from cause

    def body(self, array, prompt):
        image, buffer = Image.fromarray(array), io.BytesIO()
        if self.size:
            image = image.resize((self.size, self.size))
        image.save(buffer, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        return json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}],
                           "temperature": 0, "max_tokens": self.max_tokens})

    def post(self, body):
        """(status, text) of one request. No proxy is used and no redirection followed: the key goes to this host or nowhere."""
        connect = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        connection = connect(self.url.hostname, self.url.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            connection.request("POST", self.url.path + (f"?{self.url.query}" if self.url.query else ""), body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    def parse(self, text):
        """The score in a completion. A ValueError says what was there instead."""
        answer = text
        try:
            answer = json.loads(text)["choices"][0]["message"]["content"]
            score = float(re.search(self.answer, answer)[1])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"no score in the answer {str(answer)[-200:]!r}") from error
        if not 1 <= score <= 5:
            raise ValueError(f"score {score:g} in the answer {answer[-200:]!r}")
        return score


# ------------------------------------------------------------------ file size


def jpeg_incompressibility(images, prompts=None):
    """Size of each image as a JPEG of quality 95, in kB of 1000 bytes: (N,) float32. No weights: a first run's sanity check."""
    sizes = []
    for array in to_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def jpeg_compressibility(images, prompts=None):
    """Minus jpeg_incompressibility."""
    return -jpeg_incompressibility(images)
