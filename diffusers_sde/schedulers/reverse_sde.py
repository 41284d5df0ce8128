"""The reverse SDE scheduler: which table it builds, the law of its noise, and its measured defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffusers_sde.configs import scheduler_init
from diffusers_sde.defaults import check_multistep, falling_noise_levels, multistep_table
from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.base import TableScheduler
from diffusers_sde.tables import Table, check_tau, eta_from_zero_snr, points_of, tau_from_eta
from diffusers_sde.weights import Point, linear_coefficients


class ReverseSDEScheduler(TableScheduler):
    r"""Stochastic sampling: ``dx = [f x - (1 + tau^2)/2 g^2 score] dt + tau g dw`` backwards in time (Fu & Wang,
    arXiv:2605.22586, section 3); every tau has the same marginals, tau = 0 is the ODE, tau = 1 the reverse SDE.

    The noise is a Brownian path: one seed gives the same picture at 10, 20 and 40 steps, for any batch size.

    Args:
        tau: noise level, a number or one per step; None: levels that fall from 1 to 0 with the noise
            (:func:`diffusers_sde.defaults.falling_noise_levels`), 1 at order 1.
        eta: DDIM's eta instead of tau (0 DDIM, 1 DDPM), None for tau.
        solver_order: 1 (DDPM) to 3, in the deterministic part.
        corrector: redo each step with the next evaluation and the same noise (SA-Solver, arXiv:2309.05019); None: for
            orders of 2 and more.
        data_std: the data scale of the exact part, which is exact in law for N(0, data_std^2) data at any number of
            steps; None: 0 at order 1, else the measured default of the path.
        clock: coordinate of the extrapolation: log_snr, sigma, angle or time; None: the measured default.
        final: the step to sigma = 0: denoise or corrected (no noise is left), exact or second_order; None: corrected,
            or denoise where the data prediction is limited.
        trust: as in :class:`ProbabilityFlowScheduler`.
        noise_seed: seed of the Brownian path where a pipeline passes no generator; None: a hash of the latents.
        kwargs: process, grid and data options, see :data:`diffusers_sde.configs.TABLE`.
    """

    _own_keys = ("tau", "eta", "solver_order", "corrector", "data_std", "clock", "final", "trust", "noise_seed")

    @scheduler_init
    def __init__(
        self,
        tau: float | Sequence[float] | None = 1.0,
        eta: float | None = None,
        solver_order: int = 2,
        corrector: bool | None = None,
        data_std: float | None = None,
        clock: str | None = None,
        final: str | None = None,
        trust: bool = True,
        noise_seed: int | None = None,
    ):
        self._setup()

    def _check(self) -> None:
        super()._check()
        check_multistep(self.config, orders=(1, 2, 3))
        check_tau(0.0 if self.config.tau is None else self.config.tau)
        if self.config.eta is not None and not 0 <= self.config.eta <= 1:
            raise ValueError(f"eta must lie between 0 (DDIM) and 1 (DDPM), not {self.config.eta}.")

    @property
    def stochastic(self) -> bool:
        return True

    def _taus(self, nodes: Nodes) -> list[float]:
        c, steps = self.config, len(nodes) - 1
        if c.eta is not None:
            return tau_from_eta(c.eta, nodes)
        if c.tau is None:
            return [1.0] * steps if c.solver_order == 1 else falling_noise_levels(self.path, nodes)
        if not isinstance(c.tau, list | tuple):
            return [float(c.tau)] * steps
        if len(c.tau) != steps:
            raise ValueError(f"tau has {len(c.tau)} values for {steps} steps: pass one number, or one a step.")
        return [float(x) for x in c.tau]

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        c = self.config
        table = multistep_table(c, path, nodes, tau=tau, final=self._final, stochastic=True)
        upper = c.variance_type == "fixed_large" and c.solver_order == 1 and not c.corrector and table.data_std == 0
        if upper:
            table = _upper_variance(table, nodes, tau)
        if c.eta is not None and nodes.alpha[0] == 0:
            table = eta_from_zero_snr(table, c.eta, points_of(nodes)[1], 1.0 if upper else table.data_std)
        return table


def _upper_variance(table: Table, nodes: Nodes, tau: list[float]) -> Table:
    """The variance of a step between states of unit normal data in place of a point's.  At tau = 1 on a variance
    preserving path it is DDPM's ``beta_t = 1 - (alpha_s/alpha_t)^2`` (Ho et al. 2020, section 3.2)."""
    rows = []
    for row, end, level in zip(table.rows, points_of(nodes)[1:], tau, strict=True):
        _, std = linear_coefficients(Point(row.alpha, row.sigma), end, 1.0, level)
        rows.append(replace(row, c=std if row.c else 0.0))
    return Table(tuple(rows), table.data_std)
