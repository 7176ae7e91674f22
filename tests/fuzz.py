"""Feeds damaged files to every loader, and counts what becomes of them.

    .venv/bin/python -m tests.fuzz --n 20000 --seed 1

Mutant i of a seed is always the same. A small valid file is damaged, as a disk, a bad copy or a
stranger would, and the loader is called in a worker with a memory limit and a time limit. Outcomes:

    refused      one ValueError line
    equal        accepted, and the content is the original's
    other        accepted with other content, in a form that has no digest (files of others)
    ACCEPTED     accepted with other content, in a form of ours, which has a digest
    NONSENSE     accepted with numbers that are not finite, or a scale that is not above 0
    EXCEPTION    another exception, or more than one line
    HANG         more than LIMIT_S seconds
    MEMORY       more than LIMIT_BYTES of new memory
    DIED         the worker ended

The exit code is 1 if there is any outcome in capitals.
"""
import argparse
import collections
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import worlds.sd3
from checkpoints import formats
from model import load_mmdit
from plumbing import log, state
from plumbing.files import read_pt, write_pt, write_tensors, write_text
from scorers import __main__ as score_folder
from worlds import prompts, tiny_base
from worlds.vae import VAE

# A busy machine needs more than these seconds for an honest file. Tests give more.
LIMIT_S = int(os.environ.get("FUZZ_LIMIT_S", 10))
LIMIT_BYTES = 2 * 2**30
BATCH = 100

# ------------------------------------------------------------------ the valid files

# Set by make_files: the tiny base that the checkpoints are for.
NET = None


def factors(net, seed):
    g = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(shape, generator=g)
            for name, shape in net.adapter_shapes(4).items()}


