"""Pipelines with our scheduler load where the package is installed but not imported."""

import pytest
from contract_helpers import in_fresh_process
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_sde import ProbabilityFlowScheduler, write_component_modules


def saved(folder, scheduler):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)


def test_component_module_loads_without_importing_the_package(tmp_path):
    """`trust_remote_code=True` finds the class through the written module; the process has not imported us."""
    saved(tmp_path, ProbabilityFlowScheduler(solver_order=3))
    assert [p.relative_to(tmp_path).as_posix() for p in write_component_modules(tmp_path)] == [
        "scheduler/diffusers_sde.py"
    ]
    script = (
        "import sys; from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(pipe.scheduler).__name__, pipe.scheduler.config.solver_order)"
    )
    assert in_fresh_process(script, tmp_path).split() == ["ProbabilityFlowScheduler", "3"]


def test_folders_without_our_components_are_refused(tmp_path):
    """No pipeline, or none of ours: one sentence, nothing written."""
    with pytest.raises(FileNotFoundError, match=r"pass the folder that pipe\.save_pretrained wrote"):
        write_component_modules(tmp_path)
    saved(tmp_path, DDPMScheduler())
    with pytest.raises(ValueError, match=r"set pipe\.scheduler before saving"):
        write_component_modules(tmp_path)
    assert not list(tmp_path.rglob("diffusers_sde.py"))
