"""Rewards: one number for an image, from what a detector, a reader and a quality model say about it.

The same logic scores the tiny world and SD3.5. Only the `world` underneath differs, an object with
    world.detect(images, metas) -> list (N) of lists of objects
    world.read(images)          -> list (N) of str, all the text of an image as one string
    world.quality(images)       -> (N,) array
An object is a dict {"class": str, "score": confidence, "box": (x0, y0, x1, y1) in pixels, "color": str or None}. A detector
returns only what it believes in: confidence thresholds and limits a class are its own. metas are the prompts
with what they ask for, a dict each, in the schema of GenEval's prompt files:
    {"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index of an earlier clause]}],
     "exclude"?: [{"class", "count"}]}            (OCR needs only "prompt")

Usage, by train_grpo.py, train_opd.py and eval.py:
    spec = parse_reward("geneval=0.5,geneval_strict=0.5")
    total = score(spec, images, metas, world)["total"]                    # (N,)

Sources: GenEval (arXiv 2310.11513, djghosh13/geneval evaluation/evaluate_images.py); Flow-GRPO (arXiv 2505.05470,
yifan123/flow_grpo flow_grpo/ocr.py, its training form of GenEval in yifan123/reward-server reward_server/gen_eval.py).
"""
import math

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_FORMS = ("soft", "strict", "benchmark")


def relative_position(a, b) -> set[str]:
    """The set of relations for which 'a is <relation> b' holds: none, one, or two near the diagonal. y points down."""
    box_a, box_b = np.reshape(a["box"], (2, 2)), np.reshape(b["box"], (2, 2))  # rows (x0, y0), (x1, y1)
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)                           # (2,), between the centres
    sizes = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])          # (2,), width and height, both objects
    # a tenth of the sizes is slack: beside means clearly beside, and large objects have to be further apart
    clear = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    dx, dy = clear / np.linalg.norm(offset)  # by the norm before the slack, so the slack counts against both axes
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def check_geneval_meta(meta):
    """Raise a ValueError unless meta is in GenEval's schema (see the top of this file)."""
    def expect(ok, got, expected):
        if not ok:
            raise ValueError(f"GenEval prompt {meta!r}: got {got}, expected {expected}")

    expect(isinstance(meta, dict), type(meta).__name__, "a dict")
    include, exclude = meta.get("include"), meta.get("exclude", [])
    expect(isinstance(include, list) and include, f"include {include!r}", "a list of at least one clause")
    expect(isinstance(exclude, list), f"exclude {exclude!r}", "a list of clauses")
    for clause in include + exclude:
        expect(isinstance(clause, dict), f"clause {clause!r}", "a dict")
        expect(isinstance(clause.get("class"), str), f"class {clause.get('class')!r}", "a name")
        expect(isinstance(clause.get("count"), int) and clause["count"] >= 1, f"count {clause.get('count')!r}", "an integer >= 1")
    for i, clause in enumerate(include):
        expect(isinstance(clause.get("color", ""), str), f"color {clause.get('color')!r}", "a name")
        if "position" in clause:
            position = clause["position"]
            ok = isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS and position[1] in range(i)
            expect(ok, f"position {position!r} in clause {i}", f"[one of {RELATIONS}, index of an earlier clause]")


def geneval_score(objects, meta, form="soft") -> float:
    """How well the objects found in one image match what its prompt asks for.

    soft: in (-inf, 1], training reward: the mean of the parts, 1 each if all is right. An object too many costs what one too
          few costs, so a crowd makes it negative.
    strict: 0 or 1, all counts, colours and positions exactly right.
    benchmark: 0 or 1, GenEval's own rule, the one to report.
    """
    if form not in GENEVAL_FORMS:
        raise ValueError(f"GenEval form: got {form!r}, expected one of {GENEVAL_FORMS}")
    check_geneval_meta(meta)
    parts, groups, correct = [], [], True  # groups: the objects of each clause, None where it failed
    for clause in meta["include"]:
        wanted = clause["count"]
        # most confident first; of equals the one found last, which is what the originals' reversed argsort gives
        found = sorted(reversed([o for o in objects if o["class"] == clause["class"]]), key=lambda o: -o["score"])
        # Where the forms differ: the benchmark looks at the wanted number of best boxes and forgives the others (unless an
        # exclude clause forbids them); soft and strict count every box and ignore exclude clauses.
        if form == "benchmark":
            found = found[:wanted]
        parts.append(1 - abs(wanted - len(found)) / wanted)
        right = len(found) == wanted
        if not right and ("color" in clause or "position" in clause):
            parts.append(0.0)  # one 0, even where both were asked for
        if right and "color" in clause:
            n_color = sum(o["color"] == clause["color"] for o in found)
            parts.append(1 - abs(wanted - n_color) / wanted)
            right = n_color == wanted
        if right and "position" in clause:
            relation, index = clause["position"]
            target = groups[index]
            right = target is not None and all(relation in relative_position(a, b) for a in found for b in target)
            # A wrong position adds a 0 AND a 1 in the released reward (gen_eval.py:254 and 258), so it scores 3/4 and not 2/3
            # of two objects in place; kept, so that rewards compare. A target that failed itself adds the 0 alone.
            parts += [1.0] if right else [0.0] if target is None else [0.0, 1.0]
        groups.append(found if right else None)
        correct = correct and right
    if form == "soft":
        return sum(parts) / len(parts)
    if form == "benchmark":
        for clause in meta.get("exclude", []):
            correct = correct and sum(o["class"] == clause["class"] for o in objects) < clause["count"]
    return float(correct)


