"""Facts about scorers/ocr.py, on drawn text, hand-made maps and small random networks."""
import glob
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont

from scorers import ocr
from scorers.ocr import Reader

FONTS = sorted(glob.glob("/usr/share/fonts/truetype/dejavu/DejaVuS*.ttf"))[::4]
MOBILE = ("PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
          "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors")
needs_cv2 = pytest.mark.skipif(ocr.cv2 is None, reason="OpenCV draws PP-OCR's boxes")


def length(v):
    return np.linalg.norm(v)


# ------------------------------------------------------------------ boxes


def turn(angle):
    """Rows times this are turned counter-clockwise on the screen, as Pillow's rotate does."""
    a = math.radians(angle)
    return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


UNIT = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])   # clockwise on the screen


@needs_cv2
@pytest.mark.parametrize("angle", [-40, -12, 0, 7, 44])
@pytest.mark.parametrize("sides", [(60, 10), (30, 24), (20, 20)])
def test_corners_go_round_clockwise_from_the_top_left(angle, sides):
    points = (np.array(sides) / 2 * UNIT) @ turn(angle) + (50, 70)
    box = ocr.corners_of(ocr.cv2.minAreaRect(points.astype(np.float32)))
    np.testing.assert_allclose(box, points, atol=1e-4)


def line_of_text(text, font, size, angle=0, side=512, at=None):
    """White text on black, turned about its centre: the picture, and corners (4, 2) around it.

    They are as loose as an annotator's.
    """
    face = ImageFont.truetype(font, size)
    x0, y0, x1, y1 = face.getbbox(text)
    centre = np.array(at or (side / 2, side / 2))
    half = np.array([x1 - x0, y1 - y0]) / 2 + 1 + size / 20
    flat = Image.new("L", (side, side))
    corner = centre - ((x0 + x1) / 2, (y0 + y1) / 2)
    ImageDraw.Draw(flat).text(tuple(corner), text, 255, face)
    corners = half * UNIT @ turn(angle) + centre
    return flat.rotate(angle, Image.BICUBIC, center=tuple(centre)), corners


def shrunk_map(quads, side=512):
    """A probability map of the cores of the quads.

    Each is shrunk by what its growth by area * 1.5 / perimeter undoes, 0.3 of the height of a long
    line. DB's training target is smaller still (0.42 of the height, from the looser polygons of its
    data). What the real network marks, grown so, is the line: see convert_ppocr.py.
    """
    image = Image.new("L", (side, side))
    for quad in quads:
        w = length(quad[1] - quad[0])
        h = length(quad[3] - quad[0])
        d = 0.0
        for _ in range(100):
            growth = 1.5 * (w - 2 * d) * (h - 2 * d) / (2 * (w + h - 4 * d))
            d = (d + growth) / 2
        u = (quad[1] - quad[0]) / w
        v = (quad[3] - quad[0]) / h
        inner = quad + d * np.array([u + v, -u + v, -u - v, u - v])
        ImageDraw.Draw(image).polygon([tuple(p) for p in inner], fill=240)
    return np.asarray(image, np.float32) / 255


def covered(box, ink):
    """Share of the ink (H, W) that lies in the box."""
    mask = Image.new("L", ink.shape[::-1])
    ImageDraw.Draw(mask).polygon([tuple(p) for p in box], fill=255, outline=255)
    return ink[np.asarray(mask) > 0].sum() / ink.sum()


