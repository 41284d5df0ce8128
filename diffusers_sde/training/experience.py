"""Where a reward fine-tuning gets its batches from: rollouts of the network as it is, their rewards, and the parts of
what they teach, one loss each.

Knows a :class:`.session.Session`, a :class:`.learner.Learner` and rewards; what is random is a function of (seed,
position), so that a resumed training makes the rollouts of an uninterrupted one.  The formulas are those of
:mod:`.reinforcement`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sde.errors import UsageError
from diffusers_sde.training import card
from diffusers_sde.training.asking import at_times
from diffusers_sde.training.learner import Learner
from diffusers_sde.training.losses import times_of
from diffusers_sde.training.objectives import loss_weights, prediction_targets
from diffusers_sde.training.processes import first_problem
from diffusers_sde.training.randomness import generator_of
from diffusers_sde.training.reinforcement import NoisedSample, Part, adjoint_steps, centred, policy_steps
from diffusers_sde.training.rewards import Reward, Spoiled, total
from diffusers_sde.training.rollouts import Chain, draw_samples, make_chain, roll_out
from diffusers_sde.training.session import Session
from diffusers_sde.training.settings import Settings
from diffusers_sde.transitions import sum_per_sample

REWARDS = ("step", "reward", "spread", "kl")
_NOISED = 6  # the stream of a position's random numbers that its noise for nft comes from


class RewardFailed(UsageError):
    """A reward gave no number for a picture; what was learned before is not lost."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far rewards lie from those of their groups, over all pictures of a rollout: root mean square and greatest."""

    usual: float
    greatest: float


@dataclasses.dataclass(frozen=True)
class Experience:
    """What one batch of pictures has taught.

    Args:
        rewards: (N,).
        kl: an estimate for each sample, whose mean is the divergence from the start (N,).
        parts: the losses, once it is known how far all rewards spread.
    """

    rewards: torch.Tensor
    kl: torch.Tensor
    parts: Callable[[Spread], Sequence[Part]]


def window_of(settings: Settings, number: int) -> list[int]:
    """The steps of rollout ``number`` that are trained: all that may draw noise, or a window that moves on by one."""
    steps, size = settings.stochastic_steps, settings.window_size or settings.stochastic_steps
    first = number % (steps - size + 1)
    return list(range(first, first + size))


