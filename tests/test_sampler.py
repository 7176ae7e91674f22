"""Facts about sampler.py: schedule, one step and its density, guidance, trajectories, states."""
import math

import numpy as np
import pytest
import torch

from model import MMDiT, MMDiTConfig
from sampler import (
    Policy,
    Sampler,
    Text,
    branches,
    clipped,
    cps_step,
    draw_noise,
    encode,
    gaussian_kl,
    generator,
    kl,
    likelihood_ratio,
    log_prob,
    ode_step,
    ratio_summary,
    regroup,
    sample,
    schedule,
    sde_sigma,
    sde_step,
    step,
    table,
    velocity,
    visited,
)

B, K, SHAPE = 4, 5, (4, 4, 6)
SETTINGS = [("sde", 0.7), ("sde", 0.3), ("cps", 0.7), ("ode", 0.7)]


@pytest.fixture(scope="module")
def net():
    """A tiny MMDiT, random in every weight, with two adapters of different ranks.

    Both adapters do something.
    """
    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig(depth=2, width=64, head_dim=32, channels=4, patch=2, pos_max=8,
                            context_dim=16, pooled_dim=8, dual=1))
    net.add_adapter("a", 2, 4)
    net.add_adapter("b", 3, 3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    g = torch.Generator().manual_seed(1)
    shapes = [(3, 16), (8,), (3, 16), (8,)]
    return Text(*(torch.randn(B, *shape, generator=g) for shape in shapes))


def states(seed=2):
    """x, v like a batch of latents, and times t, t_next (B,) inside (0, 1), in float64."""
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, B, *SHAPE, generator=g, dtype=torch.float64)
    t = torch.tensor([0.95, 0.6, 0.3, 0.05]).double()
    t_next = torch.tensor([0.9, 0.35, 0.28, 0.01]).double()
    return x, v, t, t_next


def noise(batch=range(B)):
    return draw_noise([("test", i) for i in batch], K, SHAPE)


def make_sampler(kind="sde", noisy=range(K)):
    return Sampler(schedule(K), kind, 0.7, noisy)


# ------------------------------------------------------------------ schedule


def test_schedule_equals_reference_numbers():
    expected = [1.0, 0.9601293103, 0.9133489461, 0.8576923077, 0.7903682720, 0.7072784811,
                0.6021505377, 0.4648760332, 0.2780487807, 0.0089285718, 0.0]
    torch.testing.assert_close(schedule(10), torch.tensor(expected), rtol=0, atol=2e-7)


@pytest.mark.parametrize("n", [1, 2, 10, 40])
def test_schedule_falls_from_exactly_1_to_exactly_0(n):
    t = schedule(n)
    assert len(t) == n + 1 and t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()


# ------------------------------------------------------------------ densities

STDS = [torch.tensor([0.01, 0.5, 1, 3]), torch.tensor([0.2])]


@pytest.mark.parametrize("std", STDS, ids=["per_sample", "shared"])
def test_logp_matches_torch_normal(std):
    mean, x_next, _, _ = states()
    std = std.double().view(-1, 1, 1, 1)
    normal = torch.distributions.Normal(mean, std.expand_as(mean))
    expected = normal.log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, mean, std), expected)


@pytest.mark.parametrize("std", STDS, ids=["per_sample", "shared"])
def test_kl_matches_torch_kl_divergence(std):
    p, q, _, _ = states()
    std = std.double().view(-1, 1, 1, 1)
    normal_p = torch.distributions.Normal(p, std.expand_as(p))
    normal_q = torch.distributions.Normal(q, std.expand_as(q))
    expected = torch.distributions.kl_divergence(normal_p, normal_q).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(p, q, std), expected)


def test_kl_of_an_sde_step_is_w_times_the_squared_velocity_gap():
    x, v_p, t, t_next = states()
    _, v_q, _, _ = states(3)
    t_second = 0.96
    t = torch.cat([t[:3], torch.ones(1)])                        # the last at t = 1
    t_next = torch.cat([t_next[:3], torch.tensor([t_second])])
    mean_p, std = sde_step(x, v_p, t, t_next, 0.7, t_second)
    mean_q, _ = sde_step(x, v_q, t, t_next, 0.7, t_second)
    dt = t - t_next
    sigma_t = 0.7 * (t / (1 - torch.where(t == 1, t_second, t))).sqrt()
    w = dt / 2 * (sigma_t * (1 - t) / (2 * t) + 1 / sigma_t) ** 2
    expected = w * ((v_p - v_q) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean_p, mean_q, std), expected)


