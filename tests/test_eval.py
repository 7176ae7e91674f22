"""Facts about the evaluation, on the shipped base with a few images."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import BASE, expect_success, torchrun

import eval as evaluation
import sampler
from worlds.prompts import TAGS
from worlds.tiny import Tiny
from worlds.tiny_prompts import TASKS


def test_eval_writes_table_json_and_picture_and_equal_models_score_equal(here, teachers):
    ckpts = ["base", teachers[0], f"again={teachers[0]}"]
    evaluation.main(evaluation.Config(ckpts=ckpts, model=BASE, per_task=12, steps=3, rows=4,
                                      out="e-1.5", device="cpu"))
    numbers = json.loads(Path("e-1.5.json").read_text())          # a dot is part of the name
    results = numbers[evaluation.TABLE]
    images = numbers[evaluation.SCORES]["base"]
    assert {task: len(scores) for task, scores in images.items()} == dict.fromkeys(TASKS, 12)
    assert np.mean(images["ocr"]) == pytest.approx(results["base"]["ocr"][0], abs=1e-4)
    assert results["geneval"] == results["again"]
    assert set(results) == {"base", "geneval", "again"}
    means = {column: values[0] for column, values in results["base"].items()}
    assert means["geneval"] == pytest.approx(sum(means[tag] for tag in TAGS) / 6)
    average = sum(means[task] for task in TASKS) / 4
    assert means["average"] == pytest.approx(average)
    assert Path("e-1.5.md").read_text().count("\n| base ") == 2
    image = Image.open("e-1.5.png")
    assert image.width > 330 + 3 * 96
    assert image.height > 4 * 96


def test_two_ranks_evaluate_to_the_same_numbers(here, teachers):
    args = ["--model", BASE, "--ckpts", "base", teachers[0], "--per-task", "12", "--steps", "3",
            "--rows", "4", "--device", "cpu"]
    scores = []
    for ranks in (1, 2):
        expect_success(torchrun(ranks, "eval.py", *args, "--out", f"e{ranks}"))
        numbers = json.loads(Path(f"e{ranks}.json").read_text())
        scores.append(numbers["all scores: mean, standard error"])
    one, two = scores
    assert set(one) == {"base", "geneval"}
    for label in one:
        for key in one[label]:
            assert one[label][key] == pytest.approx(two[label][key], abs=1e-4), (label, key)


def test_average_is_of_scores_on_the_papers_scale():
    class World:
        tags = ()
        score = {"pickscore": "pickscore", "quality": "deqa", "ocr": "ocr"}

    scores = {"pickscore": np.array([26.0, 13.0]), "quality": np.array([4.0, 5.0]),
              "ocr": np.array([1.0, 0.0])}
    metas = {task: [{}, {}] for task in scores}
    got = evaluation.summarise(scores, metas, World)
    assert got["pickscore"][0] == 19.5
    assert got["average"][0] == pytest.approx((0.75 + 0.9 + 0.5) / 3)


def test_a_folder_of_prompts_is_scored_by_the_reward_that_is_named(here):
    (here / "test.txt").write_text("a red circle\na blue square\n")
    options = dict(model=BASE, prompts=["mine=."], per_task=12, steps=1, rows=3, also=[],
                   out="e", device="cpu")
    with pytest.raises(ValueError, match="mine: has no score of its own; .*--score mine=REWARD"):
        evaluation.main(evaluation.Config(**options))
    evaluation.main(evaluation.Config(**options, tasks=["mine", "ocr"], score=["mine=quality"]))
    numbers = json.loads(Path("e.json").read_text())
    table = numbers["table: mean, standard error, n"]["base"]
    scores = numbers["all scores: mean, standard error"]["base"]
    assert scores.keys() == {"quality on mine", "ocr on ocr"}
    assert table["mine"][0] == scores["quality on mine"][0]


# ------------------------------------------------------------------ pictures in a folder


def draw(*prompts, **options):
    evaluation.main(evaluation.Config(model=BASE, prompt=list(prompts), steps=1, device="cpu",
                                      out="pictures", **options))


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*.png"))}


@pytest.mark.parametrize("layout", ["numbers", "compbench"])
def test_the_same_pictures_are_drawn_again_and_other_prompts_are_refused(here, monkeypatch, layout):
    for _ in range(2):
        draw("a red circle", "a blue square", layout=layout)
    before = contents("pictures")
    assert len(before) == 2
    monkeypatch.setattr(Tiny, "load", lambda *args: pytest.fail("loaded first"))
    for prompts in (["a red circle"], ["a red circle", "a red square"],
                    ["a blue square", "a red circle"]):
        for label in ("base", "student=base"):
            with pytest.raises(ValueError, match=r"^--out pictures: holds pictures/base/[^\n]*, "
                                                 r"[^\n]*give --out NEW, or delete [^\n]*base$"):
                draw(*prompts, layout=layout, ckpts=[label])
    assert contents("pictures") == before
    assert Path("pictures/prompts.txt").read_text() == "a red circle\na blue square\n"


def test_pictures_that_are_not_asked_for_are_refused(here):
    draw("a red circle")
    picture = Path("pictures/base/0000.png")
    picture.with_name("0001.png").write_bytes(picture.read_bytes())
    with pytest.raises(ValueError, match="holds pictures/base/0001.png, a picture of other"):
        draw("a red circle")
    picture.with_name("0001.png").unlink()
    draw("a red circle", ckpts=["student=base"])
    Path("pictures/prompts.txt").unlink()
    with pytest.raises(ValueError, match="holds pictures/base/0000.png"):
        draw("a red circle")


def test_drawing_that_was_stopped_may_be_given_again(here, monkeypatch):
    def stopped(*args):
        if Path("pictures/base/0000.png").exists():
            raise KeyboardInterrupt
        return sampler.draw(*args)

    prompts = ["a red circle", "a blue square"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "draw", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw(*prompts, batch=1)
    assert len(contents("pictures")) == 1
    draw(*prompts, batch=1)
    assert len(contents("pictures")) == 2
