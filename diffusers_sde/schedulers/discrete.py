"""What the schedulers of tokens share: diffusers' contract for discrete diffusion, and the transition of a step.

Knows the grid of times, what pipelines of diffusers pass and read (a step by its number or by its time in (0, 1],
blocks, tokens that are given, the end of a text), and the law of the next state.  The mathematics stands in
:mod:`diffusers_sde.discrete`; which positions an order prefers is the masked scheduler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import BaseOutput

from diffusers_sde.discrete.categorical import shape_logits
from diffusers_sde.discrete.leaps import log_odds, survival, tau_leap, trapezoidal_rates
from diffusers_sde.discrete.processes import DiscreteProcess
from diffusers_sde.discrete.schedules import NoiseSchedule, noise_schedule
from diffusers_sde.errors import check_finite, check_whole

LEAPS = ("ancestral", "tau_leaping", "theta_trapezoidal")


@dataclass
class DiscreteSchedulerOutput(BaseOutput):
    """One step; the names are those of diffusers' discrete schedulers.

    prev_sample: the next state (N, L).  sampled_tokens: the clean tokens that it holds and, where it holds noise, the
    likeliest ones (N, L).  sampled_probs: their probabilities (N, L).  transfer_index: positions that went from noise
    to a token.  editing_transfer_index: other positions that changed.  pred_logits: the model's output, for
    self-conditioning.
    """

    prev_sample: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor
    transfer_index: torch.Tensor
    editing_transfer_index: torch.Tensor
    pred_logits: torch.Tensor


def check_logits(model_output: torch.Tensor, sample: torch.Tensor) -> None:
    """Raise ``ValueError`` unless there are logits (N, L, S) for every token (N, L)."""
    if model_output.shape[:-1] != sample.shape:
        raise ValueError(
            f"logits have shape {tuple(model_output.shape)} and tokens {tuple(sample.shape)}: pass those of the same "
            "positions."
        )


@dataclass(frozen=True)
class Row:
    """One evaluation: its time, and the survival probabilities that its step goes from and to.

    ``stage``: whole (a step of one evaluation), first or second (of two).
    """

    time: float
    start: float
    end: float
    stage: str = "whole"


def rows_of(schedule: NoiseSchedule, count: int, theta: float | None) -> list[Row]:
    """``count`` evaluations from t = 1 to 0, equally spaced in time.

    Args:
        schedule: of the noise.
        count: evaluations.
        theta: None for steps of one evaluation; else steps of two, the second one after this share of the clock of
            leaps, but for the first and the last step, at whose outer ends that clock is infinite.
    """
    doubled = 0 if theta is None else max(count - 2, 0) // 2
    widths = [1] * (count - 2 * doubled - 1) + [2] * doubled + [1]
    times = 1 - np.cumsum([0, *widths]) / count
    alphas = [float(schedule.alpha(t)) for t in np.clip(times, 0, 1)]
    alphas[-1] = 1.0  # what a schedule leaves at t = 0 is not sampled
    rows = []
    for width, t, start, end in zip(widths, times[:-1], alphas[:-1], alphas[1:], strict=True):
        if width == 1:
            rows.append(Row(float(t), start, end))
            continue
        assert theta is not None
        middle = survival(log_odds(start) + theta * (log_odds(end) - log_odds(start)))
        rows += [Row(float(t), start, end, "first"), Row(float(schedule.time(middle)), start, end, "second")]
    return rows


class DiscreteScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers of tokens.  A subclass says its process."""

    order = 1
    _compatibles = ["BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"]  # noqa: RUF012

    def _setup(self) -> None:
        c = self.config
        self._schedule = noise_schedule(c.noise_schedule)
        check_finite("theta", c.theta)
        if not 0 < c.theta < 1:
            raise ValueError(f"theta must lie in (0, 1), not {c.theta}.")
        self.set_timesteps(c.num_inference_steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        block_length: int | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the times of ``num_inference_steps`` network calls.

        Args:
            num_inference_steps: calls of the network, whatever the steps are.
            device: of ``timesteps``, float32 in (0, 1].
            block_length: accepted for the pipelines that pass it; a step takes any number of positions.
            timesteps, sigmas, mu: of Gaussian processes, refused.

        Raises:
            ValueError: for these, and for no whole number of calls.
        """
        if timesteps is not None or sigmas is not None or mu is not None:
            raise ValueError("A discrete process is laid out by its number of calls: pass num_inference_steps alone.")
        check_whole("num_inference_steps", num_inference_steps)
        assert num_inference_steps is not None
        two_stages = self.config.algorithm_type == "theta_trapezoidal"
        self._rows = rows_of(self._schedule, num_inference_steps, self.config.theta if two_stages else None)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor([row.time for row in self._rows], dtype=torch.float32, device=device)
        self._first: torch.Tensor | None = None  # rates of the first stage

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample: tokens have no scale."""
        return sample

    # -- one step --

    def row(self, timestep: Any) -> Row:
        """The evaluation at a time in (0, 1], or of a number, as diffusers' discrete pipelines count their steps (whole
        numbers; further ones than there are mean the last)."""
        value = timestep.item() if isinstance(timestep, torch.Tensor | np.generic) else timestep
        if isinstance(value, int):
            return self._rows[min(value, len(self._rows) - 1)]
        return min(self._rows, key=lambda row: abs(row.time - value))

    def clean(
        self,
        model_output: torch.Tensor,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
    ) -> torch.Tensor:
        """The law of the clean tokens (N, L, S) that steps draw from; what is None is the config's.

        Args:
            model_output: logits (N, L, S).
            temperature, top_p, top_k: as in :func:`diffusers_sde.discrete.categorical.shape_logits`.
            sampling_method: ``greedy`` takes the likeliest token.
        """
        c = self.config
        warm = 0.0 if sampling_method == "greedy" else c.temperature if temperature is None else temperature
        return shape_logits(
            model_output, warm, c.top_k if top_k is None else top_k, c.top_p if top_p is None else top_p
        )

    def transition(self, process: DiscreteProcess, row: Row, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The law (N, L, S) of the next state, each position by itself; remembers the first stage of two.

        Args:
            process: the noise.
            row: the evaluation.
            sample: states (N, L).
            clean: the law of the clean tokens there (N, L, S).
        """
        c, (start, end) = self.config, (row.start, row.end)
        leaping = c.algorithm_type in LEAPS[1:] and start > 0 and end < 1
        if not leaping:
            return process.posterior(sample, clean, start, end)
        duration = log_odds(end) - log_odds(start)
        if row.stage != "second":
            rates = process.reverse_rates(sample, clean, start, 1 - start)
            self._first = rates
            return tau_leap(sample, rates, duration * (c.theta if row.stage == "first" else 1))
        if self._first is None or self._first.shape != clean.shape:
            raise ValueError(
                "The second stage of a step came without its first: step through timesteps in their order, all of them."
            )
        middle = survival(log_odds(start) + c.theta * duration)
        rates = trapezoidal_rates(self._first, process.reverse_rates(sample, clean, middle, 1 - middle), c.theta)
        self._first = None
        return tau_leap(sample, rates * process.made(sample)[..., None], duration * (1 - c.theta))

    def _output(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        clean: torch.Tensor,
        state: torch.Tensor,
        noise: torch.Tensor,
        given: torch.Tensor | None,
        return_dict: bool,
    ) -> DiscreteSchedulerOutput | tuple[torch.Tensor, ...]:
        """The result of a step, with the tokens that are given put back.

        Args:
            noise: which positions of ``sample`` and of ``state`` are noise, (2, N, L).
            given: positions that keep their tokens, (L,) or (N, L).
        """
        if given is not None:
            state = torch.where(given.to(sample.device), sample, state)
        before, after = noise
        tokens = torch.where(after, clean.argmax(-1), state)
        transferred = before & (state != sample)
        out = DiscreteSchedulerOutput(
            prev_sample=state,
            sampled_tokens=tokens,
            sampled_probs=clean.gather(-1, tokens[..., None])[..., 0].float(),
            transfer_index=transferred,
            editing_transfer_index=(state != sample) & ~transferred,
            pred_logits=model_output,
        )
        return out if return_dict else out.to_tuple()

    # -- what diffusers' block pipelines ask --

    def check_eos_finished(
        self,
        cur_x: torch.Tensor,
        sampled_tokens: torch.Tensor,
        final_transfer: torch.Tensor,
        finished: torch.Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> torch.Tensor:
        """Which texts (N,) have ended: an end token behind the prompt, and no mask before it.

        Args:
            cur_x: the whole sequences (N, L).
            sampled_tokens, final_transfer: of the last step; an end is looked for in the sequences themselves.
            finished: those known to have ended (N,).
            eos_token_id, mask_token_id, prompt_length: of the text.
        """
        text = cur_x[:, prompt_length:]
        ended = (text == eos_token_id).cumsum(-1) > 0
        return finished | (ended.any(-1) & ~((text == mask_token_id) & ~ended).any(-1))

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: Any,
        editing_enabled: bool,
        editing_transfer_index: torch.Tensor,
        post_steps: int,
        max_post_steps: int,
        finished: torch.Tensor,
    ) -> bool:
        """Whether a block has further steps: while it has masks, steps are left and a text has not ended; tokens are
        edited while there are masks, not afterwards."""
        return bool(masks_remaining) and step_idx < self.num_inference_steps and not bool(finished.all())
