"""Facts about rewards.py, checked on detections and readings made by hand."""
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards import (REWARDS, edit_distance, geneval_score, ocr_score, ocr_target, parse_reward, relative_position, score)


def obj(name, x=0, y=0, color=None, confidence=0.95, size=10):
    """An object of the given size centred on (x, y)."""
    return {"class": name, "score": confidence, "box": (x - size / 2, y - size / 2, x + size / 2, y + size / 2), "color": color}


def want(name, count=1, **rest):
    return {"class": name, "count": count, **rest}


def meta(tag, *include, exclude=None):
    return {"tag": tag, "include": list(include), "prompt": "", **({"exclude": exclude} if exclude else {})}


SINGLE = meta("single_object", want("cat"))
TWO = meta("two_object", want("cat"), want("dog"))
COUNT = meta("counting", want("cat", 2), exclude=[want("cat", 3)])
COLOR = meta("colors", want("cat", color="red"))
RED_PAIR = meta("colors", want("cat", 2, color="red"))
ATTR = meta("color_attr", want("cat", color="red"), want("dog", color="blue"))
POSITION = meta("position", want("cat"), want("dog", position=["left of", 0]))
POSITION_PAIR = meta("position", want("cat", 2), want("dog", position=["left of", 0]))
RED_TARGET = meta("position", want("cat", color="red"), want("dog", position=["left of", 0]))
BLUE_LEFT = meta("position", want("cat"), want("dog", color="blue", position=["left of", 0]))
NO_DOG = meta("counting", want("cat"), exclude=[want("dog", 1)])

cat, dog = obj("cat"), obj("dog")
red_cat, blue_cat = obj("cat", color="red"), obj("cat", color="blue")
left_dog, right_dog = obj("dog", x=-50), obj("dog", x=50)
left_blue_dog, left_red_dog = obj("dog", x=-50, color="blue"), obj("dog", x=-50, color="red")

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
    ("benchmark: the surest box has the colour", COLOR, [obj("cat", color="blue", confidence=0.5), red_cat], 0, 0, 1),
    ("benchmark: the surest box has not the colour", COLOR, [obj("cat", color="red", confidence=0.5), blue_cat], 0, 0, 0),
    ("benchmark: of equally sure boxes the last found counts", COLOR, [blue_cat, red_cat], 0, 0, 1),
    ("benchmark: of equally sure boxes the first found is dropped", COLOR, [red_cat, blue_cat], 0, 0, 0),

    ("both colours", ATTR, [red_cat, left_blue_dog], 1, 1, 1),
    ("colours swapped", ATTR, [blue_cat, left_red_dog], 0.5, 0, 0),
    ("one colour wrong", ATTR, [red_cat, left_red_dog], 0.75, 0, 0),
    ("one object missing costs its colour too", ATTR, [red_cat], 0.5, 0, 0),

    ("in place", POSITION, [cat, left_dog], 1, 1, 1),
    ("a wrong position adds a 0 and a 1", POSITION, [cat, right_dog], 3 / 4, 0, 0),
    ("the same box is not beside itself", POSITION, [cat, dog], 3 / 4, 0, 0),
    ("a missing target adds a 0 alone", POSITION, [left_dog], (0 + 1 + 0) / 3, 0, 0),
    ("one target too many: missing for soft, not for the benchmark", POSITION, [cat, cat, left_dog], (0 + 1 + 0) / 3, 0, 1),
    ("the placed object missing costs its position", POSITION, [cat], (1 + 0 + 0) / 3, 0, 0),
    ("left of every target", POSITION_PAIR, [cat, obj("cat", x=20), left_dog], 1, 1, 1),
    ("left of one target of two is not enough", POSITION_PAIR, [cat, obj("cat", x=-99), left_dog], 3 / 4, 0, 0),
    ("a target of the wrong colour is no target", RED_TARGET, [blue_cat, left_dog], (1 + 0 + 1 + 0) / 4, 0, 0),
    ("colour and position both right", BLUE_LEFT, [cat, left_blue_dog], 1, 1, 1),
    ("after a wrong colour the position adds nothing", BLUE_LEFT, [cat, left_red_dog], (1 + 1 + 0) / 3, 0, 0),
    ("with colour and position asked, a wrong count adds one 0", BLUE_LEFT, [cat], (1 + 0 + 0) / 3, 0, 0),
]


