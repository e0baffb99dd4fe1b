from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megafish.data import tokenizer as module
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import Tokenizer, casefold_table, load_tokenizer, special_lut, train_tokenizer
from megafish.errors import InputError

HARD = [
    "a\tb\n",
    "\r\n x\r\n",
    "   a   b  ",
    " ",
    " " * 300,
    "\n\n\n",
    "\N{GRINNING FACE} e\u0301 \u00e9 \ufb01 \u3000",
    "\0a\0",
    "\u2581a \u2581\u2581 b\u2581",
    "<s></s><unk><0x41><|endoftext|><pad>",
    "\u2585 \ufeff \uffff \ufffd \u2028 \x85 \x1c \U0010ffff",
]


@pytest.fixture(params=["bpe", "unigram", "byte_level"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HARD)
def test_every_text_survives(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert not set(ids) & any_tokenizer.special_ids
    assert any_tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_any_text_survives(bpe: Tokenizer, unigram: Tokenizer, byte_level: Tokenizer) -> None:
    pieces = st.sampled_from([*HARD, "def f(x):\n    return x", "A", "\u2581", " ", "\n"])

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.one_of(st.text(max_size=20), pieces), max_size=8).map("".join))
    def check(text: str) -> None:
        for tokenizer in (bpe, unigram, byte_level):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.token_bytes[ids].sum() == len(text.encode())
            assert not set(ids) & tokenizer.special_ids

    check()


def test_bpe_gives_the_library_s_own_ids_on_long_text(bpe: Tokenizer, source_folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(bpe.path))
    text = (source_folder / "inspect.py").read_text(encoding="utf-8")
    assert len(text) > 100_000  # many segments
    assert bpe.encode(text) == library.encode(text)
    spaces = "x" + " " * 20_000 + "y"  # no place to cut
    assert bpe.encode(spaces) == library.encode(spaces)


