"""The tables of names: which tool calls which sampler and schedule what.

Knows names only; formula, paper and order of a sampler stand with its recipe (:mod:`diffusers_sde.published`).  Data
alone, so that names are checked and listed before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

A1111, COMFY, INVOKE, K, RES, STOCK = "A1111", "ComfyUI", "InvokeAI", "k-diffusion", "RES4LYF", "diffusers"


@dataclass(frozen=True)
class Entry:
    """The names of one sampler or schedule.

    Attributes:
        tools: what each tool calls it, by tool.
        settings: config keys that are set for it; empty where its own name says all.
        note: what a user must know: where it differs from a tool's, in one sentence.
    """

    tools: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def spellings(self) -> tuple[str, ...]:
        """All names, of all tools."""
        return tuple(name for names in self.tools.values() for name in names)


def _entry(note: str = "", settings: Mapping[str, Any] | None = None, **tools: str) -> Entry:
    """``tools``: names separated by commas, by tool."""
    keys = {"a1111": A1111, "comfy": COMFY, "invoke": INVOKE, "k": K, "res": RES, "stock": STOCK}
    names = {keys[tool]: tuple(name.strip() for name in text.split(",")) for tool, text in tools.items()}
    return Entry(names, settings or {}, note)


_EXACT = "third-order weights are the exact ones, those of k-diffusion and diffusers converge with order 2"

# fmt: off
SAMPLERS: dict[str, Entry] = {
    "euler": _entry(a1111="Euler, DDIM", comfy="euler, ddim", invoke="euler, ddim", k="sample_euler",
        res="res_1s, euler", stock="EulerDiscrete, DDIM, FlowMatchEulerDiscrete, EDMEuler"),
    "euler_ancestral": _entry(a1111="Euler a", comfy="euler_ancestral, ddpm", invoke="euler_a, ddpm",
        k="sample_euler_ancestral", stock="EulerAncestralDiscrete, DDPM",
        note="on variance preserving models the same as DDPM's posterior"),
    "heun": _entry(a1111="Heun", comfy="heun", invoke="heun", k="sample_heun", res="heun_2s", stock="HeunDiscrete"),
    "dpm_2": _entry(a1111="DPM2", comfy="dpm_2", invoke="kdpm_2", k="sample_dpm_2", stock="KDPM2Discrete"),
    "dpm_2_ancestral": _entry(a1111="DPM2 a", comfy="dpm_2_ancestral", invoke="kdpm_2_a", k="sample_dpm_2_ancestral",
        stock="KDPM2AncestralDiscrete"),
    "dpm_solver_3": _entry(k="DPMSolver.dpm_solver_3_step", note="the third-order step of dpm_fast on any schedule"),
    "lms": _entry(a1111="LMS", comfy="lms", invoke="lms", k="sample_lms", stock="LMSDiscrete"),
    "ipndm": _entry(comfy="ipndm", stock="IPNDM"),
    "ipndm_v": _entry(comfy="ipndm_v", note="weights are those of the interpolation at every order"),
    "deis": _entry(comfy="deis", res="deis_3m"),
    "deis_2m": _entry(res="deis_2m"),
    "deis_4m": _entry(res="deis_4m"),
    "deis_log_rho": _entry(invoke="deis", stock="DEISMultistep", note="deis alone means ComfyUI's"),
    "gradient_estimation": _entry(comfy="gradient_estimation"),
    "dpmpp_2m": _entry(a1111="DPM++ 2M", comfy="dpmpp_2m", invoke="dpmpp_2m", k="sample_dpmpp_2m", res="dpmpp_2m",
        stock="DPMSolverMultistep, EDMDPMSolverMultistep"),
    "dpmpp_3m": _entry(invoke="dpmpp_3m", res="dpmpp_3m", stock="DPMSolverMultistep of order 3", note=_EXACT),
    "dpmpp_2s": _entry(invoke="dpmpp_2s", res="dpmpp_2s", stock="DPMSolverSinglestep",
        note="a stage inside each step, as in the paper; InvokeAI and diffusers let grid nodes be the stages"),
    "dpmpp_3s": _entry(res="dpmpp_3s"),
    "dpmpp_2s_ancestral": _entry(a1111="DPM++ 2S a", comfy="dpmpp_2s_ancestral", k="sample_dpmpp_2s_ancestral"),
    "dpmpp_sde": _entry(a1111="DPM++ SDE", comfy="dpmpp_sde", invoke="dpmpp_sde", k="sample_dpmpp_sde",
        res="dpmpp_sde_2s", stock="DPMSolverSDE",
        note="the noise of stage and step is one Brownian path in the SDE's own clock, k-diffusion's in sigma"),
    "dpmpp_2m_sde": _entry(a1111="DPM++ 2M SDE", comfy="dpmpp_2m_sde", invoke="dpmpp_2m_sde", k="sample_dpmpp_2m_sde"),
    "dpmpp_2m_sde_heun": _entry(a1111="DPM++ 2M SDE Heun", comfy="dpmpp_2m_sde_heun",
        k="sample_dpmpp_2m_sde(solver_type='heun')"),
    "dpmpp_3m_sde": _entry(a1111="DPM++ 3M SDE", comfy="dpmpp_3m_sde", k="sample_dpmpp_3m_sde", note=_EXACT),
    "unipc": _entry(a1111="UniPC", comfy="uni_pc"),
    "unipc_bh2": _entry(comfy="uni_pc_bh2"),
    "unipc_2": _entry(invoke="unipc", stock="UniPCMultistep", 
        note="unipc alone means A1111's and ComfyUI's, of order 3"),
    "sa_solver": _entry(comfy="sa_solver", stock="SASolver", note="diffusers' is of order 2"),
    "res_2m": _entry(comfy="res_multistep", res="res_2m"),
    "res_3m": _entry(res="res_3m"),
    "res_multistep_ancestral": _entry(comfy="res_multistep_ancestral",
        note="the line goes through D and D_1 where they were evaluated; ComfyUI's starts at the last lower level"),
    "res_2s": _entry(res="res_2s"),
    "res_3s": _entry(res="res_3s"),
    "exp_heun_2_x0": _entry(comfy="exp_heun_2_x0"),
    "exp_heun_2_x0_sde": _entry(comfy="exp_heun_2_x0_sde"),
    "seeds_2": _entry(comfy="seeds_2", note="the same table as dpmpp_sde, whose noise here is exact"),
    "seeds_3": _entry(comfy="seeds_3"),
    "er_sde": _entry(comfy="er_sde", note="third-order weights are the exact ones, the published ones are of order 2"),
    "midpoint_2s": _entry(res="midpoint_2s"),
    "ralston_2s": _entry(res="ralston_2s"),
    "kutta_3s": _entry(res="kutta_3s"),
    "rk4_4s": _entry(res="rk4_4s"),
}

FLOW_MAPS: dict[str, Entry] = {
    "lcm": _entry(a1111="LCM", comfy="lcm", invoke="lcm", stock="LCM, FlowMatchLCM", settings={"gamma": 1.0},
        note="for networks that were distilled to jump"),
    "tcd": _entry(invoke="tcd", stock="TCD", settings={"gamma": 0.3}, note="for networks that were distilled to jump"),
}

_UNSEEN = ("it needs the unconditional prediction, which a scheduler does not see: use the guider and scheduler of "
    "diffusers_sde.cfg_plus_plus in a modular pipeline")
GUIDED = {name: _UNSEEN for name in (
    "euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_cfg_pp",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation_cfg_pp", "ddim_cfg_pp")}
_ADAPTIVE = "it chooses its steps while it runs, a scheduler lays them out before: use dpmpp_2m or dpm_solver_3"
REFUSED = {
    "dpm_adaptive": _ADAPTIVE,
    "dpm_fast": "it mixes steps of three orders on a grid of its own and stops at the smallest training noise: use "
        "dpm_solver_3 exponential with final_sigmas_type='sigma_min'",
    "heunpp2": "its third evaluation lies beyond the step, where the next one begins again: use kutta_3s or res_3s",
    "restart": "it goes back up in noise, timesteps of a scheduler only go down: use euler_ancestral or dpmpp_sde",
    "plms": "its first step alone spends an evaluation more on the same multistep formula: use ipndm",
    "sa_solver_pece": "it evaluates each corrected state a second time: use sa_solver, with more steps",
}
_OTHER_SPELLINGS = {
    "ddim_cfg_pp": ("DDIM CFG++",), "dpm_adaptive": ("DPM adaptive",), "dpm_fast": ("DPM fast",),
    "restart": ("Restart",), "plms": ("PLMS", "pndm", "PNDM"), "heunpp2": ("Heun++ 2",),
    "euler_ancestral_cfg_pp": ("Euler a CFG++",),
}
# Every name: what it is, or why it is not to be had.
ALL: dict[str, Entry] = {
    **SAMPLERS, **FLOW_MAPS,
    **{name: Entry({A1111: _OTHER_SPELLINGS.get(name, ())}, note=why) for name, why in (REFUSED | GUIDED).items()},
}

SCHEDULES: dict[str, Entry] = {
    "karras": _entry(a1111="Karras", comfy="karras", invoke="k", k="get_sigmas_karras", settings={"grid": "karras"}),
    "exponential": _entry(a1111="Exponential, Polyexponential", comfy="exponential", k="get_sigmas_exponential, "
        "get_sigmas_polyexponential", settings={"grid": "exponential"}, note="equal steps of log sigma"),
    "simple": _entry(a1111="Simple", comfy="simple", settings={"grid": "simple"}),
    "normal": _entry(a1111="Normal, Uniform", comfy="normal", k="get_sigmas", stock="linspace",
        settings={"grid": "linspace"}, note="equal steps of training time"),
    "sgm_uniform": _entry(a1111="SGM Uniform", comfy="sgm_uniform", settings={"grid": "sgm_uniform"}),
    "ddim_uniform": _entry(a1111="DDIM", comfy="ddim_uniform", stock="leading",
        settings={"grid": "leading", "steps_offset": 1}, note="never more evaluations than asked for"),
    "beta": _entry(a1111="Beta", comfy="beta", settings={"grid": "beta_timesteps"},
        note="in training time; diffusers' use_beta_sigmas is in noise levels, grid='beta'"),
    "beta57": _entry(res="beta57", settings={"grid": "beta57"}),
    "kl_optimal": _entry(a1111="KL Optimal", comfy="kl_optimal", settings={"grid": "kl_optimal"}),
    "linear_quadratic": _entry(comfy="linear_quadratic", settings={"grid": "linear_quadratic"}),
    "bong_tangent": _entry(res="bong_tangent", settings={"grid": "bong_tangent"}),
    "ays": _entry(a1111="Align Your Steps", comfy="align_your_steps, AlignYourSteps SD1", settings={"grid": "ays"}),
    "ays_sdxl": _entry(comfy="AlignYourSteps SDXL", settings={"grid": "ays_sdxl"}),
    "ays_svd": _entry(comfy="AlignYourSteps SVD", settings={"grid": "ays_svd"}),
    "lcm": _entry(stock="LCM", settings={"grid": "lcm"}, note="of the 50 steps of latent consistency distillation"),
    "turbo": _entry(a1111="Turbo", comfy="sd_turbo", stock="trailing", settings={"grid": "trailing"}),
    "log_snr": _entry(stock="lu_lambdas", settings={"grid": "log_snr"}),
    "balanced": _entry(settings={"grid": "balanced"}, note="this package's default for its own solvers"),
}
# fmt: on