@pytest.mark.parametrize("form", ["soft", "strict", "benchmark"])
@pytest.mark.parametrize("prompt, objects, expected", [(p, o, dict(soft=s, strict=t, benchmark=b)) for _, p, o, s, t, b in TABLE],
                         ids=[row[0].replace(" ", "_") for row in TABLE])
def test_geneval_score_is(prompt, objects, expected, form):
    assert geneval_score(objects, prompt, form) == pytest.approx(expected[form])


def test_table_covers_every_tag():
    assert {row[1]["tag"] for row in TABLE} == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}


def test_geneval_score_is_soft_unless_told():
    assert geneval_score([cat] * 3, SINGLE) == -1


@pytest.mark.parametrize("x, y, expected", [
    (-50, 0, {"left of"}), (50, 0, {"right of"}), (0, -50, {"above"}), (0, 50, {"below"}),  # y points down
    (50, 50, {"right of", "below"}), (-50, -50, {"left of", "above"}),                      # on the diagonal both hold
    (50, 20, {"right of"}),
    (2, 0, set()),               # 0.1 of 10 + 10 is the slack
    (0, 0, set()),
    (3, 0, set()),               # (3 - 2) / 3 is below 0.5
    (4, 0, set()),               # (4 - 2) / 4 is 0.5, not over it
    (4.1, 0, {"right of"}),
    (5, 5, set()),               # (5 - 2) / 7.07: near the diagonal neither holds for objects this close
])
def test_relative_position_is(x, y, expected):
    assert relative_position(obj("dog", x, y), obj("cat")) == expected


def test_relative_position_counts_the_slack_by_both_sizes():
    assert relative_position(obj("dog", x=11, size=10), obj("cat", size=10)) == {"right of"}
    assert relative_position(obj("dog", x=11, size=10), obj("cat", size=50)) == set()


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


