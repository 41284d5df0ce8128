"""``diffusers-sde compare``: several samplers, the same noise, one model; pictures, errors and a table.

Knows samplers by name (this package's and diffusers' own), how to set each up for the process of a model so that all
of them solve the same equation, and how to measure and draw the results.  Knows no solver and no particular network.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import inspect
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.assets import DEFAULT_MODEL
from diffusers_sde.paths import FlowMatching, VarianceExploding, path_from_config
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers.config import SHARED, canonical_config


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""


# -- samplers by name -----------------------------------------------------------------------------------------------

# No sampler may clip: each would then solve an equation of its own.
UNLIMITED = {"clip_sample": False, "thresholding": False}

PROCESS_KEYS = {
    "variance preserving": "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr "
    "snr_shift_scale prediction_type",
    "flow matching": "num_train_timesteps shift use_dynamic_shifting base_shift max_shift base_image_seq_len "
    "max_image_seq_len time_shift_type shift_terminal invert_sigmas",
    "EDM": "num_train_timesteps prediction_type sigma_data sigma_min sigma_max sigma_schedule",
}


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
    path = path_from_config(canonical_config(config))
    if isinstance(path, FlowMatching):
        return "flow matching"
    return "EDM" if isinstance(path, VarianceExploding) else "variance preserving"


def _process(config: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The keys of ``config`` that say what its process is, and ``more``; what its solver was set to stays behind."""
    source = canonical_config(config)
    return {k: source[k] for k in (*PROCESS_KEYS[process_kind(config)].split(), *more) if k in source}


def _ours(cls: type, **options: Any) -> Callable[[Mapping[str, Any]], Any]:
    own = ("prediction_type", "use_flow_sigmas", "noise_conditioning", "variance_type")

    def build(config: Mapping[str, Any]) -> Any:
        known = inspect.signature(cls).parameters
        return cls(**{**{k: v for k, v in _process(config, *own).items() if k in known}, **UNLIMITED, **options})

    return build


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
        if "use_flow_sigmas" in known and kind == "flow matching":
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": process.pop("shift")}
            process |= flow
        lost = [k for k, v in process.items() if k not in known and v != getattr(SHARED.get(k), "default", v)]
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
    "variance preserving": ["pf-ode", "dpm-solver", "ddim", "dpm++2m", "unipc", "reverse-sde", "euler-a"],
    "flow matching": ["pf-ode", "dpm-solver", "euler", "dpm++2m", "unipc", "heun", "reverse-sde"],
    "EDM": ["pf-ode", "dpm-solver", "euler", "dpm++2m", "reverse-sde"],
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
    grid = {"grid": "karras"} if process_kind(config) == "EDM" else {"grid": "power", "rho": 1.5}
    return _ours(ProbabilityFlowScheduler, solver_order=2, corrector=True, **grid)(config)


# -- a model as a problem to solve ----------------------------------------------------------------------------------

Tick = Callable[[], None]


@dataclass(frozen=True)
class Problem:
    """A model with everything but the sampler fixed: ``solve(scheduler, steps, tick)`` returns images (N, C, H, W) with
    values around [-1, 1] on the CPU, from the same noise each time, and calls ``tick`` after each evaluation."""

    config: Mapping[str, Any]
    solve: Callable[[Any, int, Tick], torch.Tensor]
    own_loop: bool


def load_pipeline(model: str) -> diffusers.DiffusionPipeline:
    """The pipeline in a folder or of a hub id; raises :class:`UsageError` where there is none."""
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} is no pipeline (it has no model_index.json): pass a folder of save_pretrained.")
    if not folder.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UsageError(f"{model} does not exist: pass a pipeline's folder or a hub id like google/ddpm-cifar10-32.")
    try:
        return diffusers.DiffusionPipeline.from_pretrained(model)
    except Exception as error:  # whatever it is: hub, cache, network, json and weights each raise their own
        where = "is a broken pipeline folder" if folder.exists() else "is no folder and could not be had from the Hub"
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{model} {where} ({type(error).__name__}: {reason}): check it, or pass another --model."
        ) from error


def make_problem(
    pipe: diffusers.DiffusionPipeline,
    *,
    num_images: int,
    seed: int,
    guidance_scale: float | None = None,
    prompt: str | None = None,
) -> Problem:
    """``pipe`` as a :class:`Problem`: a bare network in this package's loop, any other pipeline through its call.

    Raises :class:`UsageError` for what the model does not take (guidance, prompt) or needs (prompt), and for a
    scheduler that names no known process.
    """
    try:
        process_kind(pipe.scheduler.config)
    except (AttributeError, ValueError) as error:
        raise UsageError(f"This model has no scheduler with a known diffusion process: {error}") from error
    if set(pipe.components) == {"unet", "scheduler"}:
        if prompt is not None:
            raise UsageError("This model takes no prompt: leave out --prompt.")
        return _network_problem(pipe, num_images, seed, guidance_scale)
    return _pipeline_problem(pipe, num_images, seed, guidance_scale, prompt)


