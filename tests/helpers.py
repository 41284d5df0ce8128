"""What the theory tests share: processes, exact Gaussian and mixture denoisers, a runner of tables, and a probe that
reads any sampler's coefficients off its behaviour."""

from __future__ import annotations

import importlib
import math
from unittest import mock

import mpmath
import numpy as np
import torch
from hypothesis import settings

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.configs import alphas_cumprod_from_config
from diffusers_sde.grids import Nodes
from diffusers_sde.paths import FlowMatching, Path, VarianceExploding, VariancePreserving
from diffusers_sde.prediction import convert, prediction_coefficients
from diffusers_sde.tables import Table
from diffusers_sde.weights import evaluation_coefficients

settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")

# -- processes --

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
TRAINED = {"trained_betas": [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6]}
BETA_CONFIGS = {
    "linear": LINEAR,
    "scaled_linear": SD,
    "squaredcos_cap_v2": COSINE,
    "sigmoid": {**LINEAR, "beta_schedule": "sigmoid"},
    "laplace": {**LINEAR, "beta_schedule": "laplace"},
    "exp": {**LINEAR, "beta_schedule": "exp"},
    "trained_betas": TRAINED,
    "zero_snr": {**SD, "rescale_betas_zero_snr": True},
    "snr_shift": {**SD, "snr_shift_scale": 3.0},
    "snr_shift_zero_snr": {**SD, "snr_shift_scale": 3.0, "rescale_betas_zero_snr": True},
}


def vp(config: dict) -> VariancePreserving:
    return VariancePreserving(alphas_cumprod_from_config(config))


PATHS: dict[str, Path] = {
    **{f"vp_{name}": vp(config) for name, config in BETA_CONFIGS.items()},
    "edm": VarianceExploding(0.002, 80.0, 0.5),
    "ve_atan": VarianceExploding(0.3, 500.0, 1.0, "atan"),
    "flow": FlowMatching(),
    "flow_shift": FlowMatching(shift=3.0),
    "flow_terminal": FlowMatching(shift=3.0, shift_terminal=0.1),
    "mochi": FlowMatching(inverted=True),
}
# One smooth (or coarse) representative of each family, for differential equations.
SMOOTH = {name: PATHS[name] for name in ("vp_trained_betas", "edm", "ve_atan", "flow", "mochi")}


def span(path: Path) -> tuple[float, float]:
    """Two interior times of a path, noisier first, far apart."""
    inner = 0.07 * (path.cleanest - path.noisiest)
    return path.noisiest + inner, path.cleanest - inner


def nodes_of(path: Path, log_snr, clean: bool = False) -> Nodes:
    """The path's nodes at these half log-SNRs, with sigma = 0 appended if ``clean``."""
    lam = np.asarray(log_snr, float)
    columns = (path.time(lam), *path.alpha_sigma_of(lam))
    if clean:
        columns = (np.append(c, end) for c, end in zip(columns, (path.cleanest, 1.0, 0.0), strict=True))
    return Nodes(*columns)


def stock_nodes(scheduler, coordinates: str = "vp") -> Nodes:
    """The nodes of a stock scheduler that is laid out: what its ``sigmas`` mean in these coordinates."""
    s = scheduler.sigmas.double().cpu().numpy()
    alpha, sigma = {
        "vp": (1 / np.sqrt(1 + s**2), s / np.sqrt(1 + s**2)),
        "ve": (np.ones_like(s), s),
        "flow": (1 - s, s),
    }[coordinates]
    return Nodes(np.append(scheduler.timesteps.double().numpy(), 0.0)[: len(s)], alpha, sigma)


# -- exact denoisers --

MIXTURE = ([0.3, 0.5, 0.2], [[1.0, -1.0, 0.5], [-1.5, 0.3, 0.0], [0.2, 1.2, -1.0]], [0.05, 0.2, 0.1])


def mixture(**process) -> GaussianMixtureModel:
    """Three components in three dimensions."""
    return GaussianMixtureModel(*MIXTURE, process=process)


def mixture_denoiser(model: GaussianMixtureModel | None = None):
    """``D(x, row)`` of the mixture, on tensors."""
    model = model or mixture()
    return lambda x, row: model.posterior_mean(x, row.alpha, row.sigma)


def gaussian_denoiser(std: float):
    """``D(x, row)`` for ``x_0 ~ N(0, std^2)``: linear, on anything."""
    return lambda x, row: x * (row.alpha * std**2 / (row.alpha**2 * std**2 + row.sigma**2))


def noise_like(n: int, seed: int = 0, dim: int = 3) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- running a table --


