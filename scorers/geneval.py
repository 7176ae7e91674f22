"""GenEval's detector of objects and their colours: Mask2Former and CLIP.

    detect = Detector("cuda", torch.float16)     # loads the weights
    detect(images, metas)                        # (N, 3, H, W) in [0, 1] and N prompts -> N lists

An object is a dict with "class", "score", "box" (x0, y0, x1, y1) in pixels and "color". rewards.py
has the rules that score the objects.

The benchmark runs mmdet's Mask2Former (Swin-S, COCO instances), which needs mmdet 2 and a compiled
mmcv of 2023. Here it is Meta's Mask2Former in transformers, with mmdet's resizing and padding, and
its reading of masks and scores. The two may differ in the weights: mmdet trained its own (mask AP
46.1 on COCO val2017), and the hub has Meta's (46.3). Architecture and data are the same. By design
there is one other difference: cv2 resizes in fixed point, so a pixel may differ by one grey level.

Do not use transformers' post_process_instance_segmentation for this. It reads the masks at
384 x 384 and thresholds them before it resizes, so boxes and mask scores differ. Its default
threshold is 0.5.

To check your installation, generate 4 images for each of the benchmark's 553 prompts. Use a model
of its table (djghosh13/geneval README). Score them with the reward geneval_benchmark, and compare
the tags. Stable Diffusion 2.1 has 0.98 single, 0.51 two, 0.44 counting, 0.85 colours, 0.07
position, 0.17 colour attribution and 0.50 overall. A tag has 320 to 400 images, so its standard
error is up to 0.028. A difference of 0.03 may be chance.

Sources: GenEval, djghosh13/geneval evaluation/evaluate_images.py; mmdet 2.28.2
(configs/mask2former, maskformer_fusion_head.py); for the colours open_clip 2.20.0 and
clip_benchmark 1.4.0 metrics/zeroshot_classification.py.
"""
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerModel

from plumbing.files import check_shapes, open_tensors, shapes_of
from scorers.pixels import clip_input, grey_levels, normalize, resize_like_cv2, to_pil
from scorers.weights import pretrained, weights

# COCO's 80 classes in the order of the detector's labels, in GenEval's spelling
# (evaluation/object_names.txt), which the files of prompts use.
CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
).split(",")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}",
             "a photo of a {color}-colored {name}",
             "a photo of a {color} object")

# From main in evaluate_images.py. There the threshold of non-maximum suppression is 1, so none
# takes place.
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16         # of one class in an image
MAX_INSTANCES = 100      # mmdet's test_cfg.max_per_image
# For RGB pixels in 0 .. 255.
COCO_MEAN = (123.675, 116.28, 103.53)
COCO_STD = (58.395, 57.12, 57.375)
BATCH = 8                # images in one forward

# ------------------------------------------------------------------ objects


class Mask2Former(torch.nn.Module):
    """transformers' Mask2FormerModel and the linear layer of the classes, in float32.

    transformers' Mask2FormerForUniversalSegmentation computes the same, but needs scipy.
    """

    def __init__(self, folder):
        super().__init__()
        self.model = pretrained(Mask2FormerModel, folder, others=("class_predictor.", "criterion."))
        check_labels(self.model.config.id2label)
        self.class_predictor = torch.nn.Linear(self.model.config.hidden_dim, len(CLASSES) + 1)
        tensors = read_class_predictor(folder)
        want = shapes_of(self.class_predictor.state_dict())
        check_shapes(want, shapes_of(tensors), folder, "class_predictor.")
        self.class_predictor.load_state_dict(tensors)
        self.requires_grad_(False)

    def forward(self, x):
        """x (N, 3, H, W) -> class logits (N, Q, 81) and mask logits (N, Q, H / 4, W / 4).

        Both come from the last layer. Q is the number of queries.
        """
        out = self.model(pixel_values=x, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), out.masks_queries_logits[-1]


