"""The arithmetic of the benchmark: FLOPs, ratios, passes, tables. Nothing is timed here."""
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import train_opd
from experiments import bench, bench_loop, bench_net, released_loop, turns
from model import MMDiTConfig

SMALL = MMDiTConfig(depth=3, width=64, head_dim=32, channels=4, pos_max=8, context_dim=48,
                    pooled_dim=40, dual=2)
B, SIDE, L, R = 2, 8, 5, 4
N = 16


def batch(cfg):
    return (torch.randn(B, cfg.channels, SIDE, SIDE), torch.rand(B),
            torch.randn(B, L, cfg.context_dim), torch.randn(B, cfg.pooled_dim))


# ------------------------------------------------------------------ FLOPs


@pytest.mark.parametrize("change", [{}, {"dual": 0}, {"depth": 2, "dual": 1}, {"channels": 16}])
def test_flops_of_the_formula_are_those_that_torch_counts(change):
    cfg = dataclasses.replace(SMALL, **change)
    net, _, _ = bench_net.our_net(cfg, "cpu", torch.float32, R)
    inputs = batch(cfg)

    def run(adapter):
        return net(*inputs, adapter)

    base = bench_net.counted(bench_net.without_gradient(run, None))
    assert base == bench_net.forward_flops(cfg, B, N, L)
    # An implementation may do the small products of an adapter in another way.
    lora = bench_net.counted(bench_net.without_gradient(run, "student"))
    assert lora == pytest.approx(bench_net.forward_flops(cfg, B, N, L, R), rel=0.02)
    step = bench_net.counted(bench_net.training_step(run, net))
    assert step == pytest.approx(bench_net.training_flops(cfg, B, N, L, R), rel=0.02)


def test_a_training_step_is_about_two_forward_passes():
    """The base is frozen, so no gradient of its weights is computed."""
    cfg = MMDiTConfig()
    forward = bench_net.forward_flops(cfg, 1, 1024, 205)
    assert 1.9 < bench_net.training_flops(cfg, 1, 1024, 205, 32) / forward < 2.3


# ------------------------------------------------------------------ turns and ratios


