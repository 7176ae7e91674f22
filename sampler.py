"""
Sampling a flow-matching model, and the density of what was sampled.

Everything that GRPO and OPD need of a sampler is here, and they speak in four words:

    policy = Policy(net, "ocr", guidance=4.5)         # a velocity field: v = policy(x, t, text)
    sampler = Sampler(schedule(10), "sde", 0.7, range(9))
    trajectory = sampler.rollout(policy, noise, text)
    states = visited(trajectory, steps, images, sampler)      # a list of States

| symbol | meaning |
|---|---|
| B, G, K, L, D | images in a batch; images of one prompt; steps; text tokens; width |
| t, t_next, dt | flow time: 1 = noise, 0 = image; a step goes t -> t_next < t; dt = t - t_next |
| x, x_next | latents before and after a step |
| v | velocity dx/dt = eps - x_0, the output of the network; v_S: student, v_T: teacher |
| mean, std | of the Gaussian of a step; std = sigma_t sqrt(dt) |
| sigma_t | the noise rate of the SDE, and nothing else |
| logp, ratio, adv, kl | as in PPO; logp and kl are nats per latent element (averaged over C*H*W) |
| w(t) | the weight of a step's KL: kl = w(t) |v_p - v_q|^2, where |.|^2 is a mean over elements |
| b, S | images of one State, or of this rank; steps that are trained or supervised |
| context, pooled | the prompt, as token vectors and as one vector |

Papers: Flow-GRPO arXiv 2505.05470 (the SDE); CPS arXiv 2509.05952; SD3 arXiv 2403.03206 (schedule);
Flow-OPD arXiv 2605.08063.
"""
import hashlib
import math
from dataclasses import dataclass, fields
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from plumbing import dist


def schedule(n, shift=3.0):
    """n + 1 flow times from 1 to 0, float32.

    They are those of diffusers' FlowMatchEulerDiscreteScheduler(shift=3.0).set_timesteps(n). The
    shift acts twice at the tail (u_min is itself a shifted time), there and so here.
    """
    u_min = shift * 0.001 / (1 + (shift - 1) * 0.001)
    u = torch.linspace(1, u_min, n, dtype=torch.float64)
    t = shift * u / (1 + (shift - 1) * u)
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)]).float()


# ------------------------------------------------------------------ the velocity, with guidance


class Text(NamedTuple):
    """The prompts of a batch as vectors, and the empty prompt (null) for guidance."""
    context: Tensor          # (B, L, .)
    pooled: Tensor           # (B, .)
    null_context: Tensor     # (B, L, .)
    null_pooled: Tensor      # (B, .)

    def rows(self, i):
        return Text(*(part[i] for part in self))


@torch.no_grad()
def encode(text_encoder, prompts):
    """Prompts (B strings) -> Text. Each distinct prompt is encoded once."""
    distinct = list(dict.fromkeys(prompts)) + [""]
    context, pooled = text_encoder(distinct)
    at = [distinct.index(prompt) for prompt in prompts]
    null_context = context[-1:].expand(len(prompts), *context.shape[1:])
    null_pooled = pooled[-1:].expand(len(prompts), *pooled.shape[1:])
    return Text(context[at], pooled[at], null_context, null_pooled)


def branches(net, x, t, text, adapter=None):
    """The velocity without the prompt and with it, from one forward pass: (B, C, H, W) each."""
    context = torch.cat([text.null_context, text.context])
    pooled = torch.cat([text.null_pooled, text.pooled])
    return net(x.repeat(2, 1, 1, 1), t.repeat(2), context, pooled, adapter).chunk(2)


def velocity(net, x, t, text, guidance=1.0, adapter=None):
    """v_null + guidance (v_text - v_null): (B, C, H, W). Guidance 1 needs half of the work."""
    if guidance == 1:
        return net(x, t, text.context, text.pooled, adapter)
    v_null, v_text = branches(net, x, t, text, adapter)
    return v_null + guidance * (v_text - v_null)


