"""Tokenizers behind one interface: sentencepiece models (trained here, lossless) and Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megafish.data.readers import ReadOptions, find_files, read_piece, split_file
from megafish.errors import InputError
from megafish.progress import track

EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")

_SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
_SPACE_BYTES = tuple(f"<0x{byte:02X}>" for byte in _SPACE.encode())
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Characters per call of sentencepiece. BPE keeps one heap for the text it is given: short segments keep it in the cache
# (1.2x faster at 4096), and a cut before a space changes no token. Unigram breaks ties by floating-point sums along the
# whole text, so it is cut only where memory would otherwise grow with the document.
_BPE_SEGMENT = 4096
_UNIGRAM_SEGMENT = 1 << 20
_LONGEST_SEGMENT = 2 << 20  # text without a space is cut here, whatever the tokens: still lossless

_TRAIN_PIECE = 1 << 20  # bytes of input drawn at one time
_TRAIN_BLOCK = 4096  # characters of a training "sentence": several lines, so that pieces with newlines are learned
_TRAIN_THREADS = 8  # fixed: the trainer's sums depend on it


class Tokenizer(ABC):
    """Text to ids and back. Text is never scanned for special tokens: "</s>" in a document is five ordinary characters.

    Attributes: `path`; `sha256` of the file; `vocab_size` (largest id + 1); `eos_id`; `bos_id` or None; `special_ids`
    (unknown, bos, eos, pad and every token marked special).
    """

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    special_ids: frozenset[int]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text, without bos or eos. Runs on the calling thread alone."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens stand for nothing."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes of text that an id stands for (empty for special tokens)."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """An id as the vocabulary spells it, special tokens too."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0].tolist()

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, int64 [vocab_size] (0 for special tokens). For bits per byte."""
        return np.array([len(self.piece(token)) for token in range(self.vocab_size)], dtype=np.int64)

    def _resolve_eos(self, ids: dict[str, int], native: int | None, eos: str | int | None) -> int:
        if isinstance(eos, int):
            if not 0 <= eos < self.vocab_size:
                raise InputError(f"{self.path}: there is no token {eos}; ids run from 0 to {self.vocab_size - 1}")
            return eos
        if eos is not None:
            if eos not in ids:
                raise InputError(f"{self.path}: the vocabulary has no end-of-document token {eos!r}")
            return ids[eos]
        if native is not None:
            return native
        for name in EOS_NAMES:
            if name in ids:
                return ids[name]
        raise InputError(
            f"{self.path}: no end-of-document token found (looked for {', '.join(EOS_NAMES)}); name one with --eos"
        )


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path, data: bytes, eos: str | int | None) -> None:
        import sentencepiece

        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._model.get_piece_size()
        except Exception as error:  # sentencepiece raises RuntimeError or OSError by version
            raise InputError(f"{path}: not a sentencepiece model, or damaged ({_first_line(error)})") from None
        if self.vocab_size == 0:
            raise InputError(f"{path}: not a sentencepiece model, or damaged (it has no pieces)")
        model = self._model
        pieces = [model.id_to_piece(token) for token in range(self.vocab_size)]
        ids = {piece: token for token, piece in enumerate(pieces)}
        self.eos_id = self._resolve_eos(ids, model.eos_id() if model.eos_id() >= 0 else None, eos)
        bos = [model.bos_id(), *(ids[name] for name in BOS_NAMES if name in ids)]
        self.bos_id = next((token for token in bos if token >= 0), None)
        marked = {t for t in range(self.vocab_size) if model.is_control(t) or model.is_unknown(t)}
        self.special_ids = frozenset(marked | {self.eos_id})

        # A model that puts a space before every text cannot be given segments of one.
        dummy_prefix = any(pieces[token].startswith(_SPACE) for token in model.encode("a"))
        normal = [t for t in range(self.vocab_size) if t not in marked and not model.is_byte(t)]
        spaces_lead = all(_SPACE not in pieces[t].lstrip(_SPACE) for t in normal)
        bpe = all(model.get_score(t).is_integer() for t in normal)  # ranks; unigram has log-probabilities
        self._segment = (_BPE_SEGMENT if bpe else _UNIGRAM_SEGMENT) if spaces_lead and not dummy_prefix else None
        bytes_known = all(piece in ids and model.is_byte(ids[piece]) for piece in _SPACE_BYTES)
        self._space_ids = (
            np.array([ids[piece] for piece in _SPACE_BYTES], dtype=np.int32)
            if bytes_known and not dummy_prefix
            else None
        )

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> npt.NDArray[np.int32]:
        if self._space_ids is not None and _SPACE in text:
            # sentencepiece cannot tell this character from a space: it travels as its three bytes.
            parts: list[npt.NDArray[np.int32]] = []
            for number, part in enumerate(text.split(_SPACE)):
                if number:
                    parts.append(self._space_ids)
                parts.append(self._encode(part))
            return np.concatenate(parts)
        if self._segment is None or len(text) <= self._segment:
            return self._model.encode(text, return_type="numpy")
        segments = list(_cut_before_space(text, self._segment))
        return np.concatenate(self._model.encode(segments, return_type="numpy", num_threads=1))

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in map(int, ids) if i not in self.special_ids])

    def piece(self, token: int) -> bytes:
        if token in self.special_ids:
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def token_name(self, token: int) -> str:
        return str(self._model.id_to_piece(token))


class _HuggingFace(Tokenizer):
    def __init__(self, path: Path, data: bytes, eos: str | int | None) -> None:
        import tokenizers

        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            layout: dict[str, Any] = json.loads(data)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a tokenizer.json, or damaged ({_first_line(error)})") from None
        self._model.encode_special_tokens = True
        self._model.no_padding()
        self._model.no_truncation()
        ids = self._model.get_vocab(with_added_tokens=True)
        if not ids:
            raise InputError(f"{path}: the vocabulary is empty")
        self.vocab_size = max(ids.values()) + 1
        self.eos_id = self._resolve_eos(ids, None, eos)
        self.bos_id = next((ids[name] for name in BOS_NAMES if name in ids), None)
        added = self._model.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special} | {self.eos_id}
        unknown = (layout.get("model") or {}).get("unk_token")
        if isinstance(unknown, str) and unknown in ids:
            special.add(ids[unknown])
        self.special_ids = frozenset(special)
        self._added = {token: entry.content for token, entry in added.items()}
        kinds = {stage.get("type") for stage in _stages(layout.get("decoder")) + _stages(layout.get("pre_tokenizer"))}
        self._byte_of = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._suffix_marker = "##" if (layout.get("model") or {}).get("type") == "WordPiece" else ""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        # One by one: encode_batch of the library starts a thread pool of its own.
        encode = self._model.encode
        return [np.array(encode(text, add_special_tokens=False).ids, dtype=np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in map(int, ids) if i not in self.special_ids], skip_special_tokens=False)

    def piece(self, token: int) -> bytes:
        if token in self.special_ids:
            return b""
        if token in self._added:
            return self._added[token].encode()
        piece = self._model.id_to_token(token)
        if piece is None:  # a hole in the vocabulary
            return b""
        if self._byte_of is not None:
            if all(char in self._byte_of for char in piece):
                return bytes(self._byte_of[char] for char in piece)
            return piece.encode()
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.removeprefix(self._suffix_marker).replace(_SPACE, " ").encode()

    def token_name(self, token: int) -> str:
        return self._model.id_to_token(token) or ""


def tokenizer_file(path: str | Path) -> Path:
    """The file that `load_tokenizer` reads. Raises InputError for a folder without one."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
    if not found:
        raise InputError(f"{path}: the folder holds neither tokenizer.json nor tokenizer.model")
    return found[0]


