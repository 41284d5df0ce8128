"""Tab 1, computed: a sheet of samplers x evaluations from the same noise, filled cell by cell.

Knows what is solved in which order, the reference, and the program that reproduces a cell.  Knows no interface.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusers_sde.comparison.command import check_samplers, rmse
from diffusers_sde.comparison.problems import Problem, spread_labels
from diffusers_sde.comparison.report import Comparison, Result, draw_grid, write_csv
from diffusers_sde.errors import UsageError
from diffusers_sde.methods.pipeline_io import sample_shape
from diffusers_sde.named_samplers import SAMPLERS, make_scheduler, process_kind, reference_scheduler
from space import inputs, models
from space.gpu import duration, on_gpu

REFERENCE_STEPS = 64
DEFAULT_SAMPLERS = ("calibrated", "pf-ode", "dpm++2m", "unipc")


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked by :func:`checked`."""

    model: str = models.DEFAULT
    choice: str = "mix"
    prompt: str = ""
    seed: int = 0
    budgets: tuple[int, ...] = (5, 10)
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS[1:]
    guidance: float = 2.0
    images: int = 4

    @property
    def start(self) -> tuple:
        """What the reference solution depends on."""
        return self.model, self.choice, self.prompt, self.seed, self.guidance, self.images


@dataclass(frozen=True)
class Sheet:
    """The state of a comparison: the finished cells, ``done`` of ``total`` evaluations, the reference once there is
    one (its distance to the solution with half the evaluations comes last)."""

    request: Request
    results: tuple[Result, ...]
    reference: torch.Tensor | None
    reference_error: float | None
    done: int
    total: int

    def cell(self, sampler: str, budget: int) -> Result | None:
        return next((r for r in self.results if (r.sampler, r.budget) == (sampler, budget)), None)

    @property
    def finished(self) -> bool:
        return self.reference_error is not None


def checked(**values: Any) -> Request:
    """A :class:`Request` of raw inputs; raises :class:`UsageError` that says what to change."""
    model = models.find(values.get("model", models.DEFAULT))
    models.labels_of(model, values.get("choice"), 1)
    return Request(
        model=model.key,
        choice=values.get("choice") or "mix",
        prompt=inputs.prompt(values.get("prompt")),
        seed=inputs.seed(values.get("seed", 0)),
        budgets=tuple(inputs.budgets(values.get("budgets", (5, 10)))),
        samplers=tuple(inputs.samplers(values.get("samplers", DEFAULT_SAMPLERS[1:]))),
        guidance=inputs.number(values.get("guidance", 2.0), 0, 20, "Guidance"),
        images=inputs.integer(values.get("images", 4), 1, inputs.MAX_IMAGES, "The number of images"),
    )


def offered(key: str) -> list[str]:
    """The samplers that fit a model that is loaded without delay, all names for the others."""
    model = models.MODELS[key]
    if not model.embedded or models.unavailable(model):
        return [name for name in SAMPLERS if name != "calibrated"]
    config, fitting = models.problem(key).config, []
    for name in SAMPLERS:
        try:
            make_scheduler(name, config)
        except UsageError:
            continue
        fitting.append(name)
    return fitting


# references of recent requests: other samplers and budgets on the same noise need no new one
_references: OrderedDict[tuple, torch.Tensor] = OrderedDict()
_lock = threading.Lock()
_KEPT = 16


def _remember(key: tuple, images: torch.Tensor) -> None:
    with _lock:
        _references[key] = images
        while len(_references) > _KEPT:
            _references.popitem(last=False)


def reference_steps(request: Request) -> int:
    """Evaluations of the reference solution."""
    return max(REFERENCE_STEPS, 2 * request.budgets[-1])


def _seconds(request: Request) -> int:
    return duration(request.model, request.budgets, request.samplers, reference_steps(request))


def _problem(request: Request) -> Any:
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
    """The sheet after each solution: first a cell, then the reference, the other cells, the reference's own error.

    Stop iterating to cancel.  Raises :class:`UsageError` for a sampler that does not fit the model.
    """
    problem = _problem(request)
    check_samplers(request.samplers, request.budgets, problem)
    cells = [(name, n) for n in request.budgets for name in request.samplers]
    steps = reference_steps(request)
    coarse_cost, costs = steps // 2, [SAMPLERS[name].evaluations(n) for name, n in cells]
    sheet = Sheet(request, (), None, None, 0, steps + coarse_cost + sum(costs))

    for i, ((name, budget), cost) in enumerate(zip(cells, costs, strict=True)):
        result = solve_cell(problem, name, budget, sheet.reference)
        sheet = replace(sheet, results=(*sheet.results, result), done=sheet.done + cost)
        yield sheet
        if i == 0:
            reference = _reference(problem, request.start, steps)
            sheet = replace(
                sheet,
                reference=reference,
                results=tuple(with_error(r, reference) for r in sheet.results),
                done=sheet.done + steps,
            )
            yield sheet
    assert sheet.reference is not None
    error = float(rmse(_reference(problem, request.start, coarse_cost), sheet.reference).mean())
    yield replace(sheet, reference_error=error, done=sheet.total)


