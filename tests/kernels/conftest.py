"""Where these tests run the Triton kernels: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

# Read by triton when a kernel is defined, so before any test imports one.
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device whose tensors the Triton kernels take here."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
