"""reproduce.py: budgets are equal, intervals cover, tables say what the results say."""
import json

import numpy as np
import pytest
import torch

import model as models
import reproduce
import train_grpo
import train_opd
import train_sft
import util

JOBS = reproduce.jobs(reproduce.Config())


@pytest.mark.parametrize("command, iters", [
    ("train_opd.py --batch 16 --updates 2", 1), ("train_opd.py --batch 16 --updates 2 --lam 0 --blend 0.1", 1),
    ("train_opd.py --batch 16 --updates 1 --rollout ode", 1), ("train_opd.py --batch 16 --updates 1 --noisy 0 8 --extrapolate 1.25", 1),
    ("train_opd.py --batch 16 --updates 1 --rollout ode --objective velocity --one --steps 16 --noisy 0 1", 1),
    ("train_grpo.py --tasks ocr --batch 24", 1), ("train_sft.py --samples 10 --batch 4", 2)])
def test_passes_are_what_the_network_was_asked_for(command, iters, tmp_path, monkeypatch):
    """Every image that goes through the transformer, three times where a backward pass follows."""
    command, count, forward = [*command.split(), "--iters", str(iters)], [0], models.MMDiT.forward

    def counted(self, x, *args, **kwargs):
        count[0] += len(x) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, x, *args, **kwargs)

    files = [str(reproduce.ROOT / path) for path in reproduce.TEACHERS.values()]
    command += ["--model", str(reproduce.ROOT / "ckpt/tiny.safetensors")] + (["--teachers", *files] if "grpo" not in command[0] else ["--out", "adapter.pt"])
    script = {"train_opd.py": train_opd, "train_grpo.py": train_grpo, "train_sft.py": train_sft}[command[0]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.MMDiT, "forward", counted)
    script.main(util.parse(script.Config, command[1:], presets=script.PRESETS))
    assert count[0] == reproduce.passes(command)


@pytest.mark.parametrize("name", [n for n, job in JOBS.items() if n.endswith("-s0") and job["command"] and not n.startswith("sft-s")])
def test_compared_runs_have_equal_budgets(name):
    default, got = reproduce.passes(JOBS["opd-merge-s0"]["command"]), reproduce.passes(JOBS[name]["command"])
    teachers = sum(reproduce.passes(JOBS[f"{task}-again-s1"]["command"]) for task in reproduce.TASKS)
    want = default / 2 if name.startswith("half") else default + teachers if name.startswith("mix-whole") else default
    if name == "mix-geneval-ocr-s0":                       # the GenEval teacher's own
        want = reproduce.passes(JOBS["geneval-again-s1"]["command"])
    assert got == pytest.approx(want, rel=0.02)


