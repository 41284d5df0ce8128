"""One calibration from its arguments to its scheduler; the page of theory is :mod:`diffusers_sde.calibration`.

Knows the order of the work and what is reported.  Knows no solver and no pipeline's call.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path as Folder
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_sde.calibration.arguments import check_denoiser, check_whole, check_work_dir, checked_counts
from diffusers_sde.calibration.choose import deterministic_entries, format_errors
from diffusers_sde.calibration.job import NODES, Job, shared_batches
from diffusers_sde.calibration.pipeline_source import PipelineSource
from diffusers_sde.calibration.sources import DenoiserSource, Source, class_conditional_source, is_class_conditional
from diffusers_sde.calibration.stochastic import stochastic_entries
from diffusers_sde.calibration.stock import fitting_samplers
from diffusers_sde.calibration.store import open_store
from diffusers_sde.calibration.workers import is_main
from diffusers_sde.configs import SHARED, path_from_config
from diffusers_sde.schedulers import CalibratedScheduler, ProbabilityFlowScheduler
from diffusers_sde.schedulers.calibrated import process_values
from diffusers_sde.schedulers.calibration_format import FORMAT_VERSION, written_calibration


def calibrate(
    model: Any,
    num_inference_steps: int | Sequence[int] = (4, 5, 6, 8, 10),
    num_samples: int = 64,
    *,
    scheduler: Any = None,
    sample_shape: Sequence[int] | None = None,
    seed: int = 0,
    stochastic: bool = False,
    refine: bool = True,
    budget: int | None = None,
    num_held_out: int | None = None,
    batch_size: int | None = None,
    compare_with_stock: bool = False,
    device: Any = None,
    work_dir: str | Folder | None = None,
    progress: bool = True,
    **pipeline_kwargs: Any,
) -> CalibratedScheduler:
    """A :class:`CalibratedScheduler` for this model: tables fitted to its own converged solutions, no gradients.

    Args:
        model: a diffusers pipeline, sampled through its own call with ``pipeline_kwargs`` (prompts, class labels and
            negative prompts may be lists, dealt out over the samples; a list of guidance scales over the batches); or
            a callable ``denoiser(sample, timestep)`` that returns what ``scheduler``'s prediction_type says.  A bare
            class-conditional network takes class_labels (default: all but the null class) and guidance_scale (default
            2), dealt out over the samples.
        num_inference_steps: the numbers of evaluations to calibrate.
        num_samples: training samples, rounded up to whole batches.
        scheduler, sample_shape, device: for a callable: any scheduler of its process, the shape (C, H, W) of a sample,
            where its samples live (default: the CPU).
        seed: of all noise; held-out samples have other noise.
        stochastic: calibrate the grid and tau of the reverse SDE instead.
        refine, budget: refine by rollouts, with at most ``budget`` evaluations a training sample over all numbers of
            steps: one grid for each, smallest number first, then a second one each while it lasts (default: what pays
            for the second one up to 6 steps).
        num_held_out: samples for the held-out error; default: half of num_samples, at least one batch.
        batch_size: samples of one evaluation, always full batches; default 8 for a pipeline, for a callable
            num_samples up to 64.  Device memory depends on it and not on num_samples.
        compare_with_stock: also run diffusers' own samplers on the held-out noise; those that cannot run on this
            process are named in a warning.
        work_dir: keep the teacher's states and finished tables there instead of in memory; calling again with the same
            arguments resumes an interrupted run.
        progress: print what will be done, a progress bar and the measured errors.

    Returns:
        The scheduler, whose ``errors[n]`` holds training and held-out error (mean over samples of the root mean square
        distance to the converged solution, in units of a sample), that of the exact solver on the same held-out noise
        (``exact``), and with ``compare_with_stock`` that of the best stock scheduler (``stock``, ``stock_name``).
        Under ``accelerate launch`` the samples are shared out and every worker returns the same scheduler.

    Raises:
        ValueError: for arguments that make no sense and for thresholding (no table is linear then; clip_sample is
            switched off with a warning), before the network is evaluated; for a model that draws noise of its own, for
            a work_dir of another run, and where no number of steps gained anything.
    """
    counts = checked_counts(num_inference_steps)
    check_whole(0, seed=seed, budget=budget)
    check_whole(1, num_samples=num_samples, num_held_out=num_held_out, batch_size=batch_size)
    check_work_dir(work_dir)
    source: Source
    if isinstance(model, DiffusionPipeline):
        if scheduler is not None or sample_shape is not None or device is not None:
            raise ValueError(
                "A pipeline has its own scheduler, shapes and device: leave out scheduler, sample_shape and device."
            )
        config = _usable(model.scheduler.config)
        make = class_conditional_source if is_class_conditional(model) else PipelineSource
        source = make(model, pipeline_kwargs, batch_size or min(num_samples, 8), seed)
    else:
        check_denoiser(model, scheduler, sample_shape)
        if pipeline_kwargs:
            raise ValueError(f"A bare denoiser takes no {next(iter(pipeline_kwargs))}: bind it to the denoiser.")
        config = _usable(scheduler.config)
        size, kind = batch_size or min(num_samples, 64), config.variance_type
        source = DenoiserSource(model, tuple(sample_shape or ()), size, seed, device or "cpu", kind)
    path = path_from_config(config)
    whole = round(abs(path.noisiest - path.cleanest)) + 1
    if config.round_timesteps and counts[-1] > whole:
        raise ValueError(f"This network only knows {whole} whole timesteps: calibrate at most so many steps.")
    batches = shared_batches(source.batch_size, num_samples, num_held_out or max(num_samples // 2, 1))
    if stochastic and min(batches.num_samples, batches.num_held_out) < 2:
        raise ValueError("stochastic=True compares distributions: pass at least 2 num_samples and 2 num_held_out.")
    stock = _stock_samplers(config, stochastic) if compare_with_stock else []
    run = [process_values(config), seed, source.batch_size, NODES, stochastic, str(sample_shape), str(pipeline_kwargs)]
    job = Job(
        config,
        source,
        open_store(work_dir, [FORMAT_VERSION, *run]),
        counts,
        batches,
        refine=refine and not stochastic,
        budget=budget,
        stock=stock,
    )
    with job.announce(progress):
        entries = stochastic_entries(job) if stochastic else deterministic_entries(job)
    out = _assembled(config, entries, stochastic)
    if progress and is_main():
        print(format_errors(out.errors))
    return out


def _usable(config: Mapping[str, Any]) -> Any:
    """The config as one of this package, without clipping; raises where a table cannot be linear."""
    ours = ProbabilityFlowScheduler.from_config(config).config
    if ours.thresholding:
        raise ValueError(
            "Thresholding makes every step depend on the sample, a learned table is linear: calibrate a scheduler with "
            "thresholding=False."
        )
    if ours.clip_sample:
        warnings.warn("clip_sample is switched off: a learned table is linear.", stacklevel=3)
        ours = ProbabilityFlowScheduler.from_config(config, clip_sample=False).config
    return ours


def _stock_samplers(config: Mapping[str, Any], stochastic: bool) -> list[str]:
    """The stock samplers to compare with; a warning names the others and why."""
    fitting, reasons = fitting_samplers(config, stochastic)
    if reasons:
        named = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"Left out of the comparison with stock samplers: {named}.", stacklevel=3)
    return fitting


def _assembled(
    config: Mapping[str, Any], entries: Mapping[int, Mapping[str, Any]], stochastic: bool
) -> CalibratedScheduler:
    """The scheduler of these tables; raises where none of them is better than the exact solver."""
    if all("lost" in e["errors"] for e in entries.values()):
        raise ValueError(
            "No calibrated table is better than the exact solver on held-out noise: use more samples, or keep "
            "ProbabilityFlowScheduler."
        )
    calibration = written_calibration(process_values(config), path_from_config(config).data_scale, stochastic, entries)
    shared = {k: v for k, v in config.items() if k in SHARED}
    return CalibratedScheduler(**shared, calibration=calibration)
