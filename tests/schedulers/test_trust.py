"""How far a run follows its rows: by what its earlier evaluations had expected of the newest one."""

import itertools

import numpy as np
import pytest
import torch
from helpers import LINEAR, PATHS, SD, nodes_of

from diffusers_sde import DPMSolverScheduler, GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.benchmarks.suite import problems
from diffusers_sde.extrapolation import trust
from diffusers_sde.sampling import network_denoiser, rmse, sample
from diffusers_sde.tables import build_multistep, build_singlestep
from diffusers_sde.weights import clock_values

TABLES = {
    "order 2 with corrector": (build_multistep, {"order": 2, "corrector": True, "data_std": 1.0}),
    "order 3 with corrector": (build_multistep, {"order": 3, "corrector": True, "data_std": 0.5, "clock": "angle"}),
    "order 3": (build_multistep, {"order": 3}),
    "SDE of order 2 with corrector": (build_multistep, {"order": 2, "corrector": True, "data_std": 0.5, "tau": 0.3}),
    "single step of 2": (build_singlestep, {"method": "grid2"}),
    "single step of 3": (build_singlestep, {"method": "grid3", "data_std": 1.0}),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_gap_is_the_evaluation_less_what_the_last_step_expected(name):
    """The gap of a polynomial in the clock, of the degree by which the step before extrapolated, is 0; that of one
    degree more is not; and of an evaluation that came as a surprise it is the surprise."""
    build, options = TABLES[name]
    lam = np.linspace(-1.5, 1.0, 8) + 0.05 * np.arange(8) ** 1.5
    rows = build(PATHS["vp_linear"], nodes_of(PATHS["vp_linear"], lam), **options).rows
    clock = clock_values(None, options.get("clock", "log_snr"), lam, options.get("data_std", 0.0))
    tested = 0
    for i, row in enumerate(rows):
        if not row.gap:
            continue
        assert row.gap[0] == 1.0
        degree = len(row.gap) - 2
        values = clock[i::-1][: len(row.gap)] - clock[i] + 0.7
        assert np.dot(row.gap, values**degree) == pytest.approx(0, abs=1e-12)
        assert abs(np.dot(row.gap, values ** (degree + 1))) > 1e-3
        tested += 1
    assert tested >= 3


@pytest.mark.parametrize("name", TABLES)
def test_slope_and_correction_are_what_goes_beyond_order_one(name):
    """``b = first + slope + correction gap``, with first the one weight of the step of order 1 between the same
    nodes."""
    build, options = TABLES[name]
    lam = np.linspace(-1.5, 1.0, 8)
    nodes = nodes_of(PATHS["vp_linear"], lam)
    first = build_multistep(None, nodes, order=1, data_std=options.get("data_std", 0.0), tau=options.get("tau", 0.0))
    for row, plain in zip(build(PATHS["vp_linear"], nodes, **options).rows, first.rows, strict=True):
        if row.gap:
            rest = np.zeros(max(len(row.b), len(row.gap)))
            for factor, part in ((1, row.b), (-1, row.slope), (-row.correction, row.gap)):
                rest[: len(part)] += factor * np.array(part)
            np.testing.assert_allclose(rest, [plain.b[0], *[0.0] * (len(rest) - 1)], atol=1e-12)
            assert (row.correction != 0) == bool(options.get("corrector"))


def test_trust_is_full_without_a_gap_and_falls_with_its_square_and_itself():
    assert trust(0.0) == (1.0, 1.0)
    assert trust(1.0) == (0.5, 0.8)
    assert trust(2.0) == (0.2, pytest.approx(2 / 3))


def evaluations_of(scheduler, outputs):
    """Run a scheduler on given model outputs; the states."""
    x, states = torch.full_like(outputs[0], 0.3), []
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, t, x, return_dict=False)[0]
        states.append(x)
    return states


