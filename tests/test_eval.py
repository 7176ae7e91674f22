"""Facts about the evaluation, on the shipped base with a few images."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import BASE, expect_success, torchrun

import eval as evaluation
from worlds.prompts import TAGS


def test_eval_writes_table_json_and_picture_and_equal_models_score_equal(here, teachers):
    ckpts = ["base", teachers[0], f"again={teachers[0]}"]
    evaluation.main(evaluation.Config(ckpts=ckpts, model=BASE, per_task=12, steps=3, rows=3,
                                      out="e", device="cpu"))
    results = json.loads(Path("e.json").read_text())["table: mean, standard error, n"]
    assert results["geneval"] == results["again"]
    assert set(results) == {"base", "geneval", "again"}
    means = {column: values[0] for column, values in results["base"].items()}
    assert means["geneval"] == pytest.approx(sum(means[tag] for tag in TAGS) / 6)
    average = (means["geneval"] + means["ocr"] + means["quality"]) / 3
    assert means["average"] == pytest.approx(average)
    assert Path("e.md").read_text().count("\n| base ") == 2
    image = Image.open("e.png")
    assert image.width > 330 + 3 * 96
    assert image.height > 3 * 96


def test_two_ranks_evaluate_to_the_same_numbers(here, teachers):
    args = ["--model", BASE, "--ckpts", "base", teachers[0], "--per-task", "12", "--steps", "3",
            "--rows", "3", "--device", "cpu"]
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
