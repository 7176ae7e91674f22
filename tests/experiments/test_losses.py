"""Facts about the losses that are called Flow-OPD: factors, expectations, noise; ours is ours.

Expectations are over the sample at fixed states. The gradients are those by the student's velocity:
the step from there to its weights is linear, and the same for all losses.
"""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import losses
from experiments.losses import LOSSES, NOISE_LEVEL, NOISY, STEPS, Step, by_velocity, gaussian
from sampler import Sampler, State, log_prob, schedule, sde_sigma
from train_opd import OBJECTIVES, step_reward

ROOT = Path(__file__).parents[2]
TIMES = schedule(STEPS).double()
SAMPLER = Sampler(TIMES, "sde", NOISE_LEVEL, NOISY)
SHAPE = (2, 3, 2)
N = 12                                                  # latent elements of SHAPE


def make_step(k, B=5, gap=0.5, seed=0):
    """B random transitions of step k. gap: how far the teacher is."""
    g = torch.Generator().manual_seed(seed)
    x, v_old, other, noise = torch.randn(4, B, *SHAPE, generator=g, dtype=torch.float64)
    future = torch.rand(B, generator=g, dtype=torch.float64)
    return Step(v_old + gap * other, v_old, x, TIMES[k], TIMES[k + 1], TIMES[1], noise, future)


def as_state(s, k):
    """The same transitions as train_opd.py has them."""
    rows = torch.arange(len(s.x))
    state = State(images=rows, slot=0 * rows, k=0 * rows + k, x=s.x, x_next=s.sample,
                  logp_old=None, sampler=SAMPLER, v_old=s.v_old, v_target=s.v_teacher)
    state.logp_old = log_prob(s.sample, *state.gaussian(s.v_old))
    return state


def same_state(k, B, gap=0.5):
    """B samples from ONE state."""
    s = make_step(k, B, gap)
    for name in ("x", "v_old", "v_teacher"):
        setattr(s, name, getattr(s, name)[:1].expand(B, *SHAPE))
    return s


def mean_and_error(loss, s):
    """Over the samples of same_state: the mean gradient (N,) and its standard error."""
    by_v = len(s.x) * by_velocity(loss, s).flatten(1)   # each image's own
    return by_v.mean(0), by_v.std(0) / len(s.x) ** 0.5


def agrees(mean, error, want):
    return ((mean - want).abs() < 4.5 * error + 1e-12).all()


def grad_kl(s):
    """(N,), of D at the one state of same_state."""
    return len(s.x) * by_velocity(losses.kl, s).flatten(1)[0]


# ------------------------------------------------------------------ ours is what train_opd.py has


@pytest.mark.parametrize("name, objective, reward", [
    ("kl", "kl", None), ("velocity", "velocity", None), ("flow_opd", "released", None),
    ("sampled", "pg", "sampled"), ("dance_opd", "pg", "dense")])
@pytest.mark.parametrize("k", NOISY)
def test_ours_equal_those_of_train_opd(name, objective, reward, k):
    """Value and gradient. DanceOPD's is the text's, times dt."""
    s = make_step(k)
    state = as_state(s, k)
    if reward:
        state.adv = step_reward(state, reward)
    if name == "dance_opd":
        state.adv = state.adv * (s.t - s.t_next)
    assert losses.kl_times_dt(s.v_old, s).max() < 5, "the clip of the advantages is not in ours"
    v = s.v_old.clone().requires_grad_(True)
    loss = OBJECTIVES[objective](v, state, SimpleNamespace(clip=1e-4))
    torch.testing.assert_close(LOSSES[name](v, s), loss)
    by_v = torch.autograd.grad(loss.mean(), v)[0]
    torch.testing.assert_close(by_velocity(LOSSES[name], s), by_v)


# ------------------------------------------------------------------ equal up to a factor


def weights(s):
    """The gradient of kl over that of velocity and of flow_factory_ode: one number each, a step."""
    found = []
    for other in (losses.velocity, losses.flow_factory_ode):
        ratio = by_velocity(losses.kl, s) / by_velocity(other, s)
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
        found.append(ratio.flatten()[0].item())
    return found


def test_velocity_and_the_ode_form_are_kl_with_other_weights_of_the_steps():
    """kl leans most to late steps, the ODE's form less, velocity not at all."""
    over_velocity, over_ode = zip(*(weights(make_step(k)) for k in NOISY))
    for k, w in zip(NOISY, over_velocity):
        t, dt = TIMES[k], TIMES[k] - TIMES[k + 1]
        sigma = sde_sigma(t, TIMES[1], NOISE_LEVEL)
        want = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
        assert w == pytest.approx(want.item())
        assert over_ode[k] == pytest.approx((want * 2 / dt ** 2).item())
    assert list(over_velocity) == sorted(over_velocity)
    assert over_velocity[-1] / over_velocity[0] == pytest.approx(36, rel=0.02)
    late = [of[-1] / of[0] for of in (over_velocity, over_ode)]
    assert late[0] > late[1] > 1


def test_at_the_last_step_the_future_is_zero_and_its_loss_is_kl():
    s = replace(make_step(4), future=torch.zeros(5).double())
    same = by_velocity(losses.flow_factory_future, s)
    torch.testing.assert_close(same, by_velocity(losses.kl, s))


def test_flow_opd_is_flow_factorys_with_the_mean_of_the_batch_for_each_image():
    s = make_step(2)
    D = losses.kl_times_dt(s.v_old, s)
    torch.testing.assert_close(losses.flow_factory(s.v_old, s), D)
    torch.testing.assert_close(losses.flow_opd(s.v_old, s), D.mean().expand(5))
    alone = make_step(2, B=1)
    torch.testing.assert_close(by_velocity(losses.flow_opd, alone),
                               by_velocity(losses.flow_factory, alone))


