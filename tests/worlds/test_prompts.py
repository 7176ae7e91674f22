"""Facts about prompts: those that SD3's world makes, and folders of prompts."""
import json
from collections import Counter

import numpy as np
import pytest

from plumbing.files import write_pt
from plumbing.state import resume
from scorers.geneval import CLASSES, COLORS
from worlds.prompts import (
    TAGS,
    check_geneval_meta,
    ocr_target,
    read_folder,
    read_mix,
    read_prompt_folders,
    with_article,
)
from worlds.sd3 import SD3
from worlds.sd3_prompts import geneval_prompt
from worlds.world import World

# ------------------------------------------------------------------ those of SD3's world


def test_prompts_made_here_keep_the_tag_mix_the_schema_and_their_hold_out():
    world = SD3()
    rng = np.random.default_rng(0)
    metas = [world.draw_prompt(rng, "geneval", "train") for _ in range(3400)]
    for meta in metas:
        check_geneval_meta(meta)
        world.check_meta(meta)
    count = Counter(meta["tag"] for meta in metas)
    mix = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1,
           "single_object": 0}
    for tag in world.tags:
        assert abs(count[tag] / len(metas) * 17 - mix[tag]) < 0.5, tag
    train = {meta["prompt"] for meta in metas}
    held = {meta["prompt"] for meta in world.eval_prompts("geneval", 600)}
    assert not train & held
    for _ in range(300):
        assert ocr_target(world.draw_prompt(rng, "ocr", "train")["prompt"])
    assert len(set(CLASSES)) == 80
    assert len(COLORS) == 10


def test_evaluation_prompts_are_fixed_and_of_all_tags_alike():
    world = SD3()
    first = world.eval_prompts("geneval", 60)
    assert world.eval_prompts("geneval", 30) == first[:30]
    assert Counter(meta["tag"] for meta in first) == dict.fromkeys(TAGS, 10)


def named(clause):
    """A clause of GenEval's as its sentence says it."""
    color = f"{clause['color']} " if "color" in clause else ""
    return with_article(color + clause["class"])


@pytest.mark.parametrize("tag", TAGS)
def test_generated_prompts_read_as_genevals_own(tag):
    """Lines of GenEval's evaluation_metadata.jsonl, rebuilt from their include clauses."""
    numbers = {2: "two", 3: "three", 4: "four"}
    for seed in range(50):
        meta = geneval_prompt(np.random.default_rng(seed), tag)
        words = meta["prompt"].removeprefix("a photo of ")
        first = meta["include"][0]
        if tag == "counting":
            assert words.startswith(f"{numbers[first['count']]} {first['class']}")
            assert meta["exclude"] == [{**first, "count": first["count"] + 1}]
        elif tag == "position":
            # The sentence begins with the second clause.
            second = meta["include"][1]
            relation, index = second["position"]
            one = with_article(second["class"])
            assert words == f"{one} {relation} {with_article(first['class'])}"
            assert index == 0
        else:
            assert words == " and ".join(named(clause) for clause in meta["include"])
            for clause in meta["include"]:
                assert "color" not in clause or clause["class"] != "person"


def test_task_without_prompts_of_its_own_asks_for_a_folder():
    with pytest.raises(ValueError, match="'pickscore' has no prompts of its own here, expected a"):
        SD3().check_prompts(["geneval", "pickscore"])


# ------------------------------------------------------------------ folders

LINE = {"tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
        "prompt": "a photo of a dog and a cat"}


def write_lines(path, *metas):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(meta) + "\n" for meta in metas))


@pytest.fixture
def folders(here):
    """A folder of flow_grpo's for GenEval, one for OCR, and GenEval's own file."""
    write_lines(here / "geneval/train_metadata.jsonl", LINE, {**LINE, "prompt": "another"})
    write_lines(here / "geneval/test_metadata.jsonl", {**LINE, "prompt": "third"})
    (here / "ocr").mkdir()
    (here / "ocr/train.txt").write_text('a sign "open"\n\nanother "sign" \n')
    write_lines(here / "evaluation_metadata.jsonl", {**LINE, "prompt": "benchmark"})


def drawn(world, task, n=20):
    rng = np.random.default_rng(0)
    return {world.draw_prompt(rng, task, "train")["prompt"] for _ in range(n)}


