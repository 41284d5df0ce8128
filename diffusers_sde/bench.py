"""The benchmark: ratios against diffusers' schedulers, all measured side by side in one run.

Knows which of diffusers' settings are the competition and what is measured: the time and memory of a step, the error
of deterministic samplers against a converged solution from the same noise (oracle and embedded network), the distance
of stochastic samplers to the true distribution.  Prints tables; asserts nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_sde.analytic import GaussianMixtureModel
from diffusers_sde.assets import load_default_model
from diffusers_sde.grids import GRIDS
from diffusers_sde.sampling import Denoiser, network_denoiser, sample
from diffusers_sde.schedulers import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.tables import CLOCKS

SECTIONS = ("speed", "memory", "oracle", "network", "sde", "robustness", "labels", "calibration")
ERROR_STEPS = (5, 6, 8, 10, 15, 20)
SDE_STEPS = (6, 10, 20, 50)
SHAPES = ((1, 4, 64, 64), (8, 16, 128, 128))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = (*SECTIONS, "training", "errors")
    parser.add_argument("--sections", nargs="+", choices=choices, default=list(SECTIONS), help="What to measure.")
    parser.add_argument("--num_images", type=int, default=10, help="Images of the network section.")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 3.0], help="Of the network section.")
    parser.add_argument(
        "--training_images", default=None, help="Folder of the embedded model's training images, for sample quality."
    )
    for name, text in {"training": "a training step", "errors": "the error budget of a sampler"}.items():
        only = {"dest": "sections", "action": "store_const", "const": [name]}
        parser.add_argument(f"--{name}", **only, help=f"Measure nothing but {text}.")  # type: ignore[arg-type]
    parser.add_argument(
        "--shipped", action="store_true", help="Calibration section: only the scheduler beside the embedded model."
    )
    parser.add_argument("--candidates", action="store_true", help="Also measure the settings the defaults beat.")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    for section in args.sections:
        if section == "speed":
            step_times()
        elif section == "memory":
            step_memory()
        elif section == "oracle":
            for name, process in PROCESSES.items():
                model = oracle(seed=args.seed, process=process)
                noise = torch.randn(64, *model.sample_shape, generator=torch.Generator().manual_seed(args.seed + 1))
                errors(f"mixture oracle, {name} betas", network_denoiser(model), noise, process, args.candidates)
        elif section == "network":
            pipe = load_default_model()
            noise = torch.randn(args.num_images, 1, 32, 32, generator=torch.Generator().manual_seed(args.seed))
            labels = torch.arange(args.num_images) % 10
            for scale in args.guidance_scale:
                denoiser = network_denoiser(pipe.unet, labels, scale)
                errors(
                    f"embedded network, guidance {scale:g}",
                    denoiser,
                    noise,
                    dict(pipe.scheduler.config),
                    args.candidates,
                )
        elif section == "sde":
            sde_quality(args.seed)
        elif section == "robustness":
            robustness(args.seed)
        elif section == "training":
            from diffusers_sde.benchmarks import training

            training.measure()
        elif section == "errors":
            from diffusers_sde.benchmarks import errors as error_budget

            error_budget.measure(args.seed)
        elif section == "labels":
            from diffusers_sde.benchmarks import labels as agreement

            agreement.measure(args.seed)
        elif section == "calibration":
            from diffusers_sde.benchmarks import calibration

            images = args.num_images if args.shipped else max(args.num_images, 20)
            scales, folder = args.guidance_scale, args.training_images
            calibration.measure(args.seed, images, scales, folder, shipped=args.shipped)
    return 0


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A plain aligned table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


# -- the competition --

BETAS = {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
PROCESSES = {
    "linear": {**BETAS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled linear": {**BETAS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
SPACINGS = [{"timestep_spacing": s} for s in ("trailing", "linspace", "leading")]
SIGMAS = [{f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")]
LU = [{"use_lu_lambdas": True}]


def stock_odes(config: dict[str, Any], n: int) -> Iterator[tuple[str, Any]]:
    """Every deterministic scheduler of diffusers with every grid it offers, laid out for ``n`` evaluations."""
    families: list[tuple[str, list[dict], list[dict]]] = [
        ("DDIMScheduler", SPACINGS, [{}]),
        ("EulerDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("HeunDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("KDPM2DiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("PNDMScheduler", SPACINGS, [{"skip_prk_steps": True}]),
        ("LMSDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("DEISMultistepScheduler", SPACINGS + SIGMAS, [{"solver_order": k} for k in (2, 3)]),
        ("UniPCMultistepScheduler", SPACINGS + SIGMAS, [{"solver_order": k} for k in (2, 3)]),
        ("DPMSolverMultistepScheduler", SPACINGS + SIGMAS + LU, [{"solver_order": k} for k in (2, 3)]),
        ("DPMSolverSinglestepScheduler", SIGMAS, [{"solver_order": k} for k in (2, 3)]),
    ]
    for name, grids, solvers in families:
        cls = getattr(diffusers, name)
        for solver in solvers:
            for grid in grids:
                scheduler = cls.from_config({**config, "_class_name": name}, clip_sample=False, **solver, **grid)
                evaluations = (
                    (n + 1) // 2 if name.startswith(("Heun", "KDPM2")) else n - 1 if name.startswith("PNDM") else n
                )
                try:
                    scheduler.set_timesteps(evaluations)
                except Exception:  # a setting that this n does not allow is no competition
                    continue
                if len(scheduler.timesteps) <= n:
                    label = name.replace("Scheduler", "").replace("Discrete", "").replace("Multistep", "")
                    order = f"-{solver['solver_order']}" if "solver_order" in solver else ""
                    yield f"{label}{order} {'/'.join(str(k if v is True else v) for k, v in grid.items())}", scheduler


def ours(config: dict[str, Any], candidates: bool) -> dict[str, Any]:
    """Our deterministic schedulers with their defaults and, if asked for, the settings these were chosen from."""
    own = {
        "ProbabilityFlow (default)": ProbabilityFlowScheduler.from_config(config, clip_sample=False),
        "DPMSolver (default)": DPMSolverScheduler.from_config(config, clip_sample=False),
    }
    grids = [("balanced", r) for r in (1.0, 1.1, 1.25)] + [("power", r) for r in (1.0, 1.25, 1.5, 2.0)]
    settings = [(g, r, c, 2) for g, r in [*grids, ("karras", 7.0), ("log_snr", None)] for c in (0.5, 1.0)]
    settings += [("balanced", 1.1, 0.0, 2), ("balanced", 1.1, 1.0, 3), ("balanced", 1.1, 1.0, 1)]
    for grid, rho, data_std, order in settings if candidates else ():
        name = f"{grid}{'' if rho is None else f' {rho:g}'}, data_std {data_std:g}, order {order}"
        options: dict[str, Any] = {"grid": grid, "rho": rho, "data_std": data_std, "solver_order": order}
        own[name] = ProbabilityFlowScheduler.from_config(config, clip_sample=False, **options)
    return own


# -- error of deterministic samplers --


def rmse(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples of the root mean square difference; inf where it is not a number."""
    value = (x - reference).double().flatten(1).square().mean(1).sqrt().mean().item()
    return value if np.isfinite(value) else float("inf")


