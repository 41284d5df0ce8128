"""The config is what it is now: what is changed on a scheduler counts from the next run, or the next step, on."""

import pytest
import torch
from contract_helpers import EDM, FLOW, VP, by_class, by_every, laid_out, loop, point, randn

from diffusers_sde import DPMSolverScheduler, FlowMapScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

SHAPE = (2, 4, 8, 8)


def run(scheduler, n=6, x=None):
    """The end of a run of a network that always says the same, so that every setting shows."""
    scheduler.set_timesteps(n)
    x = randn(*SHAPE) if x is None else x
    output = 0.3 * randn(*SHAPE, seed=4)
    return loop(scheduler, x * scheduler.init_noise_sigma, lambda x, t: output)


CHANGES = [
    (ProbabilityFlowScheduler, VP, {"prediction_type": "v_prediction"}),
    (ProbabilityFlowScheduler, VP, {"clip_sample": True, "clip_sample_range": 0.4}),
    (ProbabilityFlowScheduler, VP, {"thresholding": True}),
    (ProbabilityFlowScheduler, VP, {"solver_order": 3}),
    (ProbabilityFlowScheduler, VP, {"corrector": False}),
    (ProbabilityFlowScheduler, VP, {"data_std": 0.3}),
    (ProbabilityFlowScheduler, VP, {"clock": "angle"}),
    (ProbabilityFlowScheduler, VP, {"grid": "karras"}),
    (ProbabilityFlowScheduler, VP, {"beta_schedule": "linear"}),
    (ProbabilityFlowScheduler, VP, {"beta_end": 0.02}),
    (ProbabilityFlowScheduler, VP | {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}),
    (ProbabilityFlowScheduler, VP, {"final_sigmas_type": "sigma_min"}),
    (ProbabilityFlowScheduler, VP, {"round_timesteps": True}),
    (ProbabilityFlowScheduler, FLOW, {"shift": 7.0}),
    (ProbabilityFlowScheduler, EDM, {"sigma_max": 40.0}),
    (ProbabilityFlowScheduler, EDM, {"sigma_data": 1.0}),
    (ReverseSDEScheduler, VP, {"tau": 0.5}),
    (ReverseSDEScheduler, VP, {"eta": 0.3}),
    (ReverseSDEScheduler, VP, {"noise_seed": 5}),
    (DPMSolverScheduler, VP, {"algorithm_type": "dpmsolver"}),
    (DPMSolverScheduler, VP, {"solver_type": "midpoint"}),
    (DPMSolverScheduler, VP, {"singlestep": True}),
    (FlowMapScheduler, VP, {"gamma": 0.3}),
]
by_change = pytest.mark.parametrize(
    "cls, process, changes", CHANGES, ids=lambda v: getattr(v, "__name__", None) or str(v)
)


@by_change
def test_a_change_after_a_run_counts(cls, process, changes):
    """After a run, attributes of the config are set; the next run is that of a scheduler built with them."""
    scheduler = cls(**process)
    before = run(scheduler)
    for key, value in changes.items():
        setattr(scheduler.config, key, value)
    expected = run(cls(**{**process, **changes}))
    assert torch.equal(run(scheduler), expected)
    assert not torch.equal(before, expected)


@by_class
def test_a_change_in_mid_run_counts(cls):
    """From the next step on: a network that knows the data still finds it after its prediction type has changed."""
    final = {} if cls is DPMSolverScheduler else {"final": "denoise"}
    scheduler, x0 = laid_out(cls, **VP, **final), randn(*SHAPE, seed=1)
    x = loop(scheduler, randn(*SHAPE), point(scheduler, x0), stop=3)
    scheduler.config.prediction_type = "v_prediction"
    torch.testing.assert_close(loop(scheduler, x, point(scheduler, x0), start=3), x0, atol=2e-4, rtol=1e-4)


def test_flow_shift_is_the_shift():
    """The key of diffusers' beta-based classes for the same thing, changed on a converted config."""
    import diffusers

    config = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ).config
    scheduler = ProbabilityFlowScheduler.from_config(config)
    scheduler.config.flow_shift = 7.0
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 3.5 / (1 + 3), 0.0]))


@pytest.mark.parametrize(
    "cls, changes, name",
    [
        (ReverseSDEScheduler, {"tau": 5.0}, "tau"),
        (ReverseSDEScheduler, {"tau": -0.1}, "tau"),
        (ReverseSDEScheduler, {"tau": [1.0, 9.0]}, "tau"),
        (ReverseSDEScheduler, {"eta": 1.5}, "eta"),
        (ProbabilityFlowScheduler, {"solver_order": 7}, "solver_order"),
        (ProbabilityFlowScheduler, {"clock": "moon"}, "clock"),
        (ProbabilityFlowScheduler, {"final": "never"}, "final"),
        (ProbabilityFlowScheduler, {"data_std": -1.0}, "data_std"),
        (ProbabilityFlowScheduler, {"prediction_type": "noise"}, "prediction_type"),
        (ProbabilityFlowScheduler, {"final_sigmas_type": "one"}, "final_sigmas_type"),
        (ProbabilityFlowScheduler, {"grid": "moon"}, "grid"),
        (DPMSolverScheduler, {"algorithm_type": "euler"}, "algorithm_type"),
        (FlowMapScheduler, {"gamma": 2.0}, "gamma"),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["built", "changed"])
def test_a_value_that_does_not_exist_is_refused_before_any_work(cls, changes, name, when):
    """When the scheduler is built, or, if it is changed later, when the run is laid out: one sentence that names it."""
    if when == "built":
        with pytest.raises(ValueError, match=name):
            cls(**VP, **changes)
        return
    scheduler = cls(**VP)
    for key, value in changes.items():
        setattr(scheduler.config, key, value)
    with pytest.raises(ValueError, match=name):
        scheduler.set_timesteps(4)


@by_every
@pytest.mark.parametrize("steps", [0, -3, 2.5, 20.0, "7", True, float("nan")], ids=repr)
def test_a_number_of_steps_that_is_none(cls, steps):
    """Floats, negative numbers and others are refused in one sentence."""
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number"):
        cls(**VP).set_timesteps(steps)
