"""Facts about detectors.py, on small random networks, hand-made logits and drawn text. cv2, if it is there, is the judge of PP-OCR's boxes."""
import glob
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import detectors
from detectors import CLASSES, COLORS, Detector, Reader
from scorers import CLIP_MEAN, CLIP_STD

FONTS = sorted(glob.glob("/usr/share/fonts/truetype/dejavu/DejaVuS*.ttf"))[::4]


def meta(tag="single_object", *include, **rest):
    return {"tag": tag, "include": list(include) or [{"class": "cat", "count": 1}], "prompt": "a photo", **rest}


def random_logits(seed, queries=20, side=24, size=(40, 56)):
    """Class logits that are sure of some queries, mask logits, one of them empty, and the three sizes of a padded input."""
    g = torch.Generator().manual_seed(seed)
    masks = F.interpolate(torch.randn(1, queries, 5, 5, generator=g) * 4, (side, side), mode="bicubic")[0]
    masks[3] = -1
    classes = torch.randn(queries, 81, generator=g) * 3
    classes[3, 7] = 20
    classes[4, 5], classes[4, 6] = 15, 14.9  # a query that counts for two classes
    return classes, masks, (4 * side, 4 * side), (80, 90), size


# ------------------------------------------------------------------ Mask2Former


def as_mmdet(classes, masks, padded, resized, size):
    """mmdet's instance_postprocess and mask2bbox, from their definition, a query at a time and without any shortcut."""
    masks = F.interpolate(masks[None], padded, mode="bilinear")[:, :, :resized[0], :resized[1]]
    masks = F.interpolate(masks, size, mode="bilinear")[0].double().numpy()
    probs = torch.softmax(classes.double(), 1).numpy()[:, :80]
    pairs = sorted(((probs[q, c], q, c) for q in range(len(probs)) for c in range(80)), reverse=True)[:100]
    found = []
    for p, q, c in pairs:
        inside = masks[q] > 0
        score = p * (1 / (1 + np.exp(-masks[q][inside]))).sum() / (inside.sum() + 1e-6)
        ys, xs = np.nonzero(inside)
        found.append((score, c, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0), inside))
    return sorted(found, key=lambda f: -f[0])


def as_benchmark(threshold, *logits):
    """Those of them that the benchmark looks at: over the threshold, at most 16 of a class."""
    kept = [f for f in as_mmdet(*logits) if f[0] > threshold]
    return [f for i, f in enumerate(kept) if sum(g[1] == f[1] for g in kept[:i]) < 16]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.02])
def test_instances_are_mmdets(seed, threshold):
    logits = random_logits(seed)
    expected = [f for f in as_mmdet(*logits) if f[0] > threshold]
    scores, labels, boxes, masks = detectors.instances(*logits, threshold)
    order = scores.argsort(descending=True)
    assert len(expected) == len(scores) > 2
    np.testing.assert_allclose(scores[order], [f[0] for f in expected], rtol=1e-4)
    assert labels[order].tolist() == [f[1] for f in expected]
    assert boxes[order].tolist() == [list(f[2]) for f in expected]
    assert all((masks[i].numpy() == f[3]).all() for i, f in zip(order, expected))


def test_instances_of_nothing_are_none():
    classes, masks, *sizes = random_logits(0)
    scores, labels, boxes, masks = detectors.instances(torch.zeros_like(classes), masks, *sizes, 0.3)
    assert len(scores) == len(labels) == 0 and boxes.shape == (0, 4) and masks.shape == (0, 40, 56)


def test_transformers_post_processing_agrees_only_at_its_own_384_pixels():
    """Its scores are mmdet's if the image is 384 x 384; on another image it scores the masks at 384 still, so they are not."""
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    classes, masks, *_ = random_logits(1)

    class Output:
        class_queries_logits, masks_queries_logits = classes[None], masks[None]

    def theirs(size):
        result = Mask2FormerImageProcessorPil().post_process_instance_segmentation(Output, threshold=0.02, target_sizes=[size])[0]
        return sorted(s["score"] for s in result["segments_info"])

    def ours(padded, size):
        # they keep as many pairs as there are queries, mmdet keeps 100
        return sorted(detectors.instances(classes, masks, padded, padded, size, 0.02)[0].tolist())[-len(theirs(size)):]

    np.testing.assert_allclose(ours((384, 384), (384, 384)), theirs((384, 384)), atol=2e-6)
    assert np.abs(np.subtract(ours((96, 96), (40, 56)), theirs((40, 56)))).max() > 1e-3


