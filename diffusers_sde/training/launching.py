"""The processes that ``accelerate launch --cpu --num_processes N`` was asked for.

Knows one thing: for CPUs Accelerate's launcher starts a single process and leaves the others to mpirun (Accelerate
1.15; with GPUs it starts all of them).  Where the others are missing, this process turns into PyTorch's own launcher
of N processes; they find each other through gloo and Accelerate takes over from there.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

_LAUNCHERS = ("accelerate-launch", "accelerate.commands.launch", "commands/launch.py")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def requested_processes(environment: Mapping[str, str], launcher: Sequence[str]) -> int:
    """How many processes the command line ``launcher`` of our parent asked for and did not start; 1 for none.

    Accelerate's launcher sets MASTER_PORT for more than one process; every real multi-process start, torchrun's or
    mpirun's, says the number of processes in the environment.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if any(name in environment for name in _SIZES) or not on_cpu or "MASTER_PORT" not in environment:
        return 1
    from accelerate.commands.launch import launch_command_parser

    starts = [i + 1 for i, word in enumerate(launcher) if word == "launch" or word.endswith(_LAUNCHERS)]
    if not starts:
        return 1
    args = launch_command_parser().parse_known_args(list(launcher[starts[0] :]))[0]
    return args.num_processes or 1 if args.num_machines in (None, 1) else 1


def start_missing() -> None:
    """Become the launcher of all processes and end with their exit status, if only one of them was started."""
    import psutil

    processes = requested_processes(os.environ, psutil.Process(os.getppid()).cmdline())
    if processes > 1:
        sys.exit(launch(processes, sys.argv[1:]))


def launch(processes: int, words: Sequence[str]) -> int:
    """Start the script in so many processes; the exit status of the first that failed, which has said why."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = ["--nnodes", "1", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "diffusers_sde.train", *words]
    try:
        run.run(run.parse_args(command))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    return 0