def as_of_others(path):
    """Take the digest of a safetensors file away, as if others had written it."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        metadata = {key: text for key, text in file.metadata().items() if key != "digest"}
    save_file(tensors, path, metadata or None)


def make_files(folder):
    """Write one valid file, or folder, of each target."""
    global NET
    torch.manual_seed(0)
    base = tiny_base.Base(tiny_base.Config(width=32, depth=1))
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.1)
    vae = VAE(ch=(8, 16, 32), n_res=1, z=4)
    tiny_base.write_model(base, vae, folder / "model.safetensors")
    NET = load_mmdit(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "base-of-others.safetensors")
    as_of_others(folder / "base-of-others.safetensors")

    adapter = dict(task="ocr", anchor=False, base=NET.fingerprint, r=4, alpha=8.0,
                   settings={"lr": 1e-3, "tasks": ["ocr"]}, tensors=factors(NET, 1))
    formats.save_adapter(folder / "adapter.pt", **adapter)
    torch.save(factors(NET, 2), folder / "scorer-of-others.pt")
    write_pt(folder / "samples.pt", {"latents": torch.randn(4, 4, 8, 8), "settings": {"seed": 1}})
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.randn(5), "exp_avg_sq": torch.rand(5)}
    opt = {"state": {"w": moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99),
                                                      "params": ["w"]}]}
    write_pt(folder / "state.pt", {"iter": 3, "settings": {"lr": 1e-3}, "base": NET.fingerprint,
                                   "weights": {"w": torch.randn(5)}, "opt": opt})
    for name in ("peft", "peft-of-others"):
        formats.write_peft(folder / name, adapter, "tiny")
    as_of_others(folder / "peft-of-others/adapter_model.safetensors")
    for name in ("lora.safetensors", "lora-of-others.safetensors"):
        formats.write_diffusers(folder / name, adapter)
    as_of_others(folder / "lora-of-others.safetensors")
    with safe_open(folder / "lora-of-others.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    save_file(tensors, folder / "lora-of-others.safetensors", {"lora_adapter_metadata": config})
    formats.save_whole(folder / "whole.safetensors", formats.merged_weights(NET, adapter),
                       folder / "model.safetensors", task="ocr", anchor=False)

    metas = [{"tag": "counting", "prompt": "two red circles",
              "include": [{"class": "circle", "count": 2, "color": "red"}],
              "exclude": [{"class": "circle", "count": 3}]},
             {"tag": "position", "prompt": "a circle left of a square",
              "include": [{"class": "square", "count": 1},
                          {"class": "circle", "count": 1, "position": ["left of", 0]}]}]
    write_text(folder / "prompts.jsonl", "".join(json.dumps(meta) + "\n" for meta in metas))
    write_text(folder / "prompts.txt", 'a sign saying "open"\na poster that says "É"\n')
    rows = [{"iter": i, "reward": 0.5 + i / 7, "kl": 1e-3 * i} for i in range(1, 6)]
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"image": f"{i}.png", "prompt": "a cat", "stamp": [1, 2], "ocr": 0.5} for i in (1, 2)]
    write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(pixels).save(folder / "image.jpg")


# ------------------------------------------------------------------ the loaders


def checkpoint(path):
    found = dict(formats.read(path, NET))
    if "net" in found:
        found["net"] = dict(found["net"].state_dict())
    return found


def model(path):
    found = worlds.load(path)
    return {"mmdit": dict(found.mmdit.state_dict()), "vae": dict(found.vae.state_dict()),
            "text": dict(found.text.state_dict()), "vocab": list(found.text.vocab)}


def restored(path):
    found = state.newest(path)
    if found is None:                                   # no file: a run would start anew
        raise ValueError(f"{path}: no such file")
    return {key: value for key, value in found.items() if key != "path"}


# name -> (loader, whether the form is ours, with a digest)
TARGETS = {
    "adapter.pt": (checkpoint, True),
    "state.pt": (restored, True),
    "samples.pt": (lambda path: read_pt(path, ["latents", "settings"]), True),
    "model.safetensors": (model, True),
    "whole.safetensors": (checkpoint, True),
    "lora.safetensors": (checkpoint, True),
    "peft": (checkpoint, True),
    "base-of-others.safetensors": (model, False),
    "lora-of-others.safetensors": (checkpoint, False),
    "peft-of-others": (checkpoint, False),
    "scorer-of-others.pt": (lambda path: read_pt(path, ours=False), False),
    "prompts.jsonl": (lambda path: prompts.read_file(path, "geneval"), False),
    "prompts.txt": (lambda path: prompts.read_file(path, "ocr"), False),
    "log.jsonl": (log.read_log, False),
    "rows.jsonl": (score_folder.read_rows, False),
    "image.png": (score_folder.read_image, False),
    "image.jpg": (score_folder.read_image, False),
}


def walk(value, update):
    """Hash a content: containers, plain values and tensors."""
    if isinstance(value, torch.Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        update(b"dict ")
        for key in sorted(value, key=repr):
            walk(key, update)
            walk(value[key], update)
    elif isinstance(value, list | tuple):
        update(f"{type(value).__name__} {len(value)} ".encode())
        for one in value:
            walk(one, update)
    else:
        update(f"{type(value).__name__} {value!r} ".encode("utf-8", "backslashreplace"))


def content(value):
    digest = hashlib.sha256()
    walk(value, digest.update)
    return digest.hexdigest()


def is_nonsense(value):
    """Whether a checkpoint has numbers that no one can compute with."""
    if not isinstance(value, dict):
        return False
    if "alpha" in value and not 0 < value["alpha"] / value["r"] < math.inf:
        return True
    parts = [part for part in value.values() if isinstance(part, dict)]
    tensors = [one for part in (value, *parts) for one in part.values() if torch.is_tensor(one)]
    return not all(tensor.isfinite().all() for tensor in tensors)


# ------------------------------------------------------------------ damage to bytes


def flip(rng, data, n=1):
    data = bytearray(data)
    for _ in range(n):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def some_flips(rng, data):
    return flip(rng, data, rng.randint(2, 16))


def span(rng, data):
    start = rng.randrange(len(data))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 13)))


def noise_run(rng, data):
    start, end = span(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def zero_run(rng, data):
    start, end = span(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def cut(rng, data):
    return data[:rng.randrange(len(data))]


def cut_out(rng, data):
    start, end = span(rng, data)
    return data[:start] + data[end:]


def double(rng, data):
    start, end = span(rng, data)
    return data[:end] + data[start:end] + data[end:]


def append(rng, data):
    return data + rng.choice([data, b"\0", b"\n", rng.randbytes(rng.randint(1, 500))])


def swap(rng, data):
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def insert(rng, data):
    at = rng.randrange(len(data))
    what = rng.choice([b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", b"\0" * 512, b'"\\ud800"',
                       b"\r", "\u2028".encode(), b"NaN", b"1" * 5000])
    return data[:at] + what + data[at:]


NUMBERS = [b"nan", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"1e300", b"9" * 19, b"9" * 400,
           b"null", b"true", b'"4"', b"[]", b"{}", b"0.5", b"18446744073709551615", b"4"]


def change_number(rng, data):
    """Another number, or none, in place of one that is written in digits."""
    head = data[:20000]
    starts = [i for i in range(1, len(head)) if head[i:i + 1].isdigit()
              and not head[i - 1:i].isalnum()]
    if not starts:
        return flip(rng, data)
    start = end = rng.choice(starts)
    while data[end:end + 1].isdigit():
        end += 1
    return data[:start] + rng.choice(NUMBERS) + data[end:]


def change_letter(rng, data):
    """Another letter in a name."""
    letters = [i for i, byte in enumerate(data[:20000]) if chr(byte).isalpha()]
    if not letters:
        return flip(rng, data)
    at = rng.choice(letters)
    return data[:at] + bytes([rng.choice(b"abcdefgQRS\xe9._ ")]) + data[at + 1:]


def other_encoding(rng, data):
    text = data.decode("latin-1")
    return text.encode(rng.choice(["utf-16", "utf-32", "utf-8", "utf-8-sig"]))


def empty(rng, data):
    return b""


BYTES = [flip, flip, flip, some_flips, noise_run, zero_run, cut, cut_out, double, append, swap,
         insert, change_number, change_number, change_letter, change_letter, other_encoding, empty]

# ------------------------------------------------------------------ damage to what a file is


def pipe(rng, path):
    os.mkfifo(path)


def a_folder(rng, path):
    path.mkdir()


def dangling(rng, path):
    path.symlink_to(rng.choice(["nothing", path.name]))


def endless(rng, path):
    path.symlink_to("/dev/zero")


KINDS = [pipe, a_folder, dangling, endless]

# ------------------------------------------------------------------ damage of one value

ODD = [math.nan, math.inf, -math.inf, 0, 0.0, -1, -8.0, 1e300, 10**30, True, None, "4", "x", [], {},
       [[1]], torch.ones(2), b"x"]


class Code:
    def __reduce__(self):
        return os.getenv, ("HOME",)


class Bomb:
    def __reduce__(self):
        return bytearray, (10**11,)


def write_deep(path):
    """A .pt whose content is a list in a list in a list ..., too deep for torch.save."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            nested = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
            archive.writestr(name, nested if name.endswith("data.pkl") else part)