# ------------------------------------------------------------------ one step on a Gaussian

# x_0 ~ N(M, S^2), so everything is known in closed form.
M, S = 0.7, 0.4


def moments(t):
    """Mean and variance of x_t = (1 - t) x_0 + t eps."""
    return torch.tensor([(1 - t) * M, (1 - t) ** 2 * S ** 2 + t ** 2], dtype=torch.float64)


def gaussian_velocity(x, t, s=S):
    """E[eps - x_0 | x_t = x], by the regression of eps - x_0 on x_t."""
    slope = (t - (1 - t) * s ** 2) / ((1 - t) ** 2 * s ** 2 + t ** 2)
    return -M + slope * (x - (1 - t) * M)


def push(mean_var, kind, t, t_next, a, s=S):
    """Mean and variance after one step, without sampling: x_next is affine in x, because v is."""
    x = torch.tensor([0, 1], dtype=torch.float64).view(2, 1, 1, 1)
    y, std = step(kind, x, gaussian_velocity(x, t, s), t, t_next, a, 0.99)
    start = y[0].item()
    slope = y[1].item() - start
    mean = start + slope * mean_var[0]
    var = slope ** 2 * mean_var[1] + std.item() ** 2
    return torch.tensor([mean, var], dtype=torch.float64)


def a_for(kind, a, dt):
    """The noise level for steps of dt.

    CPS at one a adds the same share of noise at any step. For the limit of short steps its a has to
    shrink with sqrt(dt).
    """
    return 2 / math.pi * math.asin(a * dt ** 0.5) if kind == "cps" else a


