"""Facts about plumbing/cli.py: a dataclass is the whole command line."""
import errno
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from plumbing import cli

ROOT = Path(__file__).parents[2]


@dataclass
class Config:
    """Options of a test: with a colon, and not a field."""
    # The base, 100% of it.
    model: str = "tiny"

    # --- rollout
    # How many steps: K of them,
    # one after another.
    noisy_steps: int = 8
    # Steps FROM TO.
    noisy: list[int] = field(default_factory=lambda: [0, 5])
    # How noise is added.
    kind: Literal["sde", "cps"] = "sde"

    # --- student
    # Rank.
    lora_r: int | None = None
    # Learning rate.
    lr: float = 1e-3
    # Train the whole.
    full: bool = False
    # Compile it.
    compile: bool = True


def parse(*argv, **how):
    return cli.parse(Config, list(argv), **how)


def help_text(capsys, *argv, **how):
    with pytest.raises(SystemExit) as done:
        parse(*argv, "--help", **how)
    assert done.value.code == 0
    return capsys.readouterr().out


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        parse(*argv)
    assert done.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------ help


def test_the_comment_above_a_field_is_its_help_and_its_group_the_one_opened_last():
    assert cli.field_docs(Config) == {
        "model": ("options", "The base, 100% of it."),
        "noisy_steps": ("rollout", "How many steps: K of them, one after another."),
        "noisy": ("rollout", "Steps FROM TO."),
        "kind": ("rollout", "How noise is added."),
        "lora_r": ("student", "Rank."),
        "lr": ("student", "Learning rate."),
        "full": ("student", "Train the whole."),
        "compile": ("student", "Compile it."),
    }


def test_a_comment_behind_code_or_before_an_empty_line_is_no_help():
    @dataclass
    class Other:
        # Stands alone.

        a: int = 1          # behind code
        b: int = 2

    docs = cli.field_docs(Other)
    assert docs["a"] == ("options", "") and docs["b"] == ("options", "")


def test_help_shows_groups_comments_and_defaults(capsys):
    text = " ".join(help_text(capsys).split())
    assert "Facts about plumbing/cli.py" in text
    assert "The base, 100% of it. (default: tiny)" in text
    assert "How many steps: K of them, one after another. (default: 8)" in text
    assert "(default: [0, 5])" in text and "(default: None)" in text
    groups = [text.index(title) for title in ("options:", "rollout:", "student:")]
    places = [text.index(flag, groups[0]) for flag in ("--model", "--noisy-steps", "--lora-r")]
    order = [groups[0], places[0], groups[1], places[1], groups[2], places[2]]
    assert order == sorted(order)


# ------------------------------------------------------------------ values


def test_without_arguments_every_field_has_its_default():
    assert parse() == Config()
    assert parse().noisy is not parse().noisy


def test_underscores_are_hyphens_on_the_command_line(capsys):
    assert parse("--noisy-steps", "3").noisy_steps == 3
    assert "--noisy_steps" in refusal(capsys, "--noisy_steps", "3")


@pytest.mark.parametrize("argv, name, value", [
    (["--noisy", "1", "2", "3"], "noisy", [1, 2, 3]),
    (["--kind", "cps"], "kind", "cps"),
    (["--lora-r", "4"], "lora_r", 4),
    (["--lr", "1e-4"], "lr", 1e-4),
    (["--full"], "full", True),
    (["--no-full"], "full", False),
    (["--no-compile"], "compile", False),
])
def test_a_field_is_read_in_its_type(argv, name, value):
    got = getattr(parse(*argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv", [
    ["--noisy", "1", "x"], ["--noisy"], ["--kind", "ode"], ["--lora-r", "2.5"],
    ["--lora-r", "None"], ["--full", "yes"], ["--nosuch", "1"], ["stray"],
])
def test_a_value_of_another_type_and_an_unknown_option_are_refused(capsys, argv):
    assert "error:" in refusal(capsys, *argv)


def test_positional_fields_need_no_flag():
    got = cli.parse(Config, ["sd3", "--lr", "2"], positional=["model"])
    assert got.model == "sd3" and got.lr == 2
    assert cli.parse(Config, [], positional=["model"]).model == "tiny"


# ------------------------------------------------------------------ presets


def presets(model):
    return {"noisy_steps": 10, "noisy": [0, 9]} if model == "sd3" else {}


def test_defaults_follow_from_the_model_and_arguments_go_before_them(capsys):
    assert parse(presets=presets) == Config()
    got = parse("--model", "sd3", "--noisy-steps", "4", presets=presets)
    assert got == Config(model="sd3", noisy_steps=4, noisy=[0, 9])
    text = help_text(capsys, "--model=sd3", presets=presets)
    assert "(default: 10)" in " ".join(text.split())


def test_a_preset_of_a_field_that_does_not_exist_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="a preset names a field that does not exist"):
        parse(presets=lambda model: {"stpes": 1})


# ------------------------------------------------------------------ checks


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), -float("inf")])
def test_numbers_must_be_finite_and_not_negative(value):
    message = rf"^--lr {re.escape(str(value))}: expected a finite number of 0 or more$"
    with pytest.raises(ValueError, match=message):
        cli.positive(Config(lr=value))


def test_numbers_that_are_named_must_be_above_0_and_none_is_no_number():
    cli.positive(Config(noisy_steps=0), "lr", "lora_r")
    message = "^--noisy-steps 0: expected a finite number greater than 0$"
    with pytest.raises(ValueError, match=message):
        cli.positive(Config(noisy_steps=0), "lr", "noisy_steps")


SCRIPT = '''
from dataclasses import dataclass
from plumbing import cli

@dataclass
class Config:
    # What.
    word: str = ""

def main(cfg):
    if cfg.word == "interrupt":
        raise KeyboardInterrupt
    if cfg.word.isdigit():
        raise OSError(int(cfg.word), "reason", "runs/x/log.jsonl")
    if cfg.word:
        raise ValueError(f"got {cfg.word}, expected nothing")
    print("done")

if __name__ == "__main__":
    cli.run(main, Config)
'''


@pytest.mark.parametrize("argv, debug, code, out, err", [
    ([], "", 0, "done\n", ""),
    (["--word", "x"], "", 2, "", "error: got x, expected nothing\n"),
    (["--word", "x"], "1", 1, "", "Traceback"),
    (["--word", str(errno.ENOSPC)], "", 2, "",
     f"error: [Errno {errno.ENOSPC}] reason: 'runs/x/log.jsonl'\n"),
    (["--word", "interrupt"], "", 130, "", "stopped by Ctrl-C\n"),
    (["--word", "interrupt"], "1", -2, "", "Traceback"),
], ids=["good", "bad", "debug", "full-disk", "interrupted", "debug-interrupted"])
def test_bad_input_and_a_full_disk_and_ctrl_c_are_one_line(tmp_path, argv, debug, code, out, err):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DEBUG": debug}
    done = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True,
                          env=env)
    assert (done.returncode, done.stdout) == (code, out)
    if debug:
        assert done.stderr.startswith(err)
    else:
        assert done.stderr == err
