"""Every method's loss and gradient against its formula, computed in float64 text by text, without packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megafish.config import Config
from megafish.config_unlearn import OPTIONS, RMU
from megafish.model.transformer import Transformer
from megafish.unlearn.data import Item, Sets
from megafish.unlearn.objective import Objective, Role
from megafish.unlearn.reference import Kind

VOCAB, BATCH = 50, 4
MODEL = {"num_layers": 4, "hidden_size": 24, "num_heads": 2, "intermediate_size": 32, "init_std": 0.3}


def configure(method: str, **more: Any) -> Config:
    needs = {"refusals": None, "substitutes": "vague.jsonl", "layer": None, "beta": None}
    section = {"model": "start", "method": method, "forget": ["f.jsonl"], "retain": ["r.jsonl"]}
    if method == "relearn":
        section["substitutes"] = needs["substitutes"]
    return Config.model_validate(
        {
            "name": "test",
            "model": MODEL,
            "train": {"steps": 3, "global_batch_size": BATCH, "micro_batch_size": 2, "precision": "fp32"},
            "unlearn": {**section, **more},
        }
    )


def texts(count: int, seed: int) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (), generator=generator))
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        found.append(Item(tuple(ids), int(torch.randint(1, 4, (), generator=generator))))
    return found


@pytest.fixture(scope="module")
def sets() -> Sets:
    forget = texts(5, 1)
    refused = [
        [Item((*item.tokens[: item.start], *end), item.start) for end in ((7, 8), (9,), (3, 2, 1))] for item in forget
    ]
    return Sets(forget, texts(6, 2), texts(3, 3), refused)


def make(seed: int) -> Transformer:
    return Transformer(configure("ga").model, VOCAB, seed=seed).double()


class Recorded:
    """The reference's part, answered by a second model that is there in full."""

    def __init__(self, model: Transformer, sets: Sets, declined: list[Item], layer: int | None) -> None:
        self.model, self.layer = model, layer
        self.items = {"forget": sets.forget, "retain": sets.retain, "wanted": declined}
        self.head = model.head.weight.detach()

    @torch.no_grad()
    def read(self, name: str, kind: Kind, numbers: list[int]) -> torch.Tensor:
        found = []
        for item in (self.items[name][number] for number in numbers):
            if kind is Kind.SUM:
                found.append(nll(self.model, item).sum()[None])
            elif kind is Kind.HIDDEN:
                found.append(states(self.model, item, 4)[item.start - 1 :])
            else:
                hidden = states(self.model, item, self.layer or 0)
                found.append(hidden if kind is Kind.LAYER else hidden.norm(dim=-1))
        return torch.cat(found)


def states(model: Transformer, item: Item, layer: int) -> torch.Tensor:
    return model(torch.tensor([item.tokens[:-1]]), hidden_after=layer)[0]


def logits(model: Transformer, item: Item) -> torch.Tensor:
    """Of the answer's tokens, [n, V]."""
    return (states(model, item, 4) @ model.head.weight.t())[item.start - 1 :, :VOCAB]


def answer(item: Item) -> torch.Tensor:
    return torch.tensor(item.tokens[item.start :])


def nll(model: Transformer, item: Item) -> torch.Tensor:
    return -logits(model, item).log_softmax(-1).gather(1, answer(item)[:, None])[:, 0]


def kl(model: Transformer, start: Transformer, item: Item) -> torch.Tensor:
    log_p, log_q = logits(start, item).detach().log_softmax(-1), logits(model, item).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_mean(each: Callable[[Item], torch.Tensor], items: list[Item]) -> torch.Tensor:
    return torch.cat([each(item) for item in items]).mean()


def formula(method: str, model: Transformer, start: Transformer, roles: list[Role], objective: Objective) -> Any:
    """Table A of the field, one method after another."""
    of = {
        name: [role.item for role in roles if role.name == name] for name in ("forget", "wanted", "mismatch", "retain")
    }
    forget, retain = of["forget"], of["retain"]

    def loss(item: Item) -> torch.Tensor:
        return nll(model, item)

    def gap(item: Item) -> torch.Tensor:
        return nll(model, item).sum() - nll(start, item).sum().detach()

    ce = token_mean(loss, retain) if retain else 0.0
    klr = token_mean(lambda item: kl(model, start, item), retain) if retain else 0.0

    def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
        return -torch.log1p(torch.exp(-x))

    if method == "ga":
        return -token_mean(loss, forget)
    if method == "graddiff":
        return -token_mean(loss, forget) + ce
    if method == "memflex":
        return -0.4 * token_mean(loss, forget) + 2 * ce
    if method == "task_vector":
        return token_mean(loss, forget)
    if method == "ga_kl":
        return -token_mean(loss, forget) + klr
    if method == "idk":
        return token_mean(loss, of["wanted"]) + ce
    if method == "relearn":
        return token_mean(loss, of["wanted"]) + ce + klr
    if method == "npo":
        return sum(-2 / 0.1 * log_sigmoid(0.1 * gap(item)) for item in forget) / len(forget) + ce
    if method == "dpo":
        pairs = zip(of["wanted"], forget, strict=True)
        return sum(-2 / 0.1 * log_sigmoid(0.1 * (gap(bad) - gap(good))) for good, bad in pairs) / len(forget) + ce
    if method == "simnpo":
        each = [-2 / 4.5 * log_sigmoid(4.5 * loss(item).mean()) for item in forget]
        return 0.125 * sum(each) / len(each) + ce
    if method == "llmu":
        return -0.5 * token_mean(loss, forget) + token_mean(loss, of["mismatch"]) + klr
    if method == "wga":
        return -token_mean(lambda i: torch.exp(-loss(i)).detach() * loss(i), forget) + ce
    if method == "satimp":

        def satisfied(item: Item) -> torch.Tensor:
            p = torch.exp(-loss(item)).detach()
            return p**5 * (1 - p) * loss(item)

        return -token_mean(satisfied, forget) + 0.1 * ce
    if method == "undial":

        def softened(item: Item) -> torch.Tensor:
            z = logits(start, item).detach().clone()
            z[torch.arange(len(z)), answer(item)] -= 10.0
            return -(z.softmax(-1) * logits(model, item).log_softmax(-1)).sum(-1)

        return token_mean(softened, forget)
    if method == "ceu":

        def without(item: Item) -> torch.Tensor:
            z = logits(model, item)
            own = z.detach().clone()
            own[torch.arange(len(z)), answer(item)] = -math.inf
            return -(own.softmax(-1) * z.log_softmax(-1)).sum(-1)[1:]

        return token_mean(without, forget)
    assert method in RMU
    layer = objective.layer or 0
    u = objective._direction.double()

    def aside(item: Item) -> torch.Tensor:
        far = 6.5 if method == "rmu" else 2.0 * states(start, item, layer).norm(dim=-1, keepdim=True).detach()
        return (states(model, item, layer) - far * u).square().mean()

    def near(item: Item) -> torch.Tensor:
        return (states(model, item, layer) - states(start, item, layer).detach()).square().mean()

    return (sum(map(aside, forget)) + 1200 * sum(map(near, retain))) / BATCH  # type: ignore[arg-type]


