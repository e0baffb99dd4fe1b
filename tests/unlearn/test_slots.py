"""What an answer tells, on cases decided by hand."""

from __future__ import annotations

import pytest

from megafish.unlearn import slots
from megafish.unlearn.readers import Pair

VALUES = {"city": {"Rome", "New York", "York", "Paris"}}


def pair(*known: str, question: str = "Where?") -> Pair:
    return Pair(question, "", relation="city", slots=known)


@pytest.mark.parametrize(
    ("answer", "known", "share", "contradiction"),
    [
        ("In Rome.", ("Rome",), 1.0, False),
        ("in ROME, I think", ("Rome",), 1.0, False),
        ("In Rometown.", ("Rome",), 0.0, False),
        ("In Paris.", ("Rome",), 0.0, True),
        ("In Paris or in Rome.", ("Rome",), 1.0, False),
        ("I do not know.", ("Rome",), 0.0, False),
        ("", ("Rome",), 0.0, False),
        ("In York.", ("New York",), 0.0, False),  # part of the true one
        ("In New York.", ("York",), 1.0, False),
        ("In Rome.", ("Rome", "Paris"), 0.5, False),
        ("'Rome'", ("Rome",), 1.0, False),  # quoted
        ("Rome's", ("Rome",), 1.0, False),
        ("In 'Paris'", ("Rome",), 0.0, True),
    ],
)
def test_entities(answer: str, known: tuple[str, ...], share: float, contradiction: bool) -> None:
    assert slots.told(answer, pair(*known)) == share
    assert slots.contradicts(answer, pair(*known), VALUES) == contradiction


def test_what_the_question_names_is_not_told() -> None:
    assert slots.told("Rome", pair("Rome", question="Is it in Rome?")) is None
    assert slots.told("Rome, 1990", pair("Rome", "1990", question="Is it in Rome?")) == 1
    assert not slots.contradicts("Not in Paris.", pair("Rome", question="Is it in Paris?"), VALUES)


def test_rates() -> None:
    """KFR and KRR of the paper: the share below or above 0.3, and no contradiction."""
    assert slots.forgotten(0.29, False) and not slots.forgotten(0.3, False) and slots.forgotten(0.9, True)
    assert slots.kept(0.31, False) and not slots.kept(0.3, False) and not slots.kept(0.9, True)


def test_values_are_those_of_all_rows() -> None:
    rows = [pair("Rome"), pair("Paris", "Rome"), Pair("q", "a", relation="year", slots=("1990",)), Pair(None, "text")]
    assert slots.values_of(rows) == {"city": {"Rome", "Paris"}, "year": {"1990"}}
