"""Conversion: a scheduler from the config of any diffusers scheduler, and the classes that can be built from ours.

Knows diffusers' loading contract (``from_config``, ``from_pretrained``, ``compatibles``) and
:mod:`diffusers_sde.configs`.  Knows nothing of runs, tables or steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_sde.configs import canonical_config, is_canonical, named_grid


class Conversion(SchedulerMixin, ConfigMixin):
    """A scheduler that reads the configs of diffusers' schedulers and can be converted to them."""

    config_name = "scheduler_config.json"
    _own_keys: tuple[str, ...] = ()  # config keys of the solver, not inherited from other classes' configs

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from the config of any diffusers scheduler, keeping its process (path, prediction, data options).

        Its solver is not kept, and its grid only where it is not a habit of the class; pass ``grid=`` or diffusers'
        flags (``use_karras_sigmas=True``, ``timestep_spacing="trailing"``) to choose.  Raises ``ValueError`` for a
        config without a diffusion process.
        """
        if isinstance(config, Mapping):
            foreign = not is_canonical(config)
            config = canonical_config(config)
            if foreign:
                config = {k: v for k, v in config.items() if k not in cls._own_keys or cls._inherits(config, k)}
            if "grid" not in kwargs and named_grid(kwargs):
                kwargs["grid"] = named_grid(kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _inherits(cls, config: Mapping[str, Any], key: str) -> bool:
        """Whether a solver key of a stock config means the same here."""
        return False

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        names = (
            "DDIMScheduler DDPMScheduler DEISMultistepScheduler DPMSolverMultistepScheduler "
            "DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler EulerDiscreteScheduler "
            "FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler HeunDiscreteScheduler "
            "KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LMSDiscreteScheduler PNDMScheduler "
            "SASolverScheduler UniPCMultistepScheduler"
        )
        return [cls, *(getattr(diffusers, name) for name in names.split() if hasattr(diffusers, name))]
