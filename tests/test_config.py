"""Configuration: presets, files that extend others, overrides, refusals, round trips."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megafish.config import Config, ModelConfig, dump_config, json_schema, load_config, preset_names
from megafish.config_errors import field_help
from megafish.config_yaml import dump_yaml, parse_yaml
from megafish.errors import InputError

PRESETS = ("125m", "1b", "350m", "7b", "8b", "tiny")


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(source: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(source, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- presets


def parameters(model: ModelConfig, vocabulary: int) -> int:
    """Parameters of a Llama, from its published description: every matrix of every block counted by hand."""
    width, head = model.hidden_size, model.resolved_head_dim
    attention = 2 * width * model.num_heads * head + 2 * width * model.resolved_kv_heads * head
    block = attention + 3 * width * model.intermediate_size + 2 * width
    return vocabulary * width * (1 if model.tie_embeddings else 2) + model.num_layers * block + width


def test_presets_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert preset_names() == sorted(PRESETS)
    for name in PRESETS:
        assert load_config(name).name == name


@pytest.mark.parametrize(("name", "published"), [("1b", 1_100_048_384), ("7b", 6_738_415_616), ("8b", 8_030_261_248)])
def test_preset_has_the_published_number_of_parameters(name: str, published: int) -> None:
    model = load_config(name).model
    assert model.vocab_size is not None
    assert parameters(model, model.vocab_size) == published


@pytest.mark.parametrize(("name", "published"), [("125m", 125e6), ("350m", 356e6)])
def test_gpt3_shapes_come_within_two_percent_in_llama_form(name: str, published: float) -> None:
    assert parameters(load_config(name).model, 50_257) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", ["1b", "7b", "8b"])
def test_model_of_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    import torch

    from megafish.model.transformer import Transformer

    config = load_config(name)
    assert config.model.vocab_size is not None
    with torch.device("meta"):
        model = Transformer(config.model, config.model.vocab_size, loss=config.loss, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters(config.model, config.model.vocab_size)


@pytest.mark.parametrize("name", PRESETS)
def test_batches_of_a_preset_divide_on_one_to_eight_processes(name: str) -> None:
    train = load_config(name).train
    for processes in (1, 2, 4) if name == "tiny" else (1, 2, 4, 8):
        assert train.global_batch_size % (train.micro_batch_size * processes) == 0


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_are_yaml_and_reach_every_depth() -> None:
    config = load_config(
        "tiny",
        ["optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.99]", "goldfish.k=null", "train.tokens=1_000_000", "name=second",
         "engine.zero_stage=1", "engine.deepspeed.zero_optimization.overlap_comm=true"],
    )  # fmt: skip
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.goldfish.k is None
    assert config.name == "second"
    assert config.engine.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_a_section_as_override_joins_the_file_key_by_key() -> None:
    config = load_config("1b", ["optimizer={lr: 1e-3}"])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-3, load_config("1b").optimizer.weight_decay)


def test_later_override_of_a_key_counts() -> None:
    assert load_config("tiny", ["goldfish.k=8", "goldfish.k=3"]).goldfish.k == 3


def test_text_keys_take_quoted_text_and_null_as_yaml() -> None:
    assert load_config("tiny", ["track.wandb.group='null'"]).track.wandb.group == "null"
    assert load_config("tiny", ["track.wandb.group=null"]).track.wandb.group is None


@pytest.mark.parametrize("text", ["007", "1e9", "2024-01-01", "true", "12:30", "a: b", "run #1", "[x"])
def test_text_keys_take_any_override_as_text(text: str) -> None:
    assert load_config("tiny", [f"track.wandb.group={text}"]).track.wandb.group == text


@pytest.mark.parametrize("unit", ["steps", "tokens", "supervised_tokens"])
def test_a_budget_on_top_takes_the_place_of_the_one_below(unit: str) -> None:
    train = load_config("tiny", [f"train.{unit}=1e6"]).train
    budgets = {name: getattr(train, name) for name in ("steps", "tokens", "supervised_tokens")}
    assert budgets == {"steps": None, "tokens": None, "supervised_tokens": None, unit: 1_000_000}


def test_two_budgets_at_one_level_are_refused() -> None:
    assert "given: steps=3, tokens=1000" in refusal("tiny", "train.tokens=1000", "train.steps=3")


def test_sources_have_short_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("corpus", "[corpus]", "{path: corpus}", "[{path: corpus, weight: 1}]"):
        (source,) = load_config("tiny", [f"data.train={text}"]).data.train
        assert (source.path, source.weight, source.goldfish_k) == (str(tmp_path / "corpus"), 1.0, "default")


def test_data_paths_are_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = load_config("tiny", ["data.train=[a, ~/b]", "data.valid=../c", "data.tokenizer=t.model"]).data
    assert [source.path for source in data.train] == [str(tmp_path / "a"), str(tmp_path / "home" / "b")]
    assert data.valid is not None
    assert data.valid[0].path == str(tmp_path.parent / "c")
    assert data.tokenizer == str(tmp_path / "t.model")


# ---------------------------------------------------------------------------------------------------------------- files


def test_extends_states_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path, "extends: 1b\nname: wide\nmodel: {hidden_size: 4096}\ntrain: {steps: 7}\n", "base.yaml")
    (tmp_path / "sub").mkdir()
    leaf = write(tmp_path, "extends: ../base.yaml\nname: leaf\ngoldfish: {k: 3}\n", "sub/leaf.yaml")
    config, preset = load_config(leaf), load_config("1b")
    assert (config.name, config.model.hidden_size, config.goldfish.k) == ("leaf", 4096, 3)
    assert (config.train.steps, config.train.supervised_tokens) == (7, None)
    assert config.model.num_layers == preset.model.num_layers
    assert config.optimizer == preset.optimizer


def test_a_section_with_every_line_commented_out_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: 1b\noptimizer:\n#  lr: 1\ntrack:\n  wandb:\n")
    assert load_config(path) == load_config("1b")


def test_null_in_a_file_undoes_an_optional_section(tmp_path: Path) -> None:
    write(tmp_path, "extends: tiny\nmodel: {rope_scaling: {type: linear, factor: 2}}\n", "base.yaml")
    assert load_config(write(tmp_path, "extends: base.yaml\n")).model.rope_scaling is not None
    path = write(tmp_path, "extends: base.yaml\nmodel: {rope_scaling: null}\n")
    assert load_config(path).model.rope_scaling is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("1_000", 1000), ("0x10", 16), ("010", 10.0),
        ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("no", "no"), ("off", "off"), ("true", True), ("null", None),
        ("~", None), (".inf", math.inf), ("1e", "1e"), ("e3", "e3"), ("-", "-"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(text: str, expected: Any) -> None:
    value = parse_yaml(f"[{text}]" if text != "-" else "'-'")
    value = value[0] if isinstance(value, list) else value
    assert value == expected
    assert isinstance(value, type(expected))


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aenofy0123456789.:-_+~ x'\"#")
)


@given(st.dictionaries(st.text("abc", min_size=1), scalars | st.lists(scalars)), st.booleans())
def test_dumped_yaml_reads_back_equal_here_and_elsewhere(tree: dict[str, Any], flow: bool) -> None:
    text = dump_yaml(tree, flow=flow)
    assert parse_yaml(text) == tree
    assert yaml.safe_load(text) == tree


@pytest.mark.parametrize("with_help", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_dumped_configuration_reads_back_equal(name: str, with_help: bool, tmp_path: Path) -> None:
    config = load_config(
        name, ["data.train=[{path: 'a # b', goldfish_k: null}]", "run_dir=1e9", "track.wandb.tags=['no']"]
    )
    assert load_config(write(tmp_path, dump_config(config, with_help=with_help))) == config


def test_help_stands_beside_every_key() -> None:
    lines = [line.strip() for line in dump_config(load_config("tiny"), with_help=True).splitlines()]
    behind_null = ("data.train.", "data.valid.", "model.rope_scaling.", "unlearn.")
    assert len(lines) == sum(not key.startswith(behind_null) for key in field_help(Config))
    assert all(len(line.partition("  # ")[2]) > 5 for line in lines)


def test_every_key_has_help() -> None:
    assert [key for key, field in field_help(Config).items() if not field.description] == []


def test_schema_knows_every_key_and_nothing_is_required() -> None:
    schema = json.loads(json_schema())
    sections = {"Config": schema, **schema["$defs"]}
    names = {name for section in sections.values() for name in section["properties"]}
    assert names == {key.rpartition(".")[2] for key in field_help(Config)} | {"extends"}
    assert not any("required" in section for section in sections.values())
    assert all(section["additionalProperties"] is False for section in sections.values())
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "phrases"),
    [
        ("model.num_layer=3", ["unknown key model.num_layer", "did you mean model.num_layers?"]),
        ("track.wandb.modes=offline", ["unknown key track.wandb.modes", "did you mean track.wandb.mode?"]),
        ("lr=1", ["unknown key lr", "did you mean optimizer.lr?"]),
        ("optimiser.lr=1", ["unknown key optimiser", "did you mean optimizer?"]),
        ("optimizer.nesterov=1", ["unknown key optimizer.nesterov", "known there are name, lr, betas"]),
        ("data.train=[{path: c, wait: 2}]", ["unknown key data.train[0].wait", "did you mean data.train[0].weight?"]),
        ("3=4", ["unknown key 3"]),
        ("goldfish.k=1", ["goldfish.k=1:", "a whole number, at least 2, or null", "Drop 1 in k"]),
        ("goldfish.k=true", ["goldfish.k=true:", "a whole number, at least 2, or null"]),
        ("goldfish.k=2.5", ["goldfish.k=2.5:", "a whole number"]),
        ("goldfish.k=off", ["goldfish.k='off':", "or null"]),
        ("goldfish.h=0", ["goldfish.h=0:", "at least 1, at most 256"]),
        ("data.train=[{path: c, goldfish_k: 1}]", ["data.train[0].goldfish_k=1:", "at least 2, or default, or null"]),
        ("data.train=[{path: c, weight: 0}]", ["data.train[0].weight=0:", "a number, above 0"]),
        ("data.train=['']", ["data.train[0].path='':", "text, not empty"]),
        ("data.train=3", ["data.train=3:", "a list of sections"]),
        ("data.train.0.weight=2", ["entries of a list", "give the whole list"]),
        ("optimizer.lr=fast", ["optimizer.lr=fast:", "a number, above 0", "Peak learning rate"]),
        ("optimizer.lr=.inf", ["optimizer.lr=.inf:", "a number, above 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr=.nan:", "a number, above 0"]),
        ("optimizer.betas=0.9", ["optimizer.betas=0.9:", "a list of 2, each a number, at least 0, below 1"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas[1]=1.5:", "below 1"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "a list of 2"]),
        ("schedule.name=cos", ["schedule.name=cos:", "cosine or linear or wsd or constant"]),
        ("schedule={name: wsd, warmup_fraction: 0.9}", ["schedule:", "above 1"]),
        ("engine.zero_stage=4", ["engine.zero_stage=4:", "0 or 1 or 2 or 3"]),
        ("engine.deepspeed.bf16.enabled=true", ["engine.deepspeed: may not hold bf16", "set train.precision instead"]),
        ("engine.deepspeed.zero_optimization.stage=3", ["zero_optimization.stage", "set engine.zero_stage instead"]),
        ("engine.deepspeed.zero_optimization.compute_grad_norm=false", ["always reported"]),
        ("engine.deepspeed.zero_optimization.cpu_offload=true", ["set engine.offload_optimizer instead"]),
        ("engine={zero_stage: 2, deepspeed: {zero_optimization: {zero_hpz_partition_size: 8}}}",
         ["engine.deepspeed: zero_optimization.zero_hpz_partition_size has no effect at engine.zero_stage=2",
          "set engine.zero_stage=3"]),
        ("engine={zero_stage: 1, deepspeed: {zero_optimization: {stage3_prefetch_bucket_size: 8}}}",
         ["stage3_prefetch_bucket_size has no effect", "set engine.zero_stage=3"]),
        ("engine={zero_stage: 3, deepspeed: {zero_optimization: {allgather_bucket_size: 8}}}",
         ["allgather_bucket_size has no effect", "set engine.zero_stage=1 or 2"]),
        ("engine={zero_stage: 2, offload_optimizer: cpu, deepspeed: "
         "{zero_optimization: {offload_optimizer: {device: nvme}}}}",
         ["offload_optimizer.device is given beside engine.offload_optimizer=cpu", "keep one"]),
        ("engine={zero_stage: 3, deepspeed: {zero_optimization: {offload_param: {pin_memory: false}}}}",
         ["offload_param has no effect without engine.offload_parameters=cpu"]),
        ("engine={zero_stage: 0, offload_optimizer: cpu}",
         ["engine:", "offload_optimizer=cpu needs zero_stage=1, 2 or 3"]),
        ("engine={zero_stage: 2, offload_parameters: cpu}", ["engine:", "offload_parameters=cpu needs zero_stage=3"]),
        ("optimizer.momentum=0.9", ["optimizer:", "momentum=0.9 has no meaning for name=adamw"]),
        ("engine.deepspeed.tensor_parallel.autotp_size=2", ["set engine.tensor_parallel instead"]),
        ("profile.steps=0", ["profile.steps=0:", "at least 1"]),
        ("profile.ranks=[]", ["profile.ranks"]),
        ("engine.deepspeed=3", ["engine.deepspeed=3:", "a section"]),
        ("engine.sequence_parallel=0", ["engine.sequence_parallel=0:", "at least 1"]),
        ("engine.tensor_parallel=2", ["model.num_heads=3 is not a multiple of engine.tensor_parallel=2", "= 2"]),
        ("engine.tensor_parallel=3.5", ["engine.tensor_parallel=3.5:", "a whole number, at least 1"]),
        ("engine={zero_stage: 3, tensor_parallel: 3, deepspeed: {zero_optimization: {mics_shard_size: 2}}}",
         ["mics_shard_size with"]),
        ("engine.deepspeed.sequence_parallel_size=2", ["set engine.sequence_parallel instead"]),
        ("model=3", ["model=3:", "a section"]),
        ("model.num_heads=7", ["model:", "hidden_size=192 is not a multiple of num_heads=7"]),
        ("model.head_dim=33", ["model:", "head_dim=33 is odd"]),
        ("model.num_kv_heads=2", ["model:", "num_heads=3 is not a multiple of num_kv_heads=2"]),
        ("model.rope_scaling.factor=2", ["model.rope_scaling.type is not set", "yarn"]),
        ("train.steps=0", ["train.steps=0:", "at least 1, or null"]),
        ("train.supervised_tokens=null", ["train:", "exactly one", "given: none"]),
        ("train.global_batch_size=3", ["train:", "global_batch_size=3 is not a multiple of micro_batch_size=8"]),
        ("train.precision=fp16", ["train.precision=fp16:", "fp32 or bf16"]),
        ("goldfish={scheme: static, seed: 3}", ["goldfish:", "seed=3 has no meaning for scheme=static"]),
        ("goldfish={scheme: random, canonical: casefold}", ["canonical=casefold has no meaning for scheme=random"]),
        ("track.wandb.enabled=maybe", ["track.wandb.enabled=maybe:", "true or false"]),
        ("track.wandb.tags=[1]", ["track.wandb.tags[0]=1:", "put quotes around it"]),
        ("name=a/b", ["name=a/b:", "letters, digits"]),
        ("train.steps", ["'train.steps'", "section.key=value"]),
        ("train..steps=3", ["'train..steps=3'", "section.key=value"]),
        ("train=[", ["'train=['", "not a valid YAML value"]),
        ("extends=1b", ["extends belongs into a file"]),
    ],
)  # fmt: skip
def test_wrong_override_is_refused_in_words(override: str, phrases: list[str]) -> None:
    message = refusal("tiny", override)
    for phrase in phrases:
        assert phrase in message


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("", ["empty"]),
        ("- a\n", ["expected sections", "found a list"]),
        ("name: a\n", ["model is not set (Shape of the model)", "train is not set"]),
        ("name: a\nmodel:\n  num_layers: 3\n  num_layers: 4\n", ["line 4, column 3", "'num_layers' stands twice"]),
        ("name: [\n", ["line 2", "not valid YAML"]),
        ("name: a\n\tmodel: 3\n", ["line 2, column 1", "not valid YAML"]),
        ("a: !!python/object:os.system x\n", ["line 1", "not valid YAML"]),
        ("extends: tinny\n", ["extends 'tinny'", "did you mean tiny?"]),
        ("extends: 3\n", ["extends=3"]),
        ("extends: run.yaml\n", ["extends itself"]),
        ("extends: tiny\nname: 20\n", ["name=20:", "put quotes around it"]),
        ("extends: tiny\nmodel: {1: 2}\n", ["unknown key model.1"]),
    ],
)
def test_wrong_file_is_refused_in_words(text: str, phrases: list[str], tmp_path: Path) -> None:
    message = refusal(write(tmp_path, text))
    for phrase in [str(tmp_path / "run.yaml"), *phrases]:
        assert phrase in message


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        (
            {"model.num_kv_heads": 1, "engine.tensor_parallel": 3},
            "model.num_kv_heads=1 is not a multiple of engine.tensor_parallel=3",
        ),
        (
            {"model.intermediate_size": 512, "engine.tensor_parallel": 3},
            "model.intermediate_size=512 is not a multiple of engine.tensor_parallel=3",
        ),
        (
            {"data.sequence_length": 256, "engine.sequence_parallel": 3},
            "data.sequence_length=256 is not a multiple of engine.tensor_parallel=1 x engine.sequence_parallel=3 = 3",
        ),
        (
            {"model.num_heads": 12, "model.num_kv_heads": 4, "engine.sequence_parallel": 6, "data.sequence_length": 96},
            "4 key/value heads (model.num_kv_heads=4 / engine.tensor_parallel=1) can neither be shared out",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(settings: dict[str, int], phrase: str) -> None:
    assert phrase in refusal("tiny", *(f"{key}={value}" for key, value in settings.items()))


def test_all_faults_are_reported_at_once() -> None:
    message = refusal("tiny", "goldfish.k=1", "optimizer.lr=-1", "model.num_layer=3")
    assert all(key in message for key in ("goldfish.k=1", "optimizer.lr=-1", "unknown key model.num_layer"))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\n")
    assert "not UTF-8 text (byte 6)" in refusal(str(tmp_path / "run.yaml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: tiny\n")
    os.chmod(path, 0)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("source", ["tine", "no/such.yaml"])
def test_unknown_source_names_the_presets(source: str) -> None:
    message = refusal(source)
    assert source in message
    assert "one of 125m, 1b, 350m, 7b, 8b, tiny" in message
    assert ("did you mean tiny?" in message) == (source == "tine")


def test_configuration_cannot_be_changed_afterwards() -> None:
    config = load_config("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.goldfish.k = 3  # type: ignore[misc]


def test_muon_and_tensor_parallelism_are_refused_together() -> None:
    message = refusal("8b", "optimizer.name=muon", "engine.tensor_parallel=2")
    assert "engine.tensor_parallel=2: Muon orthogonalizes whole matrices; set engine.tensor_parallel=1" in message
