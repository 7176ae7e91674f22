"""SD3.5-Medium in its published size, with random weights, in a folder like the published one.

The transformer and the VAE have all their layers. The text encoders have the published widths, but
only two layers: they run once per prompt and are unloaded before training.
"""
import sys
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from checkpoints.formats import write_peft
from model import PREFIX, MMDiT, MMDiTConfig
from plumbing.files import write_tensors
from worlds.vae import VAE

TESTS = Path(__file__).parent.parent / "tests"
TASKS = ("geneval", "ocr", "quality")
FILE = "sd3.5_medium.safetensors"


def write_tokenizers(folder):
    """Write small tokenizers in the published form. Returns the vocabulary sizes of CLIP and T5."""
    sys.path.insert(0, str(TESTS))
    import mini_sd3
    return mini_sd3.write_tokenizers(folder)


def random_weights(net, prefix, generator):
    """Random bfloat16 weights for a net on the meta device: {prefix + name: tensor}.

    They are scaled so that signals neither vanish nor explode.
    """
    tensors = {}
    for name, like in net.state_dict().items():
        scale = 0.02
        if like.dim() > 1:
            scale = 0.5 * like[0].numel() ** -0.5
        weight = torch.randn(like.shape, generator=generator) * scale
        if like.dim() == 1 and name.endswith("weight"):         # of a norm: about 1
            weight += 1
        tensors[prefix + name] = weight.bfloat16()
    return tensors


def random_adapter(net, generator, r=32):
    tensors = {}
    for name, shape in net.adapter_shapes(r).items():
        scale = 0.02 if name.endswith(".A") else 0.01
        tensors[name] = torch.randn(shape, generator=generator) * scale
    return {"tensors": tensors, "r": r, "alpha": 2 * r}


def write_text_encoders(folder):
    clip_words, t5_words = write_tokenizers(folder)
    for name, width, heads in (("text_encoder", 768, 12), ("text_encoder_2", 1280, 20)):
        config = CLIPTextConfig(vocab_size=clip_words, hidden_size=width,
                                intermediate_size=4 * width, num_hidden_layers=2,
                                num_attention_heads=heads, projection_dim=width,
                                bos_token_id=0, pad_token_id=1, eos_token_id=2)
        CLIPTextModelWithProjection(config).bfloat16().save_pretrained(folder / name)
    config = T5Config(vocab_size=t5_words, d_model=4096, d_kv=64, d_ff=10240, num_layers=2,
                      num_heads=64, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).bfloat16().save_pretrained(folder / "text_encoder_3")


def make(folder):
    """Write the model in bfloat16, and a PEFT adapter of rank 32 for each task."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig())
        vae = VAE()
    tensors = random_weights(mmdit, PREFIX["mmdit"], generator)
    tensors |= random_weights(vae, PREFIX["vae"], generator)
    for task in TASKS:
        adapter = random_adapter(mmdit, generator)
        write_peft(folder / task, adapter, "stabilityai/stable-diffusion-3.5-medium")
    write_text_encoders(folder)
    write_tensors(folder / FILE, tensors)               # last, so it marks a whole folder
