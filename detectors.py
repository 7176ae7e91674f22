"""Detectors of real pictures: GenEval's, of objects and their colours, and PP-OCRv5, of text. On torch, transformers and Pillow alone.

    detect = Detector("cuda", torch.float16)      # loads the weights, once a process
    detect(images, metas)                         # (N, 3, H, W) in [0, 1], N dicts -> list (N) of lists of objects (see rewards.py)
    read = Reader("cuda", torch.float16)
    read(images)                                  # -> list (N) of str, all the words of an image in reading order

GenEval's detector is mmdet's Mask2Former (Swin-S, COCO instances), which needs mmdet 2 and a compiled mmcv of 2023. Here it is Meta's
Mask2Former in transformers, with mmdet's resizing, padding and reading of masks and scores. Where the two may differ:
- the weights. mmdet trained its own (mask AP 46.1 on COCO val2017); the hub has Meta's (46.3). Same architecture and data, another run.
- nothing else by design, but up to one grey level in the resized image, which cv2 computes in fixed point.
Do not use transformers' post_process_instance_segmentation for this: it reads the masks at 384 x 384 and thresholds before it resizes, so
boxes and mask scores differ, and its default threshold is 0.5.
To check yours: generate the benchmark's 553 prompts, 4 images each, with a model of its table (djghosh13/geneval README), score them with
form "benchmark" and compare the tags: Stable Diffusion 2.1 has 0.98 single, 0.51 two, 0.44 counting, 0.85 colours, 0.07 position, 0.17 colour
attribution, 0.50 overall. With 320 to 400 images a tag, 0.03 either way is luck (one standard error is up to 0.028).

Sources: GenEval, djghosh13/geneval evaluation/evaluate_images.py; mmdet 2.28.2 (configs/mask2former, maskformer_fusion_head.py); colours:
open_clip 2.20.0, clip_benchmark 1.4.0 metrics/zeroshot_classification.py; PP-OCR: paddleocr 2.9.1 tools/infer, ppocr/postprocess, as Flow-GRPO
uses it (with PP-OCRv4 weights), and transformers' image processors of pp_ocrv5_server_det and _rec.
"""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open

from scorers import normalize, pretrained, to_uint8, weights

# COCO's 80 classes in the order of the detector's labels, in GenEval's spelling (evaluation/object_names.txt), which the prompt files use
CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,"
    "cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,"
    "donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS = 0.3, 0.9, 16     # evaluate_images.py, main; its NMS threshold of 1 means none
MAX_INSTANCES = 100                                           # mmdet's test_cfg.max_per_image
COCO_MEAN, COCO_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of pixels in 0 .. 255
BATCH = 8                                                     # images in one forward


# ------------------------------------------------------------------ pixels


