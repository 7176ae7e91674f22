"""KL at the fixed states."""
import json
from pathlib import Path

from experiments import fixed_states

ROOT = Path(__file__).parents[2]


def test_a_teacher_at_the_fixed_states_is_at_distance_zero_from_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "fixed-states.json"
    fixed_states.measure(file, {"ocr-s0": "ckpt/ocr.pt", "base-s0": "base"}, per_task=4)
    kls = json.loads(file.read_text())
    for which in ("base's states", "teacher's states"):
        assert kls["ocr-s0"][which]["ocr"] == 0
        assert kls["ocr-s0"][which]["geneval"] > 1e-4
        assert kls["base-s0"][which]["ocr"] > 1e-4
