"""Facts about scorers.py: every network against its original's layout, on random weights; every judge against a real local server."""
import base64
import gzip
import importlib.util
import io
import json
import math
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import BlipTextModel, BlipVisionModel, CLIPConfig, CLIPModel

import scorers
from scorers import (QWEN_VL, UNIFIED_REWARD, Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore, VLMJudge, clip_pixels, clip_tokenizer, clip_tokens,
                     clipscore_pixels, hps_pixels, jpeg_compressibility, jpeg_incompressibility, open_clip_clean, to_uint8, weights)


def test_weights_are_found_in_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    (tmp_path / "NAME").mkdir()
    (tmp_path / "NAME" / "model.safetensors").touch()
    assert weights("owner/NAME", "model.safetensors", "*.safetensors") == tmp_path / "NAME"


def test_weights_come_from_the_hub_where_there_is_no_local_folder(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(tmp_path))
    (tmp_path / "a.pt").touch()
    assert weights("owner/NAME", "a.pt") == tmp_path
    with pytest.raises(ValueError, match="got no b.pt in"):
        weights("owner/NAME", "b.pt")


def test_weights_that_are_missing_from_the_local_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    (tmp_path / "NAME").mkdir()
    with pytest.raises(ValueError, match=r"^weights of owner/NAME: got no b.pt in .*NAME; put a.pt, b.pt of owner/NAME into \$REWARD_MODELS/NAME.*$"):
        (tmp_path / "NAME" / "a.pt").touch()
        weights("owner/NAME", "a.pt", "b.pt")


@pytest.mark.parametrize("root", [True, False])
def test_weights_that_are_nowhere_say_where_they_were_looked_for(tmp_path, monkeypatch, root):
    import huggingface_hub

    def no_network(repo, allow_patterns):
        assert (repo, allow_patterns) == ("owner/NAME", ["a.pt"])
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path)) if root else monkeypatch.delenv("REWARD_MODELS", raising=False)
    looked = f"no folder {tmp_path}/NAME" if root else r"no \$REWARD_MODELS"
    with pytest.raises(ValueError, match=rf"^weights of owner/NAME: got {looked}, and from .* ConnectionError \(no route\); put a.pt of .*network$"):
        weights("owner/NAME", "a.pt")


# ------------------------------------------------------------------ small networks with random weights, on the disk as they are published


PROMPTS = ['A sign that says "Open"; it\'s 24/7!', "a red cat, left of a dog", "x " * 100, 'A sign that says "Open"; it\'s 24/7!']
BPE = Path(importlib.util.find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz" if importlib.util.find_spec("open_clip") else None
needs_bpe = pytest.mark.skipif(BPE is None, reason="CLIP's vocabulary comes from the open_clip package")


def pictures(n=4, h=60, w=60):
    """Smooth shapes with noise, (n, 3, h, w) in [0, 1]."""
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 6, h), torch.linspace(0, 6, w), indexing="ij")
    phase = torch.rand(n, 3, 1, 1, generator=g) * 6
    return ((x * phase).sin() * (y + phase).cos() / 2 + 0.5 + 0.2 * torch.randn(n, 3, h, w, generator=g)).clamp(0, 1)