def test_a_square_is_found_where_it_is():
    """512 pixels are 800 to the network and 200 to its masks: cells 50 to 99 are pixels 128 to 255."""
    classes, masks = torch.zeros(2, 81), torch.full((2, 200, 200), -20.0)
    classes[0, CLASSES.index("dog")] = classes[1, 80] = 20
    masks[0, 50:100, 25:75] = 20
    scores, labels, boxes, _ = detectors.instances(classes, masks, (800, 800), (800, 800), (512, 512), 0.3)
    assert labels.tolist() == [CLASSES.index("dog")] and scores[0] > 0.97
    assert boxes.tolist() == [[64, 128, 192, 256]]


def test_detector_input_is_mmdets():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 300, 400), dtype=np.uint8))
    x, resized = detectors.detector_input(image)
    assert x.shape == (1, 3, 800, 1088) and resized == (800, 1067)
    grey = (128 - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(x[0, :, 400, 1080], grey, rtol=1e-5)
    pixels = x[0, :, :, :1067].permute(1, 2, 0).numpy() * [58.395, 57.12, 57.375] + [123.675, 116.28, 103.53]
    pillow = np.asarray(detectors.to_pil(image[0]).resize((1067, 800), Image.BILINEAR), np.float64)  # the same as cv2's where it enlarges
    assert np.abs(pixels - pillow).max() < 1.01
    for height, width, expected in ((512, 512, (800, 800)), (1024, 1024, (800, 800)), (256, 1024, (333, 1333))):
        x, resized = detectors.detector_input(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        assert resized == expected and x.shape[2] % 32 == x.shape[3] % 32 == 0 and x.shape[2] - resized[0] < 32


@pytest.mark.parametrize("size", [(75, 61), (31, 200), (11, 13)])
def test_resize_is_cv2s(size):
    cv2 = pytest.importorskip("cv2", reason="cv2 judges the resizing, larger and smaller")
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    ours = detectors.resize(torch.from_numpy(image).permute(2, 0, 1)[None], *size)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - cv2.resize(image, size[::-1]).astype(float)).max() <= 1


def test_at_most_sixteen_of_a_class_the_most_confident_first():
    scores, labels = torch.rand(40, generator=torch.Generator().manual_seed(0)), torch.tensor([0] * 30 + [1] * 10)
    kept = detectors.most_confident(scores, labels)
    assert sorted(scores[kept].tolist(), reverse=True) == scores[kept].tolist() and len(kept) == 26
    assert {i for i in kept if i < 30} == set(scores[:30].argsort(descending=True)[:16].tolist())


def test_classes_are_cocos_in_order():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES.index(c) for c in ("person", "cat", "computer mouse", "tv remote", "computer keyboard", "cell phone", "toothbrush")] == [
        0, 15, 64, 65, 66, 67, 79]
    voc = {**dict(enumerate(CLASSES)), 3: "motorbike", 4: "aeroplane", 57: "sofa", 62: "tvmonitor", 64: "mouse"}
    detectors.check_labels(voc)
    detectors.check_labels({i: f"LABEL_{i}" for i in range(80)})
    for wrong in ({i: str(i) for i in range(133)}, {**voc, 15: "dog", 16: "cat"}):
        with pytest.raises(ValueError, match="expected COCO's 80"):
            detectors.check_labels(wrong)


# ------------------------------------------------------------------ colours


def test_color_crop_shows_the_object_on_grey():
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:9] = True
    mask[2, 4] = False
    crop = np.array(detectors.color_crop(image, mask, (4.0, 2.0, 9.0, 6.0)))
    assert crop.shape == (4, 5, 3)
    assert crop[0, 0].tolist() == [0x99] * 3 and (crop[1:] == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(300, 500), (641, 230), (224, 224), (100, 60), (7, 90)])
