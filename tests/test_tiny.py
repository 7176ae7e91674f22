"""Facts about tiny.py: the prompts and their split, the renderer, the verifiers, and what the base is trained on."""
import inspect
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import rewards
import tiny
from tiny import TinyText
from tiny import C, PROMPTS, S, TAGS, TASKS, corrupt, detect, draw_prompt, draw_word, eval_prompts, faithful, quality, read, render

ALL = {tag: {m["prompt"]: m for split in ("train", "eval") for m in PROMPTS["photo", tag, split]} for tag in TAGS}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def pick(rng, tag, n):
    """n prompts of a tag, drawn evenly from both splits."""
    options = list(ALL[tag].values()) if tag in TAGS else [word_meta(draw_word(rng, s)) for s in ("train", "eval") for _ in range(n)]
    return [options[i] for i in rng.integers(len(options), size=n)]


def word_meta(word):
    return {"tag": "ocr", "prompt": f'a sign that says "{word}"', "word": word}


def truth(rng, metas):
    return tensor([render(rng, faithful(rng, m)) for m in metas])


def near(hits, n, p, sigmas=4):
    """Are `hits` of n draws what probability p gives?"""
    return abs(hits - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


# ------------------------------------------------------------------ verifiers


@pytest.mark.parametrize("tag", TAGS)
def test_geneval_is_right_on_rendered_ground_truth(tag):
    rng = np.random.default_rng(1)
    metas = pick(rng, tag, 80)
    got = rewards.score(dict.fromkeys(("geneval", "geneval_strict", "geneval_benchmark"), 1), truth(rng, metas), metas, tiny)
    assert all(got[form].mean() >= 0.99 for form in got if form != "total")


def test_ocr_reads_rendered_words_exactly_and_finds_no_figure_in_them():
    rng = np.random.default_rng(2)
    metas = pick(rng, "ocr", 400)
    images = truth(rng, metas)
    assert np.mean([text == m["word"] for text, m in zip(read(images), metas)]) >= 0.99
    assert rewards.score({"ocr": 1}, images, metas, tiny)["ocr"].mean() >= 0.99
    assert not any(detect(images[:100]))
    figures = truth(rng, [m for tag in TAGS for m in pick(rng, tag, 15)])
    assert set(read(figures)) == {""}                            # and no letter in figures


def content(meta):
    """What a prompt asks for, whatever its wording, order and frame: "a left of b" is "b right of a"."""
    if "word" in meta:
        return meta["word"]
    o, tag = meta["include"], meta["tag"]
    if tag == "position":
        relation, (b, a) = o[1]["position"][0], [x["class"] for x in o]
        mirror = {"right of": "left of", "below": "above"}
        return (tag, b, mirror[relation], a) if relation in mirror else (tag, a, relation, b)
    return tag, frozenset((x["class"], x["count"], x.get("color")) for x in o)


@pytest.mark.parametrize("tag", TAGS)
def test_geneval_is_at_chance_on_captions_drawn_anew_within_the_tag(tag):
    """Chance: how often two prompts of the tag, drawn alike, ask for the same."""
    rng, every = np.random.default_rng(3), list(ALL[tag].values())
    counts = Counter(content(m) for m in every)
    chance = sum((n / len(every)) ** 2 for n in counts.values())
    assert chance == pytest.approx({"single_object": 1 / 4, "two_object": 1 / 6, "counting": 1 / 12, "colors": 1 / 24, "position": 1 / 24, "color_attr": 1 / 180}[tag])
    found, n = detect(truth(rng, pick(rng, tag, 100))), 2000
    hits = sum(rewards.geneval_score(objects, m, "strict") for objects, m in zip(found * 20, pick(rng, tag, n)))
    if tag == "position":        # on the diagonal two relations hold, so up to twice as often
        assert n * chance - 4 * math.sqrt(n * chance) < hits < 2 * n * chance + 4 * math.sqrt(2 * n * chance)
    else:
        assert near(hits, n, chance)


def painted(*patches, color=tiny.INK):
    """A cream page with masks (rows of booleans) painted at (top, left)."""
    image = np.full((32, 32, 3), tiny.CREAM, np.uint8)
    for mask, top, left in patches:
        image[top:top + mask.shape[0], left:left + mask.shape[1]][mask] = color
    return tensor([image])


@pytest.mark.parametrize("rows", [["####"] * 4, ["#####"] * 2, ["#.....", "#.....", "#.....", "#.....", "#.....", "######"], ["########", "#......."] * 4, ["#" * 12] * 12],
                         ids=["small_block", "short_bar", "corner", "comb", "large_block"])
def test_a_figure_that_is_no_shape_is_not_counted(rows):
    assert detect(painted((tiny.bitmap(rows, len(rows[0])), 9, 10), color=tiny.COLORS["red"])) == [[]]


def test_text_is_read_line_by_line_from_the_left():
    letters = [(tiny.GLYPH_MASK[a].copy(), top, left) for a, top, left in [("T", 20, 3), ("A", 4, 10), ("Z", 5, 18), ("H", 4, 2), ("X", 19, 11)]]
    letters[1][0][0, 2] = False                                  # a flaw: the upper line agrees less than the lower
    assert read(painted(*letters)) == ["HAZ TX"]


def test_ocr_is_low_on_captions_drawn_anew():
    rng = np.random.default_rng(4)
    scores = rewards.score({"ocr": 1}, truth(rng, pick(rng, "ocr", 300)), pick(rng, "ocr", 300), tiny)["ocr"]
    assert scores.mean() < 0.3 and (scores == 1).mean() < 0.02


def test_verifiers_score_each_image_by_itself():
    rng = np.random.default_rng(5)
    images = torch.cat([truth(rng, [m for tag in TAGS for m in pick(rng, tag, 3)]), truth(rng, pick(rng, "ocr", 6))])[torch.randperm(24)]
    alone = [images[i:i + 1] for i in range(24)]
    assert detect(images) == [detect(x)[0] for x in alone] and read(images) == [read(x)[0] for x in alone]
    np.testing.assert_allclose(quality(images), [quality(x)[0] for x in alone], rtol=1e-6)


def test_verifiers_find_nothing_on_an_empty_page_or_in_noise():
    images = torch.cat([tensor([render(np.random.default_rng(0), ([], None, None), tone) for tone in (0, 0.3, 1)]), torch.rand(3, 3, 32, 32), torch.zeros(1, 3, 32, 32)])
    assert not any(detect(images)) and not any(read(images))


@pytest.mark.parametrize("shape", S)
def test_detected_boxes_colours_and_counts_are_those_rendered(shape):
    rng = np.random.default_rng(6)
    for color in C:
        for n in (1, 2, 3, 4):
            image = render(rng, ([(shape, color)] * n, None, None))
            (found,), painted = detect(tensor([image])), (image == tiny.COLORS[color]).all(-1)
            assert [(o["class"], o["color"]) for o in found] == [(shape, color)] * n
            assert painted.sum() == n * tiny.SHAPE_MASK[shape].sum()             # whole, inside the picture and apart
            for x0, y0, x1, y1 in (o["box"] for o in found):
                assert (painted[y0:y1, x0:x1] == tiny.SHAPE_MASK[shape]).all()


def test_every_rendered_position_satisfies_relative_position():
    rng = np.random.default_rng(7)
    metas = list(ALL["position"].values()) * 4
    for m, objects in zip(metas, detect(truth(rng, metas))):
        target, placed = (next(o for o in objects if o["class"] == clause["class"]) for clause in m["include"])
        relation = m["include"][1]["position"][0]
        assert relation in rewards.relative_position(placed, target), m["prompt"]
        words = m["prompt"].split(relation)
        assert placed["class"] in words[0] and target["class"] in words[1]        # the sentence says what the metadata say


# ------------------------------------------------------------------ quality


def page(objects=(), word=None, tone=1.0, seed=0):
    return quality(tensor([render(np.random.default_rng(seed), (list(objects), None, word), tone)]))[0]


def test_quality_is_highest_for_a_cream_page_with_at_most_one_figure():
    assert page() == 1
    assert all(page([(s, c)]) == pytest.approx(1) for s in S for c in C)
    rng = np.random.default_rng(8)
    values = quality(torch.cat([truth(rng, [m for tag in TAGS + ("ocr",) for m in pick(rng, tag, 20)]), torch.rand(5, 3, 32, 32), torch.zeros(1, 3, 32, 32)]))
    assert values.shape == (146,) and values.min() >= 0 and values.max() <= 1 + 1e-6


@pytest.mark.parametrize("shape", S)
def test_quality_falls_with_every_further_figure(shape):
    """To the floor of 0.4, where 92 pixels are drawn on."""
    values = [page([(shape, "red")] * n) for n in (1, 2, 3, 4)]
    assert all(a - b > 0.05 or a == b == pytest.approx(0.4) for a, b in zip(values, values[1:])) and values[2] < 0.8


def test_quality_falls_with_a_word_and_with_the_dusk():
    assert page(word="HAT") < 0.95 and page(word="HATS") < page(word="HAT")
    tones = [page([("cross", "blue")], tone=t) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert np.diff(tones) == pytest.approx(0.1, abs=0.005)                        # linear in the tone, 0.4 in all


def test_quality_does_not_look_at_the_prompt():
    assert list(inspect.signature(quality).parameters) == ["images"]
    rng = np.random.default_rng(9)
    metas = pick(rng, "counting", 5)
    images = truth(rng, metas)
    for other in (metas, pick(rng, "ocr", 5)):
        np.testing.assert_array_equal(rewards.score({"quality": 1}, images, other, tiny)["quality"], quality(images))


# ------------------------------------------------------------------ prompts and their split


def test_training_and_evaluation_prompts_are_disjoint_by_content():
    """In every tag but single_object, whatever the wording and the frame; together they are all there is."""
    for tag in TAGS:
        train, held = ({content(m) for frame in ("photo", "poster") for m in PROMPTS[frame, tag, split]} for split in ("train", "eval"))
        assert train == held if tag == "single_object" else not train & held
        assert train | held == {content(m) for m in ALL[tag].values()}
    sizes = {tag: (len(PROMPTS["photo", tag, "eval"]), len(ALL[tag])) for tag in TAGS}
    assert sizes == {"single_object": (4, 4), "two_object": (4, 12), "counting": (3, 12), "colors": (6, 24), "position": (16, 48), "color_attr": (154, 360)}


def test_no_training_prompt_names_a_held_out_colour_shape_pair():
    def pairs(split, *tags):
        return [{(o["class"], o["color"]) for o in m["include"]} for tag in tags for m in PROMPTS["photo", tag, split]]
    held = set.union(*pairs("eval", "colors"))
    assert len(held) == 6 and not held & set.union(*pairs("train", "colors", "color_attr"))
    assert all(asked & held for asked in pairs("eval", "color_attr"))             # and every evaluation prompt has one


def test_a_fifth_of_all_words_is_held_out_and_never_drawn_in_training():
    rng = np.random.default_rng(10)
    train, held = ({draw_word(rng, split) for _ in range(1500)} for split in ("train", "eval"))
    assert not train & held and {len(w) for w in train} == {len(w) for w in held} == {3, 4}
    n = 2000
    assert near(sum(tiny.word_held_out("".join(rng.choice(tiny.A, 4))) for _ in range(n)), n, 1 / 5)


@pytest.mark.parametrize("task", TASKS)
def test_drawn_prompts_keep_to_their_split(task):
    rng = np.random.default_rng(11)
    train, held = [draw_prompt(rng, task, "train") for _ in range(1500)], eval_prompts(task, 300)
    assert all(m["task"] == task for m in train + held)
    apart = [{content(m) for m in metas if m["tag"] != "single_object"} for metas in (train, held)]
    assert apart[0] and apart[1] and not apart[0] & apart[1]


def test_training_mix_is_flow_grpos_and_never_draws_single_object():
    rng, n = np.random.default_rng(12), 3000
    tags = Counter(draw_prompt(rng, "geneval", "train")["tag"] for _ in range(n))
    assert set(tags) == set(TAGS) - {"single_object"}
    assert all(near(tags[tag], n, w / 17) for tag, w in {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}.items())


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_prompts_are_the_same_on_every_call(task):
    first = eval_prompts(task, 120)
    np.random.seed(5)
    assert eval_prompts(task, 120) == first and eval_prompts(task, 60) == first[:60] and len(first) == 120
    assert len({m["prompt"] for m in first}) > 30


@pytest.mark.parametrize("task", TASKS)
def test_prompts_to_choose_settings_by_are_training_combinations(task):
    asked = {content(m) for m in eval_prompts(task, 200, "train") if m["tag"] != "single_object"}
    assert asked and not asked & {content(m) for m in eval_prompts(task, 200) if m["tag"] != "single_object"}
    assert eval_prompts(task, 50, "train") == eval_prompts(task, 50, "train")


def test_evaluation_asks_for_every_tag_and_shape_pair_alike():
    tags = Counter(m["tag"] for m in eval_prompts("geneval", 96))
    assert set(tags) == set(TAGS) and set(tags.values()) == {16}
    pairs = Counter(tuple(o["class"] for o in m["include"]) for m in eval_prompts("geneval", 600) if m["tag"] == "color_attr")
    assert len(pairs) == 12 and max(pairs.values()) < 25          # of 100: no pair is more than twice or thrice as frequent as it should be


def test_every_prompt_is_well_formed_and_spoken_in_the_text_encoders_words():
    text, used, rng = TinyText(tiny.VOCAB, tiny.LENGTH, 4), set(), np.random.default_rng(13)
    geneval = [m for metas in PROMPTS.values() for m in metas]
    words = [draw_prompt(rng, task, split) for task in ("ocr", "quality") for split in ("train", "eval") for _ in range(200)]
    for m in geneval:
        rewards.check_geneval_meta(m)
    for m in words:
        assert "word" not in m or rewards.ocr_target(m["prompt"]) == m["word"]
    for m in geneval + words:
        assert json.loads(json.dumps(m)) == m
        used |= {tiny.VOCAB[i] for i in text.tokens([m["prompt"]])[0] if i}       # raises for an unknown word or one too many
    assert used == set(tiny.VOCAB[1:]) and len(set(tiny.VOCAB)) == len(tiny.VOCAB)    # and no word is idle or double


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'aesthetic': the tiny world has geneval, ocr, quality"):
        draw_prompt(np.random.default_rng(0), "aesthetic", "train")


# ------------------------------------------------------------------ pictures


def test_rendering_is_seeded():
    for m in [pick(np.random.default_rng(0), tag, 1)[0] for tag in TAGS + ("ocr",)]:
        images = [render(rng, faithful(rng, m)) for rng in map(np.random.default_rng, (5, 5, 6))]
        assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
    (metas, x), (again, y), (_, z) = (tiny.pictures(np.random.default_rng(seed), 20) for seed in (7, 7, 8))
    assert metas == again and torch.equal(x, y) and not torch.equal(x, z)
    assert x.shape == (20, 3, 32, 32) and x.min() >= 0 and x.max() <= 1


def test_pictures_are_of_training_prompts_and_show_them_unless_corrupted():
    rng = np.random.default_rng(14)
    metas, images = tiny.pictures(rng, 200, corrupted=False)
    for task, form in [("geneval", "geneval_strict"), ("ocr", "ocr")]:
        rows = [i for i, m in enumerate(metas) if m["task"] == task]
        assert rewards.score({form: 1}, images[rows], [metas[i] for i in rows], tiny)["total"].mean() >= 0.99
    trained = {content(m) for m in metas if m["tag"] != "single_object"}
    assert not trained & {content(m) for task in TASKS for m in eval_prompts(task, 200)}


# The chance that a corrupted scene is still what was asked, by corrupt()'s numbers: a shape is redrawn in 0.2 of the scenes (from 4),
# a colour in 0.2 (from 6), a count in 0.4 (from 4), a relation in 0.45 (from 4), one of two objects is dropped in 0.15.
SHAPE, COLOR, COUNT, RELATION, BOTH = 1 - 0.2 * 3 / 4, 1 - 0.2 * 5 / 6, 1 - 0.4 * 3 / 4, 1 - 0.45 * 3 / 4, 1 - 0.15
FAITHFUL = {"single_object": SHAPE, "colors": SHAPE * COLOR, "two_object": SHAPE ** 2 * BOTH, "color_attr": (SHAPE * COLOR) ** 2 * BOTH,
            "position": SHAPE ** 2 * RELATION, "counting": COUNT * SHAPE * (2 + BOTH) / 3}


@pytest.mark.parametrize("tag", TAGS)
def test_corrupt_makes_wrong_pictures_at_its_rate(tag):
    rng, n = np.random.default_rng(15), 3000
    metas, right = pick(rng, tag, n), []
    scenes = [corrupt(rng, faithful(rng, m)) for m in metas]
    for m, (objects, relation, _) in zip(metas, scenes):
        wanted = [o for o in m["include"] for _ in range(o["count"])]
        right.append(len(objects) == len(wanted) and relation == wanted[-1].get("position", [None])[0]
                     and all(s == o["class"] and c == o.get("color", c) for (s, c), o in zip(objects, wanted)))
    assert near(sum(right), n, FAITHFUL[tag])
    scores = rewards.score({"geneval_strict": 1}, tensor([render(rng, scene) for scene in scenes[:200]]), metas[:200], tiny)["total"]
    assert scores[right[:200]].all() and scores[~np.array(right[:200])].mean() < 0.2      # a diagonal or two swaps can be right by luck


def test_corrupt_makes_wrong_letters_at_its_rate():
    rng, n = np.random.default_rng(16), 3000
    wrong = sum(corrupt(rng, ([], None, "HAT"))[2][i] != "HAT"[i] for _ in range(n // 3) for i in range(3))
    assert near(wrong, n, 0.35 * 11 / 12)
    metas = pick(rng, "ocr", 100)
    texts = read(tensor([render(rng, corrupt(rng, faithful(rng, m))) for m in metas]))
    assert all(len(text) == len(m["word"]) for text, m in zip(texts, metas)) and sum(text != m["word"] for text, m in zip(texts, metas)) > 50


def test_corrupt_leaves_its_input_as_it_was():
    rng = np.random.default_rng(17)
    for m in pick(rng, "color_attr", 20):
        scene = faithful(rng, m)
        before = json.dumps(scene)
        corrupt(rng, scene)
        assert json.dumps(scene) == before
