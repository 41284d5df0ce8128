"""diffusers schedulers: thin shells that choose a table and let one shared base run it; of tokens, a law."""

from diffusers_sde.schedulers.base import SchedulerOutput, TableScheduler
from diffusers_sde.schedulers.calibrated import CalibratedScheduler
from diffusers_sde.schedulers.discrete import DiscreteScheduler, DiscreteSchedulerOutput
from diffusers_sde.schedulers.dpm_solver import DPMSolverScheduler
from diffusers_sde.schedulers.flow_map import FlowMapScheduler
from diffusers_sde.schedulers.masked_diffusion import MaskedDiffusionScheduler
from diffusers_sde.schedulers.named import NamedScheduler
from diffusers_sde.schedulers.probability_flow import ProbabilityFlowScheduler
from diffusers_sde.schedulers.reverse_sde import ReverseSDEScheduler
from diffusers_sde.schedulers.scoring import transition
from diffusers_sde.schedulers.uniform_diffusion import UniformDiffusionScheduler

__all__ = [
    "CalibratedScheduler",
    "DPMSolverScheduler",
    "DiscreteScheduler",
    "DiscreteSchedulerOutput",
    "FlowMapScheduler",
    "MaskedDiffusionScheduler",
    "NamedScheduler",
    "ProbabilityFlowScheduler",
    "ReverseSDEScheduler",
    "SchedulerOutput",
    "TableScheduler",
    "UniformDiffusionScheduler",
    "transition",
]