def reference_solution(denoiser: Denoiser, noise: torch.Tensor, config: dict[str, Any], n: int) -> torch.Tensor:
    """A converged solution of the probability-flow ODE from this noise."""
    options: dict[str, Any] = {"grid": "balanced", "rho": 1.25, "solver_order": 2, "data_std": 0.5, "final": "exact"}
    scheduler = ProbabilityFlowScheduler.from_config(config, clip_sample=False, **options)
    scheduler.set_timesteps(n)
    return sample(denoiser, scheduler, noise)


def errors(title: str, denoiser: Denoiser, noise: torch.Tensor, config: dict[str, Any], candidates: bool) -> None:
    """Error versus NFE: our settings against the best of all stock settings at each NFE."""
    reference = reference_solution(denoiser, noise, config, 240)
    uncertainty = rmse(reference_solution(denoiser, noise, config, 120), reference)
    best: list[tuple[float, str]] = []
    own: dict[str, list[float]] = {name: [] for name in ours(config, candidates)}
    for n in tqdm(ERROR_STEPS, desc=title, leave=False):
        measured = []
        for name, scheduler in stock_odes(config, n):
            try:
                measured.append((rmse(sample(denoiser, scheduler, noise), reference), name))
            except Exception:  # a stock scheduler that crashes on its own grid is no competition
                continue
        best.append(min(measured))
        for name, scheduler in ours(config, candidates).items():
            scheduler.set_timesteps(n)
            own[name].append(rmse(sample(denoiser, scheduler, noise), reference))
    rows = [["best of diffusers, error", *(f"{e:.4f}" for e, _ in best), ""]]
    for name, values in own.items():
        if "default" in name:
            rows.append([f"{name}, error", *(f"{v:.4f}" for v in values), ""])
        ratios = [v / e for v, (e, _) in zip(values, best, strict=True)]
        mean = statistics.geometric_mean(ratios)
        rows.append([f"{name}, ratio", *(f"{r:.2f}" for r in ratios), f"{mean:.2f}"])
    header = ["", *(f"{n} NFE" for n in ERROR_STEPS), "mean"]
    print_table(f"Error to the exact ODE solution: {title} (reference converged to {uncertainty:.1e})", header, rows)
    print("best of diffusers was: " + "; ".join(f"{n}: {name}" for n, (_, name) in zip(ERROR_STEPS, best, strict=True)))


