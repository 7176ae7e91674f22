"""Facts about `python -m scorers`: a folder of images is scored, and a stopped run goes on."""
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scorers.__main__ as folder

ROOT = Path(folder.__file__).parents[1]


@pytest.fixture
def pictures(tmp_path):
    """Five images, the fourth of another size, and their prompts."""
    rng = np.random.default_rng(0)
    for i in range(5):
        width = 20 if i == 3 else 16
        array = rng.integers(0, 256, (16, width, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i:04d}.png")
    (tmp_path / "prompts.txt").write_text("".join(f"picture {i}\n" for i in range(5)))
    return tmp_path


def config(pictures, name="jpeg_incompressibility", **options):
    return folder.Config(name, str(pictures), str(pictures / "prompts.txt"), device="cpu",
                         **options)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def totals(path):
    return {row["image"]: row["total"] for row in rows(path)}


def test_scoring_a_folder_writes_a_line_an_image_and_a_summary(pictures):
    folder.main(config(pictures, batch=2))
    got = rows(pictures / "jpeg_incompressibility.jsonl")
    expected = [(f"{i:04d}.png", f"picture {i}") for i in range(5)]
    assert [(row["image"], row["prompt"]) for row in got] == expected
    buffer = io.BytesIO()
    Image.open(pictures / "0003.png").save(buffer, format="JPEG", quality=95)
    assert got[3]["jpeg_incompressibility"] == pytest.approx(len(buffer.getvalue()) / 1000)
    summary = json.loads((pictures / "jpeg_incompressibility.summary.json").read_text())
    assert summary["total"]["images"] == 5
    assert summary["total"]["mean"] == pytest.approx(np.mean([row["total"] for row in got]))


def test_the_summary_has_each_tags_mean_and_the_mean_of_those():
    scores = {"one": [1.0, 2.0, 6.0], "two": [5.0]}
    lines = [{"tag": tag, "total": value} for tag, values in scores.items() for value in values]
    summary = folder.summarize(lines, ["total"])["total"]
    assert summary["mean"] == 3.5 and summary["images"] == 4
    assert summary["one"] == 3 and summary["two"] == 5 and summary["mean of the tags' means"] == 4
    assert summary["standard error"] == pytest.approx(np.std([1, 2, 6, 5], ddof=1) / 2)
    assert folder.summarize(lines[:1], ["total"])["total"] == {
        "mean": 1.0, "standard error": None, "images": 1}


def test_pictures_that_changed_are_scored_again_and_another_reward_too(pictures):
    out = pictures / "scores.jsonl"
    folder.main(config(pictures, out=str(out)))
    before = totals(out)
    Image.new("RGB", (16, 16)).save(pictures / "0001.png")
    folder.main(config(pictures, out=str(out)))
    after = totals(out)
    assert {image for image in before if before[image] != after[image]} == {"0001.png"}
    folder.main(config(pictures, "jpeg_compressibility", out=str(out)))
    assert all(row["jpeg_compressibility"] == -after[row["image"]] for row in rows(out))


def test_images_are_in_the_order_of_their_numbers(tmp_path):
    names = ["2.png", "10.png", "a dog_000011.png", "z cat_000003.png", "x.png", "7.txt"]
    for name in names:
        (tmp_path / name).touch()
    expected = ["x.png", "2.png", "z cat_000003.png", "10.png", "a dog_000011.png"]
    assert [path.name for path in folder.find_images(tmp_path)] == expected


def test_scoring_a_folder_goes_on_where_it_was_stopped(pictures, monkeypatch):
    folder.main(config(pictures, batch=2))
    out = pictures / "jpeg_incompressibility.jsonl"
    whole = rows(out)
    first = out.read_text().splitlines()[:3]
    out.write_text("\n".join(first) + '\n{"image": "0003.png", "pro')
    real = folder.score
    seen = []

    def counted(spec, images, metas, world):
        seen.extend(meta["prompt"] for meta in metas)
        return real(spec, images, metas, world)

    monkeypatch.setattr(folder, "score", counted)
    folder.main(config(pictures, batch=2))
    assert rows(out) == whole and seen == ["picture 3", "picture 4"]


def test_several_images_a_prompt_go_with_it_in_order(pictures):
    (pictures / "0004.png").unlink()
    (pictures / "prompts.txt").write_text("one\ntwo\n")
    folder.main(config(pictures, "jpeg_compressibility"))
    got = {row["image"]: row["prompt"] for row in rows(pictures / "jpeg_compressibility.jsonl")}
    assert got == {"0000.png": "one", "0001.png": "one", "0002.png": "two", "0003.png": "two"}


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("change, message", [
    (lambda d: (d / "prompts.txt").write_text("one\ntwo\n"), "5 images for the 2 prompts"),
    (lambda d: (d / "0002.png").write_bytes(b"no"), "0002.png: is not an image"),
    (lambda d: (d / "prompts.txt").unlink(), "prompts.txt: no such file"),
])
def test_a_folder_that_does_not_fit_its_prompts_is_refused(pictures, change, message):
    change(pictures)
    with pytest.raises(ValueError, match=message):
        folder.main(config(pictures, "jpeg_compressibility"))


@pytest.mark.parametrize("where", ["base", "base/samples"])
def test_other_prompts_than_eval_left_beside_the_pictures_are_refused(tmp_path, where):
    images = tmp_path / where
    images.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16)).save(images / f"{i:04d}.png")
    (tmp_path / "prompts.txt").write_text("a cat\na cat\na dog\na dog\n")

    def score(text):
        (tmp_path / "given.txt").write_text(text)
        folder.main(folder.Config("jpeg_compressibility", str(images), str(tmp_path / "given.txt"),
                                  device="cpu"))

    for text in ("a cat\na bird\n", "a cat\na cat\na bird\na dog\n"):
        with pytest.raises(ValueError, match=r"^\S*given.txt: has 'a bird' for 0002.png, but "
                                             r"\S*/prompts.txt says 'a dog'; [^\n]*$"):
            score(text)
    assert not list(images.glob("*.jsonl")), "before anything is scored"
    score("a cat\na dog\n")                              # the same, two pictures of each
    assert len(rows(images / "jpeg_compressibility.jsonl")) == 4


def test_geneval_on_plain_prompts_asks_for_its_metadata(pictures):
    with pytest.raises(ValueError, match=r"^[^\n]*prompts.txt: GenEval needs more than prompts"
                                         r"[^\n]*\.jsonl metadata[^\n]*$"):
        folder.main(config(pictures, "geneval_benchmark"))


def test_options_that_make_no_sense_are_refused(pictures):
    with pytest.raises(ValueError, match="^--batch 0: expected"):
        folder.main(config(pictures, batch=0))
    with pytest.raises(ValueError, match="^world 'moon': expected one of tiny, sd3$"):
        folder.main(config(pictures, world="moon"))


@pytest.mark.parametrize("arguments, message", [
    ([], "^error: usage: python -m scorers NAME IMAGES PROMPTS[^\n]*\n$"),
    (["pickscore", "."], "^error: usage: python -m scorers NAME IMAGES PROMPTS[^\n]*\n$"),
    (["nosuch", ".", "prompts.txt"], "^error: reward 'nosuch': got 'nosuch', expected[^\n]*\n$"),
])
def test_the_command_line_ends_in_one_line_and_exit_code_2(arguments, message):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "scorers", *arguments], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
