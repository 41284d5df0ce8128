"""The loop: optimizer steps until the training, the sitting or the patience of the system ends.

Knows a :class:`Session`, its stream of batches and a loss.  Knows neither models nor data.
"""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.training import card
from diffusers_sde.training.experience import RewardFailed
from diffusers_sde.training.losses import Loss
from diffusers_sde.training.randomness import seed_of
from diffusers_sde.training.results import validate
from diffusers_sde.training.session import Session
from diffusers_sde.training.soundness import check, diverged

_DROPOUT = 4  # the stream of the network's own random numbers
STOPPED = 128 + signal.SIGTERM  # exit status after a checkpoint on SIGTERM


class StopRequest:
    """Whether the process was asked to stop (SIGTERM, SIGINT); the step under way is finished first."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


def run_steps(session: Session, stream: Iterator[dict[str, Any]], loss_of: Loss) -> int:
    """Optimizer steps until the end of the training or of the sitting, or a request to stop; returns the status.

    Raises:
        Diverged: before a checkpoint or the result is written from weights that are not good.
    """
    settings, accelerator, progress = session.settings, session.accelerator, session.progress
    main = accelerator.is_main_process
    curve = session.output / "loss.csv"
    if main:
        card.start_curve(curve, progress.step)
    if settings.report_to != "none":
        accelerator.init_trackers("diffusers_sde", config=settings.public())
    last = session.length.steps
    if settings.stop_after_steps is not None:
        last = min(last, progress.step + settings.stop_after_steps)
    if progress.step >= last:
        return 0
    try:
        first = next(stream)
    except RewardFailed as error:
        raise RewardFailed(f"{error}; mend it, then {session.last_good()}.") from error
    stream = itertools.chain([first], stream)
    losses: list[float] = []  # since the last line of the tracker
    unchecked: list[float] = []  # since the last check
    bar = tqdm(initial=progress.step, total=session.length.steps, unit="step", disable=not main or None)
    with StopRequest() as stop, bar:
        while progress.step < last:
            rate = session.lr_scheduler.get_last_lr()[0]
            try:
                loss, stopping = optimizer_step(session, stream, loss_of, stop)
            except RewardFailed as error:
                if unchecked:  # since the last checkpoint
                    check(session, loss_of, first, unchecked)
                    session.save_checkpoint()
                raise RewardFailed(f"{error}; mend it, then {session.last_good()}.") from error
            stopping = stopping and progress.step % session.length.updates == 0
            losses.append(loss)
            unchecked.append(loss)
            bar.update()
            keep = progress.step % settings.checkpointing_steps == 0 or stopping or progress.step == last
            if keep or progress.step % settings.logging_steps == 0:
                mean = sum(losses) / len(losses)
                accelerator.log({"loss": mean, "learning_rate": rate}, step=progress.step)
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if main:
                    card.extend_curve(curve, progress.step, mean, rate)
                losses.clear()
            if keep:
                check(session, loss_of, first, unchecked)
                unchecked.clear()
                session.save_checkpoint()
            if settings.validation_steps and progress.step % settings.validation_steps == 0 and progress.step < last:
                validate(session, f"step-{progress.step:06d}")
            if stopping:
                if main:
                    print(
                        f"Stopped after step {progress.step}; go on with --resume_from_checkpoint latest.", flush=True
                    )
                return STOPPED
    return 0


def optimizer_step(
    session: Session, stream: Iterator[dict[str, Any]], loss_of: Loss, stop: StopRequest
) -> tuple[float, bool]:
    """One optimizer step; its mean loss over batches and processes, and whether any process was asked to stop.

    Raises:
        Diverged: before the weights are touched, if a loss or the gradient is not finite.
    """
    settings, accelerator, progress = session.settings, session.accelerator, session.progress
    total, stopping, losses = 0.0, False, session.length.accumulate * session.length.parts
    for k in range(losses):
        batch = next(stream)
        torch.manual_seed(seed_of(settings.seed, progress.step * losses + k, accelerator.process_index, _DROPOUT))
        with accelerator.accumulate(session.network):
            with accelerator.autocast():
                loss = loss_of(session.network, batch)
            own = torch.stack([loss.detach().float(), torch.full_like(loss.detach(), float(stop.requested)).float()])
            mean, requests = accelerator.reduce(own, reduction="mean").tolist()
            if not math.isfinite(mean):
                raise diverged(session, f"The loss is {mean} at step {progress.step + 1}")
            total, stopping = total + mean / losses, stopping or requests > 0
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(session.network.parameters(), settings.max_grad_norm)
                if accelerator.scaler is None and norm is not None and not math.isfinite(norm):  # a scaler skips these
                    raise diverged(session, f"The gradient is {norm:g} at step {progress.step + 1}")
            session.optimizer.step()
            session.optimizer.zero_grad(set_to_none=True)
    session.lr_scheduler.step()
    progress.step += 1
    if session.ema is not None:
        session.ema.update()
    return total, stopping
