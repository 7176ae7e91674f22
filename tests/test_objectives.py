"""Facts about the objectives of train_opd.py, on a policy where every expectation is known.

Its velocities are affine in x, so all states are Gaussian: v = x M^T + b, in N = 2 latent elements.
Log-probabilities and KLs are averaged over elements. A policy gradient is a product of two of them,
so it is 1/N of what the sum over one of them would be: hence the factor N below.
"""
import math
from types import SimpleNamespace

import pytest
import torch

import train_opd
from sampler import Sampler, State, kl, log_prob, schedule, sde_sigma, step
from train_opd import OBJECTIVES, credited, step_reward

N, K, A = 2, 4, 0.7
TIMES = schedule(6).double()
KS = range(1, 1 + K)                # at step 0 std is large and the numbers dull
SAMPLER = Sampler(TIMES, "sde", A, KS)
M_S = torch.tensor([[0.3, -0.5], [0.2, 0.7]]).double()
B_S = torch.tensor([0.1, -0.2]).double()
M_T = torch.tensor([[0.6, -0.1], [-0.3, 0.5]]).double()
B_T = torch.tensor([-0.2, 0.3]).double()


def velocity(theta, x):
    M = theta[:4].view(2, 2)
    b = theta[4:]
    return (x[:, :, 0, 0] @ M.T + b)[:, :, None, None]


def theta_s():
    return torch.cat([M_S.flatten(), B_S]).requires_grad_(True)


def target(x):
    return velocity(torch.cat([M_T.flatten(), B_T]), x)


def randn(*shape, g=None):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def weight(k):
    """w(t) of step k: the KL of the SDE is w(t) |v - v_target|^2."""
    t = TIMES[k]
    dt = t - TIMES[k + 1]
    sigma = sde_sigma(t, TIMES[1], A)
    return dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2


def bare_state(x, k, sampler=SAMPLER):
    """A state before its step: the velocity of the rollout and x_next are still to come."""
    rows = torch.arange(len(x))
    return State(images=rows, slot=torch.zeros_like(rows), k=torch.full_like(rows, k), x=x,
                 x_next=None, v_old=None, logp_old=None, sampler=sampler, v_target=target(x))


@torch.no_grad()
def state(x, k, theta, g):
    """One sampled step of the student from x."""
    s = bare_state(x, k)
    s.v_old = velocity(theta, x)
    mean, std = s.gaussian(s.v_old)
    s.x_next = mean + std * randn(*x.shape, g=g)
    s.logp_old = log_prob(s.x_next, mean, std)
    return s


def path(B, theta, g):
    """B trajectories of the student from N(0, 1): the K states."""
    x = randn(B, N, 1, 1, g=g)
    states = []
    for k in KS:
        states.append(state(x, k, theta, g))
        x = states[-1].x_next
    return states


def exact_path_kl(theta, through_states):
    """The sum over steps of E[D], from the Gaussian moments of the states.

    through_states: its gradient also goes by how theta moves the states.
    """
    M = theta[:4].view(2, 2)
    b = theta[4:]
    eye = torch.eye(N).double()
    mean = torch.zeros(N).double()
    cov = eye
    total = 0
    for k in KS:
        t = TIMES[k]
        dt = t - TIMES[k + 1]
        sigma = sde_sigma(t, TIMES[1], A)
        dM = M - M_T
        db = b - B_T
        gap = (dM @ mean + db).square().sum() + torch.trace(dM @ cov @ dM.T)
        total = total + weight(k) * gap / N
        drift_x = 1 - sigma ** 2 * dt / (2 * t)
        drift_v = (1 + sigma ** 2 * (1 - t) / (2 * t)) * dt
        moving_M = M if through_states else M.detach()
        moving_b = b if through_states else b.detach()
        J = drift_x * eye - drift_v * moving_M
        mean = J @ mean - drift_v * moving_b
        cov = J @ cov @ J.T + sigma ** 2 * dt * eye
    return total


