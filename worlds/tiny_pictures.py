"""The pictures of the tiny world: how they are drawn, and how their content is detected and read.

A picture is 32 x 32 pixels on a grid of 4 x 4 cells. It shows up to four shapes in six colours, or
a word in a 5 x 7 font. The tone of the background goes from dusk to cream.
"""
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 32
CELL = 8
# The square is hollow, because a full one would differ from the circle in only 4 pixels.
SHAPE_ROWS = {
    "circle": (".####.", "######", "######", "######", "######", ".####."),
    "square": ("######", "#....#", "#....#", "#....#", "#....#", "######"),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
}
RGB = {
    "red": (230, 40, 40), "green": (30, 150, 60), "blue": (40, 70, 230),
    "yellow": (245, 205, 20), "purple": (150, 50, 190), "orange": (250, 125, 20),
}
INK = (20, 20, 30)
DUSK = (158, 173, 204)
CREAM = (255, 245, 219)
FONT = {
    "A": ".###." "#...#" "#...#" "#####" "#...#" "#...#" "#...#",
    "E": "#####" "#...." "#...." "####." "#...." "#...." "#####",
    "H": "#...#" "#...#" "#...#" "#####" "#...#" "#...#" "#...#",
    "K": "#...#" "#..#." "#.#.." "##..." "#.#.." "#..#." "#...#",
    "L": "#...." "#...." "#...." "#...." "#...." "#...." "#####",
    "N": "#...#" "##..#" "##..#" "#.#.#" "#..##" "#..##" "#...#",
    "O": ".###." "#...#" "#...#" "#...#" "#...#" "#...#" ".###.",
    "P": "####." "#...#" "#...#" "####." "#...." "#...." "#....",
    "S": ".####" "#...." "#...." ".###." "....#" "....#" "####.",
    "T": "#####" "..#.." "..#.." "..#.." "..#.." "..#.." "..#..",
    "X": "#...#" "#...#" ".#.#." "..#.." ".#.#." "#...#" "#...#",
    "Z": "#####" "....#" "...#." "..#.." ".#..." "#...." "#####",
}
# relation -> the direction from the first object to the second: the signs of (x, y), y down.
DIRECTIONS = {
    "left of": (-1, 0), "right of": (1, 0),
    "above": (0, -1), "below": (0, 1),
}
SHAPES = list(SHAPE_ROWS)
COLORS = list(RGB)
LETTERS = list(FONT)


def bitmap(rows, width):
    """Rows of "#" (drawn) and "." -> booleans (height, width)."""
    return np.array([c == "#" for c in "".join(rows)]).reshape(-1, width)


SHAPE_MASK = {name: bitmap(rows, 6) for name, rows in SHAPE_ROWS.items()}
GLYPH_MASK = {letter: bitmap(rows, 5) for letter, rows in FONT.items()}

# ------------------------------------------------------------------ from a prompt to a picture


class Scene(NamedTuple):
    """What a picture shows: figures, perhaps in a relation, or a word."""
    objects: list                    # of [shape, color]
    relation: str | None = None      # of the second object to the first
    word: str | None = None


def faithful(rng, meta):
    """The Scene that a prompt asks for. Colours that it does not name are random."""
    if "word" in meta:
        return Scene([], word=meta["word"])
    objects = []
    relation = None
    for clause in meta["include"]:
        color = clause.get("color") or rng.choice(COLORS)
        # All objects of one clause share a colour.
        objects += [[clause["class"], color]] * clause["count"]
        if "position" in clause:
            relation = clause["position"][0]
    return Scene(objects, relation)


def are_alike(objects):
    return len(objects) > 1 and all(one == objects[0] for one in objects)


def corrupt(rng, scene):
    """Redraw parts of a scene at random, so that its picture may not follow its caption.

    The base learns from such pictures. The probabilities here set how good it becomes.
    """
    def redrawn(old, options, p):
        return rng.choice(options) if rng.random() < p else old

    objects, relation, word = scene
    if word:
        return Scene([], word="".join(redrawn(letter, LETTERS, 0.35) for letter in word))
    if are_alike(objects) and rng.random() < 0.4:
        objects = objects[:1] * int(rng.integers(1, 5))
    if are_alike(objects):           # what is counted stays alike
        shape, color = objects[0]
        objects = [[redrawn(shape, SHAPES, 0.2), color]] * len(objects)
    else:
        objects = [[redrawn(shape, SHAPES, 0.2), redrawn(color, COLORS, 0.2)]
                   for shape, color in objects]
    if relation:
        relation = redrawn(relation, list(DIRECTIONS), 0.45)
    if not relation and len(objects) == 2 and rng.random() < 0.15:
        objects = objects[:1]
    return Scene(objects, relation)


