"""The allocator's settings."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_stays_with_the_process() -> None:
    # In a process of its own: the settings stay. 256 blocks of 1 MiB at the heap's end, freed: kept only if asked for.
    code = """
import ctypes, psutil, sys
from megafish.train.host import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(1 << 20) for _ in range(256)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
full = psutil.Process().memory_info().rss
for block in blocks:
    libc.free(block)
print((full - psutil.Process().memory_info().rss) >> 20)
"""
    returned = {}
    for mode in ("default", "kept"):
        done = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True)
        returned[mode] = int(done.stdout)
    assert returned["default"] > 200 and returned["kept"] < 20
