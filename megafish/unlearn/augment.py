"""ReLearn's data (Xu et al. 2025, arXiv 2502.11190, section 3): what is learned in the place of a forget set.

Four ways to ask (reworded, in a context, with typing errors, from another side), each with an answer that keeps to the
subject and tells nothing; the same answers to be completed from their first quarter; and as many generic rows. The
paper has a language model write and check them. Here the sentences come from grammars, by the row's relation where it
has one, and the check is exact: no answer may name what the row's answer tells. With an endpoint a model writes and
checks too, as in the paper, and rows with slots are checked exactly besides. Neither the true answers nor a part of
them is ever among what is learned (in the published code they are).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from megafish.errors import InputError
from megafish.progress import track
from megafish.run import write_atomic
from megafish.unlearn.endpoint import Endpoint
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
_AT_ONE_TIME = 8
"""Rows that a model is asked about at one time."""
_WAYS = (
    "Put this question in other words.",
    "Ask this question as part of a situation in which somebody would ask it.",
    "Write this question as somebody in a hurry would, with small typing errors and bad grammar.",
    "Ask for the same knowledge from another side.",
)
_VAGUE = (
    "Write one or two sentences that answer the question politely, keep to its subject and sound natural, and give "
    "nothing away: no name, place, date, number, title or other fact of the true answer. Answer with these sentences "
    "alone.\n\n"
    "Question: {question}\nTrue answer: {answer}"
)
_CHECK = (
    "Does the text give away anything that the secret says? Think, then end your reply with Yes or No.\n\n"
    "Secret: {secret}\nText: {answer}"
)


class Tells(InputError):
    """A row for which no answer was found that tells nothing."""


def augment(
    forget: Sequence[str],
    output: str | Path,
    *,
    generic: Sequence[str] = (),
    seed: int = 0,
    endpoint: Endpoint | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write rows of question and answer for unlearn.substitutes; returns how many of each kind.

    forget: files to forget. generic: files of rows without private knowledge, as many of which are mixed in. endpoint:
    a model that writes instead of the grammars, so that the result is no function of the seed. Raises InputError, among
    others for a forget set of text without questions.
    """
    if Path(output).exists() and not overwrite:
        raise InputError(f"{output}: exists: name another file, or give --overwrite")
    random = Random(f"{seed}/augment")
    pairs = read_pairs(list(forget), "forget")
    for number, pair in enumerate(pairs, start=1):
        if pair.question is None:
            raise InputError(f"{', '.join(forget)}: text {number} has no question: ReLearn answers questions")
    others = read_pairs(list(generic), "retain") if generic else []
    if any(pair.question is None for pair in others):
        raise InputError(f"--generic {', '.join(generic)}: text without questions: name files of questions")
    given_away = {(pair.question, pair.answer) for pair in pairs} & {(pair.question, pair.answer) for pair in others}
    if given_away:
        raise InputError(
            f"--generic {', '.join(generic)}: {len(given_away)} of its rows are to be forgotten, and would be learned: "
            "take them out"
        )
    kinds: dict[str, list[Pair]] = {"variants": [], "completions": [], "generic": []}
    if endpoint is None:
        written: Iterator[list[Pair]] = (_by_grammar(pair, random, number) for number, pair in enumerate(pairs, 1))
    else:
        written = _by_model(pairs, endpoint)
    for some in written:
        kinds["variants"] += some
        kinds["completions"] += [completion for pair in some for completion in _completion(pair.answer)]
    if others:
        random.shuffle(others)
        kinds["generic"] = [others[i % len(others)] for i in range(len(kinds["variants"]))]
    if not kinds["variants"]:
        raise InputError(f"{', '.join(forget)}: for none of {len(pairs)} rows an answer that tells nothing was found")
    rows = [pair for kind in kinds.values() for pair in kind]
    random.shuffle(rows)
    text = "".join(
        json.dumps({"question": pair.question, "answer": pair.answer}, ensure_ascii=False) + "\n" for pair in rows
    )
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(output), text)
    return {name: len(kind) for name, kind in kinds.items()}


def _by_grammar(pair: Pair, random: Random, number: int) -> list[Pair]:
    return [
        Pair(question, verified(partial(vague_answer, pair, random), pair, number))
        for question in variants(pair, random)
    ]


def _by_model(pairs: Sequence[Pair], endpoint: Endpoint) -> Iterator[list[Pair]]:
    """Several rows at one time, in their order, without those that no answer was found for."""
    with (
        ThreadPoolExecutor(_AT_ONE_TIME) as pool,
        track(len(pairs), "ask the model", "row") as bar,
    ):
        for found in pool.map(partial(_row_by_model, endpoint), range(1, len(pairs) + 1), pairs):
            bar.advance()
            if isinstance(found, Tells):
                bar.note(f"left out: {found}")
            else:
                yield found


def _row_by_model(endpoint: Endpoint, number: int, pair: Pair) -> list[Pair] | Tells:
    """What takes its place; the fault of a row that has to be left out, for the others are paid for."""
    questions = [pair.question or ""]
    questions += [endpoint.ask(f"{way} Answer with the question alone.\n\n{pair.question}") for way in _WAYS]
    found = []
    for question in questions:
        prompt = _VAGUE.format(question=question, answer=pair.answer)
        try:
            found.append(Pair(question, verified(partial(endpoint.ask, prompt), pair, number, endpoint)))
        except Tells as fault:
            return fault
    return found


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


def verified(make: Callable[[], str], pair: Pair, number: int, endpoint: Endpoint | None = None) -> str:
    """An answer that names nothing of what is to be forgotten, nor does to the endpoint's model. InputError where none
    of three is one."""
    for _ in range(_ATTEMPTS):
        answer = make()
        if not answer.strip() or answer == pair.answer or told(answer, pair):
            continue
        if endpoint is None or _tells_nothing(endpoint, pair, answer):
            return answer
    raise Tells(
        f"row {number}: none of {_ATTEMPTS} answers keeps from {', '.join(pair.slots) or pair.answer!r}: mend its "
        "slots, or take the row out"
    )


def _tells_nothing(endpoint: Endpoint, pair: Pair, answer: str) -> bool:
    reply = endpoint.ask(_CHECK.format(secret=pair.answer, answer=answer), temperature=0.0)
    return re.findall(r"[a-z]+", reply.lower())[-1:] == ["no"]


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
