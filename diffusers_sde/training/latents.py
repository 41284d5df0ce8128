"""Latents of every training image, encoded once.

Knows the encoder's distribution and its files: safetensors shards in a folder named by a fingerprint of data, framing
and autoencoder, each written under a temporary name first, so that whatever is there is complete and belongs to them.
Knows nothing of how the latents are trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffusers_sde.training.framing import DataError
from diffusers_sde.training.samples import Images, Item, TrainingData

SHARD = 1024  # images in a file


def latent_fingerprint(images: Images, vae: torch.nn.Module) -> str:
    """16 hexadecimal digits that change with the images, their framing, and the autoencoder's config and weights."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(images.fingerprint().encode())
    digest.update(json.dumps(dict(vae.config), sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(f"{name}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentImages(TrainingData):
    """Cached latents; items are those of ``images`` with ``latents`` (float32, (c, h, w)) instead of pixels.

    An item samples ``z = mean + std eps`` with eps from its seed and returns ``(z - shift_factor) scaling_factor``, the
    units of the network (deterministic encoders have std = 0).
    """

    def __init__(self, images: Images, folder: Path, *, scaling_factor: float, shift_factor: float) -> None:
        self.images, self.folder, self.framing = images, folder, images.framing
        self.class_names, self.captions, self.damage = images.class_names, images.captions, images.damage
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay in their process

    def item(self, index: int, seed: int) -> Item:
        """The latents of the image of this number, drawn from ``seed``, with its label and caption."""
        shard, row = divmod(index, SHARD)
        if shard not in self._open:
            self._open[shard] = safetensors.safe_open(shard_path(self.folder, shard), "pt")
        file = self._open[shard]
        number = int(file.get_slice("numbers")[row : row + 1])
        if "latents" in file.keys():  # noqa: SIM118 (no mapping)
            latents = file.get_slice("latents")[row : row + 1].float()
        else:
            distribution = DiagonalGaussianDistribution(file.get_slice("parameters")[row : row + 1].float())
            latents = distribution.sample(torch.Generator().manual_seed(seed))
        latents = (latents[0] - self.shift_factor) * self.scaling_factor
        return {"latents": latents, **self.images.annotation(number, seed)}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def encoder_output(vae: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the encoder says: ``parameters`` (mean and log-variance) or, of deterministic ones, ``latents``."""
    out = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(out, "latent_dist"):
        return {"parameters": out.latent_dist.parameters.cpu()}
    return {"latents": (out.latent if hasattr(out, "latent") else out.latents).cpu()}


def cache_latents(
    images: TrainingData,
    vae: Any,
    *,
    directory: str | Path,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> LatentImages:
    """Encode every image once into ``directory`` and train on the result.

    What an earlier call with the same data, resolution and autoencoder has written is used again, also what an
    interrupted one has left.  An image that is cropped at random is cropped once, from a seed that is its number.

    Args:
        vae: an autoencoder of diffusers; its dtype is that of the files.
        device: where it encodes; None leaves it where it is.

    Raises:
        DataError: for a stream and for random flips, which cannot be encoded once.
    """
    if not isinstance(images, Images):
        raise DataError("A stream cannot be encoded once: leave out the caching of latents or the streaming.")
    if images.framing.random_flip:
        raise DataError("Flipped images have latents of their own: leave out the caching of latents or --random_flip.")
    folder = Path(directory) / latent_fingerprint(images, vae)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s for s in range(math.ceil(len(images) / SHARD)) if not shard_path(folder, s).exists()]
    if missing and device is not None:
        vae.to(device)
    for shard in tqdm(missing, desc="Encoding", unit=" shards", disable=None if progress else True):
        write_shard(images, vae, folder, shard, batch_size)
    scaling, shift = (getattr(vae.config, key, None) for key in ("scaling_factor", "shift_factor"))
    return LatentImages(images, folder, scaling_factor=scaling or 1.0, shift_factor=shift or 0.0)


@torch.no_grad()
def write_shard(images: Images, vae: Any, folder: Path, shard: int, batch_size: int) -> None:
    """Encode the images of one shard; the file appears when it is complete."""
    indices = range(shard * SHARD, min((shard + 1) * SHARD, len(images)))
    numbers, encoded = [], []
    for first in indices[::batch_size]:
        chunk = [images.readable(i) for i in range(first, min(first + batch_size, indices.stop))]
        numbers += [number for number, _ in chunk]
        pixels = [images.framing.tensor(pixels, seed=number) for number, pixels in chunk]
        encoded.append(encoder_output(vae, torch.stack(pixels)))
    tensors = {key: torch.cat([e[key] for e in encoded]).contiguous() for key in encoded[0]}
    target = shard_path(folder, shard)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({**tensors, "numbers": torch.tensor(numbers)}, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
