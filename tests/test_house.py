"""The house: rooms whose imports go one way, narrow lines, one place for each dangerous call."""
import ast
import difflib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rewards
import train_grpo
import train_opd
import worlds
from plumbing import cli

ROOT = Path(__file__).parent.parent
# A room may import from any room to its right. A module of scripts is one that is run.
ROOMS = ["scripts", "checkpoints", "watch", "rewards", "worlds", "scorers", "sampler", "model",
         "plumbing"]
SCRIPTS = {"train_grpo", "train_opd", "train_sft", "eval", "worlds.tiny_base",
           "checkpoints.__main__", "scorers.__main__"}
WIDEST = 100


def all_files():
    """Every .py file of the project, as a path from its root."""
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in files if path.parts[0] not in (".venv", "runs"))


def source_files():
    return [path for path in all_files() if path.parts[0] != "tests"]


def module_name(path):
    """"checkpoints/formats.py" -> "checkpoints.formats"; a package has the name of its folder."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {module_name(path): path for path in source_files()}


def tree_of(path):
    return ast.parse((ROOT / path).read_text())


# ------------------------------------------------------------------ who imports whom


def first_text(node):
    """The first argument of a call, if it is a literal string."""
    if node.args and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return ""


def named_in(node):
    """The modules that one node of a source imports by name, the project's and others."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        # "from worlds import tiny" imports a module; "from worlds import load" uses the package.
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in names]
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func)
        if function in ("importlib.import_module", "import_module"):
            return [first_text(node)]
        if function == "scorers.get":                    # scorers.get("clip.HPSv2", device)
            return ["scorers." + first_text(node).split(".")[0]]
    return []


def imports_in(tree, importer=""):
    """The project's modules that a source imports, at its top or inside a function.

    With a module Python imports the packages that it lies in. They count too, but not those that
    the importer lies in: they are there already.
    """
    found = set()
    for node in ast.walk(tree):
        for name in named_in(node):
            found.add(name)
            parts = name.split(".")
            for n in range(1, len(parts)):
                package = ".".join(parts[:n])
                if not importer.startswith(package + "."):
                    found.add(package)
    return found & MODULES.keys()


def graph():
    """module -> the modules that it imports, lazily or not."""
    edges = {}
    for name, path in MODULES.items():
        edges[name] = imports_in(tree_of(path), importer=name) - {name}
    # What is imported by a name that a table holds, or a caller gives.
    edges["worlds"] |= {place.rsplit(".", 1)[0] for place in worlds.WORLDS.values()}
    for reward in rewards.REWARDS.values():
        if reward.where:
            edges["rewards"].add("scorers." + reward.where.split(".")[0])
    for name in MODULES.keys() - SCRIPTS:
        if name.startswith("scorers."):
            edges["scorers"].add(name)
    return edges


def room_of(name):
    if name in SCRIPTS or name.split(".")[0] == "experiments":
        return "scripts"
    return name.split(".")[0]


def test_every_module_is_in_a_room():
    assert {room_of(name) for name in MODULES} == set(ROOMS)


def test_no_import_goes_round_in_a_circle():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_go_from_a_room_to_those_on_its_right():
    wrong = []
    for name, imported in graph().items():
        for other in sorted(imported):
            here = ROOMS.index(room_of(name))
            there = ROOMS.index(room_of(other))
            if there < here:
                wrong.append(f"{name} ({ROOMS[here]}) imports {other} ({ROOMS[there]})")
    assert not wrong


def test_the_graph_sees_lazy_imports():
    source = """
def f():
    from plumbing import cli
    from scorers import offload
    import os, sampler
    importlib.import_module("worlds.tiny")
    scorers.get("clip.PickScore", device)
"""
    found = imports_in(ast.parse(source))
    assert found == {"plumbing", "plumbing.cli", "sampler", "scorers", "scorers.clip", "worlds",
                     "worlds.tiny"}
    inside = imports_in(ast.parse(source), importer="scorers.ocr")
    assert "scorers" in inside, "it uses a name of the package"
    edges = graph()
    assert {"worlds.tiny", "worlds.sd3"} <= edges["worlds"]
    assert "scorers.deqa" in edges["rewards"]
    assert {"scorers.geneval", "scorers.ocr"} <= edges["worlds.sd3"]


@pytest.mark.parametrize("name", ["train_grpo", "train_opd", "train_sft", "eval"])
def test_nobody_imports_a_script(name):
    importers = [other for other, imported in graph().items() if name in imported]
    assert all(other.startswith("experiments.") for other in importers)


# ------------------------------------------------------------------ lines


@pytest.mark.parametrize("path", all_files(), ids=str)
def test_no_line_is_wider_than_100_columns(path):
    lines = (ROOT / path).read_text().splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDEST]
    assert not wide


# ------------------------------------------------------------------ the two stages


def loop_of(name):
    """The lines of a script's training loop."""
    source = (ROOT / name).read_text()
    start = source.index("    for it in tqdm(")
    end = source.index("    out = save", start)
    return source[start:end].splitlines()


def test_the_two_loops_differ_by_little():
    changes = list(difflib.ndiff(loop_of("train_grpo.py"), loop_of("train_opd.py")))
    for sign in ("- ", "+ "):
        changed = [line for line in changes if line.startswith(sign)]
        assert 0 < len(changed) <= 40


def test_the_options_that_both_stages_have_stand_in_the_same_places():
    grpo = cli.field_docs(train_grpo.Config)
    opd = cli.field_docs(train_opd.Config)
    shared = [option for option in grpo if option in opd]
    assert len(shared) > 20
    assert shared == [option for option in opd if option in grpo]
    for option in shared:
        # What is trained is the policy in stage 1 and the student in stage 2.
        groups = grpo[option][0], opd[option][0].replace("student", "policy")
        assert groups[0] == groups[1], option


# ------------------------------------------------------------------ files


# module -> its functions that only plumbing/files.py may use.
RESERVED = {"torch": {"load", "save"}, "os": {"replace", "rename"},
            "safetensors.torch": {"save_file"}}


def reserved_names(tree):
    """The reserved functions that a source names, as "torch.load" or by an import."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            for module, names in RESERVED.items():
                if node.attr in names and ast.unparse(node.value) == module:
                    found.add(f"{module}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in RESERVED.get(node.module, ()):
                    found.add(f"{node.module}.{alias.name}")
    return found


def test_only_plumbing_reads_pickles_and_writes_and_renames_files():
    for path in source_files():
        found = reserved_names(tree_of(path))
        if path == Path("plumbing/files.py"):
            assert {"torch.load", "os.replace", "safetensors.torch.save_file"} <= found
        else:
            assert not found, path