def robustness(seed: int) -> None:
    """The worst error of every grid x clock x order x data scale x corrector a user can select, at few evaluations."""
    process = PROCESSES["linear"]
    model = oracle(seed=seed, process=process)
    denoiser, count = network_denoiser(model), 0
    noise = torch.randn(16, *model.sample_shape, generator=torch.Generator().manual_seed(seed + 1))
    reference = reference_solution(denoiser, noise, process, 240)
    rows = []
    for n in (5, 10):
        worst = (0.0, "")
        settings = list(itertools.product(GRIDS, CLOCKS, (1, 2, 3, 4), (0.0, 0.5, 1.0, float("inf")), (False, True)))
        for grid, clock, order, data_std, corrector in tqdm(settings, desc=f"robustness, {n}", leave=False):
            options: dict[str, Any] = {"grid": grid, "clock": clock, "solver_order": order, "data_std": data_std}
            scheduler = ProbabilityFlowScheduler.from_config(process, corrector=corrector, **options)
            scheduler.set_timesteps(n)
            worst = max(
                worst, (rmse(sample(denoiser, scheduler, noise), reference), f"{options}, corrector {corrector}")
            )
            count += 1
        ddim = diffusers.DDIMScheduler.from_config(process, clip_sample=False, timestep_spacing="trailing")
        ddim.set_timesteps(n)
        rows.append([str(n), f"{worst[0]:.3f}", f"{rmse(sample(denoiser, ddim, noise), reference):.3f}", worst[1]])
    spread = reference.std().item()
    title = f"Worst error of {count} runs, every selectable setting (standard deviation of the data {spread:.2f})"
    print_table(title, ["NFE", "worst", "DDIM", "setting"], rows)


def oracle(
    dimension: int = 36, components: int = 10, seed: int = 0, process: dict[str, Any] | None = None
) -> GaussianMixtureModel:
    """A random anisotropic mixture with the scale of image data (standard deviation about 0.6)."""
    g = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(components, dimension, generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(components, dimension, dimension, generator=g, dtype=torch.float64))[0]
    spread = 0.02 + 0.3 * torch.rand(components, dimension, generator=g, dtype=torch.float64) ** 3
    covariances = torch.einsum("kij,kj,klj->kil", basis, spread, basis)
    weights = 0.5 + torch.rand(components, generator=g, dtype=torch.float64)
    return GaussianMixtureModel(weights.tolist(), means.tolist(), covariances.tolist(), process=process)


