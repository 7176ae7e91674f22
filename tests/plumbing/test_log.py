"""Facts about plumbing/log.py: the log of a run that was stopped and goes on."""
import json

import pytest

from plumbing.log import Log


def lines(folder):
    return (folder / "log.jsonl").read_text().splitlines()


def rows(folder):
    return [json.loads(line) for line in lines(folder)]


def iterations(folder):
    return [row["iter"] for row in rows(folder)]


def write(folder, first, last, resume_at=0, kl=0.5):
    """The log of iterations first to last."""
    log = Log(folder, 0, {"lr": 0.1}, resume_at)
    for it in range(first, last + 1):
        log({"iter": it, "kl": kl})


def test_a_row_is_a_line_on_the_disk_and_on_the_screen(tmp_path, capsys):
    log = Log(tmp_path / "runs" / "new", 0, {"lr": 0.1, "tasks": ["ocr"]})
    log({"iter": 1, "kl": 0.123456789123, "task": "ocr"})
    assert rows(tmp_path / "runs" / "new") == [{"iter": 1, "kl": 0.12345679, "task": "ocr"}]
    assert capsys.readouterr().out.strip() == "iter 1 kl 0.1235 task ocr"
    config = json.loads((tmp_path / "runs" / "new" / "config.json").read_text())
    assert config == {"lr": 0.1, "tasks": ["ocr"]}


def test_a_resumed_log_has_no_iteration_twice(tmp_path):
    """It was stopped after iteration 5, and its last state is of iteration 3."""
    write(tmp_path, 1, 5, kl=0.5)
    write(tmp_path, 4, 6, resume_at=3, kl=0.25)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [row["kl"] for row in rows(tmp_path)] == [0.5] * 3 + [0.25] * 3


@pytest.mark.parametrize("cut", ['{"iter": 4, "k', '{"iter": 4', "{", '{"iter": 2, "kl": 0.'])
def test_a_line_that_was_cut_is_forgotten(tmp_path, cut):
    write(tmp_path, 1, 3)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(cut)
    write(tmp_path, 4, 5, resume_at=3)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


def test_a_run_from_the_start_forgets_the_log_of_the_one_before(tmp_path):
    write(tmp_path, 1, 5)
    write(tmp_path, 1, 2)
    assert iterations(tmp_path) == [1, 2]


def test_a_resumed_run_without_a_log_starts_one(tmp_path):
    write(tmp_path, 4, 5, resume_at=3)
    assert iterations(tmp_path) == [4, 5]


def test_only_rank_0_writes(tmp_path, capsys):
    log = Log(tmp_path / "run", 1, {})
    log({"iter": 1})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""
