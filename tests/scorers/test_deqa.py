"""Facts about scorers/deqa.py: it equals the published layout, and it is strict about its files.

The layout is rebuilt below straight from a state dict, on random weights.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from plumbing.files import shapes_of
from scorers import deqa
from scorers.deqa import DeQA, Owl2, load, pixels_of
from scorers.pixels import CLIP_MEAN, CLIP_STD

# LLaMA-2's pieces of the prompt and their ids, by sentencepiece 0.2.3 from tokenizer.model of
# zhiyuanyou/DeQA-Score, preprocessor/.
PIECES = {
    1: "<s>", 3148: "▁US", 1001: "ER", 29901: ":", 1128: "▁How", 723: "▁would", 366: "▁you",
    6554: "▁rate", 278: "▁the", 11029: "▁quality", 310: "▁of", 445: "▁this", 1967: "▁image",
    29973: "?", 13: "\n", 29871: "▁", 22933: "ASS", 9047: "IST", 13566: "ANT", 450: "▁The",
    338: "▁is", 15129: "▁excellent", 1781: "▁good", 6534: "▁fair", 6460: "▁poor", 4319: "▁bad",
}
VALUE = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}

# Small, but with every branch. No two widths, head counts or depths of the three networks are
# alike, but those that have to be.
CONFIG = {
    "model_type": "mplug_owl2",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "rms_norm_eps": 0.5,
    "rope_theta": 100.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "visual_config": {
        "visual_model": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 56,
            "patch_size": 14,
            "layer_norm_eps": 1e-3,
            "model_type": "mplug_owl_vision_model",
        },
        "visual_abstractor": {
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_learnable_queries": 5,
            "encoder_hidden_size": 24,
            "grid_size": 4,
            "layer_norm_eps": 1e-2,
        },
    },
}
FULL = {
    "model_type": "mplug_owl2",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "visual_config": {
        "visual_model": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 448,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "num_learnable_queries": 64,
            "grid_size": 32,
            "layer_norm_eps": 1e-6,
        },
    },
}

# ------------------------------------------------------------------ the published names


def with_bias(prefix, **sizes):
    """Weights and biases of modules. "__" in a keyword stands for the dot of a name."""
    shapes = {}
    for name, shape in sizes.items():
        name = prefix + name.replace("__", ".")
        shapes[name + ".weight"] = shape
        shapes[name + ".bias"] = shape[:1]
    return shapes


def llama_shapes(prefix, width, inner):
    shapes = {}
    for name in ("q_proj", "o_proj", "k_proj.multiway.0", "k_proj.multiway.1",
                 "v_proj.multiway.0", "v_proj.multiway.1"):
        shapes[f"{prefix}self_attn.{name}.weight"] = (width, width)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}{name}.multiway.0.weight"] = (width,)
        shapes[f"{prefix}{name}.multiway.1.weight"] = (width,)
    shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, width)
    shapes[f"{prefix}mlp.up_proj.weight"] = (inner, width)
    shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
    return shapes


def vision_shapes(prefix, vision):
    width = vision["hidden_size"]
    inner = vision["intermediate_size"]
    patch = vision["patch_size"]
    embeddings = prefix + "embeddings."
    shapes = {
        embeddings + "cls_token": (1, 1, width),
        embeddings + "patch_embed.weight": (width, 3, patch, patch),
        embeddings + "position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, width),
    }
    shapes |= with_bias(prefix, embeddings__pre_layernorm=(width,), post_layernorm=(width,))
    for i in range(vision["num_hidden_layers"]):
        shapes |= with_bias(
            f"{prefix}encoder.layers.{i}.",
            self_attn__query_key_value=(3 * width, width),
            self_attn__dense=(width, width),
            mlp__fc1=(inner, width),
            mlp__fc2=(width, inner),
            input_layernorm=(width,),
            post_attention_layernorm=(width,))
    return shapes


def abstractor_shapes(prefix, abstractor, image_width, width_out):
    width = abstractor["hidden_size"]
    inner = abstractor["intermediate_size"]
    queries = abstractor["num_learnable_queries"]
    shapes = {prefix + "query_embeds": (1, queries, width), prefix + "vit_eos": (1, 1, width_out)}
    shapes |= with_bias(prefix, visual_fc=(width_out, width))
    for i in range(abstractor["num_hidden_layers"]):
        layer = f"{prefix}encoder.layers.{i}.crossattention."
        shapes[layer + "attention.q_pos_embed"] = (queries, width)
        shapes[layer + "attention.k_pos_embed"] = (abstractor["grid_size"] ** 2 + 1, width)
        shapes |= with_bias(
            layer,
            attention__query=(width, width),
            attention__key=(width, image_width),
            attention__value=(width, image_width),
            output__out_proj=(width, width),
            output__norm2=(width,),
            output__mlp__w1=(inner, width),
            output__mlp__w2=(width, inner),
            output__mlp__w3=(inner, width),
            output__mlp__ffn_ln=(inner,),
            norm1=(width,),
            normk=(width,))
    return shapes


def published_shapes(config):
    """{name: shape}, nested and named as the modules of visual_encoder.py and modeling_llama2.py.

    There are biases where theirs have one.
    """
    vision = config["visual_config"]["visual_model"]
    abstractor = config["visual_config"]["visual_abstractor"]
    width = config["hidden_size"]
    vocab = config["vocab_size"]
    shapes = {
        "lm_head.weight": (vocab, width),
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes |= llama_shapes(f"model.layers.{i}.", width, config["intermediate_size"])
    shapes |= vision_shapes("model.vision_model.", vision)
    shapes |= abstractor_shapes("model.visual_abstractor.", abstractor, vision["hidden_size"],
                                width)
    return shapes


def random_state(config, seed=0):
    """Random tensors for every name, none of them 0 or 1 throughout, so that each of them matters.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(config).items():
        state[name] = torch.randn(shape, generator=generator) * 0.25
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    return state


