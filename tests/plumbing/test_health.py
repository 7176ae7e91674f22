"""Facts about plumbing/health.py: what is hopeless ends a run, what is doubtful is said once."""
import math

import pytest
from tiny_runs import log, opd

from plumbing import health as plumbing_health
from plumbing.health import JUMP, LAST, Health
from rewards import Judge


def rows(n, **values):
    return [{"iter": it + 1, **values} for it in range(n)]


def test_a_healthy_run_is_not_disturbed(capsys):
    health = Health(0)
    for it, row in enumerate(rows(100, ratio_err=1e-6, zero_std_ratio=0.5)):
        health({**row, "kl": 1e-6 * it ** 2})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["kl", "kl_ocr", "loss"])
def test_a_loss_or_kl_that_is_not_finite_ends_a_run_with_advice(key, value):
    words = rf"^iteration 3: the {key} is {value}; expected a finite number\. .* lower --lr or --a"
    with pytest.raises(ValueError, match=words):
        Health(0)({"iter": 3, key: value})


@pytest.mark.parametrize("value", [0.11, math.nan])
def test_a_ratio_far_from_1_before_the_first_update_ends_a_run(value):
    Health(0)({"iter": 1, "ratio_err": 0.09})
    with pytest.raises(ValueError, match="away from 1 before the first update, .* try --amp"):
        Health(0)({"iter": 1, "ratio_err": value})


def test_groups_without_a_signal_are_said_once_after_some_iterations_in_a_row(capsys):
    health = Health(0)
    for row in rows(LAST - 1, zero_std_ratio=1.0) + rows(1, zero_std_ratio=0.9):
        health(row)
    assert capsys.readouterr().err == ""
    for row in rows(3 * LAST, zero_std_ratio=1.0):
        health(row)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"warning: iteration {LAST}: no group had a signal for {LAST} iterations")


def test_a_kl_that_runs_away_is_said_once(capsys):
    health = Health(0)
    for row in rows(LAST, kl=1.0) + rows(1, kl=0.9 * JUMP):
        health(row)
    assert capsys.readouterr().err == ""
    for row in rows(2, kl=1.1 * JUMP):
        health(row)
    assert capsys.readouterr().err.startswith("warning: iteration 1: the KL is 11, more than 10 ")


def test_only_rank_0_warns(capsys):
    health = Health(1)
    for row in rows(2 * LAST, zero_std_ratio=1.0):
        health(row)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [{"objective": "mixed"}, {"drop_equal": True}],
                         ids=["mixed", "drop-equal"])
def test_stage_2_warns_too_where_it_scores_images_and_no_group_has_a_signal(
        here, teachers, monkeypatch, capsys, options):
    monkeypatch.setattr(plumbing_health, "LAST", 2)
    real = Judge.totals
    monkeypatch.setattr(Judge, "totals", lambda self: [0.5 for _ in real(self)])
    opd(teachers=teachers, iters=2, **options)
    assert [row["zero_std_ratio"] for row in log("opd")] == [1.0, 1.0]
    assert "warning: iteration 2: no group had a signal for 2 iterations" in capsys.readouterr().err


def test_stage_2_without_scores_says_nothing_of_signals(here, teachers):
    opd(teachers=teachers, iters=1)
    assert "zero_std_ratio" not in log("opd")[0]
