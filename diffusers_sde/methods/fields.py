"""A network as a field: what it predicts at any point of its process, in any parameterisation.

Knows how to ask a network (its time, its input scale, its precision, its learned variance) at a given ``alpha, sigma``
and how to turn the answer into ``A E[x_0|x] + B E[eps|x]``.  Knows nothing of grids, solvers or pipelines: likelihood,
inversion and posterior sampling integrate fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde.configs import canonical_config
from diffusers_sde.paths import Path, path_from_config
from diffusers_sde.prediction import DATA, from_model
from diffusers_sde.sampling import Denoiser, network_denoiser
from diffusers_sde.schedulers.data_prediction import split_variance
from diffusers_sde.weights import Point


@dataclass(frozen=True)
class Field:
    """``denoiser(sample, timestep)`` on its process.

    ``dtype`` is what the network computes in; states may have any other, and keep it.
    """

    denoiser: Denoiser
    path: Path
    prediction_type: str
    variance_type: str = "fixed_small"
    dtype: torch.dtype = torch.float32

    def coefficients(self, point: Point, target: tuple[float, float] = DATA) -> tuple[float, float]:
        """``(k_x, k_m)`` with ``A x_0 + B eps = k_x x + k_m m`` for the network's output m; ``target = (A, B)``.

        Raises ``ValueError`` where the network's prediction says nothing about the target (epsilon at alpha = 0).
        """
        return from_model(self.path, self.prediction_type, point.alpha, point.sigma, target)

    def output(self, x: torch.Tensor, point: Point) -> torch.Tensor:
        """The network's output m at the state x (N, C, H, W), in x's dtype."""
        scale = self.path.input_scale(point.sigma)
        scaled = x if scale == 1.0 else x * scale
        out = self.denoiser(scaled.to(self.dtype), float(self.path.time(point.log_snr)))
        if out.shape != x.shape:
            out = split_variance(out, x, self.variance_type)
        return out.to(x.dtype)

    def __call__(self, x: torch.Tensor, point: Point, target: tuple[float, float] = DATA) -> torch.Tensor:
        """``A E[x_0|x] + B E[eps|x]`` at ``point``, of x's shape and dtype; the default target is ``E[x_0|x]``."""
        k_x, k_m = self.coefficients(point, target)
        return torch.mul(self.output(x, point), k_m).add_(x, alpha=k_x)


def network_field(
    network: torch.nn.Module,
    config: Mapping[str, Any],
    class_labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Field:
    """The field of a ``UNet2DModel``-like network under the process of any scheduler's ``config``, ours or diffusers',
    with labels (N,) and classifier-free guidance as in :func:`diffusers_sde.sampling.network_denoiser`; a batch of k N
    states is taken for k copies of the batch.

    Raises ``ValueError`` for a config without a process, for labels that the network does not have, and for guidance
    without classes.
    """
    process = canonical_config(config)
    denoiser = network_denoiser(network, class_labels, guidance_scale)

    def repeated(sample: torch.Tensor, t: Any) -> torch.Tensor:
        copies = 1 if class_labels is None else len(sample) // len(class_labels)
        if class_labels is None or copies == 1:
            return denoiser(sample, t)
        return network_denoiser(network, class_labels.repeat(copies), guidance_scale)(sample, t)

    return Field(
        repeated,
        path_from_config(process),
        process.get("prediction_type") or "epsilon",
        process.get("variance_type") or "fixed_small",
        network.dtype,
    )
