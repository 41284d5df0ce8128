"""Configs of diffusers' schedulers: the process they describe, there and back, and what is refused."""

import inspect
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import (
    CLASSES,
    FLOW,
    SHAPE,
    VP,
    by_class,
    by_process,
    gaussian,
    laid_out,
    one_step,
    randn,
    same_alphas,
)
from diffusers.configuration_utils import FrozenDict
from tiny_pipelines import cosine_dpm_solver, stock

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

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
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
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