# ------------------------------------------------------------------ expectations over the sample


@pytest.mark.parametrize("k", [0, 4])
def test_the_detached_form_has_no_gradient_on_average(k):
    s = same_state(k, 20_000)
    mean, error = mean_and_error(losses.dance_opd, s)
    assert agrees(mean, error, 0) and (error > 0).all()
    assert grad_kl(s).norm() * (s.t - s.t_next) > 5 * mean.norm()


@pytest.mark.parametrize("name", ["flow_opd", "flow_factory"])
@pytest.mark.parametrize("k", [0, 4])
def test_the_authors_form_is_dt_times_kl_on_average(name, k):
    s = same_state(k, 20_000)
    parts = [replace(s, x=s.x[:100], v_old=s.v_old[:100], v_teacher=s.v_teacher[:100], noise=noise)
             for noise in s.noise.split(100)]           # flow_opd makes (B, B) of them
    found = torch.stack([by_velocity(LOSSES[name], part).flatten(1).sum(0) for part in parts])
    mean, error = found.mean(0), found.std(0) / len(parts) ** 0.5
    want = (s.t - s.t_next) * grad_kl(s)
    assert agrees(mean, error, want) and not agrees(mean, error, grad_kl(s))


@pytest.mark.parametrize("k", [0, 4])
def test_both_sampled_forms_have_the_direction_of_kl_on_average(k):
    """N times smaller; and the standardised one divides by the std of its reward."""
    s = same_state(k, 50_000)
    mean, error = mean_and_error(losses.sampled, s)
    assert agrees(N * mean, N * error, grad_kl(s))
    std = losses.log_prob(s.v_teacher, s).std() + 1e-4
    mean, error = mean_and_error(losses.diffusion_opsd, s)
    assert agrees(N * std * mean, N * std * error, grad_kl(s))
    assert not agrees(N * mean, N * error, torch.zeros(N))


def noise_to_signal(loss, gap):
    s = same_state(4, 20_000, gap)
    mean, error = mean_and_error(loss, s)
    return (error.norm() * len(s.x) ** 0.5 / by_velocity(losses.kl, s).norm()).item()


def test_only_with_log_p_of_the_student_does_the_noise_vanish_near_the_teacher():
    """sampled: noise and gradient both fall with the distance. Without log p_S noise stays."""
    far, near = (noise_to_signal(losses.sampled, gap) for gap in (0.1, 0.01))
    assert near == pytest.approx(far, rel=0.1)
    far, near = (noise_to_signal(losses.diffusion_opsd, gap) for gap in (0.1, 0.01))
    assert near == pytest.approx(10 * far, rel=0.1)


def test_the_future_term_has_one_nth_of_its_due():
    """Its due: the gradient of the expected future KL, by how v moves the sample."""
    s = same_state(2, 50_000)
    place = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).double()
    s.future = losses.mean_square(s.sample - place)
    both, error = mean_and_error(losses.flow_factory_future, s)
    term = both - grad_kl(s)
    v = s.v_old[:1].clone().requires_grad_(True)
    expected = losses.mean_square(gaussian(v, s)[0][:1] - place)    # and std^2, without a gradient
    due = torch.autograd.grad(expected.sum(), v)[0].flatten()
    assert agrees(N * term, N * error, due) and not agrees(term, error, due)


# ------------------------------------------------------------------ what is measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Bench, its Steps and text, and what main wrote, on few images."""
    out = tmp_path_factory.mktemp("losses") / "losses.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(losses, "DRAWS", (2,))
        patch.setattr(losses, "BATCH", 8)
        losses.main(losses.Config(seeds=[3, 4], out=str(out)))
        bench = losses.Bench()
        steps, text = bench.steps(3)
    return bench, steps, text, json.loads(out.read_text())["losses"]


def test_the_states_are_the_students_own_and_the_future_adds_up(measured):
    bench, steps, text, _ = measured
    for s, following in zip(steps, steps[1:]):
        torch.testing.assert_close(s.sample, following.x)
        later = losses.kl(following.v_old, following) + following.future
        torch.testing.assert_close(s.future, later)
        v = bench.student(s.x, s.t.expand(8), text)
        torch.testing.assert_close(v, s.v_old, rtol=1e-4, atol=1e-5)
    assert steps[-1].future.eq(0).all()


def test_what_is_written_is_the_cosine_with_the_gradient_of_the_objective(measured):
    """Of train_opd.py's kl, by its own backward pass, summed over the supervised steps."""
    bench, steps, text, rows = measured
    gradients = {}
    for name in ("kl", "velocity"):
        for p in bench.params:
            p.grad = None
        for k, s in enumerate(steps):
            v = bench.student(s.x, s.t.expand(8), text)
            state = replace(as_state(s, k), sampler=Sampler(TIMES.float(), "sde", 0.7, NOISY))
            OBJECTIVES[name](v, state, None).mean().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in bench.params])
    cosine = losses.cosine(gradients["velocity"], gradients["kl"])
    assert rows["velocity"]["cosine"][0] == pytest.approx(cosine, abs=1e-4)
    norm = (gradients["velocity"].norm() / gradients["kl"].norm()).item()
    assert rows["velocity"]["norm"][0] == pytest.approx(norm, rel=1e-3)
    for row in rows.values():
        assert len(row["cosine"]) == 2
        for shares in row["shares"]:
            assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_one_seed_has_no_spread():
    with pytest.raises(ValueError, match="--seeds .*at least two"):
        losses.main(losses.Config(seeds=[0]))


def test_the_page_has_the_tables_of_the_results():
    rows = json.loads((ROOT / "results/losses.json").read_text())["losses"]
    page = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    for table in losses.tables(rows):
        assert table in page
