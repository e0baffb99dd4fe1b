"""A model spread over processes is the whole model: layer by layer in float64, and altogether."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megafish.config import ModelConfig
from megafish.errors import InputError
from megafish.model.mesh import Axis, Mesh, check_degrees
from megafish.model.shard import shard_of
from megafish.model.transformer import Transformer
from tests.helpers import finish, start

SHAPE = ModelConfig(num_layers=1, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48)


def test_spread_layers_and_models_equal_whole_ones(tmp_path: Path) -> None:
    output = finish(start(tmp_path, 4, str(Path(__file__).with_name("spread.py"))))
    assert output.count("all equal") == 4, output


@pytest.mark.parametrize("tied", [False, True])
def test_shards_share_out_every_matrix(tied: bool) -> None:
    """Of each matrix every process of two has half, heads and fused parts unbroken; the rest is whole."""
    config = SHAPE.model_copy(update={"tie_embeddings": tied, "qkv_bias": True, "mlp_bias": True})
    whole = Transformer(config, 90, seed=3)
    halves = [Transformer(config, 90, seed=3, mesh=Mesh(tensor=Axis(rank, 2))) for rank in range(2)]
    for name, full in whole.named_parameters():
        own = [half.get_parameter(name) for half in halves]
        if name.endswith("norm.weight") or name.endswith("down.bias"):
            assert all(shard_of(one) is None and torch.equal(one, full) for one in own), name
            continue
        again = torch.full_like(full, float("nan"))
        for one in own:
            shard = shard_of(one)
            assert shard is not None and one.numel() * 2 == full.numel(), name
            shard.put(one.detach(), again)
        assert torch.equal(again, full), name
    queries, keys, _ = shard_of(halves[1].blocks[0].attention.qkv.weight).ranges  # type: ignore[union-attr]
    assert queries == (16, 32) and keys == (40, 48)


@pytest.mark.parametrize(
    ("processes", "tensor", "sequence", "advice"),
    [(4, 3, 1, "= 3: start 3 or 6,"), (8, 2, 3, "= 6: start 6 or 12,"), (1, 2, 1, "1 process is not a multiple")],
)
def test_an_impossible_mesh_is_refused(processes: int, tensor: int, sequence: int, advice: str) -> None:
    with pytest.raises(InputError) as caught:
        check_degrees(processes, tensor, sequence)
    assert advice in str(caught.value) and f"engine.tensor_parallel={tensor}" in str(caught.value)


def test_a_vocabulary_that_does_not_divide_is_refused() -> None:
    config = SHAPE.model_copy(update={"vocab_size": 91})
    with pytest.raises(InputError, match=r"91 rows are not a multiple of engine.tensor_parallel=2"):
        Transformer(config, 90, mesh=Mesh(tensor=Axis(0, 2)))


def test_a_spread_model_gives_no_logits() -> None:
    model = Transformer(SHAPE, 90, mesh=Mesh(tensor=Axis(0, 2)))
    with pytest.raises(ValueError, match="without a mesh"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 tokens do not divide among 2"):
        model(torch.zeros(1, 3, dtype=torch.int64), targets=torch.zeros(1, 3, dtype=torch.int64))