@pytest.mark.parametrize("t", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("kind, a", SETTINGS)
def test_one_step_leaves_the_marginal_by_the_square_of_dt(kind, a, t):
    def error(dt):
        after = push(moments(t), kind, t, t - dt, a_for(kind, a, dt))
        return (after - moments(t - dt)).abs()

    assert error(1e-3).max() < 3e-5
    # Halving dt quarters the error. One of order dt would halve.
    assert ((error(2e-3) > 3.5 * error(1e-3)) | (error(1e-3) < 1e-12)).all()


@pytest.mark.parametrize("kind, a", SETTINGS)
def test_sde_step_keeps_the_ode_marginal_on_a_gaussian(kind, a):
    times = torch.linspace(0.95, 0, 2001, dtype=torch.float64).tolist()
    now = moments(0.95)
    for t, t_next in zip(times, times[1:]):
        now = push(now, kind, t, t_next, a_for(kind, a, t - t_next))
        if round(t_next, 6) in (0.475, 0.0):
            torch.testing.assert_close(now, moments(t_next), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind, a", SETTINGS)
def test_rollout_on_a_gaussian_ends_at_the_gaussian(kind, a):
    def net(x, t, *_):
        return gaussian_velocity(x, t.view(-1, 1, 1, 1))

    n = 400
    sampler = Sampler(torch.linspace(1, 0, n + 1), kind, a_for(kind, a, 1 / n), range(n))
    if kind == "ode":
        sampler = Sampler(sampler.times, "sde", a, range(0))
    text = Text(*[torch.zeros(1, 1)] * 4)
    noise = draw_noise([("gaussian",)], n, (1, 128, 128))
    x = sampler.rollout(Policy(net), noise, text).x[:, -1]
    # Five standard errors of 128^2 numbers.
    assert x.mean().item() == pytest.approx(M, abs=5 * S / 128)
    assert x.std().item() == pytest.approx(S, abs=5 * S / 128 / 2 ** 0.5)


@pytest.mark.parametrize("a", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("t, t_next", [(1.0, 0.6), (0.6, 0.1), (0.6, 0.0)])
def test_one_cps_step_of_any_length_keeps_the_marginal_of_one_image_exactly(a, t, t_next):
    before = torch.tensor([(1 - t) * M, t ** 2], dtype=torch.float64)
    after = torch.tensor([(1 - t_next) * M, t_next ** 2], dtype=torch.float64)
    torch.testing.assert_close(push(before, "cps", t, t_next, a, s=0), after)
    # The SDE leaves noise above what t_next asks for.
    assert push(before, "sde", 0.6, 0.1, 0.7, s=0)[1] > 0.15 ** 2


def test_cps_leaves_no_noise_at_t_next_0():
    x, v, t, _ = states()
    mean, std = cps_step(x, v, t, torch.zeros(B), 0.7)
    assert (std == 0).all()
    x0_hat = x - t.view(-1, 1, 1, 1) * v
    torch.testing.assert_close(mean, x0_hat)


def test_cps_std_is_t_next_sin_of_a_quarter_turn():
    x, v, t, t_next = states()
    for a, share in [(0, 0), (1 / 3, 0.5), (1 / 2, 0.5 ** 0.5), (1, 1)]:
        _, std = cps_step(x, v, t, t_next, a)
        torch.testing.assert_close(std.flatten(), share * t_next)


def test_sde_with_a_0_equals_ode():
    x, v, t, t_next = states()
    mean, std = sde_step(x, v, t, t_next, 0, 0.9)
    ode_mean, ode_std = ode_step(x, v, t, t_next)
    torch.testing.assert_close(mean, ode_mean)
    assert (std == 0).all() and (ode_std == 0).all()


def test_sigma_t_takes_the_second_time_at_t_1():
    got = sde_sigma(torch.tensor([1, 0.9601, 0.5]), torch.tensor(0.9601), 0.7)
    expected = 0.7 * torch.tensor([1 / 0.0399, 0.9601 / 0.0399, 1]).sqrt()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["sde", "cps", "ode"])
def test_a_batch_of_times_steps_each_sample_by_its_own(kind):
    x, v, t, t_next = states()
    mean, std = step(kind, x, v, t, t_next, 0.7, 0.96)
    for i in range(B):
        row = slice(i, i + 1)
        its_mean, its_std = step(kind, x[row], v[row], t[i].item(), t_next[i].item(), 0.7, 0.96)
        torch.testing.assert_close(mean[row], its_mean)
        torch.testing.assert_close(std[row], its_std)


def test_unknown_step_is_refused():
    x, v, t, t_next = states()
    with pytest.raises(AssertionError, match="unknown step 'heun'"):
        step("heun", x, v, t, t_next, 0.7, 0.96)


# ------------------------------------------------------------------ guidance


@pytest.mark.parametrize("adapter", [None, "a"])
def test_guidance_is_null_plus_w_times_the_difference_of_two_forwards(net, text, adapter):
    x = noise()[:, 0]
    t = torch.tensor([1, 0.7, 0.4, 0.1])
    v_text = net(x, t, text.context, text.pooled, adapter)
    v_null = net(x, t, text.null_context, text.null_pooled, adapter)
    assert not torch.allclose(v_text, v_null, rtol=0.1)
    guided = velocity(net, x, t, text, 2.5, adapter)
    torch.testing.assert_close(guided, v_null + 2.5 * (v_text - v_null), rtol=1e-4, atol=1e-5)
    plain = velocity(net, x, t, text, 1.0, adapter)
    torch.testing.assert_close(plain, v_text, rtol=0, atol=0)
    nearly = velocity(net, x, t, text, 1.0 + 1e-6, adapter)
    torch.testing.assert_close(nearly, v_text, rtol=1e-4, atol=1e-4)


def test_guidance_1_takes_one_forward_of_the_batch_and_more_takes_one_of_twice_the_batch(text):
    sizes = []

    def net(x, t, context, pooled, adapter):
        sizes.append(len(x))
        return x

    for w in (1, 1.0, 2.5):
        velocity(net, noise()[:, 0], torch.ones(B), text, w)
    assert sizes == [B, B, 2 * B]


@pytest.mark.parametrize("adapter", [None, "a"])
def test_a_policy_gives_the_guided_velocity_or_both_branches_in_float32(net, text, adapter):
    def half(*inputs):
        return net(*inputs).bfloat16()

    x = noise()[:, 0]
    t = torch.tensor([1, 0.7, 0.4, 0.1])
    v = Policy(half, adapter, 2.5)(x, t, text)
    assert v.dtype == torch.float32
    assert torch.equal(v, velocity(half, x, t, text, 2.5, adapter).float())
    both = Policy(half, adapter, 2.5, both=True)(x, t, text)
    v_null, v_text = branches(half, x, t, text, adapter)
    assert both.dtype == torch.float32
    assert torch.equal(both, torch.cat([v_null, v_text], 1).float())


def test_encode_reads_each_distinct_prompt_once_and_the_empty_one_for_guidance():
    seen = []

    def encoder(prompts):
        seen.extend(prompts)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts]).float()
        return lengths[:, :, None], lengths + 100

    got = encode(encoder, ["ab", "a", "ab", ""])
    assert sorted(set(seen)) == ["", "a", "ab"] and seen.count("ab") == seen.count("a") == 1
    assert got.context.flatten().tolist() == [2, 1, 2, 0]
    assert got.pooled.flatten().tolist() == [102, 101, 102, 100]
    assert got.null_context.flatten().tolist() == [0] * 4
    assert got.null_pooled.flatten().tolist() == [100] * 4
    assert got.rows([2, 1]).context.flatten().tolist() == [2, 1]


