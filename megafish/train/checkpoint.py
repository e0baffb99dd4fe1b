"""Checkpoints: written beside, checked, renamed; then `latest` moves.

checkpoints/step_00001000/
    model.safetensors   all weights, in the training precision
    deepspeed/          what the engine needs to continue (sharded optimizer state, master weights)
    state.json          counters, and everything that must be the same for a resume to be the same run
    manifest.json       size and sha256 of every file above
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megafish.config import Config
from megafish.errors import InputError
from megafish.model.load import save_weights
from megafish.run import RunDir, read_json, sha256_file, sync_folder, write_atomic
from megafish.train.engine import Engine, together

# What must not change between the run and its continuation, and what to tell the user who changed it.
_FIXED = {
    "mask": "the goldfish mask is not the one this run was trained with",
    "data": "the training samples or their order are not those of this run",
    "model": "the model's shape is not the one of this run",
    "engine": "the optimizer's state was stored for another layout",
}


def save_checkpoint(run: RunDir, engine: Engine, state: dict[str, Any], keep: int | None) -> Path:
    """Write the checkpoint of `state["step"]` and make it the latest. Collective; returns its folder."""
    final = run.checkpoint(state["step"])
    temporary = final.with_name(final.name + ".tmp")
    main = engine.processes.is_main
    together(lambda: _make_room(temporary, engine) if main else None)
    try:
        engine.save(temporary)
        weights = engine.full_weights()
        if weights is not None:
            save_weights(weights, temporary)
            write_atomic(temporary / "state.json", json.dumps(state, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive writer.
        if shutil.disk_usage(run.path).free < 1 << 24 or "No space left" in str(error):
            raise InputError(
                f"{run.checkpoints}: no space left on the device: free some, then resume {run.path}"
            ) from None
        raise
    dist.barrier()
    together(lambda: _publish(run, temporary, final, state["step"], keep) if main else None)
    return final


def _publish(run: RunDir, temporary: Path, final: Path, step: int, keep: int | None) -> None:
    """Give a complete checkpoint its name, then make it the latest."""
    _write_manifest(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_folder(run.checkpoints)
    write_atomic(run.latest_file, final.name + "\n")
    _prune(run, step, keep)


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return read_json(folder / "state.json")


def check_resume(saved: dict[str, Any], now: dict[str, Any], run: RunDir) -> None:
    """Refuse a continuation that would not be the same run, naming each value that differs."""
    for key, meaning in _FIXED.items():
        if saved.get(key) != now[key]:
            difference = "; ".join(_differences(saved.get(key), now[key], key))
            raise InputError(f"cannot resume {run.path}: {meaning} ({difference}): undo the change, or start a new run")


def changed_settings(old: Config, new: Config) -> list[str]:
    """What a continued run does otherwise than before, one phrase a setting. Where it lies is no change."""
    before, after = (config.model_dump(mode="json", exclude={"run_dir"}) for config in (old, new))
    return _differences(before, after, "")


def verify_checkpoint(folder: Path) -> None:
    """Read every file again and compare it with the manifest; InputError names the first that differs."""
    manifest = read_json(folder / "manifest.json")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(
                f"{path}: missing; the checkpoint is damaged: name an older one in {folder.parent.parent / 'latest'}"
            )
        if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise InputError(
                f"{path}: content differs from the manifest; the checkpoint is damaged: name an older one in "
                f"{folder.parent.parent / 'latest'}"
            )


def set_aside(run: RunDir, step: int) -> list[int]:
    """Rename checkpoints later than `step`: a run that goes back to it makes others of those steps. Returns them."""
    later = [other for other in run.steps() if other > step]
    for other in later:
        folder = run.checkpoint(other)
        aside = folder.with_name(f"abandoned_{folder.name}")
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(folder, aside)
    return later


def _write_manifest(folder: Path) -> None:
    """Read every file back from the disk, which must have it by then, and store its size and hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
    }
    write_atomic(
        folder / "manifest.json", json.dumps({"format": "megafish-checkpoint", "version": 1, "files": entries})
    )


def _make_room(folder: Path, engine: Engine) -> None:
    """An empty folder; refused before anything is written where the checkpoint would not fit.

    Counted are the weights twice (safetensors and DeepSpeed's), fp32 master weights and two moments.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    needed = sum(getattr(p, "ds_numel", p.numel()) * (2 * p.element_size() + 4 + 8) for p in engine.module.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent}: no space for a checkpoint: about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _prune(run: RunDir, step: int, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and what killed runs left half-written."""
    for leftover in run.checkpoints.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    if keep is not None:
        for old in [other for other in run.steps() if other <= step][:-keep]:
            shutil.rmtree(run.checkpoint(old))


def _differences(old: Any, new: Any, path: str) -> list[str]:
    """The leaves in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found += _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        return found
    return [f"{path} was {old!r}, is {new!r}"]