def read_class_predictor(folder):
    """{"weight": ..., "bias": ...}, from whichever of the folder's files has them."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as file:
            for name in file.keys():
                if name.startswith("class_predictor."):
                    tensors[name.removeprefix("class_predictor.")] = file.get_tensor(name)
    return tensors


def check_classes(metas):
    """ValueError unless the detector knows every class that a prompt names.

    A class that it does not know would always score 0.
    """
    for meta in metas:
        for clause in meta.get("include", []) + meta.get("exclude", []):
            if clause.get("class") not in CLASSES:
                raise ValueError(
                    f"GenEval prompt {meta.get('prompt')!r}: got class {clause.get('class')!r}, "
                    "expected one of COCO's 80 in GenEval's spelling, such as 'computer mouse', "
                    "'tv remote', 'computer keyboard' or 'tv' (scorers.geneval.CLASSES)")


def check_labels(id2label):
    """ValueError unless the detector's labels are COCO's 80 in order.

    Names that are not in CLASSES pass, such as VOC's spellings (sofa, tvmonitor) and LABEL_7.
    """
    moved = []
    for i, name in id2label.items():
        if name in CLASSES and CLASSES.index(name) != int(i):
            moved.append(f"{i}: {name}")
    if len(id2label) != len(CLASSES) or moved:
        raise ValueError(f"detector: got {len(id2label)} labels, of them out of order {moved[:5]}, "
                         "expected COCO's 80 instance classes in order; "
                         "use facebook/mask2former-swin-small-coco-instance")


def detector_input(pixels):
    """(N, 3, H, W) uint8 RGB -> (N, 3, H', W') normalised, and the size before the padding.

    This is mmdet's test_pipeline for Mask2Former. The image is scaled to fit 1333 x 800. So
    512 x 512 becomes 800 x 800. Grey 128 pads it below and to the right, to multiples of 32.
    """
    height, width = pixels.shape[-2:]
    scale = min(1333 / max(height, width), 800 / min(height, width))
    height = int(height * scale + 0.5)
    width = int(width * scale + 0.5)
    resized = resize_like_cv2(pixels, height, width)
    padded = F.pad(resized, (0, -width % 32, 0, -height % 32), value=128)
    return normalize(padded, COCO_MEAN, COCO_STD), (height, width)


def resize_masks(logits, padded, resized, size):
    """Mask logits (M, h, w) -> (M, *size): resize to padded, cut the padding off, resize to size.

    padded, resized and size: see instances. Like mmdet, this resizes the logits, not the masks.
    """
    logits = F.interpolate(logits[None], padded, mode="bilinear", align_corners=False)
    logits = logits[..., :resized[0], :resized[1]]
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]


def boxes_of(masks):
    """Masks (M, H, W), none of them empty -> the boxes around them (M, 4): x0, y0, x1, y1."""
    height, width = masks.shape[1:]
    columns = masks.any(1).int()
    rows = masks.any(2).int()
    x0 = columns.argmax(1)
    y0 = rows.argmax(1)
    x1 = width - columns.flip(1).argmax(1)
    y1 = height - rows.flip(1).argmax(1)
    return torch.stack([x0, y0, x1, y1], 1).float()


def instances(class_logits, mask_logits, padded, resized, size, threshold):
    """The instances of one image with a score over the threshold, as mmdet reads Mask2Former.

    class_logits (Q, 81), the last of them "no object"; mask_logits (Q, h, w). padded, resized and
    size are (height, width): of the network's input, of the image in it, and of the image itself.
    Returns scores (M,), labels (M,), boxes (M, 4) and masks (M, H, W) bool. A query counts once
    for every class that is among the MAX_INSTANCES most probable pairs of query and class.
    """
    probs = class_logits.softmax(-1)[:, :-1]
    scores, pairs = probs.flatten().topk(min(MAX_INSTANCES, probs.numel()))
    # The score of a mask is at most 1, so the other pairs cannot pass the threshold below. Their
    # masks are not computed.
    keep = scores > threshold
    scores = scores[keep]
    pairs = pairs[keep]
    labels = pairs % probs.shape[1]
    if len(pairs) == 0:
        masks = torch.zeros(0, *size, dtype=torch.bool, device=scores.device)
        return scores, labels, scores.new_zeros(0, 4), masks
    logits = resize_masks(mask_logits[pairs // probs.shape[1]], padded, resized, size)
    masks = logits > 0
    # The score of a mask is the mean probability inside it: 0 if it is empty.
    inside = (logits.sigmoid() * masks).flatten(1).sum(1)
    scores = scores * (inside / (masks.flatten(1).sum(1) + 1e-6))
    keep = scores > threshold
    masks = masks[keep]
    return scores[keep], labels[keep], boxes_of(masks), masks


def most_confident(scores, labels):
    """Indices of at most MAX_OBJECTS instances a class, the most confident first."""
    kept = []
    count = dict.fromkeys(labels.tolist(), 0)
    for i in scores.argsort(descending=True).tolist():
        label = int(labels[i])
        count[label] += 1
        if count[label] <= MAX_OBJECTS:
            kept.append(i)
    return kept


# ------------------------------------------------------------------ colours


def color_crop(image, mask, box):
    """The object on grey, cropped to its box (in pixels).

    image: a Pillow image. mask: a bool array (H, W).
    """
    blank = Image.new("RGB", image.size, "#999")
    on_grey = Image.composite(image, blank, Image.fromarray(mask))
    return on_grey.crop(tuple(round(side) for side in box))


def text_embeddings(clip, tokenizer, texts):
    """texts -> their normalised embeddings (len(texts), D), float32."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
    return F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)


