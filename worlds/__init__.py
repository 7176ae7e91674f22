"""The worlds a model can live in, and how a --model tells which one it is."""
import importlib
from pathlib import Path

from plumbing.files import open_tensors

# name -> its class. A world is imported when it is asked for.
WORLDS = {"tiny": "worlds.tiny.Tiny", "sd3": "worlds.sd3.SD3"}


def world_name(path):
    """The world of a --model: the one that the file's metadata name, else Stable Diffusion 3's.

    path: a safetensors file, SD3.5's published folder, or its name on the hub. A path that does not
    exist counts as sd3, so that --help works. worlds/paths.py reports it later.
    """
    if not Path(path).is_file():
        return "sd3"
    with open_tensors(path) as file:
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
    """This gives cli.run a function from --model to its defaults.

    table: {world: {option: default}}.
    """
    return lambda model: table.get(world_name(model), {})