def load_tokenizer(path: str | Path, *, eos: str | int | None = None) -> Tokenizer:
    """Load a sentencepiece model or a `tokenizer.json`, or the one in a folder (`tokenizer.json` before `.model`).

    `eos`: the end-of-document token, by name or id; by default the model's own, else the first of `EOS_NAMES` that the
    vocabulary has. Raises InputError for a missing or damaged file and where there is no end-of-document token.
    """
    path = tokenizer_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
    if not data:
        raise InputError(f"{path}: the tokenizer file is empty")
    kind = _HuggingFace if data.lstrip()[:1] == b"{" else _SentencePiece
    return kind(path, data, eos)


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    *,
    options: ReadOptions | None = None,
    sample_bytes: int = 64 << 20,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Tokenizer:
    """Train a sentencepiece model on files and folders, write it to the file `output`, and load it.

    Lossless on any UTF-8 text: no normalization, no added space, bytes for what the vocabulary lacks. Runs of spaces,
    newlines and punctuation with the newline after it can become pieces, digits stay single (as in Llama). Ids 0, 1, 2
    are `<unk>`, `<s>`, `</s>`, ids 3 to 258 the bytes.

    At most about `sample_bytes` of text, from pieces of the input drawn by `seed`, are read and held in memory.
    Raises InputError for unreadable input and for a vocabulary that does not fit the text.
    """
    import sentencepiece

    output = Path(output)
    if kind not in ("bpe", "unigram"):
        raise InputError(f"tokenizer kind {kind!r}: choose bpe or unigram")
    if vocab_size < 300:
        raise InputError(f"vocab_size={vocab_size} is too small: 256 bytes, 3 special tokens and letters need 300")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: the file exists; choose another name or replace it with --overwrite")
    options = options or ReadOptions()
    sample = _sample(inputs, options, sample_bytes, seed, progress)
    if not sample:
        raise InputError(f"{inputs[0]}: no document has any text to train a tokenizer on")
    model = io.BytesIO()
    with track(None, f"training a tokenizer on {len(sample)} blocks of text", enabled=progress):
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=kind,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                max_sentence_length=_TRAIN_BLOCK * 4 + 4,
                num_threads=_TRAIN_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"vocab_size={vocab_size} does not fit the text: {_vocabulary_fault(error)}") from None
    beside = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(model.getvalue())
        os.replace(beside, output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None
    return load_tokenizer(output)


def _sample(
    inputs: Sequence[str | Path], options: ReadOptions, sample_bytes: int, seed: int, progress: bool
) -> list[str]:
    """Blocks of text from randomly drawn pieces of the input, up to a budget of bytes."""
    pieces = [piece for file in find_files(inputs, options)[0] for piece in split_file(file, options, _TRAIN_PIECE)]
    order = random.Random(seed).sample(range(len(pieces)), len(pieces))
    blocks: list[str] = []
    used = 0
    with track(min(sample_bytes, sum(piece.size for piece in pieces)), "sampling", "B", enabled=progress) as tracker:
        for number in order:
            of_piece = 0
            for document in read_piece(pieces[number], options):
                for start in range(0, len(document.text), _TRAIN_BLOCK):
                    # The trainer takes no text with NUL and none with its own two marks.
                    texts = re.split("[\0\u2581\u2585]", document.text[start : start + _TRAIN_BLOCK])
                    blocks += [text for text in texts if text]
                size = len(document.text.encode("utf-8"))
                of_piece += size
                used += size
                tracker.advance(size)
                # A compressed file is one piece however long: it may not fill the sample alone.
                if of_piece >= 4 * _TRAIN_PIECE or used >= sample_bytes:
                    break
            if used >= sample_bytes:
                break
    return blocks


def special_lut(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """True at the special tokens, bool [vocab_size]."""
    table = np.zeros(tokenizer.vocab_size, dtype=bool)
    table[sorted(tokenizer.special_ids)] = True
    return table


def casefold_table(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """The smallest id that spells the same text up to case, leading space and Unicode form, int64 [vocab_size].

    Special tokens, tokens of white space alone and tokens that are not whole UTF-8 stand for themselves. Used by
    `goldfish.canonical: casefold`, so that near-duplicates of a text share their masks.
    """
    table = np.arange(tokenizer.vocab_size, dtype=np.int64)
    first: dict[str, int] = {}
    for token in range(tokenizer.vocab_size):
        try:
            text = tokenizer.piece(token).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        # Twice: folding can leave a string that normalizes further (Unicode 15, D146).
        folded = unicodedata.normalize("NFKC", text.removeprefix(" ")).casefold()
        table[token] = first.setdefault(unicodedata.normalize("NFKC", folded).casefold(), token)
    return table


def _cut_before_space(text: str, size: int) -> Iterator[str]:
    """Cut `text` into segments of about `size` characters, between a non-space and a space.

    Pieces have spaces only in front, so no piece can straddle such a cut.
    """
    start = 0
    while len(text) - start > size:
        limit = start + _LONGEST_SEGMENT
        end = text.find(" ", start + size, limit)
        while end > 0 and text[end - 1] == " ":
            end = text.find(" ", end + 1, limit)
        if end < 0:
            if len(text) <= limit:
                break
            end = limit
        yield text[start:end]
        start = end
    yield text[start:]


def _stages(entry: Any) -> list[dict[str, Any]]:
    """The stages of a decoder or pre-tokenizer of a tokenizer.json, sequences taken apart."""
    if not isinstance(entry, dict):
        return []
    inner = entry.get("decoders") or entry.get("pretokenizers")
    return [stage for item in inner for stage in _stages(item)] if inner else [entry]


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 stands for itself, the other bytes are U+0100 upwards (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _vocabulary_fault(error: BaseException) -> str:
    """What the sentencepiece trainer says of the vocabulary's size, without its source lines and option names."""
    if match := re.search(r"value <= (\d+)", str(error)):
        return f"it has pieces for at most {match[1]}; choose that or give more text"
    if match := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return f"its characters alone take {match[1]}; choose more"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
