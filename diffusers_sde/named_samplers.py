"""Schedulers of the named samplers, each set up for the process of a model.

Knows which config keys are the process and which are a solver's, so that all samplers solve the same equation.  Knows
no network and draws nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

import diffusers_sde
from diffusers_sde.configs import SHARED, canonical_config
from diffusers_sde.errors import UsageError
from diffusers_sde.paths import path_from_config
from diffusers_sde.sampler_names import SAMPLERS, Sampler
from diffusers_sde.schedulers import CalibratedScheduler, ProbabilityFlowScheduler

# No sampler may clip: each would then solve an equation of its own.
UNLIMITED = {"clip_sample": False, "thresholding": False}
CALIBRATED = "calibrated"  # the folder beside a model that holds its CalibratedScheduler, and its key in a config

PROCESS_KEYS = {
    "variance preserving": "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr "
    "snr_shift_scale prediction_type",
    "flow matching": "num_train_timesteps shift use_dynamic_shifting base_shift max_shift base_image_seq_len "
    "max_image_seq_len time_shift_type shift_terminal invert_sigmas",
    "EDM": "num_train_timesteps prediction_type sigma_data sigma_min sigma_max sigma_schedule",
}


def family_of(config: Mapping[str, Any]) -> str:
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
    grid: dict[str, Any] = {"grid": "karras"} if family_of(config) == "EDM" else {"grid": "balanced", "rho": 1.25}
    return _for_process(ProbabilityFlowScheduler, config, solver_order=2, corrector=True, **grid)


def _process_keys(config: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The keys of ``config`` that say what its process is, and ``more``; what its solver was set to stays behind."""
    source = canonical_config(config)
    return {k: source[k] for k in (*PROCESS_KEYS[family_of(config)].split(), *more) if k in source}


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
    cls = getattr(diffusers_sde, sampler.classes[family_of(config)])
    return _for_process(cls, config, **sampler.options)


def _for_process(cls: Any, config: Mapping[str, Any], **options: Any) -> Any:
    known = inspect.signature(cls).parameters
    keys = _process_keys(config, "prediction_type", "use_flow_sigmas", "noise_conditioning", "variance_type")
    return cls(**{**{k: v for k, v in keys.items() if k in known}, **UNLIMITED, **options})


def _of_diffusers(sampler: Sampler, config: Mapping[str, Any]) -> Any:
    """Raises :class:`UsageError` where diffusers has no class for the family or that cannot express the process."""
    family, keys = family_of(config), _process_keys(config)
    if family not in sampler.classes:
        raise UsageError(f"diffusers has no {family} form of it")
    cls = getattr(diffusers, sampler.classes[family])
    known = inspect.signature(cls.__init__).parameters
    if "use_flow_sigmas" in known and family == "flow matching":
        keys |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": keys.pop("shift")}
    lost = [k for k, v in keys.items() if k not in known and v != getattr(SHARED.get(k), "default", v)]
    if lost:
        raise UsageError(f"{cls.__name__} ignores {' and '.join(lost)}")
    wanted = {**keys, "timestep_spacing": "trailing", **UNLIMITED, **sampler.options}
    return cls(**{k: v for k, v in wanted.items() if k in known})
