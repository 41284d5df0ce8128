"""The scheduler of published samplers by name: which recipe it runs, and what its stages and its noise are to a run.

Knows no recipe's formula (:mod:`diffusers_sde.published` does) and no other spelling of a name
(:mod:`diffusers_sde.names` does).
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from diffusers_sde.configs import scheduler_init
from diffusers_sde.grids import Nodes
from diffusers_sde.named_grids import make_grid
from diffusers_sde.paths import Path
from diffusers_sde.published import RECIPES, Recipe, build_published, noise_levels, step_groups, with_stages
from diffusers_sde.schedulers.base import TableScheduler
from diffusers_sde.schedulers.compiled import Normals
from diffusers_sde.tables import Table, check_tau


class NamedScheduler(TableScheduler):
    r"""A published sampler, verbatim; :func:`diffusers_sde.sampler` finds it by any of its names, and
    ``diffusers-sde samplers`` lists formula, paper and names of each.

    ``num_inference_steps`` counts evaluations of the network.  A method with stages makes as many steps as fit: with
    two evaluations a step and one in the last step, to clean data, N steps are ``num_inference_steps=2 N - 1``, with
    three ``3 N - 2``; every evaluation has its own timestep.  ``timesteps=`` and ``sigmas=`` of ``set_timesteps`` name
    the steps, and stages come on top.

    Args:
        sampler: a key of :data:`diffusers_sde.published.RECIPES`.
        eta: the amount of noise of a stochastic sampler, as the tools' ``eta``; None: 1.
        noise_seed: seed of the Brownian path where a pipeline passes no generator; None: a hash of the latents.
        kwargs: process, grid and data options, see :data:`diffusers_sde.configs.TABLE`; with no grid an EDM
            model's ``sigma_schedule``, else steps that are equal in time (``trailing``).
    """

    _own_keys = ("sampler", "eta", "noise_seed")

    @scheduler_init
    def __init__(self, sampler: str = "dpmpp_2m", eta: float | None = None, noise_seed: int | None = None):
        self._setup()

    @property
    def _recipe(self) -> Recipe:
        return RECIPES[self.config.sampler]

    @property
    def _eta(self) -> float:
        return 1.0 if self.config.eta is None else float(self.config.eta)

    def _check(self) -> None:
        super()._check()
        name, eta = self.config.sampler, self.config.eta
        if name not in RECIPES:
            near = ", ".join(difflib.get_close_matches(str(name), RECIPES, 3, 0.0))
            raise ValueError(f"sampler {name!r} is unknown, the nearest are {near}: diffusers-sde samplers lists all.")
        if eta is None:
            return
        if not self._recipe.stochastic or self._recipe.noise == "extended":
            raise ValueError(f"{name} has no eta: leave it out.")
        if self._recipe.noise == "ancestral" and not 0 <= eta <= 1:
            raise ValueError(f"eta of {name} must lie between 0 (no noise) and 1, not {eta}.")
        check_tau(math.sqrt(eta) if self._recipe.noise == "sde" and eta > 0 else eta)

    @property
    def stochastic(self) -> bool:
        return self._recipe.stochastic and self._eta > 0

    # -- layout --

    def _asks_for_a_grid(self, path: Path, sigmas: Any) -> bool:
        return not self._is_habit(path, sigmas)

    def _default_grid(self, path: Path, n: int, mu: float | None, start: float = 1.0) -> np.ndarray:
        whole = round(n / start)
        return make_grid(path, self.config.sigma_schedule or "trailing", whole, mu=mu)[whole - n :]

    def _own_nodes(self, path: Path, n: int, mu: float | None) -> tuple[Nodes, tuple[int, float | None] | None]:
        return super()._own_nodes(path, n, mu)[0], None

    def _steps(self, evaluations: int) -> int:
        return self._recipe.steps(evaluations)

    def _evaluated(self, nodes: Nodes) -> Nodes:
        staged = with_stages(self.path, nodes, self._recipe, self._eta)
        if not self.config.round_timesteps or len(staged) == len(nodes):
            return staged
        return Nodes(np.append(np.round(staged.time[:-1]), staged.time[-1]), staged.alpha, staged.sigma)

    # -- the run --

    def _taus(self, nodes: Nodes) -> list[float]:
        return noise_levels(self.path, nodes, self._recipe, self._eta)

    def _normals(self, nodes: Nodes, tau: list[float], data_std: float) -> list[Normals]:
        """Those of the Brownian path of the reverse SDE; an ancestral step with stages draws at its end what the path
        has gathered since its beginning."""
        each = super()._normals(nodes, tau, 0.0)
        if self._recipe.noise != "ancestral":
            return each
        gathered = np.diff(np.exp(2 * np.minimum(nodes.log_snr, 20.0)))  # of the variance in units of s_t^4
        merged: list[Normals] = []
        for first, size in step_groups(self.path, nodes, self._recipe, self._eta):
            for last in range(first, first + size):
                parts = range(first, last + 1)
                total = sum(gathered[k] for k in parts)
                shares = {k: math.sqrt(gathered[k] / total) for k in parts if gathered[k] > 0}
                merged.append(tuple((node, shares[k] * w) for k in shares for node, w in each[k]))
        return merged

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        return build_published(path, nodes, self._recipe, taus=tau, eta=self._eta)
