"""Calibration: its numerics against brute force, and that a learned table cannot hurt."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_helpers import randn
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from helpers import LINEAR, SD, mixture
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import PIPELINES

import diffusers_sde
from diffusers_sde import CalibratedScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler, calibrate
from diffusers_sde.benchmarks.common import oracle
from diffusers_sde.calibration.dynamic_program import best_grids, step_costs
from diffusers_sde.calibration.fit import Samples, fit_tables, last_residuals, mean_error, ridge_correction, subgrid
from diffusers_sde.calibration.plan import starts
from diffusers_sde.calibration.refine import TRIALS, Refiner, directions, refine, refinement_cost
from diffusers_sde.calibration.rollout import Process
from diffusers_sde.calibration.sources import HELD_OUT, DenoiserSource
from diffusers_sde.calibration.stochastic import energy_distance
from diffusers_sde.calibration.teacher import Store, Teacher
from diffusers_sde.cli import main
from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers.calibrated import entry_nodes, entry_table, process_of, standard_table

SHAPE = (1, 1, 3)
VP = {**LINEAR, "prediction_type": "epsilon"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": 3.0}
EDM = {"sigma_data": 0.5, "prediction_type": "epsilon"}
QUIET = {"progress": False, "sample_shape": SHAPE}


def scheduler_of(process):
    return ProbabilityFlowScheduler(**process)


def denoiser_of(process, **guidance):
    return network_denoiser(mixture(**process), **guidance)


def calibrated(process=VP, steps=(4, 5), num_samples=32, **options):
    return calibrate(
        denoiser_of(process),
        scheduler=scheduler_of(process),
        num_inference_steps=steps,
        num_samples=num_samples,
        **{**QUIET, **options},
    )


@pytest.fixture(scope="module")
def learned():
    return calibrated(steps=(4, 6), num_samples=64)


def taught(process=VP, batches=2, size=16, nodes=24, count=None):
    """Training samples of the mixture with their teacher."""
    p = Process(scheduler_of(process).path, process["prediction_type"], 1.0)
    source = DenoiserSource(denoiser_of(process), SHAPE, size, 0)
    teacher = Teacher(p, source, Store(), nodes)
    samples = Samples(p, source, range(0, batches * size, size), teacher)
    teacher.run(samples.firsts, [HELD_OUT])
    return samples


def final(scheduler, n, noise, denoiser):
    scheduler.set_timesteps(n)
    return sample(denoiser, scheduler, noise)


# -- the numerics --


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


@given(st.integers(1, 5), st.integers(0, 50))
def test_directions_are_orthonormal(k, seed):
    v = np.random.default_rng(seed).normal(size=(k, 40))
    gram = v @ v.T / 40
    d = directions(gram)
    assert np.allclose(d @ gram @ d.T, np.eye(len(d)), atol=1e-9) and len(d) == k
    assert len(directions(np.ones((3, 3)))) == 1  # parallel vectors have one direction


def test_gram_matrix_streams_in_batches():
    """The Gram matrix of batches = that of one batch; it is float64 and the evaluations are not kept."""
    small, large = taught(batches=4, size=8), taught(batches=1, size=32)
    one, other = (s.teacher.gram(s.firsts) for s in (small, large))
    assert one.dtype == np.float64 and np.allclose(one, other, rtol=1e-6, atol=1e-9)
    assert set(small.teacher._store._memory["teacher-0"]) == {"states", "gram", "solution", "first"}


def test_teacher_is_the_exact_solution():
    """For Gaussian data the teacher's states are those of the closed-form ODE: x_t = x_T std_t / std_T."""
    process, std = VP, 0.5
    model = GaussianMixtureModel([1.0], [[0.0] * 3], [std**2], process=process)
    p = Process(scheduler_of(process).path, "epsilon", 1.0)
    source = DenoiserSource(network_denoiser(model), SHAPE, 4, 0)
    teacher = Teacher(p, source, Store(), 48)
    teacher.run([0], [])
    scale = np.hypot(std * teacher.nodes.alpha, teacher.nodes.sigma)
    with source.open(0) as batch:
        start = p.start(batch)
    for i, s in enumerate(scale):
        assert torch.allclose(teacher.state(0, i), start * float(s / scale[0]), atol=2e-4)


