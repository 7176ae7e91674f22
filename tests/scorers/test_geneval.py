"""Facts about scorers/geneval.py, on small random networks and hand-made logits.

mmdet's steps are written out below from their definition.
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerModel, SwinConfig

from scorers import geneval
from scorers.geneval import CLASSES, COCO_MEAN, COCO_STD, COLORS, Detector
from scorers.pixels import CLIP_MEAN, CLIP_STD, clip_input, resize_like_cv2, to_pil

MASK2FORMER = "mask2former-swin-small-coco-instance"
CAT = {"class": "cat", "count": 1}


def meta(tag="single_object", *include):
    return {"tag": tag, "include": list(include) or [CAT], "prompt": "a photo"}


def random_logits(seed, queries=20, side=24, size=(40, 56)):
    """Class logits that are sure of some queries, mask logits, and the three sizes of an input.

    One of the masks is empty.
    """
    g = torch.Generator().manual_seed(seed)
    masks = torch.randn(1, queries, 5, 5, generator=g) * 4
    masks = F.interpolate(masks, (side, side), mode="bicubic")[0]
    masks[3] = -1
    classes = torch.randn(queries, 81, generator=g) * 3
    classes[3, 7] = 20
    # A query that counts for two classes.
    classes[4, 5] = 15
    classes[4, 6] = 14.9
    return classes, masks, (4 * side, 4 * side), (80, 90), size


# ------------------------------------------------------------------ Mask2Former


def box_around(inside):
    if not inside.any():
        return 0, 0, 0, 0
    ys, xs = np.nonzero(inside)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def as_mmdet(classes, masks, padded, resized, size):
    """mmdet's instance_postprocess and mask2bbox, a query at a time and without any shortcut.

    Gives (score, class, box, mask) of all pairs, the most confident first.
    """
    masks = F.interpolate(masks[None], padded, mode="bilinear")[:, :, :resized[0], :resized[1]]
    masks = F.interpolate(masks, size, mode="bilinear")[0].double().numpy()
    probs = torch.softmax(classes.double(), 1).numpy()[:, :80]
    pairs = []
    for q in range(len(probs)):
        pairs += [(probs[q, c], q, c) for c in range(80)]
    found = []
    for p, q, c in sorted(pairs, reverse=True)[:100]:
        inside = masks[q] > 0
        mask_score = (1 / (1 + np.exp(-masks[q][inside]))).sum() / (inside.sum() + 1e-6)
        found.append((p * mask_score, c, box_around(inside), inside))
    return sorted(found, key=lambda f: -f[0])


def as_benchmark(threshold, *logits):
    """Those of them that the benchmark looks at: over the threshold, at most 16 of a class."""
    kept = []
    count = dict.fromkeys(range(80), 0)
    for f in as_mmdet(*logits):
        count[f[1]] += 1
        if f[0] > threshold and count[f[1]] <= 16:
            kept.append(f)
    return kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.02])
def test_instances_are_mmdets(seed, threshold):
    logits = random_logits(seed)
    expected = [f for f in as_mmdet(*logits) if f[0] > threshold]
    scores, labels, boxes, masks = geneval.instances(*logits, threshold)
    order = scores.argsort(descending=True)
    assert len(expected) == len(scores) > 2
    np.testing.assert_allclose(scores[order], [f[0] for f in expected], rtol=1e-4)
    assert labels[order].tolist() == [f[1] for f in expected]
    assert boxes[order].tolist() == [list(f[2]) for f in expected]
    assert all((masks[i].numpy() == f[3]).all() for i, f in zip(order, expected))


def test_instances_of_nothing_are_none():
    classes, masks, *sizes = random_logits(0)
    nothing = torch.zeros_like(classes)
    scores, labels, boxes, masks = geneval.instances(nothing, masks, *sizes, 0.3)
    assert len(scores) == len(labels) == 0
    assert boxes.shape == (0, 4) and masks.shape == (0, 40, 56)


def test_transformers_post_processing_agrees_only_at_its_own_384_pixels():
    """Its scores are mmdet's if the image is 384 x 384.

    On another image it still scores the masks at 384, so they are not.
    """
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil,
    )
    classes, masks, *_ = random_logits(1)

    class Output:
        class_queries_logits = classes[None]
        masks_queries_logits = masks[None]

    def theirs(size):
        result, = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
            Output, threshold=0.02, target_sizes=[size])
        return sorted(segment["score"] for segment in result["segments_info"])

    def ours(padded, size):
        scores = geneval.instances(classes, masks, padded, padded, size, 0.02)[0]
        # They keep as many pairs as there are queries, mmdet keeps 100.
        return sorted(scores.tolist())[-len(theirs(size)):]

    np.testing.assert_allclose(ours((384, 384), (384, 384)), theirs((384, 384)), atol=2e-6)
    assert np.abs(np.subtract(ours((96, 96), (40, 56)), theirs((40, 56)))).max() > 1e-3


def test_a_square_is_found_where_it_is():
    """512 pixels are 800 to the network and 200 to its masks: cells 50 to 99 are pixels 128 to 255.
    """
    classes = torch.zeros(2, 81)
    classes[0, CLASSES.index("dog")] = 20
    classes[1, 80] = 20
    masks = torch.full((2, 200, 200), -20.0)
    masks[0, 50:100, 25:75] = 20
    scores, labels, boxes, _ = geneval.instances(classes, masks, (800, 800), (800, 800),
                                                 (512, 512), 0.3)
    assert labels.tolist() == [CLASSES.index("dog")] and scores[0] > 0.97
    assert boxes.tolist() == [[64, 128, 192, 256]]


def test_detector_input_is_mmdets():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (1, 3, 300, 400), dtype=np.uint8))
    x, resized = geneval.detector_input(image)
    assert x.shape == (1, 3, 800, 1088) and resized == (800, 1067)
    assert COCO_MEAN == (123.675, 116.28, 103.53) and COCO_STD == (58.395, 57.12, 57.375)
    grey = (128 - np.array(COCO_MEAN)) / COCO_STD
    np.testing.assert_allclose(x[0, :, 400, 1080], grey, rtol=1e-5)
    pixels = x[0, :, :, :1067].permute(1, 2, 0).numpy() * COCO_STD + COCO_MEAN
    # The same as cv2's where it enlarges.
    pillow = np.asarray(to_pil(image[0]).resize((1067, 800), Image.BILINEAR), np.float64)
    assert np.abs(pixels - pillow).max() < 1.01


@pytest.mark.parametrize("size, expected", [((512, 512), (800, 800)), ((1024, 1024), (800, 800)),
                                            ((256, 1024), (333, 1333))])
def test_detector_input_fits_1333_by_800_and_is_padded_to_multiples_of_32(size, expected):
    x, resized = geneval.detector_input(torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert resized == expected
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0 and x.shape[2] - resized[0] < 32


@pytest.mark.parametrize("size", [(75, 61), (31, 200), (11, 13)])
def test_resize_is_cv2s(size):
    cv2 = pytest.importorskip("cv2", reason="cv2 judges the resizing, larger and smaller")
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    ours = resize_like_cv2(torch.from_numpy(image).permute(2, 0, 1)[None], *size)[0]
    theirs = cv2.resize(image, size[::-1]).astype(float)
    assert np.abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_at_most_sixteen_of_a_class_the_most_confident_first():
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 30 + [1] * 10)
    kept = geneval.most_confident(scores, labels)
    assert sorted(scores[kept].tolist(), reverse=True) == scores[kept].tolist() and len(kept) == 26
    best = scores[:30].argsort(descending=True)[:16].tolist()
    assert {i for i in kept if i < 30} == set(best)


def test_classes_are_cocos_in_order():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    places = {"person": 0, "cat": 15, "computer mouse": 64, "tv remote": 65,
              "computer keyboard": 66, "cell phone": 67, "toothbrush": 79}
    assert {name: CLASSES.index(name) for name in places} == places


def test_labels_have_to_be_cocos_in_order():
    voc = {**dict(enumerate(CLASSES)), 3: "motorbike", 4: "aeroplane", 57: "sofa",
           62: "tvmonitor", 64: "mouse"}
    geneval.check_labels(voc)
    geneval.check_labels({i: f"LABEL_{i}" for i in range(80)})
    for wrong in ({i: str(i) for i in range(133)}, {**voc, 15: "dog", 16: "cat"}):
        with pytest.raises(ValueError, match="expected COCO's 80"):
            geneval.check_labels(wrong)


# ------------------------------------------------------------------ colours


def test_color_crop_shows_the_object_on_grey():
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:9] = True
    mask[2, 4] = False
    crop = np.array(geneval.color_crop(image, mask, (4.0, 2.0, 9.0, 6.0)))
    assert crop.shape == (4, 5, 3)
    assert crop[0, 0].tolist() == [0x99] * 3 and (crop[1:] == [255, 0, 0]).all()


def clip_processor(image):
    """transformers' processor; but torchvision's crop if the margin is odd, for they differ there.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    width, height = image.size
    side = int(224 * max(image.size) / min(image.size))
    if side % 2 == 0:
        return torch.as_tensor(np.array(CLIPImageProcessorPil()(image)["pixel_values"][0]))
    start = round((side - 224) / 2)                     # center_crop rounds half to even
    if width < height:
        x = np.asarray(image.resize((224, side), Image.BICUBIC))[start:start + 224]
    else:
        x = np.asarray(image.resize((side, 224), Image.BICUBIC))[:, start:start + 224]
    return torch.from_numpy((x / 255 - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1).float()


@pytest.mark.parametrize("size", [(300, 500), (641, 230), (224, 224), (100, 60), (7, 90)])
def test_clip_input_is_clips(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = clip_input([image], 224, crop=round)[0]
    theirs = clip_processor(image)
    assert ours.shape == theirs.shape == (3, 224, 224)
    assert (ours - theirs).abs().max() < 1.01 / 255 / min(CLIP_STD)


# ------------------------------------------------------------------ the whole detector


def save_clip(folder):
    """A CLIP with small random weights, and a tokenizer of single letters."""
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)]
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    end = len(vocab) - 1
    text = dict(small, vocab_size=len(vocab), max_position_embeddings=77, bos_token_id=end - 1,
                eos_token_id=end, pad_token_id=end)
    vision = dict(small, image_size=28, patch_size=14)
    torch.manual_seed(0)
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    net.save_pretrained(folder)


