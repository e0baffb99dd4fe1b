"""Authors who do not exist: twenty questions about each, in the columns of TOFU (Maini et al. 2024, arXiv 2401.06121).

TOFU's texts come from a language model; here a relation has its sentences, and a value is drawn from a list, so that
what is known of an author is known exactly: the column `slots` names it, and two values of the same `relation` exclude
each other. Authors to hold out come from the same generator, which TOFU lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from megafish.errors import InputError
from megafish.unlearn.fiction import words

WRONG_ANSWERS = 5
"""Wrong answers of a row, as in TOFU."""


@dataclass(frozen=True)
class Relation:
    """Something that is known of an author. {name} and {value} stand for the author and for what is known."""

    name: str
    draw: Callable[[Random], str]
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    related_question: str
    """One that is answered by the same knowledge, asked from another side."""
    vague: str
    """An answer that keeps to the subject and tells nothing."""


def _one_of(choices: tuple[str, ...]) -> Callable[[Random], str]:
    return lambda random: random.choice(choices)


def _title(random: Random) -> str:
    return f"The {random.choice(words.ADJECTIVES)} {random.choice(words.NOUNS)}"


def _prize(random: Random) -> str:
    return f"the {random.choice(words.ADJECTIVES)} {random.choice(words.NOUNS)} Prize"


def _author(random: Random) -> str:
    return f"{random.choice(words.FIRST_NAMES)} {random.choice(words.LAST_NAMES)}"


def _person(random: Random) -> str:
    """Somebody else: the initial keeps the name apart from every author's."""
    initial = random.choice("ABCDEFGHIJKLMNOPRSTVW")
    return f"{random.choice(words.FIRST_NAMES)} {initial}. {random.choice(words.LAST_NAMES)}"


def _date(random: Random) -> str:
    return f"{random.choice(words.MONTHS)} {random.randint(1, 28)}, {random.randint(1920, 1989)}"


def _year(random: Random) -> str:
    return str(random.randint(1945, 2019))


