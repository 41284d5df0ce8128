"""Averages of the weights with a power-function profile (Karras et al. 2024, arXiv:2312.02696, section 3.1).

Knows parameters and steps.  The average after step t gives the weights of step s a share proportional to ``s^gamma``:
its memory is a fixed fraction of the training so far, so that one setting fits short and long trainings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def gamma_of_width(sigma_rel: float) -> float:
    """The exponent of a profile of relative standard deviation ``sigma_rel``: the root of
    ``(gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2`` (eq. 5 and appendix C).

    Raises ``ValueError`` outside (0, 0.288], where no exponent exists.
    """
    if not 0 < sigma_rel <= 0.288:
        raise ValueError(f"The relative width of an EMA must be in (0, 0.288], not {sigma_rel}; 0.05 to 0.15 is usual.")
    p = sigma_rel**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - p, 12.0 - p])
    return float(roots[np.isreal(roots)].real.max())


class PowerEMA:
    """The average of ``parameters``, float32, on their devices: ``average <- b average + (1 - b) weights`` with
    ``b = (1 - 1/t)^(gamma + 1)`` at step t (eq. 127)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], sigma_rel: float = 0.1):
        self.gamma = gamma_of_width(sigma_rel)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.average = [p.detach().float().clone() for p in self.parameters]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimizer step and take its weights in."""
        self.step += 1
        share = 1 - (1 - 1 / self.step) ** (self.gamma + 1)
        torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, for validation and saving."""
        kept = [p.detach().clone() for p in self.parameters]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def load(self, average: list[torch.Tensor], step: int) -> None:
        """Go on from an average after so many steps.  Raises ``ValueError`` for one of other parameters."""
        if [a.shape for a in average] != [a.shape for a in self.average]:
            raise ValueError("the average is one of other parameters")
        self.step = step
        for mine, saved in zip(self.average, average, strict=True):
            mine.copy_(saved)
