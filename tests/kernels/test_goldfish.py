"""The goldfish mask against an oracle in Python's own integers, its frozen vectors, and its statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafish_kernels import goldfish_coefficients, goldfish_drop

VECTORS = json.loads((Path(__file__).parent / "goldfish_v1_vectors.json").read_text(encoding="utf-8"))
DESIGN_TOKENS = [5, 17, 0, 99, 42, 7, 131071, 1, 1, 250, 5, 17, 0, 99, 42, 7]


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published (state first advanced, then mixed), in Python integers."""
    out, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def oracle_keys(tokens: list[int], starts: set[int], *, h: int, seed: int, window: str, table: Any) -> list[int]:
    c = splitmix64(seed, h + 1)
    ids = [table[t] for t in tokens] if table is not None else tokens
    keys, start = [], 0
    for i in range(len(ids)):
        start = i if i in starts else start
        last = i - 1 if window == "preceding" else i
        key = c[0] + sum(c[j] * (ids[last - j + 1] + 1) for j in range(1, h + 1) if last - j + 1 >= start)
        keys.append(key % 2**64)
    return keys


def oracle_drop(case: dict[str, Any]) -> list[int]:
    """Positions that goldfish-v1 drops, from the contract's words alone."""
    window, h = case["window"], case["h"]
    least = case["min_context"]
    if least is None:
        least = h if window == "preceding" else h - 1
    starts, table, exempt = {0, *case["starts"]}, case["canonical"], set(case["exempt"] or [])
    keys = oracle_keys(case["tokens"], starts, h=h, seed=case["seed"], window=window, table=table)
    dropped, start = [], 0
    for i, key in enumerate(keys):
        start = i if i in starts else start
        if key >> 32 < 2**32 // case["k"] and i - start >= least and case["tokens"][i] not in exempt:
            dropped.append(i)
    return dropped


def call(case: dict[str, Any], as_torch: bool) -> list[int]:
    make = torch.tensor if as_torch else np.array
    tokens = case["tokens"]
    starts = np.isin(np.arange(len(tokens)), case["starts"])
    vocabulary = max(tokens) + 1
    exempt = None if case["exempt"] is None else np.isin(np.arange(vocabulary), case["exempt"])
    drop = goldfish_drop(
        make(tokens),
        k=case["k"],
        h=case["h"],
        seed=case["seed"],
        window=case["window"],
        min_context=case["min_context"],
        document_starts=make(starts),
        exempt=None if exempt is None else make(exempt),
        canonical=None if case["canonical"] is None else make(case["canonical"]),
    )
    assert isinstance(drop, torch.Tensor if as_torch else np.ndarray)
    return np.flatnonzero(np.asarray(drop)).tolist()


def both(tokens: Any, **options: Any) -> np.ndarray:
    """The mask by NumPy, after checking that torch gives the same."""
    tokens = np.asarray(tokens)
    drop = goldfish_drop(tokens, **options)
    other = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    same = goldfish_drop(torch.from_numpy(tokens), **other)
    assert drop.dtype == np.bool_ and same.dtype == torch.bool and drop.shape == tokens.shape == tuple(same.shape)
    np.testing.assert_array_equal(drop, same.numpy())
    return drop


def zipf(rng: np.random.Generator, size: int, vocabulary: int = 32000) -> np.ndarray:
    weights = 1.0 / np.arange(1, vocabulary + 1)
    return np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(size)).astype(np.int64)


# ------------------------------------------------------------------------------------------------- the frozen contract


def test_coefficients_and_keys_of_the_contract() -> None:
    first = ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f", "f88bb8a8724c81ec", "1b39896a51a8749b"]
    assert [f"{c:016x}" for c in goldfish_coefficients(0, 4)] == first
    for seed in (0, 1, 2**64 - 1):
        assert list(goldfish_coefficients(seed, 64)) == splitmix64(seed, 65)
    keys = oracle_keys(DESIGN_TOKENS, {0}, h=4, seed=0, window="preceding", table=None)
    assert [f"{key:016x}" for key in keys[:6]] == [
        "e220a8397b1dcdaf",
        "78f45eb945763167",
        "cf35fa4bda5e98b1",
        "9dae264fcb491eb9",
        "2d2f1b4f1ae6c488",
        "f7af03d6d905b559",
    ]


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, [4, 9, 10, 11, 13, 14]),
        ({"document_starts": np.arange(16) == 10}, [4, 9, 14]),
        ({"window": "inclusive", "min_context": 4}, [8, 9, 10, 12, 13]),
        ({"window": "inclusive"}, [3, 8, 9, 10, 12, 13]),
    ],
)
def test_masks_of_the_contract(options: dict[str, Any], dropped: list[int]) -> None:
    assert np.flatnonzero(both(DESIGN_TOKENS, k=2, h=4, **options)).tolist() == dropped


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    assert oracle_drop(case) == case["drop"]
    assert call(case, as_torch=False) == case["drop"]
    assert call(case, as_torch=True) == case["drop"]


