"""The prompts of the tiny world, and which of them are held out for evaluation.

    geneval      "a photo of a red circle and a blue square": the six tags of GenEval
    ocr          'a sign that says "HAT"'
    preference   "a picture of ..." with such figures, or 'a picture that says "HAT"'
    quality      "a poster of ..." with such figures, or 'a poster that says "HAT"'

Combinations are held out for evaluation: no stage of training reads them as captions. They are:

    colors                  24 of 60 pairs of colour and shape
    color_attr              all with one of these 24 pairs, or with two shapes held out below
    counting                10 of 30 pairs of count and shape, and these 24 pairs
    two_object, position    30 of 90 ordered pairs of shapes
    words                   a fifth of all words

single_object holds nothing out: the base needs its ten prompts, and evaluation asks for them too.
"""
from itertools import product

from worlds.prompts import RELATIONS, TAGS, TRAIN_MIX, draw_tag, with_article
from worlds.tiny_pictures import COLORS, LETTERS, SHAPES

TASKS = ("geneval", "ocr", "preference", "quality")
# The first words of a task's prompts: "a photo of a circle".
FRAMES = {"geneval": "photo", "ocr": "sign", "preference": "picture", "quality": "poster"}
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {shape: shape + ("es" if shape.endswith(("s", "ch")) else "s") for shape in SHAPES}
# All words of the prompts. The first is the padding.
VOCAB = ["<pad>",
         *"a an photo picture poster sign of and that says left right above below".split(), '"',
         *COUNTS, *COLORS, *SHAPES, *PLURALS.values(), *LETTERS]
# A prompt has at most this many tokens, and is padded to this many.
LENGTH = 12

# ------------------------------------------------------------------ all prompts of figures


def is_held_out(tag, include):
    """Is this combination kept for evaluation? include: the objects that the prompt asks for."""
    shapes = [SHAPES.index(clause["class"]) for clause in include]
    for shape, clause in zip(shapes, include):
        if "color" in clause and (COLORS.index(clause["color"]) + shape) % 5 < 2:
            return True
    if tag == "counting":
        return (include[0]["count"] + shapes[0]) % 3 == 0
    return tag in ("two_object", "position", "color_attr") and sum(shapes) % 3 == 0


def single(shape, **more):
    return {"class": shape, "count": 1, **more}


def figures(tag):
    """All that a tag's prompts can ask for: [(include, its text)]."""
    a = with_article
    pairs = [pair for pair in product(SHAPES, SHAPES) if pair[0] != pair[1]]
    colored = list(product(COLORS, SHAPES))
    if tag == "single_object":
        return [([single(shape)], a(shape)) for shape in SHAPES]
    if tag == "two_object":
        return [([single(one), single(two)], f"{a(one)} and {a(two)}") for one, two in pairs]
    if tag == "counting":
        found = []
        for (word, n), shape in product(COUNTS.items(), SHAPES):
            found.append(([{"class": shape, "count": n}], f"{word} {PLURALS[shape]}"))
            for color in COLORS:
                include = [{"class": shape, "count": n, "color": color}]
                found.append((include, f"{word} {color} {PLURALS[shape]}"))
        return found
    if tag == "colors":
        return [([single(shape, color=color)], a(f"{color} {shape}")) for color, shape in colored]
    if tag == "position":
        # As in GenEval: "a dog right of a cat" lists the cat first, and the dog relative to it.
        return [([single(two), single(one, position=[relation, 0])],
                 f"{a(one)} {relation} {a(two)}")
                for relation, (one, two) in product(RELATIONS, pairs)]
    found = []
    for (one, two), color_one, color_two in product(pairs, COLORS, COLORS):
        if color_one != color_two:
            include = [single(one, color=color_one), single(two, color=color_two)]
            found.append((include, f"{a(f'{color_one} {one}')} and {a(f'{color_two} {two}')}"))
    return found


def list_prompts(frame, tag, split):
    """All prompts of a tag that belong to a split, as GenEval's metadata."""
    metas = []
    for include, text in figures(tag):
        if tag != "single_object" and is_held_out(tag, include) != (split == "eval"):
            continue
        meta = {"tag": tag, "include": include, "prompt": f"a {frame} of {text}"}
        if tag == "counting":
            meta["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
        metas.append(meta)
    return metas


PROMPTS = {key: list_prompts(*key)
           for key in product(("photo", "picture", "poster"), TAGS, ("train", "eval"))}

# ------------------------------------------------------------------ drawing prompts


def is_word_held_out(word):
    return sum(LETTERS.index(letter) for letter in word) % 5 == 0


def draw_word(rng, split):
    """A word of three or four letters that belongs to the split."""
    while True:
        length = rng.integers(3, 5)
        word = "".join(rng.choice(LETTERS, length))
        if is_word_held_out(word) == (split == "eval"):
            return word


def default_tags(task, split):
    """{tag: weight}: Flow-GRPO's mix in training, equal weights in evaluation and for other tasks.

    single_object holds nothing out, so only GenEval's evaluation draws it by default. The training
    of the base draws it too, by giving its own tags to draw_prompt.
    """
    if task != "geneval":
        return {tag: 1 for tag in TAGS if tag != "single_object"}
    if split == "train":
        return TRAIN_MIX
    return dict.fromkeys(TAGS, 1)


def draw_prompt(rng, task, split, tags=None):
    """One prompt. tags: {tag: weight} of its figures, or None for the task's own."""
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}': the tiny world has {', '.join(TASKS)}")
    frame = FRAMES[task]
    # Half of the prompts for preference and for quality ask for figures, half for a word.
    if task == "geneval" or task != "ocr" and rng.random() < 0.5:
        tag = draw_tag(rng, tags or default_tags(task, split))
        options = PROMPTS[frame, tag, split]
        return {**options[rng.integers(len(options))], "task": task}
    word = draw_word(rng, split)
    return {"tag": task, "prompt": f'a {frame} that says "{word}"', "task": task, "word": word}
