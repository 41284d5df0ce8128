"""The loss of each objective is its published formula, written out, and what is random in a batch is what is promised.

The networks are affine in state, time, target time and label: no two of their arguments can be exchanged unnoticed.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence

import diffusers
import numpy as np
import pytest
import torch
from scipy.stats import norm
from training_helpers import TINY_VAE

from diffusers_sde.paths import FlowMatching, VarianceExploding
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.losses import Drawn, _teacher_output, draw, make_loss
from diffusers_sde.training.networks import Task, fresh_task
from diffusers_sde.training.objectives import draw_times
from diffusers_sde.training.samples import sample_seed
from diffusers_sde.training.settings import Settings

CLASSES, BATCH = 2, 12  # label 2 is no label


class Affine(torch.nn.Module):
    """``state x + time t + target s + label y``, each times its coefficient."""

    def __init__(self, *coefficients: float):
        super().__init__()
        self.coefficients, self.seen, self.device = coefficients, torch.empty(0), torch.device("cpu")

    def say(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, s: torch.Tensor | float = 0.0) -> torch.Tensor:
        state, time, target, label = self.coefficients
        return state * x + (time * t + label * y + target * s).float().reshape(-1, 1, 1, 1)

    def forward(self, x, timestep, class_labels, target_timestep=0.0, return_dict=True):
        self.seen = x
        return (self.say(x, timestep, class_labels, target_timestep),)


STUDENT, TEACHER = Affine(0.7, 2e-3, -1e-3, 0.4), Affine(-0.3, 1e-3, 0.0, -0.8)
LABELS = torch.tensor([0, 1] * (BATCH // 2))


def settings(**values: object) -> Settings:
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return read_settings(["--train_data_dir", "data", "--output_dir", "nowhere", "--report_to", "none", *words])


def batch(positions: Sequence[int] = range(BATCH), **more: object) -> dict:
    x0 = torch.stack([torch.full((1, 4, 4), np.sin(3.0 * p)) for p in positions]).float()
    return {"positions": torch.tensor(positions), "pixel_values": x0, **more}


def drawn(asked: Settings, task: Task):
    """``(loss, what was drawn, labels with 2 for a dropped one)`` of a batch of 12 on the objective's network."""
    given = batch(class_labels=LABELS)
    d = draw(asked, task, given, BATCH)
    assert d.labels is not None
    y = torch.tensor([CLASSES if label is None else label for label in d.labels])
    return given, d, y


# -- the losses --

STOCK = functools.partial(diffusers.DDPMScheduler, clip_sample=False)


