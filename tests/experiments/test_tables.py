"""The tables say what the results say."""
import json

import pytest

from experiments import jobs, reproduce, tables
from experiments.intervals import Interval
from experiments.results import collect, curve, reached

OUT = "results/reproduce"
PLAN = jobs.plan()


def result(name, seed, geneval, ocr, quality, **more):
    average = (geneval + ocr + quality) / 3
    table = {"geneval": [geneval, 0, 600], "ocr": [ocr, 0, 600], "quality": [quality, 0, 600],
             "average": [average, 0, 1800]}
    return {"part": PLAN[f"{name}-s{seed}"].part,
            "table: mean, standard error, n": table,
            "diversity": {"geneval": [0.1, 0, 5]},
            "all scores": {"quality on geneval": [0.6, 0]},
            "on training prompts (to choose settings by)": table,
            "timed alone": True,
            **more}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with made-up results of three seeds.

    The student has 0.9, 1.0 and 1.1 of the teacher's GenEval gain, and half of the others.
    """
    monkeypatch.chdir(tmp_path)
    out = tmp_path / OUT
    out.mkdir(parents=True)
    shots = [("50", (0.3, 0.79, 0.99)), ("70", (0.2, 0.4, 0.6))]
    student = {"iterations": 100, "s/it, median": 2.0}
    for seed in range(3):
        made = {
            "base": result("base", seed, 0.2, 0.4, 0.6),
            "geneval": result("geneval", seed, 0.3, 0, 0),
            "ocr": result("ocr", seed, 0, 0.8, 0),
            "quality": result("quality", seed, 0, 0, 1.0),
            "merge": result("merge", seed, 0.2, 0.5, 0.7),
            "opd-merge": result("opd-merge", seed, 0.29 + 0.01 * seed, 0.6, 0.8, **student),
            "half": result("half", seed, 0.1 * seed, 0.5, 0.5),
            "half-lam0": result("half-lam0", seed, 0.1 * seed + 0.01, 0.5, 0.5),
            "half-velocity-lam0": result("half-velocity-lam0", seed, 0.1 * seed + 0.03, 0.5, 0.5)}
        for name, one in made.items():
            (out / f"{name}-s{seed}.json").write_text(json.dumps(one))
        snapshots = {}
        for it, scores in shots:
            snapshots[it] = result("opd-merge", seed, *scores)["table: mean, standard error, n"]
        curves = {"part": "curves", "iteration -> table": snapshots}
        (out / f"curve-opd-merge-s{seed}.json").write_text(json.dumps(curves))
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- reproduce: share -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "docs/results.md").write_text(page)
    return tmp_path


def test_parts_of_the_gain_and_paired_differences_are_taken_seed_by_seed(written):
    found = collect(OUT)
    # 4.303 * 0.1 / sqrt(3) = 0.248
    parts = "1.00 ± 0.25 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.67 ± 0.08"
    assert parts in tables.share_table(found)
    table = tables.ablation_table(found, {})            # the seeds' own spread, 0.1, cancels
    assert "`lam0` | default | 3 | +0.010 ± 0.000 | +0.000" in table
    assert "`velocity-lam0` | lam0 | 3 | +0.020 ± 0.000 | +0.000" in table


def test_another_weight_of_the_anchor_is_compared_with_none():
    assert tables.compared_with("half-lam0.5", "mar") == "half-lam0"
    assert tables.compared_with("half-cps", "states") == "half"
    assert tables.compared_with("half-pg-dense-slow-lam0", "objectives") == "half-slow-lam0"
    assert tables.compared_with("half-pg-dense-lam0", "objectives") == "half-lam0"
    assert tables.compared_with("half-paper", "objectives") == "half"


def test_a_student_is_measured_by_the_teachers_that_taught_it(written):
    found = collect(OUT)
    found["opd-second"] = found["opd-merge"]
    for task in jobs.TASKS:
        found[f"{task}-second"] = {seed: result("base", seed, 0.4, 0.8, 1.0) for seed in range(3)}
    # 0.29, 0.30, 0.31 between the base's 0.2 and 0.4
    assert "second teachers** | 3 | 0.50 ± 0.12 |" in tables.share_table(found)
    lines = tables.difference_table(found).splitlines()
    second = [line for line in lines if "second teachers minus each teacher" in line]
    first = [line for line in lines if "from merge minus each teacher" in line]
    assert "| -0.100 ± 0.025 |" in second[0]
    assert "| +0.000 ± 0.025 |" in first[0]


def test_a_curve_begins_with_the_cold_start_and_ends_with_the_run(written):
    points = curve(collect(OUT), "opd-merge")["ocr"]
    rounded = [(it, round(part.mean, 3)) for it, part in points]
    assert rounded == [(0, 0.25), (50, 0.975), (70, 0.0), (100, 0.5)]
    assert reached(points) is None
    assert reached(points[:2]) == 50


def test_cost_is_counted_to_the_snapshot_from_which_on_all_have_95_percent(written):
    means = {0: 0.2, 10: 0.96, 20: 0.94, 30: 0.95, 40: 0.99}
    points = [(it, Interval(mean, 0)) for it, mean in means.items()]
    assert reached(points) == 30
    found = collect(OUT)
    lines = tables.cost_table(found).splitlines()
    assert "| Flow-OPD from merge | ocr | 100 | 0.50 | not reached | - | - | - | - |" in lines
    perfect = {task: [1.0] for task in jobs.TASKS}
    for seed in range(3):
        found["curve-opd-merge"][seed]["iteration -> table"] = {"50": perfect}
        found["opd-merge"][seed]["table: mean, standard error, n"] |= perfect

    def row(model):
        lines = tables.cost_table(found).splitlines()
        return [line for line in lines if line.startswith(f"| {model} | all three |")][0]

    # 50 * 64 * 33 passes of 2083 thousand, 50 * 2 s
    assert row("Flow-OPD from merge").startswith("| Flow-OPD from merge | all three | 100 | ")
    assert "| 50 | 1.00 ± 0.00 | 106 | 5.1% | 100 |" in row("Flow-OPD from merge")
    found |= {"opd-sft": found["opd-merge"], "curve-opd-sft": found["curve-opd-merge"],
              "sft": found["merge"]}
    assert " | 203 | 9.8% |" in row("Flow-OPD from SFT")       # and SFT's 98 thousand


def test_tables_go_between_the_marks_of_the_page_and_nowhere_else(written):
    for _ in range(2):
        reproduce.main(reproduce.Config(tables=True))
        page = (written / "docs/results.md").read_text()
        assert page.startswith("before\n<!-- reproduce: share -->\n| part of")
        assert page.endswith("<!-- end -->\nafter\n")
        assert "old" not in page
    assert page.count("<!-- end -->") == 1
    table = page.split("share -->\n")[1].split("\n<!--")[0]
    assert table in (written / "results/reproduce.md").read_text()


def test_other_results_leave_the_page_alone(written):
    (written / OUT).rename(written / "results/mine")
    before = (written / "docs/results.md").read_text()
    reproduce.main(reproduce.Config(tables=True, out="results/mine"))
    assert (written / "docs/results.md").read_text() == before
    assert (written / "results/mine.md").exists()


def test_without_the_page_only_the_file_of_tables_is_written(written):
    (written / "docs/results.md").unlink()
    reproduce.main(reproduce.Config(tables=True))
    assert (written / "results/reproduce.md").exists()
    assert not (written / "docs/results.md").exists()
