"""What diffusers' pipelines ask of a scheduler, one test a demand, and bugs of its schedulers that ours do not have."""

import copy
import inspect
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import (
    CLASSES,
    EDM,
    FLOW,
    VP,
    by_class,
    by_process,
    gaussian,
    in_fresh_process,
    loop,
    point,
    randn,
    relative,
    sample,
    seeded,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from tiny_pipelines import cosine_dpm_solver, stock

import diffusers_sde
from diffusers_sde import DPMSolverScheduler, GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler

SHAPE = (2, 4, 8, 8)
PUBLIC = [
    cls
    for cls in (getattr(diffusers_sde, name) for name in diffusers_sde.__all__)
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin) and cls is not diffusers.SchedulerMixin
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Settings that are deterministic and that the first-order step of any stock ODE sampler equals.
FIRST_ORDER = {"solver_order": 1, "corrector": False}


def laid_out(cls, n=6, **kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(n)
    return scheduler


def one_step(scheduler, i=0, x=None, **kwargs):
    """The step at grid index ``i`` on Gaussian data."""
    x = randn(*SHAPE) if x is None else x
    t = scheduler.timesteps[i]
    return scheduler.step(gaussian(scheduler)(x, t), t, x, **kwargs)


# -- step --


@by_class
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


@by_class
@pytest.mark.parametrize("extra", [{"prev_timestep": 3}, {"use_clipped_model_output": True}, {"variance_noise": None}])
def test_foreign_keywords_are_tolerated(extra, cls):
    """Keywords of other schedulers' ``step`` that mean nothing here change nothing."""
    expected = one_step(laid_out(cls, **VP)).prev_sample
    assert torch.equal(one_step(laid_out(cls, **VP), **extra).prev_sample, expected)


@by_class
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


@by_class
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


@by_class
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


@by_class
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


@by_class
@by_process
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_kept(process, cls, dtype):
    """Every tensor of the output has the sample's dtype."""
    scheduler = laid_out(cls, **process)
    for i in range(6):
        out = one_step(scheduler, i, randn(*SHAPE, dtype=torch.float64).to(dtype))
        assert {out.prev_sample.dtype, out.pred_original_sample.dtype, out.prev_sample_mean.dtype} == {dtype}
        assert out.prev_sample.isfinite().all()


@by_class
def test_float32_model_on_half_sample(cls):
    """A network that returns float32 for a half precision sample does not change the sample's dtype."""
    scheduler, x = laid_out(cls, **VP), randn(*SHAPE).to(torch.bfloat16)
    assert scheduler.step(x.float(), scheduler.timesteps[0], x, return_dict=False)[0].dtype == torch.bfloat16


@by_class
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


@by_class
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


@by_class
def test_step_index_can_be_put_back(cls):
    """Cosmos steps twice at one timestep, with ``_step_index -= 1`` in between: the second step counts."""
    scheduler = laid_out(cls, **VP)
    first = one_step(scheduler).prev_sample
    scheduler._step_index -= 1
    assert scheduler.step_index == 0
    assert torch.equal(one_step(scheduler).prev_sample, first)
    assert scheduler.step_index == 1


# -- set_timesteps --


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_set_timesteps_signature(cls):
    """``sigmas``, ``timesteps`` and ``mu`` are found by introspection, and all arguments are optional."""
    parameters = inspect.signature(cls.set_timesteps).parameters
    assert {"num_inference_steps", "device", "sigmas", "mu", "timesteps"} <= set(parameters)
    assert all(p.default is None for name, p in parameters.items() if name != "self")


@by_class
@by_process
def test_steps_terminal_and_types(process, cls):
    """``n`` timesteps and ``n + 1`` sigmas, float32 tensors, the last sigma 0."""
    scheduler = laid_out(cls, 7, **process)
    assert scheduler.timesteps.shape == (7,) and scheduler.sigmas.shape == (8,)
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    assert scheduler.num_inference_steps == 7


@by_class
@pytest.mark.parametrize("n", [1, 2, 3, 50, 999, 1000])
@by_process
def test_any_number_of_steps(process, n, cls):
    """From one step to as many as were trained: distinct timesteps of decreasing noise."""
    scheduler = laid_out(cls, n, **process)
    assert len(scheduler.timesteps) == n
    assert (scheduler.sigmas.diff() < 0).all()


@by_class
def test_sigmas_without_number_of_steps(cls):
    """Flow pipelines pass ``sigmas`` and ``num_inference_steps=None``, by way of ``retrieve_timesteps``."""
    scheduler = cls(**FLOW)
    timesteps, n = retrieve_timesteps(scheduler, None, "cpu", sigmas=np.linspace(1.0, 0.25, 4))
    assert n == len(timesteps) == 4


@by_class
def test_timesteps_without_number_of_steps(cls):
    """The same for ``timesteps``."""
    timesteps, n = retrieve_timesteps(cls(**VP), None, "cpu", timesteps=[999, 600, 100])
    assert n == 3 and timesteps.tolist() == [999, 600, 100]


@by_class
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_sigmas_of_any_type(kind, cls):
    """Lists, arrays and tensors of sigmas are the same."""
    scheduler = cls(use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=kind([1.0, 0.5, 0.25]))
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.25, 0.0]


@by_class
def test_mu_without_dynamic_shifting(cls):
    """Pipelines pass ``mu`` also where dynamic shifting is off: it changes nothing, on any process."""
    for process in (VP, FLOW, EDM):
        plain, given = cls(**process), cls(**process)
        plain.set_timesteps(5)
        given.set_timesteps(5, mu=1.7)
        assert torch.equal(plain.sigmas, given.sigmas) and torch.equal(plain.timesteps, given.timesteps)


@by_class
@pytest.mark.parametrize("terminal", [[0.0], []], ids=["with_terminal", "without"])
def test_sigma_list_of_vp(terminal, cls):
    """Euler and AYS lists include the terminal 0; without it one is added.  No evaluation is spent on it."""
    sigmas = [14.615, 6.475, 1.886, 0.399, 0.029]
    scheduler = cls(**VP)
    scheduler.set_timesteps(sigmas=sigmas + terminal)
    assert len(scheduler.timesteps) == 5
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*sigmas, 0.0]))


