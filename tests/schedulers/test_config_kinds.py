"""Which configs are ours, which are a few-step network's, which are refused; and which classes ours converts to."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from contract_helpers import CLASSES, EDM, FLOW, VP, randn
from tiny_pipelines import stock

from diffusers_sde import CalibratedScheduler, FlowMapScheduler, ProbabilityFlowScheduler, stock_configs
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.errors import UsageError
from diffusers_sde.schedulers import conversion
from diffusers_sde.stock_configs import FLOW_MAP_CLASSES, STOCK_CLASSES, canonical_config

OURS = {name for names in STOCK_CLASSES.values() for name in names}
ALL = {name for name in dir(diffusers) if name.endswith("Scheduler")}
OTHERS = {
    "AmusedScheduler": {"mask_token_id": 3},
    "BlockRefinementScheduler": {},
    "CMStochasticIterativeScheduler": {},
    "DDPMWuerstchenScheduler": {},
    "DiscreteDDIMScheduler": {},
    "EntropyBoundScheduler": {},
    "HeliosDMDScheduler": {},
    "HeliosScheduler": {},
    "IPNDMScheduler": {},
    "KarrasVeScheduler": {},
    "LTXEulerAncestralRFScheduler": {},
    "PiflowScheduler": {},
    "SCMScheduler": {},
    "ScoreSdeVeScheduler": {},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
UNNAMEABLE = {"MiniMaxH3Scheduler", "RFD4ProteinaScheduler"}  # shift alone; required arguments


def test_every_scheduler_of_diffusers_is_decided():
    """A class that a new diffusers brings is refused until somebody has looked at it and listed it here."""
    assert OURS | set(FLOW_MAP_CLASSES) | set(OTHERS) | UNNAMEABLE >= ALL


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", [name for name in OTHERS if hasattr(diffusers, name)])
def test_other_kinds_are_refused(name, named):
    """With their class name or by their keys, by every class: not taken for linear betas."""
    config = {k: v for k, v in getattr(diffusers, name)(**OTHERS[name]).config.items() if k[0] != "_"}
    for cls in (ProbabilityFlowScheduler, FlowMapScheduler):
        with pytest.raises(UsageError, match=r"keep that scheduler|none of the keys of a forward process"):
            cls.from_config({**config, **({"_class_name": name} if named else {})})


@pytest.mark.parametrize(
    "config, sentence",
    [
        (ProbabilityFlowScheduler(), "pass scheduler.config"),
        (diffusers.DDIMScheduler(), "pass scheduler.config"),
        ("runwayml/stable-diffusion-v1-5", "from_pretrained"),
        (None, "from_pretrained"),
        ({}, "none of the keys of a forward process"),
        ({"num_train_timesteps": 1000, "prediction_type": "epsilon"}, "none of the keys of a forward process"),
        ({"_class_name": "UNet2DConditionModel", "sample_size": 64}, "config of a UNet2DConditionModel"),
    ],
    ids=["ours", "stock", "string", "None", "empty", "no process", "model"],
)
def test_what_is_no_scheduler_config(config, sentence):
    """One sentence each."""
    with pytest.raises(UsageError, match=sentence):
        ProbabilityFlowScheduler.from_config(config)


def test_handwritten_config_of_ours():
    """A file of ours may leave out what is default."""
    config = {"_class_name": "ProbabilityFlowScheduler", "solver_order": 3}
    assert ProbabilityFlowScheduler.from_config(config).config.solver_order == 3


def test_classes_that_diffusers_drops(monkeypatch):
    """Without LCM, PNDM, SASolver and IPNDM in diffusers every other config converts, and so does one that names a
    dropped class and says its process."""
    dropped = {"LCMScheduler", "PNDMScheduler", "SASolverScheduler", "IPNDMScheduler"}
    later = SimpleNamespace(**{name: getattr(diffusers, name) for name in ALL - dropped})
    for module in (conversion, stock_configs):
        monkeypatch.setattr(module, "diffusers", later)
    names = {cls.__name__ for cls in ProbabilityFlowScheduler().compatibles}
    assert {"PNDMScheduler", "SASolverScheduler"}.isdisjoint(names) and "DDIMScheduler" in names
    for name in ("DDIMScheduler", "PNDMScheduler"):
        config = ProbabilityFlowScheduler.from_config({"_class_name": name, **VP}).config
        assert config.beta_end == VP["beta_end"]
    with pytest.raises(UsageError, match="none of the keys"):
        ProbabilityFlowScheduler.from_config({"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000})


@pytest.mark.parametrize("name", ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"])
def test_defaults_of_classes_that_need_torchsde(name):
    """They are written down here, and are those of the source text."""
    file = {"C": "scheduling_cosine_dpmsolver_multistep", "D": "scheduling_dpmsolver_sde"}[name[0]]
    text = (Path(diffusers.__file__).parent / "schedulers" / f"{file}.py").read_text()
    values = canonical_config({"_class_name": name})
    for key in ("sigma_max", "solver_order") if name[0] == "C" else ("beta_start", "beta_end"):
        assert f"{key}: float = {values[key]:g}," in text or f"{key}: int = {values[key]:g}," in text


# -- few-step networks that jump --


@pytest.mark.parametrize("name", FLOW_MAP_CLASSES)
def test_flow_maps_are_not_plain_flow_matching(name):
    """Their networks say no velocity of the ODE: the solvers refuse them and name the class that runs them."""
    for cls in CLASSES:
        with pytest.raises(UsageError, match="FlowMapScheduler"):
            cls.from_config(stock(name).config)


def test_flow_map_euler():
    """AnyFlow's scheduler: a mean flow network with both times, and the same timesteps, sigmas and steps as stock."""
    theirs = stock("FlowMapEulerDiscreteScheduler", shift=5.0)
    ours = FlowMapScheduler.from_config(theirs.config)
    assert (ours.config.flow_map, ours.gamma, ours.config.prediction_type) == ("mean_flow", 0.0, "flow_prediction")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas.float())
    x = y = randn(2, 4, 8, 8)
    for i, (t, s) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        if i < 3:  # the last jump goes to clean data
            assert float(ours.target_timestep(t)) == pytest.approx(1000 * float(theirs.sigmas[i + 1]), abs=1e-3)
        output = randn(2, 4, 8, 8, seed=i + 1)
        x = ours.step(output, t, x, return_dict=False)[0]
        y = theirs.step(output, s, y, return_dict=False)[0].float()
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert FlowMapScheduler.from_config(theirs.config, flow_map="consistency").config.flow_map == "consistency"


