"""A sweep file: which runs there are. configs/sweeps/*.yaml are examples."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megafish.config import Config, config_folder
from megafish.config_errors import explain, field_help
from megafish.config_yaml import read_tree
from megafish.errors import InputError

_OWN_KEYS = ("name", "run_dir")
"""Settings that the sweep itself gives each run."""


@dataclass(frozen=True)
class Choice:
    """A parameter that takes the values of a list."""

    values: tuple[Any, ...]

    def draw(self, random: Random) -> Any:
        """One of them, each as likely."""
        return random.choice(self.values)


@dataclass(frozen=True)
class Distribution:
    """A parameter that is drawn anew for each run."""

    kind: Literal["uniform", "log_uniform", "integer"]
    low: float
    high: float

    def draw(self, random: Random) -> Any:
        """A number in [low, high]; to four digits unless it is whole, so that its name says all of it."""
        if self.kind == "integer":
            return random.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return float(f"{random.uniform(self.low, self.high):.4g}")
        return float(f"{math.exp(random.uniform(math.log(self.low), math.log(self.high))):.4g}")


class Metric(BaseModel):
    """What the runs are ranked by."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = "valid_loss"
    """Key of a record of metrics.jsonl (the last one counts), or audit.KEY.KEY of the newest audit's summary."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Which end is the better one."""


class Sweep(BaseModel):
    """The content of a sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """Folder of its runs, below runs/. Default: the file's name."""
    config: str
    """Preset, or YAML file (relative to this one), that all runs share."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings on top of it, the same in all runs: dotted keys and values."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys; a list, {from, to, step}, {from, to, count, scale}, {uniform}, {log_uniform} or {integer} each."""
    zip: list[dict[str, list[Any]]] = Field(default_factory=list)
    """Groups of parameters whose lists move together."""
    exclude: list[dict[str, Any]] = Field(default_factory=list)
    """Runs that match all keys of an entry are left out."""
    samples: int | None = Field(default=None, ge=1)
    """Random search: so many runs. null: every combination."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    repeats: int = Field(default=1, ge=1)
    """Times that each combination is run, with seeds 0, 1, 2, ..."""
    repeat_keys: list[str] = Field(default=["train.seed", "data.seed"], min_length=1)
    """Keys that get the seed."""
    metric: Metric = Field(default_factory=Metric)
    """What the runs are ranked by."""

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ValueError("must be a folder's name, of letters, digits, dots, hyphens and underscores")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if not self.parameters and not self.zip:
            raise ValueError("nothing varies: give parameters or zip")
        keys = [*self.parameters, *(key for group in self.zip for key in group)]
        varied = list(keys)
        keys += self.repeat_keys if self.repeats > 1 else []
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice among parameters, zip and repeat_keys")
        for key in [*keys, *self.set]:
            _check_key(key)
        for entry in self.exclude:
            for key in entry:
                if key not in varied:
                    raise ValueError(f"exclude: {key} is none of the parameters ({', '.join(varied)})")
        for group in self.zip:
            lengths = {key: len(values) for key, values in group.items()}
            if len(set(lengths.values())) != 1 or 0 in lengths.values():
                told = ", ".join(f"{key} {length}" for key, length in lengths.items())
                raise ValueError(f"zip: the lists of a group are to be equally long and not empty: {told}")
        for key, found in self.axes.items():
            if isinstance(found, Distribution) and self.samples is None:
                raise ValueError(f"parameters: {key} is drawn at random ({found.kind}): say how many runs by samples")
        return self

    @property
    def axes(self) -> dict[str, Choice | Distribution]:
        """The parameters, read."""
        return {key: parse_parameter(key, given) for key, given in self.parameters.items()}

    @property
    def keys(self) -> list[str]:
        """What differs between runs, in the order of the file; the seeds last."""
        zipped = [key for group in self.zip for key in group]
        return [*self.parameters, *zipped, *(self.repeat_keys if self.repeats > 1 else [])]


def parse_parameter(key: str, given: Any) -> Choice | Distribution:
    """What a parameter in the file means. ValueError, in the file's words, where it means nothing."""
    if isinstance(given, list):
        if not given:
            raise ValueError(f"parameters: {key}: the list is empty")
        return Choice(tuple(given))
    if not isinstance(given, dict):
        raise ValueError(
            f"parameters: {key}={given!r}: must be a list, or a section such as {{from: 1, to: 9, step: 2}}"
        )
    if len(given) == 1 and (kind := next(iter(given))) in ("uniform", "log_uniform", "integer"):
        return _distribution(key, kind, given[kind])
    if {"from", "to"} <= given.keys() <= {"from", "to", "step", "count", "scale"}:
        return Choice(tuple(_range(key, **{("start" if name == "from" else name): v for name, v in given.items()})))
    raise ValueError(
        f"parameters: {key}: {{{', '.join(given)}}} is none of {{from, to, step}}, {{from, to, count, scale}}, "
        "{uniform: [a, b]}, {log_uniform: [a, b]} and {integer: [a, b]}"
    )