def randomized(named_shapes, seed=0):
    """A state dict: gains about 1, matrices of a size that keeps activations of order 1, biases and embeddings small."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in named_shapes.items():
        noise = torch.randn(shape, generator=g)
        gain = len(shape) == 1 and name.endswith("weight")
        scale = 1.5 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 and "embed" not in name else 0.3
        state[name] = 1 + 0.1 * noise if gain else scale * noise
    return state


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """$REWARD_MODELS, with CLIP's real vocabulary and BERT's in miniature."""
    root = tmp_path_factory.mktemp("models")
    os.environ["REWARD_MODELS"] = str(root)
    if BPE:
        merges = gzip.open(BPE).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
        visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
        vocab = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
        for name in ("CLIP-ViT-H-14-laion2B-s32B-b79K", "clip-vit-large-patch14"):
            (root / name).mkdir()
            (root / name / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
            (root / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (root / "bert-base-uncased").mkdir()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat dog left of sign that says , \" x ##s ' !".split()
    (root / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words))
    yield root
    del os.environ["REWARD_MODELS"]


def save_clip(folder, act, seed):
    """A CLIP of transformers with 2 layers, 3 x 3 patches of 14 and heads of 64, saved in folder."""
    config = CLIPConfig(projection_dim=48, vision_config=dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                                                              image_size=42, patch_size=14, hidden_act=act),
                        text_config=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128, hidden_act=act))
    net = CLIPModel(config).eval()
    net.load_state_dict(randomized(shapes(net), seed) | {"logit_scale": torch.tensor(4.6052)})
    folder.mkdir(exist_ok=True)
    net.save_pretrained(folder)
    return net


def varied(scores, spread=1e-3):
    """Scores that would show an error: they differ by image and by prompt, all but the first and last, where the prompts are equal."""
    return scores.std() > spread and scores.isfinite().all() and scores.shape == (4,) and scores.dtype == torch.float32


# ------------------------------------------------------------------ pre-processing


SIZES = [(512, 512), (300, 451), (451, 300), (224, 224), (100, 77), (224, 227), (235, 224)]  # the last two: an odd number to crop


def levels(pixels):
    """Undo the normalisation: grey levels, 0 to 255."""
    return (pixels * scorers.CLIP_STD + scorers.CLIP_MEAN) * 255


@pytest.mark.parametrize("h, w", SIZES)
def test_clip_pixels_are_those_of_the_transformers_processor(h, w):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    images = pictures(2, h, w)
    pils = [Image.fromarray(array) for array in to_uint8(images)]
    theirs = CLIPImageProcessorPil()(pils, return_tensors="pt").pixel_values
    assert (levels(clip_pixels(images, 224)) - levels(theirs)).abs().max() < 0.01


def torchvision_box(h, w, size):
    """((height, width), top, left) of torchvision's Resize(size) and CenterCrop(size)."""
    new = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    return new, int(round((new[0] - size) / 2.0)), int(round((new[1] - size) / 2.0))


@pytest.mark.parametrize("h, w", SIZES)
def test_clip_pixels_with_crop_round_are_those_of_torchvision_on_pillow_images(h, w):
    images, ((height, width), top, left) = pictures(2, h, w), torchvision_box(h, w, 224)
    pils = [Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC) for array in to_uint8(images)]
    theirs = np.stack([np.asarray(pil)[top:top + 224, left:left + 224] for pil in pils]).transpose(0, 3, 1, 2)
    assert np.abs(levels(clip_pixels(images, 224, round)).numpy() - theirs).max() < 0.01


def resize_planes(array, height, width, resample):
    """(h, w, 3) grey levels -> (3, height, width), by Pillow in floating point."""
    return np.stack([Image.fromarray(array[:, :, c].astype("float32")).resize((width, height), resample) for c in range(3)])


@pytest.mark.parametrize("h, w", SIZES)
def test_clipscore_pixels_are_bilinear_on_floats(h, w):
    images, ((height, width), top, left) = pictures(2, h, w), torchvision_box(h, w, 224)
    for array, ours in zip(to_uint8(images), levels(clipscore_pixels(images, 224))):
        theirs = resize_planes(array, height, width, Image.Resampling.BILINEAR)[:, top:top + 224, left:left + 224]
        assert np.abs(ours.numpy() - theirs).max() < 0.01


@pytest.mark.parametrize("h, w", SIZES)
def test_hps_pixels_scale_the_longest_side_and_pad_with_black(h, w):
    images = pictures(2, h, w)
    ours, scale = levels(hps_pixels(images, 224)), 224 / max(h, w)
    new_h, new_w = round(h * scale), round(w * scale)
    top, left = (224 - new_h) // 2, (224 - new_w) // 2
    for array, image in zip(to_uint8(images), ours):
        theirs = np.zeros((3, 224, 224), "float32")
        theirs[:, top:top + new_h, left:left + new_w] = resize_planes(array, new_h, new_w, Image.Resampling.BICUBIC)
        assert np.abs(image.numpy() - theirs).max() < 0.01


def test_images_are_rounded_to_grey_levels_and_clipped():
    images = torch.tensor([-0.1, 0.4999 / 255, 0.5001 / 255, 1.2]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 1, 255]
    half = torch.linspace(0, 1, 999).bfloat16().reshape(1, 3, 9, 37)
    assert np.array_equal(to_uint8(half), to_uint8(half.float()))  # multiplied in float32: bfloat16 would round 101.3 to 101.5, and that to 102


