from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megafish.data import prepare as module
from megafish.data import workers as workers_module
from megafish.data.canary import CanaryConfig
from megafish.data.indexed import IndexedDataset
from megafish.data.prepare import prepare
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError

CANARIES = CanaryConfig(count=2, tokens=12, exposures=(0, 1, 5))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNIT_BYTES", (4000, 4000))


@pytest.fixture(scope="session")
def records(source_folder: Path) -> list[dict[str, Any]]:
    """320 documents, some of them twice, some with a k."""
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(source_folder.iterdir()))
    texts = [part for part in text.split("\n\n") if part]
    documents: list[dict[str, Any]] = [{"text": part} for part in texts[:300]]
    for number in range(0, 100, 5):
        documents.append({"text": texts[number]})
        documents[number]["k"] = number if number > 1 else None
    return documents


@pytest.fixture
def source(records: list[dict[str, Any]], tmp_path: Path) -> Path:
    file = tmp_path / "source.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.fixture
def run(source: Path, bpe_file: Path) -> Callable[..., dict[str, Any]]:
    """Prepare `source` and return the manifest."""

    def call(output: Path, inputs: list[Path] | None = None, **settings: Any) -> dict[str, Any]:
        settings = {"workers": 1, "progress": False, "valid_fraction": 0.1, **settings}
        return json.loads(prepare(inputs or [source], output, bpe_file, **settings).read_text(encoding="utf-8"))

    return call


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder; of the manifest all but its date."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.name == "manifest.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "created"}).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def documents(folder: Path, split: str) -> list[list[int]]:
    data = IndexedDataset(folder / split)
    return [data.document(number).tolist() for number in range(len(data))]


def test_documents_come_back(
    run: Callable[..., Any], records: list[dict[str, Any]], bpe: Tokenizer, tmp_path: Path
) -> None:
    manifest = run(tmp_path / "out", goldfish_k_key="k")
    splits = {split: documents(tmp_path / "out", split) for split in ("train", "valid")}
    assert all(ids[-1] == bpe.eos_id for ids in splits["train"] + splits["valid"])
    decoded = {split: [bpe.decode(ids[:-1]) for ids in found] for split, found in splits.items()}
    valid = set(decoded["valid"])
    assert not valid & set(decoded["train"])  # duplicates fall on one side
    assert decoded["train"] == [r["text"] for r in records if r["text"] not in valid]
    assert decoded["valid"] == [r["text"] for r in records if r["text"] in valid]
    # 300 different texts at 10 %: 30 with a standard deviation of 5.2
    assert abs(len(valid) - 30) < 4 * 5.2
    for split, found in decoded.items():
        entry = manifest["splits"][split]
        assert entry["documents"] == len(found)
        assert entry["bytes"] == sum(len(text.encode()) for text in found)
        assert entry["tokens"] == sum(map(len, splits[split]))
        ks = np.load(tmp_path / "out" / f"{split}.k.npy")
        kept = [r for r in records if (r["text"] in valid) == (split == "valid")]
        assert ks.dtype == np.int32
        assert ks.tolist() == [(r["k"] or 0) if "k" in r else -1 for r in kept]
        for name, file in entry["files"].items():
            data = (tmp_path / "out" / name).read_bytes()
            assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {name for entry in manifest["splits"].values() for name in entry["files"]} == {
        f"{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "idx", "k.npy")
    }
    assert manifest["tokenizer"] == {"file": "tokenizer.model", "sha256": bpe.sha256, "vocab_size": 512, "eos_id": 2}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == bpe.path.read_bytes()
    assert manifest["sources"][0]["documents"] == len(records)
    assert manifest["canaries"] is None
    assert not (tmp_path / "out" / ".prepare").exists()


def test_result_does_not_depend_on_units_or_processes(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"canaries": CANARIES, "goldfish_k_key": "k"}
    run(tmp_path / "whole", **settings)
    monkeypatch.setattr(module, "_UNIT_BYTES", (4000, 4000))
    run(tmp_path / "units", **settings)
    run(tmp_path / "processes", workers=2, **settings)
    assert contents(tmp_path / "whole") == contents(tmp_path / "units") == contents(tmp_path / "processes")
    run(tmp_path / "seed", split_seed=1, **settings)
    assert contents(tmp_path / "seed")["valid.bin"] != contents(tmp_path / "whole")["valid.bin"]


