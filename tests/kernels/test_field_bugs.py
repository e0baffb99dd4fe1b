"""The mistakes that linear cross-entropies and masks of other projects have made: each has a test here.

Compared is with torch's own functions on all logits, never with the code under test. The numbers are those of issues
and pull requests on GitHub.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megafish_kernels import goldfish_drop, linear_cross_entropy, torch_backend
from megafish_kernels.backends import Backend
from megafish_kernels.partials import RowLoss, merge, row_loss
from megafish_kernels.rows import KeptRows
from megafish_kernels.tiles import LossTiles, Tile, override
from megafish_kernels.torch_backend import Options, Rows

# No multiple of any tile, nor of each other.
N, D, V = 21, 19, 45
_SMALL = Tile(16, 16, 16, 1, 1)
TOLERANCE = 3e-6


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Either backend; Triton with tiles that are small against the problem, so that there are several of each kind."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with override(LossTiles(_SMALL, _SMALL, _SMALL)):
        yield request.param


@pytest.fixture
def device(backend: Backend, triton_device: torch.device) -> torch.device:
    """Where both backends run here."""
    return triton_device


class Problem:
    """hidden [n, D], weight [v, D], bias [v], leaves of fp32; targets [n] with some left out, token weights [n]."""

    def __init__(self, device: torch.device, n: int = N, v: int = V, d: int = D, dtype: torch.dtype = torch.float32):
        g = torch.Generator().manual_seed(n + v)
        self.hidden = torch.randn(n, d, generator=g).to(device, dtype).requires_grad_()
        self.weight = torch.randn(v, d, generator=g).to(device, dtype).requires_grad_()
        self.bias = torch.randn(v, generator=g).to(device, dtype).requires_grad_()
        self.ids = torch.randint(0, v, (n,), generator=g).to(device)
        self.keep = (torch.rand(n, generator=g) > 0.3).to(device)
        self.targets = self.ids.masked_fill(~self.keep, -100)
        self.token_weight = torch.rand(n, generator=g).to(device)

    def logits(self, bias: bool = False) -> Tensor:
        """All of them, in float64."""
        logits = self.hidden.double() @ self.weight.double().T
        return logits + self.bias.double() if bias else logits

    def loss(self, backend: Backend, **options: Any) -> Tensor:
        options = {"targets": self.targets, **options}
        loss = linear_cross_entropy(self.hidden, self.weight, options.pop("targets"), backend=backend, **options)
        assert isinstance(loss, Tensor)
        return loss

    def check(self, loss: Tensor, wanted: Tensor, upstream: Tensor | None = None, bias: bool = False) -> None:
        """Value and gradients of a loss are those of the wanted one."""
        torch.testing.assert_close(loss.double(), wanted.double(), rtol=TOLERANCE, atol=TOLERANCE)
        leaves = (self.hidden, self.weight, self.bias)[: 3 if bias else 2]
        up = torch.ones_like(loss) if upstream is None else upstream
        got = torch.autograd.grad(loss, leaves, up)
        want = torch.autograd.grad(wanted, leaves, up.to(wanted.dtype))
        for one, other in zip(got, want, strict=True):
            assert relative_error(one, other) < TOLERANCE


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the exact norm; 0 where both are 0."""
    difference = float((actual.double() - exact.double()).norm())
    return difference and difference / float(exact.double().norm())


def row_loss_over_cuts(
    backend: Backend, problem: Problem, cuts: list[int], bias: Tensor | None = None, **options: float
) -> RowLoss:
    """Losses of the kept rows from figures over column ranges, as ranks with shards of the vocabulary have them; the
    rows of padding that make up each rank's shard are huge."""
    hidden, targets = problem.hidden.detach()[problem.keep], problem.ids[problem.keep]
    parts = []
    for first, last in itertools.pairwise(cuts):
        shard = F.pad(problem.weight.detach()[first:last], (0, 0, 0, 17), value=1e4)
        own = None if bias is None else F.pad(bias[first:last], (0, 17))
        settings = Options(vocab_size=V, columns=last - first, stats=True, **options)  # type: ignore[arg-type]
        if backend == "torch":
            figures = torch_backend.partials(Rows(hidden, targets - first, None, None), shard, own, settings, first)
            parts.append(figures[None])
        else:
            from megafish_kernels import triton_loss

            kept = triton_loss.Kept(hidden, (targets - first).int(), len(hidden))
            parts.append(triton_loss.partials(kept, shard, own, settings, first, False)[0])
    fields = settings.fields
    return row_loss(
        merge(torch.cat(parts), fields),
        fields,
        targets,
        vocab_size=V,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
    )