def test_the_whole_plan_fits_about_six_hours_and_every_seed_has_its_own_run():
    assert sum(job["seconds"] for job in reproduce.jobs(reproduce.Config(compile=True)).values()) < 6.5 * 3600
    runs = [job["command"][job["command"].index("--name") + 1] for job in JOBS.values() if job["command"]]
    assert len(runs) == len(set(runs)) and all("{seed}" not in str(job) for job in JOBS.values())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_the_mean_19_times_of_20(n):
    rng = np.random.default_rng(0)
    hits = [abs(mean - 0.7) < half_width for mean, half_width in (reproduce.mean_half(rng.normal(0.7, 0.2, n)) for _ in range(4000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)
    assert reproduce.interval([0.5]) == "0.500" and reproduce.interval([0.5, 0.5, 0.5]) == "0.500 ± 0.000"


def test_a_ratio_of_noisy_gains_is_unbiased_and_its_interval_covers_where_the_mean_of_ratios_does_not():
    rng, hits, ratios, means = np.random.default_rng(0), [], [], []
    for _ in range(4000):
        base = rng.normal(0, 0.03, 3)                      # the same base under both
        above, below = 0.16 + rng.normal(0, 0.01, 3) - base, 0.2 + rng.normal(0, 0.01, 3) - base
        ratio, half_width = reproduce.ratio_half(above, below)
        hits, ratios, means = hits + [abs(ratio - 0.8) < half_width], ratios + [ratio], means + [np.mean(above / below)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)
    assert abs(np.mean(ratios) - 0.8) < 0.6 * abs(np.mean(means) - 0.8)


def result(name, seed, geneval, ocr, quality, **more):
    table = {"geneval": [geneval, 0, 600], "ocr": [ocr, 0, 600], "quality": [quality, 0, 600], "average": [(geneval + ocr + quality) / 3, 0, 1800]}
    return {"part": JOBS[f"{name}-s{seed}"]["part"], "table: mean, standard error, n": table, "diversity": {"geneval": [0.1, 0, 5]},
            "all scores": {"quality on geneval": [0.6, 0]}, "on training prompts (to choose settings by)": table, "timed alone": True, **more}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with made-up results: the student has 0.9, 1.0 and 1.1 of the teacher's GenEval gain with seeds 0, 1, 2, and half of the others."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results/reproduce"
    out.mkdir(parents=True)
    for seed in range(3):
        made = {"base": result("base", seed, 0.2, 0.4, 0.6), "geneval": result("geneval", seed, 0.3, 0, 0), "ocr": result("ocr", seed, 0, 0.8, 0),
                "quality": result("quality", seed, 0, 0, 1.0), "merge": result("merge", seed, 0.2, 0.5, 0.7),
                "opd-merge": result("opd-merge", seed, 0.29 + 0.01 * seed, 0.6, 0.8, iterations=100, **{"s/it, median": 2.0}),
                "half": result("half", seed, 0.1 * seed, 0.5, 0.5), "half-lam0": result("half-lam0", seed, 0.1 * seed + 0.01, 0.5, 0.5),
                "half-velocity-lam0": result("half-velocity-lam0", seed, 0.1 * seed + 0.03, 0.5, 0.5)}
        for name, r in made.items():
            (out / f"{name}-s{seed}.json").write_text(json.dumps(r))
        shots = {it: result("opd-merge", seed, *at)["table: mean, standard error, n"] for it, at in (("50", (0.3, 0.79, 0.99)), ("70", (0.2, 0.4, 0.6)))}
        (out / f"curve-opd-merge-s{seed}.json").write_text(json.dumps({"part": "curves", "iteration -> table": shots}))
    (tmp_path / "README.md").write_text("before\n<!-- reproduce: share -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def test_parts_of_the_gain_and_paired_differences_are_taken_seed_by_seed(written):
    found = reproduce.collect("results/reproduce")
    assert "1.00 ± 0.25 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.67 ± 0.08" in reproduce.share_table(found)         # 4.303 * 0.1 / sqrt(3) = 0.248
    table = reproduce.ablation_table(found, {})            # the seeds' own spread, 0.1, cancels
    assert "`lam0` | default | 3 | +0.010 ± 0.000 | +0.000" in table and "`velocity-lam0` | lam0 | 3 | +0.020 ± 0.000 | +0.000" in table


def test_a_student_is_measured_by_the_teachers_that_taught_it(written):
    found = reproduce.collect("results/reproduce")
    found |= {"opd-second": found["opd-merge"], **{f"{task}-second": {seed: result("base", seed, 0.4, 0.8, 1.0) for seed in range(3)} for task in reproduce.TASKS}}
    assert "second teachers** | 3 | 0.50 ± 0.12 |" in reproduce.share_table(found)                # 0.29, 0.30, 0.31 between the base's 0.2 and 0.4
    lines = reproduce.difference_table(found).splitlines()
    assert any("second teachers minus each teacher" in line and "| -0.100 ± 0.025 |" in line for line in lines)
    assert any("from merge minus each teacher" in line and "| +0.000 ± 0.025 |" in line for line in lines)
    taught = {name: job["command"] for name, job in JOBS.items() if name.startswith("opd-")}
    assert all(path in taught["opd-second-s0"] and path not in taught["opd-merge-s0"] for path in reproduce.SECOND.values())
    assert [job["ckpts"] for name, job in JOBS.items() if name == "ocr-second-s2"] == [[f"it={reproduce.SECOND['ocr-second']}"]]


def test_cost_is_counted_to_the_snapshot_from_which_on_all_have_95_percent(written):
    points = reproduce.curve(reproduce.collect("results/reproduce"), "opd-merge")
    assert [(it, round(mean, 3)) for it, mean, _ in points["ocr"]] == [(0, 0.25), (50, 0.975), (70, 0.0), (100, 0.5)]
    assert reproduce.reached(points["ocr"]) is None and reproduce.reached(points["ocr"][:2]) == 50
    assert reproduce.reached([(0, 0.2, 0), (10, 0.96, 0), (20, 0.94, 0), (30, 0.95, 0), (40, 0.99, 0)]) == 30
    lines = reproduce.cost_table(reproduce.collect("results/reproduce")).splitlines()
    assert "| Flow-OPD from merge | ocr | 100 | 0.50 | not reached | - | - | - | - |" in lines
    snapshots = {"50": {task: [1.0] for task in reproduce.TASKS}}
    found = reproduce.collect("results/reproduce")
    for seed in range(3):
        found["curve-opd-merge"][seed]["iteration -> table"] = snapshots
        found["opd-merge"][seed]["table: mean, standard error, n"] |= {task: [1.0] for task in reproduce.TASKS}
    lines = reproduce.cost_table(found).splitlines()       # 50 * 64 * 33 passes of 2083 thousand, 50 * 2 s
    assert any(line.startswith("| Flow-OPD from merge | all three | 100 | ") and "| 50 | 1.00 ± 0.00 | 106 | 5.1% | 100 |" in line for line in lines)
    found |= {"opd-sft": found["opd-merge"], "curve-opd-sft": found["curve-opd-merge"], "sft": found["merge"]}
    lines = reproduce.cost_table(found).splitlines()       # and SFT's 98 thousand
    assert any(line.startswith("| Flow-OPD from SFT | all three |") and " | 203 | 9.8% |" in line for line in lines)


def test_tables_go_between_the_readmes_marks_and_nowhere_else(written):
    for _ in range(2):
        reproduce.tables("results/reproduce")
        readme = (written / "README.md").read_text()
        assert readme.startswith("before\n<!-- reproduce: share -->\n| part of") and readme.endswith("<!-- end -->\nafter\n") and "old" not in readme
    assert readme.count("<!-- end -->") == 1 and readme.split("share -->\n")[1].split("\n<!--")[0] in (written / "results/reproduce.md").read_text()


def test_a_teacher_at_the_fixed_states_is_at_distance_zero_from_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "jobs", lambda cfg: {"ocr-s0": {"ckpts": ["it=ckpt/ocr.pt"]}, "base-s0": {"ckpts": ["it=base"]}})
    monkeypatch.chdir(reproduce.ROOT)
    reproduce.fixed(reproduce.Config(out=str(tmp_path)), per_task=4)
    kls = json.loads((tmp_path / "fixed-states.json").read_text())
    for which in ("base's states", "teacher's states"):
        assert kls["ocr-s0"][which]["ocr"] == 0 and kls["ocr-s0"][which]["geneval"] > 1e-4 and kls["base-s0"][which]["ocr"] > 1e-4
