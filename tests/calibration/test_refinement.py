"""Refinement by rollouts: its Jacobian, its steps, its cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_helpers import taught
from hypothesis import given
from hypothesis import strategies as st

from diffusers_sde.calibration.fit import fit_tables, last_residuals, table_error
from diffusers_sde.calibration.job import refined_grids
from diffusers_sde.calibration.refine import TRIALS, directions, refine, refinement_cost, start_refinement
from diffusers_sde.calibration.rollout import Evaluator
from diffusers_sde.calibration.store import Store


@given(st.integers(1, 5), st.integers(0, 50))
def test_directions_are_orthonormal(k, seed):
    v = np.random.default_rng(seed).normal(size=(k, 40))
    gram = v @ v.T / 40
    d = directions(gram)
    assert np.allclose(d @ gram @ d.T, np.eye(len(d)), atol=1e-9) and len(d) == k
    assert len(directions(np.ones((3, 3)))) == 1  # parallel vectors have one direction


def test_derivatives_by_evaluation_times_stay_in_the_training_range():
    """The first row at the noisiest time is moved towards clean data, the last one at the cleanest away from it."""
    seen = []

    class Seen(Evaluator):
        def evaluate(self, batch, row, x):
            seen.append(row.time)
            return super().evaluate(batch, row, x)

    samples = taught(batches=1)
    ((table, _),) = fit_tables(samples, [[0, 8, 20]])
    path = samples.evaluator.path
    first, middle, last = table.rows
    table = replace(table, rows=(replace(first, time=path.noisiest), middle, replace(last, time=path.cleanest)))
    start_refinement(replace(samples, evaluator=Seen(path, "epsilon", 1.0)), Store(), table)
    assert path.cleanest <= min(seen) < 3 and 996 < max(seen) <= path.noisiest
    assert len(set(seen)) == 6


def test_refinement_never_raises_the_training_error_and_keeps_times_in_order():
    samples = taught()
    ((table, error),) = fit_tables(samples, [[0, 5, 10, 16]])
    errors, store = [], Store()
    refined, after = refine(samples, store, table, errors.append)
    assert np.isclose(errors[0], error, rtol=1e-4)
    assert np.isclose(after, table_error(samples, refined), rtol=1e-6)
    assert [*errors, after] == sorted([*errors, after], reverse=True) and after < 0.6 * error
    times = [row.time for row in refined.rows]
    assert times == sorted(times, reverse=True) and times[-1] >= 0 and times[0] <= 999
    assert not any(f"jacobian-{first}" in store for first in samples.firsts)


@pytest.mark.parametrize("integer", [False, True])
def test_refinement_costs_what_the_plan_says(integer):
    """Every parameter of every row by one rollout of the rows after it: nothing is dropped, all trials are used."""
    calls = []
    samples = taught(batches=1)
    evaluator = replace(samples.evaluator, integer_times=integer, tick=lambda: calls.append(1))
    samples = replace(samples, evaluator=evaluator)
    ((table, _),) = fit_tables(samples, [[0, 5, 10, 16]])
    calls.clear()
    refinement = start_refinement(samples, Store(), table)
    for _ in range(TRIALS):
        refinement.step()
    dropped = sum(1 + min(i + 1, 4) - len(d) for i, d in enumerate(refinement.directions[:-1]))
    assert len(calls) + 4 * dropped >= refinement_cost(4, times=not integer) + 4 >= len(calls)


@pytest.fixture(scope="module")
def started():
    """A refinement of a fitted table of four rows, not stepped yet, and its samples."""
    samples = taught(batches=1)
    ((table, _),) = fit_tables(samples, [[0, 5, 10, 16]])
    return start_refinement(samples, Store(), table), samples


def test_every_column_of_the_jacobian_is_a_derivative_of_the_rollout(started):
    """Column k = the central finite difference of the last states along parameter k, for all weights and times."""
    refinement, samples = started
    jacobian = refinement.jacobian(0)
    assert len(jacobian) == sum(map(len, refinement.directions)) + 4 >= 17  # weights, and a time for each row
    for k, column in enumerate(jacobian):
        h = np.zeros(len(jacobian))
        h[k] = 1e-3
        (there, up), (back, down) = refinement.moved(h), refinement.moved(-h)  # no time moves past the noisiest one
        change = last_residuals(samples, there)[0].double() - last_residuals(samples, back)[0]
        change /= up[k] - down[k]
        assert float((column - change).norm()) < 0.05 * float(change.norm()) + 1e-3, k


def test_a_step_is_that_of_gauss_newton_on_the_mean_error(started):
    """``J'WJ`` and ``J'Wr`` with weight ``1/(error of the sample)`` over the number of elements, none above five times
    the mean's."""
    refinement, _ = started
    normal, gradient = refinement.normal_equations()
    j, r = refinement.jacobian(0), refinement.residuals[0].double()
    expected, slope = torch.zeros(normal.shape, dtype=torch.float64), torch.zeros(len(gradient), dtype=torch.float64)
    for k in range(len(r)):
        error = max(float(r[k].square().mean().sqrt()), 0.2 * refinement.error)
        expected += j[:, k] @ j[:, k].T / error / r.shape[1]
        slope += j[:, k] @ r[k] / error / r.shape[1]
    torch.testing.assert_close(torch.from_numpy(normal), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.from_numpy(gradient), slope, rtol=1e-6, atol=1e-9)


def test_what_a_step_showed_is_in_the_jacobian():
    """Broyden's secant condition: J times the step taken is the change of the residuals; directions orthogonal to it
    (in the metric of the diagonal) are as they were."""
    samples = taught(batches=1)
    ((table, _),) = fit_tables(samples, [[0, 5, 10, 16]])
    refinement = start_refinement(samples, Store(), table)
    before, (normal, gradient) = refinement.jacobian(0), refinement.normal_equations()
    diagonal, old = np.diag(normal), refinement.residuals[0]
    trial, delta = refinement.moved(np.linalg.solve(normal + refinement.damping * np.diag(diagonal), -gradient))
    new = last_residuals(samples, trial)[0]
    refinement.step()
    learnt = refinement.jacobian(0)
    assert torch.allclose(torch.einsum("p,pbe->be", torch.from_numpy(delta), learnt), (new - old).double(), atol=1e-5)
    other = np.random.default_rng(0).standard_normal(len(delta))
    other -= delta * ((diagonal * delta) @ other) / ((diagonal * delta) @ delta)
    for j in (before, learnt):
        assert torch.allclose(
            torch.einsum("p,pbe->be", torch.from_numpy(other), j - before), torch.zeros(()).double(), atol=1e-5
        )


def test_a_budget_pays_for_one_grid_each_before_a_second_one():
    costs = {n: refinement_cost(n, times=True) for n in (4, 8, 10)}
    assert refined_grids(costs, 0) == {4: 0, 8: 0, 10: 0}
    assert refined_grids(costs, costs[4] + costs[8]) == {4: 1, 8: 1, 10: 0}
    assert refined_grids(costs, sum(costs.values()) + costs[4]) == {4: 2, 8: 1, 10: 1}
    assert refined_grids(costs, 10**6) == {4: 2, 8: 2, 10: 2}