def grey_levels(images):
    """(N, 3, H, W) in [0, 1] -> uint8 on the CPU, what a saved PNG would hold."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)


def to_pil(pixels):
    """(3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(pixels, height, width):
    """(N, 3, H, W) of 0 .. 255 -> (N, 3, height, width) float32 of whole numbers, as cv2.resize does it: bilinear, never smoothed first."""
    return F.interpolate(pixels.float(), (height, width), mode="bilinear", align_corners=False).round()


def per_channel(values, like):
    return torch.tensor(values, device=like.device).reshape(-1, 1, 1)


# ------------------------------------------------------------------ GenEval: objects


class Mask2Former(torch.nn.Module):
    """transformers' Mask2FormerModel and the classes' linear layer, float32. Its Mask2FormerForUniversalSegmentation is the same, but wants scipy."""

    def __init__(self, folder):
        from transformers import Mask2FormerModel
        super().__init__()
        self.model = pretrained(Mask2FormerModel, folder, others=("class_predictor.", "criterion."))
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                tensors.update({name.split(".")[1]: f.get_tensor(name) for name in f.keys() if name.startswith("class_predictor.")})
        check_labels(self.model.config.id2label)
        shapes = {"weight": (len(CLASSES) + 1, self.model.config.hidden_dim), "bias": (len(CLASSES) + 1,)}
        if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
            raise ValueError(f"weights in {folder}: got class_predictor with {({name: tuple(t.shape) for name, t in tensors.items()})}, "
                             f"expected {shapes}; fetch the folder anew")
        self.class_predictor = torch.nn.Linear(*reversed(shapes["weight"]))
        self.class_predictor.load_state_dict(tensors)
        self.requires_grad_(False)

    def forward(self, x):
        """x (N, 3, H, W) -> class logits (N, Q, 81), mask logits (N, Q, H / 4, W / 4), both of the last layer."""
        out = self.model(pixel_values=x, output_hidden_states=True)
        return self.class_predictor(out.transformer_decoder_intermediate_states[-1].transpose(0, 1)), out.masks_queries_logits[-1]


def check_classes(metas):
    """Raise a ValueError unless every class that a prompt names is one that the detector knows; an unknown one would always score 0."""
    for meta in metas:
        for clause in meta.get("include", []) + meta.get("exclude", []):
            if clause.get("class") not in CLASSES:
                raise ValueError(f"GenEval prompt {meta.get('prompt')!r}: got class {clause.get('class')!r}, expected one of COCO's 80 in GenEval's "
                                 "spelling, such as 'computer mouse', 'tv remote', 'computer keyboard' or 'tv' (detectors.CLASSES)")


def check_labels(id2label):
    """Raise a ValueError unless the detector's labels are COCO's 80 in order; VOC's spellings (sofa, tvmonitor) and LABEL_7 are let through."""
    moved = [f"{i}: {name}" for i, name in id2label.items() if name in CLASSES and CLASSES.index(name) != int(i)]
    if len(id2label) != len(CLASSES) or moved:
        raise ValueError(f"detector: got {len(id2label)} labels, of them out of order {moved[:5]}, expected COCO's 80 instance classes in order; "
                         "use facebook/mask2former-swin-small-coco-instance")


def detector_input(pixels):
    """(N, 3, H, W) uint8 RGB -> (N, 3, H', W') normalised, and the size before padding: mmdet's test_pipeline of this model.

    Scaled to fit 1333 x 800 (so 512 x 512 becomes 800 x 800), padded below and to the right with grey 128 to multiples of 32.
    """
    height, width = pixels.shape[-2:]
    scale = min(1333 / max(height, width), 800 / min(height, width))
    height, width = int(height * scale + 0.5), int(width * scale + 0.5)
    x = F.pad(resize(pixels, height, width), (0, -width % 32, 0, -height % 32), value=128)
    return (x - per_channel(COCO_MEAN, x)) / per_channel(COCO_STD, x), (height, width)


def instances(class_logits, mask_logits, padded, resized, size, threshold):
    """One image's instances as mmdet reads them off Mask2Former: scores (M,), labels (M,), boxes (M, 4), masks (M, H, W) bool; score > threshold.

    class_logits (Q, 81), the last of them "no object"; mask_logits (Q, h, w); padded, resized, size: (height, width) of the network's input,
    of the image in it, and of the image itself. A query counts once for every class that is among the MAX_INSTANCES most probable pairs.
    """
    probs = class_logits.softmax(-1)[:, :-1]
    scores, index = probs.flatten().topk(min(MAX_INSTANCES, probs.numel()))
    index, scores = index[scores > threshold], scores[scores > threshold]  # a mask's score is below 1: the others cannot pass, spare their masks
    query, labels = index // probs.shape[1], index % probs.shape[1]
    if len(query) == 0:
        return scores, labels, scores.new_zeros(0, 4), torch.zeros(0, *size, dtype=torch.bool, device=scores.device)
    # logits, not masks, are resized: to the network's input, without the padding, and then to the image
    logits = F.interpolate(mask_logits[query][None], padded, mode="bilinear", align_corners=False)[..., :resized[0], :resized[1]]
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    mask_scores = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)  # mean probability inside the mask
    scores = scores * mask_scores
    columns, rows = masks.any(1).int(), masks.any(2).int()
    boxes = torch.stack([columns.argmax(1), rows.argmax(1), size[1] - columns.flip(1).argmax(1), size[0] - rows.flip(1).argmax(1)], 1)
    keep = scores > threshold  # never an empty mask, whose score is 0
    return scores[keep], labels[keep], boxes[keep].float(), masks[keep]


def most_confident(scores, labels):
    """Indices of at most MAX_OBJECTS instances a class, the most confident first."""
    kept, count = [], {}
    for i in scores.argsort(descending=True).tolist():
        label = int(labels[i])
        count[label] = count.get(label, 0) + 1
        if count[label] <= MAX_OBJECTS:
            kept.append(i)
    return kept


