"""`prepare`: files of text to a corpus folder that training can read.

The input is cut into units. Processes, this one among them, turn units into token files below OUTPUT/.prepare; these
are then put together in order. A run that was killed is continued by the same call: finished units are kept. The result
depends on the input and the settings alone, not on the number of processes or on interruptions.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megafish.data.assemble import HashedFile, assemble
from megafish.data.canary import Canary, CanaryConfig, Candidate, CandidateKeeper, choose
from megafish.data.encode import (
    EncodeOptions,
    Unit,
    disk,
    encode_unit,
    finished_unit,
    remove_unfinished,
    text_hash,
    unit_candidates,
)
from megafish.data.indexed import optimal_dtype
from megafish.data.manifest import FORMAT, MANIFEST, VERSION
from megafish.data.readers import InputFile, Piece, ReadOptions, find_files, read_piece, split_file
from megafish.data.tokenizer import Tokenizer, load_tokenizer
from megafish.data.workers import Worker, WorkerKilledError, start_workers
from megafish.errors import InputError
from megafish.progress import Track, track

_WORK = ".prepare"
_PLAN = "plan.json"
_OUTPUTS = (
    *(f"{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "idx", "k.npy")),
    "tokenizer.model",
    "tokenizer.json",
    "canaries.jsonl",
    MANIFEST,
)

# A unit is what is lost when a run is killed and what a process works on at one time: small enough to share out evenly,
# large enough that a big corpus has a few thousand of them.
_UNIT_BYTES = (1 << 20, 256 << 20)
_UNITS_WANTED = 4096


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
    eos: str | int | None = None,
    text_key: str = "text",
    goldfish_k_key: str | None = None,
    documents: Literal["file", "line", "blank-line"] = "file",
    text_suffixes: Sequence[str] = (".txt",),
    valid_fraction: float = 0.01,
    split_seed: int = 0,
    canaries: CanaryConfig | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the corpus of `inputs` (files and folders) to the folder `output`; returns the path of its manifest.

    Each document becomes its ids and an end-of-document token, in the order of the input (folders by sorted path).
    `valid_fraction` of the documents, chosen by a hash of their text and `split_seed`, go to the validation split, so
    that duplicates are on one side; 0 writes no validation split. `workers`: processes, this one included, by default
    one a core. `overwrite` replaces a corpus that is there, once the new one is complete, and forgets an unfinished run
    with other settings.

    Raises InputError for whatever the user can mend, naming file and place.
    """
    if not 0 <= valid_fraction < 1:
        raise InputError(f"valid_fraction={valid_fraction} must be at least 0 and below 1")
    if not 0 <= split_seed < 2**64:
        raise InputError(f"split_seed={split_seed} must be at least 0 and below 2^64")
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1")
    read = ReadOptions(text_key, goldfish_k_key, documents, tuple(text_suffixes))
    options = EncodeOptions(read, valid_fraction, split_seed, canaries)
    files, skipped = find_files(inputs, read)
    if goldfish_k_key is not None and all(file.kind == "text" for file in files):
        raise InputError(
            f"goldfish_k_key={goldfish_k_key!r}: all inputs are text files, which have no fields; leave it out or give "
            ".jsonl or .parquet"
        )
    folder = Path(output)
    for file in files:
        if folder.resolve() in Path(file.path).resolve().parents:
            raise InputError(f"{folder}: the output folder is part of the input ({file.path}); choose another")
    units = _units(files, read)
    # First of all: they take a while to start.
    with start_workers(min(_count(workers), len(units)) - 1, tokenizer, eos) as others:
        coder = load_tokenizer(tokenizer, eos=eos)
        plan = _plan(files, coder, options)
        with disk(folder), _work_folder(folder, plan, overwrite) as work:
            with track(sum(file.size for file in files), "encoding", "B", enabled=progress) as tracker:
                if skipped:
                    tracker.note(f"left out {len(skipped)} files with other suffixes, the first is {skipped[0]}")
                done = _encode(work, units, coder, options, others, tracker)
            _check_unchanged(files)
            _finish(folder, work, files, units, done, coder, options, plan, progress)
    return folder / MANIFEST


