"""The scheduler of uniform noise on tokens: ancestral steps and leaps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_sde.discrete.categorical import sample_categorical
from diffusers_sde.discrete.processes import uniform
from diffusers_sde.schedulers.discrete import LEAPS, DiscreteScheduler, DiscreteSchedulerOutput, check_logits


class UniformDiffusionScheduler(DiscreteScheduler):
    r"""Tokens out of uniformly random tokens: a token that was drawn can be replaced again until the end.

    For networks trained on uniform noise (DiffusionGemma), in their pipelines of diffusers or in the custom pipeline of
    text generation.  ``ancestral`` draws from the law ``sum_v q(x_s|x_t, v) p(v|x_t)``: what DiscreteDDIMScheduler
    draws by way of a clean token.  ``tau_leaping`` and ``theta_trapezoidal`` leap with the rates of the reverse chain
    (Campbell et al. 2022, arXiv:2205.14987; Ren et al. 2025, arXiv:2502.00234).

    Args:
        algorithm_type: ancestral, tau_leaping or theta_trapezoidal.
        num_inference_steps: calls until :meth:`set_timesteps` says otherwise.
        noise_schedule: ``alpha(t)``, see :data:`diffusers_sde.discrete.schedules.SCHEDULES`.
        theta: where the second call of theta_trapezoidal stands.
        temperature, top_k, top_p: of the draws, unless a step is told otherwise; 1 is the model's own law.

    Raises:
        ValueError: for values out of range.
    """

    @register_to_config
    def __init__(
        self,
        algorithm_type: str = "ancestral",
        num_inference_steps: int = 32,
        noise_schedule: str = "linear",
        theta: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        if algorithm_type not in LEAPS:
            raise ValueError(f"algorithm_type {algorithm_type!r} is unknown: use one of {', '.join(LEAPS)}.")
        self._setup()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        prompt_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DiscreteSchedulerOutput | tuple[torch.Tensor, ...]:
        """Draw the next state.

        Args:
            model_output: logits of the clean tokens (N, L, S).
            timestep: a time of ``timesteps``, or the number of the step.
            sample: tokens (N, L), int64.
            temperature, top_p, top_k: of the draws, see :meth:`clean`.
            prompt_mask: positions that keep their tokens, (L,) or (N, L), bool.
            generator: of all draws.
            return_dict: False for a tuple.

        Returns:
            :class:`DiscreteSchedulerOutput`, or its fields.

        Raises:
            ValueError: for shapes that do not fit.
        """
        check_logits(model_output, sample)
        clean, row = self.clean(model_output, temperature, top_p, top_k), self.row(timestep)
        process = uniform(model_output.shape[-1])
        state = sample_categorical(self.transition(process, row, sample, clean), generator)
        last = torch.full_like(sample, row.end == 1, dtype=torch.bool)
        noise = torch.stack([torch.ones_like(last), ~last & (state == sample)])
        return self._output(model_output, sample, clean, state, noise, prompt_mask, return_dict)
