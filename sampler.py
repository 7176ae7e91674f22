"""
Sampling a flow-matching model, and the density of what was sampled. Everything GRPO and OPD need of the sampler is here.

| symbol | meaning |
|---|---|
| B, G, K, L, D | images in a batch; images of one prompt; steps of a trajectory; text tokens; width |
| t, t_next, dt | flow time, 1 = noise, 0 = image; a step goes t -> t_next < t; dt = t - t_next > 0 |
| x, x_next | latents before and after a step |
| v | velocity dx/dt = eps - x_0, what the network gives |
| mean, std | of the step's Gaussian; std = sigma_t sqrt(dt) |
| sigma_t | the SDE's noise rate, and nothing else |
| logp, ratio, adv, reward, kl | as in PPO; logp and kl are nats per latent element (averaged over C*H*W, not summed) |
| context, pooled | the prompt, as token vectors and as one vector |
| student, teachers[task], anchor | the adapter that learns, those it learns from, the task-agnostic quality teacher |

Papers: Flow-GRPO arXiv 2505.05470 (the SDE); CPS arXiv 2509.05952; SD3 arXiv 2403.03206 (schedule); Flow-OPD arXiv 2605.08063.
"""
import math
from typing import NamedTuple

import torch

from model import Route
from util import generator


def schedule(n, shift=3.0):
    """n + 1 flow times from 1 to 0, float32: diffusers' FlowMatchEulerDiscreteScheduler(shift=3.0).set_timesteps(n).

    The shift acts twice at the tail (u_min is itself a shifted time), there and so here.
    """
    u_min = shift * 0.001 / (1 + (shift - 1) * 0.001)
    u = torch.linspace(1, u_min, n, dtype=torch.float64)
    t = shift * u / (1 + (shift - 1) * u)
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)]).float()


# ------------------------------------------------------------------ the velocity, with guidance: the one place


class Text(NamedTuple):
    """A batch's prompts as vectors, and the empty prompt's (null) for guidance: context (B, L, .), pooled (B, .)."""
    context: torch.Tensor
    pooled: torch.Tensor
    null_context: torch.Tensor
    null_pooled: torch.Tensor

    def rows(self, i):
        return Text(*(a[i] for a in self))


@torch.no_grad()
def encode(text_encoder, prompts):
    """Each distinct prompt is encoded once, whatever its number of images."""
    distinct = list(dict.fromkeys(prompts)) + [""]
    context, pooled = text_encoder(distinct)
    at = [distinct.index(p) for p in prompts]
    null_context, null_pooled = (x[-1:].expand(len(prompts), *x.shape[1:]) for x in (context, pooled))
    return Text(context[at], pooled[at], null_context, null_pooled)


def branches(net, x, t, text, adapter=None):
    """(v_null, v_text) from one forward: without the prompt and with it. x (B, C, H, W), t (B,) -> (B, C, H, W) each."""
    if isinstance(adapter, Route):
        adapter = Route(adapter.names, adapter.index.repeat(2))
    return net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([text.null_context, text.context]), torch.cat([text.null_pooled, text.pooled]), adapter).chunk(2)


def velocity(net, x, t, text, guidance=1.0, adapter=None):
    """v_g = v_null + w (v_text - v_null); w = 1 needs half the work. x (B, C, H, W), t (B,) -> (B, C, H, W)."""
    if guidance == 1:
        return net(x, t, text.context, text.pooled, adapter)
    v_null, v_text = branches(net, x, t, text, adapter)
    return v_null + guidance * (v_text - v_null)


# ------------------------------------------------------------------ one step: (mean, std) of x_next given x and v


def expand(t, x):
    """A time (B,) or a number, shaped to multiply x (B, C, H, W), in x's device and dtype."""
    return torch.as_tensor(t, device=x.device, dtype=x.dtype).reshape(-1, 1, 1, 1)


def ode_step(x, v, t, t_next):
    """Euler: x_next = x - dt v, no noise."""
    t, t_next = expand(t, x), expand(t_next, x)
    return x - (t - t_next) * v, torch.zeros_like(t)


def sde_sigma(t, t_second, a):
    """sigma_t = a sqrt(t / (1 - t)) (Flow-GRPO eq. 9); at t = 1 the 1 - t takes the second time of the schedule instead."""
    return a * (t / (1 - torch.where(t >= 1, t_second, t))).sqrt()


