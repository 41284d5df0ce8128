"""DPM-Solver in its published variants, with exact weights: which table each algorithm_type is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers_sde.configs import scheduler_init
from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.base import TableScheduler
from diffusers_sde.tables import Table, build_multistep, build_singlestep, check_solver

# algorithm_type -> (data_std, tau): noise or data prediction, ODE or SDE
ALGORITHMS = {
    "dpmsolver": (math.inf, 0.0),
    "dpmsolver++": (0.0, 0.0),
    "sde-dpmsolver": (math.inf, 1.0),
    "sde-dpmsolver++": (0.0, 1.0),
    "noise_prediction": (math.inf, 0.0),  # the names of SASolverScheduler
    "data_prediction": (0.0, 0.0),
}
SOLVER_TYPES = ("exact", "midpoint", "heun")


class DPMSolverScheduler(TableScheduler):
    r"""DPM-Solver (Lu et al. 2022, arXiv:2206.00927) and DPM-Solver++ (arXiv:2211.01095), ODE and SDE.

    ``dpmsolver`` integrates ``x_t = alpha_t/alpha_s x_s - alpha_t Int e^-lambda eps dlambda``, ``dpmsolver++``
    ``x_t = sigma_t/sigma_s x_s + sigma_t Int e^lambda D dlambda``; the sde variants are the same with tau = 1.

    Args:
        solver_order: 1 to 3.
        algorithm_type: dpmsolver, dpmsolver++, sde-dpmsolver or sde-dpmsolver++.
        solver_type: heun (diffusers' name for the exact integral of the interpolating line; exact is accepted and kept
            as heun), or midpoint (the published default of order 2).  Order 3 always has exact weights.
        singlestep: restart each step from its anchor instead of keeping a history.
        trust: as in :class:`ProbabilityFlowScheduler`; the published methods have none.
        noise_seed: as in :class:`ReverseSDEScheduler`.
        kwargs: process, grid and data options, see :data:`diffusers_sde.configs.TABLE`.
    """

    _own_keys = ("solver_order", "algorithm_type", "solver_type", "singlestep", "trust", "noise_seed")

    @scheduler_init
    def __init__(
        self,
        solver_order: int = 2,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "heun",
        singlestep: bool = False,
        trust: bool = False,
        noise_seed: int | None = None,
    ):
        if solver_type == "exact":  # the name that diffusers' classes accept for the same weights
            self.register_to_config(solver_type="heun")
        self._setup()

    def _check(self) -> None:
        super()._check()
        c = self.config
        check_solver(c.solver_order, orders=(1, 2, 3))
        if c.algorithm_type not in ALGORITHMS:
            raise ValueError(f"algorithm_type {c.algorithm_type!r} is unknown: use one of {', '.join(ALGORITHMS)}.")
        if c.solver_type not in SOLVER_TYPES:
            raise ValueError(f"solver_type {c.solver_type!r} is unknown: use exact, midpoint or heun.")

    @classmethod
    def _inherits(cls, config: Mapping[str, Any], key: str, ours: bool) -> bool:
        algorithm, rule = config.get("algorithm_type") in ALGORITHMS, config.get("solver_type", "exact") in SOLVER_TYPES
        return {"algorithm_type": algorithm, "solver_type": rule}.get(key, True) if ours else algorithm and rule

    @property
    def stochastic(self) -> bool:
        return ALGORITHMS[self.config.algorithm_type][1] > 0

    def _taus(self, nodes: Nodes) -> list[float]:
        return [ALGORITHMS[self.config.algorithm_type][1]] * (len(nodes) - 1)

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        c = self.config
        data_std, _ = ALGORITHMS[c.algorithm_type]
        rule = "midpoint" if c.solver_type == "midpoint" and c.solver_order == 2 else "exact"
        if c.singlestep and c.solver_order > 1:
            method = f"grid{c.solver_order}"
            return build_singlestep(path, nodes, method=method, data_std=data_std, tau=tau, rule=rule)
        return build_multistep(path, nodes, order=c.solver_order, data_std=data_std, tau=tau, rule=rule)
