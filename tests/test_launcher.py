"""How one of several processes ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.helpers import finish

_PROGRAM = """
import atexit, sys, threading, time
import torch.distributed as dist
from megafish.launcher import leave
dist.init_process_group("gloo")
atexit.register(lambda: print("registered"))
threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
class Never:
    def __del__(self):
        print("taken down")
never = Never()
leave(3)
print("goes on")
"""


@pytest.mark.parametrize(
    ("size", "code", "said"), [(1, 0, ["goes on", "thread", "registered"]), (2, 3, ["thread", "registered"])]
)
def test_leave(size: int, code: int, said: list[str]) -> None:
    """Of several: threads and what is registered come first, the interpreter is not taken down. One alone goes on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        lines = [
            line
            for line in finish(process, code).splitlines()
            if line in ("goes on", "thread", "registered", "taken down")
        ]
        assert lines[: len(said)] == said and ("taken down" in lines) == (size == 1)
