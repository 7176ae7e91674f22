"""The speedrun: its test over seeds, what an entry may not change, and its page."""
import json

import numpy as np
import pytest

from experiments import speedrun
from experiments.jobs import ROUTED
from plumbing import cli

GOAL = {"base": dict.fromkeys(ROUTED, 0.3), "teachers": dict.fromkeys(ROUTED, 0.5)}


def students(*scores):
    """One result a seed, with this score on every task."""
    return [{"scores": {task: [score, 0.01, 100] for task in ROUTED}} for score in scores]


# The points where Student's one-sided t-test has p = 0.01: number of seeds, t.
@pytest.mark.parametrize("n, t", [(3, 6.965), (4, 4.541), (5, 3.747), (8, 2.998), (21, 2.528)])
def test_p_is_one_hundredth_at_the_tables_points(n, t):
    x = np.arange(n, dtype=float)
    x = (x - x.mean()) / x.std(ddof=1) + t / np.sqrt(n)
    assert speedrun.p_value(x) == pytest.approx(0.01, abs=2e-5)
    assert speedrun.p_value(-x) == pytest.approx(0.99, abs=2e-5)


def test_two_seeds_are_too_few():
    with pytest.raises(ValueError, match="expected at least 3"):
        speedrun.p_value([0.1, 0.1])


def test_the_margin_is_nothing_at_95_percent_of_the_gain():
    results = students(0.49, 0.5, 0.3)
    assert speedrun.margins(results, GOAL, "ocr") == pytest.approx([0, 0.01, -0.19])
    assert speedrun.shares(results, GOAL, "ocr") == pytest.approx([0.95, 1, 0])


def test_a_record_is_above_the_score_for_sure_and_on_every_task():
    assert speedrun.is_record(students(0.499, 0.5, 0.501), GOAL)
    assert not speedrun.is_record(students(0.499, 0.501), GOAL)
    assert not speedrun.is_record(students(0.48, 0.5, 0.52), GOAL)      # above, but by chance
    one_is_short = students(0.499, 0.5, 0.501)
    for result, score in zip(one_is_short, (0.488, 0.489, 0.4885)):
        result["scores"]["preference"][0] = score
    assert not speedrun.is_record(one_is_short, GOAL)


def write_entry(tmp_path, monkeypatch, options):
    """An entry of its own folder; nothing is trained or judged for it."""
    monkeypatch.setattr(speedrun, "OUT", tmp_path)
    monkeypatch.setattr(speedrun, "launch", None)
    entry = {"options": options, "date": "2026-01-01", "why": "a trial"}
    (tmp_path / "entries.json").write_text(json.dumps({"mine": entry}))


@pytest.mark.parametrize("options, named", [
    ("--teachers ckpt/ocr.pt", "--teachers"),
    ("--teach ckpt/ocr.pt", "--teachers"),              # argparse takes a part of a flag
    ("--model other.safetensors", "--model"),
    ("--prompts ocr=mine", "--prompts"),
    ("--name other", "--name or --seed"),
    ("--seed 3", "--name or --seed"),
    ("--init runs/opd/student.pt", "--init PATH")])
def test_an_entry_changes_neither_teachers_nor_world_nor_start(tmp_path, monkeypatch, options,
                                                               named):
    write_entry(tmp_path, monkeypatch, options)
    with pytest.raises(ValueError, match=f"entry mine: {named} is not for an entry"):
        speedrun.main(speedrun.Config(entries=["mine"]))


def test_an_unknown_entry_is_named_before_anything_runs(tmp_path, monkeypatch):
    write_entry(tmp_path, monkeypatch, "--iters 1")
    with pytest.raises(ValueError, match="other: expected entries of .*entries.json, which are "
                                         "mine"):
        speedrun.main(speedrun.Config(entries=["other"]))


def test_the_shipped_entries_keep_the_rules_and_say_why_they_are_there():
    for name, entry in speedrun.read_entries().items():
        speedrun.check_entry(name)
        assert set(entry) == {"options", "date", "why"}, name


def test_a_seed_that_was_judged_is_not_run_again(tmp_path, monkeypatch):
    write_entry(tmp_path, monkeypatch, "--iters 1")
    monkeypatch.setattr(speedrun, "write_tables", lambda out: None)
    (tmp_path / "goal.json").write_text(json.dumps(GOAL))
    (tmp_path / "mine-s0.json").write_text("{}")
    ran = []
    monkeypatch.setattr(speedrun, "run", lambda *args: ran.append(args))
    speedrun.main(cli.parse(speedrun.Config, ["mine", "--seeds", "0", "1", "--out", str(tmp_path)],
                            positional=("entries",)))
    assert ran == [("mine", 1, 2, str(tmp_path))]


def test_a_teacher_is_at_no_distance_from_itself_and_the_others_are(monkeypatch):
    monkeypatch.setattr(speedrun, "SCREENED", {"geneval": 2, "ocr": 2, "preference": 2})
    far = speedrun.distances("ckpt/ocr.pt")
    assert far["ocr"] == 0
    assert far["geneval"] > 0.1 and far["preference"] > 0.1


def test_the_tables_of_the_page_are_the_generated_ones():
    page = speedrun.PAGE.read_text()
    for name, table in speedrun.make_tables(speedrun.OUT).items():
        assert f"<!-- speedrun: {name} -->\n{table}\n<!-- end -->" in page, name