def paths_in(value, path=()):
    """All places in nested dicts and lists."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        found.append((*path, key))
        if isinstance(one, dict | list):
            found += paths_in(one, (*path, key))
    return found


def change_value(rng, content):
    """Change one value in nested dicts and lists: drop, rename, or replace it."""
    places = paths_in(content)
    # Half of the changes are near the top, where the meaning is.
    if rng.random() < 0.5:
        places = [place for place in places if len(place) == 1]
    *path, key = rng.choice(places)
    inside = content
    for step in path:
        inside = inside[step]
    how = rng.random()
    if how < 0.15:
        del inside[key]
    elif how < 0.3 and isinstance(inside, dict):
        inside[rng.choice([str(key) + "x", 3, "", "digest", "a.b"])] = inside.pop(key)
    elif isinstance(inside[key], torch.Tensor):
        inside[key] = other_tensor(rng, inside[key])
    else:
        inside[key] = rng.choice(ODD)
    return content


def other_tensor(rng, tensor):
    odd = tensor.clone().float().reshape(-1)
    odd[rng.randrange(odd.numel())] = rng.choice([math.nan, math.inf, 1e38, 0.123])
    odd = odd.view(tensor.shape)
    return rng.choice([odd, odd, tensor.half(), tensor.int(), tensor.double(), tensor.flatten(),
                       tensor.reshape(-1)[:0], tensor.to_sparse(), tensor.to("meta"),
                       tensor.reshape(-1)[0], torch.ones(()).expand(10**12),
                       torch.ones(10**6, 10**6, device="meta"), torch.complex(odd, odd),
                       tensor.tolist()])


def rewrite_pt(rng, path):
    """A .pt written anew with one change, with a digest of the new content or without one."""
    content = torch.load(path, weights_only=True)
    how = rng.random()
    if how < 0.02:
        write_deep(path)
        return
    if how < 0.05:
        content = rng.choice([[content], 3, None, {}, "x", {3: content}])
    elif how < 0.1:
        content["task"] = rng.choice([Code(), Bomb(), set(), bytearray(9)])
    else:
        content = change_value(rng, content)
    if rng.random() < 0.5:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.9)
    else:
        write_pt(path, content)


def rewrite_tensors(rng, path):
    """A safetensors file written anew with one change, with a digest or without one."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        metadata = file.metadata() or {}
    name = rng.choice(sorted(tensors))
    how = rng.random()
    if how < 0.3 and metadata:
        key = rng.choice(sorted(metadata))
        metadata[key] = rng.choice(["", "nan", "[" * 10**5, '{"a": 1}', "[1]", '"\\ud800"', "sd3",
                                    '{"transformer.r": 4, "transformer.lora_alpha": NaN}',
                                    '{"transformer.lora_alpha": -8}', '{"lora_alpha": "8"}',
                                    '{"lora_alpha": 0}', '{"lora_alpha": 1e999}', "9" * 5000])
    elif how < 0.45:
        del tensors[name]
    elif how < 0.6:
        number = rng.choice(["99999999", "-1", "1e9", "x", "9" * 30])
        parts = name.split(".")
        numbered = [at for at, part in enumerate(parts) if part.isdigit()]
        if numbered:
            parts[rng.choice(numbered)] = number
        tensors[".".join(parts) if numbered else name + "x"] = tensors.pop(name)
    else:
        changed = other_tensor(rng, tensors[name])
        if not torch.is_tensor(changed) or changed.is_sparse or changed.numel() > 10**7:
            changed = torch.full_like(tensors[name], math.nan)
        tensors[name] = changed.contiguous()
    tensors = {key: one.clone() for key, one in tensors.items() if one.device.type == "cpu"}
    if rng.random() < 0.5:
        save_file(tensors, path, metadata)
    else:
        write_tensors(path, tensors, metadata)


