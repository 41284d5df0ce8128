"""Tab 1, computed: a sheet of samplers x evaluations from the same noise, filled cell by cell.

Knows what a visitor may ask for, the references that are known already, and the program that reproduces a cell;
:mod:`diffusers_sde.comparison.engine` solves.  Knows no interface.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from diffusers_sde.comparison.engine import (
    Comparison,
    available_samplers,
    compare,
    default_samplers,
    reference_steps_for,
)
from diffusers_sde.comparison.problems import Problem, Tick
from diffusers_sde.comparison.report import draw_grid, write_csv
from diffusers_sde.methods.pipeline_io import sample_shape
from diffusers_sde.named_samplers import CALIBRATED, make_scheduler, reference_scheduler
from diffusers_sde.sampler_names import DEFAULT_SAMPLERS, SAMPLERS
from diffusers_sde.sampling import spread_labels
from space import inputs, models
from space.gpu import duration, on_gpu

Key, Value = TypeVar("Key"), TypeVar("Value")

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
    guidance: float = 7.5
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
    default, samplers, guidance = Request(), values.get("samplers"), values.get("guidance")
    model = models.find(values.get("model", default.model))
    models.labels_of(model, values.get("choice"), 1)
    request = Request(
        model=model.key,
        choice=values.get("choice") or default.choice,
        prompt=inputs.prompt(values.get("prompt")),
        seed=inputs.seed(values.get("seed", default.seed)),
        budgets=tuple(inputs.budgets(values.get("budgets", default.budgets))),
        samplers=() if samplers is None else tuple(inputs.samplers(samplers)),
        guidance=inputs.number((model.guidance or 1.0) if guidance is None else guidance, 0, 20, "Guidance"),
        images=inputs.integer(values.get("images", default.images), 1, inputs.MAX_IMAGES, "The number of images"),
    )
    inputs.work(len(request.samplers) or PRESELECTED, request.budgets, request.images)
    return request


def choices(key: str) -> tuple[list[str], list[str]]:
    """The samplers to choose from with a model, and those that are chosen at first; for a model that takes long to load
    all names but the calibrated one."""
    model = models.MODELS[key]
    if not model.embedded or models.unavailable(model):
        names = [name for name, sampler in SAMPLERS.items() if not sampler.learned]
        return names, [name for name in DEFAULT_SAMPLERS["variance preserving"] if name in names][:PRESELECTED]
    problem = models.problem(key)
    return available_samplers(problem), default_samplers(problem, Request().budgets, PRESELECTED)


class Recent(Generic[Key, Value]):
    """The last ``kept`` values, whoever made them: what a page knows is a key, so that pages left open keep nothing."""

    def __init__(self, kept: int):
        self._kept, self._values, self._lock = kept, OrderedDict[Key, Value](), threading.Lock()

    def get(self, key: Key) -> Value | None:
        with self._lock:
            return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._kept:
                self._values.popitem(last=False)


_references: Recent[tuple, torch.Tensor] = Recent(16)  # other samplers and budgets on the same noise need no new one
_finished: Recent[Request, Sheet] = Recent(16)


def finished(request: Request | None) -> Sheet | None:
    """The finished sheet of a recent request."""
    return None if request is None else _finished.get(request)


def _reference(problem: Problem, start: tuple, tick: Tick, steps: int) -> torch.Tensor:
    """The reference solution of a request, kept for the next ones."""
    images = _references.get((*start, steps))
    if images is None:
        images = problem.solve(reference_scheduler(problem.config), steps, tick)
        _references.put((*start, steps), images)
    return images


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
def sheets(request: Request, tick: Tick = lambda: None) -> Generator[Sheet]:
    """The sheet in each state of :func:`diffusers_sde.comparison.engine.compare`.

    Stop iterating to cancel; ``tick`` is called after each evaluation.  Raises :class:`UsageError` for a sampler that
    does not fit the model.
    """
    problem = problem_of(request)
    samplers = request.samplers or default_samplers(problem, request.budgets, PRESELECTED)
    solve_reference = functools.partial(_reference, problem, request.start, tick)
    for state in compare(problem, samplers, request.budgets, solve_reference=solve_reference, tick=tick):
        sheet = Sheet(request, state)
        if state.finished:
            _finished.put(request, sheet)
        yield sheet


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
    """A Python program that makes the pixels of this cell: a pipeline's pictures, or tensors of a bare network."""
    model, problem = models.find(request.model), problem_of(request)
    scheduler, steps = make_scheduler(sampler, problem.config), SAMPLERS[sampler].steps(budget)
    name, package = type(scheduler).__name__, "diffusers_sde" if SAMPLERS[sampler].ours else "diffusers"
    if SAMPLERS[sampler].learned:
        construct = f'{name}.from_pretrained(f"{{pipe.name_or_path}}/{CALIBRATED}")'
    else:
        config = models.shared_pipeline(model).scheduler.config
        options = "".join(f", {k}={v!r}" for k, v in changes(scheduler, config).items())
        construct = f"{name}.from_config(pipe.scheduler.config{options})"
    load, imported = f"{model.loader}()", f"from diffusers_sde.assets import {model.loader}"
    if not model.embedded:
        load = f'DiffusionPipeline.from_pretrained("{model.source}", dtype=torch.float16).to("cuda")'
        imported = "from diffusers import DiffusionPipeline"
    imports = "\n".join(sorted({imported, f"from {package} import {name}"}))
    if problem.own_loop and model.embedded:
        return _network_program(request, model, imports, load, construct, steps)
    words = f"batch_size={request.images}"
    if model.prompted:
        words = json.dumps(models.prompts_of(request.prompt, request.images), ensure_ascii=False)
    guided = f"guidance_scale={request.guidance:g}, " if model.guidance is not None else ""
    return f"""import torch
{imports}

pipe = {load}
pipe.scheduler = {construct}
generators = [torch.Generator().manual_seed({request.seed} + i) for i in range({request.images})]
images = pipe(
    {words},
    {guided}num_inference_steps={steps}, generator=generators,
).images
"""


def _network_program(request: Request, model: models.Model, imports: str, load: str, construct: str, steps: int) -> str:
    labels = models.labels_of(model, request.choice, request.images)
    labels = labels or spread_labels(request.images, len(model.classes))
    shape = (request.images, *sample_shape(models.shared_pipeline(model).unet))
    return f"""import torch
{imports}
from diffusers_sde.sampling import lay_out, network_denoiser, sample

pipe = {load}
scheduler = {construct}
lay_out(scheduler, {steps})

generator = torch.Generator().manual_seed({request.seed})
noise = torch.randn({shape}, generator=generator)
denoiser = network_denoiser(pipe.unet, torch.tensor({labels}), guidance_scale={request.guidance:g})
images = sample(denoiser, scheduler, noise, generator=generator)  # values in [-1, 1]
"""
