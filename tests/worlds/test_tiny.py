"""Facts about the tiny world: its prompts and their split, the renderer, the verifiers, and the
pictures that its base is trained on."""
import inspect
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import rewards
from worlds.prompts import TAGS, check_geneval_meta, ocr_target
from worlds.tiny import Tiny, TinyText
from worlds.tiny_base import pictures
from worlds.tiny_pictures import (
    COLORS,
    CREAM,
    GLYPH_MASK,
    INK,
    LETTERS,
    RGB,
    SHAPE_MASK,
    SHAPES,
    Scene,
    bitmap,
    corrupt,
    detect,
    faithful,
    quality,
    read,
    render,
)
from worlds.tiny_prompts import (
    LENGTH,
    PROMPTS,
    TASKS,
    VOCAB,
    draw_prompt,
    draw_word,
    is_word_held_out,
)

TINY = Tiny()
eval_prompts = TINY.eval_prompts
score = rewards.score
GENEVAL = {"geneval": 1, "geneval_strict": 1, "geneval_benchmark": 1}


def prompts_of(tag):
    """All prompts of a tag, by their text."""
    both = PROMPTS["photo", tag, "train"] + PROMPTS["photo", tag, "eval"]
    return {meta["prompt"]: meta for meta in both}


ALL = {tag: prompts_of(tag) for tag in TAGS}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def word_meta(word):
    return {"tag": "ocr", "prompt": f'a sign that says "{word}"', "word": word}


def pick(rng, tag, n):
    """n prompts of a tag, drawn evenly from both splits."""
    if tag in TAGS:
        options = list(ALL[tag].values())
    else:
        words = [draw_word(rng, split) for split in ("train", "eval") for _ in range(n)]
        options = [word_meta(word) for word in words]
    return [options[i] for i in rng.integers(len(options), size=n)]


def pick_each(rng, tags, n):
    """n prompts of each of these tags."""
    metas = []
    for tag in tags:
        metas += pick(rng, tag, n)
    return metas


def truth(rng, metas):
    """The pictures that the prompts ask for."""
    return tensor([render(rng, faithful(rng, meta)) for meta in metas])


