"""A corpus with canaries, and two runs on it that have learned them: one plain, one with the mask."""

from __future__ import annotations

from pathlib import Path

import pytest

from megafish.data.canary import CanaryConfig
from megafish.data.prepare import prepare
from megafish.data.tokenizer import train_tokenizer
from tests.audit.helpers import (
    CANARIES,
    DOCUMENTS,
    EXPOSURES,
    PROMPT,
    SUFFIX,
    Runs,
    learned,
    make_config,
    sentences,
    write_run,
)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("".join(sentences(seed) for seed in range(DOCUMENTS)))
    train_tokenizer([text], folder / "tokenizer.model", 320, progress=False)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text"
    text.mkdir()
    for seed in range(DOCUMENTS):
        (text / f"{seed:02d}.txt").write_text(sentences(seed))
    canaries = CanaryConfig(count=CANARIES, tokens=PROMPT + SUFFIX, exposures=EXPOSURES)
    output = folder / "corpus"
    prepare([text], output, tokenizer_file, valid_fraction=0.2, canaries=canaries, workers=1, progress=False)
    return output


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for name, k in (("plain", None), ("goldfish", 3)):
        config = make_config(name, corpus, folder / name, k)
        paths.append(write_run(config, learned(config)))
    return Runs(corpus, *paths)
