"""What is checked on a GPU, as functions of a device and of sizes.

tests/gpu calls them on a CUDA device. tests/kernels/test_gpu_checks.py calls them on a CPU, small and in Triton's
interpreter: so the checks are known to be right before they meet a GPU, and stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megafish_kernels import (
    KeptRows,
    compact_rows,
    goldfish_drop,
    goldfish_keep,
    linear_cross_entropy,
    rms_norm,
    rotary,
    rotary_qkv,
    swiglu,
)
from megafish_kernels.reference import (
    reference_linear_cross_entropy,
    reference_rms_norm,
    reference_rotary,
    reference_swiglu,
)

LOSS_BOUND = 1e-5
"""Of the loss and its statistics, which come from fp32 logits in every dtype."""
GRADIENT_BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""In half precision one unit of it: kept logits, their gradient and the result are rounded, once each, which comes to
0.37 units in fp16."""
ELEMENTWISE_BOUND = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""In half precision half a unit: a result is rounded once, which comes to 0.23 units in fp16."""

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "weights": {"weighted": True},
    "z-loss": {"z_loss": 0.01},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.6},
    "entropy": {"entropy_weight": (1.0, 1.5)},
    "all": {
        "bias": True,
        "weighted": True,
        "z_loss": 0.01,
        "label_smoothing": 0.1,
        "softcap": 5.0,
        "logit_scale": 0.6,
    },
}
ROWS = ("device", "drop", "host")
"""How the kept rows are known: by ignored targets or a mask, and then their count to the device alone; or the count
to the host too, where the products are the BLAS library's."""


