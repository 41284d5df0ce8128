r"""One noising process of tokens for each stationary law: absorbing (masked) and uniform are its two members.

Knows the forward chain ``q(x_t|x_0) = alpha delta_{x_0} + (1 - alpha) pi`` of every position, independent of the
others, its bridges, and the reverse process: posterior, concrete score and reverse rates, all from the denoiser
``p(x_0^l | x_t)`` alone (Lu, arXiv:2607.01693, chapter 7; Campbell et al. 2022, arXiv:2205.14987; Lou et al. 2023,
arXiv:2310.16834).  Float64 tensors; states are integers below S, laws have S as their last dimension.  Knows no
schedule: everything is a function of survival probabilities alpha.  Knows no network and no sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_sde.discrete.categorical import sample_categorical


@dataclass(frozen=True)
class DiscreteProcess:
    r"""The chain that replaces a token by a draw of ``pi`` at some rate beta(t): generator
    ``beta (1 pi^T - I)``, survival ``alpha = exp(-\int beta)``.

    Args:
        stationary: pi (S,), float64.
    """

    stationary: torch.Tensor

    @property
    def states(self) -> int:
        """S, the number of states of a position."""
        return len(self.stationary)

    def likelihood(self, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """``q(x_t = x | x_0 = v)`` for every v, (..., S), of states x (...) at survival alpha."""
        pi = self.stationary.to(x.device)
        return alpha * _one_hot(x, self.states) + (1 - alpha) * pi[x][..., None]

    def marginal(self, clean: torch.Tensor, alpha: float) -> torch.Tensor:
        """The law (..., S) at survival alpha of a position whose clean law is ``clean`` (..., S)."""
        pi = self.stationary.to(clean.device)
        return alpha * clean + (1 - alpha) * clean.sum(-1, keepdim=True) * pi

    def noised(self, x0: torch.Tensor, alpha: float, generator: torch.Generator | None = None) -> torch.Tensor:
        """A draw of ``q(x_t | x_0)`` for tokens x0 (...)."""
        return sample_categorical(self.marginal(_one_hot(x0, self.states), alpha), generator)

    def bridge(self, x_t: torch.Tensor, x_0: torch.Tensor, alpha_t: float, alpha_s: float) -> torch.Tensor:
        """``q(x_s | x_t, x_0)`` (..., S) at an earlier time, ``alpha_s >= alpha_t``."""
        return self.posterior(x_t, _one_hot(x_0, self.states), alpha_t, alpha_s)

    def posterior(self, x_t: torch.Tensor, clean: torch.Tensor, alpha_t: float, alpha_s: float) -> torch.Tensor:
        r"""``p(x_s^l | x_t) = sum_v q(x_s^l | x_t^l, v) p(x_0^l = v | x_t)``, the step of ancestral sampling.

        With ``a = alpha_t/alpha_s`` and ``r_s = E[q_s(.|x_0)/q_t(x_t|x_0)]`` it is ``(a delta_{x_t} + (1 - a)
        pi(x_t)) r_s``.

        Args:
            x_t: states (...).
            clean: ``p(x_0^l | x_t)`` (..., S).
            alpha_t, alpha_s: survival probabilities, ``alpha_s >= alpha_t``.

        Returns:
            (..., S).
        """
        kept, here = alpha_t / alpha_s if alpha_s else 1.0, _one_hot(x_t, self.states)
        back = kept * here + (1 - kept) * self.stationary.to(x_t.device)[x_t][..., None]
        law = back * self.marginal(self._weights(x_t, clean, alpha_t), alpha_s)
        law = torch.where(self.made(x_t)[..., None], law, here)  # a token among masks stays, however few there can be
        return law / law.sum(-1, keepdim=True)

    def made(self, x: torch.Tensor) -> torch.Tensor:
        """Which states (...) noise can make; under masking the masks."""
        return self.stationary.to(x.device)[x] > 0

    def ratios(self, x: torch.Tensor, clean: torch.Tensor, alpha: float) -> torch.Tensor:
        """The concrete score (..., S): ``p_t(x with x^l = y)/p_t(x) = E[q_t(y|x_0^l)/q_t(x^l|x_0^l) | x]`` for every y.

        Args:
            x: states (...).
            clean: ``p(x_0^l | x)`` (..., S).
            alpha: survival probability at x.
        """
        return self.marginal(self._weights(x, clean, alpha), alpha)

    def reverse_rates(self, x: torch.Tensor, clean: torch.Tensor, alpha: float, rate: float = 1.0) -> torch.Tensor:
        """Rates (..., S) of the reverse chain from x to each other state of a position: ``beta pi(x^l)`` times the
        concrete score, 0 to the state itself.

        Args:
            x, clean, alpha: as in :meth:`ratios`.
            rate: beta, the forward rate in the caller's clock.
        """
        to = rate * self.stationary.to(x.device)[x][..., None] * self.ratios(x, clean, alpha)
        return to * (1 - _one_hot(x, self.states))

    def _weights(self, x: torch.Tensor, clean: torch.Tensor, alpha: float) -> torch.Tensor:
        """``p(x_0^l = v | x)/q(x^l | v)``.  A state that noise never makes is clean, whatever a network says."""
        clean = torch.where(self.made(x)[..., None] & bool(alpha < 1), clean.double(), _one_hot(x, self.states))
        return torch.where(clean > 0, clean / self.likelihood(x, alpha).clamp(min=1e-300), torch.zeros_like(clean))


def absorbing(states: int, mask: int) -> DiscreteProcess:
    """Masked diffusion: every token ends as ``mask``, one of the ``states``."""
    return DiscreteProcess(_one_hot(torch.tensor(mask), states))


def uniform(states: int) -> DiscreteProcess:
    """Uniform noise on all ``states``."""
    return DiscreteProcess(torch.full((states,), 1 / states, dtype=torch.float64))


def _one_hot(x: torch.Tensor, states: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(x, states).double()
