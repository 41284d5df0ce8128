"""Every sampler that people know, by any of its names.

import diffusers_sde
pipe.scheduler = diffusers_sde.sampler("dpm++ 2m sde karras", pipe.scheduler.config)

Knows how names are spelled and which scheduler, with which settings, each of them is; ``diffusers-sde samplers`` prints
the tables.  Knows no formula (:mod:`diffusers_sde.published` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_sde.names.catalogue import FLOW_MAPS, GUIDED, REFUSED, SCHEDULES
from diffusers_sde.names.spelling import find

__all__ = ["sampler"]


def sampler(sampler: str, config: Mapping[str, Any], *, schedule: str | None = None, **options: Any) -> Any:
    """The scheduler of a named sampler, set up for the process of a model.

    Args:
        sampler: any name of it, with or without a schedule, as ``DPM++ 2M SDE Karras``, ``euler_ancestral``, ``Euler
            a`` or ``res_2s + bong_tangent``; case, spaces, underscores and hyphens do not matter, and ``++`` is ``pp``.
        config: ``pipe.scheduler.config``, of any diffusers scheduler.
        schedule: the name of a grid, where ``sampler`` has none; without any the grid that ``config`` names, an EDM
            model's ``sigma_schedule``, or equal steps of time (``trailing``).
        options: further keys of the config, as ``eta=0.5``, ``noise_seed=7``, ``shift=3.0`` or ``rho=5.0``.

    Returns:
        A new :class:`diffusers_sde.NamedScheduler`; for ``lcm`` and ``tcd`` a :class:`diffusers_sde.FlowMapScheduler`.

    Raises:
        ValueError: for an unknown name (with the three nearest), two schedules, and a sampler that is no linear table
            or needs what a scheduler does not see (with the reason).
    """
    from diffusers_sde.schedulers import FlowMapScheduler, NamedScheduler

    name, grid = find(sampler, schedule)
    refusal = REFUSED.get(name) or GUIDED.get(name)
    if refusal:
        raise ValueError(f"{name} is not among the samplers here: {refusal}.")
    settings = {**({} if grid is None else SCHEDULES[grid].settings), **options}
    if name in FLOW_MAPS:
        if grid == "lcm":  # its networks know no other levels: the run keeps to them
            del settings["grid"]
            settings["original_inference_steps"] = 50
        return FlowMapScheduler.from_config(config, **{**FLOW_MAPS[name].settings, **settings})
    return NamedScheduler.from_config(config, **{"sampler": name, **settings})