# -- rows and refinement --


def test_infinite_ridge_gives_the_exact_rows():
    samples = taught()
    grid = [0, 4, 9, 15]
    ((table, error),) = fit_tables(samples, [grid], ridge=np.inf)
    exact = standard_table(samples.process.path, subgrid(samples.teacher.nodes, grid))
    for mine, row in zip(table.rows, exact.rows, strict=True):
        assert mine.a == row.a and np.allclose(mine.b[: len(row.b)], row.b, rtol=0, atol=0)
        assert not any(mine.b[len(row.b) :]) and (mine.time, mine.alpha, mine.sigma) == (row.time, row.alpha, row.sigma)
    assert np.isclose(error, mean_error(samples, exact), rtol=1e-5)


def test_fitted_rows_lower_the_error_of_each_row():
    """On any grid the fitted table is nearer to the teacher than the exact one on the samples it was fitted to, and the
    error that the fit reports is that of a rollout."""
    samples = taught()
    grids = [[0, 4, 9, 15], [0, 8, 14, 20], [0, 2, 5, 18]]
    for (table, error), grid in zip(fit_tables(samples, grids), grids, strict=True):
        exact = standard_table(samples.process.path, subgrid(samples.teacher.nodes, grid))
        assert error < mean_error(samples, exact)
        assert np.isclose(error, mean_error(samples, table), rtol=1e-4)


def test_refinement_never_raises_the_training_error_and_keeps_times_in_order():
    samples = taught()
    ((table, error),) = fit_tables(samples, [[0, 5, 10, 16]])
    errors, store = [], Store()
    refined, after = refine(samples, store, table, errors.append)
    assert np.isclose(errors[0], error, rtol=1e-4)
    assert np.isclose(after, mean_error(samples, refined), rtol=1e-6)
    assert [*errors, after] == sorted([*errors, after], reverse=True) and after < 0.6 * error
    times = [row.time for row in refined.rows]
    assert times == sorted(times, reverse=True) and times[-1] >= 0 and times[0] <= 999
    assert not any(f"jacobian-{first}" in store for first in samples.firsts)


@pytest.mark.parametrize("integer", [False, True])
def test_refinement_costs_what_the_plan_says(integer):
    """Every parameter of every row by one rollout of the rows after it: nothing is dropped, all trials are used."""
    calls = []
    samples = taught(batches=1)
    process = replace(samples.process, integer_times=integer, tick=lambda: calls.append(1))
    samples = replace(samples, process=process)
    ((table, _),) = fit_tables(samples, [[0, 5, 10, 16]])
    calls.clear()
    refiner = Refiner(samples, Store(), table)
    for _ in range(TRIALS):
        refiner.step()
    dropped = sum(1 + min(i + 1, 4) - len(d) for i, d in enumerate(refiner._directions[:-1]))
    assert len(calls) + 4 * dropped >= refinement_cost(4, times=not integer) + 4 >= len(calls)


def test_jacobian_is_that_of_the_rollout():
    """The Gauss-Newton gradient = a finite difference of the weighted squared error along the same step."""
    samples = taught(batches=1)
    ((table, _),) = fit_tables(samples, [[0, 5, 10, 16]])
    refiner = Refiner(samples, Store(), table)
    _, gradient = refiner._normal_equations()
    r = refiner._residuals[0].double()
    weights = 1 / r.square().mean(1).sqrt().clamp(min=0.2 * refiner.error) / r.shape[1]
    for k in (0, 3, len(gradient) - 1):
        h = np.zeros(len(gradient))
        h[k] = 2e-3
        there, back = (last_residuals(samples, refiner._moved(sign * h)[0])[0].double() for sign in (1, -1))
        change = (there - back) / (2 * h[k])
        assert np.isclose((weights[:, None] * r * change).sum(), gradient[k], rtol=0.1, atol=2e-3)