def test_prompt_folders_of_flow_grpo_are_read_as_they_are(folders):
    world = SD3(["geneval=geneval", "ocr=ocr", "mine=ocr"])
    rng = np.random.default_rng(0)
    assert drawn(world, "geneval") == {"a photo of a dog and a cat", "another"}
    meta = world.draw_prompt(rng, "geneval", "train")
    assert (meta["task"], meta["tag"]) == ("geneval", "two_object")
    assert drawn(world, "ocr") == {'a sign "open"', 'another "sign"'}
    assert [meta["prompt"] for meta in world.eval_prompts("geneval", 3)] == ["third"] * 3
    assert world.tasks == (*SD3.tasks, "mine")
    assert world.ratio == {**SD3.ratio, "mine": 1}
    meta = world.draw_prompt(rng, "mine", "train")
    assert (meta["task"], meta["tag"]) == ("mine", "mine")
    texts = [meta["prompt"] for meta in world.eval_prompts("mine", 2, "train")]
    assert texts == ['a sign "open"', 'another "sign"']


def test_genevals_own_file_is_for_evaluation_alone(folders, here):
    write_lines(here / "folder/evaluation_metadata.jsonl", {**LINE, "prompt": "benchmark"})
    for where in ("evaluation_metadata.jsonl", "folder"):
        world = SD3([f"geneval={where}"])
        assert world.eval_prompts("geneval", 1)[0]["prompt"] == "benchmark"
        assert all(text.startswith("a photo of") for text in drawn(world, "geneval"))


def test_evaluation_takes_a_folders_prompts_evenly_and_again_if_more_are_asked_for(here):
    (here / "set").mkdir()
    (here / "set/test.txt").write_text("".join(f"{i}\n" for i in range(10)))
    world = SD3(["mine=set"])
    for n, want in ((5, "02468"), (10, "0123456789"), (12, "012345678901")):
        assert "".join(meta["prompt"] for meta in world.eval_prompts("mine", n)) == want


def test_training_prompts_that_the_world_makes_are_not_those_of_the_evaluation_file(here):
    class Letters(World):
        tasks = ("t",)
        letters = iter("aabab")

        def own_prompt(self, rng, task, split, tags=None):
            return {"prompt": next(self.letters)}

    (here / "test.txt").write_text("a\n")
    world = Letters(["t=test.txt"])
    assert [world.draw_prompt(None, "t", "train")["prompt"] for _ in range(2)] == ["b", "b"]


def test_evaluation_prompts_that_the_world_makes_are_not_those_of_the_training_file(here):
    texts = [meta["prompt"] for meta in SD3().eval_prompts("ocr", 20)]
    (here / "set").mkdir()
    (here / "set/train.txt").write_text("\n".join(texts[::2]))
    world = SD3(["ocr=set"])
    held = [meta["prompt"] for meta in world.eval_prompts("ocr", 10)]
    # What is left of the world's own are the same prompts, in the same order.
    assert held == [text for text in texts if text not in texts[::2]][:10]


def test_a_file_of_all_the_prompts_that_a_world_can_make_is_refused(here):
    class Letters(World):
        def own_prompt(self, rng, task, split, tags=None):
            return {"prompt": "a"}

    (here / "test.txt").write_text("a\n")
    world = Letters(["t=test.txt"])
    message = "^--prompts t: the folder holds each of 1000 prompts .*; expected a folder with"
    with pytest.raises(ValueError, match=message):
        world.draw_prompt(None, "t", "train")


def test_a_run_whose_prompt_file_was_edited_is_not_resumed(folders, here):
    def settings():
        world = SD3(["geneval=geneval", "ocr=ocr"])
        return {"lr": 1.0, "prompts_digest": world.prompts_digest}

    assert SD3().prompts_digest == {}
    before = settings()
    assert before["prompts_digest"].keys() == {"geneval", "ocr"}
    write_pt("run/state.pt", {"iter": 1, "settings": before, "base": "b"})
    assert resume("run/state.pt", settings(), "b")["iter"] == 1
    write_lines(here / "geneval/test_metadata.jsonl", {**LINE, "prompt": "fourth"})
    after = settings()["prompts_digest"]
    changed = {task for task in after if after[task] != before["prompts_digest"][task]}
    assert changed == {"geneval"}
    with pytest.raises(ValueError, match="run/state.pt: holds a run with another prompts_digest;"):
        resume("run/state.pt", settings(), "b")


