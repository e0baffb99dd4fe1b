"""What is audited: a run, or a folder of Hugging Face's, with all that is known of its training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megafish.config import Config, lay_over, parse_settings, validated
from megafish.data.tokenizer import Tokenizer
from megafish.decode.packed import for_decoding
from megafish.errors import InputError
from megafish.huggingface.importer import Described, load_model
from megafish.model.load import STATE, checkpoint_of, load_run
from megafish.model.transformer import Transformer
from megafish.processes import device_of
from megafish.run import RunDir, read_json

SPENT = ("samples", "tokens", "supervised_tokens")


@dataclass(frozen=True)
class Target:
    """A model to audit."""

    path: Path
    """As it was named."""
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    """The run's, or what is known of a model that no run here has trained; with the overrides of this audit."""
    run: RunDir
    """Where the audit is written: the run itself; of a Hugging Face folder one that holds nothing else."""
    step: int
    state: dict[str, Any] | None
    """state.json of the checkpoint; None where the model was not trained here, so that nothing is on record."""

    @property
    def spent(self) -> dict[str, int] | None:
        """What the checkpoint was trained on: samples, tokens, supervised_tokens; None where that is unknown."""
        return None if self.state is None else {key: int(self.state["spent"][key]) for key in SPENT}

    @property
    def folder(self) -> Path:
        """Folder of this audit."""
        return self.run.audit / self.run.checkpoint(self.step).name


def load_target(
    path: str | Path,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    device: torch.device | None = None,
) -> Target:
    """The model at `path`: a run directory, a checkpoint in one, or a folder with a Hugging Face model.

    overrides: settings of the section audit, and, of a model that was not trained here, of data, eval and goldfish:
    what it was trained on. output: where the audit of a Hugging Face folder is written (default: audit/NAME). device:
    the model's, by default a GPU where there is one. Raises InputError.
    """
    path = Path(path)
    if _is_huggingface(path):
        if step is not None:
            raise InputError(f"{path}: a Hugging Face folder has no steps: leave --step away")
        return _huggingface(path, overrides, output, device or device_of(None))
    if output is not None:
        raise InputError(f"--output: the audit of a run is written into the run ({path}/audit): leave it away")
    folder = checkpoint_of(path, step)[1]
    state: dict[str, Any] | None = read_json(folder / STATE)
    if state is not None and "imported" in state:
        state = None
    elif state is not None:
        _check_spent(folder / STATE, state)
    _check_overrides(path, overrides, trained=state is not None)
    loaded = load_run(path, step, device or device_of(None))
    config = loaded.run.load_config(list(overrides)) if overrides else loaded.config
    return Target(path, for_decoding(loaded.model), loaded.tokenizer, config, loaded.run, loaded.step, state)


def check_named(path: str | Path) -> None:
    """Refuse what `load_target` would not find (InputError)."""
    if not _is_huggingface(Path(path)):
        checkpoint_of(path)


def _is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "config.yaml").is_file()


def _huggingface(path: Path, overrides: Sequence[str], output: str | Path | None, device: torch.device) -> Target:
    _check_overrides(path, overrides, trained=False)
    model, found = load_model(path, device)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.resolve().name).lstrip("._-") or "model"
    run = RunDir(output if output is not None else Path("audit") / name)
    if run.checkpoints.exists():
        raise InputError(f"{run.path}: holds a run: name another --output for the audit of {path}")
    config = validated(lay_over(_settings(name, found), parse_settings(list(overrides))), str(path))
    return Target(path, for_decoding(model), found.tokenizer, config, run, 0, None)


def _settings(name: str, found: Described) -> dict[str, Any]:
    return {
        "name": name,
        "model": found.model.model_dump(mode="json"),
        "data": {"tokenizer": str(found.tokenizer.path.resolve()), "sequence_length": found.length},
        # It is not known whether anything was dropped; a configuration says so by goldfish.k=null.
        "goldfish": {"k": None},
        "train": {"steps": 1},
    }


def _check_overrides(path: Path, overrides: Sequence[str], *, trained: bool) -> None:
    allowed = ("audit",) if trained else ("audit", "data", "eval", "goldfish")
    for override in overrides:
        if override.split("=")[0].split(".")[0] in allowed:
            continue
        if trained:
            raise InputError(
                f"override {override!r}: an audit changes settings of the section audit only (audit.key=value, or "
                "audit={key: value})"
            )
        raise InputError(
            f"override {override!r}: of {path}, which was not trained here, an audit takes settings of the sections "
            "audit, data, eval and goldfish (what it was trained on)"
        )


def _check_spent(file: Path, state: dict[str, Any]) -> None:
    spent = state.get("spent")
    if not isinstance(spent, dict) or not all(isinstance(spent.get(key), int) for key in SPENT):
        raise InputError(
            f"{file}: does not say what was trained on (spent: {', '.join(SPENT)}): the checkpoint is damaged"
        )