def test_vectors_cover_what_they_should() -> None:
    cases = VECTORS["cases"]
    assert VECTORS["scheme"] == "goldfish-v1"
    assert {case["h"] for case in cases} >= {1, 4, 13, 50, 64}
    assert {case["window"] for case in cases} == {"preceding", "inclusive"}
    assert len({case["seed"] for case in cases}) >= 4
    assert all(case["drop"] for case in cases)
    for field in ("min_context", "exempt", "canonical"):
        assert any(case[field] is not None for case in cases)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint32])
def test_integer_types_agree(dtype: type) -> None:
    tokens = np.random.default_rng(0).integers(0, 60000, 3000)
    expected = goldfish_drop(tokens, k=3)
    np.testing.assert_array_equal(goldfish_drop(tokens.astype(dtype), k=3), expected)
    assert expected.any()


def test_blocks_and_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    import megafish_kernels.goldfish as module

    rng = np.random.default_rng(1)
    tokens, starts = rng.integers(0, 500, (4, 777)), rng.random((4, 777)) < 0.02
    options = {"k": 3, "h": 9, "min_context": 2, "document_starts": starts}
    whole = both(tokens, **options)
    monkeypatch.setattr(module, "_BLOCK", 37)
    np.testing.assert_array_equal(goldfish_drop(tokens, **options), whole)
    for row in range(4):
        alone = goldfish_drop(tokens[row], k=3, h=9, min_context=2, document_starts=starts[row])
        np.testing.assert_array_equal(alone, whole[row])


# ---------------------------------------------------------------------------------- the mask belongs to the document


@pytest.mark.parametrize("window", ["preceding", "inclusive"])
@pytest.mark.parametrize("min_context", [None, 0, 40])
def test_packing_and_chunking_never_change_a_fate(window: Any, min_context: int | None) -> None:
    rng = np.random.default_rng(2)
    h, k = 13, 3
    documents = [rng.integers(0, 300, int(length)) for length in rng.integers(1, 200, 60)]
    options: dict[str, Any] = {"k": k, "h": h, "window": window, "min_context": min_context}
    fates = [goldfish_drop(document, **options) for document in documents]
    assert sum(int(fate.sum()) for fate in fates) > 500

    for order in (np.arange(60), rng.permutation(60)):
        stream = np.concatenate([documents[i] for i in order])
        expected = np.concatenate([fates[i] for i in order])
        positions = np.concatenate([np.arange(len(documents[i])) for i in order])
        starts = positions == 0
        np.testing.assert_array_equal(both(stream, document_starts=starts, **options), expected)
        for length, halo in ((64, h), (100, 29)):
            begins = np.arange(halo, len(stream) - length, length)
            at = begins[:, None] + np.arange(-halo, length)
            got = both(stream[at], document_starts=starts[at], positions=positions[at], halo=halo, **options)
            assert not got[:, :halo].any()
            np.testing.assert_array_equal(got[:, halo:], expected[at[:, halo:]])
            by_positions = both(stream[at], positions=positions[at], halo=halo, **options)
            np.testing.assert_array_equal(by_positions, got)
            shuffle = rng.permutation(len(at))
            again = both(
                stream[at][shuffle],
                document_starts=starts[at][shuffle],
                positions=positions[at][shuffle],
                halo=halo,
                **options,
            )
            np.testing.assert_array_equal(again, got[shuffle])


