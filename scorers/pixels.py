"""Images as the networks want them: grey levels, resizing, cropping and normalising."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# For RGB pixels in [0, 1] (openai/CLIP clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# ------------------------------------------------------------------ grey levels


def to_uint8(images):
    """(N, 3, H, W) in [0, 1] -> a numpy array (N, H, W, 3) of uint8, as a PNG would hold it.

    It rounds in the same way as flow_grpo's rewards.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images: got shape {tuple(images.shape)} of {images.dtype}, "
                         "expected (N, 3, H, W) floats in [0, 1]")
    if not images.isfinite().all():
        raise ValueError("images: got values that are not finite, expected [0, 1]; "
                         "look for the step of the sampler that made them")
    # This needs float32: bfloat16 would hold 101.3 as 101.5, which then rounds to 102.
    levels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def grey_levels(images):
    """(N, 3, H, W) in [0, 1] -> the same shape in uint8, on the CPU."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)


def as_floats(images):
    """The grey levels of a PNG as ToTensor reads them: (N, 3, H, W) in [0, 1], on the CPU."""
    return grey_levels(images) / 255


def to_pil(pixels):
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def check_pairs(images, prompts):
    """ValueError unless each image has one prompt. A scorer could broadcast others silently."""
    if len(images) != len(prompts) or isinstance(prompts, str):
        raise ValueError(f"scorer: got {len(prompts)} prompts for {len(images)} images, "
                         "expected a list with one prompt an image")


# ------------------------------------------------------------------ one operation each


def normalize(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    """Subtract each channel's mean and divide by its deviation. pixels: (N, 3, H, W), (3, H, W)."""
    mean = torch.tensor(mean, device=pixels.device).reshape(3, 1, 1)
    std = torch.tensor(std, device=pixels.device).reshape(3, 1, 1)
    return (pixels - mean) / std


def shortest_to(size, height, width):
    """The (height, width) of an image after its shortest side becomes size.

    The other side is rounded down, as in transformers and torchvision.
    """
    shortest = min(height, width)
    return size * height // shortest, size * width // shortest


def resize_floats(pixels, height, width, mode):
    """Resize as torchvision does: antialiased (its default since 0.17), and not clamped."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode=mode, antialias=True)


def resize_like_cv2(pixels, height, width):
    """(N, 3, H, W) of 0 .. 255 -> (N, 3, height, width) float32 of whole numbers.

    Like cv2.resize it is bilinear, without antialiasing.
    """
    resized = F.interpolate(pixels.float(), (height, width), mode="bilinear", align_corners=False)
    return resized.round()


# ------------------------------------------------------------------ what each network is shown


def clip_input(pictures, size, crop=math.floor):
    """Pillow images -> CLIP's input (N, 3, size, size), normalised.

    Pillow's bicubic resizes the shortest side to size, in grey levels. The centre is then cut out,
    so the ends of a long picture are lost. crop: the function that rounds the offset of the cut.
    transformers' processor takes the floor, and torchvision's CenterCrop rounds to even (round).
    """
    centres = []
    for picture in pictures:
        height, width = shortest_to(size, picture.height, picture.width)
        top = crop((height - size) / 2)
        left = crop((width - size) / 2)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        centres.append(np.asarray(picture.crop((left, top, left + size, top + size))))
    return normalize(torch.from_numpy(np.stack(centres)).permute(0, 3, 1, 2) / 255)


def clip_pixels(images, size, crop=math.floor):
    """clip_input of images (N, 3, H, W) in [0, 1]."""
    pictures = [Image.fromarray(array) for array in to_uint8(images)]
    return clip_input(pictures, size, crop)


def clipscore_pixels(images, size):
    """The input (N, 3, size, size) of flow_grpo's CLIPScore (flow_grpo/clip_scorer.py).

    It is CLIP's input, but resized as floats, and bilinearly (torchvision's default).
    """
    pixels = as_floats(images)
    height, width = shortest_to(size, *pixels.shape[2:])
    top = round((height - size) / 2)
    left = round((width - size) / 2)
    pixels = resize_floats(pixels, height, width, "bilinear")
    return normalize(pixels[:, :, top:top + size, left:left + size])


def hps_pixels(images, size):
    """HPSv2's input (N, 3, size, size) (hpsv2/src/open_clip/transform.py, ResizeMaxSize).

    The LONGEST side is resized to size, as floats, and black bars fill the rest.
    """
    pixels = as_floats(images)
    scale = size / max(pixels.shape[2:])
    height, width = (round(side * scale) for side in pixels.shape[2:])
    left = (size - width) // 2
    top = (size - height) // 2
    bars = (left, size - width - left, top, size - height - top)
    return normalize(F.pad(resize_floats(pixels, height, width, "bicubic"), bars))
