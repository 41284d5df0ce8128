"""Exact oracles: laws of token sequences whose every conditional is known, also given noisy tokens.

Knows a table of joint probabilities, and a Markov chain, where the forward-backward recursion does what the table does
by enumeration (Lu, arXiv:2607.01693, chapter 7, on what a network has to learn).  They are to text what the Gaussian
mixture is to pictures.  Float64 tensors; evidence is the likelihood of what is seen of each position, from
:meth:`.processes.DiscreteProcess.likelihood`.  Knows no network and no sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from diffusers_sde.discrete.categorical import sample_categorical


class JointTable:
    """``p(x_0)`` of sequences of length L over V tokens, as a table.

    Args:
        probabilities: (V, ..., V) with L dimensions, non-negative; normalised.

    Raises:
        ValueError: for a table that is none.
    """

    def __init__(self, probabilities: Any):
        table = torch.as_tensor(probabilities, dtype=torch.float64)
        if table.ndim == 0 or len(set(table.shape)) > 1 or not bool((table >= 0).all()) or not float(table.sum()) > 0:
            raise ValueError("probabilities must be non-negative, (V, ..., V) with one dimension a position.")
        self.probabilities, self.vocabulary, self.length = table / table.sum(), table.shape[0], table.ndim

    @property
    def sequences(self) -> torch.Tensor:
        """Every sequence, (V^L, L), in the order of the flat table."""
        return torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))

    def posterior(self, evidence: torch.Tensor) -> torch.Tensor:
        """``p(x_0^l | evidence)`` (N, L, V), for likelihoods of each position (N, L, V)."""
        positions = torch.arange(self.length)
        joint = self.probabilities.flatten() * evidence.double()[:, positions, self.sequences].prod(-1)
        tables = joint.unflatten(1, self.probabilities.shape)
        axes = [[d for d in range(1, self.length + 1) if d != axis + 1] for axis in range(self.length)]
        marginals = [tables.sum(others) if others else tables for others in axes]
        return _normalised(torch.stack(marginals, 1))

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """``log p(x)`` (N,) of sequences (N, L)."""
        return self.probabilities[tuple(x.T)].log()

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """n exact samples, (n, L)."""
        flat = self.probabilities.flatten()
        return self.sequences[sample_categorical(flat.expand(n, -1), generator)]

    def table(self) -> JointTable:
        """Itself."""
        return self

    def tilted(self, reward: Callable[[torch.Tensor], torch.Tensor], beta: float = 1.0) -> JointTable:
        """The law proportional to ``p(x) exp(beta r(x))``, for ``reward`` from (M, L) to (M,)."""
        weights = (beta * reward(self.sequences).double()).softmax(0)
        return JointTable((self.probabilities.flatten() * weights).reshape(self.probabilities.shape))

    def noised(self, kernel: torch.Tensor) -> JointTable:
        """The law of the noisy sequence if each position goes through ``kernel`` (V, S): ``p_t`` over S^L."""
        table = self.probabilities
        for _ in range(self.length):  # the first position becomes the last, L times
            table = torch.tensordot(table, kernel, dims=([0], [0]))
        return JointTable(table)


class MarkovChain:
    """``p(x_0) = p_1(x^1) prod_l P(x^l, x^{l+1})``.

    Args:
        initial: (V,), positive somewhere; normalised.
        transition: P (V, V), rows normalised.
        length: L.

    Raises:
        ValueError: for shapes that do not fit and negative numbers.
    """

    def __init__(self, initial: Any, transition: Any, length: int):
        start, step = (torch.as_tensor(v, dtype=torch.float64) for v in (initial, transition))
        if start.ndim != 1 or step.shape != (len(start), len(start)) or bool((start < 0).any() | (step < 0).any()):
            raise ValueError("initial must be (V,) and transition (V, V), both non-negative.")
        self.initial, self.transition = start / start.sum(), step / step.sum(-1, keepdim=True)
        self.vocabulary, self.length = len(start), length

    def posterior(self, evidence: torch.Tensor) -> torch.Tensor:
        """``p(x_0^l | evidence)`` (N, L, V) by the forward-backward recursion, for likelihoods of each position
        (N, L, V); of a shorter sequence, the beginning of the chain."""
        evidence = evidence.double()
        forward = [_normalised(self.initial * evidence[:, 0])]
        for l in range(1, evidence.shape[1]):  # noqa: E741
            forward.append(_normalised(forward[-1] @ self.transition * evidence[:, l]))
        backward = [torch.ones_like(forward[0])]
        for l in range(evidence.shape[1] - 1, 0, -1):  # noqa: E741
            backward.insert(0, _normalised((evidence[:, l] * backward[0]) @ self.transition.T))
        return _normalised(torch.stack(forward, 1) * torch.stack(backward, 1))

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """``log p(x)`` (N,) of sequences (N, L)."""
        return self.initial[x[:, 0]].log() + self.transition[x[:, :-1], x[:, 1:]].log().sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """n exact samples, (n, L)."""
        x = [sample_categorical(self.initial.expand(n, -1), generator)]
        while len(x) < self.length:
            x.append(sample_categorical(self.transition[x[-1]], generator))
        return torch.stack(x, 1)

    def table(self) -> JointTable:
        """The same law as a table; V^L numbers."""
        table = self.initial
        for _ in range(self.length - 1):
            table = table[..., None] * self.transition
        return JointTable(table)


def _normalised(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum(-1, keepdim=True)