def test_what_a_step_showed_is_in_the_jacobian():
    """Broyden's secant condition: J times the step taken is the change of the residuals; directions orthogonal to it
    (in the metric of the diagonal) are as they were."""
    samples = taught(batches=1)
    ((table, _),) = fit_tables(samples, [[0, 5, 10, 16]])
    refiner = Refiner(samples, Store(), table)
    before, (normal, gradient) = refiner._jacobian(0), refiner._normal_equations()
    diagonal, old = np.diag(normal), refiner._residuals[0]
    trial, delta = refiner._moved(np.linalg.solve(normal + refiner.damping * np.diag(diagonal), -gradient))
    new = last_residuals(samples, trial)[0]
    refiner.step()
    learnt = refiner._jacobian(0)
    assert torch.allclose(torch.einsum("p,pbe->be", torch.from_numpy(delta), learnt), (new - old).double(), atol=1e-5)
    other = np.random.default_rng(0).standard_normal(len(delta))
    other -= delta * ((diagonal * delta) @ other) / ((diagonal * delta) @ delta)
    for j in (before, learnt):
        assert torch.allclose(
            torch.einsum("p,pbe->be", torch.from_numpy(other), j - before), torch.zeros(()).double(), atol=1e-5
        )


def test_a_budget_pays_for_one_grid_each_before_a_second_one():
    costs = {n: refinement_cost(n) for n in (4, 8, 10)}
    assert starts(costs, 0) == {4: 0, 8: 0, 10: 0}
    assert starts(costs, costs[4] + costs[8]) == {4: 1, 8: 1, 10: 0}
    assert starts(costs, sum(costs.values()) + costs[4]) == {4: 2, 8: 1, 10: 1}
    assert starts(costs, 10**6) == {4: 2, 8: 2, 10: 2}


# -- calibrate: what it promises --


@pytest.mark.parametrize(
    "process", [VP, {**SD, "prediction_type": "v_prediction"}, FLOW, EDM], ids=["vp", "v", "flow", "edm"]
)
def test_no_number_of_steps_loses_on_fresh_noise(process):
    """On noise that neither fit nor test has seen, calibrated <= exact at every number of steps, mostly far below."""
    steps = (3, 5, 8)
    scheduler, denoiser = calibrated(process, steps), denoiser_of(process)
    noise, exact = randn(200, *SHAPE, seed=99), scheduler_of(process)
    reference = final(scheduler_of(process), 200, noise, denoiser)

    def error(s, n):
        return (final(s, n, noise, denoiser) - reference).flatten(1).square().mean(1).sqrt().mean().item()

    ratios = [error(scheduler, n) / error(exact, n) for n in steps]
    assert max(ratios) <= 1.0 and np.exp(np.mean(np.log(ratios))) < 0.5, ratios
    for n in steps:
        e = scheduler.errors[n]
        assert e["held_out"] <= e["exact"] and e["training"] > 0
        assert e["stock"] is None or e["held_out"] < e["stock"]


def test_a_guided_oracle_behaves():
    """Guidance 7.5 between mixture components: no number of steps loses on held-out noise."""
    labels = torch.arange(32) % 3
    model = mixture(**VP)
    model.register_to_config(num_class_embeds=4)
    scheduler = calibrate(
        network_denoiser(model, labels, 7.5),
        scheduler=scheduler_of(VP),
        num_inference_steps=[4, 8],
        num_samples=32,
        **QUIET,
    )
    for e in scheduler.errors.values():
        assert e["held_out"] <= e["exact"]