def test_clip_input_is_clips(size):
    """Against transformers' processor, where the margin is even (with an odd one it crops a pixel elsewhere than torchvision does)."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = detectors.clip_input(image)
    margin = int(224 * max(size) / min(size)) - 224
    if margin % 2:
        side = margin + 224
        resized = image.resize((224, side) if size[0] < size[1] else (side, 224), Image.BICUBIC)
        start = round(margin / 2)  # torchvision's center_crop rounds half to even
        x = np.asarray(resized)[start:start + 224] if size[0] < size[1] else np.asarray(resized)[:, start:start + 224]
        theirs = torch.from_numpy((x / 255 - CLIP_MEAN.flatten().numpy()) / CLIP_STD.flatten().numpy()).permute(2, 0, 1).float()
    else:
        theirs = torch.as_tensor(np.array(CLIPImageProcessorPil()(image)["pixel_values"][0]))
    assert ours.shape == theirs.shape == (3, 224, 224)
    assert (ours - theirs).abs().max() < 1.01 / 255 / CLIP_STD.min()


# ------------------------------------------------------------------ the whole detector, on small random networks


def save_clip(folder):
    from transformers import CLIPConfig, CLIPModel
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)]
    vocab = {t: i for i, t in enumerate(letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    net = CLIPModel(CLIPConfig(text_config=dict(small, vocab_size=len(vocab), max_position_embeddings=77, bos_token_id=len(vocab) - 2,
                                                eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1),
                               vision_config=dict(small, image_size=28, patch_size=14), projection_dim=16))
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    net.save_pretrained(folder)


def save_detector(folder):
    from safetensors.torch import load_file, save_file
    from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig
    torch.manual_seed(0)
    swin = SwinConfig(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2], window_size=4, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=3,
                               encoder_feedforward_dim=32, dim_feedforward=32, num_attention_heads=2, num_queries=30, num_labels=80)
    net = Mask2FormerModel(config)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    for name in ("queries_features", "queries_embedder"):  # queries that see different things
        getattr(net.transformer_module, name).weight.data *= 30
    net.save_pretrained(folder)
    # the hub's file is the whole model: a prefix, and the head (and the loss's weights, which nothing reads); sure of its classes here
    tensors = {"model." + k: v for k, v in load_file(folder / "model.safetensors").items()}
    head = {"class_predictor.weight": 3 * torch.randn(81, 32), "class_predictor.bias": torch.zeros(81), "criterion.empty_weight": torch.ones(81)}
    save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_MODELS", str(folder))
        save_clip(folder / "clip-vit-large-patch14")
        save_detector(folder / "mask2former-swin-small-coco-instance")
        save_readers(folder)
        yield folder


@pytest.fixture(scope="module")
def detector(models):
    return Detector("cpu", torch.float32)


def pictures(n, height=64, width=96):
    g = torch.Generator().manual_seed(1)
    return F.interpolate(torch.rand(n, 3, 6, 6, generator=g), (height, width), mode="bicubic").clamp(0, 1)


def test_mask2former_is_transformers_own(detector, models, monkeypatch):
    """The released file's names load into both, and both give the same; theirs without the question for scipy, which only its loss calls."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former import modeling_mask2former
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(models / "mask2former-swin-small-coco-instance").eval()
    x = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        out, (classes, masks) = theirs(pixel_values=x), detector.net["detector"](x)
    assert torch.equal(out.class_queries_logits, classes) and torch.equal(out.masks_queries_logits, masks)
    assert classes.shape == (1, 30, 81) and masks.shape == (1, 30, 32, 40)


def test_detector_finds_what_mmdets_steps_find(detector):
    images = pictures(2)
    found = detector(images, [meta(), meta("counting")])
    x, resized = detectors.detector_input((images * 255).round().to(torch.uint8))
    with torch.no_grad():
        logits = detector.net["detector"](x)
    for objects, classes, masks, threshold in zip(found, *logits, (0.3, 0.9)):
        expected = as_benchmark(threshold, classes, masks, x.shape[-2:], resized, (64, 96))
        assert [(o["class"], o["box"]) for o in objects] == [(CLASSES[c], tuple(map(float, box))) for _, c, box, _ in expected]
        np.testing.assert_allclose([o["score"] for o in objects], [f[0] for f in expected], rtol=1e-4)
        assert all(o["color"] is None for o in objects)
    assert len(found[0]) > len(found[1]) > 1 and len({o["box"] for o in found[0]}) > 5


