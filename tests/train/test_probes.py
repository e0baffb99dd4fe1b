"""Canaries as batches, and their loss during a run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megafish.config import load_config
from megafish.data.canary import Canary, CanaryConfig, read_canaries
from megafish.data.loader import IGNORE
from megafish.data.prepare import prepare
from megafish.data.tokenizer import train_tokenizer
from megafish.model.load import load_run
from megafish.train.loop import train
from megafish.train.probes import CanaryProbe
from tests.helpers import read_metrics

LENGTH = 32


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
        for batch, level in probe:
            assert batch.tokens.shape == level.shape == probe.batches[0][0].tokens.shape
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
                levels = level.flatten()[begin:end].unique().tolist()
                assert [probe.levels[index] for index in levels] == [given[number].exposures]
    chosen = [c for copies in (0, 4, 8) for c in [c for c in given if c.exposures == copies][:5]]
    assert seen == {c.id: c.tokens[: LENGTH + 1] for c in chosen}


def test_a_run_reports_what_its_model_makes_of_them(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        words = rng.choice(["fish", "water", "mega", "net", "sea", "boat", "wave", "salt"], 60)
        (text / f"{number}.txt").write_text(f"{number} " + " ".join(words))
    train_tokenizer([text], tmp_path / "tokenizer.model", 320)
    planted = CanaryConfig(count=3, tokens=24, exposures=(0, 2, 6))
    prepare([text], tmp_path / "corpus", tmp_path / "tokenizer.model", valid_fraction=0.1, canaries=planted)
    settings = [
        f"data.train={tmp_path}/corpus",
        f"run_dir={tmp_path}/run",
        "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48}",
        "data.sequence_length=32",
        "train={steps: 2, global_batch_size: 4, micro_batch_size: 2, precision: fp32}",
        "eval.canaries=2",
        "eval.interval=1",
    ]
    outcome = train(load_config("tiny", settings), console=Console(quiet=True))
    records = read_metrics(outcome.run.path)["canaries"]
    assert [record["step"] for record in records] == [1, 2]
    loaded = load_run(outcome.run.path, device="cpu")
    known = read_canaries(tmp_path / "corpus")
    for copies in planted.exposures:
        losses = []
        for canary in [c for c in known if c.exposures == copies][:2]:
            ids = torch.tensor([canary.tokens])
            losses.append(loaded.model(ids[:, :-1], targets=ids[:, 1:], per_token=True).flatten())
        assert records[-1][f"loss_{copies}"] == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-4)
