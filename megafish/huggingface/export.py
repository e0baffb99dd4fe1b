"""A run's model as a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafish.data.corpus import run_tokenizer
from megafish.errors import InputError
from megafish.huggingface.shape import to_huggingface as config_json
from megafish.huggingface.tokenizer import Comparison, write_tokenizer
from megafish.huggingface.weights import to_huggingface
from megafish.model.load import WEIGHTS, WEIGHTS_INDEX, Tensors, checkpoint_of
from megafish.model.tensor_file import Entry, shards, write_tensors
from megafish.progress import track

SHARD_BYTES = 4 << 30
"""Most bytes of one file of weights, a single larger tensor excepted."""


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    folder: Path
    architecture: str
    parameters: int
    files: int
    tokenizer: Comparison
    """How its tokenizer.json compares with the run's tokenizer."""

    @property
    def notes(self) -> list[str]:
        """What the user has to know."""
        found = [] if self.tokenizer.note is None else [self.tokenizer.note]
        if self.architecture == "Qwen2ForCausalLM":
            # It takes the class that it knows for the model's type, whatever tokenizer_config.json says (5.23).
            found.append(
                "transformers' AutoTokenizer puts Qwen2's own splitting of text in the place of this one's: unless "
                "it is Qwen2's, load it by PreTrainedTokenizerFast.from_pretrained"
            )
        return found


def export(
    run: str | Path,
    folder: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Exported:
    """Write config.json, generation_config.json, safetensors and the tokenizer's files of a run's checkpoint.

    run: the run directory, or a checkpoint in it. folder: new or empty; it appears when it is complete. dtype: of the
    weights, default as they are stored. One tensor at a time is in memory. The embedding is cut to the tokenizer's
    size: rows of padding are not exported. Raises InputError.
    """
    target = Path(folder)
    source, checkpoint = checkpoint_of(run, step)
    config = source.load_config()
    tokenizer = run_tokenizer(config.data)
    stored = Tensors(checkpoint)
    dtype = dtype if dtype is not None else stored.dtype()
    settings = config_json(
        config.model,
        vocab_size=tokenizer.vocab_size,
        max_positions=config.data.sequence_length,
        dtype=str(dtype).removeprefix("torch."),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    entries = list(to_huggingface(config.model, tokenizer.vocab_size, stored, dtype))
    with appearing(target, sum(entry.bytes for entry in entries)) as beside:
        files = write_parts(beside, entries, shard_bytes, progress)
        _write_json(beside / "config.json", settings)
        ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id") if settings[name] is not None}
        _write_json(beside / "generation_config.json", {"_from_model_config": True, **ids})
        compared = write_tokenizer(tokenizer, beside, settings["max_position_embeddings"])
    parameters = sum(torch.Size(entry.shape).numel() for entry in entries)
    return Exported(target, settings["architectures"][0], parameters, len(files), compared)


@contextmanager
def appearing(folder: Path, needed: int) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well. InputError where something is there
    already, or `needed` bytes are more than the disk has free."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: not an empty folder: name another one, nothing is overwritten")
    beside = folder.with_name(folder.name + ".partial")
    if beside.exists():
        shutil.rmtree(beside)  # of an earlier attempt that was cut off
    beside.mkdir(parents=True)
    free = shutil.disk_usage(beside).free
    if free < needed:
        shutil.rmtree(beside)
        raise InputError(f"{folder}: no space: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    os.replace(beside, folder)


def write_parts(folder: Path, entries: Iterable[Entry], shard_bytes: int, progress: bool) -> dict[str, dict[str, Any]]:
    """Write tensors into model.safetensors, or into parts with an index. Returns {file: {"bytes", "sha256"}}."""
    by_name = {entry.name: entry for entry in entries}
    parts = shards({name: entry.bytes for name, entry in by_name.items()}, shard_bytes)
    total = sum(entry.bytes for entry in by_name.values())
    files: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    with track(total, f"writing {len(by_name)} tensors", "B", enabled=progress) as tracker:
        for number, names in enumerate(parts, start=1):
            file = WEIGHTS if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            files[file] = write_tensors(folder / file, [by_name[name] for name in names])
            weight_map |= dict.fromkeys(names, file)
            tracker.advance(sum(by_name[name].bytes for name in names))
    if len(parts) > 1:
        _write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
