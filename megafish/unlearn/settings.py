"""The configuration of an unlearning run: the starting run's, the usual settings of unlearning, then the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megafish.config import Config, UnlearnConfig, lay_over, parse_settings, preset_names, read_settings, validated
from megafish.config_unlearn import KEEPING
from megafish.data.corpus import run_tokenizer
from megafish.errors import InputError
from megafish.model.load import checkpoint_of
from megafish.run import RunDir
from megafish.unlearn.data import learned_texts, steps_of

# TOFU's and NPO's settings, as far as they are not the framework's own (facts in docs/unlearn.md).
_USUAL: dict[str, Any] = {
    "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.01},
    "schedule": {"name": "linear", "min_lr_ratio": 0.0},
    # Losses rise on purpose: only what is not finite is refused.
    "guard": {"sigma": None},
    "eval": {"interval": None},
    "checkpoint": {"interval": 100},
}
_FROM_START = ("model", "data", "goldfish", "audit")


def unlearning_config(source: str, overrides: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that SOURCE and overrides mean, and whether it continues a run.

    source: an unlearning run to continue, a trained run to start from, or a YAML file that names one as unlearn.model.
    Raises InputError.
    """
    path = Path(source)
    words = list(overrides)
    if path.is_dir() and (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        raise InputError(
            f"{source}: a Hugging Face folder: make a run of it first, `megafish import {source} --to RUN`"
        )
    if path.is_dir():
        given = parse_settings(words)
        section = given.get("unlearn")
        named = section.get("model") if isinstance(section, dict) else None
        if named is not None and Path(str(named)).resolve() != path.resolve():
            raise InputError(
                f"unlearn.model={named}: the run to start from is named already, {source}: leave one of the two out"
            )
        if path.parent.name == "checkpoints":
            return _new({"unlearn": {"model": source}}, words), False
        run = RunDir.existing(path)
        started = run.load_config().unlearn
        if started is not None and named is None:
            _check_given(given)
            config = run.load_config([*words, f"run_dir={source}"])
            assert config.unlearn is not None
            _check_continues(source, started, config.unlearn)
            _check(config)
            return config, True
        return _new({"unlearn": {"model": source}}, words), False
    if source in preset_names() and not path.is_file():
        raise InputError(f"{source}: a preset has no weights: name a run directory, or a YAML file with unlearn.model")
    if not path.is_file():
        raise InputError(f"no run and no configuration {source!r}: name a run directory, or a YAML file")
    return _new(read_settings(source), words), False


def _check_given(given: dict[str, Any]) -> None:
    """What no unlearning run takes from its user."""
    for key in ("model", "goldfish"):
        if key in given:
            raise InputError(f"{key} is that of the starting run and cannot be changed: leave it out")
    for key in ("train", "valid"):
        if isinstance(given.get("data"), dict) and key in given["data"]:
            raise InputError(f"data.{key}: unlearning reads unlearn.forget and unlearn.retain: leave it out")


def _check_continues(source: str, before: UnlearnConfig, now: UnlearnConfig) -> None:
    """A run goes on as it began; another one from where it stands is named so."""
    what, was = now.identity(), before.identity()
    changed = sorted(key for key in what if what[key] != was[key])
    if changed:
        raise InputError(
            f"{source}: goes on as it began, and unlearn.{', unlearn.'.join(changed)} would be another: leave it out; "
            f"for a new run from where this one stands say unlearn.model={source} too, and name=NAME"
        )


def _new(tree: dict[str, Any], words: list[str]) -> Config:
    asked = lay_over(tree, parse_settings(words))
    section = asked.get("unlearn")
    model = section.get("model") if isinstance(section, dict) else None
    if not isinstance(model, str):
        raise InputError("unlearn.model is not set: name the run to start from")
    run, folder = checkpoint_of(model)
    its = run.load_config()
    if its.patch.size is not None and its.patch.fraction == 1:
        raise InputError(f"unlearn.model={model}: trained on patches alone: it does not predict tokens")
    before = its.model_dump(mode="json")
    method = section.get("method", "npo") if isinstance(section, dict) else "npo"
    usual = _USUAL
    if isinstance(section, dict) and (method in KEEPING or section.get("sure_percentile") is not None):
        # What is left alone must not decay.
        usual = lay_over(_USUAL, {"optimizer": {"weight_decay": 0.0}})
    base = {
        "name": f"{its.name}-{method}",
        **{key: before[key] for key in _FROM_START},
        "train": {"precision": its.train.precision, "device": its.train.device},
        "engine": {"zero_stage": 1},
    }
    _check_given(asked)
    if isinstance(section, dict):
        section["model"] = str(folder if Path(model).parent.name == "checkpoints" else model)
    settings = lay_over(lay_over(base, usual), asked)
    train = settings["train"]
    given = [unit for unit in ("tokens", "supervised_tokens") if train.get(unit) is not None]
    if given:
        raise InputError(f"train.{given[0]}: the budget of unlearning is unlearn.epochs, or train.steps")
    epochs = train.get("steps") is None
    config = validated(settings if not epochs else {**settings, "train": {**train, "steps": 1}}, "unlearning")
    _check(config)
    if epochs:
        assert config.unlearn is not None
        items = learned_texts(config, run_tokenizer(config.data))
        steps = steps_of(config.unlearn.epochs, items, config.train.global_batch_size)
        schedule = dict(settings["schedule"])
        if not schedule.keys() & {"warmup_steps", "warmup_fraction"}:
            schedule["warmup_fraction"] = min(1.0, 1 / config.unlearn.epochs) if config.unlearn.epochs > 1 else 0.0
        config = validated({**settings, "schedule": schedule, "train": {**train, "steps": steps}}, "unlearning")
    if config.train.steps == 1 and config.schedule.name != "constant" and config.schedule.min_lr_ratio == 0:
        raise InputError(
            "train.steps=1: the last step has the rate that the schedule ends with, which is 0: set unlearn.epochs or "
            "train.steps higher, or schedule.name=constant"
        )
    return config


def _check(config: Config) -> None:
    """What of a run's settings has no meaning here, or is not supported."""
    engine, unlearn = config.engine, config.unlearn
    assert unlearn is not None
    for name in ("tensor_parallel", "sequence_parallel"):
        if getattr(engine, name) > 1:
            raise InputError(f"engine.{name}={getattr(engine, name)}: unlearning shards by engine.zero_stage: set 1")
    if config.train.initial_weights is not None:
        raise InputError("train.initial_weights: an unlearning run starts from unlearn.model: leave it null")
    for section, idle in (("patch", config.patch.size), ("contrast", config.contrast.premature)):
        if idle is not None:
            raise InputError(f"{section}: has no meaning for unlearning: leave it out")
    if config.loss.model_dump() != type(config.loss)().model_dump():
        raise InputError("loss: its terms have no part in unlearning: leave the section out")
    if unlearn.keeps_weights and config.optimizer.weight_decay > 0:
        raise InputError(
            f"optimizer.weight_decay={config.optimizer.weight_decay}: would shrink the weights that are to stay: "
            "leave it at 0"
        )
    if engine.zero_stage == 3 and (unlearn.sure_percentile is not None or unlearn.method == "memflex"):
        what = "unlearn.sure_percentile" if unlearn.sure_percentile is not None else "method=memflex"
        raise InputError(f"engine.zero_stage=3: {what} looks at whole gradients, which are cut there: take 2 or less")
    if unlearn.lora_rank is not None and config.optimizer.name == "muon":
        raise InputError("unlearn.lora_rank with optimizer.name=muon: Muon is for whole matrices: take adamw")
    if unlearn.layer is not None and unlearn.layer > config.model.num_layers:
        raise InputError(
            f"unlearn.layer={unlearn.layer}: the model has blocks 1 to {config.model.num_layers}: name one of them"
        )