# ------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("kind, guidance, adapter", [
    ("sde", 1.0, "a"), ("sde", 2.5, "b"), ("cps", 1.0, None),
])
def test_replaying_a_stored_action_scores_the_recorded_logp(net, text, kind, guidance, adapter):
    times = schedule(K)
    policy = Policy(net, adapter, guidance)
    trajectory = make_sampler(kind).rollout(policy, noise(), text)
    last = K - 1 if kind == "cps" else K         # CPS ends without noise and density
    for k in range(last):
        x = trajectory.x[:, k]
        v = velocity(net, x, times[k].expand(B), text, guidance, adapter)
        mean, std = step(kind, x, v, times[k], times[k + 1], 0.7, times[1])
        logp = log_prob(trajectory.x[:, k + 1], mean, std)
        torch.testing.assert_close(logp, trajectory.logp[:, k], rtol=0, atol=1e-5)
    assert (trajectory.logp[:, last:] == 0).all()


def test_recorded_logp_is_the_density_of_the_noise_that_was_drawn(net, text):
    times = schedule(K)
    z = noise()
    logp = make_sampler().rollout(Policy(net), z, text).logp
    for k in range(K):
        _, std = sde_step(z[:, 0], z[:, 0], times[k], times[k + 1], 0.7, times[1])
        normal = torch.distributions.Normal(0, 1)
        expected = normal.log_prob(z[:, k + 1]).mean((1, 2, 3)) - math.log(std.item())
        torch.testing.assert_close(logp[:, k], expected, rtol=0, atol=2e-4)


def test_rollout_noise_is_per_trajectory(net, text):
    """Cutting the batch in two gives the same trajectories.

    Changing the noise of one sample changes no other's trajectory.
    """
    policy = Policy(net, None, 2.5)
    sampler = make_sampler()
    whole = sampler.rollout(policy, noise(), text)
    parts = []
    for rows in ([0], [1, 2, 3]):
        parts.append(sampler.rollout(policy, noise(rows), text.rows(rows)))
    x = torch.cat([part.x for part in parts])
    logp = torch.cat([part.logp for part in parts])
    torch.testing.assert_close(x, whole.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logp, whole.logp, rtol=1e-4, atol=1e-4)
    other = sampler.rollout(policy, torch.cat([noise([9]), noise([1, 2, 3])]), text)
    assert torch.equal(other.x[1:], whole.x[1:]) and not torch.allclose(other.x[0], whole.x[0])


def test_draw_noise_is_the_same_whatever_the_batch_cut():
    whole = noise()
    assert whole.shape == (B, K + 1, *SHAPE)
    assert torch.equal(torch.cat([noise([0]), noise([1, 2]), noise([3])]), whole)
    assert torch.equal(noise([2, 0]), whole[[2, 0]])
    # No two samples or steps share their numbers.
    correlation = torch.corrcoef(whole.flatten(2).flatten(0, 1)).fill_diagonal_(0)
    assert (correlation.abs() < 0.6).all()
    assert whole.mean().abs() < 0.1 and abs(whole.std() - 1) < 0.1


def test_a_key_of_numpys_or_torchs_integers_is_the_key_of_pythons():
    def draw(*key):
        return torch.randn(8, generator=generator(*key))

    assert torch.equal(draw(3, "a", 5), draw(np.int64(3), "a", torch.tensor(5)))
    assert not torch.equal(draw(3, "a", 5), draw(3, "a", 6))
    assert not torch.equal(draw(1, 23), draw(12, 3))


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_steps_outside_noisy_are_the_odes_and_have_logp_0(net, text, kind):
    times = schedule(K)
    z = noise()
    noisy = range(1, 3)
    x, logp, vs = make_sampler(kind, noisy).rollout(Policy(net), z, text, keep_v=True)
    for k in range(K):
        v = velocity(net, x[:, k], times[k].expand(B), text)
        assert torch.equal(vs[:, k], v.float())
        how = kind if k in noisy else "ode"
        mean, std = step(how, x[:, k], v, times[k], times[k + 1], 0.7, times[1])
        torch.testing.assert_close(x[:, k + 1], mean + std * z[:, k + 1], rtol=0, atol=1e-5)
        if k in noisy:
            assert (logp[:, k] != 0).all()
        else:
            assert (logp[:, k] == 0).all() and (std == 0).all()


