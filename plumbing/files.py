"""Files. A file is written whole or not at all, read without running code, and checked.

Tensors are written in two forms, and both hold a SHA-256 digest of their whole content:

    .pt            by torch.save. The digest of the file's bytes is the comment of the zip file.
    .safetensors   The digest of names, dtypes, shapes, numbers and metadata is "digest" in the
                   metadata.

Both are checked when the file is read. A file of others has no digest. Its structure and sizes are
checked before memory is taken for them. SHA-256 takes 1 s per GB of one core, so 5 s for SD3.5.
"""
import contextlib
import hashlib
import io
import json
import os
import pickletools
import re
import stat
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
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


class Hashed:
    """An open file that hashes what is written to it."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.flush = file.flush

    def write(self, data):
        self.digest.update(data)
        return self.file.write(data)


# A zip file ends in the length of its comment (2 bytes) and the comment, here the digest.
NO_COMMENT = bytes(2)
COMMENT = (64).to_bytes(2, "little")


def write_pt(path, obj):
    """Write plain tensors and containers with torch.save, and a digest of all that it wrote."""
    # Given a path, torch.save stores its name in the file. Given an open file, it does not.
    with atomic(path) as tmp, open(tmp, "wb") as file:
        hashed = Hashed(file)
        torch.save(obj, hashed)
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        file.write(COMMENT + hashed.digest.hexdigest().encode())


def write_text(path, text):
    with atomic(path) as tmp:
        tmp.write_text(text)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file. tensors: {name: tensor}; metadata: {str: str}."""
    metadata = dict(metadata or {})
    metadata["digest"] = content_digest(tensors, tensors.__getitem__, metadata)
    with atomic(path) as tmp:
        save_file(tensors, tmp, metadata)


# ------------------------------------------------------------------ reading


def first_line(error):
    """An exception's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


CHANGED = "its content has changed since it was written (its digest is of another); get it anew"


@contextlib.contextmanager
def one_line(path, what):
    """Turns whatever a damaged file raises into one ValueError line. what: what is wrong then."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {what} ({type(error).__name__}: "
                         f"{first_line(error)})") from None


