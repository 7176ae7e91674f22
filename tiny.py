"""
The tiny world: prompts, a renderer, exact verifiers and the training of the base model. Minutes on two CPU cores.

    python tiny.py                              # train VAE and base from nothing, write ckpt/tiny.safetensors; resumes by itself
    torchrun --nproc_per_node=2 tiny.py         # the same on two cores, one rank each (set OMP_NUM_THREADS=1)
    python tiny.py --show world.png             # look at some training images

A picture is 32 x 32 on a grid of 4 x 4 cells: up to four shapes in six colours, or a word in a 5 x 7 font, on a background whose
tone goes from dusk to cream. Three tasks, in the roles the paper's rewards have:

  geneval   "a photo of a red circle and a blue square": GenEval's six tags in GenEval's own JSON schema
  ocr       'a sign that says "HAT"'
  quality   "a poster of ...": a score that never looks at the prompt. It likes a cream background (0.4) and an empty page (0.6):
            up to one figure is free, further ones cost. So it is at odds with prompts that ask for two or three objects or
            for a word, as a human-preference reward is at odds with GenEval (in the paper GRPO-PickScore falls from 0.63 to 0.51).

The base is imperfect the way SD3.5-Medium is: it draws crisply and often draws the wrong thing, because in training the picture did
not always follow its caption (`corrupt`). Reinforcement learning then has to choose the right mode, not to learn to draw.

Held out for evaluation, as captions that no stage of training reads (but for the four of single_object, which the base needs):
combinations. Of 24 colour-shape pairs 6, of 12 count-shape pairs 3, of 12 ordered shape pairs 4, color_attr prompts with a held-out
colour-shape pair, a fifth of all words. Shape pairs are held out of two_object and position only.
"""
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import trange

import util
from model import MMDiT, MMDiTConfig, Model, PREFIX, VAE, check_shapes, load_mmdit, load_vae, open_file

SIDE, CELL = 32, 8
SHAPES = {"circle": (".####.", "######", "######", "######", "######", ".####."),
          "square": ("######", "#....#", "#....#", "#....#", "#....#", "######"),      # hollow: a full one is a circle but for 4 pixels
          "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
          "cross": ("..##..", "..##..", "######", "######", "..##..", "..##..")}
COLORS = {"red": (230, 40, 40), "green": (30, 150, 60), "blue": (40, 70, 230), "yellow": (245, 205, 20),
          "purple": (150, 50, 190), "orange": (250, 125, 20)}
INK, DUSK, CREAM = (20, 20, 30), (158, 173, 204), (255, 245, 219)
FONT = {"A": ".###.#...##...#######...##...##...#", "E": "######....#....####.#....#....#####", "H": "#...##...##...#######...##...##...#",
        "K": "#...##..#.#.#..##...#.#..#..#.#...#", "L": "#....#....#....#....#....#....#####",
        "N": "#...###..###..##.#.##..###..###...#", "O": ".###.#...##...##...##...##...#.###.",
        "P": "####.#...##...#####.#....#....#....", "S": ".#####....#.....###.....#....#####.",
        "T": "#####..#....#....#....#....#....#..", "X": "#...##...#.#.#...#...#.#.#...##...#",
        "Z": "#####....#...#...#...#...#....#####"}
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
S, C, A = list(SHAPES), list(COLORS), list(FONT)
TASKS = ("geneval", "ocr", "quality")
LORA = (16, 32.0)                                      # rank and alpha of a new adapter
RATIO = {"geneval": 3, "ocr": 1, "quality": 1}         # prompts in stage 2, as the paper's GenEval 3 : OCR 1 : PickScore 1
# What a teacher of the task is rewarded for, and what evaluation reports. Half of GenEval's reward is the strict form: the soft form alone pays
# for half-right pictures and can be gamed.
REWARD = {"geneval": "geneval=0.5,geneval_strict=0.5", "ocr": "ocr", "quality": "quality"}
SCORE = {"geneval": "geneval_benchmark", "ocr": "ocr", "quality": "quality"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TRAIN_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}      # Flow-GRPO's; no single_object
VOCAB = ["<pad>", *"a an photo poster sign of and that says left right above below".split(), '"', *COUNTS, *C, *S,
         "circles", "squares", "triangles", "crosses", *A]
LENGTH = 12