def test_text_without_spaces_is_cut_and_survives(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_SEGMENT", 5000)
    for text in ("abc" * 10_000, " " * 30_000, "x" * 9999 + " " + "\u2581" * 6000):
        assert bpe.decode(bpe.encode(text)) == text


def test_white_space_is_cheap(bpe: Tokenizer) -> None:
    assert len(bpe.encode("        ")) == 1
    assert bpe.piece(bpe.encode("):\n")[-1]).endswith(b":\n")


def test_batch_is_int32_and_equals_single(any_tokenizer: Tokenizer) -> None:
    batch = any_tokenizer.encode_batch(HARD)
    assert all(ids.dtype == np.int32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [any_tokenizer.encode(text) for text in HARD]


def test_special_tokens(bpe: Tokenizer, byte_level: Tokenizer) -> None:
    assert (bpe.bos_id, bpe.eos_id, bpe.special_ids) == (1, 2, {0, 1, 2})
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.special_ids) == (None, 1, {0, 1})
    for tokenizer in (bpe, byte_level):
        assert np.flatnonzero(special_lut(tokenizer)).tolist() == sorted(tokenizer.special_ids)
        assert tokenizer.decode([*tokenizer.special_ids, *tokenizer.encode("ab")]) == "ab"
        assert not tokenizer.token_bytes[sorted(tokenizer.special_ids)].any()


def test_end_of_document_can_be_named(byte_level_file: Path) -> None:
    assert load_tokenizer(byte_level_file, eos="<pad>").eos_id == 0
    assert load_tokenizer(byte_level_file, eos=7).eos_id == 7
    assert 7 in load_tokenizer(byte_level_file, eos=7).special_ids
    with pytest.raises(InputError, match="no end-of-document token '<none>'"):
        load_tokenizer(byte_level_file, eos="<none>")
    with pytest.raises(InputError, match="no token 400; ids run from 0 to 399"):
        load_tokenizer(byte_level_file, eos=400)


def test_no_end_of_document_token(byte_level_file: Path, tmp_path: Path) -> None:
    layout = json.loads(byte_level_file.read_text(encoding="utf-8"))
    layout["added_tokens"] = layout["added_tokens"][:1]
    vocabulary = layout["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("<|endoftext|>")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(InputError, match=r"no end-of-document token found.*--eos"):
        load_tokenizer(file)


def test_a_folder_stands_for_its_tokenizer(bpe_file: Path, tmp_path: Path) -> None:
    assert load_tokenizer(bpe_file.parent).path == bpe_file
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_unreadable_files(bpe_file: Path, byte_level_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "missing.model")
    damaged = {
        "empty.model": b"",
        "cut.model": bpe_file.read_bytes()[:-1000],
        "text.model": b"this is no tokenizer",
        "cut.json": byte_level_file.read_bytes()[:-100],
        "other.json": b'{"model": 3}',
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            load_tokenizer(tmp_path / name)


def test_casefold_table(bpe: Tokenizer, byte_level: Tokenizer) -> None:
    for tokenizer in (bpe, byte_level):
        table = casefold_table(tokenizer)
        assert table.dtype == np.int64 and table.shape == (tokenizer.vocab_size,)
        assert (table <= np.arange(tokenizer.vocab_size)).all()
        assert (table[table] == table).all()
        by_text = {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)}
        assert table[by_text[b" s"]] == table[by_text[b"s"]]
        assert table[by_text[b"T"]] == table[by_text[b"t"]]
        assert table[by_text[b"t"]] != table[by_text[b"a"]]
        assert len({table[token] for token in tokenizer.special_ids}) == len(tokenizer.special_ids)
        assert table[by_text[b"        "]] == by_text[b"        "]


def test_casefold_folds_compatibility_forms() -> None:
    class Words(Tokenizer):
        words = ("x", "\ufb01", " FI", "fi", "\u2460", "1", "\xe9", "e\u0301")
        vocab_size, special_ids = len(words), frozenset()

        def piece(self, token: int) -> bytes:
            return self.words[token].encode()

        def token_name(self, token: int) -> str:
            raise NotImplementedError

        def encode_batch(self, texts):  # type: ignore[no-untyped-def]
            raise NotImplementedError

        def decode(self, ids):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    assert casefold_table(Words()).tolist() == [0, 1, 1, 1, 4, 4, 6, 6]


def test_training_is_repeatable_and_bounded(source_folder: Path, tmp_path: Path) -> None:
    options = ReadOptions(text_suffixes=(".py",))
    hashes = [
        train_tokenizer(
            [source_folder], tmp_path / str(n), 400, options=options, sample_bytes=20_000, seed=seed, progress=False
        ).sha256
        for n, seed in enumerate([0, 0, 5])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_training_refuses(source_folder: Path, tmp_path: Path) -> None:
    options = ReadOptions(text_suffixes=(".py",))
    target = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match="vocab_size=10 is too small"):
        train_tokenizer([source_folder], target, 10, options=options)
    with pytest.raises(InputError, match=r"vocab_size=500000 does not fit the text: it has pieces for at most \d+;"):
        train_tokenizer([source_folder], target, 500_000, options=options, progress=False)
    with pytest.raises(InputError, match=r"vocab_size=300 does not fit the text: its characters alone take 3\d\d;"):
        train_tokenizer([source_folder], target, 300, options=options, progress=False)
    with pytest.raises(InputError, match="kind 'word': choose bpe or unigram"):
        train_tokenizer([source_folder], target, 320, "word")  # type: ignore[arg-type]
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    with pytest.raises(InputError, match="no document has any text"):
        train_tokenizer([empty], target, 320, progress=False)
    assert not target.exists()
    target.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"the file exists.*--overwrite"):
        train_tokenizer([source_folder], target, 320, options=options)
    assert target.read_bytes() == b"mine"


def test_training_takes_reserved_characters(tmp_path: Path) -> None:
    file = tmp_path / "odd.txt"
    file.write_text("one \0 two \u2581 three \u2585 four " * 200, encoding="utf-8")
    for kind in ("bpe", "unigram"):
        with pytest.raises(InputError, match="pieces for at most"):  # the text itself was taken
            train_tokenizer([file], tmp_path / "odd.model", 300, kind, progress=False)  # type: ignore[arg-type]
