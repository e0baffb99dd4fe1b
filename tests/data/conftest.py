from __future__ import annotations

import inspect
import json
import random
import string
import textwrap
from pathlib import Path

import pytest
import tokenizers

from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real source files of the standard library."""
    folder = tmp_path_factory.mktemp("source")
    for module in (inspect, json, random, string, textwrap, json.decoder, json.encoder, json.scanner):
        file = Path(str(module.__file__))
        (folder / f"{module.__name__}.py").write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def bpe_file(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE model of 512 ids."""
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    train_tokenizer([source_folder], file, 512, options=ReadOptions(text_suffixes=(".py",)), progress=False)
    return file


@pytest.fixture(scope="session")
def bpe(bpe_file: Path) -> Tokenizer:
    return load_tokenizer(bpe_file)


@pytest.fixture(scope="session")
def unigram(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("unigram") / "tokenizer.model"
    options = ReadOptions(text_suffixes=(".py",))
    return train_tokenizer([source_folder], file, 512, "unigram", options=options, progress=False)


@pytest.fixture(scope="session")
def byte_level_file(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face byte-level BPE of 400 ids, as GPT-2's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([(source_folder / "textwrap.py").read_text(encoding="utf-8")], trainer)
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(file))
    return file


@pytest.fixture(scope="session")
def byte_level(byte_level_file: Path) -> Tokenizer:
    return load_tokenizer(byte_level_file)
