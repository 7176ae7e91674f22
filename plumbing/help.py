"""--help in a moment: a script imports this first, before torch, which takes two seconds.

Asked for --help, this runs only those lines of the script that its help is made of: the class
Config, PRESETS, and the last lines, which parse. They may use dataclasses, typing and worlds. If
they need more, nothing happens here, and the help comes after all imports.
"""
import ast
import sys
from pathlib import Path

from plumbing import cli

LIGHT = ("dataclasses", "typing", "worlds")              # modules that import no torch


def makes_help(node):
    """Is this top-level statement of a script one of those that its help is made of?"""
    if isinstance(node, ast.ImportFrom):
        return node.module in LIGHT
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "PRESETS"
    if isinstance(node, ast.ClassDef):
        return node.name == "Config"
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def answer(script, argv):
    """Print the help of a script, a module that is being imported, and exit, if argv asks for it.

    Nothing happens if the script does not import this module itself.
    """
    if not {"-h", "--help"} & set(argv):
        return
    body = ast.parse(Path(script.__file__).read_text()).body
    if "import plumbing.help" not in map(ast.unparse, body):
        return
    lines = ast.Module([node for node in body if makes_help(node)], type_ignores=[])
    vars(script).update(cli=cli, main=None)              # main is never called
    try:
        exec(compile(lines, script.__file__, "exec"), vars(script))
    except NameError:
        pass


if hasattr(sys.modules["__main__"], "__file__"):
    answer(sys.modules["__main__"], sys.argv[1:])


def quiet(kind, error, traceback):
    """Ctrl-C while a script imports is one line, as plumbing.cli.run makes it later."""
    if kind is KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = quiet
