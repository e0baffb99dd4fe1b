"""Canaries as batches, and their loss during a run."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megafish.audit.metrics import extraction_strength, longest_common_prefix
from megafish.audit.scores import token_scores
from megafish.config import EvalConfig, load_config
from megafish.data.canary import Canary, CanaryConfig, read_canaries
from megafish.data.loader import IGNORE
from megafish.data.prepare import prepare
from megafish.data.tokenizer import train_tokenizer
from megafish.decode.generate import generate
from megafish.model.load import load_run
from megafish.run import RunDir
from megafish.train.loop import train
from megafish.train.probes import CanaryProbe, Recites, limit_passed
from tests.audit.helpers import sentences
from tests.helpers import read_metrics

LENGTH = 32
COPIES = (0, 2, 24)


def canaries(lengths: dict[int, list[int]]) -> list[Canary]:
    """Canaries of these lengths by their copies; token n of canary i is 1000 i + n."""
    found = []
    for copies, sizes in lengths.items():
        for size in sizes:
            number = len(found)
            found.append(Canary(number, copies, [1000 * number + n for n in range(size)], "", ""))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_canary_stands_once_among_the_processes(world_size: int) -> None:
    given = canaries({0: [9, 33, 50], 4: [16, 17, 2], 8: [9] * 7})
    probes = [CanaryProbe(given, 5, LENGTH, 2, rank, world_size) for rank in range(world_size)]
    assert all(probe.levels == [0, 4, 8] for probe in probes)
    assert len({len(probe.batches) for probe in probes}) == 1, "all make the same calls"
    seen: dict[int, list[int]] = {}
    for probe in probes:
        for batch, place in probe:
            assert batch.tokens.shape == place.shape == probe.batches[0][0].tokens.shape
            bounds = batch.cu_seqlens.tolist()
            assert bounds[-1] == batch.tokens.numel() and max(np.diff(bounds)) == batch.max_seqlen
            for begin, end in pairwise(bounds):
                tokens, targets = (x.flatten()[begin:end] for x in (batch.tokens, batch.targets))
                if (targets == IGNORE).all():
                    continue
                number = int(tokens[0]) // 1000
                assert number not in seen, "once"
                seen[number] = [*tokens.tolist(), int(targets[-1])]
                assert targets[:-1].tolist() == tokens[1:].tolist()
                where = place.flatten()[begin:end]
                index = int(where[0]) // probe.width
                assert where.tolist() == [index * probe.width + n for n in range(1, end - begin + 1)]
                assert probe.levels[probe.level[index]] == given[number].exposures
    chosen = [c for copies in (0, 4, 8) for c in [c for c in given if c.exposures == copies][:5]]
    assert seen == {c.id: c.tokens[: LENGTH + 1] for c in chosen}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("probes")
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(sentences(number))
    train_tokenizer([text], tmp_path / "tokenizer.model", 320)
    planted = CanaryConfig(count=3, tokens=24, exposures=COPIES)
    prepare([text], tmp_path / "corpus", tmp_path / "tokenizer.model", valid_fraction=0.2, canaries=planted)
    return tmp_path / "corpus"


def settings(corpus: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data.train={corpus}",
        f"run_dir={run}",
        "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48}",
        "data.sequence_length=32",
        "train={steps: 2, global_batch_size: 4, micro_batch_size: 2, precision: fp32}",
        "eval.canaries=2",
        "eval.interval=1",
        "audit={prompt_tokens: 12, suffix_tokens: 8}",
        *more,
    ]


def test_a_run_reports_what_its_model_makes_of_them(corpus: Path, tmp_path: Path) -> None:
    config = load_config("tiny", settings(corpus, tmp_path / "run"))
    outcome = train(config, console=Console(quiet=True))
    records = read_metrics(outcome.run.path)["canaries"]
    assert [record["step"] for record in records] == [1, 2]
    loaded = load_run(outcome.run.path, device="cpu")
    known = read_canaries(corpus)
    for copies in COPIES:
        losses = []
        for canary in [c for c in known if c.exposures == copies][:2]:
            ids = torch.tensor([canary.tokens])
            losses.append(loaded.model(ids[:, :-1], targets=ids[:, 1:], per_token=True).flatten())
        assert records[-1][f"loss_{copies}"] == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-4)


LEARNED = (
    "model={num_layers: 1, hidden_size: 64, num_heads: 2, intermediate_size: 128, init_std: 0.05}",
    "train={steps: 300, global_batch_size: 8, micro_batch_size: 8, precision: fp32}",
    "optimizer={lr: 5e-3, weight_decay: 0}",
    "eval.interval=150",
    "goldfish.k=null",
)


@pytest.fixture(scope="module")
def learned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has read the corpus often enough to recite some of it."""
    run = tmp_path_factory.mktemp("learned") / "run"
    train(load_config("tiny", settings(corpus, run, *LEARNED)), console=Console(quiet=True))
    return run


