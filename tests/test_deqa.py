"""Facts about deqa.py: equal to the published layout, rebuilt below straight from a state dict, on random weights; strict about its files."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deqa
from scorers import CLIP_MEAN, CLIP_STD
from deqa import DeQA, Owl2, load, pixels_of

# LLaMA-2's pieces of the prompt and their ids, by sentencepiece 0.2.3 from tokenizer.model of zhiyuanyou/DeQA-Score, preprocessor/
PIECES = {1: "<s>", 3148: "▁US", 1001: "ER", 29901: ":", 1128: "▁How", 723: "▁would", 366: "▁you", 6554: "▁rate", 278: "▁the",
          11029: "▁quality", 310: "▁of", 445: "▁this", 1967: "▁image", 29973: "?", 13: "\n", 29871: "▁", 22933: "ASS", 9047: "IST",
          13566: "ANT", 450: "▁The", 338: "▁is", 15129: "▁excellent", 1781: "▁good", 6534: "▁fair", 6460: "▁poor", 4319: "▁bad"}
VALUE = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}

# small, but with every branch: no two widths, head counts or depths of the three networks are alike, but those that have to be
CONFIG = {
    "model_type": "mplug_owl2", "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 32000, "rms_norm_eps": 0.5, "rope_theta": 100.0, "rope_scaling": None, "hidden_act": "silu",
    "visual_config": {
        "visual_model": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56,
                         "patch_size": 14, "layer_norm_eps": 1e-3, "model_type": "mplug_owl_vision_model"},
        "visual_abstractor": {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
                              "num_learnable_queries": 5, "encoder_hidden_size": 24, "grid_size": 4, "layer_norm_eps": 1e-2}}}
FULL = {
    "model_type": "mplug_owl2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "visual_config": {
        "visual_model": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
                         "patch_size": 14, "layer_norm_eps": 1e-6},
        "visual_abstractor": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
                              "num_learnable_queries": 64, "grid_size": 32, "layer_norm_eps": 1e-6}}}


def published_shapes(config):
    """{name: shape} as the modules of visual_encoder.py and modeling_llama2.py are nested and named; biases where theirs have one."""
    vision, abstractor = config["visual_config"]["visual_model"], config["visual_config"]["visual_abstractor"]
    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    v, v_inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    a, a_inner, queries = abstractor["hidden_size"], abstractor["intermediate_size"], abstractor["num_learnable_queries"]
    shapes = {"lm_head.weight": (vocab, d), "model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}

    def with_bias(prefix, **sizes):
        for name, shape in sizes.items():
            shapes[f"{prefix}{name.replace('__', '.')}.weight"], shapes[f"{prefix}{name.replace('__', '.')}.bias"] = shape, shape[:1]

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.o_proj", "self_attn.k_proj.multiway.0", "self_attn.k_proj.multiway.1",
                     "self_attn.v_proj.multiway.0", "self_attn.v_proj.multiway.1"):
            shapes[f"{p}{name}.weight"] = (d, d)
        for name in ("input_layernorm.multiway.0", "input_layernorm.multiway.1", "post_attention_layernorm.multiway.0",
                     "post_attention_layernorm.multiway.1"):
            shapes[f"{p}{name}.weight"] = (d,)
        shapes |= {f"{p}mlp.gate_proj.weight": (inner, d), f"{p}mlp.up_proj.weight": (inner, d), f"{p}mlp.down_proj.weight": (d, inner)}
    p = "model.vision_model."
    shapes |= {f"{p}embeddings.cls_token": (1, 1, v), f"{p}embeddings.patch_embed.weight": (v, 3, patch, patch),
               f"{p}embeddings.position_embedding": (1, (vision["image_size"] // patch) ** 2 + 1, v)}
    with_bias(p, embeddings__pre_layernorm=(v,), post_layernorm=(v,))
    for i in range(vision["num_hidden_layers"]):
        with_bias(f"{p}encoder.layers.{i}.", self_attn__query_key_value=(3 * v, v), self_attn__dense=(v, v), mlp__fc1=(v_inner, v),
                  mlp__fc2=(v, v_inner), input_layernorm=(v,), post_attention_layernorm=(v,))
    p = "model.visual_abstractor."
    shapes |= {f"{p}query_embeds": (1, queries, a), f"{p}vit_eos": (1, 1, d)}
    with_bias(p, visual_fc=(d, a))
    for i in range(abstractor["num_hidden_layers"]):
        q = f"{p}encoder.layers.{i}.crossattention."
        shapes |= {f"{q}attention.q_pos_embed": (queries, a), f"{q}attention.k_pos_embed": (abstractor["grid_size"] ** 2 + 1, a)}
        with_bias(q, attention__query=(a, a), attention__key=(a, v), attention__value=(a, v), output__out_proj=(a, a), output__norm2=(a,),
                  output__mlp__w1=(a_inner, a), output__mlp__w2=(a, a_inner), output__mlp__w3=(a_inner, a), output__mlp__ffn_ln=(a_inner,),
                  norm1=(a,), normk=(a,))
    return shapes


def random_state(config, seed=0):
    """Random tensors for every name, none of them 0 or 1 throughout, so that each of them matters."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in published_shapes(config).items():
        state[name] = torch.randn(shape, generator=generator) * 0.25
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    return state


