"""CLIP and what is built on it: PickScore, CLIPScore, LAION's aesthetic predictor and HPSv2."""
import html
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from plumbing.files import check_shapes, read_pt
from scorers.pixels import check_pairs, clip_pixels, clipscore_pixels, hps_pixels
from scorers.weights import count_layers, pretrained, rename, score_head, weights

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"

# ------------------------------------------------------------------ images and prompts compared


def clip_tokenizer(repo):
    return CLIPTokenizer.from_pretrained(weights(repo, "vocab.json", "merges.txt"))


def clip_tokens(tokenizer, prompts):
    """(N, 77) token ids, cut to 77 and padded with 0, as OpenCLIP does.

    The padding does not matter: a token attends only to earlier ones, and the vector of a prompt is
    that of its first end token.
    """
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=77,
                      return_tensors="pt")
    return batch.input_ids * batch.attention_mask


def load_clip(repo):
    return pretrained(CLIPModel, weights(repo, "config.json", "model.safetensors"))


def cosine(net, pixels, ids):
    """Cosine of the embeddings of each image and its prompt: (N,) float32 on the CPU.

    pixels (N, 3, S, S), ids (N, L).
    """
    # Each different prompt is embedded once, whatever the number of its images.
    ids, at = ids.unique(dim=0, return_inverse=True)
    image = net.get_image_features(pixels.to(net.device, net.dtype)).pooler_output
    text = net.get_text_features(ids.to(net.device)).pooler_output
    text = text[at.to(text.device)]
    return F.cosine_similarity(image.float(), text.float()).cpu()


class ClipLogit:
    """logit scale * cosine, for a CLIP whose weights are in transformers' format."""
    repo = ""
    tokenizer_repo = ""
    pixels = None            # a function of pixels.py

    def __init__(self, device, dtype):
        net = load_clip(self.repo)
        # The scale is read before half precision rounds its logarithm. An error of 2e-3 in the
        # logarithm changes the score by the factor 1 + 2e-3.
        self.scale = net.logit_scale.exp().item()
        self.net = net.to(device, dtype)
        self.tokenizer = clip_tokenizer(self.tokenizer_repo)

    @torch.no_grad()
    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        pixels = self.pixels(images, self.net.config.vision_config.image_size)
        return self.scale * cosine(self.net, pixels, clip_tokens(self.tokenizer, prompts))


class PickScore(ClipLogit):
    """CLIP-H fine-tuned on Pick-a-Pic (yuvalkirstain/PickScore README)."""
    repo = "yuvalkirstain/PickScore_v1"
    tokenizer_repo = CLIP_H
    pixels = staticmethod(clip_pixels)


class CLIPScore(ClipLogit):
    """CLIP ViT-L/14 as it is (flow_grpo/clip_scorer.py)."""
    repo = CLIP_L
    tokenizer_repo = CLIP_L
    pixels = staticmethod(clipscore_pixels)


class Aesthetic:
    """LAION's aesthetic predictor: a linear head on the normalised embedding of CLIP ViT-L/14.

    The prompt plays no part.
    """

    def __init__(self, device, dtype):
        clip = load_clip(CLIP_L)
        # The file is of christophschuhmann/improved-aesthetic-predictor on GitHub; this repository
        # is its copy on the hub.
        file = "sac+logos+ava1-l14-linearMSE.pth"
        path = weights("camenduru/improved-aesthetic-predictor", file) / file
        head = score_head(read_pt(path, ["layers.0.weight"], ours=False), path)
        self.net = nn.ModuleDict({
            "vision": clip.vision_model.to(dtype),
            "projection": clip.visual_projection.to(dtype),
            "head": head,                               # stays float32
        }).to(device)

    @torch.no_grad()
    def __call__(self, images, prompts=None):
        vision = self.net["vision"]
        pixels = clip_pixels(images, vision.config.image_size).to(vision.device, vision.dtype)
        image = self.net["projection"](vision(pixels).pooler_output).float()
        return self.net["head"](F.normalize(image, dim=-1))[:, 0].cpu()


