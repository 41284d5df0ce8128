"""What a scheduler config of diffusers says, in this package's keys, and which configs say nothing that is ours.

Knows diffusers' scheduler classes by name, their defaults, their names for a grid, and the habits of each.  Looks every
class up where it is installed, so that a class that diffusers drops is missing here and nothing else.  Knows nothing of
steps or tables.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers

from diffusers_sde.configs import ALIASES, EDM, FLOW, SHARED, VP, alphas_cumprod_from_config, settled
from diffusers_sde.errors import UsageError

# The classes whose process is one of ours.  Everything else that diffusers has is refused.
# fmt: off
STOCK_CLASSES = {
    VP: (
        "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler",
        "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
        "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
        "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "TCDScheduler",
        "UnCLIPScheduler", "UniPCMultistepScheduler",
    ),
    FLOW: ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    EDM: ("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
}
# fmt: on
# Flow matching networks that jump: which of them is told where to.
FLOW_MAP_CLASSES = {"FlowMapEulerDiscreteScheduler": "mean_flow", "FlowMatchLCMScheduler": "consistency"}
# A key that only this class has, for configs that do not name it.
_TELLING_KEYS = {
    "block_length": "BlockRefinementScheduler",
    "clip_denoised": "CMStochasticIterativeScheduler",
    "corrector_steps": "DiscreteDDIMScheduler",
    "entropy_bound": "EntropyBoundScheduler",
    "mask_token_id": "AmusedScheduler",
    "num_policy_substeps": "PiflowScheduler",
    "num_vec_classes": "VQDiffusionScheduler",
    "stages": "HeliosScheduler",
    "upscale_mode": "FlowMatchLCMScheduler",
}
_PROCESS_MARKS = (
    "beta_schedule",
    "beta_start",
    "trained_betas",
    "shift",
    "flow_shift",
    "use_flow_sigmas",
    "sigma_data",
)

_GRID_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log_snr",
}
_SPACINGS = ("leading", "trailing", "linspace")
_RAMPS = ("karras", "exponential", "beta")

_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
# Classes that are importable only where torchsde is installed.
_WITHOUT_TORCHSDE = {
    "CosineDPMSolverMultistepScheduler": {
        "sigma_min": 0.3,
        "sigma_max": 500.0,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "prediction_type": "v_prediction",
        "rho": 7.0,
        "final_sigmas_type": "zero",
    },
    "DPMSolverSDEScheduler": {**_BETAS, "prediction_type": "epsilon", "use_karras_sigmas": False},
}


def is_canonical(config: Mapping[str, Any]) -> bool:
    """Whether a config spells its process in this package's keys: it is one of our schedulers' or has been."""
    return "use_flow_sigmas" in config and "noise_conditioning" in config


def class_name(config: Mapping[str, Any]) -> str:
    """The scheduler class that a config names, or that one of its keys gives away; empty where neither does."""
    name = config.get("_class_name")
    if isinstance(name, list | tuple):
        name = name[-1]
    if name:
        return str(name)
    if config.get("prediction_type") == "trigflow":
        return "SCMScheduler"
    return next((owner for key, owner in _TELLING_KEYS.items() if key in config), "")


def stock_defaults(name: str) -> dict[str, Any]:
    """Parameters of a diffusers scheduler class with their defaults; empty for a class that diffusers does not have."""
    if name in _WITHOUT_TORCHSDE:
        return dict(_WITHOUT_TORCHSDE[name])
    source = getattr(diffusers, name, None) if name else None
    if source is None:
        return {}
    parameters = inspect.signature(source.__init__).parameters
    return {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}


@functools.cache
def _stock_keys() -> frozenset[str]:
    """Every parameter of the stock classes whose process is ours."""
    return frozenset(
        key for names in (*STOCK_CLASSES.values(), FLOW_MAP_CLASSES) for name in names for key in stock_defaults(name)
    )


def unknown_keys(keywords: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """The keywords that are a key neither of ``config``, nor of its class, nor of any stock scheduler of ours."""
    known = {*stock_defaults(class_name(config)), *config, *SHARED}
    return [key for key in keywords if key not in known and key not in _stock_keys()]


def nearest_key(key: str, own: Iterable[str]) -> str | None:
    """The config key most like a misspelt one, of ``own`` or of any stock scheduler; None where none is like it."""
    return next(iter(difflib.get_close_matches(key, {*own, *SHARED, *_stock_keys()}, 1)), None)


def _refuse_other_kinds(name: str, values: Mapping[str, Any], flow_maps: bool) -> None:
    """Raise :class:`UsageError` for a config whose process is none of ours."""
    if name in FLOW_MAP_CLASSES:
        if not flow_maps:
            raise UsageError(
                f"{name} belongs to a few-step network that jumps: convert it with FlowMapScheduler.from_config."
            )
        if values.get("scale_factors"):
            raise UsageError("This FlowMatchLCMScheduler grows its latents between steps: keep that scheduler.")
    elif name and not name.endswith("Scheduler"):
        raise UsageError(f"This is the config of a {name}, not of a scheduler: pass pipe.scheduler.config.")
    elif name not in {n for names in STOCK_CLASSES.values() for n in names} and (
        hasattr(diffusers, name) or name in _TELLING_KEYS.values() or name == "SCMScheduler"
    ):
        raise UsageError(f"{name} describes no diffusion process that a solver here integrates: keep that scheduler.")
    elif all(values.get(key) is None for key in _PROCESS_MARKS):
        raise UsageError(
            f"This config has none of the keys of a forward process ({', '.join(_PROCESS_MARKS)}): pass "
            "pipe.scheduler.config."
        )


def canonical_config(
    config: Mapping[str, Any], changes: Mapping[str, Any] | None = None, *, flow_maps: bool = False
) -> dict[str, Any]:
    """``config`` of any diffusers scheduler, as it is now and with the caller's ``changes`` applied in its own keys,
    with its process spelled in this package's keys.

    Flow matching is recognised by ``use_flow_sigmas``, by its class, or by a shift without betas; EDM by
    ``sigma_data``; the cosine network conditioning by its class.  The source's own keys are kept, so converting back
    restores it.  In a config that has been ours before, what its present class says of a key counts; what that class
    does not know or was not told is as we left it.

    Args:
        config: of a scheduler of diffusers or of this package.
        changes: keywords of ``from_config``, in the source's keys or ours.
        flow_maps: whether few-step networks that jump (:data:`FLOW_MAP_CLASSES`) are welcome.

    Raises:
        UsageError: for schedulers of another kind of model, and for a prediction that has no meaning on the process.
    """
    now, changes = settled(config), dict(changes or {})
    name, unset = class_name(now), set(now.get("_use_default_values") or ())
    defaults, ours = stock_defaults(name), is_canonical(now)
    values = {k: v for k, v in now.items() if k != "_use_default_values"}
    if ours:
        stated = {k for k in defaults if k in values and k not in unset} | set(changes)
        values |= changes
    else:
        cosine = name.startswith("Cosine") or (not name and _looks_cosine(values))
        values = {**defaults, **values, **changes}
        if values.get("sigma_data") is not None:
            values["noise_conditioning"] = changes.get("noise_conditioning", "atan" if cosine else "log")
        stated = set(values)
        _refuse_other_kinds(name, values, flow_maps)
        _spell_process(values, name, tells_prediction=not defaults or "prediction_type" in {**defaults, **changes})
    if "timestep_type" in stated:
        _spell_timestep_type(values)
    values["shift"] = _shift(values, stated & set(defaults or values), changes)
    values |= {alias: values[key] for alias, key in ALIASES.items()}
    before = values.get("grid")
    own_law = not ours and values.get("sigma_data") is not None and not values["use_flow_sigmas"]
    values["grid"] = named_grid(changes) if own_law and "grid" not in changes else _grid(values, stated, changes)
    betas = "beta_start" in defaults or (not ours and not defaults and "beta_start" in values)
    if values["grid"] in _RAMPS and values["grid"] != before and betas and values["use_flow_sigmas"]:
        _spell_ramp(values)
    return values


def _spell_process(values: dict[str, Any], name: str, tells_prediction: bool) -> None:
    """Write the process of a stock config in this package's keys; ``tells_prediction``: whether its
    ``prediction_type``, if there is one, is that of its network."""
    has_betas = any(values.get(key) is not None for key in ("beta_start", "beta_schedule", "trained_betas"))
    has_shift = "shift" in values or "flow_shift" in values
    flow = (
        values.get("use_flow_sigmas")
        or name in STOCK_CLASSES[FLOW]
        or name in FLOW_MAP_CLASSES
        or (has_shift and not has_betas)
    )
    values["use_flow_sigmas"] = bool(flow)
    if not (tells_prediction and values.get("prediction_type")):
        values["prediction_type"] = "flow_prediction" if flow else "epsilon"
    prediction = values["prediction_type"]
    if flow and prediction == "v_prediction":
        raise UsageError(
            "The v_prediction of diffusers' flow matching schedulers holds for alpha^2 + sigma^2 = 1 only: pass "
            "prediction_type='flow_prediction' to from_config, or what this network says."
        )
    if not flow and prediction == "flow_prediction":
        raise UsageError(
            "prediction_type is 'flow_prediction' but the process is not flow matching: pass use_flow_sigmas=True to "
            "from_config for a flow matching network, else the prediction_type of this network."
        )
    if values.get("sigma_data") is None and not flow and values.get("timestep_type") != "continuous":
        # noise levels that beta-based schedulers cache or cut are results, not part of the process
        values["sigma_min"] = values["sigma_max"] = None


def _looks_cosine(config: Mapping[str, Any]) -> bool:
    """Whether a config without a class name is a cosine scheduler's: the only EDM family with an order but no choice of
    algorithm."""
    return "solver_order" in config and "algorithm_type" not in config and not config.get("use_flow_sigmas")


def _spell_timestep_type(values: dict[str, Any]) -> None:
    """Stable Video Diffusion's ``continuous`` timesteps: v prediction in sigma/alpha coordinates is EDM's
    preconditioning at unit data scale.  Euler's others leave the process to the betas."""
    if values.get("timestep_type") != "continuous":
        values["sigma_data"] = values["sigma_min"] = values["sigma_max"] = None
        return
    if values.get("prediction_type") != "v_prediction":
        raise UsageError("Continuous timesteps are supported with prediction_type='v_prediction' only.")
    values["sigma_data"], values["noise_conditioning"] = 1.0, "log"
    values["sigma_schedule"] = "karras" if values.get("use_karras_sigmas") else "exponential"
    _spell_ramp(values)


