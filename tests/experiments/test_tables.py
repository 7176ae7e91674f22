"""The tables say what the results say."""
import json

import numpy as np
import pytest

from eval import ALL_SCORES, SCORES
from experiments import reproduce, tables
from experiments.intervals import Interval
from experiments.jobs import EARLY
from experiments.results import (
    OF_BASE,
    SECONDS_IT,
    SNAPSHOTS,
    UNSEEN,
    collect,
    curve,
    minus,
    reached,
    scores,
)
from experiments.unseen import BASE
from worlds import open_world
from worlds.prompts import TAGS

OUT = "results/reproduce"
N = 24                                                  # images of a task


def images(geneval, ocr, preference, quality):
    return {"geneval": [geneval] * N, "ocr": [ocr] * N, "preference": [preference] * N,
            "quality": [quality] * N}


def result(*scores, **more):
    return {SCORES: images(*scores), OF_BASE: "a",
            UNSEEN: {"sharpness": 1, "distance": 2, "colours": 2.5, "places": 4, "tones": 0.3,
                     "alone": 300},
            "diversity": {"geneval": [0.1, 0, 5]},
            ALL_SCORES: {"quality on geneval": [0.6, 0]}, **more}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Made-up results of three seeds, in a folder.

    The student has 0.9, 1.0 and 1.1 of the teacher's GenEval gain, and half of the others.
    """
    (tmp_path / "ckpt").symlink_to(tables.Path("ckpt").resolve())
    monkeypatch.chdir(tmp_path)
    out = tmp_path / OUT
    out.mkdir(parents=True)
    run = {"iterations": 100, SECONDS_IT: 2.0}
    for seed in range(3):
        made = {"base": result(0.2, 0.4, 0.2, 0.6),
                "teacher-geneval": result(0.3, 0, 0, 0),
                "teacher-ocr": result(0, 0.8, 0, 0, **run),
                "teacher-preference": result(0, 0, 0.6, 0),
                "teacher-quality": result(0, 0, 0, 1.0),
                "merge": result(0.2, 0.5, 0.3, 0.7),
                "opd": result(0.29 + 0.01 * seed, 0.6, 0.4, 0.8, **run),
                "curve-opd": {OF_BASE: "a", SNAPSHOTS: {"50": images(0.3, 0.79, 0.6, 0.99),
                                          "70": images(0.2, 0.4, 0.2, 0.6)}},
                "curve-teacher-ocr": {OF_BASE: "a", SNAPSHOTS: {"50": {"ocr": [0.79] * N}}}}
        for name, one in made.items():
            (out / f"{name}-s{seed}.json").write_text(json.dumps(one))
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- reproduce: share -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "docs/results.md").write_text(page)
    return collect(OUT)


def test_parts_of_the_gain_and_paired_differences_are_taken_seed_by_seed(found):
    # 4.303 * 0.1 / sqrt(3) = 0.248. Together: gains of 0.1, 0.2 and 0.2 of 0.1, 0.4 and 0.4
    parts = "1.00 ± 0.25 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.56 ± 0.03"
    assert parts in tables.share_table(found)
    for seed in range(3):                               # the seeds' own spread cancels
        shifted = [score + 0.02 for score in found["opd"][seed][SCORES]["geneval"]]
        found.setdefault("sft", {})[seed] = result(shifted[0], 0.6, 0.4, 0.8)
    assert minus(found, "sft", "opd", "geneval", [0, 1, 2])[0] == pytest.approx([0.02] * 3)
    assert "| **-0.020 ± 0.000** | +0.000 ± 0.000 |" in tables.difference_table(found)


def test_a_student_is_compared_with_each_teacher_on_its_own_task(found):
    line = [line for line in tables.difference_table(found).splitlines() if "own task" in line][0]
    # 0.30 - 0.3, 0.6 - 0.8, 0.4 - 0.6, 0.8 - 1.0
    assert "0.000 ± 0.025 | **-0.200 ± 0.000** | **-0.200 ± 0.000** |" in line


def test_the_mean_of_the_tags_is_genevals_score(found):
    results = [result(0, 0, 0, 0)]
    results[0][SCORES]["geneval"] = list(np.random.default_rng(0).random(N))
    by_tag = [scores(results, tag) for tag in TAGS]
    np.testing.assert_allclose(np.mean(by_tag, axis=0), scores(results, "geneval"))
    # Prompts come tag by tag, or in turns. Either way a tag's score is that of its own images.
    own = [meta["tag"] == "counting" for meta in open_world(BASE).eval_prompts("geneval", N)]
    mean = np.mean(np.array(results[0][SCORES]["geneval"])[own])
    np.testing.assert_allclose(scores(results, "counting")[0], mean)


def test_a_student_of_half_way_teachers_is_compared_with_their_snapshots(found):
    row = "Flow-OPD from half-way teachers minus each of these on its own task"
    assert row not in tables.difference_table(found)
    found["opd-early"] = {seed: result(0.5, 0.6, 0.7, 0.8) for seed in range(3)}
    for task, it in EARLY.items():
        shots = {"1": {task: [0.0] * N}, str(it): {task: [0.4] * N}}
        found[f"curve-teacher-{task}"] = {seed: {SNAPSHOTS: shots} for seed in range(3)}
    line = [line for line in tables.difference_table(found).splitlines() if row in line][0]
    cells = "**+0.100 ± 0.000** | **+0.200 ± 0.000** | **+0.300 ± 0.000** | - | **+0.200"
    assert f"| {cells}" in line


def test_a_curve_begins_with_the_cold_start_and_ends_with_the_run(found):
    points = curve(found, "opd", "ocr")
    rounded = [(it, round(part.mean, 3)) for it, part in points]
    assert rounded == [(0, 0.25), (50, 0.975), (70, 0.0), (100, 0.5)]
    assert reached(points, 0.95) is None
    assert reached(points[:2], 0.95) == 50


def test_cost_is_counted_to_the_snapshot_from_which_on_all_have_95_percent(found):
    means = {0: 0.2, 10: 0.96, 20: 0.94, 30: 0.95, 40: 0.99}
    points = [(it, Interval(mean, 0)) for it, mean in means.items()]
    assert reached(points, 0.95) == 30
    lines = tables.cost_table(found).splitlines()
    assert ("| Flow-OPD from the average | ocr | 0.50 ± 0.00 | not reached | - | - | "
            "not reached | - | - |") in lines
    whole = tables.own_passes()["teacher-ocr"]
    # the gain is whole at 100 by definition, and 0.975 at 50; an iteration takes 2 s
    assert (f"| teacher `ocr` | ocr | 1.00 ± 0.00 | 50 | {whole / 2e3:.0f} | 100 | "
            f"100 | {whole / 1e3:.0f} | 200 |") in lines


def test_results_of_another_world_are_refused(found):
    file = tables.Path(OUT) / "opd-s0.json"
    file.write_text(json.dumps({**found["opd"][0], OF_BASE: "b"}))
    with pytest.raises(ValueError, match="are of different bases; expected results of one world"):
        collect(OUT)


def test_what_has_no_results_yet_is_left_out_and_does_not_stop_the_rest(found):
    del found["teacher-quality"]
    assert "| Flow-OPD" not in tables.share_table(found)
    assert "own task" not in tables.difference_table(found)
    del found["base"]
    assert "| Flow-OPD from the average | 3 |" in tables.main_table(found)
    assert "Flow-OPD" not in tables.cost_table(found)


def test_the_passes_of_a_cold_start_count():
    own = tables.own_passes()
    assert own["opd-sft"] == own["opd"] + own["sft"]


def test_tables_go_between_the_marks_of_the_page_and_nowhere_else(found):
    for _ in range(2):
        reproduce.main(reproduce.Config(tables=True))
        page = tables.Path("docs/results.md").read_text()
        assert page.startswith("before\n<!-- reproduce: share -->\n| part of")
        assert page.endswith("<!-- end -->\nafter\n")
        assert "old" not in page
    assert page.count("<!-- end -->") == 1
    table = page.split("share -->\n")[1].split("\n<!--")[0]
    assert table in tables.Path("results/reproduce.md").read_text()


def test_other_results_leave_the_page_alone(found):
    tables.Path(OUT).rename("results/mine")
    before = tables.Path("docs/results.md").read_text()
    reproduce.main(reproduce.Config(tables=True, out="results/mine"))
    assert tables.Path("docs/results.md").read_text() == before
    assert tables.Path("results/mine.md").exists()


def test_without_the_page_only_the_file_of_tables_is_written(found):
    tables.Path("docs/results.md").unlink()
    reproduce.main(reproduce.Config(tables=True))
    assert tables.Path("results/reproduce.md").exists()
    assert not tables.Path("docs/results.md").exists()
