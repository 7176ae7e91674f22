"""PP-OCRv5: finds the lines of text of an image and reads them.

    read = Reader("cuda", torch.float16)         # loads the weights
    read(images)                                 # (N, 3, H, W) in [0, 1] -> N strings

A string holds all the words of an image in reading order. OpenCV draws the boxes around the lines,
as in PP-OCR itself; it is an optional extra that only this reader needs.

Sources: paddleocr 2.9.1 tools/infer and ppocr/postprocess, as Flow-GRPO uses it (with PP-OCRv4
weights), and transformers' image processors of pp_ocrv5_server_det and _rec.
"""
import json
import math
from operator import itemgetter

import numpy as np
import torch
import transformers
from PIL import Image

from scorers.pixels import grey_levels, normalize, resize_like_cv2, to_pil
from scorers.weights import pretrained, weights

try:
    import cv2
except ImportError:                                     # Reader says how to install it
    cv2 = None

BATCH = 8                # images in one forward of the detector

# ------------------------------------------------------------------ where the lines of text are

# From paddleocr 2.9.1 tools/infer/utility.py. MIN_SIZE and MAX_CANDIDATES are DBPostProcess's.
DET_MAX_SIDE = 960       # of an image, in pixels
DET_THRESHOLD = 0.3      # a pixel is text above it
BOX_SCORE = 0.6          # mean probability in a box
UNCLIP = 1.5
MIN_SIZE = 3             # pixels on the map, of the shorter side
MAX_CANDIDATES = 1000
# ImageNet's values for RGB. They are applied to BGR, because PP-OCR was trained in this way.
DET_MEAN = (0.485, 0.456, 0.406)
DET_STD = (0.229, 0.224, 0.225)


def text_detector_input(pixels):
    """(N, 3, H, W) uint8 RGB -> (N, 3, H', W') normalised BGR, with sides that are multiples of 32.

    The longer side is at most 960 before both sides are rounded to multiples of 32.
    """
    height, width = pixels.shape[-2:]
    ratio = min(1, DET_MAX_SIDE / max(height, width))
    sides = []
    for side in (height, width):
        blocks = round(int(side * ratio) / 32)
        sides.append(32 * max(1, blocks))
    bgr = resize_like_cv2(pixels, *sides).flip(1)
    return normalize(bgr / 255, DET_MEAN, DET_STD)


def distance(a, b):
    return np.linalg.norm(a - b)


def corners_of(rectangle):
    """The corners (4, 2) of one of OpenCV's rectangles (centre, sides, angle).

    Their order is top left, top right, bottom right, bottom left (PP-OCR's get_mini_boxes). This
    holds for text that is not steeper than 45 degrees.
    """
    corners = sorted(cv2.boxPoints(rectangle).tolist(), key=itemgetter(0))
    top_left, bottom_left = sorted(corners[:2], key=itemgetter(1))
    top_right, bottom_right = sorted(corners[2:], key=itemgetter(1))
    return np.array([top_left, top_right, bottom_right, bottom_left])


def box_score(prob, box):
    """Mean probability inside the box (4, 2) on the map (H, W): PP-OCR's box_score_fast."""
    x0, y0 = np.floor(box.min(0)).astype(int).clip(0)
    x1, y1 = np.ceil(box.max(0)).astype(int) + 1        # may lie outside; numpy cuts it off
    prob = prob[y0:y1, x0:x1]
    inside = np.zeros(prob.shape, np.uint8)
    cv2.fillPoly(inside, (box - (x0, y0)).astype(np.int32)[None], 1)
    return cv2.mean(prob, inside)[0]