@pytest.mark.parametrize("gamma", [None, 0.1])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_denoising_is_the_regression_of_diffusers_examples(kind: str, gamma: float | None) -> None:
    """States, targets and times of ``DDPMScheduler``; min-SNR weights as published for each prediction."""
    scheduler = STOCK(prediction_type=kind)
    asked = settings(label_dropout=0.3, **({} if gamma is None else {"snr_gamma": gamma}))
    task = fresh_task(STUDENT, scheduler, CLASSES)
    given, d, y = drawn(asked, task)
    t = torch.from_numpy(np.floor(1000 * d.u)).long()
    x = scheduler.add_noise(d.x0, d.eps, t)
    target = {"epsilon": d.eps, "sample": d.x0, "v_prediction": scheduler.get_velocity(d.x0, d.eps, t)}[kind]
    weights = torch.ones(BATCH)
    if gamma is not None:
        snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))[t]
        weights = snr.clamp(max=gamma) / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[kind]
    expected = (weights * (STUDENT.say(x, t, y) - target).square().mean((1, 2, 3))).mean()
    loss = make_loss(asked, task, None, BATCH)(STUDENT, given)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_denoising_on_edm_is_the_loss_of_its_paper() -> None:
    """Karras et al. 2022, eq. 8: ``(1/sigma^2 + 1/sigma_data^2) |D - x_0|^2``, ``D = c_skip x + c_out F(c_in x)``."""
    asked = settings(loss_weighting="edm", time_sampling="lognormal", label_dropout=0.0)
    task = fresh_task(STUDENT, diffusers.EDMEulerScheduler(), CLASSES)
    given, d, y = drawn(asked, task)
    log_sigma = torch.from_numpy(-1.2 + 1.2 * norm.ppf(d.u))
    sigma = log_sigma.exp().float().reshape(-1, 1, 1, 1)
    x = d.x0 + sigma * d.eps
    total = sigma.square() + 0.5**2
    output = STUDENT.say(x / total.sqrt(), log_sigma / 4, y)
    denoised = 0.5**2 / total * x + 0.5 * sigma / total.sqrt() * output
    expected = ((1 / sigma.square() + 1 / 0.5**2) * (denoised - d.x0).square()).mean()
    loss = make_loss(asked, task, None, BATCH)(STUDENT, given)
    torch.testing.assert_close(loss, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("guidance", [None, 1.0, 3.0], ids=["no_teacher", "teacher", "guided_teacher"])
@pytest.mark.parametrize("objective", ["consistency", "mean_flow"])
def test_flow_maps_learn_the_published_target(objective: str, guidance: float | None) -> None:
    """One step of the (guided) teacher's ODE after x_t, or of the same data and noise, then the network's own jump
    (Song et al. 2023, algorithms 2 and 3; Geng et al. 2025): on straight lines all jumps are ``x + (sigma_s - sigma_t)
    m``, and the target is the slope of the whole way.  Guidance is ``m_0 + w (m_y - m_0)``."""
    h = 1 / 4
    taught = {} if guidance is None else {"teacher_model_name_or_path": "given below", "guidance_scale": guidance}
    asked = settings(objective=objective, label_dropout=0.3, distillation_steps=4, **taught)
    task = fresh_task(STUDENT, diffusers.FlowMatchEulerDiscreteScheduler(), CLASSES)
    teacher = None if guidance is None else dataclasses.replace(task, network=TEACHER)
    given, d, y = drawn(asked, task)

    def sigma(w: torch.Tensor) -> torch.Tensor:
        return (0.001 + 0.999 * w).float().reshape(-1, 1, 1, 1)

    place = torch.from_numpy(d.u).clamp(min=h)
    below = place - h
    v = torch.from_numpy(d.v)
    to = torch.where(v[:, 0] < 0.5, below, v[:, 1] * below) if objective == "mean_flow" else torch.zeros_like(place)
    at, then, end = (sigma(w) for w in (place, below, to))
    told = 1000 * end.flatten() if objective == "mean_flow" else torch.zeros(())
    x = (1 - at) * d.x0 + at * d.eps
    if guidance is None:
        x_then = (1 - then) * d.x0 + then * d.eps
    else:
        no_label = torch.full_like(y, CLASSES)
        null, conditional = (TEACHER.say(x, 1000 * at.flatten(), labels) for labels in (no_label, y))
        x_then = x + (then - at) * (null + guidance * (conditional - null))
    x_end = x_then + (end - then) * STUDENT.say(x_then, 1000 * then.flatten(), y, told)
    target = (x_end - x) / (end - at)
    expected = (STUDENT.say(x, 1000 * at.flatten(), y, told) - target).square().mean()
    loss = make_loss(asked, task, teacher, BATCH)(STUDENT, given)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("labels", [None, [1, 0]])
def test_a_guided_teacher_is_asked_without_the_conditions_that_it_has(labels: list[int] | None) -> None:
    """Without captions and, where the data has them, without labels: a text-to-image teacher knows no labels."""
    asked: list[tuple] = []

    def condition(labels: Sequence | None, captions: Sequence | None) -> dict:
        asked.append((labels, captions))
        return {"class_labels": torch.zeros(2)}

    teacher = dataclasses.replace(fresh_task(TEACHER, STOCK(), 0), condition=condition)
    zeros = torch.zeros(2, 1, 4, 4)
    d = Drawn(zeros, zeros, np.zeros(2), np.zeros((2, 2)), labels, ["a", "b"])
    asked_for = settings(guidance_scale=2.0, objective="consistency", teacher_model_name_or_path="given below")
    _teacher_output(asked_for, teacher, teacher.path, zeros, np.full(2, 500.0), d)
    assert asked == [(labels, ["a", "b"]), (labels and [None, None], [None, None])]


def test_the_classifier_is_shown_the_noised_image_and_keeps_every_label() -> None:
    """Cross entropy of the true labels, none dropped (Dhariwal & Nichol 2021, section 4.1)."""
    scheduler, seen = STOCK(), []

    def classifier(x, t):
        seen.append((x, t))
        return torch.stack([x.mean((1, 2, 3)), t / 1000], 1)

    classifier.device = torch.device("cpu")
    asked = settings(objective="classifier", label_dropout=0.5)
    task = Task(types.SimpleNamespace(scheduler=scheduler), "classifier", classifier, lambda labels, captions: {})
    given, d, _ = drawn(asked, task)
    t = torch.from_numpy(np.floor(1000 * d.u)).long()
    x = scheduler.add_noise(d.x0, d.eps, t)
    loss = make_loss(asked, task, None, BATCH)(classifier, given)
    torch.testing.assert_close(seen[0][0], x, rtol=1e-4, atol=1e-5)
    logits = torch.stack([x.mean((1, 2, 3)), t / 1000], 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, LABELS), rtol=1e-4, atol=1e-5)


