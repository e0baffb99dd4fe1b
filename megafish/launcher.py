"""What the launcher of this process has said of it, by its environment."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress

from megafish.errors import InputError

# Under the launchers that Slurm users know, srun starts the processes and names them in its own variables.
# (STEP_NUM_TASKS, not NTASKS: the latter is there in the batch script itself, which is no task.)
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def adopt_slurm() -> None:
    """Give torch.distributed the variables it reads, where srun has started several processes."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise InputError(
            f"started by srun without {' and '.join(missing)}: export MASTER_ADDR=$(scontrol show hostnames "
            '"$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500 in the batch script'
        )
    for name, source in _SLURM.items():
        env[name] = env[source]


def leave(code: int) -> None:
    """End one of several processes here, once its threads and what is registered for the end are done; others return.

    The interpreter would take itself down around gloo's and the store's threads. One of them that comes back for the
    GIL just then is ended by it inside C++, which answers with abort(): exit code -6 after all work was done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() == 1:  # nothing of another process's can still be on its way
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a reader that has gone, or a closed stream
            stream.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that prints, before any of them have met."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
