"""The exported tokenizer gives the ids of the sentencepiece model, in `tokenizers` and in transformers."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers

from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import load_tokenizer, train_tokenizer
from megafish.huggingface.tokenizer import compare, fast_tokenizer, samples, write_tokenizer

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
AWKWARD = [
    "",
    " ",
    "   a",
    "a\n\n\tb  ",
    "</s>",
    "<s> <unk> <0x41>",
    "\u2581 a\u2581\u2581b",
    "\0",
    "a\u0300\u00e0",
    "😀👍🏽",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    inputs = [LIBRARY / name for name in ("json", "email", "logging")]
    options = ReadOptions(text_suffixes=(".py",))
    train_tokenizer(inputs, path, 2000, request.param, options=options, progress=False)
    return path


def test_ids_are_those_of_the_model(model: Path) -> None:
    """BPE: on all texts. Unigram: but for texts that can be cut in two ways whose likelihoods fp32 tells apart by its
    roundings alone; `tokenizers` adds in float64."""
    slow = load_tokenizer(model)
    text = fast_tokenizer(model.read_bytes())
    compared = compare(slow, text, seed=11, count=10_000)
    assert compared.problem is None and compared.tried > 10_000
    bpe = '"type": "BPE"' in text
    assert compared.ties == 0 if bpe else compared.ties < 20
    fast = tokenizers.Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    source = [path.read_text(encoding="utf-8") for path in sorted((LIBRARY / "asyncio").glob("*.py"))]
    assert len(source) > 20
    for document in [*source, *AWKWARD]:
        ids = slow.encode(document)
        assert fast.encode(document, add_special_tokens=False).ids == ids, document[:80]
        assert fast.decode(ids) == document


def test_transformers_reads_the_files(model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    slow = load_tokenizer(model)
    assert write_tokenizer(slow, tmp_path, 64).problem is None
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (fast.eos_token_id, fast.bos_token_id) == (slow.eos_id, slow.bos_id) and len(fast) == slow.vocab_size
    plain = tokenizers.Tokenizer.from_str(fast_tokenizer(model.read_bytes()))
    plain.encode_special_tokens = True
    for text in [*samples(slow, seed=3, count=200), *AWKWARD]:
        ids = fast(text).input_ids
        assert ids == plain.encode(text, add_special_tokens=False).ids, text[:80]
        assert fast.decode(ids) == text


def test_a_difference_is_found(model: Path) -> None:
    """Here of a tokenizer.json in which one piece is spelled in another way: it has no part in any text then."""
    slow = load_tokenizer(model)
    layout = json.loads(fast_tokenizer(model.read_bytes()))
    token = next(t for t in range(600, slow.vocab_size) if len(slow.piece(t)) > 4)
    piece = slow.piece(token).decode()
    vocab = layout["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab["\u2581unheard of"] = vocab.pop(piece)
        layout["model"]["merges"] = [pair for pair in layout["model"]["merges"] if piece not in ("".join(pair), *pair)]
    else:
        vocab[token][0] = "\u2581unheard of"
    compared = compare(slow, json.dumps(layout))
    assert compared.problem is not None and "it would read" in str(compared.note)
