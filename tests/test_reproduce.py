"""reproduce.py: budgets are equal, intervals cover, tables say what the results say."""
import json

import numpy as np
import pytest

import reproduce
import train_grpo
import train_opd
import train_sft
import util

JOBS = reproduce.jobs(reproduce.Config())


def passes(command):
    """Forward passes of a command by its own options (a backward pass is two)."""
    module = {"train_opd.py": train_opd, "train_grpo.py": train_grpo, "train_sft.py": train_sft}[command[0]]
    cfg = util.parse(module.Config, command[1:], presets=module.PRESETS)
    if module is train_sft:
        return cfg.samples * cfg.steps + cfg.iters * cfg.batch * 3
    if module is train_grpo:
        window = cfg.noisy[1] - cfg.noisy[0]
        return cfg.iters * cfg.batch * (cfg.steps + window * (3 + (cfg.beta > 0)))
    first, end = cfg.supervised or (cfg.noisy if cfg.rollout != "ode" else (0, cfg.steps))
    teachers = 1 + (cfg.blend > 0) * (len(cfg.teachers) - 1) + (cfg.extrapolate != 1) + (cfg.lam > 0)
    return cfg.iters * cfg.batch * (cfg.steps + (1 if cfg.one else end - first) * (teachers + 3))


@pytest.mark.parametrize("name", [n for n, job in JOBS.items() if n.endswith("-s0") and job["command"] and not n.startswith("sft-s")])
def test_compared_runs_have_equal_budgets(name):
    default, got = passes(JOBS["opd-merge-s0"]["command"]), passes(JOBS[name]["command"])
    teachers = sum(passes(JOBS[f"{task}-again-s1"]["command"]) for task in reproduce.TASKS)
    want = default / 2 if name.startswith("half") else default + teachers if name == "mix-whole-s0" else default
    if name == "mix-geneval-ocr-s0":                       # the GenEval teacher's own
        want = passes(JOBS["geneval-again-s1"]["command"])
    assert got == pytest.approx(want, rel=0.02)


def test_the_whole_plan_fits_six_hours_and_every_seed_has_its_own_run():
    assert sum(job["seconds"] for job in reproduce.jobs(reproduce.Config(compile=True)).values()) < 6 * 3600
    runs = [job["command"][job["command"].index("--name") + 1] for job in JOBS.values() if job["command"]]
    assert len(runs) == len(set(runs)) and all("{seed}" not in str(job) for job in JOBS.values())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_the_mean_19_times_of_20(n):
    rng = np.random.default_rng(0)
    hits = [abs(mean - 0.7) < half_width for mean, half_width in (reproduce.mean_half(rng.normal(0.7, 0.2, n)) for _ in range(4000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)
    assert reproduce.interval([0.5]) == "0.500" and reproduce.interval([0.5, 0.5, 0.5]) == "0.500 ± 0.000"


def result(name, seed, geneval, ocr, quality, **more):
    table = {"geneval": [geneval, 0, 600], "ocr": [ocr, 0, 600], "quality": [quality, 0, 600], "average": [(geneval + ocr + quality) / 3, 0, 1800]}
    return {"part": JOBS[f"{name}-s{seed}"]["part"], "table: mean, standard error, n": table, "diversity": {"geneval": [0.1, 0, 5]},
            "all scores": {"quality on geneval": [0.6, 0]}, "on training prompts (to choose settings by)": table, "timed alone": True, **more}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with made-up results: the student has 0.9, 1.0 and 1.1 of the teacher's GenEval gain with seeds 0, 1, 2, and half of the others."""
    monkeypatch.chdir(tmp_path)
    reproduce.OUT.mkdir(parents=True)
    for seed in range(3):
        made = {"base": result("base", seed, 0.2, 0.4, 0.6), "geneval": result("geneval", seed, 0.3, 0, 0), "ocr": result("ocr", seed, 0, 0.8, 0),
                "quality": result("quality", seed, 0, 0, 1.0), "merge": result("merge", seed, 0.2, 0.5, 0.7),
                "opd-merge": result("opd-merge", seed, 0.29 + 0.01 * seed, 0.6, 0.8, iterations=100, **{"s/it, median": 2.0}),
                "half": result("half", seed, 0.1 * seed, 0.5, 0.5), "half-velocity-lam0": result("half-velocity-lam0", seed, 0.1 * seed + 0.03, 0.5, 0.5)}
        for name, r in made.items():
            (reproduce.OUT / f"{name}-s{seed}.json").write_text(json.dumps(r))
        shots = {"50": result("opd-merge", seed, 0.3, 0.79, 0.99)["table: mean, standard error, n"], "70": result("opd-merge", seed, 0.2, 0.4, 0.6)["table: mean, standard error, n"]}
        (reproduce.OUT / f"curve-opd-merge-s{seed}.json").write_text(json.dumps({"part": "curves", "iteration -> table": shots}))
    (tmp_path / "README.md").write_text("before\n<!-- reproduce: share -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def test_parts_of_the_gain_and_paired_differences_are_taken_seed_by_seed(written):
    found = reproduce.collect()
    assert "1.00 ± 0.25 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.67 ± 0.08" in reproduce.share_table(found)         # 4.303 * 0.1 / sqrt(3) = 0.248
    assert "`velocity` | objectives | 3 | +0.030 ± 0.000 | +0.000" in reproduce.ablation_table(found, {})  # the seeds' own spread, 0.1, cancels


def test_cost_is_counted_to_the_first_snapshot_with_95_percent(written):
    points = reproduce.curve(reproduce.collect(), "opd-merge")
    assert [(it, round(mean, 3)) for it, mean, _ in points["ocr"]] == [(0, 0.25), (50, 0.975), (70, 0.0), (100, 0.5)]
    line = next(line for line in reproduce.cost_table(reproduce.collect()).splitlines() if "| ocr |" in line)
    assert line == "| Flow-OPD from merge | ocr | 100 | 0.50 | 50 | 106 | 100 |"                            # 50 * 64 * 33 passes, 50 * 2 s


def test_tables_go_between_the_readmes_marks_and_nowhere_else(written):
    for _ in range(2):
        reproduce.tables()
        readme = (written / "README.md").read_text()
        assert readme.startswith("before\n<!-- reproduce: share -->\n| part of") and readme.endswith("<!-- end -->\nafter\n") and "old" not in readme
    assert readme.count("<!-- end -->") == 1 and readme.split("share -->\n")[1].split("\n<!--")[0] in (written / "results/reproduce.md").read_text()


def test_a_teacher_at_the_fixed_states_is_at_distance_zero_from_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path)
    monkeypatch.setattr(reproduce, "jobs", lambda cfg: {"ocr-s0": {"ckpts": ["it=ckpt/ocr.pt"]}, "base-s0": {"ckpts": ["it=base"]}})
    monkeypatch.chdir(reproduce.ROOT)
    reproduce.fixed(None, per_task=4)
    kls = json.loads((tmp_path / "fixed-states.json").read_text())
    for which in ("base's states", "teacher's states"):
        assert kls["ocr-s0"][which]["ocr"] == 0 and kls["ocr-s0"][which]["geneval"] > 1e-4 and kls["base-s0"][which]["ocr"] > 1e-4
