"""The picture that eval.py draws: rows are prompts, columns are models."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

RIGHT = 0.9                          # the least score that counts as right
TEACHER = "its teacher"              # the column of each task's own teacher
GREEN, RED = (30, 150, 60), (205, 40, 40)
# In pixels: width of the prompt column, height of the label row, gap between tiles, height of the
# score line.
LEFT, TOP, GAP, LINE = 330, 24, 12, 16


def to_bytes(image):
    """Image (3, H, W) in [0, 1] -> uint8 array (H, W, 3), as Pillow takes it."""
    return (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)


def columns(shown):
    """The columns of the picture: models that are named after the tasks share one, TEACHER.

    shown: {label: {task: cells}}. With a model for each task, a row shows that of its own task.
    """
    tasks = next(iter(shown.values()))
    if not all(task in shown for task in tasks):
        return shown
    merged = {}
    for label, cells in shown.items():
        if label in tasks:
            merged.setdefault(TEACHER, {})[label] = cells[label]
        else:
            merged[label] = cells
    return merged


def choose_rows(shown, rows):
    """Choose `rows` prompts, about equally many per task. Returns [(task, index)].

    With a column of teachers, the first prompts are chosen that the first other model gets wrong
    and the teacher right, so that no further model has a say. Without one, the first on which any
    models disagree. If there are too few, the first of the rest follow.
    shown: {label: {task: [(prompt, image, score)]}}.
    """
    some = next(iter(shown.values()))
    first = next((label for label in shown if label != TEACHER), None)
    chosen = []
    for n, task in enumerate(some):
        wanted = (n + 1) * rows // len(some) - n * rows // len(some)
        telling, rest = [], []
        for i in range(len(some[task])):
            right = {label: cells[task][i][2] >= RIGHT for label, cells in shown.items()}
            if TEACHER in shown:
                tells = right[TEACHER] and not right.get(first, False)
            else:
                tells = len(set(right.values())) > 1
            (telling if tells else rest).append(i)
        chosen += [(task, i) for i in sorted((telling + rest)[:wanted])]
    return chosen


def draw_grid(shown, path, rows, scale=3):
    """Write a PNG. A green frame means right, a red one wrong. The score is below the image.

    scale: images smaller than 128 pixels are enlarged by it; all others are drawn with side 256.
    """
    shown = columns(shown)
    labels = list(shown)
    chosen = choose_rows(shown, rows)
    task, i = chosen[0]
    side = shown[labels[0]][task][i][1].shape[-1]
    side = side * scale if side < 128 else 256
    width = side + GAP
    height = side + GAP + LINE
    size = (LEFT + len(labels) * width, TOP + len(chosen) * height)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for row, (task, i) in enumerate(chosen):
        y = TOP + row * height
        prompt = shown[labels[0]][task][i][0]
        pen.text((6, y + side // 2 - 8), prompt, fill="black", font=font)
        for column, label in enumerate(labels):
            x = LEFT + column * width
            _, image, score = shown[label][task][i]
            color = GREEN if score >= RIGHT else RED
            pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill=color)
            tile = Image.fromarray(to_bytes(image))
            canvas.paste(tile.resize((side, side), Image.NEAREST), (x, y))
            pen.text((x, y + side + 3), f"{score:.2f}", fill=color, font=font)
    for column, label in enumerate(labels):
        pen.text((LEFT + column * width, 2), label, fill="black", font=font)
    canvas.save(path)
