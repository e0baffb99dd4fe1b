"""Typed configuration: YAML file, then ``section.key=value`` overrides, then validation.

Every field carries its help text, which is what ``--print-config``, the JSON schema and the error messages show.
Unknown keys and wrong values are refused with the field, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from megafish.config_audit import AuditConfig
from megafish.config_errors import allowed, explain, field_help
from megafish.config_sections import (
    CheckpointConfig,
    ContrastConfig,
    DataConfig,
    EngineConfig,
    EvalConfig,
    GoldfishConfig,
    GuardConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PatchConfig,
    ProfileConfig,
    RopeScaling,
    ScheduleConfig,
    Section,
    SourceConfig,
    Text,
    TrackConfig,
    TrainConfig,
    WandbConfig,
)
from megafish.config_unlearn import UnlearnConfig
from megafish.config_yaml import Tree, dump_yaml, overlay, parse_overrides, read_tree
from megafish.errors import InputError

__all__ = [
    "AuditConfig",
    "CheckpointConfig",
    "Config",
    "ContrastConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "GoldfishConfig",
    "GuardConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PatchConfig",
    "ProfileConfig",
    "RopeScaling",
    "ScheduleConfig",
    "Section",
    "SourceConfig",
    "TrackConfig",
    "TrainConfig",
    "UnlearnConfig",
    "WandbConfig",
    "dump_config",
    "json_schema",
    "load_config",
    "preset_names",
]


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, its directory and in wandb: letters, digits and . _ -, beginning with a letter or digit."""
    run_dir: Text | None = None
    """Where everything of the run is kept. null: runs/<name>."""
    model: ModelConfig
    """Shape of the model."""
    data: DataConfig = Field(default_factory=DataConfig)
    """What is read."""
    goldfish: GoldfishConfig = Field(default_factory=GoldfishConfig)
    """Which tokens are left out of the loss."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """Terms of the loss."""
    patch: PatchConfig = Field(default_factory=PatchConfig)
    """A first stage of patches."""
    contrast: ContrastConfig = Field(default_factory=ContrastConfig)
    """A second run against repetitions."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW or Muon."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Learning rate."""
    train: TrainConfig
    """Budget and batch."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """DeepSpeed."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Validation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """Bad steps, stalls, corruption."""
    track: TrackConfig = Field(default_factory=TrackConfig)
    """Reporting."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    """Profiling."""
    audit: AuditConfig = Field(default_factory=AuditConfig)
    """Memorization audit."""
    unlearn: UnlearnConfig | None = None
    """Removal of what a model has memorized (`megafish unlearn`). null: a run of `megafish train`."""

    @model_validator(mode="after")
    def _accumulates_in_fp32(self) -> Config:
        if self.train.precision == "bf16" and self.engine.zero_stage == 0:
            raise ValueError(
                "train.precision=bf16 with engine.zero_stage=0: DeepSpeed would add up gradients in bf16 there; set "
                "engine.zero_stage=1 (on one process it costs nothing) or train.precision=fp32"
            )
        return self

    @model_validator(mode="after")
    def _divides_among_the_mesh(self) -> Config:
        fault = mesh_fault(self, self.engine.tensor_parallel, self.engine.sequence_parallel)
        if fault is not None:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _patches_divide(self) -> Config:
        size, length, parts = self.patch.size, self.data.sequence_length, self.engine.sequence_parallel
        if size is None:
            return self
        if length % (size * parts):
            raise ValueError(
                f"data.sequence_length={length} is not a multiple of patch.size={size}"
                + (f" x engine.sequence_parallel={parts}" if parts > 1 else "")
            )
        if self.engine.tensor_parallel > 1:
            raise ValueError(
                f"patch.size={size} with engine.tensor_parallel={self.engine.tensor_parallel}: the targets of a patch "
                "are looked up in the whole head; shard with engine.zero_stage or engine.sequence_parallel instead"
            )
        return self

    @model_validator(mode="after")
    def _contrast_is_of_tokens(self) -> Config:
        if self.contrast.premature is None:
            return self
        if self.patch.size is not None:
            raise ValueError(
                f"contrast.premature with patch.size={self.patch.size}: the premature model predicts tokens, not "
                "patches; train the patches in a run before"
            )
        if self.loss.mile_gamma:
            raise ValueError(
                f"contrast.premature with loss.mile_gamma={self.loss.mile_gamma:g}: MiLe weighs by the model's own "
                "uncertainty, and a corrected prediction is not the model's own; leave out one of the two"
            )
        if self.engine.tensor_parallel > 1:
            raise ValueError(
                f"contrast.premature with engine.tensor_parallel={self.engine.tensor_parallel}: both heads are needed "
                "whole; shard with engine.zero_stage=3 (which shards the premature model too) instead"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> Config:
        if self.optimizer.name == "muon" and self.engine.tensor_parallel > 1:
            raise ValueError(
                f"optimizer.name=muon with engine.tensor_parallel={self.engine.tensor_parallel}: Muon orthogonalizes "
                "whole matrices; set engine.tensor_parallel=1 or optimizer.name=adamw"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Config:
        saves, validations = self.checkpoint.interval, self.eval.interval
        if self.checkpoint.keep_best and saves is not None and (validations is None or saves % validations):
            raise ValueError(
                f"checkpoint.keep_best needs a validation at every checkpoint: checkpoint.interval={saves} must be a "
                f"multiple of eval.interval={validations}"
            )
        return self

    @property
    def run_path(self) -> Path:
        """Directory of the run."""
        return Path(self.run_dir).expanduser() if self.run_dir is not None else Path("runs") / self.name


def mesh_fault(config: Config, tensor: int, sequence: int) -> str | None:
    """Why a model cannot be spread over this many tensor- and sequence-parallel processes; None where it can."""
    model = config.model
    of_tensor = f"engine.tensor_parallel={tensor}"
    of_both = f"{of_tensor} x engine.sequence_parallel={sequence} = {tensor * sequence}"
    kv_heads = model.resolved_kv_heads
    for name, size, degree, said in (
        ("model.num_heads", model.num_heads, tensor * sequence, of_both),
        ("model.num_kv_heads", kv_heads, tensor, of_tensor),
        ("model.intermediate_size", model.intermediate_size, tensor, of_tensor),
        ("data.sequence_length", config.data.sequence_length, tensor * sequence, of_both),
    ):
        if size % degree:
            return f"{name}={size} is not a multiple of {said}"
    own = kv_heads // tensor
    if own % sequence and sequence % own:
        return (
            f"{own} key/value heads (model.num_kv_heads={kv_heads} / {of_tensor}) can neither be shared out among "
            f"engine.sequence_parallel={sequence} processes nor repeated for them: one must be a multiple of the other"
        )
    return None


# -------------------------------------------------------------------------------------------------------------- loading

_BUDGETS = ("steps", "tokens", "supervised_tokens")


def preset_names() -> list[str]:
    """Names of the configurations that ship with megafish."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a configuration and lay ``section.key=value`` overrides over it (values are YAML).

    `source` is the path of a YAML file or the name of a preset. A file may begin with `extends: NAME-OR-PATH` and then
    states only what differs. A budget that is given on top takes the place of the one below. Raises InputError, one
    line with all faults.
    """
    return validated(read_settings(source, overrides), str(source))


def read_settings(source: str | Path, overrides: list[str] | tuple[str, ...] = (), folder: Path | None = None) -> Tree:
    """What `load_config` validates: the settings of a file or preset with overrides on top, as they stand.

    `folder`: where a relative path starts (default: the working directory).
    """
    return lay_over(_read(str(source), folder or Path(), ()), parse_settings(overrides))


def parse_settings(overrides: list[str] | tuple[str, ...]) -> Tree:
    """The settings that ``section.key=value`` words make. InputError for a word that is none."""
    given = parse_overrides(overrides, _text_keys())
    if "extends" in given:
        raise InputError("extends belongs into a file: name the preset or file in its place on the command line")
    return given


def dump_config(config: Config, *, with_help: bool = False) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object.

    `with_help` puts the help text of every key behind it.
    """
    if not with_help:
        return dump_yaml(config.model_dump(mode="json"))
    return with_help_text(config)


