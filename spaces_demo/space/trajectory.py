"""Tab 2, computed: one picture's way from noise, and what the number of steps and the noise level do to it.

Knows which runs are made from one noise.  Knows no interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler, TableScheduler
from diffusers_sde.errors import UsageError
from diffusers_sde.methods.pipeline_io import sample_shape
from diffusers_sde.named_samplers import make_scheduler
from diffusers_sde.sampling import Denoiser, network_denoiser, sample
from space import inputs, models
from space.recording import Recording, record

STEP_COUNTS = (10, 20, 40)
TAUS = (0.0, 0.5, 1.0, 2.0)
STAYING = ("ODE", "SDE", "Euler ancestral")


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked by :func:`checked`."""

    model: str = models.DEFAULT
    choice: str = "ankle boot"
    seed: int = 0
    steps: int = 20
    tau: float = 1.0
    guidance: float = 2.0


@dataclass(frozen=True)
class Journey:
    """What is known so far: the recorded path; the final picture (1, C, H, W) of ``(kind, steps)`` for each of STAYING
    and STEP_COUNTS, of each of TAUS; ``done`` of ``total`` runs."""

    request: Request
    path: Recording | None
    staying: Mapping[tuple[str, int], torch.Tensor]
    dial: Mapping[float, torch.Tensor]
    done: int
    total: int


def checked(**values: Any) -> Request:
    """A :class:`Request` of raw inputs; raises :class:`UsageError` that says what to change."""
    model = models.find(values.get("model", models.DEFAULT))
    if model.prompted or not model.embedded:
        raise UsageError(f"{model.title} works in a latent space: choose a model that ships with the demo here.")
    choice = values.get("choice") or model.classes[-1]
    models.labels_of(model, choice, 1)
    return Request(
        model=model.key,
        choice=choice,
        seed=inputs.seed(values.get("seed", 0)),
        steps=inputs.steps(values.get("steps", 20)),
        tau=inputs.number(values.get("tau", 1.0), 0, 2, "The noise level tau"),
        guidance=inputs.number(values.get("guidance", 2.0), 0, 20, "Guidance"),
    )


def solver(config: Mapping[str, Any], tau: float, seed: int) -> TableScheduler:
    """The probability flow ODE at tau = 0, else the reverse SDE with a Brownian path of this seed."""
    if tau == 0:
        return ProbabilityFlowScheduler.from_config(config)
    return ReverseSDEScheduler.from_config(config, tau=tau, noise_seed=seed)


def journey(request: Request) -> Iterator[Journey]:
    """The path first, then each final picture as it is ready."""
    model = models.find(request.model)
    pipe = models.shared_pipeline(model)
    labels = models.labels_of(model, request.choice, 1) or [0]
    denoiser = network_denoiser(pipe.unet, torch.tensor(labels), request.guidance)
    generator = torch.Generator().manual_seed(request.seed)
    noise = torch.randn(1, *sample_shape(pipe.unet), generator=generator)
    config = pipe.scheduler.config

    def solved(tau: float, steps: int) -> torch.Tensor:
        return finish(denoiser, solver(config, tau, request.seed), steps, noise)

    total = 1 + len(STAYING) * len(STEP_COUNTS) + len(TAUS)
    scheduler = solver(config, request.tau, request.seed)
    scheduler.set_timesteps(request.steps)
    state = Journey(request, record(denoiser, scheduler, noise), {}, {}, 1, total)
    yield state
    for kind in STAYING:
        for steps in STEP_COUNTS:
            if kind == "Euler ancestral":
                ancestral = make_scheduler("euler-a", config)
                assert isinstance(ancestral, EulerAncestralDiscreteScheduler)
                generator = torch.Generator().manual_seed(request.seed)
                picture = finish(denoiser, ancestral, steps, noise, generator)
            else:
                picture = solved(0.0 if kind == "ODE" else request.tau or 1.0, steps)
            state = replace(state, staying={**state.staying, (kind, steps): picture}, done=state.done + 1)
        yield state
    for tau in TAUS:
        state = replace(state, dial={**state.dial, tau: solved(tau, STEP_COUNTS[1])}, done=state.done + 1)
    yield state


def finish(denoiser: Denoiser, scheduler: Any, steps: int, noise: torch.Tensor, generator: Any = None) -> torch.Tensor:
    """The final picture of a run."""
    scheduler.set_timesteps(steps)
    return sample(denoiser, scheduler, noise, generator=generator)


def likeness(left: torch.Tensor, right: torch.Tensor) -> float:
    """Correlation of two pictures' pixels."""
    a, b = (x.double().flatten() - x.double().mean() for x in (left, right))
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-12))
