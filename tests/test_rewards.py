"""Facts about rewards.py, checked on detections and readings made by hand."""
import numpy as np
import pytest
import torch

import rewards
import scorers
from rewards import (
    REWARDS,
    check_rewards,
    edit_distance,
    geneval_score,
    ocr_score,
    parse_reward,
    relative_position,
    score,
)
from scorers.jpeg import jpeg_incompressibility
from worlds.prompts import ocr_target
from worlds.sd3 import SD3


def obj(name, x=0, y=0, color=None, confidence=0.95, size=10):
    """An object of the given size centred on (x, y)."""
    r = size / 2
    return {"class": name, "score": confidence, "box": (x - r, y - r, x + r, y + r), "color": color}


def want(name, count=1, **rest):
    return {"class": name, "count": count, **rest}


def meta(tag, *include, **rest):
    return {"tag": tag, "include": list(include), "prompt": "", **rest}


left_of_first = ["left of", 0]
SINGLE = meta("single_object", want("cat"))
TWO = meta("two_object", want("cat"), want("dog"))
COUNT = meta("counting", want("cat", 2), exclude=[want("cat", 3)])
COLOR = meta("colors", want("cat", color="red"))
RED_PAIR = meta("colors", want("cat", 2, color="red"))
ATTR = meta("color_attr", want("cat", color="red"), want("dog", color="blue"))
POSITION = meta("position", want("cat"), want("dog", position=left_of_first))
POSITION_PAIR = meta("position", want("cat", 2), want("dog", position=left_of_first))
RED_TARGET = meta("position", want("cat", color="red"), want("dog", position=left_of_first))
BLUE_LEFT = meta("position", want("cat"), want("dog", color="blue", position=left_of_first))
NO_DOG = meta("counting", want("cat"), exclude=[want("dog", 1)])

cat = obj("cat")
dog = obj("dog")
red_cat = obj("cat", color="red")
blue_cat = obj("cat", color="blue")
unsure_red_cat = obj("cat", color="red", confidence=0.5)
unsure_blue_cat = obj("cat", color="blue", confidence=0.5)
left_dog = obj("dog", x=-50)
right_dog = obj("dog", x=50)
left_blue_dog = obj("dog", x=-50, color="blue")
left_red_dog = obj("dog", x=-50, color="red")

