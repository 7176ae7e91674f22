"""Bad input is one clear line, before any time is spent. The table of bad command lines.

docs/bad-input.md is made of the table:

    PYTHONPATH=. .venv/bin/python tests/test_bad_input.py > docs/bad-input.md
"""
import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import BASE, ROOT, make_teacher, torchrun

import checkpoints.__main__ as convert
import eval as evaluation
import sampler
import scorers
import scorers.__main__ as score_folder
import train_grpo
import train_opd
import train_sft
import worlds
from experiments import bench, fullsize, kills, reproduce
from plumbing import cli
from plumbing.files import write_pt
from worlds import presets, tiny_base
from worlds.tiny_prompts import TASKS

# ------------------------------------------------------------------ the table

# script -> its module, the options that its bad ones are added to, its positional fields.
TEACHERS = "--teachers " + " ".join(f"ckpt/{task}.pt" for task in TASKS)
SCRIPTS = {
    "train_grpo.py": (train_grpo, "--tasks ocr", ()),
    "train_opd.py": (train_opd, TEACHERS, ()),
    "train_sft.py": (train_sft, TEACHERS, ()),
    "eval.py": (evaluation, "", ()),
    "worlds.tiny_base": (tiny_base, "", ()),
    "checkpoints": (convert, "ckpt/ocr.pt --out new", ("ckpts",)),
    "scorers": (score_folder, "jpeg_compressibility images prompts.txt",
                ("name", "images", "prompts")),
    "experiments.bench": (bench, "", ()),
    "experiments.fullsize": (fullsize, "", ()),
    "experiments.reproduce": (reproduce, "", ()),
    "experiments.kills": (kills, "", ()),
}
# script -> [(options, the message)]. A message that ends in "..." goes on with what depends on the
# machine, or with a long list. HERE is the current folder, BASE the fingerprint of the shipped
# base. bad_files makes the files.
BAD = {
    "train_grpo.py": [
        ("--tasks dance",
         "--tasks dance: unknown task; the world of this model has geneval, ocr, preference, "
         "quality; --prompts dance=DIR makes a new one"),
        ("--tasks", "argument --tasks: expected at least one argument"),
        ("--tasks ocr ocr", "--tasks ocr ocr: expected each task once, at least one"),
        ("--reward beauty", "reward 'beauty': got 'beauty', expected one of ..."),
        ("--reward geneval", "reward geneval does not fit task 'ocr': ..."),
        ("--tasks quality --reward ocr",
         "reward ocr does not fit task 'quality': OCR prompt: got 'a poster of three "
         "green triangles', expected the wanted text in straight double quotes, as in: a "
         'sign saying "open"'),
        ("--reward ocr ocr", "--reward: got 2 values for 1 tasks (ocr)"),
        ("--reward ocr=-1",
         "reward 'ocr=-1': got weight '-1' for ocr, expected a positive, finite number"),
        ("--reward unifiedreward",
         "reward unifiedreward does not fit task 'ocr': reward unifiedreward: is asked "
         "of an OpenAI-compatible endpoint, but $UNIFIEDREWARD_URL is not set, e.g. "
         "http://127.0.0.1:8000/v1"),
        ("--prompts ocr", "--prompts ocr: expected TASK=DIR, each task once"),
        ("--prompts ocr=folder",
         "--prompts ocr=folder: expected a folder with train_metadata.jsonl, train.txt, "
         "test_metadata.jsonl, test.txt, evaluation_metadata.jsonl, or such a file"),
        ("--prompts ocr=text.txt",
         "text.txt, line 1: OCR prompt: got 'hello', expected the wanted text in straight "
         'double quotes, as in: a sign saying "open"'),
        ("--ratio ocr=1 quality=2",
         "--ratio quality=2: expected TASK=N with one of the tasks (ocr), each at most "
         "once, and a whole number of 0 or more"),
        ("--tasks ocr quality --ratio ocr=1",
         "--ratio ocr=1: expected a number for each of ocr, quality (0 leaves a task out), "
         "not all 0"),
        ("--ratio ocr=99999999",
         "--ratio ocr=99999999: expected shares that add up to at most 1000"),
        ("--group 5",
         "--batch 96 --group 5: expected whole groups, so a batch that is a multiple of 5"),
        ("--group 1",
         "--group 1: an advantage compares images of one prompt, so at least 2 are needed"),
        ("--updates 7",
         "--batch 96 with 1 rank(s) and --updates 7: every rank has equally many images in "
         "every update, so the batch must be a multiple of 7"),
        ("--updates 0", "--updates 0: expected a finite number greater than 0"),
        ("--decay 2", "--decay 2.0: expected at most 1"),
        ("--iters 1e3", "argument --iters: invalid int value: '1e3'"),
        ("--iters 99999999999", "--iters 99999999999: expected at most 1000000"),
        ("--steps 0", "--steps 0: expected a finite number greater than 0"),
        ("--noisy -1 3", "--noisy -1: expected a finite number of 0 or more"),
        ("--noisy 3", "--noisy [3]: expected FROM TO with 0 <= FROM < TO <= --steps 8"),
        ("--noisy 2 9", "--noisy [2, 9]: expected FROM TO with 0 <= FROM < TO <= --steps 8"),
        ("--noisy 0 8 --rollout cps",
         "--noisy [0, 8] --rollout cps: the last CPS step has no noise and so no density; "
         "end at 7"),
        ("--rollout ode", "argument --rollout: invalid choice: 'ode' (choose ..."),
        ("--window 99",
         "--window 99: takes this many of the steps of --noisy [0, 5] --rollout sde; "
         "expected no more than they are"),
        ("--a 0", "--a 0.0: expected a finite number greater than 0"),
        ("--guidance 1e30", "--guidance 1e+30: expected at most 1000"),
        ("--clip 5", "--clip 5.0: expected at most 1"),
        ("--lr 1e300", "--lr 1e+300: expected at most 10"),
        ("--lr nan", "--lr nan: expected a finite number of 0 or more"),
        ("--ema 1", "--ema 1.0: the decay of an average; expected 0 <= ema < 1"),
        ("--ema-every 4",
         "--ema-every 4 --ema 0: there is no average to update; expected --ema above 0"),
        ("--keep 1000",
         "--keep 1000 --iters 300: would never happen; expected no more than the "
         "iterations"),
        ("--eval-every 1000",
         "--eval-every 1000 --iters 300: would never happen; expected no more than the "
         "iterations"),
        ("--eval-every 1 --eval-images 0",
         "--eval-images 0: expected a finite number greater than 0"),
        ("--eval-every 1 --eval-images 100000000",
         "--eval-images 100000000: expected at most 100000"),
        ("--save-every 0", "--save-every 0: expected a finite number greater than 0"),
        ("--init nowhere", "nowhere: no such file"),
        ("--init merge",
         "--init merge: merges teachers, and this run has none; expected none, or the path "
         "of a checkpoint"),
        ("--init ckpt/ocr.pt --lora-r 4",
         "--lora-r 4 --lora-alpha None: are for a new adapter; with --init ckpt/ocr.pt "
         "--full False there is none whose rank can be chosen"),
        ("--full --lora-r 16",
         "--lora-r 16 --lora-alpha None: are for a new adapter; with --init none --full "
         "True there is none whose rank can be chosen"),
        ("--full --amp float16",
         "--amp float16 --full: scaled losses are for adapters here; expected --amp "
         "bfloat16 or float32"),
        ("--lora-r 100000", "--lora-r 100000: expected at most 4096"),
        ("--lora-alpha nan", "--lora-alpha nan: expected a finite number of 0 or more"),
        ("--seed -1", "--seed -1: expected a finite number of 0 or more"),
        ("--seed 99999999999999999999999",
         "--seed 99999999999999999999999: expected at most 9223372036854775807"),
        ("--name ../../escape",
         "--name '../../escape': expected the name of a folder in runs/, without slashes, "
         "and without dots or spaces at its ends"),
        ("--out folder", "folder: is a folder, expected the name of a file to write"),
        ("--out text.txt/new.pt", "text.txt: HERE/text.txt is a file, expected a folder"),
        ("--size 64",
         "--size 64 --t5  --text-encoders : are for SD3.5; the tiny world's pictures have "
         "32 px, and its text encoder is in the model's file and has no T5"),
        ("--track nothing", "argument --track: invalid choice: 'nothing' (choose ..."),
        ("--device abacus", "--device abacus: expected auto, cuda, mps or cpu (choose ..."),
        ("--model nowhere",
         "--model nowhere: no such file or folder; expected a safetensors file (the tiny "
         "world's or SD3.5's), SD3.5's published folder, or its name on the hub"),
        ("--model ckpt/ocr.pt",
         "ckpt/ocr.pt: expected a safetensors file, got another or a damaged one "
         "(ValueError ..."),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
    "train_opd.py": [
        ("--teachers nowhere.pt", "nowhere.pt: no such file"),
        ("--teachers evil.pt",
         "evil.pt: holds something other than plain tensors and containers (pickled code "
         "is refused): posix system"),
        ("--teachers cut.pt",
         "cut.pt: not a readable checkpoint (BadZipFile: File is not a zip file)"),
        ("--teachers text.pt",
         "text.pt: not a readable checkpoint (BadZipFile: File is not a zip file)"),
        ("--teachers short.pt",
         "short.pt: expected a checkpoint with task, anchor, base, r, alpha, tensors, "
         "settings; it lacks anchor, base, r, alpha, tensors, settings"),
        ("--teachers other.pt",
         "other.pt: is an adapter of base 0000000000000000, but --model has fingerprint "
         "BASE; an adapter fits the base it was trained on"),
        ("--teachers ckpt/ocr.pt second.pt",
         "second.pt: is a second teacher of 'ocr', after ckpt/ocr.pt; a prompt is routed "
         "to one"),
        ("--teachers dance.pt",
         "dance.pt: is trained on 'dance', expected one of geneval, ocr, preference, "
         "quality, to which prompts can be routed"),
        ("--teachers misshapen.pt --lam 0",
         "misshapen.pt: tensor 'joint_blocks.0.context_block.attn.proj.A' is (1, 4, 128), "
         "expected (1, 5, 128) (29 more do not fit)"),
        ("--teachers nan.pt",
         "nan.pt: 'joint_blocks.0.context_block.attn.qkv.A' is not a tensor of finite "
         "numbers"),
        ("--teachers unsigned.pt",
         "unsigned.pt: has no digest, so it is damaged, not by these scripts, or by an old "
         "version; `python -m checkpoints` converts an old adapter that you trust (--to "
         "pt)"),
        ("--teachers ckpt/ocr.pt",
         "0 of the teachers are marked as the anchor; expected one: say --anchor TASK, "
         "--anchor base, or --lam 0 for none"),
        ("--teachers ckpt/ocr.pt --lam 0 --blend 0.5",
         "--blend 0.5: there is one teacher, so none to blend it with"),
        ("--anchor beauty",
         "--anchor beauty: expected the task of a teacher or the base (geneval, ocr, "
         "preference, quality, base), and --lam > 0; got --lam 0.02"),
        ("--anchor ocr --lam 0",
         "--anchor ocr: expected the task of a teacher or the base (geneval, ocr, "
         "preference, quality, base), and --lam > 0; got --lam 0.0"),
        ("--lam -1", "--lam -1.0: expected a finite number of 0 or more"),
        ("--teachers ckpt/quality.pt",
         "no prompt is routed to quality by default; expected shares: --ratio quality=1"),
        ("--ratio geneval=0 ocr=0 preference=0 quality=0",
         "--ratio geneval=0 ocr=0 preference=0 quality=0: expected a number for each of "
         "geneval, ocr, preference, quality (0 leaves a task out), not all 0"),
        ("--ratio geneval=1.5 ocr=1 preference=1 quality=0",
         "--ratio geneval=1.5: expected TASK=N with one of the tasks (geneval, ocr, "
         "preference, quality), each at most once, and a whole number of 0 or more"),
        ("--ratio geneval=99999999 ocr=1 preference=1 quality=0",
         "--ratio geneval=99999999 ocr=1 preference=1 quality=0: expected shares that add "
         "up to at most 1000"),
        ("--merge geneval=1",
         "--merge geneval=1: expected a number for each of geneval, ocr, preference, "
         "quality (0 leaves a task out), not all 0"),
        ("--init none --merge geneval=1 ocr=1 preference=1 quality=1",
         "--merge geneval=1 ocr=1 preference=1 quality=1: --init none merges no teachers"),
        ("--lora-r 4",
         "--lora-r 4 --lora-alpha None: are for a new adapter; with --init merge --full "
         "False there is none whose rank can be chosen"),
        ("--init truncate --lora-r 99",
         "--init truncate --lora-r 99: the exact merge has rank 64; expected no more"),
        ("--init factors --full",
         "--init factors --full: is about an adapter's factors; a whole transformer starts "
         "from merge, none, or a checkpoint"),
        ("--objective nonsense",
         "--objective nonsense: expected one of kl, velocity, pg, released, mixed"),
        ("--objective pg --rollout ode",
         "--objective pg --rollout ode --noisy [1, 3] --supervised [0, 4]: a policy "
         "gradient needs a density at every supervised step, so noise"),
        ("--objective released --noisy 0 2 --supervised 0 3",
         "--objective released --rollout sde --noisy [0, 2] --supervised [0, 3]: a policy "
         "gradient needs a density at every supervised step, so noise"),
        ("--objective pg --match branches --guidance 2",
         "--objective pg --match branches: the density is of the guided output, not of its "
         "branches"),
        ("--match fold",
         "--match fold --guidance 1: without guidance there is one branch, nothing to "
         "match or fold"),
        ("--step-reward sampled", "--step-reward sampled --credit step: are for --objective pg"),
        ("--objective pg --credit future --one",
         "--credit future --one True --supervised [1, 3]: there are no later supervised "
         "steps to credit"),
        ("--objective pg --credit future --supervised 1 2",
         "--credit future --one False --supervised [1, 2]: there are no later supervised "
         "steps to credit"),
        ("--objective released --drop-equal --group 4",
         "--drop-equal --objective released: its loss of an image is a mean over the whole "
         "micro-batch, so dropped images would still count"),
        ("--kl-scale 2", "--kl-scale 2.0 --objective kl: is for --objective mixed"),
        ("--clip 0.2",
         "--clip 0.2 --objective kl: there is no ratio to clip; is for pg, released, mixed"),
        ("--reward ocr ocr ocr ocr",
         "--reward ocr ocr ocr ocr: no image is scored here; it is for --objective mixed "
         "and --drop-equal"),
        ("--drop-equal --group 1",
         "--group 1: rewards are compared within a prompt, so at least 2 images are needed"),
        ("--states teacher --objective pg",
         "--states teacher --objective pg --match guided --drop-equal False: states of "
         "others have no ratio, no reward and no branches of the student"),
        ("--supervised 3 9",
         "--supervised [3, 9]: expected FROM TO with 0 <= FROM < TO <= --steps 4"),
        ("--rollout cps --a 1.5",
         "--a 1.5 --rollout cps: expected 1 or less; std = t_next sin(a pi / 2), and at 1 "
         "all noise is new"),
        ("--rollout cps --noisy 1 2 --supervised 0 4",
         "--rollout cps --supervised [0, 4]: its last step has no noise, so no KL"),
        ("--blend 1",
         "--blend 1.0: the part of the other teachers in the target; expected 0 <= blend < "
         "1"),
        ("--extrapolate 0", "--extrapolate 0.0: expected a finite number greater than 0"),
        ("--extrapolate inf", "--extrapolate inf: expected a finite number of 0 or more"),
        ("--model nowhere.safetensors",
         "--model nowhere.safetensors: no such file or folder; expected a safetensors file "
         "(the tiny world's or SD3.5's), SD3.5's published folder, or its name on the hub"),
        ("--model text.txt",
         "text.txt: expected a safetensors file, got another or a damaged one (ValueError "
         "..."),
    ],
    "train_sft.py": [
        ("--samples 0", "--samples 0: expected a finite number greater than 0"),
        ("--samples 99999999999", "--samples 99999999999: expected at most 1000000"),
        ("--drop 1", "--drop 1.0: expected 0 <= drop < 1"),
        ("--times x", "argument --times: invalid choice: 'x' (choose ..."),
        ("--batch 0", "--batch 0: expected a finite number greater than 0"),
        ("--lora-r 0", "--lora-r 0: expected a finite number greater than 0"),
        ("--init merge --lora-r 4",
         "--lora-r 4 --lora-alpha None: are for a new adapter; with --init merge --full "
         "False there is none whose rank can be chosen"),
        ("--ratio geneval=-1 ocr=1 preference=1 quality=0",
         "--ratio geneval=-1: expected TASK=N with one of the tasks (geneval, ocr, "
         "preference, quality), each at most once, and a whole number of 0 or more"),
        ("--teachers ckpt/quality.pt",
         "no prompt is routed to quality by default; expected shares: --ratio quality=1"),
        ("--name .",
         "--name '.': expected the name of a folder in runs/, without slashes, and without "
         "dots or spaces at its ends"),
    ],
    "eval.py": [
        ("--ckpts nowhere.pt", "nowhere.pt: no such file"),
        ("--ckpts base base", "--ckpts base: a second model called 'base'; write LABEL=base"),
        ("--ckpts", "argument --ckpts: expected at least one argument"),
        ("--also", "argument --also: expected at least one argument"),
        ("--also beauty",
         "reward 'geneval_benchmark,beauty,geneval_strict': got 'beauty', expected one of "
         "..."),
        ("--tasks dance",
         "--tasks dance: expected some of geneval, ocr, preference, quality, each once"),
        ("--tasks ocr ocr",
         "--tasks ocr: expected some of geneval, ocr, preference, quality, each once"),
        ("--score ocr",
         "--score ocr: expected TASK=REWARD, each task once; tasks are geneval, ocr, "
         "preference, quality, rewards ..."),
        ("--score ocr=beauty",
         "--score ocr=beauty: expected TASK=REWARD, each task once; tasks are geneval, "
         "ocr, preference, quality, rewards ..."),
        ("--rows 3", "--rows 3: expected at least one a task (4), at most --per-task 600"),
        ("--per-task 4 --rows 4",
         "--per-task 4: expected at least 12 images a task, a multiple of the 1 rank(s)"),
        ("--per-task 1000000000", "--per-task 1000000000: expected at most 100000"),
        ("--each 5", "--each 5 --layout numbers: are for pictures of --prompt or --prompt-file"),
        ("--out .", "--out '.': expected the start of file names, such as runs/eval"),
        ("--out text.txt/new", "text.txt: HERE/text.txt is a file, expected a folder"),
        ('--prompt "a red bird" --out text.txt',
         "text.txt: HERE/text.txt is a file, expected a folder"),
        ('--prompt "a red bird" --tasks ocr',
         "--tasks, --score and --diversity: are for an evaluation; with --prompt or "
         "--prompt-file only pictures are drawn"),
        ('--prompt "a_b" --layout compbench',
         "--layout compbench: prompt 'a_b' cannot be a file's name there: expected no '/' "
         "or '_', and at most 230 bytes"),
        ('--prompt "a red bird" --ckpts ..=base',
         "--ckpts ..=...: expected a label that can be a folder's name"),
        ("--prompt-file nowhere.txt", "nowhere.txt: no such file"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16' (choose ..."),
    ],
    "worlds.tiny_base": [
        ("--steps 0", "--steps 0: expected a finite number greater than 0"),
        ("--depth -1", "--depth -1: expected a finite number of 0 or more"),
        ("--depth 0", "--depth 0: expected a finite number greater than 0"),
        ("--width 33", "--width 33: expected a multiple of 32, the width of a head"),
        ("--width 100000000", "--width 100000000: expected at most 16384"),
        ("--pool 100", "--batch 128 and --pool 100: expected multiples of 1 and 256 with 1 ranks"),
        ("--vae-steps 0", "--vae-steps 0: expected a finite number greater than 0"),
        ("--dropout nan", "--dropout nan: expected a finite number of 0 or more"),
        ("--dropout 1.5", "--dropout 1.5: a part of the captions; expected 0 <= dropout < 1"),
        ("--lr 1e300", "--lr 1e+300: expected at most 10"),
        ("--seed -1", "--seed -1: expected a finite number of 0 or more"),
        ("--out folder", "folder: is a folder, expected the name of a file to write"),
        ("--out text.txt/new.safetensors", "text.txt: HERE/text.txt is a file, expected a folder"),
        ("--folder text.txt", "text.txt: HERE/text.txt is a file, expected a folder"),
        ("--show picture.jpg", "--show picture.jpg: expected a name that ends in .png"),
    ],
    "checkpoints": [
        ("--out folder --to pt", "folder: is a folder, expected the name of a file to write"),
        ("--out text.txt", "text.txt: HERE/text.txt is a file, expected a folder"),
        ("--out text.txt/new.pt --to pt", "text.txt: HERE/text.txt is a file, expected a folder"),
        ("--out ckpt/tiny.safetensors --to merged",
         "--out ckpt/tiny.safetensors: is the base itself; expected another file"),
        ("--weights 1 2",
         "--weights 1.0 2.0: expected 1 finite numbers above 0, one for each checkpoint"),
        ("--weights nan", "--weights nan: expected a finite number of 0 or more"),
        ("--anchor",
         "--anchor --to peft: this form cannot hold the mark; expected --to pt or merged"),
        ("--task geneval", "geneval=ckpt/ocr.pt: is called 'geneval', but was trained on 'ocr'"),
        ("--to onnx", "argument --to: invalid choice: 'onnx' (choose ..."),
        ("--model nowhere",
         "--model nowhere: no such file or folder; expected a safetensors file (the tiny "
         "world's or SD3.5's), SD3.5's published folder, or its name on the hub"),
    ],
    "scorers": [
        ("--world mars", "world 'mars': expected one of tiny, sd3"),
        ("--batch 0", "--batch 0: expected a finite number greater than 0"),
        ("--out folder", "folder: is a folder, expected the name of a file to write"),
        ("--out text.txt/x", "text.txt: HERE/text.txt is a file, expected a folder"),
        ("--device abacus", "--device abacus: expected auto, cuda, mps or cpu (choose ..."),
    ],
    "experiments.bench": [
        ("--parts fly", "--parts fly: expected some of ..."),
        ("--widths 3", "--widths 3: expected some of ..."),
        ("--threads -1", "--threads -1: expected a finite number of 0 or more"),
    ],
    "experiments.fullsize": [
        ("--parts fly", "--parts fly: expected some of load, step, opd, rewards"),
        ("--parts rewards load",
         "--parts rewards load: rewards are measured alone, into a file of their own; expected "
         "--parts rewards, or parts without it"),
        ("--names pickscore", "--names pickscore: is for --parts rewards"),
        ("--size 33", "--size 33: expected a multiple of 16, at most 6144"),
        ("--threads -1", "--threads -1: expected a finite number of 0 or more"),
        ("--out folder", "folder: is a folder, expected the name of a file to write"),
    ],
    "experiments.reproduce": [
        ("--parts fly",
         "--parts fly: expected some of teachers, main, seesaw, objectives, states, mar, cold, "
         "targets, controls, early, curves"),
        ("--only fly", "--only fly: expected some of ..."),
        ("--ranks 3", "--ranks 3: expected 1 or 2, which divide the batches of the tiny world"),
        ("--seeds -1", "--seeds -1: expected a finite number of 0 or more"),
        ("--seeds", "argument --seeds: expected at least one argument"),
        ("--seeds 0 0", "--seeds 0 0: expected each seed once"),
        ("--out text.txt", "text.txt: HERE/text.txt is a file, expected a folder"),
    ],
    "experiments.kills": [
        ("--stages fly", "--stages fly: expected some of grpo, opd, sft, base"),
        ("--soak nan", "--soak nan: expected a finite number of 0 or more"),
        ("--trials -1", "--trials -1: expected a finite number of 0 or more"),
        ("--ranks", "argument --ranks: expected at least one argument"),
        ("--ranks 1 0", "--ranks 0: expected 1 or more ranks a run"),
        ("--jobs 0", "--jobs 0: expected a finite number greater than 0"),
    ],
}
ROWS = [(script, *row) for script, rows in BAD.items() for row in rows]


# ------------------------------------------------------------------ the page


def command(script):
    """How a script is started, with the options that the bad ones are added to."""
    start = script if script.endswith(".py") else f"python -m {script}"
    return f"{start} {SCRIPTS[script][1]}".strip()


TOP = """# Bad input

What {n} wrong command lines get. Each ends with one line and exit code 2, before anything is drawn,
trained or written. The options in a table are added to the command above it. Of an option that is
given twice, the last one counts. `...` stands for a long list, or for what depends on the machine.
HERE is the current folder, BASE the fingerprint of the shipped base. tests/test_bad_input.py has
the table, makes this page, and checks each line."""


def page():
    """The text of docs/bad-input.md."""
    lines = [TOP.format(n=len(ROWS))]
    for script, rows in BAD.items():
        lines += ["", f"## {script}", "", f"`{command(script)}`", "", "| and | gets |", "|---|---|"]
        for options, message in rows:
            lines.append(f"| `{options}` | {message.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_the_table():
    assert (ROOT / "docs/bad-input.md").read_text(encoding="utf-8") == page()


# ------------------------------------------------------------------ the messages


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def bad_files(here):
    """Files that are no teachers, or none that fits, beside the shipped ones."""
    shutil.copytree(ROOT / "ckpt", here / "ckpt")
    (here / "folder").mkdir()
    (here / "images").mkdir()
    Image.new("RGB", (32, 32)).save(here / "images/0.png")
    (here / "prompts.txt").write_text("a cat\n")
    (here / "text.txt").write_text("hello\n")
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


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("bad")
    bad_files(here)
    return here


def refusal(script, options, capsys):
    """What a command line gets: the message of a ValueError, or that of argparse."""
    module, given, positional = SCRIPTS[script]
    how = {"positional": positional}
    if hasattr(module, "PRESETS"):
        how["presets"] = presets(module.PRESETS)
    try:
        module.main(cli.parse(module.Config, shlex.split(f"{given} {options}"), **how))
    except ValueError as error:
        return str(error)
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err.partition("error: ")[2].strip()
    raise AssertionError("accepted")


@functools.cache
def base_fingerprint():
    return worlds.load(BASE).fingerprint


# What takes time: a script comes to one of these when it has accepted its input.
SLOW = [(sampler.Sampler, "rollout"), (evaluation, "draw"),
        (train_grpo, "draw_noise"), (train_opd, "draw_noise"), (train_sft, "sample"),
        (tiny_base, "make_vae"), (tiny_base, "pictures"), (convert, "write_peft"),
        (convert, "save_whole"), (convert, "save_adapter"), (score_folder, "score_files"),
        (bench, "measure"), (fullsize, "bench_model"), (fullsize, "bench_rewards"),
        (reproduce, "run_all"), (kills, "run_trials"), (kills, "soak")]


@pytest.mark.parametrize("script, options, message", ROWS,
                         ids=[f"{script} {options}" for script, options, _ in ROWS])
def test_bad_input_is_one_clear_line_before_any_time_is_spent(bad_folder, monkeypatch, capsys,
                                                              script, options, message):
    def slow(*args, **kwargs):
        raise AssertionError("the input was accepted")

    for owner, name in SLOW:
        monkeypatch.setattr(owner, name, slow)
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(scorers, "LOADED", {})
    monkeypatch.delenv("UNIFIEDREWARD_URL", raising=False)
    before = set(bad_folder.rglob("*"))
    got = refusal(script, options, capsys).replace(str(bad_folder), "HERE")
    got = got.replace(base_fingerprint(), "BASE")
    assert "\n" not in got
    if message.endswith("..."):
        assert got.startswith(message.removesuffix("...").rstrip())
    else:
        assert got == message
    assert set(bad_folder.rglob("*")) == before         # nothing was written, no code was run


def test_no_option_of_a_list_may_stand_alone(capsys):
    for options in ("--also", "--ckpts --steps 3"):
        assert refusal("eval.py", options, capsys).endswith("expected at least one argument")


def test_a_plot_without_matplotlib_is_refused(here, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "find_spec", lambda name: None)
    assert refusal("experiments.reproduce", "--plot", capsys) == (
        "--plot: needs matplotlib; pip install matplotlib")


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


if __name__ == "__main__":
    print(page(), end="")