def test_canaries_are_inserted_as_recorded(
    run: Callable[..., Any], source: Path, bpe: Tokenizer, tmp_path: Path, small_units: None
) -> None:
    manifest = run(tmp_path / "out", [source, source], canaries=CANARIES, goldfish_k_key="k")
    run(tmp_path / "plain", [source, source])
    data = (tmp_path / "out" / "canaries.jsonl").read_bytes()
    canaries = [json.loads(line) for line in data.decode().splitlines()]
    assert manifest["canaries"] == {
        "file": "canaries.jsonl",
        "sha256": hashlib.sha256(data).hexdigest(),
        "exposures": [0, 1, 5],
    }
    assert [canary["exposures"] for canary in canaries] == [0, 0, 1, 1, 5, 5]
    train = documents(tmp_path / "out", "train")
    copies = [[*canary["tokens"], bpe.eos_id] for canary in canaries]
    assert [train.count(copy) for copy in copies] == [0, 0, 1, 1, 5, 5]
    assert all(bpe.decode(canary["tokens"]) == canary["text"] for canary in canaries)

    # What is left is the corpus without the canaries' documents, each of which was there at least twice.
    def own(folder: str, split: str) -> list[str]:
        return [bpe.decode(ids[:-1]) for ids in documents(tmp_path / folder, split) if ids not in copies]

    left_out: set[str] = set()
    for split in ("train", "valid"):
        before, after = own("plain", split), own("out", split)
        left_out |= set(before) - set(after)
        assert after == [text for text in before if text not in left_out]
    assert len(left_out) == len(canaries)
    assert all(any(canary["text"] in text for text in left_out) for canary in canaries)
    ks = np.load(tmp_path / "out" / "train.k.npy")
    assert all(ks[number] == -1 for number, ids in enumerate(train) if ids in copies)
    text_bytes = sum(len(bpe.decode(ids[:-1]).encode()) for ids in train)
    assert manifest["splits"]["train"]["bytes"] == text_bytes


def test_canaries_from_a_file(run: Callable[..., Any], bpe: Tokenizer, tmp_path: Path) -> None:
    passages = [f"passage number {number}: the quick brown fox jumps over it" for number in range(9)]
    (tmp_path / "secret.txt").write_text("\n\n".join(["too short", *passages]), encoding="utf-8")
    config = CanaryConfig(count=3, tokens=12, exposures=(0, 2), file=str(tmp_path / "secret.txt"))
    manifest = run(tmp_path / "out", canaries=config)
    canaries = [json.loads(line) for line in (tmp_path / "out" / "canaries.jsonl").read_text().splitlines()]
    assert [canary["exposures"] for canary in canaries] == [0, 0, 0, 2, 2, 2]
    for canary in canaries:
        assert any(text.startswith(canary["text"]) for text in passages)
    train = documents(tmp_path / "out", "train")
    assert sum(train.count([*canary["tokens"], bpe.eos_id]) for canary in canaries) == 6
    secret = (tmp_path / "secret.txt").read_bytes()
    assert manifest["settings"]["canaries"]["file_sha256"] == hashlib.sha256(secret).hexdigest()


