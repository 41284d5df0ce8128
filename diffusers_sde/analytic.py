"""Exact oracles: Gaussian mixtures, whose density, score and sampler are known at every noise level.

Knows a mixture of normals under ``x_t = alpha x_0 + sigma eps``: density, posterior mean, score, sampling, and tilting
by linear rewards or linear Gaussian observations (again a mixture; Fu & Wang, arXiv:2605.22586, section 1, and the
Kalman update).  Float64 tensors of shape (N, d); knows nothing of paths, predictions, networks or schedulers.
"""

from __future__ import annotations

import math
from typing import Any

import torch


class GaussianMixture:
    r"""``p(x_0) = sum_k w_k N(m_k, C_k)`` on vectors of dimension d.

    At ``x_t = alpha x_0 + sigma eps`` the components are ``N(alpha m_k, S_k)``, ``S_k = alpha^2 C_k + sigma^2 I``, and
    ``E[x_0|x_t] = sum_k pi_k(x_t) (m_k + alpha C_k S_k^-1 (x_t - alpha m_k))`` with ``pi_k`` the posterior weights.

    Args:
        weights: (K,), positive; normalised.
        means: (K, d).
        covariances: (K, d, d), (K, d) for diagonal or (K,) for isotropic ones; symmetric, positive semidefinite.

    Raises:
        ValueError: for shapes that do not fit and weights that are not positive.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any):
        w, m, c = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        if w.ndim != 1 or m.ndim != 2 or len(m) != len(w) or len(c) != len(w) or not bool((w > 0).all()):
            raise ValueError("weights (K,) must be positive, means (K, d), covariances (K, d, d), (K, d) or (K,).")
        d = m.shape[1]
        if c.ndim == 1:
            c = c[:, None, None] * torch.eye(d, dtype=torch.float64)
        elif c.ndim == 2:
            c = torch.diag_embed(c)
        if c.shape != (len(w), d, d):
            raise ValueError(f"covariances have shape {tuple(c.shape)}, expected ({len(w)}, {d}, {d}).")
        values, self._vectors = torch.linalg.eigh(c)
        self._values = values.clamp(min=0)
        self.weights, self.means, self.dimension = w / w.sum(), m, d
        self._to_bases = self._vectors.permute(1, 0, 2).reshape(d, -1)  # all eigenbases side by side, (d, K d)
        self._centres = torch.einsum("kij,ki->kj", self._vectors, m)

    @property
    def covariances(self) -> torch.Tensor:
        """(K, d, d)."""
        return torch.einsum("kij,kj,klj->kil", self._vectors, self._values, self._vectors)

    def __len__(self) -> int:
        return len(self.weights)

    # -- at a noise level --

    def _components(self, x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log w_k N(x; alpha m_k, S_k) as (N, K), and the centred x in each eigenbasis as (N, K, d)."""
        variances = alpha**2 * self._values + sigma**2
        z = (x @ self._to_bases).reshape(len(x), *self.means.shape) - alpha * self._centres
        log_det = torch.log(2 * math.pi * variances).sum(-1)
        return self.weights.log() - 0.5 * ((z**2 / variances).sum(-1) + log_det), z

    def log_density(self, x: torch.Tensor, alpha: float = 1.0, sigma: float = 0.0) -> torch.Tensor:
        """``log p_t(x)`` (N,), for x (N, d)."""
        return self._components(x, alpha, sigma)[0].logsumexp(-1)

    def posterior_mean(
        self, x: torch.Tensor, alpha: float, sigma: float, components: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``E[x_0 | x_t = x]``.

        Args:
            x: (N, d).
            alpha, sigma: of x.
            components: (N,) integers; k conditions on component k, K on nothing.

        Returns:
            (N, d).
        """
        log_weights, z = self._components(x, alpha, sigma)
        if components is not None:
            allowed = torch.nn.functional.one_hot(components, len(self) + 1)[:, :-1].bool()
            allowed |= (components == len(self))[:, None]
            log_weights = log_weights.masked_fill(~allowed, -math.inf)
        gain = alpha * self._values / (alpha**2 * self._values + sigma**2).clamp(min=1e-300)
        chosen = log_weights.softmax(-1)
        return chosen @ self.means + (chosen[..., None] * gain * z).flatten(1) @ self._to_bases.T

    def score(
        self, x: torch.Tensor, alpha: float, sigma: float, components: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``grad log p_t(x) = (alpha E[x_0|x] - x)/sigma^2`` (Tweedie), (N, d); sigma > 0."""
        return (alpha * self.posterior_mean(x, alpha, sigma, components) - x) / sigma**2

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """``n`` exact samples of the data, (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dimension, dtype=torch.float64, generator=generator) * self._values[k].sqrt()
        return self.means[k] + torch.einsum("nij,nj->ni", self._vectors[k], z)

    # -- exact conditioning --

    def tilted(self, direction: torch.Tensor) -> GaussianMixture:
        """The mixture proportional to ``p(x) exp(v . x)`` for a direction v (d,): means ``m_k + C_k v``, weights times
        ``exp(v.m_k + 1/2 v.C_k v)``."""
        shift = self.covariances @ direction
        log_weights = self.weights.log() + self.means @ direction + 0.5 * shift @ direction
        return self._with(log_weights, self.means + shift, self.covariances)

    def posterior(self, operator: torch.Tensor, observation: torch.Tensor, noise_std: float) -> GaussianMixture:
        """The mixture ``p(x | y)`` for ``y = H x + noise_std n``: Kalman update of each component, weights times the
        component's evidence ``N(y; H m_k, H C_k H' + noise_std^2 I)``.

        Args:
            operator: H, (m, d).
            observation: y, (m,).
            noise_std: of the observation; positive.
        """
        h, y, c = operator, observation, self.covariances
        s = h @ c @ h.T + noise_std**2 * torch.eye(len(y), dtype=torch.float64)
        gain = torch.linalg.solve(s, h @ c).mT
        residual = y - self.means @ h.T
        means = self.means + torch.einsum("kij,kj->ki", gain, residual)
        covariances = c - gain @ h @ c
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(residual), s).log_prob(residual)
        return self._with(self.weights.log() + evidence, means, 0.5 * (covariances + covariances.mT))

    def _with(self, log_weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> GaussianMixture:
        return GaussianMixture(log_weights.softmax(0).clamp(min=1e-300), means, covariances)
