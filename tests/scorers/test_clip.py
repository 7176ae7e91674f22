"""Facts about scorers/clip.py: every network against its original's layout, on random weights."""
import json
import sys

import numpy as np
import pytest
import torch
from mini_clip import (
    BPE,
    PROMPTS,
    affine,
    needs_bpe,
    pictures,
    randomized,
    resize_planes,
    save_clip,
    shapes,
    torchvision_box,
    varied,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel

from scorers.clip import (
    CLIP_H,
    Aesthetic,
    CLIPScore,
    HPSv2,
    PickScore,
    clip_config_of,
    clip_state_from_open_clip,
    clip_tokenizer,
    clip_tokens,
    open_clip_clean,
)
from scorers.pixels import clip_pixels, hps_pixels, normalize, to_uint8

# ------------------------------------------------------------------ tokens


TEXTS = PROMPTS + [
    "", "   ", "don't we'll THEY'RE I'd 's", "3.14 100% #1 @you", "naïve café Å É",
    "e\u0301 decomposed", "日本語 の テスト", "Привет мир", "🐱🐶 emoji 👩‍🚀",
    "An astronaut’s “glove” ‘floating’", "A &amp; B &lt;b&gt; &amp;quot;C&amp;quot;",
    "ＦＵＬＬ　ｗｉｄｔｈ！", "ﬁne ﬂower oﬃce", "tab\tand\nnew\r\nline",
    "zero\u200bwidth no\u00a0break", "dash – em — …", "bell\x07 feff\ufeff", "İstanbul ΣΑΣ straße",
    "ĳs Ǆ ŉ", "½ ² ™ ①", "a" * 300, "word " * 74, "word " * 75, "word " * 76, "hello!!! ?? ...",
    "schÃ¶nes cafÃ© â€œmojibakeâ€\x9d", "&amp;ldquo;quoted&amp;rdquo; <b>&eacute;</b>",
]


@needs_bpe
def test_clip_tokens_are_those_of_open_clip(models, open_clip):
    pytest.importorskip("ftfy", reason="open_clip cleans prompts with it")
    ours = clip_tokens(clip_tokenizer(CLIP_H), [open_clip_clean(text) for text in TEXTS])
    theirs = open_clip.tokenize(TEXTS)
    for text, a, b in zip(TEXTS, ours, theirs):
        assert torch.equal(a, b), repr(text)
    assert ours.shape == (len(TEXTS), 77)
    assert ours[:, 0].eq(49406).all() and ours.max(1).values.eq(49407).all()


# ------------------------------------------------------------------ CLIP's family


def readme_logits(net, tokenizer, pixels, prompts):
    """logit scale * cosine as PickScore's README has it, but for the pixels."""
    text = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image = net.get_image_features(pixel_values=pixels).pooler_output
    text = net.get_text_features(**text).pooler_output
    image = image / image.norm(dim=-1, keepdim=True)
    text = text / text.norm(dim=-1, keepdim=True)
    return (net.logit_scale.exp() * (text @ image.T)).diagonal()


@needs_bpe
@torch.no_grad()
def test_pickscore_is_the_readmes(models):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    net = save_clip(models / "PickScore_v1", "gelu", 1)
    images = pictures(4, 60, 94)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 42},
                                      crop_size={"height": 42, "width": 42})
    pils = [Image.fromarray(array) for array in to_uint8(images)]
    pixels = processor(pils, return_tensors="pt").pixel_values
    scorer = PickScore("cpu", torch.float32)
    theirs = readme_logits(net, scorer.tokenizer, pixels, PROMPTS)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-4)


@needs_bpe
@torch.no_grad()
def test_clipscore_is_flow_grpos_before_it_divides(models):
    net = save_clip(models / "clip-vit-large-patch14", "quick_gelu", 2)
    images = pictures(4, 60, 94)
    scorer = CLIPScore("cpu", torch.float32)
    (height, width), top, left = torchvision_box(60, 94, 42)
    planes = np.stack([resize_planes(array, height, width, Image.Resampling.BILINEAR)
                       for array in to_uint8(images)])
    pixels = normalize(torch.from_numpy(planes[:, :, top:top + 42, left:left + 42] / 255))
    theirs = readme_logits(net, scorer.tokenizer, pixels, PROMPTS)
    # 1e-5 of the scale: the two resize floats in different ways.
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-3)


@needs_bpe
def test_half_precision_moves_a_score_by_less_than_a_hundredth_of_the_scale(models):
    save_clip(models / "PickScore_v1", "gelu", 1)
    images = pictures(4)
    exact = PickScore("cpu", torch.float32)
    half = PickScore("cpu", torch.bfloat16)
    assert half.net.dtype == torch.bfloat16
    assert half.scale == exact.scale == pytest.approx(100, rel=1e-4)
    assert (half(images, PROMPTS) - exact(images, PROMPTS)).abs().max() < 1
    assert half(images, PROMPTS).dtype == torch.float32


@needs_bpe
def test_a_scorer_scores_each_pair_by_itself(models):
    save_clip(models / "PickScore_v1", "gelu", 1)
    scorer = PickScore("cpu", torch.float32)
    images = pictures(4)
    together = scorer(images, PROMPTS)
    apart = torch.cat([scorer(images[i:i + 1], PROMPTS[i:i + 1]) for i in range(4)])
    assert torch.allclose(together, apart, atol=1e-4)
    for prompts in (PROMPTS[:1], PROMPTS[0], PROMPTS * 2):
        with pytest.raises(ValueError, match="^scorer: got .* prompts for 4 images, expected"):
            scorer(images, prompts)


