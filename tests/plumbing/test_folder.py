"""Facts about plumbing/folder.py: a run's folder is checked, cleaned and locked at the start."""
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_runs import ROOT

from plumbing import folder as folders
from plumbing.folder import check_places, check_room, lock, prepare, run_folder

DEAD = 2 ** 22 + 1                      # above the largest process number of Linux

HOLD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from plumbing.folder import prepare
prepare(Path("runs/x"), "runs/x/out.pt", 0)
print("holds it", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(here):
    """Another process that holds runs/x."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds it\n"
    yield process
    process.kill()
    process.wait()


def ready(out="runs/x/out.pt"):
    prepare(Path("runs/x"), out, 0)


# ------------------------------------------------------------------ names and places


@pytest.mark.parametrize("name", ["", ".", "..", "../../escape", "/abs", "a/b", "a\\b", "a\nb",
                                  "a\0b", " ", "a ", ".hidden"])
def test_a_run_has_the_name_of_one_folder(name):
    with pytest.raises(ValueError, match="^--name .*: expected the name of a folder in runs/"):
        run_folder(name)


@pytest.mark.parametrize("name", ["opd", "grpo-ocr", "a=0.7, seed 1", "größer", "v1.2"])
def test_usual_names_are_taken(name):
    assert run_folder(name) == Path("runs") / name


def test_the_folders_are_made(here):
    ready(out="results/deep/x.pt")
    assert Path("runs/x").is_dir() and Path("results/deep").is_dir()


def test_a_check_of_the_places_writes_nothing(here):
    check_places("runs/x", "results/deep/x.pt")
    assert os.listdir() == []
    Path("runs").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        check_places("runs/x", "results/deep/x.pt")


def test_only_rank_0_prepares(here):
    prepare(Path("runs/x"), "runs/x/out.pt", rank=1)
    assert os.listdir() == []


@pytest.mark.parametrize("file", ["runs", "runs/x"])
def test_a_file_in_place_of_the_folder_is_refused(here, file):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text("")
    with pytest.raises(ValueError, match=f"^runs/x: .*/{file} is a file, expected a folder$"):
        ready()


def test_out_is_the_name_of_a_file_that_can_be_written(here):
    Path("d").mkdir()
    Path("f").write_text("")
    with pytest.raises(ValueError, match="^d: is a folder, expected the name of a file to write$"):
        ready(out="d")
    with pytest.raises(ValueError, match="^f: .*/f is a file, expected a folder$"):
        ready(out="f/x.pt")
    assert not Path("runs").exists(), "nothing was begun"


def test_a_folder_that_takes_no_files_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"^/proc/x: cannot be written to \(.+\); expected a fold"):
        prepare("/proc/x", "/proc/x/out.pt", 0)


# ------------------------------------------------------------------ one process a folder


def test_a_second_process_is_told_who_uses_the_folder_until_that_one_is_killed(other):
    with pytest.raises(ValueError, match=f"^runs/x: is in use by process {other.pid} on .+; give"):
        ready()
    other.kill()
    other.wait()
    ready()
    ready()                             # the same process may, again and again
    assert Path("runs/x/lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_disk_without_locks_goes_on(here, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.fcntl, "flock", unsupported)
    ready()


def test_left_overs_of_dead_processes_are_removed_and_nothing_else(here, other):
    Path("runs/y").mkdir(parents=True)
    Path("out").mkdir()
    gone = [f"runs/y/state.pt.{DEAD}.tmp", f"runs/y/log.{os.getpid()}.tmp", f"out/r.pt.{DEAD}.tmp",
            f"out/r.safetensors.{DEAD}.tmp"]
    stays = [f"runs/y/state.pt.{other.pid}.tmp", "runs/y/mine.tmp", "runs/y/state.pt",
             f"out/other.pt.{DEAD}.tmp"]
    for path in gone + stays:
        Path(path).write_text("x")
    prepare("runs/y", "out/r.pt", 0)
    assert [path for path in gone + stays if Path(path).exists()] == stays


# ------------------------------------------------------------------ room


def disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")(1e15, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)


def room(learns=10 ** 9, **options):
    check_room("runs/x", "runs/x/out.pt", learns, 0, **options)


def test_a_run_needs_room_for_two_states_and_its_results(here, monkeypatch):
    ready()
    disk(monkeypatch, 31e9)             # 1.1 x (2 x 12 + 4) GB = 30.8
    room()
    with pytest.raises(ValueError, match="^runs/x: states and results need 35.2 GB, but only 31.0"):
        room(results=2)
    with pytest.raises(ValueError, match="need 39.6 GB"):
        room(average=True)


def test_states_that_are_there_need_no_more_room(here, monkeypatch):
    ready()
    disk(monkeypatch, 10.01e6 + 1.1 * 4e6)
    with pytest.raises(ValueError, match="need 40.8 MB"):
        room(learns=10 ** 6)
    Path("runs/x/state.pt").write_bytes(bytes(12_000_000))
    with pytest.raises(ValueError, match="need 27.6 MB"):
        room(learns=10 ** 6)
    Path("runs/x/state-before.pt").hardlink_to("runs/x/state.pt")
    with pytest.raises(ValueError, match="need 27.6 MB"):
        room(learns=10 ** 6)
    Path("runs/x/state-before.pt").unlink()
    Path("runs/x/state-before.pt").write_bytes(bytes(12_000_000))
    room(learns=10 ** 6)


def test_lock_is_per_folder(here):
    for name in ("a", "b"):
        Path(name).mkdir()
        lock(Path(name))
