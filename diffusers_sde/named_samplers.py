"""Schedulers of the named samplers, each set up for the process of a model.

Knows which config keys are the process and which are a solver's, so that all samplers solve the same equation.  Knows
no network and draws nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from diffusers_sde import schedulers
from diffusers_sde.configs import FLOW, SHARED, path_from_config, process_keys
from diffusers_sde.errors import UsageError
from diffusers_sde.sampler_names import SAMPLERS, Sampler
from diffusers_sde.schedulers import CalibratedScheduler, ProbabilityFlowScheduler
from diffusers_sde.stock_configs import canonical_config

# No sampler may clip: each would then solve an equation of its own.
UNLIMITED = {"clip_sample": False, "thresholding": False}
CALIBRATED = "calibrated"  # the folder beside a model that holds its CalibratedScheduler, and its key in a config


def process_family(config: Mapping[str, Any]) -> str:
    """The family of the process of a scheduler config.

    Returns:
        ``variance preserving``, ``flow matching`` or ``EDM``.

    Raises:
        ValueError: for a config that describes none of them.
    """
    return path_from_config(canonical_config(config)).family


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a named sampler for the process of a model.

    Args:
        name: a key of :data:`diffusers_sde.sampler_names.SAMPLERS`.
        config: the scheduler config of the model, see :func:`diffusers_sde.comparison.problems.model_config`.

    Returns:
        A new scheduler, ours or diffusers'.

    Raises:
        UsageError: where the sampler cannot be had for this model.
    """
    sampler = SAMPLERS[name]
    try:
        if sampler.learned:
            return _learned(config)
        return _of_this_package(sampler, config) if sampler.ours else _of_diffusers(sampler, config)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"Sampler {name} does not fit this model: {error}; leave it out.") from error


def reference_scheduler(config: Mapping[str, Any]) -> ProbabilityFlowScheduler:
    """The sampler of the reference solution for the process of ``config``: with many steps exact to well below the
    errors compared here (order 3 converges no faster on networks)."""
    grid: dict[str, Any] = {"grid": "karras"} if process_family(config) == "EDM" else {"grid": "balanced", "rho": 1.25}
    return _for_process(ProbabilityFlowScheduler, config, solver_order=2, corrector=True, **grid)


def _process_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``config`` that say what its process is; what its solver was set to stays behind."""
    source = canonical_config(config)
    return {k: source[k] for k in process_keys(process_family(config)) if k in source}


def _learned(config: Mapping[str, Any]) -> CalibratedScheduler:
    """The calibrated scheduler that lies beside the model; raises where there is none or it is for another process."""
    if not config.get(CALIBRATED):
        raise UsageError(f"no {CALIBRATED}/scheduler_config.json lies beside it (make it with diffusers-sde calibrate)")
    scheduler = CalibratedScheduler.from_pretrained(config[CALIBRATED])
    scheduler.check_process(config)
    if scheduler.stochastic:
        raise UsageError("the calibration beside it is stochastic, and has no error of a sample")
    return scheduler


def _of_this_package(sampler: Sampler, config: Mapping[str, Any]) -> Any:
    cls = getattr(schedulers, sampler.classes[process_family(config)])
    return _for_process(cls, config, **sampler.options)


def _for_process(cls: Any, config: Mapping[str, Any], **options: Any) -> Any:
    variance = canonical_config(config).get("variance_type") or SHARED["variance_type"].default
    return cls(**{**_process_values(config), "variance_type": variance, **UNLIMITED, **options})


def _of_diffusers(sampler: Sampler, config: Mapping[str, Any]) -> Any:
    """Raises :class:`UsageError` where diffusers has no class for the family or that cannot express the process."""
    family, process_config = process_family(config), _process_values(config)
    if family not in sampler.classes:
        raise UsageError(f"diffusers has no {family} form of it")
    cls = getattr(diffusers, sampler.classes[family])
    known = inspect.signature(cls.__init__).parameters
    if family == FLOW:
        if "use_flow_sigmas" in known:
            process_config["flow_shift"] = process_config.pop("shift")
        elif process_config["prediction_type"] == "flow_prediction":  # such a class knows no other
            del process_config["use_flow_sigmas"], process_config["prediction_type"]
    lost = [k for k, v in process_config.items() if k in SHARED and k not in known and v != SHARED[k].default]
    if lost:
        raise UsageError(f"{cls.__name__} ignores {' and '.join(lost)}")
    options = {**process_config, "timestep_spacing": "trailing", **UNLIMITED, **sampler.options}
    return cls(**{k: v for k, v in options.items() if k in known})
