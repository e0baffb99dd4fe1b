"""From a sweep to its runs: named, each with a directory and a configuration of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megafish.config import Config, lay_over, parse_settings, read_settings, validated
from megafish.config_yaml import Tree, overlay
from megafish.errors import InputError
from megafish.sweep.spec import Choice, Sweep

RUNS = Path("runs")
_LONGEST_NAME = 120
"""Characters of a run's name: file systems take 255 bytes."""
_SHOWN = 3
"""Faults of runs that are told."""

Point = dict[str, Any]
"""Dotted keys and values that make one run."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    path: Path
    point: Point
    config: Config


def expand(sweep: Sweep, file: Path, overrides: list[str] | None = None) -> list[SweepRun]:
    """The runs of a sweep, in the order of its file: the last parameter changes fastest.

    `file`: where the sweep stands, from which relative paths start. `overrides`: settings of the command line, on top
    of `set`. InputError where a combination makes no valid configuration.
    """
    for word in overrides or []:
        key = word.partition("=")[0]
        if key in sweep.keys or key in ("name", "run_dir"):
            raise InputError(f"{word}: {key} is what differs between the runs of this sweep: change it in {file}")
    shared = lay_over(read_settings(sweep.config, folder=file.parent), nested(sweep.set))
    shared = lay_over(shared, parse_settings(overrides or []))
    points = points_of(sweep)
    if not points:
        raise InputError(f"{file}: exclude leaves no run")
    runs, faults = [], []
    for name, point in zip(names_of(sweep, points), points, strict=True):
        own = nested({**point, "name": name, "run_dir": str(RUNS / sweep.name / name)})
        try:
            config = validated(lay_over(shared, own), name)
        except InputError as error:
            faults.append(str(error))
            continue
        group = config.track.wandb.group or sweep.name
        wandb = config.track.wandb.model_copy(update={"group": group})
        config = config.model_copy(update={"track": config.track.model_copy(update={"wandb": wandb})})
        runs.append(SweepRun(name, config.run_path, point, config))
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        advice = " (exclude: leaves out combinations that cannot be run)" if runs else ""
        raise InputError(f"{file}: {'; '.join(faults[:_SHOWN])}{more}{advice}")
    return runs


def nested(settings: dict[str, Any]) -> Tree:
    """A tree from dotted keys."""
    tree: Tree = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = overlay(tree, value)
    return tree


def points_of(sweep: Sweep) -> list[Point]:
    """What each run sets: the grid, or so many draws; without what is excluded, each with its seeds."""
    kept = _sampled(sweep) if sweep.samples is not None else list(_grid(sweep))
    if sweep.repeats == 1:
        return kept
    return [{**point, **dict.fromkeys(sweep.repeat_keys, seed)} for point in kept for seed in range(sweep.repeats)]


def _grid(sweep: Sweep) -> Iterator[Point]:
    groups: list[list[Point]] = []
    for key, axis in sweep.axes.items():
        assert isinstance(axis, Choice)
        groups.append([{key: value} for value in axis.values])
    groups += [_zipped(group) for group in sweep.zip]
    for parts in itertools.product(*groups):
        point = {key: value for part in parts for key, value in part.items()}
        if not _excluded(sweep, point):
            yield point


def _sampled(sweep: Sweep) -> list[Point]:
    """Different draws, in one order whatever their number. Fewer than asked for when there are no more."""
    assert sweep.samples is not None
    random = Random(sweep.seed)
    found: dict[str, Point] = {}
    misses = 0
    while len(found) < sweep.samples and misses < 1000:
        point = {key: axis.draw(random) for key, axis in sweep.axes.items()}
        for group in sweep.zip:
            point |= random.choice(_zipped(group))
        key = json.dumps(point)
        if key in found or _excluded(sweep, point):
            misses += 1
            continue
        found[key], misses = point, 0
    return list(found.values())


def _zipped(group: dict[str, list[Any]]) -> list[Point]:
    return [dict(zip(group, values, strict=True)) for values in zip(*group.values(), strict=True)]


def _excluded(sweep: Sweep, point: Point) -> bool:
    return any(all(point.get(key) == value for key, value in entry.items()) for entry in sweep.exclude)


# ---------------------------------------------------------------------------------------------------------------- names


def names_of(sweep: Sweep, points: list[Point]) -> list[str]:
    """A name for each run: its settings in short, unique, and the same when other runs come or go."""
    shown = _shown_keys(sweep)
    labels = short_labels(shown)
    names: dict[str, int] = {}
    found = []
    for point in points:
        name = "-".join(f"{labels[key]}{short_value(point[key])}" for key in shown)
        if len(name) > _LONGEST_NAME:
            digest = hashlib.sha256(json.dumps(point, sort_keys=True, default=str).encode()).hexdigest()[:8]
            name = f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{digest}"
        names[name] = names.get(name, 0) + 1
        found.append(name if names[name] == 1 else f"{name}-{names[name]}")
    return found


def _shown_keys(sweep: Sweep) -> list[str]:
    """Of keys that move together the first one says all."""
    led = {key for group in sweep.zip for key in list(group)[1:]}
    led |= set(sweep.repeat_keys[1:]) if sweep.repeats > 1 else set()
    return [key for key in sweep.keys if key not in led]


def short_labels(keys: list[str]) -> dict[str, str]:
    """The end of each key, as long as it has to be to tell them apart: k, h, train.seed."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            label = ".".join(parts[-length:])
            if sum(other == label or other.endswith(f".{label}") for other in keys) == 1 or length == len(parts):
                labels[key] = label
                break
    return labels


def short_value(value: Any) -> str:
    """A value as a part of a file name."""
    if value is None:
        return "-none"
    if isinstance(value, bool):
        return "-on" if value else "-off"
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "-" + re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")[:40]
