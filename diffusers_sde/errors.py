"""Errors that are the caller's to mend, and the numbers that callers hand over.  Knows nothing."""

from __future__ import annotations

import math
import numbers
from typing import Any


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""


def is_real(value: Any) -> bool:
    """Whether a value is a real number: of Python, numpy or torch, or their array without dimensions; True is none."""
    number = _number(value)
    return isinstance(number, numbers.Real) and not isinstance(number, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, likewise."""
    number = _number(value)
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def _number(value: Any) -> Any:
    return value.item() if getattr(value, "shape", None) == () else value


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number from ``least`` on.

    Args:
        name: of the argument.
        value: what was passed.
        least: the smallest that is possible.

    Raises:
        ValueError: for any other.
    """
    if not is_whole(value):
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}.")


def check_finite(name: str, value: Any) -> None:
    """Refuse what is no finite number.

    Args:
        name: of the argument.
        value: what was passed.

    Raises:
        ValueError: for any other.
    """
    if not (is_real(value) and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, not {value!r}.")
