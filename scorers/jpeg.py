"""The size of an image's file (DDPO, arXiv 2305.13301). It needs no weights.

So it suits the sanity check of a first run.
"""
import io

import torch
from PIL import Image

from scorers.pixels import to_uint8


def jpeg_incompressibility(images, prompts=None):
    """Size of each image as a JPEG of quality 95, in kB of 1000 bytes: (N,) float32."""
    sizes = []
    for array in to_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)
