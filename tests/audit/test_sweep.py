"""Sweeps and beams against generation, cell by cell."""

from __future__ import annotations

import pytest

from megafish.audit.metrics import longest_common_prefix
from megafish.audit.probes import load_canaries, split_probes
from megafish.audit.sweep import beams, by_level, sweep
from megafish.config import AuditConfig
from megafish.decode.generate import generate
from megafish.errors import InputError
from megafish.model.load import load_run
from tests.audit.helpers import CANARIES, EXPOSURES, Runs, probe


def settings(**values: object) -> AuditConfig:
    return AuditConfig.model_validate({"prompt_tokens": 24, "suffix_tokens": 8, **values})


@pytest.mark.parametrize("name", ["plain", "goldfish"])
def test_every_cell_is_what_greedy_decoding_gives(runs: Runs, name: str) -> None:
    loaded = load_run(getattr(runs, name))
    probes = load_canaries(runs.corpus, 1.0)
    cells = sweep(loaded.model, probes, settings(prompt_lengths=[4, 12], offsets=[0, 8]), progress=False)
    assert [(cell["offset"], cell["prompt_tokens"]) for cell in cells] == [
        (offset, prompt) for offset in (0, 8) for prompt in (4, 12, 24)
    ]
    for cell in cells:
        start, prompt = cell["offset"], cell["prompt_tokens"]
        texts = [one.tokens[start : start + prompt + 8].tolist() for one in probes]
        outputs = generate(loaded.model, None, [text[:prompt] for text in texts], max_new_tokens=8)
        for level in cell["levels"]:
            group = [i for i, one in enumerate(probes) if one.exposures == level["exposures"]]
            lengths = [longest_common_prefix(texts[i][prompt:], outputs[i]) for i in group]
            assert level["canaries"] == len(group) == CANARIES
            assert level["exact_matches"] == lengths.count(8)
            assert level["mean_prefix"] == pytest.approx(sum(lengths) / len(lengths))


def test_recitation_grows_with_the_prompt(runs: Runs) -> None:
    loaded = load_run(runs.plain)
    cells = sweep(loaded.model, load_canaries(runs.corpus, 1.0), settings(prompt_lengths=[1, 24]), progress=False)
    first, last = (cell["levels"][-1] for cell in cells)
    assert last["exact_rate"] == 1.0 and first["exact_rate"] <= last["exact_rate"]


def test_nothing_to_sweep(runs: Runs) -> None:
    loaded = load_run(runs.plain)
    assert sweep(loaded.model, load_canaries(runs.corpus, 1.0), settings(), progress=False) == []


def test_passages_too_short_for_a_cell(runs: Runs) -> None:
    loaded = load_run(runs.plain)
    with pytest.raises(InputError, match=r"passage 3 has 8 tokens, the sweep needs 40"):
        sweep(loaded.model, [probe(tokens=8, number=3)], settings(offsets=[8]), progress=False)


def test_beams_find_what_greedy_decoding_finds(runs: Runs) -> None:
    loaded = load_run(runs.plain)
    probes = load_canaries(runs.corpus, 1.0)
    parts = split_probes(probes, 24, 8)
    [found] = beams(loaded.model, loaded.tokenizer, probes, *parts, settings(beams=[4]), progress=False)
    assert found["beams"] == 4 and [level["exposures"] for level in found["levels"]] == list(EXPOSURES)
    assert found["levels"][-1]["best_rate"] == found["levels"][-1]["any_rate"] == 1.0
    assert found["levels"][0]["best_rate"] == 0.0


def test_by_level_puts_the_unknown_first() -> None:
    probes = [probe(4), probe(None), probe(0), probe(4)]
    levels = by_level(probes, lambda numbers: {"numbers": numbers})
    assert [(level["exposures"], level["numbers"]) for level in levels] == [(None, [1]), (0, [2]), (4, [0, 3])]
