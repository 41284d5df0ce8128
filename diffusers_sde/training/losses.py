"""The loss of a batch for each ``--objective``: denoising, rectification, flow maps (consistency, mean flow), noisy
classification, autoencoders, text, masked or of embeddings, and those that learn from rewards (:mod:`.reinforcement`).

Knows how a batch becomes noised states, targets and weights (:mod:`.objectives`, :mod:`diffusers_sde.flow_maps`), each
sample from its own generator (:mod:`.randomness`), and how the network is called.  Knows nothing of optimizers,
checkpoints or processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffusers_sde.flow_maps import average_prediction, jump
from diffusers_sde.paths import Path
from diffusers_sde.schedulers import ProbabilityFlowScheduler
from diffusers_sde.training import autoencoders, embedding_language, language
from diffusers_sde.training.asking import ask, ask_guided, at_times
from diffusers_sde.training.encoding import drawn, encoder_output, units_of
from diffusers_sde.training.networks import Task, call_network
from diffusers_sde.training.objectives import draw_times, loss_weights, prediction_targets, regression_loss
from diffusers_sde.training.randomness import generator_of
from diffusers_sde.training.samples import SAMPLE_STREAM
from diffusers_sde.training.settings import REWARDED, Settings

Loss = Callable[[Any, dict[str, Any]], torch.Tensor]
_NOISE = 1  # the stream of a sample's random numbers that its noise, times and dropped condition come from


@dataclass
class Drawn:
    """What is random in a batch: data x_0 and noise eps (N, C, H, W), uniform numbers u for the time and v (N, 2) for a
    second time, labels and captions with the dropped ones None, and where in their pictures the data lie."""

    x0: torch.Tensor
    eps: torch.Tensor
    u: np.ndarray
    v: np.ndarray
    labels: list[int | None] | None
    captions: list[str | None] | None
    frames: torch.Tensor | None = None


def draw(settings: Settings, task: Task, batch: dict[str, Any], global_batch: int) -> Drawn:
    """Noise, times and dropped conditions of a batch, every sample from the generator of its position."""
    device = task.network.device
    generators = [generator_of(settings.seed, int(p), _NOISE) for p in batch["positions"]]
    numbers = torch.stack([torch.rand(4, generator=g, dtype=torch.float64) for g in generators]).numpy()
    u, dropped = numbers[:, 0], numbers[:, 1] < settings.label_dropout
    if settings.time_sampling == "stratified":  # one number in each of the global batch's equal intervals
        u = (batch["positions"].numpy() % global_batch + u) / global_batch
    if "latents" in batch:
        x0 = batch["latents"].to(device)
    else:
        x0 = batch["pixel_values"].to(device)
        if task.vae is not None:
            own = [generator_of(settings.seed, int(p), SAMPLE_STREAM) for p in batch["positions"]]
            x0 = units_of(task.vae)(drawn(encoder_output(task.vae, x0), own)).to(device)
    eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(device)

    def kept(values: Any) -> list[Any] | None:
        return None if values is None else [None if d else v for v, d in zip(values, dropped, strict=True)]

    labels = batch["class_labels"].tolist() if "class_labels" in batch else None
    u = np.clip(u, 1e-12, 1 - 1e-12)
    return Drawn(x0.float(), eps, u, numbers[:, 2:], kept(labels), kept(batch.get("caption")), batch.get("frame"))


def times_of(settings: Settings, task: Task, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The training times of uniform numbers u (N,) and their density in log-SNR (:func:`.objectives.draw_times`)."""
    mean, std = settings.time_mean, settings.time_std
    return draw_times(task.path, settings.time_sampling, u, mean=mean, std=std, mu=task.mu)


