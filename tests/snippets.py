"""The usage snippets of the pipelines' docstrings, as the tests and the README run them.

``python tests/snippets.py inversion likelihood ...`` runs them and writes their ``image`` to ``pipelines/images``.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import functools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

ROOT = Path(__file__).parents[1]


@functools.cache
def use_own_cache() -> None:
    """diffusers copies a custom pipeline into a cache before importing it: not one that parallel tests share, for this
    process only."""
    folder = tempfile.TemporaryDirectory(prefix="pipelines")
    atexit.register(folder.cleanup)
    dynamic_modules_utils.HF_MODULES_CACHE = folder.name


def load(name: str, model: Any, **options: Any) -> Any:
    """The pipeline ``name`` on the model folder ``model``, silent."""
    use_own_cache()
    file = str(ROOT / "pipelines" / f"{name}.py")
    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=file, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def snippet(name: str) -> str:
    """The first ``python`` block of the module docstring of ``pipelines/<name>.py``."""
    docstring = ast.get_docstring(ast.parse((ROOT / "pipelines" / f"{name}.py").read_text())) or ""
    return re.search(r"```python\n(.*?)```", docstring, re.DOTALL).group(1)


def run(name: str) -> dict[str, Any]:
    """Execute the snippet in the root of the clone, as it says, and return its variables."""
    use_own_cache()
    variables: dict[str, Any] = {}
    with contextlib.chdir(ROOT):
        exec(compile(snippet(name), f"{name} snippet", "exec"), variables)
    return variables


if __name__ == "__main__":
    for name in sys.argv[1:]:
        target = ROOT / "pipelines" / "images" / f"{name}.png"
        target.parent.mkdir(exist_ok=True)
        run(name)["image"].save(target.with_suffix(".tmp"), format="PNG", optimize=True)
        os.replace(target.with_suffix(".tmp"), target)