def test_more_steps_than_asked_for_and_grids_of_the_user_are_exact(learned):
    """An uncalibrated number of steps: the exact solver on the interpolated grid, and a warning; likewise timesteps."""
    exact = ProbabilityFlowScheduler(**VP)
    with pytest.warns(UserWarning, match="5 steps were not calibrated"):
        learned.set_timesteps(5)
    times = learned.timesteps.tolist()
    assert times[0] == 999 and times == sorted(times, reverse=True)
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    mine = sample(denoiser, learned, noise)
    exact.set_timesteps(timesteps=times)
    assert torch.allclose(mine, sample(denoiser, exact, noise), atol=1e-5)
    with pytest.warns(UserWarning, match="was not calibrated"):
        learned.set_timesteps(timesteps=times)
    assert torch.allclose(mine, sample(denoiser, learned, noise), atol=1e-5)
    with pytest.warns(UserWarning):
        learned.set_timesteps(40)  # finer: converges to the same solution
    fine = sample(denoiser, learned, noise)
    assert (fine - final(exact, 100, noise, denoiser)).abs().max() < 0.02


def test_saved_scheduler_makes_equal_bits(learned, tmp_path):
    """save_pretrained, from_pretrained, from_config and deepcopy: the same samples to the last bit; a few kB."""
    learned.save_pretrained(tmp_path)
    loaded = CalibratedScheduler.from_pretrained(tmp_path)
    again = CalibratedScheduler.from_config(learned.config)
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    for n in (4, 6):
        wanted = final(learned, n, noise, denoiser)
        assert torch.equal(wanted, final(loaded, n, noise, denoiser))
        assert torch.equal(wanted, final(again, n, noise, denoiser))
    assert (tmp_path / "scheduler_config.json").stat().st_size < 16_000
    assert loaded.errors == learned.errors
    json.loads((tmp_path / "scheduler_config.json").read_text(), parse_constant=pytest.fail)


def test_pipeline_saves_and_loads_it(learned, tmp_path):
    pipe = DDPMPipeline(mixture(**VP), learned)
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is CalibratedScheduler
    images = [
        p(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipe, loaded)
    ]
    assert np.array_equal(*images)


def test_a_run_from_inside_the_grid_has_exact_rows(learned):
    """Image-to-image: no history, so the rest of the grid runs with exact rows; starting at 0 restores the table."""
    learned.set_timesteps(6)
    learned.set_begin_index(3)
    nodes = entry_nodes(learned.config.calibration["tables"]["6"])
    x, denoiser = randn(4, *SHAPE), denoiser_of(VP)
    for t in learned.timesteps[3:]:
        x = learned.step(denoiser(x, t), t, x, return_dict=False)[0]
    compiled = learned._run.compiled
    exact = standard_table(learned.path, nodes[3:])
    assert [row.a for row in compiled.rows] == [row.a for row in exact.rows] and bool(x.isfinite().all())
    learned.set_timesteps(6)
    final(learned, 6, randn(2, *SHAPE), denoiser)
    table = entry_table(learned.config.calibration["tables"]["6"], 1.0)
    assert [row.a for row in learned._run.compiled.rows] == [row.a for row in table.rows]


def test_pipelines_that_pass_their_habitual_sigmas_get_the_learned_grid():
    scheduler = calibrated(FLOW, steps=4, num_samples=16, budget=0)
    learned = entry_nodes(scheduler.config.calibration["tables"]["4"]).time[:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert np.allclose(scheduler.timesteps, learned)
    with pytest.warns(UserWarning, match="not calibrated"):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3, 0.2])


# -- what is refused --