@pytest.mark.parametrize("images, got", [
    (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\)"),
    (torch.zeros(1, 4, 4, 3), r"shape \(1, 4, 4, 3\)"),
    (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "torch.uint8"),
    (torch.full((1, 3, 4, 4), float("nan")), "not finite"),
])
def test_images_that_are_no_images_are_refused(images, got):
    with pytest.raises(ValueError, match=f"^images: got .*{got}"):
        to_uint8(images)


# ------------------------------------------------------------------ tokens


@pytest.fixture(scope="session")
def open_clip():
    """The open_clip package. It imports torchvision, and ftfy wcwidth, for what is not used here: stand-ins will do."""
    names = ["wcwidth", "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops", "torchvision.ops.misc"]
    names = [name for name in names if not importlib.util.find_spec(name.split(".")[0])]
    sys.modules.update({name: MagicMock() for name in names})
    try:
        return pytest.importorskip("open_clip", reason="the original that HPSv2 is compared with")
    finally:
        for name in names:
            del sys.modules[name]


TEXTS = PROMPTS + [
    "", "   ", "don't we'll THEY'RE I'd 's", "3.14 100% #1 @you", "naïve café Å É", "e\u0301 decomposed", "日本語 の テスト", "Привет мир",
    "🐱🐶 emoji 👩‍🚀", "An astronaut’s “glove” ‘floating’", "A &amp; B &lt;b&gt; &amp;quot;C&amp;quot;", "ＦＵＬＬ　ｗｉｄｔｈ！", "ﬁne ﬂower oﬃce",
    "tab\tand\nnew\r\nline", "zero\u200bwidth no\u00a0break", "dash – em — …", "bell\x07 feff\ufeff", "İstanbul ΣΑΣ straße", "ĳs Ǆ ŉ", "½ ² ™ ①",
    "a" * 300, "word " * 74, "word " * 75, "word " * 76, "hello!!! ?? ...",
]


@needs_bpe
def test_clip_tokens_are_those_of_open_clip(models, open_clip):
    pytest.importorskip("ftfy", reason="open_clip cleans prompts with it")
    ours = clip_tokens(clip_tokenizer("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"), [open_clip_clean(text) for text in TEXTS])
    theirs = open_clip.tokenize(TEXTS)
    for text, a, b in zip(TEXTS, ours, theirs):
        assert torch.equal(a, b), repr(text)
    assert ours.shape == (len(TEXTS), 77) and ours[:, 0].eq(49406).all() and ours.max(1).values.eq(49407).all()


# ------------------------------------------------------------------ CLIP's family


def readme_logits(net, tokenizer, pixels, prompts):
    """logit scale * cosine as PickScore's README has it, but for the pixels."""
    text = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image = net.get_image_features(pixel_values=pixels).pooler_output
    text = net.get_text_features(**text).pooler_output
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    return (net.logit_scale.exp() * (text @ image.T)).diagonal()


@needs_bpe
@torch.no_grad()
def test_pickscore_is_the_readmes(models):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    net, images = save_clip(models / "PickScore_v1", "gelu", 1), pictures(4, 60, 94)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    pixels = processor([Image.fromarray(array) for array in to_uint8(images)], return_tensors="pt").pixel_values
    scorer = PickScore("cpu", torch.float32)
    theirs = readme_logits(net, scorer.tokenizer, pixels, PROMPTS)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-4)


@needs_bpe
@torch.no_grad()
def test_clipscore_is_flow_grpos_before_it_divides(models):
    net, images = save_clip(models / "clip-vit-large-patch14", "quick_gelu", 2), pictures(4, 60, 94)
    scorer = CLIPScore("cpu", torch.float32)
    (height, width), top, left = torchvision_box(60, 94, 42)
    planes = np.stack([resize_planes(array, height, width, Image.Resampling.BILINEAR) for array in to_uint8(images)])
    pixels = (torch.from_numpy(planes[:, :, top:top + 42, left:left + 42] / 255) - scorers.CLIP_MEAN) / scorers.CLIP_STD
    theirs = readme_logits(net, scorer.tokenizer, pixels, PROMPTS)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-3)  # 1e-5 of the scale: two float resizes


@needs_bpe
def test_half_precision_moves_a_score_by_less_than_a_hundredth_of_the_scale(models):
    save_clip(models / "PickScore_v1", "gelu", 1)
    images = pictures(4)
    exact, half = PickScore("cpu", torch.float32), PickScore("cpu", torch.bfloat16)
    assert half.net.dtype == torch.bfloat16 and half.scale == exact.scale == pytest.approx(100, rel=1e-4)
    assert (half(images, PROMPTS) - exact(images, PROMPTS)).abs().max() < 1
    assert half(images, PROMPTS).dtype == torch.float32


