"""What diffusers' own `SchedulerCommonTest` asks of every scheduler, asked of all five: that test file is not in the
wheel, so its checks stand here in our words. `CONTROL` is a stock scheduler, which passes them."""

import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import PROCESSES, VP, by_process, randn
from five_schedulers import FIVE, build

from diffusers_sde import CalibratedScheduler, FlowMapScheduler

CONTROL = diffusers.DPMSolverMultistepScheduler
STEPS = 10
SAMPLE = randn(4, 3, 8, 8)
by_class = pytest.mark.parametrize("cls", [*FIVE, CONTROL], ids=lambda cls: cls.__name__)
# Settings of each scheduler that are not its defaults.
CHANGES = [
    {"beta_start": 0.002, "beta_end": 0.03},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "v_prediction"},
    {"num_train_timesteps": 200},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"steps_offset": 1, "timestep_spacing": "leading"},
]


def make(cls, process=VP, **changes):
    if cls is CONTROL:
        return cls(**{**process, **changes})
    spacing = changes.pop("timestep_spacing", None)
    if spacing and cls is not CalibratedScheduler:
        changes["grid"] = spacing
    return build(cls, {**process, **changes}, (STEPS, 20))


def output_of(scheduler, steps=3):
    """The sample after some steps with the network of the common test, which says a tenth of the sample."""
    scheduler.set_timesteps(STEPS)
    x = SAMPLE
    for t in scheduler.timesteps[:steps]:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(0.1 * model_input, t, x, **seeded(scheduler)).prev_sample
    return x


def seeded(scheduler):
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": torch.Generator().manual_seed(0)} if takes else {}


@by_class
@pytest.mark.parametrize("changes", [{}, *CHANGES], ids=str)
def test_saved_and_loaded_is_the_same_scheduler(changes, cls, tmp_path):
    """`save_config` and `from_pretrained` give the same samples, for defaults and for each changed setting."""
    scheduler = make(cls, **changes)
    scheduler.save_config(tmp_path)
    assert torch.equal(output_of(cls.from_pretrained(tmp_path)), output_of(scheduler))


@by_process
@pytest.mark.parametrize("cls", FIVE, ids=lambda cls: cls.__name__)
def test_saved_and_loaded_in_every_process(cls, process, tmp_path):
    scheduler = make(cls, process)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(output_of(cls.from_pretrained(tmp_path)), output_of(scheduler))


@by_class
def test_loaded_with_changes(cls, tmp_path):
    """Keywords of `from_pretrained` win over the file; unknown ones come back when they are asked for."""
    make(cls).save_pretrained(tmp_path)
    if cls is CalibratedScheduler:  # whose process cannot be changed
        changed, unused = cls.from_pretrained(tmp_path, noise_seed=7, foo="bar", return_unused_kwargs=True)
        assert changed.config.noise_seed == 7
    else:
        changed, unused = cls.from_pretrained(
            tmp_path, prediction_type="v_prediction", foo="bar", return_unused_kwargs=True
        )
        assert changed.config.prediction_type == "v_prediction"
        assert torch.equal(output_of(changed), output_of(make(cls, prediction_type="v_prediction")))
    assert unused["foo"] == "bar"
    assert not set(unused) & set(inspect.signature(cls.__init__).parameters)


@by_class
def test_config_says_which_values_are_defaults(cls, tmp_path):
    """A directly built scheduler names its default values in `_use_default_values`, a loaded one has no such entry; the
    rest of their configs is equal."""
    scheduler = make(cls)
    config = dict(scheduler.config)
    defaults = config.pop("_use_default_values")
    parameters = inspect.signature(cls.__init__).parameters
    for name in defaults:
        assert config[name] == parameters[name].default
    assert not set(defaults) & set(VP)
    scheduler.save_pretrained(tmp_path)
    loaded = dict(cls.from_pretrained(tmp_path).config)
    assert "_use_default_values" not in loaded
    assert {k: v for k, v in loaded.items() if k[0] != "_"} == {k: v for k, v in config.items() if k[0] != "_"}


@pytest.mark.parametrize("cls", FIVE, ids=lambda cls: cls.__name__)  # some of the control's need torchsde
def test_every_compatible_class_can_be_built_and_left(cls):
    """`compatibles` are classes, each can be built from our config, and the way back restores the config."""
    scheduler = make(cls)
    assert scheduler.compatibles and all(inspect.isclass(other) for other in scheduler.compatibles)
    for other in scheduler.compatibles:
        there = other.from_config(scheduler.config)
        assert type(there) is other
        again = cls.from_config(there.config)
        known = {k: v for k, v in again.config.items() if k in scheduler.config}
        assert {k: v for k, v in known.items() if k[0] != "_"} == {
            k: v for k, v in scheduler.config.items() if k[0] != "_"
        }, other.__name__
        added = set(again.config) - set(scheduler.config)
        assert not added & set(inspect.signature(cls.__init__).parameters), other.__name__


@by_process
@pytest.mark.parametrize("cls", FIVE, ids=lambda cls: cls.__name__)
def test_every_compatible_class_can_be_built_in_every_process(cls, process):
    scheduler = make(cls, process)
    for other in scheduler.compatibles:
        assert type(other.from_config(scheduler.config)) is other


