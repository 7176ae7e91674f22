"""The fuzzer (tests/fuzz.py) in short, and whether it sees what it looks for.

$FUZZ_SEED takes other mutants, so that a nightly run can try new ones each day.
"""
import os
import random
import subprocess
import sys
import time

import fuzz
import pytest
from tiny_runs import ROOT


def test_damaged_files_are_refused_in_one_line_and_never_taken_for_others():
    command = [sys.executable, "-m", "tests.fuzz", "--n", "102",
               "--seed", os.environ.get("FUZZ_SEED", "0")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FUZZ_LIMIT_S": "60"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def accept(path):
    return path.read_bytes() if path.is_file() else b""


def fail(path):
    raise KeyError("x")


def two_lines(path):
    raise ValueError("one\ntwo")


def refuse(path):
    raise ValueError("a.bin: is damaged")


def hang(path):
    time.sleep(60)


def much_memory(path):
    return len(bytearray(2 * fuzz.LIMIT_BYTES))


def die(path):
    os._exit(3)


@pytest.mark.parametrize("loader, ours, outcome", [
    (accept, True, "ACCEPTED"), (accept, False, "other"), (lambda path: b"same", True, "equal"),
    (refuse, True, "refused"), (fail, True, "EXCEPTION"), (two_lines, True, "EXCEPTION"),
    (hang, True, "HANG"), (much_memory, True, "MEMORY"), (die, True, "DIED"),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_fuzzer_sees_each_outcome(tmp_path, monkeypatch, loader, ours, outcome):
    (tmp_path / "a.bin").write_bytes(b"same")
    monkeypatch.setattr(fuzz, "TARGETS", {"a.bin": (loader, ours)})
    monkeypatch.setattr(fuzz, "ORIGINAL", {"a.bin": fuzz.content(b"same")})
    monkeypatch.setattr(fuzz, "LIMIT_S", 1)
    rows = fuzz.run_batch(0, [0], tmp_path)
    assert [row[3] for row in rows] == [outcome]
    assert bool(fuzz.failures(rows)) == outcome.isupper()


def test_the_same_seed_damages_a_file_in_the_same_way():
    data = bytes(range(256)) * 8
    for change in fuzz.BYTES:
        one, two = (change(random.Random("1/7"), data) for _ in range(2))
        assert one == two
