"""A small classifier of noisy pictures, ``p(y | x_t)``, for classifier guidance.

Knows its architecture: half a UNet with the time added in each block, averaged, and one linear layer (as in Dhariwal &
Nichol 2021, arXiv:2105.05233, appendix, without attention).  Knows no sampler and no training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from torch import nn


class NoisyClassifierModel(ModelMixin, ConfigMixin):
    """Logits of the classes of noisy pictures at any noise level: ``p(y | x_t) = softmax(classifier(x_t, t))``.

    Args: ``sample_size`` and ``in_channels`` of the pictures, ``num_classes``; ``block_out_channels``, one level a
    number, each level but the last halves the picture; ``layers_per_block`` residual blocks a level;
    ``norm_num_groups`` must divide all channels.  The default has 0.3 million parameters.
    Train it on ``E -log p(y | alpha x_0 + sigma eps)`` with the labels of the data and t over the training range.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 1,
        num_classes: int = 10,
        block_out_channels: Sequence[int] = (32, 48, 64, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
    ):
        super().__init__()
        first, width = block_out_channels[0], 4 * block_out_channels[0]
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, width)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.blocks = nn.ModuleList()
        channels = first
        for level, out in enumerate(block_out_channels):
            for _ in range(layers_per_block):
                self.blocks.append(
                    ResnetBlock2D(in_channels=channels, out_channels=out, temb_channels=width, groups=norm_num_groups)
                )
                channels = out
            if level < len(block_out_channels) - 1:
                self.blocks.append(Downsample2D(channels, use_conv=True, name="op"))
        self.norm_out = nn.GroupNorm(norm_num_groups, channels)
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """Logits (N, num_classes) of ``sample`` (N, C, H, W) at ``timestep``, a number or one per sample."""
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(t).to(sample.dtype))
        h = self.conv_in(sample)
        for block in self.blocks:
            h = block(h, embedding) if isinstance(block, ResnetBlock2D) else block(h)
        return self.classify(nn.functional.silu(self.norm_out(h)).mean((2, 3)))