def test_another_process_is_refused(learned):
    for change in ({"beta_end": 0.03}, {"prediction_type": "v_prediction"}, {"beta_schedule": "scaled_linear"}):
        with pytest.raises(ValueError, match="another process"):
            CalibratedScheduler.from_config({**learned.config, **change})
        with pytest.raises(ValueError, match=next(iter(change))):
            learned.check_process(DDIMScheduler(**{**VP, **change}).config)
    learned.check_process(DDPMScheduler(**VP).config)
    flow = calibrated(FLOW, steps=4, num_samples=16, budget=0)
    flow.check_process(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    with pytest.raises(ValueError, match=r"shift is 1\.0, was 3\.0"):
        flow.check_process(FlowMatchEulerDiscreteScheduler(shift=1.0).config)


def test_a_changed_config_is_refused_before_the_run(learned):
    mine = CalibratedScheduler.from_config(learned.config)
    mine.register_to_config(beta_end=0.03)
    with pytest.raises(ValueError, match="another process"):
        mine.set_timesteps(4)


def test_a_table_that_lost_cannot_be_made_or_saved(learned):
    """Held-out error above the exact solver's: no scheduler can hold such a table."""
    bad = json.loads(json.dumps(learned.config.calibration))
    bad["tables"]["4"]["errors"]["held_out"] = 2 * bad["tables"]["4"]["errors"]["exact"]
    with pytest.raises(ValueError, match="worse than the exact solver"):
        CalibratedScheduler(**VP, calibration=bad)
    with pytest.raises(ValueError, match="needs a calibration"):
        CalibratedScheduler(**VP)


def test_a_losing_number_of_steps_keeps_the_exact_solver(monkeypatch):
    """A fit spoiled on purpose loses on held-out noise: alone it is refused, among others it is the exact solver's."""
    from diffusers_sde.calibration import choose

    def spoiled(samples, grids):
        tables = fit_tables(samples, grids)
        if len(grids[0]) != 4:
            return tables
        return [(replace(t, rows=(*t.rows[:-1], replace(t.rows[-1], a=3.0))), e) for t, e in tables]

    monkeypatch.setattr(choose, "fit_tables", spoiled)
    with pytest.raises(ValueError, match="better than the exact solver"):
        calibrated(steps=4, budget=0)
    scheduler = calibrated(steps=(4, 5), budget=0)
    e = scheduler.errors[4]
    assert e["lost"] > e["exact"] == e["held_out"]
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    assert torch.equal(final(scheduler, 4, noise, denoiser), final(scheduler_of(VP), 4, noise, denoiser))


def test_thresholding_random_models_and_wrong_arguments_are_refused(tmp_path):
    process, denoiser = scheduler_of(VP), denoiser_of(VP)
    with pytest.raises(ValueError, match="thresholding=False"):
        calibrate(denoiser, scheduler=ProbabilityFlowScheduler(**VP, thresholding=True), **QUIET)
    with pytest.raises(ValueError, match="noise of its own"):
        calibrate(lambda x, t: denoiser(x, t) + 0.1 * torch.randn_like(x), scheduler=process, **QUIET)
    with pytest.raises(ValueError, match="scheduler= and sample_shape="):
        calibrate(denoiser)
    with pytest.raises(ValueError, match="prompt"):
        calibrate(denoiser, scheduler=process, prompt="a cat", **QUIET)
    with pytest.raises(ValueError, match="num_inference_steps"):
        calibrate(denoiser, num_inference_steps=[0], scheduler=process, **QUIET)
    with pytest.warns(UserWarning, match="clip_sample is switched off"):
        calibrate(denoiser, num_inference_steps=[4], num_samples=8, scheduler=DDPMScheduler(**VP), budget=0, **QUIET)


# -- interrupted, resumed, shared out --


def test_an_interrupted_run_resumes(tmp_path):
    """Killed in the middle, called again: the same scheduler, without solving the teacher again; another seed or
    another network is refused."""
    denoiser, calls = denoiser_of(VP), [0]

    def dying(limit):
        def call(x, t):
            calls[0] += 1
            if calls[0] > limit:
                raise KeyboardInterrupt
            return denoiser(x, t)

        calls[0] = 0
        return call

    options = {
        "scheduler": scheduler_of(VP),
        "num_inference_steps": [4, 5],
        "num_samples": 32,
        "batch_size": 8,
        **QUIET,
    }
    whole = calibrate(denoiser, **options)
    with pytest.raises(KeyboardInterrupt):
        calibrate(dying(900), work_dir=tmp_path, **options)
    kept = sorted(p.name for p in tmp_path.glob("teacher-*"))
    assert len(kept) == 6 and not list(tmp_path.glob("*.part"))
    resumed = calibrate(dying(10**9), work_dir=tmp_path, **options)
    assert resumed.config.calibration == whole.config.calibration
    first = calls[0]
    assert calibrate(dying(10**9), work_dir=tmp_path, **options).errors == whole.errors
    assert calls[0] < 20 < first
    with pytest.raises(ValueError, match="another work_dir"):
        calibrate(denoiser, work_dir=tmp_path, seed=1, **options)
    with pytest.raises(ValueError, match="another network"):
        calibrate(lambda x, t: 0.5 * denoiser(x, t), work_dir=tmp_path, **options)


SHARED_RUN = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from helpers import mixture
from diffusers_sde import ProbabilityFlowScheduler, calibrate
from diffusers_sde.sampling import network_denoiser
from accelerate import PartialState
torch.set_num_threads(1)
state = PartialState(cpu=True)
s = calibrate(network_denoiser(mixture()), scheduler=ProbabilityFlowScheduler(), sample_shape=(1, 1, 3),
              num_inference_steps=[4], num_samples=16, batch_size=4, progress=False)
with open({out!r} + str(state.process_index) + "-of-" + str(state.num_processes), "w") as file:
    json.dump(s.config.calibration, file)
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """Accelerate with two gloo processes: both end with one result, that of a single process up to the
    rounding of sums."""
    script = tmp_path / "run.py"
    script.write_text(SHARED_RUN.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path / "out")))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    left, right = (json.loads((tmp_path / f"out{k}-of-2").read_text()) for k in (0, 1))
    one = calibrate(
        denoiser_of(VP), [4], 16, scheduler=ProbabilityFlowScheduler(), batch_size=4, **QUIET
    ).config.calibration
    assert left == right
    mine, shared = (v["tables"]["4"] for v in (one, left))
    assert np.allclose(mine["time"], shared["time"], rtol=1e-2)
    assert np.isclose(mine["errors"]["held_out"], shared["errors"]["held_out"], rtol=0.05)


