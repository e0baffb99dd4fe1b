"""The goldfish mask: which tokens of a document are left out of the loss (Hans et al. 2024, arXiv 2406.10209).

Scheme goldfish-v1, frozen: for token i of a document with the h tokens x[i-1] ... x[i-h] before it,

    key  = c[0] + sum over j = 1..h of c[j] * (x[i-j] + 1)      mod 2^64
    drop = (key >> 32) < floor(2^32 / k)

c[0..h] are the first outputs of splitmix64(seed); positions before the document's start contribute 0. This is
multilinear hashing, strongly universal in its upper 32 bits (Lemire and Kaser 2014, "Strongly universal string hashing
is fast"): over the seed, every context drops with probability floor(2^32 / k) / 2^32, and any two contexts are
independent. Only integer arithmetic is used, so that NumPy, torch on any device, and Triton (triton_mask.py) give the
same bits.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megafish_kernels.backends import Backend, uses_triton

Window = Literal["preceding", "inclusive"]
Scheme = Literal["goldfish-v1", "table", "static", "random"]
Array = TypeVar("Array", npt.NDArray[Any], Tensor)

_MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

_TABLE_SIZE = 1_000_003
_TABLE_SEED = 2_971_215_073

# Tokens hashed at one time by the NumPy path: its three uint64 buffers (384 KiB) then stay in a core's L2 cache.
_BLOCK = 16_384


def _mix(state: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    state = ((state ^ (state >> 30)) * MIX_1) & _MASK
    state = ((state ^ (state >> 27)) * MIX_2) & _MASK
    return state ^ (state >> 31)


@lru_cache(maxsize=64)
def goldfish_coefficients(seed: int, h: int) -> tuple[int, ...]:
    """c[0] ... c[h] of goldfish-v1: the first h + 1 outputs of splitmix64 seeded with `seed`, as unsigned integers."""
    seed, h = whole("seed", seed), whole("h", h)  # NumPy's integers would overflow below
    if not 0 <= seed < 2**64 or h < 0:
        raise ValueError(f"seed, h: {seed} and {h}; expected 0 <= seed < 2^64 and h >= 0")
    return tuple(_mix((seed + (i + 1) * GOLDEN) & _MASK) for i in range(h + 1))


@lru_cache(maxsize=1)
def _published_table() -> Tensor:
    """The uniform float32 table of the published code, as its CPU generator makes it (a CUDA one differs)."""
    return torch.rand(_TABLE_SIZE, generator=torch.Generator().manual_seed(_TABLE_SEED))


def goldfish_drop(
    tokens: Array,
    *,
    k: int | Array | None,
    h: int = 13,
    seed: int = 0,
    window: Window = "preceding",
    min_context: int | None = None,
    scheme: Scheme = "goldfish-v1",
    document_starts: Array | None = None,
    exempt: Array | None = None,
    canonical: Array | None = None,
    halo: int = 0,
    positions: Array | None = None,
    nonce: int | Array = 0,
    backend: Backend = "auto",
) -> Array:
    """Which tokens are dropped as targets of the loss.

    NumPy arrays give a NumPy array, torch tensors a tensor on their device, with equal values. All arrays must be of
    the kind of `tokens`. The NumPy path is the fast one on a CPU.

    Args:
        tokens: [..., n] integers >= 0; each row is a stretch of a stream of documents. With `scheme="table"` the
            published code's masks come out when these are the targets (the inputs shifted by one).
        k: one in k tokens is dropped: an integer >= 2, None for no drops, or integers that broadcast to `tokens` (the
            k of each position's document; 0 for no drops). An integer may be Python's, NumPy's or a 0-d array or
            tensor, here and below.
        h: context tokens that decide, >= 1 (schemes goldfish-v1 and table).
        seed: of the hash, 0 <= seed < 2^64 (schemes goldfish-v1 and random).
        window: "preceding" hashes x[i-1] ... x[i-h], the paper's definition; "inclusive" hashes x[i] ... x[i-h+1] as
            the published code does. Scheme goldfish-v1 only: table is inclusive by definition, the others hash nothing.
        min_context: a token with fewer tokens than this before it in its document is kept. Default h, or h - 1 for
            "inclusive". Scheme goldfish-v1 only.
        scheme: "goldfish-v1"; "table", the published hash table bit for bit (windows of a row, across documents; the
            first h - 1 positions of a row are kept); "static", in-document positions p with p % k == k - 1; "random",
            an independent draw for every (seed, nonce, position in the row after the halo).
        document_starts: bool [..., n], True at the first token of a document. The first position of a row always
            starts one unless there is a halo.
        exempt: bool [vocabulary], True for ids that are never dropped. They still count as context.
        canonical: integers >= 0 [vocabulary]; ids are replaced by these before they are hashed (goldfish-v1, table).
        halo: the first `halo` positions of each row are context only, never dropped. It must cover the window: h, or
            h - 1 for "inclusive" (and for table, where a shorter one leaves the row's first h - 1 positions kept).
        positions: integers [..., n], the index of each token in its whole document. Needed where a row begins inside
            a document: by scheme static, and by goldfish-v1 if min_context is above `halo`.
        nonce: another integer is another draw; one for all, or one a row ([...]). Scheme random only.
        backend: what computes a tensor's mask; the bits are the same. "triton", scheme goldfish-v1 alone, reads int32
            and int64 tokens as they are and casts other integers first. "auto" takes it where it can be started on a
            GPU's tensors and leaves the rest to "torch", which torch.compile fuses. NumPy arrays take "auto" only.

    Returns:
        bool [..., n], True where the token is dropped as a target.

    Raises:
        ValueError: an argument is out of range, has the wrong shape, type or device, or does not go with the scheme.
            Values inside tensors (negative ids, a k of 1) are looked at on the CPU alone: reading them would make the
            host wait for another device. There, and under torch.compile, a negative id is undefined and k = 1 is 0.
        IndexError: an id lies outside `exempt` or `canonical` (tensors on a CPU; undefined on other devices).
    """
    options = checked_options(
        tokens,
        k=k,
        h=h,
        seed=seed,
        window=window,
        min_context=min_context,
        scheme=scheme,
        document_starts=document_starts,
        exempt=exempt,
        canonical=canonical,
        halo=halo,
        positions=positions,
        nonce=nonce,
    )
    if not isinstance(tokens, Tensor):
        if backend != "auto":
            raise ValueError(f"backend: {backend!r} is for tensors, and tokens are a NumPy array; leave it out")
        return _drop_numpy(np.asarray(tokens), **options)
    if on_triton(backend, tokens, scheme, options["k"]):
        from megafish_kernels import triton_mask

        return triton_mask.drop(tokens, **triton_options(tokens, options))
    return _drop_torch(tokens, **options)


def checked_options(
    tokens: Any,
    *,
    k: Any,
    h: Any,
    seed: Any,
    window: str,
    min_context: Any,
    scheme: str,
    document_starts: Any,
    exempt: Any,
    canonical: Any,
    halo: Any,
    positions: Any,
    nonce: Any,
) -> dict[str, Any]:
    """The arguments of `goldfish_drop`, checked as far as they can be without looking into arrays; as they are used."""
    if not isinstance(tokens, (np.ndarray, Tensor)):
        raise ValueError(f"tokens: expected a NumPy array or a tensor, got {type(tokens).__name__}")
    # Checks and arithmetic below are those of Python's integers: nothing else may pass for one.
    if k is not None and not getattr(k, "ndim", 0):
        k = whole("k", k)
    if not getattr(nonce, "ndim", 0):
        nonce = whole("nonce", nonce)
    h, seed, halo = whole("h", h), whole("seed", seed), whole("halo", halo)
    min_context = None if min_context is None else whole("min_context", min_context)
    _check_options(k, h, seed, window, min_context, scheme, canonical, halo, nonce)
    shape = tuple(tokens.shape)
    if not shape:
        raise ValueError("tokens: expected at least one dimension, got a scalar")
    if _kind(tokens) != "integers":
        raise ValueError(f"tokens: expected integers, got {tokens.dtype}")
    _check_array(tokens, "document_starts", document_starts, "bool", shape)
    _check_array(tokens, "positions", positions, "integers", shape)
    _check_array(tokens, "exempt", exempt, "bool")
    _check_array(tokens, "canonical", canonical, "integers")
    if k is not None and not isinstance(k, int):
        _check_k(tokens, k)
    reach = h if window == "preceding" else h - 1
    context = reach if min_context is None else min_context
    if scheme == "goldfish-v1":
        if 0 < halo < reach:
            raise ValueError(f"halo: {halo} does not cover the window of {reach} tokens; give at least {reach} or 0")
        if 0 < halo < context and positions is None:
            raise ValueError(f"positions: needed, since min_context {context} looks further back than the halo {halo}")
    if scheme == "static" and halo > 0 and positions is None:
        raise ValueError("positions: needed by scheme static with a halo, since rows may begin inside a document")
    return {
        "k": k,
        "h": h,
        "seed": seed,
        "first": 1 if window == "preceding" else 0,
        "min_context": context,
        "scheme": scheme,
        "starts": document_starts,
        "exempt": exempt,
        "canonical": canonical,
        "halo": halo,
        "positions": positions,
        "nonce": nonce,
    }


def whole(name: str, value: Any) -> int:
    """A scalar as a Python integer; anything that is not an integer, such as 2.5, is refused rather than rounded."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None


def _kind(array: Any) -> str:
    """integers, bool or floats (all else)."""
    if isinstance(array, Tensor):
        if array.dtype == torch.bool:
            return "bool"
        return "floats" if array.is_floating_point() or array.is_complex() else "integers"
    return {"b": "bool", "i": "integers", "u": "integers"}.get(array.dtype.kind, "floats")


def _check_array(tokens: Any, name: str, array: Any, kind: str, shape: tuple[int, ...] | None = None) -> None:
    """An array of the kind and device of `tokens`, with `kind` in it; of this shape, or with None of one dimension."""
    if array is None:
        return
    tensor = isinstance(tokens, Tensor)
    if not isinstance(array, Tensor if tensor else np.ndarray):
        wanted = "a tensor" if tensor else "a NumPy array"
        raise ValueError(f"{name}: expected {wanted} as tokens are, got {type(array).__name__}")
    if tensor and array.device != tokens.device:
        raise ValueError(f"{name}: on {array.device}, but tokens are on {tokens.device}; move it there once")
    if _kind(array) != kind:
        raise ValueError(f"{name}: expected {kind}, got {array.dtype}")
    if shape is not None and tuple(array.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(array.shape)} must equal that of tokens, {shape}")
    if shape is None and array.ndim != 1:
        raise ValueError(f"{name}: shape {tuple(array.shape)}; expected one entry for each id of the vocabulary")


def _check_k(tokens: Any, k: Any) -> None:
    """An array of k, as far as the values do not matter."""
    _check_array(tokens, "k", k, "integers", tuple(k.shape))
    shape, full = tuple(k.shape), tuple(tokens.shape)
    pairs = zip(reversed(shape), reversed(full), strict=False)
    if len(shape) > len(full) or any(size not in (1, wide) for size, wide in pairs):
        raise ValueError(f"k: shape {shape} does not broadcast to that of tokens, {full}")


def _check_ks(smallest: int, any_one: bool) -> None:
    if smallest < 0 or any_one:
        raise ValueError("k: each must be at least 2, or 0 for no drops")


def on_triton(backend: Backend, tokens: Tensor, scheme: Scheme, k: Any) -> bool:
    """Whether `backend` means the Triton kernel for these tokens."""
    if scheme != "goldfish-v1" and backend == "triton":
        raise ValueError(f"backend: triton has no scheme {scheme}; use auto or torch")
    chosen = uses_triton(backend, tokens.device) and scheme == "goldfish-v1" and k is not None
    # There is nothing to start for an empty batch, and the kernel counts a row's columns in an int32.
    return chosen and tokens.numel() > 0 and tokens.shape[-1] < 2**30


def triton_options(tokens: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """What the Triton kernel takes of `checked_options`, after the look at the values where that is free."""
    _check_values_torch(tokens, options["k"])
    if looked_at(tokens):
        exempt, highest = options["exempt"], int(tokens.long().max())
        if exempt is not None and highest >= len(exempt):
            raise IndexError(f"exempt: id {highest} lies outside its {len(exempt)} entries")
        _check_first(options["h"] - 1 + options["first"], options["halo"], options["positions"])
    return {name: value for name, value in options.items() if name not in ("scheme", "nonce")}


def _check_options(
    k: Any, h: int, seed: int, window: str, min_context: int | None, scheme: str, canonical: Any, halo: int, nonce: Any
) -> None:
    if scheme not in ("goldfish-v1", "table", "static", "random"):
        raise ValueError(f"scheme: {scheme!r} is not one of goldfish-v1, table, static, random")
    if window not in ("preceding", "inclusive"):
        raise ValueError(f"window: {window!r} is not one of preceding, inclusive")
    if isinstance(k, int) and not 2 <= k < 2**63:
        raise ValueError(f"k: {k} must be at least 2 and below 2^63 (None drops nothing)")
    if h < 1:
        raise ValueError(f"h: {h} must be at least 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: {seed} must be at least 0 and below 2^64")
    if halo < 0:
        raise ValueError(f"halo: {halo} must be at least 0")
    if min_context is not None and min_context < 0:
        raise ValueError(f"min_context: {min_context} must be at least 0")
    if min_context is not None and scheme != "goldfish-v1":
        raise ValueError(f"min_context: has no meaning for scheme {scheme}; leave it out")
    if canonical is not None and scheme in ("static", "random"):
        raise ValueError(f"canonical: has no meaning for scheme {scheme}, which hashes no tokens; leave it out")
    if window != "preceding" and scheme in ("static", "random"):
        raise ValueError(f"window: has no meaning for scheme {scheme}, which hashes no tokens; leave it out")
    if seed != 0 and scheme in ("table", "static"):
        raise ValueError(f"seed: has no meaning for scheme {scheme}; leave it at 0")
    if scheme != "random" and not (isinstance(nonce, int) and nonce == 0):
        raise ValueError(f"nonce: has no meaning for scheme {scheme}; leave it at 0")


# --------------------------------------------------------------------------------------------------------------- NumPy


def _drop_numpy(
    tokens: npt.NDArray[Any],
    *,
    k: Any,
    h: int,
    seed: int,
    first: int,
    min_context: int,
    scheme: str,
    starts: Any,
    exempt: Any,
    canonical: Any,
    halo: int,
    positions: Any,
    nonce: Any,
) -> npt.NDArray[np.bool_]:
    n = tokens.shape[-1]
    if k is None or tokens.size == 0:
        return np.zeros(tokens.shape, dtype=bool)
    if tokens.dtype.kind == "i" and int(tokens.min()) < 0:
        raise ValueError(f"tokens: id {int(tokens.min())} is negative")
    ks = np.asarray(k)
    if ks.ndim:
        _check_ks(int(ks.min()), bool((ks == 1).any()))
        ks = np.broadcast_to(ks, tokens.shape)

    ids = tokens if canonical is None else np.take(canonical, tokens)
    if scheme == "goldfish-v1":
        marks = _starts_numpy(tokens.shape, starts, positions, halo)
        _check_first(reach=h - 1 + first, halo=halo, positions=positions)
        drop = _hash_drop_numpy(ids, marks, positions, ks, goldfish_coefficients(seed, h), first, min_context)
    elif scheme == "table":
        drop = np.zeros(tokens.shape, dtype=bool)
        if n >= h:
            key = np.ones((*tokens.shape[:-1], n - h + 1), dtype=np.int64)
            for j in range(h):
                key *= ids[..., j : n - h + 1 + j].astype(np.int64)
            table = _published_table().numpy()
            drop[..., h - 1 :] = table[key % _TABLE_SIZE] < _rate_numpy(ks, tokens.shape)[..., h - 1 :]
    elif scheme == "static":
        if positions is None:
            marks = _starts_numpy(tokens.shape, starts, None, 0)
            index = np.arange(n)
            positions = index - np.maximum.accumulate(np.where(marks, index, 0), axis=-1)
        divisor = np.maximum(ks, 1)
        drop = (positions % divisor == divisor - 1) & (ks > 0)
    else:
        draws = np.asarray(nonce).astype(np.uint64)[..., None]
        if draws.ndim > 1 and draws.shape[:-1] != tokens.shape[:-1]:
            raise ValueError(f"nonce: shape {draws.shape[:-1]} must be that of the rows, {tokens.shape[:-1]}")
        row = mix_numpy(np.uint64(seed) + np.uint64(GOLDEN) * (draws + np.uint64(1)))
        index = np.arange(1 - halo, n - halo + 1).astype(np.uint64)
        drop = mix_numpy(row + np.uint64(GOLDEN) * index) < _threshold_numpy(ks)
        drop = np.array(np.broadcast_to(drop, tokens.shape))
    drop[..., :halo] = False
    if exempt is not None:
        drop &= ~np.take(exempt, tokens)
    return drop


def _check_first(reach: int, halo: int, positions: Any) -> None:
    if reach > 0 and halo == 0 and positions is not None and bool((positions[..., 0] != 0).any()):
        raise ValueError(f"positions: a row begins inside a document; give its context, a halo of at least {reach}")


def _starts_numpy(shape: tuple[int, ...], starts: Any, positions: Any, halo: int) -> npt.NDArray[np.bool_]:
    if starts is not None:
        marks = np.array(starts, dtype=bool)
    elif positions is not None:
        marks = np.asarray(positions == 0)
    else:
        marks = np.zeros(shape, dtype=bool)
    if halo == 0:
        marks[..., 0] = True
    return marks


def _threshold_numpy(ks: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """floor(2^32 / k) * 2^32, to be compared with the whole key: (key >> 32) < t if and only if key < t * 2^32."""
    if ks.size > 2**16 > int(ks.max()):
        # Many positions, few values: a look-up is several times as fast as a 64-bit division.
        return _threshold_numpy(np.arange(int(ks.max()) + 1))[ks]
    wide = ks.astype(np.uint64)
    quotient = np.uint64(2**32) // np.maximum(wide, np.uint64(1))
    return np.where(wide == 0, np.uint64(0), quotient << np.uint64(32))


def _rate_numpy(ks: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """1 / k in float32, the type in which the published code compares (0 for k = 0)."""
    return np.broadcast_to(np.where(ks == 0, 0.0, 1.0 / np.maximum(ks, 1)).astype(np.float32), shape)


def mix_numpy(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX_2)
    return state ^ (state >> np.uint64(31))


def _hash_drop_numpy(
    ids: npt.NDArray[Any],
    marks: npt.NDArray[np.bool_],
    positions: Any,
    ks: npt.NDArray[Any],
    coefficients: tuple[int, ...],
    first: int,
    min_context: int,
) -> npt.NDArray[np.bool_]:
    """goldfish-v1. Rows are joined into one stream: a window never reaches into the row before, since a row begins
    with a document or with a halo as long as the window, whose own positions are not reported.
    """
    stream = np.ascontiguousarray(ids).reshape(-1)
    size = stream.size
    reach = len(coefficients) - 2 + first
    c = np.array(coefficients, dtype=np.uint64)
    # Every full window has the same sum of coefficients from the + 1 of its ids: one constant instead of n additions.
    constant = np.uint64(sum(coefficients) & _MASK)
    thresholds = _threshold_numpy(ks)
    per_position = thresholds.reshape(-1) if thresholds.ndim else None
    drop = np.empty(size, dtype=bool)

    widest = min(_BLOCK, size)
    values = np.zeros(widest + reach, dtype=np.uint64)
    keys = np.empty(widest, dtype=np.uint64)
    product = np.empty(widest, dtype=np.uint64)
    for begin in range(0, size, _BLOCK):
        count = min(_BLOCK, size - begin)
        left = min(reach, begin)
        values[reach - left : reach + count] = stream[begin - left : begin + count]
        key, part = keys[:count], product[:count]
        key.fill(constant)
        for j in range(1, len(c)):
            back = j - 1 + first
            np.multiply(values[reach - back : reach - back + count], c[j], out=part)
            np.add(key, part, out=key)
        if per_position is None:
            np.less(key, thresholds, out=drop[begin : begin + count])
        else:
            np.less(key, per_position[begin : begin + count], out=drop[begin : begin + count])

    # Near a document's start the windows above reach into the document before: these few are done anew.
    begins = np.flatnonzero(marks.reshape(-1))
    lengths = np.diff(begins, append=size)
    for depth in range(max(reach, 0 if positions is not None else min_context)):
        at = begins[lengths > depth] + depth
        if at.size == 0:
            break
        if depth < min_context:
            drop[at] = False
            continue
        short = np.full(at.size, c[0], dtype=np.uint64)
        for j in range(1, depth + 2 - first):
            short = short + c[j] * (stream[at - (j - 1 + first)].astype(np.uint64) + np.uint64(1))
        drop[at] = short < (thresholds if per_position is None else per_position[at])
    shaped = drop.reshape(ids.shape)
    if positions is not None:
        shaped &= positions >= min_context
    return shaped


# --------------------------------------------------------------------------------------------------------------- torch


def _signed(value: int) -> int:
    """The int64 that has the bits of the unsigned `value` mod 2^64."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def looked_at(tensor: Tensor) -> bool:
    """Whether its values are checked: another device's queue would stall, and a graph under compilation break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_values_torch(tokens: Tensor, k: int | Tensor) -> None:
    if not looked_at(tokens):
        return
    # int64, since torch's other unsigned types lack most operations.
    lowest = int(tokens.long().min())
    if lowest < 0:
        raise ValueError(f"tokens: id {lowest} is negative")
    if isinstance(k, Tensor):
        _check_ks(int(k.long().min()), bool((k.long() == 1).any()))


def _drop_torch(
    tokens: Tensor,
    *,
    k: Any,
    h: int,
    seed: int,
    first: int,
    min_context: int,
    scheme: str,
    starts: Any,
    exempt: Any,
    canonical: Any,
    halo: int,
    positions: Any,
    nonce: Any,
) -> Tensor:
    device, n = tokens.device, tokens.shape[-1]
    if k is None or tokens.numel() == 0:
        return torch.zeros(tokens.shape, dtype=torch.bool, device=device)
    _check_values_torch(tokens, k)
    ids = tokens.long()
    ks = torch.as_tensor(k, device=device)
    if ks.dim():
        # int64 before any arithmetic: 2^32 // k and the shift overflow narrower types.
        ks = ks.long().expand(tokens.shape)

    hashed = ids if canonical is None else canonical.long()[ids]
    # torch would cut the number that it compares narrower positions with.
    positions = None if positions is None else positions.long()
    index = torch.arange(n, device=device)
    if scheme == "goldfish-v1" or (scheme == "static" and positions is None):
        if starts is not None:
            marks = starts.bool().clone()
        elif positions is not None:
            marks = positions == 0
        else:
            marks = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
        if halo == 0:
            marks[..., 0] = True
        # With no start in view, every window inside the row is whole.
        depth = index - torch.where(marks, index, -h - 1).cummax(dim=-1).values

    if scheme == "goldfish-v1":
        if looked_at(tokens):
            _check_first(reach=h - 1 + first, halo=halo, positions=positions)
        # Past the cache, which torch.compile cannot trace.
        c = goldfish_coefficients.__wrapped__(seed, h)
        # Adding 2^63 turns the unsigned order of keys into the signed order of int64.
        key = torch.full(tokens.shape, _signed(c[0] + 2**63), dtype=torch.int64, device=device)
        for j in range(1, h + 1):
            back = j - 1 + first
            if back >= n:
                break
            inside = depth[..., back:] >= back
            key[..., back:] += torch.where(inside, (hashed[..., : n - back] + 1) * _signed(c[j]), 0)
        drop = key < _threshold_torch(ks)
        drop &= (depth if positions is None else positions) >= min_context
    elif scheme == "table":
        drop = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
        if n >= h:
            product = torch.ones_like(hashed[..., h - 1 :])
            for j in range(h):
                product *= hashed[..., j : n - h + 1 + j]
            rate = torch.where(ks == 0, 0.0, 1.0 / ks.clamp(min=1).double()).float().expand(tokens.shape)
            drop[..., h - 1 :] = _published_table().to(device)[product % _TABLE_SIZE] < rate[..., h - 1 :]
    elif scheme == "static":
        divisor = ks.clamp(min=1)
        drop = ((depth if positions is None else positions) % divisor == divisor - 1) & (ks > 0)
    else:
        draws = torch.as_tensor(nonce, device=device).long()[..., None]
        if draws.dim() > 1 and draws.shape[:-1] != tokens.shape[:-1]:
            raise ValueError(f"nonce: shape {tuple(draws.shape[:-1])} must be that of the rows")
        row = _mix_torch(_signed(seed) + _signed(GOLDEN) * (draws + 1))
        key = _mix_torch(row + _signed(GOLDEN) * (index + 1 - halo))
        drop = (key + _signed(2**63) < _threshold_torch(ks)).expand(tokens.shape).clone()
    drop[..., :halo] = False
    if exempt is not None:
        drop &= ~exempt[ids]
    return drop


def _threshold_torch(ks: Tensor) -> Tensor:
    """floor(2^32 / k) * 2^32 - 2^63 as int64 (k >= 2, so that it never exceeds 0)."""
    quotient = torch.where(ks == 0, 0, 2**32 // ks.clamp(min=1))
    return torch.where(quotient == 2**31, 0, (quotient << 32) + _signed(2**63))


def _mix_torch(state: Tensor) -> Tensor:
    """splitmix64's finaliser on int64: the arithmetic shift's copies of the sign are masked away."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _signed(MIX_1)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _signed(MIX_2)
    return state ^ ((state >> 31) & (2**33 - 1))