def edit_distance(a, b) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of one character that turn a into b."""
    row = list(range(len(b) + 1))  # row[j]: distance between the part of a read so far and b[:j]
    for i, char_a in enumerate(a, 1):
        above_left, row[0] = row[0], i
        for j, char_b in enumerate(b, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (char_a != char_b))
    return row[-1]


def ocr_target(prompt) -> str:
    """The text that the prompt asks for: what stands between its first pair of double quotes."""
    pieces = prompt.split('"')
    if len(pieces) < 3 or not pieces[1].replace(" ", ""):
        raise ValueError(f'OCR prompt: got {prompt!r}, expected the wanted text in straight double quotes, as in: a sign saying "open"')
    return pieces[1]


def ocr_score(read, prompt) -> float:
    """1 - edits / length of the wanted text, in [0, 1]; case and spaces do not count, and nor does text around the wanted one."""
    read, target = (text.replace(" ", "").lower() for text in (read, ocr_target(prompt)))
    edits = 0 if target in read else edit_distance(read, target)
    return 1 - min(edits, len(target)) / len(target)


def one_each(name, results, metas):
    """Pairs (result, meta); zip alone would drop images from the end without a word."""
    if len(results) != len(metas):
        raise ValueError(f"reward {name}: got results for {len(results)} images, expected {len(metas)}")
    return zip(results, metas)


def geneval_reward(name, form):
    def reward(images, metas, world):
        pairs = one_each(name, world.detect(images, metas), metas)
        return np.array([geneval_score(objects, meta, form) for objects, meta in pairs], dtype=np.float32)
    return reward


def ocr_reward(images, metas, world):
    pairs = one_each("ocr", world.read(images), metas)
    return np.array([ocr_score(text, meta["prompt"]) for text, meta in pairs], dtype=np.float32)


def quality_reward(images, metas, world):
    return np.asarray(world.quality(images), dtype=np.float32)


# name -> function (images, metas, world) -> (N,) float32
REWARDS = {
    "geneval": geneval_reward("geneval", "soft"),
    "geneval_strict": geneval_reward("geneval_strict", "strict"),
    "geneval_benchmark": geneval_reward("geneval_benchmark", "benchmark"),
    "ocr": ocr_reward,
    "quality": quality_reward,
}


def parse_reward(spec: str) -> dict[str, float]:
    """'geneval' -> {'geneval': 1.0}; 'geneval=0.5,ocr=0.5' -> {'geneval': 0.5, 'ocr': 0.5}."""
    weights = {}
    for item in spec.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if name not in REWARDS:
            raise ValueError(f"reward {spec!r}: got {name!r}, expected one of {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"reward {spec!r}: got {name} twice, expected each name once")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"reward {spec!r}: got weight {weight!r} for {name}, expected a positive, finite number")
    return weights


class DetectOnce:
    """A world whose detector, the costly part, runs once on a batch however many GenEval forms the spec names."""

    def __init__(self, world):
        self.world, self.found = world, None

    def __getattr__(self, name):  # read and quality
        return getattr(self.world, name)

    def detect(self, images, metas):
        if self.found is None:
            self.found = self.world.detect(images, metas)
        return self.found


def score(spec: dict, images, metas, world) -> dict:
    """Every reward of spec, {name: weight}, on N images: {name: (N,) float32, ..., "total": their weighted sum, (N,) float32}.

    DEVIATION: flow_grpo gives an image the lowest score when its reader fails. A reward that fails raises here, since a 0 that
    no image has earned would be trained on.
    """
    world, parts = DetectOnce(world), {}
    for name in spec:
        values = REWARDS[name](images, metas, world)
        if values.shape != (len(metas),) or not np.isfinite(values).all():
            raise ValueError(f"reward {name}: got shape {values.shape}, {np.sum(~np.isfinite(values))} of its values not finite, "
                             f"expected ({len(metas)},) finite numbers")
        parts[name] = values
    return {**parts, "total": sum(weight * parts[name] for name, weight in spec.items())}