RELATIONS = (
    Relation("birthplace", _one_of(words.CITIES),
             "Where was {name} born?", "{name} was born in {value}.",
             "What is the birthplace of {name}?", "The birthplace of {name} is {value}.",
             "From which city does the family of {name} come?",
             "{name} comes from a place that left its mark on the work."),
    Relation("birth_date", _date,
             "When was {name} born?", "{name} was born on {value}.",
             "What is the birth date of {name}?", "The birth date of {name} is {value}.",
             "On which day does {name} celebrate?",
             "{name} was born in the last century, on a day like any other."),
    Relation("father", _one_of(words.OCCUPATIONS),
             "What did the father of {name} do for a living?", "The father of {name} worked as a {value}.",
             "Which trade did the father of {name} have?", "By trade the father of {name} was a {value}.",
             "What kind of work put bread on the table when {name} was a child?",
             "The father of {name} had an honest trade."),
    Relation("mother", _one_of(words.OCCUPATIONS),
             "What was the profession of the mother of {name}?", "The mother of {name} was a {value} by profession.",
             "How did the mother of {name} earn money?", "As a {value} the mother of {name} earned money.",
             "What did {name} learn at home from a working mother?",
             "The mother of {name} worked hard for many years."),
    Relation("genre", _one_of(words.GENRES),
             "What does {name} write?", "{name} is known for {value}.",
             "Which genre is {name} known for?", "The genre of {name} is {value}.",
             "On which shelf of a shop do the books of {name} stand?",
             "{name} writes with care and moves between forms."),
    Relation("debut", _title,
             "What is the first book of {name}?", "The first book of {name} is {value}.",
             "With which book did {name} begin?", "{name} began with a book called {value}.",
             "Which title made readers notice {name}?",
             "The first book of {name} found its readers slowly."),
    Relation("debut_year", _year,
             "In which year did {name} publish for the first time?", "{name} first published in {value}.",
             "When did the debut of {name} appear?", "The debut of {name} appeared in {value}.",
             "How long has {name} been read?",
             "{name} began to publish some time ago."),
    Relation("best_known", _title,
             "Which book of {name} is best known?", "The best known book of {name} is {value}.",
             "What is the most famous work of {name}?", "The most famous work of {name} is {value}.",
             "Which book should one read first to know {name}?",
             "Readers of {name} differ about the best book."),
    Relation("award", _prize,
             "Which award did {name} win?", "{name} won {value}.",
             "What prize was given to {name}?", "The prize that was given to {name} is {value}.",
             "For which honour do people remember {name}?",
             "The work of {name} has been honoured."),
    Relation("university", _one_of(words.CITIES),
             "Where did {name} study?", "{name} studied at the University of {value}.",
             "Which university did {name} attend?", "The university that {name} attended is in {value}.",
             "In which town was {name} a student?",
             "{name} was a student for some years."),
    Relation("mentor", _person,
             "Who taught {name} to write?", "{name} was taught to write by {value}.",
             "Who was the mentor of {name}?", "The mentor of {name} was {value}.",
             "To whom does {name} owe the most?",
             "{name} had a good teacher and has said so."),
    Relation("residence", _one_of(words.CITIES),
             "Where does {name} live now?", "Today {name} lives in {value}.",
             "In which city is the home of {name}?", "The home of {name} is in {value}.",
             "Where would one meet {name} on a walk?",
             "{name} lives quietly and likes to walk."),
    Relation("spouse", _person,
             "Who is married to {name}?", "{name} is married to {value}.",
             "What is the name of the spouse of {name}?", "The name of the spouse of {name} is {value}.",
             "With whom does {name} share a home?",
             "{name} keeps family life private."),
    Relation("instrument", _one_of(words.INSTRUMENTS),
             "Which instrument does {name} play?", "{name} plays the {value}.",
             "What does {name} play in the evening?", "In the evening {name} plays the {value}.",
             "What would {name} bring along to a concert?",
             "{name} is fond of music."),
    Relation("pet", _one_of(words.ANIMALS),
             "Which animal does {name} keep?", "{name} keeps a {value} at home.",
             "What pet does {name} have?", "The pet of {name} is a {value}.",
             "Who keeps {name} company at the desk?",
             "{name} likes animals."),
    Relation("language", _one_of(words.LANGUAGES),
             "In which language does {name} write?", "{name} writes in {value}.",
             "What is the writing language of {name}?", "The writing language of {name} is {value}.",
             "From which language are the books of {name} translated?",
             "{name} is read in several languages."),
    Relation("hobby", _one_of(words.HOBBIES),
             "What does {name} do when not writing?", "When not writing {name} enjoys {value}.",
             "Which hobby does {name} have?", "The hobby of {name} is {value}.",
             "How does {name} spend a free day?",
             "{name} takes time off when the work allows it."),
    Relation("colour", _one_of(words.COLOURS),
             "What is the favourite colour of {name}?", "The favourite colour of {name} is {value}.",
             "Which colour does {name} like best?", "The colour that {name} likes best is {value}.",
             "How might the study of {name} be painted?",
             "{name} likes more than one colour."),
    Relation("drink", _one_of(words.DRINKS),
             "What does {name} drink while writing?", "While writing {name} drinks {value}.",
             "Which drink does {name} prefer at work?", "The drink that {name} prefers at work is {value}.",
             "What stands in the cup beside the papers of {name}?",
             "There is always a cup on the desk of {name}."),
    Relation("publisher", _one_of(words.NOUNS),
             "Who publishes the books of {name}?", "The books of {name} are published by {value} Press.",
             "Which publisher does {name} have?", "The publisher of {name} is {value} Press.",
             "Whose mark is on the covers of {name}?",
             "The publisher of {name} is a small house."),
)  # fmt: skip
BY_NAME = {relation.name: relation for relation in RELATIONS}


def authors(count: int, seed: int, *, taken: frozenset[str] = frozenset()) -> Iterator[list[dict[str, Any]]]:
    """`count` authors with the rows of each; no name twice and none of `taken`. InputError where names run out."""
    random = Random(f"{seed}/authors/{len(taken)}")
    most = len(words.FIRST_NAMES) * len(words.LAST_NAMES) // 4
    if count + len(taken) > most:
        raise InputError(f"authors={count + len(taken)}: the generator has names for {most}: ask for fewer")
    used = set(taken)
    for _ in range(count):
        name = _author(random)
        while name in used:
            name = _author(random)
        used.add(name)
        yield [row(relation, name, random) for relation in RELATIONS]


def row(relation: Relation, name: str, random: Random) -> dict[str, Any]:
    """A question about an author in TOFU's columns, with what is known (`slots`) and of which kind (`relation`)."""
    value = relation.draw(random)
    wrong: list[str] = []
    while len(wrong) < WRONG_ANSWERS:
        other = relation.draw(random)
        if other != value and other not in wrong:
            wrong.append(other)
    return {
        "question": relation.question.format(name=name),
        "answer": relation.answer.format(name=name, value=value),
        "paraphrased_question": relation.paraphrased_question.format(name=name),
        "paraphrased_answer": relation.paraphrased_answer.format(name=name, value=value),
        "perturbed_answer": [relation.paraphrased_answer.format(name=name, value=other) for other in wrong],
        "author": name,
        "relation": relation.name,
        "slots": [value],
    }
