"""Facts about plumbing/memory.py: the memory that --dry-run announces is what a run takes."""
import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import mini_sd3
import pytest
import torch

import train_grpo
import train_opd
from model import MMDiT, MMDiTConfig
from plumbing import memory
from worlds import load, presets
from worlds.vae import VAE
from worlds.world import Model

DOCS = Path(__file__).parents[2] / "docs" / "sd35.md"
# Between the tiny model and SD3.5-Medium: width 384, 256 image tokens, 77 text tokens.
MIDDLE = MMDiTConfig(depth=4, width=384, channels=4, pos_max=32, context_dim=96, pooled_dim=80,
                     dual=2)


@dataclass
class Text:
    """SD3.5's text encoders with T5, as far as a plan needs them."""
    tokens: int = 205

    def shape(self):
        return self.tokens, 4096

    def size(self):
        return 11.1e9


def measured(net, n_text, side, adapter, samples):
    """The bytes that autograd keeps of a forward pass, without the parameters."""
    cfg = net.cfg
    known = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage      # it lives, so its address stays its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        v = net(torch.randn(samples, cfg.channels, side, side), torch.rand(samples),
                torch.randn(samples, n_text, cfg.context_dim),
                torch.randn(samples, cfg.pooled_dim), adapter)
    assert v.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def planned(net, n_text, side, samples, whole):
    n_image = (side // net.cfg.patch) ** 2
    return samples * memory.kept(net.cfg, n_text, n_image, 4, 4, whole)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
@pytest.mark.parametrize("dual", [0, 2])
def test_what_autograd_keeps_is_as_planned_at_a_middle_size(whole, dual):
    net = MMDiT(replace(MIDDLE, dual=dual)).requires_grad_(whole)
    if not whole:
        net.add_adapter("student", 32, 64.0, trainable=True)
    found = measured(net, 77, 32, None if whole else "student", samples=4)
    assert planned(net, 77, 32, 4, whole) == pytest.approx(found, rel=0.1)


def test_what_autograd_keeps_is_as_planned_in_the_tiny_world():
    net = load("ckpt/tiny.safetensors").mmdit
    net.add_adapter("student", 16, 32.0, trainable=True)
    found = measured(net, 12, 8, "student", samples=96)
    assert planned(net, 12, 8, 96, False) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("t5", ["128", "zeros"])
def test_text_encoders_are_counted_without_loading_them(tmp_path, t5):
    mini_sd3.write_folder(tmp_path)
    text = load(tmp_path, size=64, t5=t5).text
    encoders = [text.encoder(part) for part in text.parts]
    assert text.size() == sum(memory.n_bytes(net.parameters()) for net in encoders)


# ------------------------------------------------------------------ SD3.5-Medium, by its shapes


def medium(n_teachers, script=train_opd, world_size=1, on="cpu", r=96, **options):
    """The plan of a run at SD3.5-Medium's shape. Nothing is allocated: all is on meta."""
    cfg = SimpleNamespace(**{**vars(script.Config()), **presets(script.PRESETS)("SD3.5"),
                             **options})
    with torch.device("meta"):
        net = MMDiT(MMDiTConfig()).bfloat16().requires_grad_(False)
        vae = VAE().requires_grad_(False)
    model = Model(net, vae, Text(), cfg.size, "")
    for n in range(n_teachers):
        net.add_adapter(f"teacher{n}", 32, 64.0)
    learns = net
    if cfg.full:
        learns = copy.deepcopy(net).float().requires_grad_(True)
    else:
        net.add_adapter("learner", r, 64.0, trainable=True)
    return memory.plan(cfg, model, learns, world_size, device=on)


def test_the_weights_of_sd35_are_counted():
    parts, start = medium(3)
    assert parts["frozen base"] == pytest.approx(4.94e9, rel=0.01)
    assert parts["weights that learn"] == 4 * 96 * 8 * 24 * 2 * 1536 - 4 * 96 * 2 * 1536
    assert start == pytest.approx(4.94e9 + 0.34e9 + 0.23e9 + 11.1e9, rel=0.01)


# The lines of docs/sd35.md: what fits on one card of 24 GB, and on each of eight cards of 80 GB.
ONE = dict(on="cuda", card=24)
EIGHT = dict(on="cuda", card=80, world_size=8)
LINES = {
    "stage 2 on one card": dict(ONE, n_teachers=3, batch=64, group=4, micro=2),
    "stage 1 on one card": dict(ONE, n_teachers=0, r=32, script=train_grpo, batch=192, micro=2),
    "stage 2 on eight cards": dict(EIGHT, n_teachers=3, micro=12),
    "stage 1 on eight cards": dict(EIGHT, n_teachers=0, r=32, script=train_grpo, micro=8),
    "stage 2, whole, on eight cards": dict(EIGHT, n_teachers=3, full=True, micro=4),
}


@pytest.mark.parametrize("line", LINES)
def test_the_lines_of_the_docs_fit_on_their_cards(line):
    options = dict(LINES[line])
    card = options.pop("card")
    parts, start = medium(**options)
    peak = max(start, sum(parts.values())) / 1e9
    assert peak < 0.9 * card, "CUDA and the allocator need the rest"
    assert f"| {line} | {sum(parts.values()) / 1e9:.1f} |" in DOCS.read_text()


def test_a_run_of_full_size_took_what_is_planned():
    """Measured by experiments/fullsize.py, whose run this is: both mapped and allocated memory."""
    parts, _ = medium(3, size=256, batch=2, group=1, updates=1, steps=2, noisy=[0, 1], micro=1,
                      checkpointing=True)
    file = DOCS.parents[1] / "results" / "fullsize-cpu-256.json"
    run = json.loads(file.read_text())["opd update"]["whole command"]
    assert sum(parts.values()) / 1e9 == pytest.approx(run["peak GB"]["both"], rel=0.05)


@pytest.mark.parametrize("options", [dict(), dict(micro=1), dict(micro=1, checkpointing=True)])
def test_another_teacher_costs_less_than_a_hundredth(options):
    fewer = sum(medium(3, **options)[0].values())
    more = sum(medium(4, **options)[0].values())
    assert 0 < more - fewer < 0.01 * fewer


def test_a_merge_of_four_is_a_larger_student_than_a_merge_of_three():
    fewer = sum(medium(3, r=96)[0].values())
    more = sum(medium(4, r=128)[0].values())
    assert more - fewer == pytest.approx(6 * 0.0751e9, rel=0.01), "the plan sees the student too"


def test_checkpointing_and_a_smaller_micro_save_activations():
    part = "activations of an update"
    assert medium(3, micro=4)[0][part] == 4 * medium(3, micro=1)[0][part]
    few = medium(3, micro=4, checkpointing=True)[0][part]
    assert few < medium(3, micro=4)[0][part] / 8


def test_an_update_has_no_more_states_than_there_are():
    part = "activations of an update"
    few = dict(batch=4, group=2, updates=2, noisy=[0, 3])     # 2 images x 3 steps in an update
    assert medium(3, micro=64, **few)[0][part] == medium(3, micro=6, **few)[0][part]
    assert medium(3, micro=64, one=True, **few)[0][part] == medium(3, micro=2, **few)[0][part]


def test_a_student_without_guidance_keeps_one_branch():
    part = "activations of an update"
    assert medium(3)[0][part] == 2 * medium(3, match="fold")[0][part]


def test_autocast_on_a_gpu_keeps_the_inputs_of_norms_in_float32():
    part = "activations of an update"
    assert 1.1 < medium(3, on="cuda")[0][part] / medium(3)[0][part] < 1.4


def test_a_whole_learner_is_sharded_over_the_ranks():
    parts = memory.learner(MMDiT(MIDDLE), True, 0.9, 1, half=False)
    shares = memory.learner(MMDiT(MIDDLE), True, 0.9, 8, half=False)
    for name in ("weights that learn", "gradients", "AdamW's two moments", "moving average"):
        assert shares[name] == parts[name] / 8
    assert "gathered blocks (FSDP)" in shares and "gathered blocks (FSDP)" not in parts
