"""``torch.compile`` of a scheduler's step: one operator that the compiler does not look into.

What a step does depends on where its run stands, which is found on the host; traced, each row would be a program of its
own.  As an operator the step is compiled once into whatever graph it is part of, and runs as it does outside of one.

Knows how a scheduler is found again from inside a graph.  Knows nothing of what a step computes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_schedulers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_new_handle = itertools.count().__next__


def register(scheduler: Any) -> int:
    """A number by which a graph finds ``scheduler``."""
    handle = _new_handle()
    _schedulers[handle] = scheduler
    return handle


def step(
    handle: int,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Any,
    return_dict: bool,
    pred_original_sample: Tensor | None = None,
    per_token_timesteps: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The step of the scheduler with this handle, inside a graph: the values of its output, or its tuple.

    ``noise_std`` is a tensor () here.  Raises ``ValueError`` for per_token_timesteps.
    """
    if per_token_timesteps is not None:
        raise ValueError("per_token_timesteps cannot be compiled: call step outside of torch.compile.")
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep)
    prev, x0, mean, std = _step(
        handle, model_output, timestep, sample, pred_original_sample, generator is not None, return_dict
    )
    return (prev, x0, mean, std) if return_dict else (prev, x0)


@torch.library.custom_op("diffusers_sde::step", mutates_args=())
def _step(
    handle: int,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    pred_original_sample: Tensor | None,
    has_generator: bool,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scheduler: Any = _schedulers[handle]
    if has_generator and scheduler.stochastic:
        raise ValueError("A generator cannot enter a compiled step: set noise_seed, or leave the seed to the latents.")
    kwargs = {} if pred_original_sample is None else {"pred_original_sample": pred_original_sample}
    out: Any = scheduler.step(model_output, timestep, sample, **kwargs)
    # an operator's results share no memory
    mean = out.prev_sample_mean.clone() if with_mean else sample.new_empty(0)
    x0 = out.pred_original_sample.clone() if pred_original_sample is not None else out.pred_original_sample
    return out.prev_sample, x0, mean, torch.tensor(out.noise_std, dtype=torch.float64)


@_step.register_fake
def _(
    handle: int,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    pred_original_sample: Tensor | None,
    has_generator: bool,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like(sample)
    mean = torch.empty_like(sample) if with_mean else sample.new_empty(0)
    return like, torch.empty_like(sample), mean, torch.empty((), dtype=torch.float64)