def test_colors_are_the_classifiers(detector, monkeypatch):
    """Only classes with a colour clause get one, and it is the arg max that the benchmark's own steps give."""
    image = pictures(1)
    seen = [o["class"] for o in detector(image, [meta()])[0]]
    name = seen[0]
    objects = detector(image, [meta("colors", {"class": name, "count": 1, "color": "red"}, {"class": seen[-1], "count": 1})])[0]
    assert {o["class"] for o in objects if o["color"]} == {name}
    clip, tokenizer = detector.net["clip"], detector.tokenizer

    def encode(model_output):
        return model_output.pooler_output / model_output.pooler_output.norm(dim=-1, keepdim=True)

    columns = []
    with torch.no_grad():
        for color in COLORS:
            texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
            # open_clip pads to 77 with 0, transformers with the end token to the longest: what follows the end is never looked at
            tokens = [tokenizer(t)["input_ids"] for t in texts]
            tokens = torch.tensor([t + [0] * (77 - len(t)) for t in tokens])
            column = encode(clip.get_text_features(input_ids=tokens)).mean(0)
            columns.append(column / column.norm())
        classifier = torch.stack(columns, 1)                                     # (D, 10), as clip_benchmark has it
        torch.testing.assert_close(detector.classifier(name), classifier.T, atol=1e-5, rtol=1e-4)
        pixels = (image * 255).round().to(torch.uint8)
        x, resized = detectors.detector_input(pixels)
        expected = as_benchmark(0.3, *(a[0] for a in detector.net["detector"](x)), x.shape[-2:], resized, (64, 96))
        features = []
        for _, c, (x0, y0, x1, y1), mask in expected:
            if CLASSES[c] == name:
                crop = np.where(mask[..., None], pixels[0].permute(1, 2, 0).numpy(), 0x99)[y0:y1, x0:x1].astype(np.uint8)
                features.append(encode(clip.get_image_features(pixel_values=detectors.clip_input(Image.fromarray(crop), 28)[None])))
    features = torch.cat(features)
    colors = [COLORS[i] for i in (100 * features @ classifier).argmax(1)]
    assert [o["color"] for o in objects if o["class"] == name] == colors
    # this small CLIP sees the same colour everywhere: once more with ten directions in which its pictures do differ
    common = F.normalize(features.mean(0), dim=0)
    directions = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    directions -= (directions @ common)[:, None] * common
    monkeypatch.setitem(detector.classifiers, name, directions)
    colors = [COLORS[i] for i in (features @ directions.T).argmax(1)]
    for batch in (8, 1):  # and however many crops go through CLIP at once
        monkeypatch.setattr(detectors, "BATCH", batch)
        objects = detector(image, [meta("colors", {"class": name, "count": 1, "color": "red"})])[0]
        assert [o["color"] for o in objects if o["class"] == name] == colors and len(set(colors)) > 2


def test_images_of_a_batch_do_not_touch(detector, monkeypatch):
    images, metas = pictures(3), [meta(), meta("colors", {"class": "dog", "count": 1, "color": "red"}), meta("counting")]
    together = detector(images, metas)
    monkeypatch.setattr(detectors, "BATCH", 2)
    for a, b in zip(together, detector(images, metas)):
        assert [o["class"] for o in a] == [o["class"] for o in b]
        np.testing.assert_allclose([o["box"] for o in a], [o["box"] for o in b], atol=1)


