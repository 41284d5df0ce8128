"""A Markov chain over tokens as a model: an exact network inside any pipeline of discrete diffusion and, of its
embeddings, under any sampler of Gaussian diffusion.

Knows how a pipeline calls a network and how a model is saved; the mathematics is in
:mod:`diffusers_sde.discrete.oracles` and :mod:`diffusers_sde.discrete.embeddings`.  Knows nothing of schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput

from diffusers_sde.configs import path_from_config
from diffusers_sde.discrete.embeddings import expected_embedding, word_evidence
from diffusers_sde.discrete.oracles import MarkovChain
from diffusers_sde.discrete.processes import absorbing, uniform
from diffusers_sde.paths import Path
from diffusers_sde.prediction import to_model


@dataclass
class TokenModelOutput(BaseOutput):
    """``logits``: of the clean token of each position (N, L, S)."""

    logits: torch.Tensor


class MarkovChainModel(ModelMixin, ConfigMixin):
    """``log p(x_0^l | x_t)`` of a Markov chain, exactly, by forward-backward.

    Under masked noise the mask is the token behind the V of the chain, and the time is not needed.

    Args:
        initial: (V,), law of the first token.
        transition: (V, V), rows are the laws of the next token.
        noise: masked or uniform.

    Raises:
        ValueError: for shapes that do not fit and another noise.
    """

    @register_to_config
    def __init__(self, initial: Sequence[float], transition: Sequence[Sequence[float]], noise: str = "masked"):
        super().__init__()
        if noise not in ("masked", "uniform"):
            raise ValueError(f"noise {noise!r} is unknown: use masked or uniform.")
        tokens = len(initial)
        MarkovChain(initial, transition, 1)  # checks
        self.process = absorbing(tokens + 1, tokens) if noise == "masked" else uniform(tokens)
        self.register_buffer("_anchor", torch.zeros(()))  # what diffusers reads dtype and device from

    @property
    def mask_token_id(self) -> int | None:
        """The number of the mask, None under uniform noise."""
        return len(self.config.initial) if self.config.noise == "masked" else None

    def chain(self, length: int) -> MarkovChain:
        """The law of sequences of this length."""
        return MarkovChain(self.config.initial, self.config.transition, length)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        alpha: float | None = None,
        return_dict: bool = True,
    ) -> TokenModelOutput | tuple[torch.Tensor]:
        """The exact logits, float64.

        Args:
            input_ids: noisy tokens (N, L); the beginning of a longer sequence is one.
            attention_mask, position_ids: accepted; every position counts and stands where it stands.
            alpha: survival probability at ``input_ids``; needed under uniform noise.
            return_dict: False for a tuple.

        Raises:
            ValueError: without ``alpha`` where it is needed.
        """
        if alpha is None:
            if self.config.noise == "uniform":
                raise ValueError("Under uniform noise the law depends on the time: pass alpha.")
            alpha = 0.5  # of which a mask says nothing
        tokens = len(self.config.initial)
        x = input_ids.cpu()
        evidence = self.process.likelihood(x, alpha)[..., :tokens]
        clean = self.chain(x.shape[1]).posterior(evidence)
        logits = clean.clamp(min=1e-300).log()
        if self.config.noise == "masked":
            logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
        logits = logits.to(input_ids.device)
        return TokenModelOutput(logits=logits) if return_dict else (logits,)


class EmbeddedChainModel(ModelMixin, ConfigMixin):
    """The embeddings of a Markov chain's tokens under Gaussian noise: the exact network of every sampler of this
    package, ``D = sum_w p(w|x) e_w`` position by position, by forward-backward with Gaussian evidence.

    Samples are (N, 1, L, d), pictures of L rows; :func:`diffusers_sde.discrete.embeddings.rounded` reads their words.

    Args:
        initial, transition: as in :class:`MarkovChainModel`.
        embeddings: (V, d).
        length: L.
        process: config of the forward process as in :func:`diffusers_sde.configs.path_from_config`; default linear
            betas, with ``prediction_type`` (default sample).

    Raises:
        ValueError: for shapes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        initial: Sequence[float],
        transition: Sequence[Sequence[float]],
        embeddings: Sequence[Sequence[float]],
        length: int,
        process: dict[str, Any] | None = None,
        in_channels: int = 1,
    ):
        super().__init__()
        self.chain = MarkovChain(initial, transition, length)
        self.embeddings = torch.tensor(embeddings, dtype=torch.float64)
        if self.embeddings.ndim != 2 or len(self.embeddings) != self.chain.vocabulary:
            raise ValueError(f"embeddings must have a row for each of the {self.chain.vocabulary} tokens.")
        self.register_to_config(sample_size=[length, self.embeddings.shape[1]])  # pipelines read it
        self._process = {"beta_schedule": "linear", "prediction_type": "sample", **(process or {})}
        self.register_buffer("_anchor", torch.zeros(()))  # what diffusers reads dtype and device from

    @property
    def path(self) -> Path:
        """The forward process that ``forward`` assumes."""
        return path_from_config(self._process)

    def laws(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """``p(w^l | x)`` (N, L, V) of noisy embeddings (N, L, d)."""
        return self.chain.posterior(word_evidence(x, self.embeddings, alpha, max(sigma, 1e-12)))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The exact prediction of the process's type for samples (N, 1, L, d) at one time, in sample's dtype."""
        alpha, sigma = (float(v) for v in self.path.alpha_sigma(float(torch.as_tensor(timestep).flatten()[0])))
        x = sample.double().cpu()[:, 0]
        data = expected_embedding(self.laws(x, alpha, sigma), self.embeddings)
        k_x, k_d = to_model(self.path, self._process["prediction_type"], alpha, sigma)
        out = (k_x * x + k_d * data)[:, None].to(sample.device, sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)
