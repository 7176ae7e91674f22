"""Every option is read and documented, and only the declared packages are imported."""
import ast
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

import sampler
import watch
from checkpoints import cold_start
from plumbing import cli

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_grpo", "train_opd", "train_sft", "eval", "worlds.tiny_base",
           "checkpoints.__main__", "scorers.__main__", "experiments.reproduce",
           "experiments.bench", "experiments.fullsize", "experiments.released_loop",
           "experiments.plot_log"]


def options_read(script):
    """The names that the source takes from cfg or self.cfg."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(script))):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
            if owner == "cfg":
                names.add(node.attr)
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_read_and_documented(name):
    script = importlib.import_module(name)
    fields = set(script.Config.__dataclass_fields__)
    # These three take the cfg of a script as it is.
    read = set().union(*map(options_read, (script, sampler, watch, cold_start)))
    assert fields <= read, "an option that nobody reads"
    docs = cli.field_docs(script.Config)
    assert set(docs) == fields
    undocumented = [option for option, (_, comment) in docs.items() if not comment]
    assert not undocumented, "the comment above an option is its --help"


# ------------------------------------------------------------------ imports

# distribution -> the module it brings, where the names differ.
MODULES = {"pillow": "PIL", "opencv-python-headless": "cv2"}
# Packages that a declared one always brings.
BROUGHT = {"huggingface_hub"}                            # transformers


def declared(requirements):
    """["torch==2.13.0"] -> {"torch"}."""
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    return {MODULES.get(name, name) for name in names}


def imported(path):
    """The packages that a file imports: {name: whether at its top}."""
    tree = ast.parse(path.read_text())
    names = {}
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        for module in modules:
            package = module.split(".")[0]
            names[package] = names.get(package, False) or node in tree.body
    return names


def source_files():
    hidden = [".venv", "tests", "runs"]
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return [path for path in files if path.parts[0] not in hidden]


def test_nothing_but_the_declared_packages_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = declared(project["dependencies"]) - {"pytest"} | BROUGHT
    optional = declared(extras["rewards"] + extras["plots"] + extras["oracles"])
    files = source_files()
    own = {path.parts[0].removesuffix(".py") for path in files} | {"mini_sd3"}    # tests/
    assert len(files) > 30
    for path in files:
        names = imported(ROOT / path)
        foreign = set(names) - own - needed - set(sys.stdlib_module_names)
        assert foreign <= optional, path
        at_top = {name for name in foreign if names[name]}
        assert not at_top, f"{path}: stops without what only a part of it needs"
