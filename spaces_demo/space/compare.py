"""Tab 1, computed: a sheet of samplers x evaluations from the same noise, filled cell by cell.

Knows what a visitor may ask for, the references that are known already, and the program that reproduces a cell;
:mod:`diffusers_sde.comparison.engine` solves.  Knows no interface.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_sde.comparison.engine import (
    Comparison,
    available_samplers,
    compare,
    default_samplers,
    reference_steps_for,
)
from diffusers_sde.comparison.problems import Problem
from diffusers_sde.comparison.report import draw_grid, write_csv
from diffusers_sde.methods.pipeline_io import sample_shape
from diffusers_sde.named_samplers import make_scheduler, reference_scheduler
from diffusers_sde.sampler_names import DEFAULT_SAMPLERS, SAMPLERS
from diffusers_sde.sampling import spread_labels
from space import inputs, models
from space.gpu import duration, on_gpu

PRESELECTED = 4  # of the default samplers, those that are chosen at first


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked by :func:`checked`; no ``samplers``: the model's first default ones."""

    model: str = models.DEFAULT
    choice: str = "mix"
    prompt: str = ""
    seed: int = 0
    budgets: tuple[int, ...] = (5, 10)
    samplers: tuple[str, ...] = ()
    guidance: float = 2.0
    images: int = 4

    @property
    def start(self) -> tuple:
        """What the reference solution depends on."""
        return self.model, self.choice, self.prompt, self.seed, self.guidance, self.images


@dataclass(frozen=True)
class Sheet:
    """What was asked for and what is known so far."""

    request: Request
    comparison: Comparison


def checked(**values: Any) -> Request:
    """A :class:`Request` of raw inputs; raises :class:`UsageError` that says what to change."""
    default, samplers = Request(), values.get("samplers")
    model = models.find(values.get("model", default.model))
    models.labels_of(model, values.get("choice"), 1)
    return Request(
        model=model.key,
        choice=values.get("choice") or default.choice,
        prompt=inputs.prompt(values.get("prompt")),
        seed=inputs.seed(values.get("seed", default.seed)),
        budgets=tuple(inputs.budgets(values.get("budgets", default.budgets))),
        samplers=() if samplers is None else tuple(inputs.samplers(samplers)),
        guidance=inputs.number(values.get("guidance", default.guidance), 0, 20, "Guidance"),
        images=inputs.integer(values.get("images", default.images), 1, inputs.MAX_IMAGES, "The number of images"),
    )


def choices(key: str) -> tuple[list[str], list[str]]:
    """The samplers to choose from with a model, and those that are chosen at first; for a model that takes long to load
    all names but the calibrated one."""
    model = models.MODELS[key]
    if not model.embedded or models.unavailable(model):
        names = [name for name, sampler in SAMPLERS.items() if not sampler.learned]
        return names, [name for name in DEFAULT_SAMPLERS["variance preserving"] if name in names][:PRESELECTED]
    problem = models.problem(key)
    return available_samplers(problem), default_samplers(problem, Request().budgets, PRESELECTED)


# references of recent requests: other samplers and budgets on the same noise need no new one
_references: OrderedDict[tuple, torch.Tensor] = OrderedDict()
_lock = threading.Lock()
_KEPT = 16


def _reference(problem: Problem, start: tuple, steps: int) -> torch.Tensor:
    """The reference solution of a request, kept for the next ones."""
    key = (*start, steps)
    if key not in _references:
        images = problem.solve(reference_scheduler(problem.config), steps, lambda: None)
        with _lock:
            _references[key] = images
            while len(_references) > _KEPT:
                _references.popitem(last=False)
    return _references[key]


def _seconds(request: Request) -> int:
    samplers = len(request.samplers) or PRESELECTED
    return duration(request.model, request.budgets, samplers, reference_steps_for(request.budgets))


