"""What callers of any pipeline may get wrong: one sentence before any evaluation; and labels by name."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from pipeline_parts import save_oracle, tiny_unet
from snippets import load

from diffusers_sde import FlowMapScheduler, GaussianMixtureModel, ReverseSDEScheduler
from diffusers_sde.assets import FASHION_MODEL, FLOW_MAP_MODEL
from diffusers_sde.methods.pipeline_io import label_tensor
from diffusers_sde.methods.posterior import check_observation
from diffusers_sde.sampling import class_names
from diffusers_sde.training.prepare import FASHION_CLASSES

PICTURES = torch.zeros(2, 1, 1, 4)
NEEDED = {
    "flow_map": {},
    "guided_generation": {"class_labels": 0, "corrector_steps": 1},
    "inversion": {"image": PICTURES},
    "likelihood": {"image": PICTURES},
    "posterior_sampling": {
        "observation": torch.zeros(2, 3),
        "operator": lambda x: x.flatten(1)[:, :3],
        "noise_std": 0.1,
    },
    "steering": {"reward": lambda x: x.mean((1, 2, 3))},
}
SCHEDULERS = {"flow_map": FlowMapScheduler, "steering": ReverseSDEScheduler}


def pipeline(name, folder):
    save_oracle(folder)
    pipe = load(name, folder)
    if name in SCHEDULERS:
        pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("name", NEEDED)
def test_numbers_of_a_wrong_type_get_a_sentence(tmp_path, name, monkeypatch):
    pipe = pipeline(name, tmp_path)
    monkeypatch.setattr(GaussianMixtureModel, "forward", lambda *args, **kwargs: pytest.fail("evaluated"))
    tried = 0
    for parameter in inspect.signature(pipe.__call__).parameters.values():
        kind = str(parameter.annotation)
        if not re.search("int|float", kind):
            continue
        for wrong in ("3", [3], True, math.nan if "float" in kind else 2.5):
            with pytest.raises(ValueError, match=rf"{parameter.name}|Correctors need") as error:
                pipe(**{**NEEDED[name], parameter.name: wrong})
            assert str(error.value).endswith(".") and "\n" not in str(error.value)
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize("name", ["inversion", "likelihood", "posterior_sampling"])
def test_a_nan_anywhere_in_a_batch_is_refused(tmp_path, name):
    pipe = pipeline(name, tmp_path)
    key = "observation" if name == "posterior_sampling" else "image"
    values = NEEDED[name][key].clone()
    values[1].view(-1)[2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        pipe(**{**NEEDED[name], key: values})


@pytest.mark.parametrize("name", ["flow_map", "guided_generation", "posterior_sampling"])
def test_latents_that_are_not_finite_are_refused(tmp_path, name):
    latents = torch.zeros(2 if name == "posterior_sampling" else 1, 1, 1, 4)
    latents[-1, 0, 0, 3] = math.inf
    with pytest.raises(ValueError, match="latents are not finite"):
        pipeline(name, tmp_path)(**NEEDED[name], latents=latents)


def test_every_observation_is_looked_at():
    y, operator = torch.zeros(3, 3), NEEDED["posterior_sampling"]["operator"]
    check_observation(operator, y, 0.1, PICTURES[:1])
    y[2, 1] = math.nan
    with pytest.raises(ValueError, match="The observation is not finite"):
        check_observation(operator, y, 0.1, PICTURES[:1])


# -- labels --


@pytest.mark.parametrize("key", ["_class_names", "id2label"])
def test_names_are_labels_where_the_network_has_names(tmp_path, key):
    network = tiny_unet(classes=4)
    with pytest.raises(ValueError, match="have no names"):
        label_tensor(network, "shoe")
    names = ["bag", "Shoe", "shoe"]
    network.register_to_config(**{key: names if key == "_class_names" else {str(i): n for i, n in enumerate(names)}})
    network.save_pretrained(tmp_path)
    network = UNet2DModel.from_pretrained(tmp_path)
    assert class_names(network) == names
    assert label_tensor(network, "shoe").tolist() == [2] and label_tensor(network, "BAG", 2).tolist() == [0, 0]
    assert label_tensor(network, ["Shoe", 0, "SHOE", 3]).tolist() == [1, 0, 1, 3]
    with pytest.raises(
        ValueError,
        match=r"There is no class 'hat', the nearest is 'bag': .* names among bag, Shoe",
    ):
        label_tensor(network, ["bag", "hat"])


def test_the_embedded_networks_know_their_names():
    for folder in (FASHION_MODEL, FLOW_MAP_MODEL):
        config = UNet2DModel.load_config(folder, subfolder="unet")
        assert tuple(config["_class_names"]) == FASHION_CLASSES and config["num_class_embeds"] == 11


def test_a_pipeline_takes_names(tmp_path):
    pipe = pipeline("guided_generation", tmp_path)
    pipe.unet.register_to_config(_class_names=["one", "two", "three"])
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    found = [
        pipe(labels, generator=torch.Generator().manual_seed(0), **options).images for labels in (["two", 0], [1, 0])
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("labels", [1.5, [0, None], [0, 1.0], True, [], np.zeros(2), torch.zeros(2), [-1], 2**70])
def test_other_labels_get_a_sentence(labels):
    with pytest.raises(ValueError, match="class_labels must be one or more whole numbers, 0 or larger"):
        label_tensor(tiny_unet(classes=4), labels)


@pytest.mark.parametrize(
    "labels", [range(3), (0, 1, 2), np.arange(3), torch.arange(3), np.arange(3).astype(object), map(int, "012")]
)
def test_labels_are_anything_that_lists_numbers(labels):
    assert label_tensor(tiny_unet(classes=4), labels).tolist() == [0, 1, 2]
