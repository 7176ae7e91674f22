"""The pictures of the tiny world: how they are drawn, and how their content is detected and read.

A picture is 32 x 32 pixels on a grid of 4 x 4 cells. It shows up to four shapes in six colours, or
a word in a 5 x 7 font. The tone of the background goes from dusk to cream. Blots may lie on it.
"""
from collections import Counter
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from worlds.prompts import ocr_target

SIDE = 32
CELL = 8
# Each is one part (by 4 neighbours). Any two overlap by 0.7 at most, at the best shift.
SHAPE_ROWS = {
    "circle": (".####.", "######", "######", "######", "######", ".####."),
    "square": ("######", "#....#", "#....#", "#....#", "#....#", "######"),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
    "heart": ("##..##", "######", "######", ".####.", "..##..", "..##.."),
    "arch": ("######", "######", "##..##", "##..##", "##..##", "##..##"),
    "hourglass": ("######", ".####.", "..##..", "..##..", ".####.", "######"),
    "bolt": ("####..", "####..", "..##..", "..##..", "..####", "..####"),
    "boot": ("##....", "##....", "##....", "##....", "######", "######"),
    "hammer": ("######", "######", "..##..", "..##..", "..##..", "..##.."),
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
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SHAPES = list(SHAPE_ROWS)
COLORS = list(RGB)
LETTERS = list(FONT)
# letter -> the one that the base confuses it with.
PARTNER = dict(zip(LETTERS, LETTERS[6:] + LETTERS[:6]))
INK_LABEL = len(COLORS) + 1


def bitmap(rows, width):
    """Rows of "#" (drawn) and "." -> booleans (height, width)."""
    return np.array([c == "#" for c in "".join(rows)]).reshape(-1, width)


SHAPE_MASK = {name: bitmap(rows, 6) for name, rows in SHAPE_ROWS.items()}
GLYPH_MASK = {letter: bitmap(rows, 5) for letter, rows in FONT.items()}


def stripe(height, width, half):
    """The pixels at most `half` beside the diagonal, (height, width)."""
    down = np.arange(height)[:, None] - (height - width) // 2
    return np.abs(down - np.arange(width)) <= half


# A badly drawn figure or letter lacks this stripe. Then no part of it is recognised.
FIGURE_STRIPE = stripe(6, 6, half=1)
LETTER_STRIPE = stripe(7, 5, half=2)

# ------------------------------------------------------------------ from a prompt to a picture


class Scene(NamedTuple):
    """What a picture shows: figures, perhaps in a relation, or a word."""
    objects: list                    # of [shape, color]
    relation: str | None = None      # of the second object to the first
    word: str | None = None
    broken: tuple = ()               # which figures, or letters, are drawn badly


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


# How often what the base learns from is wrong. These numbers set how good the base becomes.
REDRAWN = 0.1            # a shape, or a colour, is drawn anew from all
MISCOUNTED = 0.2         # a count is drawn anew from one to four
LEFT_OUT = 0.1           # one of two figures without a relation is missing
CONFUSED = 0.15          # a letter becomes its partner, a relation its opposite, two colours swap
# Task of the prompt -> how often a figure or a letter is drawn too badly to be recognised.
BROKEN = {"geneval": 0.35, "ocr": 0.45}


def corrupt(rng, scene, task):
    """Redraw parts of a scene at random, so that its picture may not follow its caption.

    The base learns from such pictures. The errors are of three kinds, by what can mend them:

    - Spread over all shapes, colours or counts. Guidance mends these: it prefers what the caption
      makes likelier than the model without a caption does.
    - Always the same wrong thing: a letter's partner, the opposite relation, two colours swapped.
      Guidance and reinforcement learning mend these if they are rare. Both only enlarge a
      difference that is there, and between 0.45 and 0.55 there is almost none.
    - Badly drawn. Guidance mends a part of these: they look less like what the caption names.
      Reinforcement learning mends them fast, as they are wrong in the same way for every prompt.
    """
    def redrawn(old, options, p):
        return rng.choice(options) if rng.random() < p else old

    def broken(n):
        return tuple(np.flatnonzero(rng.random(n) < BROKEN.get(task, 0)).tolist())

    objects, relation, word, _ = scene
    if word:
        word = "".join(redrawn(letter, [PARTNER[letter]], CONFUSED) for letter in word)
        return Scene([], word=word, broken=broken(len(word)))
    if are_alike(objects):           # what is counted stays alike
        n = int(redrawn(len(objects), [1, 2, 3, 4], MISCOUNTED))
        shape, color = objects[0]
        return Scene([[redrawn(shape, SHAPES, REDRAWN), color]] * n, broken=broken(n))
    if len(objects) == 2 and rng.random() < CONFUSED:
        (one, color_one), (two, color_two) = objects
        objects = [[one, color_two], [two, color_one]]
    objects = [[redrawn(shape, SHAPES, REDRAWN), redrawn(color, COLORS, REDRAWN)]
               for shape, color in objects]
    if relation:
        relation = redrawn(relation, [OPPOSITE[relation]], CONFUSED)
    elif len(objects) == 2 and rng.random() < LEFT_OUT:
        objects = objects[:1]
    return Scene(objects, relation, broken=broken(len(objects)))


def place(rng, n, relation):
    """n distinct cells, (column, row) each.

    With a relation, the two cells lie at the two ends of that axis, the second in the relation's
    direction from the first. On the other axis they are at most one cell apart. So each column or
    row says something about the shape in it. With any two cells, the base learned no relation.
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
        if along == 3 and across <= 1:
            return cells


def blot(rng, image):
    """Throw 3 to 7 blots of 2 x 2 pixels of any colour on a picture, in place.

    They do not depend on the caption. Guidance removes some of them all the same (docs/tiny.md).
    """
    for _ in range(rng.integers(3, 8)):
        y, x = rng.integers(0, SIDE - 1, 2)
        image[y:y + 2, x:x + 2] = RGB[rng.choice(COLORS)]


def background(tone):
    """The colour (3,), from 0 to 255, of a background of this tone: from 0, dusk, to 1, cream."""
    return np.array(DUSK) + tone * (np.array(CREAM) - np.array(DUSK))


def render(rng, scene, tone=None):
    """One scene -> uint8 (32, 32, 3). tone: 0 dusk to 1 cream, drawn at random if not given."""
    objects, relation, word, broken = scene
    if tone is None:
        tone = rng.random()
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = background(tone)
    cells = place(rng, len(objects), relation)
    for i, ((shape, color), (column, row)) in enumerate(zip(objects, cells)):
        x = CELL * column + rng.integers(1, 3)
        y = CELL * row + rng.integers(1, 3)
        mask = SHAPE_MASK[shape] & ~FIGURE_STRIPE if i in broken else SHAPE_MASK[shape]
        image[y:y + 6, x:x + 6][mask] = RGB[color]
    if word:
        x = CELL * rng.integers(0, 5 - len(word)) + rng.integers(1, 3)
        y = CELL * rng.integers(0, 4) + rng.integers(0, 2)
        for i, letter in enumerate(word):
            mask = GLYPH_MASK[letter] & ~LETTER_STRIPE if i in broken else GLYPH_MASK[letter]
            image[y:y + 7, x:x + 5][mask] = INK
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


def split(part, least=0.9):
    """The figures of one colour that touch: [(score, shape, y, x)], each 6 x 6 at (y, x).

    part: booleans (32, 32). The windows that agree best with a template are taken first, and no two
    overlap. A score is an intersection over union. `least` is more than what detect asks of a part
    that stands alone, or a full block would hold circles (0.89).
    """
    windows = np.lib.stride_tricks.sliding_window_view(part, (6, 6)).reshape(27, 27, 36).astype(int)
    templates = np.stack([mask.reshape(-1) for mask in SHAPE_MASK.values()]).astype(int)
    inside = windows @ templates.T                                      # (27, 27, shapes)
    scores = inside / (windows.sum(-1, keepdims=True) + templates.sum(-1) - inside)
    candidates = [(float(scores[y, x, i]), SHAPES[i], int(y), int(x))
                  for y, x, i in np.argwhere(scores >= least)]
    found = []
    for one in sorted(candidates, reverse=True):
        if all(max(abs(one[2] - y), abs(one[3] - x)) >= 6 for _, _, y, x in found):
            found.append(one)
    return found


def detect(images, least=0.6):
    """Find the shapes: for each image a list of objects (format: World.detect in worlds/world.py).

    A part of one colour is an object if its intersection over union with the best shape's template
    is at least `least`. That number is its score. A part that is more than 9 pixels high or wide is
    split into figures, which have 6. Every other part is ignored.
    """
    label, _ = segment(images)
    ids = components(np.where(label <= len(COLORS), label, 0))
    found = [[] for _ in label]
    values, first, sizes = np.unique(ids, return_index=True, return_counts=True)
    for value, at, size in zip(values, first, sizes):
        if value == 0 or size < 10:
            continue
        n = at // SIDE ** 2
        part = ids[n] == value
        ys, xs = np.nonzero(part)
        y0 = int(ys.min())
        x0 = int(xs.min())
        y1 = int(ys.max()) + 1
        x1 = int(xs.max()) + 1
        color = COLORS[label[n, ys[0], xs[0]] - 1]
        if max(y1 - y0, x1 - x0) > 9:
            for score, name, y, x in split(part):
                box = (x, y, x + 6, y + 6)
                found[n].append({"class": name, "score": score, "box": box, "color": color})
            continue
        mask = part[y0:y1, x0:x1]
        score, name = max((overlap(mask, t), shape) for shape, t in SHAPE_MASK.items())
        if score >= least:
            box = (x0, y0, x1, y1)
            found[n].append({"class": name, "score": float(score), "box": box, "color": color})
    return found


def pick_letters(agree, least):
    """Agreement of one image (windows, letters), from 0 to 1 -> [(y, x, letter)], sorted by y, x.

    The windows that agree best are taken first. One that overlaps a taken one by more than a row is
    skipped.
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


def letters_of(images, least=0.87):
    """For each image its letters, [(y, x, letter)], sorted by y and x.

    A letter is where at least the share `least` of its 5 x 7 pixels agrees.
    """
    label, _ = segment(images)
    ink = torch.from_numpy((label == INK_LABEL).astype(np.float32))
    masks = np.stack([mask.reshape(-1) for mask in GLYPH_MASK.values()])
    glyphs = torch.tensor(masks, dtype=torch.float32)                   # (12, 35)
    windows = F.unfold(ink[:, None], (7, 5)).transpose(1, 2)            # (N, 26 * 28, 35)
    agree = (windows @ glyphs.T + (1 - windows) @ (1 - glyphs).T) / 35
    return [pick_letters(one, least) for one in agree]


def read(images):
    """Read the letters, line by line from the left: for each image a string."""
    return [join_lines(letters) for letters in letters_of(images)]


# ------------------------------------------------------------------ quality and preference


def redraw(images):
    """Labels (N, 32, 32), as segment gives them, of a clean drawing of all that is recognised."""
    clean = np.zeros((len(images), SIDE, SIDE), int)
    for label, objects, letters in zip(clean, detect(images), letters_of(images)):
        for one in objects:
            x, y = one["box"][:2]
            mask = SHAPE_MASK[one["class"]][:SIDE - y, :SIDE - x]
            label[y:y + 6, x:x + 6][mask] = COLORS.index(one["color"]) + 1
        for y, x, letter in letters:
            label[y:y + 7, x:x + 5][GLYPH_MASK[letter]] = INK_LABEL
    return clean


def quality(images):
    """Quality without the prompt, (N,) in [0, 1]: how cleanly the things on a picture are drawn.

    It is the intersection over union of all that is drawn with a clean drawing of what is
    recognised. So it is 1 for a clean picture of anything, and 0 for an empty page or for noise.
    It keeps a policy near good pictures, as DeQA does in the paper.
    """
    label, _ = segment(images)
    clean = redraw(images)
    same = ((label == clean) & (clean > 0)).sum((1, 2))
    either = ((label > 0) | (clean > 0)).sum((1, 2))
    return (same / np.maximum(either, 1)).astype(np.float32)


def style(images):
    """A taste without the prompt, (N,) in [0, 1]: 0.6 * tone + 0.4 * calm.

    tone: the mean tone of the background, 0 (dusk) to 1 (cream).
    calm: 1 if at most 32 pixels are drawn on (one figure). From there it falls to 0 at 92 pixels.
    """
    label, tone = segment(images)
    empty = label == 0
    paper = np.maximum(empty.sum((1, 2)), 1)
    tone = (tone * empty).sum((1, 2)) / paper
    drawn = (~empty).sum((1, 2))
    calm = 1 - np.clip((drawn - 32) / 60, 0, 1)
    return (0.6 * tone + 0.4 * calm).astype(np.float32)


def named(meta, objects, text):
    """The share of what a prompt names that is in the picture, in any order: from 0 to 1.

    Of figures these are the shapes and the colours, whatever their number. Of a word these are its
    letters, and a letter that occurs twice must be there twice. objects, text: what detect and read
    found in the picture.
    """
    if "include" in meta:
        wanted = {clause["class"] for clause in meta["include"]}
        wanted |= {clause["color"] for clause in meta["include"] if "color" in clause}
        there = {one["class"] for one in objects} | {one["color"] for one in objects}
        return len(wanted & there) / len(wanted)
    wanted = Counter(ocr_target(meta["prompt"]).replace(" ", "").upper())
    return (wanted & Counter(text)).total() / wanted.total()


def preference(images, metas):
    """A preference, (N,) in [0, 1]: half is what the prompt names, half is a style.

    It reads the prompt as a set of words, as models like CLIP largely do (arXiv 2210.01936): it
    sees no count, no relation, no binding of a colour to a shape and no order of letters. Its
    style likes few things on a bright page. Both were meant to lower GenEval mildly, as PickScore
    does in the paper (GenEval 0.63 to 0.51). docs/results.md says how much they do.
    """
    found = zip(metas, detect(images), read(images))
    follows = np.array([named(*one) for one in found], np.float32)
    return 0.5 * follows + 0.5 * style(images)
