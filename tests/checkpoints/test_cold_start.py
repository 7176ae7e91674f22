"""Facts about checkpoints/cold_start.py: merges that are exact, and those that are not."""
import copy

import pytest
import torch

from checkpoints.cold_start import (
    cold_start,
    cold_start_whole,
    merge_adapters,
    merge_factors,
    merge_whole,
    read_weights,
    truncate_adapter,
)
from model import MMDiT, MMDiTConfig

TINY = MMDiTConfig(depth=3, width=64, head_dim=32, channels=4, patch=2, pos_max=8, context_dim=12,
                   pooled_dim=10, dual=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_net():
    """An MMDiT in float64, random in EVERY weight, the position table included."""
    g = torch.Generator().manual_seed(0)
    net = MMDiT(TINY)
    weights = {}
    for name, weight in net.state_dict().items():
        std = 0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        mean = 1 if name.endswith(("ln_q.weight", "ln_k.weight")) else 0
        weights[name] = torch.randn(weight.shape, generator=g) * std + mean
    net.load_state_dict(weights)
    return net.double().requires_grad_(False)


def inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, TINY.channels, 6, 10, generator=g, dtype=torch.float64)
    context = torch.randn(2, 3, TINY.context_dim, generator=g, dtype=torch.float64)
    pooled = torch.randn(2, TINY.pooled_dim, generator=g, dtype=torch.float64)
    return x, torch.linspace(0.02, 0.97, 2, dtype=torch.float64), context, pooled


def with_adapters(net, **ranks):
    """Attach random adapters (A and B both random), scale 1.5."""
    for name, r in ranks.items():
        net.add_adapter(name, r, 1.5 * r)
        for layer in net.lora_layers().values():
            torch.nn.init.normal_(layer.B[name], std=0.1)
    return net.double().requires_grad_(False)


def as_dict(net, name, r):
    return {"tensors": net.adapter(name), "r": r, "alpha": 1.5 * r}


def updates(adapter):
    """scale B A of every layer, (n, D, D)."""
    scale = adapter["alpha"] / adapter["r"]
    tensors = adapter["tensors"]
    layers = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    return {layer: scale * tensors[f"{layer}.B"] @ tensors[f"{layer}.A"] for layer in layers}


def test_merge_is_exactly_the_mean_of_the_updates_and_not_of_the_factors():
    net = with_adapters(random_net(), a=2, b=2, c=4)
    a = as_dict(net, "a", 2)
    b = as_dict(net, "b", 2)
    c = {**as_dict(net, "c", 4), "alpha": 2}                    # of another rank and scale
    merged = merge_adapters([a, b, c])
    assert merged["r"] == 8
    for layer, update in updates(merged).items():
        mean = sum(updates(part)[layer] for part in (a, b, c)) / 3
        torch.testing.assert_close(update, mean)
    means = {name: (a["tensors"][name] + b["tensors"][name]) / 2 for name in a["tensors"]}
    factors = {**a, "tensors": means}
    for layer, update in updates(merge_adapters([a, b])).items():
        assert (update - updates(factors)[layer]).norm() > 0.1 * update.norm()