@pytest.mark.parametrize("a, b, expected", [
    ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("abc", "abd", 1), ("abc", "ac", 1), ("ac", "abc", 1),
    ("ab", "ba", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("intention", "execution", 5),
])
def test_edit_distance_is(a, b, expected):
    assert edit_distance(a, b) == expected


def test_ocr_target_is_the_first_quoted_text_as_written():
    assert ocr_target('a "Big Sale" sign beside a "closed" one') == "Big Sale"


@pytest.mark.parametrize("prompt", ["a sign", 'a 5" sign', 'a "" sign', 'a "  " sign', "a 'big' sign", "a \u201cbig\u201d sign"])
def test_prompt_without_quoted_text_is_refused(prompt):
    with pytest.raises(ValueError, match="expected the wanted text in straight double quotes"):
        ocr_score("big", prompt)


@pytest.mark.parametrize("read, expected", [
    ("Open Now", 1), ("OPEN NOW", 1), ("o p e n n o w", 1),       # neither case nor spaces count
    ("we are open now!", 1), ("xxopennowxx", 1),                  # contained is enough
    ("open nov", 6 / 7), ("opennw", 6 / 7), ("openn", 5 / 7),     # one substituted, one missing, two missing
    ("oopen nov", 5 / 7),                                         # where it is not contained, extra letters count
    ("", 0), ("zzzzzzz", 0), ("quite another long text", 0),      # never below 0
])
def test_ocr_score_is(read, expected):
    assert ocr_score(read, 'a shop with a sign "Open Now" in its window') == pytest.approx(expected)


@pytest.mark.parametrize("spec, expected", [
    ("geneval", {"geneval": 1.0}),
    ("geneval=0.5,geneval_strict=0.5", {"geneval": 0.5, "geneval_strict": 0.5}),
    (" ocr = 2 , quality ", {"ocr": 2.0, "quality": 1.0}),
])
def test_parse_reward_is(spec, expected):
    assert parse_reward(spec) == expected


@pytest.mark.parametrize("spec, message", [
    ("beauty", "got 'beauty', expected one of geneval, geneval_strict, geneval_benchmark, ocr, quality"),
    ("", "got '', expected one of"),
    ("ocr,", "got '', expected one of"),
    ("ocr,ocr=2", "got ocr twice"),
    *[(f"ocr={weight}", f"got weight '{weight}' for ocr, expected a positive, finite number")
      for weight in ("0", "-1", "nan", "inf", "much", "", "1=2")],
])
def test_parse_reward_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_reward(spec)


class World:
    """Finds, reads and rates what it was told to; counts how often its detector runs."""

    def __init__(self, found=(), texts=(), rates=()):
        self.found, self.texts, self.rates, self.runs = found, texts, rates, 0

    def detect(self, images, metas):
        self.runs += 1
        return list(self.found)

    def read(self, images):
        return list(self.texts)

    def quality(self, images):
        return np.array(self.rates)


IMAGES = np.zeros((2, 3, 8, 8))


def test_score_gives_each_component_and_their_weighted_sum():
    world = World(found=[[cat], [cat] * 3], rates=[0.5, 0.25])
    got = score({"geneval": 0.5, "quality": 2.0}, IMAGES, [SINGLE, SINGLE], world)
    assert list(got) == ["geneval", "quality", "total"]
    np.testing.assert_allclose(got["geneval"], [1, -1])
    np.testing.assert_allclose(got["quality"], [0.5, 0.25])
    np.testing.assert_allclose(got["total"], [1.5, 0])
    assert all(values.dtype == np.float32 and values.shape == (2,) for values in got.values())


def test_each_geneval_name_scores_by_its_own_form():
    world = World(found=[[cat] * 3])
    assert [REWARDS[name](IMAGES[:1], [SINGLE], world)[0] for name in ("geneval", "geneval_strict", "geneval_benchmark")] == [-1, 0, 1]


def test_score_reads_each_image_against_its_own_prompt():
    metas = [{"prompt": 'a sign "ab"'}, {"prompt": 'a sign "cd"'}]
    np.testing.assert_allclose(score({"ocr": 1.0}, IMAGES, metas, World(texts=["AB", "ad"]))["total"], [1, 0.5])


def test_detector_runs_once_for_all_geneval_forms_and_anew_for_each_batch():
    world, spec = World(found=[[cat], [cat]]), parse_reward("geneval,geneval_strict,geneval_benchmark")
    score(spec, IMAGES, [SINGLE, SINGLE], world)
    assert world.runs == 1
    score(spec, IMAGES, [SINGLE, SINGLE], world)
    assert world.runs == 2


@pytest.mark.parametrize("rates", [[1, np.nan], [1, np.inf], [1], [1, 1, 1], [[1], [1]], 1.0],
                         ids=["nan", "inf", "too_few", "too_many", "column", "scalar"])
def test_score_refuses_a_bad_component_by_name(rates):
    with pytest.raises(ValueError, match=r"reward quality: got shape .* expected \(2,\) finite numbers"):
        score({"geneval": 1.0, "quality": 1.0}, IMAGES, [SINGLE, SINGLE], World(found=[[cat], [cat]], rates=rates))


@pytest.mark.parametrize("name", ["geneval", "geneval_strict", "geneval_benchmark", "ocr"])
@pytest.mark.parametrize("n", [1, 3])
def test_score_refuses_results_for_another_number_of_images(name, n):
    metas = [{**SINGLE, "prompt": 'a "b"'}] * 2
    with pytest.raises(ValueError, match=f"reward {name}: got results for {n} images, expected 2"):
        score({name: 1.0}, IMAGES, metas, World(found=[[cat]] * n, texts=["b"] * n))


def test_a_reward_that_fails_is_not_scored_as_zero():
    with pytest.raises(ValueError, match="straight double quotes"):
        score({"ocr": 1.0}, IMAGES, [{"prompt": "no text asked for"}] * 2, World(texts=["a", "b"]))


# ------------------------------------------------------------------ networks: loaded at first use, scaled in a sum


class Constant:
    """A scorer that gives every image the same."""

    def __init__(self, value):
        self.value, self.net = value, torch.nn.Linear(1, 1)

    def __call__(self, images, prompts):
        assert len(images) == len(prompts) and all(isinstance(p, str) for p in prompts)
        return torch.full((len(images),), self.value)


@pytest.fixture
def constants(monkeypatch):
    made = []

    def make(name, value):
        return lambda device, dtype: made.append((name, str(device), dtype)) or Constant(value)
    monkeypatch.setattr(rewards, "LOADED", {})
    for name, value in (("deqa", 4.0), ("pickscore", 13.0), ("imagereward", 0.7)):
        monkeypatch.setitem(rewards.SCORERS, name, make(name, value))
    return made


def test_components_are_reported_as_published_and_weighed_on_the_peers_scale(constants):
    got = score(parse_reward("deqa=0.4,pickscore=0.6,imagereward"), torch.zeros(2, 3, 8, 8), [SINGLE, SINGLE], World())
    assert got["deqa"].tolist() == [4, 4] and got["pickscore"].tolist() == [13, 13]
    np.testing.assert_allclose(got["total"], [0.4 * 4 / 5 + 0.6 * 13 / 26 + 0.7] * 2, rtol=1e-6)


def test_a_network_is_loaded_once_a_process_and_only_when_asked_for(constants):
    assert parse_reward("deqa,pickscore") and constants == []
    for _ in range(2):
        score({"deqa": 1.0}, torch.zeros(1, 3, 8, 8), [SINGLE], World())
    assert constants == [("deqa", "cpu", torch.float32)]


def test_offload_moves_every_loaded_scorer_off_and_the_next_use_brings_it_back(constants, monkeypatch):
    moves = []
    score({"deqa": 1.0, "pickscore": 1.0}, torch.zeros(1, 3, 8, 8), [SINGLE], World())
    for name, one in rewards.LOADED.items():
        monkeypatch.setattr(one.net, "to", lambda device, name=name: moves.append((name, str(device))))
    rewards.offload()
    assert sorted(moves) == [("deqa", "cpu"), ("pickscore", "cpu")]
    rewards.scorer("deqa", "meta")
    assert moves[-1] == ("deqa", "meta")


def test_every_published_reward_has_a_loader_and_the_loaders_names_exist():
    import deqa
    import detectors
    import scorers
    assert {"geneval", "ocr", "pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic", "deqa", "unifiedreward", "qwenvl", "jpeg_compressibility",
            "jpeg_incompressibility", "quality"} <= set(REWARDS)
    assert all(hasattr(m, n) for m, n in [(deqa, "DeQA"), (detectors, "Detector"), (detectors, "Reader"), (scorers, "VLMJudge")])
    for name in ("PickScore", "CLIPScore", "HPSv2", "ImageReward", "Aesthetic"):
        assert hasattr(scorers, name) and name.lower() in rewards.SCORERS
    assert set(rewards.SCALE) <= set(REWARDS)


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic", "deqa", "detector", "reader"])
def test_missing_weights_are_one_line_that_says_where_they_were_looked_for(monkeypatch, tmp_path, name):
    monkeypatch.setattr(rewards, "LOADED", {})
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match=r"REWARD_MODELS") as e:
        rewards.scorer(name, "cpu")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", ["unifiedreward", "qwenvl"])
