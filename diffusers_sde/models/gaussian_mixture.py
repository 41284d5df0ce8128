"""A Gaussian mixture as a diffusers model: an exact network inside any unconditional or class-conditional pipeline.

Knows how a pipeline calls a network and how a model is saved; the mathematics is in :mod:`diffusers_sde.analytic`.
Knows nothing of schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.configs import path_from_config
from diffusers_sde.paths import Path
from diffusers_sde.prediction import model_coefficients, to_model

_DDPM = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


class GaussianMixtureModel(ModelMixin, ConfigMixin):
    r"""``p(x_0) = sum_k w_k N(m_k, C_k)`` on vectors of dimension d, shown to pipelines as images.

    ``forward(sample, timestep, class_labels=None)`` returns what the process's ``prediction_type`` says; class label k
    conditions on component k, label K (or None) on nothing.  ``sample`` is the state itself, under EDM too, where
    networks are shown ``x / sqrt(sigma^2 + sigma_data^2)`` (``scale_model_input``): multiply it back there.
    Arithmetic in float64 on the host, results in the sample's dtype; formulas in
    :class:`diffusers_sde.analytic.GaussianMixture`, which is ``mixture`` here.

    Args:
        weights: (K,), positive; normalised.
        means: (K, d).
        covariances: (K, d, d), (K, d) for diagonal or (K,) for isotropic ones; symmetric, positive semidefinite.
        in_channels, sample_size: shape of one sample, (in_channels, *sample_size) of product d (an int sample_size is
            square); default one channel of size (1, d).
        process: config of the forward process as in :func:`diffusers_sde.configs.path_from_config`; default DDPM's.

    Raises:
        ValueError: for shapes that do not fit.
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
        # no parameters: .half() and .to(dtype) must not round the oracle
        self.mixture = GaussianMixture(weights, means, covariances)
        size = (1, self.mixture.dimension) if sample_size is None else sample_size
        self.sample_shape = (in_channels, *((size, size) if isinstance(size, int) else size))
        if math.prod(self.sample_shape) != self.mixture.dimension:
            raise ValueError(f"sample_shape {self.sample_shape} does not hold {self.mixture.dimension} values.")
        self.register_to_config(sample_size=list(self.sample_shape[1:]))  # pipelines read it
        self._process = {**_DDPM, **(process or {})}
        self.register_buffer("_anchor", torch.zeros(()))  # what diffusers reads dtype and device from

    @property
    def path(self) -> Path:
        """The forward process that ``forward`` assumes."""
        return path_from_config(self._process)

    @property
    def covariances(self) -> torch.Tensor:
        """(K, d, d), float64."""
        return self.mixture.covariances

    def log_density(self, x: torch.Tensor, alpha: float = 1.0, sigma: float = 0.0) -> torch.Tensor:
        """``log p_t(x)`` (N,), float64, for x of shape (N, d) or (N, C, H, W)."""
        return self.mixture.log_density(_flat(x), alpha, sigma)

    def posterior_mean(
        self, x: torch.Tensor, alpha: float, sigma: float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``E[x_0 | x_t = x]``, float64, of x's shape; ``class_labels`` (N,) conditions on components."""
        labels = None if class_labels is None else class_labels.to("cpu", torch.int64)
        return self.mixture.posterior_mean(_flat(x), alpha, sigma, labels).reshape(x.shape)

    def score(self, x: torch.Tensor, alpha: float, sigma: float, class_labels: Any = None) -> torch.Tensor:
        """``grad log p_t(x) = (alpha E[x_0|x] - x)/sigma^2`` (Tweedie), float64, of x's shape; sigma > 0."""
        return (alpha * self.posterior_mean(x, alpha, sigma, class_labels) - x.double().cpu()) / sigma**2

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """``n`` exact samples of the data, (n, C, H, W), float64."""
        return self.mixture.sample(n, generator).reshape(n, *self.sample_shape)

    def tilted(self, direction: torch.Tensor, beta: float = 1.0) -> GaussianMixtureModel:
        """The mixture proportional to ``p(x) exp(beta direction . x)``, with this model's shape and process."""
        return self._like(self.mixture.tilted(beta * direction.double().reshape(-1)))

    def posterior(self, operator: torch.Tensor, observation: torch.Tensor, noise_std: float) -> GaussianMixtureModel:
        """The mixture ``p(x | y)`` for ``y = H x + noise_std n``, with this model's shape and process."""
        return self._like(self.mixture.posterior(operator.double(), observation.double().reshape(-1), noise_std))

    def _like(self, mixture: GaussianMixture) -> GaussianMixtureModel:
        lists = (v.tolist() for v in (mixture.weights, mixture.means, mixture.covariances))
        channels, *size = self.sample_shape
        return GaussianMixtureModel(*lists, in_channels=channels, sample_size=size, process=dict(self._process))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The exact prediction.

        Args:
            sample: states (N, C, H, W), any dtype.
            timestep: one number, or one per sample.
            class_labels: None, one, or one per sample.
            return_dict: False for a tuple.

        Returns:
            The prediction of the process's type, of sample's shape and dtype.

        Raises:
            ValueError: for samples of another shape and labels that do not exist.
        """
        components = len(self.mixture)
        if math.prod(sample.shape[1:]) != self.mixture.dimension:
            raise ValueError(
                f"samples have shape {tuple(sample.shape[1:])}, this mixture lives on {self.sample_shape}."
            )
        times = torch.as_tensor(timestep).double().cpu().reshape(-1)
        labels = None if class_labels is None else class_labels.cpu().reshape(-1)
        if labels is not None:
            if len(labels) not in (1, len(sample)) or not bool(((labels >= 0) & (labels <= components)).all()):
                raise ValueError(f"class_labels must be one or {len(sample)} numbers from 0 to {components} (none).")
            labels = labels.expand(len(sample))
        if len(times) > 1 and bool((times != times[0]).any()):
            out = torch.empty_like(sample)
            for t in times.unique():
                at = times == t
                there = None if labels is None else labels[at]
                out[at] = self(sample[at], t, there, return_dict=False)[0]
        else:
            alpha, sigma = (float(v) for v in self.path.alpha_sigma(float(times[0])))
            kind, x = self._process["prediction_type"], sample.double().cpu()
            if sigma > 0:
                k_x, k_d = to_model(self.path, kind, alpha, sigma)
                out = k_x * x + k_d * self.posterior_mean(x, alpha, sigma, labels)
            else:  # D = x/alpha; the noise is not seen: its mean is 0
                out = model_coefficients(self.path, kind, alpha, sigma)[0] * x / alpha
            out = out.to(sample.device, sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.double().cpu().reshape(len(x), -1)
