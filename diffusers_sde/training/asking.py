"""What a network says at states and times of its process, with the guidance of its condition if wanted.

Knows a :class:`.networks.Task` and tensors.  Knows no objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sde.paths import Path
from diffusers_sde.training.networks import Task, call_network


def at_times(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Host floats (N,) as a float32 tensor (N, 1, 1, 1) beside ``like``."""
    return torch.from_numpy(np.asarray(values)).to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))


def ask(
    task: Task, network: Any, path: Path, x: torch.Tensor, t: np.ndarray, condition: dict[str, Any]
) -> torch.Tensor:
    """The prediction at states x of times t (N,), float32."""
    sigma = at_times(path.alpha_sigma(t)[1], x)
    return call_network(task, network, x, at_times(t, x).flatten(), sigma, condition).float()


def ask_guided(
    task: Task,
    network: Any,
    path: Path,
    x: torch.Tensor,
    t: np.ndarray,
    labels: Sequence[int | None] | None,
    captions: Sequence[str | None] | None,
    frames: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The prediction at states x of times t (N,) with classifier-free guidance of this scale (1: none), float32."""
    m = ask(task, network, path, x, t, task.given(labels, captions, frames))
    if scale == 1.0:
        return m
    none = [None] * len(x)
    null = ask(task, network, path, x, t, task.given(none if labels else None, none, frames))
    return torch.lerp(null, m, scale)