# ------------------------------------------------------------------ GenEval: colours


def color_crop(image, mask, box):
    """The object on grey, cut out. image: Pillow; mask (H, W) bool array; box (x0, y0, x1, y1) in pixels."""
    blank = Image.new("RGB", image.size, "#999")
    return Image.composite(image, blank, Image.fromarray(mask)).crop(tuple(round(v) for v in box))


def clip_input(image, size=224):
    """A Pillow image -> (3, size, size) normalised: shorter side to size (bicubic), then the centre, so the ends of a long object are not seen."""
    width, height = image.size
    scale_to = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    image = image.resize(scale_to, Image.BICUBIC)
    x0, y0 = round((image.width - size) / 2), round((image.height - size) / 2)
    x = torch.from_numpy(np.array(image.crop((x0, y0, x0 + size, y0 + size)))).permute(2, 0, 1) / 255
    return normalize(x)


def text_embeddings(clip, tokenizer, texts):
    """Normalised (len(texts), D) float32."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
    return F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)


def image_embeddings(clip, x):
    """x (N, 3, S, S) -> normalised (N, D) float32."""
    return F.normalize(clip.get_image_features(pixel_values=x.to(clip.device, clip.dtype)).pooler_output.float(), dim=-1)


def color_classifier(clip, tokenizer, name):
    """One unit vector a colour for objects called name, (10, D): the mean over the templates of the normalised text embeddings."""
    vectors = [text_embeddings(clip, tokenizer, [t.format(color=color, name=name) for t in TEMPLATES]).mean(0) for color in COLORS]
    return F.normalize(torch.stack(vectors), dim=-1)


class Detector:
    """GenEval's detector: the objects of an image, with a colour where the image's prompt asks for one of that class.

    The detector computes in float32 whatever dtype is, as the benchmark's does, for its thresholds are sharp; CLIP in dtype (the
    benchmark: autocast). The colours' CLIP has QuickGELU: transformers' openai/clip-vit-large-patch14 does, and so has the benchmark's
    open_clip 2.20.0, whose loader of pretrained="openai" switches it on. Newer open_clip (seen in 3.3.0) only warns, and computes "ViT-L-14" with
    plain GELU: a GenEval run on that, without "ViT-L-14-quickgelu", has other colours than the benchmark and than this.
    """

    def __init__(self, device, dtype, detector="facebook/mask2former-swin-small-coco-instance", clip="openai/clip-vit-large-patch14"):
        from transformers import CLIPModel, CLIPTokenizer
        folder = weights(clip, "config.json", "*.safetensors", "vocab.json", "merges.txt")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.net = torch.nn.ModuleDict({
            "detector": Mask2Former(weights(detector, "config.json", "*.safetensors")),
            "clip": pretrained(CLIPModel, folder, dtype=dtype)}).to(device)
        self.classifiers = {}  # class name -> (10, D)

    @torch.no_grad()
    def __call__(self, images, metas):
        """images (N, 3, H, W) in [0, 1], metas: N dicts in GenEval's schema -> list (N) of lists of objects, the most confident first."""
        if len(images) != len(metas):
            raise ValueError(f"detector: got {len(images)} images and {len(metas)} prompts, expected one prompt an image")
        check_classes(metas)
        found = []
        for i in range(0, len(images), BATCH):
            found += self.detect(grey_levels(images[i:i + BATCH]), metas[i:i + BATCH])
        return found

    def detect(self, pixels, metas):
        x, resized = detector_input(pixels.to(self.net["detector"].model.device))
        found, crops, wanting = [], [], []  # wanting: the objects that wait for the colour of their crop
        for image, class_logits, mask_logits, meta in zip(pixels, *self.net["detector"](x), metas):
            threshold = COUNTING_THRESHOLD if meta.get("tag") == "counting" else THRESHOLD
            colored = {clause["class"] for clause in meta.get("include", []) if "color" in clause}
            scores, labels, boxes, masks = instances(class_logits, mask_logits, x.shape[-2:], resized, image.shape[-2:], threshold)
            objects = []
            for i in most_confident(scores, labels):
                o = {"class": CLASSES[labels[i]], "score": float(scores[i]), "box": tuple(boxes[i].tolist()), "color": None}
                if o["class"] in colored:
                    crops.append(clip_input(color_crop(to_pil(image), masks[i].cpu().numpy(), o["box"]), self.clip_size))
                    wanting.append(o)
                objects.append(o)
            found.append(objects)
        for i in range(0, len(crops), 8 * BATCH):
            embeddings = image_embeddings(self.net["clip"], torch.stack(crops[i:i + 8 * BATCH]))
            for o, embedding in zip(wanting[i:], embeddings):
                o["color"] = COLORS[int((self.classifier(o["class"]) @ embedding).argmax())]
        return found

    @property
    def clip_size(self):
        return self.net["clip"].config.vision_config.image_size

    def classifier(self, name):
        if name not in self.classifiers:
            self.classifiers[name] = color_classifier(self.net["clip"], self.tokenizer, name)
        return self.classifiers[name].to(self.net["clip"].device)


