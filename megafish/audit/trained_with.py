"""Are data and mask those that the checkpoint was trained with?"""

from __future__ import annotations

from typing import Any

from megafish.audit.target import Target
from megafish.errors import InputError
from megafish.model.load import STATE

_TRAINED_WITH = {
    "data": (
        "the training data are not those the checkpoint was trained on",
        "restore the corpora and the section data of {config} of that time",
    ),
    "mask": (
        "the mask is not the one the checkpoint was trained with",
        "restore the section goldfish of {config} and the tokenizer of that time",
    ),
}
"""What state.json must hold like the audit finds it: what a difference means, and what to do."""


def check_trained_with(target: Target, now: dict[str, Any]) -> None:
    """Refuse data or a mask that the checkpoint never met: counts of copies and dropped tokens would be made up."""
    file = target.run.checkpoint(target.step) / STATE
    state = target.state
    assert state is not None
    for key, (meaning, remedy) in _TRAINED_WITH.items():
        if not isinstance(state.get(key), dict):
            raise InputError(f"{file}: does not say what was trained with ({key}): the checkpoint is damaged")
        if differences := _differing(state[key], now[key], key):
            raise InputError(
                f"{file.parent}: {meaning} (differs: {', '.join(differences)}): "
                f"{remedy.format(config=target.run.config_file)}, or train again"
            )


def _differing(saved: Any, now: Any, path: str) -> list[str]:
    """Paths of the values that differ, such as "data.sources.0.slots"."""
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        # Long lists of numbers are named as a whole.
        if not any(isinstance(value, dict) for value in (*saved, *now)):
            return [] if saved == now else [path]
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = sorted(saved.keys() | now.keys())
        return [found for key in keys for found in _differing(saved.get(key), now.get(key), f"{path}.{key}")]
    return [] if saved == now else [path]
