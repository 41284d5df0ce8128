"""Looking into a running pipeline: where it adds noise, and at which timesteps it evaluates its network."""

import inspect
from unittest import mock

import torch


class Stop(Exception):
    """Ends a pipeline at its first evaluation."""


def watched(pipe, kwargs, stop=False):
    """Call a pipeline; return the levels `(alpha, sigma)` at which noise was added, each with the number of evaluations
    before it, and the timesteps the network was evaluated at."""
    levels, times = [], []
    network = pipe.components.get("unet") or pipe.transformer
    cls = type(pipe.scheduler)
    original = getattr(cls, "add_noise", None) or (lambda self, x, noise, t: original_scale(self, x, t, noise))
    original_scale = getattr(cls, "scale_noise", None)
    scale = 1000 if "Flux" in type(pipe).__name__ else 1

    def level(noised, data, noise):
        basis = torch.stack([data.flatten(), noise.flatten()], 1).double()
        return torch.linalg.lstsq(basis, noised.flatten().double()).solution.tolist()

    def add_noise(self, original_samples, noise, timesteps):
        noised = original(self, original_samples, noise, timesteps)
        levels.append((level(noised, original_samples, noise), len(times)))
        return noised

    def scale_noise(self, sample, timestep, noise):
        return add_noise(self, sample, noise, timestep)

    def evaluate(module, args, kwargs):
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        times.append(scale * float(torch.as_tensor(arguments["timestep"]).flatten()[0]))
        if stop:
            raise Stop

    hook = network.register_forward_pre_hook(evaluate, with_kwargs=True)
    patches = {"add_noise": add_noise, "scale_noise": scale_noise}
    try:
        with mock.patch.multiple(cls, **{name: patch for name, patch in patches.items() if hasattr(cls, name)}):
            pipe(**kwargs)
    except Stop:
        pass
    finally:
        hook.remove()
    return levels, times
