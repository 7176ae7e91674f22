"""What can be known of the timings at full size without taking them."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import fullsize
from experiments.random_scorers import RANDOM
from rewards import REWARDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["jpeg", "qwenvl", "jpeg_compressibility"])
def test_a_name_without_a_network_is_refused_with_those_that_have_one(name):
    message = f"--names {name}: unknown reward, or one without a network; expected one of "
    with pytest.raises(ValueError, match=re.escape(message) + ".*geneval.*pickscore.*deqa"):
        fullsize.main(fullsize.Config(parts=["rewards"], names=[name]))


def test_the_command_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.fullsize", "--parts", "rewards", "--names", "jpeg"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "--names jpeg: unknown reward" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options, message", [
    (dict(parts=["stepp"]), "--parts stepp: expected some of load, step, opd"),
    (dict(parts=["rewards", "load"]), "--parts rewards load: rewards are measured alone"),
    (dict(parts=["load", "rewards"]), "--parts load rewards: rewards are measured alone"),
    (dict(size=33), "--size 33: expected a multiple of 16, at most 6144"),
    (dict(size=0), "--size 0: expected a finite number greater than 0"),
    (dict(out="."), "is a folder, expected the name of a file"),
    (dict(parts=["rewards"], out="."), "is a folder, expected the name of a file")])
def test_what_cannot_be_measured_is_refused_before_a_model_is_made(options, message, monkeypatch):
    monkeypatch.setattr(fullsize.random_sd3, "make", lambda folder: pytest.fail("made a model"))
    monkeypatch.setattr(fullsize, "reward_networks", lambda: pytest.fail("made a network"))
    with pytest.raises(ValueError, match=re.escape(message)):
        fullsize.main(fullsize.Config(**options))


def test_every_network_of_the_rewards_can_be_timed():
    """A judge is no network of ours."""
    wheres = {reward.where for reward in REWARDS.values() if reward.where}
    assert {where for where in wheres if not where.startswith("judge.")} <= set(RANDOM)
    assert len(fullsize.reward_networks()) == len(RANDOM)


def test_watch_says_output_seconds_and_memory():
    code = "import time; block = b'x' * 100_000_000; time.sleep(0.5); print('LOADED', 1, 2)"
    output, seen = fullsize.watch(["-c", code], threads=1)
    assert fullsize.line_of(output, "LOADED") == ["1", "2"]
    assert 0.4 < seen["seconds"] < 60
    assert 0.1 <= seen["peak GB"]["anonymous"] < 1
    with pytest.raises(ValueError, match="no-such-file"):
        fullsize.watch(["no-such-file.py"], threads=1)