def test_sigma_list_of_vp_means_stock_timesteps():
    """Its timesteps are those of EulerDiscrete within the error of that class's rule (linear in log sigma)."""
    sigmas = [14.0, 6.475, 1.886, 0.399, 0.04]
    theirs, ours = diffusers.EulerDiscreteScheduler(**VP), ProbabilityFlowScheduler(**VP)
    theirs.set_timesteps(sigmas=[*sigmas, 0.0])
    ours.set_timesteps(sigmas=[*sigmas, 0.0])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), atol=0.02, rtol=1e-4)


@by_class
def test_timestep_list_of_vp(cls):
    """Custom timesteps have the noise levels of training."""
    times = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    scheduler = cls(**VP)
    scheduler.set_timesteps(timesteps=times)
    abar = diffusers.DDIMScheduler(**VP).alphas_cumprod.double()[times]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ((1 - abar) / abar).sqrt(), rtol=1e-5, atol=0)


@by_class
@pytest.mark.parametrize("settings", [{}, {"rho": 5.0}, {"sigma_schedule": "exponential"}], ids=str)
def test_ramp_of_edm(settings, cls):
    """EDM pipelines pass a ramp from 0 to 1 as ``sigmas``: the timesteps and sigmas of EDMEuler."""
    theirs = diffusers.EDMEulerScheduler(**settings)
    ours = cls.from_config(theirs.config)
    ramp = torch.linspace(0, 1, 9)
    theirs.set_timesteps(sigmas=ramp)
    ours.set_timesteps(sigmas=ramp)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


@by_class
@by_process
def test_written_sigma_takes_effect(process, cls):
    """``scheduler.sigmas[-1] = scheduler.sigmas[-2]`` before the first step: the last step goes nowhere (a corrector
    would still redo the step before it)."""
    options = {**process} if cls is DPMSolverScheduler else {**process, "corrector": False}
    scheduler = laid_out(cls, **options)
    scheduler.sigmas[-1] = scheduler.sigmas[-2]
    states = []
    end = loop(scheduler, randn(*SHAPE) * scheduler.init_noise_sigma, states=states)
    plain = laid_out(cls, **options)
    unchanged = loop(plain, randn(*SHAPE) * scheduler.init_noise_sigma)
    assert relative(end, unchanged) > (1e-6 if process is EDM else 1e-3)
    torch.testing.assert_close(end, states[-1], atol=1e-5, rtol=1e-5)


def test_written_sigma_is_the_step_to_that_level():
    """Any written sigma is where its step goes: a network that knows the data ends on the path at that level."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP, data_std=0.0)
    scheduler.sigmas[-1] = 0.05
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE)
    x = scheduler.add_noise(x0, eps, scheduler.timesteps[:1])
    alpha = 1 / math.hypot(1, 0.05)
    torch.testing.assert_close(
        loop(scheduler, x, point(scheduler, x0)), alpha * (x0 + 0.05 * eps), atol=1e-4, rtol=1e-4
    )


@by_class
def test_flow_timesteps_are_1000_sigma(cls):
    """As floats, not truncated to integers as in stock UniPC and DPM-Solver."""
    scheduler = laid_out(cls, 7, **FLOW)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()


@pytest.mark.parametrize(
    "config, mu",
    [
        ({"shift": 3.0}, None),
        ({"shift": 3.0, "use_dynamic_shifting": True}, 0.9),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.7),
        ({"shift": 3.0, "shift_terminal": 0.1}, None),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.8),
        ({"shift": 2.5, "invert_sigmas": True}, None),
    ],
    ids=str,
)
def test_shifts_of_given_sigmas_equal_stock(config, mu):
    """For given sigmas: static or dynamic shift, then stretched to the terminal, then inverted, as FlowMatchEuler."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    sigmas = np.linspace(1.0, 1 / 8, 8)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)


@by_class
def test_shift_is_applied_once(cls):
    """On the default grid sigma = shift u / (1 + (shift - 1) u) with u = 1, 7/8, ...; FlowMatchEuler shifts twice."""
    scheduler = laid_out(cls, 8, **FLOW, grid="trailing")
    u = torch.arange(8, 0, -1) / 8
    torch.testing.assert_close(scheduler.sigmas[:-1], 3 * u / (1 + 2 * u))


@by_class
def test_dynamic_shifting_needs_mu(cls):
    """Without ``mu`` a ValueError names it."""
    scheduler = cls(use_flow_sigmas=True, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu"):
        scheduler.set_timesteps(5)


@by_class
def test_timesteps_and_sigmas_together(cls):
    """The network sees ``timesteps``, the state has ``sigmas``."""
    scheduler = cls(**{**FLOW, "shift": 1.0})
    scheduler.set_timesteps(timesteps=[900.0, 400.0], sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == [900.0, 400.0]
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
    x, x0 = randn(*SHAPE), randn(*SHAPE, seed=1)
    out = scheduler.step(x - x0, scheduler.timesteps[0], x)  # at sigma = 1 the flow x - x0 says x0
    torch.testing.assert_close(out.pred_original_sample, x0, atol=1e-6, rtol=1e-6)


@by_class
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 0},
        {"timesteps": []},
        {"num_inference_steps": 5, "timesteps": [999, 500]},
        {"timesteps": [999, 500], "sigmas": [14.0, 3.0, 1.0]},
        {"timesteps": [100, 500, 999]},
        {"sigmas": [1.0, float("nan")]},
    ],
    ids=str,
)
def test_bad_layouts(arguments, cls):
    """No, empty, contradictory, rising or non-finite arguments raise ValueError."""
    with pytest.raises(ValueError):
        cls(**VP).set_timesteps(**arguments)


