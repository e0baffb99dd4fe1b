"""A sweep as a file for `wandb sweep`, whose agents run the same command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from megafish.config_yaml import dump_yaml
from megafish.errors import InputError
from megafish.sweep.expand import RUNS
from megafish.sweep.spec import Choice, Distribution, Sweep

_DISTRIBUTIONS = {"uniform": "uniform", "log_uniform": "log_uniform_values", "integer": "int_uniform"}
# Groups under which the tracker logs the keys of metrics.jsonl.
_GROUPS = {"valid_loss": "valid", "valid_bpb": "valid", "loss_dropped": "goldfish", "loss_kept": "goldfish"}


def wandb_sweep(sweep: Sweep, file: Path, overrides: list[str]) -> str:
    """The text of the file. InputError for what wandb's sweeps cannot express."""
    for name, given in (("zip", sweep.zip), ("exclude", sweep.exclude)):
        if given:
            raise InputError(
                f"{file}: {name} cannot be said in a wandb sweep: use --on local or --on slurm, or leave it out"
            )
    if sweep.repeats > 1 and len(sweep.repeat_keys) > 1:
        keys = " and ".join(sweep.repeat_keys)
        raise InputError(f"{file}: a wandb sweep cannot move {keys} together: name one of them in repeat_keys")
    if sweep.metric.name.startswith("audit."):
        raise InputError(f"{file}: metric {sweep.metric.name}: audits are not logged to wandb: rank by another metric")
    parameters = {key: _parameter(axis) for key, axis in sweep.axes.items()}
    if sweep.repeats > 1:
        parameters[sweep.repeat_keys[0]] = {"values": list(range(sweep.repeats))}
    tree: dict[str, Any] = {
        "name": sweep.name,
        "method": "grid" if sweep.samples is None else "random",
        "metric": {
            "name": f"{_GROUPS.get(sweep.metric.name, 'train')}/{sweep.metric.name}",
            "goal": sweep.metric.goal,
        },
        "parameters": parameters,
        "command": ["/bin/bash", "-c", _command(sweep, file, overrides), "trial", "${args_no_hyphens}"],
    }
    if sweep.samples is not None:
        tree["run_cap"] = sweep.samples * sweep.repeats
    return f"# wandb sweep THIS-FILE, then: wandb agent ENTITY/PROJECT/ID\n{dump_yaml(tree)}"


def _parameter(axis: Choice | Distribution) -> dict[str, Any]:
    if isinstance(axis, Distribution):
        return {"distribution": _DISTRIBUTIONS[axis.kind], "min": axis.low, "max": axis.high}
    # An agent writes Python's None, which is text in YAML.
    return {"values": ["null" if value is None else value for value in axis.values]}


def _command(sweep: Sweep, file: Path, overrides: list[str]) -> str:
    """One line of bash: the agent tells a trial its id by a variable alone, and its settings by arguments."""
    config = file.parent / sweep.config
    fixed = [f"{key}={dump_yaml(value, flow=True)}" for key, value in sweep.set.items()]
    words = [
        "megafish", "train", str(config.resolve()) if config.is_file() else sweep.config, *fixed, *overrides,
        "track.wandb.enabled=true", f"track.wandb.group={sweep.name}",
    ]  # fmt: skip
    folder = (RUNS / sweep.name).absolute()
    return f'exec {shlex.join(words)} "run_dir={folder}/$WANDB_RUN_ID" "name=$WANDB_RUN_ID" "$@" --resume'
