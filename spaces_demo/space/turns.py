"""Who computes next: requests share the processor evaluation by evaluation, and stop when nobody waits for them.

Knows how long each request has computed; knows neither what is computed nor how a server tells who waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusers_sde.comparison.problems import Tick
from diffusers_sde.errors import UsageError

Value = TypeVar("Value")

# gradio's limit for the requests that share TURNS, of all tabs together: many, because each waits for others anyway
SHARED: dict[str, Any] = {"concurrency_limit": 16, "concurrency_id": "solve"}
AT_ONCE = 2  # evaluations that run at the same time
GLANCE = 0.5  # seconds after which who waits for a turn looks again whether it is still wanted


class Abandoned(UsageError):
    """Nobody waits for this request any more."""


class Turns:
    """Places for ``at_once`` requests that compute.  A free one goes to whom has computed least so far, so that a light
    request waits for the evaluations that run, not for the requests."""

    def __init__(self, at_once: int = AT_ONCE):
        self._free, self._waiting, self._changed = at_once, list[Visit](), threading.Condition()

    def take(self, visit: Visit) -> None:
        """Wait for a place; raises :class:`Abandoned` where nobody wants the result any more."""
        with self._changed:
            self._waiting.append(visit)
            try:
                while True:
                    if not visit.wanted():
                        raise Abandoned("Nobody waits for this any more.")
                    if self._free and visit is min(self._waiting, key=lambda one: one.used):
                        break
                    self._changed.wait(GLANCE)
            finally:
                self._waiting.remove(visit)
                self._changed.notify_all()
            self._free -= 1
            visit.since = time.monotonic()

    def give(self, visit: Visit) -> None:
        """Free the place, where there is one."""
        with self._changed:
            if visit.since is None:
                return
            visit.used, visit.since = visit.used + time.monotonic() - visit.since, None
            self._free += 1
            self._changed.notify_all()


@dataclass(eq=False)
class Visit:
    """A request: whether it is still ``wanted``, the seconds ``used`` so far, and ``since`` when it has a place."""

    wanted: Callable[[], bool]
    used: float = 0.0
    since: float | None = None


TURNS = Turns()


def in_turn(
    make: Callable[[Tick], Generator[Value]], wanted: Callable[[], bool] = lambda: True, turns: Turns = TURNS
) -> Iterator[Value]:
    """What ``make(tick)`` yields, computed in turn with other requests.

    Args:
        make: calls ``tick`` after each evaluation: there another request may go first, and :class:`Abandoned` ends one
            that is not wanted.
        wanted: whether somebody still waits for the result.
        turns: whom to share with.
    """
    visit = Visit(wanted)

    def tick() -> None:
        turns.give(visit)
        turns.take(visit)

    with contextlib.closing(make(tick)) as stream:
        while True:
            turns.take(visit)
            try:
                value = next(stream)
            except StopIteration:
                return
            finally:
                turns.give(visit)
            yield value
