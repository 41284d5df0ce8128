"""A Markov chain over tokens as a model of transformers' kind: an exact network inside any pipeline of discrete
diffusion.

Knows how a pipeline calls a network of tokens and how a model is saved; the mathematics is in
:mod:`diffusers_sde.discrete.oracles`.  Knows nothing of schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from diffusers_sde.discrete.oracles import MarkovChain
from diffusers_sde.discrete.processes import absorbing, uniform


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