def problem_of(request: Request) -> Problem:
    """What every cell of a request solves."""
    return models.problem(
        request.model,
        choice=request.choice,
        prompt=request.prompt,
        seed=request.seed,
        guidance=request.guidance,
        images=request.images,
    )


@on_gpu(_seconds)
def sheets(request: Request) -> Iterator[Sheet]:
    """The sheet in each state of :func:`diffusers_sde.comparison.engine.compare`.

    Stop iterating to cancel.  Raises :class:`UsageError` for a sampler that does not fit the model.
    """
    problem = problem_of(request)
    samplers = request.samplers or default_samplers(problem, request.budgets, PRESELECTED)
    solve_reference = functools.partial(_reference, problem, request.start)
    for state in compare(problem, samplers, request.budgets, solve_reference=solve_reference):
        yield Sheet(request, state)


def write_files(sheet: Sheet, folder: Path) -> tuple[Path, Path]:
    """``compare.png`` and ``compare.csv`` of a finished sheet."""
    files = folder / "compare.png", folder / "compare.csv"
    draw_grid(sheet.comparison, files[0])
    write_csv(sheet.comparison, files[1])
    return files


# -- the program of a cell --


def changes(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make ``from_config(config)`` of its class this scheduler."""
    plain = type(scheduler).from_config(dict(config)).config
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_") and plain.get(k) != v}


def program(request: Request, sampler: str, budget: int) -> str:
    """A Python program whose ``images`` are the pixels of this cell."""
    model = models.find(request.model)
    problem = problem_of(request)
    scheduler, steps = make_scheduler(sampler, problem.config), SAMPLERS[sampler].steps(budget)
    name, package = type(scheduler).__name__, "diffusers_sde" if SAMPLERS[sampler].ours else "diffusers"
    config = models.shared_pipeline(model).scheduler.config
    if SAMPLERS[sampler].learned:
        folder = "Path(diffusers_sde.assets.__file__).parent"
        construct = f'{name}.from_pretrained({folder} / "{model.source}" / "calibrated")'
    else:
        options = "".join(f", {k}={v!r}" for k, v in changes(scheduler, config).items())
        construct = f"{name}.from_config(pipe.scheduler.config{options})"
    load = f'DiffusionPipeline.from_pretrained("{model.source}", dtype=torch.float16).to("cuda")'
    if model.embedded:
        load = f'DDPMPipeline.from_pretrained(Path(diffusers_sde.assets.__file__).parent / "{model.source}")'
    if model.prompted or not model.embedded:
        return _pipeline_program(request, model, package, name, load, construct, steps)
    labels = models.labels_of(model, request.choice, request.images)
    labels = labels or spread_labels(request.images, len(model.classes))
    shape = (request.images, *sample_shape(models.shared_pipeline(model).unet))
    return f"""from pathlib import Path

import torch
from diffusers import DDPMPipeline

import diffusers_sde.assets
from diffusers_sde.sampling import lay_out, network_denoiser, sample
from {package} import {name}

pipe = {load}
scheduler = {construct}
lay_out(scheduler, {steps})

generator = torch.Generator().manual_seed({request.seed})
noise = torch.randn({shape}, generator=generator)
denoiser = network_denoiser(pipe.unet, torch.tensor({labels}), guidance_scale={request.guidance:g})
images = sample(denoiser, scheduler, noise, generator=generator)  # values in [-1, 1]
"""


def _pipeline_program(
    request: Request, model: models.Model, package: str, name: str, load: str, construct: str, steps: int
) -> str:
    words = f"[{request.prompt!r}] * {request.images}" if model.prompted else f"batch_size={request.images}"
    guided = f", guidance_scale={request.guidance:g}" if model.guidance is not None else ""
    return f"""import torch
from diffusers import DiffusionPipeline

from {package} import {name}

pipe = {load}
pipe.scheduler = {construct}
generator = [torch.Generator().manual_seed({request.seed} + i) for i in range({request.images})]
images = pipe({words}{guided}, num_inference_steps={steps}, generator=generator).images
"""