@by_class
def test_conversion_is_quiet(cls, caplog):
    """No conversion between ours and a compatible stock class logs a complaint."""
    scheduler = make(cls)
    if cls is CONTROL:
        pytest.skip("stock classes complain about each other's keys")
    for other in scheduler.compatibles:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", UserWarning)
            cls.from_config(other.from_config(scheduler.config).config)
    assert not [record.getMessage()[:80] for record in caplog.records]


@by_class
def test_step_keeps_the_shape(cls):
    scheduler = make(cls)
    scheduler.set_timesteps(STEPS)
    first = scheduler.step(0.1 * SAMPLE, scheduler.timesteps[0], SAMPLE).prev_sample
    second = scheduler.step(0.1 * SAMPLE, scheduler.timesteps[1], first).prev_sample
    assert first.shape == second.shape == SAMPLE.shape


@by_class
def test_tuple_and_output_are_equal(cls):
    """`return_dict=False` gives the tuple of the same tensors in the same order."""
    results = []
    for return_dict in (True, False):
        scheduler = make(cls)
        scheduler.set_timesteps(STEPS)
        t = scheduler.timesteps[0]
        results.append(scheduler.step(0.1 * SAMPLE, t, SAMPLE, return_dict=return_dict, **seeded(scheduler)))
    output, pair = results
    assert isinstance(pair, tuple)
    for from_tuple, from_output in zip(pair, output.values(), strict=False):
        assert torch.equal(from_tuple, from_output)
    assert output.prev_sample is output[0]


@by_class
def test_public_interface(cls):
    """What pipelines take for granted, in names, signatures and defaults."""
    scheduler = make(cls)
    assert hasattr(scheduler, "init_noise_sigma") and scheduler.order == 1
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert next(iter(inspect.signature(scheduler.scale_model_input).parameters)) == "sample"
    step = list(inspect.signature(scheduler.step).parameters)
    assert step[:3] == ["model_output", "timestep", "sample"] and "return_dict" in step
    layout = list(inspect.signature(scheduler.set_timesteps).parameters)
    assert layout[:2] == ["num_inference_steps", "device"]
    scheduler.set_timesteps(STEPS)
    assert scheduler.scale_model_input(SAMPLE, scheduler.timesteps[0]).shape == SAMPLE.shape
    assert scheduler.num_inference_steps == STEPS == len(scheduler.timesteps)
    assert "kwargs" not in inspect.signature(cls.__init__).parameters


@by_process
@pytest.mark.parametrize("cls", FIVE, ids=lambda cls: cls.__name__)
def test_add_noise_gives_the_level_of_the_timestep(cls, process):
    """As the common test calls it: a one-element tensor of the grid, on the device and with the dtype of the sample."""
    scheduler = make(cls, process)
    scheduler.set_timesteps(20)
    t = scheduler.timesteps[:1]
    for dtype in (torch.float16, torch.float32, torch.float64):
        x, noise = SAMPLE.to(dtype), randn(*SAMPLE.shape, seed=1).to(dtype)
        noised = scheduler.add_noise(x, noise, t)
        alpha, sigma = scheduler.levels.alpha[0], scheduler.levels.sigma[0]
        assert noised.dtype == dtype and noised.device == x.device
        torch.testing.assert_close(noised.double(), (alpha * x + sigma * noise).double(), rtol=2e-3, atol=2e-3 * sigma)


@by_class
def test_trained_betas(cls, tmp_path):
    """Betas as an array are kept, saved and loaded, and are the `betas` attribute."""
    betas = np.array([0.1, 0.3, 0.4, 0.5])
    if cls is CalibratedScheduler:
        scheduler = build(cls, {"trained_betas": betas.tolist(), "num_train_timesteps": 4}, (3,))
    else:
        scheduler = cls(trained_betas=betas, num_train_timesteps=4)
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-6)
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist()


@by_class
def test_attributes(cls):
    """Attributes and methods are found, what does not exist is an `AttributeError`, a config key is a config key."""
    scheduler = make(cls)
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    assert scheduler.dummy_attribute == 5
    assert scheduler.config.test_attribute == 5
    assert scheduler.save_pretrained == scheduler.save_pretrained
    with pytest.warns(FutureWarning, match="test_attribute"):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match="does_not_exist"):
        scheduler.does_not_exist  # noqa: B018


@pytest.mark.parametrize("source", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("cls", [*FIVE[:2], FlowMapScheduler], ids=lambda cls: cls.__name__)
def test_default_values_of_the_source_are_not_taken_for_choices(cls, source):
    """A key that the source left at its default (`beta_start` 0.0001 there) is ours by value, not by chance, and a key
    of the source's solver does not become ours."""
    stock = getattr(diffusers, source)()
    scheduler = cls.from_config(stock.config)
    torch.testing.assert_close(scheduler.betas, stock.betas, rtol=1e-5, atol=1e-7)
    assert scheduler.config.grid is None
    defaults = inspect.signature(cls.__init__).parameters
    for key in cls._own_keys:
        assert scheduler.config[key] == defaults[key].default


def test_processes_are_the_three_families():
    """The processes of this file are all there are, so that a fourth family is tested here as well."""
    families = {type(make(FIVE[0], process).path).__name__ for process in PROCESSES.values()}
    assert families == {"VariancePreserving", "VarianceExploding", "FlowMatching"}