UNEVEN_CUTS = [[0, V], [0, 20, V], [0, 1, 18, 44, V]]


@pytest.mark.parametrize("cuts", UNEVEN_CUTS, ids=str)
def test_a_target_of_another_rank_matches_no_padding(backend: Backend, device: torch.device, cuts: list[int]) -> None:
    """apple/ml-cross-entropy #59: the number for "not in this shard" was that of a padded column of the last tile,
    whose logit of -inf became the target's. Here ids of the next rank are rows of padding in this rank's shard, and
    columns of padding in its last tile."""
    problem = Problem(device)
    row = row_loss_over_cuts(backend, problem, cuts)
    logits, ids = problem.logits().detach()[problem.keep], problem.ids[problem.keep]
    wanted = F.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(row.cross_entropy.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert row.correct is not None and torch.equal(row.correct, logits.argmax(dim=1) == ids)


@pytest.mark.parametrize("shift", ["none", "one token", "all negative"])
def test_per_token_upstream_gradients_that_differ(backend: Backend, device: torch.device, shift: str) -> None:
    """linkedin/Liger-Kernel #968 and #678, NVIDIA/TransformerEngine #1879: with reduction="none" every token's gradient
    was multiplied by the first token's upstream gradient."""
    problem = Problem(device)
    upstream = torch.linspace(-1.0, 2.0, N, device=device)
    if shift == "one token":
        upstream = torch.zeros(N, device=device).index_fill_(0, problem.keep.nonzero()[3], 1.0)
    elif shift == "all negative":
        upstream = upstream - 3.0
    wanted = F.cross_entropy(problem.logits(), problem.targets, reduction="none")
    problem.check(problem.loss(backend, reduction="none"), wanted, upstream)


def test_label_smoothing_spreads_over_the_whole_vocabulary(backend: Backend, device: torch.device) -> None:
    """NVIDIA/Megatron-LM #737, and TransformerEngine: the smoothed part was taken over the rank's own columns, so that
    ranks had different losses, none of them torch's."""
    problem = Problem(device)
    wanted = F.cross_entropy(problem.logits(), problem.targets, label_smoothing=0.2)
    problem.check(problem.loss(backend, label_smoothing=0.2), wanted)
    per_row = F.cross_entropy(problem.logits(), problem.ids, label_smoothing=0.2, reduction="none")[problem.keep]
    for cuts in UNEVEN_CUTS:
        row = row_loss_over_cuts(backend, problem, cuts, label_smoothing=0.2)
        torch.testing.assert_close(row.loss.double(), per_row, rtol=TOLERANCE, atol=TOLERANCE)


def test_z_loss_uses_the_true_log_sum_exp(backend: Backend, device: torch.device) -> None:
    """huggingface/nanotron (parallel/tensor_parallel/functional.py): the z-loss took the logarithm of the sum of the
    exponentials after the maximum was subtracted from the logits, and without the maximum."""
    problem = Problem(device)
    with torch.no_grad():
        problem.weight += 0.5 * problem.hidden.mean(dim=0)  # no maximum is near 0
    logits = problem.logits()
    z = torch.logsumexp(logits, dim=1)
    assert float(logits.detach().amax(dim=1).abs().mean()) > 3
    per_row = F.cross_entropy(logits, problem.targets, reduction="none") + 0.03 * z.square() * problem.keep
    problem.check(problem.loss(backend, z_loss=0.03), per_row.sum() / problem.keep.sum())
    for cuts in UNEVEN_CUTS:
        row = row_loss_over_cuts(backend, problem, cuts, z_loss=0.03)
        torch.testing.assert_close(row.lse.double(), z.detach()[problem.keep], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_kept_gives_zeros(backend: Backend, device: torch.device, reduction: str) -> None:
    """deepspeedai/DeepSpeed (runtime/sequence_parallel/ulysses_sp.py): a shard whose tokens are all ignored has a mean
    of 0/0, which needs a special case there."""
    problem = Problem(device)
    nothing = torch.full_like(problem.targets, -100)
    loss = problem.loss(backend, targets=nothing, reduction=reduction, bias=problem.bias, z_loss=0.1)
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), (problem.hidden, problem.weight, problem.bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_tokens_do_not_count_against_torch(backend: Backend, device: torch.device, reduction: str) -> None:
    """NVIDIA/TransformerEngine #2476: ignored tokens counted in the mean, which a test that compared the loss with
    itself did not see."""
    problem = Problem(device)
    wanted = F.cross_entropy(problem.logits(), problem.targets, reduction=reduction)
    problem.check(problem.loss(backend, reduction=reduction), wanted)


def test_error_of_the_weight_gradient_does_not_grow(backend: Backend, device: torch.device) -> None:
    """linkedin/Liger-Kernel #512 and #827, apple/ml-cross-entropy #14: the weight's gradient was added up over chunks
    of tokens in bf16, with an error that grew with their number until training diverged."""
    # Triton's interpreter is wrong for bfloat16.
    dtype = torch.float16 if backend == "triton" and device.type == "cpu" else torch.bfloat16
    v, d = 33, 16
    large = Tile(64, 64, 16, 4, 1)
    errors = {}
    for n in (64, 1024):
        problem = Problem(device, n=n, v=v, d=d, dtype=dtype)
        wanted = F.cross_entropy(problem.logits(), problem.targets, reduction="sum")
        (exact,) = torch.autograd.grad(wanted, problem.weight)
        for chunked in (False, True):
            # A chunk of all rows, or of four; in Triton all logits kept, or none.
            size: int | None = (4 if chunked else n) * v * dtype.itemsize
            if backend == "triton":
                size = 1 if chunked else None
            with override(LossTiles(large, large, large)):
                loss = problem.loss(backend, reduction="sum", logits_bytes=size)
                (gradient,) = torch.autograd.grad(loss, problem.weight)
            errors[n, chunked] = relative_error(gradient, exact)
    # The roundings of the logits, of their gradient and of the result, however many there are to add.
    assert max(errors.values()) < torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bias_reaches_logits_and_target_alike(backend: Backend, device: torch.device, sign: float) -> None:
    """apple/ml-cross-entropy #52 and #53: the bias was read wrongly for the target's logit, and the loss came out far
    too low, or negative."""
    problem = Problem(device)
    with torch.no_grad():
        problem.bias += sign * torch.arange(V, device=device) / 4
    wanted = F.cross_entropy(problem.logits(bias=True), problem.targets, reduction="none")
    loss = problem.loss(backend, bias=problem.bias, reduction="none")
    assert bool((loss >= 0).all())
    problem.check(loss, wanted, problem.token_weight, bias=True)
    whole = F.cross_entropy(problem.logits(bias=True), problem.targets)
    problem.check(problem.loss(backend, bias=problem.bias), whole, bias=True)


@pytest.mark.parametrize(
    "extra", [{}, {"z_loss": 0.01, "logit_scale": 7.0}, {"logits_bytes": 1}, {"softcap": 5.0}], ids=str
)
def test_a_bias_of_minus_infinity_bans_an_id(backend: Backend, device: torch.device, extra: dict[str, Any]) -> None:
    """A whole tile of banned ids has a maximum of -inf, and -inf less -inf is NaN."""
    problem = Problem(device)
    problem.targets = problem.targets.where((problem.ids < 16) | (problem.ids >= 33), -100)
    with torch.no_grad():
        problem.bias[16:33] = float("-inf")
    loss, stats = linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, return_stats=True, backend=backend, **extra
    )
    logits = problem.logits(bias=True) * extra.get("logit_scale", 1.0)
    if "softcap" in extra:
        logits = torch.tanh(logits / 5.0) * 5.0
    keep = problem.targets != -100
    lse = logits.logsumexp(dim=1)[keep]
    wanted = F.cross_entropy(logits, problem.targets) + extra.get("z_loss", 0.0) * lse.square().mean()
    problem.check(loss, wanted, bias=True)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()
    torch.testing.assert_close(stats.entropy.double()[keep], entropy[keep], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_shard_of_banned_ids_says_nothing(backend: Backend, device: torch.device) -> None:
    """As above, where a rank's whole part of the vocabulary is banned, and where some of it is."""
    problem = Problem(device)
    bias = problem.bias.detach().clone()
    bias[10:20] = float("-inf")
    problem.ids = torch.where((problem.ids >= 10) & (problem.ids < 20), 3, problem.ids)
    row = row_loss_over_cuts(backend, problem, [0, 7, 10, 20, V], bias)
    logits = (problem.logits().detach() + bias.double())[problem.keep]
    wanted = F.cross_entropy(logits, problem.ids[problem.keep], reduction="none")
    torch.testing.assert_close(row.cross_entropy.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert row.entropy is not None
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(row.entropy.double(), entropy, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("v", [1, 15, 16, 17, 33])
def test_vocabularies_that_fill_no_tile(backend: Backend, device: torch.device, v: int) -> None:
    """apple/ml-cross-entropy #59 and others: what stands in the last tile past the vocabulary must not count. Rows of
    padding are huge here, and targets lie at both ends."""
    problem = Problem(device, n=6, v=v)
    problem.targets = torch.tensor([0, v - 1, -100, v // 2, v - 1, 0], device=device)
    padded = F.pad(problem.weight, (0, 0, 0, 13), value=1e4)
    loss = linear_cross_entropy(problem.hidden, padded, problem.targets, vocab_size=v, backend=backend)
    assert isinstance(loss, Tensor)
    problem.check(loss, F.cross_entropy(problem.logits(), problem.targets))


def test_vocabularies_above_250_thousand(backend: Backend, device: torch.device) -> None:
    """NVIDIA/Megatron-LM #2206, a comment there: a port of Liger's kernel was numerically wrong for more than 250,000
    ids."""
    v = 250_007
    problem = Problem(device, n=3, v=v, d=8)
    interpreted = backend == "triton" and device.type == "cpu"
    # The interpreter takes its time for every tile: few and wide ones, and test_loss_oracle has the weight's gradient.
    wide, product = Tile(16, 16384, 16, 1, 1), Tile(16, 16, 4096, 1, 1)
    tiles = LossTiles(wide, wide, product) if interpreted else LossTiles(_SMALL, _SMALL, _SMALL)
    leaves = (problem.hidden,) if interpreted else (problem.hidden, problem.weight)
    problem.weight.requires_grad_(not interpreted)
    problem.targets = torch.tensor([v - 1, 200_000, 7], device=device)
    exact = F.cross_entropy(problem.logits(), problem.targets)
    plain = F.cross_entropy(problem.hidden @ problem.weight.T, problem.targets)
    with override(tiles):
        loss = problem.loss(backend)
        got = torch.autograd.grad(loss, leaves)
    assert relative_error(loss.detach(), exact.detach()) < TOLERANCE
    # Sums of so many numbers in fp32: no worse than torch's own.
    torchs = torch.autograd.grad(plain, leaves)
    for ours, theirs, best in zip(got, torchs, torch.autograd.grad(exact, leaves), strict=True):
        assert relative_error(ours, best) < max(TOLERANCE, 1.5 * relative_error(theirs, best))


@pytest.mark.parametrize("what", ["targets", "hidden", "weight"])
def test_tensors_that_start_anywhere(backend: Backend, device: torch.device, what: str) -> None:
    """Dao-AILab/flash-attention (ops/triton/cross_entropy.py): labels of 64 bits that did not start at a multiple of 16
    bytes, as every slice from the second token on, were read wrongly."""
    problem = Problem(device)
    problem.targets = problem.ids  # with nothing left out, nothing is copied to a place of its own either
    wanted = F.cross_entropy(problem.logits(), problem.ids)
    given: dict[str, Tensor] = {"hidden": problem.hidden, "weight": problem.weight, "targets": problem.ids}
    tensor = given[what]
    moved = torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].reshape(tensor.shape)
    assert moved.data_ptr() % 16 != 0
    given[what] = moved
    loss = linear_cross_entropy(**given, backend=backend)
    assert isinstance(loss, Tensor)
    problem.check(loss, wanted)


def test_micro_batches_of_uneven_counts_add_up(backend: Backend, device: torch.device) -> None:
    """linkedin/Liger-Kernel #802: the mean of each micro-batch's mean is not the mean over the batch's kept tokens."""
    problem = Problem(device)
    kept = problem.keep.sum()
    cuts = [0, 2, 13, N]
    counts = [int(problem.keep[a:b].sum()) for a, b in itertools.pairwise(cuts)]
    assert len(set(counts)) == 3
    total = torch.zeros((), device=device)
    for first, last in itertools.pairwise(cuts):
        part = linear_cross_entropy(
            problem.hidden[first:last],
            problem.weight,
            problem.targets[first:last],
            denominator=kept,
            backend=backend,
        )
        assert isinstance(part, Tensor)
        total = total + part
    problem.check(total, F.cross_entropy(problem.logits(), problem.targets))


@pytest.mark.parametrize("shape", [(0,), (V * D,)], ids=["ZeRO-3", "FSDP1"])
def test_a_weight_that_is_not_gathered_is_an_error_with_the_reason(
    backend: Backend, device: torch.device, shape: tuple[int, ...]
) -> None:
    """huggingface/trl #3368 and #4544, linkedin/Liger-Kernel #332: a kernel that takes `lm_head.weight` by its name
    meets an empty or a flat tensor, and fails with "size mismatch". (DTensors: test_integration.)"""
    problem = Problem(device)
    with pytest.raises(ValueError, match=r"weight: expected \[V, D\].*forward of the module that owns it"):
        linear_cross_entropy(problem.hidden, torch.zeros(shape, device=device), problem.targets, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_twice(backend: Backend, device: torch.device, reduction: str) -> None:
    """apple/ml-cross-entropy: sums under spin locks come in another order in every run. (On a CPU the interpreter's
    programs have one order; on a GPU they have not.)"""
    problem = Problem(device)
    runs = []
    for _ in range(2):
        loss = problem.loss(backend, reduction=reduction, bias=problem.bias, label_smoothing=0.1, z_loss=0.01)
        leaves = (problem.hidden, problem.weight, problem.bias)
        runs.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_compacted_rows_equal_all_rows_with_weights_of_zero(backend: Backend, device: torch.device) -> None:
    """Leaving rows out before the products, as few projects do, must change nothing: all rows, with weights of 0 and
    named as kept so that they are computed, give the same."""
    problem = Problem(device)
    weights = problem.token_weight * problem.keep
    every = KeptRows(torch.arange(N, device=device, dtype=torch.int32), N)
    compacted = problem.loss(backend, token_weight=problem.token_weight)
    computed = problem.loss(backend, targets=problem.ids, token_weight=weights, rows=every)
    problem.check(compacted, computed)
    wanted = F.cross_entropy(problem.logits(), problem.ids, reduction="none")
    problem.check(problem.loss(backend, token_weight=problem.token_weight), (wanted * weights).sum() / weights.sum())


@pytest.mark.parametrize("options", [{}, {"h": 50, "seed": 7}, {"k": 2, "window": "inclusive"}], ids=str)
def test_the_mask_is_the_same_on_host_and_device(
    backend: Backend, device: torch.device, options: dict[str, Any]
) -> None:
    """ahans30/goldfish-loss (lit_gpt/utils.py): the table that decides was drawn by the device's generator, so that a
    CPU and a GPU dropped different tokens, and one id of 0 in a window decided alone."""
    tokens = np.random.default_rng(0).integers(0, 128_256, (2, 1_000))
    tokens[:, ::7] = 0
    starts = np.random.default_rng(1).random(tokens.shape) < 0.002
    settings: dict[str, Any] = {"k": 4, **options}
    host = goldfish_drop(tokens, document_starts=starts, **settings)
    there = [torch.from_numpy(array).to(device) for array in (tokens, starts)]
    drop = goldfish_drop(there[0], document_starts=there[1], backend=backend, **settings)
    assert np.array_equal(drop.cpu().numpy(), host)
    assert 0.8 < host.mean() * settings["k"] < 1.2