def image_embeddings(clip, x):
    """x (N, 3, S, S) -> normalised (N, D) float32."""
    features = clip.get_image_features(pixel_values=x.to(clip.device, clip.dtype))
    return F.normalize(features.pooler_output.float(), dim=-1)


def color_classifier(clip, tokenizer, name):
    """A unit vector for each colour of objects called name, (10, D).

    It is the mean over the templates of the normalised text embeddings.
    """
    vectors = []
    for color in COLORS:
        texts = [template.format(color=color, name=name) for template in TEMPLATES]
        vectors.append(text_embeddings(clip, tokenizer, texts).mean(0))
    return F.normalize(torch.stack(vectors), dim=-1)


# ------------------------------------------------------------------ both


class Detector:
    """The objects of an image. An object has a colour only if the prompt names one for its class.

    Mask2Former ignores dtype and computes in float32, as in the benchmark: near a threshold a small
    error would change the result. CLIP computes in dtype (the benchmark: autocast).

    The CLIP of the colours has QuickGELU. transformers' openai/clip-vit-large-patch14 has it, and
    so has the benchmark's open_clip 2.20.0: its loader of pretrained="openai" switches it on.
    Newer open_clip (seen in 3.3.0) only warns, and computes "ViT-L-14" with plain GELU. With it,
    GenEval finds other colours than the benchmark and this, unless "ViT-L-14-quickgelu" is set.
    """

    def __init__(self, device, dtype, detector="facebook/mask2former-swin-small-coco-instance",
                 clip="openai/clip-vit-large-patch14"):
        folder = weights(clip, "config.json", "*.safetensors", "vocab.json", "merges.txt")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.net = torch.nn.ModuleDict({
            "detector": Mask2Former(weights(detector, "config.json", "*.safetensors")),
            "clip": pretrained(CLIPModel, folder, dtype=dtype),
        }).to(device)
        self.classifiers = {}                           # class name -> (10, D)

    @torch.no_grad()
    def __call__(self, images, metas):
        """images (N, 3, H, W) in [0, 1], metas: N dicts in GenEval's schema -> N lists of objects.

        The most confident object comes first.
        """
        if len(images) != len(metas):
            raise ValueError(f"detector: got {len(images)} images and {len(metas)} prompts, "
                             "expected one prompt an image")
        check_classes(metas)
        found = []
        for i in range(0, len(images), BATCH):
            found += self.detect(grey_levels(images[i:i + BATCH]), metas[i:i + BATCH])
        return found

    def detect(self, pixels, metas):
        """__call__ for one batch. pixels (N, 3, H, W) uint8, on the CPU."""
        net = self.net["detector"]
        x, resized = detector_input(pixels.to(net.model.device))
        found = []
        uncolored = []                                  # objects that wait for their colour
        crops = []                                      # and their pictures
        for image, class_logits, mask_logits, meta in zip(pixels, *net(x), metas):
            threshold = COUNTING_THRESHOLD if meta.get("tag") == "counting" else THRESHOLD
            asked = {clause["class"] for clause in meta.get("include", []) if "color" in clause}
            scores, labels, boxes, masks = instances(
                class_logits, mask_logits, x.shape[-2:], resized, image.shape[-2:], threshold)
            objects = []
            for i in most_confident(scores, labels):
                box = tuple(boxes[i].tolist())
                thing = {"class": CLASSES[labels[i]], "score": float(scores[i]), "box": box,
                         "color": None}
                objects.append(thing)
                if thing["class"] in asked:
                    uncolored.append(thing)
                    crops.append(color_crop(to_pil(image), masks[i].cpu().numpy(), box))
            found.append(objects)
        self.color(uncolored, crops)
        return found

    def color(self, objects, crops):
        """Set the colour of each object, from its crop (a Pillow image)."""
        clip = self.net["clip"]
        for i in range(0, len(crops), 8 * BATCH):
            x = clip_input(crops[i:i + 8 * BATCH], clip.config.vision_config.image_size, crop=round)
            for thing, embedding in zip(objects[i:], image_embeddings(clip, x)):
                similarity = self.classifier(thing["class"]) @ embedding
                thing["color"] = COLORS[int(similarity.argmax())]

    def classifier(self, name):
        """color_classifier, computed once for each name."""
        clip = self.net["clip"]
        if name not in self.classifiers:
            self.classifiers[name] = color_classifier(clip, self.tokenizer, name)
        return self.classifiers[name].to(clip.device)
