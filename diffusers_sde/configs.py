"""Configs: which process a scheduler config of diffusers describes, in this package's keys.

Knows the config keys and defaults of diffusers' schedulers and the parameters that all schedulers here share.
Knows nothing of steps or tables.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers


def shared_parameters(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: Any = None,
    rescale_betas_zero_snr: bool = False,
    snr_shift_scale: float = 1.0,
    prediction_type: str = "epsilon",
    use_flow_sigmas: bool = False,
    shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    invert_sigmas: bool = False,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigma_schedule: str | None = None,
    noise_conditioning: str = "log",
    grid: str | None = None,
    rho: float | None = None,
    steps_offset: int = 0,
    final_sigmas_type: str = "zero",
    round_timesteps: bool = False,
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
    variance_type: str = "fixed_small",
) -> None:
    """The parameters that every scheduler here accepts after its own.

    Process (as in diffusers): num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
    rescale_betas_zero_snr, snr_shift_scale, prediction_type (epsilon, sample, v_prediction, flow_prediction, score);
    use_flow_sigmas makes it flow matching, with shift, use_dynamic_shifting, base_shift, max_shift,
    base_image_seq_len, max_image_seq_len, time_shift_type, shift_terminal, invert_sigmas; a sigma_data makes it
    variance exploding (EDM), with sigma_min, sigma_max, sigma_schedule (karras, exponential) and noise_conditioning
    (log, atan).

    From a stock config, ``use_karras_sigmas`` and its like and ``timestep_spacing="trailing"`` (few-step models need
    it) are taken over as the grid; the spacings leading and linspace are habits of classes and count only when the
    caller passes them to from_config.

    Grid: grid (balanced, power, trailing, leading, linspace, log_snr, exponential, karras, beta, ays; None: an EDM
    model's own sigma_schedule, else the measured default), rho (exponent of balanced, power and karras), steps_offset
    (leading), final_sigmas_type (zero, sigma_min),
    round_timesteps (networks that only know integer timesteps).

    Data prediction: clip_sample to +-clip_sample_range; thresholding to the dynamic_thresholding_ratio quantile, at
    most sample_max_value (Saharia et al. 2022), the whole step then follows the limited x_0 (as DDIM's does with
    use_clipped_model_output=True); variance_type (learned and learned_range outputs are split,
    fixed_large is honoured by the first-order reverse SDE).
    """


SHARED = inspect.signature(shared_parameters).parameters


def scheduler_init(own: Callable[..., None]) -> Callable[..., None]:
    """Make ``own``'s keyword parameters and the shared ones the signature of ``__init__`` and register all of them.

    Everything goes into the config, defaults too: other classes' defaults differ (``beta_start`` is 0.00085 in some),
    and a key that diffusers takes for unset would change the process on the way to them.
    """
    parameters = list(inspect.signature(own).parameters.values())
    names = {p.name for p in parameters}
    signature = inspect.Signature([*parameters, *(p for name, p in SHARED.items() if name not in names)])

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **{k: v for k, v in kwargs.items() if not k.startswith("_")})
        bound.apply_defaults()
        values = {k: v for k, v in bound.arguments.items() if k != "self"}
        self.register_to_config(**values)
        own(self, **{k: v for k, v in values.items() if k in names})

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


_OTHER_KINDS = ("CMStochastic", "SCM", "VQDiffusion", "Amused", "ScoreSde", "KarrasVe", "IPNDM", "DDPMWuerstchen")

_COSINE_DEFAULTS = {
    "sigma_min": 0.3,
    "sigma_max": 500.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "prediction_type": "v_prediction",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}


def stock_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of the diffusers class that a config names; empty for others."""
    name = str(config.get("_class_name"))
    if name == "CosineDPMSolverMultistepScheduler":  # importable only where torchsde is installed
        return dict(_COSINE_DEFAULTS)
    source = getattr(diffusers, name, None)
    if source is None:
        return {}
    return {
        name: p.default
        for name, p in inspect.signature(source.__init__).parameters.items()
        if p.default is not inspect.Parameter.empty
    }


def is_canonical(config: Mapping[str, Any]) -> bool:
    """Whether a config already spells its process in this package's keys."""
    return "use_flow_sigmas" in config and "noise_conditioning" in config


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of any diffusers scheduler with its process spelled in this package's keys.

    Flow matching is recognised by ``use_flow_sigmas``, by ``prediction_type="flow_prediction"``, or by a config that
    has a shift but no betas; EDM by ``sigma_data``; the cosine network conditioning by its class.  The source's own
    keys are kept, so converting back restores it.  Raises ``ValueError`` for schedulers of another kind of model
    (consistency, discrete, score-based with a corrector).
    """
    name = str(config.get("_class_name", ""))
    values = {**stock_defaults(config), **{k: v for k, v in config.items() if k != "_use_default_values"}}
    has_betas = "beta_start" in values or values.get("trained_betas") is not None
    if is_canonical(values):
        return values
    flow_keys = "shift" in values or "flow_shift" in values
    known = has_betas or flow_keys or "beta_schedule" in values or values.get("sigma_data") is not None
    if name.startswith(_OTHER_KINDS) or (hasattr(diffusers, name) and not known):
        raise ValueError(f"{name} describes no diffusion process that a solver here integrates: keep that scheduler.")
    if values.get("use_flow_sigmas") or "FlowMatch" in name or (flow_keys and not has_betas):
        values["use_flow_sigmas"] = True
        values["prediction_type"] = "flow_prediction"
        values["shift"] = values.get("flow_shift", 1.0) if "shift" not in values else values["shift"]
    elif values.get("sigma_data") is not None:
        # a cosine config without its class name: the only EDM family with an order but no choice of algorithm
        cosine = name.startswith("Cosine") or ("solver_order" in values and "algorithm_type" not in values)
        values["noise_conditioning"] = "atan" if cosine else "log"
    elif values.get("timestep_type") == "continuous":
        # Stable Video Diffusion: v prediction in sigma/alpha coordinates is EDM's preconditioning at unit data scale
        if values.get("prediction_type") != "v_prediction":
            raise ValueError("Continuous timesteps are supported with prediction_type='v_prediction' only.")
        values["sigma_data"], values["noise_conditioning"] = 1.0, "log"
        values["sigma_schedule"] = "karras" if values.get("use_karras_sigmas") else "exponential"
    else:
        # noise levels that beta-based schedulers cache or cut are results, not part of the process
        values["sigma_min"] = values["sigma_max"] = None
        values["use_flow_sigmas"] = False
    values["shift"] = 1.0 if values.get("shift") is None else values["shift"]
    if values.get("sigma_data") is None:
        values["grid"] = named_grid(values, habits=("leading", "linspace"))
    return values


def named_grid(flags: Mapping[str, Any], habits: tuple[str, ...] = ()) -> str | None:
    """The grid that diffusers' flags ask for, None if they ask for none; ``habits`` are spacings to overlook."""
    for flag, grid in _SIGMA_FLAGS.items():
        if flags.get(flag):
            return grid
    spacing = flags.get("timestep_spacing")
    return None if spacing in habits else spacing


_SIGMA_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log_snr",
}
