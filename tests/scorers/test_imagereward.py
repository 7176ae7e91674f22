"""Facts about scorers/imagereward.py: the network by hand, and files that do not fit."""
import os

import pytest
import torch
import torch.nn.functional as F
from mini_clip import PROMPTS, affine, pictures, randomized, shapes, varied
from transformers import BlipTextModel, BlipVisionModel

from scorers import imagereward
from scorers.imagereward import ImageReward
from scorers.pixels import clip_pixels
from scorers.weights import rename

V = "blip.visual_encoder."
T = "blip.text_encoder."


def linear_shapes(name, n_out, n_in):
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def norm_shapes(name, n):
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def vision_shapes(W, depth, grid, patch):
    s = {
        V + "cls_token": (1, 1, W),
        V + "pos_embed": (1, grid * grid + 1, W),
        V + "patch_embed.proj.weight": (W, 3, patch, patch),
        V + "patch_embed.proj.bias": (W,),
    }
    for i in range(depth):
        b = f"{V}blocks.{i}."
        s |= norm_shapes(b + "norm1", W)
        s |= linear_shapes(b + "attn.qkv", 3 * W, W)
        s |= linear_shapes(b + "attn.proj", W, W)
        s |= norm_shapes(b + "norm2", W)
        s |= linear_shapes(b + "mlp.fc1", 4 * W, W)
        s |= linear_shapes(b + "mlp.fc2", W, 4 * W)
    return s | norm_shapes(V + "norm", W)


def text_shapes(D, layers, vocab, W):
    s = {
        T + "embeddings.word_embeddings.weight": (vocab, D),
        T + "embeddings.position_embeddings.weight": (512, D),
    }
    s |= norm_shapes(T + "embeddings.LayerNorm", D)
    for i in range(layers):
        b = f"{T}encoder.layer.{i}."
        for kind, width in (("attention", D), ("crossattention", W)):
            s |= linear_shapes(f"{b}{kind}.self.query", D, D)
            s |= linear_shapes(f"{b}{kind}.self.key", D, width)
            s |= linear_shapes(f"{b}{kind}.self.value", D, width)
            s |= linear_shapes(f"{b}{kind}.output.dense", D, D)
            s |= norm_shapes(f"{b}{kind}.output.LayerNorm", D)
        s |= linear_shapes(b + "intermediate.dense", 4 * D, D)
        s |= linear_shapes(b + "output.dense", D, 4 * D)
        s |= norm_shapes(b + "output.LayerNorm", D)
    return s


