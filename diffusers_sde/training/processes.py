"""What the processes of a training tell each other.  Knows Accelerate's messages, not what they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from diffusers_sde.errors import UsageError

Result = TypeVar("Result")


def on_main(accelerator: Any, act: Callable[[], Result]) -> Result:
    """What ``act`` of the main process returns, on every process.

    Raises:
        UsageError: on every process, where the main one cannot do it.
    """
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = act()
        except (ValueError, OSError) as error:
            told[1] = str(error)
    broadcast_object_list(told)
    if told[1] is not None:
        raise UsageError(told[1])
    return told[0]


def first_problem(problem: str | None) -> str | None:
    """The first problem that any process has, on every process."""
    return next((p for p in gather_object([problem]) if p is not None), None)
