"""The comparison with diffusers' samplers on held-out noise, for those who ask for it.

Knows the named samplers, and says of each one that is left out why.  Knows nothing of learned tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.fit import TaughtSamples
from diffusers_sde.errors import UsageError
from diffusers_sde.named_samplers import make_scheduler
from diffusers_sde.sampler_names import SAMPLERS
from diffusers_sde.sampling import lay_out, sample


def fitting_samplers(config: Mapping[str, Any], stochastic: bool) -> tuple[list[str], dict[str, str]]:
    """The named samplers of diffusers for the process of a config, deterministic or stochastic, and for each of the
    others why it has none."""
    fitting, reasons = [], {}
    for name in (name for name, s in SAMPLERS.items() if not s.ours and s.stochastic == stochastic):
        try:
            make_scheduler(name, _given(config))
            fitting.append(name)
        except UsageError as error:
            reasons[name] = str(error.__cause__ or error)
    return fitting, reasons


def best_stock(
    names: Sequence[str],
    config: Mapping[str, Any],
    n: int,
    samples: TaughtSamples,
    measure: Callable[[Mapping[int, torch.Tensor]], float],
) -> dict[str, Any]:
    """The stock sampler with the smallest error at ``n`` evaluations.

    Args:
        names: of the samplers to run.
        config: the scheduler config whose process they are set up for.
        samples: whose noise they start from.
        measure: the error of last states by batch, not finite for those that are not (a sampler failed there).

    Returns:
        ``stock``, its error, and ``stock_name``; None where all of them failed, which a warning says of each.
    """
    best: dict[str, Any] = {"stock": None, "stock_name": None}
    for name in names:
        ends: dict[int, torch.Tensor] = {}
        try:
            for first in samples.firsts:
                scheduler = make_scheduler(name, _given(config))
                lay_out(scheduler, SAMPLERS[name].steps(n))
                generator, tick = torch.Generator().manual_seed(first), samples.evaluator.tick
                with samples.source.open(first) as batch:
                    x = sample(batch.evaluate, scheduler, batch.noise, generator=generator, callback=tick)
                ends[first] = x.cpu()
        except Exception as error:  # a stock class may fail in any way, and that is no reason to lose a calibration
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{name} is left out of the comparison at {n} steps: {reason}", stacklevel=2)
        missing = {first: torch.full_like(samples.teacher.solution(first), torch.nan) for first in samples.firsts}
        error_found = measure(missing | ends)  # all workers take part, whatever happened to this one
        if np.isfinite(error_found) and (best["stock"] is None or error_found < best["stock"]):
            best = {"stock": error_found, "stock_name": name}
    return best


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if v is not None}  # stock classes have other words for "default"
