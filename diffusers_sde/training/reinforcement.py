r"""Learning from rewards: the losses of policy gradients, adjoint matching and DiffusionNFT, and what they learn.

All of them seek the law that maximises ``E[r] - beta KL(theta || start)`` over the trajectories of a sampler, which is
that of the start tilted by ``exp(r/beta)`` (Fu & Wang, arXiv:2605.22586; Lu, arXiv:2607.01693, section 8).  Its samples
have the law ``p(x) exp(r(x)/beta)/Z`` if the sampler forgets its first noise (tau = 1, "memoryless"; Domingo-Enrich et
al., arXiv:2409.08861, section 4).  With ``x' ~ N(mean_theta, std^2 I)`` the step of a :class:`.rollouts.Chain`, Delta =
mean_theta - mean_start and A a sample's reward to go, less the mean of its group,

    grpo              -min(ratio A, clip(ratio) A) + beta |Delta|^2 / (2 std^2), ratio = p_theta(x'|x)/p_old(x'|x)
                      (Liu et al., arXiv:2505.05470), A of ``r - beta sum of the later steps' KL``: its gradient is
                      that of E[r] - beta KL, so that beta is the tilt's.
    adjoint_matching  |Delta/std - std a'|^2 / 2, ``a = (d mean_start/dx)^T a'`` backwards from ``grad r/beta``.  At the
                      optimum Delta = std^2 E[a'|x] exactly, at any number of steps, for a' is then minus the
                      gradient of the cost to go (its envelope theorem).
    nft               a contrast of good and bad samples that are noised anew, see :class:`NoisedSample` (Zheng et al.,
                      arXiv:2509.16117); no transition is needed, so that any sampler may have drawn them.

Knows tensors, transitions and a network as a function of state and time.  Knows no rollouts, prompts or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde.training.rollouts import Chain, Predict, Trajectory
from diffusers_sde.transitions import GaussianTransition

_LARGEST = 20.0  # log-ratio: beyond it only the sign of the advantage matters
_LEAST = 1e-8  # of a spread that is divided by


def centred(values: torch.Tensor, group: int) -> torch.Tensor:
    """Values (N,) less the mean of the others of their group of ``group`` consecutive ones: a baseline that leaves the
    policy gradient unbiased."""
    groups = values.reshape(-1, group)
    return ((groups - groups.mean(1, keepdim=True)) * group / (group - 1)).flatten()


def to_go(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each of K steps the sum of the values (N,) of the steps after it."""
    sums = [torch.zeros_like(values[-1])]
    for value in reversed(values[1:]):
        sums.append(sums[-1] + value)
    return sums[::-1]


@dataclass(frozen=True)
class PolicyStep:
    """A step of a rollout that is re-scored.

    Args:
        chain, k: which step.
        state, next_state: between which it went (N, ...).
        log_prob: what the network of the rollout gave it (N,).
        advantage: (N,).
        start: the step of the start from the same state.
        beta: weight of the divergence from it.
        clip_range: how far from 1 the likelihood ratio is followed.
        spread: of the rewards; divides both terms, so that the loss has no units.
    """

    chain: Chain
    k: int
    state: torch.Tensor
    next_state: torch.Tensor
    log_prob: torch.Tensor
    advantage: torch.Tensor
    start: GaussianTransition
    beta: float
    clip_range: float
    spread: float

    def loss(self, predict: Predict) -> torch.Tensor:
        """The mean over the batch, float32."""
        step = self.chain.step(predict, self.k, self.state)
        ratio = (step.log_prob(self.next_state) - self.log_prob).clamp(-_LARGEST, _LARGEST).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        gain = torch.minimum(ratio * self.advantage, clipped * self.advantage)
        return ((self.beta * step.kl(self.start) - gain) / max(self.spread, _LEAST)).mean().float()


