"""Facts about plumbing/picture.py: which prompts are drawn, and the colour of a frame."""
import numpy as np
import pytest
import torch
from PIL import Image

from plumbing.picture import (
    GAP,
    GREEN,
    LEFT,
    LINE,
    RED,
    TEACHER,
    TOP,
    choose_rows,
    columns,
    draw_grid,
    to_bytes,
)

SIDE = 32
SCALE = 3
CELL = SIDE * SCALE


def cells(*scores, color=(0.0, 0.0, 1.0)):
    """The (prompt, image, score) of one model and task: images of one colour."""
    image = torch.tensor(color).view(3, 1, 1).expand(3, SIDE, SIDE)
    return [(f"prompt {i}", image, score) for i, score in enumerate(scores)]


# ------------------------------------------------------------------ which prompts


def test_the_first_prompts_on_which_models_disagree_are_chosen_for_each_task():
    shown = {
        "base": {"ocr": cells(1, 0, 0, 1, 0, 1), "quality": cells(0, 0, 0, 0.5)},
        "student": {"ocr": cells(1, 0, 1, 1, 1, 0), "quality": cells(0, 0.9, 0, 1)},
    }
    assert choose_rows(shown, 4) == [("ocr", 2), ("ocr", 4), ("quality", 1), ("quality", 3)]


def test_a_score_of_0_9_is_right_and_only_right_and_wrong_disagree():
    shown = {"base": {"ocr": cells(0.1, 0.95, 0.89)}, "student": {"ocr": cells(0.8, 1.0, 0.9)}}
    assert choose_rows(shown, 1) == [("ocr", 2)]


def test_any_two_of_the_models_may_disagree():
    shown = {"a": {"ocr": cells(0, 0)}, "b": {"ocr": cells(0, 0)}, "c": {"ocr": cells(0, 1)}}
    assert choose_rows(shown, 1) == [("ocr", 1)]


def test_beside_teachers_the_base_must_be_wrong_and_the_teacher_right_and_no_other_has_a_say():
    base = {"ocr": cells(0, 1, 0, 0, 0)}
    teacher = {"ocr": cells(0, 0, 1, 1, 1)}
    for student in (cells(1, 1, 0, 1, 0), cells(0, 0, 1, 0, 1)):
        shown = {"base": base, TEACHER: teacher, "student": {"ocr": student}}
        assert choose_rows(shown, 2) == [("ocr", 2), ("ocr", 3)]
        shown = {TEACHER: teacher, "base": base, "student": {"ocr": student}}
        assert choose_rows(shown, 2) == [("ocr", 2), ("ocr", 3)]
    assert choose_rows({"base": base, TEACHER: teacher}, 4) == [("ocr", i) for i in (0, 2, 3, 4)]


def test_where_too_few_disagree_the_first_others_are_added_in_the_order_of_the_prompts():
    shown = {"a": {"ocr": cells(0, 1, 0, 0)}, "b": {"ocr": cells(0, 1, 1, 0)}}
    assert choose_rows(shown, 2) == [("ocr", 0), ("ocr", 2)]
    assert choose_rows(shown, 3) == [("ocr", 0), ("ocr", 1), ("ocr", 2)]
    alone = {"a": {"ocr": cells(0, 1, 0, 0)}}
    assert choose_rows(alone, 2) == [("ocr", 0), ("ocr", 1)]


@pytest.mark.parametrize("rows, expected", [
    (3, [1, 1, 1]), (4, [1, 1, 2]), (5, [1, 2, 2]), (6, [2, 2, 2]),
    (4, [1, 1, 1, 1]), (6, [1, 2, 1, 2])])
def test_rows_are_shared_evenly_by_the_tasks(rows, expected):
    names = ("geneval", "ocr", "preference", "quality")
    one = {task: cells(0, 0, 0, 0) for task in names[:len(expected)]}
    chosen = [task for task, _ in choose_rows({"base": one}, rows)]
    assert [chosen.count(task) for task in one] == expected
    assert chosen == sorted(chosen)


def test_models_named_after_the_tasks_share_a_column_of_each_tasks_own_teacher():
    def model(one, two):
        return {"ocr": cells(one), "quality": cells(two)}

    shown = {"base": model(0, 1), "ocr": model(2, 3), "quality": model(4, 5), "it": model(6, 7)}
    merged = columns(shown)
    assert list(merged) == ["base", TEACHER, "it"]
    assert merged[TEACHER] == {"ocr": shown["ocr"]["ocr"], "quality": shown["quality"]["quality"]}
    del shown["quality"]                                # not every task has a teacher here
    assert columns(shown) == shown


# ------------------------------------------------------------------ the picture


def draw(path, shown, rows):
    draw_grid(shown, path, rows, SCALE)
    return np.asarray(Image.open(path))


def frame(picture, row, column):
    """The colours of the frame about one image: left, right, above, below."""
    x = LEFT + column * (CELL + GAP)
    y = TOP + row * (CELL + GAP + LINE)
    middle = CELL // 2
    points = [(y + middle, x - 2), (y + middle, x + CELL + 1), (y - 2, x + middle),
              (y + CELL + 1, x + middle)]
    return {tuple(picture[point].tolist()) for point in points}


def test_a_frame_is_green_where_the_score_is_at_least_0_9_and_red_elsewhere(tmp_path):
    scores = {"base": (0.0, 0.9, 0.8999), "student": (1.0, 0.5, 0.95)}
    shown = {label: {"ocr": cells(*values)} for label, values in scores.items()}
    picture = draw(tmp_path / "grid.png", shown, 3)
    for column, values in enumerate(scores.values()):
        for row, value in enumerate(values):
            assert frame(picture, row, column) == {GREEN if value >= 0.9 else RED}, value
    assert GREEN[1] > max(GREEN[0], GREEN[2]) and RED[0] > max(RED[1:])


def test_every_image_stands_in_its_models_column_and_its_prompts_row(tmp_path):
    colors = [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0)]
    shown = {"base": {"ocr": cells(0, 0, color=colors[0])},
             "student": {"ocr": cells(1, 1, color=colors[1])}}
    picture = draw(tmp_path / "grid.png", shown, 2)
    width = LEFT + 2 * (CELL + GAP)
    assert picture.shape == (TOP + 2 * (CELL + GAP + LINE), width, 3)
    for row in range(2):
        for column, color in enumerate(colors):
            x = LEFT + column * (CELL + GAP)
            y = TOP + row * (CELL + GAP + LINE)
            tile = picture[y:y + CELL, x:x + CELL]
            assert (tile == 255 * np.array(color)).all()


def test_images_become_bytes_by_rounding():
    image = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    got = to_bytes(image)
    assert got.shape == (1, 1, 3) and got.dtype == np.uint8
    assert got.flatten().tolist() == [0, 128, 255]
