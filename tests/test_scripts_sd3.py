"""Facts about the scripts with --model DIR: SD3.5's side, on random weights in its layout."""
import json

import mini_sd3
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import BASE, distance, log, tensors

import eval as evaluation
import scorers
import scorers.clip
import train_grpo
import train_opd
import worlds
import worlds.sd3
from checkpoints.formats import read, save_whole, write_peft
from model import MMDiT
from plumbing import cli
from rewards import REWARDS, Reward

SMALL = dict(iters=2, batch=4, group=2, steps=4, noisy=[0, 2], size=32, guidance=4.5, micro=4,
             updates=1, device="cpu", t5="128", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "stable-diffusion-3.5-mini"
    return str(mini_sd3.write_folder(folder))


@pytest.fixture
def bright(monkeypatch):
    """The reward "bright"."""
    reward = Reward(lambda images, metas, world: images.mean((1, 2, 3)).cpu().numpy())
    monkeypatch.setitem(REWARDS, "bright", reward)


def random_adapter(net, r=3, alpha=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, m in net.lora_layers().items():
        D = m.in_features
        tensors[f"{name}.A"] = torch.randn(m.n, r, D, generator=g) / D ** 0.5
        tensors[f"{name}.B"] = torch.randn(m.n, D, r, generator=g) / D ** 0.5
    return {"tensors": tensors, "r": r, "alpha": alpha}


def grpo(**options):
    train_grpo.main(train_grpo.Config(**{**SMALL, **options}))


def opd(**options):
    train_opd.main(train_opd.Config(**{**SMALL, **options}))


def evaluate(**options):
    evaluation.main(evaluation.Config(**{"size": 32, "device": "cpu", **options}))


def write_set(here, name, text):
    """A folder "set" with one file of prompts."""
    (here / "set").mkdir(exist_ok=True)
    (here / "set" / name).write_text(text)


# ------------------------------------------------------------------ options


SIZES = dict(size=512, guidance=4.5)


@pytest.mark.parametrize("script, want", [
    (train_grpo, dict(**SIZES, steps=10, beta=0.004, ema=0.9)),
    (train_opd, dict(**SIZES, steps=10)),
    (evaluation, dict(**SIZES, steps=40)),
], ids=["grpo", "opd", "eval"])
def test_defaults_follow_from_the_model(folder, script, want):
    presets = worlds.presets(script.PRESETS)

    def parse(*args):
        return cli.parse(script.Config, list(args), presets)

    theirs = parse("--model", folder)
    assert {option: getattr(theirs, option) for option in want} == want
    assert parse("--model", BASE) == script.Config(model=BASE), "the tiny world has no presets"
    # What is said outweighs the preset.
    assert parse("--model", folder, "--guidance", "2").guidance == 2


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_grpo_and_opd_run_on_sd3(folder, here, bright, full):
    """Teachers in the forms of both stages and a PEFT folder, with checkpointing; then pictures."""
    for task in ("geneval", "ocr"):
        grpo(model=folder, tasks=[task], reward=["bright"], out=f"ckpt/{task}.pt",
             full=full and task == "ocr", checkpointing=True)
    net = worlds.load(folder, size=32).mmdit
    write_peft(here / "quality", random_adapter(net), "mini")
    suffix = "safetensors" if full else "pt"
    ocr = f"ckpt/ocr.{suffix}"
    opd(model=folder, teachers=["ckpt/geneval.pt", ocr, "quality=quality"], anchor="quality",
        full=full, checkpointing=True, dtype="bfloat16")
    ckpts = ["base", ocr, f"student=runs/opd/student.{suffix}", "peft=quality"]
    evaluate(model=folder, prompt=["a red cat", "a bird"], ckpts=ckpts, steps=2, guidance=4.5,
             out="pictures")
    student = here / "pictures/student"
    assert sorted(path.name for path in student.iterdir()) == ["0000.png", "0001.png"]
    base = here / "pictures/base/0000.png"
    assert (student / "0000.png").read_bytes() != base.read_bytes()
    rows = log("opd")
    assert len(rows) == 2
    assert all(np.isfinite(row["kl"]) and row["kl"] > 0 for row in rows)


def test_a_file_with_its_text_encoders_beside_it_is_the_same_model_as_its_folder(folder, here):
    net = worlds.load(folder, size=32).mmdit
    write_peft(here / "teacher", random_adapter(net), "mini")
    paths = {"folder": folder, "file": f"{folder}/sd3.5_medium.safetensors"}
    for name, path in paths.items():
        opd(model=path, name=name, iters=1, teachers=["ocr=teacher"], init="none", lam=0.0)
    one = tensors("runs/folder/student.pt")
    assert distance(tensors("runs/folder/init.pt"), one) > 0
    assert distance(one, tensors("runs/file/student.pt")) == 0
    assert log("folder")[0]["kl"] == log("file")[0]["kl"] > 0


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_ratio_is_one_and_policy_is_the_base_under_autocast(folder, here, bright, monkeypatch,
                                                            full):
    """The dtypes of a GPU, on the CPU.

    They are a bfloat16 base, a float32 adapter or float32 whole policy, and bfloat16 autocast.
    Guidance and checkpointing are on.
    """
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast",
                        lambda kind, dtype, enabled: real("cpu", torch.bfloat16))
    grpo(model=folder, tasks=["ocr"], reward=["bright"], dtype="bfloat16", full=full,
         checkpointing=True, iters=1)
    row = log("grpo-ocr")[0]
    assert row["ratio_err"] == 0
    assert row["kl"] == 0
    assert row["grad_norm"] > 0


def test_checkpointing_changes_memory_and_not_gradients():
    cfg = mini_sd3.MEDIUM
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, cfg.channels, 12, 20, generator=g)
    t = torch.tensor([1.0, 0.37, 0.0089])
    context = torch.randn(3, 9, cfg.context_dim, generator=g)
    pooled = torch.randn(3, cfg.pooled_dim, generator=g)
    grads = []
    runs = []                       # how many blocks ran
    for on in (False, True):
        net = mini_sd3.randomise(MMDiT(cfg)).requires_grad_(True)
        net.checkpointing = on
        ran = []
        for block in net.joint_blocks:
            block.register_forward_pre_hook(lambda block, args, ran=ran: ran.append(block))
        net(x, t, context, pooled).square().mean().backward()
        runs.append(len(ran))
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert runs == [4, 8], "every block again on the way back"
    plain, checkpointed = grads
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ rewards


