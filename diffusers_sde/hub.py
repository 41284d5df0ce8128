"""Sharing pipelines whose scheduler is ours.

Knows how diffusers finds a component's class: with ``import diffusers_sde`` before, by itself; without it, through a
module file beside the component's config, which it runs only with ``trust_remote_code=True``.
"""

from __future__ import annotations

import json
from pathlib import Path

_MODULE = '''"""Lets diffusers find this component's class: needs the package and trust_remote_code=True."""

from diffusers_sde import {names}

__all__ = [{quoted}]
'''


def write_component_modules(pipeline_folder: str | Path) -> list[Path]:
    """Write ``<component>/diffusers_sde.py`` into a saved pipeline for each component of this package, so that
    ``DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`` loads it without ``import diffusers_sde``.

    Args:
        pipeline_folder: what ``pipe.save_pretrained`` wrote and is to be uploaded.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: where there is no pipeline.
        ValueError: where no component is of this package; nothing is written.
    """
    folder = Path(pipeline_folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: pass the folder that pipe.save_pretrained wrote.")
    written = []
    for component, entry in json.loads(index.read_text()).items():
        if isinstance(entry, list) and entry[0] == "diffusers_sde":
            path = folder / component / "diffusers_sde.py"
            path.write_text(_MODULE.format(names=entry[1], quoted=f'"{entry[1]}"'))
            written.append(path)
    if not written:
        raise ValueError(f"No component of {folder} is from diffusers_sde: set pipe.scheduler before saving.")
    return written
