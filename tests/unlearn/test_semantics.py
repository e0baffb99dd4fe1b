"""Judges that are models: real ones of Hugging Face's classes, too small to know anything, beside their own logits."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafish.config import UnlearnConfig
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.unlearn import metrics
from megafish.unlearn.items import _judged, _Truth, read_texts, score_items
from megafish.unlearn.loop import unlearn
from megafish.unlearn.readers import Pair
from megafish.unlearn.score import ScoreOptions, score_run
from megafish.unlearn.semantics import LABELS, SAME, Semantics
from megafish.unlearn.settings import unlearning_config
from megafish.unlearn.slots import told
from tests.helpers import place_kept

pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

WORDS = (
    "in", "the", "city", "of", "lisbon", "kyoto", "oslo", "lima", "cairo", "quito", "dublin", "hanoi", "old", "town",
    "big", "1", "9", "born", "she", "he",
)  # fmt: skip


def save(folder: Path, labels: tuple[str, ...] | None) -> Path:
    """A model of two small layers; a reader with labels, or one whose mean is an embedding."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789.?:,'"]
    vocabulary += [f"##{sign}" for sign in "abcdefghijklmnopqrstuvwxyz0123456789"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.5,
    )  # fmt: skip
    if labels is None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformers.BertModel(config).save_pretrained(folder)
        made = SentenceTransformer(modules=[each := Transformer(str(folder)), Pooling(each.get_embedding_dimension())])
        made.save(str(folder / "whole"))
        return folder / "whole"
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "nli", ("CONTRADICTION", "Entailment", "neutral"))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "embeddings", None)


@cache
def loaded_by_hand(kind: Any, folder: Path) -> tuple[Any, Any]:
    return transformers.AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder).eval()


@torch.no_grad()
def relation(folder: Path, premise: str, hypothesis: str) -> str:
    tokenizer, model = loaded_by_hand(transformers.AutoModelForSequenceClassification, folder)
    logits = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits[0]
    return str(model.config.id2label[int(logits.argmax())]).lower()


@torch.no_grad()
def vector(folder: Path, text: str) -> torch.Tensor:
    tokenizer, model = loaded_by_hand(transformers.AutoModel, folder)
    mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
    return mean / mean.norm()


def test_relations_and_similarities_are_those_of_the_logits(reader: Path, embedder: Path) -> None:
    judges = Semantics(str(reader), str(embedder), device="cpu", batch_size=3)
    draw = np.random.default_rng(0)
    pairs = [tuple(" ".join(draw.choice(WORDS, 4)) for _ in range(2)) for _ in range(40)]
    found = judges.relations(pairs)  # type: ignore[arg-type]
    assert found == [relation(reader, *pair) for pair in pairs] and set(found) <= set(LABELS) and len(set(found)) > 1
    wanted = [float(vector(embedder, a) @ vector(embedder, b)) for a, b in pairs]
    assert judges.similarities(pairs) == pytest.approx(wanted, abs=1e-5)  # type: ignore[arg-type]
    assert judges.relations([]) == judges.similarities([]) == []


def test_a_name_in_other_words(embedder: Path) -> None:
    """A value is named where a run of words of its length, give or take one, has a cosine of 0.8 with it."""
    judges = Semantics(None, str(embedder), device="cpu")
    vectors = {word: vector(embedder, word) for word in [*WORDS, *(f"{a} {b}" for a in WORDS[:8] for b in WORDS[8:16])]}
    cosine = {(a, b): float(vectors[a] @ vectors[b]) for a in vectors for b in vectors if a != b}
    near, value = max((pair for pair in cosine if len(pair[0].split()) != len(pair[1].split())), key=cosine.__getitem__)
    assert cosine[near, value] >= SAME
    far = min(WORDS, key=lambda word: cosine.get((word, value), 1.0))
    assert cosine[far, value] < SAME
    assert judges.names(near, [value, value.upper()]) == [True, True]
    assert judges.names(far, [value]) == [False] and judges.names("", [value]) == [False]
    assert judges.names(f"{far} {near} {far}", [value]) == [True]  # a run in a longer answer
    assert judges.names(near, []) == []
    pair = Pair("Where?", "old town", slots=("old town", "oslo"))
    assert told("old town", pair) == 0.5
    assert told("old town", pair, lambda answer, values: [value == "oslo" for value in values]) == 1
    assert told("big", pair) == 0 and told("big", pair, lambda answer, values: [True, False]) == 0.5


