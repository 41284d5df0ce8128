r"""Inference-time control: sampling the tilted law ``p(x) exp(beta r(x)) / Z`` by twisted sequential Monte Carlo.

Knows Feynman-Kac weights, resampling, and estimates with error bars, on tensors and callables: a *kernel* says the
transition of a sampler, Gaussian or of tokens, a *reward* scores samples.  Knows no network, no path and no pipeline.

N particles start from noise and follow the sampler's transitions ``x' ~ N(mean(x), std^2 I)``, or those of tokens, each
position from a law of its own.  A twist ``psi_k(x_k) = exp(beta_k r(D(x_k)))``, D the data prediction, guesses what the
reward at the end will be.  Proposing from the sampler, or of Gaussian transitions with ``gradient`` from ``N(mean +
std^2 grad log psi_k(x_k), std^2 I) = q``, a step multiplies the weights by

    psi_{k+1}(x') / psi_k(x) * N(x'; mean, std^2) / q(x'),

with psi = exp(beta r(x)) at the last state, so that the weights of whole trajectories are exp(beta r) whatever the
twists are: they only decide the variance.  Particles are resampled where their effective number falls.  Consistent as N
grows, error O(N^-1/2), for the law of the sampler with its steps, not of the SDE (Wu et al. 2023, arXiv:2306.17775;
Singhal et al. 2025, arXiv:2501.06848; Lu, arXiv:2607.01693, section 8).  Guidance alone, the gradient without weights,
samples another law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from diffusers_sde.discrete.categorical import sample_categorical

Reward = Callable[[torch.Tensor], torch.Tensor]


class Transition(NamedTuple):
    """One step of a sampler, ``x' ~ N(mean, std^2 I)``: mean (M, ...), std, and ``clean`` (M, ...), the data prediction
    at the states before it."""

    mean: torch.Tensor
    std: float
    clean: torch.Tensor

    def of(self, index: torch.Tensor) -> Transition:
        """Of some of the particles, by their numbers."""
        return self._replace(mean=self.mean[index])

    def draw(self, shift: torch.Tensor | None, generator: torch.Generator | None) -> tuple[torch.Tensor, Any]:
        """A draw of ``N(mean + shift, std^2)`` and ``log N(mean, std^2) - log N(mean + shift, std^2)`` there."""
        if self.std == 0:
            return self.mean, 0.0
        z = _normals(self.mean, generator)
        if shift is None:
            return self.mean + self.std * z, 0.0
        flat, noise = shift.double().flatten(1), z.double().flatten(1)
        correction = -(0.5 * flat.square().sum(1) + self.std * (noise * flat).sum(1)) / self.std**2
        return self.mean + shift + self.std * z, correction


class TokenTransition(NamedTuple):
    """One step of a sampler of tokens, each position by itself: ``law`` (M, L, S) of the next state, and ``clean``
    (M, L), tokens that the data are guessed to have."""

    law: torch.Tensor
    clean: torch.Tensor

    def of(self, index: torch.Tensor) -> TokenTransition:
        """Of some of the particles, by their numbers."""
        return self._replace(law=self.law[index])

    def draw(self, shift: torch.Tensor | None, generator: torch.Generator | None) -> tuple[torch.Tensor, Any]:
        """A draw; its law is not shifted."""
        return sample_categorical(self.law, generator), 0.0


Kernel = Callable[[int, torch.Tensor], Transition | TokenTransition]


@dataclass(frozen=True)
class Particles:
    """The result of P independent populations of N weighted particles.

    samples (P, N, ...); rewards (P, N); log_weights (P, N), of each population normalised to sum 1; log_normalizer
    (P,), the ``log Z`` of each population, whose exponentials are unbiased; ess (steps + 1, P), effective sample sizes
    before resampling; resampled (steps, P).
    """

    samples: torch.Tensor
    rewards: torch.Tensor
    log_weights: torch.Tensor
    log_normalizer: torch.Tensor
    ess: torch.Tensor
    resampled: torch.Tensor


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    """How many equally weighted particles say as much: ``(sum w)^2 / sum w^2``.

    Args:
        log_weights: (..., N), of any normalisation.

    Returns:
        (...), between 1 and N.
    """
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def systematic_resample(log_weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Ancestors by systematic resampling: particle i has ``floor`` or ``ceil`` of ``N w_i`` children, on average
    ``N w_i``.

    Args:
        log_weights: (P, N), of any normalisation.
        generator: of the one random number of each population.

    Returns:
        Indices (P, N) into each population.
    """
    populations, n = log_weights.shape
    weights = log_weights.double().softmax(-1).cpu()
    offset = torch.rand(populations, 1, dtype=torch.float64, generator=_on_cpu(generator))
    quantiles = (torch.arange(n, dtype=torch.float64) + offset) / n
    return torch.searchsorted(weights.cumsum(-1), quantiles).clamp(max=n - 1).to(log_weights.device)


