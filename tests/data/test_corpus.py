"""Corpora, windows of their streams, and the sample streams over them."""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megafish.config import DataConfig
from megafish.data.corpus import Corpus, SampleStream, SourceSpec, open_train, open_valid, run_tokenizer
from megafish.data.indexed import IndexedWriter
from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError

EOS = 0


def documents(count: int, seed: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, 100, int(rng.integers(0, longest))).tolist(), EOS] for _ in range(count)]


def write_pair(prefix: Path, docs: list[list[int]], dtype: str = "uint16") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for doc in docs:
            writer.append(doc)


def write_folder(
    folder: Path, train: list[list[int]], valid: list[list[int]] | None = None, k: list[int] | None = None
) -> Path:
    """A corpus folder, written by hand as the format says."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"model")
    splits = {}
    for name, docs in [("train", train), ("valid", valid)]:
        if docs is None:
            continue
        write_pair(folder / name, docs)
        if name == "train" and k is not None:
            np.save(folder / "train.k.npy", np.array(k, dtype=np.int32))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(folder.glob(f"{name}.*"))
        }
        tokens = sum(len(doc) for doc in docs)
        splits[name] = {"tokens": tokens, "documents": len(docs), "bytes": 3 * tokens, "files": files}
    tokenizer = {"file": "tokenizer.model", "sha256": "ab" * 32, "vocab_size": 100, "eos_id": EOS}
    manifest = {"format": "megafish-corpus", "version": 1, "splits": splits, "tokenizer": tokenizer}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def flat(docs: list[list[int]]) -> list[tuple[int, int, int]]:
    """(token, document, position) of the whole stream."""
    return [(token, number, position) for number, doc in enumerate(docs) for position, token in enumerate(doc)]


@pytest.mark.parametrize("with_k", [False, True])
def test_windows_against_the_documents(tmp_path: Path, with_k: bool) -> None:
    docs = documents(12, seed=1)
    ks = [[0, -1, 2, 5][number % 4] for number in range(len(docs))]
    corpus = Corpus(write_folder(tmp_path / "c", docs, k=ks if with_k else None))
    stream = flat(docs)
    for start in range(-20, len(stream)):
        for length in (1, 2, 17, len(stream), 2 * len(stream) + 3):
            window = corpus.window(start, length)
            expected = [stream[(start + i) % len(stream)] for i in range(length)]
            assert window.tokens.tolist() == [token for token, _, _ in expected]
            assert window.positions.tolist() == [position for _, _, position in expected]
            assert window.document_starts.tolist() == [position == 0 for _, _, position in expected]
            assert (window.k is not None) == with_k
            if window.k is not None:
                assert window.k.tolist() == [ks[number] for _, number, _ in expected]
    assert (window.tokens.dtype, window.document_starts.dtype, window.positions.dtype) == (np.int64, np.bool_, np.int64)


def test_samples_are_windows_with_a_halo(tmp_path: Path) -> None:
    docs = documents(40, seed=2)
    write_pair(tmp_path / "pair", docs)
    corpus = Corpus(tmp_path / "pair")
    plain, wide = (SampleStream([SourceSpec(corpus)], 16, seed=5, halo=halo) for halo in (0, 9))
    stream = flat(docs)
    for number in range(3 * plain.unique_samples):
        sample, start = wide.read(number), int(wide.locate(number, 1).start[0])
        expected = [stream[(start - 9 + i) % len(stream)] for i in range(9 + 17)]
        assert sample.tokens.tolist() == [token for token, _, _ in expected]
        assert sample.positions.tolist() == [position for _, _, position in expected]
        assert (sample.number, sample.source, sample.halo, sample.k) == (number, 0, 9, None)
        # The halo changes nothing of what is trained on.
        np.testing.assert_array_equal(plain.read(number).tokens, sample.tokens[9:])


def test_k_of_document_before_source_before_run(tmp_path: Path) -> None:
    docs = [[1, 2, 3, EOS], [4, 5, 6, EOS], [7, 8, 9, EOS]]
    own = Corpus(write_folder(tmp_path / "own", docs, k=[0, -1, 7]))
    bare = Corpus(write_folder(tmp_path / "bare", docs))
    cases: list[tuple[Corpus, Any, list[int]]] = [
        (own, "default", [0, -1, 7]),
        (own, 5, [0, 5, 7]),
        (own, None, [0, 0, 7]),
        (bare, 5, [5, 5, 5]),
        (bare, None, [0, 0, 0]),
    ]
    for corpus, source_k, expected in cases:
        sample = SampleStream([SourceSpec(corpus, k=source_k)], 11, seed=0).read(0)
        assert sample.k is not None
        by_document = {int(token): int(k) for token, k in zip(sample.tokens, sample.k, strict=True) if token != EOS}
        assert by_document == {token: expected[(token - 1) // 3] for token in by_document}
    assert SampleStream([SourceSpec(bare)], 11, seed=0).read(0).k is None


def test_blend_takes_samples_from_the_right_source(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[1] * 50, [1] * 70])
    write_pair(tmp_path / "b", [[2] * 90])
    sources = [SourceSpec(Corpus(tmp_path / "a"), 3.0), SourceSpec(Corpus(tmp_path / "b"), 1.0)]
    stream = SampleStream(sources, 8, seed=0)
    samples = [stream.read(number) for number in range(400)]
    assert [sample.source for sample in samples].count(1) == 100
    assert all(set(sample.tokens.tolist()) == {sample.source + 1} for sample in samples)


def test_corpus_shorter_than_a_sample(tmp_path: Path) -> None:
    write_pair(tmp_path / "short", [[1] * 9])
    corpus = Corpus(tmp_path / "short")
    assert SampleStream([SourceSpec(corpus)], 8, seed=0).read(0).tokens.tolist() == [1] * 9
    with pytest.raises(InputError, match=r"short\.bin: 9 tokens, one sample takes 10"):
        SampleStream([SourceSpec(corpus)], 9, seed=0)
    with pytest.raises(InputError, match="no sources"):
        SampleStream([], 8, seed=0)


def test_id_outside_the_vocabulary(tmp_path: Path) -> None:
    docs = [[1, 2, EOS], [3, 4, 5, 100, 6, EOS], [7, EOS]]
    corpus = Corpus(write_folder(tmp_path / "c", docs))
    corpus.window(0, 6)
    with pytest.raises(InputError, match=r"train\.bin: byte 12: document 1, token 3: id 100 .* vocabulary of 100"):
        corpus.window(8, 11)
    write_pair(tmp_path / "signed", [[1, 2]], "int32")
    (tmp_path / "signed.bin").write_bytes(np.array([1, -2], dtype="<i4").tobytes())
    pair = Corpus(tmp_path / "signed")
    pair.check_tokenizer(SimpleNamespace(vocab_size=10, sha256="", path=Path("x")))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"byte 4: document 0, token 1: id -2"):
        pair.window(0, 2)


def test_sizes_against_the_manifest(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", documents(5, 0), documents(2, 1))
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-2])
    with pytest.raises(
        InputError, match=rf"train\.bin: {len(content) - 2} bytes.*truncated at byte {len(content) - 2}"
    ):
        Corpus(folder)
    (folder / "train.bin").write_bytes(content + b"\0\0")
    with pytest.raises(InputError, match=r"train\.bin: .*not the file that was written"):
        Corpus(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(InputError, match=r"train\.bin: no such file, but the manifest names it"):
        Corpus(folder)
    assert Corpus(folder, "valid").num_documents == 2


def test_counts_against_the_manifest(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", documents(5, 0))
    splits = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["splits"]
    splits["train"]["documents"] = 6
    edit_manifest(folder, splits=splits)
    with pytest.raises(InputError, match=r"in 5 documents, the manifest says .* in 6"):
        Corpus(folder)


def test_k_file_of_another_corpus(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", documents(5, 0), k=[2, 3, 4, 5])
    with pytest.raises(InputError, match=r"train\.k\.npy: int32 \(4,\), expected int32 \(5,\)"):
        Corpus(folder)


def test_verify_reads_the_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", documents(5, 0))
    corpus = Corpus(folder)
    corpus.verify()
    content = bytearray((folder / "train.bin").read_bytes())
    content[0] ^= 1
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"train\.bin: sha256 is "):
        Corpus(folder).verify()


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (None, "a folder without manifest.json"),
        ("{", "not valid JSON"),
        ("[]", "not the manifest of a corpus"),
        ('{"format": "other"}', "not the manifest of a corpus"),
        ('{"format": "megafish-corpus", "version": 2}', "version 2"),
        ('{"format": "megafish-corpus", "version": 1, "splits": {}}', "no tokenizer"),
    ],
)
def test_bad_manifest(tmp_path: Path, text: str | None, phrase: str) -> None:
    folder = write_folder(tmp_path / "c", documents(2, 0))
    if text is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=phrase):
        Corpus(folder)


@pytest.mark.parametrize(
    ("where", "key"),
    [
        (("tokenizer",), "eos_id"),
        (("tokenizer",), "vocab_size"),
        (("splits", "train"), "files"),
        (("splits", "train"), "tokens"),
        (("splits", "train", "files", "train.bin"), "sha256"),
    ],
)
def test_a_manifest_that_lacks_a_key(tmp_path: Path, where: tuple[str, ...], key: str) -> None:
    folder = write_folder(tmp_path / "c", documents(2, 0))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest
    for name in where:
        entry = entry[name]
    for text in ("is missing", "is None"):
        entry.pop(key)
        if text == "is None":
            entry[key] = None
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(InputError, match=rf"manifest\.json: {'.'.join(where)}\.{key} {text}: damaged"):
            Corpus(folder)
        entry[key] = None


def test_no_such_corpus_and_no_such_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder written by `megafish prepare` nor the prefix"):
        Corpus(tmp_path / "nothing")
    with pytest.raises(InputError, match="no split 'valid', only train"):
        Corpus(write_folder(tmp_path / "c", documents(2, 0)), "valid")


def test_another_tokenizer(tmp_path: Path) -> None:
    corpus = Corpus(write_folder(tmp_path / "c", documents(2, 0)))
    right = SimpleNamespace(sha256="ab" * 32, vocab_size=100, eos_id=EOS, path=Path("right.model"))
    wrong = SimpleNamespace(sha256="cd" * 32, vocab_size=100, eos_id=EOS, path=Path("wrong.model"))
    other_end = SimpleNamespace(sha256="ab" * 32, vocab_size=100, eos_id=EOS + 1, path=Path("right.model"))
    corpus.check_tokenizer(right)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"wrong\.model: not the tokenizer of .*cdcd.*abab"):
        corpus.check_tokenizer(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"right\.model: ends documents with id {EOS + 1}, .* end with {EOS}"):
        corpus.check_tokenizer(other_end)  # type: ignore[arg-type]


def test_a_prepared_corpus(corpus: Path) -> None:
    """What `prepare` writes is what is read here: manifest, files, tokenizer, documents, canaries."""
    train, valid = Corpus(corpus), Corpus(corpus, "valid")
    tokenizer = train.open_tokenizer()
    assert tokenizer is not None
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = {
        path.read_bytes().decode("utf-8")
        for name in ("json", "email", "logging")
        for path in (library / name).rglob("*.py")
    }
    canaries = [json.loads(line) for line in (corpus / "canaries.jsonl").read_text(encoding="utf-8").splitlines()]
    copies = {tuple(canary["tokens"]): 0 for canary in canaries}
    found = set()
    for opened in (train, valid):
        opened.verify()
        opened.check_tokenizer(tokenizer)
        window = opened.window(0, opened.num_tokens)
        for part in np.split(window.tokens, np.flatnonzero(window.document_starts)[1:]):
            assert part[-1] == tokenizer.eos_id
            if tuple(part[:-1].tolist()) in copies:
                copies[tuple(part[:-1].tolist())] += 1
            else:
                found.add(tokenizer.decode(part[:-1].tolist()))
    assert found <= texts
    assert len(found) > 20
    assert sorted(copies.values()) == sorted(canary["exposures"] for canary in canaries)
    assert train.text_bytes is not None
    assert train.text_bytes == tokenizer.token_bytes[train.window(0, train.num_tokens).tokens].sum()
    stream = SampleStream([SourceSpec(train)], 64, seed=0, halo=13)
    assert len(stream.read(5).tokens) == 78


def test_a_tokenizer_with_another_end_of_document(tmp_path: Path, corpus: Path) -> None:
    """The end-of-document token is the corpus's choice, not the tokenizer's."""
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    tokenizer = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
    edit_manifest(copy, tokenizer=tokenizer | {"eos_id": tokenizer["eos_id"] + 7})
    reopened = Corpus(copy).open_tokenizer()
    assert reopened is not None
    assert reopened.eos_id == tokenizer["eos_id"] + 7
    write_pair(tmp_path / "pair", documents(3, 0))
    assert Corpus(tmp_path / "pair").open_tokenizer() is None
    # So it is where the same file is named as the run's tokenizer; a damaged manifest does not stand in the way.
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    train = [{"path": str(tmp_path / name)} for name in ("pair", "damaged", "copy")]
    file = str(copy / tokenizer["file"])
    run = run_tokenizer(DataConfig.model_validate({"train": train, "tokenizer": file}))
    assert run.eos_id == tokenizer["eos_id"] + 7
    Corpus(copy).check_tokenizer(run)
    alone = run_tokenizer(DataConfig.model_validate({"train": train[:1], "tokenizer": file}))
    assert alone.eos_id == load_tokenizer(file).eos_id


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    docs = documents(5, 0)
    base = Corpus(write_folder(tmp_path / "a", docs)).fingerprint()
    assert Corpus(write_folder(tmp_path / "moved", docs)).fingerprint() == base
    assert Corpus(write_folder(tmp_path / "other", documents(5, 1))).fingerprint() != base
    assert Corpus(write_folder(tmp_path / "k", docs, k=[2] * 5)).fingerprint() != base
    for name, pair in [("x", docs), ("y", docs), ("z", documents(5, 1))]:
        write_pair(tmp_path / name, pair)
    x, y, z = (Corpus(tmp_path / name).fingerprint() for name in "xyz")
    assert x == y != z
    assert json.loads(json.dumps(base)) == base


def test_describe_names_all_that_decides(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", documents(50, 0))
    write_pair(tmp_path / "b", documents(50, 1))
    a, b = Corpus(tmp_path / "a"), Corpus(tmp_path / "b")

    def describe(sources: list[SourceSpec], length: int = 16, seed: int = 0, halo: int = 0) -> str:
        return json.dumps(SampleStream(sources, length, seed, halo).describe(), sort_keys=True)

    base = describe([SourceSpec(a), SourceSpec(b)])
    assert describe([SourceSpec(a, 2.0), SourceSpec(b, 2.0)], halo=13) == base
    changed = [
        describe([SourceSpec(a), SourceSpec(b)], length=17),
        describe([SourceSpec(a), SourceSpec(b)], seed=1),
        describe([SourceSpec(b), SourceSpec(a)]),
        describe([SourceSpec(a, 2.0), SourceSpec(b)]),
        describe([SourceSpec(a, k=3), SourceSpec(b)]),
        describe([SourceSpec(a, k=None), SourceSpec(b)]),
        describe([SourceSpec(a)]),
    ]
    assert len({base, *changed}) == 1 + len(changed)


def test_open_from_the_configuration(tmp_path: Path) -> None:
    both = write_folder(tmp_path / "both", documents(5, 0), documents(3, 1))
    bare = tmp_path / "pair"
    write_pair(bare, documents(4, 2))
    empty = write_folder(tmp_path / "empty", documents(2, 3), [])
    train = [
        {"path": str(both), "weight": 2.0, "goldfish_k": None},
        {"path": str(bare), "goldfish_k": 9},
        {"path": str(empty)},
    ]
    config = DataConfig.model_validate({"train": train, "sequence_length": 8})
    opened = open_train(config)
    assert [(s.corpus.num_documents, s.weight, s.k) for s in opened] == [
        (5, 2.0, None),
        (4, 1.0, 9),
        (2, 1.0, "default"),
    ]
    assert opened[0].corpus.tokenizer_path == both / "tokenizer.model"
    assert opened[1].corpus.tokenizer_path is None
    assert opened[0].corpus.text_bytes == 3 * opened[0].corpus.num_tokens
    # Validation splits of the training corpora, where there is text in them.
    assert [source.corpus.num_documents for source in open_valid(config)] == [3]
    named = DataConfig.model_validate({"train": train, "valid": [str(bare), str(both)], "sequence_length": 8})
    assert [source.corpus.num_documents for source in open_valid(named)] == [4, 3]
    # Those shorter than a sample are passed over, unless they were named.
    tokens = sum(source.corpus.num_tokens for source in open_valid(config))
    for length, found in ((tokens - 1, 1), (tokens, 0)):
        assert len(open_valid(config.model_copy(update={"sequence_length": length}))) == found
    with pytest.raises(InputError, match=r"data\.valid: .*valid\.bin has .* validation.*--valid-fraction"):
        open_valid(DataConfig.model_validate({"train": train, "valid": [str(both)], "sequence_length": tokens}))
    with pytest.raises(InputError, match=r"data\.train is empty"):
        open_train(DataConfig())