def test_rollout_states_are_float32_from_the_noise_to_the_sample(net, text):
    """Whatever the network computes in."""
    def half(*inputs):
        return net(*inputs).bfloat16()

    x, logp, v = make_sampler().rollout(Policy(half), noise(), text, keep_v=True)
    assert v.shape == (B, K, *SHAPE) and v.dtype == torch.float32
    assert x.shape == (B, K + 1, *SHAPE) and logp.shape == (B, K)
    assert x.dtype == logp.dtype == torch.float32 and torch.equal(x[:, 0], noise()[:, 0])


def test_sample_is_the_ode_and_reads_only_the_first_noise(net, text):
    z = noise()
    policy = Policy(net, "b", 2.5)
    ode = make_sampler(noisy=range(0))
    expected = ode.rollout(policy, z, text)
    assert torch.equal(sample(policy, z[:, 0], text, schedule(K)), expected.x[:, -1])
    z[:, 1:] = 0
    assert torch.equal(ode.rollout(policy, z, text).x, expected.x)
    assert (expected.logp == 0).all()


# ------------------------------------------------------------------ states


@pytest.fixture(scope="module")
def trajectory(net, text):
    return make_sampler().rollout(Policy(net, "a"), noise(), text, keep_v=True)


STEPS = torch.tensor([[0, 3], [1, 2], [4, 4], [2, 0]])           # (B, S)


@pytest.fixture
def some_states(trajectory):
    return visited(trajectory, STEPS, torch.arange(10, 10 + B), make_sampler())


def test_a_rollout_that_ends_early_has_the_same_states_so_far_and_nan_after(trajectory, net, text):
    short = make_sampler().rollout(Policy(net, "a"), noise(), text, keep_v=True, until=2)
    assert torch.equal(short.x[:, :3], trajectory.x[:, :3])
    assert torch.equal(short.logp[:, :2], trajectory.logp[:, :2])
    assert torch.equal(short.v, trajectory.v[:, :2])
    assert short.x.shape == trajectory.x.shape and short.x[:, 3:].isnan().all()
    assert short.logp[:, 2:].isnan().all()


def test_visited_states_are_the_steps_of_their_own_trajectories(trajectory, some_states):
    times = schedule(K)
    assert len(some_states) == 2
    for slot, s in enumerate(some_states):
        assert s.images.tolist() == [10, 11, 12, 13] and s.slot.tolist() == [slot] * B
        assert torch.equal(s.k, STEPS[:, slot])
        for i, k in enumerate(STEPS[:, slot].tolist()):
            assert s.t[i] == times[k] and s.dt[i] == times[k] - times[k + 1]
            assert torch.equal(s.x[i], trajectory.x[i, k])
            assert torch.equal(s.x_next[i], trajectory.x[i, k + 1])
            assert torch.equal(s.v_old[i], trajectory.v[i, k])
            assert s.logp_old[i] == trajectory.logp[i, k]


def test_regrouped_states_are_the_same_ones_in_pieces_of_at_most_micro(some_states):
    pieces = regroup(some_states, torch.tensor([10, 12, 13]), micro=4)
    assert [len(s.x) for s in pieces] == [4, 2]
    found = [(i, slot) for s in pieces for i, slot in zip(s.images.tolist(), s.slot.tolist())]
    assert sorted(found) == [(i, slot) for i in (10, 12, 13) for slot in (0, 1)]
    for s in pieces:
        for row, (i, slot) in enumerate(zip(s.images.tolist(), s.slot.tolist())):
            was = some_states[slot]
            for name in ("k", "x", "x_next", "logp_old", "v_old"):
                assert torch.equal(getattr(s, name)[row], getattr(was, name)[i - 10]), name


