"""Real diffusers pipelines with tiny random weights, built without the Hub.

Every builder in `PIPELINES` returns `(pipe, call_kwargs, expected_shape)`: a pipeline with the stock scheduler of its
published checkpoint, the arguments of one call, and the shape of `pipe(**call_kwargs)[0]`. Weights are cached and
shared (nothing here trains them); the scheduler and the generator are new at every call. One module a kind of model.
"""

from tiny_pipelines import (  # noqa: F401
    audio,
    cosmos,
    flow_images,
    latent_images,
    more_videos,
    other_images,
    videos,
)
from tiny_pipelines.common import PIPELINES, cosine_dpm_solver, generator, stock
from tiny_pipelines.other_images import ddpm_unet

__all__ = ["PIPELINES", "cosine_dpm_solver", "ddpm_unet", "generator", "stock"]
