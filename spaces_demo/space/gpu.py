"""Time on a shared GPU: ``spaces.GPU`` where there is one, nothing elsewhere.  Knows how long a request takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

try:
    import spaces
except ImportError:  # not on a GPU Space
    spaces = None

SECONDS_PER_EVALUATION = {"sd15": 0.12, "sdxl": 0.35, "sana": 0.15}  # of four images, on the GPU of a Space
STARTUP, SHORTEST, LONGEST = 20, 30, 300


def duration(key: str, budgets: Sequence[int], samplers: int, reference_steps: int) -> int:
    """Seconds to ask for: evaluations of that many samplers at all budgets and of both references, and the start."""
    evaluations = samplers * sum(budgets) + 1.5 * reference_steps
    return int(min(max(STARTUP + SECONDS_PER_EVALUATION.get(key, 0.1) * evaluations, SHORTEST), LONGEST))


def on_gpu(seconds: Callable[..., int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of ``function(request, tick)``: run on the Space's GPU for at most ``seconds(request)``.

    There it is another process's, which hears of no tick: it stops between two values.
    """
    if spaces is None:
        return lambda function: function

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        there = spaces.GPU(duration=seconds)(function)
        return functools.wraps(function)(lambda request, tick=None: there(request))

    return decorate
