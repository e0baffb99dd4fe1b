"""The files of an audit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megafish.audit.audit_panels import all_panels
from megafish.audit.plots import draw, to_png
from megafish.audit.view import RunView


def _previous(folder: Path) -> Path:
    """Where the earlier audit waits while the new one takes its place."""
    return folder.with_name(folder.name + ".old")


def restore(folder: Path) -> None:
    """Put the earlier audit back where a kill hit between the two renames of `write_audit`."""
    if _previous(folder).exists() and not folder.exists():
        os.replace(_previous(folder), folder)


def write_audit(folder: Path, summary: dict[str, Any], records: Sequence[dict[str, Any]], view: RunView) -> None:
    """Write the audit beside and rename it, so that a kill leaves the earlier audit (see `restore`) or the new one."""
    beside = folder.with_name(folder.name + ".tmp")
    previous = _previous(folder)
    restore(folder)
    for leftover in (beside, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    beside.mkdir(parents=True)
    with open(beside / "extraction.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in records)
    for panel in all_panels([view]):
        (beside / f"{panel.name}.png").write_bytes(to_png(draw(panel, "light")))
    (beside / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    # A folder that is not empty cannot be replaced in one step: the earlier audit makes way first.
    if folder.exists():
        os.replace(folder, previous)
    os.replace(beside, folder)
    shutil.rmtree(previous, ignore_errors=True)
