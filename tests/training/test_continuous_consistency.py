"""Consistency training with ever smaller steps: the gradient of its continuous-time objective.

Song et al. 2023: arXiv:2303.01469, theorem 6.  Lu & Song 2024: arXiv:2410.11081.  Geng et al. 2025: arXiv:2505.13447.
Lai et al.: arXiv:2510.21890, chapter 11.  Derivatives along trajectories are exact (forward-mode differentiation).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import PATHS

from diffusers_sde.flow_maps import average_prediction, jump
from diffusers_sde.training.losses import draw, make_loss
from diffusers_sde.training.networks import Task

X0, EPS = torch.tensor([[0.4, -1.2], [1.1, 0.3]], dtype=torch.float64)


def network(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Some smooth function of state and level."""
    return torch.tanh(1.3 * x - 0.7 * r) + 0.2 * x * r**2


def along(x: torch.Tensor, r: float, speed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """m and its total derivative dm/dr where x moves with ``speed``."""
    at = torch.tensor(r, dtype=torch.float64)
    return torch.func.jvp(network, (x, at), (speed, torch.ones_like(at)))


@pytest.mark.parametrize("s", [0.0, 0.25])
def test_small_steps_learn_the_mean_flow_identity(s: float) -> None:
    """The target of a step h of sigma differs from m by ``h ((v - m) - (t - s) dm/dt)/(t - s)``: its fixed point in the
    limit is the MeanFlow identity, at s = 0 that of consistency models; v is the velocity of one (x_0, eps), whose mean
    is that of the ODE (Geng et al., eq. 6 and 10)."""
    path, t = PATHS["flow"], 0.7
    v, x = EPS - X0, (1 - t) * X0 + t * EPS
    m, slope = along(x, t, v)
    exact = ((v - m) - (t - s) * slope) / (t - s)

    def rate(h: float) -> torch.Tensor:
        u = t - h
        x_u = (1 - u) * X0 + u * EPS
        level = torch.tensor(u, dtype=torch.float64)
        x_s = jump(path, "flow_prediction", x_u, network(x_u, level), 1000 * u, 1000 * s)
        return (average_prediction(path, "flow_prediction", x, x_s, 1000 * t, 1000 * s) - m) / h

    torch.testing.assert_close(2 * rate(1e-4) - rate(2e-4), exact, rtol=1e-6, atol=1e-6)


def test_small_steps_have_the_tangent_of_trigflow() -> None:
    """On the circle ``x = cos(r) x_0 + sin(r) eps`` the consistency function is ``f = cos(r) x - sin(r) m`` and the
    target moves m by ``h/sin(r) df/dr``, ``df/dr = -cos(r) (m - dx/dr) - sin(r) (x + dm/dr)`` (Lu & Song, eq. 6 with
    unit data scale)."""
    path, r = PATHS["vp_zero_snr"], 0.9
    clean = math.atan2(*(float(v) for v in reversed(path.alpha_sigma(path.cleanest))))

    def at(angle: float) -> tuple[float, torch.Tensor]:
        time = float(path.time(-math.log(math.tan(angle))))
        return time, math.cos(angle) * X0 + math.sin(angle) * EPS

    (t, x), speed = at(r), math.cos(r) * EPS - math.sin(r) * X0
    m, slope = along(x, r, speed)
    to = r - clean  # the target of the package's network is the cleanest training time, not r = 0
    exact = (-math.cos(to) * (m - speed) - math.sin(to) * (x + slope)) / math.sin(to)

    def rate(h: float) -> torch.Tensor:
        u, x_u = at(r - h)
        level = torch.tensor(r - h, dtype=torch.float64)
        x_s = jump(path, "v_prediction", x_u, network(x_u, level), u, path.cleanest)
        return (average_prediction(path, "v_prediction", x, x_s, t, path.cleanest) - m) / h

    torch.testing.assert_close(2 * rate(1e-4) - rate(2e-4), exact, rtol=1e-6, atol=1e-6)


class Toy(torch.nn.Module):
    """A network of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.device = torch.device("cpu")

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (torch.sin(self.weight * x.double()) + timestep.double().reshape(-1, 1, 1, 1) / 1000,)


def test_the_gradient_of_the_training_tends_to_the_continuous_one() -> None:
    """``N`` times the gradient of ``--objective consistency`` with steps of 1/N tends to ``-2 E[dm/dtheta tangent]``,
    the target held fixed (Song et al. 2023, theorem 6)."""
    toy, path, n = Toy(), PATHS["flow"], 64
    pipe = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    task = Task(pipe, "toy", toy, lambda *_: {})
    batch = {"positions": torch.arange(n), "pixel_values": torch.linspace(-1, 1, 4 * n).reshape(n, 1, 2, 2)}

    def settings(steps: int) -> Any:
        times = {"time_sampling": "logit_normal", "time_mean": 0.5, "time_std": 0.4, "label_dropout": 0.0, "seed": 0}
        weight = {"loss_weighting": "none", "snr_gamma": 5.0, "loss": "l2", "huber_c": 0.1}
        return SimpleNamespace(objective="consistency", distillation_steps=steps, guidance_scale=1.0, **times, **weight)

    def gradient(steps: int) -> float:
        toy.zero_grad()
        make_loss(settings(steps), task, None, n)(toy, batch).backward()
        assert toy.weight.grad is not None
        return steps * float(toy.weight.grad)

    d = draw(settings(1), task, batch, n)
    x0, eps = d.x0.double(), d.eps.double()
    z = torch.special.ndtri(torch.from_numpy(d.u))
    times = path.training_times(torch.sigmoid(0.5 + 0.4 * z).numpy())[0]
    r = torch.from_numpy(np.asarray(times)).reshape(-1, 1, 1, 1) / 1000
    low = float(path.alpha_sigma(path.cleanest)[1])
    x, v, w = (1 - r) * x0 + r * eps, eps - x0, float(toy.weight)
    m, slope = torch.sin(w * x) + r, torch.cos(w * x) * w * v + 1
    tangent = ((v - m) - (r - low) * slope) / (r - low) * (1 - low)  # a step of 1/N of the range of times
    exact = -2 * float((torch.cos(w * x) * x * tangent).flatten(1).mean(1).mean())
    assert 2 * gradient(400) - gradient(200) == pytest.approx(exact, rel=2e-3)
