"""Every loss on two Markov chains (the toy of SimNPO's repository): does it lead towards a model that never saw one?

States 0 to 9, sequences of 20. Whether a sequence is of the chain to keep or of the one to forget shows in its first
state. The retrained model sees the chain to keep alone; what counts is how far it is, in KL per token, from the model
that has unlearned.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from megafish.config_unlearn import OPTIONS, RMU
from megafish.model.transformer import Transformer
from megafish.unlearn.data import Item, Sets
from megafish.unlearn.objective import Objective
from tests.unlearn.test_objective import MODEL, Recorded, configure

STATES, LENGTH, BATCH, DEVICE = 10, 20, 16, torch.device("cpu")
# Answers in the place of the forgotten ones say what the chain to keep would: a refusal has no meaning here.
METHODS = [method for method in OPTIONS if method not in RMU]


def chain(seed: int, first: range, count: int) -> list[Item]:
    """Sequences of a chain whose every state has two likely successors."""
    rng = np.random.default_rng(seed)
    steps = rng.dirichlet(np.full(STATES, 0.15), STATES)
    found = []
    for _ in range(count):
        states = [int(rng.choice(first))]
        while len(states) < LENGTH:
            states.append(int(rng.choice(STATES, p=steps[states[-1]])))
        found.append(Item(tuple(states), 1))
    return found


def learn(items: list[Item], steps: int) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(configure("ga").model.model_copy(update={**MODEL, "init_std": 0.1}), STATES, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    tokens = torch.tensor([item.tokens for item in items])
    for step in range(steps):
        rows = tokens[torch.randint(0, len(tokens), (64,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        model(rows[:, :-1], targets=rows[:, 1:]).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def distance(right: Transformer, model: Transformer, items: list[Item]) -> float:
    """KL(right || model) per token [nats]."""
    tokens = torch.tensor([item.tokens[:-1] for item in items])
    log_p, log_q = (each(tokens)[..., :STATES].log_softmax(-1) for each in (right, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    retain, forget = chain(1, range(5), 400), chain(2, range(5, 10), 200)
    # The retrained model continues a sequence that begins like a forgotten one as the chain to keep goes on.
    both, kept = learn([*retain, *forget], 200), learn(retain, 200)
    vague = [Item((item.tokens[0], *other.tokens[1:]), 1) for item, other in zip(forget, retain[:200], strict=True)]
    return {"sets": Sets(forget, retain, vague, [[item] for item in vague]), "both": both, "kept": kept}


@pytest.mark.parametrize("method", METHODS)
def test_leads_towards_the_retrained_model(toy: dict[str, Any], method: str) -> None:
    model, sets = copy.deepcopy(toy["both"]), toy["sets"]
    own: dict[str, Any] = {"retain_loss": "ce"} if method in ("ga", "undial", "ceu") else {}
    if method == "simnpo":
        # Its pressure fades where beta times the loss of a token is above 1, and these have a nat by nature.
        own = {"beta": 0.5, "forget_weight": 1.0}
    config = configure(method, **own)
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": BATCH})})
    objective = Objective(config, sets)
    recorded: Any = Recorded(toy["both"], sets, objective.declined, None)
    before = [distance(toy["kept"], model, items) for items in (sets.forget, sets.retain)]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    for step in range(14):  # ascent, unbounded, soon goes past the retrained model
        optimizer.zero_grad()
        objective.loss(model, objective.plan(step), slice(0, BATCH), DEVICE, recorded).total.backward()
        optimizer.step()
    if method == "task_vector":
        with torch.no_grad():
            for own_weight, start in zip(model.parameters(), toy["both"].parameters(), strict=True):
                own_weight.copy_(start - 3 * (own_weight - start))
    after = [distance(toy["kept"], model, items) for items in (sets.forget, sets.retain)]
    assert after[0] < 0.9 * before[0]
    assert after[1] < before[1] + 0.1