def test_rewards_load_on_the_runs_device_before_anything_is_sampled(folder, here, monkeypatch):
    asked = []

    def load(device, dtype):
        asked.append((device.type, dtype))
        raise ValueError("no weights")

    monkeypatch.setattr(scorers.clip, "PickScore", load)
    monkeypatch.setattr(scorers, "LOADED", {})
    for script, name in ((train_grpo, "draw_noise"), (evaluation, "draw")):
        monkeypatch.setattr(script, name, lambda *args: pytest.fail("sampled first"))
    with pytest.raises(ValueError, match="does not fit task 'ocr': no weights"):
        grpo(model=folder, tasks=["ocr"], reward=["pickscore"])
    write_set(here, "test.txt", "a\n")
    with pytest.raises(ValueError, match="does not fit task 'pickscore': no weights"):
        evaluate(model=folder, tasks=["pickscore"], prompts=["pickscore=set"], per_task=12, rows=1,
                 steps=1, also=[])
    assert asked == [("cpu", torch.float32)] * 2


def test_task_without_a_reward_or_prompts_is_refused_before_the_model_is_loaded(folder, here,
                                                                                monkeypatch):
    monkeypatch.setattr(worlds.sd3.SD3, "load", lambda *args: pytest.fail("loaded first"))
    write_set(here, "train.txt", "a\n")
    with pytest.raises(ValueError, match="mine has no reward of its own; expected --reward"):
        grpo(model=folder, tasks=["mine"], prompts=["mine=set"])
    message = "'pickscore' has no prompts of its own here, expected a folder"
    with pytest.raises(ValueError, match=message):
        grpo(model=folder, tasks=["pickscore"])
    with pytest.raises(ValueError, match=message):
        opd(model=folder, teachers=["pickscore=x"])
    with pytest.raises(ValueError, match=message):
        opd(model=folder, teachers=["x"], ratio=["pickscore=1"])


def test_a_reward_that_fails_midway_stops_training_with_its_cause(folder, here, monkeypatch):
    calls = []

    def flaky(images, metas, world):
        calls.append(len(images))
        if len(calls) > 6:
            raise ValueError("judge x: got HTTP 500 (try 5 of 5)")
        return images.mean((1, 2, 3)).numpy()

    monkeypatch.setitem(REWARDS, "flaky", Reward(flaky))
    with pytest.raises(ValueError, match="got HTTP 500"):
        grpo(model=folder, tasks=["ocr"], reward=["flaky"], iters=99, save_every=1)
    done = len(log("grpo-ocr"))
    assert 0 < done < 7
    state = torch.load("runs/grpo-ocr/state.pt", weights_only=True)
    assert state["iter"] == done, "what was done is kept"


# ------------------------------------------------------------------ evaluation


