"""The published methods as data: which evaluations a step reads, how it weighs them and what noise it draws.

In the formulas ``s = sigma/alpha``, ``x`` stands for ``x/alpha``, ``D = E[x_0|x]``, ``d = (x - D)/s``, ``h =
log(s/s_t)`` for the step from s to s_t, ``phi_1 = (1 - e^-h)/h``, ``phi_2 = (1 - phi_1)/h``, ``z`` is standard normal
and ``[..]`` says how the evaluations before (D_1, D_2, ...; d_1, ...) or within the step enter.  On flow matching the
ODEs and the ancestral methods are the same formulas with sigma in the place of s and x itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Where a move of a single-step method ends, and what it takes the evaluation F to be on the way from the step's
    beginning: at the fraction u of the step ``F_0 + u sum_j slopes[j] (F_{j+1} - F_0)``.

    Attributes:
        at: fraction of the step, in the recipe's clock.
        slopes: one for each stage evaluated before; missing ones are 0.
        carried: so many times the same integral as far as the first stage is added to the weight of ``F_1 - F_0``: the
            term that lets an exponential Runge-Kutta method of order 3 end a stage at 1.
    """

    at: float
    slopes: tuple[float, ...] = ()
    carried: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """One published method.

    Attributes:
        formula, paper: of a step, in the terms of this module, and its source.
        order: of convergence without noise.
        evaluates: what is interpolated: ``data`` (D) or ``noise`` (d).
        clock: coordinate of the interpolation and of the stages: ``log_snr`` or ``sigma``.
        rule: how two evaluations are integrated: ``exact``, or as if the kernel were flat, ``midpoint`` with the weight
            of a constant and ``bh1`` with h in its place (UniPC's two B(h)).
        history: how many evaluations a step reads, of a multistep method.
        fixed: weights by the number of evaluations, as shares of the constant's: not those of any interpolation.
        corrector: how many nodes the step before is redone on when its evaluation has arrived, 0: it is not.
        ending: the order at the end is at most the evaluations that are left minus this; None: it is not lowered.
        denoises: a step to clean data returns D.
        stages: of a single-step method, the last one the step's end.
        noise: ``none``; ``sde``, the reverse SDE with tau^2 = eta; ``interval``, it with tau = eta in the middle three
            fifths of time; ``extended``, ER-SDE's law; ``ancestral``, an ODE step to a lower level and noise up again.
    """

    formula: str
    paper: str
    order: int
    evaluates: str = "data"
    clock: str = "log_snr"
    rule: str = "exact"
    history: int = 1
    fixed: tuple[tuple[float, ...], ...] = ()
    corrector: int = 0
    ending: int | None = None
    denoises: bool = True
    stages: tuple[Stage, ...] = ()
    noise: str = "none"

    @property
    def evaluations(self) -> int:
        """Evaluations a step."""
        return max(len(self.stages), 1)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.noise != "none"

    def steps(self, evaluations: int) -> int:
        """The most steps that make at most so many evaluations; the last one, to clean data, makes one."""
        return max((evaluations - 1) // self.evaluations + 1, 1)


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

_HEUN = (Stage(1.0), Stage(1.0, (1.0,)))
_MIDDLE = (Stage(0.5), Stage(1.0, (2.0,)))
_THIRDS = (Stage(1 / 3), Stage(2 / 3, (3.0,)), Stage(1.0, (0.0, 1.5)))

_DDIM = "Song et al. 2021, arXiv:2010.02502"
_EDM = "Karras et al. 2022, arXiv:2206.00364"
_K = "Crowson, k-diffusion"
_DPM = "Lu et al. 2022, arXiv:2206.00927"
_DPMPP = "Lu et al. 2022, arXiv:2211.01095"
_DEIS = "Zhang & Chen 2023, arXiv:2204.13902"
_UNIPC = "Zhao et al. 2023, arXiv:2302.04867"
_RES = "Zhang et al. 2023, arXiv:2308.02157"
_SEEDS = "Gonzalez et al. 2023, arXiv:2305.14267"
_BUTCHER = "Butcher, Numerical Methods for ODEs"

_DOWN = "x = (s_d/s) x + (1 - s_d/s) [{}] + sqrt(s_t^2 - s_d^2) z, s_d = s_t^2/s"
_TWO_D = "x = e^-h x + (1 - e^-h) [{}]"
_SDE = "x = e^-2h x + (1 - e^-2h) [{}] + s_t sqrt(1 - e^-2h) z"

# fmt: off
RECIPES: dict[str, Recipe] = {
    "euler": Recipe("x = x + (s_t - s) d", f"{_DDIM}; {_EDM}", 1),
    "euler_ancestral": Recipe(_DOWN.format("D"), f"Ho et al. 2020, arXiv:2006.11239; {_K}", 1, noise="ancestral"),
    "heun": Recipe("x = x + (s_t - s) [(d + d(s_t))/2]", f"{_EDM}, algorithm 1", 2,
        evaluates="noise", clock="sigma", stages=_HEUN),
    "dpm_2": Recipe("x = x + (s_t - s) [d at sqrt(s s_t)]", f"{_DPM}, algorithm 1; {_EDM}", 2,
        evaluates="noise", rule="midpoint", stages=_MIDDLE),
    "dpm_2_ancestral": Recipe("x = x + (s_d - s) [d at sqrt(s s_d)] + sqrt(s_t^2 - s_d^2) z, s_d = s_t^2/s",
        f"{_DPM}; {_K}", 2, evaluates="noise", rule="midpoint", stages=_MIDDLE, noise="ancestral"),
    "dpm_solver_3": Recipe("x = x + (s_t - s) [d and d(2/3) by phi_1, phi_2]", f"{_DPM}, algorithm 2", 3,
        evaluates="noise", stages=_THIRDS),
    "lms": Recipe("x = x + Int [polynomial through d, d_1, d_2, d_3] ds", _K, 4,
        evaluates="noise", clock="sigma", history=4, denoises=False),
    "ipndm": Recipe("x = x + (s_t - s) [(55 d - 59 d_1 + 37 d_2 - 9 d_3)/24]", f"Liu et al. 2022, arXiv:2202.09778; "
        f"{_DEIS}", 1, evaluates="noise", history=4, fixed=_ADAMS_BASHFORTH),
    "ipndm_v": Recipe("x = x + Int [polynomial through d, d_1, d_2, d_3] ds", _DEIS, 4,
        evaluates="noise", clock="sigma", history=4),
    "deis_2m": Recipe("x = x + Int [line through d, d_1] ds", f"{_DEIS}, rho-AB", 2,
        evaluates="noise", clock="sigma", history=2),
    "deis": Recipe("x = x + Int [parabola through d, d_1, d_2] ds", f"{_DEIS}, rho-AB", 3,
        evaluates="noise", clock="sigma", history=3),
    "deis_4m": Recipe("x = x + Int [cubic through d, d_1, d_2, d_3] ds", f"{_DEIS}, rho-AB", 4,
        evaluates="noise", clock="sigma", history=4),
    "deis_log_rho": Recipe("x = x + Int [line in log s through d, d_1] ds", f"{_DEIS}, in log rho", 2,
        evaluates="noise", history=2),
    "gradient_estimation": Recipe("x = x + (s_t - s) [2 d - d_1]", "Permenter & Yuan 2024, arXiv:2306.04848", 1,
        evaluates="noise", history=2, fixed=((1.0,), (2.0, -1.0))),
    "dpmpp_2m": Recipe(_TWO_D.format("D + h/(2 h_1) (D - D_1)"), f"{_DPMPP}, algorithm 2", 2,
        rule="midpoint", history=2),
    "dpmpp_3m": Recipe(_TWO_D.format("parabola in log s through D, D_1, D_2, integrated exactly"), _DPMPP, 3,
        history=3),
    "dpmpp_2s": Recipe(_TWO_D.format("D at sqrt(s s_t)"), f"{_DPMPP}, algorithm 1", 2, rule="midpoint", stages=_MIDDLE),
    "dpmpp_3s": Recipe(_TWO_D.format("D and D(2/3) by phi_1, phi_2"), _DPMPP, 3, stages=_THIRDS),
    "dpmpp_2s_ancestral": Recipe(_DOWN.format("D at sqrt(s s_d)"), f"{_DPMPP}; {_K}", 2,
        rule="midpoint", stages=_MIDDLE, noise="ancestral"),
    "dpmpp_sde": Recipe(_SDE.format("D at sqrt(s s_t)"), f"{_DPMPP}; {_K}", 2,
        rule="midpoint", stages=_MIDDLE, noise="sde"),
    "dpmpp_2m_sde": Recipe(_SDE.format("D + h/(2 h_1) (D - D_1)"), f"{_DPMPP}; {_K}", 2,
        rule="midpoint", history=2, noise="sde"),
    "dpmpp_2m_sde_heun": Recipe(_SDE.format("line in log s through D, D_1, integrated exactly"), f"{_DPMPP}; {_K}", 2,
        history=2, noise="sde"),
    "dpmpp_3m_sde": Recipe(_SDE.format("parabola in log s through D, D_1, D_2, integrated exactly"), f"{_DPMPP}; {_K}",
        3, history=3, noise="sde"),
    "unipc": Recipe(_TWO_D.format("parabola through D, D_1, D_2; redone with D(s_t)") + ", B(h) = h", _UNIPC, 3,
        rule="bh1", history=3, corrector=4, ending=0),
    "unipc_bh2": Recipe(_TWO_D.format("parabola through D, D_1, D_2; redone with D(s_t)") + ", B(h) = e^h - 1", _UNIPC,
        3, rule="midpoint", history=3, corrector=4, ending=0),
    "unipc_2": Recipe(_TWO_D.format("D + h/(2 h_1) (D - D_1); redone with D(s_t)") + ", B(h) = e^h - 1", _UNIPC, 2,
        rule="midpoint", history=2, corrector=3, ending=0),
    "sa_solver": Recipe("the reverse SDE for 0.2 <= t/T <= 0.8, else the ODE: [parabola through D, D_1, D_2; redone on "
        "the cubic with D(s_t)]", "Xue et al. 2023, arXiv:2309.05019", 3,
        history=3, corrector=4, ending=1, noise="interval"),
    "res_2m": Recipe(_TWO_D.format("line in log s through D, D_1, integrated exactly"), f"{_RES}, multistep", 2,
        history=2),
    "res_3m": Recipe(_TWO_D.format("parabola in log s through D, D_1, D_2, integrated exactly"), f"{_RES}, multistep",
        3, history=3),
    "res_multistep_ancestral": Recipe(_DOWN.format("line through D, D_1"), f"{_RES}, multistep; ComfyUI", 2,
        history=2, noise="ancestral"),
    "res_2s": Recipe("x = e^-h x + h [(phi_1 - 2 phi_2) D + 2 phi_2 D(1/2)]", f"{_RES}, single step", 2,
        stages=_MIDDLE),
    "res_3s": Recipe("x = e^-h x + h [(phi_1 - 5/3 phi_2) D + 4/3 phi_2 D(1/2) + 1/3 phi_2 D(1)]", f"{_RES}, single "
        "step; Hochbruck & Ostermann 2005, eq. 5.9, c = 1/2, 1", 3,
        stages=(Stage(0.5), Stage(1.0, (2.0,), carried=4.0), Stage(1.0, (4 / 3, 1 / 3)))),
    "exp_heun_2_x0": Recipe("x = e^-h x + h [(phi_1 - phi_2) D + phi_2 D(s_t)]", "Hochbruck & Ostermann 2005, eq. 5.3",
        2, stages=_HEUN),
    "exp_heun_2_x0_sde": Recipe(_SDE.format("line through D and D(s_t), integrated exactly"), f"{_SEEDS}; ComfyUI", 2,
        stages=_HEUN, noise="sde"),
    "seeds_2": Recipe(_SDE.format("D at sqrt(s s_t)"), f"{_SEEDS}, with data prediction", 2,
        rule="midpoint", stages=_MIDDLE, noise="sde"),
    "seeds_3": Recipe(_SDE.format("D and D(2/3) by phi_1, phi_2 of 2h"), f"{_SEEDS}, with data prediction", 3,
        stages=_THIRDS, noise="sde"),
    "er_sde": Recipe("x = r x + Int (..) [parabola in s through D, D_1, D_2] + sqrt(s_t^2 - r^2 s^2) z, r = "
        "phi(s_t)/phi(s), phi = s (e^(s^0.3) + 10)", "Cui et al. 2023, arXiv:2309.06169", 3,
        clock="sigma", history=3, noise="extended"),
    "midpoint_2s": Recipe("x = x + (s_t - s) [d at (s + s_t)/2]", _BUTCHER, 2,
        evaluates="noise", clock="sigma", stages=_MIDDLE),
    "ralston_2s": Recipe("x = x + (s_t - s) [d/4 + 3/4 d(2/3)]", _BUTCHER, 2,
        evaluates="noise", clock="sigma", stages=(Stage(2 / 3), Stage(1.0, (1.5,)))),
    "kutta_3s": Recipe("x = x + (s_t - s) [(d + 4 d(1/2) + d(1))/6]", _BUTCHER, 3,
        evaluates="noise", clock="sigma", stages=(Stage(0.5), Stage(1.0, (4.0,)), Stage(1.0, (4 / 3, 1 / 3)))),
    "rk4_4s": Recipe("x = x + (s_t - s) [(d + 2 d(1/2) + 2 d(1/2)' + d(1))/6]", _BUTCHER, 4,
        evaluates="noise", clock="sigma", stages=(
            Stage(0.5), Stage(0.5, (4.0,)), Stage(1.0, (0.0, 2.0)), Stage(1.0, (2 / 3, 2 / 3, 1 / 3)))),
}
# fmt: on