# ------------------------------------------------------------------------------------------------------------- planning


def _plan(files: Sequence[InputFile], tokenizer: Tokenizer, options: EncodeOptions) -> dict[str, Any]:
    """All that the output depends on: what a continued run must share with the one that was interrupted."""
    settings: dict[str, Any] = asdict(options.read)
    settings.update(valid_fraction=options.valid_fraction, split_seed=options.split_seed)
    settings["canaries"] = asdict(options.canaries) if options.canaries is not None else None
    if options.canaries is not None and options.canaries.file is not None:
        settings["canaries"]["file_sha256"] = _sha256(Path(options.canaries.file))
    plan = {
        "format": "megafish-prepare",
        "version": 1,
        "tokenizer": {"sha256": tokenizer.sha256, "eos_id": tokenizer.eos_id},
        "settings": settings,
        "inputs": [[file.path, file.size, file.mtime_ns] for file in files],
    }
    return json.loads(json.dumps(plan))  # as it reads back from the file: tuples are lists


def _units(files: Sequence[InputFile], options: ReadOptions) -> list[list[Piece]]:
    total = sum(file.size for file in files)
    size = min(max(total // _UNITS_WANTED, _UNIT_BYTES[0]), _UNIT_BYTES[1])
    units: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece in split_file(file, options, size):
            if room <= 0:
                units.append([])
                room = size
            units[-1].append(piece)
            room -= max(piece.size, 1024)  # opening a file costs something too
    return units


def _count(workers: int | None) -> int:
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _work_folder(folder: Path, plan: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """The folder of an unfinished run, new or continued, locked. Removed unless the block fails with units done."""
    work = folder / _WORK
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; the output is a folder")
    if not (work / _PLAN).exists() and not overwrite and folder.exists():
        if (folder / MANIFEST).exists():
            raise InputError(f"{folder}: already holds a corpus; choose another folder or replace it with --overwrite")
        if any(entry.name != _WORK for entry in folder.iterdir()):
            raise InputError(f"{folder}: the folder is not empty; choose another or write into it with --overwrite")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another prepare is writing this folder") from None
        if (work / _PLAN).exists() and not overwrite:
            _compare(json.loads((work / _PLAN).read_text(encoding="utf-8")), plan, folder)
        elif not (work / _PLAN).exists() or json.loads((work / _PLAN).read_text(encoding="utf-8")) != plan:
            (work / _PLAN).unlink(missing_ok=True)
            shutil.rmtree(work / "units", ignore_errors=True)
            _write_json(work / _PLAN, plan)
        (work / "units").mkdir(exist_ok=True)
        try:
            yield work
        except BaseException:
            remove_unfinished(work / "units")
            if not any((work / "units").glob("*.json")):  # nothing worth keeping: leave no trace
                (work / _PLAN).unlink()
                shutil.rmtree(work)
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise
        (work / _PLAN).unlink()  # first: without a plan the rest is rubbish
        shutil.rmtree(work)


def _compare(before: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    way_out = "start over with --overwrite or choose another folder"
    unfinished = f"{folder}: holds an unfinished run"
    for key in ("format", "version"):
        if before.get(key) != plan[key]:
            raise InputError(f"{unfinished} of another version of megafish; {way_out}")
    if before["tokenizer"] != plan["tokenizer"]:
        raise InputError(f"{unfinished} with another tokenizer or end-of-document token; {way_out}")
    for key, value in plan["settings"].items():
        old = before["settings"].get(key)
        if old != value:
            raise InputError(f"{unfinished} with other settings ({key} was {old!r}, is {value!r}); {way_out}")
    if before["inputs"] != plan["inputs"]:
        old_files = {tuple(entry) for entry in before["inputs"]}
        changed = [entry[0] for entry in plan["inputs"] if tuple(entry) not in old_files]
        which = f"{changed[0]} is new or has changed" if changed else "files are missing or in another order"
        raise InputError(f"{unfinished} on other input ({which}); {way_out}")


# ------------------------------------------------------------------------------------------------------------- encoding


class _Stopped(Exception):
    """The main thread wants no more."""


def _encode(
    work: Path,
    units: list[list[Piece]],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    workers: list[Worker],
    tracker: Track,
) -> list[Unit]:
    """Encode the units that are not there yet: in this process and in `workers`, each of which has a thread here."""
    folder = work / "units"
    remove_unfinished(folder)
    lock, stop = threading.Lock(), threading.Event()
    encoded = 0  # bytes of input

    def on_bytes(count: int) -> None:
        nonlocal encoded
        with lock:
            encoded += count
        if stop.is_set():
            raise _Stopped

    def take() -> int | None:
        with lock:
            return next(left, None)

    def encode_here() -> None:
        while (number := take()) is not None:
            done[number] = encode_unit(folder, number, units[number], tokenizer, options, on_bytes)

    def encode_in(worker: Worker) -> None:
        # It takes a unit only when it has started: meanwhile this process may well do them all.
        _check_tokenizer(tokenizer.path, worker.tokenizer_sha256(), tokenizer.sha256)
        while (number := take()) is not None:
            done[number] = worker.encode_unit(folder, number, units[number], options, on_bytes)

    with ThreadPoolExecutor(1 + len(workers)) as pool:
        done: list[Unit | None] = []
        for pieces, unit in zip(units, pool.map(partial(finished_unit, folder), range(len(units))), strict=True):
            done.append(unit)
            if unit is not None:
                tracker.set(tracker.done + sum(piece.size for piece in pieces), already_done=True)
        before = tracker.done
        left = iter([number for number, unit in enumerate(done) if unit is None])
        try:
            running = {pool.submit(encode_here), *(pool.submit(encode_in, worker) for worker in workers)}
            while None in done:
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                tracker.set(before + encoded)
                for future in finished:
                    future.result()
        except WorkerKilledError:
            raise InputError(
                f"{work.parent}: a worker process was killed (out of memory?); start again, perhaps with fewer "
                "workers: what is done is kept"
            ) from None
        finally:
            stop.set()
            for worker in workers:
                worker.kill()
    return [unit for unit in done if unit is not None]


def _check_tokenizer(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(f"{path}: the tokenizer has changed while prepare ran; start over with --overwrite")


def _check_unchanged(files: Sequence[InputFile]) -> None:
    """Refuse what was read from files that were written to meanwhile: it may be neither their old nor new content."""
    for file in files:
        try:
            stat = os.stat(file.path)
            same = (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)
        except OSError:
            same = False
        if not same:
            raise InputError(f"{file.path}: the file has changed while it was read; start over with --overwrite")


# ------------------------------------------------------------------------------------------------------------ finishing


def _finish(
    folder: Path,
    work: Path,
    files: list[InputFile],
    units: list[list[Piece]],
    done: list[Unit],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    plan: dict[str, Any],
    progress: bool,
) -> None:
    """Put the units together, write the manifest and move everything into place, the manifest last."""
    if not any(unit.documents for unit in done):
        raise InputError(f"{files[0].root}: the corpus is empty: no document has any text ({len(files)} files read)")
    own_k, key = sum(unit.own_k for unit in done), options.read.goldfish_k_key
    if key is not None and own_k == 0:
        raise InputError(
            f"{files[0].root}: goldfish_k_key={key!r}, but no document of the corpus has this field with a k "
            "of its own (-1 is none); start over without it or with another name"
        )
    # Read once, so that the copy is what the ids were made with.
    data = tokenizer.path.read_bytes()
    _check_tokenizer(tokenizer.path, hashlib.sha256(data).hexdigest(), tokenizer.sha256)
    config = options.canaries
    canaries: list[Canary] = []
    left_out: set[int] = set()
    if config is not None:
        candidates: Iterable[Candidate]
        if config.file is not None:
            candidates = _candidates_of_file(config, config.file, tokenizer, options)
        else:
            parts = (unit_candidates(work / "units", number) for number in range(len(units)))
            candidates = itertools.chain.from_iterable(parts)
        canaries, left_out = choose(candidates, config)
    final = work / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    dtype = optimal_dtype(tokenizer.vocab_size)
    with track(sum(unit.tokens for unit in done) * dtype.itemsize, "writing", "B", enabled=progress) as tracker:
        splits = assemble(
            work / "units",
            len(units),
            final,
            dtype,
            eos_id=tokenizer.eos_id,
            canaries=canaries,
            canary_seed=config.seed if config is not None else 0,
            left_out=left_out,
            with_valid=options.valid_fraction > 0,
            with_k=options.read.goldfish_k_key is not None,
            on_bytes=tracker.advance,
        )
    if splits["train"]["documents"] == 0:
        raise InputError(f"{files[0].root}: no document is left for training; lower valid_fraction or give more text")
    canary_entry = None
    if config is not None:
        with HashedFile(final / "canaries.jsonl") as lines:
            for canary in canaries:
                lines.write((json.dumps(canary.record(), ensure_ascii=False) + "\n").encode("utf-8"))
        canary_entry = {
            "file": "canaries.jsonl",
            "sha256": lines.entry()["sha256"],
            "exposures": list(config.exposures),
        }
    name = "tokenizer.json" if data.lstrip()[:1] == b"{" else "tokenizer.model"
    with HashedFile(final / name) as copy:
        copy.write(data)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "splits": splits,
        "tokenizer": {
            "file": name,
            "sha256": copy.entry()["sha256"],
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "sources": _sources(files, units, done),
        "settings": plan["settings"],
        "documents_with_k": own_k,
        "canaries": canary_entry,
    }
    _write_json(final / MANIFEST, manifest)
    _sync(final)
    # At no time does a manifest stand beside files that are not its own.
    (folder / MANIFEST).unlink(missing_ok=True)
    for output in _OUTPUTS:
        if (final / output).exists():
            os.replace(final / output, folder / output)
        else:
            (folder / output).unlink(missing_ok=True)


def _candidates_of_file(
    config: CanaryConfig, path: str, tokenizer: Tokenizer, options: EncodeOptions
) -> list[Candidate]:
    read = ReadOptions(options.read.text_key, None, "blank-line", options.read.text_suffixes)
    keeper = CandidateKeeper(config, tokenizer)
    for file in find_files([path], read)[0]:
        for piece in split_file(file, read, _UNIT_BYTES[1]):
            for document in read_piece(piece, read):
                _, digest = text_hash(document.text.encode("utf-8"), options.split_seed)
                keeper.offer(digest, tokenizer.encode_batch([document.text])[0], file.path)
    return keeper.candidates()


def _sources(files: list[InputFile], units: list[list[Piece]], done: list[Unit]) -> list[dict[str, Any]]:
    """What was read, one entry for each input that was named."""
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        entry = entries.setdefault(file.root, {"path": file.root, "bytes": 0, "files": 0, "documents": 0})
        entry["bytes"] += file.size
        entry["files"] += 1
    for pieces, unit in zip(units, done, strict=True):
        for piece, count in zip(pieces, unit.pieces, strict=True):
            entries[piece.file.root]["documents"] += count
    return list(entries.values())


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _sync(folder: Path) -> None:
    """Put the files of a folder on the disk. All at once: that takes little longer than one of them."""

    def sync(path: Path) -> None:
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor() as pool:
        list(pool.map(sync, folder.iterdir()))


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None
