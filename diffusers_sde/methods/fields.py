"""A network as a field: what it predicts at any point of its forward process, in any parameterisation.

Knows how to call a network (its time, its input scale, its precision, its learned variance) at a given ``alpha, sigma``
and how to turn the answer into ``A E[x_0|x] + B E[eps|x]``.  Knows nothing of grids, solvers or pipelines: likelihood,
inversion and posterior sampling integrate fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde.configs import path_from_config
from diffusers_sde.paths import Path
from diffusers_sde.prediction import DATA, from_model, split_variance
from diffusers_sde.sampling import Denoiser, network_denoiser
from diffusers_sde.stock_configs import canonical_config
from diffusers_sde.weights import Point


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating point type of a device.

    Args:
        device: any.

    Returns:
        float64, or float32 where there is none (mps).
    """
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Field:
    """A network on its forward process.

    Args:
        denoiser: ``denoiser(scaled sample, timestep)`` of a batch (N, C, H, W); the answer may have 2C channels.
        path: the forward process.
        prediction_type: what the network returns, as in a scheduler's config.
        variance_type: the config's; outputs with learned variances are split.
        dtype: what the network computes in; states may have any other, and keep it.
    """

    denoiser: Denoiser
    path: Path
    prediction_type: str
    variance_type: str = "fixed_small"
    dtype: torch.dtype = torch.float32

    def coefficients(self, point: Point, target: tuple[float, float] = DATA) -> tuple[float, float]:
        """How the network's output m becomes another prediction: ``A x_0 + B eps = k_x x + k_m m``.

        Args:
            point: where.
            target: (A, B).

        Returns:
            (k_x, k_m).

        Raises:
            ValueError: where the network's prediction says nothing about the target (epsilon at alpha = 0).
        """
        return from_model(self.path, self.prediction_type, point.alpha, point.sigma, target)

    def output(self, x: torch.Tensor, point: Point, time: float | None = None) -> torch.Tensor:
        """The network's output m.

        Args:
            x: the state (N, C, H, W).
            point: its noise level.
            time: what the network is given for it; None: the path's time there.  A grid of a user's own, and a
                calibrated one, may evaluate a network at other times than the levels' own.

        Returns:
            m, of x's shape and dtype.

        Raises:
            ValueError: for an output of another shape without learned variances.
        """
        scale = self.path.input_scale(point.sigma)
        scaled = x if scale == 1.0 else x * scale
        if time is None:
            time = float(self.path.time(point.log_snr))
        # a tensor: UNet2DModel cuts a Python float down to an integer
        timestep = torch.tensor(time, dtype=wide_dtype(x.device), device=x.device)
        out = self.denoiser(scaled.to(self.dtype), timestep)
        if out.shape != x.shape:
            out = split_variance(out, x, self.variance_type)
        return out.to(x.dtype)

    def __call__(
        self, x: torch.Tensor, point: Point, target: tuple[float, float] = DATA, time: float | None = None
    ) -> torch.Tensor:
        """The prediction ``A E[x_0|x] + B E[eps|x]``, by default ``E[x_0|x]``.

        Args:
            x: the state (N, C, H, W).
            point: its noise level.
            target: (A, B).
            time: as in :meth:`output`.

        Returns:
            The prediction, of x's shape and dtype.

        Raises:
            ValueError: as :meth:`coefficients` and :meth:`output`.
        """
        k_x, k_m = self.coefficients(point, target)
        return torch.mul(self.output(x, point, time), k_m).add_(x, alpha=k_x)


def network_field(
    network: torch.nn.Module,
    config: Mapping[str, Any],
    class_labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Field:
    """The field of a network under the forward process of a scheduler's config.

    Args:
        network: a ``UNet2DModel``-like network or a mixture.
        config: of any scheduler, ours or diffusers'.
        class_labels: (N,) int64, on the network's device; a batch of k N states is taken for k copies of the batch.
            None: no class.
        guidance_scale: classifier-free guidance as in :func:`diffusers_sde.sampling.network_denoiser`.

    Returns:
        The field; it computes in the network's dtype.

    Raises:
        ValueError: for a config without a forward process, for a network that lacks the labels it needs, and for
            guidance without classes.
    """
    canonical = canonical_config(config)
    denoiser = network_denoiser(network, class_labels, guidance_scale)

    def repeated(sample: torch.Tensor, t: Any) -> torch.Tensor:
        copies = 1 if class_labels is None else len(sample) // len(class_labels)
        if class_labels is None or copies == 1:
            return denoiser(sample, t)
        return network_denoiser(network, class_labels.repeat(copies), guidance_scale)(sample, t)

    return Field(
        repeated,
        path_from_config(canonical),
        canonical.get("prediction_type") or "epsilon",
        canonical.get("variance_type") or "fixed_small",
        network.dtype,
    )