# fact, prompt, objects found, soft, strict, benchmark
TABLE = [
    ("the object is there", SINGLE, [cat], 1, 1, 1),
    ("another class does not count", SINGLE, [dog], 0, 0, 0),
    ("nothing found", SINGLE, [], 0, 0, 0),
    ("an object of another class besides is forgiven by all", SINGLE, [cat, dog], 1, 1, 1),
    ("one too many is forgiven by the benchmark alone", SINGLE, [cat, cat], 0, 0, 1),
    ("a crowd makes soft negative", SINGLE, [cat] * 3, -1, 0, 1),

    ("both there", TWO, [dog, cat], 1, 1, 1),
    ("one of two missing is half", TWO, [dog], 0.5, 0, 0),
    ("overlapping boxes count as two, there is no suppression", TWO, [cat, cat, dog], 0.5, 0, 1),

    ("the right count", COUNT, [cat] * 2, 1, 1, 1),
    ("one too few", COUNT, [cat], 0.5, 0, 0),
    ("one too many costs as much, and trips the exclude clause", COUNT, [cat] * 3, 0.5, 0, 0),
    ("five for two", COUNT, [cat] * 5, -0.5, 0, 0),
    ("exclude clauses bind the benchmark alone", NO_DOG, [cat, dog], 1, 1, 0),

    ("the right colour", COLOR, [red_cat], 1, 1, 1),
    ("a wrong colour keeps the part for the count", COLOR, [blue_cat], 0.5, 0, 0),
    ("an unknown colour is a wrong one", COLOR, [cat], 0.5, 0, 0),
    ("a wrong count costs the part for the colour", COLOR, [], 0, 0, 0),
    ("with too many, colours are not looked at by soft", COLOR, [red_cat, red_cat], 0, 0, 1),
    ("one of two in the right colour", RED_PAIR, [red_cat, blue_cat], 0.75, 0, 0),
    ("benchmark: the surest box has the colour", COLOR, [unsure_blue_cat, red_cat], 0, 0, 1),
    ("benchmark: the surest box has not the colour", COLOR, [unsure_red_cat, blue_cat], 0, 0, 0),
    ("benchmark: of equally sure boxes the last found counts", COLOR, [blue_cat, red_cat], 0, 0, 1),
    ("benchmark: of equally sure boxes the first found is dropped", COLOR, [red_cat, blue_cat],
     0, 0, 0),

    ("both colours", ATTR, [red_cat, left_blue_dog], 1, 1, 1),
    ("colours swapped", ATTR, [blue_cat, left_red_dog], 0.5, 0, 0),
    ("one colour wrong", ATTR, [red_cat, left_red_dog], 0.75, 0, 0),
    ("one object missing costs its colour too", ATTR, [red_cat], 0.5, 0, 0),

    ("in place", POSITION, [cat, left_dog], 1, 1, 1),
    ("a wrong position adds a 0 and a 1", POSITION, [cat, right_dog], 3 / 4, 0, 0),
    ("the same box is not beside itself", POSITION, [cat, dog], 3 / 4, 0, 0),
    ("a missing target adds a 0 alone", POSITION, [left_dog], (0 + 1 + 0) / 3, 0, 0),
    ("one target too many: missing for soft, not for the benchmark", POSITION,
     [cat, cat, left_dog], (0 + 1 + 0) / 3, 0, 1),
    ("the placed object missing costs its position", POSITION, [cat], (1 + 0 + 0) / 3, 0, 0),
    ("left of every target", POSITION_PAIR, [cat, obj("cat", x=20), left_dog], 1, 1, 1),
    ("left of one target of two is not enough", POSITION_PAIR,
     [cat, obj("cat", x=-99), left_dog], 3 / 4, 0, 0),
    ("a target of the wrong colour is no target", RED_TARGET, [blue_cat, left_dog],
     (1 + 0 + 1 + 0) / 4, 0, 0),
    ("colour and position both right", BLUE_LEFT, [cat, left_blue_dog], 1, 1, 1),
    ("after a wrong colour the position adds nothing", BLUE_LEFT, [cat, left_red_dog],
     (1 + 1 + 0) / 3, 0, 0),
    ("with colour and position asked, a wrong count adds one 0", BLUE_LEFT, [cat],
     (1 + 0 + 0) / 3, 0, 0),
]


# ------------------------------------------------------------------ GenEval


@pytest.mark.parametrize("form", ["soft", "strict", "benchmark"])
@pytest.mark.parametrize("prompt, objects, soft, strict, benchmark", [row[1:] for row in TABLE],
                         ids=[row[0].replace(" ", "_") for row in TABLE])
def test_geneval_score_is(prompt, objects, soft, strict, benchmark, form):
    expected = {"soft": soft, "strict": strict, "benchmark": benchmark}
    assert geneval_score(objects, prompt, form) == pytest.approx(expected[form])


def test_table_covers_every_tag():
    assert {row[1]["tag"] for row in TABLE} == {"single_object", "two_object", "counting",
                                                "colors", "position", "color_attr"}


def test_geneval_score_is_soft_unless_told():
    assert geneval_score([cat] * 3, SINGLE) == -1