def policy_steps(
    chain: Chain,
    trajectory: Trajectory,
    starts: dict[int, GaussianTransition],
    rewards: torch.Tensor,
    group: int,
    *,
    beta: float,
    clip_range: float,
    spread: float,
) -> list[PolicyStep]:
    """The noisy steps of a rollout.

    Args:
        starts: the start's step from each of their states.
        rewards: (N,), groups of ``group`` consecutive ones.
        beta, clip_range, spread: see :class:`PolicyStep`.
    """
    steps, states, noisy = trajectory.steps, trajectory.states, trajectory.noisy
    later = to_go([steps[k].kl(starts[k]) for k in noisy])
    return [
        PolicyStep(
            chain,
            k,
            states[k],
            states[k + 1],
            steps[k].log_prob(states[k + 1]),
            centred(rewards.to(kl.dtype) - beta * kl, group),
            starts[k],
            beta,
            clip_range,
            spread,
        )
        for k, kl in zip(noisy, later, strict=True)
    ]


@dataclass(frozen=True)
class AdjointStep:
    """A step of a rollout that is pulled along the adjoint.

    Args:
        chain, k: which step.
        state: from which it went (N, ...).
        start: the step of the start from the same state.
        adjoint: at its end (N, ...).
    """

    chain: Chain
    k: int
    state: torch.Tensor
    start: GaussianTransition
    adjoint: torch.Tensor

    def loss(self, predict: Predict) -> torch.Tensor:
        """The mean over batch and dimensions, float32."""
        step = self.chain.step(predict, self.k, self.state)
        error = (step.mean - self.start.mean) / step.std - step.std * self.adjoint
        return 0.5 * error.float().square().mean()


def adjoint_steps(chain: Chain, trajectory: Trajectory, start: Predict, slope: torch.Tensor) -> list[AdjointStep]:
    """The noisy steps of a rollout with the lean adjoint, which is carried back through the start's steps.

    Args:
        start: the network before any training.
        slope: ``grad r / beta`` at the last states (N, ...).
    """
    steps = []
    for k in reversed(range(len(chain))):
        x = trajectory.states[k].detach().requires_grad_()
        with torch.enable_grad():
            own = chain.step(start, k, x)
            (before,) = torch.autograd.grad(own.mean, x, slope.to(own.mean.dtype))
        if own.std > 0:
            frozen = GaussianTransition(own.mean.detach(), own.std, own.jacobian, own.start, own.end)
            steps.append(AdjointStep(chain, k, trajectory.states[k], frozen, slope))
        slope = before
    return steps[::-1]


@dataclass(frozen=True)
class NoisedSample:
    """Samples noised anew, to which the network is drawn as far as they are good and from which as far as they are not:

        w [o |v_theta - v|^2 + (1 - o) |2 v_old - v_theta - v|^2 + pull |v_theta - v_start|^2],   o = 1/2 + A/2

    with A in [-1, 1] the centred reward over its greatest size R.  At v_theta = v_old its gradient is ``2 w [A (v_theta
    - v) + pull (v_theta - v_start)]``, zero on average where ``v_theta - v_start = Cov(r, v | x_t)/(R pull)``.
    The covariance is the derivative of v along the tilt, so that ``pull = beta/R`` makes beta that of the tilt: exactly
    for linear rewards of normal data, whose covariance does not change, else to first order in r/beta.

    Args:
        state: x_t (N, ...).
        time: its times (N,), host floats.
        target: v, the network's target there.
        old: what the network of the rollout says there.
        start: what the start says there.
        optimality: o (N,).
        weight: w (N,).
        pull: of the start.
    """

    state: torch.Tensor
    time: Any
    target: torch.Tensor
    old: torch.Tensor
    start: torch.Tensor
    optimality: torch.Tensor
    weight: torch.Tensor
    pull: float

    def loss(self, predict: Predict) -> torch.Tensor:
        """The mean over batch and dimensions, float32."""
        now = predict(self.state, self.time)
        near, far, gone = (
            error.float().square().flatten(1).mean(1)
            for error in (now - self.target, 2 * self.old - now - self.target, now - self.start)
        )
        o = self.optimality
        return (self.weight * (o * near + (1 - o) * far + self.pull * gone)).mean()


Part = PolicyStep | AdjointStep | NoisedSample
