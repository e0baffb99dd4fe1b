"""The mask's Triton kernel against NumPy and torch: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafish_kernels import goldfish_coefficients, goldfish_drop, goldfish_keep

pytest.importorskip("triton")

VECTORS = json.loads((Path(__file__).parent / "goldfish_v1_vectors.json").read_text(encoding="utf-8"))
BATCHES = 10
# Interpreted, a step of the window takes about 2.5 ms; compiled, nearly every configuration is a kernel of its own.
PER_BATCH = 15 if torch.cuda.is_available() else 100
KS = [2, 3, 3, 4, 5, 16, 50, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63 - 1]


def to(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }


def both(tokens: np.ndarray, device: torch.device, **options: Any) -> np.ndarray:
    """The mask by NumPy, after checking that Triton gives the same."""
    expected = goldfish_drop(tokens, **options)
    got = goldfish_drop(torch.from_numpy(tokens).to(device), **to(device, options), backend="triton")
    assert got.dtype == torch.bool and got.shape == tokens.shape and got.device.type == device.type
    np.testing.assert_array_equal(got.cpu().numpy(), expected)
    return expected


# ------------------------------------------------------------------------------------------------ random configurations


def in_document(starts: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """Positions in documents, of which a row's first token has `begin`."""
    positions = np.zeros(starts.shape, dtype=np.int64)
    for i in range(starts.shape[-1]):
        previous = positions[..., i - 1] + 1 if i else begin
        positions[..., i] = np.where(starts[..., i], 0, previous)
    return positions


def ks_of(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One k, or as many as broadcast to `shape`, zeros among them."""
    if rng.random() < 0.5:
        return KS[rng.integers(0, 7 if rng.random() < 0.8 else len(KS))]
    own = tuple(size if rng.random() < 0.7 else 1 for size in shape)[rng.integers(0, len(shape)) :]
    ks = rng.choice(np.array([0, *KS]), size=own)
    if rng.random() < 0.5:
        ks = np.where(rng.random(own) < 0.7, rng.integers(2, 5, own), ks)
    return (
        ks.astype(rng.choice(["int64", "uint64"]))
        if ks.size == 0 or ks.max() > 50
        else ks.astype(rng.choice(["int8", "int32"]))
    )


def configuration(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    h = int(rng.choice([1, 1, 2, 2, 3, 3, 4, 5, 6])) if rng.random() < 0.97 else int(rng.integers(7, 65))
    window = str(rng.choice(["preceding", "inclusive"]))
    reach = h if window == "preceding" else h - 1
    halo = 0 if rng.random() < 0.5 else reach + int(rng.integers(0, 4))
    n = halo + int(rng.choice([0, 1, 2, 9, 40, 60]))
    # A program has 256 tokens: some batches need several, of rows longer or much shorter than that.
    shape = [(n,), (1, n), (4, n), (2, 2, n), (0, n)][rng.integers(0, 5)]
    if rng.random() < 0.05:
        shape = (2, n + 300) if rng.random() < 0.5 else (100, halo + 3)
    dtype = rng.choice(["int32", "int64", "int64", "uint8", "int16", "uint16"])
    vocabulary = int(rng.choice([2, 50, 200, 131072]))
    vocabulary = min(vocabulary, np.iinfo(dtype).max)
    tokens = rng.integers(0, vocabulary, shape).astype(dtype)

    options: dict[str, Any] = {"k": ks_of(rng, shape), "h": h, "window": window, "halo": halo}
    seeds = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, *(int(seed) for seed in rng.integers(0, 2**64, 6, dtype=np.uint64))]
    options["seed"] = seeds[rng.integers(0, len(seeds))]
    starts = rng.random(shape) < rng.choice([0.0, 0.02, 0.2])
    begin = rng.integers(0, 2 * h + 2, shape[:-1]) if halo else np.zeros(shape[:-1], dtype=np.int64)
    positions = in_document(starts, begin)
    given = rng.integers(0, 4)
    if given in (1, 3):
        options["document_starts"] = starts
    if given in (2, 3):
        options["positions"] = positions.astype(rng.choice(["int32", "int64"]))
    if rng.random() < 0.4:
        options["min_context"] = int(rng.integers(0, reach + 6)) if rng.random() < 0.98 else 2**33
        if 0 < halo < options["min_context"]:
            options["positions"] = positions
    if rng.random() < 0.3:
        options["exempt"] = rng.random(vocabulary) < 0.3
    if rng.random() < 0.3:
        options["canonical"] = rng.integers(0, 7, vocabulary).astype(rng.choice(["uint8", "int32", "int64"]))
    return tokens, options


def laid_out(rng: np.random.Generator, array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same values in a tensor that may be no row-major block of memory."""
    tensor = torch.from_numpy(array).to(device)
    layout = rng.integers(0, 3)
    if layout == 1:
        wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] * 2 + 1), dtype=tensor.dtype, device=device)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == 2:
        wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 3), dtype=tensor.dtype, device=device)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    return tensor


