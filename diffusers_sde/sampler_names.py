"""The named samplers, this package's and diffusers' own, in one table, and which of them are compared by default.

Knows what each name stands for.  Imports nothing, so that a command can list and check names before torch is imported;
:mod:`diffusers_sde.named_samplers` makes the schedulers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("variance preserving", "flow matching", "EDM")


@dataclass(frozen=True)
class Sampler:
    """One named sampler.

    Attributes:
        classes: for each family of processes that it is for, the name of its class: of this package or of diffusers.
        options: what the class is set to besides the process.
        ours: whether the class is of this package.
        stochastic: it draws noise, and has no error against the solution of the ODE.
        two_stage: it makes 2 steps - 1 evaluations.
        learned: it lies beside a model, for the numbers of evaluations that it was calibrated for.
    """

    classes: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False
    stochastic: bool = False
    two_stage: bool = False
    learned: bool = False

    @property
    def label(self) -> str:
        """Where it comes from and whether it draws noise, in words."""
        return ("ours" if self.ours else "diffusers") + (", stochastic" if self.stochastic else "")

    def steps(self, n: int) -> int:
        """What to pass to ``set_timesteps`` for at most ``n`` evaluations."""
        return (n + 1) // 2 if self.two_stage else n

    def evaluations(self, n: int) -> int:
        """The true number of evaluations for a budget of ``n``."""
        return 2 * self.steps(n) - 1 if self.two_stage else n


def _ours(name: str, **marks: Any) -> Sampler:
    return Sampler(dict.fromkeys(FAMILIES, name), ours=True, **marks)


def _diffusers(vp: str, flow: str | None = None, edm: str | None = None, **marks: Any) -> Sampler:
    names = zip(FAMILIES, (vp, flow, edm), strict=True)
    return Sampler({family: f"{name}Scheduler" for family, name in names if name}, **marks)


_DPM, _UNIPC = "DPMSolverMultistep", "UniPCMultistep"
# diffusers' DEIS stops at the smallest training noise instead of 0 (on flow models at its last evaluation: left out
# there), its DDIM and DDPM do with a number of steps that does not divide T; they have no option for it.
SAMPLERS: dict[str, Sampler] = {
    "calibrated": _ours("CalibratedScheduler", learned=True),
    "pf-ode": _ours("ProbabilityFlowScheduler"),
    "dpm-solver": _ours("DPMSolverScheduler"),
    "reverse-sde": _ours("ReverseSDEScheduler", stochastic=True),
    "ddim": _diffusers("DDIM"),
    "euler": _diffusers("EulerDiscrete", "FlowMatchEulerDiscrete", "EDMEuler"),
    "dpm++2m": _diffusers(_DPM, _DPM, "EDMDPMSolverMultistep"),
    "dpm++2m-karras": _diffusers(_DPM, options={"use_karras_sigmas": True}),
    "unipc": _diffusers(_UNIPC, _UNIPC),
    "deis": _diffusers("DEISMultistep"),
    "heun": _diffusers("HeunDiscrete", "FlowMatchHeunDiscrete", two_stage=True),
    "ddpm": _diffusers("DDPM", stochastic=True),
    "euler-a": _diffusers("EulerAncestralDiscrete", stochastic=True),
    "dpm++2m-sde": _diffusers(_DPM, _DPM, options={"algorithm_type": "sde-dpmsolver++"}, stochastic=True),
}

# By family, the most telling first: where there is room for fewer, the first of them are shown.
DEFAULT_SAMPLERS = {
    "variance preserving": ["calibrated", "pf-ode", "dpm++2m", "unipc", "ddim", "dpm-solver", "reverse-sde", "euler-a"],
    "flow matching": ["calibrated", "pf-ode", "dpm++2m", "unipc", "euler", "dpm-solver", "heun", "reverse-sde"],
    "EDM": ["calibrated", "pf-ode", "dpm++2m", "euler", "dpm-solver", "reverse-sde"],
}