# ------------------------------------------------------------------ HPSv2: OpenCLIP's names

# OpenCLIP's name -> transformers' name.
OPEN_CLIP_NAMES = [
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),   # [sic]
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)", r".layer_norm\1"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"\.attn\.(in|out)_proj(_|\.)", r".self_attn.\1_proj."),
]
# The tensors that clip_config_of reads.
TELLING = ("visual.conv1.weight", "visual.proj", "visual.positional_embedding",
           "token_embedding.weight", "positional_embedding")


def clip_state_from_open_clip(state):
    """A state dict of OpenCLIP under transformers' names.

    The joint tensor of q, k and v is split in three. The two projections are transposed, because
    OpenCLIP multiplies by them from the right.
    """
    named = {}
    for name, tensor in rename(state, OPEN_CLIP_NAMES).items():
        if ".in_proj." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                named[name.replace(".in_proj.", f".{part}_proj.")] = piece
        elif name in ("visual_projection.weight", "text_projection.weight"):
            named[name] = tensor.T
        else:
            named[name] = tensor
    return named


def clip_config_of(state):
    """The config that fits a state dict of OpenCLIP's ViT-H.

    The shapes tell everything but the activation and the width of a head. A head of the image tower
    is 80 wide (model_configs/ViT-H-14.json, head_width). The text tower has width 1024 and 16
    heads.
    """
    width, _, _, patch = state["visual.conv1.weight"].shape
    vocab, text_width = state["token_embedding.weight"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    vision = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=count_layers(state, "visual.transformer.resblocks."),
        num_attention_heads=width // 80,
        patch_size=patch,
        image_size=patch * math.isqrt(patches),
        hidden_act="gelu")
    text = dict(
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=count_layers(state, "transformer.resblocks."),
        num_attention_heads=text_width // 64,
        vocab_size=vocab,
        max_position_embeddings=len(state["positional_embedding"]),
        hidden_act="gelu")
    return CLIPConfig(projection_dim=state["visual.proj"].shape[1], vision_config=vision,
                      text_config=text)


def import_ftfy():
    try:
        import ftfy
    except ImportError:
        raise ValueError("HPSv2: got no module ftfy, with which OpenCLIP cleans its prompts; "
                         "expected it: pip install ftfy==6.3.1") from None
    return ftfy


def open_clip_clean(prompt):
    """A prompt as OpenCLIP's tokenizer cleans it (hpsv2/src/open_clip/tokenizer.py).

    fix_text replaces curly quotes, full-width characters and ligatures by plain ones. It also
    repairs text that was decoded with the wrong encoding.
    """
    prompt = import_ftfy().fix_text(prompt)             # basic_clean
    prompt = html.unescape(html.unescape(prompt))
    return " ".join(prompt.split()).lower()             # whitespace_clean


class HPSv2:
    """Human Preference Score v2.1: the cosine of a fine-tuned OpenCLIP ViT-H-14.

    The score is about 0.2 to 0.35 (tgxs002/HPSv2 hpsv2/img_score.py).
    """

    def __init__(self, device, dtype):
        import_ftfy()                                   # fails before 4 GB are fetched
        file = "HPS_v2.1_compressed.pt"
        path = weights("xswu/HPSv2", file) / file
        state = read_pt(path, ["state_dict"], ours=False)["state_dict"]
        missing = [name for name in TELLING if name not in state]
        check_shapes(dict.fromkeys(missing, "a tensor"), {}, path)
        net = pretrained(CLIPModel, path, clip_config_of(state), clip_state_from_open_clip(state))
        self.net = net.to(device, dtype)
        self.tokenizer = clip_tokenizer(CLIP_H)

    @torch.no_grad()
    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        pixels = hps_pixels(images, self.net.config.vision_config.image_size)
        cleaned = [open_clip_clean(prompt) for prompt in prompts]
        return cosine(self.net, pixels, clip_tokens(self.tokenizer, cleaned))
