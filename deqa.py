"""DeQA-Score: how good an image looks, from 1 (bad) to 5 (excellent), whatever its prompt.

    deqa = DeQA("cuda", torch.float16)              # loads 16.4 GB, once a process
    deqa(images)                                    # (N, 3, H, W) in [0, 1] -> (N,) float32 on the CPU

The model is mPLUG-Owl2: a CLIP-like ViT-L/14 sees the image at 448 x 448, an abstractor of 64 learned queries sums its 1025 tokens
up in 65, and a LLaMA-2 7B in which text and image have norms, keys and values of their own continues
"The quality of the image is". The score is the expected level under its next word, of excellent, good, fair, poor and bad.

Plain torch, no remote code. Parameter names are those of the released checkpoint, so its files load strictly and nothing is remapped.
2 TFLOP an image: 0.72 the ViT, 0.04 the abstractor, 1.2 LLaMA.

Papers: DeQA-Score arXiv 2501.11561, mPLUG-Owl2 arXiv 2311.04257. Facts are from zhiyuanyou/DeQA-Score, by file and line below.
DEVIATION: flow_grpo sends the image as a JPEG of quality 75 to a server and trains on the score / 5; here it is seen as it is, and
the score is the reported one.
"""
import hashlib
import json
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import nn

from scorers import CLIP_MEAN, normalize, to_uint8, weights

REPO = "zhiyuanyou/DeQA-Score-Mix3"

# The one prompt (src/evaluate/scorer.py:18), as LLaMA-2's tokenizer splits it: the parts around the image are split apart from each
# other (src/mm_utils.py:53). Token ids belong to the weights, so they stand here, and no tokenizer has to be loaded.
PROMPT = "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is"
BEFORE = [1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13]     # <s> USER: ... this image? \n
AFTER = [29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338]                  # \n ASSISTANT: The ... image is
LEVELS = {15129: 5, 1781: 4, 6534: 3, 6460: 2, 4319: 1}                                         # excellent, good, fair, poor, bad
TOKENIZER = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"                   # sha256 of LLaMA-2's tokenizer.model

# ------------------------------------------------------------------ the image


def pixels_of(images, size):
    """images (N, 3, H, W) in [0, 1] -> (N, 3, size, size) float32, normalised: on a square of the mean colour, then bicubic."""
    colour = tuple(int(255 * mean) for mean in CLIP_MEAN.flatten().tolist())                         # scorer.py:42
    squares = []
    for array in to_uint8(images):
        height, width = array.shape[:2]
        side = max(height, width)
        square = Image.new("RGB", (side, side), colour)
        square.paste(Image.fromarray(array), ((side - width) // 2, (side - height) // 2))
        squares.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
    x = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255
    return normalize(x)                                                                          # CLIP's


# ------------------------------------------------------------------ the network. B images, T tokens, D width, h heads of width d


def group(**modules):
    """Modules under one name: group(a=...) called b holds the parameters b.a.*, as the checkpoint has them."""
    return nn.ModuleDict(modules)


def parameter(*shape):
    return nn.Parameter(torch.empty(shape))


def split_heads(x, heads):                                               # (B, T, D) -> (B, h, T, d)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(q, k, v, causal=False):                                    # (B, h, T, d) each -> (B, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class VisionLayer(nn.Module):
    """A layer of CLIP's ViT (visual_encoder.py:244), but with q, k and v in one projection."""

    def __init__(self, width, inner, heads, eps):
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.self_attn = group(query_key_value=nn.Linear(width, 3 * width), dense=nn.Linear(width, width))
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.mlp = group(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))

    def forward(self, x):                                                # (B, T, D)
        qkv = self.self_attn.query_key_value(self.input_layernorm(x))
        q, k, v = qkv.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)          # side by side within each head
        x = x + self.self_attn.dense(attention(q, k, v))
        y = self.mlp.fc1(self.post_attention_layernorm(x))
        return x + self.mlp.fc2(y * torch.sigmoid(1.702 * y))            # CLIP's quick GELU


