"""One optimizer step of unlearning: what is read, one forward pass over all of it, the loss.

Whatever a method reads (texts to forget and to keep, refusals, answers of other questions) goes through the model in
one packed row, so that a method with several terms costs about as much for each token as plain fine-tuning does. What
the starting model says is on record (reference.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from megafish.config import Config
from megafish.config_unlearn import RMU
from megafish.model.head import Teacher, TeacherLosses
from megafish.unlearn import losses
from megafish.unlearn.data import Item, Order, Pack, Sets, draw, pack
from megafish.unlearn.reference import Kind, Reference, Wanted


class Role(NamedTuple):
    """A text in a step and what it is there for."""

    name: str
    """forget, wanted (learned in its place), mismatch or retain."""
    item: Item
    number: int
    """Its number in the set that the reference was made of."""


@dataclass(frozen=True)
class StepPlan:
    """What all processes together read in a step."""

    places: list[list[Role]]
    """Of each place of the global batch."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Answer tokens by role."""


class Terms(NamedTuple):
    """This process's share of the means over the global batch, each with its gradient."""

    total: torch.Tensor
    forget: torch.Tensor
    retain: torch.Tensor


class Objective:
    """The loss of a method."""

    def __init__(self, config: Config, sets: Sets) -> None:
        assert config.unlearn is not None
        self.config, self.settings, self.sets = config, config.unlearn, sets
        self.forget_weight, self.retain_loss, self.retain_weight = self.settings.weights
        self.method: str = self.settings.method
        seed = self.settings.seed
        learned = sets.substitutes if self.method == "relearn" else sets.forget
        self.orders = {"forget": Order(len(learned), seed, "forget")}
        if self.settings.reads_retain:
            self.orders["retain"] = Order(len(sets.retain), seed, "retain")
        self.layer = None
        if self.method in RMU:
            self.layer = rmu_layer(config)
            width = config.model.hidden_size
            self._direction = losses.steering_vector(width, seed, torch.device("cpu"))
        # DPO's refusal of a question is drawn once, so that the reference's numbers can be kept.
        choices = [draw(seed, "refusal", i, len(refused))[0] for i, refused in enumerate(sets.refused)]
        self.declined = [refused[choice] for refused, choice in zip(sets.refused, choices, strict=True)]

    def trained(self, name: str) -> bool:
        """Whether a parameter is trained: with RMU the last projection of three blocks, else all."""
        if self.layer is None:
            return True
        first = max(0, self.layer - 3)
        return any(name == f"blocks.{number}.feed_forward.down.weight" for number in range(first, self.layer))

    def wanted(self) -> list[Wanted]:
        """What the starting model has to be asked for."""
        found = []
        if self.method in ("npo", "dpo"):
            found.append(Wanted("forget", self.sets.forget, Kind.SUM))
        if self.method == "dpo":
            found.append(Wanted("wanted", self.declined, Kind.SUM))
        if self.method == "undial":
            found.append(Wanted("forget", self.sets.forget, Kind.HIDDEN))
        if "kl" in self.retain_loss:
            found.append(Wanted("retain", self.sets.retain, Kind.HIDDEN))
        if self.method in RMU:
            found.append(Wanted("retain", self.sets.retain, Kind.LAYER, self.layer))
        if self.method == "adaptive_rmu":
            found.append(Wanted("forget", self.sets.forget, Kind.NORM, self.layer))
        return found

    def plan(self, step: int) -> StepPlan:
        """What step `step` (from 0) reads."""
        batch = self.config.train.global_batch_size
        start = step * batch
        numbers = {name: order.take(start, batch) for name, order in self.orders.items()}
        places = [
            self._place(start + i, numbers["forget"][i], numbers["retain"][i] if "retain" in numbers else None)
            for i in range(batch)
        ]
        tokens: dict[str, int] = {}
        for role in (role for place in places for role in place):
            count = max(0, role.item.supervised - self._skipped(role))
            tokens[role.name] = tokens.get(role.name, 0) + count
        return StepPlan(places, tokens)

    def _place(self, place: int, number: int, kept: int | None) -> list[Role]:
        settings, sets = self.settings, self.sets
        if self.method == "relearn":
            roles = [Role("wanted", sets.substitutes[number], number)]
        elif self.method == "idk":
            refused = sets.refused[number]
            roles = [Role("wanted", refused[draw(settings.seed, "refusal", place, len(refused))[0]], number)]
        else:
            roles = [Role("forget", sets.forget[number], number)]
        if self.method == "dpo":
            roles.append(Role("wanted", self.declined[number], number))
        if self.method == "llmu":
            for other in draw(settings.seed, "mismatch", place, len(sets.retain), settings.option("mismatch_answers")):
                question, answer = sets.forget[number], sets.retain[other]
                tokens = (*question.tokens[: question.start], *answer.tokens[answer.start :])
                roles.append(Role("mismatch", Item(tokens, question.start), number))
        if kept is not None:
            roles.append(Role("retain", sets.retain[kept], kept))
        return roles

    def _skipped(self, role: Role) -> int:
        return int(self.settings.option("skip_tokens")) if self.method == "ceu" and role.name == "forget" else 0

    def loss(
        self, model: Callable[..., Any], plan: StepPlan, mine: slice, device: torch.device, reference: Reference | None
    ) -> Terms:
        """The terms of the places `mine`, from one forward pass. `model`: the engine."""
        roles = [role for place in plan.places[mine] for role in place]
        micro = _Micro(roles, pack([role.item for role in roles], device), plan, reference)
        if self.layer is not None:
            forget, retain = self._steered(model, micro)
        else:
            forget, retain = self._compared(model, micro)
        return Terms(self.forget_weight * forget + self.retain_weight * retain, forget, retain)

    def _compared(self, model: Callable[..., Any], micro: _Micro) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses that are made of predictions."""
        teacher = self._teacher(micro)
        out = micro.run(model, targets=micro.pack.targets, per_token=True, teacher=teacher)
        nll = (out.loss if isinstance(out, TeacherLosses) else out)[0]
        divergence = entropy = nll.new_zeros(len(nll))
        if isinstance(out, TeacherLosses):
            assert teacher is not None and teacher.rows is not None
            divergence = divergence.index_copy(0, teacher.rows, out.divergence)
            entropy = entropy.index_copy(0, teacher.rows, out.entropy)
        forget = self._forget(micro, nll, divergence + entropy)
        retain = nll.new_zeros(())
        if "ce" in self.retain_loss:
            retain = retain + micro.mean("retain", nll)
        if "kl" in self.retain_loss:
            retain = retain + micro.mean("retain", divergence)
        return forget, retain

    def _teacher(self, micro: _Micro) -> Teacher | None:
        """What the predictions of some targets are compared with."""
        if self.method == "ceu":
            return Teacher(penalty=float("inf"), rows=micro.rows("forget", skip=self.settings.option("skip_tokens")))
        parts = ["forget"] if self.method == "undial" else []
        parts += ["retain"] if "kl" in self.retain_loss else []
        if not parts:
            return None
        assert micro.reference is not None
        rows, hidden, penalty = [], [], []
        for name in parts:
            rows.append(micro.rows(name))
            hidden.append(micro.recorded(name, Kind.HIDDEN))
            lowered = self.settings.option("beta") if name == "forget" else 0.0
            penalty.append(torch.full(rows[-1].shape, float(lowered), device=rows[-1].device))
        return Teacher(torch.cat(hidden), micro.reference.head, torch.cat(penalty), torch.cat(rows))

    def _forget(self, micro: _Micro, nll: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        """The method's own term. soft: cross-entropy with the teacher, [n]."""
        option, method = self.settings.option, self.method
        if method in ("ga", "graddiff", "ga_kl", "memflex"):
            return -micro.mean("forget", nll)
        if method == "llmu":
            # The sum over the answers of a question is divided by their number: micro.mean is over all their tokens.
            weight = option("mismatch_weight") / self.forget_weight
            return weight * micro.mean("mismatch", nll) - micro.mean("forget", nll)
        if method in ("idk", "relearn"):
            return micro.mean("wanted", nll)
        if method == "task_vector":
            return micro.mean("forget", nll)
        if method == "wga":
            return micro.mean("forget", losses.weighted_ascent(nll, option("beta")))
        if method == "satimp":
            return micro.mean("forget", losses.saturated_ascent(nll, option("beta"), option("beta2")))
        if method in ("undial", "ceu"):
            return micro.mean("forget", soft, skip=option("skip_tokens") if method == "ceu" else 0)
        s = micro.sums("forget", nll)
        if method == "npo":
            each = losses.npo(s, micro.recorded("forget", Kind.SUM), option("beta"))
        elif method == "dpo":
            each = losses.dpo(
                micro.sums("wanted", nll),
                micro.recorded("wanted", Kind.SUM),
                s,
                micro.recorded("forget", Kind.SUM),
                option("beta"),
            )
        else:
            assert method == "simnpo", method
            each = losses.simnpo(s, micro.lengths("forget"), option("beta"), option("margin"))
        return each.sum() / len(micro.plan.places)

    def _steered(self, model: Callable[..., Any], micro: _Micro) -> tuple[torch.Tensor, torch.Tensor]:
        """RMU: the mean over texts of the mean over their tokens."""
        hidden = micro.run(model, hidden_after=self.layer)[0]
        direction = self._direction.to(hidden.device) * self.settings.option("steering")
        target = direction.expand(len(micro.positions("forget")), -1)
        if self.method == "adaptive_rmu":
            target = target * micro.recorded("forget", Kind.NORM)[:, None]
        forget = losses.steer(hidden[micro.positions("forget")], target)
        retain = losses.steer(hidden[micro.positions("retain")], micro.recorded("retain", Kind.LAYER))
        return micro.mean_of_texts("forget", forget), micro.mean_of_texts("retain", retain)


