"""config.json of Hugging Face's Llama, Mistral, Qwen2 and Qwen3, and what it is here.

The files are written in the form that transformers 4 and 5 both read (`rope_theta` and `rope_scaling` apart); both
forms are read. What a file says that this model cannot do is refused: a model that computes something else is worse
than none.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megafish.config import ModelConfig, RopeScaling
from megafish.errors import InputError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Class of transformers by model_type."""

# What transformers' configuration classes assume where a file says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def model_type(config: ModelConfig) -> str:
    """The model_type that computes what a model of this shape does; InputError where none of the four does."""
    chosen = [name for name in ("qk_norm", "qkv_bias", "mlp_bias") if getattr(config, name)]
    if len(chosen) > 1 or (config.mlp_bias and config.sliding_window is not None):
        said = [f"model.{name}=true" for name in chosen]
        said += [f"model.sliding_window={config.sliding_window}"] if config.sliding_window is not None else []
        raise InputError(
            f"{' with '.join(said)}: Hugging Face has no such model among {', '.join(CLASSES)}, so this one cannot be "
            "exported"
        )
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    return "mistral" if config.sliding_window is not None else "llama"


def to_huggingface(
    config: ModelConfig, *, vocab_size: int, max_positions: int, dtype: str, bos_id: int | None, eos_id: int
) -> dict[str, Any]:
    """config.json of a model.

    vocab_size: rows of the exported embedding. max_positions: tokens of the longest sequence that was trained on; with
    rope_scaling the length that it extends to. dtype: of the weights, as torch spells it ("bfloat16").
    """
    kind = model_type(config)
    scaling = config.rope_scaling
    if scaling is not None and scaling.type != "linear":
        # transformers takes YaRN's factor from these two lengths.
        max_positions = round(scaling.factor * scaling.original_max_position)
    values: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": config.resolved_head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _scaling_to_huggingface(scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    if kind == "llama":
        values |= {"attention_bias": False, "mlp_bias": config.mlp_bias}
    elif kind == "mistral":
        values |= {"sliding_window": config.sliding_window}
    else:
        windowed = config.sliding_window is not None
        values |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        # Layers from this one on have the window: all or none.
        values |= {"max_window_layers": 0 if windowed else config.num_layers}
        if kind == "qwen3":
            values |= {"attention_bias": False}
    return values


def from_huggingface(values: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes. Its vocab_size is the embedding's rows.

    Raises InputError, beginning with `where`, for a model that is not supported, naming what stands in the way.
    """
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise InputError(f"{where}: model_type={kind!r} is not supported: there are {', '.join(CLASSES)}")
    missing = [name for name in _SIZES if not isinstance(values.get(name), int)]
    if missing:
        raise InputError(f"{where}: {missing[0]}={values.get(missing[0])!r}: expected a whole number")
    values = {**_DEFAULTS[kind], **values}
    _refuse(values, kind, where)
    heads = values["num_attention_heads"]
    theta, scaling = _rope(values, where)
    try:
        return ModelConfig(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            intermediate_size=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            tie_embeddings=values.get("tie_word_embeddings", False),
            norm_eps=values["rms_norm_eps"],
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2",
            mlp_bias=kind == "llama" and values.get("mlp_bias", False),
            sliding_window=_window(values, kind, where),
            rope_theta=theta,
            rope_scaling=scaling,
            init_std=values.get("initializer_range") or 0.02,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"])) or "shape"
        raise InputError(f"{where}: {name}={problem['input']!r}: {problem['msg']}") from None


def _refuse(values: dict[str, Any], kind: str, where: str) -> None:
    """InputError for what would have to be computed in another way."""
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish", None),
        "attention_bias": (False, None),  # of Llama and Qwen3: on the output projection as well
        "quantization_config": (None,),
        "partial_rotary_factor": (1, None),
    }
    if kind != "llama":
        allowed["mlp_bias"] = (False, None)
    for name, good in allowed.items():
        if values.get(name) not in good:
            raise InputError(f"{where}: {name}={values[name]!r} is not supported: only {good[0]!r} is")


def _window(values: dict[str, Any], kind: str, where: str) -> int | None:
    """The window of all layers; InputError where only some have one."""
    window = values.get("sliding_window")
    if kind == "llama" or window is None:
        return None
    if kind == "mistral":
        return int(window)
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        first = values["max_window_layers"] if values.get("use_sliding_window", False) else layers
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    windowed = {entry == "sliding_attention" for entry in kinds}
    if len(windowed) > 1:
        raise InputError(f"{where}: some layers have a sliding window and others have none, which is not supported")
    return int(window) if windowed == {True} else None


def _scaling_to_huggingface(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.type == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return values


def _rope(values: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(given.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"{where}: rope_type={kind!r} is not supported: there are default, linear, llama3, yarn")
    # With these YaRN's temperature or its ramp would be another.
    for name, usual in (("attention_factor", None), ("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if kind == "yarn" and given.get(name, usual) != usual:
            raise InputError(f"{where}: rope {name}={given[name]!r} is not supported: leave it out")
    original = given.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    names = {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else {"beta_fast", "beta_slow"}
    extra = {name: given[name] for name in names if kind != "linear" and given.get(name) is not None}
    if kind != "linear":
        extra["original_max_position"] = original
    try:
        return theta, RopeScaling(**{"type": kind, "factor": given.get("factor"), **extra})
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            f"{where}: rope {'.'.join(map(str, problem['loc']))}={problem['input']!r}: {problem['msg']}"
        ) from None
