"""The numerics of a calibration against brute force: costs, dynamic program, teacher, fitted rows."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_helpers import SHAPE, VP, scheduler_of, taught
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.calibration.dynamic_program import best_grids, step_costs
from diffusers_sde.calibration.fit import (
    corrected,
    fit_tables,
    inner_products,
    linear,
    ridge_correction,
    subgrid,
    table_error,
)
from diffusers_sde.calibration.rollout import Evaluator
from diffusers_sde.calibration.sources import DenoiserSource
from diffusers_sde.calibration.store import Store
from diffusers_sde.calibration.teacher import Teacher
from diffusers_sde.defaults import standard_table
from diffusers_sde.sampling import network_denoiser
from diffusers_sde.tables import Row


def random_vectors(m, seed, rows=200):
    g = np.random.default_rng(seed)
    smooth = np.linspace(0, 1, 2 * m + 1)[:, None] ** np.arange(4) @ g.normal(size=(4, rows))
    return smooth + 0.1 * g.normal(size=(2 * m + 1, rows))


@given(st.integers(2, 6), st.integers(0, 50))
def test_step_costs_are_least_squares_errors(m, seed):
    """Schur complements of the Gram matrix = residuals of brute-force least squares, for every triple."""
    v = random_vectors(m, seed)
    states, evaluations = v[: m + 1], v[m + 1 :]
    first, later = step_costs(v @ v.T)

    def residual(target, *basis):
        b = np.stack(basis, 1)
        return np.sum((target - b @ np.linalg.lstsq(b, target, rcond=None)[0]) ** 2)

    for n in range(1, m + 1):
        assert np.isclose(first[n], residual(states[n], states[0], evaluations[0]), rtol=1e-6, atol=1e-9)
    for p, c, n in itertools.product(range(m), range(m), range(m + 1)):
        if p < c < n:
            expected = residual(states[n], states[c], evaluations[c], evaluations[p])
            assert np.isclose(later[p, c, n], expected, rtol=1e-6, atol=1e-9)
        else:
            assert np.isinf(later[p, c, n])


@given(st.integers(3, 7), st.integers(0, 50))
def test_dynamic_program_finds_the_best_of_all_grids(m, seed):
    """Bellman's recursion = the minimum over all grids of the sum of root mean square errors."""
    first, later = step_costs(np.cov(random_vectors(m, seed)))

    def cost(grid):
        path = [*grid, m]
        steps = [first[path[1]], *(later[triple] for triple in zip(path, path[1:], path[2:], strict=False))]
        return np.sqrt(steps).sum()

    for n, grid in best_grids(first, later, range(1, m + 1)).items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, m), n - 1)]
        assert len(grid) == n and grid[0] == 0
        assert np.isclose(cost(grid), min(map(cost, every)), rtol=1e-12)


@pytest.mark.parametrize("counts", [[1], [3], [6], [2, 5], [4, 1, 6]])
def test_every_number_that_is_asked_for_has_its_grid(counts):
    """And only those; each is that of all numbers at once."""
    costs = step_costs(np.cov(random_vectors(6, 1)))
    whole = best_grids(*costs, range(1, 7))
    assert best_grids(*costs, counts) == {n: whole[n] for n in counts}


@pytest.mark.parametrize("counts", [[], [0, 3], [3, 7], [7]])
def test_grids_that_the_nodes_cannot_give_are_refused(counts):
    with pytest.raises(ValueError, match="from 1 to 6 of the teacher's nodes"):
        best_grids(*step_costs(np.cov(random_vectors(6, 1))), counts)


def test_nearly_parallel_evaluations_explain_no_more_than_there_is():
    """Evaluations 1e-6 apart in angle: the cost of a step stays between 0 and the square of its target."""
    axes, angle = np.eye(4), 1e-6
    parallel = np.cos(angle) * axes[0] + np.sin(angle) * axes[1]
    states, evaluations = np.array([axes[3], axes[2], axes[1]]), np.array([axes[0], parallel])
    v = np.concatenate([states, evaluations])
    cost = step_costs(v @ v.T)[1][0, 1, 2]
    assert 0 <= cost <= 1


def test_inner_products_add_up_samples_and_average_elements():
    x, y = torch.arange(12.0).reshape(2, 2, 3), torch.ones(2, 2, 3)
    assert inner_products([x], [x, y]).tolist() == [[506 / 6, 66 / 6]]


