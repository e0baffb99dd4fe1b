"""A tokenizer's files as transformers reads them: tokenizer.json and tokenizer_config.json.

A sentencepiece model is rewritten for the `tokenizers` library. Pieces keep real spaces, which nothing has to replace:
so U+2581, which sentencepiece writes for a space, stays apart from it. Before the result is written it is compared with
the model on every piece and on thousands of made-up texts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafish.data.tokenizer import Tokenizer, tokenizer_file
from megafish.errors import InputError
from megafish.run import read_json

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
ORIGINAL = "megafish_tokenizer"
"""Key of tokenizer_config.json that names the file from which the others were made. transformers passes over it."""
_SPACE = "\u2581"
_TRIALS = 2000
_NEVER = -1000.0
"""Log-probability of what is no piece of text, below that of any spelling in pieces."""


@dataclass(frozen=True)
class Comparison:
    """How a tokenizer.json compares with the tokenizer it was made from."""

    problem: str | None
    """The first text that it reads in another way; None where there was none."""
    ties: int = 0
    """Texts that it cuts in another way which is just as likely (unigram): the sums of two ways differ by rounding."""
    tried: int = 0

    @property
    def note(self) -> str | None:
        """What the user has to know."""
        if self.problem is not None:
            return f"no tokenizer.json: it would read {self.problem!r} in another way; tokenizer.model is there instead"
        if self.ties:
            return (
                f"tokenizer.json cuts {self.ties} of {self.tried:,} made-up texts in another, equally likely way than "
                "tokenizer.model (unigram rounds its sums)"
            )
        return None


def original_tokenizer(folder: Path) -> Path:
    """The tokenizer's file in a folder: of an export the one that the model was trained with, byte for byte, so that
    corpora prepared with it go on to fit; else the one that transformers takes."""
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get(ORIGINAL) if settings.is_file() else None
    if named in (TOKENIZER_JSON, TOKENIZER_MODEL) and (folder / named).is_file():
        return folder / str(named)
    return tokenizer_file(folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> Comparison:
    """Write the tokenizer into a folder: tokenizer.json unless it would be another one, and tokenizer.model besides
    where the tokenizer is one. max_positions: the length [tokens] above which transformers warns."""
    data = tokenizer.path.read_bytes()
    compared = Comparison(None)
    original = TOKENIZER_JSON if data.lstrip()[:1] == b"{" else TOKENIZER_MODEL
    if original == TOKENIZER_JSON:
        (folder / TOKENIZER_JSON).write_bytes(data)
    else:
        (folder / TOKENIZER_MODEL).write_bytes(data)
        text = fast_tokenizer(data)
        compared = compare(tokenizer, text)
        if compared.problem is None:
            (folder / TOKENIZER_JSON).write_text(text, encoding="utf-8")
    names = {"eos_token": tokenizer.token_name(tokenizer.eos_id)}
    if tokenizer.bos_id is not None:
        names["bos_token"] = tokenizer.token_name(tokenizer.bos_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        # The text "</s>" is five characters, as it was in training.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        ORIGINAL: original,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return compared


def fast_tokenizer(model: bytes) -> str:
    """tokenizer.json of a sentencepiece model (BPE or unigram, byte fallback)."""
    import sentencepiece

    source = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = source.get_piece_size()
    texts = [source.id_to_piece(token).replace(_SPACE, " ") for token in range(count)]
    plain = [not (source.is_control(t) or source.is_unknown(t) or source.is_byte(t)) for t in range(count)]
    scores = [source.get_score(token) for token in range(count)]
    bpe = all(score.is_integer() for score, usual in zip(scores, plain, strict=True) if usual)
    special = [
        {
            "id": token,
            "content": source.id_to_piece(token),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in range(count)
        if source.is_control(token) or source.is_unknown(token)
    ]
    unknown = source.unk_id()
    if bpe:
        layout: dict[str, Any] = {
            "type": "BPE",
            "dropout": None,
            "unk_token": texts[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": _merges(texts, scores, plain),
        }
    else:
        layout = {
            "type": "Unigram",
            "unk_id": unknown,
            # `tokenizers` looks for all entries in the text, sentencepiece for none of "<0x41>" and "</s>".
            "vocab": [
                [text, score if usual else _NEVER] for text, score, usual in zip(texts, scores, plain, strict=True)
            ],
            "byte_fallback": True,
        }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": layout,
        },
        ensure_ascii=False,
    )


def _merges(texts: list[str], scores: list[float], plain: list[bool]) -> list[list[str]]:
    """All pairs of pieces that make a piece, in the order in which sentencepiece prefers the results.

    sentencepiece joins any two neighbours whose text is a piece, the best score first. Pairs of one result stand
    together, the longest left part first: from the left, a run of one character is joined that way.
    """
    known = {text for text, usual in zip(texts, plain, strict=True) if usual}
    order = sorted((token for token, usual in enumerate(plain) if usual), key=lambda token: -scores[token])
    return [
        [text[:cut], text[cut:]]
        for text in (texts[token] for token in order)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    ]


def compare(tokenizer: Tokenizer, text: str, seed: int = 0, count: int = _TRIALS) -> Comparison:
    """The ids that a tokenizer.json gives beside those of the tokenizer, on `samples`."""
    import tokenizers

    fast = tokenizers.Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    layout = json.loads(text)["model"]
    scores = [score for _, score in layout["vocab"]] if layout["type"] == "Unigram" else None
    ties = 0
    tried = samples(tokenizer, seed, count)
    for sample in tried:
        got, want = fast.encode(sample, add_special_tokens=False).ids, tokenizer.encode(sample)
        if got == want:
            continue
        if scores is None or not _tied(scores, got, want):
            return Comparison(sample[:40], ties, len(tried))
        ties += 1
    return Comparison(None, ties, len(tried))


def _tied(scores: list[float], got: list[int], want: list[int]) -> bool:
    """Whether two ways to cut a text are as likely, as far as fp32 can tell."""
    sums = [sum(scores[token] for token in ids) for ids in (got, want)]
    return abs(sums[0] - sums[1]) <= 1e-6 * abs(sums[1])


def samples(tokenizer: Tokenizer, seed: int, count: int = _TRIALS) -> list[str]:
    """Texts to compare tokenizers on: every piece by itself, then `count` made-up ones."""
    draw = random.Random(seed)
    pieces = [tokenizer.piece(token).decode("utf-8", "ignore") for token in range(tokenizer.vocab_size)]
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        raise InputError(f"{tokenizer.path}: no piece stands for any text")
    found = list(pieces)
    for _ in range(count):
        mixed = [
            draw.choice(pieces) if draw.random() < 0.7 else _characters(draw, draw.randint(1, 4))
            for _ in range(draw.randint(1, 24))
        ]
        found.append("".join(mixed))
    return found


def _characters(draw: random.Random, count: int) -> str:
    """Random characters: of ASCII, of the first plane or of all planes; never half of a surrogate pair."""
    last = draw.choice((0x7F, 0x7F, 0x2FFF, 0x10FFFF))
    codes = [draw.randint(0, last) for _ in range(count)]
    if draw.random() < 0.3:
        codes = codes[:1] * count  # runs of one character are what merges go about in different ways
    return "".join(chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF)