def oracle(state, config, picture, ids):
    """Logits (T, vocabulary) in float64 for one picture (3, S, S) in place of id -200: formulas by name, token by token, head by head."""
    w = {name: tensor.double() for name, tensor in state.items()}
    vision, abstractor = config["visual_config"]["visual_model"], config["visual_config"]["visual_abstractor"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def layer_norm(x, name, eps):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rms_norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def attend(q, k, v, mask=0.0):  # one head, (T, d) each
        return torch.softmax(q @ k.T / q.shape[-1] ** 0.5 + mask, -1) @ v

    # the vision model: MplugOwlVisionEmbeddings, MplugOwlVisionEncoderLayer
    patch, n, p = vision["patch_size"], vision["image_size"] // vision["patch_size"], "model.vision_model."
    kernel = w[f"{p}embeddings.patch_embed.weight"].flatten(1)
    rows = [w[f"{p}embeddings.cls_token"][0, 0]]
    for row in range(n):
        for column in range(n):
            rows.append(kernel @ picture[:, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch].double().flatten())
    x = layer_norm(torch.stack(rows) + w[f"{p}embeddings.position_embedding"][0], f"{p}embeddings.pre_layernorm", vision["layer_norm_eps"])
    heads, d = vision["num_attention_heads"], vision["hidden_size"] // vision["num_attention_heads"]
    for i in range(vision["num_hidden_layers"]):
        q = f"{p}encoder.layers.{i}."
        mixed = linear(layer_norm(x, f"{q}input_layernorm", vision["layer_norm_eps"]), f"{q}self_attn.query_key_value")
        parts = [mixed[:, 3 * d * head:3 * d * (head + 1)] for head in range(heads)]
        x = x + linear(torch.cat([attend(*part.split(d, 1)) for part in parts], 1), f"{q}self_attn.dense")
        hidden = linear(layer_norm(x, f"{q}post_attention_layernorm", vision["layer_norm_eps"]), f"{q}mlp.fc1")
        x = x + linear(hidden / (1 + torch.exp(-1.702 * hidden)), f"{q}mlp.fc2")
    seen = layer_norm(x, f"{p}post_layernorm", vision["layer_norm_eps"])

    # the abstractor: MplugOwlVisualAbstractorAttention, ...MultiHeadAttention, ...CrossOutput, ...MLP. Its norms have torch's own eps, 1e-5
    p, x = "model.visual_abstractor.", w["model.visual_abstractor.query_embeds"][0]
    d = abstractor["hidden_size"] // abstractor["num_attention_heads"]
    for i in range(abstractor["num_hidden_layers"]):
        q = f"{p}encoder.layers.{i}.crossattention."
        hidden = layer_norm(x, f"{q}norm1", 1e-5)
        context = torch.cat([hidden, layer_norm(seen, f"{q}normk", 1e-5)])
        places = torch.cat([w[f"{q}attention.q_pos_embed"], w[f"{q}attention.k_pos_embed"]])
        query = linear(hidden + w[f"{q}attention.q_pos_embed"], f"{q}attention.query")
        key, value = linear(context + places, f"{q}attention.key"), linear(context, f"{q}attention.value")
        got = torch.cat([attend(a, b, c) for a, b, c in zip(query.split(d, 1), key.split(d, 1), value.split(d, 1))], 1)
        hidden = hidden + linear(got, f"{q}output.out_proj")
        normed = layer_norm(hidden, f"{q}output.norm2", 1e-5)
        gate = linear(normed, f"{q}output.mlp.w1")
        inner = layer_norm(gate / (1 + torch.exp(-gate)) * linear(normed, f"{q}output.mlp.w3"), f"{q}output.mlp.ffn_ln", abstractor["layer_norm_eps"])
        x = hidden + linear(inner, f"{q}output.mlp.w2")
    picture_tokens = torch.cat([linear(x, f"{p}visual_fc"), w[f"{p}vit_eos"][0]])

    # the language model: prepare_inputs_labels_for_multimodal, LlamaDecoderLayer with MultiwayNetwork
    embeds, modality = [], []
    for token in ids:
        embeds.append(picture_tokens if token == -200 else w["model.embed_tokens.weight"][token][None])
        modality += [token == -200] * len(embeds[-1])
    x, modality, length = torch.cat(embeds), torch.tensor(modality)[:, None], len(modality)
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    d = config["hidden_size"] // config["num_attention_heads"]
    turns = [[t / config["rope_theta"] ** (2 * j / d) for j in range(d // 2)] for t in range(length)]
    turns = torch.polar(torch.ones(length, d // 2, dtype=torch.float64), torch.tensor(turns, dtype=torch.float64))

    def rope(y):  # one head, (T, d): channels j and j + d / 2 are one complex number
        y = torch.complex(y[:, :d // 2], y[:, d // 2:]) * turns
        return torch.cat([y.real, y.imag], 1)

    def multiway(function, y, name):
        return torch.where(modality, function(y, f"{name}.multiway.1"), function(y, f"{name}.multiway.0"))

    for i in range(config["num_hidden_layers"]):
        q = f"model.layers.{i}."
        hidden = multiway(rms_norm, x, f"{q}input_layernorm")
        query, key = linear(hidden, f"{q}self_attn.q_proj"), multiway(linear, hidden, f"{q}self_attn.k_proj")
        value = multiway(linear, hidden, f"{q}self_attn.v_proj")
        got = [attend(rope(a), rope(b), c, mask) for a, b, c in zip(query.split(d, 1), key.split(d, 1), value.split(d, 1))]
        x = x + linear(torch.cat(got, 1), f"{q}self_attn.o_proj")
        hidden = multiway(rms_norm, x, f"{q}post_attention_layernorm")
        gate = linear(hidden, f"{q}mlp.gate_proj")
        x = x + linear(gate / (1 + torch.exp(-gate)) * linear(hidden, f"{q}mlp.up_proj"), f"{q}mlp.down_proj")
    return linear(rms_norm(x, "model.norm"), "lm_head")


def oracle_score(state, config, picture):
    ids = deqa.BEFORE + [-200] + deqa.AFTER
    ids_of = {piece.strip("▁"): token for token, piece in PIECES.items()}
    logits = oracle(state, config, picture, ids)[-1]
    probability = torch.softmax(torch.stack([logits[ids_of[word]] for word in VALUE]), 0)
    return sum(p * value for p, value in zip(probability.tolist(), VALUE.values()))


def write(folder, state, shards=1, kind="safetensors", config=CONFIG):
    """A checkpoint folder as the hub has it, with a stand-in for the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"tokens")
    names = sorted(state)
    for i in range(shards):
        part = {name: state[name].contiguous() for name in names[i::shards]}
        if kind == "safetensors":
            save_file(part, folder / f"model-{i + 1:05}-of-{shards:05}.safetensors")
        else:
            torch.save(part, folder / f"pytorch_model-{i + 1:05}-of-{shards:05}.bin")
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


def test_logits_equal_the_published_layout(state, images):
    net = Owl2(CONFIG)
    net.load_state_dict(state)
    pixels = pixels_of(images, 56)
    with torch.no_grad():
        got = net(pixels, deqa.BEFORE, deqa.AFTER)
    expected = torch.stack([oracle(state, CONFIG, picture, deqa.BEFORE + [-200] + deqa.AFTER)[-1] for picture in pixels])
    assert expected.std() > 1 and (expected[0] - expected[1]).abs().max() > 0.1, "the test's weights have to tell the images apart"
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


def test_score_equals_the_published_one_from_a_checkpoint_folder(state, images, home):
    write(home, state)
    scorer = DeQA("cpu", torch.float32)
    got = scorer(images, ["a prompt"] * 3)
    assert got.dtype == torch.float32 and got.device.type == "cpu" and got.shape == (3,)
    expected = [oracle_score(state, CONFIG, picture) for picture in pixels_of(images, 56)]
    assert max(expected) - min(expected) > 0.01
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(DeQA("cpu", torch.float32, batch=2)(images).numpy(), got.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(state, images, home, dtype):
    write(home, state)
    whole, half = DeQA("cpu", torch.float32), DeQA("cpu", dtype)
    assert {tensor.dtype for tensor in half.net.state_dict().values()} == {dtype}
    torch.testing.assert_close(half(images), whole(images), atol=0.1, rtol=0)


@pytest.mark.parametrize("word, value", VALUE.items())
def test_a_sure_word_scores_its_level_and_no_preference_3(state, images, home, word, value):
    token = next(token for token, piece in PIECES.items() if piece == f"▁{word}")
    write(home, state)
    scorer = DeQA("cpu", torch.float32)
    scorer.net.lm_head.weight = torch.nn.Parameter(torch.zeros_like(scorer.net.lm_head.weight))
    assert scorer(images[:1]).item() == pytest.approx(3)
    scorer.net.model.norm.weight = torch.nn.Parameter(torch.zeros(64))
    scorer.net.model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    scorer.net.lm_head.weight.data[token] = 1.0
    assert scorer(images[:1]).item() == pytest.approx(value, abs=1e-4)


def test_tokens_spell_the_prompt_and_the_levels():
    def text(ids):
        return "".join(PIECES[token] for token in ids).replace("▁", " ")
    before, after = "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is".split("<|image|>")
    assert deqa.PROMPT == f"{before}<|image|>{after}"
    assert text(deqa.BEFORE) == f"<s> {before}" and text(deqa.AFTER) == f" {after}"
    assert {PIECES[token].strip("▁"): value for token, value in deqa.LEVELS.items()} == VALUE


def test_tokens_equal_sentencepiece_on_the_released_tokenizer():
    path = Path(os.environ.get("REWARD_MODELS", "")) / "DeQA-Score-Mix3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no released tokenizer at $REWARD_MODELS/DeQA-Score-Mix3: {path}")
    sentencepiece = pytest.importorskip("sentencepiece", reason="reads tokenizer.model, to check the ids in deqa.py")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == deqa.TOKENIZER
    split = sentencepiece.SentencePieceProcessor(model_file=str(path))
    before, after = deqa.PROMPT.split("<|image|>")
    assert [split.bos_id()] + split.encode(before) == deqa.BEFORE and split.encode(after) == deqa.AFTER
    assert [split.encode(word)[0] for word in VALUE] == list(deqa.LEVELS)


@pytest.mark.parametrize("height, width", [(448, 448), (512, 512), (300, 517), (640, 333), (20, 31), (449, 448)])
def test_preprocessing_equals_the_clip_processor_within_a_grey_level(height, width):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="the original's processor, on Pillow")
    processor = clip.CLIPImageProcessorPil(size=448, crop_size=448)      # its defaults are the checkpoint's preprocessor_config.json
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x * 40).sin() / 2 + 0.5]) * 0.8 + torch.rand(3, height, width, generator=torch.Generator().manual_seed(2)) * 0.2
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)                         # expand2square: the mean colour, the image in the middle
    square[:] = [122, 116, 104]
    top, left = (side - height) // 2, (side - width) // 2
    square[top:top + height, left:left + width] = np.asarray(picture)
    expected = processor(images=[Image.fromarray(square)], return_tensors="pt")["pixel_values"]
    got = pixels_of(image[None], 448)
    assert got.shape == (1, 3, 448, 448) and got.dtype == torch.float32
    grey = CLIP_STD * 255
    assert ((got - expected) * grey).abs().max() <= 1


def test_pixels_are_rounded_and_clamped_like_the_peers():
    image = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2]).expand(1, 3, 6, 6)
    grey = pixels_of(image, 6) * CLIP_STD + CLIP_MEAN
    np.testing.assert_allclose(grey[0, 0, 0] * 255, [0, 0, 0, 1, 255, 255], atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        pixels_of(torch.full((1, 3, 4, 4), bad), 56)


def test_full_size_has_the_published_names_and_shapes():
    got = {name: tuple(tensor.shape) for name, tensor in meta_net(FULL).state_dict().items()}
    assert got == published_shapes(FULL)
    # as counted on zhiyuanyou/DeQA-Score's own modules (transformers 4.36.1); 16.41 GB in 16 bits is what the hub's shards are said to weigh
    assert len(got) == 862 and sum(np.prod(shape, dtype=np.int64) for shape in got.values()) == 8_204_550_144


@pytest.mark.parametrize("kind, shards", [("safetensors", 3), ("bin", 1), ("bin", 3)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_shards_load_whole_in_the_dtype_asked_for(state, tmp_path, kind, shards, stored):
    stored_state = {name: tensor.to(stored) for name, tensor in state.items()}
    net = meta_net()
    load(net, write(tmp_path, stored_state, shards, kind), "cpu", torch.float32)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, stored_state[name].float(), atol=0, rtol=0)
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"


NORM, FC = "model.layers.1.input_layernorm.multiway.1.weight", "model.visual_abstractor.visual_fc.bias"


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop(NORM), f"{NORM} missing"),
    (lambda state: state.update(extra=torch.zeros(1)), "extra unknown"),
    (lambda state: state.update({FC: torch.zeros(65)}), rf"{FC} \(65,\) instead of \(64,\)"),
    (lambda state: [state.pop(name) for name in list(state) if name.startswith("model.layers.2")], "missing and 3 more"),
    (lambda state: [state.pop(NORM), state.update(extra=torch.zeros(1))], f"{NORM} missing, extra unknown"),
], ids=["missing", "extra", "misshapen", "many", "several"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(state, tmp_path, change, message, kind):
    broken = dict(state)
    change(broken)
    with pytest.raises(ValueError, match=message) as raised:
        load(meta_net(), write(tmp_path, broken, 2, kind), "cpu", torch.float32)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_lost_shard_is_refused(state, tmp_path):
    (write(tmp_path, state, 3) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing .*and \d+ more, expected the 125 tensors"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


def test_shards_of_two_checkpoints_are_refused(state, tmp_path):
    write(write(tmp_path, state, 3), state, 2)
    with pytest.raises(ValueError, match="and in another file of .* expected the shards of one checkpoint"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_shard_is_refused(state, tmp_path, kind):
    path = sorted(write(tmp_path, state, 1, kind).glob("*model-*"))[0]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"got .*{path.name}, which cannot be read"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


class Payload:
    def __reduce__(self):
        return os.getenv, ("HOME",)


def test_a_pickle_that_runs_code_is_refused(state, tmp_path):
    write(tmp_path, {}, 1, "bin")
    torch.save({"model.norm.weight": Payload()}, tmp_path / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(ValueError, match="cannot be read .*Weights only"):
        load(meta_net(), tmp_path, "cpu", torch.float32)


def test_frequencies_of_older_transformers_are_no_weights(state, tmp_path):
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load(meta_net(), write(tmp_path, old), "cpu", torch.float32)


def test_another_tokenizer_is_refused(state, home):
    (write(home, state) / "tokenizer.model").write_bytes(b"others")
    with pytest.raises(ValueError, match="got another tokenizer in .*tokenizer.model, expected LLaMA-2's"):
        DeQA("cpu", torch.float32)


@pytest.mark.parametrize("key, value", [("model_type", "llama"), ("hidden_act", "gelu"), ("rope_scaling", {"type": "linear", "factor": 2.0})])
def test_another_architecture_is_refused(key, value):
    with pytest.raises(ValueError, match=f"got {key} .*only zhiyuanyou/DeQA-Score-Mix3 is supported"):
        meta_net({**CONFIG, key: value})


def test_nothing_is_trained_and_nothing_stays_on_the_meta_device(state, home):
    write(home, state)
    net = DeQA("cpu", torch.float32).net
    assert not net.training and not any(tensor.requires_grad for tensor in net.parameters())
    assert {tensor.device.type for tensor in [*net.parameters(), *net.buffers()]} == {"cpu"}