def test_what_is_compared_takes_turns():
    order = []
    calls = {"ours": lambda: order.append("ours"), "theirs": lambda: order.append("theirs")}
    seconds = turns.take_turns(calls, 3, "cpu", least=0)
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert order[-6:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_a_ratio_is_theirs_over_ours_turn_by_turn():
    assert turns.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == [1.5, 2.0, 2.5]
    assert turns.ratio([3.0], [2.0]) == [1.5, 1.5, 1.5]


def test_utilisation_is_of_the_same_turn_and_of_the_best_of_each():
    """The machine is half as fast in the second turn, for both."""
    used = turns.utilisation(60, [1.0, 2.0, 1.0], 200, [2.0, 4.0, 2.5])
    assert used == {"turns": [0.6, 0.6, 0.675], "best": 0.6}


# ------------------------------------------------------------------ ours and theirs


def test_both_loops_get_the_same_sizes():
    world = bench_loop.World(Path("model"), ["a", "b"], 32, 4, 16, 8)
    ours = train_opd.Config(**bench_loop.our_options(world, bench.Config(), 6, "x"))
    theirs = released_loop.Config(**bench_loop.their_options(world, bench.Config(), 6, "x"))
    for name in ("batch", "group", "micro", "steps", "guidance", "lora_r", "iters", "anchor"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.noisy == [0, int(released_loop.LAST * theirs.steps)] == [0, 7]
    assert not theirs.drop, "both train on every image"


def test_flags_are_the_command_line_of_options():
    flags = bench_loop.flags_of({"lora_r": 4, "drop": False, "score": True, "noisy": [0, 3],
                            "size": None})
    assert flags == ["--lora-r", "4", "--no-drop", "--score", "--noisy", "0", "3"]


def test_every_run_of_the_cost_would_start(tmp_path, monkeypatch, capsys):
    """Fewer teachers, larger images, more steps: train_opd.py's own checks accept them."""
    monkeypatch.chdir(tmp_path)
    runs = bench_loop.cost_runs(bench.Config(), tmp_path)
    started = 0
    for values in runs.values():
        for options in values.values():
            train_opd.main(train_opd.Config(**{**options, "name": "x", "dry_run": True}))
            started += 1
    assert capsys.readouterr().out.count("dry run: all checks passed") == started >= 13
    taught = [len(options["teachers"]) for options in runs["teachers"].values()]
    assert taught == [1, 2, 3, 4]


def test_copies_of_the_base_are_counted(tmp_path):
    path = tmp_path / "base.safetensors"
    teachers = bench_loop.make_base(path, 64, 2, 32)
    world = bench_loop.World(path, teachers, 4, 2, 2, 4, r=2)
    base = sum(p.numel() for p in bench_loop.load_mmdit(path).parameters())
    ours = bench_loop.gigabytes_held(world, whole=False)
    theirs = bench_loop.gigabytes_held(world, whole=True)
    assert theirs - ours == pytest.approx(4 * (4 * base) / 1e9, rel=0.05)


def test_ours_and_diffusers_agree_on_the_same_weights():
    pytest.importorskip("diffusers", reason="needs the oracles: make oracles")
    pytest.importorskip("peft", reason="needs the oracles: make oracles")
    runs, give_adapter, (ours, _), _ = bench_net.pair(128, "cpu")
    assert bench_net.agree(runs, None, 128) < 1e-5
    give_adapter()
    assert bench_net.agree(runs, "student", 128) < 1e-5
    with torch.no_grad():
        ours.final_layer.linear.weight *= 1.001
    with pytest.raises(ValueError, match="width 128: ours and diffusers' differ by"):
        bench_net.agree(runs, "student", 128)


def test_without_the_oracles_there_is_one_line(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="--parts net compiled: .*peft.*`make oracles` installs"):
        bench_net.their_net(SMALL, {}, "cpu", torch.float32)


# ------------------------------------------------------------------ what is written


def test_a_table_has_a_row_for_each_result_and_spreads_as_three_numbers():
    rows = [{"width": 128, "ratio": [0.9, 1.0, 1.1], "seconds": {"ours": [1.0, 2.0, 3.0]}},
            {"width": 384, "memory": {"ours": 0.5}}]
    assert turns.table(rows).splitlines() == [
        "| width | ratio | seconds, ours | memory, ours |",
        "|---|---|---|---|",
        "| 128 | 1 (0.9 to 1.1) | 2 (1 to 3) |  |",
        "| 384 |  |  | 0.5 |"]


def test_a_part_that_is_measured_again_leaves_the_others_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_net, "bench_flops", lambda cfg: [{"width": 128}])
    monkeypatch.setattr(bench_loop, "bench_cost", lambda cfg, folder, turns: [{"what": "images"}])
    out = tmp_path / "bench.json"
    bench.main(bench.Config(parts=["flops", "cost"], out=str(out)))
    monkeypatch.setattr(bench_net, "bench_flops", lambda cfg: [{"width": 384}])
    bench.main(bench.Config(parts=["flops"], out=str(out), threads=1))
    written = json.loads(out.read_text())
    assert written["cost"]["rows"] == [{"what": "images"}]
    assert written["flops"]["rows"] == [{"width": 384}]
    assert written["flops"]["torch"] == torch.__version__
    assert written["flops"]["commit"] and written["flops"]["machine"]
    assert "| 384 |" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (dict(parts=["fly"]), "--parts fly: expected some of net, compiled, iteration, cost, flops"),
    (dict(parts=["net", "load"]), "load, step, opd and rewards are parts of python -m experiments"),
    (dict(widths=[100]), "--widths 100: expected some of 128, 384, 1536"),
    (dict(turns=0), "--turns 0: expected a finite number greater than 0"),
    (dict(out="."), ".: is a folder, expected the name of a file to write")])
def test_bad_options_are_refused_in_one_line(options, message, monkeypatch):
    monkeypatch.setattr(bench_net, "bench_net", lambda *args, **how: pytest.fail("time was spent"))
    with pytest.raises(ValueError, match=re.escape(message)):
        bench.main(bench.Config(**options))