@pytest.mark.parametrize("x, y, expected", [
    # y points down.
    (-50, 0, {"left of"}), (50, 0, {"right of"}), (0, -50, {"above"}), (0, 50, {"below"}),
    # On the diagonal both hold.
    (50, 50, {"right of", "below"}), (-50, -50, {"left of", "above"}),
    (50, 20, {"right of"}),
    (2, 0, set()),               # 0.1 of 10 + 10 is the slack
    (0, 0, set()),
    (3, 0, set()),               # (3 - 2) / 3 is below 0.5
    (4, 0, set()),               # (4 - 2) / 4 is 0.5, not over it
    (4.1, 0, {"right of"}),
    # (5 - 2) / 7.07: near the diagonal neither holds for objects this close.
    (5, 5, set()),
])
def test_relative_position_is(x, y, expected):
    assert relative_position(obj("dog", x, y), obj("cat")) == expected


def test_relative_position_counts_the_slack_by_both_sizes():
    small_dog = obj("dog", x=11, size=10)
    assert relative_position(small_dog, obj("cat", size=10)) == {"right of"}
    assert relative_position(small_dog, obj("cat", size=50)) == set()


@pytest.mark.parametrize("broken, got", [
    (None, "NoneType"),
    ({"prompt": "a cat"}, "include None"),
    ({"include": []}, r"include \[\]"),
    ({"include": ["cat"]}, "clause 'cat'"),
    ({"include": [{"count": 1}]}, "class None"),
    ({"include": [{"class": "cat"}]}, "count None"),
    ({"include": [want("cat", 0)]}, "count 0"),
    ({"include": [want("cat", "2")]}, "count '2'"),
    ({"include": [want("cat", color=None)]}, "color None"),
    ({"include": [want("cat", position=["above", 0])]}, "position .* in clause 0"),
    ({"include": [want("cat"), want("dog", position=["above", 1])]}, "position .* in clause 1"),
    ({"include": [want("cat"), want("dog", position=["above", -1])]}, "position .* in clause 1"),
    ({"include": [want("cat"), want("dog", position=["beside", 0])]}, "position .* in clause 1"),
    ({"include": [want("cat"), want("dog", position=None)]}, "position None in clause 1"),
    ({"include": [want("cat")], "exclude": [{"class": "dog"}]}, "count None"),
    ({"include": [want("cat")], "exclude": None}, "exclude None"),
])
def test_malformed_geneval_prompt_is_refused(broken, got):
    with pytest.raises(ValueError, match=f"got {got}, expected"):
        geneval_score([cat], broken)


def test_unknown_geneval_form_is_refused():
    with pytest.raises(ValueError, match="got 'hard', expected one of .*soft"):
        geneval_score([cat], SINGLE, "hard")


# ------------------------------------------------------------------ OCR


@pytest.mark.parametrize("a, b, expected", [
    ("", "", 0), ("", "abc", 3), ("abc", "", 3),
    ("abc", "abc", 0), ("abc", "abd", 1), ("abc", "ac", 1), ("ac", "abc", 1), ("ab", "ba", 2),
    ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("intention", "execution", 5),
])
def test_edit_distance_is(a, b, expected):
    assert edit_distance(a, b) == expected


def test_ocr_target_is_the_first_quoted_text_as_written():
    assert ocr_target('a "Big Sale" sign beside a "closed" one') == "Big Sale"


@pytest.mark.parametrize("prompt", ["a sign", 'a 5" sign', 'a "" sign', 'a "  " sign',
                                    "a 'big' sign", "a \u201cbig\u201d sign"])
def test_prompt_without_quoted_text_is_refused(prompt):
    with pytest.raises(ValueError, match="expected the wanted text in straight double quotes"):
        ocr_score("big", prompt)


@pytest.mark.parametrize("read, expected", [
    # Neither case nor spaces count.
    ("Open Now", 1), ("OPEN NOW", 1), ("o p e n n o w", 1),
    # Contained is enough.
    ("we are open now!", 1), ("xxopennowxx", 1),
    # One substituted, one missing, two missing.
    ("open nov", 6 / 7), ("opennw", 6 / 7), ("openn", 5 / 7),
    # Where it is not contained, extra letters count.
    ("oopen nov", 5 / 7),
    # Never below 0.
    ("", 0), ("zzzzzzz", 0), ("quite another long text", 0),
])
def test_ocr_score_is(read, expected):
    prompt = 'a shop with a sign "Open Now" in its window'
    assert ocr_score(read, prompt) == pytest.approx(expected)