def test_every_context_decides_alone_and_in_order() -> None:
    rng = np.random.default_rng(3)
    h, rows = 13, 20000
    context = rng.integers(0, 32000, (rows, h))
    base = goldfish_drop(np.concatenate([context, rng.integers(0, 32000, (rows, 1))], 1), k=2)[:, -1]
    other_target = goldfish_drop(np.concatenate([context, rng.integers(0, 32000, (rows, 1))], 1), k=2)[:, -1]
    np.testing.assert_array_equal(base, other_target)
    tail = np.zeros((rows, 1), dtype=np.int64)
    # Another context is another draw: at k = 2 it turns half of the fates.
    changed = context.copy()
    changed[:, 0] = rng.integers(0, 32000, rows)
    swapped = context[:, [1, 0, *range(2, h)]]
    reversed_ = context[:, ::-1]
    for variant in (changed, swapped, reversed_):
        flips = goldfish_drop(np.concatenate([variant, tail], 1), k=2)[:, -1] != base
        assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(rows)
    outside = np.concatenate([rng.integers(0, 32000, (rows, 3)), context, tail], 1)
    np.testing.assert_array_equal(goldfish_drop(outside, k=2)[:, -1], base)


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("h", [4, 13, 50, 64])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "many zeros"])
def test_drop_rate_over_distinct_contexts(kind: str, h: int) -> None:
    rng = np.random.default_rng(h)
    size = 200_000
    tokens = rng.integers(0, 131072, size) if kind == "uniform" else zipf(rng, size)
    if kind == "many zeros":
        tokens[rng.random(size) < 0.3] = 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, h)[:-1]
    # The sum under other random coefficients names a context; repeats of one context are one draw.
    name = (windows.astype(np.uint64) * rng.integers(1, 2**63, h).astype(np.uint64)).sum(axis=1, dtype=np.uint64)
    first = np.unique(name, return_index=True)[1]
    for k in (2, 3, 4, 7, 16, 50, 128):
        rate = goldfish_drop(tokens, k=k, h=h)[h:][first].mean()
        sigma = np.sqrt((1 / k) * (1 - 1 / k) / len(first))
        assert abs(rate - 1 / k) < 4 * sigma, (k, rate)


def test_neighbouring_fates_are_independent() -> None:
    drop = goldfish_drop(np.random.default_rng(5).integers(0, 32000, 400_000), k=4)[13:].astype(float)
    for lag in (1, 2, 13):
        correlation = np.corrcoef(drop[:-lag], drop[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(drop))


def test_every_seed_draws_anew() -> None:
    # Over the seed one fixed context is dropped with probability 1/k, and two contexts independently of each other.
    tokens = np.random.default_rng(6).integers(0, 50000, 200)
    masks = np.array([goldfish_drop(tokens, k=4, seed=seed)[13:] for seed in range(2000)], dtype=float)
    assert np.abs(masks.mean(axis=0) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)
    correlation = np.corrcoef(masks.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 6 / np.sqrt(2000)


# ------------------------------------------------------------------------------------------------------------ options


def test_k_of_each_position() -> None:
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 1000, (3, 4000))
    ks = np.array([[0], [2], [50]])
    drop = both(tokens, k=ks)
    assert not drop[0].any()
    np.testing.assert_array_equal(drop[1], goldfish_drop(tokens[1], k=2))
    np.testing.assert_array_equal(drop[2], goldfish_drop(tokens[2], k=50))
    mixed = np.where(np.arange(4000) < 2000, 3, 0).astype(np.int32)
    np.testing.assert_array_equal(
        both(tokens[0], k=mixed, min_context=0), goldfish_drop(tokens[0], k=3, min_context=0) & (mixed > 0)
    )
    assert not both(tokens, k=None).any()


@pytest.mark.parametrize("scheme", ["goldfish-v1", "table", "static", "random"])
def test_exempt_and_k_hold_for_every_scheme(scheme: Any) -> None:
    # Odd ids, of which the published product keeps all its bits.
    tokens = np.random.default_rng(8).integers(0, 500, (2, 3000)) * 2 + 1
    exempt = np.arange(1000) < 200
    plain = both(tokens, k=3, scheme=scheme)
    assert abs(plain.mean() - 1 / 3) < 0.04
    np.testing.assert_array_equal(both(tokens, k=3, scheme=scheme, exempt=exempt), plain & ~exempt[tokens])
    ks = np.where(np.arange(3000) % 2 == 0, 3, 0)
    np.testing.assert_array_equal(both(tokens, k=ks, scheme=scheme), plain & (ks > 0))
    assert not both(tokens, k=None, scheme=scheme).any()
    assert not both(tokens, k=2, scheme=scheme, halo=100, positions=np.tile(np.arange(3000), (2, 1)))[:, :100].any()


def test_canonical_ids_share_their_fates() -> None:
    rng = np.random.default_rng(9)
    table = np.arange(2000) % 1000
    tokens = rng.integers(0, 1000, 5000)
    twin = tokens + 1000 * rng.integers(0, 2, 5000)
    expected = goldfish_drop(tokens, k=4)
    np.testing.assert_array_equal(both(twin, k=4, canonical=table), expected)
    assert (goldfish_drop(twin, k=4) != expected).any()


def published_table_mask(targets: torch.Tensor, k: int, h: int) -> torch.Tensor:
    """The published algorithm in words: product of the h ids that end at the target, in int64 with wrap-around."""
    table = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2971215073)).tolist()
    drop = torch.zeros(targets.shape, dtype=torch.bool)
    for row in range(targets.shape[0]):
        ids = targets[row].tolist()
        for i in range(h - 1, len(ids)):
            product = 1
            for token in ids[i - h + 1 : i + 1]:
                product = (product * token) % 2**64
            signed = product - 2**64 if product >= 2**63 else product
            drop[row, i] = table[signed % 1_000_003] < 1 / k
    return drop


