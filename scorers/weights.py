"""Published weights: where they are found, and how they are loaded. Every tensor must fit."""
import os
import re
from pathlib import Path

import torch
from torch import nn

from plumbing.files import check_shapes, first_line, shapes_of

# ------------------------------------------------------------------ where they are found


def weights(repo, *files):
    """The folder that holds the files of a hub repository.

    files: names, or patterns such as "*.safetensors". The folder is $REWARD_MODELS/NAME if it
    exists (NAME: the part of repo after the slash). Otherwise huggingface_hub downloads the files,
    or finds them in its cache.
    """
    name = repo.split("/")[-1]
    root = os.environ.get("REWARD_MODELS")
    mend = (f"put {', '.join(files)} of {repo} into $REWARD_MODELS/{name}, "
            "or give this machine a network")
    if root and (Path(root) / name).is_dir():
        folder = Path(root) / name
    else:
        looked = f"no folder {Path(root) / name}" if root else "no $REWARD_MODELS"
        folder = download(repo, files, looked, mend)
    missing = [file for file in files if not any(folder.glob(file))]
    if missing:
        raise ValueError(f"weights of {repo}: got no {', '.join(missing)} in {folder}; {mend}")
    return folder


def download(repo, files, looked, mend):
    """The folder in the hub's cache. looked, mend: parts of the error if the download fails."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files)))
    except Exception as error:                          # from network, hub or disk
        raise ValueError(f"weights of {repo}: got {looked}, and from the Hugging Face hub "
                         f"{type(error).__name__} ({first_line(error)}); {mend}") from error


# ------------------------------------------------------------------ how they are loaded


def count_layers(state, prefix):
    """The number of layers: how many different numbers follow the prefix in a state dict."""
    numbers = set()
    for name in state:
        if name.startswith(prefix):
            numbers.add(name.removeprefix(prefix).split(".")[0])
    return len(numbers)


def rename(state, table):
    """A state dict under other names. table: (pattern, replacement) pairs, applied in order."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def pretrained(cls, folder, config=None, state=None, dtype=torch.float32, others=(), **options):
    """A transformers model, loaded strictly and frozen.

    It is read from a folder, or made from a config and a state dict. In the second case folder is
    only the path that errors name.
    others: prefixes of tensors of other parts, which the file may hold and which are ignored.
    """
    # from_pretrained only reports the tensors that do not fit. The check below raises the error.
    net, report = cls.from_pretrained(
        folder if state is None else None, config=config, state_dict=state, dtype=dtype,
        use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    shapes = shapes_of(net.state_dict())
    want = {name: shapes[name] for name in report["missing_keys"]}
    got = {}
    for name in report["unexpected_keys"]:
        if not name.startswith(tuple(others)):
            got[name] = "there"
    for name, in_file, in_net in report["mismatched_keys"]:
        got[name] = tuple(in_file)
        want[name] = tuple(in_net)
    check_shapes(want, got, folder)
    return net.eval().requires_grad_(False)


def score_head(state, path):
    """The five linear layers that Aesthetic and ImageReward end in, with no activation between.

    state: a dict of "layers.0.weight", ... path: its file, which errors name.
    The dropouts do nothing here. They only give the linear layers the same numbers as in the file.
    """
    width = state["layers.0.weight"].shape[-1]
    layers = nn.Sequential(nn.Linear(width, 1024), nn.Dropout(0.2),
                           nn.Linear(1024, 128), nn.Dropout(0.2),
                           nn.Linear(128, 64), nn.Dropout(0.1),
                           nn.Linear(64, 16),
                           nn.Linear(16, 1))
    net = nn.ModuleDict({"layers": layers})
    check_shapes(shapes_of(net.state_dict()), shapes_of(state), path)
    net.load_state_dict(state)
    return layers.eval().requires_grad_(False)