@needs_cv2
@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("size", [18, 32, 64])
@pytest.mark.parametrize("angle", [0, 12, -25])
def test_drawn_text_is_found_and_cut_out(font, size, angle):
    image, quad = line_of_text("Hello reward", font, size, angle)
    box, = ocr.text_boxes(shrunk_map([quad]), 512, 512)
    areas = [length(b[1] - b[0]) * length(b[3] - b[0]) for b in (box, quad)]
    assert covered(box, np.asarray(image, float)) > 0.99                # all of the text
    assert areas[0] < 1.3 * areas[1]                                    # and little else
    # Turned back, it is the line that was drawn.
    upright = ocr.cut_out(image.convert("RGB"), box).convert("L").resize((150, 20))
    flat, _ = line_of_text("Hello reward", font, size)
    turned = ((box - 256) @ turn(-angle) + 256).round()
    drawn = flat.crop((*turned.min(0), *turned.max(0))).resize((150, 20))
    both = [np.asarray(picture, float).ravel() for picture in (upright, drawn)]
    assert np.corrcoef(*both)[0, 1] > 0.85


@needs_cv2
def test_boxes_scale_to_the_image_and_specks_and_doubts_are_dropped():
    prob = np.zeros((64, 128), np.float32)
    prob[20:40, 30:90] = 0.9
    prob[50:52, 5:7] = 0.9                              # too small
    prob[5:15, 100:120] = 0.5                           # above the threshold, below the score
    box, = ocr.text_boxes(prob, 128, 512)
    # The centres of the pixels span 59 and 19.
    d = 59 * 19 * 1.5 / (2 * (59 + 19))
    x0, y0, x1, y1 = 30 - d, 20 - d, 89 + d, 39 + d
    expected = np.round(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) * [4, 2])
    np.testing.assert_allclose(box, expected)
    assert ocr.text_boxes(np.zeros((64, 64)), 64, 64).shape == (0, 4, 2)


def mini_box(points):
    """get_mini_boxes of paddleocr: corners, and the rectangle."""
    rectangle = ocr.cv2.minAreaRect(points.astype(np.float32))
    corners = sorted(ocr.cv2.boxPoints(rectangle).tolist())
    left = sorted(corners[:2], key=lambda p: p[1])
    right = sorted(corners[2:], key=lambda p: p[1])
    return np.array([left[0], right[0], right[1], left[1]]), rectangle


