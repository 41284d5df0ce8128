"""Samplers by name, this package's and diffusers' own, each set up for the process of a model.

Knows which config keys are the process and which are a solver's, so that all samplers solve the same equation.  Knows
no network and draws nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from diffusers_sde.configs import SHARED, family_of, process_keys
from diffusers_sde.errors import UsageError
from diffusers_sde.schedulers import (
    CalibratedScheduler,
    DPMSolverScheduler,
    ProbabilityFlowScheduler,
    ReverseSDEScheduler,
)
from diffusers_sde.stock_configs import canonical_config

# No sampler may clip: each would then solve an equation of its own.
UNLIMITED = {"clip_sample": False, "thresholding": False}


@dataclass(frozen=True)
class Sampler:
    """``build(config)`` makes a scheduler for the process of a scheduler config.  A stochastic one has no error against
    the solution of the ODE; a two-stage one makes 2 steps - 1 evaluations."""

    build: Callable[[Mapping[str, Any]], Any]
    stochastic: bool = False
    ours: bool = False
    two_stage: bool = False

    def steps(self, n: int) -> int:
        """What to pass to ``set_timesteps`` for at most ``n`` evaluations."""
        return (n + 1) // 2 if self.two_stage else n

    def evaluations(self, n: int) -> int:
        """The true number of evaluations for a budget of ``n``."""
        return 2 * self.steps(n) - 1 if self.two_stage else n


def process_kind(config: Mapping[str, Any]) -> str:
    """``variance preserving``, ``flow matching`` or ``EDM``; raises ``ValueError`` for a config that is neither."""
    return family_of(canonical_config(config))


def _process(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``config`` that say what its process is; what its solver was set to stays behind."""
    source = canonical_config(config)
    return {k: source[k] for k in process_keys(family_of(source)) if k in source}


def _ours(cls: type, **options: Any) -> Callable[[Mapping[str, Any]], Any]:
    def build(config: Mapping[str, Any]) -> Any:
        variance = canonical_config(config).get("variance_type") or SHARED["variance_type"].default
        return cls(**{**_process(config), "variance_type": variance, **UNLIMITED, **options})

    return build


CALIBRATED = "calibrated"  # the folder beside a model that holds its CalibratedScheduler, and its key in a config


def _calibrated(config: Mapping[str, Any]) -> Any:
    """The learned scheduler that lies beside the model; raises where there is none or it is for another process."""
    if not config.get(CALIBRATED):
        raise UsageError(f"no {CALIBRATED}/scheduler_config.json lies beside it (make it with diffusers-sde calibrate)")
    scheduler = CalibratedScheduler.from_pretrained(config[CALIBRATED])
    scheduler.check_process(config)
    if scheduler.config.calibration["stochastic"]:
        raise UsageError("the calibration beside it is stochastic, and has no error of a sample")
    return scheduler


def _stock(classes: Mapping[str, str], **options: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Factory of a diffusers sampler from the class name for each kind of process.

    It raises :class:`UsageError` where there is no such class or where the class cannot express the process.
    """

    def build(config: Mapping[str, Any]) -> Any:
        kind, process = process_kind(config), _process(config)
        if kind not in classes:
            raise UsageError(f"diffusers has no {kind} form of it")
        cls = getattr(diffusers, classes[kind])
        known = inspect.signature(cls.__init__).parameters
        if kind == "flow matching":
            if "use_flow_sigmas" in known:
                process["flow_shift"] = process.pop("shift")
            elif process["prediction_type"] == "flow_prediction":  # such a class knows no other
                del process["use_flow_sigmas"], process["prediction_type"]
        lost = [k for k, v in process.items() if k in SHARED and k not in known and v != SHARED[k].default]
        if lost:
            raise UsageError(f"{cls.__name__} ignores {' and '.join(lost)}")
        wanted = {**process, "timestep_spacing": "trailing", **UNLIMITED, **options}
        return cls(**{k: v for k, v in wanted.items() if k in known})

    return build


def _both(name: str) -> dict[str, str]:
    return {"variance preserving": name, "flow matching": name}


_DPM = _both("DPMSolverMultistepScheduler")
# diffusers' DEIS stops at the smallest training noise instead of 0 (on flow models at its last evaluation: left out
# there), its DDIM and DDPM do with a number of steps that does not divide T; they have no option for it.
SAMPLERS: dict[str, Sampler] = {
    "calibrated": Sampler(_calibrated, ours=True),
    "pf-ode": Sampler(_ours(ProbabilityFlowScheduler), ours=True),
    "dpm-solver": Sampler(_ours(DPMSolverScheduler), ours=True),
    "reverse-sde": Sampler(_ours(ReverseSDEScheduler), ours=True, stochastic=True),
    "ddim": Sampler(_stock({"variance preserving": "DDIMScheduler"})),
    "euler": Sampler(
        _stock(
            {
                "variance preserving": "EulerDiscreteScheduler",
                "flow matching": "FlowMatchEulerDiscreteScheduler",
                "EDM": "EDMEulerScheduler",
            }
        )
    ),
    "dpm++2m": Sampler(_stock({**_DPM, "EDM": "EDMDPMSolverMultistepScheduler"})),
    "dpm++2m-karras": Sampler(_stock({"variance preserving": _DPM["flow matching"]}, use_karras_sigmas=True)),
    "unipc": Sampler(_stock(_both("UniPCMultistepScheduler"))),
    "deis": Sampler(_stock({"variance preserving": "DEISMultistepScheduler"})),
    "heun": Sampler(
        _stock(
            {"variance preserving": "HeunDiscreteScheduler", "flow matching": "FlowMatchHeunDiscreteScheduler"},
        ),
        two_stage=True,
    ),
    "ddpm": Sampler(_stock({"variance preserving": "DDPMScheduler"}), stochastic=True),
    "euler-a": Sampler(_stock({"variance preserving": "EulerAncestralDiscreteScheduler"}), stochastic=True),
    "dpm++2m-sde": Sampler(_stock(_DPM, algorithm_type="sde-dpmsolver++"), stochastic=True),
}
DEFAULT_SAMPLERS = {
    "variance preserving": ["calibrated", "pf-ode", "dpm-solver", "ddim", "dpm++2m", "unipc", "reverse-sde", "euler-a"],
    "flow matching": ["calibrated", "pf-ode", "dpm-solver", "euler", "dpm++2m", "unipc", "heun", "reverse-sde"],
    "EDM": ["calibrated", "pf-ode", "dpm-solver", "euler", "dpm++2m", "reverse-sde"],
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a named sampler for the process of ``config``; raises :class:`UsageError` if it has none."""
    try:
        return SAMPLERS[name].build(config)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"Sampler {name} does not fit this model: {error}; leave it out of --samplers.") from error


def reference_scheduler(config: Mapping[str, Any]) -> Any:
    """The sampler of the reference solution: with many steps exact to well below the errors compared here (order 3
    converges no faster on networks)."""
    grid = {"grid": "karras"} if process_kind(config) == "EDM" else {"grid": "balanced", "rho": 1.25}
    return _ours(ProbabilityFlowScheduler, solver_order=2, corrector=True, **grid)(config)