def run_table(table: Table, denoise, x, noise=None, outputs=None, states: bool = False):
    """Execute a table in float64: ``x <- a x + sum_j b_j F_j + c z_i`` with F from ``D = denoise(x, row)``.

    ``outputs = (kind, values)`` replaces the denoiser by given network outputs; ``noise(i)`` is z of row i.
    """
    evaluations, out = [], []
    for i, row in enumerate(table.rows):
        own = table.evaluation or evaluation_coefficients(table.data_std, row.alpha, row.sigma)
        if outputs is None:
            said, value = (1.0, 0.0), denoise(x, row)
        else:
            said, value = prediction_coefficients(outputs[0], row.alpha, row.sigma), outputs[1][i]
        k_x, k_m = convert(said, own, row.alpha, row.sigma)
        evaluations.insert(0, k_x * x + k_m * value)
        x = row.a * x + sum(b * f for b, f in zip(row.b, evaluations, strict=False))
        if noise is not None and row.c:
            x = x + row.c * noise(i)
        out.append(x)
    return out if states else x


def gaussian_law(table: Table, std: float, first_variance: float) -> float:
    """The exact variance of a table's result for ``N(0, std^2)`` data started from ``N(0, first_variance)``: the state
    is linear in the first state and in every z, so its coefficients are run instead of samples."""
    basis = np.eye(len(table.rows) + 1)
    x = run_table(table, gaussian_denoiser(std), math.sqrt(first_variance) * basis[0], lambda i: basis[i + 1])
    return float(x @ x)


# -- probing a sampler --
# Every sampler here is linear in its first state, the network's outputs and its noise.  Feed it basis vectors for these
# and read the coefficients off its states: the whole method, not one trajectory of it.


def probe_basis(n: int, dtype=torch.float64) -> torch.Tensor:
    return torch.eye(2 * n + 1, dtype=dtype)


def probe_stock(scheduler, dtype=torch.float64, **step) -> np.ndarray:
    """(n, 2n+1): each state of a stock scheduler in the basis (first state, outputs 1..n, noises 1..n)."""
    n = len(scheduler.timesteps)
    basis, states = probe_basis(n, dtype), []
    x = basis[:1, :, None, None]

    def randn(*_, **__):
        return basis[n + 1 + len(states)][None, :, None, None].clone()

    module = importlib.import_module(type(scheduler).__module__)
    with mock.patch.object(module, "randn_tensor", randn) if hasattr(module, "randn_tensor") else mock.MagicMock():
        for i, t in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(basis[i + 1][None, :, None, None].clone(), t, x, **step)[0]
            states.append(x.flatten().double().numpy())
    return np.array(states)


def probe_table(table: Table, kind: str) -> np.ndarray:
    """The same of a table whose network says ``kind``."""
    n = len(table.rows)
    basis = probe_basis(n).numpy()
    return np.array(run_table(table, None, basis[0], lambda i: basis[n + 1 + i], (kind, basis[1:]), states=True))


def probe_ours(scheduler) -> tuple[np.ndarray, np.ndarray]:
    """``(states, noise_std)`` of a scheduler of this package whose noise is replaced by basis vectors."""
    n = len(scheduler.timesteps)
    basis, states, stds = probe_basis(n), [], []
    x = basis[:1, :, None, None]
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(basis[i + 1][None, :, None, None], t, x)
        x = out.prev_sample_mean + out.noise_std * basis[n + 1 + i][None, :, None, None]
        states.append(x.flatten().numpy())
        stds.append(out.noise_std)
    return np.array(states), np.array(stds)


def deviation(left: np.ndarray, right: np.ndarray) -> float:
    """Largest difference of two probes relative to the largest coefficient of each state."""
    return float(np.max(np.abs(left - right).max(1) / np.abs(right).max(1)))


# -- references --


def reference_weights(start: float, end: float, basis, tau: float = 0.0) -> np.ndarray:
    """Data prediction weights over alpha_t, to 30 digits: ``A Int e^{-A (lambda_t - u)} L_j(u) du``."""
    with mpmath.workdps(30):
        rate, at = 1 + mpmath.mpf(tau) ** 2, [mpmath.mpf(float(b)) for b in basis]

        def weight(j):
            def integrand(u):
                kernel = rate * mpmath.exp(-rate * (mpmath.mpf(end) - u))
                return kernel * mpmath.fprod((u - o) / (at[j] - o) for k, o in enumerate(at) if k != j)

            return mpmath.quad(integrand, [mpmath.mpf(start), mpmath.mpf(end)])

        return np.array([float(weight(j)) for j in range(len(at))])


def order_of(errors) -> np.ndarray:
    """Observed orders of convergence of errors at doubled numbers of steps."""
    errors = np.asarray(errors)
    return np.log2(errors[:-1] / errors[1:])


def stock_row(scheduler, update: str, index: int, order: int) -> np.ndarray:
    """One multistep row of a stock scheduler: weights of the newest ``order`` outputs, newest first, then the factor on
    the state and that on the noise."""
    basis = torch.eye(order + 2, dtype=torch.float64)
    scheduler._step_index = index
    return getattr(scheduler, update)([*basis[:order].flip(0)], sample=basis[order], noise=basis[order + 1]).numpy()


def gaussian_flow(log_snr, std: float):
    """``(x/alpha, D)`` along one exact trajectory of the probability-flow ODE for N(0, std^2) data."""
    s2 = np.exp(-2 * np.asarray(log_snr))
    return np.sqrt(std**2 + s2), std**2 / np.sqrt(std**2 + s2)