@dataclass
class Policy:
    """A velocity field: a network, the adapter it runs through, and its guidance."""
    net: torch.nn.Module
    adapter: str | None = None               # None: the network without an adapter
    guidance: float = 1.0
    both: bool = False                       # give both branches instead of the guided velocity

    def __call__(self, x, t, text):
        """x (B, C, H, W), t (B,) -> v (B, C, H, W) float32, or (B, 2 C, H, W) for both."""
        if self.both:
            return torch.cat(branches(self.net, x, t, text, self.adapter), 1).float()
        return velocity(self.net, x, t, text, self.guidance, self.adapter).float()


# ------------------------------------------------------------------ one step: (mean, std) of x_next


def expand(t, x):
    """A time (B,) or a number, shaped to multiply x (B, C, H, W), in its device and dtype."""
    return torch.as_tensor(t, device=x.device, dtype=x.dtype).reshape(-1, 1, 1, 1)


def ode_step(x, v, t, t_next):
    """Euler: x_next = x - dt v, without noise."""
    t = expand(t, x)
    t_next = expand(t_next, x)
    return x - (t - t_next) * v, torch.zeros_like(t)


def sde_sigma(t, t_second, a):
    """sigma_t = a sqrt(t / (1 - t)) (Flow-GRPO eq. 9).

    At t = 1 the 1 - t takes t_second, the second time of the schedule, instead of t.
    """
    return a * (t / (1 - torch.where(t >= 1, t_second, t))).sqrt()


def sde_step(x, v, t, t_next, a, t_second):
    """The SDE that has the marginals of the ODE. t, t_next: (B,) or numbers."""
    t = expand(t, x)
    t_next = expand(t_next, x)
    dt = t - t_next
    sigma = sde_sigma(t, expand(t_second, x), a)
    # x_next = x - [v + sigma^2 / (2 t) (x + (1 - t) v)] dt + sigma sqrt(dt) z
    drift_x = 1 - sigma ** 2 * dt / (2 * t)
    drift_v = 1 + sigma ** 2 * (1 - t) / (2 * t)
    mean = x * drift_x - v * drift_v * dt
    return mean, sigma * dt.sqrt()


def cps_step(x, v, t, t_next, a):
    """Coefficients-preserving sampling: x_next has exactly the noise level t_next, whatever a is.

    So no noise is left at t_next = 0.
    """
    t = expand(t, x)
    t_next = expand(t_next, x)
    std = t_next * math.sin(a * math.pi / 2)
    x0_hat = x - t * v
    eps_hat = x + (1 - t) * v
    mean = (1 - t_next) * x0_hat + (t_next ** 2 - std ** 2).sqrt() * eps_hat
    return mean, std