# -- what is random --

PLAIN = fresh_task(STUDENT, diffusers.DDPMScheduler(), CLASSES)


def test_what_a_sample_draws_is_a_function_of_seed_and_position() -> None:
    """Noise, time, second time and dropped label of position p are those of p in any batch; of no other position and
    of no other seed."""
    asked = settings(label_dropout=0.5)

    def of(positions: Sequence[int], **options: object) -> list[tuple]:
        d = draw(settings(label_dropout=0.5, **options) if options else asked, PLAIN, batch(positions), 4)
        return list(zip(d.eps.unbind(), d.u.tolist(), map(tuple, d.v.tolist()), strict=True))

    alone = {p: of([p])[0] for p in (3, 4, 5, 700)}
    for order in ([3, 4, 5, 700], [700, 5, 3, 4]):
        for p, found in zip(order, of(order), strict=True):
            assert torch.equal(found[0], alone[p][0]) and found[1:] == alone[p][1:]
    every = [*alone.values(), of([3], seed=1)[0]]
    for i, one in enumerate(every):
        for other in every[:i]:
            assert not torch.equal(one[0], other[0]) and one[1] != other[1] and one[2] != other[2]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_the_given_share_of_labels_and_captions_is_dropped(share: float) -> None:
    """Classifier-free guidance's dropout (Ho & Salimans 2022, algorithm 1): that share becomes None, label and caption
    together; the rest is kept as it is."""
    n = 1500
    positions = torch.arange(n)
    given = {
        "positions": positions,
        "pixel_values": torch.zeros(n, 1, 1, 1),
        "class_labels": positions % 7,
        "caption": [f"caption {p}" for p in range(n)],
    }
    d = draw(settings(label_dropout=share), PLAIN, given, n)
    assert d.labels is not None and d.captions is not None
    gone = [label is None for label in d.labels]
    assert abs(sum(gone) - share * n) <= 4 * (share * (1 - share) * n) ** 0.5
    for p, dropped in enumerate(gone):
        assert (d.labels[p], d.captions[p]) == ((None, None) if dropped else (p % 7, f"caption {p}"))
    assert draw(settings(label_dropout=share), PLAIN, batch([1, 2]), 2).labels is None


