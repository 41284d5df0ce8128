"""What is trained: a fresh network or one of a pipeline, its forward process, and how it is called.

Knows diffusers' models and pipelines: the default network of a resolution, the config of each ``--path``, and how any
pipeline conditions its network (by asking the pipeline itself).  Knows nothing of losses, data sets or optimizers.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.conditioning import PLAIN, batched, call, calling, capture, moved, network_name, ragged, remembered
from diffusers_sde.configs import path_from_config
from diffusers_sde.models.classifier import NoisyClassifierModel
from diffusers_sde.models.flow_map_unet import FlowMapUNet2DModel
from diffusers_sde.paths import Path
from diffusers_sde.schedulers import FlowMapScheduler, ProbabilityFlowScheduler
from diffusers_sde.stock_configs import canonical_config

_FORWARD_PROCESSES: dict[str, dict[str, Any]] = {
    "vp": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "ve": {"sigma_data": 1.0, "sigma_min": 0.01, "sigma_max": 50.0, "sigma_schedule": "exponential"},
    "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_schedule": "karras"},
    "flow": {"use_flow_sigmas": True},
}

MAX_CONDITION_BYTES = 2**30  # of the conditions of captions that are kept


def process_scheduler(path: str, prediction_type: str) -> Any:
    """A scheduler whose config names the forward process ``path`` and the prediction: diffusers' own class where it
    has one (so that the model works without this package), else :class:`ProbabilityFlowScheduler`.

    ``vp`` linear betas 1e-4 to 0.02, ``scaled_linear`` Stable Diffusion's betas, ``cosine`` Nichol & Dhariwal's, ``ve``
    sigma 0.01 to 50 at unit data scale, ``edm`` Karras et al.'s sigma 0.002 to 80 and sigma_data 0.5, ``flow``
    rectified flow without shift.
    """
    process = _FORWARD_PROCESSES[path]
    stock = prediction_type in ("epsilon", "sample", "v_prediction")
    if path == "scaled_linear" and stock:
        kept = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # as Stable Diffusion's
        return diffusers.DDIMScheduler(**process, **kept, prediction_type=prediction_type)
    if path in ("vp", "cosine") and stock:
        return diffusers.DDPMScheduler(**process, prediction_type=prediction_type, clip_sample=False)
    if path == "flow" and prediction_type == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    if path == "edm" and prediction_type in ("epsilon", "v_prediction"):
        return diffusers.EDMEulerScheduler(prediction_type=prediction_type)
    return ProbabilityFlowScheduler(**process, prediction_type=prediction_type)


def default_network(resolution: int, channels: int, classes: int) -> diffusers.UNet2DModel:
    """A ``UNet2DModel`` that fits the resolution: widths 32, 64, 128, 128, ..., one level for each factor of two down
    to 8x8 (at least two levels), one layer a block, attention at the lowest; about 2.7 M parameters at 32x32.

    ``classes`` > 0 adds an embedding for each and a null one, the last.
    """
    levels = max(2, len([s for s in (8, 16, 32, 64, 128, 256) if s < resolution]) + 1)
    levels = min(levels, 6)
    widths = ([32, 64, 128] + [128] * 3)[:levels]
    divisor = 2 ** (levels - 1)
    if resolution % divisor:
        raise ValueError(f"--resolution {resolution} must be a multiple of {divisor} for the default network.")
    return diffusers.UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=classes + 1 if classes else None,
    )


def read_model_config(source: str) -> dict[str, Any]:
    """The config in ``--model_config``, a JSON file or a model folder; raises ``ValueError`` where there is none."""
    file = File(source) / "config.json" if File(source).is_dir() else File(source)
    if not file.is_file():
        raise ValueError(f"--model_config {source} does not exist: pass a JSON file or a folder with a config.json.")
    return json.loads(file.read_text())


def network_from_config(source: str, classes: int) -> Any:
    """A fresh network from ``--model_config``, whose ``_class_name`` is a class of diffusers (default ``UNet2DModel``).
    The number of classes is that of the data.  Raises ``ValueError`` for a config that names no model."""
    config = read_model_config(source)
    cls = getattr(diffusers, config.get("_class_name", "UNet2DModel"), None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ValueError(f"--model_config {source} names {config.get('_class_name')!r}, which diffusers does not have.")
    if issubclass(cls, diffusers.UNet2DModel):
        config["num_class_embeds"] = classes + 1 if classes else None
    return cls.from_config(config)


@dataclass
class Task:
    """The trainable ``network`` of ``pipe`` (its component ``name``), the process of its scheduler, and the condition.

    ``condition(labels, captions)`` gives the network's further keyword arguments for a batch; a label or caption that
    is None stands for no condition (classifier-free guidance's dropout).  ``trained`` is the module that the optimizer
    sees: the network, or a module that has it as its part ``network`` beside others of the pipeline.  ``mu`` is the
    dynamic shift that the pipeline samples with at the resolution of the training.  ``told_frames``: whether a network
    that knows of sizes and crops is told those of each picture.
    """

    pipe: Any
    name: str
    network: Any
    condition: Callable[[Sequence[int | None] | None, Sequence[str | None] | None], dict[str, Any]]
    timestep_scale: float = 1.0
    trained: Any = None
    mu: float | None = None
    told_frames: bool = False

    def __post_init__(self) -> None:
        self.trained = self.network if self.trained is None else self.trained

    def given(
        self,
        labels: Sequence[int | None] | None,
        captions: Sequence[str | None] | None,
        frames: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The condition of a batch with the frames (N, 4) of its pictures (:meth:`.framing.Framing.frame`)."""
        condition = self.condition(labels, captions)
        return condition if frames is None or not self.told_frames else with_frames(condition, frames)

    @property
    def parts(self) -> dict[str, Any]:
        """What is trained, by the names of the pipeline's components."""
        if self.trained is self.network:
            return {self.name: self.network}
        return {self.name if name == "network" else name: part for name, part in self.trained.named_children()}

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    @property
    def vae(self) -> Any:
        return getattr(self.pipe, "vae", None)

    @property
    def path(self) -> Path:
        return path_from_config(canonical_config(self.scheduler.config))

    @property
    def forward_process(self) -> str:
        """The process and what is predicted, in words."""
        return "none" if self.scheduler is None else f"{type(self.path).__name__}, {self.prediction_type}"

    @property
    def process_facts(self) -> dict[str, Any]:
        """What a checkpoint says of the process: its class and noise levels, whatever names it has."""
        path = self.path
        levels = ", ".join(f"{level:.3f}" for level in path.log_snr(np.linspace(path.noisiest, path.cleanest, 5)))
        known = f"{type(path).__name__} with log_snr {levels}"
        return {"--prediction_type": self.prediction_type, "--path": known}

    @property
    def card_values(self) -> dict[str, Any]:
        """What the card's snippet is filled in with."""
        return {"channels": self.channels, "size": self.network.config.get("sample_size")}

    @property
    def prediction_type(self) -> str:
        return str(canonical_config(self.scheduler.config).get("prediction_type", "epsilon"))

    @property
    def channels(self) -> int:
        """Channels of the images that the data set has to give."""
        return image_channels(self.network if self.vae is None else self.vae)


def image_channels(model: Any) -> int:
    """Channels of the images that a network or an autoencoder takes."""
    return int(model.config.get("in_channels") or model.config["input_channels"])  # the latter of Qwen-Image's


def fresh_task(network: Any, scheduler: Any, classes: int) -> Task:
    """A network without a pipeline of its own: unconditional or class-conditional."""
    return _unet_task(diffusers.DDPMPipeline(unet=network, scheduler=scheduler), classes)


def pipeline_task(pipe: Any, classes: int, captions: bool, resolution: int | None = None) -> Task:
    """The network of a pretrained pipeline, told what the pipeline tells it at a resolution (None: at its own).

    Raises ``ValueError`` where the pipeline has no network to train or the data lacks what it is conditioned on.
    """
    name = network_name(pipe)
    if name is None:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer: pass another pipeline.")
    network = getattr(pipe, name)
    if isinstance(network, diffusers.UNet2DModel) and getattr(pipe, "vae", None) is None:
        own = network.config.num_class_embeds
        if own and classes and classes != own - 1:
            raise ValueError(
                f"The network knows {own - 1} classes and a null class, the data has {classes}: use the same classes."
            )
        if own and not classes:
            raise ValueError(f"The network is conditioned on {own - 1} classes: put the images into class folders.")
        return _unet_task(pipe, classes if own else 0)
    takes = inspect.signature(pipe.__call__).parameters
    for other in pipe.components.values():
        if isinstance(other, torch.nn.Module) and other is not network:
            other.requires_grad_(False).eval()
    if "class_labels" in takes:
        if not classes:
            raise ValueError(f"{type(pipe).__name__} is class-conditional: put the images into class folders.")
        return _captured_task(pipe, name, network, resolution, by_label=True)
    if "prompt" in takes:
        if not captions:
            raise ValueError(f"{type(pipe).__name__} is conditioned on text: add captions in a metadata.jsonl.")
        return _captured_task(pipe, name, network, resolution, by_label=False)
    raise ValueError(f"{type(pipe).__name__} takes neither class labels nor prompts: pass another pipeline.")


def _unet_task(pipe: Any, classes: int) -> Task:
    """A bare network, with a pipeline that can be called: that of diffusers takes no labels."""
    if classes:
        pipe = ClassConditionalPipeline(pipe.unet, pipe.scheduler)

    def condition(labels: Sequence[int | None] | None, captions: Sequence[str | None] | None) -> dict[str, Any]:
        if not classes or labels is None:
            return {}
        known = torch.tensor([classes if label is None else label for label in labels])
        return {"class_labels": known.to(pipe.unet.device)}

    return Task(pipe, "unet", pipe.unet, condition)


def flow_map_task(task: Task, flow_map: str) -> Task:
    """``task`` with a scheduler that jumps; for ``mean_flow`` also with a network that is told where to.

    Raises ``ValueError`` for a mean flow from a network that is no ``UNet2DModel``.
    """
    task.pipe.scheduler = FlowMapScheduler.from_config(task.scheduler.config, flow_map=flow_map)
    if flow_map == "consistency" or isinstance(task.network, FlowMapUNet2DModel):
        return task
    if not isinstance(task.network, diffusers.UNet2DModel):
        raise ValueError(
            f"{type(task.network).__name__} has no embedding of a target time: use --objective consistency."
        )
    network = FlowMapUNet2DModel.from_unet(task.network)
    task.pipe.register_modules(**{task.name: network})
    return dataclasses.replace(task, network=network, trained=network)


def classifier_task(scheduler: Any, resolution: int, channels: int, classes: int) -> Task:
    """A small classifier of noisy images, for classifier guidance on the process of ``scheduler``."""
    if not classes:
        raise ValueError("A classifier needs labels: put the images into class folders.")
    network = NoisyClassifierModel(sample_size=resolution, in_channels=channels, num_classes=classes)
    nothing = types.SimpleNamespace(scheduler=scheduler, components={})
    return Task(nothing, "classifier", network, lambda labels, captions: {})


def _captured_task(pipe: Any, name: str, network: Any, resolution: int | None, by_label: bool) -> Task:
    """Any pipeline: its own call says for each caption or label what else the network is given
    (:func:`diffusers_sde.conditioning.capture`); kept on the host afterwards, within :data:`MAX_CONDITION_BYTES`."""
    size = {} if resolution is None else {"height": resolution, "width": resolution}
    how = calling(network)
    step = 1 if how is PLAIN else 2 * pipe.vae_scale_factor
    if resolution is not None and resolution % step:
        raise ValueError(
            f"{type(pipe).__name__} sees latents in patches of 2x2: pass a --resolution that is a multiple of {step}."
        )
    kind, nothing = ("class_labels", 0) if by_label else ("prompt", "")
    first = capture(pipe, **{kind: [nothing]}, **size)

    def make(key: Any) -> dict[str, Any]:
        if by_label:  # the null class is no label that a pipeline takes
            null = getattr(network.config, "num_embeds_ada_norm", None)
            return {**first.condition, "class_labels": torch.tensor([null if key is None else key])}
        if key is None and pipe.config.get("force_zeros_for_empty_prompt"):  # what it samples with, of SDXL
            return silent(first.condition)
        return capture(pipe, prompt=[key or ""], **size).condition

    given = remembered(make, MAX_CONDITION_BYTES)

    def condition(labels: Sequence[int | None] | None, captions: Sequence[str | None] | None) -> dict[str, Any]:
        keys: Sequence[Any] = (labels if by_label else captions) or ()
        values = [given(key) for key in keys]
        if ragged(how, values):  # the pipeline fills up a batch in its own way
            return moved(capture(pipe, prompt=[key or "" for key in keys], **size).condition, network.device)
        return moved(batched(how, values), network.device)

    return Task(pipe, name, network, condition, first.time_scale, mu=first.mu, told_frames=True)


def with_frames(condition: dict[str, Any], frames: torch.Tensor) -> dict[str, Any]:
    """A condition with the sizes (N, 2) and crops (N, 2) of each picture in place of those of a whole one (Podell et
    al. 2023, arXiv:2307.01952, section 2.2), where the network is told such: SDXL's time ids, CogView's coordinates."""
    size, corner = frames.split(2, 1)
    out = dict(condition)
    if "crop_coords" in out:
        out["original_size"], out["crop_coords"] = size.to(out["original_size"]), corner.to(out["crop_coords"])
    ids = (out.get("added_cond_kwargs") or {}).get("time_ids")
    if ids is not None and ids.shape[1] == 6:  # five are those of the refiner
        told = torch.cat([size.to(ids), corner.to(ids), ids[:, 4:]], 1)
        out["added_cond_kwargs"] = {**out["added_cond_kwargs"], "time_ids": told}
    return out


def silent(condition: dict[str, Any]) -> dict[str, Any]:
    """A condition whose text embeddings, pooled ones too, are zeros."""
    return {
        key: silent(value)
        if isinstance(value, dict)
        else torch.zeros_like(value)
        if key in ("encoder_hidden_states", "text_embeds")
        else value
        for key, value in condition.items()
    }


def call_network(
    task: Task, network: Any, x: torch.Tensor, times: torch.Tensor, sigma: torch.Tensor, condition: dict[str, Any]
) -> torch.Tensor:
    """The prediction for states ``x`` at ``times`` (N,): EDM networks see ``x / sqrt(sigma^2 + sigma_data^2)``, learned
    variances are split off.  ``network`` is ``task.network`` or what Accelerate made of it."""
    how = calling(task.network)
    return call(how, network, x * task.path.input_scale(sigma), times, task.timestep_scale, condition)
