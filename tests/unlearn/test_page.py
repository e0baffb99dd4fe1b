"""The commands of docs/unlearn.md and the README that unlearn, run as they stand on files of the names they use."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megafish.cli import main
from megafish.run import RunDir
from tests.helpers import place_kept

ROOT = Path(__file__).parents[2]


def walk(page: str) -> list[list[str]]:
    """Arguments of the commands in the shell blocks of a page that unlearn; the bench has tests of its own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("megafish unlearn ") and not line.startswith("megafish unlearn bench "):
                found.append(shlex.split(line)[1:])
    return found


def test_every_command_runs(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "plain", "never_saw_it"):
        run = tmp_path / "runs" / name
        shutil.copytree(learned / "start", run)
        config = (run / "config.yaml").read_text(encoding="utf-8")
        (run / "config.yaml").write_text(config.replace("name: start", f"name: {name}"), encoding="utf-8")
    shutil.copy(learned / "retain.jsonl", tmp_path)
    for name in ("forget", "unseen", "world", "general"):
        rows = [{"question": f"Where was {name} {i} born?", "answer": f"In Rome in {i}."} for i in range(1900, 1920)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    commands = [*walk("docs/unlearn.md"), *walk("README.md")]
    assert [words[1] for words in commands].count("score") == 3 and len(commands) == 8
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["megafish", *words])
        with place_kept():
            try:
                main()
            except SystemExit as end:
                assert end.code in (None, 0), (words, capsys.readouterr().err)
        assert "next: " in capsys.readouterr().out, words
    assert RunDir(tmp_path / "runs/tiny-npo").latest() is not None
    curve = (tmp_path / "runs/relearned/metrics.jsonl").read_text(encoding="utf-8")
    assert curve.count('"unlearned"') > 2  # after every step
    assert sum(1 for _ in (tmp_path / "sets/authors/full.jsonl").open(encoding="utf-8")) == 4000