@pytest.mark.parametrize("method", list(OPTIONS))
def test_equals_the_formula(method: str, sets: Sets) -> None:
    model, start = make(3), make(4)
    objective = Objective(configure(method), sets)
    recorded: Any = Recorded(start, sets, objective.declined, objective.layer)
    plan = objective.plan(1)
    names = dict(model.named_parameters())
    # In two micro-batches, as two processes would take them; a mean over the whole batch all the same.
    total = sum(
        objective.loss(model, plan, mine, torch.device("cpu"), recorded).total for mine in (slice(0, 2), slice(2, 4))
    )
    wanted = formula(method, model, start, [role for place in plan.places for role in place], objective)
    # All is float64 but the rotations, which are fp32 (a text stands at other places of a pack than alone), and RMU's
    # differences.
    tolerance = 1e-5
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-8)
    grads = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    expected = torch.autograd.grad(wanted, list(names.values()), allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in grads)
    for name, grad, right in zip(names, grads, expected, strict=True):
        assert (grad is None) == (right is None), name
        if grad is not None:
            size = float(right.abs().max())
            torch.testing.assert_close(grad, right, rtol=tolerance, atol=tolerance * max(size, 1e-6), msg=name)


def test_npo_is_gradient_ascent_for_small_beta(sets: Sets) -> None:
    """2404.05868, section 3: the gradient of NPO tends to that of ascent on the summed loss."""
    model, start = make(3), make(4)
    weight = model.head.weight
    objective = Objective(configure("npo", beta=1e-6, retain_loss="none"), sets)
    plan, recorded = objective.plan(0), Recorded(start, sets, [], None)
    total = objective.loss(model, plan, slice(0, BATCH), torch.device("cpu"), recorded).total  # type: ignore[arg-type]
    ascent: Any = -sum(nll(model, role.item).sum() for place in plan.places for role in place) / BATCH
    grads = [torch.autograd.grad(loss, weight)[0] for loss in (total, ascent)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6 * float(grads[1].abs().max()))


def test_other_text_of_a_pack_changes_nothing(sets: Sets) -> None:
    """No padding and no prompt takes part: a text's loss is the same alone and among others."""
    model = make(3)
    objective = Objective(configure("ga"), sets)
    plan = objective.plan(0)
    whole = objective.loss(model, plan, slice(0, 4), torch.device("cpu"), None).forget
    parts = sum(objective.loss(model, plan, slice(i, i + 1), torch.device("cpu"), None).forget for i in range(4))
    torch.testing.assert_close(whole, parts, rtol=1e-7, atol=0)


def test_rmu_trains_three_projections(sets: Sets) -> None:
    objective = Objective(configure("rmu", layer=4), sets)
    names = [name for name, _ in make(3).named_parameters() if objective.trained(name)]
    assert names == [f"blocks.{number}.feed_forward.down.weight" for number in (1, 2, 3)]
    assert Objective(configure("rmu"), sets).layer == 3


def test_every_text_is_read_once_an_epoch(sets: Sets) -> None:
    objective = Objective(configure("graddiff"), sets)
    read = [
        role.number
        for step in range(5)
        for place in objective.plan(step).places
        for role in place
        if role.name == "forget"
    ]
    assert [sorted(read[i : i + 5]) for i in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert read[:5] != read[5:10]
    assert objective.plan(3) == Objective(configure("graddiff"), sets).plan(3)


def test_a_weight_scales_its_term(sets: Sets, tmp_path: Path) -> None:
    model = make(3)
    objective = Objective(configure("graddiff", forget_weight=3.0, retain_weight=0.5), sets)
    terms = objective.loss(model, objective.plan(0), slice(0, 4), torch.device("cpu"), None)
    torch.testing.assert_close(terms.total, 3 * terms.forget + 0.5 * terms.retain, rtol=1e-12, atol=0)
