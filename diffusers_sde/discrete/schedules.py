"""How fast tokens are noised: ``alpha(t)``, the probability that a token has survived until time t in [0, 1].

Knows the schedules and their inverses, on float64 numbers of the host.  A schedule is a choice of clock and no more:
every process with the same noise has the same bridges and the same bound in alpha (:mod:`.bounds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_LEAST, _MOST = 1e-4, 20.0  # total noise at both ends of the geometric schedule


@dataclass(frozen=True)
class NoiseSchedule:
    """``alpha(t)``, falling from 1 (or nearly 1) at t = 0 to 0 (or nearly 0) at t = 1.

    Args:
        alpha: survival probability of times.
        slope: ``alpha'(t)``, negative.
        time: the inverse of ``alpha``.
    """

    alpha: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    time: Callable[[Any], Any]

    def rate(self, t: Any) -> Any:
        """``-d log alpha/dt``, the rate at which a token is replaced by noise; infinite where alpha is 0."""
        with np.errstate(divide="ignore"):
            return -self.slope(t) / np.asarray(self.alpha(t))


def _total(t: Any) -> Any:
    return _LEAST ** (1 - np.asarray(t, float)) * _MOST ** np.asarray(t, float)


#: linear ``1 - t``; cosine ``1 - sin(pi t/2)`` (Chang et al. 2022, arXiv:2202.04200); square ``1 - t^2``; geometric
#: ``exp(-1e-4^(1-t) 20^t)``, which has no sharp ends (Lou et al. 2023, arXiv:2310.16834).
SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": NoiseSchedule(
        lambda t: 1 - np.asarray(t, float),
        lambda t: -np.ones_like(np.asarray(t, float)),
        lambda a: 1 - np.asarray(a, float),
    ),
    "cosine": NoiseSchedule(
        lambda t: 1 - np.sin(np.pi / 2 * np.asarray(t, float)),
        lambda t: -np.pi / 2 * np.cos(np.pi / 2 * np.asarray(t, float)),
        lambda a: 2 / np.pi * np.arcsin(1 - np.asarray(a, float)),
    ),
    "square": NoiseSchedule(
        lambda t: 1 - np.asarray(t, float) ** 2,
        lambda t: -2 * np.asarray(t, float),
        lambda a: np.sqrt(1 - np.asarray(a, float)),
    ),
    "geometric": NoiseSchedule(
        lambda t: np.exp(-_total(t)),
        lambda t: -np.exp(-_total(t)) * _total(t) * math.log(_MOST / _LEAST),
        lambda a: np.log(-np.log(np.asarray(a, float)) / _LEAST) / math.log(_MOST / _LEAST),
    ),
}


def noise_schedule(name: str) -> NoiseSchedule:
    """The schedule of this name, one of :data:`SCHEDULES`.

    Raises:
        ValueError: for any other.
    """
    if name not in SCHEDULES:
        raise ValueError(f"noise_schedule {name!r} is unknown: use one of {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]