def gradient(loss, theta):
    return torch.autograd.grad(loss, theta)[0]


def exact(through_states):
    theta = theta_s()
    return gradient(exact_path_kl(theta, through_states), theta)


def one_gradient(objective, reward, credit, group, B, g):
    """The gradient (6,) from B trajectories: summed over steps, averaged over trajectories."""
    theta = theta_s()
    cfg = SimpleNamespace(clip=0.2)
    states = path(B, theta, g)
    rewards = torch.stack([step_reward(s, reward) for s in states], 1)
    adv = credited(rewards, group, credit)
    loss = 0
    for j, s in enumerate(states):
        s.adv = adv[:, j]
        loss = loss + OBJECTIVES[objective](velocity(theta, s.x), s, cfg).mean()
    return gradient(loss, theta)


def estimate(objective, reward="dense", credit="step", group=1, runs=60, B=700):
    """The mean gradient over runs of B trajectories, and its standard error: (6,) each."""
    g = torch.Generator().manual_seed(0)
    grads = [one_gradient(objective, reward, credit, group, B, g) for _ in range(runs)]
    grads = torch.stack(grads)
    return grads.mean(0), grads.std(0) / math.sqrt(runs)


def agrees(mean, se, want):
    return ((mean - want).abs() < 4.5 * se + 1e-9).all()


# ------------------------------------------------------------------ expected gradients


def test_kl_is_the_gradient_at_the_visited_states():
    mean, se = estimate("kl")
    assert agrees(mean, se, exact(False)) and not agrees(mean, se, exact(True))


def test_kl_has_no_variance_at_a_state_and_the_sampled_form_has():
    x = torch.randn(500, N, 1, 1).double()
    theta = theta_s()
    g = torch.Generator().manual_seed(1)
    cfg = SimpleNamespace(clip=0.2)
    closed, sampled = [], []
    for _ in range(50):
        s = state(x, 3, theta, g)
        closed.append(gradient(OBJECTIVES["kl"](velocity(theta, x), s, cfg).mean(), theta))
        s.adv = step_reward(s, "sampled")
        sampled.append(gradient(OBJECTIVES["pg"](velocity(theta, x), s, cfg).mean(), theta))
    closed = torch.stack(closed)
    sampled = N * torch.stack(sampled)
    assert closed.std(0).max() < 1e-12
    assert agrees(sampled.mean(0), sampled.std(0) / 50 ** 0.5, closed[0])
    assert (sampled.std(0) > 0.1 * closed[0].abs()).all()


def test_detached_dense_reward_has_no_gradient_on_average():
    """The paper's text: nothing but noise, which falls with the number of draws."""
    mean, se = estimate("pg", "dense", "step")
    assert agrees(mean, se, torch.zeros(6)) and (se > 0).all()
    _, few = estimate("pg", "dense", "step", runs=40, B=100)
    _, many = estimate("pg", "dense", "step", runs=40, B=1600)
    assert 2 < few.norm() / many.norm() < 8          # a quarter for sixteen times as many
    assert exact(False).norm() > 20 * mean.norm()


def test_sampled_log_ratio_is_unbiased_for_kl():
    mean, se = estimate("pg", "sampled", "step")
    assert agrees(N * mean, N * se, exact(False))


def test_dense_reward_is_minus_the_kl_and_the_sampled_one_is_so_on_average():
    theta = theta_s()
    g = torch.Generator().manual_seed(6)
    x = randn(1, N, 1, 1, g=g).expand(20_000, N, 1, 1)
    for k in KS:
        s = state(x, k, theta, g)
        minus_kl = -kl(velocity(theta, x), target(x), s).detach()
        assert torch.equal(step_reward(s, "dense"), minus_kl)
        sampled = step_reward(s, "sampled")
        assert agrees(sampled.mean(), sampled.std() / len(x) ** 0.5, minus_kl[0])
        assert sampled.std() > 0.1 * minus_kl[0].abs()


