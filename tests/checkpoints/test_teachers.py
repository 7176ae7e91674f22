"""Facts about checkpoints/teachers.py: a teacher's task is the name of its adapter."""
import pytest
from tiny_runs import BASE, make_teacher

import worlds
from checkpoints.teachers import attach, read_teachers


@pytest.mark.parametrize("task", ["ocr.v2", "student", "training"])
def test_a_task_that_cannot_name_an_adapter_is_refused(here, task):
    net = worlds.load(BASE).mmdit
    path = make_teacher(here / "x.pt", task)
    message = f"x.pt: '{task}' cannot be the name of an adapter; expected a task of another name"
    with pytest.raises(ValueError, match=message):
        read_teachers([path], net, [task])


def test_teachers_are_attached_under_the_names_of_their_tasks(here):
    net = worlds.load(BASE).mmdit
    paths = [make_teacher(here / f"{task}.pt", task, seed) for seed, task in enumerate("ab")]
    teachers = read_teachers(paths, net, ["a", "b"])
    known = attach(teachers, net)
    assert list(known) == ["a", "b"] and known["a"] != known["b"]
    for layer in net.lora_layers().values():
        assert set(layer.A) == {"a", "b"}