def bitmap(rows, width):
    return np.array([c == "#" for c in "".join(rows)]).reshape(-1, width)


SHAPE_MASK = {s: bitmap(rows, 6) for s, rows in SHAPES.items()}
GLYPH_MASK = {a: bitmap(rows, 5) for a, rows in FONT.items()}

# ------------------------------------------------------------------ prompts


def held_out(tag, include):
    """Is this combination kept for evaluation? include: GenEval's list of required objects."""
    shape = [S.index(o["class"]) for o in include]
    if tag == "counting":
        return (include[0]["count"] + shape[0]) % 4 == 0
    if tag in ("colors", "color_attr"):
        return any((C.index(o["color"]) + s) % 4 == 0 for o, s in zip(include, shape))
    return sum(shape) == 3            # two_object, position: circle with cross, square with triangle


def word_held_out(word):
    return sum(A.index(a) for a in word) % 5 == 0


def every_prompt(tag, frame="photo"):
    """All prompts of a tag as GenEval metadata, each with its split."""
    def entry(include, text, exclude=()):
        split = "both" if tag == "single_object" else "eval" if held_out(tag, include) else "train"
        meta = {"tag": tag, "include": include, "prompt": f"a {frame} of {text}"}
        return {**meta, "exclude": list(exclude)} if exclude else meta, split

    def obj(s, **more):
        return {"class": s, "count": 1, **more}

    def a(x):
        return ("an " if x[0] == "o" else "a ") + x

    pairs = [(s1, s2) for s1, s2 in product(S, S) if s1 != s2]
    if tag == "single_object":
        return [entry([obj(s)], a(s)) for s in S]
    if tag == "two_object":
        return [entry([obj(s1), obj(s2)], f"{a(s1)} and {a(s2)}") for s1, s2 in pairs]
    if tag == "counting":
        return [entry([{"class": s, "count": n}], f"{w} {s}{'es' if s == 'cross' else 's'}", [{"class": s, "count": n + 1}])
                for (w, n), s in product(COUNTS.items(), S)]
    if tag == "colors":
        return [entry([obj(s, color=c)], a(f"{c} {s}")) for c, s in product(C, S)]
    if tag == "position":             # as GenEval: "a photo of a dog right of a cat" lists the cat first, the dog relative to it
        return [entry([obj(s2), obj(s1, position=[r, 0])], f"{a(s1)} {r} {a(s2)}") for r, (s1, s2) in product(RELATIONS, pairs)]
    return [entry([obj(s1, color=c1), obj(s2, color=c2)], f"{a(f'{c1} {s1}')} and {a(f'{c2} {s2}')}")
            for (s1, s2), (c1, c2) in product(pairs, product(C, C)) if c1 != c2]


PROMPTS = {(frame, tag, split): [m for m, where in every_prompt(tag, frame) if where in (split, "both")]
           for frame in ("photo", "poster") for tag in TAGS for split in ("train", "eval")}


def draw_word(rng, split):
    while True:
        word = "".join(rng.choice(A, rng.integers(3, 5)))
        if word_held_out(word) == (split == "eval"):
            return word


def draw_prompt(rng, task, split, tags=None):
    """One prompt's metadata. tags: tag -> weight, for geneval (default: Flow-GRPO's training mix in train, all six alike in eval)."""
    if task == "geneval" or task == "quality" and rng.random() < 0.5:
        # single_object has no held-out combinations: only geneval's evaluation draws it (and the base's training, which says so by tags)
        tags = tags or ({t: 1 for t in TAGS if t != "single_object"} if task == "quality" else TRAIN_MIX if split == "train" else dict.fromkeys(TAGS, 1))
        p = np.array(list(tags.values()), float)
        options = PROMPTS["photo" if task == "geneval" else "poster", list(tags)[rng.choice(len(p), p=p / p.sum())], split]
        return {**options[rng.integers(len(options))], "task": task}
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}': the tiny world has {', '.join(TASKS)}")
    word = draw_word(rng, split)
    return {"tag": task, "prompt": f'a {"sign" if task == "ocr" else "poster"} that says "{word}"', "task": task, "word": word}


