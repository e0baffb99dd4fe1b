"""Checkpoints: written beside, read back, renamed; then `latest` moves.

checkpoints/step_00001000/
    model.safetensors   all weights, in the training precision (in parts with an index where they are large)
    optimizer/          fp32 weights and optimizer state, one file a process and an index (train/state.py)
    state.json          counters, and everything that must be the same for a resume to be the same run
    manifest.json       size and sha256 of every file above

saver.py writes them while the training goes on; here is what stands in one, and what becomes of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megafish.config import CheckpointConfig, Config, differences
from megafish.errors import InputError
from megafish.model.load import MANIFEST, STATE, WEIGHTS, WEIGHTS_INDEX
from megafish.model.tensor_file import Cancel, Entry, never, shards, write_tensors
from megafish.processes import attempt
from megafish.run import RunDir, read_json, sha256_file, sync_folder, write_atomic
from megafish.train.engine import Processes, from_main
from megafish.train.state import FOLDER, INDEX, StateReader, Weights, make_index

RECEIPTS = "receipts"
"""Folder inside an unfinished checkpoint in which every process says what it has written."""
WEIGHTS_BYTES = 2 << 30
"""Most bytes of one file of weights: as many processes write at one time, and that much can be loaded apart."""

# What must not change between the run and its continuation, and what to tell the user who changed it.
_FIXED = {
    "mask": "the goldfish mask is not the one this run was trained with",
    "data": "the training samples or their order are not those of this run",
    "model": "the model's shape is not the one of this run",
    "optimizer": "the stored state is of another optimizer",
    "premature": "contrast.premature is not the model that this run is contrasted with",
    "unlearn": "the method, its settings, its texts or the starting model are not those of this run",
}


# ------------------------------------------------------------------------------------------------------------- writing


def write_receipt(folder: Path, kind: str, rank: int, receipt: dict[str, Any]) -> None:
    """Say what process `rank` has written: {"files": {name: checksums}, ...}."""
    write_atomic(folder / RECEIPTS / f"{kind}_{rank:05d}.json", json.dumps(receipt))


def read_receipts(folder: Path, kind: str, world_size: int) -> list[dict[str, Any]]:
    """What the processes have written, by rank."""
    # By name: a shared file system may show an old list of a folder, but not an old file that was never asked for.
    return [read_json(folder / RECEIPTS / f"{kind}_{rank:05d}.json") for rank in range(world_size)]


def write_weights(
    folder: Path,
    weights: Weights,
    dtype: torch.dtype,
    rank: int,
    world_size: int,
    cancelled: Cancel = never,
    limit: int = WEIGHTS_BYTES,
) -> dict[str, Any]:
    """This process's share of the model's weights in `dtype`, made from the fp32 weights on disk; returns its receipt.

    One parameter at a time is in memory, whatever the number of processes. The files are dealt out so that neighbouring
    processes, which share a node, do not write them all.
    """
    shapes = weights.shapes
    files = shards({name: torch.Size(shapes[name]).numel() * dtype.itemsize for name in sorted(shapes)}, limit)
    receipt: dict[str, Any] = {"files": {}, "weight_map": {}}
    own = [number for number in range(len(files)) if number * world_size // len(files) == rank]
    if not own:
        return receipt
    reader = StateReader(folder, make_index(read_receipts(folder, "pieces", world_size)))
    for number in own:
        file = WEIGHTS if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        entries = [
            Entry(name, dtype, shapes[name], partial(_weight, weights, reader, name, dtype)) for name in files[number]
        ]
        receipt["files"][file] = write_tensors(folder / file, entries, cancelled)
        receipt["weight_map"] |= dict.fromkeys(files[number], file)
    return receipt


def _weight(weights: Weights, reader: StateReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    # Rounded as DeepSpeed rounds after each step, so these are the bits that the model computes with.
    return weights.read(reader, name).to(dtype)


def publish(run: RunDir, temporary: Path, state: dict[str, Any], config: CheckpointConfig, world_size: int) -> int:
    """Give a complete checkpoint its name and make it the latest. Returns its size in bytes. Main process only."""
    pieces, weights = (read_receipts(temporary, kind, world_size) for kind in ("pieces", "weights"))
    files = {file: sums for receipt in (*pieces, *weights) for file, sums in receipt["files"].items()}
    written = {f"{FOLDER}/{INDEX}": make_index(pieces), STATE: state}
    weight_map = {name: file for receipt in weights for name, file in receipt["weight_map"].items()}
    parts = sorted(set(weight_map.values()))
    if len(parts) > 1:
        total = sum(files[part]["bytes"] for part in parts)
        written[WEIGHTS_INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in written.items():
        path = temporary / name
        write_atomic(path, json.dumps(content, indent=2 if name == STATE else None) + "\n")
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {"format": "megafish-checkpoint", "version": 2, "files": dict(sorted(files.items()))}
    write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(temporary / RECEIPTS)

    final = run.checkpoint(state["step"])
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    sync_folder(run.checkpoints)
    write_atomic(run.latest_file, final.name + "\n")
    _prune(run, state["step"], config)
    return sum(entry["bytes"] for entry in files.values())


def make_room(folder: Path, needed: int) -> None:
    """Empty folders for a checkpoint of `needed` bytes; InputError where that does not fit, with nothing written."""
    if folder.exists():
        shutil.rmtree(folder)
    for name in (FOLDER, RECEIPTS):
        (folder / name).mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent}: no space for a checkpoint: about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _prune(run: RunDir, step: int, config: CheckpointConfig) -> None:
    """Remove the checkpoints up to `step` that are not to be kept, and what killed runs left half-written."""
    for leftover in run.checkpoints.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = [other for other in run.steps() if other <= step]
    for old in set(steps) - kept_steps(run, steps, config):
        _remove(run.checkpoint(old))


def _remove(folder: Path) -> None:
    """Remove a checkpoint. Its name goes first: a kill meanwhile leaves no half of one that looks complete.

    What cannot be removed (NFS keeps files that a reader has open) is tried again when the next one is published: the
    run need not end for it.
    """
    nameless = folder.with_suffix(".old.tmp")
    os.replace(folder, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def kept_steps(run: RunDir, steps: list[int], config: CheckpointConfig) -> set[int]:
    """Of the checkpoints of `steps` (ascending): the newest `keep`, every `keep_every`-th step, the best one."""
    if config.keep is None:
        return set(steps)
    kept = set(steps[-config.keep :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    if config.keep_best and (best := best_step(run, steps)) is not None:
        kept.add(best)
    return kept


def best_step(run: RunDir, steps: list[int]) -> int | None:
    """The checkpoint with the lowest validation loss, the newest of equals; None where no step was validated."""
    losses: dict[int, float] = {}
    for step in steps:
        try:
            loss = load_state(run.checkpoint(step)).get("valid_loss")
        except InputError:
            continue  # damaged; the run that goes on need not end for it
        if loss is not None and math.isfinite(loss):
            losses[step] = loss
    return min(losses, key=lambda step: (losses[step], -step), default=None)


# ------------------------------------------------------------------------------------------------------------- reading


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return read_json(folder / STATE)


def verify_checkpoint(folder: Path, rank: int = 0, world_size: int = 1) -> int:
    """Read the files again and compare them with the manifest; InputError names the first that differs.

    Of `world_size` processes each reads its share. Returns the size of all files [bytes].
    """
    manifest = read_json(folder / MANIFEST)
    files: Any = manifest.get("files")
    whole = isinstance(files, dict) and all({"bytes", "sha256"} <= set(entry) for entry in files.values())
    if manifest.get("version") != 2 or not whole or STATE not in files:
        raise InputError(
            f"{folder / MANIFEST}: not the manifest of a checkpoint (version 2): the checkpoint is damaged"
        )
    # The largest first, dealt out in turn, so that all have about as much to read.
    ordered = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in ordered[rank::world_size]:
        path, expected = folder / name, files[name]
        if not path.is_file():
            raise InputError(f"{path}: missing: the checkpoint is damaged")
        if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise InputError(f"{path}: content differs from the manifest: the checkpoint is damaged")
    return sum(entry["bytes"] for entry in files.values())


def find_good(run: RunDir, processes: Processes) -> tuple[Path | None, str | None]:
    """The checkpoint to continue from, and a line to say where it is not the latest: (None, None) without any.

    A damaged one is passed over for the newest good one before it. Collective. Raises InputError when none is good.
    """
    candidates = from_main(lambda: _up_to_latest(run), processes)
    if not candidates:
        return None, None
    first = None
    for folder in map(run.checkpoint, candidates):
        _, problem = attempt(partial(verify_checkpoint, folder, processes.rank, processes.world_size))
        if problem is None:
            note = None if first is None else f"{first}; continuing from the newest good one, {folder.name}"
            return folder, note
        first = first or problem
    raise InputError(
        f"{first}; none of the {len(candidates) - 1} older ones is good either: see `megafish verify {run.path}`; "
        "there is nothing to continue from, start a new run"
    )


def _up_to_latest(run: RunDir) -> list[int]:
    """Steps of the checkpoints up to the latest, the newest first; [] without any."""
    latest = run.latest()
    if latest is None:
        return []
    return [step for step in reversed(run.steps()) if run.checkpoint(step).name <= latest.name]


def verify_run(run: RunDir, console: Console | None = None) -> tuple[list[int], list[int]]:
    """Verify every checkpoint of a run and print a table; returns the steps of the good and of the damaged ones."""
    steps = run.steps()
    if not steps:
        raise InputError(f"{run.path}: no checkpoint yet: train for at least checkpoint.interval steps")
    latest, best = run.latest(), best_step(run, steps)
    good: list[int] = []
    damaged: list[int] = []
    faults: list[str] = []
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("step", "GB", "validation loss", "", "state"):
        table.add_column(heading, justify="left" if heading in ("", "state") else "right", overflow="fold")
    for step in steps:
        folder = run.checkpoint(step)
        size = loss = ""
        try:
            size = f"{verify_checkpoint(folder) / 1e9:.2f}"
            valid_loss = load_state(folder)["valid_loss"]
            loss = "" if valid_loss is None else f"{valid_loss:.4f}"
            verdict = "good"
            good.append(step)
        except InputError as error:
            verdict = "damaged"
            damaged.append(step)
            faults.append(f"step {step} damaged: {error}")
        marks = [mark for mark, marked in (("latest", folder == latest), ("best", step == best)) if marked]
        table.add_row(str(step), size, loss, " ".join(marks), verdict)
    console = console or Console()
    console.print(table, highlight=False)
    for fault in faults:  # below the table, which would fold the paths
        console.print(fault, highlight=False, soft_wrap=True)
    return good, damaged


def identity(config: Config, data: dict[str, Any], optimizer: str, premature: str | None = None) -> dict[str, Any]:
    """What a continuation must share with the run it continues (_FIXED), in JSON's types. `data`: mask and samples;
    `premature`: digest of the premature model."""
    shape = config.model.model_dump(mode="json")
    return {**data, "model": shape, "optimizer": optimizer} | ({} if premature is None else {"premature": premature})


def check_resume(saved: dict[str, Any], now: dict[str, Any], run: RunDir) -> None:
    """Refuse a continuation that would not be the same run, naming each value that differs."""
    for key, meaning in _FIXED.items():
        if saved.get(key) != now.get(key):
            difference = "; ".join(differences(saved.get(key), now.get(key), key))
            raise InputError(f"cannot resume {run.path}: {meaning} ({difference}): undo the change, or start a new run")


def set_aside(run: RunDir, step: int) -> list[int]:
    """Rename checkpoints later than `step`: a run that goes back to it makes others of those steps. Returns them."""
    later = [other for other in run.steps() if other > step]
    if later:
        # `latest` may name one of them (a damaged one), and must name one that is there at every moment.
        write_atomic(run.latest_file, run.checkpoint(step).name + "\n")
    for other in later:
        folder = run.checkpoint(other)
        aside = folder.with_name(f"abandoned_{folder.name}")
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(folder, aside)
    return later
