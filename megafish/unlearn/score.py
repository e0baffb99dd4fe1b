"""`megafish unlearn score`: what a model still knows of a forget set, what it has kept, whether it writes sense.

Every figure stands for the model and, where one is named, for the retain model beside it: a model that was trained
without the forget set is what forgetting aims at, and none of the figures has an ideal value of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from megafish.audit.membership import membership_scores
from megafish.audit.metrics import exact_memorization, extraction_strength
from megafish.audit.roc import auc
from megafish.audit.scores import TokenScores, token_scores
from megafish.config import UnlearnConfig
from megafish.decode.generate import for_decoding, generate
from megafish.errors import InputError
from megafish.model.load import LoadedRun, load_run
from megafish.run import write_atomic
from megafish.unlearn import metrics
from megafish.unlearn.data import Item, encode
from megafish.unlearn.readers import Pair, read_pairs
from megafish.unlearn.rounding import Rounding
from megafish.unlearn.stress import rounded

_COMPARED = ("model", "retain model")
NEW_TOKENS = 200
"""Most tokens of a generated answer (TOFU's)."""
ATTACKS = ("loss", "zlib", "min_k", "min_k++")


@dataclass(frozen=True)
class ItemScore:
    """Of one question and its answer."""

    question: str | None
    answer: str
    generated: str | None
    """Greedy answer; None for text without a question."""
    probability: float
    """exp(-mean loss of the answer's tokens, the one that ends it included)."""
    exact_memorization: float
    extraction_strength: float
    rouge: float | None
    truth_ratio: float | None
    """None where the row has no paraphrase or no wrong answers."""
    perplexity: float | None
    """Of the generated answer under the judge; None where it is empty."""
    distinct_2: float | None
    repetition: float | None
    brunet: float | None
    honore: float | None


@dataclass(frozen=True)
class Texts:
    """A set with its texts as tokens, all made by the template of the run that is scored."""

    name: str
    settings: UnlearnConfig
    pairs: list[Pair]
    items: list[Item]
    longest: int


def score_run(
    path: str | Path,
    *,
    forget: list[str],
    retain: list[str],
    holdout: list[str],
    retain_model: str | Path | None = None,
    roundings: Sequence[Rounding] = (),
    batch_size: int = 32,
    console: Console | None = None,
) -> Path:
    """Score a run, print the table and write summary.json and items.jsonl into the run; returns their folder.

    Sets that are not named are those of the unlearning run. retain_model: a run that never saw the forget set. The
    judge of fluency is that model, or the starting model of an unlearning run. roundings: the same figures of the model
    with rounded weights. Raises InputError.
    """
    console = console or Console()
    loaded = load_run(path)
    settings = loaded.config.unlearn
    named = {
        "forget": forget or (settings.forget if settings else []),
        "retain": retain or (settings.retain if settings else []),
    }
    if not named["forget"]:
        raise InputError(f"{path}: not an unlearning run: name the texts with --forget FILE")
    asked = settings or UnlearnConfig(model=str(path), method="ga", forget=named["forget"])
    longest = loaded.config.data.sequence_length
    sets = [_texts(name, files, asked, loaded, longest) for name, files in named.items() if files]
    unseen = _texts("holdout", holdout, asked, loaded, longest) if holdout else None
    peer = None if retain_model is None else _peer(retain_model, loaded)
    judge, judged_by = peer, str(retain_model)
    if judge is None and settings is not None:
        judge, judged_by = _peer(settings.model, loaded), settings.model

    models = {"model": loaded, **({} if peer is None else {"retain model": peer})}
    models |= {each.value: replace(loaded, model=rounded(loaded.model, each)) for each in roundings}
    summary: dict[str, Any] = {"run": str(path), "step": loaded.step, "judge": judged_by if judge else None}
    summary["models"] = {}
    lines = []
    for title, each in models.items():
        for_decoding(each.model)
        scores = {texts.name: _score(each, texts, judge, batch_size) for texts in sets}
        figures: dict[str, Any] = {name: _figures(found) for name, found in scores.items()}
        figures["forget"]["utility"] = None  # of what is kept
        if unseen is not None:
            figures["membership"] = _membership(each, sets[0], unseen, batch_size)
        summary["models"][title] = figures
        lines += [{"model": title, "set": name, **asdict(item)} for name, found in scores.items() for item in found]
        figures["ratios"] = [item.truth_ratio for item in scores["forget"] if item.truth_ratio is not None]
    _beside(summary)

    folder = loaded.run.path / "unlearning" / f"step_{loaded.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "items.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    console.print(_table(summary))
    if roundings:
        console.print(_rounded_table(summary))
    for note in _notes(summary):
        console.print(note, highlight=False)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return folder


def _texts(name: str, files: list[str], settings: UnlearnConfig, loaded: LoadedRun, longest: int) -> Texts:
    pairs = read_pairs(files, "retain" if name == "retain" else "forget")
    if any(pair.question is None for pair in pairs):  # cut to pieces, each of which is a text
        pieces = encode(pairs, settings, loaded.tokenizer, longest, f"--{name}")
        pairs = [Pair(None, loaded.tokenizer.decode(item.tokens)) for item in pieces]
        return Texts(name, settings, pairs, pieces, longest)
    return Texts(name, settings, pairs, encode(pairs, settings, loaded.tokenizer, longest, f"--{name}"), longest)


def _peer(path: str | Path, loaded: LoadedRun) -> LoadedRun:
    found = load_run(path)
    if found.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise InputError(f"{path}: has another tokenizer than {loaded.run.path}: their losses cannot be compared")
    return found


def _score(loaded: LoadedRun, texts: Texts, judge: LoadedRun | None, batch_size: int) -> list[ItemScore]:
    """Every text of a set."""
    answers = _losses(loaded, texts.items, batch_size)
    ratios = _ratios(loaded, texts, batch_size)
    asked = [i for i, pair in enumerate(texts.pairs) if pair.question is not None]
    prompts = [texts.items[i].tokens[: texts.items[i].start] for i in asked]
    outputs = generate(
        loaded.model, loaded.tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=batch_size, progress=True
    )
    written = dict(zip(asked, outputs, strict=True))
    spoken = [i for i in asked if written[i]]
    perplexities: dict[int, float] = {}
    if judge is not None and spoken:
        whole = [
            Item((*texts.items[i].tokens[: texts.items[i].start], *written[i]), texts.items[i].start) for i in spoken
        ]
        losses = [float(-scores.log_prob.mean()) for scores in _losses(judge, whole, batch_size)]
        perplexities = {i: float(np.exp(min(loss, 700.0))) for i, loss in zip(spoken, losses, strict=True)}
    found = []
    for i, (pair, scores) in enumerate(zip(texts.pairs, answers, strict=True)):
        correct = scores.correct[:-1] if len(scores.correct) > 1 else scores.correct
        text, words = None, None
        if i in written:
            given = texts.items[i].tokens[: texts.items[i].start]
            text = loaded.tokenizer.decode([*given, *written[i]])[len(loaded.tokenizer.decode(given)) :].strip()
            words = metrics.words_of(text)
        found.append(
            ItemScore(
                pair.question,
                pair.answer,
                text,
                float(np.exp(scores.log_prob.mean())),
                exact_memorization(correct),
                extraction_strength(correct),
                None if text is None else metrics.rouge_recall(pair.answer, text),
                ratios[i],
                perplexities.get(i),
                None if words is None else metrics.distinct(words, 2),
                None if words is None else metrics.repetition(words),
                None if words is None else metrics.brunet(words),
                None if words is None else metrics.honore(words),
            )
        )
    return found


def _losses(loaded: LoadedRun, items: Sequence[Item], batch_size: int) -> list[TokenScores]:
    """Scores of the answers' tokens alone."""
    found = token_scores(loaded.model, [item.tokens for item in items], batch_size=batch_size)
    return [
        TokenScores(
            scores.log_prob[item.start - 1 :], scores.correct[item.start - 1 :], scores.likeliest[item.start - 1 :]
        )
        for item, scores in zip(items, found, strict=True)
    ]


def _ratios(loaded: LoadedRun, texts: Texts, batch_size: int) -> list[float | None]:
    """Truth ratio of each row that has a paraphrase and wrong answers."""
    rows = [i for i, pair in enumerate(texts.pairs) if pair.paraphrase and pair.wrong]
    pairs, counts = [], []
    for i in rows:
        pair = texts.pairs[i]
        said = [pair.paraphrase or "", *pair.wrong]
        pairs += [Pair(pair.question, answer) for answer in said]
        counts.append(len(said))
    found: list[float | None] = [None] * len(texts.pairs)
    if rows:
        items = encode(pairs, texts.settings, loaded.tokenizer, texts.longest, f"--{texts.name}")
        losses = [float(-scores.log_prob.mean()) for scores in _losses(loaded, items, batch_size)]
        starts = np.cumsum([0, *counts])
        for i, start, end in zip(rows, starts[:-1], starts[1:], strict=True):
            found[i] = metrics.truth_ratio(losses[start], losses[start + 1 : end])
    return found


def _figures(items: list[ItemScore]) -> dict[str, float | None]:
    """Means over a set; of what none of its rows has, None."""

    def mean(name: str) -> float | None:
        values = [value for item in items if (value := getattr(item, name)) is not None]
        return float(np.mean(values)) if values else None

    names = ("probability", "exact_memorization", "extraction_strength", "rouge", "truth_ratio", "distinct_2",
             "repetition", "brunet", "honore")  # fmt: skip
    found = {name: mean(name) for name in names}
    perplexities = [item.perplexity for item in items if item.perplexity is not None]
    found["perplexity"] = float(np.median(perplexities)) if perplexities else None
    written = [item for item in items if item.generated is not None]
    found["empty"] = float(np.mean([not item.generated for item in written])) if written else None
    found["linguistic_score"] = None
    if perplexities and found["brunet"] is not None and found["honore"] is not None:
        mean_perplexity = float(np.mean(perplexities))
        found["linguistic_score"] = metrics.linguistic_score(mean_perplexity, found["brunet"], found["honore"])
    ratios = [item.truth_ratio for item in items if item.truth_ratio is not None]
    parts = [found["probability"], found["rouge"]]
    if ratios:
        parts.append(float(np.mean([max(0.0, 1 - ratio) for ratio in ratios])))
    found["utility"] = None
    if all(part is not None for part in parts):
        found["utility"] = metrics.harmonic_mean([part for part in parts if part is not None])
    return found


def _membership(loaded: LoadedRun, forget: Texts, unseen: Texts, batch_size: int) -> dict[str, float]:
    """AUC of attacks that tell the forget set from texts that were never seen."""
    found = []
    for texts in (forget, unseen):
        tokens = [item.tokens for item in texts.items]
        scores = token_scores(loaded.model, tokens, batch_size=batch_size, moments=True)
        found.append(membership_scores(scores, [loaded.tokenizer.decode(text) for text in tokens]))
    return {attack: auc(found[0][attack], found[1][attack]) for attack in ATTACKS}


def _beside(summary: dict[str, Any]) -> None:
    """What takes both models."""
    models = summary["models"]
    ratios = {title: figures.pop("ratios") for title, figures in models.items()}
    if "retain model" not in models:
        return
    if ratios["model"]:
        quality = metrics.forget_quality(ratios["model"], ratios["retain model"])
        summary["forget_quality"] = quality._asdict()
    if "membership" in models["model"]:
        pairs = {name: [models[title]["membership"][name] for title in _COMPARED] for name in ATTACKS}
        summary["privacy_leak"] = {name: metrics.privacy_leak(*values) for name, values in pairs.items()}


_ROWS = {
    "probability": "probability of the answer",
    "rouge": "ROUGE-L recall of what it writes",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "truth_ratio": "truth ratio",
    "utility": "utility",
    "perplexity": "perplexity of what it writes, median",
    "distinct_2": "different pairs of words",
    "repetition": "share of the most frequent word",
    "empty": "empty answers",
    "linguistic_score": "Linguistic Score",
}


def _table(summary: dict[str, Any]) -> Table:
    models = summary["models"]
    columns = [
        (name, title)
        for name in ("forget", "retain")
        for title in _COMPARED
        if title in models and name in models[title]
    ]
    table = Table(title=f"{summary['run']}, step {summary['step']}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for name, title in columns:
        table.add_column(name if title == "model" else f"{name}, retain model", justify="right")
    for key, label in _ROWS.items():
        values = [models[title][name][key] for name, title in columns]
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else f"{value:.3g}" for value in values))
    return table