def test_a_correction_adds_to_the_weights_that_it_knows():
    """delta on the state, then on the evaluations, newest first, whichever of the row and delta is longer."""
    row = Row(5.0, 0.6, 0.8, 0.5, (1.0, 2.0, 3.0), 0.25)
    assert corrected(row, np.array([0.5, 0.25])) == Row(5.0, 0.6, 0.8, 1.0, (1.25, 2.0, 3.0), 0.25)
    longer = corrected(row, np.array([0.0, 1.0, 0.0, 0.0, 4.0]))
    assert (longer.a, longer.b) == (0.5, (2.0, 2.0, 3.0, 4.0))


def test_ridge_correction_limits():
    """No data or an infinite ridge: no correction; a vanishing ridge: plain least squares; monotone between them."""
    g = np.random.default_rng(0)
    basis, r = g.normal(size=(50, 3)), g.normal(size=50)
    gram, cross = basis.T @ basis, basis.T @ r
    assert not ridge_correction(np.zeros((3, 3)), np.zeros(3)).any()
    assert not ridge_correction(gram, cross, np.inf).any()
    assert np.allclose(ridge_correction(gram, cross, 1e-14), np.linalg.lstsq(basis, r, rcond=None)[0])
    sizes = [np.linalg.norm(ridge_correction(gram, cross, ridge)) for ridge in (1e-6, 1e-2, 1.0, 1e2)]
    assert sizes == sorted(sizes, reverse=True)


def test_gram_matrix_streams_in_batches(tmp_path):
    """The Gram matrix of batches = that of one batch; it is float64 and the evaluations are not kept."""
    small, large = taught(batches=4, size=8, store=Store(tmp_path)), taught(batches=1, size=32)
    one, other = (s.teacher.gram(s.firsts) for s in (small, large))
    assert one.dtype == np.float64 and np.allclose(one, other, rtol=1e-6, atol=1e-9)
    kept = load_file(tmp_path / "teacher-0.safetensors")
    assert {name: len(v) for name, v in kept.items()} == {"states": 25, "gram": 49, "solution": 8, "first": 1}


def test_teacher_is_the_exact_solution():
    """For Gaussian data the teacher's states are those of the closed-form ODE: x_t = x_T std_t / std_T."""
    process, std = VP, 0.5
    model = GaussianMixtureModel([1.0], [[0.0] * 3], [std**2], process=process)
    evaluator = Evaluator(scheduler_of(process).path, "epsilon", 1.0)
    source = DenoiserSource(network_denoiser(model), SHAPE, 4, 0)
    teacher = Teacher(evaluator, source, Store(), 48)
    teacher.run([0], [])
    scale = np.hypot(std * teacher.nodes.alpha, teacher.nodes.sigma)
    with source.open(0) as batch:
        start = evaluator.start(batch)
    for i, s in enumerate(scale):
        assert torch.allclose(teacher.state(0, i), start * float(s / scale[0]), atol=2e-4)


def test_infinite_ridge_gives_the_exact_rows():
    samples = taught()
    grid = [0, 4, 9, 15]
    ((table, error),) = fit_tables(samples, [grid], ridge=np.inf)
    followed = standard_table(samples.evaluator.path, subgrid(samples.teacher.nodes, grid))
    exact = replace(followed, rows=tuple(map(linear, followed.rows)))
    for mine, row in zip(table.rows, exact.rows, strict=True):
        assert mine.a == row.a and np.allclose(mine.b[: len(row.b)], row.b, rtol=0, atol=0)
        assert not any(mine.b[len(row.b) :]) and (mine.time, mine.alpha, mine.sigma) == (row.time, row.alpha, row.sigma)
    assert np.isclose(error, table_error(samples, exact), rtol=1e-5)


def test_fitted_rows_lower_the_error_of_each_row():
    """On any grid the fitted table is nearer to the teacher than the exact one on the samples it was fitted to, and the
    error that the fit reports is that of a rollout."""
    samples = taught()
    grids = [[0, 4, 9, 15], [0, 8, 14, 20], [0, 2, 5, 18]]
    for (table, error), grid in zip(fit_tables(samples, grids), grids, strict=True):
        exact = standard_table(samples.evaluator.path, subgrid(samples.teacher.nodes, grid))
        assert error < table_error(samples, exact)
        assert np.isclose(error, table_error(samples, table), rtol=1e-4)