@needs_bpe
def test_a_scorer_scores_each_pair_by_itself(models):
    save_clip(models / "PickScore_v1", "gelu", 1)
    scorer, images = PickScore("cpu", torch.float32), pictures(4)
    together = scorer(images, PROMPTS)
    apart = torch.cat([scorer(images[i:i + 1], PROMPTS[i:i + 1]) for i in range(4)])
    assert torch.allclose(together, apart, atol=1e-4)
    for prompts in (PROMPTS[:1], PROMPTS[0], PROMPTS * 2):
        with pytest.raises(ValueError, match="^scorer: got .* prompts for 4 images, expected"):
            scorer(images, prompts)


AESTHETIC_SHAPES = {"layers.0.weight": (1024, 48), "layers.0.bias": (1024,), "layers.2.weight": (128, 1024), "layers.2.bias": (128,),
                    "layers.4.weight": (64, 128), "layers.4.bias": (64,), "layers.6.weight": (16, 64), "layers.6.bias": (16,),
                    "layers.7.weight": (1, 16), "layers.7.bias": (1,)}  # as read from the published file, but for 768 inputs


def affine(x, state, prefix=""):
    """The head by hand: one linear layer after the other."""
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"{prefix}layers.{i}.weight"].T + state[f"{prefix}layers.{i}.bias"]
    return x[:, 0]


@needs_bpe
@torch.no_grad()
def test_aesthetic_is_the_published_head_on_the_normalised_embedding(models):
    net, images, head = save_clip(models / "clip-vit-large-patch14", "quick_gelu", 2), pictures(), randomized(AESTHETIC_SHAPES, 3)
    (models / "improved-aesthetic-predictor").mkdir(exist_ok=True)
    torch.save(head, models / "improved-aesthetic-predictor" / "sac+logos+ava1-l14-linearMSE.pth")
    embedding = net.get_image_features(pixel_values=clip_pixels(images, 42)).pooler_output
    theirs = affine(embedding / embedding.norm(dim=-1, keepdim=True), head)
    scorer = Aesthetic("cpu", torch.float32)
    assert varied(theirs) and torch.allclose(scorer(images), theirs, atol=1e-4) and torch.equal(scorer(images, PROMPTS), scorer(images))
    assert Aesthetic("cpu", torch.bfloat16).net["head"][0].weight.dtype == torch.float32