@pytest.mark.parametrize(("k", "h"), [(4, 13), (3, 4), (50, 50), (8, 1)])
def test_table_equals_the_published_masks(k: int, h: int) -> None:
    tokens = np.random.default_rng(10).integers(0, 131072, (3, 700))
    tokens[1, ::90] = 0
    expected = published_table_mask(torch.from_numpy(tokens), k, h).numpy()
    assert expected.any()
    np.testing.assert_array_equal(both(tokens, k=k, h=h, scheme="table"), expected)
    assert not both(tokens[:, : h - 1], k=k, h=h, scheme="table").any()


def test_table_of_the_published_generator() -> None:
    # table[0] = 0.23368: a window with an id 0 is dropped at k = 4 and kept at k = 5.
    zeros = np.zeros(20, dtype=np.int64)
    assert np.flatnonzero(both(zeros, k=4, h=13, scheme="table")).tolist() == list(range(12, 20))
    assert not both(zeros, k=5, h=13, scheme="table").any()


def mersenne_floats(seed: int, count: int) -> np.ndarray:
    """float32 in [0, 1) from the lowest 24 bits of MT19937's outputs: what a published table of a CPU consists of."""
    generator: Any = np.random.RandomState(seed)._bit_generator  # type: ignore[attr-defined]
    return ((generator.random_raw(count) & (2**24 - 1)) / 2**24).astype(np.float32)