def with_help_text(section: Section) -> str:
    """A section as YAML with the help text of every key behind it."""
    return "\n".join(_lines_with_help(section, "")) + "\n"


def changed_settings(old: Config, new: Config) -> list[str]:
    """In what two configurations of a run differ, one phrase a setting. Where it lies is no change."""
    before, after = (config.model_dump(mode="json", exclude={"run_dir"}) for config in (old, new))
    return differences(before, after, "")


def differences(old: Any, new: Any, path: str) -> list[str]:
    """The leaves in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found += differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        return found
    return [f"{path} was {old!r}, is {new!r}"]


def json_schema() -> str:
    """JSON schema of a configuration file, for editors (`# yaml-language-server: $schema=...`).

    Nothing is required there: a file that extends another may leave out anything.
    """
    schema = Config.model_json_schema()
    sources = schema["$defs"]["DataConfig"]["properties"]
    for name in ("train", "valid"):
        kept = {key: sources[name][key] for key in ("default", "description", "title") if key in sources[name]}
        sources[name] = {"anyOf": _SOURCES_SCHEMA, **kept}
    schema["properties"]["extends"] = {"type": "string", "description": "Preset or file that this one builds on."}
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    return json.dumps(schema, indent=2)


# A source, or a list of them, each in short (its path) or in full: what DataConfig takes and pydantic cannot know.
_SOURCE_SCHEMA = [{"type": "string"}, {"$ref": "#/$defs/SourceConfig"}]
_SOURCES_SCHEMA = [*_SOURCE_SCHEMA, {"type": "array", "items": {"anyOf": _SOURCE_SCHEMA}}, {"type": "null"}]


def config_folder() -> Path:
    """Where presets, cluster profiles and sweeps lie."""
    return shipped_folder("configs")


def shipped_folder(name: str) -> Path:
    """A folder that ships with megafish: inside the package in a wheel, beside it in a checkout (editable install)."""
    package = Path(__file__).resolve().parent
    packaged = package / name
    return packaged if packaged.is_dir() else package.parent / name


def _read(source: str, folder: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """The tree of a file or preset on top of what it extends; relative paths start at `folder`."""
    path = folder / Path(source).expanduser()
    if not path.is_file():
        names = preset_names()
        if source not in names:
            near = difflib.get_close_matches(source, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            asked = f"{readers[-1]}: extends" if readers else "no configuration"
            file = "a YAML file" if readers else "a YAML file or a run directory"
            raise InputError(f"{asked} {source!r}{hint}: give {file} that exists, or one of {', '.join(names)}")
        path = config_folder() / f"{source}.yaml"
    path = path.resolve()
    if path in readers:
        raise InputError(f"{path}: extends itself by way of {readers[-1]}")
    tree = _without_empty(read_tree(path), Config)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"{path}: extends={base!r}: must be the name of a preset or the path of a YAML file")
    return lay_over(_read(base, path.parent, (*readers, path)), tree)


def _without_empty(tree: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """The tree without sections that have no lines (all commented out): they change nothing below them."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        annotation = section.model_fields[key].annotation if key in section.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, Section):
            if value is None:
                continue
            if isinstance(value, dict):
                value = _without_empty(value, annotation)
        kept[key] = value
    return kept


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`. One budget is meant: a new one takes the place of the one below."""
    joined = overlay(below, above)
    given = above.get("train")
    if isinstance(given, dict) and any(given.get(name) is not None for name in _BUDGETS):
        joined["train"].update({name: given.get(name) for name in _BUDGETS})
    return joined


def validated(tree: Tree, where: str) -> Config:
    """The configuration that settings make. InputError that names `where` and every fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, Config)}") from None


@cache
def _text_keys() -> frozenset[str]:
    """Keys whose value on the command line is text as it stands."""
    return frozenset(key for key, field in field_help(Config).items() if allowed(field.annotation).startswith("text"))


def _lines_with_help(section: Section, margin: str) -> Iterator[str]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"{margin}{name}:  # {field.description}"
            yield from _lines_with_help(value, margin + "  ")
        else:
            yield f"{margin}{name}: {dump_yaml(values[name], flow=True)}  # {field.description}"
