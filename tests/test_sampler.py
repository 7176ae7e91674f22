"""Facts about sampler.py: the schedule, one step and its density, guidance, whole trajectories."""
import math

import pytest
import torch

from model import MMDiT, MMDiTConfig, Route
from sampler import Text, cps_step, draw_noise, encode, gaussian_kl, log_prob, ode_step, rollout, sample, schedule, sde_sigma, sde_step, step, velocity

B, K, SHAPE = 4, 5, (4, 4, 6)
SETTINGS = [("sde", 0.7), ("sde", 0.3), ("cps", 0.7), ("ode", 0.7)]


@pytest.fixture(scope="module")
def net():
    """A tiny MMDiT, random in every weight, with two adapters of different ranks that both do something."""
    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig(depth=2, width=64, head_dim=32, channels=4, patch=2, pos_max=8, context_dim=16, pooled_dim=8, dual=1))
    net.add_adapter("a", 2, 4)
    net.add_adapter("b", 3, 3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    g = torch.Generator().manual_seed(1)
    return Text(*(torch.randn(B, *s, generator=g) for s in [(3, 16), (8,), (3, 16), (8,)]))


def states(seed=2):
    """x, v like a batch of latents, and times t, t_next (B,) inside (0, 1), in float64."""
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, B, *SHAPE, generator=g, dtype=torch.float64)
    return x, v, torch.tensor([0.95, 0.6, 0.3, 0.05]).double(), torch.tensor([0.9, 0.35, 0.28, 0.01]).double()


def noise(batch=range(B)):
    return draw_noise([("test", i) for i in batch], K, SHAPE)


# ------------------------------------------------------------------ schedule


def test_schedule_equals_reference_numbers():
    expected = [1.0, 0.9601293103, 0.9133489461, 0.8576923077, 0.7903682720, 0.7072784811, 0.6021505377, 0.4648760332, 0.2780487807, 0.0089285718, 0.0]
    torch.testing.assert_close(schedule(10), torch.tensor(expected), rtol=0, atol=2e-7)


@pytest.mark.parametrize("n", [1, 2, 10, 40])
def test_schedule_falls_from_exactly_1_to_exactly_0(n):
    t = schedule(n)
    assert len(t) == n + 1 and t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()


# ------------------------------------------------------------------ densities


@pytest.mark.parametrize("std", [torch.tensor([0.01, 0.5, 1, 3]), torch.tensor([0.2])], ids=["per_sample", "shared"])
def test_logp_matches_torch_normal(std):
    mean, x_next, _, _ = states()
    std = std.double().view(-1, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, mean, std), expected)


@pytest.mark.parametrize("std", [torch.tensor([0.01, 0.5, 1, 3]), torch.tensor([0.2])], ids=["per_sample", "shared"])
def test_kl_matches_torch_kl_divergence(std):
    p, q, _, _ = states()
    std = std.double().view(-1, 1, 1, 1)
    normal = [torch.distributions.Normal(mean, std.expand_as(mean)) for mean in (p, q)]
    torch.testing.assert_close(gaussian_kl(p, q, std), torch.distributions.kl_divergence(*normal).mean((1, 2, 3)))


def test_kl_of_an_sde_step_is_w_times_the_squared_velocity_gap():
    (x, v_p, t, t_next), v_q, t_second = states(), states(3)[1], 0.96
    t, t_next = torch.cat([t[:3], torch.ones(1)]), torch.cat([t_next[:3], torch.tensor([t_second])])      # the last at t = 1
    mean_p, std = sde_step(x, v_p, t, t_next, 0.7, t_second)
    mean_q, _ = sde_step(x, v_q, t, t_next, 0.7, t_second)
    dt, sigma_t = t - t_next, 0.7 * (t / (1 - torch.where(t == 1, t_second, t))).sqrt()
    w = dt / 2 * (sigma_t * (1 - t) / (2 * t) + 1 / sigma_t) ** 2
    torch.testing.assert_close(gaussian_kl(mean_p, mean_q, std), w * ((v_p - v_q) ** 2).mean((1, 2, 3)))


# ------------------------------------------------------------------ one step on a Gaussian: x_0 ~ N(M, S^2), everything in closed form

M, S = 0.7, 0.4


