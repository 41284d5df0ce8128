"""The network that learns from rewards, its frozen start, and the pictures of its states.

Knows a :class:`.networks.Task`, how its network is asked for a batch, and how latents become pictures.  Knows no
rewards, objectives or processes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from diffusers_sde.errors import UsageError
from diffusers_sde.methods.pipeline_io import sample_shape
from diffusers_sde.schedulers import FlowMapScheduler
from diffusers_sde.training.asking import ask_guided
from diffusers_sde.training.encoding import decoded, drawn, encoder_output
from diffusers_sde.training.networks import Task
from diffusers_sde.training.randomness import generator_of, seed_of
from diffusers_sde.training.rollouts import Predict
from diffusers_sde.training.settings import Settings

_ROLLOUT = 5  # the stream of a position's random numbers that its rollout comes from


def frozen_start(settings: Settings, task: Task) -> Task:
    """The task with its network as it is now for good: a copy, or for LoRA the network itself, whose adapters are
    switched off (:meth:`Learner.start`).

    Raises:
        UsageError: for a flow map, which has no noise levels between its jumps.
    """
    if isinstance(task.scheduler, FlowMapScheduler):
        raise UsageError(
            "A flow map jumps and has no rollout to learn from: pass the model that it was distilled from."
        )
    if settings.rank is not None:
        return task
    network = copy.deepcopy(task.network).requires_grad_(False).eval()
    return dataclasses.replace(task, network=network, trained=network)


@dataclasses.dataclass
class Learner:
    """What a rollout asks.

    Args:
        settings: of the training.
        task: what is trained.
        frozen: what it began as (:func:`frozen_start`).
        autocast: a context for calls of the network.
    """

    settings: Settings
    task: Task
    frozen: Task
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __post_init__(self) -> None:
        self.path = self.task.path

    def predict(self, batch: dict[str, Any]) -> Callable[[Any, torch.Tensor, Any], torch.Tensor]:
        """``predict(network, x, time)`` for the wishes of a batch, with guidance; time is a float or (N,) floats."""
        return self._asked(self.task, batch)

    def start(self, batch: dict[str, Any]) -> Predict:
        """``start(x, time)``, what the network said before the training."""
        asked = self._asked(self.frozen, batch)

        def predict(x: torch.Tensor, time: Any) -> torch.Tensor:
            with self._without_adapters():
                return asked(self.frozen.network, x, time)

        return predict

    def _asked(self, task: Task, batch: dict[str, Any]) -> Callable[[Any, torch.Tensor, Any], torch.Tensor]:
        labels = batch["class_labels"].tolist() if "class_labels" in batch else None
        prompts, scale = batch.get("caption"), self.settings.guidance_scale

        def predict(network: Any, x: torch.Tensor, time: Any) -> torch.Tensor:
            times = np.full(len(x), time, np.float64)
            with self.autocast():
                return ask_guided(task, network, self.path, x, times, labels, prompts, None, scale)

        return predict

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        if self.frozen is not self.task:
            yield
            return
        self.task.network.disable_adapters()
        try:
            yield
        finally:
            self.task.network.enable_adapters()

    def seeds(self, batch: dict[str, Any]) -> torch.Tensor:
        """A seed for the rollout of each position (N,), int64."""
        own = [seed_of(self.settings.seed, int(p), _ROLLOUT) for p in batch["positions"]]
        return torch.tensor(own, device=self.task.network.device)

    def shape(self, resolution: int) -> tuple[int, ...]:
        """Of the state of one picture of this resolution (C, H, W)."""
        if self.task.vae is None:
            return sample_shape(self.task.network)
        grey = torch.zeros(1, self.task.channels, resolution, resolution)
        return tuple(drawn(encoder_output(self.task.vae, grey), [generator_of(0)]).shape[1:])

    def pictures(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures (N, C, H, W) in [0, 1] of the last states of rollouts, differentiable."""
        pixels = x if self.task.vae is None else decoded(self.task.vae, x)
        return ((pixels + 1) / 2).clamp(0, 1)
