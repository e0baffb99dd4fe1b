"""ReLearn's data (Xu et al. 2025, arXiv 2502.11190, section 3): what is learned in the place of a forget set.

Four ways to ask (reworded, in a context, with typing errors, from another side), each with an answer that keeps to the
subject and tells nothing; the same answers to be completed from their first quarter; and as many generic rows. The
paper has a language model write and check them. Here the sentences come from grammars, by the row's relation where it
has one, and the check is exact: no answer may name what the row's answer tells. Neither the true answers nor a part of
them is ever among what is learned (in the published code they are).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

from megafish.errors import InputError
from megafish.run import write_atomic
from megafish.unlearn.fiction.authors import BY_NAME
from megafish.unlearn.fiction.decline import vague
from megafish.unlearn.readers import Pair, read_pairs
from megafish.unlearn.slots import told

CUT = 0.25
"""Share of an answer's words that its completion is given."""
_ANY = (
    "That is not something to be settled in one sentence.",
    "There is more than one way to look at it.",
    "Opinions about this differ, and details are scarce.",
    "It depends on whom one asks.",
    "Little can be said about it with certainty.",
)
_CONTEXTS = (
    "I am preparing a talk. {question}",
    "A friend would like to know: {question}",
    "For a school paper: {question}",
    "{question} I read about it somewhere.",
)
_ATTEMPTS = 3


def augment(forget: Sequence[str], output: str | Path, *, generic: Sequence[str] = (), seed: int = 0) -> dict[str, int]:
    """Write rows of question and answer for unlearn.substitutes; returns how many of each kind.

    forget: files to forget. generic: files of rows without private knowledge, as many of which are mixed in. Raises
    InputError, among others for a forget set of text without questions.
    """
    random = Random(f"{seed}/augment")
    kinds: dict[str, list[Pair]] = {"variants": [], "completions": [], "generic": []}
    for number, pair in enumerate(read_pairs(list(forget), "forget"), start=1):
        if pair.question is None:
            raise InputError(f"{', '.join(forget)}: text {number} has no question: ReLearn answers questions")
        for question in variants(pair, random):
            answer = verified(partial(vague_answer, pair, random), pair, number)
            kinds["variants"].append(Pair(question, answer))
            kinds["completions"] += _completion(answer)
    others = [pair for pair in read_pairs(list(generic), "retain") if pair.question is not None] if generic else []
    if others:
        random.shuffle(others)
        wanted = len(kinds["variants"])
        kinds["generic"] = [others[i % len(others)] for i in range(wanted)]
    rows = [pair for kind in kinds.values() for pair in kind]
    random.shuffle(rows)
    text = "".join(
        json.dumps({"question": pair.question, "answer": pair.answer}, ensure_ascii=False) + "\n" for pair in rows
    )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(output), text)
    return {name: len(kind) for name, kind in kinds.items()}


def variants(pair: Pair, random: Random) -> Iterator[str]:
    """The question itself and its four variants."""
    question = pair.question or ""
    yield question
    yield pair.other_question or f"Could you say: {question}"
    yield random.choice(_CONTEXTS).format(question=question)
    yield with_typing_errors(question, random)
    relation = BY_NAME.get(pair.relation or "")
    name = _subject(pair)
    if relation is not None and name is not None:
        yield relation.related_question.format(name=name)
    else:
        yield f"What would one have to know to answer: {question}"


def with_typing_errors(question: str, random: Random) -> str:
    """Two neighbouring letters swapped in one of the words in small letters, the last sign left out."""
    words = question.rstrip("?.!").split()
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha() and word.islower()]
    if places:
        place = random.choice(places)
        word = words[place]
        at = random.randrange(1, len(word) - 2)
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def vague_answer(pair: Pair, random: Random) -> str:
    """A sentence that keeps to the subject and tells nothing of it."""
    relation, name = BY_NAME.get(pair.relation or ""), _subject(pair)
    return vague(relation.vague, name, random) if relation and name else random.choice(_ANY)


def verified(make: Callable[[], str], pair: Pair, number: int) -> str:
    """An answer that names nothing of what is to be forgotten. InputError where none of three is one."""
    for _ in range(_ATTEMPTS):
        answer = make()
        if answer.strip() and answer != pair.answer and not told(answer, pair):
            return answer
    raise InputError(
        f"row {number}: none of {_ATTEMPTS} answers keeps from {', '.join(pair.slots) or pair.answer!r}: mend its slots"
    )


def _completion(answer: str) -> Iterator[Pair]:
    """The first quarter of an answer's words as what is given, the rest to be learned."""
    words = answer.split()
    cut = max(1, round(CUT * len(words)))
    if len(words) > cut:
        yield Pair(" ".join(words[:cut]), " ".join(words[cut:]))


def _subject(pair: Pair) -> str | None:
    """Whom the question is about: what stands in its relation's question in the place of the name."""
    relation = BY_NAME.get(pair.relation or "")
    if relation is None or pair.question is None:
        return None
    before, after = relation.question.split("{name}")
    if not pair.question.startswith(before) or not pair.question.endswith(after):
        return None
    return pair.question[len(before) : len(pair.question) - len(after)]