def place(rng, n, relation):
    """n distinct cells, (column, row) each.

    With a relation, the second cell lies in that direction from the first. Its distance on the
    other axis is not larger.
    """
    while True:
        cells = [divmod(i, 4) for i in rng.choice(16, n, replace=False)]
        if not relation or n < 2:
            return cells
        dx = cells[1][0] - cells[0][0]
        dy = cells[1][1] - cells[0][1]
        to_right, down = DIRECTIONS[relation]
        along = dx * to_right + dy * down
        across = abs(dx * down) + abs(dy * to_right)
        if along > 0 and along >= across:
            return cells


def background(tone):
    return np.array(DUSK) + tone * (np.array(CREAM) - np.array(DUSK))


def render(rng, scene, tone=None):
    """One scene -> uint8 (32, 32, 3). tone: 0 dusk to 1 cream, drawn at random if not given."""
    objects, relation, word = scene
    if tone is None:
        tone = rng.random()
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = background(tone)
    for (shape, color), (column, row) in zip(objects, place(rng, len(objects), relation)):
        x = CELL * column + rng.integers(1, 3)
        y = CELL * row + rng.integers(1, 3)
        image[y:y + 6, x:x + 6][SHAPE_MASK[shape]] = RGB[color]
    if word:
        x = CELL * rng.integers(0, 5 - len(word)) + rng.integers(1, 3)
        y = CELL * rng.integers(0, 4) + rng.integers(0, 2)
        for letter in word:
            image[y:y + 7, x:x + 5][GLYPH_MASK[letter]] = INK
            x += CELL
    return image


# ------------------------------------------------------------------ what is on a picture
# Images here are (N, 3, 32, 32) in [0, 1].


def segment(images):
    """The label and the tone of each pixel, (N, 32, 32) each.

    label: the nearest colour. 0 is the background, 1 to 6 are COLORS in order, and 7 is ink.
    tone: the nearest point on the line from dusk (0) to cream (1), the colours of backgrounds.
    """
    pixels = images.permute(0, 2, 3, 1).float().cpu().numpy() * 255
    dusk = np.array(DUSK, np.float32)
    span = np.array(CREAM, np.float32) - dusk
    tone = np.clip((pixels - dusk) @ span / (span @ span), 0, 1)
    distances = [((pixels - dusk - tone[..., None] * span) ** 2).sum(-1)]
    for color in [*RGB.values(), INK]:
        distances.append(((pixels - np.array(color, np.float32)) ** 2).sum(-1))
    return np.stack(distances).argmin(0), tone


# Pairs of slices of pictures (N, H, W): pixels with a neighbour on one side, and the neighbours.
UP = (np.s_[:, 1:], np.s_[:, :-1])
LEFT = (np.s_[:, :, 1:], np.s_[:, :, :-1])
NEIGHBOURS = (UP, UP[::-1], LEFT, LEFT[::-1])


def components(label):
    """Connected parts (by 4 neighbours) of equal label: (N, H, W) -> ids, 0 where label is 0.

    Every pixel begins with an id of its own. Each part takes on its largest id, step by step.
    """
    ids = np.arange(1, label.size + 1).reshape(label.shape)
    ids = np.where(label > 0, ids, 0)
    while True:
        grown = ids.copy()
        for here, there in NEIGHBOURS:
            larger = np.maximum(grown[here], grown[there])
            grown[here] = np.where(label[here] == label[there], larger, grown[here])
        if (grown == ids).all():
            return ids
        ids = grown


