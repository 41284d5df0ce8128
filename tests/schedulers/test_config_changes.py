"""A config is what it is now: changed in place, by keywords of ``from_config``, or on the way through a stock class."""

import inspect
import json
import logging

import diffusers
import pytest
import torch
from contract_helpers import CLASSES, FLOW, VP, by_class
from diffusers.configuration_utils import FrozenDict
from tiny_pipelines import stock

from diffusers_sde import FlowMapScheduler, GaussianMixtureModel, ProbabilityFlowScheduler
from diffusers_sde.configs import TABLE, current, path_from_config
from diffusers_sde.errors import UsageError
from diffusers_sde.schedulers.calibrated import process_values
from diffusers_sde.stock_configs import canonical_config

WAN = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
UNIPC = diffusers.UniPCMultistepScheduler


def times(scheduler, n=4, **kwargs):
    scheduler.set_timesteps(n, **kwargs)
    return scheduler.timesteps.tolist()


# -- one table --


@by_class
def test_signature_and_help_come_from_the_table(cls):
    """``inspect`` and ``help`` show every key of the table with its default, after the class's own."""
    parameters = inspect.signature(cls.__init__).parameters
    assert {k.name: k.default for k in TABLE} == {k.name: parameters[k.name].default for k in TABLE}
    assert all(f"{k.name} ({k.annotation}, default {k.default!r}" in cls.__init__.__doc__ for k in TABLE)


PATH_VALUES = {
    "num_train_timesteps": 500, "prediction_type": "sample", "use_flow_sigmas": True, "beta_start": 0.002,
    "beta_end": 0.03, "beta_schedule": "scaled_linear", "trained_betas": [0.1, 0.2], "rescale_betas_zero_snr": True,
    "snr_shift_scale": 2.0, "shift": 2.0, "use_dynamic_shifting": True, "time_shift_type": "linear",
    "shift_terminal": 0.1, "invert_sigmas": True, "sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 10.0,
    "noise_conditioning": "atan",
}  # fmt: skip
FAMILY = {
    "variance preserving": {},
    "flow matching": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "EDM": {"sigma_data": 0.5},
    "any": {},
}


@pytest.mark.parametrize("key", [k for k in TABLE if k.path], ids=lambda k: k.name)
def test_a_learned_table_does_not_survive_a_change_of_the_path(key):
    """Every key that the table calls a key of the path makes another process of a config."""
    before = ProbabilityFlowScheduler(**FAMILY[key.family]).config
    after = ProbabilityFlowScheduler(**{**FAMILY[key.family], key.name: PATH_VALUES[key.name]}).config
    assert process_values(before) != process_values(after)


# -- changed in place --


@pytest.mark.parametrize(
    "kwargs, key, value",
    [
        (FLOW, "shift", 5.0),
        (VP, "rescale_betas_zero_snr", True),
        (VP, "beta_schedule", "squaredcos_cap_v2"),
        ({"sigma_data": 0.5}, "sigma_max", 10.0),
    ],
    ids=lambda v: str(v)[:20],
)
@by_class
def test_process_changed_by_attribute(cls, kwargs, key, value):
    """``config.key = value`` sets an attribute and not the item: it counts all the same."""
    scheduler, expected = cls(**kwargs), cls(**{**kwargs, key: value})
    setattr(scheduler.config, key, value)
    assert scheduler.config[key] != value and current(scheduler.config)[key] == value
    assert times(scheduler) == times(expected)
    assert torch.equal(scheduler.sigmas, expected.sigmas)


def test_flow_shift_changed_by_attribute():
    """On a converted config diffusers' own name of the shift counts; where both change, ours does."""
    scheduler = ProbabilityFlowScheduler.from_config(UNIPC(**WAN).config)
    scheduler.config.flow_shift = 7.0
    assert scheduler.path.static_shift == 7.0
    scheduler.config.shift = 2.0
    assert scheduler.path.static_shift == 2.0


def test_stock_config_changed_by_attribute():
    """So does an attribute of a stock config, a default included, on the way to ours, and from ours to ours."""
    config = stock("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction").config
    config.flow_shift = 5.0
    ours = ProbabilityFlowScheduler.from_config(config)
    assert ours.config.shift == 5.0
    ours.config.solver_order = 3
    assert ProbabilityFlowScheduler.from_config(ours.config).config.solver_order == 3


def test_plain_mappings_are_as_they_are():
    """A dictionary has no attributes: it is itself; and every process default is filled in."""
    config = {"use_flow_sigmas": True}
    assert current(config) is config
    assert path_from_config(config).static_shift == 1.0


