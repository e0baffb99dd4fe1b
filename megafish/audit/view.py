"""A finished or running run as the report sees it: small files only, no model and no tokenizer is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafish.config import Config
from megafish.errors import InputError
from megafish.run import RunDir, read_json

FORMAT, VERSION = "megafish-audit", 2
"""Of summary.json."""

_AUDIT = re.compile(r"^step_\d{8}$")


@dataclass(frozen=True)
class RunView:
    """What is known of one run."""

    path: Path
    name: str
    config: Config
    metrics: dict[str, list[dict[str, Any]]]
    """Records of metrics.jsonl by kind ("train", "valid", "dropped"), by step."""
    audits: list[dict[str, Any]]
    """Every summary.json, by step."""
    samples: list[dict[str, Any]]
    """Lines of extraction.jsonl of the last audit."""
    index: int = 0
    """Number among the runs of its kind (with a mask or without) on this page."""

    @property
    def masked(self) -> bool:
        """Was it trained with a goldfish mask anywhere?"""
        if self.summary is not None and self.summary["mask"] is not None:
            return not self.summary["mask"]["reference"]
        sources = [source.goldfish_k for source in self.config.data.train]
        ks = [self.config.goldfish.k if k == "default" else k for k in sources] or [self.config.goldfish.k]
        return any(k is not None for k in ks)

    @property
    def trained_here(self) -> bool:
        """Is its training on record? Of a folder of Hugging Face's, and of a model imported from one, it is not."""
        return self.summary is None or self.summary["samples"] is not None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The last audit, or None."""
        return self.audits[-1] if self.audits else None

    @property
    def extraction(self) -> dict[str, Any] | None:
        """Extraction figures of the last audit, or None."""
        return self.summary["extraction"] if self.summary else None

    @property
    def canaries(self) -> list[dict[str, Any]]:
        """The lines of extraction.jsonl that are of canaries."""
        return [item for item in self.samples if item["set"] == "canaries"]

    @property
    def levels(self) -> list[dict[str, Any]]:
        """Figures by exposure level of the last audit, ascending."""
        return self.extraction["levels"] if self.extraction else []

    @property
    def divergence_mask(self) -> bool:
        """Do the samples carry `dropped` marks, and are they those of this run's own mask?"""
        if self.summary is None or self.summary["mask"] is None or self.summary["mask"]["reference"]:
            return False
        # A random mask drops other tokens at every copy: there is nothing to mark.
        return self.summary["mask"].get("scheme") != "random"

    def last(self, kind: str, key: str) -> float | None:
        """The last value of a field of metrics.jsonl, or None."""
        for record in reversed(self.metrics.get(kind, [])):
            if record.get(key) is not None:
                return float(record[key])
        return None

    def valid(self, key: str) -> float | None:
        """Validation "loss" [nats/token] or "bits_per_byte": of the audit, else the last one of the training."""
        audited = (self.summary["losses"]["valid"] or {}) if self.summary else {}
        if audited.get(key) is not None:
            return float(audited[key])
        return self.last("valid", {"loss": "valid_loss", "bits_per_byte": "valid_bpb"}[key])


def load_views(paths: Sequence[str | Path], step: int | None = None) -> list[RunView]:
    """The runs at `paths`, in order, with names that differ, and with their audits up to that of `step`, by default all
    of them. Raises InputError for a path that is not a run, and for one without an audit of the step."""
    runs = [RunDir.existing(path) for path in paths]
    configs = [run.load_config() for run in runs]
    names = _distinct([config.name for config in configs], [run.path for run in runs])
    views: list[RunView] = []
    for run, config, name in zip(runs, configs, names, strict=True):
        folders = _up_to(step, run, audit_folders(run))
        audits = [_read_summary(run, folder) for folder in folders]
        samples = read_lines(folders[-1] / "extraction.jsonl") if folders else []
        metrics: dict[str, list[dict[str, Any]]] = {}
        for record in read_lines(run.metrics_file):
            metrics.setdefault(record.get("kind", ""), []).append(record)
        view = RunView(run.path, name, config, metrics, audits, samples)
        views.append(_numbered(view, views))
    return views


def _numbered(view: RunView, before: list[RunView]) -> RunView:
    return replace(view, index=sum(other.masked == view.masked for other in before))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file; lines that a kill or a running writer cut off are left out. No file: nothing."""
    if not path.is_file():
        return []
    found = []
    # Not splitlines(): it also splits at U+2028, U+2029 and U+0085, which stand unescaped inside JSON strings.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def audit_folders(run: RunDir) -> list[Path]:
    """Folders of the finished audits of a run, by step."""
    if not run.audit.is_dir():
        return []
    folders = sorted(entry for entry in run.audit.iterdir() if _AUDIT.match(entry.name))
    return [folder for folder in folders if (folder / "summary.json").is_file()]


def _up_to(step: int | None, run: RunDir, folders: list[Path]) -> list[Path]:
    if step is None:
        return folders
    steps = [_step_of(folder) for folder in folders]
    if step not in steps:
        raise InputError(
            f"{run.path}: no audit of step {step}: there are those of {', '.join(map(str, steps)) or 'none'} "
            f"(megafish audit {run.path} --step {step})"
        )
    return folders[: steps.index(step) + 1]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _read_summary(run: RunDir, folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    summary = read_json(file)
    if (summary.get("format"), summary.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{file}: {summary.get('format')} version {summary.get('version')}, this program reads {FORMAT} version "
            f"{VERSION}: audit again (megafish audit {run.path} --step {_step_of(folder)})"
        )
    return summary


def _distinct(names: list[str], paths: list[Path]) -> list[str]:
    """Names of the runs; the folder stands in where two runs share a name, the whole path where that is shared too."""
    for candidates in (names, [path.resolve().name for path in paths]):
        if len(set(candidates)) == len(candidates):
            return candidates
    return [str(path) for path in paths]