def test_noise_is_standard_normal_and_times_are_uniform() -> None:
    """Means and second moments over 400 positions within four standard errors; noise does not follow the time."""
    d = draw(settings(), PLAIN, batch(range(400)), 4)
    n = d.eps.numel()
    assert abs(float(d.eps.mean())) < 4 / n**0.5 and abs(float(d.eps.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    for column in (d.u, *d.v.T):
        assert abs(column.mean() - 0.5) < 4 / (12 * 400) ** 0.5 and column.min() > 0 and column.max() < 1
        assert abs((column**2).mean() - 1 / 3) < 4 * (4 / 45 / 400) ** 0.5
    assert abs(np.corrcoef(d.u, d.eps.mean((1, 2, 3)))[0, 1]) < 0.2 and abs(np.corrcoef(d.u, d.v[:, 0])[0, 1]) < 0.2


def test_stratified_times_have_one_in_each_interval_of_the_global_batch() -> None:
    """Two processes' halves of a global batch of 8: position k of it lies in [k/8, (k + 1)/8)."""
    u = [draw(settings(time_sampling="stratified"), PLAIN, batch(range(s, s + 4)), 8).u for s in (16, 20)]
    assert np.floor(8 * np.concatenate(u)).tolist() == list(range(8))


def test_latents_drawn_in_training_are_those_that_would_be_cached() -> None:
    """``(mean + std eps - shift) scale`` with eps from the seed of the sample, as ``cache_latents`` draws it."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL.from_config({**TINY_VAE, "scaling_factor": 0.7, "shift_factor": 0.1}).eval()
    task = Task(types.SimpleNamespace(scheduler=STOCK(), vae=vae), "unet", STUDENT, lambda labels, captions: {})
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    found = draw(settings(seed=3), task, {"positions": torch.tensor([9, 4]), "pixel_values": pixels}, 2).x0
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    for k, position in enumerate((9, 4)):
        eps = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(sample_seed(3, position)))
        torch.testing.assert_close(found[k], (posterior.mean[k] + posterior.std[k] * eps - 0.1) * 0.7)


# -- the distribution of times --

UNIT = np.array([-1.0, 0.0, 1.0])  # standard deviations, and their uniform numbers
U = norm.cdf(UNIT)


def test_lognormal_times_have_the_stated_mean_and_spread() -> None:
    """Karras et al. 2022, table 1: ``log sigma ~ N(-1.2, 1.2^2)``, quantile by quantile."""
    path = VarianceExploding(0.002, 80.0, 0.5)
    t, _ = draw_times(path, "lognormal", U, mean=-1.2, std=1.2)
    np.testing.assert_allclose(np.log(path.alpha_sigma(t)[1]), -1.2 + 1.2 * UNIT, atol=1e-3)  # cut at 4 of 1.2


def test_logit_normal_times_have_the_stated_mean_and_spread() -> None:
    """Esser et al. 2024, eq. 19: ``log(sigma/(1 - sigma)) ~ N(m, s^2)`` of rectified flow's sigma."""
    path = FlowMatching()
    t, _ = draw_times(path, "logit_normal", U, mean=0.5, std=0.8)
    sigma = (t / 1000 - 0.001) / 0.999  # the unit interval is the training range
    np.testing.assert_allclose(np.log(sigma / (1 - sigma)), 0.5 + 0.8 * UNIT, rtol=1e-9)


def test_mode_times_are_the_published_function_of_uniform_numbers() -> None:
    """Esser et al. 2024, eq. 20, with s = 1.29: ``w = 1 - u - s (cos^2(pi u/2) - 1 + u)``."""
    t, _ = draw_times(FlowMatching(), "mode", np.array([0.0, 0.25, 0.5, 1.0]))
    at_quarter = 0.75 - 1.29 * ((2 + 2**0.5) / 4 - 0.75)  # cos^2(pi/8)
    np.testing.assert_allclose((t - 1) / 999, [1, at_quarter, 0.5, 0], atol=1e-12)


def test_uniform_times_go_through_the_static_shift() -> None:
    """``s u/(1 + (s - 1) u)`` with s = 3 (Esser et al. 2024, eq. 23), on the training range."""
    t, _ = draw_times(FlowMatching(shift=3.0), "uniform", np.array([0.25, 0.5]))
    np.testing.assert_allclose((t - 1) / 999, [0.5, 0.75], rtol=1e-12)
