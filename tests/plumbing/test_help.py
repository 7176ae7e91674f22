"""Facts about plumbing/help.py: --help is there before torch is imported."""
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = [["train_opd.py"], ["train_grpo.py"], ["train_sft.py"], ["eval.py"],
           ["-m", "worlds.tiny_base"], ["-m", "checkpoints"]]


def without_torch(folder, *argv, cwd=ROOT):
    """Run Python where torch cannot be imported: a broken torch.py is found before it."""
    (folder / "torch.py").write_text("raise ImportError('torch is imported')\n")
    env = {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[-1])
def test_help_needs_no_torch(tmp_path, script):
    done = without_torch(tmp_path, *script, "--help")
    assert done.returncode == 0 and not done.stderr
    module = script[-1].removesuffix(".py")
    path = ROOT / f"{module.replace('.', '/')}.py"
    source = (path if path.is_file() else ROOT / module / "__main__.py").read_text()
    options = source.split("class Config:")[1].split("\n\n\n")[0]
    names = [line.split(":")[0].strip() for line in options.splitlines()
             if ": " in line and not line.strip().startswith("#")]
    assert len(names) > 3
    for name in names:
        assert name in done.stdout or f"--{name.replace('_', '-')}" in done.stdout


def test_the_defaults_of_the_help_are_those_of_the_model(tmp_path):
    tiny = without_torch(tmp_path, "train_opd.py", "--help")
    medium = without_torch(tmp_path, "train_opd.py", "--help", "--model", "SD3.5")
    assert "(default: 96)" in tiny.stdout and "(default: 96)" not in medium.stdout


def test_without_help_torch_is_imported(tmp_path):
    done = without_torch(tmp_path, "train_opd.py")
    assert done.returncode == 1 and "torch is imported" in done.stderr


def test_help_of_a_script_that_needs_more_comes_after_all_imports(tmp_path):
    (tmp_path / "heavy.py").write_text("STEPS = 7\n")
    (tmp_path / "script.py").write_text('''"""A script."""
import plumbing.help
from dataclasses import dataclass
from plumbing import cli
from heavy import STEPS

@dataclass
class Config:
    # Steps.
    steps: int = STEPS

if __name__ == "__main__":
    cli.run(None, Config)
''')
    done = without_torch(tmp_path, "script.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "(default: 7)" in done.stdout


def test_a_script_that_does_not_ask_for_it_is_left_alone(tmp_path, monkeypatch):
    script = tmp_path / "other.py"
    script.write_text("class Config:\n    pass\n\nif __name__ == '__main__':\n    1 / 0\n")
    from plumbing import help
    module = type(cli)("other")
    module.__file__ = str(script)
    help.answer(module, ["--help"])
    assert not hasattr(module, "Config")
