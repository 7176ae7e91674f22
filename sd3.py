"""
Stable Diffusion 3.5's side of things: its published folder, its text encoders, and the paper's tasks. The counterpart of tiny.py.

    stable-diffusion-3.5-medium/                         the folder as published, or its name on the hub where there is a network
        sd3.5_medium.safetensors                         transformer and VAE, in Stability's native layout
        text_encoder/  text_encoder_2/  text_encoder_3/  CLIP-L, CLIP-G, T5-XXL
        tokenizer/     tokenizer_2/     tokenizer_3/

SD3-Medium and SD3.5-Large are read in the same way. T5 makes 128 tokens in Flow-GRPO and here, 256 in the reference (`--t5 256`), or is left out
(`--t5 zeros`: 256 zero vectors, as diffusers does without it, and 10 GB less to load).

Sources: SD3 arXiv 2403.03206, Stability-AI/sd3.5; GenEval arXiv 2310.11513, djghosh13/geneval prompts/create_prompts.py; Flow-GRPO arXiv 2505.05470.
"""
import hashlib
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging

from detectors import CLASSES, COLORS, check_classes
from model import Model, find, load_mmdit, load_vae
from rewards import RELATIONS, scorer

CLIP_TOKENS = 77
CACHE = Path("runs/text")             # embeddings of prompts: 1.4 MB each with 128 T5 tokens, 2.4 MB with 256

# ------------------------------------------------------------------ the folder


def load(path, device="cpu", dtype=torch.float32, size=None, t5=None):
    """SD3.5 by its folder. dtype: of the transformer and text encoders (the VAE is float32, as in Flow-GRPO); size: 512 px unless given."""
    file = find(path)
    size, text = size or 512, SD3Text(file.parent, t5 or "128", device, dtype)      # the cheap checks first
    mmdit, vae = load_mmdit(file, device, dtype), load_vae(file, device)
    unit, most = vae.factor * mmdit.cfg.patch, vae.factor * mmdit.cfg.patch * mmdit.cfg.pos_max
    if size % unit or not 0 < size <= most:
        raise ValueError(f"--size {size}: expected a multiple of {unit}, at most {most}")
    text.fit(mmdit.cfg)
    return Model(mmdit, vae, text, "sd3", size, str(file))


# ------------------------------------------------------------------ text


