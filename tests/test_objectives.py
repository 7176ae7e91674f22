"""Facts about train_opd.py's objectives, on a policy where every expectation is known: velocities that are affine in x, so that all states are Gaussian.

v = x M^T + b, in N = 2 latent elements. Log-probabilities and KLs are averaged over elements, so a product of two of them, as a policy gradient is, is
1/N of what the sum over one of them would be: hence the factor N below.
"""
import math
from types import SimpleNamespace

import pytest
import torch

import adapters
import train_opd
from sampler import log_prob, schedule, sde_sigma, step
from train_opd import OBJECTIVES, State, credited, gaussian, kl, step_reward

N, K, A = 2, 4, 0.7
TIMES = schedule(6).double()
KS = range(1, 1 + K)                    # steps 1 to 4: at step 0 std is large and the numbers dull
M_S, B_S = torch.tensor([[0.3, -0.5], [0.2, 0.7]]).double(), torch.tensor([0.1, -0.2]).double()
M_T, B_T = torch.tensor([[0.6, -0.1], [-0.3, 0.5]]).double(), torch.tensor([-0.2, 0.3]).double()
PG = dict(objective="pg", clip=0.2)


def velocity(theta, x):
    M, b = theta[:4].view(2, 2), theta[4:]
    return (x[:, :, 0, 0] @ M.T + b)[:, :, None, None]


def theta_s():
    return torch.cat([M_S.flatten(), B_S]).requires_grad_(True)


def target(x):
    return velocity(torch.cat([M_T.flatten(), B_T]), x)


def state(x, k, theta, g):
    """One sampled step of the student from x."""
    with torch.no_grad():
        s = State(x, x, TIMES[k].expand(len(x)), TIMES[k + 1].expand(len(x)), TIMES[1], "sde", A, None, torch.zeros(len(x)).double())
        mean, std = gaussian(velocity(theta, x), s)
        x_next = mean + std * torch.randn(x.shape, generator=g, dtype=torch.float64)
        return s._replace(x_next=x_next, logp=log_prob(x_next, mean, std))


def path(B, theta, g):
    """B trajectories of the student from N(0, 1): the K states."""
    x, states = torch.randn(B, N, 1, 1, generator=g, dtype=torch.float64), []
    for k in KS:
        states.append(state(x, k, theta, g))
        x = states[-1].x_next
    return states


def exact_path_kl(theta, through_states):
    """sum over steps of E[D], from the states' Gaussian moments; through_states: also by how theta moves the states."""
    M, b = theta[:4].view(2, 2), theta[4:]
    mu, cov, total = torch.zeros(N).double(), torch.eye(N).double(), 0
    for k in KS:
        t, dt = TIMES[k], TIMES[k] - TIMES[k + 1]
        sigma = sde_sigma(t, TIMES[1], A)
        w = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
        dM, db = M - M_T, b - B_T
        total = total + w * ((dM @ mu + db).square().sum() + torch.trace(dM @ cov @ dM.T)) / N
        step_x, step_v = 1 - sigma ** 2 * dt / (2 * t), (1 + sigma ** 2 * (1 - t) / (2 * t)) * dt
        J = step_x * torch.eye(N) - step_v * (M if through_states else M.detach())
        mu, cov = J @ mu - step_v * (b if through_states else b.detach()), J @ cov @ J.T + sigma ** 2 * dt * torch.eye(N)
    return total


def exact(through_states):
    theta = theta_s()
    return torch.autograd.grad(exact_path_kl(theta, through_states), theta)[0]


def estimate(objective, reward="dense", credit="step", group=1, runs=60, B=700, seed=0):
    """Mean gradient over runs of B trajectories, and its standard error: (6,) each; summed over steps, averaged over trajectories."""
    cfg, grads, g = SimpleNamespace(objective=objective, reward=reward, credit=credit, clip=0.2), [], torch.Generator().manual_seed(seed)
    for _ in range(runs):
        theta = theta_s()
        states = path(B, theta, g)
        with torch.no_grad():
            rewards = torch.stack([step_reward(velocity(theta, s.x), target(s.x), s, cfg) for s in states], 1)
        adv = credited(rewards, group, credit)
        loss = sum(OBJECTIVES[objective](velocity(theta, s.x), target(s.x), s._replace(adv=adv[:, j]), cfg).mean() for j, s in enumerate(states))
        grads.append(torch.autograd.grad(loss, theta)[0])
    grads = torch.stack(grads)
    return grads.mean(0), grads.std(0) / math.sqrt(runs)


def agrees(mean, se, want):
    return ((mean - want).abs() < 4.5 * se + 1e-9).all()


def test_kl_is_the_gradient_at_the_visited_states():
    mean, se = estimate("kl")
    assert agrees(mean, se, exact(False)) and not agrees(mean, se, exact(True))


