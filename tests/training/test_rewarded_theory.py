"""What the losses of reward fine-tuning learn, against tilted laws and gradients in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR

from diffusers_sde.prediction import to_model
from diffusers_sde.training.reinforcement import NoisedSample, adjoint_steps, centred, policy_steps, to_go
from diffusers_sde.training.rollouts import Chain, make_chain, roll_out

STD, SLOPE = 0.6, 0.8  # of normal data, and of the linear reward SLOPE x: the tilt is N(SLOPE STD^2/beta, STD^2)
VP = {**LINEAR, "prediction_type": "epsilon"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROCESSES = {"vp": VP, "flow": FLOW}


class Oracle:
    """The exact network of N(0, STD^2) data tilted by exp(slope x), ``D + slope Var(x_0|x_t)``, with a slope for each
    step of a chain."""

    def __init__(self, chain: Chain, slopes: Any) -> None:
        self.chain, self.slopes = chain, slopes
        self.levels, self.path = chain.scheduler.levels, chain.scheduler.path

    def __call__(self, x: torch.Tensor, time: float) -> torch.Tensor:
        k = int(np.argmin(np.abs(self.levels.time[:-1] - time)))
        alpha, sigma = float(self.levels.alpha[k]), float(self.levels.sigma[k])
        variance = (alpha * STD) ** 2 + sigma**2
        data = alpha * STD**2 / variance * x + self.slopes[k] * (STD * sigma) ** 2 / variance
        k_x, k_d = to_model(self.path, self.chain.scheduler.config.prediction_type, alpha, sigma)
        return k_x * x + k_d * data


def chain_of(name: str, steps: int = 6, tau: Any = 1.0) -> Chain:
    return make_chain(PROCESSES[name], steps, tau=tau, data_std=STD)


def forgotten(chain: Chain) -> float:
    """The share of the variance of a chain's result that its own noise has made, the first state's is the rest."""
    kept = 1.0
    for k in range(len(chain)):
        x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        step = chain.step(Oracle(chain, [0.0] * len(chain)), k, x)
        kept *= float(torch.autograd.grad(step.mean.sum(), x)[0])
    first = chain.scheduler.levels
    return 1 - kept**2 * ((float(first.alpha[0]) * STD) ** 2 + float(first.sigma[0]) ** 2) / STD**2


def moments(chain: Chain, predict: Callable) -> tuple[float, float]:
    """Exact mean and standard deviation of a chain of affine steps, started from the law of its first level."""
    levels = chain.scheduler.levels
    alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
    mean, variance = 0.0, (alpha * STD) ** 2 + sigma**2
    for k in range(len(chain)):
        at = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        step = chain.step(predict, k, at)
        low, high = step.mean.flatten().tolist()
        mean, variance = low + (high - low) * mean, (high - low) ** 2 * variance + step.std**2
    return mean, math.sqrt(variance)


# -- rollouts --


@pytest.mark.parametrize("steps", [4, 8, 50])
@pytest.mark.parametrize("name", PROCESSES)
def test_rollouts_have_the_moments_of_the_data_from_4_to_50_steps(name: str, steps: int) -> None:
    chain = chain_of(name, steps)
    exact = moments(chain, Oracle(chain, [0.0] * steps))
    assert exact == pytest.approx((0, STD), rel=1e-9, abs=1e-9)
    drawn = roll_out(chain, Oracle(chain, [0.0] * steps), torch.arange(4000), (1,)).states[-1]
    assert float(drawn.mean()) == pytest.approx(0, abs=4 * STD / math.sqrt(4000))
    assert float(drawn.std()) == pytest.approx(STD, rel=4 / math.sqrt(8000))


def test_a_rollout_depends_on_the_seed_of_each_picture_only() -> None:
    chain = chain_of("flow")
    predict = Oracle(chain, [0.0] * 6)
    whole = roll_out(chain, predict, torch.tensor([5, 6, 7]), (2,)).states[-1]
    alone = roll_out(chain, predict, torch.tensor([6]), (2,)).states[-1]
    assert torch.equal(whole[1:2], alone)


# -- adjoint matching --


def learn_by_adjoint(chain: Chain, beta: float) -> torch.Tensor:
    """The slopes of the least loss, a parabola in each of them: where its derivative, which is a line, is zero."""
    steps = len(chain)
    start = Oracle(chain, [0.0] * steps)
    trajectory = roll_out(chain, start, torch.arange(16), (1,))
    parts = adjoint_steps(chain, trajectory, start, torch.full((16, 1), SLOPE / beta))
    derivatives = []
    for value in (0.0, 1.0):
        slopes = torch.full((steps,), value, dtype=torch.float64, requires_grad=True)
        loss = sum(part.loss(Oracle(chain, slopes)) for part in parts)
        derivatives.append(torch.autograd.grad(loss, slopes)[0])
    return derivatives[0] / (derivatives[0] - derivatives[1])


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("name", PROCESSES)
def test_adjoint_matching_learns_the_tilted_law(name: str, beta: float) -> None:
    """At 6 steps, whose own error it learns away: the exact network of the tilted law would arrive elsewhere."""
    chain = chain_of(name)
    mean, std = moments(chain, Oracle(chain, learn_by_adjoint(chain, beta).tolist()))
    assert mean == pytest.approx(SLOPE * STD**2 / beta, rel=1e-3)
    assert std == pytest.approx(STD, rel=1e-6)


def test_without_the_memoryless_schedule_adjoint_matching_is_biased_as_much_as_the_first_noise_is_remembered() -> None:
    """With less noise the result moves only as far as the noise of the rollout has made its variance."""
    shift = SLOPE * STD**2
    for tau in (0.3, 0.5):
        chain = chain_of("vp", tau=tau)
        mean, _ = moments(chain, Oracle(chain, learn_by_adjoint(chain, 1.0).tolist()))
        share = forgotten(chain)
        assert mean == pytest.approx(share * shift, rel=1e-3) and share < 0.95
    assert forgotten(chain_of("vp")) > 0.9999


# -- divergence --


@pytest.mark.parametrize("name", PROCESSES)
def test_the_sum_of_the_steps_divergences_is_that_of_the_laws(name: str) -> None:
    """Of N(d, s^2) from N(0, s^2): d^2/(2 s^2), at 6 steps, on rollouts of what has learned the tilt."""
    chain = chain_of(name)
    tilted, start = Oracle(chain, learn_by_adjoint(chain, 0.5).tolist()), Oracle(chain, [0.0] * 6)
    trajectory = roll_out(chain, tilted, torch.arange(8), (1,))
    each = [trajectory.steps[k].kl(chain.step(start, k, trajectory.states[k])) for k in trajectory.noisy]
    assert float(sum(each).mean()) == pytest.approx((SLOPE / 0.5 * STD) ** 2 / 2, rel=1e-3)


# -- policy gradients --


def policy_gradient(slopes: torch.Tensor, chain: Chain, beta: float, seeds: torch.Tensor, group: int) -> torch.Tensor:
    """What a step of grpo does to the slopes of an oracle."""
    trajectory = roll_out(chain, Oracle(chain, slopes.detach().tolist()), seeds, (1,))
    start = Oracle(chain, [0.0] * len(chain))
    starts = {k: chain.step(start, k, trajectory.states[k]) for k in trajectory.noisy}
    rewards = SLOPE * trajectory.states[-1][:, 0]
    parts = policy_steps(chain, trajectory, starts, rewards, group, beta=beta, clip_range=0.2, spread=1.0)
    loss = sum(part.loss(Oracle(chain, slopes)) for part in parts)
    (gradient,) = torch.autograd.grad(loss, slopes)
    return -gradient


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_policy_gradient_is_that_of_reward_less_divergence(name: str, beta: float) -> None:
    """Against the derivative of ``E[r] - beta KL`` of a chain of three steps, both in closed form: the means of the
    chain are affine in the slopes."""
    chain, slopes = chain_of(name, 3), torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)

    def value(s: np.ndarray) -> float:
        tilted, start = Oracle(chain, s.tolist()), Oracle(chain, [0.0] * 3)
        x = torch.zeros(1, 1, dtype=torch.float64)
        kl = 0.0
        for k in range(3):  # the difference of the means does not depend on the state
            step = chain.step(tilted, k, x)
            kl += float(step.kl(chain.step(start, k, x)))
            x = step.mean
        return SLOPE * float(x) - beta * kl

    h, base = 1e-4, slopes.numpy()
    exact = [(value(base + h * e) - value(base - h * e)) / (2 * h) for e in np.eye(3)]
    found = policy_gradient(slopes.requires_grad_(), chain, beta, torch.arange(40000), 8)
    assert found.tolist() == pytest.approx(exact, abs=0.02 * max(map(abs, exact)) + 0.003)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_policy_gradient_vanishes_at_the_tilted_law(name: str) -> None:
    """Which adjoint matching has learned: beta is that of the tilt in both."""
    chain, beta = chain_of(name, 4), 0.5
    at_optimum, elsewhere = (
        policy_gradient(slopes.requires_grad_(), chain, beta, torch.arange(20000), 8)
        for slopes in (learn_by_adjoint(chain, beta), torch.zeros(4, dtype=torch.float64))
    )
    assert float(at_optimum.norm()) < 0.05 * float(elsewhere.norm())


def test_a_clipped_ratio_is_followed_only_back_to_its_range() -> None:
    """Where the step has become more likely than the range allows, a good sample pulls no more, a bad one does."""
    chain = chain_of("flow", 3)
    slopes = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    trajectory = roll_out(chain, Oracle(chain, [0.0] * 3), torch.arange(2), (1,))
    start = Oracle(chain, [0.0] * 3)
    starts = {k: chain.step(start, k, trajectory.states[k]) for k in trajectory.noisy}
    options = {"beta": 0.0, "clip_range": 0.2, "spread": 1.0}
    for rewards, pulls in ((torch.tensor([1.0, -1.0]), [False, True]), (torch.tensor([-1.0, 1.0]), [True, False])):
        part = policy_steps(chain, trajectory, starts, rewards, 2, **options)[0]
        for sample, expected in enumerate(pulls):
            only = torch.zeros(2)
            only[sample] = part.advantage[sample]
            own = type(part)(**{**vars(part), "log_prob": part.log_prob - 1, "advantage": only})  # the ratio is e
            (gradient,) = torch.autograd.grad(own.loss(Oracle(chain, slopes)), slopes)
            assert bool(gradient[0] != 0) == expected


def test_the_advantage_leaves_the_sample_itself_out_and_stays_in_its_group() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 60.0])
    assert centred(values, 3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 10 - 40, 20 - 35, 60 - 15])


def test_the_divergence_to_go_is_that_of_later_steps() -> None:
    values = [torch.tensor([float(v)]) for v in (1, 2, 4)]
    assert [float(v) for v in to_go(values)] == [6, 4, 0]


# -- nft --


def noised(slope: float, beta: float, count: int = 40000) -> tuple[NoisedSample, Callable[[float], Callable]]:
    """Samples of the law tilted by ``slope`` noised at one level, with the exact network of that law."""
    draw = torch.Generator().manual_seed(0)
    alpha, sigma = 0.6, 0.8
    x0 = slope * STD**2 + STD * torch.randn(count, 1, generator=draw, dtype=torch.float64)
    x = alpha * x0 + sigma * torch.randn(count, 1, generator=draw, dtype=torch.float64)
    variance = (alpha * STD) ** 2 + sigma**2

    def exact(s: float) -> Callable:
        return lambda x, time: alpha * STD**2 / variance * x + s * (STD * sigma) ** 2 / variance

    away = SLOPE * x0[:, 0]
    away = away - away.mean()
    greatest = float(away.abs().max())
    now = exact(slope)(x, None)
    part = NoisedSample(
        x, None, x0, now, exact(0.0)(x, None), 0.5 + 0.5 * away / greatest, torch.ones(count), beta / greatest
    )
    return part, exact


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_nft_rests_at_the_tilted_law_and_pulls_there_from_the_start(beta: float) -> None:
    """The gradient in the slope of the exact network: none at SLOPE/beta, else proportional to the distance."""
    gradients = []
    for slope in (0.0, SLOPE / beta):
        part, exact = noised(slope, beta)
        s = torch.tensor(slope, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(part.loss(exact(s)), s)
        gradients.append(float(gradient))
    assert gradients[0] < 0 and abs(gradients[1]) < 0.05 * abs(gradients[0])
