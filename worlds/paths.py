"""Where the file of a --model is: here, in a folder, or on the hub."""
from pathlib import Path

from plumbing.files import first_line


def find(path, text_encoders=True):
    """The safetensors file that a --model means.

    It is the path itself, the file in SD3.5's published folder, or a file on the hub. A file on the
    hub is downloaded. The text encoders are downloaded too, if text_encoders is true.
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


def fetch(name, text_encoders):
    """The folder of a model on the hub, "organisation/model", downloaded to this machine."""
    path = Path(name)
    if path.is_absolute() or len(path.parts) != 2 or path.suffix == ".safetensors":
        raise ValueError(f"--model {name}: no such file or folder; expected a safetensors file "
                         "(the tiny world's or SD3.5's), SD3.5's published folder, or its name "
                         "on the hub")
    from huggingface_hub import snapshot_download
    wanted = ["sd3*.safetensors"]
    if text_encoders:
        wanted += ["text_encoder*/*", "tokenizer*/*"]
    superfluous = ["text_encoders/*", "*_incl_*", "*.fp16*"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted,
                                      ignore_patterns=superfluous))
    # The hub's client raises many types: no network, no such model, licence not accepted, ...
    except Exception as error:
        why = first_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"--model {name}: is no file or folder here, and the hub did not give "
                         f"it: {why}") from None
