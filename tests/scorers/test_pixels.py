"""Facts about scorers/pixels.py and scorers/jpeg.py: pre-processing against its originals'."""
import numpy as np
import pytest
import torch
from mini_clip import levels, pictures, resize_planes, torchvision_box
from PIL import Image

from scorers.jpeg import jpeg_incompressibility
from scorers.pixels import (
    clip_input,
    clip_pixels,
    clipscore_pixels,
    grey_levels,
    hps_pixels,
    to_pil,
    to_uint8,
)

# The last two leave an odd number to crop.
SIZES = [(512, 512), (300, 451), (451, 300), (224, 224), (100, 77), (224, 227), (235, 224)]


@pytest.mark.parametrize("h, w", SIZES)
def test_clip_pixels_are_those_of_the_transformers_processor(h, w):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    images = pictures(2, h, w)
    pils = [Image.fromarray(array) for array in to_uint8(images)]
    theirs = CLIPImageProcessorPil()(pils, return_tensors="pt").pixel_values
    assert (levels(clip_pixels(images, 224)) - levels(theirs)).abs().max() < 0.01


@pytest.mark.parametrize("h, w", SIZES)
def test_clip_pixels_with_crop_round_are_those_of_torchvision_on_pillow_images(h, w):
    images = pictures(2, h, w)
    (height, width), top, left = torchvision_box(h, w, 224)
    theirs = []
    for array in to_uint8(images):
        pil = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        theirs.append(np.asarray(pil)[top:top + 224, left:left + 224])
    theirs = np.stack(theirs).transpose(0, 3, 1, 2)
    assert np.abs(levels(clip_pixels(images, 224, round)).numpy() - theirs).max() < 0.01


def test_clip_input_takes_pictures_of_several_sizes():
    images = pictures(1, 90, 60), pictures(1, 50, 130)
    both = clip_input([to_pil(grey_levels(image)[0]) for image in images], 42, round)
    apart = torch.cat([clip_pixels(image, 42, round) for image in images])
    assert torch.equal(both, apart) and both.shape == (2, 3, 42, 42)


@pytest.mark.parametrize("h, w", SIZES)
def test_clipscore_pixels_are_bilinear_on_floats(h, w):
    images = pictures(2, h, w)
    (height, width), top, left = torchvision_box(h, w, 224)
    for array, ours in zip(to_uint8(images), levels(clipscore_pixels(images, 224))):
        theirs = resize_planes(array, height, width, Image.Resampling.BILINEAR)
        theirs = theirs[:, top:top + 224, left:left + 224]
        assert np.abs(ours.numpy() - theirs).max() < 0.01


@pytest.mark.parametrize("h, w", SIZES)
def test_hps_pixels_scale_the_longest_side_and_pad_with_black(h, w):
    images = pictures(2, h, w)
    scale = 224 / max(h, w)
    new_h = round(h * scale)
    new_w = round(w * scale)
    rows = slice((224 - new_h) // 2, (224 - new_h) // 2 + new_h)
    columns = slice((224 - new_w) // 2, (224 - new_w) // 2 + new_w)
    for array, ours in zip(to_uint8(images), levels(hps_pixels(images, 224))):
        theirs = np.zeros((3, 224, 224), "float32")
        theirs[:, rows, columns] = resize_planes(array, new_h, new_w, Image.Resampling.BICUBIC)
        assert np.abs(ours.numpy() - theirs).max() < 0.01


def test_images_are_rounded_to_grey_levels_and_clipped():
    values = torch.tensor([-0.1, 0.4999 / 255, 0.5001 / 255, 1.2])
    images = values.reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 1, 255]
    # Multiplied in float32: bfloat16 would round 101.3 to 101.5, and that to 102.
    half = torch.linspace(0, 1, 999).bfloat16().reshape(1, 3, 9, 37)
    assert np.array_equal(to_uint8(half), to_uint8(half.float()))


@pytest.mark.parametrize("images, got", [
    (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\)"),
    (torch.zeros(1, 4, 4, 3), r"shape \(1, 4, 4, 3\)"),
    (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "torch.uint8"),
    (torch.full((1, 3, 4, 4), float("nan")), "not finite"),
])
def test_images_that_are_no_images_are_refused(images, got):
    with pytest.raises(ValueError, match=f"^images: got .*{got}"):
        to_uint8(images)


def test_jpeg_size_is_that_of_the_file_at_quality_95(tmp_path):
    images = torch.stack([torch.zeros(3, 64, 64), *pictures(2, 64, 64)])
    sizes = jpeg_incompressibility(images, ["a cat"] * 3)
    for array, size in zip(to_uint8(images), sizes):
        Image.fromarray(array).save(tmp_path / "x.jpg", quality=95)
        assert size * 1000 == pytest.approx((tmp_path / "x.jpg").stat().st_size)
    assert sizes[0] < sizes[1] and sizes.dtype == torch.float32
