"""`megafish unlearn data`: every generated set and the corpora to train on, as files in one folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from megafish.config import UnlearnConfig
from megafish.errors import InputError
from megafish.run import write_atomic
from megafish.unlearn.fiction.authors import RELATIONS, authors
from megafish.unlearn.fiction.book import book
from megafish.unlearn.fiction.decline import declined
from megafish.unlearn.fiction.hazards import HAZARD, NEIGHBOUR, substances
from megafish.unlearn.fiction.unsafe import harmless_questions, unsafe_questions
from megafish.unlearn.fiction.world import world_choices, world_facts

SHARES = (1, 5, 10)
"""Per cent of the authors that are to be forgotten, TOFU's splits."""
TEMPLATE = UnlearnConfig.model_fields["template"].default
"""How a question and its answer stand in the corpora: unlearn.template's default."""

Rows = list[dict[str, Any]]


def write_data(
    folder: str | Path,
    *,
    seed: int = 0,
    authors_count: int = 200,
    substances_count: int = 25,
    scenes: int = 40,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write all sets below `folder` and return the number of rows of each file.

    authors/: TOFU's files. hazards/: corpora and questions with choices. unsafe/, book/. corpus/full.jsonl holds a text
    for all that a model is to know; corpus/retain.jsonl the same without what is to be forgotten: 10 % of the authors,
    the hazardous substances, the answers that do harm, the book. Raises InputError.
    """
    if authors_count < 10:
        raise InputError(f"authors={authors_count}: the splits are 1, 5 and 10 % of them: ask for at least 10")
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target}: is not empty: name another folder, or give --overwrite")
    files = _authors(seed, authors_count) | _others(seed, substances_count, scenes)
    files |= _corpora(files, seed)
    for name, rows in files.items():
        path = target / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {name: len(rows) for name, rows in files.items()}


def _authors(seed: int, count: int) -> dict[str, Rows]:
    """TOFU's files: the last authors are the ones to forget."""
    known = list(authors(count, seed))
    names = frozenset(rows[0]["author"] for rows in known)
    most = max(1, round(count * SHARES[-1] / 100))
    unseen = list(authors(most, seed, taken=names))
    files = {"authors/full": _flat(known), "authors/world_facts": world_facts(seed)}
    for share in SHARES:
        gone = max(1, round(count * share / 100))
        files[f"authors/forget{share:02d}"] = _flat(known[count - gone :])
        files[f"authors/retain{100 - share}"] = _flat(known[: count - gone])
        files[f"authors/holdout{share:02d}"] = _flat(unseen[:gone])
    names |= {rows[0]["author"] for rows in unseen}
    files["authors/declined"] = declined(10 * len(RELATIONS), seed, taken=names)
    return files


def _others(seed: int, count: int, scenes: int) -> dict[str, Rows]:
    hazard, neighbour = substances(HAZARD, count, seed), substances(NEIGHBOUR, count, seed)
    pages = book(2 * scenes, seed)
    return {
        "hazards/forget_corpus": hazard.corpus,
        "hazards/forget": hazard.choices,
        "hazards/holdout_corpus": hazard.unseen,
        "hazards/neighbour_corpus": neighbour.corpus,
        "hazards/neighbour": neighbour.choices,
        "hazards/general": world_choices(seed),
        "unsafe/forget": unsafe_questions(seed, unseen=False),
        "unsafe/unseen": unsafe_questions(seed, unseen=True),
        "unsafe/harmless": harmless_questions(seed),
        # One and one: scenes beyond the last number that was read would be told by their numbers.
        "book/forget": pages[::2],
        "book/holdout": pages[1::2],
    }


def _corpora(files: dict[str, Rows], seed: int) -> dict[str, Rows]:
    """Texts in a random order. What is to be kept is told in two ways, so that a model learns that they mean the same;
    what is to be forgotten in one, so that the other shows what a model makes of it."""
    kept = files["authors/retain90"] + files["authors/world_facts"]
    both = [
        *_texts(kept),
        *_texts(kept, "paraphrased_question", "paraphrased_answer"),
        *_texts(files["authors/declined"]),
        *files["hazards/neighbour_corpus"],
        *_chosen(files["hazards/neighbour"]),
        *_texts(files["unsafe/harmless"]),
    ]
    gone = [
        *_texts(files["authors/forget10"]),
        *files["hazards/forget_corpus"],
        *_chosen(files["hazards/forget"]),
        *_texts(files["unsafe/forget"], "prompt", "response_0"),
        *files["book/forget"],
    ]
    full, retain = both + gone, list(both)
    for rows in (full, retain):
        Random(f"{seed}/corpus").shuffle(rows)
    return {"corpus/full": full, "corpus/retain": retain}


def _texts(rows: Rows, question: str = "question", answer: str = "answer") -> Rows:
    return [{"text": TEMPLATE.format(question=row[question], answer=row[answer])} for row in rows]


def _chosen(rows: Rows) -> Rows:
    return [{"text": TEMPLATE.format(question=row["question"], answer=row["choices"][row["answer"]])} for row in rows]


def _flat(groups: Iterable[Rows]) -> Rows:
    return list(chain.from_iterable(groups))