def test_flow_match_lcm():
    """A consistency network on flow matching: jump to the data and re-noise fully; scale-wise ones are refused."""
    theirs = stock("FlowMatchLCMScheduler", shift=3.0)
    ours = FlowMapScheduler.from_config(theirs.config)
    assert (ours.config.flow_map, ours.gamma, ours.path.static_shift) == ("consistency", 1.0, 3.0)
    ours.set_timesteps(1)
    x, output = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    assert torch.allclose(ours.step(output, ours.timesteps[0], x).prev_sample, x - output, atol=1e-6)
    with pytest.raises(UsageError, match="grows its latents"):
        FlowMapScheduler.from_config(stock("FlowMatchLCMScheduler", scale_factors=[1.0, 2.0]).config)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_consistency_networks_on_betas(name):
    """LCM and TCD: consistency on their betas, epsilon prediction."""
    ours = FlowMapScheduler.from_config(stock(name).config)
    config = ours.config
    assert (config.flow_map, config.beta_start, config.prediction_type) == ("consistency", 0.00085, "epsilon")


# -- what diffusers' common tests ask --

CALIBRATION = json.loads((FASHION_MODEL / "calibrated" / "scheduler_config.json").read_text())["calibration"]
BUILT = {
    **{cls.__name__: (cls, VP) for cls in (*CLASSES, FlowMapScheduler)},
    **{f"{cls.__name__} flow": (cls, FLOW) for cls in (*CLASSES, FlowMapScheduler)},
    "ProbabilityFlowScheduler edm": (ProbabilityFlowScheduler, EDM),
    "DPMSolverScheduler sde": (CLASSES[2], {**VP, "algorithm_type": "sde-dpmsolver++"}),
    "CalibratedScheduler": (CalibratedScheduler, {**CALIBRATION["process"], "calibration": CALIBRATION}),
}
built = pytest.mark.parametrize("cls, kwargs", BUILT.values(), ids=BUILT)


@built
def test_compatibles_can_be_built(cls, kwargs):
    """SchedulerCommonTest: every compatible class is built from our config, and back from it ours is what it was."""
    scheduler = cls(**kwargs)
    missing = set(conversion.COMPATIBLE) - {c.__name__ for c in scheduler.compatibles}
    assert missing == ({"SASolverScheduler", "DEISMultistepScheduler"} if "algorithm_type" in kwargs else set())
    for other in scheduler.compatibles:
        back = cls.from_config(other.from_config(scheduler.config).config).config
        assert {k: v for k, v in back.items() if k in scheduler.config} == dict(scheduler.config), other.__name__
        assert not {k for k in back if k not in scheduler.config} & set(inspect.signature(cls.__init__).parameters)


@built
def test_defaults_are_marked(cls, kwargs, tmp_path):
    """SchedulerCommonTest: a built scheduler says which keys nobody passed; a saved and loaded one does not."""
    scheduler = cls(**kwargs)
    scheduler.save_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert dict(cls.from_pretrained(tmp_path).config) == config
