"""What ``calibrate`` promises: a learned table cannot hurt, an interrupted run goes on, several processes agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_helpers import EDM, FLOW, QUIET, SHAPE, VP, calibrated, denoiser_of, final, scheduler_of
from contract_helpers import randn
from diffusers import UniPCMultistepScheduler
from helpers import COSINE, SD, mixture
from two_processes import run_on_two_processes

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler, calibrate
from diffusers_sde.benchmarks.common import oracle
from diffusers_sde.calibration.fit import fit_tables
from diffusers_sde.calibration.sources import HELD_OUT, DenoiserSource
from diffusers_sde.calibration.stochastic import energy_distance
from diffusers_sde.sampling import network_denoiser, sample


def mean_error(scheduler, n, noise, denoiser, reference):
    """Mean over samples of the root mean square distance to ``reference``."""
    return float((final(scheduler, n, noise, denoiser) - reference).flatten(1).square().mean(1).sqrt().mean())


@pytest.mark.parametrize(
    "process", [VP, {**SD, "prediction_type": "v_prediction"}, FLOW, EDM], ids=["vp", "v", "flow", "edm"]
)
def test_no_number_of_steps_loses_on_fresh_noise(process):
    """On noise that neither fit nor test has seen, calibrated <= exact at every number of steps, mostly far below."""
    steps = (3, 5, 8)
    scheduler, denoiser, exact = calibrated(process, steps), denoiser_of(process), scheduler_of(process)
    noise = randn(200, *SHAPE, seed=99)
    reference = final(scheduler_of(process), 200, noise, denoiser)
    ratios = [mean_error(scheduler, n, noise, denoiser, reference) for n in steps]
    ratios = np.divide(ratios, [mean_error(exact, n, noise, denoiser, reference) for n in steps])
    assert ratios.max() <= 1.0 and np.exp(np.mean(np.log(ratios))) < 0.5, ratios


def test_the_reported_errors_are_those_of_the_named_noise():
    """``held_out`` and ``exact`` are the errors of the scheduler and of the exact solver on the held-out noise,
    ``training`` that of the scheduler on the training noise, all to the converged solution."""
    scheduler, denoiser = calibrated(steps=(4, 5), budget=0), denoiser_of(VP)
    source = DenoiserSource(denoiser, SHAPE, 32, 0)
    for n in (4, 5):
        e = scheduler.errors[n]
        assert e["training"] < 0.95 * e["held_out"]  # 32 samples for fifteen weights: no exchange goes unnoticed
        for name, first, run in (
            ("training", 0, scheduler),
            ("held_out", HELD_OUT, scheduler),
            ("exact", HELD_OUT, scheduler_of(VP)),
        ):
            with source.open(first) as batch:
                noise = batch.noise
            reference = final(scheduler_of(VP), 200, noise, denoiser)
            found = mean_error(run, n, noise, denoiser, reference)
            assert e[name] == pytest.approx(found, rel=0.01), name


def test_a_guided_network_gains_on_fresh_noise():
    """Guidance 7.5 between mixture components, whose trajectories bend: at 4 and 8 steps the calibrated tables have at
    most a fifth of the exact solver's error on noise that neither fit nor test has seen, with the labels of each."""
    model = mixture(**VP)
    labels = torch.arange(32) % 3
    scheduler = calibrate(
        network_denoiser(model, labels, 7.5), (4, 8), 32, scheduler=scheduler_of(VP), budget=0, **QUIET
    )
    noise, denoiser = randn(32, *SHAPE, seed=99), network_denoiser(model, labels, 7.5)
    reference = final(scheduler_of(VP), 200, noise, denoiser)
    for n in (4, 8):
        learned, exact = (mean_error(s, n, noise, denoiser, reference) for s in (scheduler, scheduler_of(VP)))
        assert learned < 0.2 * exact


def test_the_winner_on_held_out_noise_is_kept(monkeypatch):
    """Of the fitted table and its refinements the one with the smallest held-out error, whatever the training error
    says: refinements that are spoiled on purpose are not chosen."""
    from diffusers_sde.calibration import choose

    def spoiled(samples, store, table, report):
        return replace(table, rows=(*table.rows[:-1], replace(table.rows[-1], a=3.0))), 0.0

    monkeypatch.setattr(choose, "refine", spoiled)
    refined, plain = calibrated(steps=4), calibrated(steps=4, budget=0)
    assert refined.errors[4] == plain.errors[4]


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