def test_kl_has_no_variance_at_a_state_and_the_sampled_form_has():
    x, theta, g = torch.randn(500, N, 1, 1).double(), theta_s(), torch.Generator().manual_seed(1)
    cfg = SimpleNamespace(reward="sampled", clip=0.2)
    closed, sampled = [], []
    for _ in range(50):
        s = state(x, 3, theta, g)
        closed.append(torch.autograd.grad(kl(velocity(theta, x), target(x), s).mean(), theta)[0])
        adv = step_reward(velocity(theta, x), target(x), s, cfg).detach()
        sampled.append(torch.autograd.grad(OBJECTIVES["pg"](velocity(theta, x), target(x), s._replace(adv=adv), cfg).mean(), theta)[0])
    closed, sampled = torch.stack(closed), torch.stack(sampled)
    assert closed.std(0).max() < 1e-12
    assert agrees(N * sampled.mean(0), N * sampled.std(0) / 50 ** 0.5, closed[0]) and (N * sampled.std(0) > 0.1 * closed[0].abs()).all()


def test_detached_dense_reward_has_no_gradient_on_average():
    """The paper's text: nothing but noise, which falls with the number of draws."""
    mean, se = estimate("pg", "dense", "step")
    assert agrees(mean, se, torch.zeros(6)) and (se > 0).all()
    few, many = (estimate("pg", "dense", "step", runs=40, B=B)[1].norm() for B in (100, 1600))
    assert 2 < few / many < 8                                                      # a quarter for sixteen times as many
    assert exact(False).norm() > 20 * mean.norm()


def test_sampled_log_ratio_is_unbiased_for_kl():
    mean, se = estimate("pg", "sampled", "step")
    assert agrees(N * mean, N * se, exact(False))


def test_future_credit_is_what_the_direct_gradient_lacks():
    direct, whole = exact(False), exact(True)
    assert (whole - direct).norm() > 0.05 * direct.norm()
    mean, se = estimate("pg", "dense", "future", runs=150)
    assert agrees(N * mean, N * se, whole - direct) and not agrees(N * mean, N * se, torch.zeros(6))


def test_sampled_future_credit_is_the_gradient_of_whole_trajectories():
    mean, se = estimate("pg", "sampled", "future", runs=150)
    assert agrees(N * mean, N * se, exact(True)) and not agrees(N * mean, N * se, exact(False))


def test_released_form_is_the_closed_form_times_dt_plus_noise():
    theta = theta_s()
    mean, se = estimate("released")
    want = torch.zeros(6).double()
    g = torch.Generator().manual_seed(5)
    for s in path(150_000, theta, g):
        want += torch.autograd.grad((kl(velocity(theta, s.x), target(s.x), s) * (s.t - s.t_next)).mean(), theta)[0]
    assert agrees(mean, se + 4e-3 * want.abs(), want)
    s = path(300, theta, g)[2]
    cfg = SimpleNamespace(clip=0.2)
    one = OBJECTIVES["released"](velocity(theta, s.x), target(s.x), s, cfg)
    D = kl(velocity(theta, s.x), target(s.x), s) * (s.t - s.t_next)
    torch.testing.assert_close(one, D.mean().expand(300))                          # its broadcast: each image gets the micro-batch's mean


def test_velocity_loss_is_kl_without_its_weight():
    theta, g = theta_s(), torch.Generator().manual_seed(2)
    for k in KS:
        s = state(torch.randn(5, N, 1, 1).double(), k, theta, g)
        t, dt = TIMES[k], TIMES[k] - TIMES[k + 1]
        sigma = sde_sigma(t, TIMES[1], A)
        w = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
        v, v_target = velocity(theta, s.x), target(s.x)
        torch.testing.assert_close(kl(v, v_target, s), w * OBJECTIVES["velocity"](v, v_target, s, None))


def test_weight_of_the_kl_has_the_ode_limit():
    for k in KS:
        s = State(torch.zeros(1, N, 1, 1).double(), None, TIMES[k:k + 1], TIMES[k + 1:k + 2], TIMES[1], "sde", 1e-4, None, None)
        one = torch.ones(1, N, 1, 1).double()
        t, dt = TIMES[k], TIMES[k] - TIMES[k + 1]
        assert (2 * 1e-4 ** 2 * kl(one, 0 * one, s)).item() == pytest.approx((dt * (1 - t) / t).item(), rel=1e-6)


def test_policy_gradient_at_the_rollout_is_not_clipped_and_far_from_it_is():
    theta, g = theta_s(), torch.Generator().manual_seed(3)
    s = state(torch.randn(200, N, 1, 1).double(), 3, theta, g)
    cfg = SimpleNamespace(clip=1e-4)
    moved = velocity(theta.detach() + 0.05, s.x)
    for sign in (1, -1):
        adv = sign * torch.ones(200).double()
        assert OBJECTIVES["pg"](velocity(theta, s.x), None, s._replace(adv=adv), cfg).mean().item() == pytest.approx(-sign)
        loss = OBJECTIVES["pg"](moved.requires_grad_(True), None, s._replace(adv=adv), cfg)
        grad = torch.autograd.grad(loss.sum(), moved)[0].flatten(1).abs().sum(1)
        ratio = (log_prob(s.x_next, *gaussian(moved, s)) - s.logp).exp()
        beyond = ratio > 1 + 1e-4 if sign == 1 else ratio < 1 - 1e-4
        assert ((grad == 0) == beyond).all() and 0 < beyond.sum() < 200


