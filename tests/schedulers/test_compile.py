"""``torch.compile`` of the step: one graph, no recompilation from step to step, the same results."""

import diffusers
import pytest
import torch
from contract_helpers import VP, by_every, by_process, gaussian, laid_out, randn

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler

SHAPE = (2, 4, 8, 8)


@pytest.fixture
def compiled():
    """``compiled(function)`` and the graphs that it became."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend=backend), graphs
    torch._dynamo.reset()


def steps(scheduler, step, x):
    """A loop with ``step``; all values of each output."""
    model = gaussian(scheduler)
    for t in scheduler.timesteps:
        out = step(model(x, t), t, x)
        yield from (
            out.prev_sample,
            out.pred_original_sample,
            out.prev_sample_mean,
            torch.as_tensor(out.noise_std, dtype=torch.float64),
        )
        x = out.prev_sample


@by_every
@by_process
def test_compiled_steps_are_the_steps(process, cls, compiled):
    """After ``set_begin_index`` the step compiles as a whole, once for the whole run."""
    make, graphs = compiled
    scheduler, x = laid_out(cls, **process), randn(*SHAPE)
    expected = list(steps(scheduler, scheduler.step, x))
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    for found, value in zip(steps(scheduler, make(scheduler.step), x), expected, strict=True):
        torch.testing.assert_close(found, value.to(found.dtype), rtol=0, atol=0)
    assert len(graphs) == 1


def test_a_graph_of_network_and_step(compiled):
    """The step inside a larger compiled function, on several runs and grids, with ``return_dict=False``."""
    make, graphs = compiled
    scheduler = ProbabilityFlowScheduler(**VP)

    @make
    def evaluate_and_step(x, t):
        return scheduler.step(torch.tanh(0.3 * x), t, x, return_dict=False)[0]

    for n in (5, 8):
        scheduler.set_timesteps(n)
        x = y = randn(*SHAPE)
        for t in scheduler.timesteps:
            x = evaluate_and_step(x, t)
        scheduler.set_timesteps(n)
        for t in scheduler.timesteps:
            y = scheduler.step(torch.tanh(0.3 * y), t, y, return_dict=False)[0]
        assert torch.equal(x, y)
    assert len(graphs) == 1


def test_stock_compiles_too(compiled):
    """What the issue is measured against: FlowMatchEuler compiles after ``set_begin_index``, more than once a run."""
    make, graphs = compiled
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    step, x = make(scheduler.step), randn(*SHAPE)
    for t in scheduler.timesteps:
        x = step(x, t, x, return_dict=False)[0]
    assert len(graphs) > 1


def test_a_generator_in_a_compiled_stochastic_step(compiled):
    """It cannot enter the graph: refused with the remedy, not ignored."""
    make, _ = compiled
    scheduler, x = laid_out(ReverseSDEScheduler, **VP), randn(*SHAPE)
    with pytest.raises(Exception, match="noise_seed"):
        make(scheduler.step)(x, scheduler.timesteps[0], x, generator=torch.Generator())
