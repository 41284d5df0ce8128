"""Guiders of Modular Diffusers for what those of diffusers do not have.

``diffusers.guiders`` has classifier-free guidance in an interval of steps, its rescaling, adaptive projection and
autoguidance; CFG++ it has not, since that needs to know where the step goes: a guider and its scheduler are a pair.

pipe.update_components(**diffusers_sde.cfg_plus_plus(pipe.scheduler.config, strength=0.6))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config

from diffusers_sde.methods.guidance import cfg_plus_plus_scale
from diffusers_sde.schedulers import NamedScheduler


class CFGPlusPlusGuidance(ClassifierFreeGuidance):
    r"""CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2): the step goes to the guided data prediction but
    re-noises with the unconditional noise, ``x' = alpha' (D_null + w (D - D_null)) + sigma' eps_null``.

    A first-order step with guidance scale ``w / (1 - exp(-h))`` is that step, h being its length in log-SNR, so the
    guider reads the levels of its :attr:`scheduler`; make both with :func:`cfg_plus_plus`.

    Args:
        strength: w, from 0 (unconditional) to 1.
        start, stop, enabled: as of diffusers' guiders.

    Raises:
        ValueError: for a strength outside [0, 1].
    """

    scheduler: NamedScheduler | None = None

    @register_to_config
    def __init__(self, strength: float = 0.6, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        if not 0 <= strength <= 1:
            raise ValueError(f"strength of CFG++ must lie between 0 and 1, not {strength}.")
        super().__init__(guidance_scale=strength, start=start, stop=stop, enabled=enabled)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Before each evaluation: the scale of the step that starts there.

        Args:
            step, num_inference_steps, timestep: of the denoising loop.

        Raises:
            ValueError: where the guider has no scheduler.
        """
        super().set_state(step, num_inference_steps, timestep)
        if self.scheduler is None:
            raise ValueError("CFG++ needs the levels of its scheduler: set guider.scheduler = pipe.scheduler.")
        log_snr = self.scheduler.levels.log_snr
        row = self.scheduler.index_for_timestep(timestep)
        self.guidance_scale = cfg_plus_plus_scale(self.config.strength, float(log_snr[row]), float(log_snr[row + 1]))


def cfg_plus_plus(config: Mapping[str, Any], strength: float = 0.6, **options: Any) -> dict[str, Any]:
    """The guider and the first-order scheduler that are CFG++ together.

    Args:
        config: ``pipe.scheduler.config``.
        strength: see :class:`CFGPlusPlusGuidance`.
        options: further keys of the scheduler's config, as ``grid="karras"``.

    Returns:
        ``{"guider": ..., "scheduler": ...}``, for ``update_components`` of a modular pipeline.

    Raises:
        ValueError: as :class:`CFGPlusPlusGuidance` and ``NamedScheduler.from_config``.
    """
    guider = CFGPlusPlusGuidance(strength)
    guider.scheduler = NamedScheduler.from_config(config, sampler="euler", **options)
    return {"guider": guider, "scheduler": guider.scheduler}
