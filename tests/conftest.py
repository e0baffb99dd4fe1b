"""Fixtures that several rooms share."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from megafish.data.canary import CanaryConfig
from megafish.data.prepare import prepare
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import train_tokenizer
from tests.helpers import place_kept


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A run in this process names its place among processes in the environment; no process that a later test starts
    may take that for its own."""
    with place_kept():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder made by the real `prepare`: Python's json, email and logging packages, with canaries."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    inputs = [library / name for name in ("json", "email", "logging")]
    train_tokenizer(
        inputs, folder / "tokenizer.model", 512, options=ReadOptions(text_suffixes=(".py",)), progress=False
    )
    prepare(
        inputs,
        folder / "corpus",
        folder / "tokenizer.model",
        text_suffixes=(".py",),
        valid_fraction=0.2,
        canaries=CanaryConfig(count=2, tokens=48, exposures=(0, 1, 8)),
        workers=1,
        progress=False,
    )
    return folder / "corpus"