def test_a_step_is_the_formula():
    """Third step at order 2, by hand: each part of the row's weights times the trust of its sample."""
    options = {**LINEAR, "prediction_type": "sample", "data_std": 0.0}
    scheduler = ProbabilityFlowScheduler(**options)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    states = evaluations_of(scheduler, outputs)
    row = build_multistep(scheduler.path, scheduler.levels, order=2, corrector=True, final="corrected").rows[2]
    F = outputs[[2, 1, 0]]
    gap = torch.tensordot(torch.tensor(row.gap, dtype=torch.float64), F, 1)
    slope = torch.tensordot(torch.tensor(row.slope, dtype=torch.float64), F[: len(row.slope)], 1)
    relative = gap.flatten(1).norm(dim=1) / F[0].flatten(1).norm(dim=1)
    assert relative.min() > 0.3  # random outputs are a surprise to each sample
    full = row.a * states[1] + torch.tensordot(torch.tensor(row.b, dtype=torch.float64), F[: len(row.b)], 1)
    less = (1 - 1 / (1 + relative**2)).reshape(-1, 1, 1, 1) * row.correction * gap
    less = less + (1 - 1 / (1 + relative / 4)).reshape(-1, 1, 1, 1) * slope
    torch.testing.assert_close(states[2], full - less, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler])
def test_trust_is_off_with_one_option(kind):
    """Without it a run is affine in what the network says; with it a surprise counts for less."""
    outputs = torch.randn(6, 2, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def last(factor, on):
        scheduler = kind(**LINEAR, trust=on, **({"tau": 0.0} if kind is ReverseSDEScheduler else {}))
        scheduler.set_timesteps(6)
        return evaluations_of(scheduler, factor * outputs + 0.5)[-1]

    plain = [last(factor, False) for factor in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(plain[2] - plain[1], plain[1] - plain[0], rtol=1e-10, atol=1e-10)
    doubting = [last(factor, True) for factor in (0.0, 1.0, 2.0)]
    assert (doubting[2] - 2 * doubting[1] + doubting[0]).abs().max() > 1e-2


def test_trust_of_a_sample_knows_nothing_of_the_batch():
    outputs = torch.randn(6, 4, 1, 2, 2, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [0.1, 1.0, 5.0, 30.0]
    ).reshape(4, 1, 1, 1)
    scheduler = ProbabilityFlowScheduler(**LINEAR)
    scheduler.set_timesteps(6)
    together = evaluations_of(scheduler, outputs)[-1]
    for k in range(4):
        scheduler.set_timesteps(6)
        torch.testing.assert_close(evaluations_of(scheduler, outputs[:, k : k + 1])[-1][0], together[k], rtol=0, atol=0)


def test_trust_becomes_full_and_the_order_stays():
    """On a smooth problem the gap shrinks with the square of the step: the untrusted part of the slope with the fourth
    power, and the error with the order of the table."""
    model = GaussianMixtureModel([0.5, 0.5], [[1.0, -0.5], [-1.0, 0.5]], [0.3, 0.5], process=SD)
    noise = torch.randn(8, *model.sample_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = np.linspace(-1.5, 1.0, 161)
    ends = {}
    for n in (10, 20, 40, 160):
        times = PATHS["vp_scaled_linear"].time(levels[:: 160 // n])[:-1]
        for on in (True, False):
            scheduler = ProbabilityFlowScheduler(
                **SD, trust=on, data_std=1.0, clock="log_snr", final_sigmas_type="sigma_min"
            )
            scheduler.set_timesteps(timesteps=times.tolist())
            ends[n, on] = sample(network_denoiser(model), scheduler, noise)
    gaps = [(ends[n, True] - ends[n, False]).abs().max().item() for n in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(gaps):
        assert coarse / fine > 2**2.5


def test_a_network_that_overshoots_does_not_explode():
    """Guidance 12 on a narrow component beside broad ones: D falls where the state rises.  At 5 evaluations the table
    as it is ends several times as far from the solution as with trust, which is not behind DDIM."""
    problem = next(p for p in problems("development", ["cosine"], [12.0]) if p.name.startswith("separated"))

    def solution(n, **options):
        scheduler = ProbabilityFlowScheduler.from_config(problem.config, clip_sample=False, **options)
        scheduler.set_timesteps(n)
        return sample(problem.denoiser, scheduler, problem.noise)

    converged = solution(200)
    error = {name: rmse(solution(5, **options), converged).mean() for name, options in CASES.items()}
    assert error["table as it is"] > 3 * error["default"]
    assert error["default"] < error["DDIM"]


CASES = {"default": {}, "table as it is": {"trust": False}, "DDIM": {"solver_order": 1, "grid": "trailing"}}