def test_recited_is_what_greedy_decoding_recites(corpus: Path, learned: Path) -> None:
    loaded = load_run(learned, device="cpu")
    record = read_metrics(learned)["canaries"][-1]
    rates = []
    for copies in COPIES:
        texts = [c.tokens[:20] for c in read_canaries(corpus) if c.exposures == copies][:2]
        outputs = generate(loaded.model, None, [text[:12] for text in texts], max_new_tokens=8)
        lengths = [longest_common_prefix(text[12:], output) for text, output in zip(texts, outputs, strict=True)]
        scores = token_scores(loaded.model, texts, batch_size=2)
        assert record[f"canaries_{copies}"] == 2
        assert record[f"recited_{copies}"] == lengths.count(8) / 2
        assert record[f"prefix_{copies}"] == np.mean(lengths)
        assert record[f"strength_{copies}"] == pytest.approx(
            np.mean([extraction_strength(s.correct[11:]) for s in scores])
        )
        assert record[f"memorized_{copies}"] == pytest.approx(np.mean([s.correct[11:].mean() for s in scores]))
        rates.append(record[f"recited_{copies}"])
    assert rates[0] == 0.0 and rates[-1] > 0.0, "the run has learned some of it by heart"


def test_an_interval_of_their_own(corpus: Path, tmp_path: Path) -> None:
    more = ("train.steps=5", "eval.interval=4", "eval.canary_interval=2")
    train(load_config("tiny", settings(corpus, tmp_path / "run", *more)), console=Console(quiet=True))
    metrics = read_metrics(tmp_path / "run")
    assert [record["step"] for record in metrics["canaries"]] == [2, 4, 5]
    assert [record["step"] for record in metrics["valid"]] == [4, 5]


def test_canaries_too_short_to_recite(corpus: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    config = load_config("tiny", settings(corpus, tmp_path / "run", "audit.prompt_tokens=17"))
    train(config, console=Console(file=printed, width=200))
    assert "no recitation is measured during training" in printed.getvalue()
    assert not any(key.startswith("recited") for key in read_metrics(tmp_path / "run")["canaries"][-1])


def test_a_limit_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = (*LEARNED, "eval.recited_limit=0.0")
    with pytest.raises(Recites, match=r"step (150|300): [12] of 2 canaries with \d+ copies are recited"):
        train(load_config("tiny", settings(corpus, run, *more)), console=Console(quiet=True))
    steps = RunDir(run).steps()
    assert steps and steps[-1] in (150, 300), "a checkpoint was saved"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    # With a warning it goes on where it was.
    printed = io.StringIO()
    config = load_config("tiny", settings(corpus, run, *more, "train.steps=310", "eval.recited_action=warn"))
    outcome = train(config, resume=True, console=Console(file=printed, width=300))
    assert outcome.spent.steps == 310 and "warning: " in printed.getvalue()


def test_limit_passed() -> None:
    result = {"kind": "canaries", "recited_0": 1.0, "recited_4": 0.25, "recited_8": 0.5}
    result |= {f"canaries_{copies}": 8 for copies in (0, 4, 8)}

    def passed(limit: float | None) -> str | None:
        return limit_passed(result, EvalConfig(recited_limit=limit))

    assert passed(None) is None and passed(0.5) is None, "the control group has no limit"
    text = passed(0.2)
    assert text is not None and text.startswith("4 of 8 canaries with 8 copies are recited, more than")