def _spell_ramp(values: dict[str, Any]) -> None:
    """Write the noise range of a class whose ramps run over the ``sigma/alpha`` of its betas, where it has none."""
    abar = alphas_cumprod_from_config(values)
    low, high = (math.sqrt(1 / float(abar[i]) - 1) for i in (0, -1 if abar[-1] > 0 else -2))
    for key, level in (("sigma_min", low), ("sigma_max", high)):
        values[key] = level if values.get(key) is None else values[key]


def _shift(values: Mapping[str, Any], stated: set[str], changes: Mapping[str, Any]) -> float:
    """The static shift: the caller's, else the source's own, else what a conversion left in the config."""
    named = [key for key in ("shift", "flow_shift") if key in changes]
    order = [*named, *(key for key in ("flow_shift", "shift") if key in stated), "shift"]
    return next((values[key] for key in order if values.get(key) is not None), float(SHARED["shift"].default))


def named_grid(flags: Mapping[str, Any], habits: tuple[str, ...] = ()) -> str | None:
    """The grid that diffusers' flags ask for, None if they ask for none; ``habits`` are spacings to overlook."""
    for flag, grid in _GRID_FLAGS.items():
        if flags.get(flag):
            return grid
    spacing = flags.get("timestep_spacing")
    return None if spacing in habits else spacing


def _grid(values: Mapping[str, Any], stated: set[str], changes: Mapping[str, Any]) -> str | None:
    """The grid: the caller's, else what the source's flags ask for, else the one that a conversion left, unless the
    source now says no to it."""
    if "grid" in changes:
        return changes["grid"]
    flags = {key: values[key] for key in (*_GRID_FLAGS, "timestep_spacing") if key in stated}
    chosen = named_grid(changes) or named_grid(flags, habits=("leading", "linspace"))
    left = values.get("grid")
    flag = next((flag for flag, grid in _GRID_FLAGS.items() if grid == left), None)
    denied = flag in flags or (left in _SPACINGS and flags.get("timestep_spacing", left) != left)
    return chosen or (None if denied else left)
