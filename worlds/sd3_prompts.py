"""The prompts of Stable Diffusion 3's world for geneval, and for ocr (scenes with a text).

A tenth of all prompts is held out for evaluation, by a hash of the text. The other tasks have no
prompts of their own: --prompts gives a folder of them.

Sources: GenEval arXiv 2310.11513, djghosh13/geneval prompts/create_prompts.py; Flow-GRPO arXiv
2505.05470.
"""
import zlib

from scorers.geneval import CLASSES, COLORS
from worlds.prompts import RELATIONS, TAGS, TRAIN_MIX, draw_tag, with_article

NUMBERS = {2: "two", 3: "three", 4: "four"}
WORDS = (
    "open closed welcome fresh coffee bread books music garden summer winter happy birthday danger "
    "exit stop slow school market hotel bakery library museum station airport platform north south "
    "river mountain forest ocean island sale today tomorrow forever dream believe create explore "
    "future galaxy rocket planet robot dragon castle magic secret treasure silver golden midnight "
    "morning sunshine rainbow thunder harvest journey victory legend champion pizza noodles tea "
    "honey vintage original limited edition chapter one two three 2024 2025 1999 24/7"
).split()
SCENES = (
    'a wooden sign in a forest that says "{}"',
    'a neon sign above a bar that reads "{}"',
    'a chalkboard in a café with "{}" written on it',
    'a book cover with the title "{}"',
    'a birthday cake with "{}" in icing',
    'a white T-shirt printed with "{}"',
    'a shop window with the words "{}"',
    'a newspaper with the headline "{}"',
    'a road sign by a highway that says "{}"',
    'a movie poster titled "{}"',
    'graffiti on a brick wall spelling "{}"',
    'a coffee mug with the text "{}"',
    'a banner over a stage that reads "{}"',
    'a sandy beach with "{}" written in the sand',
    'a billboard at night that shows "{}"',
    'a postcard that says "Greetings, {}"',
    'a robot holding a card with "{}"',
    'a label on a jar that reads "{}"',
    'a ticket stamped with "{}"',
    'a smartphone whose screen shows "{}"',
)
STYLES = (str.title, str.upper, str)


def draw_two(rng, names):
    one, two = rng.choice(names, 2, replace=False)
    return str(one), str(two)


def geneval_prompt(rng, tag):
    """One prompt of GenEval's, as its authors generate them, with its metadata."""
    a = with_article
    classes = CLASSES
    if tag in ("colors", "color_attr"):
        classes = CLASSES[1:]        # a "person" gets no colour
    one, two = draw_two(rng, classes)
    color_one, color_two = draw_two(rng, COLORS)
    meta = {"tag": tag, "include": [{"class": one, "count": 1}]}
    first = meta["include"][0]
    if tag == "single_object":
        text = a(one)
    elif tag == "two_object":
        meta["include"].append({"class": two, "count": 1})
        text = f"{a(one)} and {a(two)}"
    elif tag == "counting":
        n = int(rng.integers(2, 5))
        first["count"] = n
        meta["exclude"] = [{"class": one, "count": n + 1}]
        ending = "es" if one.endswith("s") else "s"
        text = f"{NUMBERS[n]} {one}{ending}"
    elif tag == "colors":
        first["color"] = color_one
        text = f"{a(color_one)} {one}"
    elif tag == "position":
        # "a dog right of a cat" lists the cat first, and the dog relative to it.
        relation = str(rng.choice(RELATIONS))
        first["class"] = two
        meta["include"].append({"class": one, "count": 1, "position": [relation, 0]})
        text = f"{a(one)} {relation} {a(two)}"
    else:
        first["color"] = color_one
        meta["include"].append({"class": two, "count": 1, "color": color_two})
        text = f"{a(color_one)} {one} and {a(color_two)} {two}"
    return {**meta, "prompt": f"a photo of {text}"}


def ocr_prompt(rng):
    """One to three words, in a scene that shows them."""
    n = rng.integers(1, 4)
    words = " ".join(str(word) for word in rng.choice(WORDS, n, replace=False))
    style = STYLES[rng.integers(3)]
    scene = str(rng.choice(SCENES))
    return {"tag": "ocr", "prompt": scene.format(style(words))}


def draw_prompt(rng, task, split, tags=None):
    """One prompt. tags: {tag: weight} of GenEval's, or None for the split's own."""
    if task not in ("geneval", "ocr"):
        raise ValueError(f"task '{task}' has no prompts of its own here, "
                         f"expected a folder of them: --prompts {task}=DIR")
    if tags is None:
        tags = TRAIN_MIX if split == "train" else dict.fromkeys(TAGS, 1)
    while True:
        if task == "geneval":
            meta = geneval_prompt(rng, draw_tag(rng, tags))
        else:
            meta = ocr_prompt(rng)
        held_out = zlib.crc32(meta["prompt"].encode()) % 10 == 0
        if held_out == (split == "eval"):
            return {**meta, "task": task}