def test_detector_errors(detector, models, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got class 'mouse'"):
        detector(pictures(1), [meta("single_object", {"class": "mouse", "count": 1})])
    with pytest.raises(ValueError, match="got 2 images and 1 prompts"):
        detector(pictures(2), [meta()])
    from safetensors.torch import load_file, save_file
    source = models / "mask2former-swin-small-coco-instance"
    tensors = load_file(source / "model.safetensors")
    for drop, message in (("class_predictor.bias", "class_predictor"), ("model.transformer_module.queries_embedder.weight", "queries_embedder")):
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        save_file({k: v for k, v in tensors.items() if k != drop}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            detectors.Mask2Former(tmp_path)


# ------------------------------------------------------------------ PP-OCR: boxes


def flood(mask):
    """The 8-connected parts of a small map, one pixel at a time."""
    left, parts = {(x, y) for y, x in zip(*np.nonzero(mask))}, []
    while left:
        part, todo = set(), [left.pop()]
        while todo:
            x, y = todo.pop()
            part.add((x, y))
            near = {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        parts.append(part)
    return parts


@pytest.mark.parametrize("density", [0.1, 0.35, 0.6])
def test_components_are_those_of_a_flood(density):
    mask = np.random.default_rng(0).random((30, 40)) < density
    ours = [set(map(tuple, part)) for part in detectors.components(mask)]
    theirs = flood(mask)
    assert len(ours) == len(theirs) > 1
    for part in ours:  # ends of the runs of exactly one part: the same extremes in every direction
        whole, = [p for p in theirs if part <= p]
        for direction in np.random.default_rng(1).normal(size=(20, 2)):
            assert max(np.dot(p, direction) for p in part) == max(np.dot(p, direction) for p in whole)


def test_smallest_rectangle_is_the_smallest():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.integers(0, 50, (rng.integers(3, 30), 2)).astype(float)
        box, short = detectors.smallest_rectangle(points)
        sides = np.linalg.norm(np.roll(box, -1, 0) - box, axis=1)
        assert np.isclose(sides.min(), short) and np.allclose(sides[:2], sides[2:])
        turn = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.linspace(0, np.pi / 2, 400)]
        areas = [np.prod(np.ptp(points @ t, axis=0)) for t in turn]
        assert sides[0] * sides[1] <= min(areas) + 1e-6
        for i in range(4):  # all points are inside, and the corners go round clockwise on the screen
            edge, to = box[(i + 1) % 4] - box[i], points - box[i]
            assert (edge[0] * to[:, 1] - edge[1] * to[:, 0] >= -1e-6).all()
    box, short = detectors.smallest_rectangle(np.array([[0, 0], [10, 0], [10, 4], [0, 4.0]]), grow=2)
    assert box.tolist() == [[-2, -2], [12, -2], [12, 6], [-2, 6]] and short == 8
    for degenerate in ([[3, 3]], [[3, 3], [9, 3]]):
        assert detectors.smallest_rectangle(np.array(degenerate, float))[1] == 0


def turn(angle):
    """Rows times this are turned counter-clockwise on the screen, as Pillow's rotate does."""
    a = math.radians(angle)
    return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def line_of_text(text, font, size, angle=0, side=512, at=None):
    """White text on black turned about its centre: the picture, and corners (4, 2) of the rectangle around it, as loose as an annotator's."""
    face = ImageFont.truetype(font, size)
    x0, y0, x1, y1 = face.getbbox(text)
    centre, half = np.array(at or (side / 2, side / 2)), np.array([x1 - x0, y1 - y0]) / 2 + 1 + size / 20
    flat = Image.new("L", (side, side))
    ImageDraw.Draw(flat).text(tuple(centre - ((x0 + x1) / 2, (y0 + y1) / 2)), text, 255, face)
    corners = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ turn(angle) + centre
    return flat.rotate(angle, Image.BICUBIC, center=tuple(centre)), corners


def shrunk_map(quads, side=512):
    """A probability map of the cores of the quads: each shrunk by what its growth by area * 1.5 / perimeter undoes, 0.3 of a long line's height.

    DB's training target is smaller still (0.42 of the height, from the looser polygons of its data); what the real network marks, grown so, is
    the line: see convert_ppocr.py.
    """
    image = Image.new("L", (side, side))
    for quad in quads:
        w, h = np.linalg.norm(quad[1] - quad[0]), np.linalg.norm(quad[3] - quad[0])
        d = 0.0
        for _ in range(100):
            d = (d + 1.5 * (w - 2 * d) * (h - 2 * d) / (2 * (w + h - 4 * d))) / 2
        u, v = (quad[1] - quad[0]) / w, (quad[3] - quad[0]) / h
        inner = quad + d * np.array([u + v, -u + v, -u - v, u - v])
        ImageDraw.Draw(image).polygon([tuple(p) for p in inner], fill=240)
    return np.asarray(image, np.float32) / 255


def covered(box, ink):
    """Share of the ink (H, W) that lies in the box."""
    mask = Image.new("L", ink.shape[::-1])
    ImageDraw.Draw(mask).polygon([tuple(p) for p in box], fill=255, outline=255)
    return ink[np.asarray(mask) > 0].sum() / ink.sum()


@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("size", [18, 32, 64])
@pytest.mark.parametrize("angle", [0, 12, -25])
def test_drawn_text_is_found_and_cut_out(font, size, angle):
    image, quad = line_of_text("Hello reward", font, size, angle)
    found = detectors.text_boxes(shrunk_map([quad]), 512, 512)
    assert len(found) == 1
    areas = [np.linalg.norm(b[1] - b[0]) * np.linalg.norm(b[3] - b[0]) for b in (found[0], quad)]
    assert covered(found[0], np.asarray(image, float)) > 0.99   # all of the text
    assert areas[0] < 1.3 * areas[1]                            # and little else
    # turned back, it is the line that was drawn
    upright = np.asarray(detectors.cut_out(image.convert("RGB"), found[0]).convert("L").resize((150, 20)), float)
    flat, _ = line_of_text("Hello reward", font, size)
    box = ((found[0] - 256) @ turn(-angle) + 256).round()
    drawn = np.asarray(flat.crop((*box.min(0), *box.max(0))).resize((150, 20)), float)
    assert np.corrcoef(upright.ravel(), drawn.ravel())[0, 1] > 0.85


def test_boxes_scale_to_the_image_and_specks_and_doubts_are_dropped():
    prob = np.zeros((64, 128), np.float32)
    prob[20:40, 30:90] = 0.9
    prob[50:52, 5:7] = 0.9    # too small
    prob[5:15, 100:120] = 0.5  # over the threshold, below the score
    found = detectors.text_boxes(prob, 128, 512)
    d = 59 * 19 * 1.5 / (2 * (59 + 19))  # pixels' centres span 59 and 19
    expected = np.round(np.array([[30 - d, 20 - d], [89 + d, 20 - d], [89 + d, 39 + d], [30 - d, 39 + d]]) * [4, 2])
    assert len(found) == 1
    np.testing.assert_allclose(found[0], expected)
    assert detectors.text_boxes(np.zeros((64, 64)), 64, 64).shape == (0, 4, 2)


def paddle_boxes(prob, height, width):
    """DBPostProcess.boxes_from_bitmap of paddleocr with cv2 itself; a rectangle pushed out by pyclipper is the rectangle, grown."""
    import cv2

    def mini_box(contour):
        rect = cv2.minAreaRect(contour.astype(np.float32))
        p = sorted(cv2.boxPoints(rect).tolist())
        left, right = sorted(p[:2], key=lambda p: p[1]), sorted(p[2:], key=lambda p: p[1])
        return np.array([left[0], right[0], right[1], left[1]]), rect

    boxes = []
    for contour in cv2.findContours((prob > 0.3).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        box, rect = mini_box(contour)
        if min(rect[1]) < 3:
            continue
        mask = np.zeros(prob.shape, np.uint8)
        cv2.fillPoly(mask, box.astype(np.int32)[None], 1)
        if cv2.mean(prob, mask)[0] < 0.6:
            continue
        d = rect[1][0] * rect[1][1] * 1.5 / (2 * sum(rect[1]))
        box, rect = mini_box(cv2.boxPoints((rect[0], (rect[1][0] + 2 * d, rect[1][1] + 2 * d), rect[2])))
        boxes.append(np.clip(np.round(box / prob.shape[::-1] * (width, height)), 0, (width, height)))
    return np.array(boxes).reshape(-1, 4, 2)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_are_paddles(seed):
    pytest.importorskip("cv2", reason="cv2 judges PP-OCR's boxes")
    rng = np.random.default_rng(seed)
    quads = [line_of_text("word" * rng.integers(1, 4), FONTS[0], int(rng.integers(14, 40)), rng.uniform(-30, 30), at=(x, y))[1]
             for x in (130, 380) for y in (80, 250, 430)]
    prob = np.clip(shrunk_map(quads) + rng.normal(0, 0.03, (512, 512)), 0, 1).astype(np.float32)
    ours, theirs = detectors.text_boxes(prob, 768, 640), paddle_boxes(prob, 768, 640)
    assert len(ours) == len(theirs) >= 4
    for box in ours:
        assert np.abs(theirs - box).max((1, 2)).min() <= 1


def test_reading_order_is_by_lines_and_from_the_left():
    def box(x, y, h=20):
        return [[x, y], [x + 50, y], [x + 50, y + h], [x, y + h]]
    # a first line whose words sit up to 7 pixels apart, a taller second line, a third
    boxes = np.array([box(200, 17), box(10, 110, 60), box(80, 10), box(150, 118, 50), box(10, 14), box(300, 200)], float)
    assert detectors.reading_order(boxes) == [4, 2, 0, 1, 3, 5]
    assert detectors.reading_order(3 * boxes) == [4, 2, 0, 1, 3, 5]  # paddle's ten pixels would not do here
    assert detectors.reading_order(np.zeros((0, 4, 2))) == []


# ------------------------------------------------------------------ PP-OCR: pre-processing, decoding


def test_cut_out_of_an_upright_box_is_the_crop_and_a_tall_one_is_laid_flat():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    box = np.array([[10, 20], [70, 20], [70, 40], [10, 40.0]])
    assert (np.asarray(detectors.cut_out(image, box)) == np.asarray(image)[20:40, 10:70]).all()
    tall = np.array([[10, 5], [30, 5], [30, 55], [10, 55.0]])
    assert (np.asarray(detectors.cut_out(image, tall)) == np.rot90(np.asarray(image)[5:55, 10:30])).all()


def test_text_detector_input_is_paddles():
    image = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    image[:, 0] = 255  # red
    x = detectors.text_detector_input(image)
    assert x.shape == (1, 3, 512, 512)
    expected = [(0 - 0.485) / 0.229, (0 - 0.456) / 0.224, (1 - 0.406) / 0.225]  # blue, green, red
    np.testing.assert_allclose(x[0, :, 100, 100], expected, rtol=1e-5)
    for size, expected in (((1000, 600), (960, 576)), ((1024, 1024), (960, 960)), ((500, 330), (512, 320)), ((20, 40), (32, 32))):
        assert detectors.text_detector_input(torch.zeros(1, 3, *size, dtype=torch.uint8)).shape[2:] == expected


def test_recogniser_input_is_paddles():
    red, wide = Image.new("RGB", (100, 30), (255, 0, 0)), Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 700, 3), dtype=np.uint8))
    x = detectors.recogniser_input([red])
    assert x.shape == (1, 3, 48, 320)
    assert (x[0, :2, :, :160] == -1).all() and (x[0, 2, :, :160] == 1).all()  # ceil(48 * 100 / 30) = 160 columns, BGR in [-1, 1]
    assert (x[0, :, :, 160:] == 0).all()
    odd = detectors.recogniser_input([red.resize((101, 30))])       # 161.6 columns
    assert (odd[0, 2, :, :162] == 1).all() and (odd[0, :, :, 162:] == 0).all()
    both = detectors.recogniser_input([red, wide])
    assert both.shape == (2, 3, 48, 700) and (both[0, :, :, 160:] == 0).all()
    np.testing.assert_allclose(both[1].flip(0).permute(1, 2, 0), np.asarray(wide) / 127.5 - 1, atol=1e-5)
    assert detectors.recogniser_input([wide.resize((9000, 48))]).shape == (1, 3, 48, 3200)