@pytest.fixture(scope="module")
def scored(
    learned: Path, reader: Path, embedder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and items of a model that has forgotten a little: questions with slots, and texts that it knows."""
    folder = tmp_path_factory.mktemp("judged")
    files = {}
    for name in ("forget", "retain"):
        rows = [json.loads(line) for line in (learned / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [{**row, "relation": "born", "slots": [row["answer"].split()[1]]} for row in rows]
        files[name] = [str(folder / f"{name}.jsonl")]
        Path(files[name][0]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [{"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in rows]
    files["general"] = [str(folder / "general.jsonl")]
    Path(files["general"][0]).write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    own = [f"unlearn.{name}={learned / name}.jsonl" for name in ("forget", "retain")]
    batch = ["train={global_batch_size: 4, micro_batch_size: 4}", "optimizer.lr=1e-3", f"run_dir={folder / 'run'}"]
    config, _ = unlearning_config(
        str(learned / "start"), [*own, *batch, "unlearn.method=wga", "unlearn.epochs=20", "checkpoint.interval=null"]
    )
    with place_kept():
        run = unlearn(config).run.path
    found = score_run(run, ScoreOptions(**files, nli=str(reader), embeddings=str(embedder)))  # type: ignore[arg-type]
    lines = (found / "items.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((found / "summary.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def test_every_item_is_judged_in_relearns_directions(
    scored: tuple[dict[str, Any], list[dict[str, Any]]], reader: Path, embedder: Path
) -> None:
    summary, items = scored
    assert (summary["nli"], summary["embeddings"]) == (str(reader), str(embedder))
    reversible = 0
    for item in items:
        if item["set"] == "general":
            continue
        both = (item["generated"], item["answer"])
        ways = relation(reader, *both), relation(reader, *both[::-1])
        reversible += ways[0] != ways[1]
        assert item["entailment"] == ways[item["set"] == "retain"]
        assert item["contradicts"] == (item["entailment"] == "contradiction")
        cosine = float(vector(embedder, both[0]) @ vector(embedder, both[1]))
        assert item["similarity"] == pytest.approx(cosine, abs=1e-5)
        words, slot = metrics.words_of(item["generated"]), metrics.words_of(item["answer"])[1]
        runs = [" ".join(words[at : at + size]) for size in (1, 2) for at in range(len(words) - size + 1)]
        near = max(float(vector(embedder, run) @ vector(embedder, slot)) for run in runs)
        assert item["told"] == (near >= SAME or slot in words)
    assert reversible, "no answer tells the two directions apart"


def test_figures_go_by_the_judges(scored: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    summary, items = scored
    for name in ("forget", "retain"):
        own, figures = [item for item in items if item["set"] == name], summary["models"]["model"][name]
        assert figures["contradicted"] == np.mean([item["entailment"] == "contradiction" for item in own])
        assert figures["entailed"] == np.mean([item["entailment"] == "entailment" for item in own])
        assert figures["similarity"] == pytest.approx(np.mean([item["similarity"] for item in own]))
        assert figures["kfr"] == np.mean([item["told"] < 0.3 or item["contradicts"] for item in own])
        assert figures["krr"] == np.mean([item["told"] > 0.3 and not item["contradicts"] for item in own])
    # Of a text what is generated is compared with how it goes on, and nothing is entailed.
    general = [item for item in items if item["set"] == "general"]
    assert {item["entailment"] for item in general} == {None} and max(item["rouge"] for item in general) == 1
    assert all(item["similarity"] == pytest.approx(1, abs=1e-5) for item in general if item["rouge_f1"] == 1)


def test_an_empty_answer_is_like_nothing(learned: Path, reader: Path, embedder: Path) -> None:
    loaded = load_run(learned / "start", device="cpu")
    files = [str(learned / "forget.jsonl")]
    texts = read_texts("forget", files, UnlearnConfig(model="a", method="ga", forget=files), loaded)
    found = score_items(loaded, texts, None, {}, 8)
    judges = Semantics(str(reader), str(embedder), device="cpu")
    truths = [_Truth(item.answer, ()) for item in found]
    silent, *others = _judged([replace(found[0], generated=""), *found[1:]], truths, texts, judges)
    assert (silent.similarity, silent.entailment, silent.told) == (0, "neutral", None)
    assert all(item.similarity == pytest.approx(1, abs=1e-5) for item in others)  # known by heart


def test_who_names_a_value_in_other_words_names_no_other_in_its_place(learned: Path, embedder: Path) -> None:
    loaded, files = load_run(learned / "start", device="cpu"), [str(learned / "forget.jsonl")]
    texts = read_texts("forget", files, UnlearnConfig(model="a", method="ga", forget=files), loaded)
    pairs = [pair._replace(relation="born", slots=("old town",)) for pair in texts.pairs]
    texts = replace(texts, pairs=pairs)
    judges = Semantics(None, str(embedder), device="cpu")
    near = max(WORDS, key=lambda word: float(vector(embedder, word) @ vector(embedder, "old town")))
    found = score_items(loaded, texts, None, {"born": {"old town", "oslo"}}, 8)
    far = min(WORDS, key=lambda word: float(vector(embedder, word) @ vector(embedder, "old town")))
    said = [
        replace(item, generated=f"oslo {word}", contradicts=True)
        for item, word in zip(found, (near, far), strict=False)
    ]
    truths = [_Truth(item.answer, ()) for item in said]
    two = replace(texts, pairs=pairs[:2], items=texts.items[:2])
    for item in _judged(said, truths, two, judges):
        assert item.told is not None and item.contradicts == (not item.told)


def test_models_that_do_not_fit(learned: Path, tmp_path: Path, embedder: Path) -> None:
    other = save(tmp_path / "other", ("good", "bad"))
    with pytest.raises(InputError, match=r"--nli .*other: its labels are good, bad, expected entailment, neutral"):
        Semantics(str(other), None, device="cpu")
    with pytest.raises(InputError, match=r"--embeddings .*nowhere: no model of this kind could be loaded"):
        Semantics(None, str(tmp_path / "nowhere"), device="cpu")
    # What has no modules.json would be given a mean that it was not trained for.
    with pytest.raises(InputError, match=r"--embeddings .*embeddings: no model of embeddings"):
        Semantics(None, str(embedder.parent), device="cpu")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"--nli .*other: no model of this kind could be loaded \(SafetensorError"):
        Semantics(str(other), None, device="cpu")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "In Rome in 1900."}\n')
    with pytest.raises(InputError, match="--nli nli judges answers, and the sets are texts without questions"):
        score_run(learned / "start", ScoreOptions(forget=[str(text)], nli="nli"))
