"""Conversion: a scheduler from the config of any diffusers scheduler, and the classes that can be built from ours.

Knows diffusers' loading contract (``from_config``, ``from_pretrained``, ``compatibles``).  Which process a config
describes is said by :mod:`diffusers_sde.stock_configs`; knows nothing of runs, tables or steps.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_sde.configs import settled
from diffusers_sde.errors import UsageError
from diffusers_sde.stock_configs import (
    canonical_config,
    class_name,
    is_canonical,
    nearest_key,
    stock_defaults,
    unknown_keys,
)

# fmt: off
COMPATIBLE = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
)
# fmt: on
# Keywords of from_pretrained that diffusers' load_config passes on although they say how to load, not what.
_LOADING = (
    "device_map",
    "dtype",
    "output_loading_info",
    "resume_download",
    "torch_dtype",
    "trust_remote_code",
    "use_auth_token",
    "use_safetensors",
    "variant",
)  # fmt: skip


class Conversion(SchedulerMixin, ConfigMixin):
    """A scheduler that reads the configs of diffusers' schedulers and can be converted to them."""

    config_name = "scheduler_config.json"
    _own_keys: tuple[str, ...] = ()  # config keys of the solver, not inherited from other classes' configs
    _flow_maps = False  # whether configs of few-step networks that jump are welcome

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from the config of any diffusers scheduler, keeping its process (path, prediction, data options).

        Its solver is not kept, and its grid only where it is not a habit of the class (``use_karras_sigmas`` and its
        like and ``timestep_spacing="trailing"`` are no habits; leading and linspace are).

        Args:
            config: ``scheduler.config``, or the dictionary of a ``scheduler_config.json``.
            return_unused_kwargs: also return the keywords that are no parameters here, as diffusers does.
            kwargs: changes of the config, in its own keys (``flow_shift=3.0``, ``use_karras_sigmas=False``,
                ``timestep_spacing="trailing"``, ...) or in ours (``grid=``, ``shift=``, solver parameters).

        Returns:
            The scheduler, or with ``return_unused_kwargs`` the pair (scheduler, dictionary).

        Raises:
            UsageError: for what is no config, a config without a diffusion process, and an unknown keyword.
        """
        if isinstance(config, ConfigMixin):
            raise UsageError(f"from_config takes a config: pass scheduler.config, not the {type(config).__name__}.")
        if not isinstance(config, Mapping):
            raise UsageError(
                f"from_config takes the config of a scheduler, not {config!r}: pass scheduler.config, or load a folder "
                "or a Hub repository with from_pretrained."
            )
        config, parameters = settled(config), inspect.signature(cls.__init__).parameters
        if class_name(config) == cls.__name__:  # a file written by hand may leave out what is default
            config = {"use_flow_sigmas": False, "noise_conditioning": "log", **config}
        changes = {k: v for k, v in kwargs.items() if k not in _LOADING}
        unknown = unknown_keys([k for k in changes if k not in parameters], config)
        if unknown and not return_unused_kwargs:
            near = nearest_key(unknown[0], [*parameters, *config])
            raise UsageError(f"{unknown[0]} is no key of a scheduler config{f': do you mean {near}?' if near else '.'}")
        unused = {k: changes.pop(k) for k in unknown}
        values = canonical_config(config, changes, flow_maps=cls._flow_maps)
        own = {**cls._solver_settings(config), **{k: v for k, v in changes.items() if k in cls._own_keys}}
        values = {k: v for k, v in values.items() if k not in cls._own_keys} | own
        return super().from_config(values, return_unused_kwargs=return_unused_kwargs, **unused)

    @classmethod
    def _solver_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The solver's own keys that a config hands on: all that were set in one of ours, of a stock class those that
        mean the same here and say something."""
        name, unset = class_name(config), set(config.get("_use_default_values") or ())
        values, ours = {**stock_defaults(name), **config}, is_canonical(config)
        own = {k: values[k] for k in cls._own_keys if k in values and not (ours and k in unset)}
        if ours and not hasattr(diffusers, name):
            return own
        defaults = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items()}
        return {k: v for k, v in own.items() if v != defaults[k] and cls._inherits(values, k, ours)}

    @classmethod
    def _inherits(cls, config: Mapping[str, Any], key: str, ours: bool) -> bool:
        """Whether a solver key of a stock class's config means the same here; ``ours``: the config has been one of
        ours before."""
        return ours

    @property
    def compatibles(self) -> list[type]:
        """The classes, ours and stock, that can be built from this config."""
        return [cls for cls in self._get_compatibles() if _builds(cls, self.config)]

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls, *(getattr(diffusers, name) for name in COMPATIBLE if hasattr(diffusers, name))]


def _builds(cls: Any, config: Mapping[str, Any]) -> bool:
    """Whether a class accepts a config: some refuse others' solver settings or beta schedules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls.from_config(config)
        except (NotImplementedError, ValueError):
            return False
    return True


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record of diffusers says more than that a stock class does not know our keys.  It keeps them for
    the way back, and the warning would list all of them in every conversion."""
    message = record.getMessage()
    return not ("config attributes" in message and "'noise_conditioning'" in message)


logging.getLogger(ConfigMixin.__module__).addFilter(_is_news)