def evaluate_reward(reward: Reward, samples: torch.Tensor) -> torch.Tensor:
    """The reward of samples, checked.

    Args:
        reward: (M, ...) to (M,).
        samples: (M, ...).

    Returns:
        (M,), float64.

    Raises:
        ValueError: unless it is one finite number for each sample.
    """
    values = reward(samples)
    if not isinstance(values, torch.Tensor) or values.shape != samples.shape[:1]:
        found = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(
            f"The reward must return a tensor of shape ({len(samples)},), one number a sample, not {found}."
        )
    if not bool(values.isfinite().all()):
        raise ValueError("The reward returned NaN or infinity: make it finite for every sample, noisy ones included.")
    return values.double()


def twisted_smc(
    kernel: Kernel,
    reward: Reward,
    x: torch.Tensor,
    *,
    steps: int,
    beta: float,
    gradient: bool = False,
    schedule: Sequence[float] | None = None,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
    reorder: Callable[[torch.Tensor], None] | None = None,
    callback: Callable[[], Any] | None = None,
) -> Particles:
    """Run P populations of N particles to the law ``p(x) exp(beta r(x)) / Z`` of the sampler's last states.

    Args:
        kernel: ``kernel(k, x)``, the transition of step k = 0 .. steps - 1 on flat particles (P N, ...); with
            ``gradient`` differentiable.
        reward: (M, ...) to (M,), of samples and of data predictions.
        x: samples of the sampler's first law (P, N, ...).
        steps: of the sampler.
        beta: strength of the tilt.
        gradient: propose along the gradient of the reward.
        schedule: beta_k/beta for each step; 0 switches the twist off there.  None: 1.
        threshold: resample a population whose effective sample size is below this fraction of N.
        generator: of resampling and proposals.
        reorder: called with the ancestors (P N,) of all particles after a resampling, for samplers that remember
            earlier steps.
        callback: called after each step.

    Returns:
        :class:`Particles`.

    Raises:
        ValueError: for rewards that are not one finite number a sample, or have no gradient where one is needed, and
            for shapes that do not fit.
    """
    if x.ndim < 3 or x.shape[1] < 1:
        raise ValueError(f"Particles have shape {tuple(x.shape)}, expected (populations, particles, ...).")
    scales = [1.0] * steps if schedule is None else [float(s) for s in schedule]
    if len(scales) != steps:
        raise ValueError(f"schedule has {len(scales)} values for {steps} steps: pass one a step.")
    populations, n = x.shape[:2]
    x = x.flatten(0, 1)
    offsets = torch.arange(populations, device=x.device)[:, None] * n
    log_weights = torch.full((populations, n), -math.log(n), dtype=torch.float64, device=x.device)
    log_normalizer = torch.zeros(populations, dtype=torch.float64, device=x.device)
    past = torch.zeros(populations * n, dtype=torch.float64, device=x.device)  # log psi at the parent, minus correction
    sizes, resampled = [], []
    for k in range(steps):
        step, log_psi, shift = _twisted(kernel, reward, k, x, beta * scales[k], gradient)
        log_weights = log_weights + (log_psi - past).reshape(populations, n)
        sizes.append(effective_sample_size(log_weights))
        low = sizes[-1] < threshold * n
        resampled.append(low)
        if bool(low.any()):
            chosen, same = systematic_resample(log_weights, generator), torch.arange(n, device=x.device)
            ancestors = torch.where(low[:, None], chosen, same)
            index = (ancestors + offsets).flatten()
            step, log_psi = step.of(index), log_psi[index]
            shift = None if shift is None else shift[index]
            if reorder is not None:
                reorder(index)
            total = log_weights.logsumexp(-1)
            log_normalizer = torch.where(low, log_normalizer + total, log_normalizer)
            log_weights = torch.where(low[:, None], torch.full_like(log_weights, -math.log(n)), log_weights)
        x, correction = step.draw(shift, generator)
        past = log_psi - correction
        if callback is not None:
            callback()
    rewards = evaluate_reward(reward, x).reshape(populations, n)
    log_weights = log_weights + beta * rewards - past.reshape(populations, n)
    sizes.append(effective_sample_size(log_weights))
    total = log_weights.logsumexp(-1, keepdim=True)
    return Particles(
        x.unflatten(0, (populations, n)),
        rewards,
        log_weights - total,
        log_normalizer + total[:, 0],
        torch.stack(sizes),
        torch.stack(resampled),
    )


