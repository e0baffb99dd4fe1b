from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from megafish.data import workers as module
from megafish.data.encode import EncodeOptions, encode_unit, unit_file
from megafish.data.readers import Piece, ReadOptions, find_files, split_file
from megafish.data.tokenizer import Tokenizer
from megafish.data.workers import Worker, WorkerKilledError, start_workers
from megafish.errors import InputError

OPTIONS = EncodeOptions(ReadOptions(), 0.25, 0, None)


def pieces_of(file: Path) -> list[Piece]:
    return split_file(find_files([file], OPTIONS.read)[0][0], OPTIONS.read, 5000)


def test_a_worker_encodes_as_the_function_does(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(1000)))
    pieces = pieces_of(tmp_path / "a.jsonl")
    reported: list[int] = []
    with start_workers(1, bpe.path, None) as [worker]:
        assert worker.tokenizer_sha256() == bpe.sha256
        units = [worker.encode_unit(tmp_path, number, pieces, OPTIONS, reported.append) for number in (0, 1)]
    assert sum(reported) == 2 * (tmp_path / "a.jsonl").stat().st_size
    assert units == 2 * [encode_unit(tmp_path, 2, pieces, bpe, OPTIONS, lambda _: None)]
    for kind in ("tokens", "documents", "json"):
        assert len({unit_file(tmp_path, number, kind).read_bytes() for number in range(3)}) == 1


def test_what_goes_wrong_in_a_worker_is_raised_here(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    pieces = pieces_of(tmp_path / "a.jsonl")
    with start_workers(2, bpe.path, None) as workers:
        for worker in workers:
            worker.tokenizer_sha256()
        with pytest.raises(InputError, match=r"a\.jsonl:1: not JSON"):
            workers[0].encode_unit(tmp_path, 0, pieces, OPTIONS, lambda _: None)
        with pytest.raises(FileNotFoundError):
            workers[1].encode_unit(tmp_path / "missing", 0, pieces, OPTIONS, lambda _: None)
    with start_workers(1, bpe.path, "<none>") as [worker], pytest.raises(InputError, match="no end-of-document token"):
        worker.tokenizer_sha256()


def test_a_worker_that_is_gone(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(worker: Worker) -> None:
        with pytest.raises(WorkerKilledError):
            worker.tokenizer_sha256()
        done.append(worker)

    done: list[Worker] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "_START", "import time; time.sleep(3600)")
        with start_workers(1, bpe.path, None) as [worker]:
            waiting = threading.Thread(target=killed, args=(worker,))
            waiting.start()
            worker.kill()
            waiting.join()
    assert done == [worker]
    monkeypatch.setattr(module, "_START", "raise SystemExit(3)")
    with start_workers(1, bpe.path, None) as [worker], pytest.raises(RuntimeError, match="a worker process failed"):
        worker.tokenizer_sha256()
