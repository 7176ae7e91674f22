"""Facts about scorers/weights.py: where published files are found, and what is refused."""
import pytest
import torch

from scorers.weights import count_layers, rename, score_head, weights


def test_weights_are_found_in_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    (tmp_path / "NAME").mkdir()
    (tmp_path / "NAME" / "model.safetensors").touch()
    assert weights("owner/NAME", "model.safetensors", "*.safetensors") == tmp_path / "NAME"


def test_weights_come_from_the_hub_where_there_is_no_local_folder(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, allow_patterns: str(tmp_path))
    (tmp_path / "a.pt").touch()
    assert weights("owner/NAME", "a.pt") == tmp_path
    with pytest.raises(ValueError, match="got no b.pt in"):
        weights("owner/NAME", "b.pt")


def test_weights_that_are_missing_from_the_local_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
    (tmp_path / "NAME").mkdir()
    (tmp_path / "NAME" / "a.pt").touch()
    message = (r"^weights of owner/NAME: got no b.pt in .*NAME; "
               r"put a.pt, b.pt of owner/NAME into \$REWARD_MODELS/NAME.*$")
    with pytest.raises(ValueError, match=message):
        weights("owner/NAME", "a.pt", "b.pt")


@pytest.mark.parametrize("root", [True, False])
def test_weights_that_are_nowhere_say_where_they_were_looked_for(tmp_path, monkeypatch, root):
    import huggingface_hub

    def no_network(repo, allow_patterns):
        assert (repo, allow_patterns) == ("owner/NAME", ["a.pt"])
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    if root:
        monkeypatch.setenv("REWARD_MODELS", str(tmp_path))
        looked = f"no folder {tmp_path}/NAME"
    else:
        monkeypatch.delenv("REWARD_MODELS", raising=False)
        looked = r"no \$REWARD_MODELS"
    message = (rf"^weights of owner/NAME: got {looked}, and from .* ConnectionError "
               r"\(no route to host\); put a.pt of .*network$")
    with pytest.raises(ValueError, match=message):
        weights("owner/NAME", "a.pt")


def test_layers_are_counted_by_their_numbers():
    state = dict.fromkeys(["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.10.a", "x.blocks.3.a"])
    assert count_layers(state, "blocks.") == 3 and count_layers(state, "layers.") == 0


def test_rename_applies_the_table_in_order():
    assert rename({"a.x": 1}, [(r"^a", "b"), (r"^b\.", "c.")]) == {"c.x": 1}


def test_a_head_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^head.pt: tensor 'layers.0.bias' is missing, "
                                         r"expected \(1024,\) \(8 more do not fit\)$"):
        score_head({"layers.0.weight": torch.zeros(1024, 768)}, "head.pt")
