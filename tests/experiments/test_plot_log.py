"""Facts about the plots of logs: which numbers are drawn, and what is said of bad input."""
import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import plot_log
from experiments.plot_log import GAP, PANELS, choose_keys, read_runs, series, spread
from plumbing import cli

GRPO = {"reward_ocr": 0.5, "reward_std": 0.1, "zero_std_ratio": 0.0, "ratio_err": 0.0, "kl": 0.1,
        "grad_norm": 0.2, "s/it": 3.0}
OPD = {"kl": 0.1, "kl_geneval": 0.1, "kl_ocr": 0.2, "kl_first": 0.1, "grad_norm": 0.2,
       "eval_ocr": 0.7, "eval_geneval": 0.6, "s/it": 3.0}


def write_log(folder, rows):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(row, n=3):
    return [{"iter": it, **row} for it in range(1, n + 1)]


def test_runs_are_read_from_folders_and_files_and_named_after_their_folder(here):
    write_log(here / "a", numbered(OPD))
    write_log(here / "b", numbered(GRPO))
    write_log(here / "more/b", numbered(GRPO, 5))
    assert list(read_runs(["a", "b/log.jsonl"])) == ["a", "b"]
    runs = read_runs(["b", "more/b/"])
    assert list(runs) == ["b", "more/b/"]
    assert [len(rows) for rows in runs.values()] == [3, 5]


def test_damaged_lines_are_left_out_and_counted(here, capsys):
    write_log(here / "a", numbered(OPD))
    with open(here / "a/log.jsonl", "a") as file:
        file.write('{"iter": 4, "k')
    assert len(read_runs(["a"])["a"]) == 3
    assert capsys.readouterr().err == "a/log.jsonl: 1 damaged line(s) left out\n"


@pytest.mark.parametrize("rows, keys", [
    (GRPO, ["reward_ocr", "reward_std", "kl", "grad_norm", "zero_std_ratio"]),
    (OPD, ["eval_ocr", "eval_geneval", "kl", "kl_geneval", "kl_ocr", "kl_first"]),
    ({"loss": 1.0, "grad_norm": 0.1, "s/it": 2.0}, ["loss", "grad_norm"]),
    ({"mine": 1.0, "text": "word"}, ["mine"]),
])
def test_default_keys_are_those_of_the_stage(rows, keys):
    assert choose_keys({"a": numbered(rows)}, []) == keys
    assert len(keys) <= PANELS


def test_keys_of_all_runs_can_be_asked_for_and_others_are_refused():
    runs = {"a": numbered(OPD), "b": numbered(GRPO)}
    assert choose_keys(runs, ["s/it", "kl_ocr", "s/it"]) == ["s/it", "kl_ocr"]
    with pytest.raises(ValueError, match="--keys lr: no run has logged it; expected some of kl, "):
        choose_keys(runs, ["lr"])


def test_a_smooth_value_is_the_mean_over_the_last_iterations():
    rows = [{"iter": it, "kl": float(it)} for it in range(1, 6)]
    its, means = series(rows, "kl", 3)
    assert its.tolist() == [1, 2, 3, 4, 5]
    assert means.tolist() == [1, 1.5, 2, 3, 4]
    assert series(rows, "kl", 1)[1].tolist() == [1, 2, 3, 4, 5]


def test_a_key_that_is_logged_seldom_is_smoothed_by_iterations_not_by_points():
    rows = [{"iter": 25, "eval_ocr": 0.5}, {"iter": 26}, {"iter": 50, "eval_ocr": 0.75},
            {"iter": 75, "eval_ocr": float("nan")}]
    its, means = series(rows, "eval_ocr", 20)
    assert (its.tolist(), means.tolist()) == ([25, 50], [0.5, 0.75])


def test_labels_do_not_overlap_and_keep_their_order():
    heights = [0.5, 0.1, 0.51, 0.99, 0.98]
    moved = spread(heights)
    assert (np.diff(np.sort(moved)) > GAP - 1e-9).all()
    assert (np.argsort(moved) == np.argsort(heights)).all()
    assert moved.max() <= 1
    assert spread([0.2, 0.8]).tolist() == [0.2, 0.8]
    assert spread([]).tolist() == []


def test_bad_input_is_one_clear_line(here, monkeypatch):
    monkeypatch.setattr(plot_log, "import_pyplot", lambda: None)
    write_log(here / "empty", [])
    write_log(here / "a", numbered(OPD))
    for options, words in [(dict(runs=[]), "got no runs, expected folders"),
                           (dict(runs=["b"]), "b: has no log.jsonl"),
                           (dict(runs=["empty"]), "empty/log.jsonl: has no iterations yet"),
                           (dict(runs=["a"], smooth=0), "--smooth 0: expected a finite"),
                           (dict(runs=["a"], out="x.pdf"), "--out x.pdf: expected .*[.]png")]:
        with pytest.raises(ValueError, match=words):
            plot_log.main(plot_log.Config(**options))


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="^a plot needs matplotlib; pip install matplotlib$"):
        plot_log.main(plot_log.Config(runs=["a"]))


def test_the_command_takes_several_runs():
    cfg = cli.parse(plot_log.Config, ["runs/a", "runs/b", "--keys", "kl", "--smooth", "5"],
                    positional=("runs",))
    assert (cfg.runs, cfg.keys, cfg.smooth) == (["runs/a", "runs/b"], ["kl"], 5)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_a_panel_for_each_key_and_a_label_for_each_run(here, monkeypatch):
    write_log(here / "a", numbered(OPD))
    write_log(here / "b", numbered(GRPO))
    panels = []
    draw = plot_log.draw_panel
    monkeypatch.setattr(plot_log, "draw_panel",
                        lambda axes, *rest: panels.append(axes) or draw(axes, *rest))
    plot_log.main(plot_log.Config(runs=["a", "b"], keys=["kl", "eval_ocr"], out="p.png"))
    assert [axes.get_title(loc="left") for axes in panels] == ["kl", "eval_ocr"]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [["a", "b"], ["a"]]
    assert Image.open("p.png").width > 500
