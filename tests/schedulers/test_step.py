"""``step`` as diffusers' pipelines call it, one test a demand."""

import inspect
import math

import diffusers
import pytest
import torch
from contract_helpers import (
    DTYPES,
    PUBLIC,
    SHAPE,
    VP,
    by_class,
    by_every,
    by_process,
    gaussian,
    laid_out,
    loop,
    one_step,
    point,
    randn,
    relative,
)

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler


@by_every
@by_process
def test_step_by_keyword(process, cls):
    """Everything may be passed by keyword."""
    x, scheduler = randn(*SHAPE), laid_out(cls, **process)
    t = scheduler.timesteps[0]
    output = gaussian(scheduler)(x, t)
    expected = scheduler.step(output, t, x).prev_sample
    scheduler.set_timesteps(6)
    found = scheduler.step(model_output=output, timestep=t, sample=x, generator=None, return_dict=True)
    assert torch.equal(found.prev_sample, expected)


@by_every
@pytest.mark.parametrize("extra", [{"prev_timestep": 3}, {"use_clipped_model_output": True}, {"variance_noise": None}])
def test_foreign_keywords_are_tolerated(extra, cls):
    """Keywords of other schedulers' ``step`` that mean nothing here change nothing."""
    expected = one_step(laid_out(cls, **VP)).prev_sample
    assert torch.equal(one_step(laid_out(cls, **VP), **extra).prev_sample, expected)


@by_every
@by_process
def test_pred_original_sample_is_honoured(process, cls):
    """Cosmos hands the step its own data prediction: the step is that of a network which says so."""
    x, x0 = randn(*SHAPE), randn(*SHAPE, seed=1)
    scheduler = laid_out(cls, **process)
    t = scheduler.timesteps[1]
    scheduler.set_begin_index(1)
    expected = scheduler.step(point(scheduler, x0)(x, t), t, x, return_dict=False)[0]
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(1)
    found, returned = scheduler.step(torch.zeros_like(x), t, x, return_dict=False, pred_original_sample=x0)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(returned, x0, atol=2e-5, rtol=2e-5)


@by_every
def test_per_token_timesteps_are_honoured(cls):
    """LTX gives every token its own noise level: the result is FlowMatchEuler's."""
    stock_scheduler, scheduler = diffusers.FlowMatchEulerDiscreteScheduler(), cls(use_flow_sigmas=True)
    sigmas = [1.0, 0.7, 0.4, 0.1]
    for s in (stock_scheduler, scheduler):
        s.set_timesteps(sigmas=sigmas)
    x, output = randn(2, 5, 3), randn(2, 5, 3, seed=1)
    for t in (1000.0, 700.0):
        own = torch.tensor([[t, 0.0, t / 2, 250.0, t], [t, t, t, 50.0, 0.0]])
        found, expected = (
            s.step(output, s.timesteps[round((1000 - t) / 300)], x, per_token_timesteps=own, return_dict=False)[0]
            for s in (scheduler, stock_scheduler)
        )
        torch.testing.assert_close(found, expected)
        x = expected


@by_every
def test_per_token_timesteps_need_flow_matching(cls):
    """Elsewhere they are refused with a clear error instead of being ignored."""
    with pytest.raises(ValueError, match="flow matching"):
        one_step(laid_out(cls, **VP), per_token_timesteps=torch.zeros(2, 4))


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_step_has_no_eta(cls):
    """Pipelines pass ``eta=0.0`` to every step that has the parameter and would turn an SDE into an ODE."""
    assert "eta" not in inspect.signature(cls.step).parameters


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_generator_is_named(cls):
    """Pipelines look for a parameter ``generator`` by introspection; it must be optional."""
    parameter = inspect.signature(cls.step).parameters["generator"]
    assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameter.default is None


@by_every
@by_process
def test_tuple_of_two(process, cls):
    """``return_dict=False``: the previous sample and the data prediction, as in the output object."""
    found = one_step(laid_out(cls, **process), return_dict=False)
    output = one_step(laid_out(cls, **process))
    assert isinstance(found, tuple) and len(found) == 2
    assert torch.equal(found[0], output.prev_sample)
    assert torch.equal(found[1], output.pred_original_sample)