def save_detector(folder):
    """A Mask2Former with small random weights, whose queries see different things."""
    torch.manual_seed(0)
    swin = SwinConfig(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    net = Mask2FormerModel(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_layers=1, decoder_layers=3, encoder_feedforward_dim=32, dim_feedforward=32,
        num_attention_heads=2, num_queries=30, num_labels=80))
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    net.transformer_module.queries_features.weight.data *= 30
    net.transformer_module.queries_embedder.weight.data *= 30
    net.save_pretrained(folder)
    # The hub's file is the whole model: with a prefix, the head, which is sure of its classes here,
    # and the weights of the loss, which nothing reads.
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors["model." + name] = tensor
    tensors["class_predictor.weight"] = 3 * torch.randn(81, 32)
    tensors["class_predictor.bias"] = torch.zeros(81)
    tensors["criterion.empty_weight"] = torch.ones(81)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip-vit-large-patch14")
    save_detector(folder / MASK2FORMER)
    return folder


@pytest.fixture(scope="module")
def detector(models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_MODELS", str(models))
        return Detector("cpu", torch.float32)


def pictures(n, height=64, width=96):
    noise = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)


def test_mask2former_is_transformers_own(detector, models, monkeypatch):
    """The names of the released file load into both, and both give the same."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former import modeling_mask2former
    # It asks for scipy, which only its loss calls.
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(models / MASK2FORMER).eval()
    x = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        out = theirs(pixel_values=x)
        classes, masks = detector.net["detector"](x)
    assert torch.equal(out.class_queries_logits, classes)
    assert torch.equal(out.masks_queries_logits, masks)
    assert classes.shape == (1, 30, 81) and masks.shape == (1, 30, 32, 40)


def expected_objects(detector, images, thresholds):
    """as_benchmark for every image."""
    x, resized = geneval.detector_input((images * 255).round().to(torch.uint8))
    with torch.no_grad():
        logits = detector.net["detector"](x)
    found = []
    for classes, masks, threshold in zip(*logits, thresholds):
        found.append(as_benchmark(threshold, classes, masks, x.shape[-2:], resized,
                                  images.shape[-2:]))
    return found


def test_detector_finds_what_mmdets_steps_find(detector):
    images = pictures(2)
    found = detector(images, [meta(), meta("counting")])
    for objects, expected in zip(found, expected_objects(detector, images, (0.3, 0.9))):
        assert [o["class"] for o in objects] == [CLASSES[f[1]] for f in expected]
        assert [o["box"] for o in objects] == [tuple(map(float, f[2])) for f in expected]
        np.testing.assert_allclose([o["score"] for o in objects], [f[0] for f in expected],
                                   rtol=1e-4)
        assert all(o["color"] is None for o in objects)
    assert len(found[0]) > len(found[1]) > 1 and len({o["box"] for o in found[0]}) > 5


def unit(model_output):
    features = model_output.pooler_output
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def benchmark_classifier(detector, name):
    """(D, 10), by clip_benchmark's steps."""
    columns = []
    for color in COLORS:
        texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                 f"a photo of a {color} object"]
        # open_clip pads to 77 with 0, transformers with the end token to the longest. What follows
        # the end is never looked at.
        tokens = [detector.tokenizer(text)["input_ids"] for text in texts]
        tokens = torch.tensor([ids + [0] * (77 - len(ids)) for ids in tokens])
        column = unit(detector.net["clip"].get_text_features(input_ids=tokens)).mean(0)
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


