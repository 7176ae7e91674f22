"""A stand-in for SD3.5's published folder, of a few megabytes.

It has the same files and names, every branch of the architecture, and random weights.
"""
import dataclasses
import json

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from model import PREFIX, MMDiT, MMDiTConfig
from worlds.vae import VAE

# The three released shapes, small. Head dimension 64 is SD3-Medium's, which has no norm to read it
# from. SD3.5-Medium has attn2 in the first half.
MEDIUM = MMDiTConfig(depth=4, width=128, head_dim=64, channels=4, patch=2, pos_max=24,
                     context_dim=96, pooled_dim=80, dual=2)
LARGE = dataclasses.replace(MEDIUM, depth=5, width=192, pos_max=12, dual=0)
SD3 = dataclasses.replace(MEDIUM, depth=3, pos_max=12, dual=0, qk_norm=False)


def randomise(module, seed=0):
    """Random in EVERY weight: norms, biases, modulations and the position table included."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        scale = 0.3 if tensor.dim() <= 1 else tensor[0].numel() ** -0.5
        state[name] = torch.randn(tensor.shape, generator=g) * scale
        if tensor.dim() == 1 and name.endswith("weight"):        # norms' weights are around 1
            state[name] += 1
    module.load_state_dict(state)
    return module.requires_grad_(False)


def write_file(path, cfg=MEDIUM, vae=True, prefix=PREFIX["mmdit"], seed=0, dtype=torch.float32):
    nets = {prefix: randomise(MMDiT(cfg), seed)}
    if vae:
        nets[PREFIX["vae"]] = randomise(VAE(ch=(128, 128), n_res=1, z=cfg.channels), seed + 1)
    tensors = {}
    for start, net in nets.items():
        for name, tensor in net.state_dict().items():
            tensors[start + name] = tensor.to(dtype).contiguous()
    save_file(tensors, path)


def write_clip_tokenizer(folder, pad):
    merges = [("r", "e"), ("re", "d</w>"), ("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    letters = ["!"] + [chr(code) for code in range(34, 127)]
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
    return len(words)


def write_t5_tokenizer(folder):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    for i, letter in enumerate('abcdefghijklmnopqrstuvwxyz"0123456789'):
        pieces.append((letter, -3.0 - i / 100))
    pieces += [("▁red", -4.0), ("▁a", -2.5)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "T5TokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(pieces)


def write_tokenizers(folder):
    """In the published form: CLIP as vocab.json and merges.txt, T5 as tokenizer.json.

    The second of CLIP's pads with "!". Returns the sizes of CLIP's and T5's vocabulary.
    """
    words = write_clip_tokenizer(folder / "tokenizer", "<|endoftext|>")
    write_clip_tokenizer(folder / "tokenizer_2", "!")
    return words, write_t5_tokenizer(folder / "tokenizer_3")


def write_folder(folder, seed=0):
    """sd3.5_medium.safetensors, text_encoder*/, tokenizer*/."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "sd3.5_medium.safetensors", seed=seed)
    words, pieces = write_tokenizers(folder)
    for name, width, act in (("text_encoder", 32, "quick_gelu"), ("text_encoder_2", 48, "gelu")):
        # eos_token_id 2 is what the published configs say; transformers then takes the largest id
        # for the end of the text.
        config = CLIPTextConfig(vocab_size=words, hidden_size=width, intermediate_size=64,
                                num_hidden_layers=3, num_attention_heads=2, projection_dim=width,
                                hidden_act=act, eos_token_id=2, bos_token_id=0, pad_token_id=1)
        net = randomise(CLIPTextModelWithProjection(config), seed + width)
        net.save_pretrained(folder / name)
    config = T5Config(vocab_size=pieces, d_model=96, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu")
    randomise(T5EncoderModel(config), seed + 5).save_pretrained(folder / "text_encoder_3")
    return folder