def near(hits, n, p, sigmas=4):
    """Are `hits` of n draws what probability p gives?"""
    return abs(hits - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


def content(meta):
    """What a prompt asks for, whatever its wording, order and frame.

    "a left of b" is "b right of a".
    """
    if "word" in meta:
        return meta["word"]
    include = meta["include"]
    tag = meta["tag"]
    if tag == "position":
        relation = include[1]["position"][0]
        b, a = [clause["class"] for clause in include]
        mirror = {"right of": "left of", "below": "above"}
        if relation in mirror:
            return tag, b, mirror[relation], a
        return tag, a, relation, b
    return tag, frozenset((c["class"], c["count"], c.get("color")) for c in include)


def contents(metas):
    """What prompts ask for, those of single_object apart, which are in both splits."""
    return {content(meta) for meta in metas if meta["tag"] != "single_object"}


# ------------------------------------------------------------------ verifiers


@pytest.mark.parametrize("tag", TAGS)
def test_geneval_is_right_on_rendered_ground_truth(tag):
    rng = np.random.default_rng(1)
    metas = pick(rng, tag, 80)
    got = score(GENEVAL, truth(rng, metas), metas, TINY)
    assert all(got[form].mean() >= 0.99 for form in GENEVAL)


def test_ocr_reads_rendered_words_exactly_and_finds_no_figure_in_them():
    rng = np.random.default_rng(2)
    metas = pick(rng, "ocr", 400)
    images = truth(rng, metas)
    right = [text == meta["word"] for text, meta in zip(read(images), metas)]
    assert np.mean(right) >= 0.99
    assert score({"ocr": 1}, images, metas, TINY)["ocr"].mean() >= 0.99
    assert not any(detect(images[:100]))
    figures = truth(rng, pick_each(rng, TAGS, 15))
    assert set(read(figures)) == {""}                            # and no letter in figures


CHANCE = {"single_object": 1 / 4, "two_object": 1 / 6, "counting": 1 / 12, "colors": 1 / 24,
          "position": 1 / 24, "color_attr": 1 / 180}


@pytest.mark.parametrize("tag", TAGS)
def test_geneval_is_at_chance_on_captions_drawn_anew_within_the_tag(tag):
    """Chance: how often two prompts of the tag, drawn alike, ask for the same."""
    rng = np.random.default_rng(3)
    counts = Counter(content(meta) for meta in ALL[tag].values())
    chance = sum((n / len(ALL[tag])) ** 2 for n in counts.values())
    assert chance == pytest.approx(CHANCE[tag])
    n = 2000
    found = detect(truth(rng, pick(rng, tag, 100))) * 20
    captions = pick(rng, tag, n)
    hits = sum(rewards.geneval_score(*pair, "strict") for pair in zip(found, captions))
    if tag == "position":
        # On the diagonal two relations hold, so up to twice as often.
        least = n * chance - 4 * math.sqrt(n * chance)
        most = 2 * n * chance + 4 * math.sqrt(2 * n * chance)
        assert least < hits < most
    else:
        assert near(hits, n, chance)


def painted(*patches, color=INK):
    """A cream page with masks (rows of booleans) painted at (top, left)."""
    image = np.full((32, 32, 3), CREAM, np.uint8)
    for mask, top, left in patches:
        image[top:top + mask.shape[0], left:left + mask.shape[1]][mask] = color
    return tensor([image])


NO_SHAPES = {
    "small_block": ["####"] * 4,
    "short_bar": ["#####"] * 2,
    "corner": ["#....."] * 5 + ["######"],
    "comb": ["########", "#......."] * 4,
    "large_block": ["############"] * 12,
}


@pytest.mark.parametrize("rows", NO_SHAPES.values(), ids=NO_SHAPES)
def test_a_figure_that_is_no_shape_is_not_counted(rows):
    mask = bitmap(rows, len(rows[0]))
    assert detect(painted((mask, 9, 10), color=RGB["red"])) == [[]]


def test_text_is_read_line_by_line_from_the_left():
    places = {"T": (20, 3), "A": (4, 10), "Z": (5, 18), "H": (4, 2), "X": (19, 11)}
    letters = [(GLYPH_MASK[letter].copy(), *place) for letter, place in places.items()]
    # A flaw: the upper line agrees less than the lower.
    letters[1][0][0, 2] = False
    assert read(painted(*letters)) == ["HAZ TX"]


def test_ocr_is_low_on_captions_drawn_anew():
    rng = np.random.default_rng(4)
    images = truth(rng, pick(rng, "ocr", 300))
    scores = score({"ocr": 1}, images, pick(rng, "ocr", 300), TINY)["ocr"]
    assert scores.mean() < 0.3
    assert (scores == 1).mean() < 0.02


def test_verifiers_score_each_image_by_itself():
    rng = np.random.default_rng(5)
    figures = truth(rng, pick_each(rng, TAGS, 3))
    words = truth(rng, pick(rng, "ocr", 6))
    images = torch.cat([figures, words])[torch.randperm(24)]
    alone = images.split(1)
    assert detect(images) == [detect(x)[0] for x in alone]
    assert read(images) == [read(x)[0] for x in alone]
    np.testing.assert_allclose(quality(images), [quality(x)[0] for x in alone], rtol=1e-6)


def test_verifiers_find_nothing_on_an_empty_page_or_in_noise():
    rng = np.random.default_rng(0)
    empty = tensor([render(rng, Scene([]), tone) for tone in (0, 0.3, 1)])
    noise = torch.rand(3, 3, 32, 32)
    images = torch.cat([empty, noise, torch.zeros(1, 3, 32, 32)])
    assert not any(detect(images))
    assert not any(read(images))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_detected_boxes_colours_and_counts_are_those_rendered(shape, n):
    rng = np.random.default_rng(6)
    mask = SHAPE_MASK[shape]
    for color in COLORS:
        image = render(rng, Scene([(shape, color)] * n))
        found, = detect(tensor([image]))
        on = (image == RGB[color]).all(-1)
        assert [(one["class"], one["color"]) for one in found] == [(shape, color)] * n
        assert on.sum() == n * mask.sum()        # whole, inside the picture and apart
        for one in found:
            x0, y0, x1, y1 = one["box"]
            assert (on[y0:y1, x0:x1] == mask).all()


def test_every_rendered_position_satisfies_relative_position():
    rng = np.random.default_rng(7)
    metas = list(ALL["position"].values()) * 4
    for meta, objects in zip(metas, detect(truth(rng, metas))):
        by_class = {one["class"]: one for one in objects}
        target, placed = [by_class[clause["class"]] for clause in meta["include"]]
        relation = meta["include"][1]["position"][0]
        assert relation in rewards.relative_position(placed, target), meta["prompt"]
        # The sentence says what the metadata say.
        before, after = meta["prompt"].split(relation)
        assert placed["class"] in before
        assert target["class"] in after


# ------------------------------------------------------------------ quality


def page(objects=(), word=None, tone=1.0):
    """The quality of one picture."""
    scene = Scene(list(objects), word=word)
    return quality(tensor([render(np.random.default_rng(0), scene, tone)]))[0]


def test_quality_is_highest_for_a_cream_page_with_at_most_one_figure():
    assert page() == 1
    for shape in SHAPES:
        for color in COLORS:
            assert page([(shape, color)]) == pytest.approx(1)
    rng = np.random.default_rng(8)
    images = truth(rng, pick_each(rng, TAGS + ("ocr",), 20))
    noise = torch.rand(5, 3, 32, 32)
    values = quality(torch.cat([images, noise, torch.zeros(1, 3, 32, 32)]))
    assert values.shape == (146,)
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_quality_falls_with_every_further_figure(shape):
    """To the floor of 0.4, where 92 pixels are drawn on."""
    values = [page([(shape, "red")] * n) for n in (1, 2, 3, 4)]
    for a, b in zip(values, values[1:]):
        assert a - b > 0.05 or a == b == pytest.approx(0.4)
    assert values[2] < 0.8


def test_quality_falls_with_a_word_and_with_the_dusk():
    assert page(word="HAT") < 0.95
    assert page(word="HATS") < page(word="HAT")
    figure = [("cross", "blue")]
    tones = [page(figure, tone=tone) for tone in (0, 0.25, 0.5, 0.75, 1)]
    assert np.diff(tones) == pytest.approx(0.1, abs=0.005)       # linear in the tone, 0.4 in all


def test_quality_does_not_look_at_the_prompt():
    assert list(inspect.signature(quality).parameters) == ["images"]
    assert list(inspect.signature(TINY.quality).parameters) == ["images"]
    rng = np.random.default_rng(9)
    metas = pick(rng, "counting", 5)
    images = truth(rng, metas)
    for other in (metas, pick(rng, "ocr", 5)):
        scores = score({"quality": 1}, images, other, TINY)["quality"]
        np.testing.assert_array_equal(scores, quality(images))


# ------------------------------------------------------------------ prompts and their split

SIZES = {"single_object": (4, 4), "two_object": (4, 12), "counting": (3, 12), "colors": (6, 24),
         "position": (16, 48), "color_attr": (154, 360)}


@pytest.mark.parametrize("tag", TAGS)
def test_training_and_evaluation_prompts_are_disjoint_by_content(tag):
    """But in single_object, whatever the wording and the frame; together they are all there is."""
    asked = {}
    for split in ("train", "eval"):
        metas = PROMPTS["photo", tag, split] + PROMPTS["poster", tag, split]
        asked[split] = {content(meta) for meta in metas}
    if tag == "single_object":
        assert asked["train"] == asked["eval"]
    else:
        assert not asked["train"] & asked["eval"]
    assert asked["train"] | asked["eval"] == {content(meta) for meta in ALL[tag].values()}
    assert (len(PROMPTS["photo", tag, "eval"]), len(ALL[tag])) == SIZES[tag]


def test_no_training_prompt_names_a_held_out_colour_shape_pair():
    def pairs(split, tag):
        metas = PROMPTS["photo", tag, split]
        return [{(c["class"], c["color"]) for c in meta["include"]} for meta in metas]

    held = set.union(*pairs("eval", "colors"))
    assert len(held) == 6
    assert not held & set.union(*pairs("train", "colors"), *pairs("train", "color_attr"))
    assert all(asked & held for asked in pairs("eval", "color_attr"))    # every one has such a pair


def test_a_fifth_of_all_words_is_held_out_and_never_drawn_in_training():
    rng = np.random.default_rng(10)
    train = {draw_word(rng, "train") for _ in range(1500)}
    held = {draw_word(rng, "eval") for _ in range(1500)}
    assert not train & held
    assert {len(word) for word in train} == {len(word) for word in held} == {3, 4}
    n = 2000
    words = ["".join(rng.choice(LETTERS, 4)) for _ in range(n)]
    assert near(sum(is_word_held_out(word) for word in words), n, 1 / 5)


@pytest.mark.parametrize("task", TASKS)
def test_drawn_prompts_keep_to_their_split(task):
    rng = np.random.default_rng(11)
    train = [draw_prompt(rng, task, "train") for _ in range(1500)]
    held = eval_prompts(task, 300)
    assert all(meta["task"] == task for meta in train + held)
    assert contents(train) and contents(held)
    assert not contents(train) & contents(held)


def test_a_fourth_task_gets_prompts_of_its_own_or_none(here):
    class Four(Tiny):
        tasks = (*TASKS, "motion")

    for ask in (Four().check_prompts, lambda tasks: Four().eval_prompts(tasks[0], 2)):
        with pytest.raises(ValueError, match="unknown task 'motion': the tiny world has geneval"):
            ask(["motion"])
    (here / "train.txt").write_text("a red circle\n")
    world = Four(["motion=."])
    meta = world.draw_prompt(np.random.default_rng(0), "motion", "train")
    assert meta == {"tag": "motion", "prompt": "a red circle", "task": "motion"}
    assert Four().tasks_with_prompts("eval") == list(TASKS)
    assert world.tasks_with_prompts("train") == [*TASKS, "motion"]
    assert world.tasks_with_prompts("eval") == list(TASKS)


def test_training_mix_is_flow_grpos_and_never_draws_single_object():
    rng = np.random.default_rng(12)
    n = 3000
    tags = Counter(draw_prompt(rng, "geneval", "train")["tag"] for _ in range(n))
    assert set(tags) == set(TAGS) - {"single_object"}
    mix = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert all(near(tags[tag], n, weight / 17) for tag, weight in mix.items())


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_prompts_are_the_same_on_every_call(task):
    first = eval_prompts(task, 120)
    np.random.seed(5)
    assert eval_prompts(task, 120) == first
    assert eval_prompts(task, 60) == first[:60]
    assert len(first) == 120
    assert len({meta["prompt"] for meta in first}) > 30


@pytest.mark.parametrize("task", TASKS)
def test_prompts_to_choose_settings_by_are_training_combinations(task):
    asked = contents(eval_prompts(task, 200, "train"))
    assert asked
    assert not asked & contents(eval_prompts(task, 200))
    assert eval_prompts(task, 50, "train") == eval_prompts(task, 50, "train")


def test_evaluation_asks_for_every_tag_and_shape_pair_alike():
    tags = Counter(meta["tag"] for meta in eval_prompts("geneval", 96))
    assert set(tags) == set(TAGS)
    assert set(tags.values()) == {16}
    asked = [meta for meta in eval_prompts("geneval", 600) if meta["tag"] == "color_attr"]
    pairs = Counter(tuple(clause["class"] for clause in meta["include"]) for meta in asked)
    assert len(pairs) == 12
    # Of 100: no pair is more than twice or thrice as frequent as it should be.
    assert max(pairs.values()) < 25


def test_every_prompt_is_well_formed_and_spoken_in_the_text_encoders_words():
    rng = np.random.default_rng(13)
    text = TinyText(VOCAB, LENGTH, 4)
    figures = []
    for metas in PROMPTS.values():
        figures += metas
    words = []
    for task in ("ocr", "quality"):
        for split in ("train", "eval"):
            words += [draw_prompt(rng, task, split) for _ in range(200)]
    for meta in figures:
        check_geneval_meta(meta)
    for meta in words:
        assert "word" not in meta or ocr_target(meta["prompt"]) == meta["word"]
    used = set()
    for meta in figures + words:
        assert json.loads(json.dumps(meta)) == meta
        # tokens raises for an unknown word or one too many.
        used |= {VOCAB[i] for i in text.tokens([meta["prompt"]])[0] if i}
    assert used == set(VOCAB[1:])                # and no word is idle or double
    assert len(set(VOCAB)) == len(VOCAB)


def test_unknown_task_is_refused():
    message = "unknown task 'aesthetic': the tiny world has geneval, ocr, quality"
    with pytest.raises(ValueError, match=message):
        TINY.draw_prompt(np.random.default_rng(0), "aesthetic", "train")


# ------------------------------------------------------------------ pictures


def test_rendering_is_seeded():
    for tag in TAGS + ("ocr",):
        meta = pick(np.random.default_rng(0), tag, 1)[0]
        images = []
        for seed in (5, 5, 6):
            rng = np.random.default_rng(seed)
            images.append(render(rng, faithful(rng, meta)))
        assert (images[0] == images[1]).all()
        assert (images[0] != images[2]).any()
    metas, x = pictures(np.random.default_rng(7), 20)
    again, y = pictures(np.random.default_rng(7), 20)
    _, z = pictures(np.random.default_rng(8), 20)
    assert metas == again
    assert torch.equal(x, y)
    assert not torch.equal(x, z)
    assert x.shape == (20, 3, 32, 32)
    assert x.min() >= 0
    assert x.max() <= 1


def test_pictures_are_of_training_prompts_and_show_them_unless_corrupted():
    rng = np.random.default_rng(14)
    metas, images = pictures(rng, 200, corrupted=False)
    for task, form in [("geneval", "geneval_strict"), ("ocr", "ocr")]:
        rows = [i for i, meta in enumerate(metas) if meta["task"] == task]
        got = score({form: 1}, images[rows], [metas[i] for i in rows], TINY)
        assert got["total"].mean() >= 0.99
    for task in TASKS:
        held = {content(meta) for meta in eval_prompts(task, 200)}
        assert not contents(metas) & held


# The chance that a corrupted scene is still the one asked for, by corrupt's numbers. A shape is
# redrawn in 0.2 of the scenes (from 4), a colour in 0.2 (from 6), a count in 0.4 (from 4), a
# relation in 0.45 (from 4), and one of two objects is dropped in 0.15.
SHAPE = 1 - 0.2 * 3 / 4
COLOR = 1 - 0.2 * 5 / 6
COUNT = 1 - 0.4 * 3 / 4
RELATION = 1 - 0.45 * 3 / 4
BOTH = 1 - 0.15
FAITHFUL = {
    "single_object": SHAPE,
    "colors": SHAPE * COLOR,
    "two_object": SHAPE ** 2 * BOTH,
    "color_attr": (SHAPE * COLOR) ** 2 * BOTH,
    "position": SHAPE ** 2 * RELATION,
    "counting": COUNT * SHAPE * (2 + BOTH) / 3,
}


def shows(scene, meta):
    """Is the scene what the prompt asks for?"""
    wanted = []
    for clause in meta["include"]:
        wanted += [clause] * clause["count"]
    if len(scene.objects) != len(wanted):
        return False
    if scene.relation != wanted[-1].get("position", [None])[0]:
        return False
    return all(shape == clause["class"] and color == clause.get("color", color)
               for (shape, color), clause in zip(scene.objects, wanted))


@pytest.mark.parametrize("tag", TAGS)
def test_corrupt_makes_wrong_pictures_at_its_rate(tag):
    rng = np.random.default_rng(15)
    n = 3000
    metas = pick(rng, tag, n)
    scenes = [corrupt(rng, faithful(rng, meta)) for meta in metas]
    right = np.array([shows(scene, meta) for scene, meta in zip(scenes, metas)])
    assert near(right.sum(), n, FAITHFUL[tag])
    images = tensor([render(rng, scene) for scene in scenes[:200]])
    scores = score({"geneval_strict": 1}, images, metas[:200], TINY)["total"]
    assert scores[right[:200]].all()
    # A diagonal or two swaps can be right by luck.
    assert scores[~right[:200]].mean() < 0.2


def test_corrupt_makes_wrong_letters_at_its_rate():
    rng = np.random.default_rng(16)
    n = 3000
    words = [corrupt(rng, Scene([], word="HAT")).word for _ in range(n // 3)]
    wrong = sum(word[i] != "HAT"[i] for word in words for i in range(3))
    assert near(wrong, n, 0.35 * 11 / 12)
    metas = pick(rng, "ocr", 100)
    texts = read(tensor([render(rng, corrupt(rng, faithful(rng, meta))) for meta in metas]))
    assert all(len(text) == len(meta["word"]) for text, meta in zip(texts, metas))
    assert sum(text != meta["word"] for text, meta in zip(texts, metas)) > 50


def test_corrupt_leaves_its_input_as_it_was():
    rng = np.random.default_rng(17)
    for meta in pick(rng, "color_attr", 20):
        scene = faithful(rng, meta)
        before = json.dumps(scene)
        corrupt(rng, scene)
        assert json.dumps(scene) == before
