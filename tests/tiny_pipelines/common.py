"""What every tiny pipeline shares: the register, fixed seeds, stock schedulers, the arguments of a call."""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import diffusers as d
import torch

PROMPT = "a cat on a mat"
TEXT_DIM = 32
IMAGE_SIZE = 16
LATENT_SIZE = 8
PIPELINES = {}


def register(builder):
    PIPELINES[builder.__name__] = builder
    return builder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(build, *args, seed=0, **kwargs):
    """Build a module from a fixed seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args, **kwargs).eval()


def finish(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(name, **config):
    """A scheduler as `from_pretrained` makes it: its config has `_class_name`, and marks the keys that are defaults."""
    cls = cosine_dpm_solver() if name == "CosineDPMSolverMultistepScheduler" else getattr(d, name)
    return cls.from_config({"_class_name": name, "_diffusers_version": "0.30.0", **config})


def cosine_dpm_solver():
    """Its module imports torchsde, which need not be installed; independent increments do for one run."""
    if importlib.util.find_spec("torchsde"):
        return d.CosineDPMSolverMultistepScheduler

    class BrownianInterval:
        def __init__(self, size, entropy=0, **kwargs):
            self.size, self.generator = size, generator(entropy % 2**31)

        def __call__(self, t0, t1):
            return torch.randn(self.size, generator=self.generator) * abs(float(t1) - float(t0)) ** 0.5

    torchsde = types.ModuleType("torchsde")
    torchsde.BrownianInterval = BrownianInterval
    with mock.patch.dict(sys.modules, torchsde=torchsde):
        module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    return module.CosineDPMSolverMultistepScheduler


def latent_call(steps, **kwargs):
    return {"generator": generator(), "num_inference_steps": steps, "output_type": "latent", **kwargs}


def text_call(steps, **kwargs):
    return latent_call(steps, prompt=PROMPT, guidance_scale=4.0, **kwargs)


def sized_call(steps, **kwargs):
    return text_call(steps, height=IMAGE_SIZE, width=IMAGE_SIZE, **kwargs)


def embedded_call(steps, **kwargs):
    """Text as embeddings: the cleaning of prompts of some pipelines needs a package that is not installed."""
    embeds = torch.randn(2, 1, 7, TEXT_DIM, generator=generator(3))
    kwargs |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 4.0}
    return latent_call(steps, height=IMAGE_SIZE, width=IMAGE_SIZE, **kwargs)


def random_image(size=IMAGE_SIZE):
    return torch.rand(1, 3, size, size, generator=generator(1))


def half_mask():
    """An inpainting mask: the left half is painted anew."""
    mask = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    mask[..., : IMAGE_SIZE // 2] = 1
    return mask