def test_ctc_decoding_is_exact():
    characters = ["blank", "a", "b", " "]

    def decode(*index):
        return detectors.ctc_decode(torch.tensor(index), torch.linspace(0.5, 1, len(index)), characters)

    assert decode(0, 1, 1, 0, 1, 2, 2, 2, 0, 0)[0] == "aab"
    assert decode(1, 2, 1, 3, 3, 2)[0] == "aba b"
    assert decode(0, 0, 0) == ("", 0.0)
    text, confidence = decode(1, 1, 0, 0, 2)                        # of the first of every repeat: 0.5 and 1
    assert text == "ab" and confidence == pytest.approx((0.5 + 1.0) / 2)


# ------------------------------------------------------------------ the whole reader, on small random networks

CHARACTERS = ["blank"] + list("abcdefghijklmnopqrstuvwxyz0123456789.,") + [" "]


def save_readers(folder):
    from transformers import (PPOCRV5MobileDetConfig, PPOCRV5MobileDetForObjectDetection, PPOCRV5MobileRecConfig, PPOCRV5MobileRecForTextRecognition,
                              PPOCRV5ServerDetConfig, PPOCRV5ServerDetForObjectDetection, PPOCRV5ServerRecConfig, PPOCRV5ServerRecForTextRecognition)
    torch.manual_seed(0)
    features = [f"stage{i}" for i in (1, 2, 3, 4)]
    hgnet = dict(model_type="hgnet_v2", stem_channels=[3, 4, 4], stem_strides=[2, 1, 1, 2, 1], stage_in_channels=[4, 8, 8, 8],
                 stage_mid_channels=[4] * 4, stage_out_channels=[8] * 4, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, hidden_sizes=[8] * 4,
                 depths=[1] * 4, embedding_size=4, out_features=features)
    intraclass = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for name, k in (("long", 7), ("mid", 5), ("short", 3)):
        intraclass[f"vertical_long_to_small_conv_{name}ratio"] = [[k, 1], [1, 1], [k // 2, 0]]
        intraclass[f"horizontal_small_to_long_conv_{name}ratio"] = [[1, k], [1, 1], [0, k // 2]]
        intraclass[f"symmetric_conv_long_{name}ratio"] = [[k, k], [1, 1], [k // 2, k // 2]]
    line = dict(hgnet, stem_strides=[2, 1, 1, 1, 1], stage_out_channels=[8, 8, 8, 16], stage_downsample=[True] * 4,
                stage_downsample_strides=[[2, 1], [1, 2], [2, 1], [2, 1]])
    lcnet = dict(model_type="pp_lcnet_v3", scale=0.25, divisor=4, out_features=["stage2", "stage3", "stage4", "stage5"])
    blocks = [[[3, 16, 32, 1, False]], [[3, 32, 64, 1, False]], [[3, 64, 128, [2, 1], False]], [[3, 128, 256, [1, 2], False]],
              [[5, 256, 512, [2, 1], True], [5, 512, 512, [2, 1], False]]]
    rec = dict(hidden_size=16, num_attention_heads=2, head_out_channels=len(CHARACTERS))
    nets = {
        "server_det": PPOCRV5ServerDetForObjectDetection(PPOCRV5ServerDetConfig(
            backbone_config=hgnet, neck_out_channels=16, intraclass_block_config=intraclass, scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2])),
        "mobile_det": PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig(
            backbone_config=lcnet, neck_out_channels=16, layer_list_out_channels=[4, 6, 8, 12])),
        "server_rec": PPOCRV5ServerRecForTextRecognition(PPOCRV5ServerRecConfig(backbone_config=line, **rec)),
        "mobile_rec": PPOCRV5MobileRecForTextRecognition(PPOCRV5MobileRecConfig(backbone_config=dict(lcnet, block_configs=blocks), **rec))}
    for name, net in nets.items():
        path = folder / f"PP-OCRv5_{name}_safetensors"
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        for m in net.modules():  # a deep network of random numbers says the same of every image, unless its norms know what to expect
            if isinstance(m, torch.nn.BatchNorm2d):
                m.momentum = None
        with torch.no_grad():
            net.train()(torch.randn(4, 3, 48, 160) if name.endswith("rec") else torch.randn(4, 3, 64, 96))
        net.save_pretrained(path)
        if name.endswith("rec"):
            (path / "preprocessor_config.json").write_text(json.dumps({"character_list": CHARACTERS}))


@pytest.mark.parametrize("kind", ["server", "mobile"])
def test_reader_from_pixels_to_words(models, kind, monkeypatch):
    """The detector gives a map of the input's size; given boxes, every line is read as it is when it is alone; the order is the reading order."""
    read = Reader("cpu", torch.float32, f"PaddlePaddle/PP-OCRv5_{kind}_det_safetensors", f"PaddlePaddle/PP-OCRv5_{kind}_rec_safetensors")
    images = pictures(3, 128, 160)
    maps = []

    def boxes(prob, height, width):  # what a random network finds is nothing to rely on
        maps.append(prob)
        assert (height, width) == (128, 160)
        return np.array([[[90, 30], [150, 30], [150, 50], [90, 50]], [[5, 28], [80, 28], [80, 52], [5, 52]]], float)[:len(maps) - 1]

    monkeypatch.setattr(detectors, "text_boxes", boxes)
    monkeypatch.setattr(detectors, "MIN_CONFIDENCE", 0.0)
    monkeypatch.setattr(detectors, "BATCH", 2)
    words = read(images)
    assert [m.shape for m in maps] == [(128, 160)] * 3 and all(0 <= m.min() <= m.max() <= 1 for m in maps)
    assert words[0] == ""                                            # no boxes: nothing read
    pil = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    crops = [pil[1].crop((90, 30, 150, 50)), pil[2].crop((5, 28, 80, 52)), pil[2].crop((90, 30, 150, 50))]
    with torch.no_grad():
        out = read.net["rec"](detectors.recogniser_input(crops)).last_hidden_state
    assert out.shape == (3, 40, len(CHARACTERS))                     # a step for every 8 columns
    lines = []
    for p in out:
        best = p.argmax(-1).tolist()
        lines.append("".join(CHARACTERS[c] for c, before in zip(best, [None] + best) if c and c != before))
    assert words[1] == lines[0] and words[2] == lines[1] + " " + lines[2] and len(set(lines)) > 1
    monkeypatch.setattr(detectors, "MIN_CONFIDENCE", 1.1)
    maps.clear()
    assert read(images) == ["", "", ""]


def test_lines_keep_their_places(models):
    """Whatever their lengths, which decide how they are batched."""
    read = Reader("cpu", torch.float32, "PaddlePaddle/PP-OCRv5_mobile_det_safetensors", "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors")
    rng = np.random.default_rng(0)
    crops = [Image.fromarray(rng.integers(0, 256, (20, int(w), 3), dtype=np.uint8)) for w in rng.integers(10, 130, 20)]
    together, alone = read.recognise(crops), [read.recognise([crop])[0] for crop in crops]
    assert [t for t, _ in together] == [t for t, _ in alone]
    np.testing.assert_allclose([c for _, c in together], [c for _, c in alone], rtol=1e-4)
    assert len({round(c, 6) for _, c in alone}) > 15


def test_reader_finds_the_boxes_that_its_map_shows(models, monkeypatch):
    """With the real box code: a detector that is sure of everything gives one line, the image."""
    read = Reader("cpu", torch.float32, "PaddlePaddle/PP-OCRv5_mobile_det_safetensors", "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors")
    read.net["det"].head.conv_final.bias.data.fill_(8)
    seen = []
    monkeypatch.setattr(read, "recognise", lambda crops: seen.extend(crops) or [("word", 0.9)] * len(crops))
    assert read(pictures(2, 64, 96)) == ["word", "word"] and [c.size for c in seen] == [(96, 64)] * 2


def test_reader_errors(models, tmp_path, monkeypatch):
    mobile = "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors"
    with pytest.raises(ValueError, match="got architecture CLIPModel"):
        Reader("cpu", torch.float32, det="openai/clip-vit-large-patch14", rec=mobile)
    path = models / "PP-OCRv5_server_rec_safetensors" / "preprocessor_config.json"
    monkeypatch.setattr(detectors.json, "loads", lambda s, loads=json.loads: {"character_list": ["a"]} if "character_list" in s else loads(s))
    with pytest.raises(ValueError, match=f"got 1 characters in .*{path.name}, expected {len(CHARACTERS)}"):
        Reader("cpu", torch.float32)
