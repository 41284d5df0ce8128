"""Rectification (reflow): the pairs of a teacher's ODE, what a network trained on them learns, and how straight it is.

Liu et al. 2022: arXiv:2209.03003.  Lai et al.: arXiv:2510.21890, chapter 5.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from helpers import LINEAR
from scipy.integrate import quad
from training_helpers import common, make_images, tiny_config, train_here

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler
from diffusers_sde.flow_maps import exact_flow_map, straightness
from diffusers_sde.grids import Nodes
from diffusers_sde.training.losses import Drawn, make_loss, rectified
from diffusers_sde.training.networks import Task

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROCESSES = {"vp": {**LINEAR, "prediction_type": "v_prediction"}, "flow": FLOW}
EDM = {"sigma_data": 0.5, "prediction_type": "epsilon"}
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
MIXTURE = {"weights": [0.5, 0.5], "means": [[1.0, 0.4], [-1.0, 0.2]], "covariances": [0.1, 0.2]}


def oracle(process: dict[str, Any], **mixture: Any) -> Task:
    """A mixture as the network of a training; its labels are its components."""
    model = GaussianMixtureModel(**(mixture or MIXTURE), process=process)
    pipe = DDPMPipeline(unet=model, scheduler=ProbabilityFlowScheduler(**process))
    null = len(model.config.weights)

    def condition(labels: Any, captions: Any) -> dict[str, Any]:
        return {} if labels is None else {"class_labels": torch.tensor([null if k is None else k for k in labels])}

    return Task(pipe, "unet", model, condition)


def settings(**changes: Any) -> Any:
    values = {"objective": "rectification", "distillation_steps": 40, "guidance_scale": 1.0, "seed": 0}
    axes = {"time_sampling": "uniform", "time_mean": 0.0, "time_std": 1.0, "label_dropout": 0.0, "loss": "l2"}
    weighting = {"loss_weighting": "none", "snr_gamma": 5.0, "huber_c": 0.1}
    return SimpleNamespace(**{**values, **axes, **weighting, **changes})


def drawn(n: int, labels: list[int | None] | None = None) -> Drawn:
    eps = torch.randn(n, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    return Drawn(torch.full_like(eps, math.nan), eps, np.full(n, 0.5), np.zeros((n, 2)), labels, None)


DYNAMIC = {**FLOW, "use_dynamic_shifting": True}


@pytest.mark.parametrize("process", [*PROCESSES.values(), EDM, DYNAMIC], ids=[*PROCESSES, "edm", "dynamic"])
def test_pairs_are_the_ends_of_the_teachers_ode(process: dict[str, Any]) -> None:
    """x_0 is where the probability-flow ODE carries eps, times the highest noise level, whatever the data of the batch
    are."""
    teacher, d = oracle(process), drawn(8)
    path, model = teacher.path, teacher.network

    def scaled(x: torch.Tensor, timestep: torch.Tensor, **options: Any) -> Any:  # the oracle is shown the state itself
        return model(x / path.input_scale(float(path.alpha_sigma(float(timestep[0]))[1])), timestep, **options)

    found = rectified(settings(distillation_steps=60), dataclasses.replace(teacher, network=scaled, trained=model), d)
    start = d.eps.double() * float(path.alpha_sigma(path.noisiest)[1])
    exact = exact_flow_map(path, model.posterior_mean, start, path.noisiest, path.cleanest)
    torch.testing.assert_close(found.x0.double(), exact, rtol=0, atol=2e-2)
    assert torch.equal(found.eps, d.eps)


def test_pairs_are_conditional_and_guided_where_their_label_was_kept() -> None:
    """Labels condition the teacher; with a guidance scale w its velocity is m_0 + w (m_y - m_0), and a dropped label is
    the unconditional ODE at any w."""
    teacher, labels = oracle(FLOW), [0, 1, None, 0]
    plain = rectified(settings(), teacher, drawn(4, labels)).x0
    alone = rectified(settings(), teacher, drawn(4)).x0
    torch.testing.assert_close(plain[2], alone[2])
    means = torch.tensor(MIXTURE["means"]).reshape(2, 1, 1, 2)
    stds = torch.tensor(MIXTURE["covariances"]).sqrt()
    for i in (0, 1, 3):  # the ODE of N(m, c^2) ends at m + c eps
        k = labels[i] or 0
        torch.testing.assert_close(plain[i], means[k, 0] + stds[k] * drawn(4).eps[i], rtol=0, atol=5e-3)
    guided = rectified(settings(guidance_scale=3.0), teacher, drawn(4, labels)).x0
    torch.testing.assert_close(guided[2], plain[2])

    def guided_mean(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        null = teacher.network.posterior_mean(x, alpha, sigma)
        return null + 3 * (teacher.network.posterior_mean(x, alpha, sigma, torch.zeros(1, dtype=torch.int64)) - null)

    exact = exact_flow_map(teacher.path, guided_mean, drawn(4).eps[:1], teacher.path.noisiest, teacher.path.time(9.0))
    torch.testing.assert_close(guided[:1].double(), exact, rtol=0, atol=1e-2)


@by_process
def test_the_loss_of_the_rectified_map_is_zero(process: dict[str, Any]) -> None:
    """For Gaussian data the pairs ``x_0 = m + c eps`` lie on lines that do not cross, so that one function of (x_t, t)
    knows both ends and the loss of the training is 0 there; that of the teacher itself, whose trajectories bend, is
    not (Liu et al., theorem 3.6)."""
    mean, std = 0.7, 0.3
    teacher = oracle(process, weights=[1.0], means=[[mean, mean]], covariances=[std**2])
    path, kind = teacher.path, teacher.prediction_type

    def straight(x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        alpha, sigma = (torch.as_tensor(v).reshape(-1, 1, 1, 1) for v in path.alpha_sigma(timestep.double().numpy()))
        eps = (x.double() - alpha * mean) / (alpha * std + sigma)
        x0 = mean + std * eps
        return ((alpha * eps - sigma * x0 if kind == "v_prediction" else eps - x0).float(),)

    class Network:
        device = torch.device("cpu")

        def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            return straight(*args, **kwargs)

    task = dataclasses.replace(teacher, trained=None)
    batch = {"positions": torch.arange(64), "pixel_values": torch.zeros(64, 1, 1, 2)}
    loss = make_loss(settings(distillation_steps=60), task, teacher, 64)
    assert float(loss(Network(), batch)) < 1e-4
    assert float(loss(teacher.network, batch)) > 0.01


def curve(std: float, mean: float, r: np.ndarray) -> np.ndarray:
    """``x_t`` of the exact flow ODE of N(mean, std^2) data from eps = 1 at the noise levels r."""
    return (1 - r) * mean + np.hypot((1 - r) * std, r)


def test_straightness_is_its_integral() -> None:
    """``Int_0^1 |dx/dr - (x_1 - x_0)|^2 dr`` along an exact trajectory, in closed form for Gaussian data; 0 for the
    line between the same ends; and on a variance preserving path that of the same trajectory is the same."""
    std, mean = 0.3, 0.7
    r = np.linspace(1, 0, 4001)
    x = torch.from_numpy(curve(std, mean, r))[:, None, None] * torch.tensor([1.0, 2.0])
    end = mean + std

    def speed(u: float) -> float:
        return -mean + (u - (1 - u) * std**2) / math.hypot((1 - u) * std, u)

    exact = quad(lambda u: (speed(u) - (1 - end)) ** 2, 0, 1, epsabs=1e-12)[0]
    found = straightness(x, Nodes(r, 1 - r, r))
    assert found.tolist() == pytest.approx([exact * 5], rel=1e-4)  # (1, 2): the squares add up
    norm = np.hypot(1 - r, r)  # the same rays at alpha^2 + sigma^2 = 1
    rotated = straightness(x / torch.from_numpy(norm)[:, None, None], Nodes(r, (1 - r) / norm, r / norm))
    assert rotated.tolist() == pytest.approx(found.tolist(), rel=1e-12)
    line = torch.from_numpy(end + (1 - end) * r)[:, None, None]
    assert straightness(line, Nodes(r, 1 - r, r)).tolist() == pytest.approx([0], abs=1e-20)
    with pytest.raises(ValueError, match="one after each step"):
        straightness(x[1:], Nodes(r, 1 - r, r))


def test_rectified_trajectories_of_the_line_keep_their_ends_and_are_straight() -> None:
    """In one dimension trajectories cannot cross: the teacher's ODE couples equal quantiles, the rectified velocity
    ``E[eps - x_0 | x_t]`` of these pairs is the line between them, and it has the same ends, the same marginals and a
    transport cost that is not larger (Liu et al., theorems 3.3 and 3.5), here on a mixture by interpolation."""
    teacher = oracle(FLOW, weights=[0.5, 0.5], means=[[1.0], [-1.0]], covariances=[0.1, 0.2])
    eps = torch.linspace(-3, 3, 601, dtype=torch.float64).reshape(-1, 1, 1, 1)
    d = Drawn(eps, eps, np.zeros(601), np.zeros((601, 2)), None, None)
    x0 = rectified(settings(distillation_steps=200), teacher, d).x0.flatten().double().numpy()
    noise = eps.flatten().numpy()
    assert np.all(np.diff(x0) > 0)  # monotone, so that no two lines cross
    scheduler = ProbabilityFlowScheduler(**FLOW)
    scheduler.set_timesteps(8)
    states = {"teacher": [eps], "rectified": [eps]}
    for t, alpha, sigma in zip(scheduler.timesteps, scheduler.levels.alpha, scheduler.levels.sigma, strict=False):
        bent = teacher.network(states["teacher"][-1], t).sample
        states["teacher"].append(scheduler.step(bent, t, states["teacher"][-1]).prev_sample)
        x = states["rectified"][-1].flatten().numpy()
        velocity = np.interp(x, alpha * x0 + sigma * noise, noise - x0).reshape(eps.shape)
        states["rectified"].append(
            _euler(states["rectified"][-1], velocity, scheduler.levels, len(states["rectified"]))
        )
    ends = states["rectified"][-1].flatten().numpy()
    np.testing.assert_allclose(ends, x0, rtol=0, atol=1e-6)
    bent, straight = (straightness(torch.stack(states[k]), scheduler.levels) for k in ("teacher", "rectified"))
    assert float(straight.max()) < 1e-9 < 1e-2 < float(bent.mean())


def _euler(x: torch.Tensor, velocity: np.ndarray, levels: Any, i: int) -> torch.Tensor:
    return x + float(levels.sigma[i] - levels.sigma[i - 1]) * torch.from_numpy(velocity)


def test_the_script_rectifies_a_pipeline(tmp_path: Path) -> None:
    """From a teacher to a stock pipeline of the same process; without one it is refused."""
    data, config = make_images(tmp_path / "data"), tiny_config(tmp_path)
    assert train_here(common(data, tmp_path / "teacher", config, 2, path="flow")) == 0
    options: dict[str, object] = {"objective": "rectification", "distillation_steps": 3, "guidance_scale": 2.0}
    options |= {"pretrained_model_name_or_path": tmp_path / "teacher"}
    options |= {"teacher_model_name_or_path": tmp_path / "teacher"}
    assert train_here(common(data, tmp_path / "out", None, 2, **options)) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    del options["teacher_model_name_or_path"]
    with pytest.raises(SystemExit):
        train_here(common(data, tmp_path / "none", None, 2, **options))