# ------------------------------------------------------------------ --reward


@pytest.mark.parametrize("spec, expected", [
    ("geneval", {"geneval": 1.0}),
    ("geneval=0.5,geneval_strict=0.5", {"geneval": 0.5, "geneval_strict": 0.5}),
    (" ocr = 2 , quality ", {"ocr": 2.0, "quality": 1.0}),
])
def test_parse_reward_is(spec, expected):
    assert parse_reward(spec) == expected


@pytest.mark.parametrize("spec, message", [
    ("beauty", "got 'beauty', expected one of geneval, geneval_strict, geneval_benchmark, ocr, "
               "quality, preference"),
    ("", "got '', expected one of"),
    ("ocr,", "got '', expected one of"),
    ("ocr,ocr=2", "got ocr twice"),
])
def test_parse_reward_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_reward(spec)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much", "", "1=2"])
def test_parse_reward_refuses_the_weight(weight):
    message = f"got weight '{weight}' for ocr, expected a positive, finite number"
    with pytest.raises(ValueError, match=message):
        parse_reward(f"ocr={weight}")


# ------------------------------------------------------------------ score


class World:
    """Finds, reads and rates what it was told to; counts how often its detector runs."""

    def __init__(self, found=(), texts=(), rates=()):
        self.found = found
        self.texts = texts
        self.rates = rates
        self.runs = 0

    def detect(self, images, metas):
        self.runs += 1
        return list(self.found)

    def read(self, images):
        return list(self.texts)

    def quality(self, images):
        return np.array(self.rates)

    def preference(self, images, metas):
        return np.array(self.rates)


IMAGES = np.zeros((2, 3, 8, 8))
PAIR = [SINGLE, SINGLE]
THREE_FORMS = ("geneval", "geneval_strict", "geneval_benchmark")


def test_score_gives_each_component_and_their_weighted_sum():
    world = World(found=[[cat], [cat] * 3], rates=[0.5, 0.25])
    got = score({"geneval": 0.5, "quality": 2.0}, IMAGES, PAIR, world)
    assert list(got) == ["geneval", "quality", "total"]
    np.testing.assert_allclose(got["geneval"], [1, -1])
    np.testing.assert_allclose(got["quality"], [0.5, 0.25])
    np.testing.assert_allclose(got["total"], [1.5, 0])
    assert all(values.dtype == np.float32 and values.shape == (2,) for values in got.values())


def test_each_geneval_name_scores_by_its_own_form():
    world = World(found=[[cat] * 3])
    got = [REWARDS[name].score(IMAGES[:1], [SINGLE], world)[0] for name in THREE_FORMS]
    assert got == [-1, 0, 1]


def test_score_reads_each_image_against_its_own_prompt():
    metas = [{"prompt": 'a sign "ab"'}, {"prompt": 'a sign "cd"'}]
    got = score({"ocr": 1.0}, IMAGES, metas, World(texts=["AB", "ad"]))
    np.testing.assert_allclose(got["total"], [1, 0.5])


def test_detector_runs_once_for_all_geneval_forms_and_anew_for_each_batch():
    world = World(found=[[cat], [cat]])
    spec = parse_reward(",".join(THREE_FORMS))
    score(spec, IMAGES, PAIR, world)
    assert world.runs == 1
    score(spec, IMAGES, PAIR, world)
    assert world.runs == 2


@pytest.mark.parametrize("rates", [[1, np.nan], [1, np.inf], [1], [1, 1, 1], [[1], [1]], 1.0],
                         ids=["nan", "inf", "too_few", "too_many", "column", "scalar"])