def test_oracle_goals():
    """The bench's mixture at 5 steps: at most 0.35 of the exact table's held-out error, 0.25 of the best stock's."""
    process = {**VP, "num_train_timesteps": 1000}
    model = oracle(process=process)
    scheduler = calibrate(
        network_denoiser(model),
        5,
        scheduler=scheduler_of(process),
        sample_shape=model.sample_shape,
        compare_with_stock=True,
        progress=False,
    )
    e = scheduler.errors[5]
    assert e["held_out"] <= 0.35 * e["exact"] and e["held_out"] <= 0.25 * e["stock"], e


# -- the comparison with stock samplers --


def counted(denoiser, calls):
    def call(x, t):
        calls.append(len(x))
        return denoiser(x, t)

    return call


def test_stock_samplers_run_only_where_asked_for():
    """Asked for, each of diffusers' deterministic samplers makes one run from each held-out batch and nothing else
    changes; otherwise there is no such error."""
    tables, calls = [], {False: [], True: []}
    for compared, made in calls.items():
        scheduler = calibrate(
            counted(denoiser_of(VP), made),
            4,
            16,
            scheduler=scheduler_of(VP),
            batch_size=4,
            budget=0,
            compare_with_stock=compared,
            **QUIET,
        )
        tables.append(json.loads(json.dumps(scheduler.config.calibration["tables"]["4"])))
        assert ("stock" in scheduler.errors[4]) == ("stock_name" in scheduler.errors[4]) == compared
    # ddim, euler, dpm++2m, dpm++2m-karras, unipc, deis at 4 evaluations, heun at 3; two held-out batches
    assert len(calls[True]) - len(calls[False]) == 2 * (6 * 4 + 3)
    del tables[1]["errors"]["stock"], tables[1]["errors"]["stock_name"]
    assert tables[0] == tables[1]


def test_the_error_of_a_stock_sampler_is_that_of_the_class_itself():
    """UniPC wins on this mixture at 8 steps; its error is what diffusers' class makes of the same held-out noise."""
    e = calibrated(steps=8, budget=0, compare_with_stock=True).errors[8]
    assert e["stock_name"] == "unipc"
    with DenoiserSource(denoiser_of(VP), SHAPE, 32, 0).open(HELD_OUT) as batch:
        noise = batch.noise
    stock = UniPCMultistepScheduler(**VP, timestep_spacing="trailing")
    difference = final(stock, 8, noise, denoiser_of(VP)) - final(scheduler_of(VP), 200, noise, denoiser_of(VP))
    assert np.isclose(e["stock"], difference.flatten(1).square().mean(1).sqrt().mean(), rtol=0.02)


def test_a_stock_sampler_that_is_left_out_is_named_with_the_reason():
    with pytest.warns(UserWarning, match=r"Left out of the comparison .* ddim: diffusers has no EDM form of it"):
        assert calibrated(EDM, steps=4, budget=0, compare_with_stock=True).errors[4]["stock_name"] in (
            "euler",
            "dpm++2m",
        )
    process = {**COSINE, "prediction_type": "epsilon"}
    with pytest.warns(UserWarning, match=r"dpm\+\+2m-karras is left out of the comparison at 5 steps: IndexError: "):
        assert calibrated(process, steps=5, budget=0, compare_with_stock=True).errors[5]["stock"] > 0


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
    left, right = run_on_two_processes(SHARED_RUN, tmp_path)
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
    scheduler = calibrated(steps=(3,), num_samples=128, stochastic=True, compare_with_stock=True)
    e = scheduler.errors[3]
    assert e["held_out"] <= e["exact"] and e["held_out"] < e["stock"] < 1
    assert e["stock_name"] in ("ddpm", "euler-a", "dpm++2m-sde")
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    one, two = (final(scheduler, 3, noise, denoiser) for _ in range(2))
    assert torch.equal(one, two)  # seeded by the latents
    entry = scheduler.config.calibration["tables"]["3"]
    same = ReverseSDEScheduler(**VP, tau=entry["tau"])
    same.set_timesteps(timesteps=entry["time"][:-1])
    assert torch.allclose(one, sample(denoiser, same, noise), atol=1e-5)
    scheduler.set_timesteps(3)
    out = scheduler.step(denoiser(noise, scheduler.timesteps[0]), scheduler.timesteps[0], noise)
    assert out.noise_std > 0
