"""What the README says of how to add a reward, an objective and a teacher is so."""
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import BASE, distance, grpo, log, opd, random_like, tensors

import train_opd
import worlds
from checkpoints.formats import read, write_peft
from rewards import REWARDS, Reward


def brightness(images, metas, world):
    return images.mean((1, 2, 3)).cpu().numpy()


def huber(v, s, cfg):
    return F.huber_loss(v, s.v_target, reduction="none").flatten(1).mean(1)


def test_a_reward_is_a_function_and_a_line(here, monkeypatch):
    monkeypatch.setitem(REWARDS, "brightness", Reward(brightness))
    grpo(iters=1, tasks=["quality"], reward=["brightness"], anchor=True, name="bright",
         out="runs/bright/adapter.pt")
    row = log("bright")[0]
    assert 0 < row["reward_quality"] < 1
    assert row["grad_norm"] > 0
    teacher = read("runs/bright/adapter.pt", worlds.load(BASE).mmdit)
    assert teacher["task"] == "quality"
    assert teacher["reward"] == {"quality": {"brightness": 1.0}}
    opd(iters=1, teachers=["quality=runs/bright/adapter.pt"], ratio=["quality=1"],
        name="bright-student")
    assert log("bright-student")[0]["kl_quality"] >= 0


def test_an_objective_is_a_line_in_a_table(here, teachers, monkeypatch):
    monkeypatch.setitem(train_opd.OBJECTIVES, "huber", huber)
    opd(iters=1, teachers=teachers, objective="huber", name="huber")
    assert log("huber")[0]["grad_norm"] > 0
    opd(iters=1, teachers=teachers, name="kl")
    start = tensors("runs/huber/init.pt")
    student = tensors("runs/huber/student.pt")
    assert distance(start, student) > 0
    assert distance(tensors("runs/kl/student.pt"), student) > 0


def test_a_peft_folder_is_a_teacher_of_the_task_it_is_called_by(here, teachers):
    net = worlds.load(BASE).mmdit
    net.add_adapter("t", 4, 8.0)
    torch.manual_seed(7)
    adapter = {"tensors": random_like(net.adapter("t")), "r": 4, "alpha": 8.0}
    write_peft(here / "folder", adapter, BASE)
    opd(iters=1, teachers=["ocr=folder", teachers[-1]], name="peft", ratio=["ocr=1", "quality=1"])
    row = log("peft")[0]
    assert row["kl_ocr"] > 0
    assert row["kl_quality"] > 0
    assert "kl_geneval" not in row
    with pytest.raises(ValueError, match="say TASK=PATH"):
        opd(teachers=["folder"], name="nameless")
