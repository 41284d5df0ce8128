"""diffusers_sde: diffusion samplers from one forward process, one coefficient table, one step.

import diffusers_sde
pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
"""

# ModelMixin and SchedulerMixin are here because diffusers looks for a component's base class in its module.
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils as _loading

from diffusers_sde.calibration import calibrate
from diffusers_sde.hub import write_component_modules
from diffusers_sde.models.classifier import NoisyClassifierModel
from diffusers_sde.models.flow_map_unet import FlowMapUNet2DModel
from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel
from diffusers_sde.schedulers import (
    CalibratedScheduler,
    DPMSolverScheduler,
    FlowMapScheduler,
    ProbabilityFlowScheduler,
    ReverseSDEScheduler,
    TableScheduler,
)

__version__ = "0.1.0"
__all__ = [
    "CalibratedScheduler",
    "DPMSolverScheduler",
    "FlowMapScheduler",
    "FlowMapUNet2DModel",
    "GaussianMixtureModel",
    "ModelMixin",
    "NoisyClassifierModel",
    "ProbabilityFlowScheduler",
    "ReverseSDEScheduler",
    "SchedulerMixin",
    "TableScheduler",
    "calibrate",
    "write_component_modules",
]

# `model_index.json` stores a component's module; diffusers finds base class and save method through this table.
_loading.LOADABLE_CLASSES.setdefault(
    "diffusers_sde", {base: ["save_pretrained", "from_pretrained"] for base in ("ModelMixin", "SchedulerMixin")}
)