def noised(d: Drawn, path: Path, times: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """``(alpha x_0 + sigma eps, sigma)`` at times (N,), sigma of shape (N, 1, 1, 1)."""
    alpha, sigma = (at_times(v, d.x0) for v in path.alpha_sigma(times))
    return alpha * d.x0 + sigma * d.eps, sigma


def make_loss(settings: Settings, task: Task, teacher: Task | None, global_batch: int) -> Loss:
    """The loss of the objective: ``loss(network, batch)`` is its mean over the batch."""
    if settings.objective == "classifier":
        return _classifier_loss(settings, task, global_batch)
    if settings.objective == "autoencoder":
        return functools.partial(autoencoders.loss_of_batch, settings, task)
    if isinstance(task, embedding_language.EmbeddingTask):
        return functools.partial(embedding_language.embedding_loss, settings, task)
    if isinstance(task, language.LanguageTask):
        return functools.partial(language.masked_loss, settings, task)
    if settings.objective in REWARDED:
        return _rewarded_loss
    if settings.objective in ("denoising", "rectification"):
        return _denoising_loss(settings, task, teacher, global_batch)
    return _flow_map_loss(settings, task, teacher, global_batch)


def _denoising_loss(settings: Settings, task: Task, teacher: Task | None, global_batch: int) -> Loss:
    """``E w(t) |m_theta(x_t, t, c) - (A x_0 + B eps)|^2``, the axes of :mod:`.objectives`; with a teacher on its
    :func:`rectified` pairs."""
    path, kind = task.path, task.prediction_type

    def loss(network: Any, batch: dict[str, Any]) -> torch.Tensor:
        d = draw(settings, task, batch, global_batch)
        if teacher is not None:
            d = rectified(settings, teacher, d)
        times, density = times_of(settings, task, d.u)
        a, b = (at_times(v, d.x0) for v in prediction_targets(path, kind, *path.alpha_sigma(times)))
        x, sigma = noised(d, path, times)
        condition = task.given(d.labels, d.captions, d.frames)
        prediction = call_network(task, network, x, at_times(times, x).flatten(), sigma, condition)
        return _weighted(settings, path, kind, times, density, prediction, a * d.x0 + b * d.eps)

    return loss


@torch.no_grad()
def rectified(settings: Settings, teacher: Task, d: Drawn) -> Drawn:
    """The same noise and conditions, with x_0 where the teacher's ODE carries the noise to, in ``distillation_steps``
    and with its guidance: the pairs of rectification (reflow; Liu et al. 2022, arXiv:2209.03003, algorithm 1; Lai et
    al., arXiv:2510.21890, chapter 5), between which trajectories are straighter
    (:func:`diffusers_sde.flow_maps.straightness`)."""
    # the ODE is one whatever its grid: the training's times are not shifted with the resolution either
    scheduler = ProbabilityFlowScheduler.from_config(teacher.scheduler.config, use_dynamic_shifting=False)
    scheduler.set_timesteps(settings.distillation_steps, device=d.eps.device)
    path, x = scheduler.path, d.eps * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        m = _teacher_output(settings, teacher, path, x, np.full(len(x), float(t)), d)
        x = scheduler.step(m, t, x, return_dict=False)[0]
    return replace(d, x0=x)


def _teacher_output(
    settings: Settings, teacher: Task, path: Path, x: torch.Tensor, t: np.ndarray, d: Drawn
) -> torch.Tensor:
    """What the teacher says at states x of times t (N,), with its guidance."""
    scale = settings.guidance_scale
    return ask_guided(teacher, teacher.network, path, x, t, d.labels, d.captions, d.frames, scale)


def _flow_map_loss(settings: Settings, task: Task, teacher: Task | None, global_batch: int) -> Loss:
    """``E |m_theta(x_t, t, s) - average_prediction(x_t, X(x_u, u, s))|^2`` with x_u one step of the ODE (1 /
    ``distillation_steps`` of the time range) after x_t: the teacher's, with its guidance, or, without a teacher, the
    state of the same data and noise (Song et al. 2023, arXiv:2303.01469, algorithms 2 and 3).

    Consistency networks always jump to the cleanest time; mean flow networks to s uniform below u, or in half of the
    samples to u itself (Geng et al. 2025, arXiv:2505.13447, whose identity is the limit of small steps).
    """
    path, kind, told = task.path, task.prediction_type, settings.objective == "mean_flow"
    clean, noisy, h = path.cleanest, path.noisiest, 1 / settings.distillation_steps

    def taught(x: torch.Tensor, t: np.ndarray, u: np.ndarray, d: Drawn) -> torch.Tensor:
        assert teacher is not None
        m = _teacher_output(settings, teacher, path, x, t, d)
        return jump(path, teacher.prediction_type, x, m, t, u)

    def loss(network: Any, batch: dict[str, Any]) -> torch.Tensor:
        d = draw(settings, task, batch, global_batch)
        times, density = times_of(settings, task, d.u)
        place = np.maximum((times - clean) / (noisy - clean), h)  # 0 at clean data, 1 at pure noise
        to = np.where(d.v[:, 0] < 0.5, place - h, d.v[:, 1] * (place - h)) if told else np.zeros_like(place)
        t, u, s = (clean + w * (noisy - clean) for w in (place, place - h, to))
        x = noised(d, path, t)[0]
        condition = task.given(d.labels, d.captions, d.frames)
        if told:
            condition["target_timestep"] = at_times(s, x).flatten()
        with torch.no_grad():
            x_u = noised(d, path, u)[0] if teacher is None else taught(x, t, u, d)
            x_s = jump(path, kind, x_u, ask(task, network, path, x_u, u, condition), u, s)
            target = average_prediction(path, kind, x, x_s, t, s)
        return _weighted(settings, path, kind, t, density, ask(task, network, path, x, t, condition), target)

    return loss


def _rewarded_loss(network: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of a part of what a rollout has taught (:mod:`.experience`); without dropout, for the law of the rollout has
    none."""
    network.eval()
    return batch["part"].loss(functools.partial(batch["predict"], network))


def _classifier_loss(settings: Settings, task: Task, global_batch: int) -> Loss:
    """Cross entropy of ``p(label | x_t, t)`` (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.1)."""
    path = task.path

    def loss(network: Any, batch: dict[str, Any]) -> torch.Tensor:
        d = draw(settings, task, batch, global_batch)
        times, _ = times_of(settings, task, d.u)
        x, sigma = noised(d, path, times)
        logits = network(x * path.input_scale(sigma), at_times(times, x).flatten())
        return torch.nn.functional.cross_entropy(logits.float(), batch["class_labels"].to(x.device))

    return loss


def _weighted(
    settings: Settings,
    path: Path,
    kind: str,
    times: np.ndarray,
    density: np.ndarray,
    prediction: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    alpha, sigma = path.alpha_sigma(times)
    weights = loss_weights(
        settings.loss_weighting, path, kind, alpha, sigma, snr_gamma=settings.snr_gamma, log_snr_density=density
    )
    w = at_times(weights, prediction).flatten()
    return regression_loss(prediction, target, w, settings.loss, settings.huber_c).mean()
