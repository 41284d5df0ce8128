"""Names: every spelling of every tool leads to its sampler and schedule, unknown ones to the nearest, and what cannot
be had says why."""

import subprocess
import sys

import diffusers
import numpy as np
import pytest
from helpers import SD

import diffusers_sde
from diffusers_sde import FlowMapScheduler, NamedScheduler
from diffusers_sde.named_grids import GRIDS
from diffusers_sde.names import command
from diffusers_sde.names.catalogue import ALL, FLOW_MAPS, GUIDED, REFUSED, SAMPLERS, SCHEDULES
from diffusers_sde.names.spelling import find
from diffusers_sde.published import RECIPES

VP = diffusers.EulerDiscreteScheduler(**SD).config

# As people write them, from each tool's own menu.
SPELLED = {
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "dpm++ 2m sde karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", None),
    "DPM++ 2S a Karras": ("dpmpp_2s_ancestral", "karras"),
    "Euler a": ("euler_ancestral", None),
    "Euler AYS": ("euler", "ays"),
    "LMS Karras": ("lms", "karras"),
    "DPM2 a Karras": ("dpm_2_ancestral", "karras"),
    "UniPC": ("unipc", None),
    "DDIM": ("euler", None),
    "res_multistep + simple": ("res_2m", "simple"),
    "res_2s + bong_tangent": ("res_2s", "bong_tangent"),
    "res_2s/beta57": ("res_2s", "beta57"),
    "er_sde": ("er_sde", None),
    "uni_pc_bh2": ("unipc_bh2", None),
    "dpmpp_3m_sde_gpu exponential": ("dpmpp_3m_sde", "exponential"),
    "seeds_2": ("seeds_2", None),
    "ipndm_v, beta": ("ipndm_v", "beta"),
    "deis ddim_uniform": ("deis", "ddim_uniform"),
    "euler kl-optimal": ("euler", "kl_optimal"),
    "euler linear quadratic": ("euler", "linear_quadratic"),
    "lcm sgm_uniform": ("lcm", "sgm_uniform"),
    "euler_k": ("euler", "karras"),
    "kdpm_2_a_k": ("dpm_2_ancestral", "karras"),
    "k_dpmpp_2m": ("dpmpp_2m", None),
    "sample_dpmpp_2m": ("dpmpp_2m", None),
    "EulerDiscrete": ("euler", None),
}


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_name_is_found_as_people_spell_it(spelled):
    assert find(spelled) == SPELLED[spelled]


def test_a_schedule_may_be_named_apart():
    assert find("DPM++ 2M SDE", "Karras") == find("dpm++ 2m sde karras")
    with pytest.raises(ValueError, match="names a schedule already"):
        find("dpm++ 2m karras", "simple")


def test_every_name_of_every_tool_is_found():
    """At its own sampler, or at the one that has had the name before it: deis and unipc alone are ComfyUI's."""
    shared = {("deis_log_rho", "deis"), ("unipc_2", "unipc")}
    for name, entry in ALL.items():
        assert find(name) == (name, None)
        for spelling in entry.spellings:
            found = find(spelling)[0]
            assert found == name or (name, spelling) in shared, spelling
    for name, entry in SCHEDULES.items():
        for spelling in (name, *entry.spellings):
            assert find("dpmpp_2m", spelling) == ("dpmpp_2m", name)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("dpm+ 2m", "dpm_2, dpmpp_2m, "),
        ("eular a karras", "euler_ancestral karras, "),
        ("res_4s", "res_2s, res_3s, "),
    ],
)
def test_an_unknown_sampler_is_answered_with_the_nearest_three(wrong, nearest):
    with pytest.raises(ValueError, match="There is no sampler") as error:
        find(wrong)
    named = str(error.value).split("the nearest are ")[1].rstrip(".").split(", ")
    assert len(named) == 3 and set(nearest.rstrip(", ").split(", ")) <= set(named)


def test_an_unknown_schedule_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"There is no schedule 'karas': the nearest are karras"):
        find("euler", "karas")


@pytest.mark.parametrize("name", sorted({**REFUSED, **GUIDED}))
def test_what_cannot_be_had_says_why(name):
    with pytest.raises(ValueError, match="is not among the samplers here: ") as error:
        diffusers_sde.sampler(name, VP)
    assert {**REFUSED, **GUIDED}[name] in str(error.value)


def test_the_tables_agree():
    """A recipe for every sampler, a grid for every schedule."""
    assert set(SAMPLERS) == set(RECIPES)
    assert {entry.settings["grid"] for entry in SCHEDULES.values()} <= set(GRIDS)


# -- the scheduler --


def test_the_two_ways_to_call_are_one():
    together = diffusers_sde.sampler("dpm++ 2m sde karras", VP)
    apart = diffusers_sde.sampler(sampler="dpmpp_2m_sde", schedule="karras", config=VP)
    assert type(together) is NamedScheduler and dict(together.config) == dict(apart.config)
    assert (together.config.sampler, together.config.grid) == ("dpmpp_2m_sde", "karras")


def test_the_process_is_the_model_s_and_options_are_the_user_s():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = diffusers_sde.sampler("res_2m beta57", flow.config, shift=5.0)
    assert (scheduler.config.shift, scheduler.config.prediction_type) == (5.0, "flow_prediction")
    assert diffusers_sde.sampler("euler a", VP, eta=0.5).config.eta == 0.5


def test_without_a_schedule_the_grid_is_the_config_s_or_equal_steps_of_time():
    karras = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    assert diffusers_sde.sampler("dpmpp_2m", karras.config).config.grid == "karras"
    scheduler = diffusers_sde.sampler("dpmpp_2m", VP)
    scheduler.set_timesteps(10)
    np.testing.assert_allclose(scheduler.timesteps, np.arange(999, 0, -100), atol=1e-4)


@pytest.mark.parametrize("name", FLOW_MAPS)
def test_a_sampler_of_distilled_networks_is_a_flow_map(name):
    scheduler = diffusers_sde.sampler(name, VP, schedule="lcm")
    assert type(scheduler) is FlowMapScheduler and scheduler.gamma == {"lcm": 1.0, "tcd": 0.3}[name]
    stock = diffusers.LCMScheduler(**SD)
    for each in (scheduler, stock):
        each.set_timesteps(4)
    np.testing.assert_array_equal(scheduler.timesteps, stock.timesteps)


# -- the command --


def test_the_command_lists_every_name_with_formula_paper_and_tools(capsys):
    assert command.run(None) == 0
    printed = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        block = printed.split(f"\n{name}: ")[1].split("\n\n")[0]
        assert recipe.formula in block and recipe.paper in block
        assert ("stochastic" in block) == recipe.stochastic
        for names in SAMPLERS[name].tools.values():
            assert all(part in " ".join(block.split()) for part in names)
    for name in (*FLOW_MAPS, *SCHEDULES, *REFUSED):
        assert f"{name}: " in printed
    for name in GUIDED:
        assert name in printed.split("\nNot to be had")[1]


def test_names_are_looked_up_without_torch():
    code = "import sys; sys.modules['torch'] = None; from diffusers_sde.names.spelling import find; find('euler a')"
    subprocess.run([sys.executable, "-c", code], check=True)
