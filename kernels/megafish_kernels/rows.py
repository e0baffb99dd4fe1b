"""Which rows of a batch a loss works on: a mask's rows as an index and a count, without asking the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafish_kernels.backends import Backend, uses_triton
from megafish_kernels.goldfish import (
    Scheme,
    Window,
    checked_options,
    goldfish_drop,
    on_triton,
    triton_options,
    whole,
)


class KeptRows(NamedTuple):
    """The rows of a flattened batch that are kept: `index[:count]`."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, as count does tuple.count
    """int32 [N]: the kept rows, ascending, and then 0 to the end: row 0 may be read there, but it means nothing."""
    count: Tensor | int  # type: ignore[assignment]
    """int32, 0-d: how many rows are kept, on the device of `index`. An int where the host knows it: all of `index`."""


def compact_rows(keep: Tensor, *, backend: Backend = "auto") -> KeptRows:
    """The rows where `keep` is True, in ascending order. The host never waits: shapes do not depend on values.

    Args:
        keep: bool [...], flattened in row-major order to N rows; N below 2^31.
        backend: "torch", "triton", or "auto" for Triton where it can be started on a GPU's tensors. The result is
            the same, and the same in every run.

    Returns:
        KeptRows on the device of `keep`.

    Raises:
        ValueError: `keep` is not bool or has too many rows, or the backend cannot run on its device.
    """
    if not isinstance(keep, Tensor):
        raise ValueError(f"keep: expected a tensor, got {type(keep).__name__}")
    if keep.dtype != torch.bool:
        raise ValueError(f"keep: expected bool, got {keep.dtype}")
    _check_count("keep", keep)
    if uses_triton(backend, keep.device) and keep.numel() > 0:
        from megafish_kernels import triton_mask

        return KeptRows(*triton_mask.compact(keep))
    return _compact_torch(keep.reshape(-1))


def goldfish_keep(
    tokens: Tensor,
    targets: Tensor,
    *,
    k: int | Tensor | None,
    h: int = 13,
    seed: int = 0,
    window: Window = "preceding",
    min_context: int | None = None,
    scheme: Scheme = "goldfish-v1",
    document_starts: Tensor | None = None,
    exempt: Tensor | None = None,
    canonical: Tensor | None = None,
    halo: int = 0,
    positions: Tensor | None = None,
    nonce: int | Tensor = 0,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> tuple[Tensor, KeptRows]:
    """Which targets of a batch are learned: neither ignored nor dropped by the goldfish mask; as a mask and as rows.

    One pass on the device, for which the host never waits (with a 0-d tensor for `k` or another number it does, to
    read it). A training step on a batch of S + 1 ids and their labels:

        keep, rows = goldfish_keep(tokens, labels[:, 1:], k=4)  # tokens, labels: [batch, S + 1]

    Args:
        tokens: [..., n] integers >= 0, the ids of the documents, as `goldfish_drop` takes them.
        targets: [..., S] integers, S <= n: what is predicted of the last S tokens of each row, their ids or
            `ignore_index`. The n - S tokens before them are context; they may include a halo (halo <= n - S).
        k, h, seed, window, min_context, scheme, document_starts, exempt, canonical, halo, positions, nonce: as for
            `goldfish_drop`; what has a token's shape there has that of `tokens` here.
        ignore_index: the target of tokens that are left out, whatever the mask says.
        backend: as for `goldfish_drop`.

    Returns:
        keep, bool [..., S], True where learned; and KeptRows of keep, rows of targets.reshape(-1).

    Raises:
        ValueError: as `goldfish_drop`, or `targets` do not go with `tokens`.
        IndexError: as `goldfish_drop`.
    """
    halo, ignore_index = whole("halo", halo), whole("ignore_index", ignore_index)
    _check_targets(tokens, targets, halo)
    options: dict[str, Any] = {
        "k": k,
        "h": h,
        "seed": seed,
        "window": window,
        "min_context": min_context,
        "scheme": scheme,
        "document_starts": document_starts,
        "exempt": exempt,
        "canonical": canonical,
        "halo": halo,
        "positions": positions,
        "nonce": nonce,
    }
    checked = checked_options(tokens, **options)
    if on_triton(backend, tokens, scheme, checked["k"]) and targets.numel() > 0:
        from megafish_kernels import triton_mask

        keep, *rows = triton_mask.keep(tokens, targets, ignore_index, **triton_options(tokens, checked))
        return keep, KeptRows(*rows)
    drop = goldfish_drop(tokens, **options, backend=backend)
    keep = (targets.long() != ignore_index) & ~drop[..., tokens.shape[-1] - targets.shape[-1] :]
    return keep, compact_rows(keep, backend=backend)


def _check_targets(tokens: Tensor, targets: Tensor, halo: int) -> None:
    for name, array in (("tokens", tokens), ("targets", targets)):
        if not isinstance(array, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(array).__name__}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integers, got {targets.dtype}")
    if targets.device != tokens.device:
        raise ValueError(f"targets: on {targets.device}, but tokens are on {tokens.device}")
    shape, full = tuple(targets.shape), tuple(tokens.shape)
    if not shape or not full or shape[:-1] != full[:-1] or shape[-1] > full[-1]:
        raise ValueError(f"targets: shape {shape} must be that of tokens, {full}, or end with fewer in each row")
    if halo > full[-1] - shape[-1]:
        raise ValueError(f"halo: {halo} tokens of context, but only {full[-1] - shape[-1]} stand before the targets")
    _check_count("targets", targets)


def _check_count(name: str, rows: Tensor) -> None:
    if rows.numel() >= 2**31:
        raise ValueError(f"{name}: {rows.numel()} rows; an int32 index holds fewer than 2^31")


def _compact_torch(keep: Tensor) -> KeptRows:
    row = torch.arange(keep.numel(), device=keep.device)
    rank = keep.cumsum(0)
    count = keep.sum()
    # Rows left out go behind the kept ones, each to a place of its own: a scatter without collisions is deterministic.
    place = torch.where(keep, rank - 1, count + row - rank)
    index = torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    index.scatter_(0, place, torch.where(keep, row, 0).int())
    return KeptRows(index, count.int())


def kept_weights(
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    rows: KeptRows | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of every token, 0 where it is left out, in the targets' shape; arguments as in linear_cross_entropy."""
    weights = torch.ones_like(targets, dtype=dtype) if token_weight is None else token_weight.detach().to(dtype)
    if rows is None:
        keep = targets != ignore_index
        if drop is not None:
            keep = keep & ~drop
        return torch.where(keep, weights, 0)
    # Past the count the index says 0, which may be a kept row: those go to one more place, which is cut off.
    size = targets.numel()
    place = rows.index.long()
    if isinstance(rows.count, Tensor):
        place = torch.where(torch.arange(len(place), device=place.device) < rows.count, place, size)
    keep = torch.zeros(size + 1, dtype=torch.bool, device=targets.device).index_fill(0, place, True)[:size]
    return torch.where(keep.view(targets.shape), weights, 0)
