"""All five schedulers over any process: the calibrated one is given a calibration that holds the exact tables."""

import pytest

from diffusers_sde import (
    CalibratedScheduler,
    DPMSolverScheduler,
    FlowMapScheduler,
    ProbabilityFlowScheduler,
    ReverseSDEScheduler,
)
from diffusers_sde.defaults import standard_table
from diffusers_sde.schedulers.calibrated import process_values
from diffusers_sde.schedulers.calibration_format import written_calibration, written_entry

FIVE = [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler, CalibratedScheduler, FlowMapScheduler]

by_each = pytest.mark.parametrize("cls", FIVE, ids=lambda cls: cls.__name__)


def calibration(config, steps):
    """A calibration for these numbers of steps whose learned rows are those of the exact solver, so that it lost to
    nothing."""
    exact = ProbabilityFlowScheduler.from_config(config, grid="log_snr")  # a grid that the default is not
    tables, table = {}, None
    for n in steps:
        exact.set_timesteps(n)
        table = standard_table(exact.path, exact.levels)
        errors = dict.fromkeys(["training", "held_out", "exact", "stock"], 0.0)
        tables[n] = written_entry(exact.levels, table, None, errors)
    return written_calibration(process_values(exact.config), table.data_std, False, tables)


def build(cls, process=None, steps=(10,), **kwargs):
    """One of the five for the process of these keyword arguments."""
    process = process or {}
    if cls is CalibratedScheduler:
        kwargs["calibration"] = calibration(ProbabilityFlowScheduler(**process).config, steps)
    return cls(**process, **kwargs)


def build_from(cls, config, steps=(10,), **kwargs):
    """One of the five from the config of another scheduler."""
    if cls is CalibratedScheduler:
        kwargs["calibration"] = calibration(config, steps)
    return cls.from_config(config, **kwargs)
