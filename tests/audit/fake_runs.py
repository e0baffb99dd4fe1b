"""Runs as their files look, audited and not, and the page of a report, read."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from megafish.audit.extraction import Extraction, record
from megafish.audit.levels import rate, summarize
from megafish.audit.membership import attack
from megafish.audit.probes import Probe
from megafish.audit.verdict import verdict
from megafish.audit.view import FORMAT, VERSION
from megafish.run import RunDir
from tests.audit.helpers import make_config

LEVELS = (0, 1, 8)
NASTY = "<script>alert('&')</script>"


class Letters:
    """A tokenizer of one piece, which a page must not take for markup."""

    def decode(self, ids: list[int]) -> str:
        return "".join(NASTY if i == 1 else chr(96 + i) for i in ids)


def fake_run(
    path: Path,
    name: str,
    k: int | None,
    *,
    trained: bool = True,
    audited: bool = True,
    canaries: bool = True,
    valid: bool = True,
) -> Path:
    """A run directory as training and audits leave it, without a model."""
    run = RunDir(path)
    run.save_config(make_config(name, Path("corpus"), path, k))
    if trained:
        kept = 75 if k else 100
        train = {"kind": "train", "lr": 1e-3, "grad_norm": 1.0, "drop_rate": 1 - kept / 100, "tokens_per_s": 1000.0}
        records: list[dict[str, Any]] = []
        for step in range(1, 121):
            spent = {"tokens": 100 * step, "supervised_tokens": kept * step}
            records.append({**train, **spent, "step": step, "loss": 5 - step / 60})
            if valid and step % 40 == 0:
                records.append({"kind": "valid", "step": step, "valid_loss": 4.0, "valid_bpb": 2.0})
            if k and step % 40 == 0:
                records.append({"kind": "dropped", "step": step, "loss_dropped": 4.5, "loss_kept": 3.0})
        text = "".join(json.dumps(record) + "\n" for record in records)
        run.metrics_file.write_text(text + '{"kind": "train", "step": 12', encoding="utf-8")
    for step in (60, 120) if audited else ():
        write_audit(run, name, k, step, canaries, valid)
    return path


def write_audit(run: RunDir, name: str, k: int | None, step: int, canaries: bool, valid: bool) -> None:
    items = []
    for number in range(3 * len(LEVELS) if canaries else 0):
        exposures = LEVELS[number // 3]
        suffix = [1, 2, 3, 4, 5, 6, 7, 8 + number]
        recited = not k and exposures == 8 and number % 3 < step / 60
        generated = suffix if recited else [1, 9, 3, 4, 5, 6, 7, 9]
        dropped = [False, True] + [False] * 6
        canary = Probe(number, exposures, np.asarray([2, 3, 4, *suffix]), "corpus", f"text/{NASTY}", 2.0)
        correct = [recited or i != 1 for i in range(8)]
        probability = -0.1 if recited else -5.0 - number
        losses, hits = [1.0 + number] * 8, [8 if recited else 1, 0]
        fields = (dropped, losses, correct, probability, hits)
        items.append(Extraction(canary, [2, 3, 4], suffix, generated, *fields))
    summary: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "run": name,
        "model": {"path": str(run.path), "parameters": 1000},
        "probes": [],
        "sweep": sweep_cells(k) if canaries else [],
        "beams": [{"set": "canaries", "beams": 30, "levels": beam_levels(k)}] if canaries else [],
        "membership": {"tokens": 20, **attack(*membership_groups())} if valid else None,
        "notes": [f"a note about {NASTY}"],
        "step": step,
        "samples": step,
        "tokens": 100 * step,
        "supervised_tokens": (75 if k else 100) * step,
        "settings": {"prompt_tokens": 3, "suffix_tokens": 8, "batch_size": 4, "loss_sequences": 4},
        "mask": {"k": k or 4, "reference": k is None},
        "extraction": summarize(items) if items else None,
        "losses": {
            "train": {"loss_kept": 3.0, "loss_dropped": 4.5, "tokens_kept": 30, "tokens_dropped": 10, "sequences": 4},
            "valid": {"loss": 4.4 if k else 4.0, "bits_per_byte": 2.0, "tokens": 9, "sequences": 1} if valid else None,
        },
    }
    summary["verdict"] = verdict(summary)
    folder = run.audit / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"set": "canaries", **record(item, Letters())}) + "\n" for item in items]
    (folder / "extraction.jsonl").write_text("".join(lines))


def sweep_cells(k: int | None) -> list[dict[str, Any]]:
    """Recited by a plain run: more the longer the prompt, less the farther into the passage it begins."""

    def levels(prompt: int, offset: int) -> list[dict[str, Any]]:
        most = 0 if k else max(0, prompt // 2 - offset)
        hits = {exposures: min(3, most) if exposures == 8 else 0 for exposures in LEVELS}
        scores = {"mean_prefix": 1.0, "extraction_strength": 0.5}
        return [
            {"exposures": e, "canaries": 3, **rate("exact", [True] * n + [False] * (3 - n)), **scores}
            for e, n in hits.items()
        ]

    return [
        {
            "set": "canaries",
            "prompt_tokens": prompt,
            "suffix_tokens": 8,
            "offset": offset,
            "levels": levels(prompt, offset),
        }
        for offset in (0, 1, 2)
        for prompt in (1, 3, 6)
    ]


def beam_levels(k: int | None) -> list[dict[str, Any]]:
    hits = [not k] * 3
    return [{"exposures": e, "canaries": 3, **rate("best", hits), **rate("any", hits)} for e in LEVELS]


def membership_groups() -> list[dict[str, np.ndarray]]:
    random = np.random.Generator(np.random.Philox(4))
    return [{name: random.normal(mean, 1, 150) for name in ("loss", "blind")} for mean in (0.5, 0.0)]


class Page(HTMLParser):
    """Checks that tags nest, and collects text and references."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check(page: Path) -> Page:
    """What every page promises: well formed, self-contained, no text taken for markup."""
    parsed = Page(page)
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in parsed.references)
    assert "script" not in parsed.tags
    assert "url(" not in page.read_text(encoding="utf-8") and "@import" not in page.read_text(encoding="utf-8")
    return parsed


def change_summary(run: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    file = run / "audit" / f"step_{step:08d}" / "summary.json"
    summary = json.loads(file.read_text())
    change(summary)
    file.write_text(json.dumps(summary))
