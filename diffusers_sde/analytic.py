"""Exact oracles: networks whose score, likelihood and sampler are known in closed form.

Knows Gaussian mixtures under any path: posterior mean, score, density, sampling, and tilting by linear rewards or
linear Gaussian observations (again a mixture).  A mixture is a diffusers model, so it stands in for a network inside
any unconditional or class-conditional pipeline.  Knows nothing of schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_sde.configs import path_from_config
from diffusers_sde.paths import Path
from diffusers_sde.prediction import convert, model_coefficients


class GaussianMixtureModel(ModelMixin, ConfigMixin):
    r"""``p(x_0) = sum_k w_k N(m_k, C_k)`` on vectors of dimension d, shown to pipelines as images.

    At ``x_t = alpha x_0 + sigma eps`` the components are ``N(alpha m_k, alpha^2 C_k + sigma^2 I)``, and
    ``E[x_0|x_t] = sum_k pi_k(x_t) (m_k + alpha C_k S_k^-1 (x_t - alpha m_k))``, ``S_k = alpha^2 C_k + sigma^2 I``.

    Args:
        weights: (K,), positive; normalised.
        means: (K, d).
        covariances: (K, d, d), (K, d) for diagonal or (K,) for isotropic ones; symmetric, positive semidefinite.
        in_channels, sample_size: shape of one sample, (in_channels, *sample_size) of product d (an int sample_size is
            square); default one channel of size (1, d).
        process: config of the forward process as in :func:`diffusers_sde.configs.path_from_config`; default DDPM's.

    ``forward(sample, timestep, class_labels=None)`` returns what the process's ``prediction_type`` says; class label k
    conditions on component k, label K (or None) on nothing.  ``sample`` is the state itself, under EDM too, where
    networks are shown ``x / sqrt(sigma^2 + sigma_data^2)`` (``scale_model_input``): multiply it back there.
    Arithmetic in float64, results in the sample's dtype.
    Raises ``ValueError`` for shapes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        covariances: Sequence[Any],
        in_channels: int = 1,
        sample_size: int | Sequence[int] | None = None,
        process: dict[str, Any] | None = None,
    ):
        super().__init__()
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
        size = (1, d) if sample_size is None else sample_size
        self.sample_shape = (in_channels, *((size, size) if isinstance(size, int) else size))
        if math.prod(self.sample_shape) != d:
            raise ValueError(f"sample_shape {self.sample_shape} does not hold {d} values.")
        self.register_to_config(sample_size=list(self.sample_shape[1:]))  # pipelines read it
        values, vectors = torch.linalg.eigh(c)
        # kept out of parameters(): .half() and .to(dtype) must not round the oracle
        self._w, self._m, self._values, self._vectors = w / w.sum(), m, values.clamp(min=0), vectors
        self._process = {**_DDPM, **(process or {})}
        self.register_buffer("_anchor", torch.zeros(()))

    @property
    def path(self) -> Path:
        """The forward process that ``forward`` assumes."""
        return path_from_config(self._process)

    # -- the mixture at a noise level, on flat float64 vectors (N, d) --

    def _components(self, x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """log w_k N(x; alpha m_k, S_k) as (N, K), and the centred x in each eigenbasis as (N, K, d)."""
        variances = alpha**2 * self._values + sigma**2
        z = torch.einsum("kij,nki->nkj", self._vectors, x[:, None] - alpha * self._m)
        log_det = torch.log(2 * math.pi * variances).sum(-1)
        return self._w.log() - 0.5 * ((z**2 / variances).sum(-1) + log_det), z

    def log_density(self, x: torch.Tensor, alpha: float = 1.0, sigma: float = 0.0) -> torch.Tensor:
        """``log p_t(x)`` (N,), for x of shape (N, d) or (N, C, H, W)."""
        return self._components(self._flat(x), alpha, sigma)[0].logsumexp(-1)

    def posterior_mean(
        self, x: torch.Tensor, alpha: float, sigma: float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``E[x_0 | x_t = x]``, float64, of x's shape; ``class_labels`` (N,) conditions on components."""
        flat = self._flat(x)
        log_weights, z = self._components(flat, alpha, sigma)
        if class_labels is not None:
            labels = class_labels.to("cpu", torch.int64)
            allowed = torch.nn.functional.one_hot(labels, len(self._w) + 1)[:, :-1].bool()
            allowed |= (labels == len(self._w))[:, None]
            log_weights = log_weights.masked_fill(~allowed, -math.inf)
        gain = alpha * self._values / (alpha**2 * self._values + sigma**2).clamp(min=1e-300)
        means = self._m + torch.einsum("kij,nkj->nki", self._vectors, gain * z)
        return torch.einsum("nk,nki->ni", log_weights.softmax(-1), means).reshape(x.shape)

    def score(self, x: torch.Tensor, alpha: float, sigma: float, class_labels: Any = None) -> torch.Tensor:
        """``grad log p_t(x) = (alpha E[x_0|x] - x)/sigma^2`` (Tweedie), float64, of x's shape; sigma > 0."""
        return (alpha * self.posterior_mean(x, alpha, sigma, class_labels) - x.double().cpu()) / sigma**2

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """``n`` exact samples of the data, (n, C, H, W), float64."""
        k = torch.multinomial(self._w, n, replacement=True, generator=generator)
        z = torch.randn(n, self._m.shape[1], dtype=torch.float64, generator=generator) * self._values[k].sqrt()
        return (self._m[k] + torch.einsum("nij,nj->ni", self._vectors[k], z)).reshape(n, *self.sample_shape)

    # -- exact conditioning --

    @property
    def covariances(self) -> torch.Tensor:
        """(K, d, d), float64."""
        return torch.einsum("kij,kj,klj->kil", self._vectors, self._values, self._vectors)

    def tilted(self, direction: torch.Tensor, beta: float = 1.0) -> GaussianMixtureModel:
        """The mixture proportional to ``p(x) exp(beta direction . x)``: means ``m_k + beta C_k v``, weights times
        ``exp(beta v.m_k + beta^2/2 v.C_k v)``."""
        v = beta * direction.double().reshape(-1)
        shift = self.covariances @ v
        log_weights = self._w.log() + self._m @ v + 0.5 * shift @ v
        return self._like(log_weights.softmax(0), self._m + shift, self.covariances)

    def posterior(self, operator: torch.Tensor, observation: torch.Tensor, noise_std: float) -> GaussianMixtureModel:
        """The mixture ``p(x | y)`` for ``y = H x + noise_std n``: Kalman update of each component, weights times the
        component's evidence ``N(y; H m_k, H C_k H' + noise_std^2 I)``."""
        h, y, c = operator.double(), observation.double().reshape(-1), self.covariances
        s = h @ c @ h.T + noise_std**2 * torch.eye(len(y), dtype=torch.float64)
        gain = torch.linalg.solve(s, h @ c).mT
        residual = y - self._m @ h.T
        means = self._m + torch.einsum("kij,kj->ki", gain, residual)
        covariances = c - gain @ h @ c
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(residual), s).log_prob(residual)
        return self._like((self._w.log() + evidence).softmax(0), means, 0.5 * (covariances + covariances.mT))

    def _like(self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> GaussianMixtureModel:
        weights = weights.clamp(min=1e-300)
        lists = (v.tolist() for v in (weights, means, covariances))
        channels, *size = self.sample_shape
        return GaussianMixtureModel(*lists, in_channels=channels, sample_size=size, process=dict(self._process))

    # -- as a network --

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The exact prediction at ``timestep`` (one number, or one per sample)."""
        if math.prod(sample.shape[1:]) != self._m.shape[1]:
            raise ValueError(
                f"samples have shape {tuple(sample.shape[1:])}, this mixture lives on {self.sample_shape}."
            )
        times = torch.as_tensor(timestep).double().cpu().reshape(-1)
        labels = None if class_labels is None else class_labels.cpu().reshape(-1)
        if labels is not None:
            if len(labels) not in (1, len(sample)) or not bool(((labels >= 0) & (labels <= len(self._w))).all()):
                raise ValueError(f"class_labels must be one or {len(sample)} numbers from 0 to {len(self._w)} (none).")
            labels = labels.expand(len(sample))
        if len(times) > 1 and bool((times != times[0]).any()):
            parts = [
                self(sample[i : i + 1], times[i], None if labels is None else labels[i : i + 1], return_dict=False)[0]
                for i in range(len(sample))
            ]
            out = torch.cat(parts)
        else:
            alpha, sigma = (float(v) for v in self.path.alpha_sigma(float(times[0])))
            kind = self._process["prediction_type"]
            wanted = model_coefficients(self.path, kind, alpha, sigma)
            x = sample.double().cpu()
            if sigma > 0:
                k_x, k_d = convert((1.0, 0.0), wanted, alpha, sigma)
                out = k_x * x + k_d * self.posterior_mean(x, alpha, sigma, labels)
            else:  # D = x/alpha; the noise is not seen: its mean is 0
                out = wanted[0] * x / alpha
            out = out.to(sample.device, sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().cpu().reshape(len(x), -1)


_DDPM = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