# -- changed by keywords --


@by_class
def test_keywords_change_the_source(cls):
    """``flow_shift`` and ``use_karras_sigmas`` of a Wan config: shift 10 of the power grid ((4-i)/4)^1.25."""
    config = UNIPC(**WAN, use_karras_sigmas=True).config
    scheduler = cls.from_config(config, flow_shift=10.0, use_karras_sigmas=False, grid="power", rho=1.25)
    u = [((4 - i) / 4) ** 1.25 for i in range(4)]
    assert times(scheduler) == pytest.approx([1000 * 10 * v / (1 + 9 * v) for v in u], rel=1e-5)
    assert [round(t) for t in times(scheduler)] == [1000, 959, 879, 682]


def test_default_grid_after_keywords():
    """Without a grid of the caller's it is the measured one: the power grid with 1.3 - 1/4 for 4 evaluations."""
    config = UNIPC(**WAN, use_karras_sigmas=True).config
    scheduler = ProbabilityFlowScheduler.from_config(config, flow_shift=10.0, use_karras_sigmas=False)
    u = [((4 - i) / 4) ** 1.05 for i in range(4)]
    assert times(scheduler) == pytest.approx([1000 * 10 * v / (1 + 9 * v) for v in u], rel=1e-5)


@pytest.mark.parametrize("shift", ["shift", "flow_shift"])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_either_name_of_the_shift(name, shift):
    """Whichever name a class has for it, both are understood, from stock and from ours, and both are written."""
    key = "flow_shift" if name.startswith("UniPC") else "shift"
    theirs = stock(name, **{"use_flow_sigmas": True, "prediction_type": "flow_prediction", key: 3.0})
    ours = ProbabilityFlowScheduler.from_config(theirs.config, **{shift: 5.0})
    assert (ours.config.shift, ours.config.flow_shift, ours.path.static_shift) == (5.0, 5.0, 5.0)
    again = ProbabilityFlowScheduler.from_config(ours.config, **{shift: 7.0})
    assert (again.config.shift, again.config.flow_shift) == (7.0, 7.0)


CHANGES = {
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "clip_sample": True,
    "final_sigmas_type": "sigma_min",
    "num_train_timesteps": 500,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "steps_offset": 1,
}


@pytest.mark.parametrize("key", CHANGES)
def test_keywords_that_diffusers_shares_with_us(key):
    """What the docs change by keyword arrives, whether or not the source's class knows the key."""
    for name in ("DDIMScheduler", "UniPCMultistepScheduler"):
        config = ProbabilityFlowScheduler.from_config(stock(name).config, **{key: CHANGES[key]}).config
        assert config[key] == CHANGES[key]


