r"""The Gaussian transition of one step, ``x' ~ N(mean, std^2 I)``: its density, draws and divergences.

Of a first-order step of noise level tau (:mod:`diffusers_sde.weights`) with data scale c

    mean = a x + b F,    b = alpha_t A Int (r_t/r_u)^A (s_u/r_u) dlambda_u
    std = alpha_t r_t sqrt(1 - (r_t/r_s)^(2 tau^2))

and F is affine in what the network says, ``F = k_x x + k_m m``: the Jacobian of the mean is the number ``jacobian = b
k_m``.  The chain of such steps is Markov and exact in law for N(0, c^2 I) data at any number of steps, so that the
likelihood ratio of two networks on a trajectory is the ratio of their densities here, and the divergence of their
trajectories the sum of ``kl``: what policy gradients and KL-regularised control need (Fan et al. 2023,
arXiv:2305.16381; Liu et al. 2025, arXiv:2505.05470).

Knows tensors and numbers.  Knows no path, network or scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffusers_sde.weights import Point

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, eq=False)
class GaussianTransition:
    """One step of a sampler, ``x' ~ N(mean, std^2 I)`` given the state before it.

    Args:
        mean: (N, ...), float32 or better, differentiable in the model output and in the state.
        std: 0 for a step without noise.
        jacobian: ``d mean / d model_output``, a factor of the identity; of an x_0 that is not clipped.
        start, end: the exact levels between which the step goes.
    """

    mean: torch.Tensor
    std: float
    jacobian: float
    start: Point
    end: Point

    def draw(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + std noise`` for unit normals (N, ...)."""
        return torch.add(self.mean, noise.to(self.mean.dtype), alpha=self.std)

    def log_prob(self, next_sample: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """The log density of the next state, of each sample by itself whatever the batch.

        Args:
            next_sample: (N, ...), any dtype.
            reduction: over the dimensions of a sample: ``sum``, the log density, or ``mean``, a dimension's share.

        Returns:
            (N,), float64 (float32 on devices without it).

        Raises:
            ValueError: for a step without noise, which has no density, another shape and another reduction.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be sum or mean, not {reduction!r}.")
        if next_sample.shape != self.mean.shape:
            raise ValueError(f"next_sample has shape {tuple(next_sample.shape)}, the step {tuple(self.mean.shape)}.")
        self._check_noise()
        dimensions = math.prod(self.mean.shape[1:])
        constant = dimensions * (math.log(self.std) + 0.5 * math.log(2 * math.pi))
        value = -0.5 * _squares(next_sample, self.mean, self.std) - constant
        return value / dimensions if reduction == "mean" else value

    def kl(self, other: GaussianTransition) -> torch.Tensor:
        """``KL(self || other) = |mean - mean'|^2 / (2 std^2)`` of each sample.

        Args:
            other: the step of another network from the same state.

        Returns:
            (N,), float64 (float32 on devices without it).

        Raises:
            ValueError: for a step without noise, and for one of another noise.
        """
        self._check_noise()
        if other.std != self.std:
            raise ValueError(f"The steps have different noise ({self.std:g} and {other.std:g}): take the same levels.")
        return 0.5 * _squares(self.mean, other.mean, self.std)

    def _check_noise(self) -> None:
        if self.std == 0:
            raise ValueError(
                "This step draws no noise, so that its next state has no density: score the steps with std > 0 only "
                "(a positive tau, and not the step to clean data)."
            )


def _squares(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """``|x - y|^2 / scale^2`` of each sample (N,)."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return sum_per_sample(((x.to(wide) - y.to(wide)) / scale).square())


def sum_per_sample(values: torch.Tensor) -> torch.Tensor:
    """The sum over all dimensions but the first, by halves: one order of additions whatever the batch, the threads and
    the device, so that a sample's sum is the same to the last bit in a batch of any size.

    Args:
        values: (N, ...).

    Returns:
        (N,), of the same dtype.
    """
    values = values.flatten(1)
    while (count := values.shape[1]) > 1:
        if count % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        low, high = values.chunk(2, 1)
        values = low + high
    return values.sum(1) if values.shape[1] == 0 else values[:, 0]
