r"""Log-likelihood of pictures under any diffusion or flow model: nats, and bits per dimension.

Along the probability-flow ODE ``dx/dt = u(x, t)`` the density changes by ``d log p/dt = -div u`` (Song et al. 2021,
arXiv:2011.13456, eq. 39), so

    log p(x_0) = log p_T(x_T) + Int_0^T div u(x_t, t) dt,

with scipy's adaptive RK45 for the integral and the exact divergence or Hutchinson's estimate ``E[e' (du/dx) e]``
(:mod:`diffusers_sde.methods.likelihood` says in which coordinates).  8-bit pictures are dequantised: with ``u``
uniform, ``-E log2 p(x + 2/255 (u - 1/2))/d + log2(255/2)`` bounds the bits per dimension from above.
Every number comes with an estimate of its error.  With a ``vae`` it is the density of the latents.

Usage, in a clone of the repository:

```python
import matplotlib.pyplot as plt
import torch
from diffusers import DiffusionPipeline
from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.pipeline_io import pictures
from diffusers_sde.sampling import network_denoiser, sample
from PIL import Image

pipe = DiffusionPipeline.from_pretrained(
    FASHION_MODEL, custom_pipeline="pipelines/likelihood.py", trust_remote_code=True
)

# two pictures: here the model's own trousers and boot
scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(15)
noise = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
originals = pictures(sample(network_denoiser(pipe.unet, torch.tensor([1, 9]), 2.0), scheduler, noise), "pil")

# how likely is each if it was a trouser, a bag, a boot?  The same probes for all: their error cancels in differences
names = {1: "trouser", 8: "bag", 9: "boot"}
results = [
    pipe(originals, label, rtol=1e-3, num_probes=2, generator=torch.Generator().manual_seed(0)) for label in names
]
print(results[0])
bits = torch.stack([result.bits_per_dim for result in results])  # (label, picture)
errors = torch.stack([result.error for result in results]) / (1024 * torch.log(torch.tensor(2.0)))

figure, axes = plt.subplots(1, 4, figsize=(6.4, 1.6), width_ratios=[1, 1.6, 1, 1.6], layout="constrained")
for k, (original, picture, chart) in enumerate(zip(originals, axes[::2], axes[1::2], strict=True)):
    picture.imshow(original, cmap="gray")
    picture.axis("off")
    chart.errorbar(bits[:, k], list(names.values()), xerr=errors[:, k], fmt="o")
    chart.set(xlabel="bits per dimension", ylim=(-0.5, 2.5))
figure.canvas.draw()
image = Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba())).convert("RGB")
plt.close(figure)
```
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from diffusers_sde.methods.fields import network_field, wide_dtype
from diffusers_sde.methods.images import to_state
from diffusers_sde.methods.likelihood import bits_per_dimension, dequantized, log_likelihood
from diffusers_sde.methods.pipeline_io import label_tensor

BIN_WIDTH = 2 / 255  # of an 8-bit picture in -1..1


@dataclass
class LikelihoodOutput(BaseOutput):
    """For each picture, float64, on the CPU:

    Args:
        log_likelihood: (N,), nats, of the (dequantised) state.
        bits_per_dim: (N,).
        error: (N,), nats, the sum of the next three; NaN, unknown, for one probe.
        solver_error: (N,).
        trace_error: (N,), one standard error over the probes, the largest of the three; NaN for one probe.
        prior_error: (N,).
        noise: the state at the noisy end (N, C, H, W).
        num_evaluations: of the network.
    """

    log_likelihood: torch.Tensor
    bits_per_dim: torch.Tensor
    error: torch.Tensor
    solver_error: torch.Tensor
    trace_error: torch.Tensor
    prior_error: torch.Tensor
    noise: torch.Tensor
    num_evaluations: int

    def __repr__(self) -> str:
        """A line for each picture, without the noise."""
        dimension = self.noise[0].numel() * math.log(2)
        lines = []
        for nats, bits, error in zip(self.log_likelihood, self.bits_per_dim, self.error, strict=True):
            known = not bool(error.isnan())
            in_nats, in_bits = (f"+- {float(e):.2g}" if known else "+- unknown" for e in (error, error / dimension))
            lines.append(f"{float(nats):.1f} {in_nats} nats, {float(bits):.4f} {in_bits} bits per dimension")
        if bool(self.error.isnan().any()):
            lines.append("The error is unknown, for one probe has no spread: pass num_probes of at least 2.")
        return "\n".join([*lines, f"{self.num_evaluations} evaluations"])


class LikelihoodPipeline(DiffusionPipeline):
    """The likelihood of pictures.

    Args:
        unet: a ``UNet2DModel``-like network or a mixture.
        scheduler: any of diffusers or of this package; only its forward process is used.
        vae: the autoencoder whose latents the network knows; None: pixels.
    """

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, unet: Any, scheduler: Any, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def __call__(
        self,
        image: Any,
        class_labels: Any = None,
        divergence: str = "hutchinson",
        num_probes: int = 4,
        distribution: str = "rademacher",
        rtol: float = 1e-4,
        atol: float | None = None,
        dequantize: bool | None = None,
        noise_std: float | None = None,
        prior: str = "matched",
        data_std: float = 1.0,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> LikelihoodOutput | tuple[Any, ...]:
        """The likelihood of each picture.

        Args:
            image: PIL images, an array (N, H, W, C) in 0..1, or a tensor (N, C, H, W) in the model's units.
            class_labels: the classes to condition on (labels or names), one or one for each picture; None: no class.
            divergence: hutchinson, or exact (one backward pass for each dimension: small states only).
            num_probes: of the Hutchinson estimate.
            distribution: of the probes, rademacher or gaussian.
            rtol: relative tolerance of RK45.
            atol: absolute tolerance; None: as rtol.
            dequantize: whether the pictures are 8-bit numbers; None: PIL images are, other inputs are not.
            noise_std: noise level sigma/alpha at which the data is looked at; None: the smallest trained one.
            prior: matched or standard, the Gaussian at the noisy end
                (:func:`diffusers_sde.methods.likelihood.log_likelihood`).
            data_std: scale of the data, for coordinates and prior.
            guidance_scale: 1; a guided field has a likelihood too, but it is not the model's.
            generator: of dequantisation and probes, on the CPU.
            return_dict: False returns a tuple.

        Returns:
            :class:`LikelihoodOutput` or its tuple.

        Raises:
            ValueError: for wrong inputs, before any evaluation.
            ArithmeticError: where RK45 finds no step that meets the tolerances.
        """
        first = image[0] if isinstance(image, list | tuple) and image else image
        if dequantize is None:
            dequantize = isinstance(first, Image.Image) and self.vae is None
        if dequantize and self.vae is not None:
            raise ValueError("A latent has no bins: leave out dequantize for a model with a vae.")
        with torch.no_grad():
            state = to_state(image, self.unet, self.vae, wide_dtype(self.unet.device))
        if dequantize:
            state = dequantized(state, BIN_WIDTH, generator)
        labels = label_tensor(self.unet, class_labels, len(state))
        field = network_field(self.unet, self.scheduler.config, labels, guidance_scale)
        with self.progress_bar(total=100) as bar:
            found = log_likelihood(
                field,
                state,
                divergence=divergence,
                num_probes=num_probes,
                distribution=distribution,
                rtol=rtol,
                atol=rtol if atol is None else atol,
                noise_std=noise_std,
                data_std=data_std,
                prior=prior,
                generator=generator,
                progress=lambda fraction: bar.update(int(100 * fraction + 1e-9) - bar.n),
            )
        out = LikelihoodOutput(
            log_likelihood=found.log_density,
            bits_per_dim=bits_per_dimension(found.log_density, state[0].numel(), BIN_WIDTH if dequantize else 1.0),
            error=found.error,
            solver_error=found.solver_error,
            trace_error=found.trace_error,
            prior_error=found.prior_error,
            noise=found.noise,
            num_evaluations=found.evaluations,
        )
        return out if return_dict else out.to_tuple()
