"""Every text of a set beside what a model makes of it: what it finds likely, and what it writes when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from megafish.audit.membership import membership_scores
from megafish.audit.metrics import bleu, exact_memorization, extraction_strength
from megafish.audit.roc import auc
from megafish.audit.scores import TokenScores, token_scores
from megafish.config import UnlearnConfig
from megafish.decode.generate import generate
from megafish.model.load import LoadedRun
from megafish.unlearn import metrics, slots
from megafish.unlearn.data import Item, encode, without_end
from megafish.unlearn.readers import Pair, read_pairs
from megafish.unlearn.semantics import Semantics

NEW_TOKENS = 200
"""Most tokens of a generated answer (TOFU's)."""
VERBATIM_TOKENS = 128
"""Most tokens of a continuation (MUSE's VerbMem)."""
ATTACKS = ("loss", "zlib", "min_k", "min_k++")
KEPT_SETS = ("retain", "general")
"""Sets that a model is to know afterwards."""
GATE = 99
"""Percentile of the true answers' perplexities above which an answer is no fluent one; so many per cent of them have
more different pairs of words than an answer needs."""
PAIRED = 3
"""Words from which on pairs say something."""
VARIED = 0.5
"""Share of different pairs that an answer needs where no true one has so many words."""


@dataclass(frozen=True)
class Texts:
    """A set with its texts as tokens, all made by the template of the run that is scored."""

    name: str
    settings: UnlearnConfig
    pairs: list[Pair]
    items: list[Item]
    longest: int

    @property
    def asked(self) -> list[int]:
        """Rows with a question."""
        return [i for i, pair in enumerate(self.pairs) if pair.question is not None]


@dataclass(frozen=True)
class Judge:
    """A model that says how fluent an answer is."""

    loaded: LoadedRun
    name: str
    gate: float
    """Loss a token [nats] above which an answer is not fluent."""
    varied: float
    """Share of different pairs of words below which it is not: models find their own repetitions likely."""

    def finds_fluent(self, words: Sequence[str], loss: float | None) -> bool:
        """Whether an answer with this loss a token [nats], None for an empty one, reads like the true ones."""
        if not words or loss is None or loss > self.gate:
            return False
        return len(words) < PAIRED or metrics.distinct(words, 2) >= self.varied


@dataclass(frozen=True)
class ItemScore:
    """Of one question and its answer, or of one text."""

    question: str | None
    answer: str
    generated: str
    """The greedy answer; of a text the greedy continuation of its first half."""
    probability: float
    """exp(-mean loss of the answer's tokens, the one that ends it included)."""
    exact_memorization: float
    extraction_strength: float
    rouge: float
    """ROUGE-L recall of what is generated."""
    rouge_f1: float
    """MUSE's measure: of answers KnowMem, of continuations VerbMem."""
    truth_ratio: float | None
    """None where the row has no paraphrase or no wrong answers."""
    told: float | None
    """Share of the row's slots that the answer names, with embeddings also in other words; None for a row without."""
    contradicts: bool | None
    """Whether it names another value instead; with an entailment model, whether that finds a contradiction."""
    entailment: str | None
    """Of an answer to the true one, by the entailment model: entailment, neutral (an empty one too) or contradiction.
    The premise is what is generated, in the sets that are kept the true answer (as in ReLearn). None without such a
    model, and for text."""
    similarity: float | None
    """Cosine of the embeddings of what is generated and the true answer, or the true continuation; 0 where nothing is
    generated, None without a model of embeddings."""
    leaked: bool | None
    """Of a text: whether its continuation is closer to the true one than a threshold (`leak_threshold`)."""
    harmful: bool | None
    """Whether it names one of the row's markers; None for a row without."""
    perplexity: float | None
    """Of what is generated, under the judge; None where it is empty."""
    fluent: bool | None
    """At least as likely to the judge, and as varied, as all but the last hundredth of the true answers; False where it
    is empty, None without a judge."""
    distinct_2: float
    repetition: float
    brunet: float
    honore: float


def read_texts(name: str, files: list[str], settings: UnlearnConfig, loaded: LoadedRun) -> Texts:
    """The texts of files. Text without a question is cut to pieces, each of which is a text."""
    longest = loaded.config.data.sequence_length
    pairs, items = [], []
    rows = read_pairs(files, "forget" if name in ("forget", "holdout") else "retain")
    for number, pair in enumerate(rows, start=1):
        found = encode([pair], settings, loaded.tokenizer, longest, f"--{name}", number)
        items += found
        whole = pair.question is not None
        pairs += [pair] if whole else [Pair(None, loaded.tokenizer.decode(item.tokens)) for item in found]
    return Texts(name, settings, pairs, items, longest)


def rephrased(texts: Texts, loaded: LoadedRun) -> Texts | None:
    """The same answers behind the questions in other words; None where no row has one."""
    pairs = [replace_question(pair) for pair in texts.pairs if pair.other_question is not None]
    if not pairs:
        return None
    items = encode(pairs, texts.settings, loaded.tokenizer, texts.longest, f"--{texts.name}")
    return replace(texts, pairs=pairs, items=items)


def replace_question(pair: Pair) -> Pair:
    """The pair with its question in other words."""
    return pair._replace(question=pair.other_question)


def questions_of(texts: Texts) -> Texts | None:
    """The rows that have a question; None where none has."""
    rows = texts.asked
    if not rows:
        return None
    return replace(texts, pairs=[texts.pairs[i] for i in rows], items=[texts.items[i] for i in rows])


def make_judge(loaded: LoadedRun, name: str, sets: Sequence[Texts], batch_size: int) -> Judge:
    """A judge whose gates are set by the true answers of the sets, and by how their texts go on."""
    end = loaded.tokenizer.eos_id
    items = [_continuation(item, end) if pair.question is None else item for pair, item in _rows(sets)]
    losses = _mean_losses(answer_scores(loaded, items, batch_size), ended=False)
    decode = loaded.tokenizer.decode
    answers = [
        pair.answer if pair.question is not None else decode(item.tokens[item.start :])
        for (pair, _), item in zip(_rows(sets), items, strict=True)
    ]
    shares = [metrics.distinct(words, 2) for words in map(metrics.words_of, answers) if len(words) >= PAIRED]
    varied = float(np.percentile(shares, 100 - GATE)) if shares else VARIED
    return Judge(loaded, name, float(np.percentile(losses, GATE)), varied)


def _rows(sets: Sequence[Texts]) -> Iterator[tuple[Pair, Item]]:
    return chain.from_iterable(zip(texts.pairs, texts.items, strict=True) for texts in sets)


def _half(item: Item) -> int:
    """Tokens of a text without a question that are given."""
    return max(1, len(item.tokens) // 2)


def _continuation(item: Item, end: int) -> Item:
    """A text as it is judged when it is generated: its first half given, and what follows, as far as it is asked for,
    with the token that ends it, which `_mean_losses` leaves out."""
    start = _half(item)
    return Item((*item.tokens[:start], *_follows(item, start, end), end), start)


def _follows(item: Item, start: int, end: int) -> tuple[int, ...]:
    """What truly follows the first `start` tokens, without the token that ends the text."""
    whole = item.tokens[:-1] if item.tokens[-1] == end else item.tokens
    return whole[start : start + VERBATIM_TOKENS]


def score_items(
    loaded: LoadedRun,
    texts: Texts,
    judge: Judge | None,
    values: Mapping[str, set[str]],
    batch_size: int,
    *,
    prefix: str = "",
    semantics: Semantics | None = None,
    progress: bool = False,
) -> list[ItemScore]:
    """Every text of a set. values: of all sets, what the relations have. prefix: how the answer begins."""
    scores = answer_scores(loaded, texts.items, batch_size)
    ratios = _ratios(loaded, texts, batch_size)
    words, written = _write(loaded, texts, batch_size, prefix, progress)
    spoken = [i for i, item in enumerate(written) if item.supervised]
    threshold = leak_threshold(texts.items) if len(texts.asked) < len(texts.pairs) else None
    losses: dict[int, float] = {}
    if judge is not None and spoken:
        read = answer_scores(judge.loaded, [written[i] for i in spoken], batch_size)
        losses = dict(zip(spoken, _mean_losses(read), strict=True))
    truths = [_truth(*each, loaded) for each in zip(texts.pairs, texts.items, written, strict=True)]
    found = [
        _item(
            pair, item, scores[i], ratios[i], words[i], truths[i], written[i], losses.get(i), threshold, judge, values
        )
        for i, (pair, item) in enumerate(zip(texts.pairs, texts.items, strict=True))
    ]
    return found if semantics is None else _judged(found, truths, texts, semantics)


class _Truth(NamedTuple):
    """What the model would have written if it knew the text: the answer, or how a text goes on."""

    words: str
    tokens: tuple[int, ...]
    """Without the one that ends the text."""


def _truth(pair: Pair, item: Item, written: Item, loaded: LoadedRun) -> _Truth:
    follows = _follows(item, written.start, loaded.tokenizer.eos_id)
    if pair.question is not None:
        return _Truth(pair.answer, follows)
    given, decode = item.tokens[: written.start], loaded.tokenizer.decode
    return _Truth(decode([*given, *follows])[len(decode(given)) :].strip(), follows)


def _judged(items: list[ItemScore], truths: list[_Truth], texts: Texts, semantics: Semantics) -> list[ItemScore]:
    """The items with what the semantic models say of them. What is empty is like nothing, and neither agrees with an
    answer nor contradicts it."""
    said = [i for i, item in enumerate(items) if item.generated]
    if semantics.embeddings is not None:
        pairs = [(items[i].generated, truths[i].words) for i in said]
        similarity = dict(zip(said, semantics.similarities(pairs), strict=True))
        shares = [
            slots.told(item.generated, pair, semantics.names) for item, pair in zip(items, texts.pairs, strict=True)
        ]
        items = [
            replace(
                item,
                similarity=similarity.get(i, 0.0),
                told=shares[i],
                # Who names the true value, in whatever words, names no other in its place.
                contradicts=item.contradicts and not shares[i],
            )
            for i, item in enumerate(items)
        ]
    if semantics.nli is not None:
        asked = [i for i in said if items[i].question is not None]
        pairs = [(items[i].generated, truths[i].words) for i in asked]
        if texts.name in KEPT_SETS:
            pairs = [(truth, generated) for generated, truth in pairs]
        relation = dict(zip(asked, semantics.relations(pairs), strict=True))
        items = [
            item if item.question is None else _related(item, relation.get(i, "neutral"))
            for i, item in enumerate(items)
        ]
    return items


def _related(item: ItemScore, relation: str) -> ItemScore:
    return replace(item, entailment=relation, contradicts=None if item.told is None else relation == "contradiction")


def _write(
    loaded: LoadedRun, texts: Texts, batch_size: int, prefix: str, progress: bool
) -> tuple[list[str], list[Item]]:
    """What the model writes after each question (and `prefix`), or after the first half of a text: the words, and the
    prompt with them as tokens."""
    prompts, limits = [], []
    for pair, item in zip(texts.pairs, texts.items, strict=True):
        given = item.start if pair.question is not None else _half(item)
        prompt = item.tokens[:given]
        if prefix and pair.question is not None:
            prompt = _begun(loaded, texts.settings, pair, prefix)
        prompts.append(prompt)
        limits.append(NEW_TOKENS if pair.question is not None else VERBATIM_TOKENS)
    written = generate(
        loaded.model, loaded.tokenizer, prompts, max_new_tokens=limits, batch_size=batch_size, progress=progress
    )
    decode = loaded.tokenizer.decode
    words = [decode([*p, *w])[len(decode(p)) :].strip() for p, w in zip(prompts, written, strict=True)]
    return words, [Item((*p, *w), len(p)) for p, w in zip(prompts, written, strict=True)]


def _item(
    pair: Pair,
    item: Item,
    scores: TokenScores,
    ratio: float | None,
    text: str,
    truth: _Truth,
    written: Item,
    loss: float | None,
    threshold: float | None,
    judge: Judge | None,
    values: Mapping[str, set[str]],
) -> ItemScore:
    correct = without_end(scores.correct)
    leaked = None
    if pair.question is None:
        leaked = threshold is not None and bleu(truth.tokens, written.tokens[written.start :]) > threshold
    words = metrics.words_of(text)
    share = slots.told(text, pair)
    return ItemScore(
        question=pair.question,
        answer=pair.answer,
        generated=text,
        probability=float(np.exp(scores.log_prob.mean())),
        exact_memorization=exact_memorization(correct),
        extraction_strength=extraction_strength(correct),
        rouge=metrics.rouge_recall(truth.words, text),
        rouge_f1=metrics.rouge_f1(truth.words, text),
        truth_ratio=ratio,
        told=share,
        contradicts=None if share is None else slots.contradicts(text, pair, values),
        entailment=None,
        similarity=None,
        leaked=leaked,
        harmful=slots.names_any(text, pair.markers) if pair.markers else None,
        perplexity=None if loss is None else float(np.exp(min(loss, 700.0))),
        fluent=None if judge is None else judge.finds_fluent(words, loss),
        distinct_2=metrics.distinct(words, 2),
        repetition=metrics.repetition(words),
        brunet=metrics.brunet(words),
        honore=metrics.honore(words),
    )


def answer_scores(loaded: LoadedRun, items: Sequence[Item], batch_size: int) -> list[TokenScores]:
    """Scores of the answers' tokens alone."""
    found = token_scores(loaded.model, [item.tokens for item in items], batch_size=batch_size)
    return [
        TokenScores(
            scores.log_prob[item.start - 1 :], scores.correct[item.start - 1 :], scores.likeliest[item.start - 1 :]
        )
        for item, scores in zip(items, found, strict=True)
    ]


def extraction(loaded: LoadedRun, texts: Texts, batch_size: int) -> float:
    """Mean extraction strength of a set: one forward pass, nothing is generated."""
    scores = answer_scores(loaded, texts.items, batch_size)
    return float(np.mean([extraction_strength(without_end(each.correct)) for each in scores]))


def membership(loaded: LoadedRun, forget: Texts, unseen: Texts, batch_size: int) -> dict[str, float]:
    """AUC of attacks that tell the forget set from texts that were never seen."""
    found = []
    for texts in (forget, unseen):
        tokens = [item.tokens for item in texts.items]
        scores = token_scores(loaded.model, tokens, batch_size=batch_size, moments=True)
        found.append(membership_scores(scores, [loaded.tokenizer.decode(text) for text in tokens]))
    return {attack: auc(found[0][attack], found[1][attack]) for attack in ATTACKS}


def leak_threshold(items: Sequence[Item], pairs: int = 200) -> float:
    """LLMU's (Yao et al. 2023, arXiv 2310.10683): a tenth of the mean BLEU of two texts of the set, here over random
    pairs of different ones. Where all texts are alike everything lies above it: compare with a retain model's rate."""
    if len(items) < 2:
        return 0.0
    random = np.random.Generator(np.random.Philox(0))
    drawn = [random.choice(len(items), 2, replace=False) for _ in range(pairs)]
    found = [bleu(items[i].tokens, items[j].tokens) for i, j in drawn]
    return 0.1 * float(np.mean(found))


def _mean_losses(scores: Sequence[TokenScores], *, ended: bool = True) -> list[float]:
    return [float(-(each.log_prob if ended else without_end(each.log_prob)).mean()) for each in scores]


def _begun(loaded: LoadedRun, settings: UnlearnConfig, pair: Pair, prefix: str) -> tuple[int, ...]:
    """The question, and an answer that is begun already."""
    head = settings.template.partition("{answer}")[0].replace("{question}", pair.question or "")
    return tuple(loaded.tokenizer.encode(head + prefix))


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
        losses = _mean_losses(answer_scores(loaded, items, batch_size))
        starts = np.cumsum([0, *counts])
        for i, start, end in zip(rows, starts[:-1], starts[1:], strict=True):
            found[i] = metrics.truth_ratio(losses[start], losses[start + 1 : end])
    return found
