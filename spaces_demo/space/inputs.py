"""What a visitor may ask for.  Knows limits and how to say kindly that one is passed; knows no model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from diffusers_sde.errors import UsageError
from diffusers_sde.sampler_names import SAMPLERS

MAX_NFE, MAX_BUDGETS, MAX_SAMPLERS, MAX_IMAGES, MAX_PROMPT, MAX_SEED = 100, 5, 6, 8, 300, 2**31 - 1
MAX_WORK = 5000  # evaluations of one picture in all cells of a sheet


def number(value: Any, low: float, high: float, name: str) -> float:
    """``value`` as a finite float in [low, high]; raises :class:`UsageError`."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}.") from None
    if not math.isfinite(result) or not low <= result <= high:
        raise UsageError(f"{name} must be from {low:g} to {high:g}.")
    return result


def integer(value: Any, low: int, high: int, name: str) -> int:
    """``value`` as an int in [low, high]; raises :class:`UsageError`."""
    result = number(value, low, high, name)
    if result != int(result):
        raise UsageError(f"{name} must be a whole number.")
    return int(result)


def seed(value: Any) -> int:
    return integer(value, 0, MAX_SEED, "The seed")


def steps(value: Any) -> int:
    return integer(value, 1, MAX_NFE, "The number of evaluations")


def budgets(values: str | Iterable[Any]) -> list[int]:
    """Numbers of evaluations, increasing, of a list or of a text such as ``5, 10 20``."""
    parts = [p for p in re.split(r"[,;\s]+", values) if p] if isinstance(values, str) else list(values or ())
    chosen = sorted({steps(part) for part in parts})
    if not 1 <= len(chosen) <= MAX_BUDGETS:
        raise UsageError(f"Choose 1 to {MAX_BUDGETS} numbers of evaluations, for example 5, 10, 20.")
    return chosen


def work(samplers: int, budgets: Sequence[int], images: int) -> None:
    """Refuse a sheet of too many evaluations; raises :class:`UsageError`."""
    total = samplers * sum(budgets) * images
    if total > MAX_WORK:
        raise UsageError(
            f"{samplers} samplers at {', '.join(map(str, budgets))} evaluations of {images} images make {total}, at "
            f"most {MAX_WORK} are computed: choose fewer samplers, evaluations or images."
        )


def samplers(values: Sequence[str] | None, allow_stochastic: bool = True) -> list[str]:
    """Known sampler names without repetitions; raises :class:`UsageError`."""
    chosen = list(dict.fromkeys(values or ()))
    for name in chosen:
        if name not in SAMPLERS:
            raise UsageError(f"There is no sampler {name!r}: choose from {', '.join(SAMPLERS)}.")
        if SAMPLERS[name].stochastic and not allow_stochastic:
            raise UsageError(f"{name} is stochastic and has no error of a sample: leave it out.")
    if not 1 <= len(chosen) <= MAX_SAMPLERS:
        raise UsageError(f"Choose 1 to {MAX_SAMPLERS} samplers.")
    return chosen


def prompt(value: str | None) -> str:
    text = (value or "").strip()
    if len(text) > MAX_PROMPT:
        raise UsageError(f"The prompt has {len(text)} characters: shorten it to {MAX_PROMPT}.")
    return text


def choice(value: Any, known: Sequence[str], name: str) -> str:
    if value not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}.")
    return str(value)