# ------------------------------------------------------------------ PP-OCR: where the lines of text are

# paddleocr 2.9.1 tools/infer/utility.py, and DBPostProcess's own min_size and max_candidates
DET_MAX_SIDE, DET_THRESHOLD, BOX_SCORE, UNCLIP, MIN_SIZE, MAX_CANDIDATES = 960, 0.3, 0.6, 1.5, 3, 1000
DET_MEAN, DET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's for RGB, but applied to BGR: PP-OCR was trained so
REC_HEIGHT, REC_WIDTH, REC_MAX_WIDTH, REC_BATCH = 48, 320, 3200, 16
MIN_CONFIDENCE = 0.5                                              # paddleocr's drop_score: what is read with less is not reported


def text_detector_input(pixels):
    """(N, 3, H, W) uint8 RGB -> (N, 3, H', W') normalised BGR, sides multiples of 32; the longer side at most 960 (before the rounding)."""
    height, width = pixels.shape[-2:]
    ratio = min(1, DET_MAX_SIDE / max(height, width))
    height, width = (max(32, round(int(side * ratio) / 32) * 32) for side in (height, width))
    x = resize(pixels, height, width).flip(1) / 255
    return (x - per_channel(DET_MEAN, x)) / per_channel(DET_STD, x)


def components(mask):
    """The 8-connected parts of a binary map (H, W): list of (M, 2) arrays, the (x, y) of both ends of every run of pixels in a row.

    The ends of the runs have the convex hull of all of the part's pixels, and the hull is all that the boxes need.
    """
    runs, parent, above = [], [], []  # runs: (first x, last x, y); parent: a forest over them, each tree one part

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # 1 where a run begins, -1 behind its last pixel
    for y in range(len(mask)):
        here = []
        for first, last in zip(np.flatnonzero(edges[y] == 1).tolist(), (np.flatnonzero(edges[y] == -1) - 1).tolist()):
            i = len(runs)
            runs.append((first, last, y))
            parent.append(i)
            here.append(i)
            for j in above:
                if runs[j][0] <= last + 1 and runs[j][1] >= first - 1:  # touch, diagonally too
                    parent[root(j)] = root(i)
        above = here
    parts = {}
    for i, (first, last, y) in enumerate(runs):
        parts.setdefault(root(i), []).extend([(first, y), (last, y)])
    return [np.array(part, dtype=np.float64) for part in parts.values()]


def convex_hull(points):
    """Corners of the hull of (M, 2) points, in order around it (Andrew's monotone chain)."""
    points = sorted(set(map(tuple, points)))

    def half(points):
        chain = []
        for p in points:
            while len(chain) > 1 and ((chain[-1][0] - chain[-2][0]) * (p[1] - chain[-2][1])
                                      <= (chain[-1][1] - chain[-2][1]) * (p[0] - chain[-2][0])):
                chain.pop()
            chain.append(p)
        return chain[:-1]

    return np.array(half(points) + half(points[::-1]) or points)


