"""The worlds a model can live in, and how a --model tells which one it is."""
import importlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

# name -> "module.Class". The module is imported only when its world is asked for.
WORLDS = {"tiny": "worlds.tiny.Tiny", "sd3": "worlds.sd3.SD3"}


def world_name(path):
    """The name of a --model's world: "world" in the file's metadata, or "sd3" without it.

    path: a safetensors file, SD3.5's published folder, or its name on the hub. Everything that is
    no file here counts as sd3. So --help works, and worlds/paths.py reports a wrong path later.
    """
    if not Path(path).is_file():
        return "sd3"
    try:
        file = safe_open(path, "numpy")
    except (OSError, SafetensorError):
        # It is not imported at the top, because it imports torch (see plumbing/help.py).
        from plumbing.files import open_tensors
        file = open_tensors(path)                       # this says what is wrong with the file
    name = (file.metadata() or {}).get("world", "sd3")
    check_name(name, f"{path}: ")
    return name


def check_name(name, where=""):
    if name not in WORLDS:
        raise ValueError(f"{where}world '{name}': expected one of {', '.join(WORLDS)}")


def world_class(name):
    check_name(name)
    module, cls = WORLDS[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)


def open_world(model, prompts=()):
    """The World of a --model, with the prompt folders of --prompts."""
    return world_class(world_name(model))(prompts)


def load(model, *args, **options):
    """The Model at a path. The other arguments go to World.load."""
    return open_world(model).load(model, *args, **options)


def presets(table):
    """Make the function that cli.run needs: it maps a --model to the defaults of its world.

    table: {world: {option: default}}.
    """
    return lambda model: table.get(world_name(model), {})