class Vision(nn.Module):
    """pixels (B, 3, S, S) -> (B, 1 + (S / patch)^2, D): a class token and the patches, normalised (visual_encoder.py:393)."""

    def __init__(self, image_size, patch_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, layer_norm_eps, **_):
        super().__init__()
        width, eps = hidden_size, layer_norm_eps
        self.image_size, self.tokens = image_size, 1 + (image_size // patch_size) ** 2
        self.embeddings = group(patch_embed=nn.Conv2d(3, width, patch_size, patch_size, bias=False), pre_layernorm=nn.LayerNorm(width, eps))
        self.embeddings.cls_token = parameter(1, 1, width)
        self.embeddings.position_embedding = parameter(1, self.tokens, width)
        layers = [VisionLayer(width, intermediate_size, num_attention_heads, eps) for _ in range(num_hidden_layers)]
        self.encoder = group(layers=nn.ModuleList(layers))
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels):
        e = self.embeddings
        patches = e.patch_embed(pixels).flatten(2).transpose(1, 2)       # (B, T - 1, D)
        x = torch.cat([e.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        x = e.pre_layernorm(x + e.position_embedding)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorLayer(nn.Module):
    """Queries attend to themselves and to the image (visual_encoder.py:600), with the positions of both stored as buffers."""

    def __init__(self, width, inner, heads, eps, queries, tokens):
        super().__init__()
        self.heads = heads
        attend = group(query=nn.Linear(width, width), key=nn.Linear(width, width), value=nn.Linear(width, width))
        attend.register_buffer("q_pos_embed", torch.empty(queries, width))
        attend.register_buffer("k_pos_embed", torch.empty(tokens, width))
        mlp = group(w1=nn.Linear(width, inner), w2=nn.Linear(inner, width), w3=nn.Linear(width, inner), ffn_ln=nn.LayerNorm(inner, eps))
        output = group(out_proj=nn.Linear(width, width), norm2=nn.LayerNorm(width), mlp=mlp)
        self.crossattention = group(attention=attend, output=output, norm1=nn.LayerNorm(width), normk=nn.LayerNorm(width))

    def forward(self, x, image):                                         # x (B, queries, D), image (B, tokens, D)
        c, a, out, mlp = self.crossattention, self.crossattention.attention, self.crossattention.output, self.crossattention.output.mlp
        x = c.norm1(x)                                                   # what is added to below is the normalised x (line 642)
        both = torch.cat([x, c.normk(image)], dim=1)
        q, k, v = a.query(x + a.q_pos_embed), a.key(both + torch.cat([a.q_pos_embed, a.k_pos_embed])), a.value(both)
        x = x + out.out_proj(attention(*(split_heads(y, self.heads) for y in (q, k, v))))
        y = out.norm2(x)
        return x + mlp.w2(mlp.ffn_ln(F.silu(mlp.w1(y)) * mlp.w3(y)))


class Abstractor(nn.Module):
    """image (B, tokens, D) -> (B, queries + 1, width of the language model); the last is the same for all images (visual_encoder.py:757)."""

    def __init__(self, width_out, tokens, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_learnable_queries,
                 layer_norm_eps, **_):
        super().__init__()
        sizes = (hidden_size, intermediate_size, num_attention_heads, layer_norm_eps, num_learnable_queries, tokens)
        self.encoder = group(layers=nn.ModuleList([AbstractorLayer(*sizes) for _ in range(num_hidden_layers)]))
        self.query_embeds = parameter(1, num_learnable_queries, hidden_size)
        self.visual_fc = nn.Linear(hidden_size, width_out)
        self.vit_eos = parameter(1, 1, width_out)

    def forward(self, image):
        x = self.query_embeds.expand(len(image), -1, -1)
        for layer in self.encoder.layers:
            x = layer(x, image)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(image), -1, -1)], dim=1)


class Multiway(nn.Module):
    """Two modules of a kind (modeling_llama2.py:40): the first for tokens of text, the second for those of the image."""

    def __init__(self, make):
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x, image):                                         # x (B, T, D); image: the slice of T that is the image
        text, picture = self.multiway
        y = text(torch.cat([x[:, :image.start], x[:, image.stop:]], dim=1))
        return torch.cat([y[:, :image.start], picture(x[:, image].contiguous()), y[:, image.start:]], dim=1)


