"""DeQA-Score: how good an image looks, from 1 (bad) to 5 (excellent), whatever its prompt.

    deqa = DeQA("cuda", torch.float16)           # loads 16.4 GB
    deqa(images)                                 # (N, 3, H, W) in [0, 1] -> (N,) float32 on the CPU

The model is mPLUG-Owl2. A CLIP-like ViT-L/14 turns the image, at 448 x 448, into 1025 tokens. An
abstractor with 64 learned queries reduces them to 65 tokens. A LLaMA-2 7B then continues "The
quality of the image is". In it, text and image have separate norms, keys and values. Its next word
gives probabilities of bad, poor, fair, good and excellent. The score is the expected level, 1 to 5.

This is plain torch, without remote code. Parameter names are those of the released checkpoint, so
its files load strictly and nothing is remapped. An image costs 2 TFLOP: 0.72 in the ViT, 0.04 in
the abstractor, 1.2 in LLaMA.

Papers: DeQA-Score arXiv 2501.11561, mPLUG-Owl2 arXiv 2311.04257. Facts are from
zhiyuanyou/DeQA-Score, by file and line below.
DEVIATION: flow_grpo sends the image to a server as a JPEG of quality 75, and trains on the score
/ 5. Here the image is seen as it is, and the score is the reported one.
"""
import hashlib
import json
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from plumbing.files import check_shapes, open_tensors, read_pt, shapes_of
from scorers.pixels import CLIP_MEAN, clip_input, to_uint8
from scorers.weights import weights

REPO = "zhiyuanyou/DeQA-Score-Mix3"

# The one prompt (src/evaluate/scorer.py:18), and its token ids from LLaMA-2's tokenizer. The parts
# before and after the image are tokenized separately (src/mm_utils.py:53). Token ids are fixed with
# the weights. So they are written here, and no tokenizer has to be loaded.
PROMPT = ("USER: How would you rate the quality of this image?\n<|image|>\n"
          "ASSISTANT: The quality of the image is")
# <s> USER: ... this image? \n
BEFORE = [1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13]
# \n ASSISTANT: The ... image is
AFTER = [29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338]
# excellent, good, fair, poor, bad
LEVELS = {15129: 5, 1781: 4, 6534: 3, 6460: 2, 4319: 1}
# sha256 of LLaMA-2's tokenizer.model
TOKENIZER = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"

# ------------------------------------------------------------------ the image


def pixels_of(images, size):
    """images (N, 3, H, W) in [0, 1] -> (N, 3, size, size) float32, normalised.

    Each image is padded to a square with the mean colour (src/evaluate/scorer.py:42), then resized.
    """
    colour = tuple(int(255 * mean) for mean in CLIP_MEAN)
    squares = []
    for array in to_uint8(images):
        height, width = array.shape[:2]
        side = max(height, width)
        square = Image.new("RGB", (side, side), colour)
        middle = ((side - width) // 2, (side - height) // 2)
        square.paste(Image.fromarray(array), middle)
        squares.append(square)
    return clip_input(squares, size)


# ------------------------------------------------------------------ parts of the network

# B images, T tokens, D width, h heads of width d.


def group(**modules):
    """Modules under one name: group(a=...) called b holds b.a.*, as the checkpoint names it."""
    return nn.ModuleDict(modules)


def parameter(*shape):
    return nn.Parameter(torch.empty(shape))


def split_heads(x, heads):
    """(B, T, D) -> (B, h, T, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(q, k, v, causal=False):
    """(B, h, T, d) each -> (B, T, D)"""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class VisionLayer(nn.Module):
    """A layer of CLIP's ViT (visual_encoder.py:244), but with q, k and v in one projection."""

    def __init__(self, width, inner, heads, eps):
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.self_attn = group(query_key_value=nn.Linear(width, 3 * width),
                               dense=nn.Linear(width, width))
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.mlp = group(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))

    def forward(self, x):                               # (B, T, D)
        qkv = self.self_attn.query_key_value(self.input_layernorm(x))
        # Within each head, q, k and v lie side by side.
        qkv = qkv.unflatten(-1, (self.heads, 3, -1))    # (B, T, h, 3, d)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)            # (B, h, T, d) each
        x = x + self.self_attn.dense(attention(q, k, v))
        y = self.mlp.fc1(self.post_attention_layernorm(x))
        y = y * torch.sigmoid(1.702 * y)                # CLIP's quick GELU
        return x + self.mlp.fc2(y)


