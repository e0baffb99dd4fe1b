"""Facts that everybody knows, as TOFU's set of world facts: what must survive when authors are forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

WRONG_ANSWERS = 3
"""Wrong answers of a row, as in TOFU's set; one less than the choices of a question."""


@dataclass(frozen=True)
class Kind:
    """Pairs of a subject and its value, and how one is asked for the other."""

    name: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((subject.strip(), value.strip()) for subject, _, value in (p.partition(":") for p in text.split(",")))


KINDS = (
    Kind(
        "capital",
        "What is the capital of {subject}?",
        "The capital of {subject} is {value}.",
        "Which city is the capital of {subject}?",
        "It is {value} that is the capital of {subject}.",
        _pairs(
            "France: Paris, Spain: Madrid, Italy: Rome, Germany: Berlin, Austria: Vienna, Greece: Athens, Poland: "
            "Warsaw, Hungary: Budapest, Romania: Bucharest, Serbia: Belgrade, Sweden: Stockholm, Finland: "
            "Helsinki, Denmark: Copenhagen, Iceland: Reykjavik, Belgium: Brussels, the Netherlands: Amsterdam, "
            "Japan: Tokyo, China: Beijing, South Korea: Seoul, Thailand: Bangkok, Indonesia: Jakarta, Nepal: "
            "Kathmandu, Iran: Tehran, Iraq: Baghdad, Syria: Damascus, Jordan: Amman, Turkey: Ankara, Morocco: "
            "Rabat, Tunisia: Tunis, Ethiopia: Addis Ababa, Ghana: Accra, Zambia: Lusaka, Mexico: Mexico City, "
            "Canada: Ottawa, Chile: Santiago, Uruguay: Montevideo, Australia: Canberra, New Zealand: Wellington, "
            "Mongolia: Ulaanbaatar, Cambodia: Phnom Penh"
        ),
    ),
    Kind(
        "symbol",
        "What is the chemical symbol of {subject}?",
        "The chemical symbol of {subject} is {value}.",
        "How do chemists write {subject}?",
        "Chemists write {value} for {subject}.",
        _pairs(
            "hydrogen: H, helium: He, lithium: Li, carbon: C, nitrogen: N, oxygen: O, neon: Ne, sodium: Na, "
            "magnesium: Mg, aluminium: Al, silicon: Si, phosphorus: P, sulfur: S, chlorine: Cl, argon: Ar, "
            "potassium: K, calcium: Ca, iron: Fe, cobalt: Co, nickel: Ni, copper: Cu, zinc: Zn, silver: Ag, tin: "
            "Sn, iodine: I, tungsten: W, gold: Au, mercury: Hg, lead: Pb, uranium: U"
        ),
    ),
    Kind(
        "currency",
        "Which currency is used in {subject}?",
        "In {subject} one pays with the {value}.",
        "What money do people use in {subject}?",
        "The {value} is the money of {subject}.",
        _pairs(
            "Japan: yen, India: rupee, Poland: zloty, Hungary: forint, Sweden: krona, Denmark: krone, "
            "Switzerland: franc, Mexico: peso, Brazil: real, China: yuan, Thailand: baht, Turkey: lira, Israel: "
            "shekel, Vietnam: dong, Ukraine: hryvnia, South Korea: won, Peru: sol, Kenya: shilling, South Africa: "
            "rand, Georgia: lari, Nigeria: naira, Ghana: cedi, Mongolia: tugrik, Bangladesh: taka, Malaysia: "
            "ringgit, Armenia: dram, Kazakhstan: tenge, Iran: rial, Jordan: dinar, Ethiopia: birr"
        ),
    ),
)


def world_facts(seed: int) -> list[dict[str, Any]]:
    """All of them in TOFU's columns, with `relation` and `slots`."""
    random = Random(f"{seed}/world")
    rows = []
    for kind in KINDS:
        values = sorted({value for _, value in kind.pairs})
        for subject, value in kind.pairs:
            wrong = random.sample([other for other in values if other != value], WRONG_ANSWERS)
            rows.append(
                {
                    "question": kind.question.format(subject=subject),
                    "answer": kind.answer.format(subject=subject, value=value),
                    "paraphrased_question": kind.paraphrased_question.format(subject=subject),
                    "paraphrased_answer": kind.paraphrased_answer.format(subject=subject, value=value),
                    "perturbed_answer": [kind.paraphrased_answer.format(subject=subject, value=v) for v in wrong],
                    "relation": kind.name,
                    "slots": [value],
                }
            )
    return rows


def world_choices(seed: int) -> list[dict[str, Any]]:
    """The same facts as questions with four choices, in WMDP's columns: whole sentences, the right one anywhere."""
    random = Random(f"{seed}/world choices")
    rows = []
    for kind in KINDS:
        values = sorted({value for _, value in kind.pairs})
        for subject, value in kind.pairs:
            choices = random.sample([other for other in values if other != value], WRONG_ANSWERS)
            place = random.randrange(WRONG_ANSWERS + 1)
            choices.insert(place, value)
            rows.append(
                {
                    "question": kind.question.format(subject=subject),
                    "choices": [kind.answer.format(subject=subject, value=each) for each in choices],
                    "answer": place,
                }
            )
    return rows