def rotary(length, d, theta, device):
    """(cos, sin), each (T, d): position t turns the pair of channels (i, i + d / 2) by the angle t / theta^(2 i / d)."""
    angles = torch.outer(torch.arange(length, device=device), theta ** -(torch.arange(0, d, 2, device=device) / d)).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, rope):                                                     # (B, h, T, d)
    cos, sin = (y.to(x.dtype) for y in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LlamaLayer(nn.Module):
    """A layer of LLaMA whose norms, keys and values depend on the modality (modeling_llama2.py:510)."""

    def __init__(self, width, inner, heads, eps):
        super().__init__()
        self.heads = heads
        linear = partial(nn.Linear, bias=False)
        self.input_layernorm = Multiway(lambda: nn.RMSNorm(width, eps))
        self.self_attn = group(q_proj=linear(width, width), k_proj=Multiway(lambda: linear(width, width)),
                               v_proj=Multiway(lambda: linear(width, width)), o_proj=linear(width, width))
        self.post_attention_layernorm = Multiway(lambda: nn.RMSNorm(width, eps))
        self.mlp = group(gate_proj=linear(width, inner), up_proj=linear(width, inner), down_proj=linear(inner, width))

    def forward(self, x, image, rope):                                   # x (B, T, D)
        a, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x, image)
        q, k, v = (split_heads(y, self.heads) for y in (a.q_proj(y), a.k_proj(y, image), a.v_proj(y, image)))
        x = x + a.o_proj(attention(rotate(q, rope), rotate(k, rope), v, causal=True))
        y = self.post_attention_layernorm(x, image)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class Owl2(nn.Module):
    """mPLUG-Owl2. config: the checkpoint's config.json as a dict."""

    def __init__(self, config):
        super().__init__()
        for key, expected in (("model_type", "mplug_owl2"), ("hidden_act", "silu"), ("rope_scaling", None)):
            if config.get(key, expected) != expected:
                raise ValueError(f"DeQA config.json: got {key} {config[key]!r}, expected {expected!r}: only {REPO} is supported")
        self.heads, self.theta = config["num_attention_heads"], config.get("rope_theta", 10000.0)
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        vision = Vision(**config["visual_config"]["visual_model"])
        layers = [LlamaLayer(width, config["intermediate_size"], self.heads, eps) for _ in range(config["num_hidden_layers"])]
        self.model = group(vision_model=vision, visual_abstractor=Abstractor(width, vision.tokens, **config["visual_config"]["visual_abstractor"]),
                           embed_tokens=nn.Embedding(config["vocab_size"], width), layers=nn.ModuleList(layers), norm=nn.RMSNorm(width, eps))
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)

    def forward(self, pixels, before, after):
        """pixels (B, 3, S, S) between the token ids before and after, lists -> logits of the next token (B, vocabulary)."""
        m = self.model
        picture = m.visual_abstractor(m.vision_model(pixels))            # (B, 65, D)
        text = m.embed_tokens(torch.tensor(before + after, device=pixels.device)).expand(len(pixels), -1, -1)
        x = torch.cat([text[:, :len(before)], picture, text[:, len(before):]], dim=1)
        image = slice(len(before), len(before) + picture.shape[1])
        rope = rotary(x.shape[1], x.shape[2] // self.heads, self.theta, x.device)
        for layer in m.layers:
            x = layer(x, image, rope)
        return self.lm_head(m.norm(x[:, -1]))


# ------------------------------------------------------------------ the weights


def tensors_of(folder):
    """{name: function that reads the tensor} of all shards in folder: the files are mapped, not read."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        try:
            if path.suffix == ".bin":
                shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                names, read = shard.keys(), shard.__getitem__
            else:
                shard = safe_open(path, "pt")
                names, read = shard.keys(), shard.get_tensor
        except Exception as error:  # of the file system, safetensors or the unpickler
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"DeQA weights: got {path}, which cannot be read ({why}); download it again") from error
        for name in names:
            if name in found:
                raise ValueError(f"DeQA weights: got {name} in {path.name} and in another file of {folder}, expected the shards of one checkpoint")
            found[name] = partial(read, name)
    return found


def load(net, folder, device, dtype):
    """Give net, which may be on the meta device, the weights in folder, tensor by tensor: one copy of them in memory."""
    wanted = net.state_dict()
    # transformers before 4.32 saved RoPE's frequencies, which are no weights
    found = {name: read for name, read in tensors_of(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    wrong = [f"{name} missing" for name in wanted if name not in found]
    wrong += [f"{name} unknown" for name in found if name not in wanted]
    wrong += [f"{name} {tuple(found[name]().shape)} instead of {tuple(wanted[name].shape)}" for name in wanted
              if name in found and found[name]().shape != wanted[name].shape]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"DeQA weights in {folder}: got {', '.join(wrong[:10])}{more}, expected the {len(wanted)} tensors of {REPO}: copy it whole")
    net.load_state_dict({name: found[name]().to(device, dtype) for name in wanted}, assign=True)


class DeQA:
    """images (N, 3, H, W) in [0, 1] -> (N,) float32 on the CPU, 1 (bad) to 5 (excellent). Prompts are not looked at."""

    def __init__(self, device, dtype, batch=16):
        folder = weights(REPO, "config.json", "tokenizer.model", "*model-*")                     # the last: the shards
        if hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest() != TOKENIZER:
            raise ValueError(f"DeQA: got another tokenizer in {folder / 'tokenizer.model'}, expected LLaMA-2's, sha256 {TOKENIZER}: copy {REPO}'s")
        with torch.device("meta"):
            self.net = Owl2(json.loads((folder / "config.json").read_text())).eval().requires_grad_(False)
        load(self.net, folder, device, dtype)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images, prompts=None):
        head, scores = self.net.lm_head.weight, []
        for part in images.split(self.batch):
            logits = self.net(pixels_of(part, self.net.model.vision_model.image_size).to(head), BEFORE, AFTER)[:, list(LEVELS)]
            # in float32: half precision, the original's, has steps of 0.002 and more between scores
            scores.append(logits.float().softmax(-1).cpu() @ torch.tensor(list(LEVELS.values()), dtype=torch.float32))
        return torch.cat(scores)
