"""A model of Hugging Face's as a run directory with one checkpoint, at step 0.

config.yaml                  its shape, and a recipe to train on from it: megafish train FOLDER/config.yaml ...
tokenizer.json               or tokenizer.model
checkpoints/step_00000000/   weights; no optimizer state
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megafish.config import Config, ModelConfig
from megafish.data.tokenizer import Tokenizer, load_tokenizer
from megafish.errors import InputError
from megafish.huggingface.export import SHARD_BYTES, appearing, write_parts
from megafish.huggingface.shape import from_huggingface as shape_of
from megafish.huggingface.tokenizer import original_tokenizer
from megafish.huggingface.weights import from_huggingface
from megafish.model.flops import padded_vocab_size
from megafish.model.load import MANIFEST, STATE, WEIGHTS_INDEX, Tensors
from megafish.model.tensor_file import Entry
from megafish.model.transformer import Transformer
from megafish.run import RunDir, read_json, sha256_file, write_atomic

MOST_PADDING = 1024
"""Rows that an embedding may have beyond its tokenizer: Qwen2.5's has up to 399, filling it up to a round number."""
_TOKENS = 1_000_000_000
_LENGTH = 4096


@dataclass(frozen=True)
class Imported:
    """What an import has written."""

    run: RunDir
    model_type: str
    parameters: int
    padding: int
    """Rows of the embedding for which the tokenizer has no token."""


def import_model(
    source: str | Path, folder: str | Path, *, shard_bytes: int = SHARD_BYTES, progress: bool = True
) -> Imported:
    """Make a run directory of a folder with config.json, safetensors and a tokenizer.

    folder: new or empty; it appears when it is complete. One tensor at a time is in memory, and the numbers keep their
    dtype. Raises InputError for what is missing, damaged or not supported.
    """
    source, target = Path(source), Path(folder).expanduser().absolute()
    found = describe(source)
    entries = found.entries
    with appearing(target, sum(entry.bytes for entry in entries)) as beside:
        run = RunDir(beside)
        checkpoint = run.checkpoint(0)
        checkpoint.mkdir(parents=True)
        files = write_parts(checkpoint, entries, shard_bytes, progress)
        state = {"step": 0, "imported": str(source), "valid_loss": None}
        write_atomic(checkpoint / STATE, json.dumps(state, indent=2) + "\n")
        for name in (STATE, WEIGHTS_INDEX):
            if (path := checkpoint / name).is_file():
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {"format": "megafish-checkpoint", "version": 2, "files": dict(sorted(files.items()))}
        write_atomic(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        write_atomic(run.latest_file, checkpoint.name + "\n")
        name = original_tokenizer(source).name
        shutil.copyfile(source / name, beside / name)
        run.save_config(_recipe(target, found, target / name))
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries)
    return Imported(RunDir(target), found.model_type, parameters, found.padding)


@dataclass(frozen=True)
class Described:
    """A model of Hugging Face's before its weights are read."""

    model_type: str
    model: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype
    entries: list[Entry]
    """Our tensors, each read when asked for."""
    padding: int
    """Rows of the embedding for which the tokenizer has no token."""
    length: int
    """Tokens of a sequence that training on from it takes."""


def describe(source: Path) -> Described:
    """What the folder `source` holds. Raises InputError for what is missing, damaged or not supported."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder: name one with config.json, safetensors and a tokenizer")
    values = read_json(source / "config.json")
    model = shape_of(values, str(source / "config.json"))
    tokenizer = load_tokenizer(original_tokenizer(source))
    assert model.vocab_size is not None
    rows = model.vocab_size
    _check_sizes(source, rows, tokenizer)
    if rows == tokenizer.vocab_size:
        model = model.model_copy(update={"vocab_size": None})  # which pads it to a round number
    stored = Tensors(source)
    dtype = stored.dtype()
    padded = padded_vocab_size(model, tokenizer.vocab_size)
    entries = list(from_huggingface(model, rows, padded, stored, dtype))
    length = min(int(values.get("max_position_embeddings", _LENGTH)), _LENGTH)
    return Described(str(values["model_type"]), model, tokenizer, dtype, entries, rows - tokenizer.vocab_size, length)


def load_model(source: str | Path, device: str | torch.device) -> tuple[Transformer, Described]:
    """The model of a Hugging Face folder in its stored dtype and in evaluation mode, and what the folder says of it."""
    found = describe(Path(source))
    with torch.device("meta"):
        model = Transformer(found.model, found.tokenizer.vocab_size)
    model.load_state_dict({entry.name: entry.make() for entry in found.entries}, assign=True, strict=False)
    model.tie()
    return model.to(device).eval(), found


def _check_sizes(source: Path, rows: int, tokenizer: Tokenizer) -> None:
    ids = tokenizer.vocab_size
    if ids > rows or rows - ids > MOST_PADDING:
        raise InputError(
            f"{source}: the tokenizer has {ids:,} ids and the embedding {rows:,} rows: they do not belong together"
        )


def _recipe(folder: Path, found: Described, tokenizer: Path) -> Config:
    """What the folder's config.yaml says: the model, and how training goes on from it unless it is told otherwise."""
    return Config.model_validate(
        {
            "name": re.sub(r"[^A-Za-z0-9._-]", "-", folder.name).lstrip("._-") or "imported",
            "model": found.model.model_dump(mode="json"),
            "data": {"tokenizer": str(tokenizer), "sequence_length": found.length},
            # A tenth of a usual pretraining rate: the weights are trained already.
            "optimizer": {"lr": 3e-5},
            "train": {
                "initial_weights": str(folder),
                "tokens": _TOKENS,
                "precision": "fp32" if found.dtype == torch.float32 else "bf16",
            },
        }
    )