def _twisted(
    kernel: Kernel, reward: Reward, k: int, x: torch.Tensor, beta: float, gradient: bool
) -> tuple[Transition | TokenTransition, torch.Tensor, torch.Tensor | None]:
    """The transition, ``log psi`` and, if wanted, the shift ``std^2 grad log psi`` of step k."""
    if beta == 0 or not gradient:
        with torch.no_grad():
            step = kernel(k, x)
            # evaluated at the first step in any case: a wrong reward is to be found before the work is done
            value = evaluate_reward(reward, step.clean) if beta or k == 0 else torch.zeros(len(x), device=x.device)
        return step, beta * value.double(), None
    if not x.is_floating_point():
        raise ValueError("Tokens have no gradient: use gradient=False.")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        step = kernel(k, x)
        assert isinstance(step, Transition)
        log_psi = beta * evaluate_reward(reward, step.clean)
        if not log_psi.requires_grad:
            raise ValueError(
                "The reward has no gradient: make it differentiable in its samples, or use gradient=False."
            )
        (slope,) = torch.autograd.grad(log_psi.sum(), x)
    return step._replace(mean=step.mean.detach()), log_psi.detach(), step.std**2 * slope


# -- results --


def estimate(values: torch.Tensor, particles: Particles) -> tuple[torch.Tensor, torch.Tensor]:
    """An expectation under the tilted law, ``sum_p Z_p m_p / sum_p Z_p`` with m_p the mean of population p and Z_p its
    estimate of Z, and the standard error of this ratio from the scatter between populations (delta method).

    Args:
        values: (P, N, ...), what to take the mean of at each particle.
        particles: P populations.

    Returns:
        ``(mean, standard error)``, each of the trailing shape, float64; the error is NaN for a single population.
    """
    weights = particles.log_weights.exp()
    means = torch.einsum("pn,pn...->p...", weights, values.double())
    z = particles.log_normalizer.softmax(0).reshape(-1, *[1] * (means.ndim - 1))
    mean, p = (z * means).sum(0), len(means)
    error = ((z * (means - mean)) ** 2).sum(0).sqrt() * (math.sqrt(p / (p - 1)) if p > 1 else math.nan)
    return mean, error


def log_normalizer(particles: Particles) -> tuple[float, float]:
    """``log Z``, ``Z = E[exp(beta r)]`` under the sampler, from the mean of Z over populations.

    Args:
        particles: P populations.

    Returns:
        ``(log Z, its standard error)``; the error is NaN for a single population.
    """
    logs, p = particles.log_normalizer, len(particles.log_normalizer)
    ratio = (logs - logs.max()).exp()
    error = float(ratio.std() / ratio.mean()) / math.sqrt(p) if p > 1 else math.nan
    return float(logs.logsumexp(0)) - math.log(p), error


def draw(particles: Particles, generator: torch.Generator | None = None) -> torch.Tensor:
    """One particle of each population, drawn by weight.

    Args:
        particles: P populations.
        generator: of the draws.

    Returns:
        Indices (P,).
    """
    weights = particles.log_weights.exp().cpu()
    return torch.multinomial(weights, 1, generator=_on_cpu(generator))[:, 0].to(particles.samples.device)


def best_of(particles: Particles) -> torch.Tensor:
    """The particle with the largest reward of each population: best-of-N if they were run at beta = 0.

    Args:
        particles: P populations.

    Returns:
        Indices (P,).
    """
    return particles.rewards.argmax(1)


# -- samplers as kernels --


def scheduler_kernel(denoiser: Callable[[torch.Tensor, Any], torch.Tensor], scheduler: Any) -> Kernel:
    """The exact transition of a scheduler as a kernel.

    Its steps must be taken in order from the first; pass ``reorder=scheduler.reorder`` to :func:`twisted_smc`.  The
    noise is the caller's, since particles that share an ancestor must not share it.

    Args:
        denoiser: ``denoiser(scaled sample, timestep)``.
        scheduler: one of this package, whose timesteps are set.

    Returns:
        ``kernel(k, x)``.
    """

    def kernel(k: int, x: torch.Tensor) -> Transition:
        t = scheduler.timesteps[k]
        out = scheduler.step(denoiser(scheduler.scale_model_input(x, t), t), t, x)
        scheduler.reorder(slice(None))  # the graph of this step is not that of the next
        return Transition(out.prev_sample_mean, out.noise_std, out.pred_original_sample)

    return kernel


def token_kernel(
    logits: Callable[[torch.Tensor, Any], torch.Tensor],
    scheduler: Any,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Kernel:
    """The exact transition of a scheduler of tokens as a kernel; the data are guessed by a draw of each clean token.

    Args:
        logits: ``logits(tokens, timestep)`` (M, L, S).
        scheduler: one of this package whose steps draw each position by itself (not an order), timesteps set.
        generator: of the guesses.
        options: of its ``law``: the mask, temperature, given tokens.

    Returns:
        ``kernel(k, x)``.
    """

    def kernel(k: int, x: torch.Tensor) -> TokenTransition:
        t = scheduler.timesteps[k]
        law, clean = scheduler.law(logits(x, t), t, x, **options)
        return TokenTransition(law, sample_categorical(clean, generator))

    return kernel


def _normals(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    """A CPU generator: the caller's, or one that goes on from it."""
    if generator is None or generator.device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (), device=generator.device, generator=generator))
    return torch.Generator().manual_seed(seed)
