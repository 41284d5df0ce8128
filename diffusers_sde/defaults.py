"""The measured defaults: grid, clock and data scale where a config names none, and the table they make.

Knows figures from the benchmark, one set for each family of paths, and the config keys of a multistep solver.  The
figures are errors to the exact ODE solution relative to the best of all diffusers schedulers and grids at each number
of evaluations (README, "How the defaults were chosen", says on what and with which command).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.tables import Table, build_multistep, check_solver


@dataclass(frozen=True)
class Defaults:
    """``grid``, its exponent ``rho`` and, for balanced, its ``share`` of time; ``clock`` and ``data_std`` of the
    table."""

    grid: str
    rho: float
    clock: str
    data_std: float
    share: float | None = None

    @property
    def options(self) -> dict[str, float | None]:
        """Of the grid's function."""
        return {"rho": self.rho, "share": self.share}


_CLEAN = 40.0  # half log-SNR: there is no step between it and infinity
# The law of each family's grid in n, the number of evaluations: smooth, so that one step more is no other sampler.
_Law = Callable[[int], dict[str, Any]]
_ODE: dict[str, _Law] = {
    "variance preserving": lambda n: {"grid": "balanced", "rho": 1.1, "share": min(max(0.45 + 1.7 / n, 0.5), 1.0)},
    "flow matching": lambda n: {"grid": "power", "rho": max(1.3 - 1 / n, 1.0)},
    "EDM": lambda n: {"grid": "noise_fraction", "rho": max(2 - 2.5 / n, 1.0)},
}
_SDE: dict[str, _Law] = {
    "variance preserving": lambda n: {"grid": "power", "rho": 1.5 if n < 12 else 2.0},
    "flow matching": lambda n: {"grid": "power", "rho": 1.5 if n < 12 else 2.0},
}


def _robust(n: int) -> dict[str, Any]:
    """Of a family that was not measured."""
    return {"grid": "balanced", "rho": 1.0}


def measured_defaults(path: Path, n: int, stochastic: bool = False) -> Defaults:
    """Defaults for ``n`` evaluations with a solver of order 2 or more.

    ODE, variance preserving: a mean of time and log-SNR, more of time the fewer steps there are.  Flow matching: nearly
    equal steps of noise; the angle clock stays finite at alpha = 0, so that the first steps keep their order.  Variance
    exploding: the same steps in the fraction of noise; the data scale is known.

    SDE: data_std 0 and tau 1.  A positive data_std is exact for data of that scale, but the noise it draws at low noise
    levels is more than data concentrated on images absorb: the embedded network's pictures at 10 steps were visibly
    speckled from data_std 0.1 on.

    Args:
        path: the forward process.
        n: evaluations.
        stochastic: of the reverse SDE, not of the ODE.

    Returns:
        :class:`Defaults`.
    """
    law = (_SDE if stochastic else _ODE).get(path.family, _robust)
    return Defaults(clock=path.default_clock, data_std=0.0 if stochastic else path.data_scale, **law(n))


def falling_noise_levels(path: Path, nodes: Nodes) -> list[float]:
    """Noise levels of the reverse SDE that fall with the noise, tau of each step: ``sigma / sqrt(data_scale^2 alpha^2 +
    sigma^2)`` half-way in log-SNR; on a variance preserving path sigma itself, on EDM's the data scale is sigma_data.

    Full noise while the state is noise, none where it is data and a step's error would stay in the picture.  Sliced
    Wasserstein on the 36-dimensional mixture (floor .027 +- .002) at 6, 10, 20 evaluations: .040, .027, .028; constant
    tau = 1: .048, .045, .037.  It is not the default: posterior samples were farther from the exact ones, and the
    pictures of the embedded network no better (Frechet distance of 120 at 10 evaluations .52 against .46, at 20 .57
    against .44, each +- .1).

    Args:
        path: the forward process.
        nodes: of the grid.

    Returns:
        One number from 0 to 1 a step, falling.
    """
    log_snr = np.clip(nodes.log_snr, -_CLEAN, _CLEAN)
    middle = 0.5 * (log_snr[:-1] + log_snr[1:]) + math.log(path.data_scale)
    return (1 / np.sqrt(1 + np.exp(2 * middle))).tolist()


def check_multistep(config: Any, orders: Sequence[int] = (1, 2, 3, 4)) -> None:
    """Raise ``ValueError`` where :func:`multistep_table` could not use a config; ``orders``: those that exist."""
    data_std, clock, final = config.data_std or 0.0, config.clock or "log_snr", config.final or "denoise"
    check_solver(config.solver_order, data_std, clock, final=final, orders=orders)


def multistep_table(
    config: Any, path: Path, nodes: Nodes, *, tau: list[float], final: str, stochastic: bool = False
) -> Table:
    """The table of a config's ``solver_order``, ``corrector``, ``data_std`` and ``clock``, with the measured defaults
    for those that are None; at order 1 the published methods (data_std 0, no corrector): DDIM and DDPM.

    Args:
        config: with these four attributes.
        path: the forward process.
        nodes: of the grid.
        tau: one noise level a step.
        final: the step to sigma = 0, see :func:`diffusers_sde.tables.build_multistep`.
        stochastic: whose measured defaults.

    Returns:
        One row an evaluation.
    """
    default, first = measured_defaults(path, len(nodes) - 1, stochastic), config.solver_order == 1
    standard = 0.0 if first else default.data_std
    return build_multistep(
        path,
        nodes,
        order=config.solver_order,
        corrector=not first if config.corrector is None else config.corrector,
        data_std=standard if config.data_std is None else config.data_std,
        clock=config.clock or default.clock,
        tau=tau,
        final=final,
    )


_STANDARD = SimpleNamespace(solver_order=2, corrector=None, data_std=None, clock=None)


def standard_table(path: Path, nodes: Nodes, tau: list[float] | None = None) -> Table:
    """The exact table with the measured defaults at order 2, its last row to clean data corrected: what a learned table
    must beat, and what it is a correction of.

    Args:
        path: the forward process.
        nodes: of the grid.
        tau: one noise level a step of the reverse SDE; None: the ODE.

    Returns:
        One row an evaluation.
    """
    stochastic = tau is not None
    levels = [0.0] * (len(nodes) - 1) if tau is None else tau
    return multistep_table(_STANDARD, path, nodes, tau=levels, final="corrected", stochastic=stochastic)