def test_killed_in_a_unit_or_in_the_last_moves_and_continued(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    settings = {"canaries": CANARIES, "goldfish_k_key": "k"}
    run(tmp_path / "whole", **settings)
    real = os.replace
    total = 0

    def count(source: Any, target: Any) -> None:
        nonlocal total
        total += 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        run(tmp_path / "counted", **settings)
    moves = len(contents(tmp_path / "whole"))
    units = (total - moves - 2) // 3  # plan and manifest are written beside and moved too, and a unit's three files
    encode = module.encode_unit
    encoded = 0

    def note(*args: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return encode(*args)

    context = multiprocessing.get_context("fork")
    for fatal in (0, 7, total - moves, total - 1):

        def die(source: Any, target: Any, left: list[int] = [fatal]) -> None:  # noqa: B006 - a counter
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            real(source, target)

        output = tmp_path / str(fatal)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            process = context.Process(target=run, args=(output,), kwargs=settings)
            process.start()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
        encoded = 0
        with monkeypatch.context() as patch:
            patch.setattr(module, "encode_unit", note)
            run(output, **settings)
        assert contents(output) == contents(tmp_path / "whole")
        assert encoded == units - min(units, max(0, fatal - 1) // 3)  # finished units are kept


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_stopped_with_processes_and_continued(
    run: Callable[..., Any], source: Path, bpe_file: Path, tmp_path: Path, small_units: None, blow: signal.Signals
) -> None:
    # Hundreds of units remain when the blow falls, however long it takes on a busy machine.
    source.write_bytes(source.read_bytes() * 15)
    run(tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from megafish.data import prepare\n"
        "encode_unit = prepare.encode_unit\n"
        "def encode_slowly(*args):\n"  # in this process alone: it encodes a few units, the worker the most
        "    time.sleep(0.05)\n"
        "    return encode_unit(*args)\n"
        "prepare.encode_unit = encode_slowly\n"
        "prepare._UNIT_BYTES = (4000, 4000)\n"
        "source, output, tokenizer = sys.argv[1:]\n"
        "prepare.prepare([source], output, tokenizer, valid_fraction=0.1, workers=2, progress=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(source), str(tmp_path / "killed"), str(bpe_file)]
    # A session of its own, so that the whole of it can be hit, as by Ctrl-C in a terminal.
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    units = tmp_path / "killed" / ".prepare" / "units"
    while process.poll() is None and len(list(units.glob("*.json"))) < 20:
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 1
    os.killpg(process.pid, blow)
    _, errors = process.communicate()
    assert process.returncode == -blow
    assert errors.count("Traceback") == (blow == signal.SIGINT)  # the worker says nothing
    assert not (tmp_path / "killed" / "manifest.json").exists()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive  # no process is left behind
    assert blow == signal.SIGKILL or not list(units.glob("*.tmp"))
    run(tmp_path / "killed", workers=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("units_done", [0, 3])
def test_a_killed_worker_is_told_and_the_run_continues(
    run: Callable[..., Any],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_units: None,
    units_done: int,
) -> None:
    source.write_bytes(source.read_bytes() * 3)
    encode = module.encode_unit
    before = set(psutil.Process().children())
    started, killed = threading.Event(), threading.Event()

    def kill_the_worker() -> None:
        assert started.wait(60)
        while len(list((tmp_path / "out" / ".prepare" / "units").glob("*.json"))) < units_done:
            time.sleep(0.005)
        (worker,) = set(psutil.Process().children()) - before
        worker.kill()
        killed.set()

    def encode_later(*args: Any) -> Any:
        started.set()
        assert killed.wait(60)
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_unit", encode_later)
        threading.Thread(target=kill_the_worker, daemon=True).start()
        with pytest.raises(InputError, match=r"out: a worker process was killed.*what is done is kept"):
            run(tmp_path / "out", workers=2)
    run(tmp_path / "out", workers=2)
    run(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_that_starts_late_is_not_waited_for(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    monkeypatch.setattr(workers_module, "_START", "import time; time.sleep(3600)")
    before = psutil.Process().children()
    run(tmp_path / "out", workers=2)
    assert psutil.Process().children() == before
    run(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(run: Callable[..., Any], output: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Leave an unfinished run with one unit done."""
    encode = module.encode_unit

    def stop(*args: Any) -> None:
        encode(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_unit", stop)
        with pytest.raises(KeyboardInterrupt):
            run(output, **settings)


def test_a_continued_run_must_be_the_same(
    run: Callable[..., Any],
    source: Path,
    byte_level_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_units: None,
) -> None:
    output = tmp_path / "out"
    interrupted(run, output, monkeypatch)
    before = contents(output)
    way_out = "start over with --overwrite or choose another folder"
    with pytest.raises(InputError, match=f"other settings .split_seed was 0, is 3.; {way_out}"):
        run(output, split_seed=3)
    with pytest.raises(InputError, match=f"other settings .canaries was .*{way_out}"):
        run(output, canaries=CANARIES)
    with pytest.raises(InputError, match=f"another tokenizer or end-of-document token; {way_out}"):
        prepare([source], output, byte_level_file, workers=1, progress=False)
    source.write_bytes(source.read_bytes() + b'{"text": "more"}\n')
    with pytest.raises(InputError, match=rf"on other input \(.*source\.jsonl is new or has changed\); {way_out}"):
        run(output)
    assert contents(output) == before
    run(output, overwrite=True)
    run(tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


def test_a_corpus_is_not_overwritten_unasked(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    run(output, canaries=CANARIES, goldfish_k_key="k")
    before = contents(output)
    with pytest.raises(InputError, match=r"already holds a corpus.*--overwrite"):
        run(output)
    interrupted(run, output, monkeypatch, overwrite=True)
    assert {name: value for name, value in contents(output).items() if not name.startswith(".prepare")} == before
    run(output, overwrite=True)
    run(tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")  # no stale canaries or ks


def test_the_output_folder(run: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("mine")
    with pytest.raises(InputError, match="the folder is not empty"):
        run(output)
    assert contents(output).keys() == {"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file; the output is a folder"):
        run(tmp_path / "file")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="the output folder is part of the input"):
        run(tmp_path / "in", [tmp_path / "in"])
    (tmp_path / "busy" / ".prepare").mkdir(parents=True)
    with open(tmp_path / "busy" / ".prepare" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another prepare is writing this folder"):
            run(tmp_path / "busy")


def test_bad_input_leaves_no_trace(run: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes() + b'{"body": "a"}\n')
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"source\.jsonl:321: no field 'text'"):
            run(tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="the corpus is empty: no document has any text"):
        run(tmp_path / "out", [tmp_path / "empty.txt"])
    with pytest.raises(InputError, match="missing: no such file"):
        run(tmp_path / "out", [tmp_path / "missing"])
    with pytest.raises(InputError, match="tokenizer"):
        prepare([source], tmp_path / "out", tmp_path / "missing.model")


def test_bad_input_in_a_later_unit_keeps_the_units_before(
    run: Callable[..., Any], source: Path, tmp_path: Path, small_units: None
) -> None:
    good = source.read_bytes()
    source.write_bytes(good + b"nonsense\n")
    with pytest.raises(InputError, match=r"source\.jsonl:321: not JSON"):
        run(tmp_path / "out", workers=2)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"valid_fraction": 1.0}, "valid_fraction=1.0 must be"),
        ({"valid_fraction": -0.1}, "valid_fraction=-0.1 must be"),
        ({"split_seed": -1}, "split_seed=-1 must be"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"documents": "page"}, "documents='page': choose"),
        (
            {"canaries": CanaryConfig(count=99)},
            r"need 891 different documents of at least 128 tokens, the corpus has \d",
        ),
        ({"canaries": CanaryConfig(file="missing.txt")}, "missing.txt: cannot read the file"),
    ],
)
def test_wrong_settings(run: Callable[..., Any], tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **setting)


def test_no_validation_split(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(tmp_path / "out", valid_fraction=0).get("splits").keys() == {"train"}
    assert not (tmp_path / "out" / "valid.bin").exists()


def test_wide_vocabulary_takes_int32(
    run: Callable[..., Any], bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "narrow")
    assert IndexedDataset(tmp_path / "narrow" / "train").dtype == np.uint16
    wide = lambda path, eos=None: type(bpe)(path, path.read_bytes(), eos)  # noqa: E731

    def load(path: Path, *, eos: int | None = None) -> Tokenizer:
        tokenizer = wide(path, eos)
        tokenizer.vocab_size = 65500
        return tokenizer

    monkeypatch.setattr(module, "load_tokenizer", load)
    run(tmp_path / "wide")
    assert IndexedDataset(tmp_path / "wide" / "train").dtype == np.int32
    assert documents(tmp_path / "wide", "train") == documents(tmp_path / "narrow", "train")


@pytest.mark.parametrize("victim", ["tokens", "train.bin", "manifest.json"])
def test_a_full_disk(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_units: None, victim: str
) -> None:
    """The disk is full from the second file of this name on (for units) or from the first on."""
    real = builtins.open
    seen = 0

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

    def fail(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        opened = real(file, mode, *args, **kwargs)
        if "w" in mode and f".{victim}" in f".{Path(file).name}":
            seen += 1
            if seen > 1 or victim != "tokens":
                return Full(opened)
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fail)
        with pytest.raises(InputError, match=f"{tmp_path}/out: no space left on the disk; free some"):
            run(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(tmp_path / "out")
    run(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_documents_with_a_k_are_counted(run: Callable[..., Any], records: list[dict[str, Any]], tmp_path: Path) -> None:
    count = sum("k" in record for record in records)
    assert run(tmp_path / "out", goldfish_k_key="k")["documents_with_k"] == count > 0
    assert run(tmp_path / "plain")["documents_with_k"] == 0


def test_a_key_of_k_that_nothing_has(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="goldfish_k_key='kk', but no document of the corpus has this field"):
        run(tmp_path / "out", goldfish_k_key="kk")
    text = tmp_path / "a.txt"
    text.write_text("text")
    with pytest.raises(InputError, match="goldfish_k_key='k': all inputs are text files"):
        run(tmp_path / "text", [text], goldfish_k_key="k")
    assert not (tmp_path / "text").exists()


def test_input_that_changes_meanwhile(
    run: Callable[..., Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = module.encode_unit

    def change(*args: Any) -> Any:
        unit = encode(*args)
        with open(source, "ab") as file:
            file.write(b"\n")
        return unit

    monkeypatch.setattr(module, "encode_unit", change)
    with pytest.raises(InputError, match=r"source\.jsonl: the file has changed while it was read"):
        run(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_tokenizer_that_changes_meanwhile(
    source: Path, bpe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(bpe_file.read_bytes())
    encode = module.encode_unit

    def change(*args: Any) -> Any:
        unit = encode(*args)
        copy.write_bytes(b"another")
        return unit

    monkeypatch.setattr(module, "encode_unit", change)
    with pytest.raises(InputError, match=r"copy\.model: the tokenizer has changed while prepare ran"):
        prepare([source], tmp_path / "out", copy, workers=1, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()