def overlap(mask, template):
    """Intersection over union of a small mask with a 6 x 6 template, at the best shift."""
    h, w = mask.shape
    best = 0.0
    shifts_down = range(-1, max(h - 6, 0) + 2)
    shifts_right = range(-1, max(w - 6, 0) + 2)
    for dy, dx in product(shifts_down, shifts_right):
        top = max(dy, 0)
        bottom = min(dy + 6, h)
        left = max(dx, 0)
        right = min(dx + 6, w)
        part = template[top - dy:bottom - dy, left - dx:right - dx]
        inside = (mask[top:bottom, left:right] & part).sum()
        best = max(best, inside / (mask.sum() + template.sum() - inside))
    return best


def detect(images, least=0.6):
    """Find the shapes: for each image a list of objects (format: World.detect in worlds/world.py).

    A part of one colour is an object if its intersection over union with the best shape's template
    is at least `least`. That number is its score. Every other part is ignored.
    """
    label, _ = segment(images)
    ids = components(np.where(label <= len(COLORS), label, 0))
    found = [[] for _ in label]
    values, first, sizes = np.unique(ids, return_index=True, return_counts=True)
    for value, at, size in zip(values, first, sizes):
        if value == 0 or size < 10:
            continue
        n = at // SIDE ** 2
        ys, xs = np.nonzero(ids[n] == value)
        x0 = int(xs.min())
        y0 = int(ys.min())
        x1 = int(xs.max()) + 1
        y1 = int(ys.max()) + 1
        if max(y1 - y0, x1 - x0) > 9:
            continue
        mask = ids[n, y0:y1, x0:x1] == value
        score, name = max((overlap(mask, t), shape) for shape, t in SHAPE_MASK.items())
        if score >= least:
            color = COLORS[label[n, ys[0], xs[0]] - 1]
            box = (x0, y0, x1, y1)
            one = {"class": name, "score": float(score), "box": box, "color": color}
            found[n].append(one)
    return found


def pick_letters(agree, least):
    """Agreement of one image (windows, letters), from 0 to 1 -> [(y, x, letter)], sorted by y, x.

    The windows that agree best are taken first. A window that overlaps a taken one is skipped.
    """
    best, which = agree.max(-1)
    candidates = (best >= least).nonzero().flatten().tolist()
    kept = []
    for i in sorted(candidates, key=lambda i: -best[i].item()):
        y, x = divmod(i, SIDE - 4)
        if all(abs(y - v) >= 6 or abs(x - u) >= 5 for v, u, _ in kept):
            kept.append((y, x, LETTERS[which[i]]))
    return sorted(kept)


def join_lines(letters):
    """Letters (y, x, letter), sorted by y -> one string, with a space between lines."""
    lines = []
    for y, x, letter in letters:
        if not lines or y - lines[-1][0][0] >= 5:
            lines.append([])
        lines[-1].append((y, x, letter))
    texts = []
    for line in lines:
        line.sort(key=lambda item: item[1])
        texts.append("".join(letter for _, _, letter in line))
    return " ".join(texts)


def read(images, least=0.87):
    """Read the letters, line by line from the left: for each image a string.

    A letter is read where at least the share `least` of its 5 x 7 pixels agrees.
    """
    label, _ = segment(images)
    ink = torch.from_numpy((label == len(COLORS) + 1).astype(np.float32))
    masks = np.stack([mask.reshape(-1) for mask in GLYPH_MASK.values()])
    glyphs = torch.tensor(masks, dtype=torch.float32)                   # (12, 35)
    windows = F.unfold(ink[:, None], (7, 5)).transpose(1, 2)            # (N, 26 * 28, 35)
    agree = (windows @ glyphs.T + (1 - windows) @ (1 - glyphs).T) / 35
    return [join_lines(pick_letters(one, least)) for one in agree]


def quality(images):
    """Quality without the prompt, (N,) in [0, 1]: 0.4 * tone + 0.6 * calm.

    The weights are those of the paper's anchor, 0.4 DeQA + 0.6 PickScore.
    tone: the mean tone of the background, 0 (dusk) to 1 (cream).
    calm: 1 if at most 32 pixels are drawn on (one figure). From there it falls to 0 at 92 pixels.
    """
    label, tone = segment(images)
    empty = label == 0
    paper = np.maximum(empty.sum((1, 2)), 1)
    tone = (tone * empty).sum((1, 2)) / paper
    drawn = (~empty).sum((1, 2))
    calm = 1 - np.clip((drawn - 32) / 60, 0, 1)
    return (0.4 * tone + 0.6 * calm).astype(np.float32)