def test_score_refuses_a_bad_component_by_name(rates):
    world = World(found=[[cat], [cat]], rates=rates)
    message = r"reward quality: got shape .* expected \(2,\) finite numbers"
    with pytest.raises(ValueError, match=message):
        score({"geneval": 1.0, "quality": 1.0}, IMAGES, PAIR, world)


@pytest.mark.parametrize("name", [*THREE_FORMS, "ocr"])
@pytest.mark.parametrize("n", [1, 3])
def test_score_refuses_results_for_another_number_of_images(name, n):
    metas = [{**SINGLE, "prompt": 'a "b"'}] * 2
    world = World(found=[[cat]] * n, texts=["b"] * n)
    message = f"reward {name}: got results for {n} images, expected 2"
    with pytest.raises(ValueError, match=message):
        score({name: 1.0}, IMAGES, metas, world)


def test_a_reward_that_fails_is_not_scored_as_zero():
    metas = [{"prompt": "no text asked for"}] * 2
    with pytest.raises(ValueError, match="straight double quotes"):
        score({"ocr": 1.0}, IMAGES, metas, World(texts=["a", "b"]))


@pytest.mark.parametrize("name", ["quality", "preference"])
def test_what_the_tiny_world_alone_has_is_refused_for_real_pictures(name):
    with pytest.raises(ValueError, match=f"reward {name}: the world 'sd3' has none of its own"):
        score({name: 1.0}, torch.zeros(1, 3, 8, 8), [SINGLE], SD3())


def test_preference_is_judged_with_each_images_own_prompt():
    class Loose(World):
        def preference(self, images, metas):
            return [len(meta["prompt"]) for meta in metas]

    metas = [{"prompt": "a"}, {"prompt": "a cat"}]
    got = score({"preference": 0.5}, IMAGES, metas, Loose())
    np.testing.assert_allclose(got["preference"], [1, 5])
    np.testing.assert_allclose(got["total"], [0.5, 2.5])


# ------------------------------------------------------------------ the table

WHERE = {"pickscore": "clip.PickScore", "clipscore": "clip.CLIPScore", "hpsv2": "clip.HPSv2",
         "imagereward": "imagereward.ImageReward", "aesthetic": "clip.Aesthetic",
         "deqa": "deqa.DeQA", "unifiedreward": "judge.UnifiedReward", "qwenvl": "judge.QwenVL"}
# The scales by which flow_grpo divides. For the others it is 1.
SCALES = {"pickscore": 26, "clipscore": 30, "deqa": 5, "unifiedreward": 5, "qwenvl": 5,
          "jpeg_compressibility": 500}


# The table may have more: the README says how to add one.
PUBLISHED = (*THREE_FORMS, "ocr", "quality", "preference", *WHERE, "jpeg_compressibility",
             "jpeg_incompressibility")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_reward_has_a_score_a_scale_and_its_network(monkeypatch, name):
    asked = []

    def get(where, device):
        asked.append(where)
        return lambda images, prompts: torch.arange(1.0, 1 + len(images))

    monkeypatch.setattr(scorers, "get", get)
    world = World(found=[[cat], []], texts=["b", "c"], rates=[0.5, 0.25])
    metas = [{**SINGLE, "prompt": 'a "b"'}] * 2
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[1] = 0.5
    got = score({name: 3.0}, images, metas, world)
    assert got[name].shape == (2,) and got[name][0] != got[name][1]
    scale = SCALES.get(name, 1)
    np.testing.assert_allclose(got["total"], 3 * got[name] / scale, rtol=1e-6)
    assert REWARDS[name].scale == scale
    assert REWARDS[name].where == WHERE.get(name, "")
    assert asked == ([WHERE[name]] if name in WHERE else [])
    # What the world itself sees costs nothing in the tiny world. A network is never cheap.
    assert REWARDS[name].cheap == (name in (*THREE_FORMS, "ocr", "quality", "preference"))