def test_credit_sums_this_and_later_steps_and_the_baseline_is_the_groups():
    reward = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    assert torch.equal(credited(reward, 1, "step"), reward)
    assert torch.equal(credited(reward, 1, "future"), torch.tensor([[7.0, 6, 4], [3, 0, 0], [1, 1, 1], [5, 5, 5]]))
    got = credited(reward, 2, "future")
    assert torch.equal(got, torch.tensor([[2.0, 3, 2], [-2, -3, -2], [-2, -2, -2], [2, 2, 2]]))


def test_baseline_shrinks_the_gradient_by_the_trajectorys_own_part_and_lowers_its_variance():
    mean, se = estimate("pg", "sampled", "future", group=10, runs=150)
    plain = estimate("pg", "sampled", "future", runs=150)[1]
    assert agrees(N * mean / (1 - 1 / 10), N * se / (1 - 1 / 10), exact(True)) and (se / (1 - 1 / 10)).norm() < plain.norm()


@pytest.mark.parametrize("e", [0.5, 1.25, 2.0])
def test_extrapolated_target_is_the_normalised_product_of_powers(e):
    x, x_next = torch.randn(4, N, 1, 1).double(), torch.randn(50, 4, N, 1, 1).double()
    v_T, v_base = target(x), velocity(theta_s().detach(), x)

    def logp(v):
        mean, std = step("sde", x, v, TIMES[2], TIMES[3], A, TIMES[1])
        return torch.stack([log_prob(y, mean, std) for y in x_next])
    rest = logp(v_base + e * (v_T - v_base)) - (e * logp(v_T) + (1 - e) * logp(v_base))
    assert rest.std(0).max() < 1e-12                                               # a constant of the state: the normaliser


def test_one_state_a_trajectory_is_drawn_towards_low_noise_and_the_same_on_all_ranks():
    cfg = SimpleNamespace(seed=0, supervised=[2, 10], one=True)
    ks = train_opd.choose(cfg, 3, range(4000))
    assert ks.shape == (4000, 1) and ks.min() >= 2 and ks.max() == 9
    assert (ks.float() - 2).mean().item() + 0.5 == pytest.approx(8 * 5 / 7, abs=0.08)      # Beta(5, 2) has mean 5/7
    assert torch.equal(train_opd.choose(cfg, 3, [7, 100]), ks[[7, 100]])
    assert torch.equal(train_opd.choose(SimpleNamespace(supervised=[2, 5], one=False), 0, [1, 2]), torch.tensor([[2, 3, 4], [2, 3, 4]]))


# ------------------------------------------------------------------ cold starts


def random_adapters(ranks=(2, 3, 4), alpha=6.0, D=12):
    g = torch.Generator().manual_seed(0)
    return [{"tensors": {"l.A": torch.randn(3, r, D, generator=g), "l.B": torch.randn(3, D, r, generator=g)}, "r": r, "alpha": alpha} for r in ranks]


def update(adapter):
    return adapter["alpha"] / adapter["r"] * adapter["tensors"]["l.B"] @ adapter["tensors"]["l.A"]


def test_truncated_merge_is_the_best_of_its_rank_and_exact_at_full_rank():
    exact_merge = adapters.merge_adapters(random_adapters())
    want = sum(update(a) for a in random_adapters()) / 3
    for r in (1, 4, 9):
        got = adapters.truncate_adapter(exact_merge, r, 2.0 * r)
        U, s, Vh = torch.linalg.svd(want)
        best = U[:, :, :r] * s[:, None, :r] @ Vh[:, :r]
        assert got["r"] == r and got["alpha"] == 2.0 * r and got["tensors"]["l.A"].shape == (3, r, 12)
        torch.testing.assert_close(update(got), best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update(adapters.truncate_adapter(exact_merge, 9, 9.0)), want, rtol=1e-4, atol=1e-4)


def test_mean_of_factors_is_not_the_mean_of_updates_but_is_for_equal_teachers():
    parts = random_adapters((3, 3))
    off = update(adapters.merge_factors(parts)) - update(adapters.merge_adapters(parts))
    assert off.norm() > 0.3 * update(adapters.merge_adapters(parts)).norm()
    torch.testing.assert_close(update(adapters.merge_factors([parts[0]] * 2)), update(parts[0]))
    with pytest.raises(ValueError, match="--init factors: averages factors of one rank"):
        adapters.merge_factors(random_adapters((2, 3)))
