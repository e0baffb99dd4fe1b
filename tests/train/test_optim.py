"""Muon against the singular value decomposition and a plain reference in float64, and the groups of both optimizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megafish.config import load_config
from megafish.model.transformer import Transformer
from megafish.train.muon import NEWTON_SCHULZ_STEPS, Matrix, Muon, _make_plan, _Run, orthogonalize
from megafish.train.optim import build_optimizer

SHAPE = (
    "model={num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, intermediate_size: 48, qk_norm: true, "
    "qkv_bias: true, mlp_bias: true}"
)


def quintic(values: np.ndarray) -> np.ndarray:
    """What the iteration does to singular values, in float64."""
    x = values / np.sqrt((values**2).sum())
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def polar(matrix: np.ndarray) -> np.ndarray:
    """The iteration's result by way of the singular value decomposition, in float64."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u * quintic(s)) @ v


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 8)])
def test_newton_schulz_acts_on_the_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    ours = orthogonalize(torch.from_numpy(matrix).float()).double().numpy()
    np.testing.assert_allclose(ours, polar(matrix), atol=2e-4)


def test_newton_schulz_comes_near_the_polar_factor() -> None:
    """Singular values of a wide Gaussian matrix (all well above 0.003 of the norm) end between 0.68 and 1.14."""
    matrix = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    ours = orthogonalize(matrix).double()
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.68 and values.max() < 1.14
    # <ours, U V^T> / rank: the mean singular value if the singular vectors are those of the matrix.
    assert math.isclose(float((ours * (u @ v)).sum()), float(values.sum()), rel_tol=1e-5)


def test_a_zero_matrix_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(4, 6)).any()


def test_muon_follows_a_plain_reference() -> None:
    """Three steps of a fused matrix with weight decay, against float64 with each part on its own."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((20, 12)) * 0.1
    parts, beta, lr, decay = (12, 4, 4), 0.9, 0.02, 0.1
    parameter = torch.nn.Parameter(torch.from_numpy(weight).float())
    optimizer = Muon(
        [{"params": [parameter], "weight_decay": decay, "muon": True}],
        [Matrix(parameter, (20, 12), parts)],
        **{"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "momentum": beta},
    )
    momentum = np.zeros_like(weight)
    for _ in range(3):
        gradient = rng.standard_normal((20, 12))
        parameter.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        momentum = beta * momentum + (1 - beta) * gradient
        nesterov = (1 - beta) * gradient + beta * momentum
        pieces = np.split(nesterov, np.cumsum(parts)[:-1])
        direction = np.concatenate([polar(piece) * 0.2 * math.sqrt(max(piece.shape)) for piece in pieces])
        weight = weight * (1 - lr * decay) - lr * direction
    np.testing.assert_allclose(parameter.detach().numpy(), weight, atol=2e-5)
    np.testing.assert_allclose(optimizer.state[parameter]["momentum"].numpy(), momentum, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tied: bool) -> None:
    config = load_config("tiny", [SHAPE, f"model.tie_embeddings={tied}", "optimizer.name=muon"])
    model = Transformer(config.model, 100)
    optimizer = build_optimizer(model, config.optimizer)
    assert isinstance(optimizer, Muon)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {}
    for group in optimizer.param_groups:
        by_muon |= {names[id(parameter)]: group["muon"] for parameter in group["params"]}
    assert by_muon.keys() == set(names.values())
    for name, taken in by_muon.items():
        assert taken == (name.startswith("blocks") and name.endswith("weight") and "norm" not in name), name
    parts = {names[id(matrix.parameter)]: matrix.parts for matrix in optimizer.matrices}
    assert parts["blocks.1.attention.qkv.weight"] == (32, 16, 16)
    assert parts["blocks.1.attention.out.weight"] == (32,)
    assert parts["blocks.1.feed_forward.gate_up.weight"] == (48, 48)
    assert parts["blocks.1.feed_forward.down.weight"] == (32,)


def test_what_adamw_takes_beside_muon_it_steps_as_alone() -> None:
    models, optimizers = [], []
    for name in ("adamw", "muon"):
        config = load_config("tiny", [SHAPE, f"optimizer.name={name}", "optimizer.weight_decay=0.3"])
        models.append(Transformer(config.model, 100))
        optimizers.append(build_optimizer(models[-1], config.optimizer))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    matrices = {id(matrix.parameter) for matrix in optimizers[1].matrices}
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs) == (id(theirs) not in matrices)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_matrix_has_one_owner_and_the_work_is_shared(world: int) -> None:
    """ZeRO-3's layout: an equal share of every matrix in every process."""
    matrices = [Matrix(torch.nn.Parameter(torch.empty(0)), (24, 24), (24,)) for _ in range(16)]
    share = 576 // world
    everyone = [
        [_Run(index, rank * share, share, index * share) for index in range(len(matrices))] for rank in range(world)
    ]
    for rank in range(world):
        plan = _make_plan(matrices, everyone, rank)
        if world == 1:
            assert [run.matrix for run in plan.whole] == list(range(16)) and not plan.rounds
            continue
        assert not plan.whole and len(plan.rounds) == math.ceil(16 / world)
        owners = [(owner, next(iter(runs.values())).matrix) for turn in plan.rounds for owner, runs in turn.items()]
        assert sorted(matrix for _, matrix in owners) == list(range(16))
        assert all(runs.keys() == set(range(world)) for turn in plan.rounds for runs in turn.values())
