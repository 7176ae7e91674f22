"""Where files are: here, or in a repository on the hub, which is then downloaded."""
import re
from pathlib import Path

from plumbing.files import first_line

# ------------------------------------------------------------------ the hub

# "organisation/name", as in jieliu/SD3.5M-FlowGRPO-GenEval. A file's ending is left to the disk.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_ENDINGS = (".pt", ".safetensors", ".txt", ".jsonl")


def on_hub(path):
    """Is this the name of a repository on the hub? What exists here never is."""
    name = str(path)
    is_name = HUB_NAME.fullmatch(name) and not name.endswith(FILE_ENDINGS)
    return bool(is_name) and not Path(path).exists()


def download(name, asked, wanted, unwanted=None, kind="model"):
    """The folder of a repository on the hub, downloaded to this machine.

    asked: what the user wrote, for the error. wanted, unwanted: patterns of files. kind: "model" or
    "dataset". ValueError if there is no network, or the hub does not give it.
    """
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), repo_type=kind, allow_patterns=list(wanted),
                                      ignore_patterns=unwanted))
    # The hub's client raises many types: no network, no such model, licence not accepted, ...
    except Exception as error:
        why = first_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{asked}: is no file or folder here, and the hub did not give it: "
                         f"{why}") from None


# ------------------------------------------------------------------ the file of a --model


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
    if not on_hub(name):
        raise ValueError(f"--model {name}: no such file or folder; expected a safetensors file "
                         "(the tiny world's or SD3.5's), SD3.5's published folder, or its name "
                         "on the hub")
    wanted = ["sd3*.safetensors"]
    if text_encoders:
        wanted += ["text_encoder*/*", "tokenizer*/*"]
    superfluous = ["text_encoders/*", "*_incl_*", "*.fp16*"]
    return download(name, f"--model {name}", wanted, superfluous)
