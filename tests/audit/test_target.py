from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megafish.audit.audit import audit_run
from megafish.audit.report import report
from megafish.audit.target import load_target
from megafish.errors import InputError
from megafish.huggingface.export import export
from megafish.huggingface.importer import import_model
from tests.audit.helpers import STEP, Runs


@pytest.fixture(scope="module")
def exported(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "plain-hf"
    export(runs.plain, folder, progress=False)
    return folder


def audit(path: Path, **options: Any) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=80)
    return audit_run(path, progress=False, console=console, **options).summary


AUDIT = [
    "audit.prompt_tokens=24",
    "audit.suffix_tokens=16",
    "audit.membership=4",
    "audit.membership_tokens=20",
    "audit.loss_sequences=6",
]


def test_an_exported_folder_gives_the_figures_of_its_run(runs: Runs, exported: Path, tmp_path: Path) -> None:
    settings = ["audit.prompt_lengths=[8,16]", "audit.offsets=[0]", "audit.beams=[3]", "audit.samples=2"]
    own = audit(runs.plain, overrides=settings)
    data = [f"data.train={runs.corpus}", "data.sequence_length=64", "goldfish.h=5", "eval.sequences=3"]
    theirs = audit(exported, overrides=[*data, *AUDIT, *settings], output=tmp_path / "out")
    for key in ("sweep", "beams", "probes", "verdict"):
        assert own[key] == theirs[key], key
    levels = [summary["extraction"]["levels"] for summary in (own, theirs)]
    for mine, other in zip(*levels, strict=True):
        assert other.pop("effective_exposures") is None, "how much it was trained on is not on record"
        assert mine.pop("effective_exposures") is not None
        assert mine.pop("discoverable") == other.pop("discoverable")
        assert mine == pytest.approx(other)
    assert own["losses"]["valid"]["loss"] == pytest.approx(theirs["losses"]["valid"]["loss"])
    assert own["mask"] == theirs["mask"]
    assert (theirs["samples"], theirs["tokens"], theirs["step"]) == (None, None, 0)
    page = report([tmp_path / "out"], None).read_text()
    assert "plain-hf" in page and "has not been trained" not in page


def test_an_imported_run_is_audited_like_the_folder(runs: Runs, exported: Path, tmp_path: Path) -> None:
    run = import_model(exported, tmp_path / "imported", progress=False).run
    with pytest.raises(InputError, match="nothing to audit it with"):
        audit(run.path)
    summary = audit(run.path, overrides=[f"data.train={runs.corpus}", *AUDIT])
    assert summary["verdict"]["recites"] is True and summary["samples"] is None


def test_text_alone(exported: Path, tmp_path: Path) -> None:
    """Nothing is known of the training: passages are continued, and the rest is left away."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "abc def ghi " * 30}))
    overrides = [f"audit.probes=[{text}]", *AUDIT]
    summary = audit(exported, overrides=overrides, output=tmp_path / "out")
    assert summary["extraction"] is None and summary["mask"] is None and summary["membership"] is None
    assert summary["losses"] == {"train": None, "valid": None}
    assert summary["verdict"]["recites"] is None
    [found] = summary["probes"]
    assert found["kind"] == "text" and found["levels"][0]["exposures"] is None and found["levels"][0]["canaries"] == 1


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {}, "nothing to audit it with"),
        (["train.steps=3"], {}, "takes settings of the sections audit, data, eval and goldfish"),
        ([], {"step": 3}, "has no steps"),
        (["data.train=nowhere"], {}, "nowhere: neither a folder"),
    ],
)
def test_what_an_export_cannot_be_asked(
    exported: Path, tmp_path: Path, overrides: list[str], options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        audit(exported, overrides=overrides, output=tmp_path / "out", **options)


def test_output_is_for_models_from_elsewhere(runs: Runs, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is written into the run"):
        audit(runs.plain, output=tmp_path / "out")
    with pytest.raises(InputError, match="holds a run: name another --output"):
        audit(exported, output=runs.plain)


def test_another_tokenizer(runs: Runs, exported: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(runs.corpus, corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not the tokenizer of"):
        audit(exported, overrides=[f"data.train={corpus}"], output=tmp_path / "out")
    with pytest.raises(InputError, match="not the tokenizer of"):
        audit(runs.plain, overrides=[f"audit.probes=[{corpus}]"])


def test_passages_longer_than_the_context(runs: Runs) -> None:
    with pytest.raises(InputError, match=r"passages of 70 tokens .* longer than the 64 the model was trained on"):
        audit(runs.plain, overrides=["audit.prompt_tokens=54"])
    with pytest.raises(InputError, match=r"passage \d+ has 40 tokens, the sweep needs 48"):
        audit(runs.plain, overrides=["audit.offsets=[8]"])


def test_state(runs: Runs) -> None:
    target = load_target(runs.goldfish)
    assert target.step == STEP and target.spent is not None and target.spent["supervised_tokens"] == 10_000
    assert target.folder == runs.goldfish / "audit" / f"step_{STEP:08d}"