# ------------------------------------------------------------------ the published layout


def attend(q, k, v, mask=0.0):
    """One head, (T, d) each."""
    return torch.softmax(q @ k.T / q.shape[-1] ** 0.5 + mask, -1) @ v


class Oracle:
    """Formulas by name, in float64, for one picture: token by token, head by head."""

    def __init__(self, state, config):
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.config = config
        self.vision = config["visual_config"]["visual_model"]
        self.abstractor = config["visual_config"]["visual_abstractor"]

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def layer_norm(self, x, name, eps):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rms_norm(self, x, name):
        eps = self.config["rms_norm_eps"]
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"]

    def see(self, picture):
        """The vision model: MplugOwlVisionEmbeddings, MplugOwlVisionEncoderLayer."""
        patch = self.vision["patch_size"]
        n = self.vision["image_size"] // patch
        eps = self.vision["layer_norm_eps"]
        prefix = "model.vision_model."
        kernel = self.w[f"{prefix}embeddings.patch_embed.weight"].flatten(1)
        rows = [self.w[f"{prefix}embeddings.cls_token"][0, 0]]
        for y in range(0, n * patch, patch):
            for x in range(0, n * patch, patch):
                rows.append(kernel @ picture[:, y:y + patch, x:x + patch].double().flatten())
        x = torch.stack(rows) + self.w[f"{prefix}embeddings.position_embedding"][0]
        x = self.layer_norm(x, f"{prefix}embeddings.pre_layernorm", eps)
        heads = self.vision["num_attention_heads"]
        d = self.vision["hidden_size"] // heads
        for i in range(self.vision["num_hidden_layers"]):
            layer = f"{prefix}encoder.layers.{i}."
            normed = self.layer_norm(x, f"{layer}input_layernorm", eps)
            mixed = self.linear(normed, f"{layer}self_attn.query_key_value")
            parts = [mixed[:, 3 * d * head:3 * d * (head + 1)] for head in range(heads)]
            got = torch.cat([attend(*part.split(d, 1)) for part in parts], 1)
            x = x + self.linear(got, f"{layer}self_attn.dense")
            normed = self.layer_norm(x, f"{layer}post_attention_layernorm", eps)
            hidden = self.linear(normed, f"{layer}mlp.fc1")
            x = x + self.linear(hidden / (1 + torch.exp(-1.702 * hidden)), f"{layer}mlp.fc2")
        return self.layer_norm(x, f"{prefix}post_layernorm", eps)

    def summarise(self, seen):
        """The abstractor: MplugOwlVisualAbstractorAttention, ...MultiHeadAttention, ...CrossOutput,
        ...MLP. Its norms have torch's own eps, 1e-5."""
        prefix = "model.visual_abstractor."
        x = self.w[f"{prefix}query_embeds"][0]
        d = self.abstractor["hidden_size"] // self.abstractor["num_attention_heads"]
        for i in range(self.abstractor["num_hidden_layers"]):
            layer = f"{prefix}encoder.layers.{i}.crossattention."
            positions = self.w[f"{layer}attention.q_pos_embed"]
            places = torch.cat([positions, self.w[f"{layer}attention.k_pos_embed"]])
            hidden = self.layer_norm(x, f"{layer}norm1", 1e-5)
            context = torch.cat([hidden, self.layer_norm(seen, f"{layer}normk", 1e-5)])
            query = self.linear(hidden + positions, f"{layer}attention.query")
            key = self.linear(context + places, f"{layer}attention.key")
            value = self.linear(context, f"{layer}attention.value")
            heads = zip(query.split(d, 1), key.split(d, 1), value.split(d, 1))
            got = torch.cat([attend(q, k, v) for q, k, v in heads], 1)
            hidden = hidden + self.linear(got, f"{layer}output.out_proj")
            normed = self.layer_norm(hidden, f"{layer}output.norm2", 1e-5)
            x = hidden + self.mlp(normed, f"{layer}output.mlp.")
        return torch.cat([self.linear(x, f"{prefix}visual_fc"), self.w[f"{prefix}vit_eos"][0]])

    def mlp(self, x, prefix):
        gate = self.linear(x, f"{prefix}w1")
        gated = gate / (1 + torch.exp(-gate)) * self.linear(x, f"{prefix}w3")
        inner = self.layer_norm(gated, f"{prefix}ffn_ln", self.abstractor["layer_norm_eps"])
        return self.linear(inner, f"{prefix}w2")

    def rope(self, y):
        """One head, (T, d): channels j and j + d / 2 are one complex number."""
        length, d = y.shape
        turns = []
        for t in range(length):
            turns.append([t / self.config["rope_theta"] ** (2 * j / d) for j in range(d // 2)])
        turns = torch.tensor(turns, dtype=torch.float64)
        turns = torch.polar(torch.ones_like(turns), turns)
        y = torch.complex(y[:, :d // 2], y[:, d // 2:]) * turns
        return torch.cat([y.real, y.imag], 1)

    def logits(self, picture, ids):
        """(T, vocabulary), for the picture (3, S, S) in place of id -200.

        prepare_inputs_labels_for_multimodal, LlamaDecoderLayer with MultiwayNetwork.
        """
        seen = self.summarise(self.see(picture))
        embeds = []
        modality = []
        for token in ids:
            embed = self.w["model.embed_tokens.weight"][token][None] if token != -200 else seen
            embeds.append(embed)
            modality += [token == -200] * len(embed)
        x = torch.cat(embeds)
        modality = torch.tensor(modality)[:, None]
        mask = torch.full((len(x), len(x)), -torch.inf, dtype=torch.float64).triu(1)
        d = self.config["hidden_size"] // self.config["num_attention_heads"]

        def multiway(function, y, name):
            text = function(y, f"{name}.multiway.0")
            return torch.where(modality, function(y, f"{name}.multiway.1"), text)

        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            hidden = multiway(self.rms_norm, x, f"{layer}input_layernorm")
            query = self.linear(hidden, f"{layer}self_attn.q_proj")
            key = multiway(self.linear, hidden, f"{layer}self_attn.k_proj")
            value = multiway(self.linear, hidden, f"{layer}self_attn.v_proj")
            heads = zip(query.split(d, 1), key.split(d, 1), value.split(d, 1))
            got = [attend(self.rope(q), self.rope(k), v, mask) for q, k, v in heads]
            x = x + self.linear(torch.cat(got, 1), f"{layer}self_attn.o_proj")
            hidden = multiway(self.rms_norm, x, f"{layer}post_attention_layernorm")
            gate = self.linear(hidden, f"{layer}mlp.gate_proj")
            gated = gate / (1 + torch.exp(-gate)) * self.linear(hidden, f"{layer}mlp.up_proj")
            x = x + self.linear(gated, f"{layer}mlp.down_proj")
        return self.linear(self.rms_norm(x, "model.norm"), "lm_head")

    def next_token(self, picture):
        """Logits (vocabulary) after the one prompt."""
        return self.logits(picture, deqa.BEFORE + [-200] + deqa.AFTER)[-1]

    def score(self, picture):
        logits = self.next_token(picture)
        ids_of = {piece.strip("▁"): token for token, piece in PIECES.items()}
        probability = torch.softmax(torch.stack([logits[ids_of[word]] for word in VALUE]), 0)
        return sum(p * value for p, value in zip(probability.tolist(), VALUE.values()))


# ------------------------------------------------------------------ folders, images, networks


def write(folder, state, shards=1, kind="safetensors", config=CONFIG):
    """A checkpoint folder as the hub has it, with a stand-in for the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"tokens")
    names = sorted(state)
    for i in range(shards):
        part = {name: state[name].contiguous() for name in names[i::shards]}
        number = f"{i + 1:05}-of-{shards:05}"
        if kind == "safetensors":
            save_file(part, folder / f"model-{number}.safetensors")
        else:
            torch.save(part, folder / f"pytorch_model-{number}.bin")
    return folder


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder in which the scorer looks for its files."""
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    monkeypatch.setattr(deqa, "TOKENIZER", hashlib.sha256(b"tokens").hexdigest())
    return tmp_path / "DeQA-Score-Mix3"


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 40, 70, generator=torch.Generator().manual_seed(1))


def meta_net(config=CONFIG):
    with torch.device("meta"):
        return Owl2(config)


# ------------------------------------------------------------------ scores


def test_logits_equal_the_published_layout(state, images):
    net = Owl2(CONFIG)
    net.load_state_dict(state)
    pixels = pixels_of(images, 56)
    with torch.no_grad():
        got = net(pixels, deqa.BEFORE, deqa.AFTER)
    oracle = Oracle(state, CONFIG)
    expected = torch.stack([oracle.next_token(picture) for picture in pixels])
    differ = (expected[0] - expected[1]).abs().max() > 0.1
    assert expected.std() > 1 and differ, "the test's weights have to tell the images apart"
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


def test_score_equals_the_published_one_from_a_checkpoint_folder(state, images, home):
    write(home, state)
    scorer = DeQA("cpu", torch.float32)
    got = scorer(images, ["a prompt"] * 3)
    assert got.dtype == torch.float32 and got.device.type == "cpu" and got.shape == (3,)
    oracle = Oracle(state, CONFIG)
    expected = [oracle.score(picture) for picture in pixels_of(images, 56)]
    assert max(expected) - min(expected) > 0.01
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    two_at_a_time = DeQA("cpu", torch.float32, batch=2)(images)
    np.testing.assert_allclose(two_at_a_time.numpy(), got.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(state, images, home, dtype):
    write(home, state)
    whole = DeQA("cpu", torch.float32)
    half = DeQA("cpu", dtype)
    assert {tensor.dtype for tensor in half.net.state_dict().values()} == {dtype}
    torch.testing.assert_close(half(images), whole(images), atol=0.1, rtol=0)


@pytest.mark.parametrize("word, value", VALUE.items())
def test_a_sure_word_scores_its_level_and_no_preference_3(state, images, home, word, value):
    token = next(token for token, piece in PIECES.items() if piece == f"▁{word}")
    write(home, state)
    scorer = DeQA("cpu", torch.float32)
    net = scorer.net
    net.lm_head.weight = torch.nn.Parameter(torch.zeros_like(net.lm_head.weight))
    assert scorer(images[:1]).item() == pytest.approx(3)
    net.model.norm.weight = torch.nn.Parameter(torch.zeros(64))
    net.model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    net.lm_head.weight.data[token] = 1.0
    assert scorer(images[:1]).item() == pytest.approx(value, abs=1e-4)


# ------------------------------------------------------------------ tokens


def test_tokens_spell_the_prompt_and_the_levels():
    def text(ids):
        return "".join(PIECES[token] for token in ids).replace("▁", " ")
    before = "USER: How would you rate the quality of this image?\n"
    after = "\nASSISTANT: The quality of the image is"
    assert deqa.PROMPT == f"{before}<|image|>{after}"
    assert text(deqa.BEFORE) == f"<s> {before}" and text(deqa.AFTER) == f" {after}"
    assert {PIECES[token].strip("▁"): value for token, value in deqa.LEVELS.items()} == VALUE


def test_tokens_equal_sentencepiece_on_the_released_tokenizer():
    path = Path(os.environ.get("REWARD_MODELS", "")) / "DeQA-Score-Mix3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no released tokenizer at $REWARD_MODELS/DeQA-Score-Mix3: {path}")
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="reads tokenizer.model, to check the ids in scorers/deqa.py")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == deqa.TOKENIZER
    split = sentencepiece.SentencePieceProcessor(model_file=str(path))
    before, after = deqa.PROMPT.split("<|image|>")
    assert [split.bos_id()] + split.encode(before) == deqa.BEFORE
    assert split.encode(after) == deqa.AFTER
    assert [split.encode(word)[0] for word in VALUE] == list(deqa.LEVELS)


# ------------------------------------------------------------------ pixels


def picture_of(height, width):
    """Ramps, waves and noise, (3, height, width) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(2))
    return torch.stack([x, y, (x * 40).sin() / 2 + 0.5]) * 0.8 + noise * 0.2


@pytest.mark.parametrize("height, width", [(448, 448), (512, 512), (300, 517), (640, 333), (20, 31),
                                           (449, 448)])
def test_preprocessing_equals_the_clip_processor_within_a_grey_level(height, width):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip",
                               reason="the original's processor, on Pillow")
    # Its defaults are the checkpoint's preprocessor_config.json.
    processor = clip.CLIPImageProcessorPil(size=448, crop_size=448)
    image = picture_of(height, width)
    side = max(height, width)
    # expand2square: the mean colour, the image in the middle.
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [122, 116, 104]
    top = (side - height) // 2
    left = (side - width) // 2
    levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    square[top:top + height, left:left + width] = levels
    expected = processor(images=[Image.fromarray(square)], return_tensors="pt")["pixel_values"]
    got = pixels_of(image[None], 448)
    assert got.shape == (1, 3, 448, 448) and got.dtype == torch.float32
    std = torch.tensor(CLIP_STD).reshape(3, 1, 1)
    assert ((got - expected) * std * 255).abs().max() <= 1


def test_pixels_are_rounded_and_clamped_like_the_peers():
    row = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2])
    red = pixels_of(row.expand(1, 3, 6, 6), 6)[0, 0, 0] * CLIP_STD[0] + CLIP_MEAN[0]
    np.testing.assert_allclose(red * 255, [0, 0, 0, 1, 255, 255], atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        pixels_of(torch.full((1, 3, 4, 4), bad), 56)


# ------------------------------------------------------------------ files


def test_full_size_has_the_published_names_and_shapes():
    got = shapes_of(meta_net(FULL).state_dict())
    assert got == published_shapes(FULL)
    # As counted on zhiyuanyou/DeQA-Score's own modules (transformers 4.36.1). In 16 bits that is
    # 16.41 GB, what the hub's shards are said to weigh.
    assert len(got) == 862
    assert sum(np.prod(shape, dtype=np.int64) for shape in got.values()) == 8_204_550_144


@pytest.mark.parametrize("kind, shards", [("safetensors", 3), ("bin", 1), ("bin", 3)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_shards_load_whole_in_the_dtype_asked_for(state, tmp_path, kind, shards, stored):
    stored_state = {name: tensor.to(stored) for name, tensor in state.items()}
    net = meta_net()
    load(net, write(tmp_path, stored_state, shards, kind), "cpu", torch.float32)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, stored_state[name].float(), atol=0, rtol=0)
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"


NORM = "model.layers.1.input_layernorm.multiway.1.weight"
FC = "model.visual_abstractor.visual_fc.bias"


def lose(state):
    del state[NORM]


def add(state):
    state["extra"] = torch.zeros(1)


def misshape(state):
    state[FC] = torch.zeros(65)


def lose_a_layer(state):
    for name in list(state):
        if name.startswith("model.layers.2"):
            del state[name]


def lose_and_add(state):
    lose(state)
    add(state)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change, message", [
    (lose, rf"tensor '{NORM}' is missing, expected \(64,\)$"),
    (add, r"tensor 'extra' is \(1,\), expected no such tensor$"),
    (misshape, rf"tensor '{FC}' is \(65,\), expected \(64,\)$"),
    (lose_a_layer, r"tensor 'model.layers.2.* is missing, expected .* \(12 more do not fit\)$"),
    (lose_and_add, r"tensor 'extra' is .*, expected no such tensor \(1 more do not fit\)$"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(state, tmp_path, change, message, kind):
    broken = dict(state)
    change(broken)
    with pytest.raises(ValueError, match=message) as raised:
        load(meta_net(), write(tmp_path, broken, 2, kind), "cpu", torch.float32)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_lost_shard_is_refused(state, tmp_path):
    (write(tmp_path, state, 3) / "model-00002-of-00003.safetensors").unlink()
    lost = (len(state) + 1) // 3
    with pytest.raises(ValueError, match="expected a whole copy of zhiyuanyou/DeQA-Score-Mix3: "
                                         rf".* is missing, .* \({lost - 1} more do not fit\)$"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


def test_shards_of_two_checkpoints_are_refused(state, tmp_path):
    write(write(tmp_path, state, 3), state, 2)
    message = "and in another file of .* expected the shards of one checkpoint"
    with pytest.raises(ValueError, match=message):
        load(meta_net(), tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("kind, message", [("safetensors", "expected a safetensors file, got"),
                                           ("bin", "not a readable checkpoint")])
def test_a_truncated_shard_is_refused(state, tmp_path, kind, message):
    path, = write(tmp_path, state, 1, kind).glob("*model-*")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{path.name}: {message}"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


class Payload:
    def __reduce__(self):
        return os.getenv, ("HOME",)


def test_a_pickle_that_runs_code_is_refused(state, tmp_path):
    path, = write(tmp_path, {}, 1, "bin").glob("*.bin")
    torch.save({"model.norm.weight": Payload()}, path)
    with pytest.raises(ValueError, match=f"{path.name}: .*pickled code is refused"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


def test_frequencies_of_older_transformers_are_no_weights(state, tmp_path):
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load(meta_net(), write(tmp_path, old), "cpu", torch.float32)


def test_another_tokenizer_is_refused(state, home):
    (write(home, state) / "tokenizer.model").write_bytes(b"others")
    message = "got another tokenizer in .*tokenizer.model, expected LLaMA-2's"
    with pytest.raises(ValueError, match=message):
        DeQA("cpu", torch.float32)


@pytest.mark.parametrize("key, value", [("model_type", "llama"), ("hidden_act", "gelu"),
                                        ("rope_scaling", {"type": "linear", "factor": 2.0})])
def test_another_architecture_is_refused(key, value):
    message = f"got {key} .*only zhiyuanyou/DeQA-Score-Mix3 is supported"
    with pytest.raises(ValueError, match=message):
        meta_net({**CONFIG, key: value})


def test_nothing_is_trained_and_nothing_stays_on_the_meta_device(state, home):
    write(home, state)
    net = DeQA("cpu", torch.float32).net
    assert not net.training
    assert not any(tensor.requires_grad for tensor in net.parameters())
    assert {tensor.device.type for tensor in [*net.parameters(), *net.buffers()]} == {"cpu"}
