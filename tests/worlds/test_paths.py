"""Facts about worlds/paths.py: what is looked up on the hub, and what the hub's failures say."""
import sys

import pytest

from worlds.paths import download, find, on_hub


@pytest.mark.parametrize("name", ["jieliu/SD3.5M-FlowGRPO-GenEval", "org/name"])
def test_an_organisation_and_a_name_are_looked_up_on_the_hub(here, name):
    assert on_hub(name)


@pytest.mark.parametrize("path", ["ckpt/ocr.pt", "org/x.safetensors", "set/test.txt", "a/b.jsonl",
                                  "/org/name", "name", "a/b/c", "../name", "./name", "org/name/",
                                  "", "none"])
def test_a_path_is_never_looked_up_on_the_hub(here, path):
    assert not on_hub(path)


def test_what_exists_here_is_never_looked_up_on_the_hub(here):
    (here / "org").mkdir()
    assert on_hub("org/name")
    (here / "org/name").mkdir()
    assert not on_hub("org/name")


def test_the_hub_is_asked_for_the_wanted_files_of_a_repository(here, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert download("org/name", "--x", ("a.txt",), kind="dataset") == here
    assert asked == [("org/name", {"repo_type": "dataset", "allow_patterns": ["a.txt"],
                                   "ignore_patterns": None})]


def test_hub_that_fails_is_one_clear_line(here, monkeypatch):
    def fail(*args, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="^--model stabilityai/sd3: is no file or folder here, and "
                                         "the hub did not give it: OSError: no network at all$"):
        find("stabilityai/sd3")
    with pytest.raises(ValueError, match="^--model org/x.safetensors: no such file or folder; exp"):
        find("org/x.safetensors")


def test_without_the_hubs_client_a_name_is_one_clear_line(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="^org/name: is no file .*ModuleNotFoundError: "):
        download("org/name", "org/name", ["a.txt"])
