"""Weights on disk: model.safetensors in a checkpoint folder, or its parts model-00001-of-00003.safetensors.

Parts come with Hugging Face's model.safetensors.index.json: its "weight_map" says which tensor is in which file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megafish.config import Config, ModelConfig
from megafish.data.corpus import run_tokenizer
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.run import RunDir, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
STATE = "state.json"
MANIFEST = "manifest.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with everything needed to use it."""

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int
    run: RunDir


def save_weights(model: Transformer | Mapping[str, torch.Tensor], folder: str | Path) -> Path:
    """Write model.safetensors into `folder` (made if missing) and return its path.

    Tensors keep their dtype. A tensor that stands under two names (tied embeddings) is written once, under the first.
    The file appears only when it is complete.
    """
    state = model.state_dict() if isinstance(model, Transformer) else model
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        tensors[name] = tensor.detach().cpu().contiguous()
    path = Path(folder) / WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    return path


def load_weights(model: Transformer, folder: str | Path) -> None:
    """Read `folder`/model.safetensors, or its parts, into the model: every tensor must be there with the right shape.

    The values are copied into the model's own tensors (its dtype and device); a model on the meta device takes over the
    stored tensors, on the CPU and in their stored dtype. Raises InputError for a missing or damaged file, and for
    tensors that are missing, unknown or of another shape.
    """
    path = Path(folder) / WEIGHTS
    stored: dict[str, torch.Tensor] = {}
    for file in _weight_files(Path(folder)):
        try:
            stored |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read ({error}): the file is damaged") from None
    parameters = dict(model.named_parameters())  # a tied weight is listed once, under its first name
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (parameters, stored)]
    _check_names(path, *shapes)
    with torch.no_grad():
        if any(parameter.is_meta for parameter in parameters.values()):
            model.load_state_dict(stored, assign=True, strict=False)
            model.tie()
        else:
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])


class Tensors:
    """The tensors of a folder with model.safetensors or its parts, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in _weight_files(folder):
            if not file.is_file():
                raise InputError(f"{file}: missing: {WEIGHTS_INDEX} names it; fetch this part of the model again")
            for name in self._handle(file).keys():  # noqa: SIM118 - no mapping
                self.files[name] = file

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: cannot be read ({error}): the file is damaged or was cut off") from None
        return self._open[file]

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise InputError(f"{self.folder}: no tensor {name}: the weights are not of the model that is described")
        return self._handle(self.files[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """InputError where there is no such tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self) -> torch.dtype:
        """The dtype of all of them; InputError where they have several or one that is not supported."""
        found = {self._slice(name).get_dtype() for name in self.files}
        if len(found) > 1 or not found <= DTYPES.keys():
            raise InputError(
                f"{self.folder}: tensors of {', '.join(sorted(found))}: expected one of {', '.join(DTYPES)}"
            )
        return DTYPES[found.pop()]

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end (of a vector: elements)."""
        rows: torch.Tensor = self._slice(name)[begin:end]
        return rows


def initial_weights(folder: str | Path, config: ModelConfig, vocab_size: int) -> Callable[[str], torch.Tensor]:
    """Weights to start a model of this shape from: a function from a parameter's name to its values, fp32 and whole.

    folder: a run directory (its latest checkpoint), a checkpoint in one, or a folder with the weights of one. Raises
    InputError when the weights are missing, damaged or of another shape.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file() and not (folder / WEIGHTS_INDEX).is_file():
        folder = checkpoint_of(folder)[1]
    stored = Tensors(folder)
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check_names(folder, wanted, {name: stored.shape(name) for name in stored.files})
    return lambda name: stored.rows(name, 0, wanted[name][0]).float()


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    path, index = folder / WEIGHTS, folder / WEIGHTS_INDEX
    if path.is_file():
        return [path]
    if not index.is_file():
        raise InputError(f"{path}: missing: only safetensors are read; name a folder that holds the weights of a model")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
        raise InputError(f"{index}: no weight_map of file names in this folder: the file is damaged")
    return [folder / file for file in sorted(set(files.values()))]


def _check_names(path: Path, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in wanted if name not in stored]
    unknown = [name for name in stored if name not in wanted]
    if missing or unknown:
        parts = [
            f"{len(names)} tensors {what} ({names[0]} first)"
            for what, names in (("missing", missing), ("not of this model", unknown))
            if names
        ]
        raise InputError(f"{path}: {', '.join(parts)}: the weights are of a model of another shape (section model)")
    for name, shape in wanted.items():
        if shape != stored[name]:
            raise InputError(
                f"{path}: {name} has shape {list(stored[name])}, the model needs {list(shape)}: "
                "the weights are of a model of another shape (section model, or another tokenizer)"
            )


def load_run(path: str | Path, step: int | None = None, device: str | torch.device | None = None) -> LoadedRun:
    """Model, tokenizer and configuration of a run.

    path: the run directory, or a checkpoint folder inside it (RUN/checkpoints/step_00001000). step: which checkpoint,
    default the latest. device: default CUDA where there is a GPU. The model is in evaluation mode and in its stored
    dtype. Raises InputError when anything is missing or does not fit.
    """
    run, folder = checkpoint_of(path, step)
    config = run.load_config()
    state = read_json(folder / STATE)
    if not isinstance(state.get("step"), int):
        raise InputError(f"{folder / STATE}: holds no step: the checkpoint is damaged")
    tokenizer = run_tokenizer(config.data)
    with torch.device("meta"):
        model = Transformer(config.model, tokenizer.vocab_size, loss=config.loss)
    load_weights(model, folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRun(model.to(device).eval(), tokenizer, config, state["step"], run)


def checkpoint_of(path: str | Path, step: int | None = None) -> tuple[RunDir, Path]:
    """The run and the checkpoint's folder that are meant by a run directory, or a checkpoint folder inside it, and a
    step (default the latest). Raises InputError where there is none."""
    folder = Path(path)
    if folder.parent.name == "checkpoints" and not (folder / "config.yaml").exists():
        run = RunDir.existing(folder.resolve().parent.parent)
        if step is not None and folder.name != run.checkpoint(step).name:
            raise InputError(f"{path} is one checkpoint, but step {step} is asked for: name the run directory")
        if not folder.is_dir():
            raise InputError(f"{path}: no such checkpoint: there are steps {run.steps()}")
    else:
        run = RunDir.existing(folder)
        folder = _checkpoint_folder(run, step)
    return run, folder


def _checkpoint_folder(run: RunDir, step: int | None) -> Path:
    if step is None:
        latest = run.latest()
        if latest is None:
            raise InputError(f"{run.path}: no checkpoint yet: train for at least checkpoint.interval steps")
        return latest
    if step not in run.steps():
        raise InputError(f"{run.path}: no checkpoint of step {step}: there are {run.steps() or 'none'}")
    return run.checkpoint(step)
