"""The training of a Gaussian diffusion of word embeddings: network, joint loss, bound, samples.

Knows how a batch of token numbers becomes noisy embeddings under any ``--path``; the formulas stand in
:mod:`diffusers_sde.discrete.embeddings` and :mod:`.objectives`.  Knows nothing of optimizers or checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_sde.discrete.embeddings import bound_density, joint_loss
from diffusers_sde.errors import UsageError
from diffusers_sde.methods.word_embeddings import embedding_denoiser, words_of
from diffusers_sde.models.embedding_text import EmbeddingTextModel
from diffusers_sde.sampling import sample
from diffusers_sde.schedulers import ProbabilityFlowScheduler
from diffusers_sde.training.language import (
    MEASURE_STREAM,
    NOISE_STREAM,
    SAMPLES_STREAM,
    LanguageTask,
    items_of,
    new_network,
)
from diffusers_sde.training.networks import Task
from diffusers_sde.training.objectives import check_objective, draw_times, loss_weights
from diffusers_sde.training.randomness import generator_of
from diffusers_sde.training.samples import TrainingData
from diffusers_sde.training.settings import Settings

DIMENSION = 32  # of an embedding
TOLD = 0.5  # share of the batch that is told a prediction of its own


class Joint(torch.nn.Module):
    """Embeddings and network as their training calls them, in one call that every wrapper of Accelerate sees."""

    def __init__(self, network: EmbeddingTextModel):
        super().__init__()
        self.network = network

    def forward(
        self, words: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, times: torch.Tensor, told: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(logits, embeddings)`` of words (N, L) under noise (N, 1, L, d).

        Args:
            levels: alpha, sigma and the scale of the network's input, (3, N, 1, 1, 1).
            times: (N,).
            told: which samples are told a prediction (N,).
        """
        embeddings = self.network.embeddings
        alpha, sigma, scale = levels
        x = scale * (alpha * embeddings[words][:, None] + sigma * noise)
        with torch.no_grad():
            last = self.network(x, times).sample * told[:, None, None, None]
        return self.network(x, times, last).logits, embeddings


@dataclass
class EmbeddingTask(LanguageTask):
    """A network of embeddings, which learns with them."""

    forward_process = Task.forward_process
    process_facts = Task.process_facts

    @property
    def card_values(self) -> dict[str, Any]:
        """What the card's snippet is filled in with."""
        length, dimension = self.network.config.sample_size
        return {"length": length, "dimension": dimension}

    def bits_per_token(self, settings: Settings, data: TrainingData, count: int) -> float:
        """The bound on ``-log2 p`` per token: :func:`diffusers_sde.discrete.embeddings.bound_density` over the training
        range of noise, the cross entropy at its cleanest level, and the divergence at its noisiest."""
        path, network, total = self.path, self.network, 0.0
        ends = [tuple(float(v) for v in path.alpha_sigma(t)) for t in (path.cleanest, path.noisiest)]
        for rows, items in items_of(data, count):
            words = torch.stack([item["input_ids"] for item in items]).to(network.device)
            x0 = network.embeddings[words][:, None]
            generators = [generator_of(settings.seed, i, MEASURE_STREAM) for i in rows]
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
            u = np.array([(i * 0.6180339887498949 + 0.5) % 1 for i in rows])  # evenly spread, any number of them
            times, density = draw_times(path, "uniform", u)
            x = self._noised(x0, noise, times)
            prediction = network(self._scaled(x, times), self._at(times)).sample
            snr = np.exp(2 * path.log_snr(times))
            each = bound_density(prediction.double(), x0.double(), 1.0).cpu() * torch.from_numpy(snr / density)
            clean = np.full(len(rows), path.cleanest)
            logits = network(self._scaled(self._noised(x0, noise, clean), clean), self._at(clean)).logits
            each += torch.nn.functional.cross_entropy(logits.mT, words, reduction="none").sum(-1).cpu()
            alpha, sigma = ends[1]
            variance = alpha**2 + sigma**2
            square = alpha**2 * x0.double().square().flatten(1).sum(-1).cpu()
            ratio = sigma**2 / variance
            each += 0.5 * (square / variance + x0[0].numel() * (ratio - 1 - math.log(ratio)))
            total += float(each.sum())
        return total / count / settings.sequence_length / math.log(2)

    def sample_texts(self, settings: Settings) -> list[str]:
        """Texts of the deterministic sampler, with self-conditioning; the same noise in every call."""
        shape = (settings.num_validation_images, 1, *self.network.config.sample_size)
        noise = torch.randn(shape, generator=generator_of(settings.seed, 0, SAMPLES_STREAM)).to(self.network.device)
        scheduler = ProbabilityFlowScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(settings.validation_inference_steps)
        made = sample(embedding_denoiser(self.network), scheduler, noise)
        return self.tokenizer.batch_decode(words_of(made, self.network), skip_special_tokens=True)

    def _at(self, times: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(times)).to(self.network.device, torch.float32)

    def _noised(self, x0: torch.Tensor, noise: torch.Tensor, times: np.ndarray) -> torch.Tensor:
        alpha, sigma = (self._at(v).reshape(-1, 1, 1, 1) for v in self.path.alpha_sigma(times))
        return alpha * x0 + sigma * noise

    def _scaled(self, x: torch.Tensor, times: np.ndarray) -> torch.Tensor:
        return x * self.path.input_scale(self._at(self.path.alpha_sigma(times)[1]).reshape(-1, 1, 1, 1))


