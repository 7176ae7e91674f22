"""Each check of experiments/doctor.py fails if what it checks is broken."""
import dataclasses
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny_runs import BASE, ROOT, make_teacher

import rewards
import sampler
from experiments import doctor


@pytest.fixture(scope="module")
def loaded():
    cfg = doctor.Config(model=BASE, tasks=["quality"], per_task=4, group=2, steps=4, eval_steps=20,
                        teachers=[str(ROOT / "ckpt/quality.pt")], device="cpu")
    return doctor.Patient(cfg)


@pytest.fixture
def patient(loaded):
    loaded.scores = {}
    loaded.teachers = None
    loaded.cfg = dataclasses.replace(loaded.cfg, teachers=[str(ROOT / "ckpt/quality.pt")])
    return loaded


def test_all_checks_of_a_healthy_model_pass(patient, monkeypatch, capsys):
    monkeypatch.delitem(doctor.CHECKS, "ranks")
    assert doctor.examine(patient) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"ok {name}" for name in doctor.CHECKS]


def expect_failure(check, patient, *words):
    ok, text = check(patient)
    assert not ok and "\n" not in text
    for word in words:
        assert word in text


def test_a_full_disk_is_found(patient, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, 1))
    expect_failure(doctor.room, patient, "too small")


def test_a_teacher_of_another_base_is_found(patient, here):
    path = make_teacher(here / "other.pt", "quality", base="another")
    patient.cfg = dataclasses.replace(patient.cfg, teachers=[path])
    expect_failure(doctor.adapters_fit, patient, "does not belong")


def test_a_log_prob_that_is_off_by_one_percent_is_found(patient, monkeypatch):
    real = sampler.likelihood_ratio
    monkeypatch.setattr(sampler, "likelihood_ratio", lambda v, s: real(v, s) * 1.01)
    expect_failure(doctor.ratio_is_one, patient, "1.0e-02")


def test_a_wrong_drift_is_found(patient, monkeypatch):
    real = sampler.sde_step
    monkeypatch.setattr(sampler, "sde_step", lambda x, v, *rest: real(x, 1.1 * v, *rest))
    expect_failure(doctor.sde_fits_ode, patient, "a = 0")


def test_a_wrong_sigma_is_found(patient, monkeypatch):
    real = sampler.sde_step

    def wrong(*args):
        mean, std = real(*args)
        return mean, 1.2 * std

    monkeypatch.setattr(sampler, "sde_step", wrong)
    expect_failure(doctor.sde_fits_ode, patient, "noise level", "sigma_t")


def test_sde_images_that_score_worse_are_found(patient, monkeypatch):
    real = sampler.sde_step

    def wrong(*args):
        mean, std = real(*args)
        return 1.5 * mean, std

    monkeypatch.setattr(sampler, "sde_step", wrong)
    expect_failure(doctor.sde_scores_alike, patient, "SDE minus ODE")


def test_a_detached_kl_is_found(patient, monkeypatch):
    real = sampler.kl
    monkeypatch.setattr(sampler, "kl", lambda *args: real(*args).detach())
    expect_failure(doctor.kl_learns, patient, "detached")
    expect_failure(doctor.overfits, patient, "does not learn")


def test_a_constant_reward_is_found(patient, monkeypatch):
    constant = rewards.Reward(lambda images, metas, world: np.ones(len(metas)))
    monkeypatch.setitem(rewards.REWARDS, "quality", constant)
    expect_failure(doctor.rewards_differ, patient, "quality", "equal for all")
    expect_failure(doctor.groups_have_signal, patient, "without a signal")


def test_a_reward_that_does_not_answer_is_one_line_and_exit_code_1(patient, monkeypatch, capsys):
    silent = rewards.Reward(lambda images, metas, world: np.full(len(metas), np.nan))
    monkeypatch.setitem(rewards.REWARDS, "quality", silent)
    monkeypatch.setattr(doctor, "CHECKS", {"rewards": doctor.rewards_differ})
    monkeypatch.setattr(doctor, "Patient", lambda cfg: patient)
    with pytest.raises(SystemExit) as left:
        doctor.main(patient.cfg)
    assert left.value.code == 1
    assert capsys.readouterr().out.startswith("FAIL rewards: could not be made")


def test_a_learning_rate_that_does_not_learn_is_found(patient):
    patient.cfg = dataclasses.replace(patient.cfg, lr=1e-9, fit_steps=5)
    try:
        expect_failure(doctor.overfits, patient, "expected half")
    finally:
        patient.cfg = dataclasses.replace(patient.cfg, lr=3e-3, fit_steps=30)


def test_the_negative_of_a_teacher_is_found(patient, monkeypatch):
    # Eight images could not tell: each prompt is drawn a few times more, from other noise.
    monkeypatch.setitem(patient.metas, "quality", 15 * patient.metas["quality"])
    assert doctor.adapters_fit(patient)[0]
    with torch.no_grad():
        for layer in patient.net.lora_layers().values():
            layer.B["quality"].neg_()
    expect_failure(doctor.teachers_are_better, patient, "worse than the base")


def test_a_teacher_that_equals_the_base_is_a_warning(patient):
    assert doctor.adapters_fit(patient)[0]
    with torch.no_grad():
        for layer in patient.net.lora_layers().values():
            layer.B["quality"].zero_()
    ok, text = doctor.teachers_are_better(patient)
    assert ok and "cannot tell" in text


def test_ranks_that_do_not_average_are_found(patient, monkeypatch):
    monkeypatch.setattr(doctor, "one_update", lambda p, ranks, folder: {"x.B": torch.ones(2)})
    assert doctor.two_ranks_are_one(patient)[0]
    monkeypatch.setattr(doctor, "one_update",
                        lambda p, ranks, folder: {"x.B": ranks * torch.ones(2)})
    expect_failure(doctor.two_ranks_are_one, patient, "not averaged")
