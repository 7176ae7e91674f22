"""The worlds a model can live in, and how a --model tells which one it is."""
import importlib
from pathlib import Path

from plumbing.files import first_line, open_tensors

# name -> its class. A world is imported when it is asked for.
WORLDS = {"tiny": "worlds.tiny.Tiny", "sd3": "worlds.sd3.SD3"}


def world_name(path):
    """The world of a --model: the one that the file's metadata name, else Stable Diffusion 3's.

    path: a safetensors file, SD3.5's published folder, or its name on the hub. Nothing is said of
    a path that does not exist, so that --help works; find does that.
    """
    if not Path(path).is_file():
        return "sd3"
    with open_tensors(path) as file:
        name = (file.metadata() or {}).get("world", "sd3")
    if name not in WORLDS:
        raise ValueError(f"{path}: is of the world '{name}', expected one of {', '.join(WORLDS)}")
    return name


def world_class(name):
    if name not in WORLDS:
        raise ValueError(f"world '{name}': expected one of {', '.join(WORLDS)}")
    module, cls = WORLDS[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)


def open_world(model, prompts=()):
    """The World of a --model, with the prompt folders of --prompts."""
    return world_class(world_name(model))(prompts)


def load(model, *args, **options):
    """A Model by its path alone. The other arguments are those of World.load."""
    return open_world(model).load(model, *args, **options)


def presets(table):
    """For cli.run: {world: {option: default}} -> the function from --model to its defaults."""
    return lambda model: table.get(world_name(model), {})


# ------------------------------------------------------------------ the file of a --model


def find(path, text_encoders=""):
    """The safetensors file that a --model means.

    It is the path itself, the file in SD3.5's published folder, or the hub's. The hub's is fetched,
    and with it the text encoders, unless a folder of text_encoders is given.
    """
    folder = Path(path)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        folder = fetch(path, text_encoders)
    files = sorted(file for file in folder.glob("sd3*.safetensors") if "_incl_" not in file.name)
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: has {names or 'no sd3*.safetensors'}, expected one file with "
                         "transformer and VAE, e.g. sd3.5_medium.safetensors")
    return files[0]


def fetch(name, text_encoders=""):
    """The folder of a model on the hub, "organisation/model", brought to this machine."""
    path = Path(name)
    if path.is_absolute() or len(path.parts) != 2 or path.suffix == ".safetensors":
        raise ValueError(f"--model {name}: no such file or folder; expected a safetensors file "
                         "(the tiny world's or SD3.5's), SD3.5's published folder, or its name "
                         "on the hub")
    from huggingface_hub import snapshot_download
    wanted = ["sd3*.safetensors"]
    if not text_encoders:
        wanted += ["text_encoder*/*", "tokenizer*/*"]
    superfluous = ["text_encoders/*", "*_incl_*", "*.fp16*"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted,
                                      ignore_patterns=superfluous))
    except Exception as error:       # no network, no such model, licence not accepted, ...
        why = first_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"--model {name}: is no file or folder here, and the hub did not give "
                         f"it: {why}") from None
