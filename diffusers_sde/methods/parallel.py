r"""Many steps of a run at once: its states as the fixed point of a map that needs one batched call of the network.

A run is ``x_{i+1} = step_i(x_i; E_i, E_{i-1}, ...)`` with evaluations ``E_i`` of the network at ``x_i``.  Given guesses
of the states of a window of rows, one *sweep* evaluates the network at all of them together and takes the rows again on
these evaluations, which is a map ``x -> G(x)``; the run is its fixed point (Picard iterations; ParaDiGMS, Shih et al.
2023, arXiv:2305.16317, algorithm 1).  The state after the first row of a window is exact after one sweep, because its
evaluation was made at an exact state, so that n rows take n calls at most, whatever the network.  The linear part of a
row is taken exactly and only the nonlinear part F (:mod:`diffusers_sde.weights`) is held fixed in a sweep: for
``N(0, data_std^2 I)`` data the first sweep arrives.  The noise of a stochastic row is a function of its seed and its
place (:mod:`diffusers_sde.noise`), so that a run of an SDE is such a fixed point too.

Two things save calls or evaluations.  Anderson acceleration mixes a sweep with those before it, each row with weights
that read no later row (ParaTAA, Tang et al. 2024, arXiv:2402.09970, section 3.2), which keeps the bound of n calls.  A
coarse solve guesses the states (as in SRDS, Selvam et al. 2024, arXiv:2412.08292): the same rows, with evaluations at a
few of them and the data prediction extrapolated to the others.

Knows rows as functions of state and evaluations; the one place where a row is executed is ``transitions.advance``.
Knows no scheduler, network or process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde.errors import check_whole, is_real
from diffusers_sde.methods.fields import wide_dtype
from diffusers_sde.methods.images import at_least_float32

# states (P, ...), the row and the sample of each -> what the network says there (P, ...)
EvaluateRows = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
_RIDGE = 1e-8  # of Anderson's least squares, relative


@dataclass(frozen=True)
class Cost:
    """What a run cost.

    Args:
        rounds: calls of the network, one after the other.
        evaluations: states that the network was evaluated at in all of them, for each sample (N,).
    """

    rounds: int
    evaluations: tuple[int, ...]


def check_parallel(
    window: int | None, tolerance: float | Sequence[float], acceleration: int, predictor_steps: int
) -> None:
    """Raise ``ValueError`` for arguments of :func:`sample_rows` that no run could use."""
    if window is not None:
        check_whole("window", window)
    check_whole("acceleration", acceleration, 0)
    check_whole("predictor_steps", predictor_steps)
    for value in tolerance if isinstance(tolerance, Sequence) else [tolerance]:
        if not (is_real(value) and value >= 0):
            raise ValueError(f"tolerance must be 0 (the sequential result) or more, not {value!r}.")


@torch.no_grad()
def sample_rows(
    evaluate: EvaluateRows,
    transitions: Any,
    x: torch.Tensor,
    *,
    window: int | None = None,
    tolerance: float | Sequence[float] = 0.0,
    acceleration: int = 1,
    predictor_steps: int = 1,
    data_std: float = 1.0,
    callback: Callable[[int], Any] = lambda rows: None,
) -> tuple[torch.Tensor, Cost]:
    """Run a table with its rows in parallel; the result is that of its rows one after the other.

    Every sample has a window of its own, which slides past each row whose evaluation was made within ``tolerance`` of
    the state that the run then takes.  With tolerance 0 the result is the sequential one, up to the rounding of a
    network that is called with other batches.

    Args:
        evaluate: the network at given states of the run; called once a round.
        transitions: the rows, from :meth:`diffusers_sde.TableScheduler.transitions` of the state ``x``.
        x: the state to start from (N, ...).
        window: rows of each sample in a call; None: all.
        tolerance: root mean square distance in units of data (a state's distance times ``data_std / sqrt(data_std^2
            alpha^2 + sigma^2)``, which the flow of ``N(0, data_std^2 I)`` data keeps); one, or one for each sample.
        acceleration: how many earlier sweeps Anderson acceleration mixes with the last; 0: none.
        predictor_steps: evaluations of the coarse solve, each a round.
        data_std: the data scale of that unit.
        callback: called after each round with how many rows have been finished since, by all samples.

    Returns:
        The state after the last row (N, ...), and what it cost.

    Raises:
        ValueError: for arguments that no run could use.
    """
    check_parallel(window, tolerance, acceleration, predictor_steps)
    tolerances = list(tolerance) if isinstance(tolerance, Sequence) else [tolerance] * len(x)
    if len(tolerances) != len(x):
        raise ValueError(f"{len(tolerances)} tolerances for {len(x)} samples: pass one, or one for each sample.")
    rows = len(transitions)
    run = _Run(evaluate, transitions, x, window or rows, data_std)
    run.predict(min(predictor_steps, rows))
    callback(run.finished)
    past: list[_Sweep] = []
    while run.finished < rows * len(x):
        finished = run.finished
        past = run.sweep(tolerances, past)[:acceleration]
        callback(run.finished - finished)
    return run.states[-1], Cost(run.rounds, tuple(run.evaluated))


@dataclass(frozen=True)
class _Sweep:
    """What one sweep did: the states ``after`` it (n + 1, N, ...), their ``residual`` in units of data (n + 1, N, D),
    in the widest type, and which states it renewed (n + 1, N)."""

    after: torch.Tensor
    residual: torch.Tensor
    renewed: torch.Tensor


class _Run:
    """States (n + 1, N, ...) and evaluations (n, N, ...) of a run: for each sample those before its ``start`` are
    final, those from there to its ``stop`` are guesses in its window, and those after it are none yet."""

    def __init__(self, evaluate: EvaluateRows, transitions: Any, x: torch.Tensor, window: int, data_std: float):
        self.rows, self.samples = len(transitions), range(len(x))
        self.states = x.new_empty((self.rows + 1, *x.shape))
        self.states[0] = x
        self.rounds, self.evaluated = 0, [0] * len(x)
        self._evaluate, self._transitions, self._window = evaluate, transitions, window
        self._evaluations = at_least_float32(x.new_empty((self.rows, *x.shape)))
        self._start, self._stop = [0] * len(x), [0] * len(x)
        self._guessed = False  # by a coarse solve, to the last row
        nodes = transitions.nodes
        scales = [data_std / math.hypot(data_std * a, s) for a, s in zip(nodes.alpha, nodes.sigma, strict=True)]
        self._scale = torch.tensor(scales, dtype=wide_dtype(x.device), device=x.device)

    @property
    def finished(self) -> int:
        """Rows that are final, of all samples."""
        return sum(self._start)

    def predict(self, steps: int) -> None:
        """Guess all states with ``steps`` evaluations of each sample, evenly spread over the rows, the first of them at
        the state that the run starts from."""
        asked = {self.rows * k // steps for k in range(steps)}
        log_snr = self._transitions.nodes.log_snr
        known: list[tuple[float, torch.Tensor]] = []  # where x_0 was predicted, latest first
        for i in range(self.rows):
            if i in asked:
                self._ask([i for _ in self.samples], [i + 1 for _ in self.samples])
                known = [(log_snr[i], self._data_prediction(i, self.samples)), *known[:1]]
            else:
                self._suppose(i, self.samples, _extrapolated(known, log_snr[i]))
            self._take(self.states, i, self.samples)
        self._start = [1 for _ in self.samples]
        self._stop = [min(1 + self._window, self.rows) for _ in self.samples]
        self._guessed = steps > 1

    def sweep(self, tolerances: Sequence[float], past: Sequence[_Sweep]) -> list[_Sweep]:
        """Evaluate the windows, take their rows again, and slide them past what has converged; ``past`` and the result
        are sweeps, latest first."""
        self._ask(self._start, self._stop)
        before, after = self.states, self.states.clone()
        for i, samples in self._spans(self._start, self._stop):
            self._take(after, i, samples)
        place = torch.arange(self.rows + 1, device=before.device)[:, None]
        renewed = (place > self._places(self._start)) & (place <= self._places(self._stop))
        residual = (after - before).flatten(2) * (self._scale[:, None] * renewed)[..., None]
        change = residual.square().mean(2).sqrt().tolist()
        latest = {k: self._data_prediction(self._stop[k] - 1, [k]) for k in self.samples if self._start[k] < self.rows}
        for k in latest:
            while self._start[k] + 1 < self._stop[k] and change[self._start[k] + 1][k] <= tolerances[k]:
                self._start[k] += 1
            self._start[k] += 1
        done = _Sweep(after, residual, renewed)
        self.states = torch.where(
            _like(place > self._places(self._start), after), _mixed(done, past), after
        )  # what is final is never mixed
        reached, self._stop = self._stop, [min(start + self._window, self.rows) for start in self._start]
        for i, samples in self._spans(reached, self._stop):
            if not self._guessed:
                self._suppose(i, samples, torch.cat([latest[k] for k in samples]))
            self._take(self.states, i, samples)
        return [done, *past]

    def _places(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor(rows, device=self.states.device)

    def _spans(self, first: Sequence[int], stop: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Each row with the samples for which it lies in ``first <= row < stop``."""
        for i in range(min(first), max(stop)):
            if samples := [k for k in self.samples if first[k] <= i < stop[k]]:
                yield i, samples

    def _ask(self, first: Sequence[int], stop: Sequence[int]) -> None:
        """Evaluate the network at all rows ``first <= row < stop`` in one call."""
        spans = list(self._spans(first, stop))
        rows, samples = [i for i, chosen in spans for _ in chosen], [k for _, chosen in spans for k in chosen]
        parts = self._evaluate(self.states[rows, samples], rows, samples).split([len(chosen) for _, chosen in spans])
        for (i, chosen), part in zip(spans, parts, strict=True):
            state = at_least_float32(self.states[i, chosen])
            self._evaluations[i, chosen] = self._transitions.evaluation(i, state, part)
        self.rounds += 1
        for k in samples:
            self.evaluated[k] += 1

    def _take(self, states: torch.Tensor, i: int, samples: Sequence[int]) -> None:
        """Row ``i`` of some samples, from ``states[i]`` to ``states[i + 1]``."""
        samples = list(samples)
        evaluations = [self._evaluations[i - age, samples] for age in range(self._transitions.reach(i))]
        taken = self._transitions.advance(i, at_least_float32(states[i, samples]), evaluations, samples)
        states[i + 1, samples] = taken.to(states.dtype)

    def _data_prediction(self, i: int, samples: Sequence[int]) -> torch.Tensor:
        state = at_least_float32(self.states[i, list(samples)])
        return self._transitions.data_prediction(i, state, self._evaluations[i, list(samples)])

    def _suppose(self, i: int, samples: Sequence[int], x0: torch.Tensor) -> None:
        """Let the network have said ``x0`` at row ``i``."""
        samples = list(samples)
        state = at_least_float32(self.states[i, samples])
        self._evaluations[i, samples] = self._transitions.supposed(i, state, x0)