@needs_bpe
def test_weights_of_a_clip_that_do_not_fit_are_named(models):
    net = save_clip(models / "PickScore_v1", "gelu", 1)
    state = net.state_dict()
    del state["logit_scale"]
    state["other"] = torch.zeros(1)
    # A buffer that OpenAI's file has: let it be.
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, models / "PickScore_v1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"PickScore_v1: tensor 'logit_scale' is missing, "
                                         r"expected \(\) \(1 more do not fit\)$"):
        PickScore("cpu", torch.float32)
    state["logit_scale"] = torch.tensor(4.6052)
    save_file(state, models / "PickScore_v1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"PickScore_v1: tensor 'other' is there, "
                                         r"expected no such tensor$"):
        PickScore("cpu", torch.float32)


# As read from the published file, but for 768 inputs.
AESTHETIC_SHAPES = {
    "layers.0.weight": (1024, 48), "layers.0.bias": (1024,),
    "layers.2.weight": (128, 1024), "layers.2.bias": (128,),
    "layers.4.weight": (64, 128), "layers.4.bias": (64,),
    "layers.6.weight": (16, 64), "layers.6.bias": (16,),
    "layers.7.weight": (1, 16), "layers.7.bias": (1,),
}


@needs_bpe
@torch.no_grad()
def test_aesthetic_is_the_published_head_on_the_normalised_embedding(models):
    net = save_clip(models / "clip-vit-large-patch14", "quick_gelu", 2)
    images = pictures()
    head = randomized(AESTHETIC_SHAPES, 3)
    folder = models / "improved-aesthetic-predictor"
    folder.mkdir(exist_ok=True)
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    embedding = net.get_image_features(pixel_values=clip_pixels(images, 42)).pooler_output
    theirs = affine(embedding / embedding.norm(dim=-1, keepdim=True), head)
    scorer = Aesthetic("cpu", torch.float32)
    assert varied(theirs) and torch.allclose(scorer(images), theirs, atol=1e-4)
    assert torch.equal(scorer(images, PROMPTS), scorer(images))
    assert Aesthetic("cpu", torch.bfloat16).net["head"][0].weight.dtype == torch.float32


# ------------------------------------------------------------------ HPSv2


def open_clip_model(open_clip, layers=2, width=160, text_width=128, dim=48, image_size=42,
                    text_layers=2):
    """OpenCLIP with the branches of its ViT-H-14: heads of 80 and 64, patches of 14, GELU."""
    vision = open_clip.CLIPVisionCfg(layers=layers, width=width, head_width=80, patch_size=14,
                                     image_size=image_size)
    text = open_clip.CLIPTextCfg(width=text_width, heads=text_width // 64, layers=text_layers)
    return open_clip.CLIP(dim, vision, text).eval()


def save_hpsv2(models, obj):
    (models / "HPSv2").mkdir(exist_ok=True)
    torch.save(obj, models / "HPSv2" / "HPS_v2.1_compressed.pt")


@needs_bpe
@torch.no_grad()
def test_hpsv2_is_open_clips_cosine(models, open_clip):
    pytest.importorskip("ftfy")
    net = open_clip_model(open_clip)
    images = pictures(4, 60, 94)
    net.load_state_dict(randomized(shapes(net), 4))
    save_hpsv2(models, {"epoch": 1, "state_dict": net.state_dict()})
    image, text, _ = net(hps_pixels(images, 42), open_clip.tokenize(PROMPTS))
    theirs = (image * text).sum(1)
    scorer = HPSv2("cpu", torch.float32)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-4)


def test_hpsv2_at_its_full_size_has_every_tensor_of_open_clips_vit_h_14(open_clip):
    with torch.device("meta"):
        state = open_clip_model(open_clip, 32, 1280, 1024, 1024, 224, 24).state_dict()
        config = clip_config_of(state)
        ours = CLIPModel(config)
    renamed = clip_state_from_open_clip(state)
    assert {name: tuple(tensor.shape) for name, tensor in renamed.items()} == shapes(ours)
    published = json.loads((BPE.parent / "model_configs" / "ViT-H-14.json").read_text())
    assert config.vision_config.num_attention_heads == 1280 // 80
    assert config.text_config.num_attention_heads == published["text_cfg"]["heads"]
    assert published["vision_cfg"] == dict(image_size=config.vision_config.image_size, layers=32,
                                           width=1280, head_width=80, patch_size=14)
    assert sum(p.numel() for p in ours.parameters()) == 986_109_441


@pytest.mark.parametrize("obj, got", [
    ({"model": {}}, "expected a checkpoint with state_dict; it lacks state_dict$"),
    ({"state_dict": {}}, r"tensor 'positional_embedding' is missing, expected a tensor "
                         r"\(4 more do not fit\)$"),
])
def test_hpsv2_from_a_file_of_something_else_is_refused(models, obj, got):
    pytest.importorskip("ftfy")
    save_hpsv2(models, obj)
    with pytest.raises(ValueError, match=rf"HPS_v2.1_compressed.pt: {got}"):
        HPSv2("cpu", torch.float32)


def test_hpsv2_without_ftfy_says_how_to_get_it_before_anything_is_fetched(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.setattr("scorers.clip.weights", lambda *args: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=r"^HPSv2: got no module ftfy.*"
                                         r"expected it: pip install ftfy==6.3.1$"):
        HPSv2("cpu", torch.float32)