class Vision(nn.Module):
    """pixels (B, 3, S, S) -> (B, 1 + (S / patch)^2, D), normalised (visual_encoder.py:393).

    The first token is the class token, and the others are the patches.
    """

    def __init__(self, image_size, patch_size, hidden_size, intermediate_size, num_hidden_layers,
                 num_attention_heads, layer_norm_eps, **_):
        super().__init__()
        width = hidden_size
        self.image_size = image_size
        self.tokens = 1 + (image_size // patch_size) ** 2
        self.embeddings = group(
            patch_embed=nn.Conv2d(3, width, patch_size, patch_size, bias=False),
            pre_layernorm=nn.LayerNorm(width, layer_norm_eps))
        self.embeddings.cls_token = parameter(1, 1, width)
        self.embeddings.position_embedding = parameter(1, self.tokens, width)
        layers = nn.ModuleList()
        for _ in range(num_hidden_layers):
            layers.append(VisionLayer(width, intermediate_size, num_attention_heads,
                                      layer_norm_eps))
        self.encoder = group(layers=layers)
        self.post_layernorm = nn.LayerNorm(width, layer_norm_eps)

    def forward(self, pixels):
        embed = self.embeddings
        cls = embed.cls_token.expand(len(pixels), -1, -1)
        patches = embed.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([cls, patches], dim=1)            # (B, T, D)
        x = embed.pre_layernorm(x + embed.position_embedding)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorLayer(nn.Module):
    """Queries attend to themselves and to the image (visual_encoder.py:600).

    The position embeddings of queries and image are stored as buffers.
    """

    def __init__(self, width, inner, heads, eps, queries, tokens):
        super().__init__()
        self.heads = heads
        attend = group(query=nn.Linear(width, width),
                       key=nn.Linear(width, width),
                       value=nn.Linear(width, width))
        attend.register_buffer("q_pos_embed", torch.empty(queries, width))
        attend.register_buffer("k_pos_embed", torch.empty(tokens, width))
        mlp = group(w1=nn.Linear(width, inner),
                    w2=nn.Linear(inner, width),
                    w3=nn.Linear(width, inner),
                    ffn_ln=nn.LayerNorm(inner, eps))
        output = group(out_proj=nn.Linear(width, width), norm2=nn.LayerNorm(width), mlp=mlp)
        self.crossattention = group(attention=attend, output=output, norm1=nn.LayerNorm(width),
                                    normk=nn.LayerNorm(width))

    def forward(self, x, image):                        # (B, queries, D), (B, tokens, D)
        cross = self.crossattention
        # The residual connection below starts from the normalised x (line 642).
        x = cross.norm1(x)
        x = x + cross.output.out_proj(self.attend(x, cross.normk(image)))
        y = cross.output.norm2(x)
        mlp = cross.output.mlp
        y = F.silu(mlp.w1(y)) * mlp.w3(y)
        return x + mlp.w2(mlp.ffn_ln(y))

    def attend(self, x, image):
        project = self.crossattention.attention
        both = torch.cat([x, image], dim=1)
        positions = torch.cat([project.q_pos_embed, project.k_pos_embed])
        q = split_heads(project.query(x + project.q_pos_embed), self.heads)
        k = split_heads(project.key(both + positions), self.heads)
        v = split_heads(project.value(both), self.heads)
        return attention(q, k, v)


class Abstractor(nn.Module):
    """image (B, tokens, D) -> (B, queries + 1, width of the language model).

    The last token is the same for all images (visual_encoder.py:757).
    """

    def __init__(self, width_out, tokens, hidden_size, intermediate_size, num_hidden_layers,
                 num_attention_heads, num_learnable_queries, layer_norm_eps, **_):
        super().__init__()
        layers = nn.ModuleList()
        for _ in range(num_hidden_layers):
            layers.append(AbstractorLayer(hidden_size, intermediate_size, num_attention_heads,
                                          layer_norm_eps, num_learnable_queries, tokens))
        self.encoder = group(layers=layers)
        self.query_embeds = parameter(1, num_learnable_queries, hidden_size)
        self.visual_fc = nn.Linear(hidden_size, width_out)
        self.vit_eos = parameter(1, 1, width_out)

    def forward(self, image):
        x = self.query_embeds.expand(len(image), -1, -1)
        for layer in self.encoder.layers:
            x = layer(x, image)
        end = self.vit_eos.expand(len(image), -1, -1)
        return torch.cat([self.visual_fc(x), end], dim=1)


class Multiway(nn.Module):
    """Two modules of one kind: for text tokens and for image tokens (modeling_llama2.py:40)."""

    def __init__(self, make):
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x, image):
        """x (B, T, D); image: the slice of T that is the image."""
        of_text, of_image = self.multiway
        text = torch.cat([x[:, :image.start], x[:, image.stop:]], dim=1)
        before, after = of_text(text).tensor_split([image.start], dim=1)
        return torch.cat([before, of_image(x[:, image].contiguous()), after], dim=1)


