"""Tells diffusers that components of this package are found under the package's own name, and its pipeline under
diffusers' name.

``model_index.json`` stores a component's library, and diffusers takes the short name only of libraries in its table
``LOADABLE_CLASSES``; pipelines on the Hub are refused for any other.  Of a pipeline it stores the name of the class,
which ``DiffusionPipeline.from_pretrained`` looks up in diffusers itself.  Knows that table and Python's import system:
diffusers takes seconds to import, so the entry is made when diffusers is, before or after this package.  Knows no
component, and of the pipeline the name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LOADER = "diffusers.pipelines.pipeline_loading_utils"
PIPELINE = "ClassConditionalPipeline"
# Base classes of components, looked up as attributes of the package, with their methods to save and to load.
LOADING_METHODS = {base: ["save_pretrained", "from_pretrained"] for base in ("ModelMixin", "SchedulerMixin")}


def register() -> None:
    """Enter this package into diffusers' table: now if that is imported, else as soon as it is."""
    if LOADER in sys.modules:
        _enter(sys.modules[LOADER])
    elif _WhenImported not in sys.meta_path:
        sys.meta_path.insert(0, _WhenImported)


def _enter(loader: ModuleType) -> None:
    loader.LOADABLE_CLASSES.setdefault(__package__, LOADING_METHODS)
    vars(sys.modules["diffusers"]).setdefault("__getattr__", _pipeline_class)


def _pipeline_class(name: str) -> Any:
    """``diffusers.ClassConditionalPipeline``: what the module itself does not have is looked up here (PEP 562), so that
    the class is imported when it is asked for."""
    if name == PIPELINE:
        return getattr(importlib.import_module(__package__), name)
    raise AttributeError(f"module 'diffusers' has no attribute {name!r}")


class _WhenImported:
    """A finder that finds nothing but the module with the table, and has the entry made once that has run."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == LOADER else None
        if spec is None or spec.loader is None:
            return None
        source: Any = spec.loader
        execute = source.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _enter(module)
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)

        source.exec_module = exec_module
        return spec