def test_table_against_a_second_reading_of_the_published_code() -> None:
    # Nothing of torch or of the library: its own generator, whole products in Python's integers, cut to 64 bits at the
    # end, and a remainder with the sign of the divisor.
    table = mersenne_floats(2971215073, 1_000_003)
    assert [f"{value:.5f}" for value in table[:2]] == ["0.23368", "0.44126"]
    rng = np.random.default_rng(20)
    negative = collapsed = 0
    for _ in range(60):
        h, n, highest = int(rng.integers(1, 65)), int(rng.integers(1, 150)), int(rng.choice([3, 1000, 131072, 2**31]))
        tokens = rng.integers(0 if rng.random() < 0.3 else 1, highest, (2, n))
        ks = rng.choice([0, 2, 3, 4, 5, 8, 50], (2, n) if rng.random() < 0.5 else (2, 1))
        table_of_ids = rng.integers(1, 60, highest) if highest < 2000 and rng.random() < 0.5 else None
        exempt = rng.random(highest) < 0.2 if highest < 2000 and rng.random() < 0.5 else None
        expected = np.zeros((2, n), dtype=bool)
        for row in range(2):
            ids = [int(token) if table_of_ids is None else int(table_of_ids[token]) for token in tokens[row]]
            for last in range(h - 1, n):
                product = math.prod(ids[last - h + 1 : last + 1]) % 2**64
                signed = product - 2**64 * (product >= 2**63)
                negative, collapsed = negative + (signed < 0), collapsed + (signed == 0)
                k = int(np.broadcast_to(ks, (2, n))[row, last])
                expected[row, last] = k > 0 and table[signed - 1_000_003 * (signed // 1_000_003)] < np.float32(1 / k)
        if exempt is not None:
            expected &= ~exempt[tokens]
        kind = rng.choice(["int32", "int64"]) if highest < 2**31 else "int64"
        given = tokens.astype(kind)
        np.testing.assert_array_equal(
            both(given, k=ks, h=h, scheme="table", canonical=table_of_ids, exempt=exempt), expected
        )
    assert negative > 1000 and collapsed > 100


@pytest.mark.parametrize(("h", "rate"), [(50, 0.0161), (64, 0.0069)])
def test_table_drops_as_rarely_as_the_published_code(h: int, rate: float) -> None:
    # Wide windows have products of 0 mod 2^64, which share table[0] = 0.234: never dropped at k = 50, which wants 0.02.
    tokens = np.random.default_rng(21).integers(1, 131072, 1_000_000)
    assert abs(goldfish_drop(tokens, k=50, h=h, scheme="table").mean() - rate) < 0.001


def test_static_counts_in_the_document() -> None:
    starts = np.isin(np.arange(14), [5])
    drop = both(np.zeros(14, dtype=np.int64), k=3, scheme="static", document_starts=starts)
    assert np.flatnonzero(drop).tolist() == [2, 7, 10, 13]
    drop = both(np.zeros(6, dtype=np.int64), k=3, scheme="static", halo=2, positions=np.arange(9, 15))
    assert np.flatnonzero(drop).tolist() == [2, 5]


def test_random_draws_anew_for_every_nonce_and_row() -> None:
    tokens = np.zeros((4, 50_000), dtype=np.int64)
    nonce = np.array([7, 8, 7, 2**40])
    drop = both(tokens, k=4, scheme="random", nonce=nonce, seed=3)
    assert abs(drop[:2].mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 100_000)
    np.testing.assert_array_equal(drop[0], drop[2])
    for other in (drop[1], drop[3], goldfish_drop(tokens[0], k=4, scheme="random", nonce=7, seed=4)):
        assert abs((drop[0] != other).mean() - 0.375) < 4 * np.sqrt(0.375 * 0.625 / 50_000)
    np.testing.assert_array_equal(goldfish_drop(tokens[0], k=4, scheme="random", nonce=8, seed=3), drop[1])
    shifted = goldfish_drop(np.zeros(50_013, dtype=np.int64), k=4, scheme="random", nonce=7, seed=3, halo=13)
    np.testing.assert_array_equal(shifted[13:], drop[0])


@pytest.mark.parametrize("scheme", ["goldfish-v1", "table", "static", "random"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (2, 1), (2, 2, 5)])
def test_small_shapes(scheme: Any, shape: tuple[int, ...]) -> None:
    both(np.ones(shape, dtype=np.int64), k=2, h=3, scheme=scheme)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": 1}, "k: 1"),
        ({"k": np.array([2, 1, 2, 2])}, "k: each"),
        ({"k": np.array([-1, 2, 2, 2])}, "k: each"),
        ({"h": 0}, "h: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed"),
        ({"window": "both"}, "window"),
        ({"scheme": "v2"}, "scheme"),
        ({"halo": -1}, "halo: -1"),
        ({"h": 3, "halo": 2}, "halo: 2 does not cover"),
        ({"h": 1, "halo": 1, "min_context": 3}, "positions: needed"),
        ({"scheme": "static", "halo": 1}, "positions: needed"),
        ({"min_context": -1}, "min_context"),
        ({"scheme": "table", "min_context": 3}, "min_context: has no meaning"),
        ({"scheme": "table", "seed": 3}, "seed: has no meaning"),
        ({"scheme": "static", "canonical": np.arange(5)}, "canonical: has no meaning"),
        ({"scheme": "random", "window": "inclusive"}, "window: has no meaning"),
        ({"nonce": 1}, "nonce: has no meaning"),
        ({"scheme": "random", "nonce": np.array([1, 2])}, "nonce: shape"),
        ({"document_starts": np.zeros(3, dtype=bool)}, "document_starts: shape"),
        ({"positions": np.arange(3, 7)}, "positions: a row begins inside"),
        ({"positions": np.zeros(4)}, "positions: expected integers, got .*float64"),
        ({"document_starts": np.zeros(4, dtype=np.int64)}, "document_starts: expected bool, got .*int64"),
        ({"exempt": np.zeros(5, dtype=np.uint8)}, "exempt: expected bool, got .*uint8"),
        ({"exempt": np.zeros((5, 1), dtype=bool)}, r"exempt: shape \(5, 1\)"),
        ({"canonical": np.zeros(5)}, "canonical: expected integers"),
        ({"k": np.array([2.0, 2.0, 2.0, 2.0])}, "k: expected integers"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], word: str) -> None:
    for make in (np.asarray, torch.as_tensor):
        given = {key: make(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
        with pytest.raises(ValueError, match=word):
            goldfish_drop(make([1, 2, 3, 4]), **{"k": 2, **given})


def test_arrays_are_of_the_kind_of_the_tokens() -> None:
    tokens = np.arange(4)
    with pytest.raises(ValueError, match="document_starts: expected a NumPy array as tokens are, got Tensor"):
        goldfish_drop(tokens, k=2, document_starts=torch.zeros(4, dtype=torch.bool))  # type: ignore[type-var]
    with pytest.raises(ValueError, match="exempt: expected a tensor as tokens are, got ndarray"):
        goldfish_drop(torch.from_numpy(tokens), k=2, exempt=np.zeros(4, dtype=bool))  # type: ignore[type-var]


def test_negative_and_floating_ids_are_refused() -> None:
    for make in (np.array, torch.tensor):
        with pytest.raises(ValueError, match="id -1 is negative"):
            goldfish_drop(make([3, -1]), k=2)
        with pytest.raises(ValueError, match="expected integers"):
            goldfish_drop(make([3.0, 1.0]), k=2)


@pytest.mark.parametrize("as_torch", [False, True])
def test_scalars_of_other_types_are_the_same_numbers(as_torch: bool) -> None:
    values = np.random.default_rng(3).integers(0, 1000, (2, 400))
    tokens: Any = torch.from_numpy(values) if as_torch else values
    seed = 2**63 + 5
    expected = goldfish_drop(tokens, k=4, h=3, seed=seed, halo=5)
    assert 0.15 < np.asarray(expected).mean() < 0.35
    for k in (np.int64(4), np.array(4), torch.tensor(4, dtype=torch.int32), torch.tensor(4, dtype=torch.uint8)):
        for h in (np.int32(3), torch.tensor(3)):
            got = goldfish_drop(tokens, k=k, h=h, seed=np.uint64(seed), halo=np.array(5))  # type: ignore[arg-type]
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    # Types too narrow for 2^32 / k.
    for dtype in ("int8", "uint8", "int32"):
        ks = np.full(values.shape, 4, dtype=dtype)
        many: Any = torch.from_numpy(ks) if as_torch else ks
        got = goldfish_drop(tokens, k=many, h=3, seed=seed, halo=5)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.int64(1)}, "k: 1 must be at least 2"),
        ({"k": np.array(-3)}, "k: -3 must be at least 2"),
        ({"k": torch.tensor(0)}, "k: 0 must be at least 2"),
        ({"k": 2**63}, "below 2\\^63"),
        ({"k": 2.5}, "k: expected an integer"),
        ({"k": np.float64(4)}, "k: expected an integer"),
        ({"k": torch.tensor(4.0)}, "k: expected an integer"),
        ({"k": "4"}, "k: expected an integer"),
        ({"h": 2.0}, "h: expected an integer"),
        ({"h": np.int64(0)}, "h: 0 must be at least 1"),
        ({"seed": np.int64(-1)}, "seed: -1 must be at least 0"),
        ({"seed": 0.5}, "seed: expected an integer"),
        ({"halo": np.float32(3)}, "halo: expected an integer"),
        ({"min_context": 1.5}, "min_context: expected an integer"),
        ({"nonce": 0.0}, "nonce: expected an integer"),
    ],
)
def test_scalars_that_are_no_such_integers(change: dict[str, Any], message: str, as_torch: bool) -> None:
    tokens: Any = torch.arange(20) if as_torch else np.arange(20)
    with pytest.raises(ValueError, match=message):
        goldfish_drop(tokens, **{"k": 4, "h": 3, **change})


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 1, 8), (3, 8), (0,)])
def test_k_that_does_not_broadcast(shape: tuple[int, ...], as_torch: bool) -> None:
    tokens, ks = np.zeros((2, 8), dtype=np.int64), np.full(shape, 4)
    arrays: Any = (torch.from_numpy(tokens), torch.from_numpy(ks)) if as_torch else (tokens, ks)
    with pytest.raises(ValueError, match=r"k: shape .* does not broadcast to that of tokens, \(2, 8\)"):
        goldfish_drop(arrays[0], k=arrays[1], h=3)


def test_what_is_no_array_is_named() -> None:
    with pytest.raises(ValueError, match="tokens: expected a NumPy array or a tensor, got list"):
        goldfish_drop([1, 2], k=2)  # type: ignore[type-var]
    for seed, h in ((-1, 3), (2**64, 3), (0, -1)):
        with pytest.raises(ValueError, match=f"seed, h: {seed} and {h}"):
            goldfish_coefficients(seed, h)
