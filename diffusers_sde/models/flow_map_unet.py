"""Networks that diffusers does not have.  Knows their architecture; knows no sampler and no training."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


class FlowMapUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` that is also told the time it jumps to: ``m(x_t, t, s)`` of :mod:`diffusers_sde.flow_maps`.

    The elapsed time ``t - s`` is embedded like the time (Geng et al. 2025, arXiv:2505.13447, table 1c) by a second
    ``TimestepEmbedding`` that starts at zero, so a new one made from a trained UNet says what that says.  Same config
    as ``UNet2DModel``, with positional time embeddings and no ``class_embed_type``; raises ``ValueError`` for others.
    """

    class_embedding: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.config.time_embedding_type != "positional" or self.config.class_embed_type is not None:
            raise ValueError("FlowMapUNet2DModel needs time_embedding_type='positional' and no class_embed_type.")
        self.class_embedding = _ClassAndTarget(
            self.class_embedding, TimestepEmbedding(*_sizes(self.time_embedding.linear_1))
        )

    __init__.__signature__ = inspect.signature(UNet2DModel.__init__)  # type: ignore[attr-defined]  # the config's keys

    @classmethod
    def from_unet(cls, unet: UNet2DModel) -> FlowMapUNet2DModel:
        """A flow map network with the weights of ``unet``: at first it ignores the target."""
        model = cls.from_config(unet.config)
        prefix = "class_embedding."
        state = {
            f"{prefix}label.{k.removeprefix(prefix)}" if k.startswith(prefix) else k: v
            for k, v in unet.state_dict().items()
        }
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any(not k.startswith(f"{prefix}target.") for k in missing):
            raise ValueError(f"These weights are not those of a plain UNet2DModel: {[*unexpected, *missing][:3]}.")
        return model if model.dtype == unet.dtype else model.to(unet.dtype)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        target_timestep: torch.Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The average prediction from ``timestep`` to ``target_timestep`` (numbers, or one per sample); without a
        target the instantaneous one, so that any scheduler can integrate it."""
        if self.class_embedding.label is not None and class_labels is None:
            raise ValueError(f"Pass class_labels: this network knows {self.config.num_class_embeds} classes.")
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        s = t if target_timestep is None else torch.as_tensor(target_timestep, dtype=torch.float32, device=t.device)
        elapsed = self.time_proj((t - s).reshape(-1).expand(len(sample))).to(self.dtype)
        # UNet2DModel adds class_embedding(class_labels) to its time embedding: the place for a second time
        return super().forward(sample, timestep, (class_labels, elapsed), return_dict)


class _ClassAndTarget(nn.Module):
    """Embedding of the class, if any, plus that of the elapsed time, which starts at zero."""

    def __init__(self, label: nn.Embedding | None, target: TimestepEmbedding):
        super().__init__()
        self.label, self.target = label, target
        nn.init.zeros_(target.linear_2.weight)
        nn.init.zeros_(target.linear_2.bias)

    def forward(self, both: tuple[torch.Tensor | None, torch.Tensor]) -> torch.Tensor:
        class_labels, elapsed = both
        target = self.target(elapsed)
        return target if self.label is None else target + self.label(class_labels)


def _sizes(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features