def rotary(length, d, theta, device):
    """(cos, sin), each (T, d).

    Position t turns the pair of channels (i, i + d / 2) by the angle t / theta^(2 i / d).
    """
    frequencies = theta ** -(torch.arange(0, d, 2, device=device) / d)
    angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, rope):                                    # x (B, h, T, d)
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class LlamaLayer(nn.Module):
    """A layer of LLaMA (modeling_llama2.py:510).

    Its norms, keys and values depend on the modality.
    """

    def __init__(self, width, inner, heads, eps):
        super().__init__()
        self.heads = heads
        square = partial(nn.Linear, width, width, bias=False)
        norm = partial(nn.RMSNorm, width, eps)
        self.input_layernorm = Multiway(norm)
        self.self_attn = group(q_proj=square(), k_proj=Multiway(square), v_proj=Multiway(square),
                               o_proj=square())
        self.post_attention_layernorm = Multiway(norm)
        self.mlp = group(gate_proj=nn.Linear(width, inner, bias=False),
                         up_proj=nn.Linear(width, inner, bias=False),
                         down_proj=nn.Linear(inner, width, bias=False))

    def forward(self, x, image, rope):                  # x (B, T, D)
        attend = self.self_attn
        y = self.input_layernorm(x, image)
        q = rotate(split_heads(attend.q_proj(y), self.heads), rope)
        k = rotate(split_heads(attend.k_proj(y, image), self.heads), rope)
        v = split_heads(attend.v_proj(y, image), self.heads)
        x = x + attend.o_proj(attention(q, k, v, causal=True))
        y = self.post_attention_layernorm(x, image)
        mlp = self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


# ------------------------------------------------------------------ the network