@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_three_paths_agree(batch: int, triton_device: torch.device) -> None:
    rng = np.random.default_rng(batch)
    dropped = 0
    for _ in range(PER_BATCH):
        tokens, options = configuration(rng)
        expected = goldfish_drop(tokens, **options)
        dropped += int(expected.sum())
        tensor, arguments = laid_out(rng, tokens, triton_device), to(triton_device, options)
        for backend in ("torch", "triton"):
            got = goldfish_drop(tensor, **arguments, backend=backend)  # type: ignore[arg-type]
            assert got.dtype == torch.bool and got.shape == tensor.shape
            np.testing.assert_array_equal(got.cpu().numpy(), expected, err_msg=f"{backend} {tokens.shape} {options}")
        if rng.random() < 0.15:
            check_keep(rng, tensor, expected, arguments)
    assert dropped > 3 * PER_BATCH


def check_keep(rng: np.random.Generator, tensor: torch.Tensor, drop: np.ndarray, arguments: dict[str, Any]) -> None:
    n = tensor.shape[-1]
    lead = int(rng.integers(arguments["halo"], n + 1))
    ignored = rng.random((*tensor.shape[:-1], n - lead)) < 0.2
    values = np.where(ignored, -100, tensor.long().cpu().numpy()[..., lead:] % 2**15)
    values = values.astype(rng.choice(["int16", "int32", "int64"]))
    expected = ~ignored & ~drop[..., lead:]
    targets = laid_out(rng, values, tensor.device)
    for backend in ("torch", "triton"):
        keep, rows = goldfish_keep(tensor, targets, **arguments, backend=backend)  # type: ignore[arg-type]
        np.testing.assert_array_equal(keep.cpu().numpy(), expected)
        kept = np.flatnonzero(expected)
        assert rows.index.dtype == rows.count.dtype == torch.int32 and rows.count.shape == ()
        assert int(rows.count) == len(kept)
        np.testing.assert_array_equal(rows.index.cpu().numpy(), np.pad(kept, (0, expected.size - len(kept))))


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any], triton_device: torch.device) -> None:
    tokens = torch.tensor(case["tokens"], device=triton_device)
    options: dict[str, Any] = {name: case[name] for name in ("k", "h", "seed", "window", "min_context")}
    options["document_starts"] = np.isin(np.arange(len(tokens)), case["starts"])
    if case["exempt"] is not None:
        options["exempt"] = np.isin(np.arange(max(case["tokens"]) + 1), case["exempt"])
    if case["canonical"] is not None:
        options["canonical"] = np.array(case["canonical"])
    drop = goldfish_drop(tokens, **to(triton_device, options), backend="triton")
    assert np.flatnonzero(drop.cpu().numpy()).tolist() == case["drop"]


@pytest.mark.parametrize("window", ["preceding", "inclusive"])
def test_a_window_that_is_not_unrolled(window: Any, triton_device: torch.device) -> None:
    rng = np.random.default_rng(11)
    tokens, starts = rng.integers(0, 1000, (2, 150)), rng.random((2, 150)) < 0.01
    for h in (16, 17, 18, 70):
        assert both(tokens, triton_device, k=2, h=h, window=window, document_starts=starts, min_context=3).any()