def teach(session: Session, stream: Iterator[dict[str, Any]], learner: Learner, rewards: Sequence[Reward]) -> Any:
    """Endless parts ``{"part", "predict"}`` of rollouts of the batches of ``stream``, from the session's step on.

    Raises:
        RewardFailed: on every process, with the step and the picture of the first reward that is no number.
    """
    settings, length = session.settings, session.length
    curve = session.output / "rewards.csv"
    if session.accelerator.is_main_process:
        card.start_curve(curve, session.progress.step, REWARDS)
    shape = learner.shape(session.measured.framing.resolution)
    for number in itertools.count(session.progress.step // settings.updates_per_rollout):
        batches = [next(stream) for _ in range(length.accumulate)]
        session.network.eval()
        learned, problem = [], None
        try:
            for batch in batches:
                learned.append(experience_of(learner, rewards, batch, number, shape))
        except Spoiled as error:
            at = "" if error.index is None else f" for picture {_place(batch, error.index, length)}"
            problem = f"At step {session.progress.step + 1} the reward {error.what}{at}"
        problem = first_problem(problem)
        if problem is not None:
            raise RewardFailed(problem)
        spread = record(session, learned, curve)
        ready = [(batch, own.parts(spread)) for batch, own in zip(batches, learned, strict=True)]
        for _ in range(settings.updates_per_rollout):
            for batch, parts in ready:
                yield from ({"part": part, "predict": learner.predict(batch)} for part in parts)


def _place(batch: dict[str, Any], index: int, length: Any) -> str:
    """Which picture of the step it is, and what it was asked for."""
    number = int(batch["positions"][index]) % (length.global_batch * length.accumulate)
    wish = batch["caption"][index] if "caption" in batch else batch.get("class_labels", {index: None})[index]
    return f"{number}" if wish is None else f"{number} ({wish if isinstance(wish, str) else f'label {int(wish)}'})"


def record(session: Session, learned: Sequence[Experience], curve: Any) -> Spread:
    """Write down mean, spread and divergence of a rollout; its :class:`Spread`, over all processes."""
    settings, accelerator = session.settings, session.accelerator
    group = 1 if settings.objective == "adjoint_matching" else settings.group_size
    rewards = torch.cat([own.rewards for own in learned])
    away = rewards if group == 1 else centred(rewards, group)
    told = torch.stack([rewards, torch.cat([own.kl for own in learned]).float(), away], 1)
    reward, kl, away = accelerator.gather(told.contiguous()).double().unbind(1)
    step = session.progress.step + 1
    facts = {"reward": reward.mean().item(), "spread": reward.std(correction=0).item(), "kl": kl.mean().item()}
    accelerator.log(facts, step=step)
    if accelerator.is_main_process:
        card.extend_curve(curve, step, *facts.values())
    return Spread(away.square().mean().sqrt().item(), away.abs().max().item())


def experience_of(
    learner: Learner, rewards: Sequence[Reward], batch: dict[str, Any], number: int, shape: Sequence[int]
) -> Experience:
    """Rollout ``number`` for the wishes of a batch.

    Raises:
        Spoiled: for a reward that is no number.
    """
    make = {"grpo": _of_policy, "adjoint_matching": _of_adjoint, "nft": _of_noised}[learner.settings.objective]
    return make(learner, rewards, batch, number, shape)


def chain_of(learner: Learner, window: Sequence[int]) -> Chain:
    """The sampler of a rollout: of grpo noise is drawn in the window only, of adjoint matching everywhere."""
    settings = learner.settings
    tau = 1.0 if settings.rollout_tau is None else settings.rollout_tau
    everywhere = settings.objective == "adjoint_matching"
    taus = [tau if everywhere or k in window else 0.0 for k in range(settings.rollout_steps)]
    config, device = learner.task.scheduler.config, learner.task.network.device
    return make_chain(config, settings.rollout_steps, tau=taus, data_std=settings.rollout_data_std, device=device)


def _rewards_of(
    learner: Learner, rewards: Sequence[Reward], batch: dict[str, Any], x: torch.Tensor, differentiable: bool = False
) -> torch.Tensor:
    """Of the pictures of states x (N, ...); (N,)."""
    labels = batch["class_labels"].tolist() if "class_labels" in batch else None
    if not bool(x.isfinite().all()):
        raise Spoiled("cannot be asked: the network's pictures are not finite, pass a smaller --learning_rate")
    return total(rewards, learner.pictures(x), batch.get("caption"), labels, differentiable)


def _of_policy(
    learner: Learner, rewards: Sequence[Reward], batch: dict[str, Any], number: int, shape: Sequence[int]
) -> Experience:
    settings = learner.settings
    chain = chain_of(learner, window_of(settings, number))
    predict, start = functools.partial(learner.predict(batch), learner.task.network), learner.start(batch)
    trajectory = roll_out(chain, predict, learner.seeds(batch), shape)
    with torch.no_grad():
        value = _rewards_of(learner, rewards, batch, trajectory.states[-1])
        starts = {k: chain.step(start, k, trajectory.states[k]) for k in trajectory.noisy}
    kl = torch.stack([trajectory.steps[k].kl(starts[k]) for k in starts]).sum(0)

    def parts(spread: Spread) -> Sequence[Part]:
        beta, clip, group = settings.kl_coefficient, settings.clip_range, settings.group_size
        of = {"beta": beta, "clip_range": clip, "spread": spread.usual}
        return policy_steps(chain, trajectory, starts, value, group, **of)

    return Experience(value, kl, parts)


def _of_adjoint(
    learner: Learner, rewards: Sequence[Reward], batch: dict[str, Any], number: int, shape: Sequence[int]
) -> Experience:
    settings = learner.settings
    chain, window = chain_of(learner, []), window_of(settings, number)
    predict = functools.partial(learner.predict(batch), learner.task.network)
    trajectory = roll_out(chain, predict, learner.seeds(batch), shape)
    x = trajectory.states[-1].detach().requires_grad_()
    value = _rewards_of(learner, rewards, batch, x, differentiable=True)
    (slope,) = torch.autograd.grad(value.sum(), x)
    steps = adjoint_steps(chain, trajectory, learner.start(batch), slope / settings.kl_coefficient)
    kl = torch.stack([trajectory.steps[step.k].kl(step.start) for step in steps]).sum(0)
    return Experience(value.detach(), kl, lambda spread: [step for step in steps if step.k in window])


@torch.no_grad()
def _of_noised(
    learner: Learner, rewards: Sequence[Reward], batch: dict[str, Any], number: int, shape: Sequence[int]
) -> Experience:
    settings, path, kind = learner.settings, learner.path, learner.task.prediction_type
    predict, start = functools.partial(learner.predict(batch), learner.task.network), learner.start(batch)
    tau = settings.rollout_tau or 0.0
    config = learner.task.scheduler.config
    x0 = draw_samples(config, settings.rollout_steps, tau, predict, learner.seeds(batch), shape)
    value = _rewards_of(learner, rewards, batch, x0)
    noised, divergences = [], []
    for part in range(settings.parts):
        own = [generator_of(settings.seed, int(p), _NOISED, part) for p in batch["positions"]]
        u = np.array([torch.rand((), generator=g, dtype=torch.float64).item() for g in own])
        eps = torch.stack([torch.randn(tuple(shape), generator=g) for g in own]).to(x0)
        times, density = times_of(settings, learner.task, np.clip(u, 1e-12, 1 - 1e-12))
        alpha, sigma = path.alpha_sigma(times)
        a, b = (at_times(v, x0) for v in prediction_targets(path, kind, alpha, sigma))
        x = at_times(alpha, x0) * x0 + at_times(sigma, x0) * eps
        weights = loss_weights(
            settings.loss_weighting, path, kind, alpha, sigma, snr_gamma=settings.snr_gamma, log_snr_density=density
        )
        of_each = at_times(weights, x0).flatten()
        noised.append((x, times, a * x0 + b * eps, predict(x, times), start(x, times), of_each))
        divergences.append(_divergence(learner, noised[-1][3] - noised[-1][4], alpha, sigma, density))
    away = centred(value, settings.group_size)

    def parts(spread: Spread) -> Sequence[Part]:
        greatest = max(spread.greatest, 1e-8)
        good, pull = 0.5 + 0.5 * away / greatest, settings.kl_coefficient / greatest
        return [NoisedSample(*of[:5], good, of[5], pull) for of in noised]

    return Experience(value, torch.stack(divergences).mean(0), parts)


def _divergence(
    learner: Learner, difference: torch.Tensor, alpha: np.ndarray, sigma: np.ndarray, density: np.ndarray
) -> torch.Tensor:
    """An estimate of ``KL = Int |D - D_start|^2 SNR dlog_snr`` (N,) from noised samples at drawn times: that of the
    trajectories at tau = 1 (Girsanov; Song et al. 2021, arXiv:2101.09258), and of the laws where D is exact."""
    scale = loss_weights(
        "likelihood", learner.path, learner.task.prediction_type, alpha, sigma, log_snr_density=density
    )
    return at_times(scale, difference).flatten() * sum_per_sample(difference.square())