def _network_problem(pipe: Any, num_images: int, seed: int, guidance_scale: float | None) -> Problem:
    network, device = pipe.unet, pipe.device
    classes = getattr(network.config, "num_class_embeds", None)
    if not classes and guidance_scale not in (None, 1.0):
        raise UsageError(
            "Guidance needs a class-conditional model, this one has no classes: leave out --guidance_scale."
        )
    scale = (2.0 if classes else 1.0) if guidance_scale is None else guidance_scale
    labels = torch.tensor(spread_labels(num_images, classes - 1), device=device) if classes else None
    denoiser, size = network_denoiser(network, labels, scale), network.config.sample_size
    channels = network.config.in_channels
    shape = (num_images, channels, *((size, size) if isinstance(size, int) else size))

    def mean(x: torch.Tensor, t: Any) -> torch.Tensor:
        return denoiser(x, t)[:, :channels]  # without a learned variance, which some of the samplers cannot take

    def solve(scheduler: Any, steps: int, tick: Tick) -> torch.Tensor:
        # the noise of a stochastic sampler goes on where that of the start ended, as in a pipeline
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(shape, generator=generator).to(device)
        lay_out(scheduler, steps)
        return sample(mean, scheduler, start, generator=generator, callback=tick).float().cpu()

    return Problem(pipe.scheduler.config, solve, own_loop=True)


def lay_out(scheduler: Any, steps: int) -> None:
    """``set_timesteps``, trailing for flow matching Euler too, which has no option for it."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)


def _pipeline_problem(
    pipe: Any, num_images: int, seed: int, guidance_scale: float | None, prompt: str | None
) -> Problem:
    known, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    inputs: dict[str, Any] = {"output_type": "np"}
    if "generator" not in known:
        raise UsageError(f"{name} takes no generator, so its noise cannot be fixed: pass another --model.")
    if guidance_scale is not None:
        if "guidance_scale" not in known:
            raise UsageError(f"{name} takes no guidance: leave out --guidance_scale.")
        inputs["guidance_scale"] = guidance_scale
    if prompt is not None and "prompt" not in known:
        raise UsageError(f"{name} takes no prompt: leave out --prompt.")
    if "class_labels" in known:
        inputs["class_labels"] = spread_labels(num_images, pipe.transformer.config.num_embeds_ada_norm)
    elif "prompt" in known:
        if prompt is None:
            raise UsageError(f"{name} makes pictures from text: pass a --prompt.")
        inputs["prompt"] = [prompt] * num_images
    elif "batch_size" in known:
        inputs["batch_size"] = num_images
    else:
        raise UsageError(f"{name} takes neither a prompt nor class labels nor a batch size: pass a model that does.")
    pipe.set_progress_bar_config(disable=True)

    def solve(scheduler: Any, steps: int, tick: Tick) -> torch.Tensor:
        # pipelines draw their latents before all else: a seed per image is the same noise for every sampler
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        pipe.scheduler = ticking(scheduler, tick)
        try:
            images = pipe(**inputs, num_inference_steps=steps, generator=generators).images
        except Exception as error:  # a pipeline may refuse a scheduler in any way
            reason = f"{name} failed with {type(scheduler).__name__}: {error}"
            raise UsageError(f"{reason}; leave that out of --samplers or pass another --model.") from error
        return torch.from_numpy(np.asarray(images)).movedim(-1, 1).float() * 2 - 1

    return Problem(pipe.scheduler.config, solve, own_loop=False)


def ticking(scheduler: Any, tick: Tick) -> Any:
    """``scheduler`` with a step that calls ``tick`` and keeps its signature, which pipelines inspect."""
    step = scheduler.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        tick()
        return step(*args, **kwargs)

    scheduler.step = counted
    return scheduler


def spread_labels(n: int, classes: int) -> list[int]:
    """``n`` labels in 0..classes - 1: evenly spread where n is smaller, else cycling."""
    if n >= classes:
        return [i % classes for i in range(n)]
    return [round(i * (classes - 1) / max(n - 1, 1)) for i in range(n)]


# -- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One run: ``nfe`` true evaluations for a budget of ``budget``; ``errors`` (N,) are the RMSE of each image against
    the reference, None for a stochastic sampler."""

    sampler: str
    budget: int
    nfe: int
    seconds: float
    images: torch.Tensor
    errors: np.ndarray | None

    @property
    def mean(self) -> float | None:
        return None if self.errors is None else float(self.errors.mean())

    @property
    def median(self) -> float | None:
        return None if self.errors is None else float(np.median(self.errors))