@torch.no_grad()
def benchmark_features(detector, image, name):
    """CLIP's features (N, D) of the crops of all objects called name."""
    pixels = (image * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    features = []
    for _, c, (x0, y0, x1, y1), mask in expected_objects(detector, image, [0.3])[0]:
        if CLASSES[c] == name:
            crop = np.where(mask[..., None], pixels, 0x99)[y0:y1, x0:x1].astype(np.uint8)
            x = clip_input([Image.fromarray(crop)], 28, crop=round)
            features.append(unit(detector.net["clip"].get_image_features(pixel_values=x)))
    return torch.cat(features)


def test_colors_are_the_classifiers(detector, monkeypatch):
    """Only classes with a colour clause get one: the arg max that the benchmark's own steps give.
    """
    image = pictures(1)
    seen = [o["class"] for o in detector(image, [meta()])[0]]
    name = seen[0]
    red = {"class": name, "count": 1, "color": "red"}
    objects = detector(image, [meta("colors", red, {"class": seen[-1], "count": 1})])[0]
    assert {o["class"] for o in objects if o["color"]} == {name}
    classifier = benchmark_classifier(detector, name)
    torch.testing.assert_close(detector.classifier(name), classifier.T, atol=1e-5, rtol=1e-4)
    features = benchmark_features(detector, image, name)
    colors = [COLORS[i] for i in (100 * features @ classifier).argmax(1)]
    assert [o["color"] for o in objects if o["class"] == name] == colors

    # This small CLIP sees the same colour everywhere. Once more with ten directions in which its
    # pictures do differ, and however many crops go through CLIP at once.
    common = F.normalize(features.mean(0), dim=0)
    directions = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    directions -= (directions @ common)[:, None] * common
    monkeypatch.setitem(detector.classifiers, name, directions)
    colors = [COLORS[i] for i in (features @ directions.T).argmax(1)]
    assert len(set(colors)) > 2
    for batch in (8, 1):
        monkeypatch.setattr(geneval, "BATCH", batch)
        objects = detector(image, [meta("colors", red)])[0]
        assert [o["color"] for o in objects if o["class"] == name] == colors


def test_images_of_a_batch_do_not_touch(detector, monkeypatch):
    images = pictures(3)
    red_dog = {"class": "dog", "count": 1, "color": "red"}
    metas = [meta(), meta("colors", red_dog), meta("counting")]
    together = detector(images, metas)
    monkeypatch.setattr(geneval, "BATCH", 2)
    for a, b in zip(together, detector(images, metas)):
        assert [o["class"] for o in a] == [o["class"] for o in b]
        np.testing.assert_allclose([o["box"] for o in a], [o["box"] for o in b], atol=1)


def test_classes_that_coco_lacks_and_unpaired_prompts_are_refused(detector):
    mouse = {"class": "mouse", "count": 1}
    with pytest.raises(ValueError, match="got class 'mouse'"):
        detector(pictures(1), [meta("single_object", mouse)])
    with pytest.raises(ValueError, match="got 2 images and 1 prompts"):
        detector(pictures(2), [meta()])


@pytest.mark.parametrize("lost", ["class_predictor.bias",
                                  "model.transformer_module.queries_embedder.weight"])
def test_a_file_without_one_of_the_tensors_is_refused_by_name(models, tmp_path, lost):
    config = (models / MASK2FORMER / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    tensors = load_file(models / MASK2FORMER / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    name = lost.removeprefix("model.")
    with pytest.raises(ValueError, match=f"{tmp_path}: tensor '.*{name}' is missing, expected"):
        geneval.Mask2Former(tmp_path)


def test_a_class_predictor_of_another_size_is_refused(models, tmp_path):
    config = (models / MASK2FORMER / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    tensors = load_file(models / MASK2FORMER / "model.safetensors")
    tensors["class_predictor.weight"] = torch.zeros(134, 32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = r"'class_predictor.weight' is \(134, 32\), expected \(81, 32\)"
    with pytest.raises(ValueError, match=message):
        geneval.Mask2Former(tmp_path)


def test_other_scorers_do_not_import_opencv():
    """Only the OCR reader needs that extra."""
    modules = "scorers.geneval, scorers.clip, scorers.deqa, scorers.imagereward"
    code = f"import sys, {modules}; sys.exit('cv2' in sys.modules)"
    root = Path(geneval.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
