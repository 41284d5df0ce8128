"""diffusers_sde: diffusion samplers from one forward process, one coefficient table, one step.

import diffusers_sde
pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)

Importing the package imports neither torch nor diffusers, so that its commands answer at once; a public name brings
what it needs when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from importlib import abc, util
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

    from diffusers_sde.analytic import GaussianMixtureModel
    from diffusers_sde.calibration import calibrate
    from diffusers_sde.hub import write_component_modules
    from diffusers_sde.models.classifier import NoisyClassifierModel
    from diffusers_sde.models.flow_map_unet import FlowMapUNet2DModel
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

# ModelMixin and SchedulerMixin are here because diffusers looks for a component's base class in its module.
_MODULES = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "GaussianMixtureModel": "diffusers_sde.analytic",
    "calibrate": "diffusers_sde.calibration",
    "write_component_modules": "diffusers_sde.hub",
    "NoisyClassifierModel": "diffusers_sde.models.classifier",
    "FlowMapUNet2DModel": "diffusers_sde.models.flow_map_unet",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "diffusers_sde.schedulers")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `model_index.json` stores a component's module; diffusers finds base class and save method through a table of its
# pipeline loader, which this package enters as soon as both are imported, in whatever order.
_LOADER = "diffusers.pipelines.pipeline_loading_utils"


def _register(loader: ModuleType) -> None:
    bases = ("ModelMixin", "SchedulerMixin")
    loader.LOADABLE_CLASSES.setdefault(__name__, {base: ["save_pretrained", "from_pretrained"] for base in bases})


class _LoaderFinder(abc.MetaPathFinder):
    """Waits for diffusers' pipeline loader, finds it as Python would have, and registers this package behind it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _LOADER:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _LOADER in sys.modules:
    _register(sys.modules[_LOADER])
else:
    sys.meta_path.insert(0, _LoaderFinder())
