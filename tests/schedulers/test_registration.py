"""The package is imported lazily, and diffusers finds its components whichever of the two is imported first."""

import ast
import inspect
import json
import sys
from pathlib import Path

import diffusers
import pytest
from contract_helpers import in_fresh_process

import diffusers_sde
from diffusers_sde import (
    ClassConditionalPipeline,
    FlowMapUNet2DModel,
    GaussianMixtureModel,
    ProbabilityFlowScheduler,
    registration,
)

ORDERS = {
    "ours first": "import diffusers_sde, diffusers",
    "diffusers first": "import diffusers, diffusers_sde",
    "a pipeline first": "from diffusers import DiffusionPipeline; import diffusers_sde",
    "a scheduler first": "from diffusers_sde.schedulers import ProbabilityFlowScheduler",
    "all names": "from diffusers_sde import *",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    model = GaussianMixtureModel([1.0], [[0.0] * 16], [1.0], sample_size=4)
    ClassConditionalPipeline(model, ProbabilityFlowScheduler(solver_order=3)).save_pretrained(path)
    return path


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    script = "import sys, diffusers_sde; print({'torch', 'diffusers', 'numpy'} & set(sys.modules) or 'none')"
    assert in_fresh_process(script).strip() == "none"


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_saved_pipeline_loads_and_is_saved_under_the_short_name(order, folder, tmp_path):
    """Also the table by which pipelines on the Hub are checked has our name before any class of ours is asked for."""
    script = f"""if True:
        import sys
        {order}
        from diffusers import DiffusionPipeline
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
        assert "diffusers_sde" in LOADABLE_CLASSES
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
        print(*(type(part).__name__ for part in (pipe, pipe.scheduler, pipe.unet)), pipe.scheduler.config.solver_order)
        pipe.save_pretrained(sys.argv[2])
    """
    found = in_fresh_process(script, folder, tmp_path)
    assert found.split() == ["ClassConditionalPipeline", "ProbabilityFlowScheduler", "GaussianMixtureModel", "3"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_sde", "ProbabilityFlowScheduler"]
    assert index["unet"] == ["diffusers_sde", "GaussianMixtureModel"]


def test_the_waiting_finder_is_gone_once_diffusers_has_the_entry():
    assert registration.LOADER in sys.modules and registration._WhenImported not in sys.meta_path


def test_diffusers_finds_our_pipeline_and_misses_what_it_missed_before():
    assert diffusers.ClassConditionalPipeline is ClassConditionalPipeline
    assert diffusers.DDPMPipeline.__name__ == "DDPMPipeline"
    with pytest.raises(AttributeError, match="module diffusers has no attribute ClassConditional"):
        diffusers.ClassConditional  # noqa: B018


def test_every_public_name_is_found_and_listed():
    for name in diffusers_sde.__all__:
        assert getattr(diffusers_sde, name).__name__ == name
    assert set(diffusers_sde.__all__) <= set(dir(diffusers_sde))
    assert diffusers_sde.FlowMapUNet2DModel is FlowMapUNet2DModel
    assert inspect.getsource(diffusers_sde.ProbabilityFlowScheduler).startswith("class ProbabilityFlowScheduler")
    with pytest.raises(AttributeError, match="module 'diffusers_sde' has no attribute 'ProbabilityFlow'"):
        diffusers_sde.ProbabilityFlow  # noqa: B018


def test_type_checkers_see_every_public_name():
    """The names that the module imports for type checkers are those that it imports when they are used."""
    tree = ast.parse(Path(diffusers_sde.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(typed) == sorted(diffusers_sde.__all__)
    for name, module in typed.items():
        assert getattr(diffusers_sde, name) is getattr(sys.modules[module], name), name