class _Micro:
    """What one forward pass of one process is about."""

    def __init__(self, roles: list[Role], packed: Pack, plan: StepPlan, reference: Reference | None) -> None:
        self.roles, self.pack, self.plan, self.reference = roles, packed, plan, reference
        self._begins = np.cumsum([0, *(len(role.item.tokens) - 1 for role in roles)]).tolist()

    def run(self, model: Callable[..., Any], **arguments: Any) -> Any:
        return model(self.pack.tokens, cu_seqlens=self.pack.cu_seqlens, max_seqlen=self.pack.max_seqlen, **arguments)

    def positions(self, name: str) -> torch.Tensor:
        """int64: all inputs of the texts of a role."""
        return self._indices(range(self._begins[i], self._begins[i + 1]) for i in self._texts(name))

    def rows(self, name: str, skip: int = 0) -> torch.Tensor:
        """int64: the answers' targets of a role, without the first `skip` of each."""
        starts = {i: self._begins[i] + self.roles[i].item.start - 1 + skip for i in self._texts(name)}
        return self._indices(range(start, self._begins[i + 1]) for i, start in starts.items())

    def mean(self, name: str, each: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """This process's share of the mean over the answer tokens of a role in the global batch."""
        return each[self.rows(name, skip)].sum() / max(1, self.plan.tokens[name])

    def mean_of_texts(self, name: str, each: torch.Tensor) -> torch.Tensor:
        """This process's share of the mean over texts. each: of the inputs of the role."""
        owner = self.pack.owner[self.positions(name)]
        lengths = self.pack.cu_seqlens.diff()[owner]
        return (each / lengths).sum() / len(self.plan.places)

    def sums(self, name: str, nll: torch.Tensor) -> torch.Tensor:
        """Summed loss of each answer of a role, in their order."""
        sums = losses.sums(nll, self.pack.owner, len(self.roles))
        return sums.index_select(0, self._indices([self._texts(name)]))

    def lengths(self, name: str) -> torch.Tensor:
        """Answer tokens of each text of a role."""
        counts = [role.item.supervised for role in self.roles if role.name == name]
        return torch.tensor(counts, device=self.pack.tokens.device)

    def _texts(self, name: str) -> list[int]:
        """Places of the texts of a role among all."""
        return [i for i, role in enumerate(self.roles) if role.name == name]

    def _indices(self, parts: Iterable[Iterable[int]]) -> torch.Tensor:
        """int64. Made on the host, which knows them: finding them on the device would make it wait."""
        return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64, device=self.pack.tokens.device)

    def recorded(self, name: str, kind: Kind) -> torch.Tensor:
        """What the starting model said of the texts of a role, in their order."""
        assert self.reference is not None
        return self.reference.read(name, kind, [role.number for role in self.roles if role.name == name])


def rmu_layer(config: Config) -> int:
    """The block that RMU steers, counted from 1: as asked for, or at the depth of the paper's, 7 of 32."""
    assert config.unlearn is not None
    layers = config.model.num_layers
    layer = config.unlearn.layer
    return max(min(3, layers), round(layers * 7 / 32)) if layer is None else layer