@dataclass(frozen=True)
class Comparison:
    """All results, the reference images, and how far the reference is from the one with half its evaluations."""

    results: list[Result]
    reference: torch.Tensor
    reference_nfe: int
    reference_error: float

    @property
    def samplers(self) -> list[str]:
        return list(dict.fromkeys(r.sampler for r in self.results))

    @property
    def budgets(self) -> list[int]:
        return sorted({r.budget for r in self.results})


def rmse(images: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """Root mean square difference of each image, (N,)."""
    return (images - reference).double().flatten(1).square().mean(1).sqrt().numpy()


def choose_samplers(names: Sequence[str] | None, problem: Problem) -> list[str]:
    """``names`` without repetitions; for None the default set of the model's process, as far as it fits the model."""
    if names:
        return list(dict.fromkeys(names))
    fitting = []
    for name in DEFAULT_SAMPLERS[process_kind(problem.config)]:
        with contextlib.suppress(UsageError):
            make_scheduler(name, problem.config)
            fitting.append(name)
    return fitting


def check_samplers(names: Sequence[str], steps: Sequence[int], problem: Problem) -> None:
    """Raise :class:`UsageError` for a sampler that cannot run on this model's process or with these numbers of
    evaluations: each makes a dry run without the network (a pipeline lays out its steps itself and cannot)."""
    for name in names:
        scheduler, n = make_scheduler(name, problem.config), steps[0]
        try:
            for n in steps if problem.own_loop else ():
                lay_out(scheduler, SAMPLERS[name].steps(n))
                if not sample(lambda x, t: torch.zeros_like(x), scheduler, torch.ones(1, 1, 1, 1)).isfinite().all():
                    raise ValueError("its coefficients are not finite")
        except (ValueError, IndexError, ArithmeticError) as error:
            reason = f"Sampler {name} cannot run with {n} evaluations on this model's process: {error}"
            raise UsageError(f"{reason}; leave it out of --samplers or change --steps.") from error


def compare(problem: Problem, names: Sequence[str], steps: Sequence[int], reference_steps: int = 100) -> Comparison:
    """Solve ``problem`` with every sampler at every number of evaluations, and with the reference."""
    total = sum(SAMPLERS[name].evaluations(n) for name in names for n in steps)
    with tqdm(total=total + reference_steps + reference_steps // 2, unit="eval", leave=False) as bar:

        def solve(label: str, scheduler: Any, n: int) -> tuple[torch.Tensor, float]:
            bar.set_description(f"{label}, {n}")
            start = time.perf_counter()
            images = problem.solve(scheduler, n, bar.update)
            return images, time.perf_counter() - start

        reference, coarse = (
            solve("reference", reference_scheduler(problem.config), n)[0]
            for n in (reference_steps, reference_steps // 2)
        )
        results = []
        for name in names:
            sampler = SAMPLERS[name]
            for n in steps:
                scheduler = make_scheduler(name, problem.config)
                images, seconds = solve(name, scheduler, sampler.steps(n))
                errors = None if sampler.stochastic else rmse(images, reference)
                results.append(Result(name, n, len(scheduler.timesteps), seconds, images, errors))
    return Comparison(results, reference, reference_steps, float(rmse(coarse, reference).mean()))


# -- what is written ------------------------------------------------------------------------------------------------

COLUMNS = ("sampler", "nfe", "seconds", "rmse_mean", "rmse_median")


def rows(comparison: Comparison, missing: str = "") -> Iterator[tuple[str, ...]]:
    """The table in strings, ``missing`` where there is no error."""
    for r in comparison.results:
        errors = (missing if e is None else f"{e:.5f}" for e in (r.mean, r.median))
        yield (r.sampler, str(r.nfe), f"{r.seconds:.2f}", *errors)


def format_table(comparison: Comparison) -> str:
    """The table for a terminal, with the reference and its own error below."""
    lines = [COLUMNS, *rows(comparison, missing="-")]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    n = comparison.reference_nfe
    text.append(
        f"rmse: per image, pixels in [-1, 1], to the ODE's solution from the same noise ({n} evaluations; {n // 2} of "
        f"them differ by {comparison.reference_error:.5f}).  '-': a stochastic sampler has no such error."
    )
    return "\n".join(text)


def write_csv(comparison: Comparison, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows(comparison))


# by name, so that two plots agree
COLOURS = {
    "pf-ode": "#d1495b",
    "dpm-solver": "#e58f1c",
    "reverse-sde": "#8e44ad",
    "ddim": "#7f8c8d",
    "euler": "#a0785a",
    "dpm++2m": "#1f77b4",
    "dpm++2m-karras": "#4bacc6",
    "unipc": "#2e8b57",
    "deis": "#6a7f10",
    "heun": "#34495e",
}


def montage(images: torch.Tensor, gap: int) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] side by side, (H, N (W + gap) - gap, 3) in [0, 1], white between them."""
    x = torch.nan_to_num(images / 2 + 0.5).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    x = torch.nn.functional.pad(x, (0, gap), value=1.0)
    return torch.cat(list(x), dim=-1)[..., : -gap or None].movedim(0, -1).numpy()


def draw_grid(comparison: Comparison, path: Path, shown: int = 4) -> None:
    """Rows: the reference and each sampler; columns: evaluations; up to ``shown`` images and the error in each cell."""
    from matplotlib.figure import Figure

    names, budgets = comparison.samplers, comparison.budgets
    cells = {(r.sampler, r.budget): r for r in comparison.results}
    keep = np.unique(
        np.linspace(0, len(comparison.reference) - 1, min(shown, len(comparison.reference))).round()
    ).astype(int)
    height, width = comparison.reference.shape[2:]
    gap = max(width // 16, 1)
    cell_width = 2.7 * len(keep) / 4
    cell_height = cell_width * height / (len(keep) * (width + gap) - gap)
    figure = Figure(
        figsize=(1.45 + (cell_width + 0.2) * len(budgets), (cell_height + 0.24) * (len(names) + 1) + 0.3),
        facecolor="white",
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.01, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(len(names) + 1, len(budgets), squeeze=False)
    best = {
        n: min((r.mean for r in comparison.results if r.budget == n and r.mean is not None), default=None)
        for n in budgets
    }
    for i, name in enumerate(["reference", *names]):
        for ax, n in zip(axes[i], budgets, strict=True):
            result = cells.get((name, n))
            images = comparison.reference if result is None else result.images
            ax.imshow(montage(images[keep], gap), interpolation="nearest" if width <= 64 else "antialiased")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if result is None:
                ax.set_title(f"{n} evaluations", fontsize=12, fontweight="bold", pad=7)
                continue
            said = [] if result.mean is None else [f"error {result.mean:.3f}"]
            said += [f"{result.nfe} evaluations"] if result.nfe != n else []
            first = result.mean is not None and result.mean == best[n]
            ax.set_xlabel(", ".join(said), fontsize=9, labelpad=2, color="black" if first else "#666666")
            ax.xaxis.label.set_fontweight("bold" if first else "normal")
        axes[i, 0].set_ylabel(
            f"reference\n{comparison.reference_nfe} evaluations" if i == 0 else row_label(name),
            rotation=0, ha="right", va="center", fontsize=11, labelpad=8,
        )  # fmt: skip
        axes[i, 0].yaxis.label.set_fontweight("bold" if i and SAMPLERS[name].ours else "normal")
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.08)


def row_label(name: str) -> str:
    notes = [] if SAMPLERS[name].ours else ["diffusers"]
    notes += ["stochastic"] if SAMPLERS[name].stochastic else []
    return f"{name}\n({', '.join(notes)})" if notes else name


def draw_errors(comparison: Comparison, path: Path) -> None:
    """Mean error against evaluations, log-log, one line per deterministic sampler, named at its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
    ax = figure.subplots()
    ends = {}
    for name in comparison.samplers:
        points = [(r.nfe, r.mean) for r in comparison.results if r.sampler == name and r.mean is not None]
        points = [(n, e) for n, e in points if math.isfinite(e) and e > 0]
        if points:
            style: dict[str, Any] = {"lw": 2.4, "ls": "-"} if SAMPLERS[name].ours else {"lw": 1.6, "ls": "--"}
            ax.plot(*zip(*points, strict=True), marker="o", ms=5, color=COLOURS[name], label=name, **style)
            ends[name] = points[-1]
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="RMSE to the exact ODE solution")
    ax.xaxis.set_major_locator(FixedLocator(comparison.budgets))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.grid(color="#dddddd", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if not ends:
        ax.text(0.5, 0.5, "stochastic samplers have no error", transform=ax.transAxes, ha="center", color="#666666")
    low, high = np.log(ax.get_ylim())
    at = {name: (math.log(e) - low) / (high - low) for name, (_, e) in ends.items()}
    for name, y in spread(at, 0.062).items():
        said = name if SAMPLERS[name].ours else f"{name} (diffusers)"
        ax.annotate(
            said, (1.02, y), xycoords="axes fraction", va="center", color=COLOURS[name],
            fontweight="bold" if SAMPLERS[name].ours else "normal",
        )  # fmt: skip
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.08)


def spread(positions: Mapping[str, float], gap: float) -> dict[str, float]:
    """Positions in [0, 1] moved apart to at least ``gap``, in their order and around where they were."""
    names = sorted(positions, key=lambda k: positions[k])
    y = np.array([positions[k] for k in names])
    for _ in range(200):
        overlap = np.clip(gap - np.diff(y), 0, None) / 2
        y[:-1] -= overlap
        y[1:] += overlap
    return dict(zip(names, y.tolist(), strict=True))


def write(comparison: Comparison, output: Path) -> None:
    """Write ``results.csv``, ``grid.png`` and ``error.png``, all of them or none."""
    existing = next(p for p in output.absolute().parents if p.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{output.name}-") as folder:
        made = {"results.csv": write_csv, "grid.png": draw_grid, "error.png": draw_errors}
        for name, make in made.items():
            make(comparison, Path(folder) / name)
        output.mkdir(parents=True, exist_ok=True)
        for name in made:
            os.replace(Path(folder) / name, output / name)


# -- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="Hub id or folder of a pipeline.")
    parser.add_argument(
        "--samplers",
        nargs="*",
        default=None,
        help=f"Any of {', '.join(SAMPLERS)}. Default: those of "
        f"{', '.join(DEFAULT_SAMPLERS['variance preserving'])} or their like for the model's process.",
    )
    parser.add_argument("--steps", nargs="*", type=int, default=[5, 10, 20], help="Numbers of network evaluations.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--num_images", type=int, default=8, help="Images per sampler; four are shown.")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=None,
        help="Classifier-free guidance. Default: 2 for a class-conditional network, a pipeline's own default.",
    )
    parser.add_argument("--prompt", default=None, help="Prompt of a text-to-image pipeline.")
    parser.add_argument("--output_dir", default="compare", help="Gets grid.png, error.png, results.csv.")
    parser.add_argument(
        "--reference_steps",
        type=int,
        default=None,
        help="Evaluations of the reference solution. Default: 100, or twice the largest of --steps.",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device of the model.",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise :class:`UsageError` for what is wrong whatever the model is."""
    if args.samplers is not None and not args.samplers:
        raise UsageError(f"--samplers is empty: name any of {', '.join(SAMPLERS)}.")
    unknown = [name for name in args.samplers or () if name not in SAMPLERS]
    if unknown:
        raise UsageError(f"Sampler {unknown[0]!r} is unknown: use any of {', '.join(SAMPLERS)}.")
    if not args.steps:
        raise UsageError("--steps is empty: pass one or more numbers of evaluations, for example --steps 5 10 20.")
    if min(args.steps) < 1:
        raise UsageError(f"--steps must be at least 1, not {min(args.steps)}.")
    if args.num_images < 1:
        raise UsageError(f"--num_images must be at least 1, not {args.num_images}.")
    if args.reference_steps is not None and args.reference_steps < 2 * max(args.steps):
        raise UsageError(
            f"--reference_steps must be at least twice the largest of --steps, {2 * max(args.steps)} here, "
            f"not {args.reference_steps}."
        )
    output = Path(args.output_dir).absolute()
    existing = next(p for p in (output, *output.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        kind = "cannot be written to" if existing.is_dir() else "is a file"
        raise UsageError(f"--output_dir {args.output_dir}: {existing} {kind}, pass another folder.")


def run(args: argparse.Namespace) -> int:
    """The subcommand: check, sample, write, print; returns the exit status."""
    try:
        check_arguments(args)
        if args.model == str(DEFAULT_MODEL) and not DEFAULT_MODEL.exists():
            raise UsageError(
                f"The embedded model is missing from {DEFAULT_MODEL}: reinstall the package or pass --model."
            )
        pipe = load_pipeline(args.model).to(args.device)
        problem = make_problem(
            pipe, num_images=args.num_images, seed=args.seed, guidance_scale=args.guidance_scale, prompt=args.prompt
        )
        names, steps = choose_samplers(args.samplers, problem), sorted(set(args.steps))
        check_samplers(names, steps, problem)
        reference_steps = args.reference_steps or max(100, 2 * steps[-1])
        comparison = compare(problem, names, steps, reference_steps)
        write(comparison, Path(args.output_dir))
    except UsageError as error:
        print(f"diffusers-sde compare: {error}", file=sys.stderr)
        return 2
    print(format_table(comparison))
    return 0