def _reference(problem: Problem, start: tuple, steps: int) -> torch.Tensor:
    key = (*start, steps)
    if key not in _references:
        _remember(key, problem.solve(reference_scheduler(problem.config), steps, lambda: None))
    return _references[key]


def solve_cell(problem: Problem, name: str, budget: int, reference: torch.Tensor | None = None) -> Result:
    """One cell: images, true evaluations, seconds; its error where there is a reference."""
    scheduler = make_scheduler(name, problem.config)
    start = time.perf_counter()
    images = problem.solve(scheduler, SAMPLERS[name].steps(budget), lambda: None)
    result = Result(name, budget, len(scheduler.timesteps), time.perf_counter() - start, images, None)
    return result if reference is None else with_error(result, reference)


def with_error(result: Result, reference: torch.Tensor) -> Result:
    """``result`` with its distance to the reference; a stochastic sampler has none."""
    return result if SAMPLERS[result.sampler].stochastic else replace(result, errors=rmse(result.images, reference))


def comparison(sheet: Sheet) -> Comparison:
    """A finished sheet as what ``diffusers-sde compare`` writes."""
    assert sheet.reference is not None and sheet.reference_error is not None
    order = {name: i for i, name in enumerate(sheet.request.samplers)}
    results = sorted(sheet.results, key=lambda r: (order[r.sampler], r.budget))
    return Comparison(results, sheet.reference, reference_steps(sheet.request), sheet.reference_error)


def write_files(sheet: Sheet, folder: Path) -> tuple[Path, Path]:
    """``compare.png`` and ``compare.csv`` of a finished sheet."""
    done, files = comparison(sheet), (folder / "compare.png", folder / "compare.csv")
    draw_grid(done, files[0])
    write_csv(done, files[1])
    return files


# -- the program of a cell --


def changes(scheduler: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make ``from_config(config)`` of its class this scheduler."""
    plain = type(scheduler).from_config(dict(config)).config
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_") and plain.get(k) != v}


def program(request: Request, sampler: str, budget: int) -> str:
    """A Python program whose ``images`` are the pixels of this cell."""
    model = models.find(request.model)
    problem = _problem(request)
    scheduler, steps = make_scheduler(sampler, problem.config), SAMPLERS[sampler].steps(budget)
    name, ours = type(scheduler).__name__, type(scheduler).__module__.startswith("diffusers_sde")
    package = "diffusers_sde" if ours else "diffusers"
    config = models.shared_pipeline(model).scheduler.config
    if sampler == "calibrated":
        folder = "Path(diffusers_sde.assets.__file__).parent"
        construct = f'{name}.from_pretrained({folder} / "{model.source}" / "calibrated")'
    else:
        options = "".join(f", {k}={v!r}" for k, v in changes(scheduler, config).items())
        construct = f"{name}.from_config(pipe.scheduler.config{options})"
    load = f'DiffusionPipeline.from_pretrained("{model.source}", dtype=torch.float16).to("cuda")'
    if model.embedded:
        load = f'DDPMPipeline.from_pretrained(Path(diffusers_sde.assets.__file__).parent / "{model.source}")'
    layout = f"scheduler.set_timesteps({steps})"
    if process_kind(problem.config) == "flow matching" and name == "FlowMatchEulerDiscreteScheduler":
        layout = f"scheduler.set_timesteps(sigmas=np.linspace(1, 1 / {steps}, {steps}).tolist())"
    if model.prompted or not model.embedded:
        return _pipeline_program(request, model, package, name, load, construct, steps)
    labels = models.labels_of(model, request.choice, request.images)
    labels = labels or spread_labels(request.images, len(model.classes))
    shape = (request.images, *sample_shape(models.shared_pipeline(model).unet))
    return f"""from pathlib import Path

import torch
from diffusers import DDPMPipeline

import diffusers_sde.assets
from diffusers_sde.sampling import network_denoiser, sample
from {package} import {name}

pipe = {load}
scheduler = {construct}
{layout}

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