def imagereward_shapes(W=128, depth=2, D=64, layers=2, vocab=40, grid=3, patch=16):
    """Names and shapes of ImageReward.pt, as THUDM/ImageReward's modules make them.

    They are in models/BLIP/vit.py, med.py and blip_pretrain.py.
    """
    s = vision_shapes(W, depth, grid, patch) | text_shapes(D, layers, vocab, W)
    s |= linear_shapes("blip.vision_proj", 256, W) | linear_shapes("blip.text_proj", 256, D)
    widths = {0: (1024, D), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for i, (n_out, n_in) in widths.items():
        s |= linear_shapes(f"mlp.layers.{i}", n_out, n_in)
    return s


class ByHand:
    """ImageReward's network from its published names.

    It is a ViT, a BERT with cross-attention in each layer, and the head on [CLS], standardised.
    """

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return x @ self.state[name + ".weight"].T + self.state[name + ".bias"]

    def norm(self, x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self.state[name + ".weight"] + self.state[name + ".bias"]

    def attend(self, q, k, v, bias=0):
        # (B, heads, L, 64)
        q, k, v = (a.unflatten(-1, (-1, 64)).transpose(1, 2) for a in (q, k, v))
        return ((q @ k.mT / 8 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def image(self, pixels):
        state = self.state
        x = F.conv2d(pixels, state[V + "patch_embed.proj.weight"],
                     state[V + "patch_embed.proj.bias"], stride=16).flatten(2).mT
        x = torch.cat([state[V + "cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + state[V + "pos_embed"]
        for i in range(2):
            b = f"{V}blocks.{i}."
            qkv = self.linear(self.norm(x, b + "norm1", 1e-6), b + "attn.qkv")
            x = x + self.linear(self.attend(*qkv.chunk(3, -1)), b + "attn.proj")
            y = self.linear(self.norm(x, b + "norm2", 1e-6), b + "mlp.fc1")
            x = x + self.linear(F.gelu(y), b + "mlp.fc2")
        return self.norm(x, V + "norm", 1e-6)

    def look(self, x, source, name, bias):
        """One attention of BERT, with what is added and normalised after it."""
        y = self.attend(self.linear(x, name + ".self.query"),
                        self.linear(source, name + ".self.key"),
                        self.linear(source, name + ".self.value"), bias)
        y = self.linear(y, name + ".output.dense")
        return self.norm(y + x, name + ".output.LayerNorm", 1e-12)

    def __call__(self, pixels, ids, mask):
        image = self.image(pixels)
        x = self.state[T + "embeddings.word_embeddings.weight"][ids]
        x = x + self.state[T + "embeddings.position_embeddings.weight"][:ids.shape[1]]
        x = self.norm(x, T + "embeddings.LayerNorm", 1e-12)
        bias = -10000.0 * (1 - mask[:, None, None, :].float())
        for i in range(2):
            b = f"{T}encoder.layer.{i}."
            x = self.look(x, x, b + "attention", bias)
            x = self.look(x, image, b + "crossattention", 0)
            y = self.linear(F.gelu(self.linear(x, b + "intermediate.dense")), b + "output.dense")
            x = self.norm(y + x, b + "output.LayerNorm", 1e-12)
        score = affine(x[:, 0], self.state, "mlp.")
        return (score - 0.16717362830052426) / 1.0333394966054072


def save_imagereward(models, state):
    (models / "ImageReward").mkdir(exist_ok=True)
    torch.save(state, models / "ImageReward" / "ImageReward.pt")


@torch.no_grad()
def test_imagereward_is_the_published_blip(models):
    state = randomized(imagereward_shapes(), 5)
    images = pictures(4, 60, 94)
    # With a buffer of old transformers.
    positions = {T + "embeddings.position_ids": torch.arange(512)[None]}
    save_imagereward(models, state | positions)
    scorer = ImageReward("cpu", torch.float32)
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35,
                              return_tensors="pt")
    # Lower case, and BLIP's tokens after BERT's.
    assert scorer.tokenizer(["A [DEC] [ENC]"]).input_ids == [[2, 5, 20, 21, 3]]
    assert tokens.input_ids.shape == (4, 35)
    assert tokens.attention_mask[0].sum() < 35 == tokens.attention_mask[2].sum()
    by_hand = ByHand(state)
    pixels = clip_pixels(images, 48, crop=round)
    theirs = by_hand(pixels, tokens.input_ids, tokens.attention_mask)
    assert varied(theirs) and torch.allclose(scorer(images, PROMPTS), theirs, atol=1e-4)
    # Padded to the longest here and to 35 there.
    short = PROMPTS[:1] * 4
    tokens = scorer.tokenizer(short, padding="max_length", max_length=35, return_tensors="pt")
    theirs = by_hand(pixels, tokens.input_ids, tokens.attention_mask)
    assert torch.allclose(scorer(images, short), theirs, atol=1e-4)
    assert ImageReward("cpu", torch.bfloat16).net["head"][0].weight.dtype == torch.float32


def without_prefix(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()
            if name.startswith(prefix)}


def test_imagereward_at_its_full_size_has_every_tensor_of_the_published_file():
    named = imagereward_shapes(1024, 24, 768, 12, 30524, 14)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in named.items()}
        vision = without_prefix(state, V)
        text = without_prefix(state, T)
        vision_config = imagereward.vision_config_of(vision)
        text_config = imagereward.text_config_of(text, vision_config.hidden_size)
        vision_net = BlipVisionModel(vision_config)
        text_net = BlipTextModel(text_config, add_pooling_layer=False)
    renamed = rename(vision, imagereward.BLIP_VISION_NAMES)
    assert {name: tuple(tensor.shape) for name, tensor in renamed.items()} == shapes(vision_net)
    assert {name: tuple(tensor.shape) for name, tensor in text.items()} == shapes(text_net)
    assert vision_config.image_size == 224
    assert vision_config.num_attention_heads == 16 and text_config.num_attention_heads == 12


# ------------------------------------------------------------------ files that do not fit


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


def drop_head(state):
    for name in list(state):
        if name.startswith("mlp."):
            del state[name]


@pytest.mark.parametrize("change, got", [
    (drop(V + "norm.bias"),
     r"tensor 'post_layernorm.bias' is missing, expected \(128,\)$"),
    (drop(V + "pos_embed"), r"it lacks blip.visual_encoder.pos_embed$"),
    (put("blip.queue", 1), r"tensor 'blip.queue' is \(1,\), expected no such tensor$"),
    (put(T + "pooler.dense.bias", 1),
     r"tensor 'pooler.dense.bias' is there, expected no such tensor$"),
    (put(V + "norm.bias", 7),
     r"tensor 'post_layernorm.bias' is \(7,\), expected \(128,\)$"),
    (put("mlp.layers.7.bias", 2), r"tensor 'layers.7.bias' is \(2,\), expected \(1,\)$"),
    (drop("mlp.layers.7.bias", "mlp.layers.6.bias"),
     r"tensor 'layers.6.bias' is missing, expected \(16,\) \(1 more do not fit\)$"),
    (drop_head, r"it lacks mlp.layers.0.weight$"),
    (lambda state: state.clear(), r"it lacks blip.visual_encoder.patch_embed.proj.weight, "),
])
def test_weights_that_do_not_fit_are_named(models, change, got):
    state = randomized(imagereward_shapes(), 5)
    change(state)
    save_imagereward(models, state)
    with pytest.raises(ValueError, match=rf"^[^\n]*ImageReward.pt: [^\n]*{got}"):
        ImageReward("cpu", torch.float32)


class Evil:
    def __reduce__(self):
        return os.putenv, ("EVIL", "1")


def test_a_pickle_is_not_run(models):
    save_imagereward(models, {"x": Evil()})
    path = models / "ImageReward" / "ImageReward.pt"
    with pytest.raises(ValueError, match=r"ImageReward.pt: .*pickled code is refused"):
        ImageReward("cpu", torch.float32)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"ImageReward.pt: not a readable checkpoint"):
        ImageReward("cpu", torch.float32)