def test_a_judge_without_an_endpoint_says_which_variable_to_set(monkeypatch, name):
    monkeypatch.setattr(rewards, "LOADED", {})
    monkeypatch.delenv(f"{name.upper()}_URL", raising=False)
    with pytest.raises(ValueError, match=rf"reward {name}: .*\${name.upper()}_URL is not set"):
        score({name: 1.0}, torch.zeros(1, 3, 8, 8), [SINGLE], World())


def test_the_tiny_worlds_quality_is_refused_for_real_pictures():
    import sd3
    with pytest.raises(ValueError, match="reward quality: is the tiny world's own"):
        score({"quality": 1.0}, torch.zeros(1, 3, 8, 8), [SINGLE], sd3)


# ------------------------------------------------------------------ a folder on the command line


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):                    # the fourth is of another size
        Image.fromarray(rng.integers(0, 256, (16, 20 if i == 3 else 16, 3), dtype=np.uint8)).save(tmp_path / f"{i:04d}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"picture {i}\n" for i in range(5)))
    return tmp_path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scoring_a_folder_writes_a_line_an_image_and_a_summary(pictures):
    rewards.main(rewards.Config("jpeg_incompressibility", str(pictures), str(pictures / "prompts.txt"), batch=2, device="cpu"))
    got = rows(pictures / "jpeg_incompressibility.jsonl")
    assert [(r["image"], r["prompt"]) for r in got] == [(f"{i:04d}.png", f"picture {i}") for i in range(5)]
    buffer = io.BytesIO()
    Image.open(pictures / "0003.png").save(buffer, format="JPEG", quality=95)
    assert got[3]["jpeg_incompressibility"] == pytest.approx(len(buffer.getvalue()) / 1000)
    summary = json.loads((pictures / "jpeg_incompressibility.summary.json").read_text())
    assert summary["total"]["images"] == 5 and summary["total"]["mean"] == pytest.approx(np.mean([r["total"] for r in got]))


def test_pictures_that_changed_are_scored_again_and_another_reward_too(pictures):
    out = str(pictures / "scores.jsonl")
    cfg = rewards.Config("jpeg_incompressibility", str(pictures), str(pictures / "prompts.txt"), out=out, device="cpu")
    rewards.main(cfg)
    before = {r["image"]: r["total"] for r in rows(pictures / "scores.jsonl")}
    Image.new("RGB", (16, 16)).save(pictures / "0001.png")
    rewards.main(cfg)
    after = {r["image"]: r["total"] for r in rows(pictures / "scores.jsonl")}
    assert {k for k in before if before[k] != after[k]} == {"0001.png"}
    rewards.main(rewards.Config("jpeg_compressibility", str(pictures), str(pictures / "prompts.txt"), out=out, device="cpu"))
    assert all(r["jpeg_compressibility"] == -after[r["image"]] for r in rows(pictures / "scores.jsonl"))


def test_images_are_in_the_order_of_their_numbers(tmp_path):
    names = ["2.png", "10.png", "a dog_000011.png", "z cat_000003.png", "x.png"]
    assert [p.name for p in sorted((tmp_path / n for n in names), key=rewards.place)] == ["x.png", "2.png", "z cat_000003.png", "10.png", "a dog_000011.png"]


def test_scoring_a_folder_goes_on_where_it_was_stopped(pictures, monkeypatch):
    cfg = rewards.Config("jpeg_incompressibility", str(pictures), str(pictures / "prompts.txt"), batch=2, device="cpu")
    rewards.main(cfg)
    out = pictures / "jpeg_incompressibility.jsonl"
    whole, seen = rows(out), []
    out.write_text("\n".join(out.read_text().splitlines()[:3]) + '\n{"image": "0003.png", "pro')
    real = rewards.score

    def counted(spec, images, metas, world):
        seen.extend(m["prompt"] for m in metas)
        return real(spec, images, metas, world)
    monkeypatch.setattr(rewards, "score", counted)
    rewards.main(cfg)
    assert rows(out) == whole and seen == ["picture 3", "picture 4"]


@pytest.mark.parametrize("change, message", [
    (lambda d: (d / "prompts.txt").write_text("one\ntwo\n"), "5 images for the 2 prompts"), (lambda d: (d / "0002.png").write_bytes(b"no"), "0002.png: is not an image"),
    (lambda d: (d / "prompts.txt").unlink(), "prompts.txt: cannot be read")])
def test_a_folder_that_does_not_fit_its_prompts_is_refused(pictures, change, message):
    change(pictures)
    with pytest.raises(ValueError, match=message):
        rewards.main(rewards.Config("jpeg_compressibility", str(pictures), str(pictures / "prompts.txt"), device="cpu"))


def test_several_images_a_prompt_go_with_it_in_order(pictures):
    (pictures / "0004.png").unlink()
    (pictures / "prompts.txt").write_text("one\ntwo\n")
    rewards.main(rewards.Config("jpeg_compressibility", str(pictures), str(pictures / "prompts.txt"), device="cpu"))
    assert {r["image"]: r["prompt"] for r in rows(pictures / "jpeg_compressibility.jsonl")} == {"0000.png": "one", "0001.png": "one", "0002.png": "two", "0003.png": "two"}
