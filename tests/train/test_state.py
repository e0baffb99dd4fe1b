"""Pieces written by one layout of processes are read by any other."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megafish.errors import InputError
from megafish.model.shard import Shard
from megafish.train.state import FOLDER, MASTER, Piece, Scalar, StateReader, make_index, write_pieces

STATES = (MASTER, "exp_avg")
FULL = {"matrix": (12, 5), "vector": (7,)}


def values(name: str, state: str) -> torch.Tensor:
    seed = sorted(FULL).index(name) * 10 + STATES.index(state)
    return torch.randn(FULL[name], generator=torch.Generator().manual_seed(seed))


def cuts(size: int, parts: int, seed: int) -> list[tuple[int, int]]:
    """`parts` ranges that make up 0 ... size - 1."""
    inner = sorted(random.Random(seed).sample(range(1, size), parts - 1))
    return list(pairwise([0, *inner, size]))


def write(folder: Path, shards: dict[str, list[Shard | None]], parts: int) -> dict:
    """The state as `parts` data-parallel processes for each of a parameter's shards would write it."""
    (folder / FOLDER).mkdir(parents=True)
    ranks: dict[int, list[Piece]] = {}
    for name, shape in FULL.items():
        for tensor_rank, shard in enumerate(shards[name]):
            local = {s: (values(name, s) if shard is None else shard.take(values(name, s))).flatten() for s in STATES}
            for part, (begin, end) in enumerate(cuts(len(local[MASTER]), parts, seed=tensor_rank)):
                states = {state: tensor[begin:end] for state, tensor in local.items()}
                piece = Piece(name, shape, shard, begin, end, states, {"step": Scalar(3.0, True)})
                ranks.setdefault(tensor_rank * parts + part, []).append(piece)
    return make_index([write_pieces(folder, rank, pieces) for rank, pieces in sorted(ranks.items())])


# A fused projection: each process has a part of the first and of the second half.
FUSED = [Shard(0, ((0, 3), (6, 9)), (12, 5)), Shard(0, ((3, 6), (9, 12)), (12, 5))]
COLUMNS = [Shard(1, ((0, 2),), (12, 5)), Shard(1, ((2, 5),), (12, 5))]


@pytest.mark.parametrize("written", [[None], FUSED, COLUMNS], ids=["whole", "fused", "columns"])
@pytest.mark.parametrize("parts", [1, 3])
def test_any_range_of_any_shard_is_read(tmp_path: Path, written: list[Shard | None], parts: int) -> None:
    index = write(tmp_path, {"matrix": written, "vector": [None]}, parts)
    reader = StateReader(tmp_path, index)
    for name, wanted in (("matrix", [None, *FUSED, *COLUMNS]), ("vector", [None])):
        for state in STATES:
            full = values(name, state)
            assert torch.equal(reader.whole(name, state), full)
            for shard in wanted:
                local = (full if shard is None else shard.take(full)).flatten()
                for begin, end in [(0, len(local)), *cuts(len(local), 4, seed=1)]:
                    assert torch.equal(reader.read(name, state, shard, begin, end), local[begin:end])
    assert reader.states("vector") == ["exp_avg", "master"] and reader.scalars("vector") == {"step": Scalar(3.0, True)}


def test_another_model_is_refused(tmp_path: Path) -> None:
    reader = StateReader(tmp_path, write(tmp_path, {"matrix": [None], "vector": [None]}, 1))
    reader.check(FULL)
    with pytest.raises(InputError, match=r"1 parameters differ \(vector is in the checkpoint alone\).*another model"):
        reader.check({"matrix": (12, 5)})
    with pytest.raises(InputError, match=r"1 parameters differ \(bias is in the model alone\)"):
        reader.check({**FULL, "bias": (1,)})
    with pytest.raises(InputError, match=r"matrix has shape \[12, 5\], the model needs \[12, 6\]"):
        reader.check({**FULL, "matrix": (12, 6)})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    index = write(tmp_path, {"matrix": [None], "vector": [None]}, 1)
    (tmp_path / FOLDER / "rank_00000.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"rank_00000.safetensors: cannot be read.*damaged"):
        StateReader(tmp_path, index).whole("vector", MASTER)
    with pytest.raises(InputError, match=r"index.json: missing"):
        StateReader(tmp_path)


def test_what_is_stored_twice_or_not_at_all_is_a_defect(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    state = torch.zeros(7)

    def receipt(begin: int, end: int) -> dict:
        return write_pieces(tmp_path, 0, [Piece("vector", (7,), None, begin, end, {MASTER: state[begin:end]}, {})])

    make_index([receipt(0, 4), receipt(4, 7)])
    for wrong in ([receipt(0, 4)], [receipt(0, 4), receipt(3, 7)], [receipt(0, 4), receipt(5, 7)]):
        with pytest.raises(AssertionError):
            make_index(wrong)
