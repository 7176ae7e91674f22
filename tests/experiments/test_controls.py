"""The controls: teachers that pretend, of the same size as the true ones."""
from pathlib import Path

import torch

from checkpoints.formats import read_adapter
from experiments.controls import controls
from experiments.jobs import TASKS, TEACHERS

ROOT = Path(__file__).parents[2]
TRUE = [read_adapter(ROOT / path, None) for path in TEACHERS.values()]
MADE = controls(TRUE)


def test_a_wrong_teacher_is_the_next_tasks_adapter_under_this_tasks_name():
    for i, task in enumerate(TASKS):
        wrong = MADE[f"wrong-{task}"]
        assert wrong["task"] == task
        assert wrong["tensors"] is TRUE[(i + 1) % len(TASKS)]["tensors"]


def test_a_shuffled_teacher_has_the_same_numbers_elsewhere():
    for teacher in TRUE:
        shuffled = MADE[f"shuffled-{teacher['task']}"]["tensors"]
        for name, tensor in teacher["tensors"].items():
            assert shuffled[name].shape == tensor.shape
            assert torch.equal(shuffled[name].flatten().sort()[0], tensor.flatten().sort()[0])
            assert not torch.equal(shuffled[name], tensor)


def test_the_noise_of_a_noised_teacher_has_half_the_spread_of_its_factors():
    for teacher in TRUE:
        noised = MADE[f"noised-{teacher['task']}"]["tensors"]
        ratios = [(noised[name] - tensor).std() / tensor.std()
                  for name, tensor in teacher["tensors"].items()]
        assert abs(torch.stack(ratios).mean() - 0.5) < 0.01


def test_no_control_anchors_the_others():
    assert not any(adapter["anchor"] for adapter in MADE.values())
