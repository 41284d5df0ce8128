"""The scheduler of learned tables: which table and grid a number of steps has, and for which process they hold.

Knows when a calibration applies.  Knows nothing of how it is written in a config
(:mod:`diffusers_sde.schedulers.calibration_format` does) or how it was made (:mod:`diffusers_sde.calibration` does).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusers_sde.configs import family_of, process_keys, process_value, scheduler_init
from diffusers_sde.defaults import standard_table
from diffusers_sde.grids import Nodes, distinct_integers
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.base import TableScheduler
from diffusers_sde.schedulers.calibration_format import check_format, entry_nodes, entry_table
from diffusers_sde.stock_configs import canonical_config
from diffusers_sde.tables import Table


def process_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for a learned table to apply: the path, and what the network says of it."""
    values = canonical_config(config)
    keys = process_keys(family_of(values), path=True)
    if values.get("trained_betas") is not None:
        keys = tuple(k for k in keys if k not in ("beta_start", "beta_end", "beta_schedule"))
    return {key: process_value(values, key) for key in keys}


class CalibratedScheduler(TableScheduler):
    r"""Sampling with tables learned for one model by :func:`diffusers_sde.calibrate`: ``x <- a x + sum_j b_j F_j`` with
    fitted ``a``, ``b`` and times, one table for each calibrated number of steps, several in one config.

    A number of steps that was not calibrated gets the exact solver (``ProbabilityFlowScheduler``'s defaults) on the
    learned grid interpolated to it, and a warning; so does a grid of the user's own.  A run that starts inside the grid
    (image-to-image) has no history for learned rows and gets exact rows on the rest of the grid.

    Args:
        calibration: what ``calibrate`` found: the version of its format, the process it holds for, ``data_std``, and
            for each number of steps nodes, rows (None: the exact solver was better), tau (stochastic calibrations) and
            measured errors.
        noise_seed: seed of the Brownian path of a stochastic calibration; None: a hash of the latents.
        kwargs: process and data options, see :data:`diffusers_sde.configs.TABLE`.

    Raises:
        ValueError: without a calibration, for one in a newer or older format, for a process other than the calibrated
            one, with thresholding or clipping, and for a table that lost to the exact one on held-out noise.
    """

    _own_keys = ("calibration", "noise_seed")

    @scheduler_init
    def __init__(self, calibration: dict[str, Any] | None = None, noise_seed: int | None = None):
        if calibration:
            check_format(calibration)
        if not calibration or not calibration["tables"]:
            raise ValueError(
                "A CalibratedScheduler needs a calibration: make one with diffusers_sde.calibrate, load one with "
                "from_pretrained, or pass another's config.calibration."
            )
        self._setup()

    def _check(self) -> None:
        """Raise ``ValueError`` unless the calibration holds for the current config."""
        super()._check()
        config, tables = self.config, self.config.calibration["tables"]
        self.check_process(config)
        if config.thresholding or config.clip_sample:
            raise ValueError("Learned tables are linear: they cannot be used with thresholding or clip_sample.")
        for n, entry in tables.items():
            errors = entry["errors"]
            learned = entry["rows"] is not None or entry["tau"] is not None
            if learned and not errors["held_out"] <= errors["exact"]:
                raise ValueError(
                    f"The table for {n} steps is worse than the exact solver on held-out noise: calibrate again."
                )
            if len(entry["time"]) != int(n) + 1:
                raise ValueError(f"The table for {n} steps has {len(entry['time']) - 1} of them.")

    def check_process(self, config: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless a model with this scheduler config has the calibrated process: path (betas,
        shift, EDM range) and prediction type."""
        mine, other = self.config.calibration["process"], process_values(config)
        differing = [k for k in {**mine, **other} if mine.get(k) != other.get(k)]
        if differing:
            differences = ", ".join(f"{k} is {other.get(k)}, was {mine.get(k)}" for k in differing)
            raise ValueError(
                f"This scheduler was calibrated for another process ({differences}): calibrate it for this model."
            )

    @property
    def errors(self) -> dict[int, dict[str, Any]]:
        """What was measured at each calibrated number of steps, root mean square distances to the converged solution
        in units of a sample (energy distances for a stochastic calibration): ``training``, and on held-out noise
        ``held_out``, ``exact`` (the exact solver with its own grid), ``lost`` (the learned table, where it was worse
        than that), and ``stock`` and ``stock_name`` where stock samplers were compared."""
        return {int(n): dict(entry["errors"]) for n, entry in self.config.calibration["tables"].items()}

    @property
    def stochastic(self) -> bool:
        return bool(self.config.calibration["stochastic"])

    @property
    def _doubts(self) -> bool:
        return True  # the exact solver's rows have a gap, learned ones none

    def _entry(self, n: int) -> Mapping[str, Any] | None:
        return self.config.calibration["tables"].get(str(n))

    # -- layout --

    def _asks_for_a_grid(self, path: Path, sigmas: Any) -> bool:
        return not self._is_habit(path, sigmas)

    def _user_nodes(self, path: Path, timesteps: Any, sigmas: Any, mu: float | None) -> Nodes:
        warnings.warn("This grid was not calibrated: the exact solver runs on it.", stacklevel=3)
        return super()._user_nodes(path, timesteps, sigmas, mu)

    def _own_nodes(self, path: Path, n: int, mu: float | None) -> tuple[Nodes, tuple[int, float | None] | None]:
        entry = self._entry(n)
        if entry is not None:
            return entry_nodes(entry), (n, mu)
        known = sorted(int(k) for k in self.config.calibration["tables"])
        warnings.warn(
            f"{n} steps were not calibrated (only {', '.join(map(str, known))}): the exact solver runs on the "
            "interpolated grid.",
            stacklevel=3,
        )
        return self._interpolated(n, min(known, key=lambda k: (abs(math.log(k / n)), k))), (n, mu)

    def _interpolated(self, n: int, known: int) -> Nodes:
        """The levels of the grid for ``known`` steps at ``n`` equal parts of its index, in the network's time."""
        path, learned = self.path, entry_nodes(self.config.calibration["tables"][str(known)])
        times = path.time(learned.log_snr[:-1])
        ends = np.append(times, path.cleanest)
        at = np.interp(np.arange(n) * known / n, np.arange(known + 1), ends)
        if self.config.round_timesteps:
            at = distinct_integers(at)
        alpha, sigma = path.alpha_sigma(at)
        return Nodes(np.append(at, learned.time[-1]), np.append(alpha, 1.0), np.append(sigma, 0.0))

    def _taus(self, nodes: Nodes) -> list[float]:
        if not self.stochastic:
            return super()._taus(nodes)
        entry = self._entry(len(nodes) - 1)
        if entry is not None and entry["tau"] is not None and _same(nodes, entry_nodes(entry)):
            return list(entry["tau"])
        return [1.0] * (len(nodes) - 1)

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        entry = self._entry(len(nodes) - 1)
        if entry is not None and entry["rows"] is not None and _same(nodes, entry_nodes(entry)):
            table = entry_table(entry, self.config.calibration["data_std"])
            assert table is not None
            return table
        return standard_table(path, nodes, tau if self.stochastic else None)


def _same(nodes: Nodes, learned: Nodes) -> bool:
    return bool(np.array_equal(nodes.alpha, learned.alpha) and np.array_equal(nodes.sigma, learned.sigma))