def moments(t):
    """Mean and variance of x_t = (1 - t) x_0 + t eps."""
    return torch.tensor([(1 - t) * M, (1 - t) ** 2 * S ** 2 + t ** 2], dtype=torch.float64)


def gaussian_velocity(x, t, s=S):
    """E[eps - x_0 | x_t = x], by the regression of eps - x_0 on x_t."""
    return -M + (t - (1 - t) * s ** 2) / ((1 - t) ** 2 * s ** 2 + t ** 2) * (x - (1 - t) * M)


def push(mean_var, kind, t, t_next, a, s=S):
    """Mean and variance after one step, without sampling: x_next is affine in x, because v is."""
    x = torch.tensor([0, 1], dtype=torch.float64).view(2, 1, 1, 1)
    y, std = step(kind, x, gaussian_velocity(x, t, s), t, t_next, a, 0.99)
    slope = y[1].item() - y[0].item()
    return torch.tensor([y[0].item() + slope * mean_var[0], slope ** 2 * mean_var[1] + std.item() ** 2], dtype=torch.float64)


def a_for(kind, a, dt):
    """CPS at one a adds the same share of noise at any step; for the limit of short steps its a has to shrink with sqrt(dt)."""
    return 2 / math.pi * math.asin(a * dt ** 0.5) if kind == "cps" else a


