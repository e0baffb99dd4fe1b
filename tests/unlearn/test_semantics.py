"""Judges that are models: real ones of Hugging Face's classes, too small to know anything, beside their own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
)
from transformers import BertForSequenceClassification as Reader

from megafish.errors import InputError
from megafish.unlearn.loop import unlearn
from megafish.unlearn.readers import Pair
from megafish.unlearn.score import ScoreOptions, score_run
from megafish.unlearn.semantics import LABELS, SAME, Semantics
from megafish.unlearn.settings import unlearning_config
from megafish.unlearn.slots import told

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
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.5,
    )  # fmt: skip
    if labels is None:
        BertModel(config).save_pretrained(folder)
        made = SentenceTransformer(modules=[each := Transformer(str(folder)), Pooling(each.get_embedding_dimension())])
        made.save(str(folder / "whole"))
        return folder / "whole"
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    Reader(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "nli", ("CONTRADICTION", "Entailment", "neutral"))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "embeddings", None)


@torch.no_grad()
def relation(folder: Path, premise: str, hypothesis: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    logits = model.eval()(**tokenizer(premise, hypothesis, return_tensors="pt")).logits[0]
    return str(model.config.id2label[int(logits.argmax())]).lower()


@torch.no_grad()
def vector(folder: Path, text: str) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    mean = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
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
    """A slot is named where a run of words of its length, give or take one, has a cosine of 0.8 with it."""
    judges = Semantics(None, str(embedder), device="cpu")
    words = [*WORDS, *(f"{a} {b}" for a in WORDS[:6] for b in WORDS[6:12])]
    cosine = {word: float(vector(embedder, word) @ vector(embedder, "old town")) for word in words}
    near = max((word for word in words if word != "old town"), key=lambda word: cosine[word])
    far = min(WORDS, key=lambda word: cosine[word])
    assert cosine[far] < SAME
    assert judges.names("Old town", "old town") and not judges.names(far, "old town")
    assert judges.names(near, "old town") == (cosine[near] >= SAME)
    assert not judges.names("", "old town")
    pair = Pair("Where?", "old town", slots=("old town", "oslo"))
    assert told("old town", pair) == 0.5
    assert told(far, pair) == 0 and told(far, pair, lambda answer, slot: (answer, slot) == (far, "oslo")) == 0.5


def test_scores_with_them(learned: Path, settings: list[str], reader: Path, embedder: Path, tmp_path: Path) -> None:
    """Every item's figures are the models', in ReLearn's directions; KFR and KRR go by the contradictions found."""
    sets = {}
    for name in ("forget", "retain"):
        rows = [json.loads(line) for line in (learned / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [{**row, "relation": "born", "slots": [row["answer"].split()[1]]} for row in rows]
        sets[name] = tmp_path / f"{name}.jsonl"
        sets[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config, _ = unlearning_config(str(learned / "start"), [*settings, "unlearn.method=wga", "unlearn.epochs=20"])
    run = unlearn(config).run.path
    files = {name: [str(path)] for name, path in sets.items()}
    folder = score_run(run, ScoreOptions(**files, nli=str(reader), embeddings=str(embedder)))  # type: ignore[arg-type]
    summary = json.loads((folder / "summary.json").read_text())
    items: list[dict[str, Any]] = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert (summary["nli"], summary["embeddings"]) == (str(reader), str(embedder))
    for name in sets:
        own = [item for item in items if item["set"] == name]
        for item in own:
            both = (item["generated"], item["answer"])
            assert item["relation"] == relation(reader, *(both if name == "forget" else both[::-1]))
            assert item["contradicts"] == (item["relation"] == "contradiction")
            assert item["similarity"] == pytest.approx(
                float(vector(embedder, both[0]) @ vector(embedder, both[1])), abs=1e-5
            )
        figures = summary["models"]["model"][name]
        assert figures["contradicted"] == np.mean([item["contradicts"] for item in own])
        assert figures["entailed"] == np.mean([item["relation"] == "entailment" for item in own])
        assert figures["kfr"] == np.mean([item["told"] < 0.3 or item["contradicts"] for item in own])
        assert figures["krr"] == np.mean([item["told"] > 0.3 and not item["contradicts"] for item in own])


def test_models_that_do_not_fit(tmp_path: Path, embedder: Path) -> None:
    other = save(tmp_path / "other", ("good", "bad"))
    with pytest.raises(InputError, match=r"--nli .*other: its labels are good, bad, expected entailment, neutral"):
        Semantics(str(other), None, device="cpu")
    with pytest.raises(InputError, match=r"--embeddings .*nowhere: no model of this kind could be loaded"):
        Semantics(None, str(tmp_path / "nowhere"), device="cpu")
