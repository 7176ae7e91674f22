"""The plan: what its runs cost, and that every job has its own seed and teachers."""
from pathlib import Path

import pytest
import torch

import model as models
import train_grpo
import train_opd
import train_sft
from experiments import jobs
from experiments.passes import passes
from plumbing import cli
from worlds import presets

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train_opd.py": train_opd, "train_grpo.py": train_grpo, "train_sft.py": train_sft}
PLAN = jobs.plan()


@pytest.mark.parametrize("command, iters", [
    ("train_opd.py --batch 16 --updates 2 --anchor base", 1),
    ("train_opd.py --batch 16 --updates 2 --lam 0 --blend 0.1", 1),
    ("train_opd.py --batch 16 --updates 1 --rollout ode --anchor base", 1),
    ("train_opd.py --batch 16 --updates 1 --steps 8 --noisy 0 8 --extrapolate 1.25 --lam 0", 1),
    ("train_opd.py --batch 16 --updates 1 --rollout ode --objective velocity --one --steps 16 "
     "--noisy 0 1 --anchor base", 1),
    ("train_grpo.py --tasks ocr --batch 24", 1),
    ("train_opd.py --batch 16 --updates 1 --states pictures --anchor base", 1),
    ("train_sft.py --samples 10 --batch 4", 2),
    ("train_sft.py --samples 10 --batch 4 --best 3", 1)])
def test_passes_are_what_the_network_was_asked_for(command, iters, tmp_path, monkeypatch):
    """Every image that goes through the transformer, three times where a backward pass follows.

    Here no anchor is a prompt's own teacher, and no group is without a signal: both save passes.
    """
    real = train_grpo.advantages
    monkeypatch.setattr(train_grpo, "advantages",
                        lambda *args: (real(*args)[0], torch.ones(24, dtype=torch.bool)))
    count = [0]
    forward = models.MMDiT.forward

    def counted(self, x, *args, **kwargs):
        count[0] += len(x) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, x, *args, **kwargs)

    command = [*command.split(), "--iters", str(iters)]
    command += ["--model", str(ROOT / "ckpt/tiny.safetensors")]
    if command[0] == "train_grpo.py":
        command += ["--out", "adapter.pt"]
    else:
        command += ["--teachers", *(str(ROOT / path) for path in jobs.TEACHERS.values())]
    script = SCRIPTS[command[0]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.MMDiT, "forward", counted)
    script.main(cli.parse(script.Config, command[1:], presets=presets(script.PRESETS)))
    assert count[0] == passes(command)


def test_grpo_on_all_rewards_has_the_passes_of_stage_1_and_stage_2_together():
    teachers = sum(passes(PLAN[f"{name}-s0"].command) for name in jobs.TEACHER_JOBS.values())
    want = teachers + passes(PLAN["opd-s0"].command)
    assert passes(PLAN["mix-s0"].command) == pytest.approx(want, rel=0.01)


def test_every_seed_has_its_own_run():
    commands = [job.command for job in PLAN.values() if job.command]
    runs = [command[command.index("--name") + 1] for command in commands]
    assert len(runs) == len(set(runs))
    assert all("{seed}" not in str(job) for job in PLAN.values())


def test_every_command_of_the_plan_is_one_that_its_script_reads():
    for command in jobs.commands().values():
        script, *options = command
        cli.parse(SCRIPTS[script].Config, options)


def test_half_way_teachers_are_snapshots_that_are_kept_and_evaluated():
    for task, it in jobs.EARLY.items():
        assert it in jobs.SNAPSHOTS_AT[f"teacher-{task}"]
    for run, shots in jobs.SNAPSHOTS_AT.items():
        command = PLAN[f"{run}-s0"].command
        keep = int(command[command.index("--keep") + 1])
        assert all(it % keep == 0 for it in shots), run


def test_a_seed_has_teachers_of_its_own_and_the_shipped_ones_are_those_of_seed_0():
    assert PLAN["teacher-ocr-s0"].checkpoints == {"it": "ckpt/ocr.pt"}
    assert PLAN["teacher-ocr-s2"].checkpoints == {"it": "ckpt/2/ocr.pt"}
    for seed in range(3):
        command = PLAN[f"opd-s{seed}"].command
        for task in jobs.TASKS:
            path = PLAN[f"teacher-{task}-s{seed}"].checkpoints["it"]
            assert path in command
            assert path in PLAN[f"teacher-{task}-s{seed}"].command
