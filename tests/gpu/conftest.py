"""These tests run on a CUDA device and are skipped without one: `make gpu`.

What they check stands in checks.py. tests/kernels/test_gpu_checks.py runs the same functions small and on a CPU.
"""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup() -> None:
    # Here and not in a fixture, so that pytest's summary counts all of them in one line.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: these tests are for one (make gpu)")


@pytest.fixture
def device() -> torch.device:
    """The GPU, with nothing in the allocator's cache that another test has left."""
    pytest.importorskip("triton")
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())
