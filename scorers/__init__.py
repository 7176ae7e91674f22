"""Networks and judges that score images. A process loads each one once, at its first use.

    scorer = scorers.get("clip.PickScore", "cuda")
    scorer(images, prompts)     # (N, 3, H, W) in [0, 1], N strings -> (N,) float32 on the CPU
    scorers.offload()           # out of the policy's way, until the next get

    python -m scorers pickscore IMAGES_DIR prompts.txt      # scores anybody's images

Every scorer class has a `net`, which get and offload move. It computes on its net's device, and
gives the reported score. The table has this score, and the training reward that flow_grpo makes of
it (yifan123/flow_grpo and CostaliyA/Flow-OPD, flow_grpo/*_scorer.py, rewards.py):

| scorer | reported | as a training reward |
|---|---|---|
| clip.PickScore (arXiv 2305.01569) | logit scale * cosine, CLIP-H | / 26 |
| clip.CLIPScore | logit scale * cosine, CLIP ViT-L/14 | / 30 |
| clip.Aesthetic (LAION, sac+logos+ava1) | about 1 to 10 | the same |
| clip.HPSv2 (v2.1, arXiv 2306.09341) | cosine, OpenCLIP ViT-H-14 | the same |
| imagereward.ImageReward (arXiv 2304.05977) | standardised, about -2 to 2 | the same |
| deqa.DeQA (arXiv 2501.11561) | 1 to 5 | / 5 |
| judge.UnifiedReward, judge.QwenVL | 1 to 5 | / 5 |
| jpeg_incompressibility (jpeg.py; DDPO, arXiv 2305.13301) | kB | the same |
| jpeg_compressibility | -kB | / 500 (DDPO: the same) |

geneval.Detector and ocr.Reader give objects and words instead. Weights are looked for in
$REWARD_MODELS/NAME, then on the Hugging Face hub.
"""
import importlib

import torch

LOADED = {}              # "module.Class" -> the scorer


def get(where, device):
    """The scorer "module.Class" of this folder, on device; in half precision on a GPU."""
    device = torch.device(device)
    if where not in LOADED:
        module, name = where.split(".")
        scorer = getattr(importlib.import_module(f"scorers.{module}"), name)
        LOADED[where] = scorer(device, torch.float16 if device.type == "cuda" else torch.float32)
    LOADED[where].net.to(device)                        # costs nothing if it is there
    return LOADED[where]


def offload():
    """Move all loaded scorers to the CPU. The next get brings one back."""
    for scorer in LOADED.values():
        scorer.net.to("cpu")
