"""Neural rewards, from their published weights, on torch and transformers alone: no torchvision, no open_clip, no servers.

    scorer = PickScore("cuda", torch.float16)       # loads the weights, once a process
    scorer(images, prompts)                         # (N, 3, H, W) in [0, 1], N str -> (N,) float32 on the CPU, the score as it is reported
"""
import os
from pathlib import Path


# ------------------------------------------------------------------ weights: where they are found, and how they are loaded


def weights(repo, *files):
    """Path of the folder with the hub repository's files, each a name or a pattern such as "*.safetensors".

    It is $REWARD_MODELS/NAME, NAME the part of repo after the slash, if that folder is there; else they are downloaded, or found in
    huggingface_hub's cache.
    """
    from huggingface_hub import snapshot_download
    name, root = repo.split("/")[-1], os.environ.get("REWARD_MODELS")
    mend = f"put {', '.join(files)} of {repo} into $REWARD_MODELS/{name}, or give this machine a network"
    if root and (Path(root) / name).is_dir():
        folder = Path(root) / name
    else:
        looked = f"no folder {Path(root) / name}" if root else "no $REWARD_MODELS"
        try:
            folder = Path(snapshot_download(repo, allow_patterns=list(files)))
        except Exception as error:  # of the network, the hub, the disk: all of them mean that there are no weights
            why = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"weights of {repo}: got {looked}, and from the Hugging Face hub {type(error).__name__} ({why}); {mend}") from error
    missing = [file for file in files if not any(folder.glob(file))]
    if missing:
        raise ValueError(f"weights of {repo}: got no {', '.join(missing)} in {folder}; {mend}")
    return folder
