"""A stand-in for SD3.5's published folder: the same files and names, every branch of the architecture, random weights, a few megabytes."""
import json

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from model import MMDiT, MMDiTConfig, PREFIX, VAE

# The three released shapes, small. Head dimension 64 is SD3-Medium's, which has no norm to read it from.
MEDIUM = MMDiTConfig(depth=4, width=128, head_dim=64, channels=4, patch=2, pos_max=24, context_dim=96, pooled_dim=80, dual=2)          # SD3.5-Medium: attn2 in the first half
LARGE = MMDiTConfig(depth=5, width=192, head_dim=64, channels=4, patch=2, pos_max=12, context_dim=96, pooled_dim=80, dual=0)           # SD3.5-Large
SD3 = MMDiTConfig(depth=3, width=128, head_dim=64, channels=4, patch=2, pos_max=12, context_dim=96, pooled_dim=80, dual=0, qk_norm=False)    # SD3-Medium


def randomise(module, seed=0):
    """Random in EVERY weight: norms, biases, modulations and the position table included."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for k, v in module.state_dict().items():
        scale = 0.3 if v.dim() <= 1 else v[0].numel() ** -0.5
        state[k] = torch.randn(v.shape, generator=g) * scale + (v.dim() == 1 and k.endswith("weight"))      # norms' weights are around 1
    module.load_state_dict(state)
    return module.requires_grad_(False)


def write_file(path, cfg=MEDIUM, vae=True, prefix=PREFIX["mmdit"], seed=0, dtype=torch.float32):
    tensors = {prefix + k: v.to(dtype) for k, v in randomise(MMDiT(cfg), seed).state_dict().items()}
    if vae:
        net = randomise(VAE(ch=(128, 128), n_res=1, z=cfg.channels), seed + 1)
        tensors.update({PREFIX["vae"] + k: v.to(dtype) for k, v in net.state_dict().items()})
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def write_tokenizers(folder):
    """In the published form: CLIP as vocab.json and merges.txt (the second pads with "!"), T5 as tokenizer.json."""
    merges = [("r", "e"), ("re", "d</w>"), ("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    letters = ["!"] + [chr(c) for c in range(34, 127)]
    words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        d = folder / name
        d.mkdir(parents=True)
        (d / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (d / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
        (d / "special_tokens_map.json").write_text(json.dumps(special))
        (d / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(c, -3.0 - i / 100) for i, c in enumerate('abcdefghijklmnopqrstuvwxyz"0123456789')]
    T5Tokenizer(vocab=pieces + [("▁red", -4.0), ("▁a", -2.5)], extra_ids=0).save_pretrained(folder / "tokenizer_3")
    config = json.loads((folder / "tokenizer_3/tokenizer_config.json").read_text())
    (folder / "tokenizer_3/tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5TokenizerFast"}))
    return len(words), len(pieces) + 2


def write_folder(folder, seed=0):
    """sd3.5_medium.safetensors, text_encoder*/, tokenizer*/."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "sd3.5_medium.safetensors", seed=seed)
    words, pieces = write_tokenizers(folder)
    for name, hidden, projection in (("text_encoder", 32, 32), ("text_encoder_2", 48, 48)):
        # eos_token_id 2 is what the published configs say; transformers then takes the largest id for the end of the text
        config = CLIPTextConfig(vocab_size=words, hidden_size=hidden, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=projection,
                                hidden_act="quick_gelu" if projection == 32 else "gelu", eos_token_id=2, bos_token_id=0, pad_token_id=1)
        randomise(CLIPTextModelWithProjection(config), seed + hidden).save_pretrained(folder / name)
    config = T5Config(vocab_size=pieces, d_model=96, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    randomise(T5EncoderModel(config), seed + 5).save_pretrained(folder / "text_encoder_3")
    return folder