def _rounded_table(summary: dict[str, Any]) -> Table:
    """What rounding the weights brings back."""
    table = Table(title="with weights rounded", box=box.SIMPLE_HEAD, title_justify="left")
    models = {title: figures for title, figures in summary["models"].items() if title != "retain model"}
    table.add_column("")
    for title in models:
        table.add_column("as it is" if title == "model" else title, justify="right")
    for name in (name for name in ("forget", "retain") if name in models["model"]):
        for key in ("probability", "rouge", "extraction_strength"):
            values = [figures[name][key] for figures in models.values()]
            if any(value is not None for value in values):
                cells = ("" if value is None else f"{value:.3g}" for value in values)
                table.add_row(f"{name}: {_ROWS[key]}", *cells)
    return table


def _notes(summary: dict[str, Any]) -> list[str]:
    found = []
    if "forget_quality" in summary:
        quality = summary["forget_quality"]
        found.append(f"forget quality: p = {quality['p_value']:.3g}, KS statistic {quality['statistic']:.3f}")
    for title, figures in summary["models"].items():
        if "membership" in figures:
            areas = ", ".join(f"{name} {value:.3f}" for name, value in figures["membership"].items())
            found.append(f"membership AUC, {title}: {areas}")
    if "privacy_leak" in summary:
        found.append("PrivLeak: " + ", ".join(f"{name} {x:+.1f} %" for name, x in summary["privacy_leak"].items()))
    if summary["judge"] is not None:
        found.append(f"perplexity is under {summary['judge']}")
    return found