def test_jpeg_rewards_are_the_size_and_its_negative():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    got = score({"jpeg_compressibility": 1.0, "jpeg_incompressibility": 1.0}, images, PAIR, World())
    sizes = jpeg_incompressibility(images).numpy()
    assert (sizes > 0).all()
    np.testing.assert_array_equal(got["jpeg_incompressibility"], sizes)
    np.testing.assert_array_equal(got["jpeg_compressibility"], -sizes)


# ------------------------------------------------------------------ at the start, and in a thread


class Pictures:
    """A model whose latents are its images."""
    resolution = 8

    def __init__(self):
        self.mmdit = torch.nn.Module()
        self.mmdit.register_buffer("pos_embed", torch.zeros(1))

    def images(self, latents):
        return latents


class Brightness(World):
    """Its quality is an image's first number; the text it reads is always "b"."""

    def __init__(self, prompts=('a "b"',)):
        super().__init__()
        self.prompts = prompts
        self.drawn = []

    def draw_prompt(self, rng, task, split):
        self.drawn.append((task, split))
        return {"task": task, "prompt": self.prompts[rng.integers(len(self.prompts))]}

    def read(self, images):
        return ["b"] * len(images)

    def quality(self, images):
        return images[:, 0, 0, 0].numpy()


def test_check_rewards_names_the_task_whose_prompts_the_reward_does_not_fit():
    world = Brightness(prompts=('a "b"', "a cat"))
    message = r"^reward quality\+ocr does not fit task 'signs': OCR prompt: [^\n]*$"
    with pytest.raises(ValueError, match=message):
        check_rewards({"signs": {"quality": 1.0, "ocr": 1.0}}, Pictures(), world)


def test_check_rewards_asks_for_more_prompts_where_it_is_cheap():
    world = Brightness()
    rates = {"cheap": {"ocr": 1.0}, "dear": {"ocr": 1.0, "jpeg_incompressibility": 1.0}}
    seen = []
    real = rewards.score

    def counted(spec, images, metas, world):
        seen.extend(meta["task"] for meta in metas)
        return real(spec, images, metas, world)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "score", counted)
        check_rewards(rates, Pictures(), world, split="eval")
    assert seen.count("cheap") == 16 and seen.count("dear") == 4
    assert {split for _, split in world.drawn} == {"eval"}


def test_judge_gives_each_image_the_reward_of_its_task_in_the_order_of_submission():
    tasks = {"quality": {"quality": 2.0}, "both": {"ocr": 1.0, "quality": 1.0}}
    judge = rewards.Judge(tasks, Pictures(), Brightness())
    latents = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    metas = [{"task": task, "prompt": 'a "b"'} for task in ("quality", "both", "quality")] * 2
    for _ in range(2):                           # nothing is left of an iteration in the next
        judge.submit(latents[:4], metas[:4])
        judge.submit(latents[4:], metas[4:])
        assert judge.totals() == [0, 2, 4, 6, 5, 10]
    # Of the reward that is a sum.
    assert judge.components() == pytest.approx({"both/ocr": 1.0, "both/quality": (1 + 4) / 2})


def test_the_log_has_a_single_reward_as_reported_and_others_as_trained_on(monkeypatch):
    def dear(images, metas, world):
        return images[:, 0, 0, 0].numpy()

    monkeypatch.setitem(rewards.REWARDS, "dear", rewards.Reward(dear, scale=10))
    tasks = {"one": {"dear": 1.0}, "double": {"dear": 2.0}, "sum": {"dear": 1.0, "quality": 1.0}}
    judge = rewards.Judge(tasks, Pictures(), Brightness())
    latents = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    metas = [{"task": task, "prompt": "a"} for task in tasks] * 2
    judge.submit(latents[:4], metas[:4])
    judge.submit(latents[4:], metas[4:])
    assert judge.totals() == pytest.approx([0, 0.2, 2.2, 0.3, 0.8, 5.5])
    assert judge.reported() == pytest.approx([0, 0.2, 2.2, 3.0, 0.8, 5.5])