def smallest_rectangle(points, grow=0.0):
    """The rectangle of least area around (M, 2) points, moved out by grow on every side: corners (4, 2) and the length of its shorter side.

    Corners are top left, top right, bottom right, bottom left, for text that is not steeper than 45 degrees (PP-OCR's get_mini_boxes).
    """
    hull = convex_hull(points)
    edges = np.roll(hull, -1, axis=0) - hull
    along = edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-9)  # one side of the rectangle lies on an edge of the hull
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    u, v = hull @ along.T, hull @ across.T                                          # (hull, edges): the hull in each edge's frame
    best = np.argmin(np.ptp(u, axis=0) * np.ptp(v, axis=0))
    u, v = u[:, best], v[:, best]
    u0, u1, v0, v1 = u.min() - grow, u.max() + grow, v.min() - grow, v.max() + grow
    corners = np.array([[u0, v0], [u1, v0], [u1, v1], [u0, v1]]) @ np.stack([along[best], across[best]])
    corners = corners[np.argsort(corners[:, 0], kind="stable")]
    left, right = corners[:2], corners[2:]
    left, right = left[np.argsort(left[:, 1], kind="stable")], right[np.argsort(right[:, 1], kind="stable")]
    return np.array([left[0], right[0], right[1], left[1]]), min(u1 - u0, v1 - v0)


def box_score(prob, box):
    """Mean probability inside the box (4, 2) on the map (H, W)."""
    height, width = prob.shape
    x0, y0 = (max(0, math.floor(box[:, i].min())) for i in (0, 1))
    x1, y1 = min(width - 1, math.ceil(box[:, 0].max())), min(height - 1, math.ceil(box[:, 1].max()))
    mask = Image.new("1", (x1 - x0 + 1, y1 - y0 + 1))
    ImageDraw.Draw(mask).polygon([(int(x) - x0, int(y) - y0) for x, y in box], fill=1, outline=1)
    return float(prob[y0:y1 + 1, x0:x1 + 1][np.array(mask)].mean())


def text_boxes(prob, height, width):
    """Probability map (h, w) -> boxes (M, 4, 2) of lines of text in the image (height, width), as DB's post-processing does it.

    DB marks the core of a line only, so that lines do not touch: every box is grown by area * UNCLIP / perimeter (of a long line, to 2.5 times
    its height).
    """
    boxes = []
    for part in components(prob > DET_THRESHOLD)[:MAX_CANDIDATES]:
        box, short = smallest_rectangle(part)
        if short < MIN_SIZE or box_score(prob, box) < BOX_SCORE:
            continue
        long = max(np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[2] - box[1]))
        box, _ = smallest_rectangle(box, grow=long * short * UNCLIP / (2 * (long + short)))  # paddle's second check, >= 5, now always holds
        box = np.clip(np.round(box * (width / prob.shape[1], height / prob.shape[0])), 0, (width, height))
        if min(np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[3] - box[0])) > 3:
            boxes.append(box)
    return np.array(boxes).reshape(-1, 4, 2)


def reading_order(boxes):
    """Indices of boxes (M, 4, 2), lines from top to bottom, and from left to right in a line.

    DEVIATION: paddleocr takes two boxes for one line if their top left corners are within 10 pixels; here their centres must be closer in
    height than half the lower one's height, so that the order does not change with the image's size.
    """
    top, bottom, centre = boxes[..., 1].min(1), boxes[..., 1].max(1), boxes[..., 1].mean(1)
    lines = []
    for i in np.argsort(centre, kind="stable"):
        first = lines[-1][0] if lines else i
        if lines and centre[i] - centre[first] < min(bottom[i] - top[i], bottom[first] - top[first]) / 2:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [int(i) for line in lines for i in sorted(line, key=lambda i: boxes[i, :, 0].min())]


# ------------------------------------------------------------------ PP-OCR: what the lines say


def cut_out(image, box):
    """The box (4, 2) of a Pillow image, turned upright; a tall one is taken for a line that runs upwards, and laid flat."""
    width = int(max(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[2] - box[3])))
    height = int(max(np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[1] - box[2])))
    corners = box[[0, 3, 2, 1]].flatten().tolist()  # Pillow's order: top left, bottom left, bottom right, top right
    crop = image.transform((width, height), Image.QUAD, corners, Image.BICUBIC)
    return crop.transpose(Image.ROTATE_90) if height / width >= 1.5 else crop