class Owl2(nn.Module):
    """mPLUG-Owl2. config: the checkpoint's config.json as a dict."""

    def __init__(self, config):
        super().__init__()
        supported = {"model_type": "mplug_owl2", "hidden_act": "silu", "rope_scaling": None}
        for key, expected in supported.items():
            if config.get(key, expected) != expected:
                raise ValueError(f"DeQA config.json: got {key} {config[key]!r}, "
                                 f"expected {expected!r}: only {REPO} is supported")
        self.heads = config["num_attention_heads"]
        self.theta = config.get("rope_theta", 10000.0)
        width = config["hidden_size"]
        eps = config["rms_norm_eps"]
        visual = config["visual_config"]
        vision = Vision(**visual["visual_model"])
        abstractor = Abstractor(width, vision.tokens, **visual["visual_abstractor"])
        layers = nn.ModuleList()
        for _ in range(config["num_hidden_layers"]):
            layers.append(LlamaLayer(width, config["intermediate_size"], self.heads, eps))
        self.model = group(vision_model=vision,
                           visual_abstractor=abstractor,
                           embed_tokens=nn.Embedding(config["vocab_size"], width),
                           layers=layers,
                           norm=nn.RMSNorm(width, eps))
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)

    def forward(self, pixels, before, after):
        """Logits (B, vocabulary) of the next token.

        pixels (B, 3, S, S) stand between the lists of token ids, before and after.
        """
        m = self.model
        picture = m.visual_abstractor(m.vision_model(pixels))           # (B, 65, D)
        first = self.embed(before, pixels)
        x = torch.cat([first, picture, self.embed(after, pixels)], dim=1)
        image = slice(len(before), len(before) + picture.shape[1])
        length, width = x.shape[1:]
        rope = rotary(length, width // self.heads, self.theta, x.device)
        for layer in m.layers:
            x = layer(x, image, rope)
        return self.lm_head(m.norm(x[:, -1]))

    def embed(self, tokens, pixels):
        """A list of token ids -> (B, T, D), the same for all pixels (B, 3, S, S)."""
        tokens = torch.tensor(tokens, device=pixels.device)
        return self.model.embed_tokens(tokens).expand(len(pixels), -1, -1)


# ------------------------------------------------------------------ the weights


def tensors_of(folder):
    """{name: function that reads the tensor}, for all shards in folder.

    The files are mapped, not read.
    """
    found = {}
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for path in paths:
        if path.suffix == ".bin":
            shard = read_pt(path, ours=False)
            read = shard.__getitem__
        else:
            shard = open_tensors(path)
            read = shard.get_tensor
        for name in shard.keys():
            if name in found:
                raise ValueError(f"DeQA weights: got {name} in {path.name} and in another file of "
                                 f"{folder}, expected the shards of one checkpoint")
            found[name] = partial(read, name)
    return found


def load(net, folder, device, dtype):
    """Give net, which may be on the meta device, the weights in folder.

    The tensors are converted one by one and assigned, so that memory holds only one copy.
    """
    reads = tensors_of(folder)
    # transformers before 4.32 also saved RoPE's frequencies, which are not weights.
    names = [name for name in reads if not name.endswith("rotary_emb.inv_freq")]
    want = shapes_of(net.state_dict())
    got = {name: tuple(reads[name]().shape) for name in names}
    check_shapes(want, got, f"DeQA weights in {folder}, expected a whole copy of {REPO}")
    tensors = {name: reads[name]().to(device, dtype) for name in names}
    net.load_state_dict(tensors, assign=True)


def check_tokenizer(path):
    """ValueError unless path is the tokenizer whose token ids BEFORE and AFTER are."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != TOKENIZER:
        raise ValueError(f"DeQA: got another tokenizer in {path}, expected LLaMA-2's, "
                         f"sha256 {TOKENIZER}: copy {REPO}'s")


class DeQA:
    """images (N, 3, H, W) in [0, 1] -> (N,) float32 on the CPU, 1 (bad) to 5 (excellent).

    Prompts are not looked at.
    """

    def __init__(self, device, dtype, batch=16):
        shards = "*model-*"
        folder = weights(REPO, "config.json", "tokenizer.model", shards)
        check_tokenizer(folder / "tokenizer.model")
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):
            self.net = Owl2(config).eval().requires_grad_(False)
        load(self.net, folder, device, dtype)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images, prompts=None):
        head = self.net.lm_head.weight
        size = self.net.model.vision_model.image_size
        tokens = list(LEVELS)
        levels = torch.tensor(list(LEVELS.values()), dtype=torch.float32)
        scores = []
        for part in images.split(self.batch):
            pixels = pixels_of(part, size).to(head)
            logits = self.net(pixels, BEFORE, AFTER)[:, tokens]
            # The original computes this in half precision, in which scores have steps of 0.002 or
            # more. Here it is float32.
            scores.append(logits.float().softmax(-1).cpu() @ levels)
        return torch.cat(scores)
