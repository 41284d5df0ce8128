"""The flow map scheduler, for few-step networks that jump: which table it builds, which target time it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffusers_sde.configs import scheduler_init
from diffusers_sde.flow_maps import build_flow_map, gamma_targets
from diffusers_sde.grids import Nodes
from diffusers_sde.named_grids import distilled, karras, make_grid
from diffusers_sde.paths import Path, VarianceExploding
from diffusers_sde.schedulers.base import TableScheduler
from diffusers_sde.stock_configs import FLOW_MAP_CLASSES, class_name
from diffusers_sde.tables import Table

FLOW_MAPS = ("consistency", "mean_flow")


class FlowMapScheduler(TableScheduler):
    r"""Few-step sampling with flow map networks: jump along the ODE, re-noise by gamma, jump again (CTM, Kim et al.
    2023, arXiv:2310.02279, algorithm 3; the formulas are in :mod:`diffusers_sde.flow_maps`).

    Args:
        flow_map: ``consistency`` for networks that know one target, clean data (consistency models, LCM; with
            gamma < 1 trajectory-consistent ones as TCD); ``mean_flow`` for networks that are also told the target time,
            ``network(sample, timestep, target_timestep=scheduler.target_timestep(timestep))``.
        gamma: 1 jumps to clean data and re-noises fully (consistency multistep), 0 jumps deterministically to the next
            level; None: 1 for consistency, 0 for mean_flow.
        noise_seed: as in :class:`ReverseSDEScheduler`.
        kwargs: process, grid and data options, see :data:`diffusers_sde.configs.TABLE`; with no
            grid the steps are equal in time (``trailing``), Karras' for variance exploding models.
            ``final_sigmas_type="sigma_min"`` ends at the cleanest training time, where a consistency function is
            trained to arrive; ``zero`` goes the rest of that jump, to clean data.
    """

    _own_keys = ("flow_map", "gamma", "noise_seed")
    _flow_maps = True

    @scheduler_init
    def __init__(self, flow_map: str = "consistency", gamma: float | None = None, noise_seed: int | None = None):
        self._setup()

    def _check(self) -> None:
        super()._check()
        flow_map, gamma = self.config.flow_map, self.config.gamma
        if flow_map not in FLOW_MAPS:
            raise ValueError(f"flow_map {flow_map!r} is unknown: use {' or '.join(FLOW_MAPS)}.")
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie between 0 (deterministic jumps) and 1 (consistency), not {gamma}.")

    @classmethod
    def _solver_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A stock flow map scheduler says by its class whether its network is told the target time."""
        kind = FLOW_MAP_CLASSES.get(class_name(config))
        return {**({"flow_map": kind} if kind else {}), **super()._solver_settings(config)}

    @property
    def gamma(self) -> float:
        """The config's ``gamma`` or its default."""
        c = self.config
        return (1.0 if c.flow_map == "consistency" else 0.0) if c.gamma is None else float(c.gamma)

    def target_timestep(self, timestep: Any) -> torch.Tensor:
        """The time that the step at ``timestep`` jumps to, a 0-dimensional float32 tensor on the device of
        ``timesteps``: what a mean flow network is told."""
        run, row = self._located(timestep, None)
        target = gamma_targets(self.path, self._nodes(run.layout), self.gamma).time[row]
        return torch.full((), float(target), dtype=torch.float32, device=self.timesteps.device)

    @property
    def stochastic(self) -> bool:
        return self.gamma > 0

    def _taus(self, nodes: Nodes) -> list[float]:
        return [float(self.stochastic)] * (len(nodes) - 1)

    def _default_grid(self, path: Path, n: int, mu: float | None, start: float = 1.0) -> np.ndarray:
        original = self.config.get("original_inference_steps")  # of a latent consistency model
        if original is not None and int(original * start) >= n:
            return distilled(path, n, original, start)
        whole = round(n / start)
        if isinstance(path, VarianceExploding):  # the last node of its grids is where the last jump ends
            return karras(path, whole + 1)[whole - n : whole]
        return make_grid(path, "trailing", whole, mu=mu)[whole - n :]

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        return build_flow_map(path, nodes, self.gamma)
