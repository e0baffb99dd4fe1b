"""Which weights a method may change: SURE's rows, chosen anew at every step, and MemFlex's tensors, chosen once.

Both look at gradients of the whole batch before the step takes its own, so every process has to hold whole ones: ZeRO 0
to 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megafish.config import UnlearnConfig
from megafish.errors import InputError
from megafish.run import RunDir, read_json, write_atomic
from megafish.train.engine import Engine
from megafish.unlearn.data import steps_of
from megafish.unlearn.objective import Objective, StepPlan, Terms
from megafish.unlearn.reference import Reference

LOCATED = "located.json"
"""File of a MemFlex run: of every tensor the cosine, the size of the gradient, and whether it is trained."""

Term = Callable[[Terms], torch.Tensor]


class RowMask:
    """SURE (Zhang et al. 2025, arXiv 2410.16454, section 6): in each tensor the rows are trained whose gradient of the
    forget term has a norm at or above a percentile of all its rows; of a vector each entry is a row."""

    def __init__(self, model: nn.Module, percentile: float) -> None:
        self.percentile = percentile
        self.masks: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._hook(parameter))

    def choose(self, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
        """The rows of the next step."""
        self.masks = {}
        for parameter, gradient in gradients.items():
            norms = gradient.reshape(len(gradient), -1).norm(dim=1)
            limit = norms.quantile(self.percentile / 100)
            self.masks[parameter] = ((norms >= limit) & (norms > 0)).view(-1, *[1] * (gradient.ndim - 1))

    def _hook(self, parameter: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
        def mask(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * self.masks[parameter] if parameter in self.masks else gradient

        return mask


def term_gradients(
    engine: Engine,
    objective: Objective,
    plan: StepPlan,
    shares: Sequence[slice],
    reference: Reference | None,
    term: Term,
) -> dict[nn.Parameter, torch.Tensor]:
    """Gradient of a term of the global batch, fp32 and whole. Collective; leaves the engine's gradients alone."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}
    for mine in shares:
        terms = objective.loss(engine.module, plan, mine, engine.processes.device, reference)
        found = torch.autograd.grad(term(terms), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sums[parameter] += gradient
    for total in sums.values():
        dist.all_reduce(total)
    return sums


def located_tensors(
    engine: Engine, objective: Objective, shares: Sequence[slice], reference: Reference | None
) -> dict[str, Any]:
    """MemFlex (Tian et al. 2024, arXiv 2407.01920, section 4): tensors in which unlearning and retaining pull apart.

    They are those whose mean gradients of the forget set's and of the retain set's loss, over an epoch, have a cosine
    below `similarity`, and whose forget gradient's entries have a mean size above `magnitude`. Returns {name: [cosine,
    mean size, chosen]}. Collective. InputError where no tensor is left.
    """
    option = objective.settings.option
    steps = steps_of(1, len(objective.sets.forget), objective.config.train.global_batch_size)
    sums: list[dict[nn.Parameter, torch.Tensor]] = [{}, {}]
    for step in range(steps):
        plan = objective.plan(step)
        for total, term in zip(sums, (lambda terms: -terms.forget, lambda terms: terms.retain), strict=True):
            for parameter, gradient in term_gradients(engine, objective, plan, shares, reference, term).items():
                total[parameter] = total.get(parameter, torch.zeros_like(gradient)) + gradient / steps
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter not in sums[0]:
            continue
        forget, retain = (total[parameter].flatten().double() for total in sums)
        cosine = float(nn.functional.cosine_similarity(forget, retain, dim=0))
        size = float(forget.abs().mean())
        found[name] = [cosine, size, cosine < option("similarity") and size > option("magnitude")]
    if not any(chosen for _, _, chosen in found.values()):
        sizes = [size for _, size, _ in found.values()]
        cosines = [cosine for cosine, _, _ in found.values()]
        raise InputError(
            f"method=memflex: no tensor has a cosine below unlearn.similarity={option('similarity')} (they are "
            f"{min(cosines):.2f} to {max(cosines):.2f}) and a mean gradient above unlearn.magnitude="
            f"{option('magnitude')} (up to {max(sizes):.2g}): set them to what this model has"
        )
    return found


def read_located(run: RunDir, settings: UnlearnConfig, known_by: str) -> dict[str, Any] | None:
    """What was found when the run began; None at its beginning. InputError where another model, other texts or other
    thresholds found it. known_by: digest of the model and the texts."""
    path = run.path / LOCATED
    if not path.is_file():
        return None
    found = read_json(path)
    if found["of"] != _thresholds(settings, known_by):
        raise InputError(
            f"{path}: found with another starting model, other texts or thresholds than this run has: remove the file, "
            "and start the run anew"
        )
    tensors: dict[str, Any] = found["tensors"]
    return tensors


def write_located(run: RunDir, settings: UnlearnConfig, known_by: str, tensors: dict[str, Any]) -> None:
    """Keep what was found."""
    run.path.mkdir(parents=True, exist_ok=True)
    found = {"of": _thresholds(settings, known_by), "tensors": tensors}
    write_atomic(run.path / LOCATED, json.dumps(found, indent=1) + "\n")


def freeze_others(model: nn.Module, located: dict[str, Any]) -> None:
    """Leave the tensors alone that were not chosen."""
    for name, parameter in model.named_parameters():
        if name in located and not located[name][2]:
            parameter.register_hook(torch.zeros_like)


def _thresholds(settings: UnlearnConfig, known_by: str) -> list[Any]:
    return [known_by, settings.option("similarity"), settings.option("magnitude")]
