"""Bad input is one clear line, before any sampling. The tables of bad command lines."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import BASE, GRPO, OPD, ROOT, make_teacher, opd, torchrun

import eval as evaluation
import sampler
import train_grpo
import train_opd
from plumbing.files import write_pt

# ------------------------------------------------------------------ combinations in stage 2

REFUSED = [
    (dict(objective="pg", rollout="ode"), "needs a density at every supervised step"),
    (dict(objective="released", noisy=[0, 2], supervised=[0, 3]), "needs a density"),
    (dict(objective="pg", match="branches", guidance=2.0),
     "--match branches: the density is of the guided output"),
    (dict(match="fold"), "--match fold --guidance 1"),
    (dict(objective="nonsense"), "--objective nonsense: expected one of kl, velocity, pg"),
    (dict(step_reward="sampled"), "are for --objective pg"),
    (dict(objective="pg", credit="future", one=True), "no later supervised steps"),
    (dict(objective="pg", credit="future", supervised=[1, 2]), "no later supervised steps"),
    (dict(rollout="cps", a=1.5), "--a 1.5 --rollout cps: expected 1 or less"),
    (dict(lr=math.inf), "--lr inf: expected a finite number"),
    (dict(lam=math.nan), "--lam nan: expected a finite number"),
    (dict(guidance=-1.0), "--guidance -1.0: expected a finite number"),
    (dict(keep=-1), "--keep -1: expected a finite number"),
    (dict(seed=-1), "--seed -1: expected a finite number"),
    (dict(extrapolate=math.inf), "--extrapolate inf: expected a finite number"),
    (dict(rollout="cps", noisy=[0, 2], supervised=[0, 4]), "its last step has no noise"),
    (dict(blend=1.0), "0 <= blend < 1"),
    (dict(supervised=[3, 9]), "--supervised .*expected FROM TO"),
    (dict(init="truncate", lora_r=99), "the exact merge has rank 12"),
    (dict(init="factors", full=True), "is about an adapter's factors"),
    (dict(init="nowhere.pt"), "nowhere.pt: no such file"),
    (dict(extrapolate=0.0), "--extrapolate 0"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[message for _, message in REFUSED])
def test_combination_that_makes_no_sense_is_refused_with_the_reason(here, teachers, change,
                                                                    message):
    with pytest.raises(ValueError, match=message) as error:
        opd(**change, teachers=teachers)
    assert "\n" not in str(error.value)
    assert not (here / "runs/opd/log.jsonl").exists()


# ------------------------------------------------------------------ files and single options


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def bad_files(here):
    """Files that are no teachers, or none that fits. good.pt is one."""
    write_pt(here / "evil.pt", {"task": Evil()})
    write_pt(here / "short.pt", {"task": "ocr"})
    good = make_teacher(here / "good.pt", "ocr")
    (here / "cut.pt").write_bytes(Path(good).read_bytes()[:5000])
    (here / "text.pt").write_text("hello")
    make_teacher(here / "other.pt", "ocr", base="0" * 16)
    make_teacher(here / "second.pt", "ocr")
    make_teacher(here / "dance.pt", "dance")
    make_teacher(here / "misshapen.pt", "ocr", r=5)
    broken = torch.load(good)
    next(iter(broken["tensors"].values()))[0] = float("nan")
    write_pt(here / "nan.pt", broken)
    torch.save(broken, here / "unsigned.pt")


GOOD = dict(teachers=["good.pt"])
ALONE = dict(teachers=["good.pt"], lam=0.0)             # without an anchor
OPD_BAD = [
    (dict(teachers=[]), "--teachers: got none"),
    (dict(teachers=["nowhere.pt"]), "nowhere.pt: no such file"),
    (dict(teachers=["evil.pt"]), "evil.pt: .*pickled code is refused"),
    (dict(teachers=["cut.pt"]), "cut.pt: "),
    (dict(teachers=["text.pt"]), "text.pt: "),
    (dict(teachers=["short.pt"]), "short.pt: .*lacks anchor"),
    (dict(teachers=["other.pt"]), "other.pt: is an adapter of base 0000"),
    (dict(teachers=["good.pt", "second.pt"]), "second.pt: is a second teacher of 'ocr'"),
    (dict(teachers=["dance.pt"]), "dance.pt: is trained on 'dance'"),
    (dict(teachers=["misshapen.pt"], lam=0.0), r"tensor '.*\.A' is .*4, .*expected .*5, "),
    (GOOD, "0 of the teachers are marked as the anchor"),
    (dict(**GOOD, anchor="quality"), "--anchor quality: expected the task of a teacher"),
    (dict(**ALONE, ratio=["dance=3"]), "--ratio dance=3"),
    (dict(**ALONE, group=3), "--batch 8 --group 3: expected whole groups"),
    (dict(**GOOD, lam=-1.0), "--lam -1.0"),
    (dict(**ALONE, anchor="ocr"), "--anchor ocr: .*--lam > 0"),
    (dict(**GOOD, lora_r=4), "are for a new adapter"),
    (dict(**GOOD, updates=0), "--updates 0: expected a finite number greater than 0"),
    (dict(**GOOD, noisy=[2, 9]), "--noisy"),
    (dict(**ALONE, blend=0.5), "--blend 0.5: there is one teacher"),
    (dict(teachers=["nan.pt"]), "nan.pt: .*not a tensor of finite numbers"),
    (dict(teachers=["unsigned.pt"]), "unsigned.pt: has no digest"),
    (dict(**GOOD, model="nowhere.safetensors"), "nowhere.safetensors"),
    (dict(**GOOD, model="text.pt"), "expected a safetensors file"),
]
GRPO_BAD = [
    (dict(tasks=["dance"]), "--tasks dance: unknown task"),
    (dict(tasks=[]), "at least one"),
    (dict(tasks=["ocr"], reward=["beauty"]), "got 'beauty'"),
    (dict(tasks=["ocr"], reward=["geneval"]), "--reward geneval does not fit task 'ocr'"),
    (dict(tasks=["quality"], reward=["ocr"]), "--reward ocr does not fit task 'quality'"),
    (dict(tasks=["ocr"], reward=["ocr", "ocr"]), "--reward: got 2 values"),
    (dict(tasks=["ocr"], a=0.0), "--a 0.0: expected a finite number greater than 0"),
    (dict(tasks=["ocr"], ratio=["ocr=1", "quality=2"]), "--ratio quality=2"),
    (dict(tasks=["ocr", "quality"], ratio=["ocr=1"]), "--ratio ocr=1: .*number for each of ocr"),
    (dict(tasks=["ocr"], group=3), "--batch 8 --group 3: expected whole groups"),
    (dict(tasks=["ocr"], group=1), "at least 2"),
    (dict(tasks=["ocr"], noisy=[0, 4], rollout="cps"), "last CPS step"),
    (dict(tasks=["ocr"], device="abacus"), "--device abacus"),
]
EVAL_BAD = [
    (dict(ckpts=["nowhere.pt"]), "nowhere.pt: no such file"),
    (dict(ckpts=["base", "base"]), "second model called 'base'"),
    (dict(ckpts=[]), "--ckpts: got none"),
    (dict(ckpts=["base"], rows=2), "--rows 2"),
    (dict(ckpts=["base"], per_task=3, rows=3), "--per-task 3"),
    (dict(score=["ocr"]), "--score ocr: expected TASK=REWARD, each task once"),
    (dict(score=["dance=ocr"]), "--score dance=ocr: .*tasks are geneval, ocr, quality"),
    (dict(score=["ocr=beauty"]), "--score ocr=beauty: .*rewards geneval, geneval_strict"),
    (dict(score=["ocr=ocr", "ocr=quality"]), "--score ocr=quality: .*each task once"),
]
DEFAULTS = {train_opd: OPD, train_grpo: GRPO, evaluation: dict(model=BASE)}
TABLES = {train_opd: OPD_BAD, train_grpo: GRPO_BAD, evaluation: EVAL_BAD}
BAD = [(script, *line) for script, table in TABLES.items() for line in table]


@pytest.mark.parametrize("script, change, message", BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_one_clear_line_before_any_sampling(here, monkeypatch, script, change,
                                                         message):
    bad_files(here)

    def sampled(*args, **kwargs):
        raise AssertionError("sampled before the input was checked")

    monkeypatch.setattr(sampler.Sampler, "rollout", sampled)
    for name in ("sample", "draw_noise"):
        monkeypatch.setattr(script, name, sampled, raising=False)
    with pytest.raises(ValueError, match=message) as error:
        script.main(script.Config(**{**DEFAULTS[script], **change}))
    assert "\n" not in str(error.value)
    assert not Path("pwned").exists()
    assert not Path("runs").exists()


# ------------------------------------------------------------------ the process


MISSING = ["--model", BASE, "--teachers", "nowhere.pt", "--device", "cpu"]


def test_bad_input_ends_the_process_with_a_code_and_one_line(here):
    command = [sys.executable, str(ROOT / "train_opd.py"), *MISSING]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: nowhere.pt: no such file"


def test_bad_input_on_two_ranks_ends_both_with_one_line(here):
    done = torchrun(2, "train_opd.py", *MISSING)
    assert done.returncode != 0
    assert done.stderr.count("error: nowhere.pt: no such file") == 1