@pytest.mark.parametrize(
    "change, grid",
    [
        ({"use_karras_sigmas": False}, None),
        ({"use_karras_sigmas": False, "timestep_spacing": "trailing"}, "trailing"),
        ({"timestep_spacing": "leading"}, "leading"),
        ({"use_karras_sigmas": False, "use_exponential_sigmas": True}, "exponential"),
        ({"use_beta_sigmas": True}, "beta"),
        ({"grid": "ays"}, "ays"),
        ({}, "karras"),
    ],
    ids=str,
)
def test_grid_keywords(change, grid):
    """The caller's flags go before the config's, from stock and from ours; ``False`` takes a grid back."""
    theirs = stock("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    assert ours.config.grid == "karras"
    assert ProbabilityFlowScheduler.from_config(theirs.config, **change).config.grid == grid
    assert ProbabilityFlowScheduler.from_config(ours.config, **change).config.grid == grid


def test_timestep_type_keyword():
    """``timestep_type="continuous"`` makes Euler's betas EDM at unit data scale, with the noise range of the betas."""
    euler = diffusers.EulerDiscreteScheduler(**VP, prediction_type="v_prediction")
    ours = ProbabilityFlowScheduler.from_config(euler.config, timestep_type="continuous")
    expected = ((1 - euler.alphas_cumprod) / euler.alphas_cumprod)[[0, -1]] ** 0.5
    assert ours.config.sigma_data == 1.0
    assert (ours.config.sigma_min, ours.config.sigma_max) == pytest.approx(expected.tolist(), rel=1e-4)
    back = ProbabilityFlowScheduler.from_config(ours.config, timestep_type="discrete")
    assert back.config.sigma_data is None and hasattr(back, "alphas_cumprod")


@pytest.mark.parametrize("typo, meant", [("corector", "corrector"), ("use_karas_sigmas", "use_karras_sigmas")])
def test_typo_of_the_caller(typo, meant):
    """An unknown keyword is an error that names the nearest key, of ours or of stock."""
    with pytest.raises(UsageError, match=f"{typo} is no key .* do you mean {meant}"):
        ProbabilityFlowScheduler.from_config(UNIPC(**WAN).config, **{typo: True})


@by_class
def test_keywords_of_any_stock_scheduler(cls):
    """What diffusers' docs pass to another class is no error: it is kept for the way back."""
    keywords = {"euler_at_final": True, "lower_order_final": False, "timestep_scaling": 5.0}
    config = cls.from_config(stock("DDIMScheduler").config, **keywords).config
    assert {key: config[key] for key in keywords} == keywords


def test_unused_keywords_are_returned():
    """With ``return_unused_kwargs`` an unknown keyword is handed back, as diffusers does, and known ones count."""
    scheduler, unused = ProbabilityFlowScheduler.from_config(
        UNIPC(**WAN).config, return_unused_kwargs=True, flow_shift=5.0, cheese=1
    )
    assert scheduler.config.shift == 5.0 and unused["cheese"] == 1


def test_from_pretrained_changes(tmp_path):
    """The same keywords beside those that say how to load; a typo is an error there too."""
    UNIPC(**WAN, use_karras_sigmas=True).save_pretrained(tmp_path / "scheduler")
    load = {"subfolder": "scheduler", "local_files_only": True, "revision": "main", "cache_dir": None, "token": None}
    loaded = ProbabilityFlowScheduler.from_pretrained(tmp_path, **load, flow_shift=10.0, use_karras_sigmas=False)
    assert [round(t) for t in times(loaded)] == [1000, 966, 903, 753]
    with pytest.raises(UsageError, match="do you mean flow_shift"):
        ProbabilityFlowScheduler.from_pretrained(tmp_path, **load, flow_shft=10.0)
    _, unused = ProbabilityFlowScheduler.from_pretrained(tmp_path, **load, return_unused_kwargs=True, cheese=1)
    assert unused["cheese"] == 1


# -- changed on the way through a stock class --


@by_class
@pytest.mark.parametrize("saved", [False, True])
def test_change_in_between(cls, saved):
    """Ours, stock with a change, ours again: the change counts, everything else is as it was."""

    def changed(stock_class, config, **changes):
        theirs = stock_class.from_config(config, **changes).config
        return json.loads(json.dumps({k: v for k, v in theirs.items() if k[:4] != "_use"})) if saved else theirs

    before = cls(
        **{**FLOW, "grid": "trailing", "noise_seed": 3} if cls is not CLASSES[0] else {**FLOW, "solver_order": 3}
    )
    after = cls.from_config(changed(UNIPC, before.config, flow_shift=5.0))
    assert (after.config.shift, after.path.static_shift) == (5.0, 5.0)
    for key in ("prediction_type", "use_flow_sigmas", "solver_order", "noise_seed"):
        assert after.config.get(key) == before.config.get(key)
    assert cls.from_config(changed(UNIPC, before.config, use_karras_sigmas=True)).config.grid == "karras"
    after = cls.from_config(changed(diffusers.DDIMScheduler, cls(**VP).config, prediction_type="v_prediction"))
    assert after.config.prediction_type == "v_prediction" and after.config.beta_end == VP["beta_end"]
    after = cls.from_config(changed(diffusers.FlowMatchEulerDiscreteScheduler, before.config, shift=4.0))
    assert after.config.shift == after.config.flow_shift == 4.0


@by_class
def test_shift_of_ours_arrives_in_stock(cls):
    """A directly built flow scheduler hands its shift to classes that call it ``flow_shift``."""
    theirs = UNIPC.from_config(cls(**FLOW).config)
    assert theirs.config.flow_shift == 3.0 and theirs.config.use_flow_sigmas


@by_class
@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
def test_conversion_is_silent(process, cls, tmp_path):
    """No list of unexpected keys is logged, from a built or a loaded scheduler, through several stock classes and
    back; a stranger's key still is."""
    records = []
    logger, handler = logging.getLogger("diffusers"), logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        cls(**process).save_pretrained(tmp_path)
        for ours in (cls(**process), cls.from_pretrained(tmp_path)):
            for first in (diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
                theirs = UNIPC.from_config(first.from_config(ours.config).config)
                cls.from_config(theirs.config)
        assert not records
        diffusers.DDIMScheduler.from_config({**diffusers.DDIMScheduler().config, "cheese": 1})
        assert len(records) == 1 and "cheese" in records[0].getMessage()
    finally:
        logger.removeHandler(handler)


# -- what a flow matching network says --

MIXTURE = GaussianMixtureModel(
    [0.5, 0.5], [[1.0, 0.0, 1.0, 0.0], [-1.0, 0.5, 0.0, 1.0]], [0.05, 0.1], process={"use_flow_sigmas": True}
)


def solved(scheduler, steps):
    """The mixture sampled with the exact network of the scheduler's prediction type, from the same noise."""
    scheduler.set_timesteps(steps)
    x = torch.randn(16, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        data = MIXTURE.posterior_mean(x.double(), 1 - sigma, sigma)
        noise = (x.double() - (1 - sigma) * data) / sigma
        said = {"sample": data, "epsilon": noise, "flow_prediction": noise - data}[scheduler.config.prediction_type]
        x = scheduler.step(said.to(x.dtype), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("kind", ["sample", "epsilon", "flow_prediction"])
def test_every_prediction_on_flow_matching(kind):
    """Whatever a flow network says, ours and UniPC converge to the same samples (.80 and .65 apart before)."""
    theirs = UNIPC(**{**WAN, "prediction_type": kind})
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    assert ours.config.prediction_type == kind
    assert (solved(ours, 40) - solved(theirs, 150)).square().mean().sqrt() < 0.003


def test_prediction_of_flow_classes_without_one():
    """A class that knows no prediction type runs flow networks, whatever a conversion left in its config; the caller's
    word counts."""
    left = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        stock("DDIMScheduler", prediction_type="epsilon").config
    ).config
    assert left["prediction_type"] == "epsilon"
    assert ProbabilityFlowScheduler.from_config(left).config.prediction_type == "flow_prediction"
    assert ProbabilityFlowScheduler.from_config(left, prediction_type="sample").config.prediction_type == "sample"


@pytest.mark.parametrize(
    "config",
    [{**WAN, "prediction_type": "v_prediction"}, {"prediction_type": "flow_prediction"}],
    ids=["v on flow", "flow on betas"],
)
def test_predictions_without_meaning_are_refused(config):
    """diffusers' v on flow matching is not the v of that path, and a flow network has no betas: one sentence each."""
    with pytest.raises(UsageError, match="prediction_type"):
        ProbabilityFlowScheduler.from_config(UNIPC(**config).config)


@pytest.mark.parametrize("limits", [{}, {"sigma_min": 0.01, "sigma_max": 200.0}], ids=["betas", "given"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_karras_on_flow_matching(limits, final):
    """Cosmos-Predict2.5: the sigmas are s/(1 + s) of the Karras ramp, as UniPC's; the shift has no part in it."""
    theirs = UNIPC(**WAN, use_karras_sigmas=True, final_sigmas_type=final, **limits)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, 1000 * theirs.sigmas[:-1], rtol=2e-4, atol=1e-3)


COSMOS = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("registered", ["before", "after"])
def test_cosmos_2(registered):
    """Its pipelines write an EDM range into a flow scheduler, pass a ramp from 0 to 1 and hand over the velocity
    (x - D)/sigma at sigma up to 80: the same grid as stock and the same samples, whether they wrote it into the stock
    scheduler or into ours."""

    def sampled(scheduler, steps):
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, steps, dtype=torch.float64))
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
        x = 80.0 * torch.randn(16, 1, 1, 4, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(scheduler.timesteps):
            sigma = float(scheduler.sigmas[i])
            velocity = (x.double() - MIXTURE.posterior_mean(x.double(), 1.0, sigma)) / sigma
            x = scheduler.step(velocity.float(), t, x, return_dict=False)[0]
        return x

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    theirs.register_to_config(**COSMOS)
    if registered == "before":
        ours = ProbabilityFlowScheduler.from_config(theirs.config)
    else:
        ours.register_to_config(**COSMOS)
    expected, got = sampled(theirs, 400), sampled(ours, 25)
    theirs.set_timesteps(sigmas=torch.linspace(0, 1, 25, dtype=torch.float64))
    torch.testing.assert_close(ours.sigmas[:-1], theirs.sigmas[:-1], rtol=1e-5, atol=0)
    assert (expected - got).square().mean().sqrt() < 0.02


def test_replaced_config_of_a_pipeline():
    """A plain ``FrozenDict`` that a pipeline puts in place of the config is read like ours."""
    scheduler = ProbabilityFlowScheduler(**FLOW)
    scheduler._internal_dict = FrozenDict({**scheduler.config, "shift": 5.0})
    assert scheduler.path.static_shift == 5.0
    assert canonical_config(scheduler.config)["shift"] == 5.0
    assert FlowMapScheduler.from_config(scheduler.config).path.static_shift == 5.0