def test_future_credit_is_what_the_direct_gradient_lacks():
    direct = exact(False)
    rest = exact(True) - direct
    assert rest.norm() > 0.05 * direct.norm()
    mean, se = estimate("pg", "dense", "future", runs=150)
    assert agrees(N * mean, N * se, rest) and not agrees(N * mean, N * se, torch.zeros(6))


def test_sampled_future_credit_is_the_gradient_of_whole_trajectories():
    mean, se = estimate("pg", "sampled", "future", runs=150)
    assert agrees(N * mean, N * se, exact(True)) and not agrees(N * mean, N * se, exact(False))


def test_released_form_is_the_closed_form_times_dt_plus_noise():
    theta = theta_s()
    mean, se = estimate("released")
    want = torch.zeros(6).double()
    g = torch.Generator().manual_seed(5)
    for s in path(150_000, theta, g):
        D = kl(velocity(theta, s.x), target(s.x), s)
        want += gradient((D * s.dt).mean(), theta)
    assert agrees(mean, se + 4e-3 * want.abs(), want)


def test_released_form_gives_each_image_the_mean_of_its_micro_batch():
    """By its broadcast of (b, 1) against (b,)."""
    theta = theta_s()
    s = path(300, theta, torch.Generator().manual_seed(5))[2]
    v = velocity(theta, s.x)
    D = kl(v, target(s.x), s) * s.dt
    got = OBJECTIVES["released"](v, s, SimpleNamespace(clip=0.2))
    torch.testing.assert_close(got, D.mean().expand(300))


def test_velocity_loss_is_kl_without_its_weight():
    theta = theta_s()
    g = torch.Generator().manual_seed(2)
    for k in KS:
        s = state(torch.randn(5, N, 1, 1).double(), k, theta, g)
        v = velocity(theta, s.x)
        expected = weight(k) * OBJECTIVES["velocity"](v, s, None)
        torch.testing.assert_close(OBJECTIVES["kl"](v, s, None), expected)


def test_weight_of_the_kl_has_the_ode_limit():
    a = 1e-4
    for k in KS:
        s = bare_state(torch.zeros(1, N, 1, 1).double(), k, Sampler(TIMES, "sde", a, range(0)))
        one = torch.ones(1, N, 1, 1).double()
        t = TIMES[k]
        dt = t - TIMES[k + 1]
        limit = (dt * (1 - t) / t).item()
        assert (2 * a ** 2 * kl(one, 0 * one, s)).item() == pytest.approx(limit, rel=1e-6)


def test_policy_gradient_at_the_rollout_is_not_clipped_and_far_from_it_is():
    theta = theta_s()
    g = torch.Generator().manual_seed(3)
    s = state(torch.randn(200, N, 1, 1).double(), 3, theta, g)
    cfg = SimpleNamespace(clip=1e-4)
    moved = velocity(theta.detach() + 0.05, s.x).requires_grad_(True)
    ratio = (log_prob(s.x_next, *s.gaussian(moved)) - s.logp_old).exp()
    for sign in (1, -1):
        s.adv = sign * torch.ones(200).double()
        at_rollout = OBJECTIVES["pg"](velocity(theta, s.x), s, cfg)
        assert at_rollout.mean().item() == pytest.approx(-sign)
        loss = OBJECTIVES["pg"](moved, s, cfg)
        grad = gradient(loss.sum(), moved).flatten(1).abs().sum(1)
        beyond = ratio > 1 + 1e-4 if sign == 1 else ratio < 1 - 1e-4
        assert ((grad == 0) == beyond).all() and 0 < beyond.sum() < 200


# ------------------------------------------------------------------ credit and baseline


