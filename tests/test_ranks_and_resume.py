"""Facts about ranks and stopped runs: more of either changes nothing.

The table of ranks in docs/running.md is what this prints:

    PYTHONPATH=. .venv/bin/python tests/test_ranks_and_resume.py
"""
import os
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    BASE,
    ROOT,
    distance,
    expect_success,
    grpo,
    log,
    opd,
    stop_at_rollout,
    tensors,
    torchrun,
)

import worlds
from plumbing import dist
from plumbing.files import read_pt
from worlds import tiny_base
from worlds.tiny_prompts import TASKS

SMALL = ["--model", BASE, "--steps", "4", "--device", "cpu"]

# ------------------------------------------------------------------ ranks


def test_minibatches_hold_the_same_images_however_many_ranks():
    one = torch.tensor(dist.share(24, 2, 0, 1)).view(2, -1)
    shares = [torch.tensor(dist.share(24, 2, rank, 2)).view(2, -1) for rank in (0, 1)]
    two = torch.stack(shares, 1).flatten(1)
    assert torch.equal(one, two)
    assert sorted(two.flatten().tolist()) == list(range(24)), "and each image appears once"


def test_two_ranks_draw_the_same_single_states(here, teachers):
    args = [*SMALL, "--iters", "1", "--noisy", "0", "1", "--rollout", "ode", "--objective",
            "velocity", "--one", "--batch", "8", "--group", "2", "--updates", "1", "--teachers",
            *teachers]
    for ranks in (1, 2):
        expect_success(torchrun(ranks, "train_opd.py", *args, "--name", f"ranks{ranks}"))
    assert log("ranks1")[0]["kl"] == pytest.approx(log("ranks2")[0]["kl"], rel=1e-4)


def compare_adapters(result):
    one = tensors(f"runs/ranks1/{result}")
    two = tensors(f"runs/ranks2/{result}")
    size = max(tensor.abs().max().item() for tensor in one.values())
    assert distance(one, two) < 1e-3 * size


def compare_weights():
    """The whole transformers, by their distance as a whole.

    Adam makes a step of lr out of a gradient that is 0 but for rounding.
    """
    one = read_pt("runs/ranks1/state.pt", ["weights"])["weights"]
    two = read_pt("runs/ranks2/state.pt", ["weights"])["weights"]
    base = worlds.load(BASE).mmdit.state_dict()
    assert one.keys() < base.keys()
    apart = sum((one[name] - two[name]).square().sum() for name in one)
    moved = sum((one[name] - base[name]).square().sum() for name in one)
    assert apart < 1e-3 ** 2 * moved


GRPO_ARGS = ["--tasks", "ocr", "quality", "--batch", "16", "--group", "4", "--updates", "2",
             "--mix", "batch"]
OPD_ARGS = ["--batch", "16", "--group", "2", "--updates", "2"]
FULL = ["--full", "--lr", "1e-4"]
# Groups of 6 on two ranks of 3 images an update: each group lies on both.
SPANNING = ["--tasks", "ocr", "--batch", "12", "--group", "6", "--updates", "2", "--lora-r", "4"]
SPANNING_PG = ["--batch", "12", "--group", "6", "--updates", "2", "--objective", "pg",
               "--step-reward", "sampled", "--credit", "future", "--clip", "1"]


@pytest.mark.parametrize("script, args, result", [
    ("train_grpo.py", [*GRPO_ARGS, "--lora-r", "4"], "adapter.pt"),
    ("train_grpo.py", SPANNING, "adapter.pt"),
    ("train_opd.py", OPD_ARGS, "student.pt"),
    ("train_opd.py", [*SPANNING_PG, "--lam", "0"], "student.pt"),
    ("train_grpo.py", [*GRPO_ARGS, *FULL], "adapter.safetensors"),
    ("train_opd.py", [*OPD_ARGS, *FULL, "--checkpointing"], "student.safetensors"),
], ids=["grpo", "grpo-groups-span-ranks", "opd", "opd-pg-groups-span-ranks",
        "grpo-full-sharded", "opd-full-sharded"])
def test_two_ranks_equal_one_rank_with_the_whole_batch(here, teachers, script, args, result):
    args = [*SMALL, "--iters", "2", "--noisy", "0", "3", *args]
    if script == "train_opd.py":
        args += ["--teachers", *teachers]
    for ranks in (1, 2):
        expect_success(torchrun(ranks, script, *args, "--name", f"ranks{ranks}"))
    one = log("ranks1")
    two = log("ranks2")
    timed = {key for key in one[0] if key.startswith("s/")}
    for key in set(one[0]) - timed - {"images/s", "ratio_err", "clip_frac"}:
        assert one[0].get(key) == pytest.approx(two[0].get(key), rel=2e-3, abs=1e-6), key
    assert (here / "runs/ranks2" / result).exists()
    if result.endswith(".pt"):
        compare_adapters(result)
    else:
        compare_weights()


def updates_of(path):
    """{layer: B A} of an adapter: what it adds to the weights of the base, up to its scale."""
    found = tensors(path)
    layers = [name.removesuffix(".A") for name in found if name.endswith(".A")]
    return {layer: found[f"{layer}.B"] @ found[f"{layer}.A"] for layer in layers}


def norm(updates):
    return sum(update.square().sum() for update in updates.values()) ** 0.5


def difference(a, b):
    return {layer: a[layer] - b[layer] for layer in a}