@by_class
@by_process
def test_second_of_the_tuple_is_the_data_prediction(process, cls):
    """For a network that knows the data exactly, ``[1]`` is the data, at every step."""
    final = {} if cls is DPMSolverScheduler else {"final": "denoise"}
    x0, scheduler = randn(*SHAPE, seed=1), laid_out(cls, **process, **final)
    model, x = point(scheduler, x0), randn(*SHAPE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x, found = scheduler.step(model(x, t), t, x, return_dict=False)
        torch.testing.assert_close(found, x0, atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(x, x0, atol=5e-4, rtol=1e-4)


@by_every
@by_process
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_kept(process, cls, dtype):
    """Every tensor of the output has the sample's dtype."""
    scheduler = laid_out(cls, **process)
    for i in range(6):
        out = one_step(scheduler, i, randn(*SHAPE, dtype=torch.float64).to(dtype))
        assert {out.prev_sample.dtype, out.pred_original_sample.dtype, out.prev_sample_mean.dtype} == {dtype}
        assert out.prev_sample.isfinite().all()


@by_every
def test_float32_model_on_half_sample(cls):
    """A network that returns float32 for a half precision sample does not change the sample's dtype."""
    scheduler, x = laid_out(cls, **VP), randn(*SHAPE).to(torch.bfloat16)
    assert scheduler.step(x.float(), scheduler.timesteps[0], x, return_dict=False)[0].dtype == torch.bfloat16


@by_every
def test_half_precision_step_is_the_rounded_float32_step(cls):
    """Arithmetic is float32: a bfloat16 step is the float32 step of the same numbers, rounded once."""
    kwargs = {"noise_seed": 1} if cls is ReverseSDEScheduler else {}
    half, full = laid_out(cls, **VP, **kwargs), laid_out(cls, **VP, **kwargs)
    for i in range(6):
        x, output = (randn(*SHAPE, seed=s + i).to(torch.bfloat16) for s in (0, 50))
        found = half.step(output, half.timesteps[i], x).prev_sample
        expected = full.step(output.float(), full.timesteps[i], x.float()).prev_sample
        assert torch.equal(found, expected.to(torch.bfloat16))


def in_bfloat16(scheduler, model):
    """Relative error of 50 bfloat16 steps to the same run in float32."""
    out = []
    for dtype in (torch.bfloat16, torch.float32):
        scheduler.set_timesteps(50)
        x = (randn(4, 4, 32, 32).to(torch.bfloat16) * scheduler.init_noise_sigma).to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        out.append(x)
    return relative(*out)


def test_bfloat16_over_50_steps():
    """50 steps in bfloat16 end within 1.5 % of float32 (the rounding of the state itself), stock UniPC at 4 %."""
    scheduler = ProbabilityFlowScheduler(**VP)
    ours = in_bfloat16(scheduler, gaussian(scheduler))
    assert ours < 0.015
    assert ours < 0.5 * in_bfloat16(diffusers.UniPCMultistepScheduler(**VP), gaussian(scheduler))


def test_float64_is_not_rounded():
    """A float64 run agrees with the exact solution beyond float32: Gaussian data and its own data_std."""
    scheduler = laid_out(ProbabilityFlowScheduler, 8, **VP, grid="trailing", data_std=0.5, final="exact")
    x = randn(*SHAPE, dtype=torch.float64)
    alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(999.0))
    model = gaussian(scheduler)
    scheduler.timesteps = scheduler.timesteps.double()
    torch.testing.assert_close(loop(scheduler, x, model), x * 0.5 / math.hypot(0.5 * alpha, sigma), rtol=1e-9, atol=0)


@by_class
@pytest.mark.parametrize("off", [700.4, torch.tensor(700.4), torch.tensor([700]), 700], ids=repr)
def test_timesteps_off_the_grid(off, cls):
    """A first timestep that is not on the grid starts at the nearest one; no error."""
    scheduler = laid_out(cls, 10, **VP, grid="trailing")  # 999, 899, ..., 99
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    found = scheduler.step(output, off, x).prev_sample
    assert scheduler.step_index == 4
    scheduler.set_timesteps(10)
    assert torch.equal(found, scheduler.step(output, scheduler.timesteps[3], x).prev_sample)


@by_every
@by_process
def test_step_before_set_timesteps(process, cls):
    """Without ``set_timesteps`` the training grid is in force: a step goes one training timestep down."""
    scheduler, x0, eps = cls(**process), randn(*SHAPE, seed=1), randn(*SHAPE)
    t, following = scheduler.timesteps[500], scheduler.timesteps[501]
    x = scheduler.add_noise(x0, eps, t[None])
    out = scheduler.step(point(scheduler, x0)(x, t), t, x)
    assert len(scheduler.timesteps) == 1000
    assert scheduler.step_index == 501
    if out.noise_std == 0:
        alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(float(following)))
        torch.testing.assert_close(out.prev_sample, alpha * x0 + sigma * eps, atol=1e-4, rtol=1e-4)


@by_every
def test_step_index_can_be_put_back(cls):
    """Cosmos steps twice at one timestep, with ``_step_index -= 1`` in between: the second step counts."""
    scheduler = laid_out(cls, **VP)
    first = one_step(scheduler).prev_sample
    scheduler._step_index -= 1
    assert scheduler.step_index == 0
    assert torch.equal(one_step(scheduler).prev_sample, first)
    assert scheduler.step_index == 1
