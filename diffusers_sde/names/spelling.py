"""How people spell the name of a sampler and of a schedule, together or apart.

Knows the spellings of :mod:`diffusers_sde.names.catalogue` up to case, separators and ``++``.  Imports no torch.
"""

from __future__ import annotations

import difflib
import functools
import re

from diffusers_sde.names.catalogue import ALL, SCHEDULES


def plain(name: str) -> str:
    """A name without what people spell differently: ``DPM++ 2M SDE`` is ``dpmpp2msde``."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\+\+", "pp", name.lower()))


@functools.cache
def sampler_spellings() -> dict[str, str]:
    """Every plain spelling of a sampler and the name it means; of two samplers that share one, the first listed."""
    found: dict[str, str] = {}
    for name, entry in ALL.items():
        for spelling in (name, *entry.spellings):
            found.setdefault(plain(spelling), name)
    for spelling, name in list(found.items()):
        for known in (f"{spelling}gpu", f"sample{spelling}", f"k{spelling}"):  # ComfyUI, k-diffusion, older interfaces
            found.setdefault(known, name)
    return found


@functools.cache
def schedule_spellings() -> dict[str, str]:
    """Every plain spelling of a schedule and the name it means."""
    found: dict[str, str] = {}
    for name, entry in SCHEDULES.items():
        for spelling in (name, *entry.spellings):
            found.setdefault(plain(spelling), name)
    return found


def find(sampler: str, schedule: str | None = None) -> tuple[str, str | None]:
    """The sampler and the schedule that are meant.

    Args:
        sampler: a name, with or without a schedule.
        schedule: a schedule's name, or None.

    Returns:
        ``(name, schedule)``, keys of :data:`diffusers_sde.names.catalogue.ALL` and
        :data:`diffusers_sde.names.catalogue.SCHEDULES`; None for no schedule.

    Raises:
        ValueError: for unknown names, with the nearest three, and for two schedules.
    """
    samplers, schedules = sampler_spellings(), schedule_spellings()
    words = plain(sampler)
    ways = [
        (samplers[words[:at]], schedules.get(words[at:]))
        for at in range(len(words), 0, -1)
        if words[:at] in samplers and (at == len(words) or words[at:] in schedules)
    ]
    if not ways:
        raise ValueError(f"There is no sampler {sampler!r}: {_nearest(words, samplers, schedules)}")
    name, named = ways[0]
    if schedule is None:
        return name, named
    if named is not None:
        raise ValueError(f"{sampler!r} names a schedule already: leave out schedule={schedule!r}, or that part.")
    if plain(schedule) not in schedules:
        near = ", ".join(difflib.get_close_matches(plain(schedule), schedules, 3, 0.0))
        raise ValueError(f"There is no schedule {schedule!r}: the nearest are {near}.")
    return name, schedules[plain(schedule)]


def _nearest(words: str, samplers: dict[str, str], schedules: dict[str, str]) -> str:
    """The three nearest names, each in its first spelling, with the schedule that the words end with."""
    tail = max((s for s in schedules if len(s) > 2 and words.endswith(s) and s != words), key=len, default="")
    near: list[str] = []
    for spelling in difflib.get_close_matches(words.removesuffix(tail), samplers, len(samplers), 0.0):
        if samplers[spelling] not in near:
            near.append(samplers[spelling])
    with_schedule = f" {schedules[tail]}" if tail else ""
    return f"the nearest are {', '.join(name + with_schedule for name in near[:3])}."
