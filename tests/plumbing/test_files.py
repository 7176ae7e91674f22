"""Facts about plumbing/files.py: files are whole or not there, and what is read is checked."""
import os
import random
import zipfile
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
    is_finite,
    open_tensors,
    read_json,
    read_pt,
    read_text,
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
        assert file.metadata()["world"] == "tiny"
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
    write_pt(path, {"task": "ocr"})
    assert read_pt(path, ["task"]) == {"task": "ocr"}
    message = "short.pt: expected a checkpoint with task, anchor, base; it lacks anchor, base$"
    with pytest.raises(ValueError, match=message):
        read_pt(path, ["task", "anchor", "base"])
    write_pt(path, ["task"])
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
    write_pt(path, {"w": torch.randn(2000)})
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    with pytest.raises(ValueError, match=r"^[^\n]*cut.pt: [^\n]*$"):
        read_pt(path)


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.pt: no such file$"):
        read_pt(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="none.safetensors: no such file$"):
        open_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.999])
def test_a_safetensors_file_that_was_cut_is_refused_in_one_line(tmp_path, part):
    path = tmp_path / "cut.safetensors"
    save_file({"w": torch.randn(2000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    message = r"^[^\n]*cut.safetensors: expected a safetensors file, got [^\n]+$"
    with pytest.raises(ValueError, match=message):
        open_tensors(path)


def test_first_line_is_one_line_of_at_most_200_characters():
    assert first_line(ValueError("one\n  two\tthree")) == "one two three"
    assert len(first_line(ValueError("word " * 100))) == 200


# ------------------------------------------------------------------ digests


def bits(rng, data, n):
    """n copies of data, in each of which one bit is flipped."""
    for _ in range(n):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def test_a_pt_of_ours_in_which_one_bit_is_flipped_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    write_pt(path, {"iter": 3, "w": torch.randn(100)})
    for data in bits(random.Random(0), path.read_bytes(), 100):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^[^\n]*a.pt: [^\n]*$"):
            read_pt(path)


def test_a_flipped_bit_in_a_number_is_refused_as_changed_content(tmp_path):
    path = tmp_path / "a.pt"
    w = torch.randn(100)
    write_pt(path, {"w": w})
    numbers = w.numpy().tobytes()
    data = path.read_bytes()
    assert data.count(numbers) == 1
    path.write_bytes(data.replace(numbers, bytes([numbers[0] ^ 1]) + numbers[1:]))
    for ours in (True, False):
        with pytest.raises(ValueError, match="a.pt: its content has changed since it was written"):
            read_pt(path, ours=ours)


def test_a_pt_without_a_digest_is_refused_unless_it_is_of_others(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="a.pt: has no digest, .*python -m checkpoints"):
        read_pt(path)
    assert torch.equal(read_pt(path, ["w"], ours=False)["w"], torch.ones(3))


def test_torch_reads_a_pt_of_ours_without_our_code(tmp_path):
    write_pt(tmp_path / "a.pt", {"w": torch.ones(3)})
    assert torch.equal(torch.load(tmp_path / "a.pt")["w"], torch.ones(3))


def test_a_safetensors_file_of_ours_in_which_one_bit_is_flipped_is_refused_or_equal(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"v": torch.randn(5, 7), "w": torch.randn(100).half()}
    write_tensors(path, tensors, {"task": "ocr"})
    equal = 0
    for data in bits(random.Random(0), path.read_bytes(), 300):
        path.write_bytes(data)
        try:
            with open_tensors(path) as file:
                # Only the mark itself was hit, or a space.
                assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
                assert file.metadata()["task"] == "ocr"
                equal += 1
        except ValueError as error:
            assert "a.safetensors: " in str(error) and "\n" not in str(error)
    assert equal < 10


def test_a_copy_with_other_metadata_gets_a_digest_of_its_own(tmp_path):
    tensors = {"w": torch.ones(3)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with open_tensors(tmp_path / "a.safetensors") as file:
        known = file.metadata()
    write_tensors(tmp_path / "b.safetensors", tensors, {**known, "task": "ocr"})
    with open_tensors(tmp_path / "b.safetensors") as file:
        assert file.metadata()["digest"] != known["digest"]


# ------------------------------------------------------------------ what is no file, and bombs

READERS = [read_pt, open_tensors, read_text, read_json]


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path, message in ((tmp_path / "pipe", "is a pipe, socket or device, expected a file"),
                          (Path("/dev/zero"), "is a pipe, socket or device, expected a file"),
                          (tmp_path, "is a folder, expected a file"),
                          (tmp_path / "link", "no such file")):
        with pytest.raises(ValueError, match=f"^{path}: {message}$"):
            reader(path)


def rewritten(path, change):
    """Write a .pt anew, without a digest. change: (name, content) -> (content, compression)."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, *change(name, content))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"w": torch.ones(3)}, path)
    rewritten(path, lambda name, content: (content + bytes(10**7), zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="bomb.pt: has compressed parts"):
        read_pt(path, ours=False)


def test_a_pickle_of_absurd_size_is_refused(tmp_path):
    path = tmp_path / "big.pt"
    torch.save({"w": list(range(10**6))}, path)
    with pytest.raises(ValueError, match="big.pt: expected one data.pkl of at most 4,194,304"):
        read_pt(path, ours=False)


class Huge:
    """A pickle that takes a terabyte when it is read."""

    def __reduce__(self):
        return bytearray, (10**12,)


def test_a_pickle_that_would_take_a_terabyte_is_refused(tmp_path):
    torch.save({"w": Huge()}, tmp_path / "huge.pt")
    with pytest.raises(ValueError, match="huge.pt: holds something other .*bytearray"):
        read_pt(tmp_path / "huge.pt", ours=False)


def test_a_tensor_that_claims_more_numbers_than_the_file_has_is_refused(tmp_path):
    torch.save({"w": [torch.ones(1).expand(10**12)]}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="wide.pt: has tensors of 4,000,000,000,000 bytes in a"):
        read_pt(tmp_path / "wide.pt", ours=False)


def test_the_end_of_a_large_file_is_enough_to_find_its_parts(tmp_path):
    tensors = {"w": torch.zeros(5 * 10**6)}
    write_pt(tmp_path / "large.pt", tensors)
    assert read_pt(tmp_path / "large.pt").keys() == tensors.keys()


def test_a_content_that_is_nested_too_deeply_is_refused(tmp_path):
    content = []
    for _ in range(60):
        content = [content]
    write_pt(tmp_path / "deep.pt", content)
    with pytest.raises(ValueError, match="deep.pt: is nested more than 50 deep$"):
        read_pt(tmp_path / "deep.pt")


def test_a_safetensors_header_of_absurd_size_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(ValueError, match="a.safetensors: .*a header of 1,099,511,627,776 bytes"):
        open_tensors(path)


@pytest.mark.parametrize("content, message", [
    (b'{"r": 1', "expected JSON \\(JSONDecodeError: "),
    (b"[" * 10**5, "expected JSON \\(RecursionError: "),
    (b'{"a": "\\ud800"}', "expected JSON \\(UnicodeEncodeError: "),
    (b"\xff\xfe{}", "expected a text in UTF-8 \\(UnicodeDecodeError: "),
    (b"1" * 5000, "expected JSON \\(ValueError: "),
    (b" " * 2**20 + b"1", "has 1,048,577 bytes, expected at most 1,048,576"),
], ids=["cut", "deep", "half_a_letter", "encoding", "long_number", "large"])
def test_a_json_file_that_is_damaged_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*a.json: {message}[^\n]*$"):
        read_json(path)


def test_good_json_and_text_are_read(tmp_path):
    write_text(tmp_path / "a.json", '{"a": ["é", 1.5]}')
    assert read_json(tmp_path / "a.json") == {"a": ["é", 1.5]}
    assert read_text(tmp_path / "a.json") == '{"a": ["é", 1.5]}'


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite_sees_a_single_number_that_is_not(dtype):
    tensor = torch.ones(10, 10, dtype=dtype)
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(tensor[0, 0])
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = tensor.clone()
        broken[7, 3] = value
        assert not is_finite(broken)
    assert not is_finite(tensor.int()), "weights are not whole numbers"


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


def test_fingerprint_is_of_names_dtypes_shapes_and_numbers_and_not_of_order():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    name = fingerprint(tensors)
    assert len(name) == 16 and int(name, 16) >= 0
    assert fingerprint({"b": tensors["b"], "a": tensors["a"]}) == name
    others = [
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].view(3, 2)},
        {"a": tensors["a"], "b": tensors["b"].half()},
        {"a": tensors["a"] + 1, "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({name, *(fingerprint(other) for other in others)}) == 6


def test_every_single_bit_of_a_tensor_changes_its_fingerprint():
    tensor = torch.arange(200, dtype=torch.int16)
    names = {fingerprint({"a": tensor.view(torch.bfloat16)})}
    for at in range(200):
        changed = tensor.clone()
        changed[at] ^= 1 << at % 15
        names.add(fingerprint({"a": changed.view(torch.bfloat16)}))
    assert len(names) == 201


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.empty(0, 3), torch.ones(4, 3).mT,
                                    torch.ones(2, dtype=torch.float8_e4m3fn)])
def test_fingerprint_takes_tensors_of_every_kind(tensor):
    assert fingerprint({"a": tensor}) == fingerprint({"a": tensor.clone()})


def test_fingerprint_can_be_taken_one_tensor_at_a_time():
    tensors = {"a": torch.randn(1000), "b": torch.randn(7, 3)}
    digest = Fingerprint()
    for name in ("a", "b"):
        digest.add(name, tensors[name])
    assert digest.name() == fingerprint(tensors)


def test_a_digest_whose_name_is_damaged_is_missed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {})
    whole = path.read_bytes()
    for name in (b"dioest", b"Digesu"):
        path.write_bytes(whole.replace(b"digest", name))
        with pytest.raises(ValueError, match="x.safetensors: "):
            open_tensors(path)