def test_evaluation_of_sd3_gives_a_table_of_the_tasks_and_tags_there_are(folder, here, monkeypatch):
    """With a detector that always sees one dog, and a prompt file without most tags."""
    dog = {"class": "dog", "score": 1.0, "box": (0, 0, 9, 9), "color": None}
    sd3 = worlds.sd3.SD3
    monkeypatch.setattr(sd3, "detect", lambda self, images, metas: [[dog] for _ in metas])
    monkeypatch.setattr(sd3, "read", lambda self, images: ["open"] * len(images))
    one = {"tag": "single_object", "include": [{"class": "dog", "count": 1}],
           "prompt": "a photo of a dog"}
    two = {**one, "tag": "two_object", "include": [*one["include"], {"class": "cat", "count": 1}]}
    lines = json.dumps(one) + "\n" + json.dumps(two) + "\n"
    (here / "evaluation_metadata.jsonl").write_text(lines)
    evaluate(model=folder, tasks=["geneval", "ocr"], prompts=["geneval=evaluation_metadata.jsonl"],
             per_task=12, rows=2, steps=1, batch=5, also=[], out="table", diversity=True)
    numbers = json.loads((here / "table.json").read_text())
    table = numbers["table: mean, standard error, n"]["base"]
    assert table["single_object"][0] == 1.0
    assert table["two_object"][0] == 0.0
    assert table["geneval"][0] == 0.5
    assert "counting" not in table
    assert np.isfinite(table["average"][0])
    assert numbers["diversity"]["base"]["geneval"][2] == 1


def test_a_task_without_a_score_is_not_evaluated(folder, here):
    write_set(here, "test.txt", "a\n")
    with pytest.raises(ValueError, match="--tasks mine: has no score .* or --score mine=REWARD"):
        evaluate(model=folder, tasks=["mine"], prompts=["mine=set"])


def test_evaluation_leaves_out_the_tasks_without_prompts_unless_they_are_named(folder, here, capsys,
                                                                               monkeypatch):
    def load(*args):
        raise ValueError("loaded")

    monkeypatch.setattr(worlds.sd3.SD3, "load", load)
    chosen = []
    real = evaluation.check
    monkeypatch.setattr(evaluation, "check", lambda *args: chosen.append(args[2]) or real(*args))
    with pytest.raises(ValueError, match="^loaded$"):
        evaluate(model=folder)
    assert chosen == [["geneval", "ocr"]]
    line = "left out: pickscore, quality, without prompts here (--prompts TASK=DIR)"
    assert capsys.readouterr().out.splitlines() == [line]
    with pytest.raises(ValueError, match="'pickscore' has no prompts of its own here"):
        evaluate(model=folder, tasks=["geneval", "pickscore"])


def test_whole_transformer_is_not_relabelled(folder, here):
    model = worlds.load(folder, size=64)
    file = save_whole(here / "x.safetensors", {}, model.file, task="ocr")
    with pytest.raises(ValueError, match="is called 'geneval', but was trained on 'ocr'"):
        read(file, model.mmdit, "geneval")


# ------------------------------------------------------------------ pictures


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_equal_prompt_and_seed_are_one_picture_whatever_the_batch(folder, here):
    for batch in (1, 3):
        evaluate(model=folder, prompt=["a", "b", "c"], steps=2, batch=batch, out=f"by{batch}")
    one, three = [[pixels(path) for path in sorted((here / f"by{batch}/base").iterdir())]
                  for batch in (1, 3)]
    assert len(one) == len(three) == 3
    for a, b in zip(one, three):
        assert abs(a - b).max() <= 1
    assert abs(one[0] - one[1]).max() > 5


def test_t2i_compbench_finds_prompt_and_number_in_the_name(folder, here):
    """Its scorers take the prompt from before the first "_", the number from after the last."""
    bench = "a green bench and a blue bowl"
    (here / "color_val.txt").write_text(f"{bench}\na red cat\n")
    evaluate(model=folder, prompt_file="color_val.txt", each=2, layout="compbench", steps=1,
             batch=3, out="bench")
    stems = sorted(path.stem for path in (here / "bench/base/samples").iterdir())
    found = [(stem.split("_")[0], int(stem.split("_")[-1])) for stem in stems]
    assert found == [(bench, 0), (bench, 1), ("a red cat", 2), ("a red cat", 3)]
    lines = (here / "bench/prompts.txt").read_text().splitlines()
    assert lines[1:3] == [bench, "a red cat"]
    with pytest.raises(ValueError, match="cannot be a file's name there"):
        evaluate(model=folder, prompt=["either/or"], layout="compbench")