def paddle_boxes(prob, height, width):
    """DBPostProcess.boxes_from_bitmap of paddleocr, with the score taken on the whole map.

    A rectangle pushed out by pyclipper is the rectangle, grown.
    """
    cv2 = ocr.cv2
    bitmap = (prob > 0.3).astype(np.uint8)
    boxes = []
    for contour in cv2.findContours(bitmap, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        box, (centre, (w, h), angle) = mini_box(contour)
        if min(w, h) < 3:
            continue
        mask = np.zeros(prob.shape, np.uint8)
        cv2.fillPoly(mask, box.astype(np.int32)[None], 1)
        if cv2.mean(prob, mask)[0] < 0.6:
            continue
        d = w * h * 1.5 / (2 * (w + h))
        box, _ = mini_box(cv2.boxPoints((centre, (w + 2 * d, h + 2 * d), angle)))
        box = np.round(box / prob.shape[::-1] * (width, height))
        boxes.append(np.clip(box, 0, (width, height)))
    return np.array(boxes).reshape(-1, 4, 2)


@needs_cv2
@pytest.mark.parametrize("seed", range(6))
def test_boxes_are_paddles(seed):
    rng = np.random.default_rng(seed)
    quads = []
    for x in (130, 380):
        for y in (80, 250, 430):
            text = "word" * rng.integers(1, 4)
            size = int(rng.integers(14, 40))
            quads.append(line_of_text(text, FONTS[0], size, rng.uniform(-30, 30), at=(x, y))[1])
    prob = shrunk_map(quads) + rng.normal(0, 0.03, (512, 512))
    prob = np.clip(prob, 0, 1).astype(np.float32)
    ours = ocr.text_boxes(prob, 768, 640)
    theirs = paddle_boxes(prob, 768, 640)
    assert len(ours) == len(theirs) >= 4
    for box in ours:
        assert np.abs(theirs - box).max((1, 2)).min() <= 1


def test_reading_order_is_by_lines_and_from_the_left():
    def box(x, y, h=20):
        return [[x, y], [x + 50, y], [x + 50, y + h], [x, y + h]]
    # A first line whose words sit up to 7 pixels apart, a taller second line, a third.
    boxes = np.array([box(200, 17), box(10, 110, 60), box(80, 10), box(150, 118, 50), box(10, 14),
                      box(300, 200)], float)
    assert ocr.reading_order(boxes) == [4, 2, 0, 1, 3, 5]
    # The ten pixels of paddle would not do here.
    assert ocr.reading_order(3 * boxes) == [4, 2, 0, 1, 3, 5]
    assert ocr.reading_order(np.zeros((0, 4, 2))) == []


# ------------------------------------------------------------------ pre-processing, decoding


def noise_picture(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_cut_out_of_an_upright_box_is_the_crop_and_a_tall_one_is_laid_flat():
    image = noise_picture(60, 90)
    pixels = np.asarray(image)
    box = np.array([[10, 20], [70, 20], [70, 40], [10, 40.0]])
    assert (np.asarray(ocr.cut_out(image, box)) == pixels[20:40, 10:70]).all()
    tall = np.array([[10, 5], [30, 5], [30, 55], [10, 55.0]])
    assert (np.asarray(ocr.cut_out(image, tall)) == np.rot90(pixels[5:55, 10:30])).all()


def test_text_detector_input_is_paddles():
    image = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    image[:, 0] = 255                                   # red
    x = ocr.text_detector_input(image)
    assert x.shape == (1, 3, 512, 512)
    # Blue, green, red.
    expected = [(0 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(x[0, :, 100, 100], expected, rtol=1e-5)


@pytest.mark.parametrize("size, expected", [((1000, 600), (960, 576)), ((1024, 1024), (960, 960)),
                                            ((500, 330), (512, 320)), ((20, 40), (32, 32))])
def test_text_detector_input_has_sides_that_are_multiples_of_32(size, expected):
    x = ocr.text_detector_input(torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert x.shape[2:] == expected


def test_recogniser_input_is_paddles():
    red = Image.new("RGB", (100, 30), (255, 0, 0))
    wide = noise_picture(48, 700)
    x = ocr.recogniser_input([red])
    assert x.shape == (1, 3, 48, 320)
    # ceil(48 * 100 / 30) = 160 columns, BGR in [-1, 1].
    assert (x[0, :2, :, :160] == -1).all() and (x[0, 2, :, :160] == 1).all()
    assert (x[0, :, :, 160:] == 0).all()
    odd = ocr.recogniser_input([red.resize((101, 30))])                 # 161.6 columns
    assert (odd[0, 2, :, :162] == 1).all() and (odd[0, :, :, 162:] == 0).all()
    both = ocr.recogniser_input([red, wide])
    assert both.shape == (2, 3, 48, 700) and (both[0, :, :, 160:] == 0).all()
    np.testing.assert_allclose(both[1].flip(0).permute(1, 2, 0), np.asarray(wide) / 127.5 - 1,
                               atol=1e-5)
    assert ocr.recogniser_input([wide.resize((9000, 48))]).shape == (1, 3, 48, 3200)


def test_ctc_decoding_is_exact():
    characters = ["blank", "a", "b", " "]

    def decode(*index):
        prob = torch.linspace(0.5, 1, len(index))
        return ocr.ctc_decode(torch.tensor(index), prob, characters)

    assert decode(0, 1, 1, 0, 1, 2, 2, 2, 0, 0)[0] == "aab"
    assert decode(1, 2, 1, 3, 3, 2)[0] == "aba b"
    assert decode(0, 0, 0) == ("", 0.0)
    text, confidence = decode(1, 1, 0, 0, 2)            # of the first of every repeat: 0.5 and 1
    assert text == "ab" and confidence == pytest.approx((0.5 + 1.0) / 2)


# ------------------------------------------------------------------ small random networks

CHARACTERS = ["blank", *"abcdefghijklmnopqrstuvwxyz0123456789.,", " "]


def small_hgnet(**changes):
    config = dict(
        model_type="hgnet_v2", stem_channels=[3, 4, 4], stem_strides=[2, 1, 1, 2, 1],
        stage_in_channels=[4, 8, 8, 8], stage_mid_channels=[4] * 4, stage_out_channels=[8] * 4,
        stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, hidden_sizes=[8] * 4,
        depths=[1] * 4, embedding_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])
    return {**config, **changes}


def small_lcnet(**changes):
    config = dict(model_type="pp_lcnet_v3", scale=0.25, divisor=4,
                  out_features=["stage2", "stage3", "stage4", "stage5"])
    return {**config, **changes}


def make(name, **config):
    """A network of transformers, by the name that its classes begin with."""
    kind = "ForObjectDetection" if name.endswith("Det") else "ForTextRecognition"
    config = getattr(transformers, f"PPOCRV5{name}Config")(**config)
    return getattr(transformers, f"PPOCRV5{name}{kind}")(config)


def server_det():
    intraclass = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for name, k in (("long", 7), ("mid", 5), ("short", 3)):
        half = k // 2
        intraclass |= {
            f"vertical_long_to_small_conv_{name}ratio": [[k, 1], [1, 1], [half, 0]],
            f"horizontal_small_to_long_conv_{name}ratio": [[1, k], [1, 1], [0, half]],
            f"symmetric_conv_long_{name}ratio": [[k, k], [1, 1], [half, half]],
        }
    return make("ServerDet", backbone_config=small_hgnet(), neck_out_channels=16,
                intraclass_block_config=intraclass, scale_factor_list=[1, 2, 4, 8],
                kernel_list=[3, 2, 2])


def mobile_det():
    return make("MobileDet", backbone_config=small_lcnet(), neck_out_channels=16,
                layer_list_out_channels=[4, 6, 8, 12])


REC = dict(hidden_size=16, num_attention_heads=2, head_out_channels=len(CHARACTERS))


def server_rec():
    backbone = small_hgnet(
        stem_strides=[2, 1, 1, 1, 1], stage_out_channels=[8, 8, 8, 16],
        stage_downsample=[True] * 4, stage_downsample_strides=[[2, 1], [1, 2], [2, 1], [2, 1]])
    return make("ServerRec", backbone_config=backbone, **REC)


def mobile_rec():
    blocks = [
        [[3, 16, 32, 1, False]],
        [[3, 32, 64, 1, False]],
        [[3, 64, 128, [2, 1], False]],
        [[3, 128, 256, [1, 2], False]],
        [[5, 256, 512, [2, 1], True], [5, 512, 512, [2, 1], False]],
    ]
    return make("MobileRec", backbone_config=small_lcnet(block_configs=blocks), **REC)


def save_reader(build, folder, shape):
    """A network with random weights, in a folder. shape: of an input."""
    net = build()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    # A deep network of random numbers says the same of every image, unless its norms know what to
    # expect.
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(shape))
    net.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for build in (server_det, mobile_det):
        save_reader(build, folder / f"PP-OCRv5_{build.__name__}_safetensors", (4, 3, 64, 96))
    for build in (server_rec, mobile_rec):
        path = folder / f"PP-OCRv5_{build.__name__}_safetensors"
        save_reader(build, path, (4, 3, 48, 160))
        characters = json.dumps({"character_list": CHARACTERS})
        (path / "preprocessor_config.json").write_text(characters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_MODELS", str(folder))
        yield folder


def pictures(n, height, width):
    noise = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)


def decode(prob):
    """(T, characters) -> str, by hand."""
    best = prob.argmax(-1).tolist()
    return "".join(CHARACTERS[c] for c, before in zip(best, [None] + best) if c and c != before)


@needs_cv2
@pytest.mark.parametrize("kind", ["server", "mobile"])
def test_reader_from_pixels_to_words(models, kind, monkeypatch):
    """The detector gives a map of the size of the input.

    Given boxes, every line is read as it is when it is alone, and the order is the reading order.
    """
    read = Reader("cpu", torch.float32, *(name.replace("mobile", kind) for name in MOBILE))
    images = pictures(3, 128, 160)
    maps = []

    def boxes(prob, height, width):     # what a random network finds is nothing to rely on
        maps.append(prob)
        assert (height, width) == (128, 160)
        right = [[90, 30], [150, 30], [150, 50], [90, 50]]
        left = [[5, 28], [80, 28], [80, 52], [5, 52]]
        return np.array([right, left], float)[:len(maps) - 1]

    monkeypatch.setattr(ocr, "text_boxes", boxes)
    monkeypatch.setattr(ocr, "MIN_CONFIDENCE", 0.0)
    monkeypatch.setattr(ocr, "BATCH", 2)
    words = read(images)
    assert [m.shape for m in maps] == [(128, 160)] * 3
    assert all(0 <= m.min() <= m.max() <= 1 for m in maps)
    assert words[0] == ""                                               # no boxes: nothing read
    pils = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    crops = [pils[1].crop((90, 30, 150, 50)), pils[2].crop((5, 28, 80, 52)),
             pils[2].crop((90, 30, 150, 50))]
    with torch.no_grad():
        out = read.net["rec"](ocr.recogniser_input(crops)).last_hidden_state
    assert out.shape == (3, 40, len(CHARACTERS))                        # a step for 8 columns
    lines = [decode(prob) for prob in out]
    assert words[1] == lines[0] and words[2] == lines[1] + " " + lines[2]
    assert len(set(lines)) > 1
    monkeypatch.setattr(ocr, "MIN_CONFIDENCE", 1.1)
    maps.clear()
    assert read(images) == ["", "", ""]


@needs_cv2
def test_lines_keep_their_places(models):
    """Whatever their lengths, which decide how they are batched."""
    read = Reader("cpu", torch.float32, *MOBILE)
    rng = np.random.default_rng(0)
    crops = []
    for width in rng.integers(10, 130, 20).tolist():
        crops.append(Image.fromarray(rng.integers(0, 256, (20, width, 3), dtype=np.uint8)))
    together = read.recognise(crops)
    alone = [read.recognise([crop])[0] for crop in crops]
    assert [text for text, _ in together] == [text for text, _ in alone]
    np.testing.assert_allclose([c for _, c in together], [c for _, c in alone], rtol=1e-4)
    assert len({round(c, 6) for _, c in alone}) > 15


@needs_cv2
def test_reader_finds_the_boxes_that_its_map_shows(models, monkeypatch):
    """With the real box code, a detector that is sure of everything gives one line, the image."""
    read = Reader("cpu", torch.float32, *MOBILE)
    read.net["det"].head.conv_final.bias.data.fill_(8)
    seen = []

    def recognise(crops):
        seen.extend(crops)
        return [("word", 0.9)] * len(crops)

    monkeypatch.setattr(read, "recognise", recognise)
    assert read(pictures(2, 64, 96)) == ["word", "word"]
    assert [crop.size for crop in seen] == [(96, 64)] * 2


@needs_cv2
def test_another_architecture_is_refused(models):
    folder = models / "another"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"]}))
    (folder / "model.safetensors").touch()
    with pytest.raises(ValueError, match="got architecture CLIPModel"):
        Reader("cpu", torch.float32, det="openai/another", rec=MOBILE[1])


@needs_cv2
def test_characters_that_do_not_fit_the_outputs_are_refused(models, monkeypatch):
    def loads(text, loads=json.loads):
        return {"character_list": ["a"]} if "character_list" in text else loads(text)

    monkeypatch.setattr(ocr.json, "loads", loads)
    message = f"got 1 characters in .*preprocessor_config.json, expected {len(CHARACTERS)}"
    with pytest.raises(ValueError, match=message):
        Reader("cpu", torch.float32)


def test_without_opencv_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(ocr, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install opencv-python-headless==\S+$") as raised:
        Reader("cpu", torch.float32)
    assert "\n" not in str(raised.value)
