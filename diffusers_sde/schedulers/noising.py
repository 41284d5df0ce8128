"""The forward process on tensors: ``alphas_cumprod``, ``add_noise``, ``scale_noise``, ``get_velocity``.

Knows where a pipeline stands in a run and how to evaluate a path at times that live on a device without bringing them
to the host.  Knows nothing of solvers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffusers_sde.grids import Nodes
from diffusers_sde.paths import FlowMatching, Path, VarianceExploding, VariancePreserving
from diffusers_sde.schedulers.state import PerThread, Run


class Noising:
    """What a scheduler offers to training scripts and image-to-image pipelines."""

    _runs: PerThread

    @property
    def path(self) -> Path:
        raise NotImplementedError

    def _nodes(self, run: Run) -> Nodes:
        raise NotImplementedError

    # -- the discrete schedule that training scripts read --

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        path = self.path
        if not isinstance(path, VariancePreserving):
            raise AttributeError("alphas_cumprod exists for variance preserving processes only.")
        return torch.from_numpy(path.alphas_cumprod).float()

    @property
    def alphas(self) -> torch.Tensor:
        abar = self.path.alphas_cumprod if isinstance(self.path, VariancePreserving) else None
        if abar is None:
            raise AttributeError("alphas exists for variance preserving processes only.")
        return torch.from_numpy(np.append(abar[0], abar[1:] / abar[:-1])).float()

    @property
    def betas(self) -> torch.Tensor:
        return 1 - self.alphas

    @property
    def final_alpha_cumprod(self) -> torch.Tensor:
        return torch.tensor(1.0)

    # -- noising --

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        """``alpha x_0 + sigma eps`` at the row a pipeline stands at (``step_index`` once stepping, else
        ``begin_index``), else at ``timesteps`` (a number, or a tensor of one time per sample)."""
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """:meth:`add_noise` in the argument order of the flow matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        """The v-prediction target ``alpha eps - sigma x_0``."""
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return alpha * noise - sigma * sample

    def _alpha_sigma(self, timesteps: Any, like: torch.Tensor) -> tuple[Any, Any]:
        run = self._runs.get()
        if run is not None and run.begin_index is not None:
            index = run.begin_index if run.step_index is None else min(run.step_index, len(run.timesteps))
            nodes = self._nodes(run)
            return float(nodes.alpha[index]), float(nodes.sigma[index])
        t = timesteps if isinstance(timesteps, torch.Tensor) else torch.as_tensor(timesteps)
        if t.device.type == "cpu":
            times = t.double().numpy().reshape(-1)
            alpha, sigma = self.path.alpha_sigma(times)
            if run is not None:  # on the grid the run's own levels count: sigmas may have been given or written
                nodes = self._nodes(run)
                for j, time in enumerate(times):
                    hit = np.flatnonzero(np.abs(nodes.time[:-1] - time) <= 1e-6 * max(abs(time), 1e-3))
                    if len(hit):
                        alpha[j], sigma[j] = nodes.alpha[hit[0]], nodes.sigma[hit[0]]
            pair = (torch.from_numpy(np.asarray(v)).to(like.device, like.dtype) for v in (alpha, sigma))
        else:
            pair = (v.to(like.device, like.dtype) for v in _alpha_sigma_on_device(self.path, t.flatten()))
        alpha_t, sigma_t = (v.reshape(-1, *[1] * (like.ndim - 1)) for v in pair)
        return alpha_t, sigma_t


def _alpha_sigma_on_device(path: Path, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``path.alpha_sigma`` for times that live on an accelerator, without bringing them to the host."""
    t = t.float()
    if isinstance(path, FlowMatching):
        sigma = t / path.scale
        return (sigma, 1 - sigma) if path.inverted else (1 - sigma, sigma)
    if isinstance(path, VarianceExploding):
        sigma = torch.exp(4 * t) if path.noise_conditioning == "log" else torch.tan(t * (np.pi / 2))
        return torch.ones_like(sigma), sigma
    assert isinstance(path, VariancePreserving)
    # linear in the angle between integers: equal to the host's rule at integers, within 1e-6 of it elsewhere
    angle = torch.from_numpy(np.arccos(np.sqrt(path.alphas_cumprod))).float().to(t.device, non_blocking=True)
    low = t.floor().clamp(0, len(angle) - 2).long()
    at = torch.lerp(angle[low], angle[low + 1], t - low)
    return at.cos(), at.sin()
