"""The pages say what is there: links, commands, options, sizes, generated tables, examples."""
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sampler
from plumbing import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXT = {name: page.read_text(encoding="utf-8") for name, page in zip(NAMES, PAGES)}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# [text](target), and ![text](target)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")


def prose(name):
    """A page without its blocks of code."""
    return FENCE.sub("", TEXT[name])


def blocks(name, language=""):
    return [code for kind, code in FENCE.findall(TEXT[name]) if kind == language]


def anchors(name):
    """What GitHub makes of the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(name), re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(kept.replace(" ", "-"))
    return found


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_resolve(name):
    for target in LINK.findall(prose(name)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            page = str(file.resolve().relative_to(ROOT))
            assert anchor in anchors(page), f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_the_tree_exist(name):
    rooms = "worlds|scorers|checkpoints|experiments|plumbing|tests|docs|results"
    for span in SPAN.findall(prose(name)):
        shown = re.fullmatch(rf"(?:{rooms})/[\w./-]*", span)
        example = re.search(r"[A-Z]{2}", span) or span == "results/mine"
        if shown and not example:
            assert (ROOT / span).exists(), f"{name}: `{span}`"


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_the_sampler_exist(name):
    for function in re.findall(r"\bsampler\.(\w+)", TEXT[name]):
        if function != "py":
            assert hasattr(sampler, function), f"{name}: sampler.{function}"


# ------------------------------------------------------------------ commands


def spoken(name):
    """The lines of a page that may be commands: of its blocks, and the code in its text."""
    for code in blocks(name):
        yield from code.replace("\\\n", " ").splitlines()
    yield from SPAN.findall(prose(name))


def our_command(line):
    """A line of a shell -> the script or module of ours that it runs, and its arguments."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:                                  # a quote in prose
        return None
    if not words:
        return None
    for n, word in enumerate(words):
        if word == "-m" and n and words[n - 1] == "python" and words[n + 1:]:
            return words[n + 1], words[n + 2:]
        launched = words[0] in ("python", "torchrun", "OMP_NUM_THREADS=1")
        bare = n == 0 and words[1:2] and words[1].startswith("--")      # `eval.py --split train`
        if word.endswith(".py") and (launched or bare):
            return word, words[n + 1:]
    return None


def commands():
    """script or module -> [(page, arguments)], every use of it on a page."""
    found = {}
    for name in NAMES:
        for line in spoken(name):
            command = our_command(line)
            if command and command[0] != "pytest":
                script, arguments = command
                found.setdefault(script, []).append((name, arguments))
    return found


@pytest.mark.parametrize("script", sorted(commands()))
def test_commands_are_parsed(script, monkeypatch):
    bad = []
    calls = []

    def run(main, cls, presets=None, positional=()):
        calls.append(cls)
        for name, arguments in commands()[script]:
            try:
                cli.parse(cls, arguments, presets, positional)
            except SystemExit as end:
                if end.code:                            # --help ends with 0
                    bad.append((name, arguments))

    monkeypatch.setattr(cli, "run", run)
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    assert len(calls) == 1 and not bad


def test_targets_of_make_exist():
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in NAMES:
        for line in spoken(name):
            found = re.match(r"make ((?:[a-z]+ ?)+)", line)
            if found:
                assert set(found[1].split()) <= made, f"{name}: {line}"


# ------------------------------------------------------------------ the README, the tables


def test_readme_is_one_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    assert readme.stat().st_size <= 10_000


def test_readme_shows_its_picture_and_says_what_was_never_run_before_the_commands():
    readme = TEXT["README.md"]
    assert readme.index("results/demo.png") < 1000
    assert readme.index("never run on real weights or a GPU") < readme.index("--model $M")


def test_tables_are_the_generated_ones():
    from experiments.tables import make_tables
    made = make_tables(str(ROOT / "results" / "reproduce"))
    page = TEXT["docs/results.md"]
    whole = (ROOT / "results" / "reproduce.md").read_text()
    for name, table in made.items():
        assert table in whole, name
        if name != "unseen-variants":                       # too long for the page
            assert f"<!-- reproduce: {name} -->\n{table}\n<!-- end -->" in page, name


# ------------------------------------------------------------------ the README's examples


def example(word):
    (code,) = [code for code in blocks("README.md", "python") if word in code]
    return code


def test_the_readmes_reward_is_one(monkeypatch):
    import rewards
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    exec(example("brightness"), vars(rewards))
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    world = SimpleNamespace(read=None, quality=None, preference=None)
    scored = rewards.score({"brightness": 1.0}, images, [{}, {}], world)
    assert scored["total"].tolist() == [0.0, 0.5]
    del rewards.brightness


def test_the_readmes_objective_is_one():
    more = eval("{" + example("huber") + "}", {"torch": torch})
    s = SimpleNamespace(v_target=torch.zeros(2, 1, 2, 2))
    loss = more["huber"](torch.tensor([0.5, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2), s, None)
    assert loss.tolist() == [0.125, 2.5]
