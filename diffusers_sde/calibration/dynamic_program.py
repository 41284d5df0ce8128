"""Where to evaluate: the best grid for each number of steps, from one Gram matrix.

Knows the inner products of a teacher's states and evaluations, the least-squares error of every step that could be made
between its nodes, and dynamic programming.  Float64 on the host; knows nothing of networks, tensors or schedulers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Array = np.ndarray
_RELATIVE = 1e-12  # added to the diagonal of a scaled Gram matrix: nearly parallel evaluations stay solvable


def step_costs(gram: Array) -> tuple[Array, Array]:
    """Mean square error of the best linear step between any nodes of a teacher: Schur complements of the Gram matrix,

        K_nn - K_nB K_BB^-1 K_Bn,      inf unless p < c < n.

    Args:
        gram: (2M + 1, 2M + 1) inner products, averaged over elements, of the normalised states ``z_0 .. z_M`` (z_M the
            solution) followed by the evaluations ``F_0 .. F_{M-1}``.

    Returns:
        ``first`` (M + 1,), the error of ``z_n`` against ``span{z_0, F_0}``, and ``later`` (M, M, M + 1), with
        ``later[p, c, n]`` the error of ``z_n`` against ``span{z_c, F_c, F_p}``.
    """
    m = len(gram) // 2
    states, evaluations = np.arange(m + 1), m + 1 + np.arange(m)
    first = _residuals(gram, np.array([[0, evaluations[0]]]), states)[0]
    first[0] = np.inf
    later = np.full((m, m, m + 1), np.inf)
    p, c = np.triu_indices(m, 1)
    if len(p):
        cost = _residuals(gram, np.stack([states[c], evaluations[c], evaluations[p]], 1), states)
        later[p, c] = np.where(states > c[:, None], cost, np.inf)
    return first, later


def _residuals(gram: Array, bases: Array, targets: Array) -> Array:
    """(B, N): squared distance of each target vector from the span of each basis (B, k), all by index into the Gram."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    unit = gram / np.outer(scale, scale)
    inner = unit[bases[:, :, None], bases[:, None, :]] + _RELATIVE * np.eye(bases.shape[1])
    cross = unit[bases[:, :, None], targets[None, None, :]]
    explained = (cross * np.linalg.solve(inner, cross)).sum(1)
    return np.maximum(1 - explained, 0.0) * scale[targets] ** 2


def best_grids(first: Array, later: Array, counts: Iterable[int]) -> dict[int, list[int]]:
    """The grids whose steps have the smallest sum of root mean square errors (local errors add up along a trajectory).

    Bellman's recursion over (previous, current): ``V_{k+1}(c, n) = min_p V_k(p, c) + cost(p, c, n)``.

    Args:
        first, later: what :func:`step_costs` returns.
        counts: numbers of evaluations n.

    Returns:
        For each n the node indices ``0 = i_1 < ... < i_n``; the last step goes to the solution.

    Raises:
        ValueError: for an n below 1 or above the number of nodes.
    """
    ordered = sorted(set(counts))
    m = len(later)
    if not ordered or ordered[0] < 1 or ordered[-1] > m:
        raise ValueError(f"A grid has from 1 to {m} of the teacher's nodes, not {ordered}.")
    first, later = np.sqrt(first), np.sqrt(later)
    value = np.full((m, m), np.inf)
    value[0, 1:] = first[1:m]
    parents: list[Array] = []  # parents[k][c, n]: the best p
    out = {}
    for n in range(1, ordered[-1] + 1):
        if n > 2:
            total = value[:, :, None] + later[:, :, :m]
            parents.append(total.argmin(0))
            value = total.min(0)
        if n in ordered:
            grid = [0] if n == 1 else list(np.unravel_index(np.argmin(value + later[:, :, m]), value.shape))
            for parent in reversed(parents):
                grid.insert(0, parent[grid[0], grid[1]])
            out[n] = [int(i) for i in grid]
    return out