# -- stochastic --


def test_energy_distance():
    """Zero in the mean for equal laws, the closed form for shifted Gaussians in one dimension."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1500, 1, generator=g, dtype=torch.float64)
    assert abs(energy_distance(x, y)) < 0.01
    shift = 1.0  # 2 E|Z sqrt2 + m| - 2 E|Z sqrt2|
    normal = torch.distributions.Normal(0.0, 1.0)
    u = torch.tensor(shift / 2**0.5)
    folded = 2**0.5 * (2 * normal.log_prob(u).exp() + u * (2 * normal.cdf(u) - 1))
    assert np.isclose(energy_distance(x, y + shift), 2 * folded - 2 * 2 / np.pi**0.5, atol=0.04)
    with pytest.raises(ValueError, match="two samples"):
        energy_distance(x[:1], y)


def test_stochastic_calibration_is_nearer_to_the_teachers_distribution():
    """The calibrated grid and tau do not lose to the default reverse SDE, and it is a Brownian sampler like it."""
    scheduler = calibrated(steps=(4,), num_samples=128, stochastic=True)
    e = scheduler.errors[4]
    assert e["held_out"] <= e["exact"] and e["stock"] is not None
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    one, two = (final(scheduler, 4, noise, denoiser) for _ in range(2))
    assert torch.equal(one, two)  # seeded by the latents
    entry = scheduler.config.calibration["tables"]["4"]
    same = ReverseSDEScheduler(**VP, tau=entry["tau"])
    same.set_timesteps(timesteps=entry["time"][:-1])
    assert torch.allclose(one, sample(denoiser, same, noise), atol=1e-5)
    scheduler.set_timesteps(4)
    out = scheduler.step(denoiser(noise, scheduler.timesteps[0]), scheduler.timesteps[0], noise)
    assert out.noise_std > 0


# -- the command --


def test_command_writes_a_scheduler(tmp_path, capsys):
    pipe = DDPMPipeline(mixture(**VP), DDPMScheduler(**VP, clip_sample=False))
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--num_samples", "8", "--steps", "4", "--budget", "0", "--output_dir", str(out)]
    assert main(["calibrate", "--model", str(tmp_path / "model"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "8 training and 8 held-out samples" in printed and "held-out" in printed and "MiB of the teacher" in printed
    assert set(CalibratedScheduler.from_pretrained(out).errors) == {4}
    assert main(["calibrate", "--model", str(tmp_path / "none"), *arguments]) == 2
    assert main(["calibrate", "--model", str(tmp_path / "model"), *arguments, "--prompt", "a cat"]) == 2
    assert "prompt" in capsys.readouterr().err


def test_class_conditional_network_through_its_bare_pipeline():
    """DDPMPipeline passes no labels: every class at every guidance scale is in each batch."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    ).eval()
    seen = []
    unet.register_forward_hook(lambda m, args, out: seen.append(args[2].tolist()))
    pipe = DDPMPipeline(unet, DDPMScheduler(clip_sample=False))
    options = {"num_inference_steps": 3, "num_samples": 4, "batch_size": 4, "budget": 0, "progress": False}
    scheduler = calibrate(pipe, guidance_scale=[1.0, 3.0], **options)
    assert isinstance(scheduler, diffusers_sde.CalibratedScheduler)
    assert {tuple(v) for v in seen} == {(0, 0, 1, 1), (2, 2, 2, 2)}
    with pytest.raises(ValueError, match="no prompt"):
        calibrate(pipe, prompt="a cat", **options)