# -- coordinates --


@by_class
@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
def test_native_coordinates(process, cls):
    """VP and flow: start from unit noise, and the network sees the state itself."""
    scheduler, x = laid_out(cls, **process), randn(*SHAPE)
    assert scheduler.init_noise_sigma == 1.0
    assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[2]), x)
    assert torch.equal(scheduler.scale_model_input(x), x)


@by_class
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_preconditioning(name, kind, cls):
    """Timesteps, input scaling and data prediction are those of the EDM schedulers, at every step."""
    theirs = getattr(diffusers, name)(prediction_type=kind, sigma_max=70.0, sigma_data=0.6)
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    output = randn(*SHAPE, seed=3)
    for i, (mine, its) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        x = randn(*SHAPE, seed=i) * theirs.sigmas[i]
        torch.testing.assert_close(ours.scale_model_input(x, mine), theirs.scale_model_input(x, its))
        expected = theirs.precondition_outputs(x, output, theirs.sigmas[i])
        found = ours.step(output, mine, x, return_dict=False)[1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        theirs._step_index += 1


@by_class
def test_edm_initial_noise(cls):
    """The initial state has the standard deviation of the noised data, sqrt(sigma_max^2 + sigma_data^2)."""
    assert cls(**EDM).init_noise_sigma == pytest.approx(math.hypot(80.0, 0.5))


@by_class
def test_cosine_conditioning(cls):
    """CosineDPMSolver's networks see 2/pi atan(sigma)."""
    theirs = cosine_dpm_solver()()
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)


# -- indices --

SOLVERS = [
    (ProbabilityFlowScheduler, {"solver_order": 3}),
    (DPMSolverScheduler, {"solver_order": 3}),
    (DPMSolverScheduler, {"solver_order": 2, "singlestep": True}),
    (DPMSolverScheduler, {"solver_order": 3, "singlestep": True}),
    (ReverseSDEScheduler, {"noise_seed": 1}),
]
by_solver = pytest.mark.parametrize("cls, kwargs", SOLVERS, ids=lambda v: getattr(v, "__name__", str(v)))


@by_solver
def test_order_is_one(cls, kwargs):
    """Whatever the solver, one timestep is one evaluation, so that pipelines slice correctly."""
    scheduler = cls(**VP, **kwargs)
    assert cls.order == scheduler.order == 1


@by_solver
@by_process
def test_every_solver_is_finite(process, cls, kwargs):
    """Also from zero signal (flow matching) to clean data."""
    scheduler = laid_out(cls, 7, **process, **kwargs)
    assert loop(scheduler, randn(*SHAPE) * scheduler.init_noise_sigma).isfinite().all()


@by_solver
@by_process
def test_any_index_is_a_start(process, cls, kwargs):
    """``set_begin_index(k)`` is a run of its own over ``timesteps[k:]``: the order ramps up from one, the path of the
    noise apart, which is that of the whole run."""
    kwargs = kwargs | ({"tau": 0.0} if cls is ReverseSDEScheduler else {})
    scheduler, rest = laid_out(cls, 8, **process, **kwargs), cls(**process, **kwargs)
    x = randn(*SHAPE)
    for k in range(1, 8):
        start = x * (scheduler.sigmas[k] if process is EDM else 1)
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(k)
        found = loop(scheduler, start, start=k)
        assert scheduler.begin_index == k and scheduler.step_index == 8
        rest.set_timesteps(timesteps=scheduler.timesteps[k:])
        torch.testing.assert_close(found, loop(rest, start), atol=1e-5, rtol=1e-4)


