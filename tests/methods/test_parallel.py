"""methods/parallel.py, sample_parallel and pipelines/parallel_sampling.py: many steps at once, the result of one after
the other."""

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from pipeline_parts import PROCESSES, oracle, tiny_unet
from snippets import run
from two_processes import run_on_two_processes

from diffusers_sde import (
    ClassConditionalPipeline,
    DPMSolverScheduler,
    FlowMapScheduler,
    GaussianMixtureModel,
    ProbabilityFlowScheduler,
    ReverseSDEScheduler,
    sample_parallel,
)
from diffusers_sde.assets import load_default_model
from diffusers_sde.methods.parallel import sample_rows
from diffusers_sde.sampling import network_denoiser, rmse, sample

TABLES = {
    "ode": (ProbabilityFlowScheduler, {}),
    "ode of order 4": (ProbabilityFlowScheduler, {"solver_order": 4}),
    "sde": (ReverseSDEScheduler, {"noise_seed": 3}),
    "single step": (DPMSolverScheduler, {"singlestep": True}),
    "clipped": (DPMSolverScheduler, {"clip_sample": True}),
}


def noise_of(model, count, seed=0):
    return torch.randn(count, *model.sample_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def both(network, scheduler, noise, steps, **options):
    """The run of ``steps`` in parallel, what it cost, and the states after it one after the other; the network is a
    function of state and time and wants the state itself."""
    scheduler.set_timesteps(steps)
    state = noise * float(scheduler.init_noise_sigma)
    scheduler.scale_model_input = lambda x, t=None: x
    expected = sample(network, scheduler, noise)
    scheduler.set_timesteps(steps)
    transitions = scheduler.transitions(state)

    def evaluate(states, rows, samples):
        return torch.cat([network(states[[i]], transitions.times[row]) for i, row in enumerate(rows)])

    made, cost = sample_rows(evaluate, transitions, state, **options)
    return made, cost, expected


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("table", TABLES)
def test_with_tolerance_0_it_is_the_sequential_result_in_as_many_rounds_at_most(process, table):
    model, _ = oracle(process)
    cls, options = TABLES[table]
    scheduler = cls(**PROCESSES[process], **options)
    made, cost, expected = both(network_denoiser(model), scheduler, noise_of(model, 2), 7, window=4)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    assert cost.rounds <= 7


@pytest.mark.parametrize("acceleration", [0, 1, 3])
def test_a_network_that_no_sweep_can_guess_takes_a_round_for_each_row(acceleration):
    """Each row is exact one round after the one before, so that n rounds are enough, mixed with earlier ones or not."""

    def network(x, t):
        return torch.frac(1e3 * x.abs() * (1 + t / 1000)) - 0.5

    noise = torch.randn(2, 1, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = ProbabilityFlowScheduler(prediction_type="epsilon", solver_order=2)
    made, cost, expected = both(network, scheduler, noise, 6, acceleration=acceleration)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    assert cost.rounds == 6 and cost.evaluations == (1 + 5 + 4 + 3 + 2 + 1,) * 2


@pytest.mark.parametrize("steps", [5, 40])
def test_for_data_of_the_scale_of_the_exact_part_the_first_sweep_arrives(steps):
    """F of ``N(0, data_std^2 I)`` is 0 wherever it is evaluated: a round for the first row, one sweep, and one that
    finds nothing to change."""
    model = GaussianMixtureModel([1.0], [[0.0] * 3], [0.25])
    scheduler = ProbabilityFlowScheduler(prediction_type="epsilon", data_std=0.5)
    made, cost, expected = both(network_denoiser(model), scheduler, noise_of(model, 1), steps, tolerance=1e-9)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-9)
    assert cost.rounds == 3


def test_each_sample_keeps_its_own_tolerance_whatever_its_batch():
    """One that wants the sequential result gets it, another is done with fewer evaluations, as it is alone."""
    model, scheduler = oracle()
    noise = noise_of(model, 2)
    made, cost, expected = both(network_denoiser(model), scheduler, noise, 12, tolerance=[0.0, 0.05])
    far = rmse(made, expected)
    assert far[0] < 1e-12 < far[1] < 0.05
    assert cost.evaluations[1] < cost.evaluations[0] == 1 + sum(range(12))
    alone, cost_alone, _ = both(network_denoiser(model), scheduler, noise[1:], 12, tolerance=0.05)
    torch.testing.assert_close(alone[0], made[1], rtol=0, atol=1e-12)
    assert cost_alone.evaluations == cost.evaluations[1:]


def test_rounds_grow_with_the_tolerance_and_not_with_the_steps():
    """Twice the steps take about as many rounds: what decides is the length of the way, not how finely it is cut."""
    model, scheduler = oracle()
    noise, rounds = noise_of(model, 1), {}
    for steps in (12, 24):
        for tolerance in (0.1, 0.001):
            made, cost, expected = both(network_denoiser(model), scheduler, noise, steps, tolerance=tolerance)
            assert float(rmse(made, expected)) <= 3 * tolerance
            rounds[steps, tolerance] = cost.rounds
    assert rounds[12, 0.1] < rounds[12, 0.001] < 12
    assert rounds[24, 0.1] < rounds[24, 0.001] <= rounds[12, 0.001] + 2


def test_a_window_bounds_a_call_and_a_coarse_solve_saves_evaluations():
    """A sixth of the rows in a window: more rounds, fewer evaluations.  A coarse solve: fewer evaluations, and in all
    no more than its own rounds above those without it."""
    model, scheduler = oracle()
    noise, denoiser = noise_of(model, 1), network_denoiser(model)
    _, whole, _ = both(denoiser, scheduler, noise, 48, tolerance=0.01)
    _, narrow, _ = both(denoiser, scheduler, noise, 48, tolerance=0.01, window=8)
    _, guessed, _ = both(denoiser, scheduler, noise, 48, tolerance=0.01, predictor_steps=7)
    assert narrow.rounds > whole.rounds and narrow.evaluations[0] <= 1 + 8 * (narrow.rounds - 1) < whole.evaluations[0]
    assert guessed.evaluations < whole.evaluations and guessed.rounds <= whole.rounds + 6


def test_anderson_acceleration_saves_rounds():
    """Guidance at scale 4 makes the map contract slowly; the result is the same."""
    model, scheduler = oracle(dim=8)
    guided = network_denoiser(model, torch.tensor([1]), 4.0)
    noise, rounds = noise_of(model, 1), []
    for acceleration in (0, 1):
        made, cost, expected = both(guided, scheduler, noise, 24, tolerance=1e-4, acceleration=acceleration)
        assert float(rmse(made, expected)) < 3e-4
        rounds.append(cost.rounds)
    assert rounds[1] < rounds[0]


def test_of_a_prompt_it_makes_the_picture_of_the_pipeline_with_the_noise_of_its_generator():
    """Stable Diffusion in the small, guidance 3, the reverse SDE: latents and Brownian path from one generator."""
    pipe = load_default_model()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = ReverseSDEScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    expected = pipe("red apple", generator=torch.Generator().manual_seed(5), **options).images
    made = sample_parallel(pipe, "red apple", generator=torch.Generator().manual_seed(5), tolerance=0.0, **options)
    torch.testing.assert_close(made.images, expected, rtol=1e-4, atol=1e-4)
    assert made.rounds == 3 and made.evaluations == [1 + 2 + 1]


SHARED_RUN = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from pipeline_parts import oracle
from diffusers_sde import ClassConditionalPipeline, ReverseSDEScheduler, sample_parallel
torch.set_num_threads(1)
state = PartialState(cpu=True)
model, scheduler = oracle()
pipe = ClassConditionalPipeline(model, ReverseSDEScheduler.from_config(scheduler.config))
pipe.set_progress_bar_config(disable=True)
asked, forward = [], model.forward

def counted(x, t, *args, **kwargs):
    if len(t.reshape(-1).unique()) == 1:  # a batch of several times asks for each of them in turn
        asked.append(len(x))
    return forward(x, t, *args, **kwargs)

model.forward = counted
generator = torch.Generator().manual_seed(state.process_index)
made = sample_parallel(pipe, num_images=3, num_inference_steps=6, tolerance=0.0, split=True, generator=generator,
                       output_type="latent")
with open({out!r} + str(state.process_index) + "-of-" + str(state.num_processes), "w") as file:
    json.dump([made.images.tolist(), made.rounds, made.evaluations, asked], file)
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_each_batch_and_get_the_pictures_of_one(tmp_path):
    """Accelerate with two gloo processes and different generators: the main one's noise counts, and each evaluates
    half of every batch, of which an odd one is filled up."""
    left, right = run_on_two_processes(SHARED_RUN, tmp_path)
    model, scheduler = oracle()
    pipe = ClassConditionalPipeline(model, ReverseSDEScheduler.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 6, "tolerance": 0.0, "output_type": "latent"}
    one = sample_parallel(pipe, num_images=3, generator=torch.Generator().manual_seed(0), **options)
    assert left[:3] == right[:3] and left[1:3] == [one.rounds, one.evaluations]
    torch.testing.assert_close(torch.tensor(left[0]), one.images, rtol=0, atol=1e-6)
    batches = [3, 15, 12, 9, 6, 3]
    assert sum(left[3]) == sum(right[3]) == sum(-(-size // 2) for size in batches)


class Unasked(torch.nn.Module):
    """A network that nobody may evaluate."""

    def forward(self, *args, **kwargs):
        raise AssertionError("the network was evaluated")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"tolerance": -1.0}, "tolerance must be 0"),
        ({"tolerance": float("nan")}, "tolerance must be 0"),
        ({"tolerance": [0.1, 0.1]}, "2 tolerances for 1 samples"),
        ({"acceleration": -1}, "acceleration must be at least 0"),
        ({"predictor_steps": 0}, "predictor_steps must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"prompt": "a cat"}, "takes no prompt"),
    ],
    ids=str,
)
def test_wrong_inputs_are_refused_without_work(wrong, message):
    pipe = ClassConditionalPipeline(tiny_unet(), ProbabilityFlowScheduler())
    pipe.unet.forward = Unasked().forward
    with pytest.raises(ValueError, match=message):
        sample_parallel(pipe, **wrong)


@pytest.mark.parametrize("scheduler", [FlowMapScheduler(), LCMScheduler()], ids=lambda s: type(s).__name__)
def test_few_jumps_are_not_run_in_parallel(scheduler):
    with pytest.raises(ValueError, match="makes few jumps"):
        sample_parallel(ClassConditionalPipeline(tiny_unet(), scheduler))


def test_the_pipeline_takes_fewer_rounds_than_steps():
    """The snippet of its docstring on the embedded model; with tolerance 0 as many."""
    near, same = run("parallel_sampling")["made"]
    assert near.rounds < same.rounds == 10
    difference = np.asarray(near.images[0], float) - np.asarray(same.images[0], float)
    assert np.sqrt(np.square(difference).mean()) < 0.1 * 255
