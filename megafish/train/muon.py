"""Muon: momentum whose update is orthogonalized, for the hidden matrices of a model under any ZeRO stage.

DeepSpeed's own Muon is not used: it clips by the norm of what is orthogonalized already (so that `grad_clip` shrinks
every step), takes a fused projection for one matrix, and compiles at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megafish.train.partition import FlatBuffer, Span

# Coefficients of the quintic (Jordan 2024, https://kellerjordan.github.io/posts/muon/): the steepest slope at zero that
# keeps singular values near 1, at the price of leaving them between 0.68 and 1.14 rather than at 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition U S V^T of `matrix` [rows, columns], approximately.

    Five steps of a Newton-Schulz iteration on matrix / ||matrix||_F: singular values above 0.003 of the norm come out
    between 0.68 and 1.14, smaller ones in proportion. Computed in bf16 on CUDA, as published, and in fp32 on a CPU;
    returned in that precision. A zero matrix stays zero.
    """
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (torch.linalg.vector_norm(x, dtype=torch.float32).to(x.dtype) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@dataclass(frozen=True)
class Matrix:
    """A weight that Muon trains."""

    parameter: torch.nn.Parameter
    shape: tuple[int, int]
    parts: tuple[int, ...]
    """Rows of the projections that are fused in it (queries, keys, values), each orthogonalized on its own."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]

    @property
    def cost(self) -> int:
        """Multiplications of one Newton-Schulz step, up to a factor."""
        return sum(rows * self.shape[1] * min(rows, self.shape[1]) for rows in self.parts)

    def direction(self, update: torch.Tensor) -> torch.Tensor:
        """The step for learning rate 1, fp32 flat, of this matrix's momentum, fp32 flat.

        Each part is orthogonalized and scaled by 0.2 sqrt(max(rows, columns)): its entries then have the root mean
        square of an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that learning rate and weight decay
        mean what they mean for AdamW.
        """
        columns = self.shape[1]
        parts = update.view(self.shape).split(self.parts)
        scaled = [orthogonalize(part).float() * (0.2 * math.sqrt(max(len(part), columns))) for part in parts]
        return torch.cat(scaled).flatten()


@dataclass(frozen=True)
class _Run:
    """Consecutive elements of a matrix in the flat tensor of some process."""

    matrix: int
    """Index into Muon.matrices."""
    begin: int
    """The first element, counted in the matrix row by row."""
    length: int
    start: int
    """The first element, counted in the flat tensor."""

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(-1).narrow(0, self.start, self.length)


@dataclass
class _Plan:
    """How the matrices in one flat tensor become whole: those that lie here, and those that several processes share."""

    whole: list[_Run] = field(default_factory=list)
    rounds: list[dict[int, dict[int, _Run]]] = field(default_factory=list)
    """Each round: owner's rank -> (holder's rank -> its run). A rank owns at most one matrix of a round."""


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `muon`, AdamW for the others, with one learning rate.

    The momentum is as sharded as the weights that the optimizer is given: each step, a process that shares a matrix
    with others sends its piece of the update to the one that orthogonalizes it, and gets its piece of the result back
    in fp32 (2 elements a parameter under ZeRO-3; under ZeRO-1 and 2 only the matrices that a partition's border cuts).
    A matrix is orthogonalized by one process, whole, so that the result does not depend on their number.

    State of a Muon tensor: `momentum`, fp32, of the tensor's own shape; of the others AdamW's `exp_avg`, `exp_avg_sq`
    and `step`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: list[Matrix],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.matrices = matrices
        self.momentum = momentum
        self.process_group: dist.ProcessGroup | None = None
        self.device = matrices[0].parameter.device
        self._plans: dict[torch.Tensor, _Plan] = {}
        self.place([FlatBuffer(m.parameter, [Span(m.parameter, 0, m.numel, 0)], groups[0], self) for m in matrices])

    def place(
        self,
        buffers: list[FlatBuffer],
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Say which parts of which matrices lie in the tensors that the optimizer steps. Collective.

        buffers: all that this process steps. process_group: those who share the matrices, if the buffers are parts;
        they have the same number of buffers, in the same order. device: where to orthogonalize and communicate, if not
        where the matrices are (offloaded partitions).
        """
        index_of = {matrix.parameter: index for index, matrix in enumerate(self.matrices)}
        buffers = [buffer for buffer in buffers if buffer.group["muon"]]
        own = [
            [_Run(index_of[span.parameter], span.begin, span.end - span.begin, span.at) for span in buffer.spans]
            for buffer in buffers
        ]
        if any(buffer.replicated for buffer in buffers):
            process_group = None
        everyone = [own]
        if process_group is not None:
            everyone = [own] * dist.get_world_size(process_group)
            dist.all_gather_object(everyone, own, process_group)
        self.process_group = process_group
        self.device = device or self.device
        rank = 0 if process_group is None else dist.get_rank(process_group)
        self._plans = {
            buffer.master: _make_plan(self.matrices, [runs[index] for runs in everyone], rank)
            for index, buffer in enumerate(buffers)
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. The gradients of the Muon tensors are used up."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    self._step_muon(flat, group["lr"], group["weight_decay"])

    def _step_muon(self, flat: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        update = flat.grad
        assert update is not None
        state = self.state[flat]
        if not state:
            state["momentum"] = torch.zeros_like(flat)
        state["momentum"].lerp_(update, 1 - self.momentum)
        update.lerp_(state["momentum"], self.momentum)  # Nesterov's
        plan = self._plans[flat]
        for run in plan.whole:
            piece = run.of(update)
            piece.copy_(self.matrices[run.matrix].direction(piece.to(self.device)))
        for round_ in plan.rounds:
            self._exchange(update, round_)
        flat.mul_(1 - learning_rate * weight_decay)
        flat.add_(update, alpha=-learning_rate)

    def _exchange(self, update: torch.Tensor, round_: dict[int, dict[int, _Run]]) -> None:
        """Replace this process's pieces of the matrices of one round by their directions. Collective."""
        group = self.process_group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        mine = round_.get(rank, {})
        # What goes to each owner, and what comes from each holder of the matrix owned here.
        sent = [round_[owner].get(rank) if owner in round_ else None for owner in range(world)]
        received = [mine.get(holder) for holder in range(world)]
        outgoing = _join([run.of(update) for run in sent if run is not None], update, self.device)
        incoming = outgoing.new_empty(_total(received))
        _all_to_all(incoming, outgoing, received, sent, group)
        if mine:
            matrix = self.matrices[next(iter(mine.values())).matrix]
            whole = incoming.new_empty(matrix.numel)
            for run, piece in _pieces(incoming, received):
                whole.narrow(0, run.begin, run.length).copy_(piece)
            whole = matrix.direction(whole)
            incoming = torch.cat([whole.narrow(0, run.begin, run.length) for run, _ in _pieces(incoming, received)])
        _all_to_all(outgoing, incoming, sent, received, group)
        for run, piece in _pieces(outgoing, sent):
            run.of(update).copy_(piece)


def _make_plan(matrices: list[Matrix], everyone: list[list[_Run]], rank: int) -> _Plan:
    """`everyone`: the runs of each process in the tensor that the plan is for."""
    holders: dict[int, dict[int, _Run]] = {}
    for holder, runs in enumerate(everyone):
        for run in runs:
            holders.setdefault(run.matrix, {})[holder] = run
    plan = _Plan()
    load = [0] * len(everyone)
    shared = []
    for index, runs_of in holders.items():
        assert sum(run.length for run in runs_of.values()) == matrices[index].numel, index
        if len(runs_of) > 1:
            shared.append(index)
            continue
        (holder,) = runs_of
        load[holder] += matrices[index].cost
        if holder == rank:
            plan.whole.append(runs_of[rank])
    # The most expensive first, each to the least loaded of those that hold a part of it.
    owned: dict[int, list[int]] = {}
    for index in sorted(shared, key=lambda index: (-matrices[index].cost, index)):
        owner = min(holders[index], key=lambda holder: (load[holder], holder))
        load[owner] += matrices[index].cost
        owned.setdefault(owner, []).append(index)
    for turn in range(max(map(len, owned.values()), default=0)):
        plan.rounds.append({owner: holders[mine[turn]] for owner, mine in owned.items() if turn < len(mine)})
    return plan


def _join(pieces: list[torch.Tensor], like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.cat(pieces).to(device) if pieces else like.new_empty(0, device=device)


def _total(runs: list[_Run | None]) -> int:
    return sum(run.length for run in runs if run is not None)


def _pieces(flat: torch.Tensor, runs: list[_Run | None]) -> Iterator[tuple[_Run, torch.Tensor]]:
    """The runs that lie one behind the other in `flat`, each with its elements."""
    at = 0
    for run in runs:
        if run is not None:
            yield run, flat.narrow(0, at, run.length)
            at += run.length


def _all_to_all(
    output: torch.Tensor,
    input_: torch.Tensor,
    received: list[_Run | None],
    sent: list[_Run | None],
    group: dist.ProcessGroup | None,
) -> None:
    incoming, outgoing = ([0 if run is None else run.length for run in runs] for runs in (received, sent))
    dist.all_to_all_single(output, input_, output_split_sizes=incoming, input_split_sizes=outgoing, group=group)