def recogniser_input(crops):
    """Pillow images of lines -> (N, 3, 48, W) BGR in [-1, 1], each in its own proportions, padded on the right with 0; W >= 320, <= 3200.

    DEVIATION from transformers' processor, which stretches all lines of a batch to one width and keeps RGB: this is PP-OCR's own, that the
    weights were trained with.
    """
    width = int(REC_HEIGHT * max([REC_WIDTH / REC_HEIGHT] + [crop.width / crop.height for crop in crops]))
    width = min(width, REC_MAX_WIDTH)
    x = torch.zeros(len(crops), 3, REC_HEIGHT, width)
    for row, crop in zip(x, crops):
        w = min(width, math.ceil(REC_HEIGHT * crop.width / crop.height))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
        row[..., :w] = resize(pixels, REC_HEIGHT, w)[0].flip(0) / 127.5 - 1
    return x


def ctc_decode(index, prob, characters):
    """The most probable character of every step, index and prob (T,) -> the text and its confidence: repeats are one, then blanks (0) go."""
    keep = index != 0
    keep[1:] &= index[1:] != index[:-1]
    text = "".join(characters[i] for i in index[keep].tolist())
    return text, float(prob[keep].mean()) if text else 0.0


class Reader:
    """PP-OCRv5: finds the lines of text of an image and reads them. det, rec: hub names of its server models, or of the smaller mobile ones
    (PaddlePaddle/PP-OCRv5_mobile_det_safetensors, PaddlePaddle/PP-OCRv5_mobile_rec_safetensors).

    The characters are "character_list" of rec's preprocessor_config.json, the blank first.
    """

    def __init__(self, device, dtype, det="PaddlePaddle/PP-OCRv5_server_det_safetensors", rec="PaddlePaddle/PP-OCRv5_server_rec_safetensors"):
        import transformers
        folders = {"det": weights(det, "config.json", "*.safetensors"),
                   "rec": weights(rec, "config.json", "*.safetensors", "preprocessor_config.json")}
        self.net = torch.nn.ModuleDict()
        for part, folder in folders.items():
            name = (json.loads((folder / "config.json").read_text()).get("architectures") or ["none"])[0]
            if not (name.startswith("PPOCRV5") and hasattr(transformers, name)):
                raise ValueError(f"reader: got architecture {name} in {folder}/config.json, expected a PP-OCRv5 model of this transformers "
                                 f"({transformers.__version__}), such as PaddlePaddle/PP-OCRv5_server_{part}_safetensors")
            self.net[part] = pretrained(getattr(transformers, name), folder, dtype=dtype).to(device)
        self.characters = json.loads((folders["rec"] / "preprocessor_config.json").read_text()).get("character_list", [])
        outputs = self.net["rec"].config.head_out_channels
        if len(self.characters) != outputs:
            raise ValueError(f"reader: got {len(self.characters)} characters in {folders['rec']}/preprocessor_config.json, expected {outputs}, the "
                             "recogniser's outputs (the blank is the first); fetch the folder anew")

    @torch.no_grad()
    def __call__(self, images):
        """images (N, 3, H, W) in [0, 1] -> list (N) of str."""
        crops, owners = [], []  # all lines of all images, each image's in reading order
        for i in range(0, len(images), BATCH):
            pixels, net = grey_levels(images[i:i + BATCH]), self.net["det"]
            probs = net(text_detector_input(pixels.to(net.device)).to(net.dtype)).last_hidden_state[:, 0].float().cpu().numpy()
            for j, (prob, p) in enumerate(zip(probs, pixels)):
                boxes, image = text_boxes(prob, *p.shape[-2:]), to_pil(p)
                crops += [cut_out(image, boxes[k]) for k in reading_order(boxes)]
                owners += [i + j] * len(boxes)
        words = [[] for _ in images]
        for owner, (text, confidence) in zip(owners, self.recognise(crops)):
            if confidence >= MIN_CONFIDENCE:
                words[owner].append(text)
        return [" ".join(w) for w in words]

    @torch.no_grad()
    def recognise(self, crops):
        """Pillow images of lines -> list of (text, confidence), in their order."""
        net, read = self.net["rec"], [None] * len(crops)
        order = sorted(range(len(crops)), key=lambda i: crops[i].width / crops[i].height)  # lines of a length together: little padding
        for i in range(0, len(order), REC_BATCH):
            batch = order[i:i + REC_BATCH]
            x = recogniser_input([crops[k] for k in batch]).to(net.device, net.dtype)
            prob, index = (a.cpu() for a in net(x).last_hidden_state.float().max(-1))
            for k, p, c in zip(batch, prob, index):
                read[k] = ctc_decode(c, p, self.characters)
        return read