def file_size(path, limit=None):
    """The bytes of a regular file. ValueError if it is something else, or larger than limit.

    Only a regular file may be opened: a named pipe would block, and a device may have no end.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise ValueError(f"{path}: is {kind}, expected a file")
    if limit and found.st_size > limit:
        raise ValueError(f"{path}: has {found.st_size:,} bytes, expected at most {limit:,}")
    return found.st_size


# ------------------------------------------------------------------ text and JSON


def read_text(path, limit=100 * 2**20):
    """A text file in UTF-8 of at most limit bytes. ValueError if it is something else."""
    file_size(path, limit)
    with one_line(path, "expected a text in UTF-8"):
        return Path(path).read_bytes().decode("utf-8")


def parse_json(text, where):
    """What a JSON text says. ValueError if it is damaged, nested too deeply, or has half letters.

    where: the path or the line that the error names.
    """
    with one_line(where, "expected JSON"):
        value = json.loads(text)
        # Half of a surrogate pair is a letter that no file can be written with.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path, limit=2**20):
    """What a JSON file of at most limit bytes says. ValueError as in read_text and parse_json."""
    return parse_json(read_text(path, limit), path)


# ------------------------------------------------------------------ .pt

# The pickle in a .pt names tensors and holds the other values. SD3.5's training state has 1 MB.
PICKLE = 4 * 2**20
# The list of a zip file's entries, one per tensor, is at its end and shorter than this.
ZIP_LIST = 16 * 2**20
# How deep its dicts and lists may be nested.
DEPTH = 50
# All that the pickle of a checkpoint may name. Others are code, or can take memory without end.
PLAIN = re.compile(r"collections OrderedDict|torch \w+Storage|torch (Size|device)|"
                   r"torch\._utils _rebuild_(tensor_v2|parameter)")
NAMING = ("GLOBAL", "STACK_GLOBAL", "INST")


def check_pt_digest(path, size, required):
    """ValueError unless the file ends in the digest of all that is before it.

    required: whether a file without a digest is refused too.
    """
    # What is hashed is the file of torch.save, which ends in the length 0 of its comment.
    length = max(0, size - len(COMMENT) - 64)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(length)
        end = file.read()
        if end[:len(COMMENT)] != COMMENT:
            if not required:
                return
            raise ValueError(f"{path}: has no digest, so it is damaged, not by these scripts, or "
                             "by an old version; `python -m checkpoints` converts an old adapter "
                             "that you trust (--to pt)")
        file.seek(0)
        while length > 0 and (data := file.read(min(length, 2**20))):
            digest.update(data)
            length -= len(data)
    digest.update(NO_COMMENT)
    if end[len(COMMENT):] != digest.hexdigest().encode():
        raise ValueError(f"{path}: {CHANGED}")


def check_zip(path, size):
    """ValueError unless a file is one that torch.save may have written, of plain content.

    Nothing is unpacked or run, and no more memory is taken than PICKLE and ZIP_LIST say.
    """
    wrong = ""
    with one_line(path, "not a readable checkpoint"), open(path, "rb") as f:
        f.seek(max(0, size - ZIP_LIST))
        with zipfile.ZipFile(io.BytesIO(f.read(ZIP_LIST))) as end:
            entries = end.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            wrong = "has compressed parts, which torch.save does not write"
        elif sum(entry.file_size for entry in entries) > size:
            wrong = "has parts that are larger than the file"
        elif len(pickles) != 1 or pickles[0].file_size > PICKLE:
            wrong = f"expected one data.pkl of at most {PICKLE:,} bytes"
        else:
            with zipfile.ZipFile(f) as archive:
                data = archive.read(pickles[0].filename)
            for op, value, _ in pickletools.genops(data):
                if op.name in NAMING and not PLAIN.fullmatch(str(value)):
                    wrong = ("holds something other than plain tensors and containers (pickled "
                             f"code is refused): {first_line(value)}")
                    break
    if wrong:
        raise ValueError(f"{path}: {wrong}")


def check_sizes(path, obj, size):
    """ValueError if the tensors in obj claim more memory than the file has, or are no plain ones.

    A tensor of stride 0 has any shape over one number. Tied tensors are counted once each.
    """
    claimed = 0
    seen = set()
    todo = [(obj, 0)]
    while todo:
        one, depth = todo.pop()
        if depth > DEPTH:
            raise ValueError(f"{path}: is nested more than {DEPTH} deep")
        if isinstance(one, torch.Tensor):
            if one.layout != torch.strided or one.device.type != "cpu":
                raise ValueError(f"{path}: has a tensor that is {one.layout} on {one.device}, "
                                 "expected plain ones on the CPU")
            claimed += one.numel() * one.element_size()
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            inside = one.values() if isinstance(one, dict) else one
            todo.extend((part, depth + 1) for part in inside)
    if claimed > 4 * size:
        raise ValueError(f"{path}: has tensors of {claimed:,} bytes in a file of {size:,}")


def read_pt(path, keys=(), ours=True):
    """Load plain tensors and containers, never pickled code, with torch.load.

    keys: those that the file must have. ours: whether write_pt wrote it, so that it must have a
    digest. A digest is checked wherever there is one.
    ValueError if the file is missing, is damaged or changed, holds code, or lacks a key.
    """
    size = file_size(path)
    check_zip(path, size)
    check_pt_digest(path, size, required=ours)
    with one_line(path, "not a readable checkpoint"):
        obj = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check_sizes(path, obj, size)
    missing = [key for key in keys if not isinstance(obj, dict) or key not in obj]
    if missing:
        raise ValueError(f"{path}: expected a checkpoint with {', '.join(keys)}; "
                         f"it lacks {', '.join(missing)}")
    return obj


# ------------------------------------------------------------------ safetensors

# SD3.5's header, which lists the tensors, has 0.1 MB.
HEADER = 16 * 2**20


def open_tensors(path, verify=True):
    """Open a safetensors file, memory-mapped, for a with statement. ValueError if it is damaged.

    verify: check the digest, if there is one. It reads the whole file, and once is enough.
    """
    size = file_size(path)
    with one_line(path, "expected a safetensors file, got another or a damaged one"):
        with open(path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > min(size, HEADER):
            raise ValueError(f"a header of {length:,} bytes")
        file = safe_open(path, "pt")
        metadata = file.metadata() or {}
        # A damaged name must not make a file of ours one of others, which has no digest.
        changed = any(len(key) == 6 and 1 <= sum(map(str.__ne__, key, "digest")) <= 2
                      for key in metadata)
        if verify and "digest" in metadata:
            content = content_digest(file.keys(), file.get_tensor, metadata)
            changed = content != metadata["digest"]
    if changed:
        raise ValueError(f"{path}: {CHANGED}")
    return file


# ------------------------------------------------------------------ what is in a file

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_finite(tensor):
    """Whether a tensor holds finite floating-point numbers only. No copy is made."""
    if tensor.dtype not in FLOATS:
        return False
    return tensor.numel() == 0 or all(end.isfinite() for end in tensor.aminmax())


def shapes_of(tensors):
    """{name: tensor} -> {name: shape}."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(want, got, path, prefix=""):
    """ValueError unless want and got, both {name: shape}, are equal.

    It names the first tensor that is missing, extra or of another shape, and counts the others.
    """
    names = sorted(want.keys() | got.keys(), key=str)
    wrong = [name for name in names if want.get(name) != got.get(name)]
    if not wrong:
        return
    name = wrong[0]
    more = f" ({len(wrong) - 1} more do not fit)" if len(wrong) > 1 else ""
    raise ValueError(f"{path}: tensor '{prefix}{name}' is {got.get(name, 'missing')}, "
                     f"expected {want.get(name, 'no such tensor')}{more}")


# ------------------------------------------------------------------ naming


class Fingerprint:
    """A name for a set of tensors: a hash of all names, dtypes, shapes and numbers."""

    def __init__(self):
        self.digest = hashlib.sha256()

    def add(self, name, tensor):
        self.digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        self.digest.update(flat.view(torch.uint8).numpy())

    def name(self):
        return self.digest.hexdigest()[:16]


def fingerprint(tensors):
    """The Fingerprint of {name: tensor}."""
    digest = Fingerprint()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.name()


def content_digest(names, read, metadata):
    """The digest of a safetensors file. read: name -> tensor. Its own entry is left out."""
    content = Fingerprint()
    for name in sorted(names):
        content.add(name, read(name))
    others = {key: value for key, value in metadata.items() if key != "digest"}
    content.digest.update(json.dumps(others, sort_keys=True).encode())
    return content.digest.hexdigest()