def text_boxes(prob, height, width):
    """Probability map (h, w) -> boxes (M, 4, 2) of lines of text in the image (height, width).

    This is the post-processing of DB. DB marks only the core of a line, so that lines do not touch.
    So every box grows on each side by area * UNCLIP / perimeter. The box of a long line becomes 2.5
    times as high.
    """
    scale = (width / prob.shape[1], height / prob.shape[0])
    text = (prob > DET_THRESHOLD).astype(np.uint8)
    contours, _ = cv2.findContours(text, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = []
    for contour in contours[:MAX_CANDIDATES]:
        centre, sides, angle = cv2.minAreaRect(contour)
        if min(sides) < MIN_SIZE:
            continue
        if box_score(prob, corners_of((centre, sides, angle))) < BOX_SCORE:
            continue
        area = sides[0] * sides[1]
        # After this a box has at least 5 pixels a side, so paddle's second check is not needed.
        grow = area * UNCLIP / (2 * sum(sides))
        grown = [side + 2 * grow for side in sides]
        box = np.round(corners_of((centre, grown, angle)) * scale)
        box = np.clip(box, 0, (width, height))
        top_left, top_right, _, bottom_left = box
        if min(distance(top_left, top_right), distance(top_left, bottom_left)) > 3:
            boxes.append(box)
    return np.array(boxes).reshape(-1, 4, 2)


def reading_order(boxes):
    """Indices of boxes (M, 4, 2): lines from top to bottom, and from left to right in a line.

    DEVIATION: paddleocr takes two boxes for one line if their top left corners are within 10
    pixels. Here the y of their centres must differ by less than half the height of the less tall
    box, so that the order does not change with the size of the image.
    """
    left = boxes[..., 0].min(1)
    centre = boxes[..., 1].mean(1)
    height = boxes[..., 1].max(1) - boxes[..., 1].min(1)
    lines = []
    for i in np.argsort(centre, kind="stable").tolist():
        first = lines[-1][0] if lines else i
        if lines and centre[i] - centre[first] < min(height[i], height[first]) / 2:
            lines[-1].append(i)
        else:
            lines.append([i])
    order = []
    for line in lines:
        order += sorted(line, key=left.__getitem__)
    return order


# ------------------------------------------------------------------ what the lines say

REC_HEIGHT = 48
REC_WIDTH = 320          # at least
REC_MAX_WIDTH = 3200
REC_BATCH = 16           # lines in one forward
# paddleocr's drop_score: a line that is read with less confidence is not reported.
MIN_CONFIDENCE = 0.5


def cut_out(image, box):
    """The box (4, 2) of a Pillow image, turned upright.

    A tall box counts as a line turned by 90 degrees, and is turned counter-clockwise to be flat.
    """
    top_left, top_right, bottom_right, bottom_left = box
    width = int(max(distance(top_left, top_right), distance(bottom_left, bottom_right)))
    height = int(max(distance(top_left, bottom_left), distance(top_right, bottom_right)))
    corners = np.concatenate([top_left, bottom_left, bottom_right, top_right]).tolist()
    crop = image.transform((width, height), Image.Transform.QUAD, corners,
                           Image.Resampling.BICUBIC)
    if height / width >= 1.5:
        crop = crop.transpose(Image.Transpose.ROTATE_90)
    return crop


def aspect(crop):
    return crop.width / crop.height


def recogniser_input(crops):
    """Pillow images of lines -> (N, 3, 48, W) BGR in [-1, 1], with W from 320 to 3200.

    Each line keeps its own proportions, and 0 pads it on the right. This is PP-OCR's own input:
    the weights were trained with it.
    DEVIATION: transformers' processor stretches all lines of a batch to one width and keeps RGB.
    """
    widest = max([REC_WIDTH / REC_HEIGHT] + [aspect(crop) for crop in crops])
    width = min(int(REC_HEIGHT * widest), REC_MAX_WIDTH)
    x = torch.zeros(len(crops), 3, REC_HEIGHT, width)
    for row, crop in zip(x, crops):
        own_width = min(width, math.ceil(REC_HEIGHT * crop.width / crop.height))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
        bgr = resize_like_cv2(pixels, REC_HEIGHT, own_width)[0].flip(0)
        row[..., :own_width] = bgr / 127.5 - 1
    return x


def ctc_decode(index, prob, characters):
    """(text, confidence). Repeats become one character, then blanks (0) are removed.

    index, prob: number and probability of the most probable character at each step, (T,) each.
    """
    keep = index != 0
    keep[1:] &= index[1:] != index[:-1]
    text = "".join(characters[i] for i in index[keep].tolist())
    return text, float(prob[keep].mean()) if text else 0.0


# ------------------------------------------------------------------ both


def load_part(folder, part, dtype):
    """The network in folder. part: "det" or "rec", which the error names."""
    config = json.loads((folder / "config.json").read_text())
    name = (config.get("architectures") or ["none"])[0]
    if not (name.startswith("PPOCRV5") and hasattr(transformers, name)):
        raise ValueError(f"reader: got architecture {name} in {folder}/config.json, expected a "
                         f"PP-OCRv5 model of this transformers ({transformers.__version__}), "
                         f"such as PaddlePaddle/PP-OCRv5_server_{part}_safetensors")
    return pretrained(getattr(transformers, name), folder, dtype=dtype)


def read_characters(folder, outputs):
    """The characters of the recogniser, one for each of its outputs. The first is the blank."""
    path = folder / "preprocessor_config.json"
    characters = json.loads(path.read_text()).get("character_list", [])
    if len(characters) != outputs:
        raise ValueError(f"reader: got {len(characters)} characters in {path}, expected {outputs}, "
                         "the recogniser's outputs (the blank is the first); fetch the folder anew")
    return characters


class Reader:
    """All the words of an image, as one string.

    det, rec: the hub's names of PP-OCRv5's server models, or of its smaller mobile ones
    (PaddlePaddle/PP-OCRv5_mobile_det_safetensors, PaddlePaddle/PP-OCRv5_mobile_rec_safetensors).
    """

    def __init__(self, device, dtype, det="PaddlePaddle/PP-OCRv5_server_det_safetensors",
                 rec="PaddlePaddle/PP-OCRv5_server_rec_safetensors"):
        if cv2 is None:
            raise ValueError("reader: got no module cv2 (OpenCV), with which PP-OCR draws its "
                             "boxes; expected it: pip install opencv-python-headless==5.0.0.93")
        det_folder = weights(det, "config.json", "*.safetensors")
        rec_folder = weights(rec, "config.json", "*.safetensors", "preprocessor_config.json")
        self.net = torch.nn.ModuleDict({
            "det": load_part(det_folder, "det", dtype),
            "rec": load_part(rec_folder, "rec", dtype),
        }).to(device)
        outputs = self.net["rec"].config.head_out_channels
        self.characters = read_characters(rec_folder, outputs)

    @torch.no_grad()
    def __call__(self, images):
        """images (N, 3, H, W) in [0, 1] -> N strings."""
        crops = []                                      # the lines of all images
        owners = []                                     # the image of each line
        for i in range(0, len(images), BATCH):
            for j, lines in enumerate(self.find_lines(grey_levels(images[i:i + BATCH]))):
                crops += lines
                owners += [i + j] * len(lines)
        texts = [[] for _ in images]
        for owner, (text, confidence) in zip(owners, self.recognise(crops)):
            if confidence >= MIN_CONFIDENCE:
                texts[owner].append(text)
        return [" ".join(parts) for parts in texts]

    def find_lines(self, pixels):
        """pixels (N, 3, H, W) uint8 -> N lists of Pillow images of lines, in reading order."""
        net = self.net["det"]
        x = text_detector_input(pixels.to(net.device)).to(net.dtype)
        probs = net(x).last_hidden_state[:, 0].float().cpu().numpy()
        found = []
        for prob, image in zip(probs, pixels):
            boxes = text_boxes(prob, *image.shape[-2:])
            picture = to_pil(image)
            found.append([cut_out(picture, boxes[k]) for k in reading_order(boxes)])
        return found

    @torch.no_grad()
    def recognise(self, crops):
        """Pillow images of lines -> list of (text, confidence), in their order."""
        net = self.net["rec"]
        read = [None] * len(crops)
        # Lines of similar proportions share a batch, so that there is little padding.
        order = sorted(range(len(crops)), key=lambda i: aspect(crops[i]))
        for i in range(0, len(order), REC_BATCH):
            batch = order[i:i + REC_BATCH]
            x = recogniser_input([crops[k] for k in batch]).to(net.device, net.dtype)
            probs, indices = net(x).last_hidden_state.float().max(-1)
            for k, prob, index in zip(batch, probs.cpu(), indices.cpu()):
                read[k] = ctc_decode(index, prob, self.characters)
        return read
