"""What can be known of the timings without taking them."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench
from experiments.random_scorers import RANDOM
from rewards import REWARDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["jpeg", "qwenvl", "jpeg_compressibility"])
def test_a_name_without_a_network_is_refused_with_those_that_have_one(name):
    message = f"--names {name}: unknown reward, or one without a network; expected one of "
    with pytest.raises(ValueError, match=re.escape(message) + ".*geneval.*pickscore.*deqa"):
        bench.main(bench.Config(parts=["rewards"], names=[name]))


def test_the_command_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "--parts", "rewards", "--names", "jpeg"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "--names jpeg: unknown reward" in errors[0]
    assert "Traceback" not in done.stderr


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="--parts stepp: expected some of load, step, opd"):
        bench.main(bench.Config(parts=["stepp"]))


def test_every_network_of_the_rewards_can_be_timed():
    """A judge is no network of ours."""
    wheres = {reward.where for reward in REWARDS.values() if reward.where}
    assert {where for where in wheres if not where.startswith("judge.")} <= set(RANDOM)
    assert len(bench.reward_networks()) == len(RANDOM)


def test_watch_says_output_seconds_and_memory():
    code = "import time; block = b'x' * 100_000_000; time.sleep(0.5); print('LOADED', 1, 2)"
    output, seen = bench.watch(["-c", code], threads=1)
    assert bench.line_of(output, "LOADED") == ["1", "2"]
    assert 0.4 < seen["seconds"] < 60
    assert 0.1 <= seen["peak GB"]["anonymous"] < 1
    with pytest.raises(ValueError, match="no-such-file"):
        bench.watch(["no-such-file.py"], threads=1)
