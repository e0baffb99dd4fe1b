from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megafish.audit.audit_panels import audit_panels
from megafish.audit.laws import laws
from megafish.audit.levels import rate
from megafish.audit.panels import memorization_panels
from megafish.audit.report import _tiles, findings, missing, report, unlike_audits
from megafish.audit.rows import comparison, membership_reasons, membership_rows, probe_rows, settings_rows
from megafish.audit.samples import choose_samples
from megafish.audit.verdict import verdict
from megafish.audit.view import load_views, read_lines
from megafish.errors import InputError
from tests.audit.fake_runs import NASTY, change_summary, check, fake_run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their plots, for tests of what they say: drawing takes seconds."""
    monkeypatch.setattr("megafish.audit.report.draw", lambda panel, theme: None)
    monkeypatch.setattr("megafish.audit.report.to_png", lambda figure: b"")
    monkeypatch.setattr("megafish.audit.report.to_svg", lambda figure: b"")


def test_one_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "gold", "gold", 4)
    page = report([run])
    assert page == run / "report.html"
    parsed = check(page)
    assert "which had stood 8 times in the corpus and about 16 times in what it read" in parsed.text
    assert NASTY in parsed.text, "the canaries' text is shown as it is"
    pngs = {entry.name for entry in (run / "plots").iterdir()}
    assert {
        "memorization.png",
        "memorization_over_training.png",
        "divergence.png",
        "loss.png",
        "dropped_loss.png",
        "prompt_length.png",
        "offset.png",
        "rouge_l_histogram.png",
        "tries.png",
        "closeness.png",
        "membership.png",
    } <= pngs
    assert parsed.tags.count("figure") == len(pngs)
    assert not list(run.rglob("*.tmp"))


def test_several_runs(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / "a", "plain", None),
        fake_run(tmp_path / "b", "gold", 4),
        fake_run(tmp_path / "c", "gold8", 8),
    ]
    page = report(runs, tmp_path / "out" / "deep")
    assert page == tmp_path / "out" / "deep" / "report.html"
    parsed = check(page)
    assert "Side by side" in parsed.text
    assert {"divergence_1.png", "divergence_2.png"} <= {entry.name for entry in (page.parent / "plots").iterdir()}


def test_comparison_gives_values_and_differences(tmp_path: Path) -> None:
    runs = load_views([fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)])
    rows = {row.label: [(cell.value, cell.note) for cell in row.cells] for row in comparison(runs)}
    assert rows["Supervised tokens"] == [("12k", ""), ("9000", "-25.0 %")]
    assert rows["Validation loss"] == [("4.000", ""), ("4.400", "+10.0 %")]
    assert rows["Recited, 8 copies"] == [("67 %", "2 of 3"), ("0 %", "0 of 3; -67 points")]
    assert rows["Recited, 1 copy"] == [("0 %", "0 of 3"), ("0 %", "0 of 3; +0 points")]
    assert rows["Length recited, most copies"] == [("5.7", ""), ("1.0", "-82.4 %")]
    assert rows["Recited, control"][0] == ("0 %", "0 of 3")
    assert rows["Loss, dropped tokens"][0] == ("4.500", "mask not used in training")
    assert rows["Within 10 % of edits, most copies"] == [("67 %", ""), ("0 %", "-67 points")]
    assert rows["Drawn at least once, most copies"] == [("67 %", "of 2 draws"), ("0 %", "of 2 draws; -67 points")]
    assert rows["Found by 30 beams, most copies"] == [("100 %", ""), ("0 %", "-100 points")]
    assert [note for _, note in rows["Membership inference, best AUC"]] == ["loss", "loss"], "not the blind one"


def test_views(tmp_path: Path) -> None:
    plain, gold = load_views([fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)])
    assert (plain.masked, gold.masked) == (False, True) and (plain.index, gold.index) == (0, 0)
    assert [audit["step"] for audit in gold.audits] == [60, 120]
    assert gold.summary is not None and gold.summary["step"] == 120
    assert len(gold.metrics["train"]) == 120, "the line that was cut off is left out"
    assert gold.last("train", "supervised_tokens") == 9000 and gold.last("train", "nothing") is None
    assert not plain.divergence_mask and gold.divergence_mask
    assert plain.valid("loss") == 4.0
    same = load_views([fake_run(tmp_path / "c", "gold", 4), fake_run(tmp_path / "d", "gold", 4)])
    assert [view.name for view in same] == ["c", "d"]
    assert [view.index for view in same] == [0, 1]
    assert [view.name for view in load_views([tmp_path / "c", tmp_path / "c"])] == [str(tmp_path / "c")] * 2


def test_samples_are_the_worst_cases(tmp_path: Path) -> None:
    runs = load_views([fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)])
    samples = choose_samples(runs)
    assert [sample.heading.split(":")[0] for sample in samples] == ["8 copies", "8 copies", "control, not planted"]
    worst = samples[0]
    assert [output.verdict for output in worst.outputs] == [
        "all 8 tokens recited",
        "1 of 8 tokens recited, ROUGE-L 0.75",
    ]
    assert [piece.style for piece in worst.outputs[0].pieces] == ["same"]
    assert [(p.text, p.style) for p in worst.outputs[1].pieces] == [
        (NASTY, "same"), ("i", "off"), ("cdefg", "again"), ("i", "off")
    ]  # fmt: skip
    assert worst.mask_of == "gold" and [(p.text, p.style) for p in worst.truth][:2] == [(NASTY, ""), ("b", "drop")]
    assert choose_samples(runs[:1])[0].mask_of == "", "a mask that was not used is not marked"


def test_findings_and_settings(tmp_path: Path) -> None:
    plain, gold = load_views([fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)])
    assert findings(plain) == [
        "plain: the difference to passages that were not planted is +67 points (95 % interval -6 to +94). Given 3 "
        "tokens, it was asked for the next 8, which had stood 8 times in the corpus and about 16 times in what it read."
    ]
    assert (
        "of the 3 passages with 8 or more copies that it did not recite, it left 3 at a dropped token or right after"
        in findings(gold)[1]
    )
    rows = settings_rows([plain, gold])
    assert rows[0].label == "goldfish.k" and [cell.value for cell in rows[0].cells] == ["none", "4"]
    assert "optimizer.lr" in {row.label for row in rows}


def test_findings_of_the_control_group_alone(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)

    def leave_control(summary: dict[str, Any]) -> None:
        summary["extraction"].update(levels=summary["extraction"]["levels"][:1])
        summary["verdict"] = verdict(summary)

    change_summary(run, 120, leave_control)
    [finding] = findings(load_views([run])[0])
    assert finding.startswith("run: of 3 control passages that were not planted, 0 were continued word for word")
    assert finding.endswith("no passage was planted, so this says nothing about memorization.")


def test_tokens_are_those_of_the_audited_checkpoint(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)]
    paths.append(fake_run(tmp_path / "c", "new", 4, audited=False))
    shutil.rmtree(paths[1] / "audit" / "step_00000120")
    runs = load_views(paths)
    rows = {row.label: [cell.value for cell in row.cells] for row in comparison(runs)}
    assert rows["Audited step"] == ["120", "60", "not audited"]
    assert rows["Supervised tokens"] == ["12k", "4500", "9000"]
    assert rows["Input tokens"] == ["12k", "6000", "12k"]
    assert ("4500", "supervised tokens", "6000 read") in _tiles(runs[1])


@pytest.mark.usefixtures("undrawn")
def test_audits_with_unlike_settings_are_pointed_out(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)]
    assert unlike_audits(load_views(paths)) == []
    assert "different settings" not in check(report(paths, tmp_path / "alike")).text
    change_summary(paths[1], 120, lambda summary: summary["settings"].update(prompt_tokens=2))
    assert unlike_audits(load_views(paths)) == [
        "plain, steps 60, 120: 3 tokens given, 8 asked for",
        "gold, step 60: 3 tokens given, 8 asked for",
        "gold, step 120: 2 tokens given, 8 asked for",
    ]
    text = check(report(paths, tmp_path / "unlike")).text
    assert "different settings" in text and "gold, step 120: 2 tokens given, 8 asked for" in text


@pytest.mark.usefixtures("undrawn")
def test_a_random_mask_has_no_marks(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", 4)
    change_summary(run, 120, lambda summary: summary["mask"].update(scheme="random"))
    runs = load_views([run])
    assert runs[0].masked and not runs[0].divergence_mask
    assert {sample.mask_of for sample in choose_samples(runs)} == {""}
    rows = {row.label: [(cell.value, cell.note) for cell in row.cells] for row in comparison(runs)}
    assert rows["Loss, dropped tokens"] == [("4.500", "")], "its own mask, though not one that marks documents"
    text = check(report([run])).text
    assert "loss, dropped" not in text and "token left out of the loss" not in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("options", "what", "command"),
    [
        ({"trained": False, "audited": False}, "has not been trained yet", "megafish train"),
        ({"audited": False}, "has not been audited yet", "megafish audit"),
        ({"canaries": False}, "without canaries", "--canaries 16"),
        ({"valid": False}, "no validation loss", "--valid-fraction 0.01"),
    ],
)
def test_a_page_says_what_is_missing(tmp_path: Path, options: dict[str, bool], what: str, command: str) -> None:
    run = fake_run(tmp_path / "run", "run", 4, **options)
    parsed = check(report([run]))
    assert what in parsed.text and command in parsed.text
    [item] = missing(load_views([run])[0])
    assert what in item.what and command in item.command


@pytest.mark.usefixtures("undrawn")
def test_an_untrained_run_beside_a_complete_one(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "new", 4, trained=False, audited=False)
    parsed = check(report([fake_run(tmp_path / "full", "full", None), run], tmp_path / "both"))
    assert "new has not been trained yet" in parsed.text and "not known" in parsed.text


def test_nothing_is_missing_from_a_complete_run(tmp_path: Path) -> None:
    assert missing(load_views([fake_run(tmp_path / "run", "run", 4)])[0]) == []


def test_a_first_step_is_enough_for_a_page(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", 4, audited=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0].replace('"loss": ', '"loss": NaN, "was": ') + "\n")
    check(report([run]))


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        report([tmp_path])


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", 4)
    (run / "audit" / "step_00000120" / "summary.json").write_text("{")
    with pytest.raises(InputError, match=re.escape("step_00000120")):
        report([run])


def test_an_audit_of_another_version_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", 4)
    file = run / "audit" / "step_00000120" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(InputError, match=r"version 99.*megafish audit .*--step 120"):
        report([run])


def test_read_lines_splits_at_line_feeds_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = ["a\u2028b", "a\u2029b", "a\u0085b", "a\r\nb"]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [item["text"] for item in read_lines(file)] == texts


def test_read_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert read_lines(file) == []
    file.write_bytes(b'{"a": 1}\n[2]\nno\n\n{"b": "\xff"}\n{"c"')
    assert [list(item) for item in read_lines(file)] == [["a"], ["b"]]


@pytest.mark.usefixtures("undrawn")
def test_the_verdict_stands_first(tmp_path: Path) -> None:
    plain, gold = fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)
    text = check(report([plain])).text
    assert text.index("2 of 3 passages with 8 copies come out word for word") < text.index("extraction by copies")
    assert "No recitation shown" in check(report([gold])).text
    assert f"gold: a note about {NASTY}" in check(report([gold])).text


@pytest.mark.usefixtures("undrawn")
def test_membership_is_told_with_its_intervals(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)
    [view] = load_views([run])
    rows = {row.label: row.cells for row in membership_rows(view)}
    assert set(rows) == {"loss", "blind"}
    assert view.summary is not None
    loss = view.summary["membership"]["attacks"]["loss"]
    assert rows["loss"][0].value == f"{loss['auc']:.3f}" and rows["loss"][0].note.startswith(f"{loss['low']:.3f} to")
    assert rows["loss"][1].value.endswith(" %") and rows["loss"][2].value == "not known"
    reason = "true positives at 0.1 % false ones: needs at least 1000 non-members, there are 150"
    assert membership_reasons(view) == [reason], "once, not for every attack"
    assert reason in check(report([run])).text


def test_laws(tmp_path: Path) -> None:
    """Prompt lengths 1, 3, 6 bring 0, 1 and 3 of 3 canaries of the plain run; two numbers of copies are no line."""
    runs = load_views([fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)])
    found = {(law.run, law.against): law for law in laws(runs)}
    fitted = found["plain", "tokens given"]
    assert fitted.x == [1, 3, 6] and fitted.y == pytest.approx([0, 1 / 3, 1])
    assert fitted.fit is not None and fitted.fit.slope == pytest.approx(1.2318, abs=1e-4)
    assert found["plain", "copies"].reason == "2 different values: a line fits any two"
    assert found["gold", "tokens given"].reason == "the rate is 0% at all of them"
    assert not any(law.against == "parameters" for law in found.values()), "all models have one size"


def test_laws_are_drawn_where_they_are_fitted(tmp_path: Path) -> None:
    plain, gold = load_views([fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4)])
    panel = next(panel for panel in audit_panels([plain, gold]) if panel.name == "prompt_length")
    [fit] = [series for series in panel.series if series.fit]
    law = next(law for law in laws([plain]) if law.against == "tokens given")
    assert list(fit.x) == [1, 3, 6] and not fit.masked, "the run with the mask recites at none of them"
    # Least squares of 0, 1/3, 1 against the logarithms of 1, 3, 6.
    assert list(fit.y) == pytest.approx([-0.0709, 0.5168, 0.8876], abs=1e-3)
    assert law.at(6) == fit.y[-1]


def test_the_line_over_copies_leaves_the_control_group_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)

    def add(summary: dict[str, Any]) -> None:
        first, *others = summary["extraction"]["levels"]
        more = [{**others[-1], "exposures": e, **rate("exact", [True] * n + [False] * (3 - n))} for e, n in ((64, 3),)]
        summary["extraction"]["levels"] = [first, *others, *more]

    change_summary(run, 120, add)
    [view] = load_views([run])
    panel = memorization_panels([view])[0]
    [fit] = [series for series in panel.series if series.fit]
    assert panel.ticks == ["0\ncontrol", "1", "8", "64"] and list(fit.x) == [1, 2, 3]
    # Rates 0, 2/3 and 1 at logarithms 0, 1 and 2 of base 8: slope 1/2 a step, mean 5/9.
    assert list(fit.y) == pytest.approx([1 / 18, 5 / 9, 19 / 18])


def test_runs_by_size_and_by_k(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / name, name, k) for name, k in (("a", None), ("b", 4), ("c", 8), ("d", None))]
    for step in (60, 120):
        change_summary(paths[3], step, lambda summary: summary["model"].update(parameters=10_000))
    page = report(paths, tmp_path / "out")
    check(page)
    names = {entry.name for entry in (tmp_path / "out" / "plots").iterdir()}
    assert {"model_size.png", "k.png"} <= names
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["name"] for run in data["runs"]] == ["a", "b", "c", "d"]
    assert data["runs"][0]["audit"]["verdict"]["recites"] in (True, False)
    law = next(law for law in data["laws"] if law["against"] == "parameters")
    assert law["fit"] is None and law["x"] == [1000.0, 10_000.0]


@pytest.mark.usefixtures("undrawn")
def test_the_figures_as_data(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / "a", "plain", None), fake_run(tmp_path / "b", "gold", 4, trained=False)]
    file = paths[0] / "metrics.jsonl"
    lines = file.read_text().splitlines()[:3]
    file.write_text("".join(line.replace('"loss": 4', '"loss": NaN, "was": 4') + "\n" for line in lines))
    page = report(paths, tmp_path / "out")
    text = (page.parent / "report.json").read_text()
    assert "NaN" not in text, "no JSON has it"
    data = json.loads(text)
    assert (data["format"], data["version"]) == ("megafish-report", 1)
    rows = {row["what"]: row for row in data["comparison"]}
    assert rows["Recited, 8 copies"]["values"] == pytest.approx([2 / 3, 0])
    assert rows["Audited step"]["values"] == [120, 120]
    plots = {plot["name"]: plot for plot in data["plots"]}
    assert set(plots) == {entry.stem for entry in (page.parent / "plots").iterdir()}
    memorized = plots["memorization"]
    assert (memorized["y"], memorized["ticks"]) == ("canaries", ["0\ncontrol", "1", "8"])
    plain = memorized["series"][0]
    assert plain["label"] == "plain" and plain["y"] == pytest.approx([0, 0, 2 / 3]) and not plain["fit"]
    assert plain["low"][2] < 2 / 3 < plain["high"][2]
    assert plots["loss"]["series"][0]["y"] == [None] * 3


def test_passages_of_other_sets(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)

    def add(summary: dict[str, Any]) -> None:
        level = {**summary["extraction"]["levels"][-1], "exposures": None, "effective_exposures": None}
        rates = [rate("exact", [True] * n + [False] * (3 - n)) for n in (0, 1, 2)]
        known = [{**level, "exposures": 10**n, **rates[n]} for n in range(3)]
        summary["probes"] = [
            {"name": "letters", "kind": "text", "levels": [level], "divergence": None, "canaries": 3},
            {"name": "books", "kind": "corpus", "levels": known, "divergence": None, "canaries": 9},
        ]

    change_summary(run, 120, add)
    text = check(report([run])).text
    assert "passages of letters" in text and "not known" in text
    assert "passages of books" in text and "100 and more" in text
    [view] = load_views([run])
    [panel] = [panel for panel in audit_panels([view]) if panel.name == "occurrences"]
    points, fit = panel.series
    assert points.label == "books" and list(points.x) == [1, 10, 100], "of letters nothing is known"
    law = next(law for law in laws([view]) if law.against == "occurrences in books")
    assert law.fit is not None and law.fit.slope == pytest.approx(1 / 3) and fit.fit
    assert list(fit.y) == pytest.approx([0, 1 / 3, 2 / 3])


def test_bins_of_occurrences_stand_at_their_mean(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)

    def add(summary: dict[str, Any]) -> None:
        level = summary["extraction"]["levels"][-1]
        means, rates = (1.0, 10.0, 1000.0), [rate("exact", [True] * n + [False] * (3 - n)) for n in (0, 1, 3)]
        known = [
            {**level, "exposures": least, "occurrences": mean, "effective_exposures": 2 * mean, **share}
            for least, mean, share in zip((1, 8, 900), means, rates, strict=True)
        ]
        summary["probes"] = [{"name": "books", "kind": "corpus", "levels": known, "divergence": None, "canaries": 9}]

    change_summary(run, 120, add)
    [view] = load_views([run])
    assert view.summary is not None
    rows = probe_rows(view.summary["probes"][0])
    assert [row.label for row in rows] == ["1", "8 and more, mean 10.0", "900 and more, mean 1000.0"]
    assert [row.cells[0].value for row in rows] == ["2", "20", "2000"]
    law = next(law for law in laws([view]) if law.against == "occurrences in books")
    assert law.x == [1, 10, 1000] and law.fit is not None and law.fit.slope == pytest.approx(1 / 3)
    [panel] = [panel for panel in audit_panels([view]) if panel.name == "occurrences"]
    assert list(panel.series[0].x) == [1, 10, 1000]


def test_plots_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)
    report([run])
    plots = run / "plots"
    (plots / "mine.png").write_bytes(b"")
    drawn = {path.name for path in plots.iterdir()}
    assert {"memorization.png", "loss.png", "mine.png"} <= drawn
    (run / "metrics.jsonl").unlink()
    report([run])
    left = {path.name for path in plots.iterdir()}
    assert "loss.png" not in left and {"memorization.png", "mine.png"} <= left
    assert report([run], step=60) == run / "report_step_00000060" / "report.html"


def test_the_audit_of_a_step(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "run", None)
    early, late = (load_views([run], step)[0] for step in (60, None))
    assert (early.summary or {})["step"] == 60 and (late.summary or {})["step"] == 120
    assert [audit["step"] for audit in late.audits] == [60, 120] and len(early.audits) == 1
    assert (
        json.loads((report([run], tmp_path / "page", step=60).parent / "report.json").read_text())["runs"][0]["audit"]
        == early.summary
    )
    with pytest.raises(
        InputError, match=r"no audit of step 90: there are those of 60, 120 \(megafish audit .* --step 90"
    ):
        load_views([run], 90)


@pytest.mark.usefixtures("undrawn")
def test_a_model_that_was_not_trained_here(tmp_path: Path) -> None:
    """What is audited without its training: no metrics, no step, nothing known of data, mask and tokens."""
    run = fake_run(tmp_path / "model", "model", 4, trained=False)
    shutil.rmtree(run / "audit" / "step_00000060")

    def forget(summary: dict[str, Any]) -> None:
        level = {**summary["extraction"]["levels"][-1], "exposures": None, "effective_exposures": None}
        summary.update(dict.fromkeys(("samples", "tokens", "supervised_tokens", "mask", "extraction", "membership")))
        summary.update(sweep=[], beams=[], losses={"train": None, "valid": None})
        summary["probes"] = [{"name": "letters", "kind": "text", "levels": [level], "divergence": None, "canaries": 3}]
        summary["verdict"] = verdict(summary)

    change_summary(run, 120, forget)
    file = run / "audit" / "step_00000120" / "extraction.jsonl"
    records = [{**item, "set": "letters", "exposures": None, "dropped": None} for item in read_lines(file)]
    file.write_text("".join(json.dumps(item) + "\n" for item in records))
    [view] = load_views([run])
    assert missing(view) == [] and not view.trained_here
    assert [row.label for row in settings_rows([view]) if not row.label.startswith("model.")] == [
        "data.sequence_length"
    ]
    samples = choose_samples([view])
    assert [sample.heading.split(":")[0] for sample in samples] == ["letters", "letters"]
    text = check(report([run])).text
    assert "has not been trained" not in text and "No verdict" in text and "Training loss" not in text
    assert "Canaries are passages" not in text

    beside = load_views([run, fake_run(tmp_path / "b", "gold", 4)])
    rows = {row.label: [cell.value for cell in row.cells] for row in settings_rows(beside)}
    assert rows["goldfish.k"] == ["not known", "4"] and rows["train.steps"] == ["not known", "20"]
    check(report([run, tmp_path / "b"], tmp_path / "both"))

    change_summary(run, 120, lambda summary: summary.update(probes=[]))
    [item] = missing(load_views([run])[0])
    assert "no passages were named" in item.what and item.command.endswith("audit.probes=[TEXTS]")