def relative(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what is wanted, or over `floor` where that is more."""
    want = want.double()
    return float((got.double() - want).norm() / max(float(want.norm()), floor, 1e-30))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within, torch raises an error where the host would wait for a CUDA device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class Problem:
    """A head and its tokens."""

    hidden: Tensor
    """[tokens, width], a leaf."""
    weight: Tensor
    """[vocab + padding, width], a leaf; the rows of padding are huge."""
    bias: Tensor
    """[vocab + padding], a leaf."""
    ids: Tensor
    """[tokens] in the vocabulary, its first and last id among them."""
    lost: Tensor
    """bool [tokens]: left out."""
    token_weight: Tensor
    """[tokens], all above 0."""
    vocab: int

    @property
    def targets(self) -> Tensor:
        return self.ids.masked_fill(self.lost, -100)

    def rows(self, how: str) -> dict[str, Any]:
        """The arguments that say which rows are kept."""
        if how == "device":
            return {"targets": self.targets}
        if how == "drop":
            return {"targets": self.ids, "drop": self.lost}
        index = (~self.lost).nonzero()[:, 0].int()
        return {"targets": self.ids, "rows": KeptRows(index, index.shape[0])}

    def options(self, features: dict[str, Any]) -> dict[str, Any]:
        """Features as arguments of the loss and of its oracle."""
        given = {"vocab_size": self.vocab, **features}
        if given.pop("bias", False):
            given["bias"] = self.bias
        if given.pop("weighted", False):
            given["token_weight"] = self.token_weight
        return given

    def leaves(self, options: dict[str, Any]) -> list[Tensor]:
        return [self.hidden, self.weight, *([self.bias] if "bias" in options else [])]


def problem(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    vocab: int,
    padding: int = 0,
    lost: float = 0.25,
    seed: int = 0,
) -> Problem:
    """Drawn on the device: the large ones would take minutes on a CPU."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(std)

    weight = normal(vocab + padding, width, std=width**-0.5)
    weight[vocab:] = 1e4
    ids = torch.randint(0, vocab, (tokens,), generator=g, device=device)
    ids[0], ids[-1] = vocab - 1, 0
    left_out = torch.rand(tokens, generator=g, device=device) < lost
    left_out[0] = left_out[-1] = False
    return Problem(
        normal(tokens, width).requires_grad_(),
        weight.requires_grad_(),
        normal(vocab + padding).requires_grad_(),
        ids,
        left_out,
        torch.rand(tokens, generator=g, device=device) + 0.1,
        vocab,
    )


def upstream_of(reduction: str, given: Problem) -> Tensor:
    """Like a loss scale, so that no gradient in fp16 is subnormal; another one for every token."""
    device, tokens = given.hidden.device, len(given.ids)
    if reduction == "none":
        return torch.linspace(-64.0, 128.0, tokens, device=device)
    # The mean divides by the tokens.
    return torch.full((), 64.0 * (tokens if reduction == "mean" else 1), device=device)


def loss_and_gradients(
    given: Problem, features: dict[str, Any], rows: str, reduction: str, logits_bytes: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """([loss, lse, entropy, cross_entropy, correct], gradients) of the Triton backend."""
    options = given.options(features)
    result: Any = linear_cross_entropy(
        given.hidden,
        given.weight,
        backend="triton",
        reduction=reduction,  # type: ignore[arg-type]
        logits_bytes=logits_bytes,
        return_stats=True,
        **given.rows(rows),
        **options,
    )
    loss, stats = result
    gradients = torch.autograd.grad(loss, given.leaves(options), upstream_of(reduction, given))
    facts = [stats.lse, stats.entropy, stats.cross_entropy, stats.correct]
    return [loss.detach(), *facts], list(gradients)


def check_loss(
    given: Problem,
    *,
    features: dict[str, Any] | None = None,
    rows: str = "device",
    reduction: str = "mean",
    logits_bytes: int | None = None,
) -> None:
    """Value, statistics and gradients of the Triton backend against the float64 oracle."""
    features = features or {}
    options = given.options(features)
    expected, facts = reference_linear_cross_entropy(
        given.hidden, given.weight, given.targets, reduction=reduction, **options
    )
    wanted = torch.autograd.grad(expected, given.leaves(options), upstream_of(reduction, given).double())
    (loss, lse, entropy, cross_entropy, correct), got = loss_and_gradients(
        given, features, rows, reduction, logits_bytes
    )
    dtype = given.hidden.dtype
    assert loss.dtype == torch.float32 and loss.device == given.hidden.device
    assert relative(loss, expected.detach(), 0.1) < LOSS_BOUND
    for name, fact in (("lse", lse), ("entropy", entropy), ("cross_entropy", cross_entropy)):
        assert relative(fact, facts[name], 1.0) < LOSS_BOUND, name
    # Two logits of float64 may be one number in fp32.
    assert int((correct != facts["correct"]).sum()) <= len(given.ids) // 1000
    for name, one, want in zip(("hidden", "weight", "bias"), got, wanted, strict=False):
        assert one.dtype == dtype and one.shape == want.shape
        error = relative(one, want, 1e-3)
        assert error < GRADIENT_BOUND[dtype], f"gradient of {name}: {error:.2e}"
    assert not got[0][given.lost].any() and not got[1][given.vocab :].any()


def check_main_grad(given: Problem, rows: str, logits_bytes: int | None) -> None:
    """Two micro-batches add their gradient to what main_grad holds, in fp32 whatever the dtype."""
    start = torch.linspace(-1.0, 1.0, given.weight.numel(), device=given.weight.device).view_as(given.weight)
    main_grad = start.clone()
    half = len(given.ids) // 2
    wanted = start.double()
    for some in (slice(0, half), slice(half, None)):
        hidden = given.hidden.detach()[some].requires_grad_()
        part = replace(given, hidden=hidden, ids=given.ids[some], lost=given.lost[some])
        loss = linear_cross_entropy(
            part.hidden,
            part.weight,
            backend="triton",
            reduction="sum",
            vocab_size=part.vocab,
            main_grad=main_grad,
            logits_bytes=logits_bytes,
            **part.rows(rows),
        )
        assert isinstance(loss, Tensor)
        of_hidden, of_weight = torch.autograd.grad(loss, (part.hidden, part.weight), allow_unused=True)
        assert of_hidden is not None and of_weight is None
        exact, _ = reference_linear_cross_entropy(
            part.hidden, part.weight, part.targets, reduction="sum", vocab_size=part.vocab
        )
        wanted = wanted + torch.autograd.grad(exact, part.weight)[0].double()
    added, want = main_grad.double() - start.double(), wanted - start.double()
    assert relative(added, want) < GRADIENT_BOUND[given.hidden.dtype]
    assert torch.equal(main_grad[given.vocab :], start[given.vocab :])


def check_nothing_kept(given: Problem, rows: str) -> None:
    """No kept token: the loss is 0, and so are its gradients."""
    nothing = replace(given, lost=torch.ones_like(given.lost))
    for reduction in ("mean", "sum", "none"):
        (loss, *_), gradients = loss_and_gradients(nothing, FEATURES["all"], rows, reduction, None)
        assert not loss.any() and not any(gradient.any() for gradient in gradients)


def check_same_bits(given: Problem, rows: str, logits_bytes: int | None) -> None:
    """Two runs give the same numbers, to the last bit."""
    runs = [loss_and_gradients(given, FEATURES["all"], rows, "mean", logits_bytes) for _ in range(2)]
    for one, other in zip(*([*facts, *gradients] for facts, gradients in runs), strict=True):
        assert torch.equal(one, other)


def stepper(given: Problem, arguments: dict[str, Any], logits_bytes: int | None = None) -> Callable[[], list[Tensor]]:
    """A function that computes the mean loss and its gradients, for what `arguments` (of Problem.rows) hold by then."""

    def step() -> list[Tensor]:
        loss = linear_cross_entropy(
            given.hidden,
            given.weight,
            vocab_size=given.vocab,
            backend="triton",
            logits_bytes=logits_bytes,
            **arguments,
        )
        assert isinstance(loss, Tensor)
        return [loss.detach(), *torch.autograd.grad(loss, (given.hidden, given.weight))]

    return step


def check_no_waiting(given: Problem, rows: str, logits_bytes: int | None) -> None:
    """The host does not wait for the device, forward or backward."""
    step = stepper(given, given.rows(rows), logits_bytes)
    step()  # compiles
    with no_waiting(given.hidden.device):
        got = step()
    assert all(bool(tensor.isfinite().all()) for tensor in got)


def captured(device: torch.device, step: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """`step` as a CUDA graph: what is returned replays it and gives its results. On a CPU the step itself."""
    if device.type != "cuda":
        return step
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return [result.clone() for result in results]

    return replay


def check_graph(given: Problem, rows: str) -> None:
    """One graph, replayed with other targets in the same memory, gives what a call with these gives. With the count on
    the device alone another number of tokens is kept as well."""
    arguments: dict[str, Any] = given.rows(rows)
    step = stepper(given, arguments)
    replay = captured(given.hidden.device, step)
    for shift, lost in ((0, 0.25), (5, 0.6), (11, 0.0)):
        ids = (given.ids + shift) % given.vocab
        if rows != "host":
            g = torch.Generator(ids.device).manual_seed(shift)
            left_out = torch.rand(len(ids), generator=g, device=ids.device) < lost
            if rows == "drop":
                arguments["drop"].copy_(left_out)
            else:
                ids = ids.masked_fill(left_out, -100)
        arguments["targets"].copy_(ids)
        for one, other in zip(replay(), step(), strict=True):
            # Under a graph the BLAS library may choose another way to add.
            bound = 0.0 if rows != "host" else GRADIENT_BOUND[given.hidden.dtype]
            assert relative(one, other) <= bound


@torch.no_grad()
def exact_in_blocks(given: Problem, last: int, rows: int = 2**13, columns: int = 2**14) -> tuple[Tensor, ...]:
    """Mean loss and the gradients of the `last` rows of hidden and of weight, in float64 and a block of logits at a
    time: for sizes that the oracle has no memory for. No padding, no features."""
    keep = (~given.lost).nonzero()[:, 0]
    hidden, weight, ids = given.hidden, given.weight, given.ids
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    of_weight = weight.new_zeros(last, weight.shape[1], dtype=torch.float64)
    final = hidden.new_zeros(last, hidden.shape[1], dtype=torch.float64)
    first_id = given.vocab - last

    def blocks(x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for begin in range(0, given.vocab, columns):
            some = weight[begin : begin + columns].double()
            yield begin, some, x @ some.T

    def lse_of(x: Tensor) -> Tensor:
        return torch.stack([logits.logsumexp(1) for _, _, logits in blocks(x)]).logsumexp(0)

    for chosen in keep.split(rows):
        x, own = hidden[chosen].double(), ids[chosen]
        lse = lse_of(x)
        total += (lse - (x * weight[own].double()).sum(1)).sum()
        gradient = (x @ weight[first_id:].double().T - lse[:, None]).exp()
        mine = (own >= first_id).nonzero()[:, 0]
        gradient[mine, own[mine] - first_id] -= 1
        of_weight += gradient.T @ x
    tail = torch.arange(len(ids) - last, len(ids), device=ids.device)
    x, own = hidden[tail].double(), ids[tail]
    lse = lse_of(x)
    for _, some, logits in blocks(x):
        final += (logits - lse[:, None]).exp() @ some
    final -= weight[own].double()
    final[given.lost[tail]] = 0
    return total / len(keep), final / len(keep), of_weight / len(keep)


def check_large(given: Problem, rows: str, logits_bytes: int | None, last: int = 64) -> None:
    """Loss and the far ends of the gradients, where the tensors are too large for an oracle of all logits."""
    loss, hidden, weight = stepper(given, given.rows(rows), logits_bytes)()
    wanted = exact_in_blocks(given, last)
    dtype = given.hidden.dtype
    assert relative(loss, wanted[0]) < LOSS_BOUND
    # The mean's gradients are small numbers of a wide range: bf16 has that range, fp16 has not.
    assert dtype != torch.float16
    for name, got, want in (("hidden", hidden, wanted[1]), ("weight", weight, wanted[2])):
        error = relative(got[-last:], want)
        assert error < GRADIENT_BOUND[dtype], f"gradient of {name}: {error:.2e}"


# ------------------------------------------------------------------------------------------------------- the mask


MASKS: dict[str, dict[str, Any]] = {
    "default": {},
    "wide": {"h": 50, "seed": 2**63 + 7},
    "inclusive": {"k": 2, "window": "inclusive", "min_context": 3},
}


def check_mask(device: torch.device, tokens: int, rows: int, options: dict[str, Any]) -> None:
    """goldfish_drop, goldfish_keep and compact_rows have NumPy's bits, and the host does not wait for any of them."""
    options = {"k": 4, **options}
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, 128_256, (rows, tokens // rows))
    ids[:, ::7] = 0
    starts = rng.random(ids.shape) < 0.002
    labels = np.where(rng.random((rows, ids.shape[1] - 1)) < 0.1, -100, ids[:, 1:])
    drop = goldfish_drop(ids, document_starts=starts, **options)
    keep = (labels != -100) & ~drop[:, 1:]
    x, at, y = (torch.from_numpy(array).to(device) for array in (ids, starts, labels))

    def run() -> tuple[Tensor, tuple[Tensor, KeptRows], KeptRows]:
        dropped = goldfish_drop(x, document_starts=at, backend="triton", **options)
        kept = goldfish_keep(x, y, document_starts=at, backend="triton", **options)
        return dropped, kept, compact_rows(kept[0], backend="triton")

    run()  # compiles
    with no_waiting(device):
        dropped, (kept, found), compacted = run()
    np.testing.assert_array_equal(dropped.cpu().numpy(), drop)
    np.testing.assert_array_equal(kept.cpu().numpy(), keep)
    index = np.flatnonzero(keep)
    for result in (found, compacted):
        assert int(result.count) == len(index)
        np.testing.assert_array_equal(result.index.cpu().numpy(), np.pad(index, (0, keep.size - len(index))))


# ----------------------------------------------------------------------------------------------- element-wise operators


def normal_like(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def compare(function: Callable[..., Any], oracle: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Results and gradients of a function against its float64 oracle, on the same inputs and without waiting."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    wanted = oracle(*wide)
    upstream = [normal_like(w.device, dtype, *w.shape, seed=9 + i) for i, w in enumerate(wanted)]

    def run() -> tuple[Any, tuple[Tensor, ...]]:
        results = function(*leaves)
        return results, torch.autograd.grad(results, leaves, upstream)

    run()  # compiles
    with no_waiting(inputs[0].device):
        results, got = run()
    gradients = torch.autograd.grad(wanted, wide, [tensor.double() for tensor in upstream])
    for one, want in zip((*results, *got), (*wanted, *gradients), strict=True):
        assert one.dtype == dtype and one.shape == want.shape
        error = relative(one.detach(), want.detach())
        assert error < ELEMENTWISE_BOUND[dtype], f"{error:.2e}"


def check_norm(device: torch.device, dtype: torch.dtype, tokens: int, width: int, residual: bool) -> None:
    x, other = (normal_like(device, dtype, 2, tokens, width, seed=seed) for seed in (0, 1))
    weight = normal_like(device, dtype, width, seed=2)
    if residual:
        compare(
            lambda x, r, w: rms_norm(x, w, 1e-5, residual=r, backend="triton"),
            # The kernel rounds the sum before it normalizes it, as a model does that keeps it in this dtype.
            lambda x, r, w: reference_rms_norm(_rounded(x + r, dtype), w, 1e-5),
            [x, other, weight],
            dtype,
        )
        return
    compare(
        lambda x, w: (rms_norm(x, w, 1e-5, backend="triton"),),
        lambda x, w: reference_rms_norm(x, w, 1e-5)[:1],
        [x, weight],
        dtype,
    )


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with the values that it has in dtype, and the gradient of x."""
    return x + (x.detach().to(dtype).double() - x.detach())


def rotary_tables(device: torch.device, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = (torch.arange(length, dtype=torch.float64)[:, None] * frequency)[:, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def check_rotary(
    device: torch.device, dtype: torch.dtype, length: int, heads: int, kv_heads: int, head_dim: int, fused: bool
) -> None:
    cos, sin = rotary_tables(device, length, head_dim)
    split = (heads, kv_heads, kv_heads)
    if fused:
        qkv = normal_like(device, dtype, 2, length, sum(split), head_dim)

        def turned(x: Tensor) -> tuple[Tensor, ...]:
            query, key, value = x.split(split, dim=2)
            return reference_rotary(query, cos, sin), reference_rotary(key, cos, sin), value

        compare(lambda x: rotary_qkv(x, cos, sin, heads, kv_heads, backend="triton"), turned, [qkv], dtype)
        return
    query = normal_like(device, dtype, 2, length, heads, head_dim)
    key = normal_like(device, dtype, 2, length, kv_heads, head_dim, seed=1)
    compare(
        lambda q, k: rotary(q, k, cos, sin, backend="triton"),
        lambda q, k: (reference_rotary(q, cos, sin), reference_rotary(k, cos, sin)),
        [query, key],
        dtype,
    )


def check_swiglu(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = normal_like(device, dtype, 2, tokens, 2 * width) * 3
    compare(lambda x: (swiglu(x, backend="triton"),), lambda x: (reference_swiglu(x),), [gate_up], dtype)


# --------------------------------------------------------------------------------------------------- torch.compile


def check_compiled(device: torch.device, dtype: torch.dtype, compiler: str, reduction: str, rows: str) -> None:
    """All operators in one graph give what they give without it."""
    torch._dynamo.reset()
    given = problem(device, dtype, tokens=2 * 24, width=32, vocab=77, padding=3)
    gain = normal_like(device, dtype, 32, seed=3).requires_grad_()
    up = normal_like(device, dtype, 128, 32, seed=4).requires_grad_()
    cos, sin = rotary_tables(device, 24, 8)
    chosen = given.rows(rows)
    targets = chosen.pop("targets")

    def step(hidden: Tensor, weight: Tensor, gain: Tensor, up: Tensor) -> Any:
        x = hidden.view(2, 24, 32)
        x, total = rms_norm(x, gain, 1e-5, residual=x.sin(), backend="triton")
        query, key, value = rotary_qkv(x.reshape(2, 24, 4, 8), cos, sin, 2, 1, backend="triton")
        x = total + torch.cat((query, key, value), dim=2).flatten(2)
        x = swiglu(x @ up.T, backend="triton")[..., :32] + x
        return linear_cross_entropy(
            x.view(48, 32),
            weight,
            targets,
            vocab_size=given.vocab,
            backend="triton",
            reduction=reduction,  # type: ignore[arg-type]
            return_stats=True,
            **chosen,
        )

    leaves = (given.hidden, given.weight, gain, up)
    upstream = upstream_of(reduction, given)
    expected, facts = step(*leaves)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    loss, others = torch.compile(step, fullgraph=True, backend=compiler)(*leaves)
    got = torch.autograd.grad(loss, leaves, upstream)
    # A compiler may leave out roundings between the operations that it fuses.
    bound = 4 * GRADIENT_BOUND[dtype]
    assert relative(loss.detach(), expected.detach()) < bound
    assert relative(others.entropy, facts.entropy) < bound
    for one, want in zip(got, wanted, strict=True):
        assert relative(one, want) < bound