# -- stochastic samplers --


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, projections: int = 256) -> float:
    """Sliced 2-Wasserstein distance of two equally large sample sets over fixed random directions."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    gap = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return gap.square().mean().sqrt().item()


def stock_sdes(config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    families: list[tuple[str, list[dict], dict[str, Any]]] = [
        ("EulerAncestralDiscreteScheduler", SPACINGS, {}),
        ("DDPMScheduler", SPACINGS, {}),
        ("DPMSolverMultistepScheduler", SPACINGS + SIGMAS, {"algorithm_type": "sde-dpmsolver++"}),
        ("SASolverScheduler", SPACINGS + SIGMAS, {}),
        ("DPMSolverSDEScheduler", SPACINGS + SIGMAS, {}),
    ]
    for name, grids, options in families:
        for grid in grids:
            label = f"{name.replace('Scheduler', '')} {'/'.join(str(k if v is True else v) for k, v in grid.items())}"
            arguments = {"clip_sample": False, **options, **grid}
            yield (
                label,
                functools.partial(getattr(diffusers, name).from_config, {**config, "_class_name": name}, **arguments),
            )


def sde_quality(seed: int, count: int = 3000, repeats: int = 3) -> None:
    """Sliced Wasserstein distance to the true distribution, ours against each stock family with its best grid: means
    over independent sets of samples."""
    process = PROCESSES["linear"]
    model = oracle(seed=seed, process=process)
    denoiser, generator = network_denoiser(model), torch.Generator().manual_seed(seed + 1)
    truth = model.sample(count, generator)
    floor = statistics.mean(sliced_wasserstein(model.sample(count, generator), truth) for _ in range(repeats))
    noises = [torch.randn(count, *model.sample_shape, generator=generator) for _ in range(repeats)]

    own = functools.partial(ReverseSDEScheduler.from_config, process)
    table: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for n in tqdm(SDE_STEPS, desc="SDE quality", leave=False):
        best: dict[str, float] = {}
        samplers: list[tuple[str, Callable[[], Any]]] = [("ReverseSDE (default)", own), *stock_sdes(process)]
        for label, make in samplers:
            family = label if label.endswith("(default)") else label.split()[0]
            try:
                values = []
                for x in noises:
                    scheduler = make()
                    scheduler.set_timesteps((n + 1) // 2 if family == "DPMSolverSDE" else n)
                    values.append(sliced_wasserstein(sample(denoiser, scheduler, x, generator=generator), truth))
            except Exception as error:
                skipped[family] = str(error).strip().splitlines()[0][:80]
                continue
            best[family] = min(best.get(family, float("inf")), statistics.mean(values))
        for family, value in best.items():
            table.setdefault(family, []).append(value)
    rows = [[name, *(f"{v:.4f}" for v in values)] for name, values in table.items()]
    title = f"Sliced Wasserstein to the true distribution, {repeats} x {count} samples (sampling floor {floor:.4f})"
    print_table(title, ["best grid of each", *(f"{n} NFE" for n in SDE_STEPS)], rows)
    for family, reason in skipped.items():
        print(f"skipped {family}: {reason}")


# -- time and memory of a step --


def step_schedulers() -> dict[str, Any]:
    config = PROCESSES["linear"]
    return {
        "ProbabilityFlow, order 2": ProbabilityFlowScheduler.from_config(config, solver_order=2),
        "ProbabilityFlow, no corrector": ProbabilityFlowScheduler.from_config(config, solver_order=2, corrector=False),
        "ReverseSDE, order 2": ReverseSDEScheduler.from_config(config),
        "DPMSolver 2M": DPMSolverScheduler.from_config(config),
        "diffusers DDIM": diffusers.DDIMScheduler.from_config(config, clip_sample=False),
        "diffusers DPM++2M": diffusers.DPMSolverMultistepScheduler.from_config(config),
        "diffusers UniPC": diffusers.UniPCMultistepScheduler.from_config(config),
        "diffusers SASolver": diffusers.SASolverScheduler.from_config(config),
    }


def step_times(repeats: int = 9, steps: int = 20) -> None:
    """Median time of a step over full runs, interleaved, against the two operations no step can do without.

    A run is set_timesteps and ``steps`` steps, as a pipeline makes it; ours keep the table of the last grid, so the
    one-time cost of building it is printed apart.
    """
    rows = []
    for shape in SHAPES:
        jobs = {"floor: mul, add": floor_job(shape, steps)}
        jobs |= {name: run_job(scheduler, shape, steps) for name, scheduler in step_schedulers().items()}
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                times[name].append((time.perf_counter() - start) / steps)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        floor, two_m = medians["floor: mul, add"], medians["diffusers DPM++2M"]
        for name, value in medians.items():
            first = f"{(times[name][0] - value) * steps * 1e3:.1f}" if "floor" not in name else ""
            cells = [f"{value * 1e6:.0f}", f"{value / floor:.1f}", f"{value / two_m:.2f}", first]
            rows.append(["x".join(map(str, shape)), name, *cells])
    header = ["shape", "scheduler", "us", "x floor", "x DPM++2M", "first run +ms"]
    print_table(f"Time of a step ({torch.get_num_threads()} threads)", header, rows)


def floor_job(shape: tuple[int, ...], steps: int) -> Callable[[], None]:
    x, m, out = torch.randn(shape), torch.randn(shape), torch.empty(shape)

    def job() -> None:
        for _ in range(steps):
            torch.mul(x, 0.9, out=out).add_(m, alpha=0.1)

    return job


def run_job(scheduler: Any, shape: tuple[int, ...], steps: int) -> Callable[[], None]:
    x, m = torch.randn(shape), torch.randn(shape)

    def job() -> None:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            scheduler.step(m, t, x, return_dict=False)

    return job


def step_memory(n: int = 10) -> None:
    """Largest number of sample-sized tensors a scheduler holds between steps."""
    rows = []
    for name, scheduler in step_schedulers().items():
        scheduler.set_timesteps(n)
        x, most = torch.randn(1, 4, 64, 64), 0
        for t in scheduler.timesteps:
            x = scheduler.step(torch.randn_like(x), t, x, return_dict=False)[0]
            most = max(most, held_tensors(scheduler, x))
        rows.append([name, str(most)])
    print_table("Tensors held between steps, in samples", ["scheduler", "tensors"], rows)


def held_tensors(scheduler: Any, like: torch.Tensor) -> int:
    """Distinct storages of the sample's size that the scheduler's attributes reach, ``like`` itself not counted."""
    found: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.numel() == like.numel() and value.data_ptr() != like.data_ptr():
                found.add(value.data_ptr())
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    state = scheduler._run.history if hasattr(scheduler, "_run") else list(vars(scheduler).values())
    walk(state)
    return len(found)
