"""Whether a training still works: its losses, gradients and weights are numbers, and its loss is in the run's range.

Knows a :class:`Session` and a loss.  Knows nothing of optimizers or of how checkpoints are written.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from diffusers_sde.training.losses import Loss
from diffusers_sde.training.session import Session

MARGIN = 10.0  # how far above the greatest loss of the run so far the loss of good weights may lie


class Diverged(Exception):
    """The training has left the numbers or its range; the message names the last good checkpoint."""


def diverged(session: Session, what: str) -> Diverged:
    """The exception that says what happened and what to do."""
    return Diverged(
        f"{what}: {session.last_good()}, with a smaller --learning_rate, another --loss_weighting or without "
        "--mixed_precision fp16."
    )


def check(session: Session, loss_of: Loss, reference: dict[str, Any], losses: Sequence[float]) -> None:
    """Pass weights that may be kept, and widen the run's range to the losses that led to them.

    The losses of the steps lag behind: that of the last step was made before its update.  So the weights as they are
    now, and their average, are asked for the loss of a batch from the beginning.

    Args:
        reference: the first batch of this process.
        losses: of the steps since the last check, at least one.

    Raises:
        Diverged: for weights that are not finite, or whose loss is more than ``MARGIN`` times the greatest of the
            steps up to the last check (before the first: of the first half of the steps) and of ``reference``.
    """
    progress = session.progress
    first = losses[: (len(losses) + 1) // 2]
    known = max(map(abs, first)) if progress.greatest_loss is None else max(progress.greatest_loss, abs(losses[0]))
    for weights in [contextlib.nullcontext()] + ([] if session.ema is None else [session.averaged()]):
        with weights:
            loss = loss_of_weights(session, loss_of, reference)
        if not math.isfinite(loss):
            raise diverged(session, f"The weights after step {progress.step} are broken (their loss is {loss})")
        if 0 < MARGIN * known < abs(loss) and not session.settings.rewarded:  # rewards have no range
            raise diverged(
                session,
                f"The weights after step {progress.step} are broken (their loss is {loss:.3g}, that of the training "
                f"was at most {known:.3g})",
            )
    progress.greatest_loss = max(known, *map(abs, losses))


@torch.no_grad()
def loss_of_weights(session: Session, loss_of: Loss, reference: dict[str, Any]) -> float:
    """The mean loss of all processes' ``reference``, without dropout; NaN where a weight is not finite anywhere."""
    network, accelerator = session.network, session.accelerator
    floats = [v for v in itertools.chain(network.parameters(), network.buffers()) if v.is_floating_point()]
    network.eval()
    try:
        with accelerator.autocast():
            loss = loss_of(network, reference).float()
    finally:
        network.train()
    finite = torch.stack([v.isfinite().all() for v in floats]).all()
    return accelerator.reduce(torch.where(finite, loss, torch.nan), reduction="mean").item()