def test_pieces_by_step_do_not_mix_steps(some_states):
    pieces = regroup(some_states, torch.arange(10, 14), micro=3, by_step=True)
    assert [len(s.x) for s in pieces] == [3, 1, 3, 1]
    assert [s.slot.unique().tolist() for s in pieces] == [[0], [0], [1], [1]]


def test_states_without_a_signal_are_left_out_but_for_one_if_all_are(some_states):
    signal = torch.zeros(20, dtype=torch.bool)
    signal[11] = True
    piece, = regroup(some_states, torch.arange(10, 14), 8, signal)
    assert piece.images.tolist() == [11, 11] and piece.slot.tolist() == [0, 1]
    piece, = regroup(some_states, torch.tensor([10, 12]), 8, signal)
    assert piece.images.tolist() == [10], "of its own images"


def test_table_has_what_states_say_in_its_place_and_nan_elsewhere(some_states):
    pieces = regroup(some_states, torch.tensor([11, 13]), 8)
    for s in pieces:
        s.kl = 10.0 * s.images + s.slot
    found = table([pieces], "kl", 14, 2)
    assert found[[11, 13]].tolist() == [[110, 111], [130, 131]]
    assert found.isnan().sum() == 2 * 12


def test_ratio_is_one_at_the_velocity_of_the_rollout_and_exp_of_the_gap_elsewhere(some_states):
    for s in some_states:
        torch.testing.assert_close(likelihood_ratio(s.v_old, s), torch.ones(B), rtol=0, atol=1e-5)
        v = s.v_old + 0.3
        mean, std = s.gaussian(v)
        expected = (log_prob(s.x_next, mean, std) - s.logp_old).exp()
        assert torch.equal(likelihood_ratio(v, s), expected)
        assert (expected - 1).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_kl_of_states_at_different_steps_is_each_steps_own(trajectory, text, kind):
    sampler = make_sampler(kind)
    early = STEPS.clamp(max=K - 2)                               # the last CPS step has no noise
    for s in visited(trajectory, early, torch.arange(B), sampler):
        v_target = s.v_old + torch.randn(s.x.shape, generator=generator("gap"))
        got = kl(s.v_old, v_target, s)
        for i in range(B):
            row = slice(i, i + 1)
            t = s.t[i]
            rest = (t, t - s.dt[i], 0.7, sampler.times[1])
            mean, std = step(kind, s.x[row], s.v_old[row], *rest)
            mean_target, _ = step(kind, s.x[row], v_target[row], *rest)
            expected = gaussian_kl(mean, mean_target, std)
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-6)


def test_kl_of_both_branches_is_the_mean_of_theirs(some_states):
    for s in some_states:
        gap = torch.randn(2, *s.x.shape, generator=generator("branches"))
        both = torch.cat([s.v_old, s.v_old], 1)
        got = kl(both, both + torch.cat([gap[0], gap[1]], 1), s)
        each = [kl(s.v_old, s.v_old + part, s) for part in gap]
        torch.testing.assert_close(got, (each[0] + each[1]) / 2)


def test_gradient_is_zero_where_the_ratio_is_clipped_and_minus_advantage_elsewhere():
    """Only those moves are cut that the objective no longer rewards."""
    logp = torch.tensor([0.0, 0.3, -0.3, 0.3, -0.3], requires_grad=True)
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    ratio = logp.exp()
    clipped(ratio, adv, 0.2).sum().backward()
    expected = [-1.0, 0.0, -ratio[2].item(), ratio[3].item(), 0.0]
    assert logp.grad.tolist() == pytest.approx(expected)


def test_ratio_summary_is_of_the_first_update_and_of_the_later_ones(trajectory):
    def minibatch(*ratios):
        states = visited(trajectory, STEPS, torch.arange(B), make_sampler())
        for s, ratio in zip(states, ratios):
            s.ratio = torch.tensor(ratio)
        return states

    first = minibatch([1, 1, 1.001, 1], [1, 0.998, 1, 1])
    second = minibatch([1, 1.3, 1.2, 0.7], [1, 0.95, 1.05, 1])
    summary = ratio_summary([first, second], 0.1)
    assert summary["ratio_err"] == pytest.approx(0.002, rel=1e-3)
    assert summary["clip_frac"] == pytest.approx(3 / 8), "in the second, where ratios move"
    assert ratio_summary([second], 0.1)["clip_frac"] == pytest.approx(3 / 8), "one is all there is"
    second[0].ratio = None
    assert ratio_summary([first, second], 0.04)["clip_frac"] == pytest.approx(2 / 4)