def step(kind, x, v, t, t_next, a, t_second):
    """kind "sde", "cps" or "ode" -> mean (B, C, H, W) and std (B or 1, 1, 1, 1) of x_next."""
    if kind == "sde":
        return sde_step(x, v, t, t_next, a, t_second)
    if kind == "cps":
        return cps_step(x, v, t, t_next, a)
    assert kind == "ode", f"unknown step {kind!r}"
    return ode_step(x, v, t, t_next)


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over elements: (B,), nats per latent element.

    DEVIATION: a density is the SUM over elements; the released Flow-GRPO averages. Its ratio
    exp(logp - logp_old) is then the C*H*W-th root of the true one and stays close to 1. That is why
    its PPO clip range is 1e-4 and not 0.2.
    """
    logp = -((x_next - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return logp.flatten(1).mean(1)


def gaussian_kl(mean_p, mean_q, std):
    """KL(N(mean_p, std^2) || N(mean_q, std^2)), averaged over elements: (B,), nats per element.

    It is the mean of (mean_p - mean_q)^2 / (2 std^2). The mean of a step is affine in v. So for the
    SDE this is w(t) mean (v_p - v_q)^2, with
    w(t) = dt / 2 (sigma_t (1 - t) / (2 t) + 1 / sigma_t)^2.
    DEVIATION: averaged over elements as log_prob is; and std^2 = sigma_t^2 dt, the variance of the
    step, where the released code has sigma_t^2.
    """
    return ((mean_p - mean_q) ** 2 / (2 * std ** 2)).flatten(1).mean(1)


# ------------------------------------------------------------------ whole trajectories


def generator(*key):
    """A CPU random generator from any key: the same on every machine, rank and resume."""
    plain = [k.item() if hasattr(k, "item") else k for k in key]      # 3 and numpy's 3 are one key
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_noise(keys, K, shape):
    """Noise (B, K + 1, *shape) of B trajectories: [:, 0] to start from, [:, 1 + k] for step k.

    Each trajectory has its own key, and so its own numbers, however the batch is cut.
    """
    noise = [torch.randn(K + 1, *shape, generator=generator(*key)) for key in keys]
    return torch.stack(noise)


class Trajectory(NamedTuple):
    """B trajectories. States are kept in float32, whatever the network computes in."""
    x: Tensor                # (B, K + 1, C, H, W); x[:, k] is before step k, x[:, K] the sample;
                             # nan where the rollout did not go
    logp: Tensor             # (B, K), nats per element; 0 where a step had no noise,
                             # nan where the rollout did not go
    v: Tensor | None         # (B, K, C, H, W), the velocity that step k took, if asked for


@dataclass
class Sampler:
    """A schedule, and how its steps take noise."""
    times: Tensor            # (K + 1,), from 1 to 0
    kind: str                # "sde" or "cps": the noise, and the density of a step
    a: float                 # noise level
    noisy: range             # the steps that take noise; the others follow the ODE

    def gaussian(self, x, v, k):
        """mean and std of x_next after step k from x (B, C, H, W) under velocity v.

        k: one step for all, or (B,). v may hold both branches side by side; then mean does too.
        """
        x = torch.cat([x] * (v.shape[1] // x.shape[1]), 1)
        t = self.times[k]
        t_next = self.times[k + 1]
        return step(self.kind, x, v, t, t_next, self.a, self.times[1])

    @torch.no_grad()
    def rollout(self, policy, noise, text, keep_v=False, until=None):
        """Sample B trajectories of the policy. noise (B, K + 1, C, H, W), as draw_noise gives.

        until: take only so many steps, if no later state is needed.
        """
        x = noise[:, 0].float()
        xs = [x]
        logps = []
        vs = []
        steps = range(len(self.times) - 1)
        for k in steps[:until]:
            t = self.times[k].expand(len(x))
            # Guided, also for a policy that gives both branches.
            v = velocity(policy.net, x, t, text, policy.guidance, policy.adapter).float()
            if k in self.noisy:
                mean, std = self.gaussian(x, v, k)
                x = mean + std * noise[:, k + 1]
                # The last step of CPS has no noise and so no density.
                logp = log_prob(x, mean, std) if std.min() > 0 else x.new_zeros(len(x))
            else:
                x, _ = ode_step(x, v, self.times[k], self.times[k + 1])
                logp = x.new_zeros(len(x))
            xs.append(x)
            logps.append(logp)
            if keep_v:
                vs.append(v)
        for _ in steps[len(logps):]:
            xs.append(torch.full_like(x, math.nan))
            logps.append(x.new_full((len(x),), math.nan))
        v = torch.stack(vs, 1) if keep_v else None
        return Trajectory(torch.stack(xs, 1), torch.stack(logps, 1), v)


@torch.no_grad()
def sample(policy, noise, text, times):
    """The ODE from noise (B, C, H, W) to latents (B, C, H, W): how models are evaluated."""
    x = noise.float()
    for t, t_next in zip(times, times[1:]):
        v = velocity(policy.net, x, t.expand(len(x)), text, policy.guidance, policy.adapter)
        x, _ = ode_step(x, v.float(), t, t_next)
    return x


def draw(model, policy, prompts, keys, times, amp="bfloat16"):
    """Latents (b, C, H, W) of b prompts by the ODE, from the noise of b keys (see draw_noise).

    model: the world's Model; times: of schedule; amp: as in dist.autocast.
    """
    text = encode(model.text, prompts)
    noise = draw_noise(keys, 0, model.latent_shape())[:, 0].to(times.device)
    with dist.autocast(times.device, amp):
        return sample(policy, noise, text, times)


# ------------------------------------------------------------------ states: what a loss is made of


@dataclass
class State:
    """b images, each at one step of its trajectory, with everything that a loss needs."""
    images: Tensor           # (b,), which images of this rank's batch
    slot: Tensor             # (b,), which of the steps that are trained or supervised
    k: Tensor                # (b,), which step of the schedule
    x: Tensor                # (b, C, H, W), before the step
    x_next: Tensor           # (b, C, H, W), after it
    logp_old: Tensor         # (b,), log p(x_next | x) in the rollout
    sampler: Sampler
    v_old: Tensor = None     # (b, C, H, W), the velocity that the rollout took, if it was kept
    v_target: Tensor = None  # (b, C, H, W), the teacher's velocity at x
    v_anchor: Tensor = None  # (b, C, H, W), the anchor's
    adv: Tensor = None       # (b,), advantage of the step; 0 where none was computed
    # For the log, (b,) each, of its update; nan where it was not computed:
    ratio: Tensor = None     # p_new / p_old, only of the images that the loss counts
    kl: Tensor = None        # to the base (stage 1), or to the target (stage 2)
    kl_anchor: Tensor = None

    @property
    def t(self):
        return self.sampler.times[self.k]

    @property
    def dt(self):
        return self.sampler.times[self.k] - self.sampler.times[self.k + 1]

    def gaussian(self, v):
        """mean and std of x_next under another velocity v."""
        return self.sampler.gaussian(self.x, v, self.k)


def visited(trajectory, steps, images, sampler):
    """The states of b trajectories at steps (b, S): one State for each of the S columns.

    images (b,): the trajectories' places in this rank's batch.
    """
    states = []
    rows = torch.arange(len(steps), device=steps.device)
    for slot, k in enumerate(steps.unbind(1)):
        states.append(State(
            images=images,
            slot=torch.full_like(k, slot),
            k=k,
            x=trajectory.x[rows, k],
            x_next=trajectory.x[rows, k + 1],
            v_old=trajectory.v[rows, k] if trajectory.v is not None else None,
            logp_old=trajectory.logp[rows, k],
            sampler=sampler,
            kl=torch.full((len(k),), math.nan, device=k.device),
            kl_anchor=torch.full((len(k),), math.nan, device=k.device)))
    return states


def regroup(states, images, micro, kept=None, by_step=False):
    """Those States that are of these images, joined and cut anew: at most micro states a piece.

    A piece is one forward pass, in which steps may mix; by_step: they may not. images (b,): places
    in this rank's batch. kept, for all of these places: states of an image that is not are left
    out, but for one if no other is there: each rank needs a forward pass, for the all-reduce.
    """
    joined = {}
    for f in fields(State):
        values = [getattr(s, f.name) for s in states]
        joined[f.name] = torch.cat(values) if torch.is_tensor(values[0]) else values[0]
    rows = torch.isin(joined["images"], images).nonzero()[:, 0]
    if kept is not None:
        counted = rows[kept[joined["images"][rows]]]
        rows = counted if len(counted) else rows[:1]
    groups = [rows]
    if by_step:
        groups = [rows[joined["slot"][rows] == slot] for slot in joined["slot"][rows].unique()]
    pieces = []
    for piece in chain(*(group.split(micro) for group in groups)):
        picked = {name: value[piece] if torch.is_tensor(value) else value
                  for name, value in joined.items()}
        pieces.append(State(**picked))
    return pieces


def table(minibatches, name, n_images, n_steps, kept=None):
    """What the states say of themselves as name ("kl", ...): (images, steps), nan where nothing.

    kept (n_images,): images that are not count for nothing, also the one that regroup adds.
    """
    filled = torch.full((n_images, n_steps), math.nan, device=minibatches[0][0].x.device)
    for s in chain(*minibatches):
        filled[s.images, s.slot] = getattr(s, name)
    if kept is not None:
        filled[~kept] = math.nan
    return filled


def kl(v, v_target, s):
    """KL(N under v || N under v_target) of the step at state s: (b,), nats per latent element.

    Both Gaussians have one std, so this is w(t) |v - v_target|^2 (see gaussian_kl).
    """
    mean, std = s.gaussian(v)
    mean_target, _ = s.gaussian(v_target)
    return gaussian_kl(mean, mean_target, std)


def likelihood_ratio(v, s):
    """p(x_next | x) now over p in the rollout: (b,). It is 1 before the first update."""
    mean, std = s.gaussian(v)
    return (log_prob(s.x_next, mean, std) - s.logp_old).exp()


def clipped(ratio, adv, clip):
    """The loss of PPO, -min(ratio A, clip(ratio, 1 - e, 1 + e) A).

    adv is (b,) as ratio is; or (b, 1), which gives (b, b) (see train_opd.released).
    """
    return -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)


def mean_of(x):
    """The mean of the numbers in x that are not nan, or 0 if all are."""
    return x.nanmean().nan_to_num().item()


def ratio_summary(minibatches, clip):
    """What the log says of the ratios of an iteration, over all ranks.

    ratio_err: the largest distance from 1 in the first update, where the ratio must be 1.
    clip_frac: the share of ratios outside the clip range, in later updates if there are any. States
    that were left out of an update have no ratio.
    """
    def distances(states):
        ratios = [s.ratio for s in states if s.ratio is not None]
        return (torch.cat(ratios) - 1).abs() if ratios else torch.zeros(0)

    device = minibatches[0][0].x.device
    first = torch.cat([torch.zeros(1), distances(minibatches[0]).cpu()]).max()
    later = distances([s for states in minibatches[1:] or minibatches for s in states])
    counts = torch.tensor([(later > clip).sum(), len(later)], dtype=torch.float32, device=device)
    outside, n = dist.sync_sum(counts).tolist()
    return {"ratio_err": dist.gather(first.reshape(1).to(device)).max().item(),
            "clip_frac": outside / max(n, 1)}


def noisy_steps(cfg, it):
    """The steps that take noise in iteration it: those of --noisy, or --window of them in a row.

    DEVIATION: Flow-GRPO-Fast draws a window for every batch of every GPU. Here all images of an
    iteration share one.
    """
    if cfg.rollout == "ode":
        return range(0)
    first, end = cfg.noisy
    if cfg.window:
        latest = end - cfg.window
        drawn = torch.randint(first, latest + 1, (), generator=generator(cfg.seed, "window", it))
        first = drawn.item()
        end = first + cfg.window
    return range(first, end)


def check_window(cfg):
    """ValueError if --window does not fit, or the last noisy step of CPS outweighs all others.

    Its std is proportional to t_next, so its KL weight grows as 1 / t_next^2. In SD3's schedule the
    last time above 0 is 0.0089.
    """
    if cfg.window and (cfg.rollout == "ode" or cfg.window > cfg.noisy[1] - cfg.noisy[0]):
        raise ValueError(f"--window {cfg.window}: takes this many of the steps of --noisy "
                         f"{cfg.noisy} --rollout {cfg.rollout}; expected no more than they are")
    if cfg.rollout != "cps":
        return
    times = schedule(cfg.steps)
    x = torch.zeros(1, 1, 1, 1)
    weights = []
    for k in range(*cfg.noisy):
        mean, std = cps_step(x, torch.ones_like(x), times[k], times[k + 1], cfg.a)
        weights.append((mean ** 2 / (2 * std ** 2)).item())
    if len(weights) > 1 and weights[-1] > 100 * max(weights[:-1]):
        raise ValueError(f"--rollout cps --noisy {cfg.noisy}: the last noisy step ends at t = "
                         f"{times[cfg.noisy[1]]:.4f} with a std of {std.item():.4f}, so its KL "
                         f"weighs {weights[-1] / max(weights[:-1]):.0f} times as much as any "
                         f"other; end at {cfg.noisy[1] - 1}")
