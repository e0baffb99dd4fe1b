"""What the starting model says of the texts that a method compares with it: asked once, before the first step.

At that moment the model in the engine is the starting model, sharded as it is. What is kept is small: a number for a
text, or the hidden states of its answer, from which the head of the starting model makes its predictions again. No
second model is ever there. The files lie in the run's folder `reference`, so that a resumed run compares with the very
same numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megafish.errors import InputError
from megafish.processes import together
from megafish.progress import track
from megafish.run import read_json, write_atomic
from megafish.train.engine import Engine
from megafish.unlearn.data import Item, pack

INDEX = "index.json"


class Kind(str, Enum):
    """What is on record of a text."""

    SUM = "sum"
    """Summed negative log-likelihood of the answer [nats]: fp32 scalar."""
    HIDDEN = "hidden"
    """Hidden states from which the head predicts the answer: [answer tokens, D]."""
    LAYER = "layer"
    """Output of a block at all inputs: [n, D]."""
    NORM = "norm"
    """Its Euclidean norms: fp32 [n]."""


class Wanted(NamedTuple):
    """Texts and what is wanted of them."""

    name: str
    items: Sequence[Item]
    kind: Kind
    block: int | None = None


class Reference:
    """Numbers of the starting model, read from the run's folder when asked for."""

    def __init__(self, folder: Path, device: torch.device, head: torch.Tensor | None) -> None:
        self.folder, self.device = folder, device
        self.head = head
        """Its output head, where predictions are compared."""
        index = read_json(folder / INDEX)
        self._processes, self._chunk = int(index["processes"]), int(index["chunk"])
        self._files: dict[int, Any] = {}

    def read(self, name: str, kind: Kind, numbers: list[int]) -> torch.Tensor:
        """Of the texts with these numbers, one behind another: [texts] of sums, else [rows] or [rows, D]."""
        found = [self._open(number).get_tensor(f"{name}/{kind.value}/{number}") for number in numbers]
        return (torch.stack(found) if kind is Kind.SUM else torch.cat(found)).to(self.device)

    def _open(self, number: int) -> Any:
        rank = number // self._chunk % self._processes
        if rank not in self._files:
            self._files[rank] = safe_open(_part(self.folder, rank), "pt")
        return self._files[rank]


def make_reference(folder: Path, engine: Engine, wanted: Sequence[Wanted], digest: str, chunk: int) -> None:
    """Ask the model in the engine and write the folder; its index last, so that half a folder is none. Collective."""
    processes = engine.processes
    together(lambda: _make_folder(folder) if processes.is_main else None)
    engine.train(False)
    tensors: dict[str, torch.Tensor] = {}
    total = sum(-(-len(each.items) // chunk) for each in wanted)
    with torch.no_grad(), track(total, "ask the starting model", "batch", enabled=processes.is_main) as bar:
        for each in wanted:
            starts = range(0, len(each.items), chunk)
            for first in range(0, len(starts), processes.world_size):
                # All processes make the call, also one for which nothing is left.
                mine = first + processes.rank
                start = starts[mine] if mine < len(starts) else 0
                found = _ask(engine, each, each.items[start : start + chunk], processes.device)
                if mine < len(starts):
                    keys = (f"{each.name}/{each.kind.value}/{start + i}" for i in range(len(found)))
                    tensors |= zip(keys, found, strict=True)
                bar.advance(min(processes.world_size, len(starts) - first))

    def write() -> None:
        part = _part(folder, processes.rank)
        save_file(tensors or {"empty": torch.zeros(1)}, part.with_suffix(".tmp"))
        part.with_suffix(".tmp").replace(part)

    together(write)
    index = {"processes": processes.world_size, "chunk": chunk, "digest": digest}
    together(lambda: write_atomic(folder / INDEX, json.dumps(index) + "\n") if processes.is_main else None)


def check_reference(folder: Path, digest: str) -> bool:
    """Whether the folder is complete; InputError where it was made by another model or of other texts."""
    if not (folder / INDEX).is_file():
        return False
    if read_json(folder / INDEX).get("digest") != digest:
        raise InputError(
            f"{folder}: made by another starting model, or of other texts, than this run has: remove the folder, and "
            "start the run anew"
        )
    return True


def _ask(engine: Engine, wanted: Wanted, items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
    packed = pack(items, device)
    shared: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
    if wanted.kind is Kind.SUM:
        nll = engine(packed.tokens, targets=packed.targets, per_token=True, **shared)[0]
        sums = nll.new_zeros(len(items)).index_add(0, packed.owner, nll)
        return list(sums.cpu().clone().unbind())
    block = wanted.block if wanted.block is not None else len(engine.module.blocks)  # type: ignore[arg-type]
    hidden = engine(packed.tokens, hidden_after=block, **shared)[0]
    values = hidden.float().norm(dim=-1) if wanted.kind is Kind.NORM else hidden
    chosen = packed.kept if wanted.kind is Kind.HIDDEN else torch.ones_like(packed.kept)
    owner = packed.owner[chosen]
    return [values[chosen][owner == i].cpu().contiguous() for i in range(len(items))]


def _make_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _part(folder: Path, rank: int) -> Path:
    return folder / f"part_{rank:05d}.safetensors"
