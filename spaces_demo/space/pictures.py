"""Tensors as pictures.  Knows PIL and data URIs; knows no model and no interface."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from diffusers_sde.comparison.report import montage


def picture(images: torch.Tensor, columns: int | None = None, gap: int = 1) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] as one RGB picture, ``columns`` a row (default: all)."""
    columns = columns or len(images)
    blank = torch.ones(-len(images) % columns, *images.shape[1:])
    rows = [montage(row, gap) for row in torch.cat([images.cpu().float(), blank]).split(columns)]
    separator = np.ones((gap, *rows[0].shape[1:]))
    parts = [part for row in rows for part in (row, separator)][:-1]
    return Image.fromarray((np.concatenate(parts) * 255).round().astype(np.uint8))


def data_uri(image: Image.Image, limit: int = 384) -> str:
    """``image``, at most ``limit`` pixels wide, as a ``data:`` address: PNG where small, WebP above."""
    if image.width > limit:
        image = image.resize((limit, round(image.height * limit / image.width)), Image.Resampling.LANCZOS)
    kind = "PNG" if image.width * image.height <= 160 * 160 else "WEBP"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
