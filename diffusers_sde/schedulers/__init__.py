"""diffusers schedulers: thin shells that choose a table and let one shared base run it."""

from diffusers_sde.schedulers.base import SchedulerOutput, TableScheduler
from diffusers_sde.schedulers.calibrated import CalibratedScheduler
from diffusers_sde.schedulers.dpm_solver import DPMSolverScheduler
from diffusers_sde.schedulers.flow_map import FlowMapScheduler
from diffusers_sde.schedulers.probability_flow import ProbabilityFlowScheduler
from diffusers_sde.schedulers.reverse_sde import ReverseSDEScheduler
from diffusers_sde.schedulers.scoring import transition

__all__ = [
    "CalibratedScheduler",
    "DPMSolverScheduler",
    "FlowMapScheduler",
    "ProbabilityFlowScheduler",
    "ReverseSDEScheduler",
    "SchedulerOutput",
    "TableScheduler",
    "transition",
]
