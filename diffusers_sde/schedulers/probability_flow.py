"""The probability-flow ODE scheduler: which table it builds, and with which measured defaults."""

from __future__ import annotations

from diffusers_sde.configs import scheduler_init
from diffusers_sde.defaults import check_multistep, multistep_table
from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.base import TableScheduler
from diffusers_sde.tables import Table


class ProbabilityFlowScheduler(TableScheduler):
    r"""Deterministic sampling: the probability-flow ODE ``dx = [f x - g^2/2 score] dt`` (Song et al. 2021,
    arXiv:2011.13456, eq. 13), linear part exact, Adams-Bashforth in the nonlinear part (the formula is in
    :mod:`diffusers_sde.weights`).

    Args:
        solver_order: 1 (DDIM) to 4.
        corrector: redo each step with the next evaluation, one order more at no evaluation (UniC, arXiv:2302.04867);
            None: for orders of 2 and more.
        data_std: the data scale c of the exact part: 0 data prediction, inf noise prediction; None: 0 at order 1, else
            the measured default of the path (:mod:`diffusers_sde.defaults`).
        clock: coordinate of the extrapolation: log_snr, sigma, angle or time; None: the measured default.
        final: the step to sigma = 0: denoise, corrected, exact or second_order (:func:`build_multistep`); None:
            corrected, or denoise where the data prediction is limited.
        trust: follow corrections and extrapolations only as far as the run's own errors let it
            (:func:`diffusers_sde.extrapolation.trust`); False: the table as it is, which is linear in the evaluations.
        kwargs: process, grid and data options, see :data:`diffusers_sde.configs.TABLE`.
    """

    _own_keys = ("solver_order", "corrector", "data_std", "clock", "final", "trust")

    @scheduler_init
    def __init__(
        self,
        solver_order: int = 2,
        corrector: bool | None = None,
        data_std: float | None = None,
        clock: str | None = None,
        final: str | None = None,
        trust: bool = True,
    ):
        self._setup()

    def _check(self) -> None:
        super()._check()
        check_multistep(self.config)

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        return multistep_table(self.config, path, nodes, tau=tau, final=self._final)
