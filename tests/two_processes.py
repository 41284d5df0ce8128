"""A script on two gloo processes of Accelerate, and what each of them has written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def run_on_two_processes(script: str, folder: Path) -> list[Any]:
    """Run a script whose ``{tests!r}`` and ``{out!r}`` are filled in, on two processes.

    Args:
        script: each process writes JSON to ``{out}K-of-2``.
        folder: for the files.

    Returns:
        What process 0 and process 1 have written.
    """
    file = folder / "run.py"
    file.write_text(script.format(tests=str(TESTS), out=str(folder / "out")))
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"out{k}-of-2").read_text()) for k in (0, 1)]
