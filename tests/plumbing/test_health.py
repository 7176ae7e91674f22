"""Facts about plumbing/health.py: what is hopeless ends a run, what is doubtful is said once."""
import math

import pytest

from plumbing.health import JUMP, LAST, Health


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