def rewrite_json(rng, path):
    """JSON, or one line of it, written anew with one change."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = rng.randrange(len(lines))
    plain = [one for one in ODD if not isinstance(one, torch.Tensor | bytes)]
    content = json.loads(lines[at])
    *way, key = rng.choice(paths_in(content))
    inside = content
    for step in way:
        inside = inside[step]
    inside[key] = rng.choice(plain)
    lines[at] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


REWRITE = {".pt": rewrite_pt, ".safetensors": rewrite_tensors, ".json": rewrite_json,
           ".jsonl": rewrite_json}

# ------------------------------------------------------------------ one mutant


def mutate(rng, path):
    """Damage a file, or one file of a folder. Returns how, and whether it has a new digest."""
    if path.is_dir():
        path = rng.choice(sorted(path.iterdir()))
    how = rng.random()
    if how < 0.03:
        change = rng.choice(KINDS)
        path.unlink()
        change(rng, path)
    elif how < 0.4 and path.suffix in REWRITE:
        change = REWRITE[path.suffix]
        change(rng, path)
    else:
        change = rng.choice(BYTES)
        path.write_bytes(change(rng, path.read_bytes()))
    return f"{change.__name__} of {path.name}", change in REWRITE.values()


def try_one(seed, i, originals, folder):
    """Make and load mutant i. Returns (target, how, outcome, message)."""
    rng = random.Random(f"{seed}/{i}")
    target = list(TARGETS)[i % len(TARGETS)]
    load, ours = TARGETS[target]
    source = originals / target
    here = folder / str(i)
    here.mkdir()
    path = here / target
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    how, rewritten = mutate(rng, path)
    message = ""
    try:
        found = load(path)
        if load is checkpoint and is_nonsense(found):
            outcome = "NONSENSE"
        elif content(found) == ORIGINAL[target]:
            outcome = "equal"
        else:
            outcome = "ACCEPTED" if ours and not rewritten else "other"
    except ValueError as error:
        message = str(error)
        outcome = "EXCEPTION" if "\n" in message else "refused"
        if "MemoryError" in message or "allocate" in message:
            outcome = "MEMORY"
    except MemoryError as error:
        outcome, message = "MEMORY", repr(error)
    except Exception as error:
        outcome, message = "EXCEPTION", f"{type(error).__name__}: {error}"
    shutil.rmtree(here, ignore_errors=True)
    return target, how, outcome, message[:300]


# target -> the content of the valid file
ORIGINAL = {}

# ------------------------------------------------------------------ workers


def worker(seed, todo, originals, pipe_out):
    """In a child process: tries the mutants of todo, and writes a line before and after each."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)       # ends the process, in C code too
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    folder = Path(tempfile.mkdtemp(dir=originals))
    for i in todo:
        signal.alarm(LIMIT_S)
        start = time.monotonic()
        row = try_one(seed, i, originals, folder)
        signal.alarm(0)
        took = time.monotonic() - start
        os.write(pipe_out, pickle.dumps((i, *row, took)).hex().encode() + b"\n")
    os._exit(0)


