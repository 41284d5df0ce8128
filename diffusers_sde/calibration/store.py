"""Where a calibration keeps what it has computed: tensors and small notes by name, in memory or in a folder.

Knows files.  Knows nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_sde.calibration.workers import is_main, wait


class Store:
    """Tensors by name, in memory or, with a folder, one safetensors file a name, written whole or not at all."""

    def __init__(self, folder: Folder | None = None):
        self.folder, self._memory = folder, dict[str, dict[str, torch.Tensor]]()

    def __contains__(self, name: str) -> bool:
        return name in self._memory if self.folder is None else (self.folder / f"{name}.safetensors").is_file()

    def put(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep these tensors, on the host, under ``name``."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        if self.folder is None:
            self._memory[name] = tensors
            return
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary)
        os.replace(temporary, path)

    def get(self, name: str, key: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one entry of its first axis (only that is read)."""
        if self.folder is None:
            tensor = self._memory[name][key]
            return tensor if index is None else tensor[index]
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            return file.get_tensor(key) if index is None else file.get_slice(key)[index : index + 1][0]

    def drop(self, name: str) -> None:
        """Forget what is kept under ``name``, if anything is."""
        if self.folder is None:
            self._memory.pop(name, None)
        else:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def note(self, name: str) -> Any:
        """What :meth:`put_note` wrote, None if it did not."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path is not None and path.is_file() else None

    def put_note(self, name: str, value: Any) -> None:
        """Keep a small JSON value in the folder; without one there is nothing to resume."""
        if self.folder is not None:
            temporary = self.folder / f"{name}.{os.getpid()}.part"
            temporary.write_text(json.dumps(value))
            os.replace(temporary, self.folder / f"{name}.json")


def open_store(work_dir: str | Folder | None, identity: Sequence[Any]) -> Store:
    """The store in a folder, or in memory for None.

    Args:
        work_dir: made if it does not exist.
        identity: JSON values that all runs of one store share.

    Raises:
        ValueError: for a folder that holds a run with another identity.
    """
    if work_dir is None:
        return Store()
    folder = Folder(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    mine = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    mark = folder / "run.txt"
    if not mark.exists() and is_main():
        mark.write_text(mine)
    wait()
    if mark.read_text() != mine:
        raise ValueError(f"{folder} holds a calibration of another process, seed or input: pass another work_dir.")
    return Store(folder)
