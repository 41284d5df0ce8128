"""A network of noisy word embeddings: a stock bidirectional encoder of transformers between two linear layers.

Knows its architecture and how it is called: as any network of pictures with one channel, whose rows are the positions
of the text, so that every sampler and pipeline of pictures takes it.  Knows no sampler and no training; what is done
with embeddings stands in :mod:`diffusers_sde.discrete.embeddings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from transformers import AutoConfig, AutoModel

from diffusers_sde.discrete.embeddings import expected_embedding, normalised


@dataclass
class EmbeddingTextOutput(BaseOutput):
    """``sample``: the data prediction (N, 1, L, d).  ``logits``: of the words (N, L, V)."""

    sample: torch.Tensor
    logits: torch.Tensor


class EmbeddingTextModel(ModelMixin, ConfigMixin):
    """``D(x, t) = sum_w p(w|x, t) e_w``: words are classified, their embeddings averaged (Dieleman et al. 2022,
    arXiv:2211.15089, section 3.1).  It predicts data (``prediction_type="sample"``) and may be told its last prediction
    (self-conditioning; Chen et al. 2022, arXiv:2208.04202).

    Args:
        vocab_size: V.
        encoder: config of the encoder with its ``model_type``, as of :class:`transformers.AutoConfig`.
        sample_size: (L, d), length of a text and dimension of an embedding.
        in_channels: 1.
    """

    @register_to_config
    def __init__(
        self, vocab_size: int, encoder: dict[str, Any], sample_size: Sequence[int] = (128, 32), in_channels: int = 1
    ):
        super().__init__()
        config = AutoConfig.for_model(**encoder)
        width, dimension = config.hidden_size, sample_size[1]
        self.words = nn.Embedding(vocab_size, dimension)
        self.project = nn.Linear(2 * dimension, width)
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.transformer = AutoModel.from_config(config)
        self.classify = nn.Linear(width, vocab_size)

    @property
    def embeddings(self) -> torch.Tensor:
        """e (V, d), of mean square 1 each."""
        return normalised(self.words.weight)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        last: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> EmbeddingTextOutput | tuple[torch.Tensor, torch.Tensor]:
        """The prediction for noisy embeddings.

        Args:
            sample: (N, 1, L, d).
            timestep: a number, or one per sample.
            last: the last prediction, of sample's shape; None: none, zeros.
            return_dict: False for a tuple.
        """
        told = torch.cat([sample, torch.zeros_like(sample) if last is None else last], -1)[:, 0]
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        embedded_time = self.time_embedding(self.time_proj(t).to(sample.dtype))
        hidden = self.project(told) + embedded_time[:, None]
        logits = self.classify(self.transformer(inputs_embeds=hidden).last_hidden_state)
        data = expected_embedding(logits.softmax(-1), self.embeddings)[:, None]
        return EmbeddingTextOutput(sample=data, logits=logits) if return_dict else (data, logits)
