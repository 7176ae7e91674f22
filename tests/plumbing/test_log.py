"""Facts about plumbing/log.py: the log of a run that was stopped and goes on, and trackers."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from plumbing import log as logging
from plumbing.log import Clock, Log, import_tracker, read_log


def lines(folder):
    return (folder / "log.jsonl").read_text().splitlines()


def rows(folder):
    return [json.loads(line) for line in lines(folder)]


def iterations(folder):
    return [row["iter"] for row in rows(folder)]


def write(folder, first, last, resume_at=0, kl=0.5):
    """The log of iterations first to last."""
    log = Log(folder, 0, {"lr": 0.1}, resume_at)
    for it in range(first, last + 1):
        log({"iter": it, "kl": kl})


def test_a_row_is_a_line_on_the_disk_and_on_the_screen(tmp_path, capsys):
    log = Log(tmp_path / "runs" / "new", 0, {"lr": 0.1, "tasks": ["ocr"]})
    log({"iter": 1, "kl": 0.123456789123, "task": "ocr"})
    assert rows(tmp_path / "runs" / "new") == [{"iter": 1, "kl": 0.12345679, "task": "ocr"}]
    assert capsys.readouterr().out.strip() == "iter 1 kl 0.1235 task ocr"
    config = json.loads((tmp_path / "runs" / "new" / "config.json").read_text())
    assert config == {"lr": 0.1, "tasks": ["ocr"]}


def test_a_clock_gives_each_phase_its_seconds_and_their_sum(monkeypatch):
    ticks = iter([0.0, 2.0, 5.0, 20.0, 21.0])
    monkeypatch.setattr(logging.time, "perf_counter", lambda: next(ticks))
    clock = Clock(torch.device("cpu"))
    clock("rollout")
    clock("update")
    assert clock.row(10) == {"s/it": 5.0, "images/s": 2.0, "s/rollout": 2.0, "s/update": 3.0}
    clock("rollout")                # the time between two iterations is left out
    assert clock.row(10) == {"s/it": 1.0, "images/s": 10.0, "s/rollout": 1.0}


def test_phases_are_on_the_disk_and_not_on_the_screen(tmp_path, capsys):
    Log(tmp_path, 0, {})({"iter": 1, "s/it": 3.0, "s/rollout": 2.0})
    assert "rollout" not in capsys.readouterr().out
    assert json.loads((tmp_path / "log.jsonl").read_text())["s/rollout"] == 2.0


def test_a_resumed_log_has_no_iteration_twice(tmp_path):
    """It was stopped after iteration 5, and its last state is of iteration 3."""
    write(tmp_path, 1, 5, kl=0.5)
    write(tmp_path, 4, 6, resume_at=3, kl=0.25)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [row["kl"] for row in rows(tmp_path)] == [0.5] * 3 + [0.25] * 3


@pytest.mark.parametrize("cut", ['{"iter": 4, "k', '{"iter": 4', "{", '{"iter": 2, "kl": 0.'])
def test_a_line_that_was_cut_is_forgotten(tmp_path, cut):
    write(tmp_path, 1, 3)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(cut)
    write(tmp_path, 4, 5, resume_at=3)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


def test_a_run_from_the_start_forgets_the_log_of_the_one_before(tmp_path):
    write(tmp_path, 1, 5)
    write(tmp_path, 1, 2)
    assert iterations(tmp_path) == [1, 2]


def test_a_resumed_run_without_a_log_starts_one(tmp_path):
    write(tmp_path, 4, 5, resume_at=3)
    assert iterations(tmp_path) == [4, 5]


def test_only_rank_0_writes(tmp_path, capsys):
    log = Log(tmp_path / "run", 1, {})
    log({"iter": 1})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("damaged", ['{"kl": 0.5}', '{"iter": null}', '{"iter": NaN}', "[1, 2]",
                                     "3", "\0\0\0\0", '{"iter": 1, "kl": 0.\0\0', "\udcff"])
def test_a_damaged_line_is_dropped_and_counted(tmp_path, capsys, damaged):
    write(tmp_path, 1, 3)
    first, *others = lines(tmp_path)
    text = "\n".join([first, damaged, *others, damaged]) + "\n"
    (tmp_path / "log.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert read_log(tmp_path / "log.jsonl")[1] == 2
    capsys.readouterr()
    write(tmp_path, 4, 5, resume_at=3)
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("log.jsonl: 2 damaged line(s) dropped\n") == 1


def test_kept_lines_stay_as_they_are(tmp_path, capsys):
    write(tmp_path, 1, 3, kl=0.1 + 0.2)
    Log(tmp_path, 0, {})({"iter": 1, "big": 1e22, "small": 1.5e-8, "n": 3, "nan": float("nan")})
    before = lines(tmp_path)
    write(tmp_path, 2, 2, resume_at=1)
    assert lines(tmp_path)[:1] == before
    assert "damaged" not in capsys.readouterr().out


# ------------------------------------------------------------------ trackers


class FakeWriter:
    """Stands for torch.utils.tensorboard.SummaryWriter. It notes what it is asked to write."""
    made = []

    def __init__(self, log_dir, purge_step):
        self.log_dir = log_dir
        self.purge_step = purge_step
        self.scalars = []
        self.images = []
        self.texts = []
        self.flushed = 0
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC" and image.shape[-1] == 3
        self.images.append((tag, image.max(), step))

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))

    def flush(self):
        self.flushed += 1


@pytest.fixture
def writers(monkeypatch):
    FakeWriter.made = []
    module = SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return FakeWriter.made


class FakeWandB:
    """Stands for the module wandb."""
    class Error(Exception):
        pass

    def __init__(self):
        self.inits = []
        self.logged = []
        self.fails = False

    def init(self, **options):
        if self.fails:
            raise self.Error("api_key not configured\n(no-tty)")
        self.inits.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    @staticmethod
    def Image(array, caption):
        return array.shape, caption


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


PICTURES = {"eval_ocr/0": (torch.ones(3, 4, 4), "a sign (0.50)")}


def test_tensorboard_gets_numbers_and_pictures_at_once(tmp_path, writers):
    log = Log(tmp_path / "new", 0, {}, track="tensorboard")
    log({"iter": 7, "kl": 0.5, "task": "ocr"}, PICTURES)
    log({"iter": 8, "kl": 0.25})
    (writer,) = writers
    assert writer.log_dir == str(tmp_path / "new" / "tensorboard")
    assert writer.scalars == [("kl", 0.5, 7), ("kl", 0.25, 8)]
    assert writer.images == [("eval_ocr/0", 255, 7)]
    assert writer.texts == [("eval_ocr/0", "a sign (0.50)", 7)]
    assert writer.flushed == 2
    assert rows(tmp_path / "new")[0] == {"iter": 7, "kl": 0.5, "task": "ocr"}


@pytest.mark.parametrize("resume_at", [0, 3])
def test_tensorboard_hides_the_points_that_a_run_repeats(tmp_path, writers, resume_at):
    write(tmp_path, 1, 5)
    Log(tmp_path, 0, {}, resume_at, "tensorboard")
    assert writers[0].purge_step == resume_at + 1


def test_wandb_gets_the_settings_numbers_and_pictures(tmp_path, wandb):
    log = Log(tmp_path / "run", 0, {"lr": 0.1}, track="wandb")
    log({"iter": 1, "kl": 0.5}, PICTURES)
    (options,) = wandb.inits
    assert options["config"] == {"lr": 0.1}
    assert (options["project"], options["name"], options["resume"]) == ("flow-opd", "run", "allow")
    assert options["dir"] == str(tmp_path / "run")
    assert wandb.logged == [(1, {"kl": 0.5, "eval_ocr/0": ((4, 4, 3), "a sign (0.50)")})]


def test_a_resumed_run_is_the_same_run_of_wandb_and_a_new_one_is_another(tmp_path, wandb):
    for resume_at in (0, 3, 0):
        Log(tmp_path, 0, {}, resume_at, "wandb")
    first, resumed, again = (options["id"] for options in wandb.inits)
    assert first == resumed != again


def test_wandb_that_does_not_start_is_one_clear_line(tmp_path, wandb):
    wandb.fails = True
    with pytest.raises(ValueError, match=r"^--track wandb: did not start \(api_key not configured "
                                         r"\(no-tty\)\); expected `wandb login`[^\n]*$"):
        Log(tmp_path, 0, {}, track="wandb")


@pytest.mark.parametrize("track, module", [("tensorboard", "torch.utils.tensorboard"),
                                           ("wandb", "wandb")])
def test_a_missing_package_stops_the_run_before_the_log_is_touched(tmp_path, monkeypatch, track,
                                                                   module):
    monkeypatch.setitem(sys.modules, module, None)
    write(tmp_path, 1, 3)
    with pytest.raises(ValueError, match=f"^--track {track}: [^\n]*pip install {track}$"):
        import_tracker(track)
    with pytest.raises(ValueError, match=f"^--track {track}: "):
        Log(tmp_path, 0, {}, track=track)
    assert iterations(tmp_path) == [1, 2, 3]


def test_only_rank_0_has_a_tracker_and_without_track_there_is_none(tmp_path, writers, wandb):
    Log(tmp_path, 1, {}, track="tensorboard")({"iter": 1}, PICTURES)
    Log(tmp_path, 0, {})({"iter": 1}, PICTURES)
    assert not writers and not wandb.inits