@by_class
@by_process
def test_start_from_the_first_timestep(process, cls):
    """Pipelines that never set ``begin_index`` start where their first timestep is, with the same result."""
    scheduler, x = laid_out(cls, 8, **process), randn(*SHAPE)
    scheduler.set_begin_index(3)
    expected = loop(scheduler, x, start=3)
    for times in (lambda t: t, torch.clone, lambda t: t.to(torch.float64)):
        scheduler.set_timesteps(8)
        model, y = gaussian(scheduler), x
        for t in times(scheduler.timesteps)[3:]:
            y = scheduler.step(model(y, t), t, y, return_dict=False)[0]
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@by_class
def test_duplicate_timesteps(cls):
    """A timestep may occur twice: every step has its own index, and the empty step changes nothing but by what a
    corrector learns there."""
    scheduler, x = cls(**VP), randn(*SHAPE)
    scheduler.set_timesteps(timesteps=[999, 600, 600, 200])
    model = gaussian(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        before = x
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        assert scheduler.step_index == i + 1
        if i == 1 and cls is DPMSolverScheduler:
            assert torch.equal(x, before)
    assert x.isfinite().all()


@by_class
@pytest.mark.parametrize("k", [1, 2])
def test_start_at_a_duplicate(k, cls):
    """A slice of ``timesteps`` that starts at the first or the second of two equal ones starts just there."""
    scheduler, x = cls(**VP), randn(*SHAPE)
    scheduler.set_timesteps(timesteps=[999, 600, 600, 200])
    loop(scheduler, x, start=k, stop=k + 1)
    assert scheduler.step_index == k + 1


def noised(scheduler, alpha, sigma):
    return alpha * randn(*SHAPE, seed=1) + sigma * randn(*SHAPE, seed=2)


def noise_both(scheduler, t):
    """``add_noise``, after checking that ``scale_noise`` is the same with its arguments in the other order."""
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    out = scheduler.add_noise(x0, eps, t)
    assert torch.equal(out, scheduler.scale_noise(x0, t, eps))
    return out


def level(scheduler, i):
    """(alpha, sigma) of grid index ``i`` from the public sigmas."""
    s = float(scheduler.sigmas[i])
    if scheduler.config.use_flow_sigmas:
        return 1 - s, s
    return (1.0, s) if scheduler.config.sigma_data else (1 / math.hypot(1, s), s / math.hypot(1, s))


@by_class
@by_process
def test_noise_while_stepping(process, cls):
    """Inpainting: once stepping, noise is that of the row reached, whatever timestep is passed."""
    scheduler = laid_out(cls, **process)
    scheduler.set_begin_index(1)
    loop(scheduler, randn(*SHAPE), start=1, stop=3)
    expected = noised(scheduler, *level(scheduler, 3))
    torch.testing.assert_close(noise_both(scheduler, scheduler.timesteps[5:6]), expected, rtol=1e-5, atol=1e-5)


@by_class
@by_process
def test_noise_at_the_start(process, cls):
    """Image to image: before the first step, noise is that of ``begin_index``, whatever timestep is passed."""
    scheduler = laid_out(cls, **process)
    scheduler.set_begin_index(2)
    expected = noised(scheduler, *level(scheduler, 2))
    torch.testing.assert_close(noise_both(scheduler, scheduler.timesteps[4:5]), expected, rtol=1e-5, atol=1e-5)


@by_class
def test_noise_on_the_grid(cls):
    """Without either index the timestep is looked up in the grid, which need not be that of training."""
    scheduler = cls(use_flow_sigmas=True)
    scheduler.set_timesteps(timesteps=[900.0, 400.0], sigmas=[0.8, 0.5])
    for i in range(2):
        expected = noised(scheduler, *level(scheduler, i))
        torch.testing.assert_close(noise_both(scheduler, scheduler.timesteps[i : i + 1]), expected)


@by_class
@by_process
def test_noise_off_the_grid(process, cls):
    """A timestep that is not on the grid, one number or one a sample, is evaluated on the path."""
    scheduler = laid_out(cls, **process)
    times = torch.tensor([0.8, 0.1]) if process is EDM else torch.tensor([123.4, 801.0])
    alpha, sigma = (
        torch.from_numpy(v).float().reshape(-1, 1, 1, 1) for v in scheduler.path.alpha_sigma(times.double().numpy())
    )
    torch.testing.assert_close(noise_both(scheduler, times), noised(scheduler, alpha, sigma), rtol=1e-5, atol=1e-5)


@by_class
def test_noise_in_training(cls):
    """Before ``set_timesteps``, with a timestep per sample: DDPM's ``add_noise`` and ``get_velocity``."""
    theirs, ours = diffusers.DDPMScheduler(**VP), cls(**VP)
    x0, eps, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([3, 871])
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t))
    torch.testing.assert_close(ours.get_velocity(x0, eps, t), theirs.get_velocity(x0, eps, t))


@by_class
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_keeps_dtype(dtype, cls):
    """Half precision latents stay half precision, at a grid index and at a timestep."""
    scheduler, x = laid_out(cls, **VP), randn(*SHAPE, dtype=torch.float64).to(dtype)
    assert scheduler.add_noise(x, x, torch.tensor([7])).dtype == dtype
    scheduler.set_begin_index(1)
    assert scheduler.add_noise(x, x, scheduler.timesteps[1:2]).dtype == dtype


# -- config --

# fmt: off
KEYS = [
    "num_train_timesteps", "prediction_type", "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift",
    "use_dynamic_shifting", "use_flow_sigmas", "final_sigmas_type", "variance_type", "steps_offset", "clip_sample",
    "sigma_data", "sigma_max", "snr_shift_scale", "beta_start", "beta_end", "beta_schedule", "trained_betas", "shift",
]
# fmt: on
OPTIONAL_KEYS = ["stochastic_sampling", "original_inference_steps", "timestep_spacing", "skip_prk_steps"]


@by_class
def test_keys_are_readable(cls):
    """Every config key that pipelines read unguarded is there; the others are answered by ``config.get``."""
    config = cls().config
    assert all(hasattr(config, key) for key in KEYS)
    assert all(config.get(key) is None for key in OPTIONAL_KEYS)


@by_class
def test_config_is_read_lazily(cls):
    """Pipelines replace ``_internal_dict`` after construction: the new values count."""
    scheduler = cls(**VP)
    scheduler._internal_dict = FrozenDict({**scheduler.config, "prediction_type": "v_prediction"})
    expected = one_step(laid_out(cls, **VP, prediction_type="v_prediction"))
    scheduler.set_timesteps(6)
    assert torch.equal(one_step(scheduler).prev_sample, expected.prev_sample)


@by_class
def test_registered_config_is_read_lazily(cls):
    """So do values changed with ``register_to_config``, the process itself included."""
    scheduler = laid_out(cls, **VP)
    scheduler.register_to_config(use_flow_sigmas=True, prediction_type="flow_prediction", shift=3.0)
    scheduler.set_timesteps(6)
    assert torch.equal(scheduler.sigmas, laid_out(cls, **FLOW).sigmas)
    expected = one_step(laid_out(cls, **FLOW)).prev_sample
    assert torch.equal(one_step(scheduler).prev_sample, expected)


