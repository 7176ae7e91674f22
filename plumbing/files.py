"""Files. A file is written whole or not at all, read without running code, and checked."""
import contextlib
import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ------------------------------------------------------------------ writing


@contextlib.contextmanager
def atomic(path):
    """Gives a temporary path to write to, and renames it to path if the block raises nothing.

    The data is on the disk before the rename. So path is the old file or the new one, never half
    of one. The file has the mode that open() gives a new file (safetensors would make it 600).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.touch()
        # The mode is read from a file, because os.umask is not safe in a thread.
        mode = tmp.stat().st_mode
        yield tmp
        tmp.chmod(mode)
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)     # it is left if the block failed


def write_pt(path, obj):
    """Write plain tensors and containers with torch.save."""
    # Given a path, torch.save stores its name in the file. Given an open file, it does not.
    with atomic(path) as tmp, open(tmp, "wb") as file:
        torch.save(obj, file)


def write_text(path, text):
    with atomic(path) as tmp:
        tmp.write_text(text)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file. tensors: {name: tensor}; metadata: {str: str}."""
    with atomic(path) as tmp:
        save_file(tensors, tmp, metadata)


# ------------------------------------------------------------------ reading


def first_line(error):
    """An exception's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def read_pt(path, keys=()):
    """Load plain tensors and containers, never pickled code, with torch.load.

    keys: those that the file must have. ValueError if the file is missing, is damaged, holds code,
    or lacks a key.
    """
    # Files from torch before 1.6 are not zip files and cannot be memory-mapped.
    mmap = zipfile.is_zipfile(path)
    try:
        obj = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds something other than plain tensors and containers "
                         "(pickled code is refused), or is corrupt") from None
    except Exception as error:                          # a damaged file can fail anywhere
        raise ValueError(f"{path}: not a readable checkpoint "
                         f"({type(error).__name__}: {first_line(error)})") from None
    missing = [key for key in keys if not isinstance(obj, dict) or key not in obj]
    if missing:
        raise ValueError(f"{path}: expected a checkpoint with {', '.join(keys)}; "
                         f"it lacks {', '.join(missing)}")
    return obj


def open_tensors(path):
    """Open a safetensors file, memory-mapped, for a with statement. ValueError if it is damaged."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got: {first_line(error)}") from None


def shapes_of(tensors):
    """{name: tensor} -> {name: shape}."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(want, got, path, prefix=""):
    """ValueError unless want and got, both {name: shape}, are equal.

    It names the first tensor that is missing, extra or of another shape, and counts the others.
    """
    wrong = [name for name in sorted(want.keys() | got.keys()) if want.get(name) != got.get(name)]
    if not wrong:
        return
    name = wrong[0]
    more = f" ({len(wrong) - 1} more do not fit)" if len(wrong) > 1 else ""
    raise ValueError(f"{path}: tensor '{prefix}{name}' is {got.get(name, 'missing')}, "
                     f"expected {want.get(name, 'no such tensor')}{more}")


# ------------------------------------------------------------------ naming


class Fingerprint:
    """A short name for a set of weights: a hash of names, shapes and some of the values.

    It does not depend on the dtype that the weights are loaded in later.
    """

    def __init__(self):
        self.digest = hashlib.sha256()

    def add(self, name, tensor):
        flat = tensor.flatten()
        self.digest.update(f"{name}{tuple(tensor.shape)}".encode())
        sample = flat[:: max(1, flat.numel() // 64)]
        self.digest.update(sample.float().numpy().tobytes())

    def name(self):
        return self.digest.hexdigest()[:16]


def fingerprint(tensors):
    """The Fingerprint of {name: tensor}."""
    digest = Fingerprint()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.name()