def run_batch(seed, todo, originals):
    """The rows (i, target, how, outcome, message, seconds) of some mutants, in a child process."""
    rows = []
    while todo:
        out, end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                worker(seed, todo, originals, end)
            finally:
                os._exit(1)
        os.close(end)
        data = b""
        while piece := os.read(out, 2**16):
            data += piece
        os.close(out)
        _, status = os.waitpid(child, 0)
        done = [pickle.loads(bytes.fromhex(line.decode())) for line in data.split(b"\n")[:-1]]
        rows += done
        todo = todo[len(done):]
        if todo:                                        # it ended in the first of these
            hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
            target = list(TARGETS)[todo[0] % len(TARGETS)]
            outcome = "HANG" if hung else "DIED"
            rows.append((todo[0], target, "?", outcome, f"status {status}", LIMIT_S))
            todo = todo[1:]
    return rows


def fuzz(n, seed):
    """Yields the rows of n mutants, batch by batch."""
    torch.set_num_threads(1)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        originals = Path(folder)
        make_files(originals)
        for target, (load, _) in TARGETS.items():
            ORIGINAL[target] = content(load(originals / target))
        for start in range(0, n, BATCH):
            yield run_batch(seed, list(range(start, min(n, start + BATCH))), originals)


def failures(rows):
    return [row for row in rows if row[3].isupper()]


def table(rows):
    """How often each outcome was met, for each target."""
    outcomes = sorted({row[3] for row in rows}, key=lambda name: (name.isupper(), name))
    counts = collections.Counter((row[1], row[3]) for row in rows)
    lines = [f"{'':28}" + "".join(f"{name:>11}" for name in outcomes)]
    for target in TARGETS:
        numbers = "".join(f"{counts[target, name]:11}" for name in outcomes)
        lines.append(f"{target:28}{numbers}")
    totals = [sum(counts[target, name] for target in TARGETS) for name in outcomes]
    lines.append(f"{'all':28}" + "".join(f"{total:11}" for total in totals))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="failures to show of each kind")
    args = parser.parse_args()
    start = time.monotonic()
    shown = collections.Counter()
    rows = []
    for batch in fuzz(args.n, args.seed):
        rows += batch
        for i, target, how, outcome, message, _ in failures(batch):
            shown[target, outcome] += 1
            if shown[target, outcome] <= args.show:
                print(f"{outcome} seed {args.seed} mutant {i}: {how} ({target}): {message}")
        if len(rows) % 1000 == 0:
            print(f"{len(rows)} mutants, {time.monotonic() - start:.0f} s", flush=True)
    took = time.monotonic() - start
    print(table(rows))
    slowest = max(row[5] for row in rows)
    print(f"{len(rows)} mutants of seed {args.seed} in {took:.0f} s, the slowest {slowest:.1f} s, "
          f"{len(failures(rows))} failures")
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