def test_process_of_names_what_must_agree():
    assert process_of(DDIMScheduler(**VP).config) == process_of(ProbabilityFlowScheduler(**VP).config)
    assert process_of(DDIMScheduler(trained_betas=[0.1, 0.2]).config)["trained_betas"] == [0.1, 0.2]
    assert "beta_end" not in process_of(FlowMatchEulerDiscreteScheduler().config)


def test_oracle_goals():
    """The bench's mixture at 5 steps: at most 0.35 of the exact table's held-out error, 0.25 of the best stock's."""
    process = {**VP, "num_train_timesteps": 1000}
    model = oracle(process=process)
    scheduler = calibrate(
        network_denoiser(model), 5, scheduler=scheduler_of(process), sample_shape=model.sample_shape, progress=False
    )
    e = scheduler.errors[5]
    assert e["held_out"] <= 0.35 * e["exact"] and e["held_out"] <= 0.25 * e["stock"], e


# -- through a pipeline's own call --


def tiny(name):
    pipe, call, _ = PIPELINES[name]()
    ours = ("generator", "num_inference_steps", "output_type", "return_dict", "latents")
    return pipe, {k: v for k, v in call.items() if k not in ours}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux", "dit"])
def test_pipelines_are_calibrated_through_their_own_call(name):
    """Guided text-to-image, flow matching with a dynamic shift, class labels with every sample held twice: the pipeline
    keeps its scheduler, and the calibrated one takes it nearer to its own converged latents than the exact one."""
    pipe, call = tiny(name)
    own = pipe.scheduler
    options = {"num_samples": 2, "batch_size": 2, "budget": 0, "progress": False}
    scheduler = calibrate(pipe, num_inference_steps=3, **options, **call)
    assert pipe.scheduler is own
    e = scheduler.errors[3]
    assert e["held_out"] < e["exact"]

    def latents(s, n):
        pipe.scheduler = s
        kind = {} if name == "dit" else {"output_type": "latent"}
        return torch.as_tensor(
            np.asarray(pipe(**call, num_inference_steps=n, generator=torch.Generator().manual_seed(5), **kind)[0])
        ).float()

    if name != "dit":  # it returns pictures only
        exact = ProbabilityFlowScheduler.from_config(own.config)
        converged = latents(exact, 60)
        learned, plain = ((latents(s, 3) - converged).norm() for s in (scheduler, exact))
        assert learned < plain


def test_pipelines_that_start_from_an_image_are_refused():
    pipe, call = tiny("sd_img2img")
    with pytest.raises(ValueError, match="pure noise"):
        calibrate(pipe, num_inference_steps=3, num_samples=2, batch_size=1, progress=False, **call)
    pipe, call = tiny("sd")
    with pytest.raises(ValueError, match="latents"):
        calibrate(pipe, latents=torch.zeros(1), progress=False, **call)
    with pytest.raises(ValueError, match="takes no colour"):
        calibrate(pipe, colour="red", progress=False, **call)
