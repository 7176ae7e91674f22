"""Facts about plumbing/files.py: files are whole or not there, and what is read is checked."""
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plumbing.files import (
    Fingerprint,
    atomic,
    check_shapes,
    fingerprint,
    first_line,
    open_tensors,
    read_pt,
    shapes_of,
    write_pt,
    write_tensors,
    write_text,
)

# ------------------------------------------------------------------ writing


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic(path) as tmp:
            tmp.write_text("half of the n")
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "and nothing of the new one"


def test_an_exception_in_the_block_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        with atomic(tmp_path / "a.txt") as tmp:
            tmp.write_text("half")
            raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stands_until_the_block_has_ended(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as tmp:
        tmp.write_text("new")
        assert path.read_text() == "old" and tmp.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda tmp, path: done.append("replace"))
    write_text(tmp_path / "a.txt", "x")
    assert done == ["fsync", "replace"]


def test_writers_make_the_folders_and_leave_nothing_else(tmp_path):
    folder = tmp_path / "deep" / "deeper"
    tensors = {"w": torch.arange(6.0).view(2, 3)}
    write_text(folder / "a.txt", "some text")
    write_pt(str(folder / "a.pt"), {"iter": 3, "tensors": tensors})
    write_tensors(folder / "a.safetensors", tensors, {"world": "tiny"})
    assert {path.name for path in folder.iterdir()} == {"a.txt", "a.pt", "a.safetensors"}
    assert (folder / "a.txt").read_text() == "some text"
    back = read_pt(folder / "a.pt", ["iter", "tensors"])
    assert back["iter"] == 3 and torch.equal(back["tensors"]["w"], tensors["w"])
    with open_tensors(folder / "a.safetensors") as file:
        assert file.metadata() == {"world": "tiny"}
        assert torch.equal(file.get_tensor("w"), tensors["w"])


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_has_the_mode_that_open_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
        write_pt(tmp_path / "a.pt", {})
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["a.txt", "a.pt", "a.safetensors"], mode)


# ------------------------------------------------------------------ reading


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"task": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match=r"^evil.pt: [^\n]*pickled code is refused[^\n]*$"):
        read_pt("evil.pt", ["task"])
    assert not Path("pwned").exists()


def test_a_checkpoint_without_its_keys_is_refused_and_they_are_named(tmp_path):
    path = tmp_path / "short.pt"
    torch.save({"task": "ocr"}, path)
    assert read_pt(path, ["task"]) == {"task": "ocr"}
    message = "short.pt: expected a checkpoint with task, anchor, base; it lacks anchor, base$"
    with pytest.raises(ValueError, match=message):
        read_pt(path, ["task", "anchor", "base"])
    torch.save(["task"], path)
    with pytest.raises(ValueError, match="it lacks task$"):
        read_pt(path, ["task"])


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*bad.pt: [^\n]*$"):
        read_pt(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_checkpoint_that_was_cut_is_refused_in_one_line(tmp_path, part):
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.randn(2000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    with pytest.raises(ValueError, match=r"^[^\n]*cut.pt: [^\n]*$"):
        read_pt(path)


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.pt: no such file$"):
        read_pt(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="none.safetensors: expected a safetensors file"):
        open_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.999])
def test_a_safetensors_file_that_was_cut_is_refused_in_one_line(tmp_path, part):
    path = tmp_path / "cut.safetensors"
    save_file({"w": torch.randn(2000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    message = r"^[^\n]*cut.safetensors: expected a safetensors file, got: [^\n]+$"
    with pytest.raises(ValueError, match=message):
        open_tensors(path)


def test_first_line_is_one_line_of_at_most_200_characters():
    assert first_line(ValueError("one\n  two\tthree")) == "one two three"
    assert len(first_line(ValueError("word " * 100))) == 200


# ------------------------------------------------------------------ the strict check

WANT = {"a": (1,), "b": (2, 3), "c": (4,)}


def test_equal_shapes_pass_in_any_order():
    tensors = {name: torch.zeros(WANT[name]) for name in reversed(WANT)}
    assert shapes_of(tensors) == WANT
    check_shapes(WANT, shapes_of(tensors), "file")


@pytest.mark.parametrize("got, message", [
    ({"a": (1,), "c": (4,)}, r"file: tensor 'net.b' is missing, expected \(2, 3\)"),
    ({**WANT, "d": (5,)}, r"file: tensor 'net.d' is \(5,\), expected no such tensor"),
    ({**WANT, "b": (3, 2)}, r"file: tensor 'net.b' is \(3, 2\), expected \(2, 3\)"),
    ({}, r"file: tensor 'net.a' is missing, expected \(1,\) \(2 more do not fit\)"),
    ({"c": (9,), "b": (2, 3), "aa": (1,)},
     r"file: tensor 'net.a' is missing, expected \(1,\) \(2 more do not fit\)"),
], ids=["missing", "superfluous", "misshapen", "all_missing", "one_of_each"])
def test_the_first_that_does_not_fit_is_named_and_the_others_are_counted(got, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_shapes(WANT, got, "file", "net.")


# ------------------------------------------------------------------ fingerprints


def test_fingerprint_is_of_names_shapes_and_numbers_and_not_of_order_or_dtype():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    name = fingerprint(tensors)
    assert len(name) == 16 and int(name, 16) >= 0
    assert fingerprint({"b": tensors["b"], "a": tensors["a"].half()}) == name
    others = [
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].view(3, 2)},
        {"a": tensors["a"] + 1, "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({name, *(fingerprint(other) for other in others)}) == 5


def test_fingerprint_can_be_taken_one_tensor_at_a_time():
    tensors = {"a": torch.randn(1000), "b": torch.randn(7, 3)}
    digest = Fingerprint()
    for name in ("a", "b"):
        digest.add(name, tensors[name])
    assert digest.name() == fingerprint(tensors)
