"""Facts about scorers.py: every network against its original's layout, on random weights; every judge against a real local server."""
import pytest

from scorers import weights


def test_weights_are_found_in_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    (tmp_path / "NAME").mkdir()
    (tmp_path / "NAME" / "model.safetensors").touch()
    assert weights("owner/NAME", "model.safetensors", "*.safetensors") == tmp_path / "NAME"


def test_weights_that_are_missing_from_the_local_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    (tmp_path / "NAME").mkdir()
    with pytest.raises(ValueError, match=r"^weights of owner/NAME: got no b.pt in .*NAME; put a.pt, b.pt of owner/NAME into \$REWARD_MODELS/NAME.*$"):
        (tmp_path / "NAME" / "a.pt").touch()
        weights("owner/NAME", "a.pt", "b.pt")


@pytest.mark.parametrize("root", [True, False])
def test_weights_that_are_nowhere_say_where_they_were_looked_for(tmp_path, monkeypatch, root):
    import huggingface_hub

    def no_network(repo, allow_patterns):
        assert (repo, allow_patterns) == ("owner/NAME", ["a.pt"])
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path)) if root else monkeypatch.delenv("REWARD_MODELS", raising=False)
    looked = f"no folder {tmp_path}/NAME" if root else r"no \$REWARD_MODELS"
    with pytest.raises(ValueError, match=rf"^weights of owner/NAME: got {looked}, and from .* ConnectionError \(no route\); put a.pt of .*network$"):
        weights("owner/NAME", "a.pt")
