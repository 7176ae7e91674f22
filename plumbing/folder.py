"""The folder of a run. It is checked before anything is loaded, then made, cleaned and locked."""
import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

LOCKS = {}                              # folder -> its open lock file, while this process lives
LEFT_OVER = re.compile(r"\.(\d+)\.tmp$")        # what plumbing.files.atomic writes to


def run_folder(name):
    """runs/NAME. ValueError unless NAME is the name of one folder."""
    plain = name and name.isprintable() and not set(name) & set("/\\")
    if not plain or name.strip(". ") != name:
        raise ValueError(f"--name {name!r}: expected the name of a folder in runs/, without "
                         "slashes, and without dots or spaces at its ends")
    return Path("runs") / name


def check_places(folder, out):
    """ValueError in one line if a run cannot write to its folder or its result. Nothing is made."""
    if Path(out).is_dir():
        raise ValueError(f"{out}: is a folder, expected the name of a file to write")
    for place in (Path(folder), Path(out).parent):
        check_writable(place)


def prepare(folder, out, rank):
    """Make the folders of a run and its result. ValueError as in check_places.

    Rank 0 does it. It then holds the lock of the run's folder until the process ends, and removes
    temporary files of dead processes. out: the file of the result.
    """
    if rank > 0:
        return
    folder, out = Path(folder), Path(out)
    check_places(folder, out)
    for place in (folder, out.parent):
        place.mkdir(parents=True, exist_ok=True)
    lock(folder)
    remove_left_overs(folder)
    remove_left_overs(out.parent, out.stem)


def check_writable(folder):
    """ValueError unless folder, or the folder that it will be made in, takes files."""
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise ValueError(f"{folder}: {there} is a file, expected a folder")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"a")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror}); expected a folder "
                         "with room, in which this user may write") from None


def lock(folder):
    """Hold folder/lock until this process ends. ValueError if another process holds it.

    The kernel frees it, however the process ends. Disks without locks are left unlocked.
    """
    key = folder.resolve()
    if key in LOCKS:
        return
    file = open(folder / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise ValueError(f"{folder}: is in use by {owner}; give this run another --name, or wait "
                         "until that one has ended") from None
    except OSError:
        return                                          # some network disks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    LOCKS[key] = file


def is_alive(pid):
    """Does another process of this machine have this number?"""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def remove_left_overs(folder, start=""):
    """Remove the temporary files that dead processes left in folder, if their name has this start.
    """
    for path in folder.glob("*.tmp"):
        pid = LEFT_OVER.search(path.name)
        if pid and path.name.startswith(start) and not is_alive(int(pid[1])):
            with contextlib.suppress(OSError):          # it may be another user's
                path.unlink()


def shown(n):
    """A number of bytes, for people."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def size_on_disk(paths):
    """The bytes of those files that exist. Two names of one file count once."""
    found = [path.stat() for path in paths if path.exists()]
    return sum({stat.st_ino: stat.st_size for stat in found}.values())


def check_room(folder, out, learns, rank, average=False, results=1):
    """ValueError if the disk is too small for two states of a run and its results.

    learns: how many numbers learn. A state has three float32 for each, and one more with a moving
    average. results: how many result files the run will write.
    """
    if rank > 0:
        return
    folder, out = Path(folder), Path(out)
    state = 4 * learns * (4 if average else 3)
    there = size_on_disk([folder / "state.pt", folder / "state-before.pt"])
    states = max(0, 2 * state - there)
    files = 4 * learns * results
    if folder.stat().st_dev == out.parent.stat().st_dev:
        needs = {folder: states + files}
    else:
        needs = {folder: states, out.parent: files}
    for place, need in needs.items():
        need = 1.1 * need + 1e7                         # for the log and other small files
        free = shutil.disk_usage(place).free
        if free < need:
            raise ValueError(f"{place}: states and results need {shown(need)}, but only "
                             f"{shown(free)} are free there; make room, or choose another disk")
