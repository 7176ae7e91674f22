"""Facts about watching a run: what is drawn and scored while a policy trains."""
import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import BASE, ROOT, expect_success, torchrun

import eval as evaluation
from plumbing import dist
from sampler import Policy
from watch import Watch, check_watch, tag_rows
from worlds import open_world

NO_AVERAGE = SimpleNamespace(applied=contextlib.nullcontext)


def config(**options):
    return SimpleNamespace(**{**dict(eval_every=2, eval_images=7, eval_steps=2, micro=3, track="",
                                     amp="float32"), **options})


def tiny(prompts=()):
    world = open_world(BASE, prompts)
    return world, world.load(BASE)


def watched(world, model, tasks, rank=0, world_size=1, **options):
    return Watch(config(**options), model, world, tasks, rank, world_size, torch.device("cpu"))


def test_scores_are_those_of_eval_on_the_same_prompts_and_noise(here):
    evaluation.main(evaluation.Config(model=BASE, per_task=12, steps=2, rows=4, also=[], out="e",
                                      device="cpu"))
    table = json.loads((here / "e.json").read_text())["table: mean, standard error, n"]["base"]
    world, model = tiny()
    run = watched(world, model, world.tasks, eval_images=12)
    row = run(Policy(model.mmdit), NO_AVERAGE, 2)
    assert row.keys() == {"eval_geneval", "eval_ocr", "eval_preference", "eval_quality"}
    for key, value in row.items():
        assert value == pytest.approx(table[key.removeprefix("eval_")][0], abs=1e-5), key


def test_it_is_called_every_n_iterations_and_gives_pictures_with_captions():
    world, model = tiny()
    run = watched(world, model, ["ocr"], eval_every=3)
    policy = Policy(model.mmdit)
    assert run(policy, NO_AVERAGE, 2) == {} and run.pictures == {}
    row = run(policy, NO_AVERAGE, 3)
    assert row.keys() == {"eval_ocr"}
    assert list(run.pictures) == [f"eval_ocr/{j}" for j in range(4)]
    image, caption = run.pictures["eval_ocr/0"]
    assert image.shape == (3, 32, 32)
    assert caption.startswith(world.eval_prompts("ocr", 1)[0]["prompt"] + " (")
    assert run(policy, NO_AVERAGE, 6) == row
    assert run(policy, NO_AVERAGE, 7) == {} and run.pictures == {}


def test_it_leaves_the_policy_and_the_random_numbers_as_they_are():
    world, model = tiny()
    model.mmdit.add_adapter("p", 4, 8.0, trainable=True)
    before = {name: p.clone() for name, p in model.mmdit.named_parameters()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    watched(world, model, world.tasks)(Policy(model.mmdit, "p"), NO_AVERAGE, 2)
    assert torch.equal(torch.rand(3), expected)
    for name, p in model.mmdit.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_it_watches_the_averaged_weights():
    world, model = tiny()
    inside = []

    @contextlib.contextmanager
    def applied():
        inside.append(True)
        yield
        inside.append(False)

    run = watched(world, model, ["ocr"], eval_images=1)
    run.mean_score = lambda policy, task: float(inside == [True])
    assert run(None, SimpleNamespace(applied=applied), 2) == {"eval_ocr": 1.0}
    assert inside == [True, False]


@pytest.mark.parametrize("images, ranks", [(7, 3), (2, 4), (8, 2)])
def test_every_rank_draws_equally_many_and_all_images_count_once(monkeypatch, images, ranks):
    """The ranks run one after another here. The score of prompt j is j + 1."""
    world, model = tiny()
    parts, mine = [], []
    for rank in range(ranks):
        run = watched(world, model, ["ocr"], rank, ranks, eval_images=images)
        passes = []

        def scores(policy, task, part, passes=passes):
            passes.append(part)
            return np.array(part, np.float32) + 1

        run.scores = scores
        monkeypatch.setattr(dist, "gather", lambda x: mine.append(x) or x.repeat(ranks))
        run.mean_score(None, "ocr")
        parts.append([len(part) for part in passes])
    assert parts == parts[:1] * ranks
    monkeypatch.setattr(dist, "gather", lambda x: torch.cat(mine[:ranks]))
    assert run.mean_score(None, "ocr") == pytest.approx((images + 1) / 2)


def test_geneval_is_the_mean_over_tags():
    world, model = tiny()
    run = watched(world, model, ["geneval"], eval_images=len(world.tags) + 1)
    rare = [0.0] * len(world.tags)
    rare[0] = 1.0
    run.scores = lambda policy, task, part: np.array([*rare, 1.0], np.float32)[part]
    assert run.mean_score(None, "geneval") == pytest.approx(1 / len(world.tags))
    assert list(tag_rows(run.metas["geneval"], world)) == list(world.tags)


def test_tasks_without_a_score_are_left_out_and_named(here, capsys):
    (here / "test.txt").write_text("a red circle\n")
    world, model = tiny(["mine=."])
    run = watched(world, model, ["mine", "ocr"])
    assert list(run.metas) == ["ocr"]
    assert capsys.readouterr().out.count("leaves out mine,") == 1


def test_without_eval_every_nothing_is_drawn():
    world, model = tiny()
    run = watched(world, model, ["ocr"], eval_every=0)
    assert run.texts == [] and run(None, None, 1) == {}


@pytest.mark.parametrize("options, words", [
    (dict(eval_images=0), "--eval-images 0: expected a finite number greater than 0"),
    (dict(eval_steps=0), "--eval-steps 0: expected a finite number greater than 0"),
    (dict(eval_every=-1), "--eval-every -1: expected a finite number of 0 or more"),
])
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        check_watch(config(**options), open_world(BASE), ["ocr"])


def test_a_run_that_has_nothing_to_watch_is_refused(here):
    (here / "train.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match="--eval-every 2: none of mine has held-out prompts"):
        check_watch(config(), open_world(BASE, ["mine=."]), ["mine"])


TWO_RANKS = """
import contextlib, json
from types import SimpleNamespace
import torch
from plumbing import dist
from sampler import Policy
from watch import Watch
from worlds import open_world
cfg = SimpleNamespace(eval_every=1, eval_images=7, eval_steps=2, micro=3, track="", amp="float32")
rank, world_size, device = dist.setup("cpu")
world = open_world({base!r})
model = world.load({base!r})
net = model.mmdit.requires_grad_(True)
policy = Policy(dist.distribute(net, full=True))
run = Watch(cfg, model, world, ["ocr", "quality"], rank, world_size, device)
rows = dist.gather_objects(run(policy, SimpleNamespace(applied=contextlib.nullcontext), 1))
if rank == 0:
    assert rows == rows[:1] * world_size
    print("ROW", json.dumps(rows[0]))
dist.barrier()                  # a rank that leaves while the other still talks may abort it
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""


def test_two_ranks_with_a_sharded_net_score_as_one(here):
    """Seven images on two ranks: one is drawn twice."""
    (here / "two.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                                 + TWO_RANKS.format(base=BASE))
    rows = []
    for ranks in (1, 2):
        done = torchrun(ranks, here / "two.py")
        expect_success(done)
        rows.append(json.loads(done.stdout.split("ROW ")[1].splitlines()[0]))
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)