def _extrapolated(known: Sequence[tuple[float, torch.Tensor]], log_snr: float) -> torch.Tensor:
    """The data prediction on the line through the two latest ones in log-SNR, or the latest where there is no line."""
    (at, x0), *older = known
    if not older or not all(map(math.isfinite, (older[0][0], at, log_snr))):
        return x0
    return torch.lerp(older[0][1], x0, (log_snr - older[0][0]) / (at - older[0][0]))


def _mixed(sweep: _Sweep, past: Sequence[_Sweep]) -> torch.Tensor:
    """Anderson acceleration, ``G - sum_j gamma_j (G - G_j)`` with the gamma of row i that minimise the residual
    ``|R - sum_j gamma_j (R - R_j)|`` summed over the rows up to i."""
    if not past:
        return sweep.after
    both = torch.stack([sweep.renewed & old.renewed for old in past])[..., None]
    residuals = torch.stack([sweep.residual - old.residual for old in past]) * both
    steps = torch.stack([(sweep.after - old.after).flatten(2).to(sweep.residual.dtype) for old in past]) * both
    gram = torch.einsum("aikd,bikd->ikab", residuals, residuals).cumsum(0)
    right = torch.einsum("aikd,ikd->ika", residuals, sweep.residual).cumsum(0)
    ridge = _RIDGE * gram.diagonal(dim1=2, dim2=3).sum(2) + torch.finfo(gram.dtype).tiny
    gamma = torch.linalg.solve(gram + ridge[..., None, None] * torch.eye(len(past)).to(gram), right)
    correction = torch.einsum("ika,aikd->ikd", gamma, steps)
    return (sweep.after - correction.reshape(sweep.after.shape)).to(sweep.after.dtype)


def _like(mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A mask (n + 1, N) that broadcasts over states (n + 1, N, ...)."""
    return mask.reshape(*mask.shape, *[1] * (states.ndim - 2))