def open_clip_model(open_clip, layers=2, width=160, text_width=128, dim=48, image_size=42, text_layers=2):
    """OpenCLIP with the branches of its ViT-H-14: heads of 80 and 64, patches of 14, GELU."""
    return open_clip.CLIP(dim, open_clip.CLIPVisionCfg(layers=layers, width=width, head_width=80, patch_size=14, image_size=image_size),
                          open_clip.CLIPTextCfg(width=text_width, heads=text_width // 64, layers=text_layers)).eval()


@needs_bpe
@torch.no_grad()
def test_hpsv2_is_open_clips_cosine(models, open_clip):
    net, images = open_clip_model(open_clip), pictures(4, 60, 94)
    net.load_state_dict(randomized(shapes(net), 4))
    (models / "HPSv2").mkdir(exist_ok=True)
    torch.save({"epoch": 1, "state_dict": net.state_dict()}, models / "HPSv2" / "HPS_v2.1_compressed.pt")
    image, text, _ = net(hps_pixels(images, 42), open_clip.tokenize(PROMPTS))
    theirs, scorer = (image * text).sum(1), HPSv2("cpu", torch.float32)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-4)


def test_hpsv2_at_its_full_size_has_every_tensor_of_open_clips_vit_h_14(open_clip):
    with torch.device("meta"):
        state = open_clip_model(open_clip, 32, 1280, 1024, 1024, 224, 24).state_dict()
        config = scorers.clip_config_of(state)
        ours = CLIPModel(config)
    assert {name: tuple(t.shape) for name, t in scorers.clip_state_from_open_clip(state).items()} == shapes(ours)
    published = json.loads((BPE.parent / "model_configs" / "ViT-H-14.json").read_text())
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (1280 // 80, published["text_cfg"]["heads"])
    assert published["vision_cfg"] == dict(image_size=config.vision_config.image_size, layers=32, width=1280, head_width=80, patch_size=14)
    assert sum(p.numel() for p in ours.parameters()) == 986_109_441


# ------------------------------------------------------------------ ImageReward


def imagereward_shapes(W=128, depth=2, D=64, layers=2, vocab=40, grid=3, patch=16):
    """Names and shapes of ImageReward.pt, as THUDM/ImageReward's modules make them (models/BLIP/vit.py, med.py, blip_pretrain.py)."""
    def linear(name, n_out, n_in):
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}

    def norm(name, n):
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    s = {v + "cls_token": (1, 1, W), v + "pos_embed": (1, grid * grid + 1, W), v + "patch_embed.proj.weight": (W, 3, patch, patch),
         v + "patch_embed.proj.bias": (W,)}
    for i in range(depth):
        b = f"{v}blocks.{i}."
        s |= norm(b + "norm1", W) | linear(b + "attn.qkv", 3 * W, W) | linear(b + "attn.proj", W, W)
        s |= norm(b + "norm2", W) | linear(b + "mlp.fc1", 4 * W, W) | linear(b + "mlp.fc2", W, 4 * W)
    s |= norm(v + "norm", W)
    s |= {t + "embeddings.word_embeddings.weight": (vocab, D), t + "embeddings.position_embeddings.weight": (512, D)}
    s |= norm(t + "embeddings.LayerNorm", D)
    for i in range(layers):
        b = f"{t}encoder.layer.{i}."
        for kind, width in (("attention", D), ("crossattention", W)):
            s |= linear(f"{b}{kind}.self.query", D, D) | linear(f"{b}{kind}.self.key", D, width) | linear(f"{b}{kind}.self.value", D, width)
            s |= linear(f"{b}{kind}.output.dense", D, D) | norm(f"{b}{kind}.output.LayerNorm", D)
        s |= linear(b + "intermediate.dense", 4 * D, D) | linear(b + "output.dense", D, 4 * D) | norm(b + "output.LayerNorm", D)
    s |= linear("blip.vision_proj", 256, W) | linear("blip.text_proj", 256, D)
    for i, n_out, n_in in ((0, 1024, D), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        s |= linear(f"mlp.layers.{i}", n_out, n_in)
    return s


def blip_by_hand(state, pixels, ids, mask):
    """ImageReward's network from its published names: ViT, BERT with cross-attention in each layer, the head on [CLS], standardised."""
    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x, name, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * state[name + ".weight"] + state[name + ".bias"]

    def attend(q, k, v, bias=0):
        q, k, v = (a.unflatten(-1, (-1, 64)).transpose(1, 2) for a in (q, k, v))  # (B, heads, L, 64)
        return ((q @ k.mT / 8 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, state[v + "patch_embed.proj.weight"], state[v + "patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([state[v + "cls_token"].expand(len(x), -1, -1), x], 1) + state[v + "pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        x = x + linear(attend(*linear(norm(x, b + "norm1", 1e-6), b + "attn.qkv").chunk(3, -1)), b + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
    image = norm(x, v + "norm", 1e-6)

    x = state[t + "embeddings.word_embeddings.weight"][ids] + state[t + "embeddings.position_embeddings.weight"][:ids.shape[1]]
    x, bias = norm(x, t + "embeddings.LayerNorm", 1e-12), -10000.0 * (1 - mask[:, None, None, :].float())
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        for kind, source, source_bias in (("attention", None, bias), ("crossattention", image, 0)):
            source, p = x if source is None else source, b + kind
            y = attend(linear(x, p + ".self.query"), linear(source, p + ".self.key"), linear(source, p + ".self.value"), source_bias)
            x = norm(linear(y, p + ".output.dense") + x, p + ".output.LayerNorm", 1e-12)
        x = norm(linear(F.gelu(linear(x, b + "intermediate.dense")), b + "output.dense") + x, b + "output.LayerNorm", 1e-12)
    return (affine(x[:, 0], state, "mlp.") - 0.16717362830052426) / 1.0333394966054072


def save_imagereward(models, state):
    (models / "ImageReward").mkdir(exist_ok=True)
    torch.save(state, models / "ImageReward" / "ImageReward.pt")


@torch.no_grad()
def test_imagereward_is_the_published_blip(models):
    state, images = randomized(imagereward_shapes(), 5), pictures(4, 60, 94)
    save_imagereward(models, state | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]})  # a buffer of old transformers
    scorer = ImageReward("cpu", torch.float32)
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert scorer.tokenizer(["A [DEC] [ENC]"]).input_ids == [[2, 5, 20, 21, 3]]  # lower case, and BLIP's tokens after BERT's
    assert tokens.input_ids.shape == (4, 35) and tokens.attention_mask[0].sum() < 35 == tokens.attention_mask[2].sum()
    theirs = blip_by_hand(state, clip_pixels(images, 48, crop=round), tokens.input_ids, tokens.attention_mask)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-4)
    short = PROMPTS[:1] * 4  # padded to the longest here and to 35 there
    tokens = scorer.tokenizer(short, padding="max_length", max_length=35, return_tensors="pt")
    theirs = blip_by_hand(state, clip_pixels(images, 48, crop=round), tokens.input_ids, tokens.attention_mask)
    assert torch.allclose(scorer(images, short), theirs, atol=1e-4)
    assert ImageReward("cpu", torch.bfloat16).net["head"][0].weight.dtype == torch.float32


def test_imagereward_at_its_full_size_has_every_tensor_of_the_published_file():
    named = imagereward_shapes(1024, 24, 768, 12, 30524, 14)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in named.items()}
        vision, text = ({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
                        for prefix in ("blip.visual_encoder.", "blip.text_encoder."))
        vision_config, text_config = scorers.blip_configs_of(vision, text)
        ours = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    assert {name: tuple(t.shape) for name, t in scorers.rename(vision, scorers.BLIP_VISION_NAMES).items()} == shapes(ours[0])
    assert {name: tuple(t.shape) for name, t in text.items()} == shapes(ours[1])
    assert (vision_config.image_size, vision_config.num_attention_heads, text_config.num_attention_heads) == (224, 16, 12)


@pytest.mark.parametrize("change, got", [
    (lambda s: s.pop("blip.visual_encoder.norm.bias"), r"1 missing \(post_layernorm.bias\)"),
    (lambda s: s.pop("blip.visual_encoder.pos_embed"), r"1 missing \(pos_embed\)"),
    (lambda s: s.update({"blip.queue": torch.zeros(1)}), r"1 unknown \(blip.queue\)"),
    (lambda s: s.update({"blip.text_encoder.pooler.dense.bias": torch.zeros(1)}), r"1 unknown \(pooler.dense.bias\)"),
    (lambda s: s.update({"blip.visual_encoder.norm.bias": torch.zeros(7)}), r"1 misshapen \(post_layernorm.bias\)"),
    (lambda s: s.update({"mlp.layers.7.bias": torch.zeros(2)}), r"1 misshapen \(layers.7.bias\)"),
    (lambda s: [s.pop(name) for name in list(s) if name.startswith("mlp.")], r"10 missing \(layers.0.bias, layers.0.weight, layers.2.bias, ...\)"),
    (lambda s: s.clear(), r"4 missing \("),
])
def test_weights_that_do_not_fit_are_named(models, change, got):
    state = randomized(imagereward_shapes(), 5)
    change(state)
    save_imagereward(models, state)
    with pytest.raises(ValueError, match=rf"^weights .*ImageReward.pt: got {got}.* tensors, expected"):
        ImageReward("cpu", torch.float32)


@needs_bpe
def test_weights_of_a_clip_that_do_not_fit_are_named(models):
    net = save_clip(models / "PickScore_v1", "gelu", 1)
    state = {name: t for name, t in net.state_dict().items() if name != "logit_scale"} | {"other": torch.zeros(1)}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # a buffer that OpenAI's file has: let it be
    save_file(state, models / "PickScore_v1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^weights .*PickScore_v1: got 1 missing \(logit_scale\) and 1 unknown \(other\) tensors"):
        PickScore("cpu", torch.float32)


def test_hpsv2_from_a_file_of_something_else_is_refused(models):
    (models / "HPSv2").mkdir(exist_ok=True)
    torch.save({"model": {}}, models / "HPSv2" / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"^weights .*HPS_v2.1_compressed.pt: got 5 missing \(positional_embedding, token_embedding.weight"):
        HPSv2("cpu", torch.float32)


class Evil:
    def __reduce__(self):
        return os.putenv, ("EVIL", "1")


def test_a_pickle_is_not_run(tmp_path):
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:100])
    for name in ("evil.pt", "cut.pt"):
        with pytest.raises(ValueError, match=rf"^weights .*{name}: got a file that torch.load\(weights_only=True\) refuses .*download it again$"):
            scorers.read_torch(tmp_path / name)


# ------------------------------------------------------------------ judges, against a real server


class Server:
    """An OpenAI-compatible server on 127.0.0.1. answer(request, n) -> (status, body) or None to stay silent; n counts the requests from 0."""

    def __init__(self):
        self.requests, self.headers, self.answer, self.busy, self.most = [], [], None, 0, 0
        lock, self.release = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    n = len(server.requests)
                    server.requests.append((self.path, request))
                    server.headers.append(dict(self.headers))
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                reply = server.answer(request, n)
                if reply is None:
                    server.release.wait(20)
                    return
                with lock:
                    server.busy -= 1
                body = reply[1].encode()
                self.send_response(reply[0])
                if reply[0] == 302:
                    self.send_header("Location", server.url + "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.close()


def says(text, status=200):
    return status, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def judge(server, style=UNIFIED_REWARD, **options):
    return VLMJudge(server.url, "some-model", **style, **dict(dict(timeout=5, tries=3, pause=0.01), **options))


def text_of(request):
    return next(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")


def image_of(request):
    url = next(part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url")
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_judge_asks_about_each_image_and_its_prompt(server):
    server.answer = lambda request, n: says("Alignment is fine. Final Score: 3.5")
    images, prompts = pictures(2, 8, 12), ["a {cat}", "a dog"]
    scores = judge(server, size=None, style={k: v for k, v in UNIFIED_REWARD.items() if k != "size"})(images, prompts)
    assert scores.tolist() == [3.5, 3.5] and scores.dtype == torch.float32
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    for _, request in server.requests:
        i = prompts.index(re.search(r"Text Caption: \[(.*)\]$", text_of(request))[1])
        assert np.array_equal(np.asarray(image_of(request)), to_uint8(images)[i])
        assert request["model"] == "some-model" and request["temperature"] == 0


def test_unified_reward_sees_512_by_512(server):
    server.answer = lambda request, n: says("Final Score: 1")
    judge(server)(pictures(1, 8, 12), ["a cat"])
    assert image_of(server.requests[0][1]).size == (512, 512)


@pytest.mark.parametrize("style, text, score", [
    (UNIFIED_REWARD, "Final Score: 4", 4), (UNIFIED_REWARD, "Final Score:2.25\n", 2.25), (UNIFIED_REWARD, "**Final Score:** 5/5", 5),
    (QWEN_VL, "<Thought>sharp</Thought>\n<Score>5</Score>", 5), (QWEN_VL, "<Score> 1 </Score>", 1),
])
def test_judge_reads_the_score_in_the_answer(server, style, text, score):
    server.answer = lambda request, n: says(text)
    assert judge(server, style)(pictures(1), ["a cat"]).tolist() == [score]


@pytest.mark.parametrize("reply", [
    says("I like it"), says("Final Score: none"), says("Final Score: 0"), says("Final Score: 45"), says("Final Score: 5.5"), says(None), (200, ""),
    (200, "<html>"), (200, "[]"), (200, "{}"), (200, '{"choices": []}'), (200, '{"choices": [{"message": null}]}'),
    (500, "oops"), (503, ""), (429, "slow down"),
], ids=lambda reply: re.sub(r"\W+", "_", str(reply))[:50])
def test_judge_retries_what_may_pass_and_then_raises_with_the_cause(server, reply):
    server.answer = lambda request, n: reply if n < 2 else says("Final Score: 2")
    assert judge(server)(pictures(1), ["a cat"]).tolist() == [2] and len(server.requests) == 3
    server.requests.clear()
    server.answer = lambda request, n: reply
    cause = f"HTTP {reply[0]}: ?{reply[1]}" if reply[0] != 200 else "ValueError: (no )?score .*in the answer"
    with pytest.raises(ValueError, match=rf"^judge some-model: got {cause} .*from {server.url} \(try 3 of 3\), expected a score from 1 to 5; .*$"):
        judge(server)(pictures(1), ["a cat"])
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404])
def test_judge_takes_a_refusal_as_final(server, status):
    server.answer = lambda request, n: (status, "model not found")
    with pytest.raises(ValueError, match=rf"^judge some-model: got HTTP {status}: model not found from .* \(try 1 of 3\)"):
        judge(server)(pictures(1), ["a cat"])
    assert len(server.requests) == 1  # a redirection is not followed: it could take the key elsewhere


def test_judge_gives_up_on_a_server_that_hangs(server):
    server.answer = lambda request, n: None
    start = time.time()
    with pytest.raises(ValueError, match=r"TimeoutError: timed out from .* \(try 2 of 2\)"):
        judge(server, timeout=0.2, tries=2)(pictures(1), ["a cat"])
    assert 0.4 < time.time() - start < 10


def test_judge_survives_one_hang(server):
    server.answer = lambda request, n: None if n == 0 else says("Final Score: 2")
    assert judge(server, timeout=0.5)(pictures(1), ["a cat"]).tolist() == [2]


def test_judge_names_a_refused_connection(server):
    server.close()
    with pytest.raises(ValueError, match=r"got ConnectionRefusedError: .* from http://127.0.0.1:\d+/v1 \(try 3 of 3\)") as error:
        judge(server)(pictures(1), ["a cat"])
    assert isinstance(error.value.__cause__, ConnectionRefusedError)


def test_judge_backs_off_twice_as_long_each_time(server):
    times = []
    server.answer = lambda request, n: times.append(time.time()) or (500, "")
    with pytest.raises(ValueError):
        judge(server, pause=0.05, tries=4)(pictures(1), ["a cat"])
    assert len(times) == 4 and all(gap >= 0.05 * 2 ** i for i, gap in enumerate(np.diff(times))), times


def test_judge_sends_the_key_of_the_environment_and_never_prints_it(server, monkeypatch):
    server.answer = lambda request, n: says("Final Score: 2") if n == 0 else (401, "bad key")
    judge(server)(pictures(1), ["a cat"])
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123\n")
    with pytest.raises(ValueError) as error:
        judge(server)(pictures(1), ["a cat"])
    assert server.headers[1]["Authorization"] == "Bearer secret-123" and "secret" not in str(error.value) + repr(error.value.__cause__)
    for key in ("secret\n123", "secret 123", "secret’"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="^judge: got white space .* expected one word") as error:
            judge(server)
        assert "secret" not in str(error.value)


def test_judge_asks_at_once_and_keeps_the_order(server):
    def answer(request, n):
        i = int(text_of(request).split("[")[1].rstrip("]"))
        time.sleep(0.3 - 0.03 * i)  # the last asked answer first
        return says(f"Final Score: {1 + i / 2}")
    server.answer = answer
    assert judge(server, workers=8)(pictures(8, 8, 8), [str(i) for i in range(8)]).tolist() == [1 + i / 2 for i in range(8)]
    assert server.most > 2
    server.most = 0
    judge(server, workers=2)(pictures(4, 8, 8), [str(i) for i in range(4)])
    assert server.most == 2


def test_judge_stops_asking_once_one_image_failed(server):
    server.answer = lambda request, n: (400, "bad") if "[0]" in text_of(request) else (500, "later")
    start = time.time()
    with pytest.raises(ValueError, match="HTTP 400: bad"):
        judge(server, workers=2, pause=30)(pictures(8, 8, 8), [str(i) for i in range(8)])
    while any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate()):
        assert time.time() - start < 20, "a thread still waits to ask again"
        time.sleep(0.05)
    assert len(server.requests) < 8


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8000/v1", "ftp://host/v1", "", "http://"])
def test_judge_refuses_what_is_no_endpoint(endpoint):
    with pytest.raises(ValueError, match="^judge: got endpoint .*, expected a URL such as"):
        VLMJudge(endpoint, "some-model", **QWEN_VL)


# ------------------------------------------------------------------ file size


def test_jpeg_size_is_that_of_the_file_at_quality_95(tmp_path):
    images = torch.stack([torch.zeros(3, 64, 64), *pictures(2, 64, 64)])
    sizes = jpeg_incompressibility(images, ["a cat"] * 3)
    for array, size in zip(to_uint8(images), sizes):
        Image.fromarray(array).save(tmp_path / "x.jpg", quality=95)
        assert size * 1000 == pytest.approx((tmp_path / "x.jpg").stat().st_size)
    assert sizes[0] < sizes[1] and sizes.dtype == torch.float32 and torch.equal(jpeg_compressibility(images), -sizes)