def test_thresholds_are_exact(triton_device: torch.device) -> None:
    # Around the k at which a token's fate turns: (upper + 1) * k <= 2^32.
    tokens = np.random.default_rng(12).integers(0, 1000, 400)
    c, h = goldfish_coefficients(0, 1), 1
    upper = np.array([((c[0] + c[1] * (int(token) + 1)) % 2**64) >> 32 for token in tokens[:-1]], dtype=np.int64)
    last = 2**32 // (upper + 1)
    assert (last >= 2).sum() > 150
    for change, dropped in ((0, True), (1, False)):
        ks = np.concatenate([[0], np.where(last >= 2, last + change, 0)])
        drop = both(tokens, triton_device, k=ks, h=h)
        np.testing.assert_array_equal(drop, (ks > 0) & dropped)
    for i in np.argsort(upper)[[0, 1, 100]]:
        for k, dropped in ((int(last[i]), True), (int(last[i]) + 1, False)):
            assert both(tokens, triton_device, k=k, h=h)[i + 1] == dropped


@pytest.mark.parametrize("window", ["preceding", "inclusive"])
@pytest.mark.parametrize("min_context", [None, 0, 20])
def test_packing_and_chunking_never_change_a_fate(
    window: Any, min_context: int | None, triton_device: torch.device
) -> None:
    rng = np.random.default_rng(2)
    h, count = 5, 25
    documents = [rng.integers(0, 300, int(length)) for length in rng.integers(1, 80, count)]
    options: dict[str, Any] = {"k": 3, "h": h, "window": window, "min_context": min_context}
    fates = [goldfish_drop(document, **options) for document in documents]
    for order in (np.arange(count), rng.permutation(count)):
        stream = np.concatenate([documents[i] for i in order])
        expected = np.concatenate([fates[i] for i in order])
        assert expected.sum() > 100
        positions = np.concatenate([np.arange(len(documents[i])) for i in order])
        np.testing.assert_array_equal(both(stream, triton_device, document_starts=positions == 0, **options), expected)
        for length, halo in ((31, h), (100, 22)):
            at = np.arange(halo, len(stream) - length, length)[:, None] + np.arange(-halo, length)
            rng.shuffle(at)
            for given in ({"positions": positions[at]}, {"document_starts": positions[at] == 0}):
                if "positions" not in given and halo < (min_context or 0):
                    continue
                got = both(stream[at], triton_device, halo=halo, **given, **options)
                np.testing.assert_array_equal(got[:, halo:], expected[at[:, halo:]])
                assert not got[:, :halo].any()


def test_every_start_gives_the_same_bits(triton_device: torch.device) -> None:
    tokens = torch.randint(0, 1000, (3, 701), generator=torch.Generator().manual_seed(0)).to(triton_device)
    targets = torch.where(tokens % 11 == 0, -1, tokens)[:, 1:]
    first = goldfish_keep(tokens, targets, k=3, h=4, ignore_index=-1, backend="triton")
    for _ in range(3):
        keep, rows = goldfish_keep(tokens, targets, k=3, h=4, ignore_index=-1, backend="triton")
        assert torch.equal(keep, first[0])
        assert torch.equal(rows.index, first[1].index) and torch.equal(rows.count, first[1].count)
    kept = first[0].reshape(-1).nonzero()[:, 0]
    assert torch.equal(first[1].index[: int(first[1].count)], kept.int())


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": 1}, "k: 1 must be at least 2"),
        ({"k": torch.tensor([[2, 3, 4]])}, "k: shape"),
        ({"k": torch.tensor([[2.0]])}, "k: expected integers"),
        ({"k": torch.tensor([[1]])}, "k: each must be at least 2"),
        ({"k": torch.empty(2, 1, dtype=torch.int64, device="meta")}, "k: on meta, but tokens are on"),
        ({"k": np.array([[2]])}, "k: expected a tensor as tokens are, got ndarray"),
        ({"h": 0}, "h: 0 must be at least 1"),
        ({"halo": 2}, "halo: 2 does not cover"),
        ({"min_context": 5, "halo": 3}, "positions: needed"),
        ({"positions": torch.ones(2, 9, dtype=torch.int64)}, "positions: a row begins inside"),
        ({"positions": torch.zeros(2, 9)}, "positions: expected integers, got torch.float32"),
        ({"document_starts": torch.zeros(9, dtype=torch.bool)}, "document_starts: shape"),
        ({"document_starts": torch.zeros(2, 9, dtype=torch.int64)}, "document_starts: expected bool"),
        ({"exempt": torch.zeros(9, dtype=torch.uint8)}, "exempt: expected bool, got torch.uint8"),
        ({"exempt": torch.zeros(3, 3, dtype=torch.bool)}, "exempt: shape"),
        ({"exempt": torch.zeros(9, dtype=torch.bool, device="meta")}, "exempt: on meta"),
        ({"canonical": torch.zeros(9, dtype=torch.bool)}, "canonical: expected integers"),
        ({"canonical": torch.zeros(9, dtype=torch.int64, device="meta")}, "canonical: on meta"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    options: dict[str, Any], word: str, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megafish_kernels import triton_mask, triton_runtime

    monkeypatch.setattr(triton_mask, "launch", None)
    monkeypatch.setattr(triton_runtime, "runs_on", lambda device: True)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=word):
        goldfish_drop(tokens, **{"k": 2, "h": 3, **options}, backend=backend)
    with pytest.raises(ValueError, match=word):
        goldfish_keep(tokens, tokens[:, 4:], **{"k": 2, "h": 3, **options}, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("targets", "options", "word"),
    [
        (torch.zeros(2, 10, dtype=torch.int64), {}, "targets: shape"),
        (torch.zeros(3, 9, dtype=torch.int64), {}, "targets: shape"),
        (torch.zeros(18, dtype=torch.int64), {}, "targets: shape"),
        (torch.zeros(2, 9), {}, "targets: expected integers"),
        (torch.zeros(2, 9, dtype=torch.int64, device="meta"), {}, "targets: on meta"),
        (torch.zeros(2, 8, dtype=torch.int64), {"halo": 3}, "halo: 3 tokens of context, but only 1 stand"),
        (np.zeros((2, 9)), {}, "targets: expected a tensor"),
        (torch.zeros(2, 9, dtype=torch.int64), {"ignore_index": 0.5}, "ignore_index: expected an integer"),
    ],
)
def test_mistakes_of_targets(targets: Any, options: dict[str, Any], word: str, backend: Any) -> None:
    with pytest.raises(ValueError, match=word):
        goldfish_keep(torch.zeros(2, 9, dtype=torch.int64), targets, k=2, h=3, **options, backend=backend)


