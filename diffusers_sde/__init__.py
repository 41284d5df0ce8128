"""diffusers_sde: diffusion samplers from one forward process, one coefficient table, one step.

import diffusers_sde
pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)

Each name is imported when it is first used, so that the command line answers before torch and diffusers are imported.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from diffusers_sde.registration import register

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from diffusers_sde.calibration.run import calibrate
    from diffusers_sde.class_conditional import ClassConditionalPipeline
    from diffusers_sde.generation import sample_adaptive, sample_parallel
    from diffusers_sde.guiders import cfg_plus_plus
    from diffusers_sde.hub import write_component_modules
    from diffusers_sde.models.classifier import NoisyClassifierModel
    from diffusers_sde.models.embedding_text import EmbeddingTextModel
    from diffusers_sde.models.flow_map_unet import FlowMapUNet2DModel
    from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel
    from diffusers_sde.models.token_oracle import EmbeddedChainModel, MarkovChainModel
    from diffusers_sde.names import sampler
    from diffusers_sde.schedulers import (
        CalibratedScheduler,
        DPMSolverScheduler,
        FlowMapScheduler,
        MaskedDiffusionScheduler,
        NamedScheduler,
        ProbabilityFlowScheduler,
        ReverseSDEScheduler,
        TableScheduler,
        UniformDiffusionScheduler,
        transition,
    )

__version__ = "0.1.0"
__all__ = [
    "CalibratedScheduler",
    "ClassConditionalPipeline",
    "DPMSolverScheduler",
    "EmbeddedChainModel",
    "EmbeddingTextModel",
    "FlowMapScheduler",
    "FlowMapUNet2DModel",
    "GaussianMixtureModel",
    "MarkovChainModel",
    "MaskedDiffusionScheduler",
    "ModelMixin",
    "NamedScheduler",
    "NoisyClassifierModel",
    "ProbabilityFlowScheduler",
    "ReverseSDEScheduler",
    "SchedulerMixin",
    "TableScheduler",
    "UniformDiffusionScheduler",
    "calibrate",
    "cfg_plus_plus",
    "sample_adaptive",
    "sample_parallel",
    "sampler",
    "transition",
    "write_component_modules",
]

# ModelMixin and SchedulerMixin are here because diffusers looks for a component's base class in its library.
_MODULES = {
    "ClassConditionalPipeline": "diffusers_sde.class_conditional",
    "GaussianMixtureModel": "diffusers_sde.models.gaussian_mixture",
    "EmbeddingTextModel": "diffusers_sde.models.embedding_text",
    "EmbeddedChainModel": "diffusers_sde.models.token_oracle",
    "MarkovChainModel": "diffusers_sde.models.token_oracle",
    "calibrate": "diffusers_sde.calibration.run",
    "cfg_plus_plus": "diffusers_sde.guiders",
    "sampler": "diffusers_sde.names",
    "sample_adaptive": "diffusers_sde.generation",
    "sample_parallel": "diffusers_sde.generation",
    "write_component_modules": "diffusers_sde.hub",
    "NoisyClassifierModel": "diffusers_sde.models.classifier",
    "FlowMapUNet2DModel": "diffusers_sde.models.flow_map_unet",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(importlib.import_module(_MODULES.get(name, "diffusers_sde.schedulers")), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # from now on it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
