"""Tab 2, computed: one picture's way from noise, and what the number of steps and the noise level do to it.

Knows which runs are made from one noise.  Knows no interface.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler, TableScheduler
from diffusers_sde.comparison.problems import Tick
from diffusers_sde.errors import UsageError
from diffusers_sde.named_samplers import make_scheduler, process_family
from diffusers_sde.sampling import sample
from space import inputs, models
from space.recording import record

STEP_COUNTS = (10, 20, 40)
TAUS = (0.0, 0.5, 1.0, 2.0)
STAYING = ("ODE", "SDE", "Euler ancestral")
MAX_FRAMES = 21


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked by :func:`checked`; an empty ``prompt``: the first example."""

    model: str = models.DEFAULT
    choice: str = ""
    prompt: str = ""
    seed: int = 0
    steps: int = 20
    tau: float = 1.0
    guidance: float = 7.5


@dataclass(frozen=True)
class Frame:
    """A moment of the way, as pictures (1, C, H, W): the state, the predicted data, and the half log-SNR."""

    state: torch.Tensor
    clean: torch.Tensor
    log_snr: float


@dataclass(frozen=True)
class Journey:
    """What is known so far: the frames of the way; the final picture (1, C, H, W) of ``(kind, steps)`` for each of
    STAYING that the model's process has and of STEP_COUNTS, and of each of TAUS; ``done`` of ``total`` runs."""

    request: Request
    frames: tuple[Frame, ...]
    staying: Mapping[tuple[str, int], torch.Tensor]
    dial: Mapping[float, torch.Tensor]
    done: int
    total: int


def checked(**values: Any) -> Request:
    """A :class:`Request` of raw inputs; raises :class:`UsageError` that says what to change."""
    default, guidance = Request(), values.get("guidance")
    model = models.find(values.get("model", default.model))
    if not model.embedded:
        raise UsageError(f"{model.title} is too large to be watched: choose a model that ships with the demo here.")
    choice = values.get("choice") or (model.classes[-1] if model.classes else "")
    models.labels_of(model, choice, 1)
    return Request(
        model=model.key,
        choice=choice,
        prompt=inputs.prompt(values.get("prompt")),
        seed=inputs.seed(values.get("seed", default.seed)),
        steps=inputs.steps(values.get("steps", default.steps)),
        tau=inputs.number(values.get("tau", default.tau), 0, 2, "The noise level tau"),
        guidance=inputs.number((model.guidance or 1.0) if guidance is None else guidance, 0, 20, "Guidance"),
    )


def solver(config: Mapping[str, Any], tau: float, seed: int) -> TableScheduler:
    """The probability flow ODE at tau = 0, else the reverse SDE with a Brownian path of this seed."""
    if tau == 0:
        return ProbabilityFlowScheduler.from_config(config)
    return ReverseSDEScheduler.from_config(config, tau=tau, noise_seed=seed)


def journey(request: Request, tick: Tick = lambda: None) -> Generator[Journey]:
    """The path first, then each final picture as it is ready; ``tick`` is called after each evaluation."""
    model = models.one_picture(request.model, request.choice, request.prompt, request.guidance)
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(request.seed))
    kinds = STAYING if process_family(model.config) == "variance preserving" else STAYING[:2]  # what diffusers has

    def solved(scheduler: Any, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        ours = isinstance(scheduler, TableScheduler)  # has its Brownian path
        generator = None if ours else torch.Generator().manual_seed(request.seed)
        return model.pictures(sample(model.denoiser, scheduler, noise, generator=generator, callback=tick))

    def sampler(kind: str) -> Any:
        if kind == "Euler ancestral":
            return make_scheduler("euler-a", model.config)
        return solver(model.config, 0.0 if kind == "ODE" else request.tau or 1.0, request.seed)

    scheduler = solver(model.config, request.tau, request.seed)
    scheduler.set_timesteps(request.steps)
    total = 1 + len(kinds) * len(STEP_COUNTS) + len(TAUS)
    state = Journey(request, frames(model, scheduler, noise, tick), {}, {}, 1, total)
    yield state
    for kind in kinds:
        for steps in STEP_COUNTS:
            staying = {**state.staying, (kind, steps): solved(sampler(kind), steps)}
            state = replace(state, staying=staying, done=state.done + 1)
            yield state
    for tau in TAUS:
        dial = {**state.dial, tau: solved(solver(model.config, tau, request.seed), STEP_COUNTS[1])}
        state = replace(state, dial=dial, done=state.done + 1)
        yield state


def frames(model: models.OnePicture, scheduler: TableScheduler, noise: torch.Tensor, tick: Tick) -> tuple[Frame, ...]:
    """At most :data:`MAX_FRAMES` moments of a run whose timesteps are set, in even steps from noise to the end."""
    path = record(model.denoiser, scheduler, noise, tick)
    shown = np.unique(np.linspace(0, len(path.states) - 1, MAX_FRAMES).round().astype(int))
    clean = torch.cat([path.clean, path.states[-1:]])[shown, 0]
    states = model.pictures(path.states[shown, 0])
    return tuple(
        Frame(state[None], data[None], float(level))
        for state, data, level in zip(states, model.pictures(clean), path.levels.log_snr[shown], strict=True)
    )


def likeness(left: torch.Tensor, right: torch.Tensor) -> float:
    """Correlation of two pictures' pixels."""
    a, b = (x.double().flatten() - x.double().mean() for x in (left, right))
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-12))