class SD3Text:
    """CLIP-L, CLIP-G and T5-XXL. prepare(prompts) encodes what is not on the disk yet and frees the encoders; a call reads from the disk.

    context (B, 77 + T5 tokens, 4096): CLIP's two penultimate hidden states side by side (768 + 1280) and zeros, then T5's last one, without an attention
    mask. pooled (B, 2048): CLIP's two projected pooled vectors. Prompts longer than 77 tokens (CLIP) or the T5 tokens are cut off, as everywhere.
    """

    def __init__(self, folder, t5, device, dtype, cache=CACHE):
        if t5 not in ("128", "256", "zeros"):
            raise ValueError(f"--t5 {t5}: expected 128 or 256 (tokens), or zeros (T5 left out)")
        self.folder, self.t5, self.device, self.dtype = folder, t5, device, dtype
        self.tokens = 256 if t5 == "zeros" else int(t5)
        self.parts = ["", "_2"] + ["_3"] * (t5 != "zeros")
        for name in [f"{kind}{part}" for part in self.parts for kind in ("tokenizer", "text_encoder")]:
            wanted = "config.json" if name.startswith("text") else "tokenizer_config.json"
            if not (folder / name / wanted).is_file():
                raise ValueError(f"{folder}: has no {name}/{wanted}; expected the model's published folder with text_encoder*/ and tokenizer*/" +
                                 (" (or leave T5 out: --t5 zeros)" if name.endswith("_3") else ""))
        self.cache = Path(cache) / self.identity()

    def identity(self):
        """Names what embeddings depend on: the encoders' and tokenizers' files (ends and size of the large ones), T5's length, and dtype."""
        digest = hashlib.sha256(f"{self.t5} {self.dtype}".encode())
        for file in sorted(f for part in self.parts for kind in ("tokenizer", "text_encoder") for f in (self.folder / f"{kind}{part}").iterdir()):
            size = file.stat().st_size
            digest.update(f"{file.parent.name}/{file.name} {size}".encode())
            with open(file, "rb") as f:
                digest.update(f.read(2 ** 20))
                f.seek(max(0, size - 2 ** 20))
                digest.update(f.read())
        return digest.hexdigest()[:16]

    def fit(self, cfg):
        """ValueError unless these encoders make what the transformer reads."""
        from transformers import AutoConfig
        config = [AutoConfig.from_pretrained(self.folder / f"text_encoder{part}") for part in self.parts]
        pooled = config[0].projection_dim + config[1].projection_dim
        context = config[2].d_model if len(config) == 3 else cfg.context_dim
        if (context, pooled) != (cfg.context_dim, cfg.pooled_dim):
            raise ValueError(f"{self.folder}: its text encoders give context {context} and pooled {pooled}, "
                             f"its transformer wants {cfg.context_dim} and {cfg.pooled_dim}")
        self.context_dim = cfg.context_dim

    def encoder(self, cls, part):
        folder, quiet = self.folder / f"text_encoder{part}", logging.get_verbosity()
        variant = None if any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")) else "fp16"
        logging.set_verbosity_error()
        try:
            net, info = cls.from_pretrained(folder, dtype=self.dtype, variant=variant, output_loading_info=True)
        except (OSError, SafetensorError, RuntimeError) as e:
            raise ValueError(f"{folder}: cannot be loaded: {' '.join(str(e).split())[:200]}") from None
        finally:
            logging.set_verbosity(quiet)
        for kind in ("missing_keys", "mismatched_keys"):
            if info[kind]:
                raise ValueError(f"{folder}: tensor '{sorted(map(str, info[kind]))[0]}' is {kind.split('_')[0]}, expected all of {cls.__name__}")
        return net.to(self.device).eval().requires_grad_(False)

    def file(self, prompt):
        return self.cache / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    @torch.no_grad()
    def prepare(self, prompts, rank=0, world_size=1, batch=16):
        """Encode each prompt (and the empty one) that is not on the disk yet: this rank its share. The encoders are in memory only meanwhile."""
        share = list(dict.fromkeys([*prompts, ""]))[rank::world_size]        # of all prompts, so that no rank depends on how far another is
        todo = [p for p in share if not self.file(p).exists()]
        if not todo:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        size, free = len(todo) * world_size * (CLIP_TOKENS * 4096 + self.tokens * 8192 * (self.t5 != "zeros")), shutil.disk_usage(self.cache).free
        if size > free:
            raise ValueError(f"{self.cache}: the embeddings of about {len(todo) * world_size} prompts need {size / 1e9:.0f} GB, "
                             f"and {free / 1e9:.0f} GB are free; make room, link runs/text to a larger disk, or lower --iters")
        if rank == 0 and size > 1e9:
            print(f"text: encoding about {len(todo) * world_size} prompts into {self.cache}, {size / 1e9:.0f} GB", flush=True)
        tokenizers = [AutoTokenizer.from_pretrained(self.folder / f"tokenizer{part}") for part in self.parts]
        encoders = [self.encoder(T5EncoderModel if part == "_3" else CLIPTextModelWithProjection, part) for part in self.parts]
        bar = tqdm(total=len(todo), desc="text", unit="prompt", disable=rank > 0)
        for chunk in (todo[i:i + batch] for i in range(0, len(todo), batch)):
            for row, prompt in zip(zip(*self.encode(tokenizers, encoders, chunk)), chunk):
                tmp = self.file(prompt).with_suffix(f".{os.getpid()}.tmp")
                save_file(dict(zip(("clip", "pooled", "t5"), (x.contiguous().cpu() for x in row))), tmp)
                os.replace(tmp, self.file(prompt))
            bar.update(len(chunk))
        bar.close()
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()             # 11 GB, for the policy and for a judge on the same card

    def encode(self, tokenizers, encoders, prompts):
        """prompts -> clip (B, 77, 768 + 1280), pooled (B, 768 + 1280), t5 (B, tokens, 4096), the last only if T5 is not left out."""
        def ids(i, length):
            return tokenizers[i](prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids.to(self.device)
        clip = [encoders[i](ids(i, CLIP_TOKENS), output_hidden_states=True) for i in (0, 1)]
        out = [torch.cat([c.hidden_states[-2] for c in clip], -1), torch.cat([c.text_embeds for c in clip], -1)]
        return out + [encoders[2](ids(2, self.tokens)).last_hidden_state] if self.t5 != "zeros" else out

    def __call__(self, prompts):
        """prompts, a list of B strings -> context (B, 77 + tokens, 4096), pooled (B, 2048)."""
        self.prepare(prompts)
        contexts, pooleds = [], []
        for prompt in prompts:
            try:
                row = load_file(self.file(prompt), str(self.device))
            except SafetensorError as e:
                raise ValueError(f"{self.file(prompt)}: is damaged ({e}); delete it, and it will be made again") from None
            clip = F.pad(row["clip"], (0, self.context_dim - row["clip"].shape[-1]))
            contexts.append(torch.cat([clip, row["t5"] if "t5" in row else clip.new_zeros(self.tokens, self.context_dim)]))
            pooleds.append(row["pooled"])
        return torch.stack(contexts), torch.stack(pooleds)


# ------------------------------------------------------------------ tasks and prompts

TASKS = ("geneval", "ocr", "pickscore", "quality")
LORA = (32, 64.0)                     # rank and alpha of a new adapter
RATIO = {"geneval": 3, "ocr": 1, "pickscore": 1, "quality": 0}     # prompts in stage 2; the quality teacher anchors all of them and needs none of its own
REWARD = {"geneval": "geneval", "ocr": "ocr", "pickscore": "pickscore", "quality": "deqa=0.4,pickscore=0.6"}
SCORE = {"geneval": "geneval_benchmark", "ocr": "ocr", "pickscore": "pickscore", "quality": "deqa"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TRAIN_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}      # Flow-GRPO's 7:5:3:1:1:0
NUMBERS = {2: "two", 3: "three", 4: "four"}
WORDS = ("open closed welcome fresh coffee bread books music garden summer winter happy birthday danger exit stop slow school market hotel bakery library "
         "museum station airport platform north south river mountain forest ocean island sale today tomorrow forever dream believe create explore future galaxy "
         "rocket planet robot dragon castle magic secret treasure silver golden midnight morning sunshine rainbow thunder harvest journey victory legend "
         "champion pizza noodles tea honey vintage original limited edition chapter one two three 2024 2025 1999 24/7").split()
SCENES = ('a wooden sign in a forest that says "{}"', 'a neon sign above a bar that reads "{}"', 'a chalkboard in a café with "{}" written on it',
          'a book cover with the title "{}"', 'a birthday cake with "{}" in icing', 'a white T-shirt printed with "{}"', 'a shop window with the words "{}"',
          'a newspaper with the headline "{}"', 'a road sign by a highway that says "{}"', 'a movie poster titled "{}"', 'graffiti on a brick wall spelling "{}"',
          'a coffee mug with the text "{}"', 'a banner over a stage that reads "{}"', 'a sandy beach with "{}" written in the sand',
          'a billboard at night that shows "{}"', 'a postcard that says "Greetings, {}"', 'a robot holding a card with "{}"', 'a label on a jar that reads "{}"',
          'a ticket stamped with "{}"', 'a smartphone whose screen shows "{}"')


def a(name):
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def geneval_prompt(rng, tag):
    """One prompt of GenEval's, as its authors generate them, with its metadata."""
    one, two = (str(c) for c in rng.choice(CLASSES[1:] if tag in ("colors", "color_attr") else CLASSES, 2, replace=False))     # no coloured persons
    c1, c2 = (str(c) for c in rng.choice(COLORS, 2, replace=False))
    if tag == "single_object":
        include, text = [{"class": one, "count": 1}], a(one)
    elif tag == "two_object":
        include, text = [{"class": one, "count": 1}, {"class": two, "count": 1}], f"{a(one)} and {a(two)}"
    elif tag == "counting":
        n = int(rng.integers(2, 5))
        include, text = [{"class": one, "count": n}], f"{NUMBERS[n]} {one}{'es' if one.endswith('s') else 's'}"
        return {"tag": tag, "include": include, "exclude": [{"class": one, "count": n + 1}], "prompt": f"a photo of {text}"}
    elif tag == "colors":
        include, text = [{"class": one, "count": 1, "color": c1}], f"{a(c1)} {one}"
    elif tag == "position":           # "a dog right of a cat" lists the cat first, and the dog relative to it
        relation = str(rng.choice(RELATIONS))
        include, text = [{"class": two, "count": 1}, {"class": one, "count": 1, "position": [relation, 0]}], f"{a(one)} {relation} {a(two)}"
    else:
        include = [{"class": one, "count": 1, "color": c1}, {"class": two, "count": 1, "color": c2}]
        text = f"{a(c1)} {one} and {a(c2)} {two}"
    return {"tag": tag, "include": include, "prompt": f"a photo of {text}"}


def ocr_prompt(rng):
    words = " ".join(str(w) for w in rng.choice(WORDS, rng.integers(1, 4), replace=False))
    style = (str.title, str.upper, str)[rng.integers(3)]
    return {"tag": "ocr", "prompt": str(rng.choice(SCENES)).format(style(words))}


def draw_prompt(rng, task, split, tags=None):
    """One prompt's metadata, made here: a tenth of all prompts (by a hash of their text) is kept for evaluation. tags: as in tiny.py."""
    if task not in ("geneval", "ocr"):
        raise ValueError(f"task '{task}' has no prompts of its own here, expected a folder of them: --prompts {task}=DIR")
    while True:
        tags = tags or (TRAIN_MIX if split == "train" else dict.fromkeys(TAGS, 1))
        p = np.array(list(tags.values()), float)
        meta = geneval_prompt(rng, list(tags)[rng.choice(len(p), p=p / p.sum())]) if task == "geneval" else ocr_prompt(rng)
        kept = zlib.crc32(meta["prompt"].encode()) % 10 == 0
        if kept == (split == "eval"):
            return {**meta, "task": task}


def eval_prompts(task, n, split="eval"):
    """n fixed prompts, the same for every model: GenEval's tags in equal numbers."""
    rng = np.random.default_rng(20260508)
    return [draw_prompt(rng, task, split, {TAGS[j % len(TAGS)]: 1} if task == "geneval" else None) for j in range(n)]


# ------------------------------------------------------------------ what GenEval and OCR ask (rewards.py)


def detect(images, metas):
    return scorer("detector", images.device)(images, metas)


def read(images):
    return scorer("reader", images.device)(images)


def check_meta(meta):
    """ValueError if a GenEval prompt names what the detector does not know, and so could never score."""
    check_classes([meta])
    for clause in meta["include"]:
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"GenEval prompt {meta['prompt']!r}: got color {clause['color']!r}, expected one of {', '.join(COLORS)}")