def embedding_task(settings: Settings, tokenizer: Any, scheduler: Any) -> EmbeddingTask:
    """A new network of embeddings, and the process of ``scheduler``.

    Raises:
        UsageError: for another prediction than that of the data.
    """
    if settings.prediction_type not in (None, "sample"):
        raise UsageError("A network of embeddings predicts data, as words: leave out --prediction_type.")
    encoder = new_network(settings.model_config, len(tokenizer), settings.sequence_length, tokenizer.pad_token_id)
    config = {key: value for key, value in encoder.config.to_dict().items() if value is not None}
    shape = (settings.sequence_length, DIMENSION)
    # by name: a copy is made of the config, from which diffusers leaves out what was passed by position
    network = EmbeddingTextModel(vocab_size=len(tokenizer), encoder=config, sample_size=shape)
    pipe = diffusers.DDPMPipeline(unet=network, scheduler=scheduler)
    task = EmbeddingTask(pipe, "unet", network, lambda labels, captions: {}, trained=Joint(network), words=tokenizer)
    check_objective(task.path, task.prediction_type, settings.loss_weighting, settings.loss)
    return task


def embedding_loss(settings: Settings, task: EmbeddingTask, network: Any, batch: dict[str, Any]) -> torch.Tensor:
    """:func:`diffusers_sde.discrete.embeddings.joint_loss`, the mean over a batch; times and weights as for pictures.
    Half of the samples are told a first prediction of the network."""
    words, path = batch["input_ids"].to(task.network.device), task.path
    generators = [generator_of(settings.seed, int(p), NOISE_STREAM) for p in batch["positions"]]
    numbers = torch.stack([torch.rand(2, generator=g, dtype=torch.float64) for g in generators])
    u = numbers[:, 0].numpy()
    if settings.time_sampling == "stratified":
        u = (batch["positions"].numpy() % len(u) + u) / len(u)
    times, density = draw_times(
        path, settings.time_sampling, np.clip(u, 1e-12, 1 - 1e-12), mean=settings.time_mean, std=settings.time_std
    )
    alpha, sigma = path.alpha_sigma(times)
    weights = loss_weights(
        settings.loss_weighting, path, "sample", alpha, sigma, snr_gamma=settings.snr_gamma, log_snr_density=density
    )
    shape = (1, *task.network.config.sample_size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(words.device)
    scale = np.broadcast_to(np.asarray(path.input_scale(sigma), float), np.shape(sigma))
    levels = torch.from_numpy(np.stack([alpha, sigma, scale])).to(words.device, torch.float32)[..., None, None, None]
    told = (numbers[:, 1] < TOLD).to(words.device, torch.float32)
    at = torch.from_numpy(np.asarray(times)).to(words.device, torch.float32)
    logits, embeddings = network(words, noise, levels, at, told)
    return joint_loss(logits, words, embeddings, torch.from_numpy(weights).to(logits)).mean()