def _distribution(key: str, kind: Any, limits: Any) -> Distribution:
    if not (isinstance(limits, list) and len(limits) == 2 and all(_is_number(limit) for limit in limits)):
        raise ValueError(f"parameters: {key}: {kind} takes two numbers: [low, high]")
    low, high = limits
    if not low < high:
        raise ValueError(f"parameters: {key}: {kind}: [{low}, {high}]: the first must be below the second")
    if kind == "log_uniform" and low <= 0:
        raise ValueError(f"parameters: {key}: log_uniform: {low} has no logarithm")
    if kind == "integer" and not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"parameters: {key}: integer: [{low}, {high}]: must be whole numbers")
    return Distribution(kind, low, high)


def _range(
    key: str, start: Any, to: Any, step: Any = None, count: Any = None, scale: Any = "linear"
) -> list[int | float]:
    """The numbers from `start` to `to`, both ends included."""
    where = f"parameters: {key}"
    if not all(_is_number(limit) for limit in (start, to)):
        raise ValueError(f"{where}: from and to must be numbers")
    if (step is None) == (count is None):
        raise ValueError(f"{where}: give either step or count")
    if scale not in ("linear", "log"):
        raise ValueError(f"{where}: scale={scale}: must be linear or log")
    if step is not None:
        if not _is_number(step) or step == 0 or (to - start) / step < 0 or scale == "log":
            raise ValueError(f"{where}: step={step} (a linear scale) does not lead from {start} to {to}")
        # A hair more than whole steps: 0.3 / 0.1 is below 3.
        return [_tidy(start + index * step) for index in range(int((to - start) / step + 1e-9) + 1)]
    if not isinstance(count, int) or count < 2:
        raise ValueError(f"{where}: count={count}: must be a whole number, at least 2")
    if scale == "log":
        if min(start, to) <= 0:
            raise ValueError(f"{where}: on a log scale both ends must be above 0")
        ratio = math.log(to / start) / (count - 1)
        inner = [float(f"{start * math.exp(index * ratio):.4g}") for index in range(1, count - 1)]
        return [start, *inner, to]
    return [start, *(_tidy(start + (to - start) * index / (count - 1)) for index in range(1, count - 1)), to]


def _tidy(number: float) -> int | float:
    """0.30000000000000004 as 0.3, whole numbers as such where they are given so."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_key(key: str) -> None:
    if key.partition(".")[0] in _OWN_KEYS:
        raise ValueError(f"{key}: the sweep itself names its runs and their directories")
    known = field_help(Config)
    if key not in known and not key.startswith("engine.deepspeed."):
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"unknown key {key}" + (f": did you mean {near[0]}?" if near else " of the configuration"))


def sweep_names() -> list[str]:
    """Sweeps that ship with megafish."""
    return sorted(path.stem for path in (config_folder() / "sweeps").glob("*.yaml"))


def sweep_file(source: str) -> Path:
    """The file of a sweep that is named by its path, or by its name if it ships with megafish."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.resolve()
    names = sweep_names()
    if source in names:
        return config_folder() / "sweeps" / f"{source}.yaml"
    near = difflib.get_close_matches(source, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise InputError(f"no sweep {source!r}{hint}: give a YAML file that exists, or one of {', '.join(names)}")


def load_sweep(file: Path) -> Sweep:
    """Read a sweep file. InputError, one line with all faults."""
    tree = {"name": file.stem, **read_tree(file)}
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{file}: {explain(error, Sweep)}") from None