def eval_prompts(task, n, split="eval"):
    """n fixed prompts, the same for every model: GenEval's tags in equal numbers, words drawn once and for all.

    split "train" gives training combinations instead, to choose settings by without looking at the held-out ones.
    """
    rng = np.random.default_rng(20260508)
    if task == "geneval":
        return [draw_prompt(rng, task, split, {tag: 1}) for tag, _ in zip(TAGS * (n // len(TAGS) + 1), range(n))]
    return [draw_prompt(rng, task, split) for _ in range(n)]


# ------------------------------------------------------------------ the model file


class TinyText(nn.Module):
    """The tiny world's text encoder: a word is a token, a capital letter is a token, each has a vector, each place has a vector.

    Contextual meaning is left to the MMDiT, whose joint attention reads and rewrites the tokens in every block.
    """

    def __init__(self, vocab, length, dim):
        super().__init__()
        self.vocab, self.ids, self.length = vocab, {w: i for i, w in enumerate(vocab)}, length
        self.embed = nn.Embedding(len(vocab), dim)               # vocab[0] is the padding
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
        self.pool = nn.Linear(dim, dim)

    def prepare(self, prompts, rank=0, world_size=1):
        """SD3.5's encoders work through a run's prompts beforehand; here there is nothing to wait for, so this only checks their words."""
        self.tokens(prompts)

    def tokens(self, prompts):
        """prompts -> (B, L) ids. ValueError names an unknown word or a prompt that is too long; "" is all padding."""
        rows = []
        for p in prompts:
            words = re.findall(r'[a-z]+|[A-Z]|[^\sa-zA-Z]', p)
            for w in words:
                if w not in self.ids:
                    raise ValueError(f"prompt {p!r}: the tiny world has no word {w!r}; it knows {' '.join(self.vocab[1:])}")
            if len(words) > self.length:
                raise ValueError(f"prompt {p!r} has {len(words)} tokens, the tiny text encoder takes {self.length}")
            rows.append([self.ids[w] for w in words] + [0] * (self.length - len(words)))
        return torch.tensor(rows, device=self.place.device)

    def forward(self, prompts):
        """prompts, a list of B strings -> context (B, L, dim), pooled (B, dim)."""
        tokens = self.tokens(prompts)
        context = self.embed(tokens) + self.place
        used = (tokens > 0).unsqueeze(-1).to(context.dtype)
        return context, self.pool((context * used).sum(1) / used.sum(1).clamp(min=1))


def load(path, device="cpu", dtype=torch.float32, size=None, t5=None):
    """The tiny world's model, all in one file: names as in sd3.5_medium.safetensors plus the text encoder's. ValueError if it is not one."""
    with open_file(path) as f:
        meta, tensors = f.metadata() or {}, {k.removeprefix(PREFIX["text"]): f.get_tensor(k) for k in f.keys() if k.startswith(PREFIX["text"])}
    if meta.get("world") != "tiny":
        raise ValueError(f"{path}: expected a tiny-world model as `python tiny.py` makes it; SD3.5 is given as its folder, not as a file")
    if size not in (None, SIDE) or t5:
        raise ValueError(f"--size {size} --t5 {t5}: are for SD3.5; the tiny world's pictures have {SIDE} px and its text encoder no T5")
    try:
        (length, dim), vocab, resolution = tensors["place"].shape, json.loads(meta["vocab"]), int(meta["resolution"])
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: cannot read its text encoder, for want of {e}") from None
    text = TinyText(vocab, length, dim)
    check_shapes(text, {k: tuple(v.shape) for k, v in tensors.items()}, path, PREFIX["text"])
    text.load_state_dict(tensors)
    text = text.to(device, dtype).eval().requires_grad_(False)
    return Model(load_mmdit(path, device, dtype), load_vae(path, device, dtype), text, "tiny", resolution, str(path))


# ------------------------------------------------------------------ renderer


def faithful(rng, meta):
    """What a picture of the prompt shows: (list of [shape, color], relation or None, word or None)."""
    if "word" in meta:
        return [], None, meta["word"]
    objects, relation = [], None
    for o in meta["include"]:
        if o["count"] > 1:            # alike objects share a colour
            objects += [[o["class"], rng.choice(C)]] * o["count"]
        else:
            objects.append([o["class"], o.get("color") or rng.choice(C)])
        relation = o["position"][0] if "position" in o else relation
    return objects, relation, None


def corrupt(rng, scene):
    """The base's training pictures do not always follow their captions: parts are redrawn at random (this sets how good the base is)."""
    def redrawn(old, options, p):
        return rng.choice(options) if rng.random() < p else old

    def alike(objects):
        return len(objects) > 1 and all(o == objects[0] for o in objects)

    objects, relation, word = scene
    if word:
        return [], None, "".join(redrawn(a, A, 0.35) for a in word)
    if alike(objects) and rng.random() < 0.4:
        objects = [objects[0]] * rng.integers(1, 5)
    if alike(objects):                # what is counted stays alike
        objects = [[redrawn(objects[0][0], S, 0.2), objects[0][1]]] * len(objects)
    else:
        objects = [[redrawn(s, S, 0.2), redrawn(c, C, 0.2)] for s, c in objects]
    if relation:
        relation = redrawn(relation, list(RELATIONS), 0.45)
    if not relation and len(objects) == 2 and rng.random() < 0.15:
        objects = objects[:1]
    return objects, relation, None


def place(rng, n, relation):
    """n distinct cells (column, row). With a relation, the second is so placed to the first, and the other axis does not outweigh it."""
    while True:
        cells = [divmod(i, 4) for i in rng.choice(16, n, replace=False)]
        if not relation or n < 2:
            return cells
        (x0, y0), (x1, y1), (rx, ry) = cells[0], cells[1], RELATIONS[relation]
        along, across = ((x1 - x0) * rx, abs(y1 - y0)) if rx else ((y1 - y0) * ry, abs(x1 - x0))
        if along > 0 and along >= across:
            return cells


def render(rng, scene, tone=None):
    """One scene -> uint8 (32, 32, 3). tone in [0, 1]: dusk to cream, drawn at random if not given."""
    objects, relation, word = scene
    tone = rng.random() if tone is None else tone
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = np.array(DUSK) + tone * (np.array(CREAM) - np.array(DUSK))
    for (s, c), (col, row) in zip(objects, place(rng, len(objects), relation)):
        x, y = CELL * col + rng.integers(1, 3), CELL * row + rng.integers(1, 3)
        image[y:y + 6, x:x + 6][SHAPE_MASK[s]] = COLORS[c]
    if word:
        left, top = CELL * rng.integers(0, 5 - len(word)) + rng.integers(1, 3), CELL * rng.integers(0, 4) + rng.integers(0, 2)
        for i, letter in enumerate(word):
            image[top:top + 7, left + CELL * i:left + CELL * i + 5][GLYPH_MASK[letter]] = INK
    return image


# ------------------------------------------------------------------ verifiers: images (N, 3, 32, 32) in [0, 1]


def segment(images):
    """Nearest colour of every pixel: (N, 32, 32) ints, 0 background, 1..6 the colours, 7 ink. The background is a segment, dusk to cream."""
    x = images.permute(0, 2, 3, 1).float().cpu().numpy() * 255
    dusk, span = np.array(DUSK, np.float32), np.array(CREAM, np.float32) - np.array(DUSK, np.float32)
    tone = np.clip((x - dusk) @ span / (span @ span), 0, 1)                                    # (N, 32, 32)
    d = [((x - dusk - tone[..., None] * span) ** 2).sum(-1)]
    d += [((x - np.array(c, np.float32)) ** 2).sum(-1) for c in [*COLORS.values(), INK]]
    return np.stack(d).argmin(0), tone


def components(label):
    """Connected components (4-neighbours) of equal, non-zero label: (N, H, W) -> ids, 0 for background. Maxima spread until nothing changes."""
    ids = np.where(label > 0, np.arange(1, label.size + 1).reshape(label.shape), 0)
    while True:
        new = ids.copy()
        for axis in (1, 2):
            for shift in (1, -1):
                a = [slice(None)] * 3
                b = [slice(None)] * 3
                a[axis], b[axis] = (slice(1, None), slice(None, -1)) if shift == 1 else (slice(None, -1), slice(1, None))
                a, b = tuple(a), tuple(b)
                new[a] = np.where(label[a] == label[b], np.maximum(new[a], new[b]), new[a])
        if (new == ids).all():
            return ids
        ids = new


def overlap(mask, template):
    """Best intersection over union of a small mask with a template, over shifts of the one against the other."""
    h, w = mask.shape
    best = 0.0
    for dy, dx in product(range(-1, max(h - 6, 0) + 2), range(-1, max(w - 6, 0) + 2)):
        y0, x0, y1, x1 = max(dy, 0), max(dx, 0), min(dy + 6, h), min(dx + 6, w)
        inside = (mask[y0:y1, x0:x1] & template[y0 - dy:y1 - dy, x0 - dx:x1 - dx]).sum()
        best = max(best, inside / (mask.sum() + template.sum() - inside))
    return best


def detect(images, metas=None, least=0.6):
    """Find the shapes: for each image a list of {"class", "score" (best overlap), "box" (x0, y0, x1, y1), "color"}.

    A component of one colour counts if it covers a shape's template by at least `least` (intersection over union); anything else on
    the picture is not an object of any class.
    """
    label, _ = segment(images)
    found = [[] for _ in label]
    ids = components(np.where(label <= len(C), label, 0))
    values, first, sizes = np.unique(ids, return_index=True, return_counts=True)
    for value, at, size in zip(values, first, sizes):
        if value == 0 or size < 10:
            continue
        n = at // SIDE ** 2
        ys, xs = np.nonzero(ids[n] == value)
        y0, x0, y1, x1 = ys.min(), xs.min(), ys.max() + 1, xs.max() + 1
        if max(y1 - y0, x1 - x0) > 9:
            continue
        mask = ids[n, y0:y1, x0:x1] == value
        score, name = max((overlap(mask, t), s) for s, t in SHAPE_MASK.items())
        if score >= least:
            color = C[label[n, ys[0], xs[0]] - 1]
            found[n].append({"class": name, "score": float(score), "box": (int(x0), int(y0), int(x1), int(y1)), "color": color})
    return found


def read(images, least=0.87):
    """Read the letters, line by line from the left: for each image a string. A letter counts if `least` of its 5 x 7 pixels agree."""
    label, _ = segment(images)
    ink = torch.from_numpy((label == len(C) + 1).astype(np.float32))
    glyphs = torch.tensor(np.stack([g.reshape(-1) for g in GLYPH_MASK.values()]), dtype=torch.float32)     # (12, 35)
    windows = F.unfold(ink[:, None], (7, 5)).transpose(1, 2)                                              # (N, 26 * 28, 35)
    agree = (windows @ glyphs.T + (1 - windows) @ (1 - glyphs).T) / 35
    best, which = agree.max(-1)
    texts = []
    for n in range(len(ink)):
        kept = []
        for i in sorted((best[n] >= least).nonzero().flatten().tolist(), key=lambda i: -best[n, i].item()):
            y, x = divmod(i, SIDE - 4)
            if all(abs(y - v) >= 6 or abs(x - u) >= 5 for v, u, _ in kept):
                kept.append((y, x, A[which[n, i]]))
        kept.sort()
        lines = []
        for y, x, a in kept:
            if not lines or y - lines[-1][0][0] >= 5:
                lines.append([])
            lines[-1].append((y, x, a))
        texts.append(" ".join("".join(a for _, _, a in sorted(line, key=lambda k: k[1])) for line in lines))
    return texts


def quality(images):
    """Prompt-free quality, (N,) in [0, 1]: 0.4 * tone + 0.6 * calm, the weights of the paper's anchor (0.4 DeQA + 0.6 PickScore).

    tone: how cream the background is. calm: 1 while at most 32 pixels are drawn on (one figure), falling to 0 at 92.
    """
    label, tone = segment(images)
    empty = label == 0
    tone = (tone * empty).sum((1, 2)) / np.maximum(empty.sum((1, 2)), 1)
    calm = 1 - np.clip(((~empty).sum((1, 2)) - 32) / 60, 0, 1)
    return (0.4 * tone + 0.6 * calm).astype(np.float32)


# ------------------------------------------------------------------ training of the base


def pictures(rng, n, corrupted=True):
    """n training examples: prompts and images (n, 3, 32, 32) in [0, 1]."""
    metas = [draw_prompt(rng, rng.choice(TASKS, p=(0.5, 0.3, 0.2)), "train", tags=dict.fromkeys(TAGS, 1)) for _ in range(n)]
    scenes = [faithful(rng, m) for m in metas]
    images = np.stack([render(rng, corrupt(rng, s) if corrupted else s) for s in scenes])
    return metas, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@dataclass
class Config:
    out: str = "ckpt/tiny.safetensors"   # the model file to write
    run: str = "runs/tiny"               # where the resumable state and the log live
    pool: int = 65536                    # training pictures, rendered and encoded once
    vae_steps: int = 2000                # steps of the VAE
    steps: int = 6000                    # steps of the base
    batch: int = 64                      # pictures a step, over all ranks
    lr: float = 1e-3                     # AdamW, warm-up then cosine to zero
    width: int = 128                     # of the MMDiT
    depth: int = 4                       # of the MMDiT
    save_every: int = 500                # steps between resumable states (and versions of the model file)
    dropout: float = 0.1                 # captions replaced by "" (for guidance)
    seed: int = 0                        # of everything
    device: str = "auto"                 # auto, cuda, mps, cpu
    show: str = ""                       # only write a grid of training pictures to this PNG


def lr_at(step, cfg, steps):
    return cfg.lr * min(1, step / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_vae(cfg, rank, world, device, state):
    """Autoencode the pictures: squared error + a small KL; then fold the latents' mean and spread into the weights, so that SD3's constants fit."""
    vae = VAE(ch=(8, 16, 32), n_res=1, z=4).to(device)
    if state.get("vae"):
        vae.load_state_dict(state["vae"])
        return vae.eval().requires_grad_(False)
    opt = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))
    parameters = list(vae.parameters())
    bar = trange(cfg.vae_steps, desc="VAE", disable=rank > 0)
    for step in bar:
        rng = np.random.default_rng((cfg.seed, 1, step, rank))
        x = pictures(rng, cfg.batch // world)[1].to(device) * 2 - 1
        mean, logvar = vae.encoder(x).chunk(2, dim=1)
        logvar = logvar.clamp(-10, 10)
        y = vae.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
        paper = x.flatten(2).median(2).values[..., None, None]                # what is drawn covers 5% of a picture: weighted, or the
        weight = 1 + 9 * ((x - paper).abs().amax(1, keepdim=True) > 0.05)     # VAE is content with the background
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        loss = (weight * (y - x) ** 2).mean() + 4e-4 * kl
        for g in opt.param_groups:
            g["lr"] = 4 * lr_at(step, cfg, cfg.vae_steps)
        opt.zero_grad()
        loss.backward()
        flat = util.sync_mean(torch.cat([p.grad.flatten() for p in parameters]))
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval().requires_grad_(False)
    with torch.no_grad():             # raw' = (raw - m) / (s * scale) + shift has the mean and spread that VAE.encode undoes
        raw = vae.encoder(pictures(np.random.default_rng((cfg.seed, 2)), 1024)[1].to(device) * 2 - 1).chunk(2, dim=1)[0]
        m, gain = raw.mean((0, 2, 3)), 1 / (raw.std((0, 2, 3)) * vae.scale)
        out, inp, z = vae.encoder.conv_out, vae.decoder.conv_in, len(m)
        out.weight[:z] *= gain.view(-1, 1, 1, 1)
        out.bias[:z] = (out.bias[:z] - m) * gain + vae.shift
        out.bias[z:] += 2 * gain.log()
        # The decoder sees (raw' - shift) / gain + m. Its padding sees raw' = 0, so the fold is exact inside and differs on the rim only.
        inp.bias += torch.einsum("ozhw,z->o", inp.weight, m - vae.shift / gain)
        inp.weight /= gain.view(1, -1, 1, 1)
    return vae


@torch.no_grad()
def make_pool(cfg, vae, rank, world, device):
    """Render and encode the training set once; every rank makes its own part. Returns prompts and latents on the CPU."""
    prompts, latents = [], []
    for i in trange(cfg.pool // world // 256, desc="pictures", disable=rank > 0):
        metas, x = pictures(np.random.default_rng((cfg.seed, 3, rank, i)), 256)
        prompts += [m["prompt"] for m in metas]
        latents.append(vae.encode(x.to(device) * 2 - 1).cpu())
    return prompts, torch.cat(latents)


class Base(torch.nn.Module):
    """MMDiT and text encoder learn together; the flow matching loss in one place (and in one forward, as DDP wants it)."""

    def __init__(self, cfg):
        super().__init__()
        self.text = TinyText(VOCAB, LENGTH, 64)
        self.mmdit = MMDiT(MMDiTConfig(depth=cfg.depth, width=cfg.width, head_dim=32, channels=4, patch=2, pos_max=8, context_dim=64,
                                       pooled_dim=64, dual=cfg.depth // 2)).init_weights()

    def forward(self, x0, prompts, t, eps):
        context, pooled = self.text(prompts)
        x = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps          # x_t = (1 - t) x_0 + t eps
        return F.mse_loss(self.mmdit(x, t, context, pooled), eps - x0)          # v = eps - x_0


def write_model(base, vae, path):
    """One safetensors file in half precision, named as sd3.5_medium.safetensors is; written whole or not at all."""
    parts = {"mmdit": base.mmdit, "vae": vae, "text": base.text}
    tensors = {PREFIX[p] + k: v.half().cpu().contiguous() for p, m in parts.items() for k, v in m.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.tmp", {"world": "tiny", "resolution": str(SIDE), "vocab": json.dumps(VOCAB)})
    os.replace(f"{path}.tmp", path)


def main(cfg):
    if cfg.show:
        metas, x = pictures(np.random.default_rng(cfg.seed), 64)
        grid = x.view(8, 8, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2).reshape(8 * SIDE, 8 * SIDE, 3).mul(255).byte().numpy()
        Image.fromarray(grid).resize((1024, 1024), Image.NEAREST).save(cfg.show)
        print("\n".join(m["prompt"] for m in metas))
        return
    rank, world, device = util.setup(cfg.device, cfg.seed)
    if cfg.batch % world or cfg.pool % (256 * world):
        raise ValueError(f"--batch {cfg.batch} and --pool {cfg.pool}: expected multiples of {world} and {256 * world} with {world} ranks")
    state_path = Path(cfg.run) / "state.pt"
    # The VAE and base belong to the pictures they saw: seed, pool, sizes and the world itself must be those of the stopped run. How long and how
    # fast it goes on may change: the shipped base took 6000 steps of 64, then 2500 of 128 (make base).
    settings = {**{k: v for k, v in asdict(cfg).items() if k not in ("out", "run", "show")}, "world_size": world, "world": str((SHAPES, COLORS, FONT, VOCAB))}
    state = util.resume(state_path, settings, "tiny", free=["steps", "batch", "lr"]) or {}
    vae = train_vae(cfg, rank, world, device, state)
    if rank == 0 and not state:
        util.save_atomic({"iter": 0, "settings": settings, "base": "tiny", "vae": vae.state_dict()}, state_path)
    prompts, latents = make_pool(cfg, vae, rank, world, device)

    torch.manual_seed(cfg.seed)
    base = Base(cfg).to(device)
    opt = torch.optim.AdamW(base.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01)
    first = 0
    if "weights" in state:
        base.load_state_dict(state["weights"])
        opt.load_state_dict(state["opt"])
        first = state["iter"]
    ddp = DDP(base, broadcast_buffers=False) if world > 1 else base
    log = util.Log(cfg.run, rank, asdict(cfg), first)
    bar, start, losses = trange(first, cfg.steps, initial=first, total=cfg.steps, desc="base", disable=rank > 0), time.time(), []
    for step in bar:
        g = util.generator(cfg.seed, "base", rank, step)          # every step has its own random numbers: a resumed run repeats them
        i = torch.randint(len(prompts), (cfg.batch // world,), generator=g)
        keep = torch.rand(len(i), generator=g) >= cfg.dropout
        t = torch.sigmoid(torch.randn(len(i), generator=g) + 0.5)         # logit-normal (SD3), a little towards the noise, where modes are chosen
        eps = torch.randn(latents[i].shape, generator=g)
        loss = ddp(latents[i].to(device), [prompts[j] if k else "" for j, k in zip(i.tolist(), keep.tolist())], t.to(device), eps.to(device))
        for group in opt.param_groups:
            group["lr"] = lr_at(step, cfg, cfg.steps)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps):
            log({"iter": step + 1, "loss": float(np.mean(losses)), "images/s": len(losses) * cfg.batch / (time.time() - start)})
            losses, start = [], time.time()
            util.save_atomic({"iter": step + 1, "settings": settings, "base": "tiny", "vae": vae.state_dict(), "weights": base.state_dict(),
                              "opt": opt.state_dict()}, state_path)
            write_model(base, vae, cfg.out)


if __name__ == "__main__":
    util.run(main, Config)