def test_merge_of_copies_and_of_one_is_the_adapter_itself_in_the_network():
    net = with_adapters(random_net(), a=2)
    sample = inputs()
    for K in (1, 3):
        merged = merge_adapters([as_dict(net, "a", 2)] * K)
        net.add_adapter(f"merged{K}", merged["r"], merged["alpha"], merged["tensors"])
        got = net.double()(*sample, f"merged{K}")
        torch.testing.assert_close(got, net(*sample, "a"), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ one layer


def random_adapters(ranks=(2, 3, 4), alpha=6.0, D=12):
    g = torch.Generator().manual_seed(0)
    adapters = []
    for r in ranks:
        tensors = {"l.A": torch.randn(3, r, D, generator=g),
                   "l.B": torch.randn(3, D, r, generator=g)}
        adapters.append({"tensors": tensors, "r": r, "alpha": alpha})
    return adapters


def update(adapter):
    return updates(adapter)["l"]


def test_truncated_merge_is_the_best_of_its_rank_and_exact_at_full_rank():
    exact_merge = merge_adapters(random_adapters())
    want = sum(update(adapter) for adapter in random_adapters()) / 3
    for r in (1, 4, 9):
        got = truncate_adapter(exact_merge, r, 2.0 * r)
        U, s, Vh = torch.linalg.svd(want)
        best = U[:, :, :r] * s[:, None, :r] @ Vh[:, :r]
        assert got["r"] == r and got["alpha"] == 2.0 * r
        assert got["tensors"]["l.A"].shape == (3, r, 12)
        torch.testing.assert_close(update(got), best, rtol=1e-4, atol=1e-4)
    whole = truncate_adapter(exact_merge, 9, 9.0)
    torch.testing.assert_close(update(whole), want, rtol=1e-4, atol=1e-4)


def test_mean_of_factors_is_not_the_mean_of_updates_but_is_for_equal_teachers():
    parts = random_adapters((3, 3))
    merged = update(merge_adapters(parts))
    off = update(merge_factors(parts)) - merged
    assert off.norm() > 0.3 * merged.norm()
    torch.testing.assert_close(update(merge_factors([parts[0]] * 2)), update(parts[0]))
    with pytest.raises(ValueError, match="--init factors: averages factors of one rank"):
        merge_factors(random_adapters((2, 3)))


# ------------------------------------------------------------------ weights


def test_weighted_merges_are_the_weighted_sums_whatever_the_weights_add_up_to():
    a, b, c = random_adapters((3, 3, 3))
    weights = [0.75, 0.25, 0.5]
    want = 0.75 * update(a) + 0.25 * update(b) + 0.5 * update(c)
    torch.testing.assert_close(update(merge_adapters([a, b, c], weights)), want)
    factors = merge_factors([a, b, c], weights)["tensors"]
    for name in ("l.A", "l.B"):
        one, two, three = [part["tensors"][name] for part in (a, b, c)]
        torch.testing.assert_close(factors[name], 0.75 * one + 0.25 * two + 0.5 * three)


def test_without_weights_a_merge_is_the_average():
    parts = random_adapters((3, 3, 3), alpha=7.0)
    shares = [part["tensors"]["l.B"] * (7.0 / 3 / 3) for part in parts]
    for weights in (None, [1 / 3] * 3):
        merged = merge_adapters(parts, weights)["tensors"]
        torch.testing.assert_close(merged["l.B"], torch.cat(shares, dim=2))
        for name, tensor in merge_factors(parts, weights)["tensors"].items():
            mean = sum(part["tensors"][name] for part in parts) / 3
            torch.testing.assert_close(tensor, mean)


def test_a_weighted_merge_of_whole_transformers_adds_their_distances_from_the_base():
    base, one, two = random_net(), random_net(), random_net()
    with torch.no_grad():
        for p, q in zip(one.parameters(), two.parameters()):
            p -= 2
            q += 1
    net = copy.deepcopy(base)
    merge_whole(net, base, [{"net": one}, {"net": two}], [1.0, 0.5])
    for name, p in net.named_parameters():
        start = base.state_dict()[name]
        far = one.state_dict()[name] - start + 0.5 * (two.state_dict()[name] - start)
        torch.testing.assert_close(p, start + far, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_weight_0_is_left_out_of_every_cold_start():
    a, b, c = random_adapters((3, 3, 4))
    merged = cold_start("merge", None, [a, b, c], None, None, [1.0, 2.0, 0.0])
    assert merged["r"] == 6
    assert torch.equal(update(merged), update(merge_adapters([a, b], [1, 2])))
    factors = cold_start("factors", None, [a, b, c], None, None, [1.0, 2.0, 0.0])
    assert torch.equal(update(factors), update(merge_factors([a, b], [1, 2])))
    with pytest.raises(ValueError, match="--lora-r 7: the exact merge has rank 6"):
        cold_start("truncate", None, [a, b, c], 7, 7, [1.0, 2.0, 0.0])
    base = random_net()
    whole = {"net": random_net()}
    assert cold_start("merge", base, [a, whole], None, None, [1.0, 0.0])["r"] == 3
    with pytest.raises(ValueError, match="--init merge: comes from a whole transformer"):
        cold_start("merge", base, [a, whole], None, None, [1.0, 1.0])
    with torch.no_grad():
        whole["net"].context_embedder.bias += 1
    cold_start_whole("merge", base, random_net(), [{"net": random_net()}, whole], [0.0, 1.0])
    assert torch.equal(base.context_embedder.bias, whole["net"].context_embedder.bias.float())


@pytest.mark.parametrize("init", ["merge", "truncate", "factors"])
def test_a_merge_in_a_run_without_teachers_is_refused(init):
    message = f"^--init {init}: merges teachers, and this run has none; expected none, or the path"
    with pytest.raises(ValueError, match=message):
        cold_start(init, None, [], 4, 8)


def test_a_run_without_teachers_starts_from_the_base():
    assert cold_start("none", None, [], 4, 8) == {"r": 4, "alpha": 8, "tensors": None}


TASKS = ["geneval", "ocr"]


def test_weights_of_the_command_line_are_in_the_order_of_the_tasks():
    assert read_weights([], TASKS) is None
    assert read_weights(["ocr=0", "geneval=1.5"], TASKS) == [1.5, 0]


@pytest.mark.parametrize("items, message", [
    (["ocr=1"], "--merge ocr=1: expected a number for each of geneval, ocr"),
    (["ocr=0", "geneval=0"], "--merge ocr=0 geneval=0: .*not all 0"),
    (["quality=1"], r"--merge quality=1: expected TASK=N with one of the tasks \(geneval, ocr\)"),
    (["ocr=1", "ocr=2"], "--merge ocr=2: .*each at most once"),
    (["ocr=-1"], "--merge ocr=-1: .*a number of 0 or more"), (["ocr=nan"], "--merge ocr=nan: "),
    (["ocr=inf"], "--merge ocr=inf: "), (["ocr"], "--merge ocr: ")])
def test_malformed_weights_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        read_weights(items, TASKS)