def sde_step(x, v, t, t_next, a, t_second):
    """The SDE with the ODE's marginals. t, t_next (B,) or numbers; t_second: the schedule's second time. Returns mean like x, std."""
    t, t_next, t_second = expand(t, x), expand(t_next, x), expand(t_second, x)
    dt, sigma = t - t_next, sde_sigma(t, t_second, a)
    # x_next = x - [v + sigma^2 / (2 t) (x + (1 - t) v)] dt + sigma sqrt(dt) z
    mean = x * (1 - sigma ** 2 * dt / (2 * t)) - v * (1 + sigma ** 2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * dt.sqrt()


def cps_step(x, v, t, t_next, a):
    """Coefficients-preserving sampling: exactly the noise level that t_next asks for, whatever a; none is left at t_next = 0."""
    t, t_next = expand(t, x), expand(t_next, x)
    std = t_next * math.sin(a * math.pi / 2)
    x0_hat, eps_hat = x - t * v, x + (1 - t) * v
    return (1 - t_next) * x0_hat + (t_next ** 2 - std ** 2).sqrt() * eps_hat, std


def step(kind, x, v, t, t_next, a, t_second):
    """kind "sde", "cps" or "ode" -> mean (B, C, H, W), std (B or 1, 1, 1, 1)."""
    if kind == "sde":
        return sde_step(x, v, t, t_next, a, t_second)
    if kind == "cps":
        return cps_step(x, v, t, t_next, a)
    assert kind == "ode", f"unknown step {kind!r}"
    return ode_step(x, v, t, t_next)


def log_prob(x_next, mean, std):
    """log N(x_next; mean, std^2), averaged over elements: (B,), nats per latent element.

    DEVIATION: a density is the SUM over elements; the released Flow-GRPO averages. The ratio exp(logp - logp_old) then is the
    C*H*W-th root of the true one and stays close to 1, which is why its PPO clip range is 1e-4 and not 0.2.
    """
    return (-((x_next - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2).flatten(1).mean(1)


def gaussian_kl(mean_p, mean_q, std):
    """KL(N(mean_p, std^2) || N(mean_q, std^2)) = mean of (mean_p - mean_q)^2 / (2 std^2) over elements: (B,), nats per latent element.

    The step's mean is affine in v, so for the SDE this is w(t) mean (v_p - v_q)^2, w(t) = dt/2 (sigma_t (1 - t) / (2 t) + 1 / sigma_t)^2.
    DEVIATION: averaged over elements as log_prob is; and std^2 = sigma_t^2 dt is the step's variance, where the released code has sigma_t^2.
    """
    return ((mean_p - mean_q) ** 2 / (2 * std ** 2)).flatten(1).mean(1)


# ------------------------------------------------------------------ whole trajectories


def draw_noise(keys, K, shape):
    """Gaussian noise (B, K + 1, *shape) for B trajectories: [:, 0] to start from, [:, 1 + k] for step k.

    Each trajectory has its own key and so its own numbers, however the batch is cut over minibatches and ranks.
    """
    return torch.stack([torch.randn(K + 1, *shape, generator=generator(*key), dtype=torch.float32) for key in keys])


class Trajectory(NamedTuple):
    x: torch.Tensor          # (B, K + 1, C, H, W) float32: x[:, k] is the state before step k, x[:, K] the sample
    logp: torch.Tensor       # (B, K), nats per element; 0 where a step had no noise
    v: torch.Tensor          # (B, K, C, H, W) float32: the velocity that step k took


@torch.no_grad()
def rollout(net, noise, times, text, guidance=1.0, adapter=None, kind="sde", a=0.7, noisy=None):
    """Sample B trajectories. noise (B, K + 1, C, H, W) as draw_noise; times (K + 1,); noisy: the steps that take noise (default all).

    Steps that are not noisy are the ODE's. States are kept in float32 whatever the network computes in.
    """
    x, xs, logps, vs = noise[:, 0].float(), [noise[:, 0].float()], [], []
    for k in range(len(times) - 1):
        v = velocity(net, x, times[k].expand(len(x)), text, guidance, adapter).float()
        how = kind if noisy is None or k in noisy else "ode"
        mean, std = step(how, x, v, times[k], times[k + 1], a, times[1])
        x = mean + std * noise[:, k + 1]
        logps.append(log_prob(x, mean, std) if how != "ode" and std.min() > 0 else torch.zeros(len(x), device=x.device))
        xs.append(x)
        vs.append(v)
    return Trajectory(torch.stack(xs, 1), torch.stack(logps, 1), torch.stack(vs, 1))


@torch.no_grad()
def sample(net, noise, times, text, guidance=1.0, adapter=None):
    """The ODE from noise (B, C, H, W), or the first of a trajectory's (draw_noise), to latents (B, C, H, W): how models are evaluated."""
    x = (noise if noise.dim() == 4 else noise[:, 0]).float()
    for t, t_next in zip(times, times[1:]):
        v = velocity(net, x, t.expand(len(x)), text, guidance, adapter).float()
        x, _ = ode_step(x, v, t, t_next)
    return x
