"""Recorded steps: what a CUDA graph would replay, run without one, gives what plain steps give."""

from __future__ import annotations

import pytest
import torch

from megafish.config import ModelConfig
from megafish.decode import stepping
from megafish.decode.beam import beam_search
from megafish.decode.generate import generate
from megafish.decode.stepping import Replay, Stepper
from megafish.model.transformer import KVCache, Transformer

PROMPTS = [[1, 2, 3], [5] * 9, [7, 8], [4] * 20, [11], [3] * 70, [9] * 4]
SETTINGS = [
    {"max_new_tokens": 12, "batch_size": 2},
    {"max_new_tokens": 12, "batch_size": 7, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "seed": 4},
    {"max_new_tokens": [1, 15, 9, 2, 3, 4, 15], "batch_size": 7},
    {"max_new_tokens": 30, "batch_size": 4, "stop": [17, 60, 3]},
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 80}
    return Transformer(ModelConfig(**shape, sliding_window=40, init_std=0.3), 90, seed=1)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows of the steps recorded. In place of a graph stands the step itself, with what a graph has too: it
    does not run when it is recorded, and its tensors are the same ones in every call."""
    rows: list[int] = []
    make = Stepper.__init__

    def make_recording(self: Stepper, model: Transformer) -> None:
        make(self, model)
        self.recorded = True

    def record(step: Replay, tokens: torch.Tensor) -> Replay:
        rows.append(len(tokens))
        given, results = tokens.clone(), []
        (cache,) = (cell.cell_contents for cell in step.__closure__ or () if isinstance(cell.cell_contents, KVCache))

        def places() -> list[int]:
            assert cache.rotary is not None
            return [each.data_ptr() for each in (cache.keys, cache.values, cache.lengths, *cache.rotary)]

        recorded = places()

        def replay(tokens: torch.Tensor) -> torch.Tensor:
            assert places() == recorded, "a graph would read and write where these were"
            found = step(given.copy_(tokens))
            results.append(found if not results else results[0].copy_(found))
            return results[0]

        return replay

    monkeypatch.setattr(Stepper, "__init__", make_recording)
    monkeypatch.setattr(stepping, "record", record)
    return rows


@pytest.mark.parametrize("settings", SETTINGS)
def test_generation(model: Transformer, settings: dict, request: pytest.FixtureRequest) -> None:
    plain = generate(model, None, PROMPTS, **settings)
    recordings = request.getfixturevalue("recordings")
    assert generate(model, None, PROMPTS, **settings) == plain
    assert recordings


@pytest.mark.parametrize("batch_size", [1, 3])
def test_beams(model: Transformer, batch_size: int, request: pytest.FixtureRequest) -> None:
    plain = beam_search(model, None, PROMPTS, beams=5, max_new_tokens=8, batch_size=batch_size)
    recordings = request.getfixturevalue("recordings")
    found = beam_search(model, None, PROMPTS, beams=5, max_new_tokens=8, batch_size=batch_size)
    assert [[beam.tokens for beam in beams] for beams in found] == [[beam.tokens for beam in beams] for beams in plain]
    # Once for each length of cache, and for the last batch if it is smaller.
    assert set(recordings) <= {8, 16} and 1 <= len(recordings) <= 4


@torch.inference_mode()
def test_batches_of_one_size_share_a_recording(model: Transformer, recordings: list[int]) -> None:
    stepper = Stepper(model)
    for prompts in ([[1, 2], [3]], [[4] * 9, [5] * 3], [[6], [7]]):
        logits = stepper.begin(prompts, 3)
        for _ in range(3):
            logits = stepper.step(logits[:, 0].argmax(-1))
    assert recordings == [2]


@torch.inference_mode()
def test_no_room_is_said(model: Transformer) -> None:
    stepper = Stepper(model)
    stepper.begin([[1, 2]], 1)
    stepper.step(torch.tensor([3]))
    with pytest.raises(ValueError, match="more tokens"):
        stepper.step(torch.tensor([3]))