def test_prompts_of_a_dataset_on_the_hub_are_those_of_its_folder(folders, monkeypatch):
    asked = []

    def snapshot_download(name, repo_type, allow_patterns, **others):
        asked.append((name, repo_type, allow_patterns))
        return "geneval"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    world = SD3(["geneval=org/prompts"])
    assert world.folders == SD3(["geneval=geneval"]).folders
    wanted = ["train_metadata.jsonl", "train.txt", "test_metadata.jsonl", "test.txt",
              "evaluation_metadata.jsonl"]
    assert asked == [("org/prompts", "dataset", wanted)]


def test_a_dataset_that_the_hub_does_not_give_is_one_clear_line(here, monkeypatch):
    def no_network(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    message = ("^--prompts ocr=org/prompts: is no file or folder here, and the hub did not give "
               "it: ConnectionError: no route to host$")
    with pytest.raises(ValueError, match=message):
        SD3(["ocr=org/prompts"])
    with pytest.raises(ValueError, match="^--prompts ocr=/org/prompts: expected a folder with"):
        SD3(["ocr=/org/prompts"])


GOOD = '{"prompt": "a", "include": [{"class": "dog", "count": 1}]}\n'
# task, file, its text, the message
MALFORMED = [
    ("geneval", "train_metadata.jsonl", GOOD + '{"prompt": "b", "include": [',
     "line 2: is not JSON"),
    ("geneval", "train_metadata.jsonl", '{"prompt": "a", "include": [{"class": "dog"}]}\n',
     "line 1: .*count None"),
    ("geneval", "test_metadata.jsonl", '{"include": [{"class": "dog", "count": 1}]}\n',
     'line 1: .*expected a JSON object with a "prompt"'),
    ("geneval", "train_metadata.jsonl", GOOD.replace("dog", "unicorn"),
     "line 1: .*got class 'unicorn'"),
    ("geneval", "train_metadata.jsonl", GOOD.replace("1}", '1, "color": "teal"}'),
     "line 1: .*got color 'teal'"),
    ("ocr", "train.txt", 'a "good" one\n\na sign without quotes\n', "line 3: .*double quotes"),
    ("pickscore", "train.txt", "\n\n", "has no prompts"),
    ("pickscore", "prompts.csv", "a", "expected a folder with train_metadata.jsonl"),
]


@pytest.mark.parametrize("task, name, text, message", MALFORMED)
def test_malformed_prompt_set_is_one_clear_line(here, task, name, text, message):
    (here / "set").mkdir()
    (here / "set" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folder(here / "set", task, SD3().check_meta)
    with pytest.raises(ValueError, match=message):
        SD3([f"{task}=set"])


@pytest.mark.parametrize("items", [["geneval"], ["=set"], ["ocr="], ["ocr=set", "ocr=set"]])
def test_malformed_prompts_option_is_refused(here, items):
    (here / "set").mkdir()
    (here / "set/train.txt").write_text('a "b"\n')
    with pytest.raises(ValueError, match=f"--prompts {items[-1]}: expected TASK=DIR, each task"):
        read_prompt_folders(items)


# ------------------------------------------------------------------ mixes of tasks

DEFAULT = {"geneval": 3, "ocr": 1, "quality": 0}


def test_mix_is_the_items_or_the_defaults_for_the_tasks_there_are():
    assert read_mix([], ["ocr", "geneval"], DEFAULT) == {"ocr": 1, "geneval": 3}
    assert read_mix(["ocr=2", "quality=0"], ["ocr", "quality"], DEFAULT) == {"ocr": 2, "quality": 0}


@pytest.mark.parametrize("items, message", [
    (["ocr"], "--ratio ocr: expected TASK=N with"), (["ocr=-1"], "--ratio ocr=-1: expected TASK=N"),
    (["other=1"], r"with one of the tasks \(ocr, quality\)"), (["ocr=1", "ocr=1"], "at most once"),
    (["ocr=1"], "--ratio ocr=1: expected a number for each of ocr, quality"),
    (["ocr=0", "quality=0"], "not all 0")])
def test_malformed_mix_is_refused(items, message):
    with pytest.raises(ValueError, match=message):
        read_mix(items, ["ocr", "quality"], DEFAULT)


def test_a_mix_in_which_no_task_has_a_share_by_default_asks_for_ratio():
    """As in a run with the teacher of quality alone."""
    message = "^no prompt is routed to quality by default; expected shares: --ratio quality=1$"
    with pytest.raises(ValueError, match=message):
        read_mix([], ["quality"], DEFAULT)
    assert read_mix(["quality=1"], ["quality"], DEFAULT) == {"quality": 1}