# fmt: off
VP_CLASSES = [
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler", "DDIMParallelScheduler",
    "DDPMParallelScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler", "UnCLIPScheduler",
]
# fmt: on
# fmt: off
FLOW_CLASSES = [
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "SASolverScheduler",
]
# fmt: on
EDM_CLASSES = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"]
CONFIGS = {
    "default": {},
    "sd": {**VP, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True},
    "sdxl": {
        **VP,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
    },
    "sd2": {**VP, "prediction_type": "v_prediction"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    "trained": {"trained_betas": np.linspace(0.001, 0.03, 200).tolist(), "num_train_timesteps": 200},
}


def stock_class(name):
    return cosine_dpm_solver() if name.startswith("Cosine") else getattr(diffusers, name)


def accepted(name, kwargs):
    """The part of ``kwargs`` that the class knows."""
    known = set(inspect.signature(stock_class(name).__init__).parameters)
    if name == "UnCLIPScheduler":
        known.remove("beta_schedule")  # it has but one
    return {k: v for k, v in kwargs.items() if k in known}


def made(name, how, kwargs):
    """A stock scheduler, constructed directly or loaded: `from_config` marks keys that were not in the file."""
    kwargs = accepted(name, kwargs)
    return stock_class(name)(**kwargs) if how == "direct" else stock(name, **kwargs)


how = pytest.mark.parametrize("how", ["direct", "loaded"])
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


PROCESS_KEYS = "prediction_type", "num_train_timesteps", "beta_schedule", "clip_sample", "variance_type"


def same_alphas(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod.float(), **tolerance)


@how
@by_config
@pytest.mark.parametrize("name", VP_CLASSES)
def test_process_of_stock(name, config, how):
    """From any VP class: the same alphas_cumprod, number of timesteps and prediction type."""
    theirs = made(name, how, config)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    same_alphas(ours, theirs, rtol=2e-5, atol=1e-6)
    assert ours.config.prediction_type == theirs.config.prediction_type
    assert len(ours) == theirs.config.num_train_timesteps
    assert not ours.config.use_flow_sigmas


@pytest.mark.parametrize("name", [n for n in VP_CLASSES if accepted(n, {"rescale_betas_zero_snr": 1})])
def test_zero_terminal_snr_of_stock(name):
    """``rescale_betas_zero_snr`` is taken over; Euler and UniPC then move the last value off zero, we do not."""
    theirs = made(name, "loaded", {**VP, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    assert ours.alphas_cumprod[-1] == 0
    torch.testing.assert_close(
        ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1].float(), rtol=1e-3 if "snr" in name else 2e-4, atol=1e-6
    )


@how
@pytest.mark.parametrize("name", FLOW_CLASSES)
def test_flow_process_of_stock(name, how):
    """From any flow class: flow prediction, the same shift, recognised without a ``prediction_type``."""
    kwargs = {"shift": 2.5, "flow_shift": 2.5, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    theirs = made(name, how, kwargs)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    assert ours.config.prediction_type == "flow_prediction" and ours.config.use_flow_sigmas
    ours.set_timesteps(sigmas=[1.0, 0.5])
    torch.testing.assert_close(ours.sigmas, torch.tensor([1.0, 2.5 * 0.5 / (1 + 1.5 * 0.5), 0.0]))


@pytest.mark.parametrize("name", EDM_CLASSES)
@pytest.mark.parametrize("kwargs", [{}, {"sigma_min": 0.1, "sigma_max": 300.0, "sigma_data": 0.7}], ids=str)
def test_edm_process_of_stock(name, kwargs):
    """From any EDM class: sigma_min, sigma_max, sigma_data and the prediction type."""
    theirs = made(name, "loaded", kwargs)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    for key in ("sigma_min", "sigma_max", "sigma_data", "prediction_type"):
        assert ours.config[key] == theirs.config[key]
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


@by_config
@pytest.mark.parametrize("name", VP_CLASSES)
def test_there_and_back(name, config):
    """A -> ours -> A keeps alphas_cumprod, prediction type and every process key of A, through each of our classes."""
    for before in (made(name, how, config) for how in ("direct", "loaded")):
        for cls in CLASSES:
            after = type(before).from_config(cls.from_config(before.config).config)
            same_alphas(after, before, rtol=0, atol=0)
            for key in accepted(name, dict.fromkeys(PROCESS_KEYS)):
                assert after.config[key] == before.config[key], key


@how
@by_class
@pytest.mark.parametrize("name", FLOW_CLASSES)
def test_flow_there_and_back(name, cls, how):
    """The same for flow matching: the sigmas of a run are the same afterwards."""
    kwargs = {"shift": 2.5, "flow_shift": 2.5, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    before = made(name, how, kwargs)
    after = type(before).from_config(cls.from_config(before.config).config)
    for scheduler in (before, after):
        scheduler.set_timesteps(6)
    assert torch.equal(after.sigmas, before.sigmas) and torch.equal(after.timesteps, before.timesteps)


@by_class
@pytest.mark.parametrize("name", EDM_CLASSES)
def test_edm_there_and_back(name, cls):
    """The same for EDM."""
    before = made(name, "loaded", {"sigma_max": 70.0})
    after = type(before).from_config(cls.from_config(before.config).config)
    for scheduler in (before, after):
        scheduler.set_timesteps(6)
    assert torch.equal(after.sigmas, before.sigmas)


@by_class
@pytest.mark.parametrize("target", ["LCMScheduler", "TCDScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("source", ["LCMScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler"])
def test_defaults_of_the_source_count(source, target, cls):
    """A default of the source (beta_start 1e-4 or 8.5e-4) survives the way through ours into a class whose own default
    differs; diffusers alone would take the target's."""
    before = stock(source)
    after = stock_class(target).from_config(cls.from_config(before.config).config)
    if source.startswith("CogVideoX"):  # the target knows no snr_shift_scale, but the betas arrive
        assert (after.config.beta_start, after.config.beta_schedule) == (0.00085, "scaled_linear")
    else:
        same_alphas(after, before, rtol=0, atol=0)


@by_class
def test_config_between_ours(cls):
    """From ours to ours, other classes included, everything shared is kept."""
    kwargs = {**VP, "clip_sample": True, "grid": "karras", "rho": 5.0, "prediction_type": "v_prediction"}
    for other in CLASSES:
        config = other.from_config(cls(**kwargs).config).config
        assert {k: config[k] for k in kwargs} == kwargs


@by_class
def test_config_without_class_name(cls):
    """Directly constructed schedulers have no ``_class_name``: what their keys say is enough."""
    theirs = diffusers.DDIMScheduler(**VP)
    config = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    same_alphas(cls.from_config(config), theirs, rtol=2e-5, atol=1e-6)
    config = {k: v for k, v in diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config.items() if k[0] != "_"}
    assert cls.from_config(config).config.prediction_type == "flow_prediction"
    config = {k: v for k, v in diffusers.EDMEulerScheduler().config.items() if k[0] != "_"}
    assert cls.from_config(config).init_noise_sigma > 70


@by_class
@pytest.mark.parametrize("name", ["LCMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "UnCLIPScheduler"])
def test_json_without_defaults(name, cls):
    """A ``scheduler_config.json`` that leaves defaults out means the defaults of the class it names."""
    config = json.loads(json.dumps({"_class_name": name, "_diffusers_version": "0.30.0"}))
    same_alphas(cls.from_config(config), stock(name), rtol=2e-5, atol=1e-6)


@by_class
def test_from_config_changes(cls):
    """Keywords of ``from_config`` go before the config, and the config passed in is left alone."""
    config = stock("DDIMScheduler", **VP).config
    before = dict(config)
    scheduler = cls.from_config(config, prediction_type="v_prediction", use_karras_sigmas=True)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas[:-1] ** (1 / 7)
    torch.testing.assert_close(levels.diff(), levels.diff().mean().expand(4), rtol=1e-3, atol=1e-4)
    assert dict(config) == before


OTHER_KINDS = {
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "AmusedScheduler": {"mask_token_id": 3},
    "CMStochasticIterativeScheduler": {},
    "SCMScheduler": {},
    "ScoreSdeVeScheduler": {},
    "KarrasVeScheduler": {},
    "IPNDMScheduler": {},
    "DDPMWuerstchenScheduler": {},
    "LTXEulerAncestralRFScheduler": {},  # flow matching, but its config does not say so
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_config_of_another_kind(name):
    """What has no Gaussian diffusion, or one that is not ours, is refused, not misread as DDPM's."""
    config = getattr(diffusers, name)(**OTHER_KINDS[name]).config
    with pytest.raises(ValueError):
        ProbabilityFlowScheduler.from_config({"_class_name": name, **config})


@by_class
def test_compatibles(cls):
    """Not empty (diffusers fails on an empty list), and real classes, ours and stock."""
    compatibles = cls().compatibles
    assert cls in compatibles and diffusers.DDIMScheduler in compatibles
    assert all(issubclass(c, diffusers.SchedulerMixin) for c in compatibles)


@by_class
@pytest.mark.parametrize("kwargs", [{}, VP, {"beta_schedule": "squaredcos_cap_v2"}], ids=str)
def test_betas(kwargs, cls):
    """``betas``, ``alphas`` and ``alphas_cumprod`` are DDPM's."""
    theirs, ours = diffusers.DDPMScheduler(**kwargs), cls(**kwargs)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(ours.alphas, theirs.alphas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)


@by_class
def test_trained_betas(cls):
    """SchedulerCommonTest: given betas are the betas, as a list and as an array."""
    for betas in ([0.1, 0.3, 0.5], np.array([0.1, 0.3, 0.5])):
        scheduler = cls(trained_betas=betas, num_train_timesteps=3)
        torch.testing.assert_close(scheduler.betas, torch.tensor([0.1, 0.3, 0.5]), rtol=1e-6, atol=0)


@by_class
def test_vp_attributes_elsewhere(cls):
    """A flow scheduler has no ``alphas_cumprod`` or ``betas``: ``hasattr`` says so, as pipelines ask."""
    assert not any(hasattr(cls(**FLOW), name) for name in ("alphas_cumprod", "alphas", "betas"))


@by_class
@by_process
def test_step_shape(process, cls):
    """SchedulerCommonTest: steps keep the shape, for images, sequences, video and single numbers."""
    for shape in [(2, 4, 8, 8), (1, 16, 6), (1, 3, 2, 4, 4), (3, 1)]:
        scheduler = laid_out(cls, 3, **process)
        x = randn(*shape)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
            assert x.shape == shape and x.isfinite().all()


@by_class
@by_process
def test_run_without_generator(process, cls):
    """SchedulerCommonTest: neither ``set_timesteps`` nor ``step`` needs a generator; inputs are left as they were."""
    scheduler, x = laid_out(cls, **process), randn(*SHAPE)
    t = scheduler.timesteps[0]
    output = gaussian(scheduler)(x, t)
    copies = x.clone(), output.clone()
    scheduler.step(output, t, x)
    assert torch.equal(x, copies[0]) and torch.equal(output, copies[1])


@pytest.mark.parametrize(
    "cls, kwargs",
    [
        (ProbabilityFlowScheduler, {}),
        (ProbabilityFlowScheduler, {"data_std": math.inf}),
        (ProbabilityFlowScheduler, {"data_std": 0.5, "prediction_type": "v_prediction"}),
        (ReverseSDEScheduler, {"prediction_type": "sample"}),
        (DPMSolverScheduler, {"algorithm_type": "dpmsolver"}),
    ],
    ids=str,
)
def test_nothing_is_shared_with_the_caller(cls, kwargs):
    """Pipelines write into the latents and outputs they hold: that must not reach the stored evaluations."""
    results = []
    for touch in (False, True):
        scheduler, x = laid_out(cls, **VP, **kwargs), randn(*SHAPE)
        model = gaussian(scheduler)
        for t in scheduler.timesteps:
            output = model(x, t)
            y, x0 = scheduler.step(output, t, x, return_dict=False)
            if touch:
                y = y.clone()
                for tensor in (output, x, x0):
                    tensor.fill_(7.0)
            x = y
        results.append(x)
    assert torch.equal(*results)


@by_class
@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variance_is_split(kind, cls):
    """Of an output with twice the channels the first half is the prediction."""
    expected = one_step(laid_out(cls, **VP)).prev_sample
    scheduler, x = laid_out(cls, **VP, variance_type=kind), randn(*SHAPE)
    t = scheduler.timesteps[0]
    output = torch.cat([gaussian(scheduler)(x, t), randn(*SHAPE, seed=4)], 1)
    assert torch.equal(scheduler.step(output, t, x).prev_sample, expected)


@by_class
def test_other_shapes_are_refused(cls):
    """Twice the channels without a learned variance, or any other shape: the error names shapes and remedy."""
    scheduler, x = laid_out(cls, **VP), randn(*SHAPE)
    with pytest.raises(ValueError, match="variance_type"):
        scheduler.step(randn(2, 8, 8, 8), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        scheduler.step(randn(2, 3, 8, 8), scheduler.timesteps[0], x)


# -- save and load --


@by_class
@by_process
def test_save_and_load(process, cls, tmp_path):
    """``save_pretrained`` and ``from_pretrained`` restore class, config and results, changed settings included."""
    kwargs = {"solver_order": 1, "grid": "linspace", "clip_sample": True, "trained_betas": [0.01, 0.02, 0.03]}
    for scheduler in (cls(**process), cls(**{**process, **kwargs})):
        scheduler.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path)
        assert type(again) is cls
        drop = {"_use_default_values", "_diffusers_version", "_class_name"}
        assert {k: v for k, v in again.config.items() if k not in drop} == {
            k: v for k, v in scheduler.config.items() if k not in drop
        }
        n = min(3, len(scheduler))
        assert torch.equal(sample(again, randn(*SHAPE), n), sample(scheduler, randn(*SHAPE), n))


@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler])
def test_infinite_data_std_is_saved(cls, tmp_path):
    """data_std = inf (noise prediction) survives the way through JSON."""
    cls(data_std=math.inf).save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.data_std == math.inf


@by_class
def test_saved_config_loads_into_stock(cls, tmp_path):
    """A stock class reads our file: same process."""
    scheduler = cls(**VP, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    again = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path)
    same_alphas(again, scheduler, rtol=2e-5, atol=1e-6)
    assert again.config.prediction_type == "v_prediction"


@by_class
def test_stock_folder_loads_into_ours(cls, tmp_path):
    """``from_pretrained`` on a stock scheduler's folder converts it."""
    diffusers.LCMScheduler().save_pretrained(tmp_path)
    same_alphas(cls.from_pretrained(tmp_path), diffusers.LCMScheduler(), rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_pipeline_loads_in_a_fresh_process(tmp_path):
    """``DiffusionPipeline.from_pretrained`` after ``import diffusers_sde`` restores scheduler and mixture: the same
    picture, bit for bit."""
    d = 3 * 4 * 4
    model = GaussianMixtureModel([0.5, 0.5], [[0.4] * d, [-0.4] * d], [0.01, 0.01], in_channels=3, sample_size=4)
    expected = {}
    for cls in CLASSES:
        pipe = diffusers.DDPMPipeline(model, cls(**VP))
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / cls.__name__)
        image = pipe(batch_size=2, generator=seeded(), num_inference_steps=4, output_type="np").images
        expected[cls.__name__] = np.asarray(image).tobytes().hex()
    script = """if True:
        import json, sys, torch
        import diffusers_sde
        from diffusers import DiffusionPipeline
        out = {}
        for name in sys.argv[2:]:
            pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}")
            assert type(pipe.scheduler) is getattr(diffusers_sde, name), type(pipe.scheduler)
            assert type(pipe.unet) is diffusers_sde.GaussianMixtureModel, type(pipe.unet)
            generator = torch.Generator().manual_seed(0)
            image = pipe(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
            out[name] = image.tobytes().hex()
        print(json.dumps(out))
    """
    assert json.loads(in_fresh_process(script, tmp_path, *expected).splitlines()[-1]) == expected


# -- limits on the data prediction --

LIMITS = [
    {"clip_sample": True, "clip_sample_range": 1.0},
    {"clip_sample": True, "clip_sample_range": 0.6},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
    {"thresholding": True, "clip_sample": True, "sample_max_value": 2.0},
]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_equal_ddim(limits, kind):
    """Clipping and dynamic thresholding give DDIM's data prediction and, at first order, DDIM's step, to the end."""
    limits = {"clip_sample": False, **limits}
    theirs = diffusers.DDIMScheduler(**VP, **limits, prediction_type=kind, timestep_spacing="trailing")
    ours = ProbabilityFlowScheduler.from_config(theirs.config, **FIRST_ORDER, data_std=0.0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
    assert torch.equal(ours.timesteps, theirs.timesteps.float())
    x = randn(*SHAPE)
    for i, t in enumerate(theirs.timesteps):
        output = randn(*SHAPE, seed=i + 1)
        # DDIM keeps the unlimited noise unless told otherwise: with it the step is not a point of the path
        expected = theirs.step(output, t, x, use_clipped_model_output=True)
        found = ours.step(output, ours.timesteps[i], x)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        if i < 7:  # DDIM's last step goes to its first training timestep, or to clean data
            torch.testing.assert_close(found.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
        x = expected.prev_sample


@by_class
@by_process
def test_clipping_holds_in_every_class(process, cls):
    """With ``clip_sample`` no data prediction leaves the range, and the last sample is one."""
    scheduler = laid_out(cls, **process, clip_sample=True, clip_sample_range=0.3)
    x = randn(*SHAPE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(gaussian(scheduler)(x, t), t, x, return_dict=False)
        assert x0.abs().max() <= 0.3 * (1 + 1e-5)


@by_class
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(kind, cls):
    """Zero terminal SNR from its first timestep on is finite and right: a network that knows the data finds it."""
    final = {} if cls is DPMSolverScheduler else {"final": "denoise"}
    scheduler = laid_out(cls, 8, **VP, rescale_betas_zero_snr=True, prediction_type=kind, **final)
    assert scheduler.timesteps[0] == 999
    x0 = randn(*SHAPE, seed=1)
    torch.testing.assert_close(loop(scheduler, randn(*SHAPE), point(scheduler, x0)), x0, atol=1e-4, rtol=1e-4)


@by_class
def test_epsilon_at_zero_terminal_snr(cls):
    """There epsilon says nothing about the data: a ValueError that names the remedies instead of NaN."""
    scheduler = laid_out(cls, 8, **VP, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="v_prediction"):
        scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE))


@by_class
def test_epsilon_below_zero_terminal_snr(cls):
    """From a first timestep below it, epsilon prediction works."""
    scheduler = cls(**VP, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(timesteps=[980, 700, 400, 100])
    assert loop(scheduler, randn(*SHAPE)).isfinite().all()


def test_fixed_small_is_the_posterior_variance():
    """The first-order reverse SDE has DDPM's mean and fixed_small variance."""
    theirs = diffusers.DDPMScheduler(**VP, clip_sample=False, timestep_spacing="trailing")
    compare_with_ddpm(theirs)


def test_fixed_large():
    """With ``variance_type="fixed_large"`` it has DDPM's fixed_large variance."""
    theirs = diffusers.DDPMScheduler(**VP, clip_sample=False, timestep_spacing="trailing", variance_type="fixed_large")
    compare_with_ddpm(theirs)


def compare_with_ddpm(theirs):
    ours = ReverseSDEScheduler.from_config(theirs.config, **FIRST_ORDER, data_std=0.0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for i, t in enumerate(theirs.timesteps[:-1]):
        found = ours.step(output, ours.timesteps[i], x)
        assert found.noise_std == pytest.approx(float(theirs._get_variance(t)) ** 0.5, rel=1e-4)
        draws = [theirs.step(output, t, x, generator=seeded()).prev_sample]
        noise = torch.randn(SHAPE, generator=seeded())
        torch.testing.assert_close(found.prev_sample_mean, draws[0] - found.noise_std * noise, atol=1e-4, rtol=1e-4)


# -- bugs of others --


def test_cosine_betas_with_karras_grid():
    """diffusers 12771: cosine betas and a Karras grid give duplicate integer timesteps, and stock crashes there."""
    kwargs = {"beta_schedule": "squaredcos_cap_v2"}
    theirs = diffusers.DPMSolverMultistepScheduler(**kwargs, use_karras_sigmas=True)
    theirs.set_timesteps(30)
    assert len(theirs.timesteps.unique()) < 30
    ours = laid_out(ProbabilityFlowScheduler, 30, **kwargs, grid="karras")
    assert len(ours.timesteps.unique()) == 30
    assert loop(ours, randn(*SHAPE)).isfinite().all()


@by_class
def test_float_timesteps_are_found(cls):
    """diffusers 11749, 10584: a float timestep that was rounded on its way is not found; ours is."""
    scheduler = laid_out(cls, 7, **FLOW)
    rounded = scheduler.timesteps.to(torch.bfloat16)
    assert (rounded.float() != scheduler.timesteps).any()
    x = randn(*SHAPE)
    for i, t in enumerate(rounded[2:]):
        x = scheduler.step(randn(*SHAPE, seed=i), t, x, return_dict=False)[0]
        assert scheduler.step_index == i + 3


@pytest.mark.parametrize("cls", [DPMSolverScheduler, ProbabilityFlowScheduler])
def test_sigmas_with_dpm_solver_on_flow_models(cls):
    """diffusers 12108: flow pipelines cannot hand their sigmas to DPM-Solver++; to ours they can."""
    theirs = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="sigmas"):
        retrieve_timesteps(theirs, None, "cpu", sigmas=[1.0, 0.5])
    ours = cls.from_config(theirs.config)
    assert retrieve_timesteps(ours, None, "cpu", sigmas=[1.0, 0.5])[1] == 2
    assert loop(ours, randn(*SHAPE)).isfinite().all()


def test_float64_samples():
    """Stock UniPC crashes on float64 samples of a float32 network (noise prediction, order 3); nothing here does."""
    theirs = diffusers.UniPCMultistepScheduler(**VP, solver_order=3, predict_x0=False)
    theirs.set_timesteps(6)
    x = randn(*SHAPE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Double"):
        for t in theirs.timesteps:
            theirs.step(x.float(), t, x)
    for cls, kwargs in SOLVERS:
        scheduler = laid_out(cls, **VP, **kwargs)
        y = loop(scheduler, x, lambda x, t: 0.1 * x.float())
        assert y.dtype == torch.float64 and y.isfinite().all()


def test_flow_timesteps_are_not_truncated():
    """Stock UniPC and DPM-Solver truncate flow timesteps to integers while the state has the exact sigma."""
    kwargs = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    theirs = diffusers.UniPCMultistepScheduler(**kwargs)
    theirs.set_timesteps(7)
    assert (theirs.timesteps - 1000 * theirs.sigmas[:-1]).abs().max() > 0.1
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    ours.set_timesteps(7)
    assert (ours.timesteps - 1000 * ours.sigmas[:-1]).abs().max() < 1e-4


def test_trained_betas_are_not_shared():
    """Schedulers built from one config do not share mutable state: a copy runs on after the original has changed."""
    scheduler = ProbabilityFlowScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    twin = copy.deepcopy(scheduler)
    scheduler.register_to_config(trained_betas=[0.3, 0.4, 0.5])
    torch.testing.assert_close(twin.betas, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(scheduler.betas, torch.tensor([0.3, 0.4, 0.5]))