def test_backends_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of"):
        goldfish_drop(tokens, k=2, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend: triton has no scheme table"):
        goldfish_drop(tokens, k=2, scheme="table", backend="triton")
    with pytest.raises(ValueError, match="backend: 'torch' is for tensors"):
        goldfish_drop(tokens.numpy(), k=2, backend="torch")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match='backend: "triton" cannot run on cpu'):
        goldfish_drop(tokens, k=2, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_outside_the_tables(backend: Any) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("values are looked at on the CPU alone")
    tokens = torch.tensor([[1, 2, 9]])
    for name, table in (("exempt", torch.zeros(9, dtype=torch.bool)), ("canonical", torch.arange(9))):
        with pytest.raises(IndexError):
            goldfish_drop(tokens, k=2, h=1, **{name: table}, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="id -1 is negative"):
        goldfish_drop(tokens - 2, k=2, h=1, backend=backend)


# ------------------------------------------------------------------------------------------------------ without a GPU


def test_torch_path_never_asks_the_device() -> None:
    tokens = torch.empty((2, 20), dtype=torch.int64, device="meta")
    for scheme in ("goldfish-v1", "static", "random"):
        keep, rows = goldfish_keep(tokens, tokens[:, 1:], k=3, h=4, scheme=scheme, backend="torch")  # type: ignore[arg-type]
        assert keep.shape == (2, 19) and rows.index.shape == (38,) and rows.count.shape == ()


def test_torch_path_in_one_graph() -> None:
    rng = np.random.default_rng(4)
    tokens = torch.from_numpy(rng.integers(0, 100, (2, 80)))
    starts, exempt = torch.from_numpy(rng.random((2, 80)) < 0.1), torch.from_numpy(rng.random(100) < 0.1)

    def step(tokens: torch.Tensor, ks: torch.Tensor, starts: torch.Tensor, exempt: torch.Tensor) -> Any:
        return goldfish_keep(
            tokens, tokens[:, 1:], k=ks, h=5, seed=2**64 - 1, document_starts=starts, exempt=exempt, ignore_index=7
        )

    arguments = (tokens, torch.tensor([[2], [3]]), starts, exempt)
    expected = step(*arguments)
    keep, rows = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(keep, expected[0]) and not keep.all()
    assert torch.equal(rows.index, expected[1].index) and torch.equal(rows.count, expected[1].count)
