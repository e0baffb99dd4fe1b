"""The mask is a property of the document: checked through real streams and batches against integers computed here."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from megafish.config import GoldfishConfig
from megafish.data.corpus import Corpus, SampleStream, SourceSpec
from megafish.data.indexed import IndexedWriter
from megafish.data.loader import IGNORE, EvalLoader, Loader
from megafish.data.prepare import prepare
from megafish.data.tokenizer import Tokenizer, load_tokenizer
from megafish.errors import InputError
from megafish.objective.goldfish import GoldfishMask
from megafish_kernels import goldfish_drop

MASK64 = 2**64 - 1
VOCABULARY = 60


def splitmix64(seed: int, count: int) -> list[int]:
    outputs, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        outputs.append(z ^ (z >> 31))
    return outputs


def document_mask(
    doc: list[int], k: int | None, h: int, seed: int = 0, inclusive: bool = False, min_context: int | None = None
) -> list[bool]:
    """goldfish-v1 of one document, token by token in Python's integers, straight from its definition."""
    c = splitmix64(seed, h + 1)
    needed = (h - 1 if inclusive else h) if min_context is None else min_context
    drops = []
    for i in range(len(doc)):
        places = [i - j + (1 if inclusive else 0) for j in range(1, h + 1)]
        key = (c[0] + sum(c[j] * (doc[p] + 1) for j, p in zip(range(1, h + 1), places, strict=True) if p >= 0)) & MASK64
        drops.append(k not in (None, 0) and i >= needed and (key >> 32) < 2**32 // k)
    return drops


def make_documents(count: int = 25, seed: int = 0) -> list[list[int]]:
    """Documents with repeats in them, so that equal windows occur; ids 1 to 59, then the end-of-document token 0."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(1, VOCABULARY, 25).tolist() for _ in range(3)]
    docs = []
    for _ in range(count):
        words = [phrases[int(rng.integers(3))] if rng.random() < 0.3 else rng.integers(1, VOCABULARY, 9).tolist()]
        words += [rng.integers(1, VOCABULARY, int(rng.integers(0, 40))).tolist(), phrases[int(rng.integers(3))]]
        docs.append([*itertools.chain(*words[: int(rng.integers(0, 4))]), 0])
    return docs


def make_corpus(prefix: Path, docs: list[list[int]]) -> Corpus:
    with IndexedWriter(prefix, "uint16") as writer:
        for doc in docs:
            writer.append(doc)
    return Corpus(prefix)


def drops_by_place(stream: SampleStream, mask: GoldfishMask, samples: int, micro: int) -> dict[int, set[bool]]:
    """Every fate that each token of source 0 met as a target, in batches of the loader, by its offset in the stream."""
    fates: dict[int, set[bool]] = {}
    loader = Loader(stream, mask, micro, micro)
    for first in range(0, samples, micro):
        starts = stream.locate(first, micro).start
        (batch,) = loader.step(first).micro_batches
        for row, column in itertools.product(range(micro), range(stream.sequence_length)):
            place = (int(starts[row]) + 1 + column) % stream.sources[0].corpus.num_tokens
            if batch.targets[row, column] == IGNORE:
                assert not batch.drop[row, column]
                continue
            fates.setdefault(place, set()).add(bool(batch.drop[row, column]))
    return fates


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"k": 3, "h": 4}, {"k": 3, "h": 4}),
        ({"k": 2, "h": 13}, {"k": 2, "h": 13}),
        ({"k": 2, "h": 1}, {"k": 2, "h": 1}),
        ({"k": 4, "h": 20, "seed": 2**64 - 1}, {"k": 4, "h": 20, "seed": 2**64 - 1}),
        ({"k": 2, "h": 5, "window": "inclusive"}, {"k": 2, "h": 5, "inclusive": True}),
        ({"k": 2, "h": 6, "min_context": 0}, {"k": 2, "h": 6, "min_context": 0}),
        ({"k": 2, "h": 6, "min_context": 3}, {"k": 2, "h": 6, "min_context": 3}),
        ({"k": 2, "h": 4, "min_context": 30}, {"k": 2, "h": 4, "min_context": 30}),
        ({"k": None, "h": 4}, {"k": None, "h": 4}),
    ],
)
def test_a_token_has_one_fate(tmp_path: Path, settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Whatever the sequence length, pass, micro-batch and place in the batch: the fate that its document gives it."""
    docs = make_documents()
    corpus = make_corpus(tmp_path / "corpus", docs)
    expected = [drop for doc in docs for drop in document_mask(doc, **arguments)]
    assert any(expected) == (arguments["k"] is not None)
    firsts = {0, *itertools.accumulate(len(doc) for doc in docs)}
    mask = GoldfishMask(GoldfishConfig(**settings))
    for length, micro in [(8, 4), (17, 1), (64, 6), (200, 2)]:
        for seed, extra in [(0, 0), (1, 7)]:
            stream = SampleStream([SourceSpec(corpus)], length, seed, mask.halo + extra)
            samples = -(-2 * (corpus.num_tokens // length) // micro) * micro
            fates = drops_by_place(stream, mask, samples, micro)
            assert len(fates) > 0.8 * (corpus.num_tokens - len(docs))
            assert fates == {place: {expected[place]} for place in fates if place not in firsts}


def test_evaluation_and_a_moved_document_agree(tmp_path: Path) -> None:
    docs = make_documents()
    mask = GoldfishMask(GoldfishConfig(k=2, h=7))
    found: list[dict[tuple[int, ...], list[bool]]] = []
    for name, order in [("a", docs), ("b", docs[::-1])]:
        corpus = make_corpus(tmp_path / name, order)
        stream = SampleStream([SourceSpec(corpus)], 40, 3, mask.halo)
        drops: dict[int, bool] = {}
        for batch in EvalLoader(stream, stream.unique_samples, 4, mask=mask):
            for row, number in enumerate(batch.sample_ids):
                start = int(stream.locate(max(number, 0), 1).start[0])
                for column in range(40 if number >= 0 else 0):
                    drops[(start + 1 + column) % corpus.num_tokens] = bool(batch.drop[row, column])
        begins = [0, *itertools.accumulate(len(doc) for doc in order)]
        whole = {}
        for doc, begin in zip(order, begins, strict=False):
            if len(doc) > 8 and all(begin + i in drops for i in range(len(doc))):
                whole[tuple(doc)] = [drops[begin + i] for i in range(len(doc))]
        found.append(whole)
    shared = found[0].keys() & found[1].keys()
    assert len(shared) > 5
    assert all(found[0][doc] == found[1][doc] for doc in shared)


def test_k_by_source_and_document(tmp_path: Path, corpus: Path) -> None:
    """k set by a field of the text's own file, through `prepare`."""
    words = [f"{start}{end}" for start in ("to", "an", "quick ") for end in ("il", "other", "ly", "", "e")]
    rng = np.random.default_rng(1)
    by_document = [[-1, 0, 2, 7][number % 4] for number in range(24)]
    records = [{"text": " ".join(rng.choice(words, 30)), **({} if k == -1 else {"k": k})} for k in by_document]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    folder = tmp_path / "made"
    model = corpus / "tokenizer.model"
    prepare([tmp_path / "texts.jsonl"], folder, model, goldfish_k_key="k", valid_fraction=0, workers=1, progress=False)
    made = Corpus(folder)
    tokenizer = made.open_tokenizer()
    docs = [made.data.document(number).tolist() for number in range(made.num_documents)]
    cases: list[tuple[int | None, Any]] = [(3, "default"), (None, "default"), (3, None), (3, 5), (None, 5)]
    for run_k, source_k in cases:
        fallback = run_k if source_k == "default" else source_k
        mask = GoldfishMask(GoldfishConfig(k=run_k, h=4), tokenizer)
        stream = SampleStream([SourceSpec(made, k=source_k)], 50, 0, mask.halo)
        expected = [
            drop and place < len(doc) - 1
            for doc, own in zip(docs, by_document, strict=True)
            for place, drop in enumerate(document_mask(doc, fallback if own == -1 else own, 4))
        ]
        fates = drops_by_place(stream, mask, stream.unique_samples // 4 * 4, 4)
        assert fates == {place: {expected[place]} for place in fates}
        assert any(True in fate for fate in fates.values())


def test_sources_with_and_without_their_own_k_in_one_batch(tmp_path: Path) -> None:
    docs = make_documents()
    corpus = make_corpus(tmp_path / "corpus", docs)
    mask = GoldfishMask(GoldfishConfig(k=2, h=3))
    sources = [SourceSpec(corpus), SourceSpec(corpus, k=None), SourceSpec(corpus, k=9)]
    stream = SampleStream(sources, 60, 0, mask.halo)
    expected = [[drop for doc in docs for drop in document_mask(doc, k, 3)] for k in (2, None, 9)]
    (batch,) = Loader(stream, mask, 12, 12).step(0).micro_batches
    places = stream.locate(0, 12)
    assert set(places.source.tolist()) == {0, 1, 2}
    for row in range(12):
        for column in range(60):
            place = (int(places.start[row]) + 1 + column) % corpus.num_tokens
            supervised = batch.targets[row, column] != IGNORE
            assert bool(batch.drop[row, column]) == bool(supervised and expected[places.source[row]][place])


@pytest.mark.parametrize("bad", [1, -2])
def test_document_k_out_of_range(tmp_path: Path, bad: int) -> None:
    mask = GoldfishMask(GoldfishConfig(h=4))
    sample = SampleStream([SourceSpec(make_corpus(tmp_path / "corpus", make_documents()))], 16, 0, mask.halo).read(0)
    k = np.full(len(sample.tokens), 4, dtype=np.int32)
    k[9] = bad
    wrong = replace(sample, k=k)
    with pytest.raises(InputError, match=f"source 0: a document has k={bad}"):
        mask([sample, wrong])


def test_static_counts_from_the_start_of_the_document(tmp_path: Path) -> None:
    docs = make_documents()
    corpus = make_corpus(tmp_path / "corpus", docs)
    mask = GoldfishMask(GoldfishConfig(k=4, scheme="static"))
    assert mask.halo == 0
    expected = [position % 4 == 3 for doc in docs for position in range(len(doc))]
    for length in (9, 32):
        fates = drops_by_place(SampleStream([SourceSpec(corpus)], length, 0), mask, 40, 2)
        assert fates == {place: {expected[place]} for place in fates}


def test_random_is_drawn_for_each_sample(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", make_documents(120))
    stream = SampleStream([SourceSpec(corpus)], 64, 0, halo=2)

    def drops(config: GoldfishConfig, micro: int) -> npt.NDArray[np.bool_]:
        loader = Loader(stream, GoldfishMask(config), micro, 24)
        return np.concatenate([batch.drop.numpy() for n in (0, 24, 48) for batch in loader.step(n).micro_batches])

    config = GoldfishConfig(k=4, scheme="random")
    whole = drops(config, 24)
    np.testing.assert_array_equal(whole, drops(config, 3))
    assert not np.array_equal(whole, drops(GoldfishConfig(k=4, scheme="random", seed=1), 24))
    assert len({row.tobytes() for row in whole}) == len(whole), "two samples have the same draw"
    # 72 x 64 draws: four standard deviations of the rate are 0.026 (targets that start a document are never dropped).
    assert abs(whole.mean() - 0.25) < 0.03


def test_table_takes_rows_of_targets(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", make_documents())
    mask = GoldfishMask(GoldfishConfig(k=3, h=4, scheme="table"))
    for halo in (0, 5):
        stream = SampleStream([SourceSpec(corpus)], 32, 0, halo)
        samples = [stream.read(number) for number in range(3)]
        rows = np.stack([sample.tokens[halo + 1 :] for sample in samples])
        expected = goldfish_drop(rows, k=3, h=4, scheme="table")
        np.testing.assert_array_equal(mask(samples), expected)
        assert not expected[:, :3].any()
        assert expected.any()
    own = [SampleStream([SourceSpec(corpus, k=k)], 32, 0).read(0) for k in (2, None)]
    by_k = goldfish_drop(own[0].tokens[1:], k=2, h=4, scheme="table")
    np.testing.assert_array_equal(mask(own), [by_k, np.zeros(32, dtype=bool)])


def test_table_exempts_no_special_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Bit for bit as published: there a special token is dropped like any other."""
    rng = np.random.default_rng(5)
    docs = [[*np.where(rng.random(60) < 0.5, 0, rng.integers(1, 200, 60)).tolist(), 0] for _ in range(20)]
    corpus = make_corpus(tmp_path / "corpus", docs)
    mask = GoldfishMask(GoldfishConfig(k=2, h=2, scheme="table"), tokenizer)
    assert mask.describe()["exempt"] == []
    samples = [SampleStream([SourceSpec(corpus)], 48, seed, 0).read(0) for seed in range(4)]
    targets = np.stack([sample.tokens[1:] for sample in samples])
    drop = mask(samples)
    np.testing.assert_array_equal(drop, goldfish_drop(targets, k=2, h=2, scheme="table"))
    assert drop[targets == 0].any()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer whose last ids are words that differ in case and leading space."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["ab", "Ab", "AB", "\u0120ab", "cd", "\u0120CD"]
    vocabulary = {piece: number for number, piece in enumerate(["<|endoftext|>", *alphabet, *words])}
    model = tokenizers.models.BPE(vocabulary, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(path)


def test_special_tokens_are_kept_and_still_count_as_context(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {0}
    rng = np.random.default_rng(5)
    docs = [[*np.where(rng.random(60) < 0.3, 0, rng.integers(1, 200, 60)).tolist(), 0] for _ in range(20)]
    corpus = make_corpus(tmp_path / "corpus", docs)
    mask = GoldfishMask(GoldfishConfig(k=2, h=3), tokenizer)
    expected = [drop and token != 0 for doc in docs for token, drop in zip(doc, document_mask(doc, 2, 3), strict=True)]
    fates = drops_by_place(SampleStream([SourceSpec(corpus)], 48, 0, mask.halo), mask, 48, 4)
    assert fates == {place: {expected[place]} for place in fates}
    assert any(True in fate for fate in fates.values())


def test_casefold_gives_near_duplicates_one_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(6)
    first = tokenizer.vocab_size - 6
    groups = [[first, first + 1, first + 2, first + 3], [first + 4, first + 5]]
    letters = [int(rng.integers(0, 2)) for _ in range(80)]
    docs = [[int(rng.choice(groups[letter])) for letter in letters] for _ in range(12)]
    assert len({tuple(doc) for doc in docs}) == 12
    corpus = make_corpus(tmp_path / "corpus", docs)

    def rows(canonical: Any) -> set[bytes]:
        mask = GoldfishMask(GoldfishConfig(k=2, h=5, canonical=canonical), tokenizer)
        stream = SampleStream([SourceSpec(corpus)], 40, 0, mask.halo)
        fates = drops_by_place(stream, mask, stream.unique_samples // 2 * 8, 2)
        by_document = [[fates.get(80 * doc + i) == {True} for i in range(80)] for doc in range(12)]
        return {bytes(row) for row in by_document}

    assert len(rows("casefold")) == 1
    assert len(rows(None)) == 12
    canonical = [[groups[letter][0] for letter in letters]]
    assert rows("casefold") == {bytes(document_mask(canonical[0], 2, 5))}


def test_casefold_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="needs a tokenizer"):
        GoldfishMask(GoldfishConfig(canonical="casefold"))


def test_describe_tells_masks_apart(tokenizer: Tokenizer) -> None:
    base = GoldfishMask(GoldfishConfig(), tokenizer).describe()
    assert base["scheme"] == "goldfish-v1"
    assert (base["k"], base["h"], base["min_context"], base["exempt"]) == (4, 13, 13, [0])
    assert json.loads(json.dumps(base)) == base
    # The default and the same value written out are one mask.
    assert GoldfishMask(GoldfishConfig(min_context=13), tokenizer).describe() == base
    others = [
        GoldfishMask(config, tokenizer).describe()
        for config in (
            GoldfishConfig(k=3),
            GoldfishConfig(k=None),
            GoldfishConfig(h=12),
            GoldfishConfig(seed=1),
            GoldfishConfig(window="inclusive"),
            GoldfishConfig(min_context=0),
            GoldfishConfig(canonical="casefold"),
            GoldfishConfig(scheme="table"),
            GoldfishConfig(scheme="static"),
            GoldfishConfig(scheme="random"),
        )
    ] + [GoldfishMask(GoldfishConfig()).describe()]
    texts = [json.dumps(other, sort_keys=True) for other in [base, *others]]
    assert len(set(texts)) == len(texts)