@pytest.mark.parametrize("t", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("kind, a", SETTINGS)
def test_one_step_leaves_the_marginal_by_the_square_of_dt(kind, a, t):
    error = [(push(moments(t), kind, t, t - dt, a_for(kind, a, dt)) - moments(t - dt)).abs() for dt in (2e-3, 1e-3)]
    assert error[1].max() < 3e-5
    assert ((error[0] > 3.5 * error[1]) | (error[1] < 1e-12)).all()          # halving dt quarters it; an error of order dt would halve


@pytest.mark.parametrize("kind, a", SETTINGS)
def test_sde_step_keeps_the_ode_marginal_on_a_gaussian(kind, a):
    times, now = torch.linspace(0.95, 0, 2001, dtype=torch.float64).tolist(), moments(0.95)
    for t, t_next in zip(times, times[1:]):
        now = push(now, kind, t, t_next, a_for(kind, a, t - t_next))
        if round(t_next, 6) in (0.475, 0.0):
            torch.testing.assert_close(now, moments(t_next), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind, a", SETTINGS)
def test_rollout_on_a_gaussian_ends_at_the_gaussian(kind, a):
    n, times = 400, torch.linspace(1, 0, 401)
    net = lambda x, t, *_: gaussian_velocity(x, t.view(-1, 1, 1, 1))                                       # noqa: E731
    text = Text(*[torch.zeros(1, 1)] * 4)
    x = rollout(net, draw_noise([("gaussian",)], n, (1, 128, 128)), times, text, kind=kind, a=a_for(kind, a, 1 / n)).x[:, -1]
    assert x.mean().item() == pytest.approx(M, abs=5 * S / 128)                 # five standard errors of 128^2 numbers
    assert x.std().item() == pytest.approx(S, abs=5 * S / 128 / 2 ** 0.5)


@pytest.mark.parametrize("a", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("t, t_next", [(1.0, 0.6), (0.6, 0.1), (0.6, 0.0)])
def test_one_cps_step_of_any_length_keeps_the_marginal_of_one_image_exactly(a, t, t_next):
    before, after = [torch.tensor([(1 - u) * M, u ** 2], dtype=torch.float64) for u in (t, t_next)]
    torch.testing.assert_close(push(before, "cps", t, t_next, a, s=0), after)
    assert push(before, "sde", 0.6, 0.1, 0.7, s=0)[1] > 0.15 ** 2          # the SDE leaves noise above what t_next asks for


def test_cps_leaves_no_noise_at_t_next_0():
    x, v, t, _ = states()
    mean, std = cps_step(x, v, t, torch.zeros(B), 0.7)
    assert (std == 0).all()
    torch.testing.assert_close(mean, x - t.view(-1, 1, 1, 1) * v)                # x0_hat


def test_cps_std_is_t_next_sin_of_a_quarter_turn():
    x, v, t, t_next = states()
    for a, share in [(0, 0), (1 / 3, 0.5), (1 / 2, 0.5 ** 0.5), (1, 1)]:
        torch.testing.assert_close(cps_step(x, v, t, t_next, a)[1].flatten(), share * t_next)


def test_sde_with_a_0_equals_ode():
    x, v, t, t_next = states()
    mean, std = sde_step(x, v, t, t_next, 0, 0.9)
    torch.testing.assert_close(mean, ode_step(x, v, t, t_next)[0])
    assert (std == 0).all() and (ode_step(x, v, t, t_next)[1] == 0).all()


def test_sigma_t_takes_the_second_time_at_t_1():
    got = sde_sigma(torch.tensor([1, 0.9601, 0.5]), torch.tensor(0.9601), 0.7)
    torch.testing.assert_close(got, 0.7 * torch.tensor([1 / 0.0399, 0.9601 / 0.0399, 1]).sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["sde", "cps", "ode"])
def test_a_batch_of_times_steps_each_sample_by_its_own(kind):
    x, v, t, t_next = states()
    mean, std = step(kind, x, v, t, t_next, 0.7, 0.96)
    for i in range(B):
        m, s = step(kind, x[i:i + 1], v[i:i + 1], t[i].item(), t_next[i].item(), 0.7, 0.96)
        torch.testing.assert_close(mean[i:i + 1], m)
        torch.testing.assert_close(std[i:i + 1], s)


# ------------------------------------------------------------------ guidance


ADAPTERS = [None, "a", Route(["a", "b"], torch.tensor([1, -1, 0, 1]))]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["base", "name", "route"])
def test_guidance_is_null_plus_w_times_the_difference_of_two_forwards(net, text, adapter):
    x, t = noise()[:, 0], torch.tensor([1, 0.7, 0.4, 0.1])
    v_text, v_null = net(x, t, text.context, text.pooled, adapter), net(x, t, text.null_context, text.null_pooled, adapter)
    assert not torch.allclose(v_text, v_null, rtol=0.1)
    torch.testing.assert_close(velocity(net, x, t, text, 2.5, adapter), v_null + 2.5 * (v_text - v_null), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity(net, x, t, text, 1.0, adapter), v_text, rtol=0, atol=0)
    torch.testing.assert_close(velocity(net, x, t, text, 1.0 + 1e-6, adapter), v_text, rtol=1e-4, atol=1e-4)


def test_guidance_1_takes_one_forward_of_the_batch_and_more_takes_one_of_twice_the_batch(text):
    sizes = []

    def net(x, t, context, pooled, adapter):
        sizes.append(len(x))
        return x

    for w in (1, 1.0, 2.5):
        velocity(net, noise()[:, 0], torch.ones(B), text, w)
    assert sizes == [B, B, 2 * B]


def test_encode_reads_each_distinct_prompt_once_and_the_empty_one_for_guidance():
    seen = []

    def encoder(prompts):
        seen.extend(prompts)
        return torch.tensor([[[len(p)]] for p in prompts]).float(), torch.tensor([[len(p)] for p in prompts]).float() + 100

    got = encode(encoder, ["ab", "a", "ab", ""])
    assert sorted(set(seen)) == ["", "a", "ab"] and seen.count("ab") == seen.count("a") == 1
    assert got.context.flatten().tolist() == [2, 1, 2, 0] and got.pooled.flatten().tolist() == [102, 101, 102, 100]
    assert got.null_context.flatten().tolist() == [0] * 4 and got.null_pooled.flatten().tolist() == [100] * 4
    assert got.rows([2, 1]).context.flatten().tolist() == [2, 1]


# ------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("kind, guidance, adapter", [("sde", 1.0, "a"), ("sde", 2.5, ADAPTERS[2]), ("cps", 1.0, None)])
def test_replaying_a_stored_action_scores_the_recorded_logp(net, text, kind, guidance, adapter):
    times = schedule(K)
    trajectory = rollout(net, noise(), times, text, guidance, adapter, kind)
    for k in range(K - (kind == "cps")):                                        # the last CPS step has no noise and no density
        x, x_next = trajectory.x[:, k], trajectory.x[:, k + 1]
        mean, std = step(kind, x, velocity(net, x, times[k].expand(B), text, guidance, adapter), times[k], times[k + 1], 0.7, times[1])
        torch.testing.assert_close(log_prob(x_next, mean, std), trajectory.logp[:, k], rtol=0, atol=1e-5)
    assert kind == "sde" or (trajectory.logp[:, -1] == 0).all()


def test_recorded_logp_is_the_density_of_the_noise_that_was_drawn(net, text):
    times, z = schedule(K), noise()
    for k in range(K):
        std = sde_step(z[:, 0], z[:, 0], times[k], times[k + 1], 0.7, times[1])[1].item()
        expected = torch.distributions.Normal(0, 1).log_prob(z[:, k + 1]).mean((1, 2, 3)) - math.log(std)
        torch.testing.assert_close(rollout(net, z, times, text).logp[:, k], expected, rtol=0, atol=2e-4)


def test_rollout_noise_is_per_trajectory(net, text):
    """Cutting the batch in two gives the same trajectories, and changing one sample's noise changes no other's."""
    whole, halves = rollout(net, noise(), schedule(K), text, 2.5), []
    for rows in ([0], [1, 2, 3]):
        halves.append(rollout(net, noise(rows), schedule(K), text.rows(rows), 2.5))
    torch.testing.assert_close(torch.cat([h.x for h in halves]), whole.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([h.logp for h in halves]), whole.logp, rtol=1e-4, atol=1e-4)
    other = rollout(net, torch.cat([noise([9]), noise([1, 2, 3])]), schedule(K), text, 2.5)
    assert torch.equal(other.x[1:], whole.x[1:]) and not torch.allclose(other.x[0], whole.x[0])


def test_draw_noise_is_the_same_whatever_the_batch_cut():
    whole = noise()
    assert whole.shape == (B, K + 1, *SHAPE)
    assert torch.equal(torch.cat([noise([0]), noise([1, 2]), noise([3])]), whole)
    assert torch.equal(noise([2, 0]), whole[[2, 0]])
    flat = whole.flatten(2).flatten(0, 1)
    assert (torch.corrcoef(flat).fill_diagonal_(0).abs() < 0.6).all()           # no two samples or steps share their numbers
    assert whole.mean().abs() < 0.1 and abs(whole.std() - 1) < 0.1


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_steps_outside_noisy_are_the_odes_and_have_logp_0(net, text, kind):
    times, z = schedule(K), noise()
    x, logp, vs = rollout(net, z, times, text, kind=kind, noisy=[1, 2])
    for k in range(K):
        v = velocity(net, x[:, k], times[k].expand(B), text)
        assert torch.equal(vs[:, k], v.float())
        mean, std = step(kind if k in (1, 2) else "ode", x[:, k], v, times[k], times[k + 1], 0.7, times[1])
        torch.testing.assert_close(x[:, k + 1], mean + std * z[:, k + 1], rtol=0, atol=1e-5)
        assert (logp[:, k] != 0).all() if k in (1, 2) else (logp[:, k] == 0).all() and (std == 0).all()


def test_rollout_states_are_float32_from_the_noise_to_the_sample(net, text):
    """Whatever the network computes in."""
    x, logp, v = rollout(lambda *inputs: net(*inputs).bfloat16(), noise(), schedule(K), text)
    assert v.shape == (B, K, *SHAPE) and v.dtype == torch.float32
    assert x.shape == (B, K + 1, *SHAPE) and logp.shape == (B, K)
    assert x.dtype == logp.dtype == torch.float32 and torch.equal(x[:, 0], noise()[:, 0])


def test_sample_is_the_ode_and_reads_only_the_first_noise(net, text):
    z, times = noise(), schedule(K)
    expected = rollout(net, z, times, text, 2.5, "b", kind="ode")
    assert torch.equal(sample(net, z[:, 0], times, text, 2.5, "b"), expected.x[:, -1])
    assert torch.equal(sample(net, z, times, text, 2.5, "b"), expected.x[:, -1])
    assert (expected.logp == 0).all()


def test_unknown_step_is_refused():
    x, v, t, t_next = states()
    with pytest.raises(AssertionError, match="unknown step 'heun'"):
        step("heun", x, v, t, t_next, 0.7, 0.96)