def table_of_ranks(iters=10):
    """Print how far runs of 2 and 4 ranks end from a run of 1, in parts of what training changed.

    AssertionError from a thousandth on.
    """
    teachers = [str(ROOT / f"ckpt/{task}.pt") for task in TASKS]
    args = [*SMALL, "--iters", str(iters), "--noisy", "0", "3", "--batch", "16", "--group", "4",
            "--updates", "2"]
    for script, more, result in (
            ("train_grpo.py", ["--tasks", "ocr"], "adapter.pt"),
            ("train_opd.py", ["--teachers", *teachers], "student.pt")):
        for ranks in (1, 2, 4):
            expect_success(torchrun(ranks, script, *args, *more, "--name", f"{script}{ranks}"))
        one = updates_of(f"runs/{script}1/{result}")
        change = one                                    # stage 1 starts from B = 0
        if script == "train_opd.py":
            change = difference(one, updates_of(f"runs/{script}1/init.pt"))
        for ranks in (2, 4):
            apart = difference(updates_of(f"runs/{script}{ranks}/{result}"), one)
            part = (norm(apart) / norm(change)).item()
            print(f"{script}, {iters} iterations: {ranks} ranks end {part:.1e} of the change from "
                  "1 rank", flush=True)
            assert part < 1e-3


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("script", ["train_grpo.py", "train_opd.py"])
def test_two_nodes_of_two_ranks_equal_one_process(here, teachers, script):
    """Two agents of torchrun on this machine are the two nodes."""
    args = [*SMALL, "--iters", "2", "--noisy", "0", "3", "--batch", "16", "--group", "8",
            "--updates", "2"]
    args += ["--teachers", *teachers] if script == "train_opd.py" else ["--tasks", "ocr"]
    expect_success(torchrun(1, script, *args, "--name", "ranks1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=two",
               str(ROOT / script), *args, "--name", "ranks2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
             for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-2000:]
    compare_adapters("student.pt" if script == "train_opd.py" else "adapter.pt")


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
@pytest.mark.parametrize("stage", ["grpo", "opd"])
def test_resume_is_bit_exact(here, teachers, monkeypatch, stage, full):
    options = dict(iters=4, save_every=2, full=full)
    suffix = ".pt"
    if full:
        options["lr"] = 1e-4
        suffix = ".safetensors"
    if stage == "grpo":
        run = grpo
        options.update(tasks=["quality"], out="x.pt")
        result = "x" + suffix
    else:
        run = opd
        options.update(teachers=teachers)
        result = "runs/{}/student" + suffix
    run(**options, name="whole")
    whole = tensors(result.format("whole"))
    calls = stop_at_rollout(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(**options, name="cut")
    run(**options, name="cut")
    assert len(calls) == 4 + 2, "the second half only"
    assert distance(whole, tensors(result.format("cut"))) == 0
    assert [row["iter"] for row in log("cut")] == [1, 2, 3, 4]


def test_sharded_run_resumes_bit_exactly(here):
    """FSDP2 on two ranks: four iterations at once, and two and two."""
    args = [*SMALL, "--tasks", "quality", "--noisy", "0", "3", "--batch", "8", "--group", "4",
            *FULL]
    for name, iters in (("whole", 4), ("cut", 2), ("cut", 4)):
        expect_success(torchrun(2, "train_grpo.py", *args, "--iters", str(iters), "--name", name,
                                "--out", f"{name}.safetensors"))
    whole = tensors("whole.safetensors")
    assert max(tensor.abs().max() for tensor in whole.values()) > 0
    assert distance(whole, tensors("cut.safetensors")) == 0
    assert [row["iter"] for row in log("cut")] == [1, 2, 3, 4]
    assert log("cut")[3]["kl"] == log("whole")[3]["kl"]


def test_resume_of_the_base_is_bit_exact(here, monkeypatch):
    options = dict(pool=256, vae_steps=2, text_steps=2, steps=4, save_every=2, batch=8, width=64,
                   depth=2, device="cpu")
    tiny_base.main(tiny_base.Config(**options, folder="whole", out="whole.safetensors"))
    calls = []
    real = tiny_base.write_model

    def stopped(*args):
        real(*args)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tiny_base, "write_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny_base.main(tiny_base.Config(**options, folder="cut", out="cut.safetensors"))
    tiny_base.main(tiny_base.Config(**options, folder="cut", out="cut.safetensors"))
    cut = load_file("cut.safetensors")
    whole = load_file("whole.safetensors")
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_a_run_of_other_settings_is_not_resumed(here):
    grpo(iters=1, tasks=["ocr"], name="n")
    with pytest.raises(ValueError, match="another lr"):
        grpo(iters=1, tasks=["ocr"], name="n", lr=1.0)


def test_a_longer_run_is_not_passed_off_as_a_shorter_one(here):
    grpo(iters=2, tasks=["ocr"], name="n")
    with pytest.raises(ValueError, match="holds a run of 2 iterations, more than --iters 1"):
        grpo(iters=1, tasks=["ocr"], name="n")


def test_a_run_whose_rate_falls_cannot_be_made_longer(here):
    grpo(iters=1, tasks=["ocr"], name="n", decay=1.0)
    with pytest.raises(ValueError, match="another iters"):
        grpo(iters=2, tasks=["ocr"], name="n", decay=1.0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        table_of_ranks()
