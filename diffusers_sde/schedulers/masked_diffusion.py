"""The scheduler of masked diffusion: ancestral steps, leaps, and orders of unmasking."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from diffusers_sde.discrete.categorical import sample_categorical
from diffusers_sde.discrete.leaps import remasking_probability, unmasking_probability
from diffusers_sde.discrete.orders import ORDERS, entropy_bounded, first_of, priorities, unmasked_count
from diffusers_sde.discrete.processes import DiscreteProcess, absorbing
from diffusers_sde.errors import check_finite
from diffusers_sde.schedulers.discrete import LEAPS, DiscreteScheduler, DiscreteSchedulerOutput, Row, check_logits

ALGORITHMS = (*LEAPS, "first_hitting", *ORDERS[1:], "entropy_bound")


class MaskedDiffusionScheduler(DiscreteScheduler):
    r"""Tokens out of masks, for any network that says ``p(x_0^l | x_t)``.

    ``pipe.scheduler = MaskedDiffusionScheduler.from_config(pipe.scheduler.config)`` in a pipeline of diffusers that
    passes a mask (LLaDA2), or in the custom pipeline of text generation.  Drawing several tokens in one call
    is what costs quality: each is drawn as if the others did not exist.  So the number of calls is the dial, and the
    algorithm says which tokens share a call:

        ancestral          every mask for itself with probability ``(alpha_s - alpha_t)/(1 - alpha_t)``
        tau_leaping        held rates, first order; theta_trapezoidal: two calls a step, second order (arXiv:2502.00234)
        first_hitting      as many as ancestral steps on average, at random places: with one call a token
                           exactly the process in continuous time, whatever the schedule (arXiv:2409.02908)
        entropy, margin, max_probability
                           the same number, the surest laws first; exact too with one call a token
        confidence         the surest draws first (LLaDA): prefers likely tokens, and is exact with no number of calls
        stride             neighbours apart;  left_to_right: autoregression
        entropy_bound      the surest laws, as many as ``entropy_bound`` nats allow (arXiv:2505.24857)

    Args:
        algorithm_type: see above.
        num_inference_steps: calls until :meth:`set_timesteps` says otherwise.
        noise_schedule: ``alpha(t)``: linear, cosine, square or geometric
            (:data:`diffusers_sde.discrete.schedules.SCHEDULES`); it says how many tokens each call fills in.
        block_length: positions that pipelines of diffusers fill in together.
        theta: where the second call of theta_trapezoidal stands.
        entropy_bound: of entropy_bound, in nats.
        remasking: strength in [0, 1] with which tokens are masked again, so that errors can be mended (ReMDM,
            arXiv:2503.00307); the process keeps its marginals.  Of ancestral steps only.
        temperature, top_k, top_p: of the draws, unless a step is told otherwise; 1 is the model's own law.
        mask_token_id: of the mask, unless a step is told otherwise.

    Raises:
        ValueError: for values out of range.
    """

    @register_to_config
    def __init__(
        self,
        algorithm_type: str = "first_hitting",
        num_inference_steps: int = 32,
        noise_schedule: str = "linear",
        block_length: int = 32,
        theta: float = 0.5,
        entropy_bound: float = 0.1,
        remasking: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_token_id: int | None = None,
    ):
        if algorithm_type not in ALGORITHMS:
            raise ValueError(f"algorithm_type {algorithm_type!r} is unknown: use one of {', '.join(ALGORITHMS)}.")
        check_finite("remasking", remasking)
        check_finite("entropy_bound", entropy_bound)
        if not 0 <= remasking <= 1 or entropy_bound < 0:
            raise ValueError("remasking must lie in [0, 1], and entropy_bound cannot be negative.")
        if remasking and algorithm_type != "ancestral":
            raise ValueError("remasking is for algorithm_type='ancestral': set that, or remasking=0.")
        self._setup()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        prompt_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> DiscreteSchedulerOutput | tuple[torch.Tensor, ...]:
        """Fill in some of the masks.

        Args:
            model_output: logits of the clean tokens (N, L, S); those of the mask are ignored.
            timestep: a time of ``timesteps``, or the number of the step.
            sample: tokens and masks (N, L), int64.
            mask_token_id: None: the config's.
            temperature, top_p, top_k, sampling_method: of the draws, see :meth:`clean`.
            prompt_mask: positions that keep their tokens, (L,) or (N, L), bool; None: none (which matters with
                remasking only: tokens stay without it).
            generator: of all draws.
            return_dict: False for a tuple.
            kwargs: what is meant for other schedulers (thresholds of BlockRefinementScheduler) is not used.

        Returns:
            :class:`DiscreteSchedulerOutput`, or its fields.

        Raises:
            ValueError: without a mask token, and for shapes that do not fit.
        """
        shaping = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "sampling_method": sampling_method}
        process, mask, clean = self._read(model_output, sample, mask_token_id, shaping)
        masked, row = sample == mask, self.row(timestep)
        if self.config.algorithm_type in LEAPS:
            state = sample_categorical(self.transition(process, row, sample, clean), generator)
        else:
            state = self._ordered(row, sample, masked, clean, generator)
        noise = torch.stack([masked, state == mask])
        return self._output(model_output, sample, clean, state, noise, prompt_mask, return_dict)

    def law(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        mask_token_id: int | None = None,
        prompt_mask: torch.Tensor | None = None,
        **shaping: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The law of the next state, each position by itself: what steering weighs.

        Args:
            model_output, timestep, sample, mask_token_id, prompt_mask: as in :meth:`step`.
            shaping: temperature, top_p, top_k and sampling_method, as in :meth:`clean`.

        Returns:
            ``(law of the next state, law of the clean tokens)``, each (N, L, S).

        Raises:
            ValueError: for an order, whose positions depend on each other, and as :meth:`step`.
        """
        if self.config.algorithm_type not in LEAPS:
            raise ValueError(
                f"algorithm_type {self.config.algorithm_type} draws positions together: use algorithm_type='ancestral'."
            )
        process, _, clean = self._read(model_output, sample, mask_token_id, shaping)
        law = self.transition(process, self.row(timestep), sample, clean)
        if prompt_mask is not None:
            here = torch.nn.functional.one_hot(sample, process.states).to(law)
            law = torch.where(prompt_mask.to(law.device)[..., None], here, law)
        return law, clean

    def transition(self, process: DiscreteProcess, row: Row, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        if not self.config.remasking:
            return super().transition(process, row, sample, clean)
        sigma = remasking_probability(self.config.remasking, row.start, row.end)
        unmask = unmasking_probability(row.start, row.end, sigma)
        here = torch.nn.functional.one_hot(sample, process.states).to(clean)
        masked = process.made(sample)[..., None]
        again = (1 - sigma) * here + sigma * process.stationary.to(clean)
        return torch.where(masked, unmask * clean + (1 - unmask) * here, again)

    def _read(
        self, model_output: torch.Tensor, sample: torch.Tensor, mask_token_id: int | None, shaping: dict[str, Any]
    ) -> tuple[DiscreteProcess, int, torch.Tensor]:
        """The process, its mask, and the law of the clean tokens."""
        mask = self.config.mask_token_id if mask_token_id is None else mask_token_id
        if mask is None:
            raise ValueError("The mask is unknown: pass mask_token_id to step, or set it in the config.")
        check_logits(model_output, sample)
        forbidden = torch.arange(model_output.shape[-1], device=sample.device) == mask
        clean = self.clean(model_output.masked_fill(forbidden, -torch.inf), **shaping)
        return absorbing(model_output.shape[-1], mask), mask, clean

    def _ordered(
        self,
        row: Row,
        sample: torch.Tensor,
        masked: torch.Tensor,
        clean: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """The masks that are first in order, filled in."""
        algorithm = self.config.algorithm_type
        tokens = sample_categorical(clean, generator)
        if algorithm == "entropy_bound":
            last = row.end == 1
            chosen = masked if last else entropy_bounded(clean, masked, self.config.entropy_bound)
        else:
            order = "random" if algorithm == "first_hitting" else algorithm
            priority = priorities(order, clean, tokens, generator)
            chosen = first_of(priority, masked, unmasked_count(masked, row.start, row.end))
        return torch.where(chosen, tokens, sample)