def test_credit_sums_this_and_later_steps_and_the_baseline_is_the_groups():
    reward = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    assert torch.equal(credited(reward, 1, "step"), reward)
    future = torch.tensor([[7.0, 6, 4], [3, 0, 0], [1, 1, 1], [5, 5, 5]])
    assert torch.equal(credited(reward, 1, "future"), future)
    less_mean = torch.tensor([[2.0, 3, 2], [-2, -3, -2], [-2, -2, -2], [2, 2, 2]])
    assert torch.equal(credited(reward, 2, "future"), less_mean)


def test_each_state_gets_the_advantage_of_its_own_image_and_step():
    """Whatever the pieces are that the batch was cut into, and in whatever order."""
    B = 6
    theta = theta_s()
    cfg = SimpleNamespace(step_reward="sampled", credit="future", group=3, batch=B, updates=1)
    states = path(B, theta, torch.Generator().manual_seed(4))
    reward = torch.stack([step_reward(s, "sampled") for s in states], 1)
    expected = credited(reward, cfg.group, "future")
    pieces = []
    for slot, s in enumerate(states):
        for rows in (torch.tensor([4, 1]), torch.tensor([0, 5, 3, 2])):
            piece = bare_state(s.x[rows], slot + KS.start)
            piece.images = rows
            piece.slot = torch.full_like(rows, slot)
            for name in ("x", "x_next", "v_old", "logp_old", "v_target"):     # rollouts: float32
                setattr(piece, name, getattr(s, name)[rows].float())
            pieces.append(piece)
    train_opd.credit_steps(pieces[::-1], range(B), K, cfg)
    for piece in pieces:
        want = expected[piece.images, piece.slot].float()
        torch.testing.assert_close(piece.adv, want, rtol=1e-4, atol=1e-5)


def test_baseline_shrinks_the_gradient_by_its_own_part_and_lowers_its_variance():
    """The trajectory's own part of the group's mean is 1/G of the gradient."""
    mean, se = estimate("pg", "sampled", "future", group=10, runs=150)
    mean = mean / (1 - 1 / 10)
    se = se / (1 - 1 / 10)
    _, plain_se = estimate("pg", "sampled", "future", runs=150)
    assert agrees(N * mean, N * se, exact(True)) and se.norm() < plain_se.norm()


# ------------------------------------------------------------------ targets and supervised steps


@pytest.mark.parametrize("e", [0.5, 1.25, 2.0])
def test_extrapolated_target_is_the_normalised_product_of_powers(e):
    x = torch.randn(4, N, 1, 1).double()
    x_next = torch.randn(50, 4, N, 1, 1).double()
    v_T = target(x)
    v_base = velocity(theta_s().detach(), x)

    def logp(v):
        mean, std = step("sde", x, v, TIMES[2], TIMES[3], A, TIMES[1])
        return torch.stack([log_prob(y, mean, std) for y in x_next])

    product = e * logp(v_T) + (1 - e) * logp(v_base)
    rest = logp(v_base + e * (v_T - v_base)) - product
    # A constant of the state is left: the normaliser.
    assert rest.std(0).max() < 1e-12


def test_one_state_a_trajectory_is_drawn_towards_low_noise_and_the_same_on_all_ranks():
    cfg = SimpleNamespace(seed=0, supervised=[2, 10], one=True, window=0)
    ks = train_opd.choose(cfg, 3, range(4000))
    assert ks.shape == (4000, 1) and ks.min() >= 2 and ks.max() == 9
    # Beta(5, 2) has mean 5/7.
    assert (ks.float() - 2).mean().item() + 0.5 == pytest.approx(8 * 5 / 7, abs=0.08)
    assert torch.equal(train_opd.choose(cfg, 3, [7, 100]), ks[[7, 100]])


def test_without_one_all_steps_of_the_window_are_supervised_in_order():
    cfg = SimpleNamespace(supervised=[2, 5], one=False, window=0)
    expected = torch.tensor([[2, 3, 4], [2, 3, 4]])
    assert torch.equal(train_opd.choose(cfg, 0, [1, 2]), expected)
