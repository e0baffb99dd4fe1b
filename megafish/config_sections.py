"""The sections of a configuration, one class each, every field with its help text under it."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from megafish.config_deepspeed import complaints
from megafish.config_errors import NO_NUMBER
from megafish.config_megatron import parse_blend, parse_split


class Section(BaseModel):
    """A group of settings. Immutable, so that a configuration cannot drift from the file saved with its run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError(NO_NUMBER)  # pydantic would read true as the number 1
        return value


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


# Stored absolute, so that a run can be continued and audited from any directory.
AbsolutePath = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


# ---------------------------------------------------------------------------------------------------------------- model


class RopeScaling(Section):
    """Rotary frequencies for contexts longer than the model was made for."""

    type: Literal["linear", "llama3", "yarn"]
    """linear: divide positions by `factor`; llama3: Llama 3.1's piecewise rule; yarn: Peng et al. 2023."""
    factor: float = Field(gt=0)
    """How many times longer the context becomes."""
    original_max_position: int = Field(default=8192, ge=1)
    """Context length the frequencies were made for [tokens] (llama3, yarn)."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths above original_max_position / this are divided by `factor`."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths below original_max_position / this are left alone."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: rotations over the original context above which a dimension is left alone."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: rotations over the original context below which a dimension is fully interpolated."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} is not below high_freq_factor={self.high_freq_factor:g}: "
                "llama3 interpolates between the two"
            )
        return self


class ModelConfig(Section):
    """Shape of a Llama-family decoder. Defaults give Llama; the options cover Mistral, Qwen2 and Qwen3 too."""

    num_layers: int = Field(ge=1)
    """Transformer blocks."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention). null: as many as num_heads."""
    head_dim: int | None = Field(default=None, ge=2)
    """Width of one head, even. null: hidden_size / num_heads."""
    intermediate_size: int = Field(ge=1)
    """Width of the SwiGLU feed-forward."""
    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding. null: the tokenizer's size rounded up to a multiple of 64 (padding is never predicted)."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before RoPE (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    mlp_bias: bool = False
    """Bias on the feed-forward projections."""
    sliding_window: int | None = Field(default=None, ge=1)
    """Attend to at most this many tokens back, itself included (Mistral). null: the whole document."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Long-context rule for the rotary frequencies."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    depth_scaled_init: bool = True
    """Divide the initial std of the projections into the residual stream by sqrt(2 * num_layers) (GPT-2)."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}: set head_dim, or "
                "choose sizes that divide"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim={self.resolved_head_dim} is odd: rotary embeddings need pairs of dimensions")
        if self.num_heads % self.resolved_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        return self

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def resolved_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads


# ----------------------------------------------------------------------------------------------------------------- data


class SourceConfig(Section):
    """One corpus in the training blend."""

    path: AbsolutePath
    """A folder written by `megafish prepare`, or the prefix of a Megatron .bin/.idx pair (without the extension)."""
    weight: Annotated[float, Field(gt=0)] | Literal["size"] = 1.0
    """Share of the samples, relative to the other sources. size: by their numbers of tokens."""
    goldfish_k: Annotated[int, Field(ge=2)] | Literal["default"] | None = "default"
    """Drop 1 in k for this source instead of goldfish.k; null: never drop; default: goldfish.k."""


class DataConfig(Section):
    """What is read, and in which order."""

    train: list[SourceConfig] = Field(default_factory=list)
    """Training sources. A single path, or a list of paths, is short for sources of equal weight."""
    valid: list[SourceConfig] | None = None
    """Validation sources. null: the validation split of the training corpora."""
    split: Text | None = None
    """Cut bare .bin/.idx pairs into training, validation and test text in these proportions (969,30,1), as Megatron."""
    tokenizer: AbsolutePath | None = None
    """tokenizer.model (sentencepiece) or tokenizer.json. null: the one stored in the training corpora."""
    sequence_length: int = Field(default=1024, ge=8)
    """Tokens in a sample."""
    seed: Seed = 0
    """Seed of the sample order."""
    prefetch: int = Field(default=4, ge=1, le=1024)
    """Steps whose batches are made ahead of time by the loader's thread."""

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_blend(value) or [{"path": value}]
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("split")
    @classmethod
    def _is_a_split(cls, text: str | None) -> str | None:
        if text is not None:
            parse_split(text)
        return text

    @model_validator(mode="after")
    def _validates_on_one_text(self) -> DataConfig:
        if self.split is not None and self.valid is not None:
            raise ValueError(
                "split cuts validation text from data.train, and data.valid names some: leave out one of them"
            )
        sizes = {source.weight == "size" for source in self.train}
        if len(sizes) > 1:
            raise ValueError("train: weight=size for some sources and a number for others: give all of them one kind")
        return self

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """Shares of training, validation and test, None without a split."""
        return None if self.split is None else parse_split(self.split)


# ------------------------------------------------------------------------------------------------------------ objective


class GoldfishConfig(Section):
    """Which tokens are left out of the loss (Hans et al. 2024, arXiv 2406.10209)."""

    k: int | None = Field(default=4, ge=2)
    """Drop 1 in k tokens as targets. null: plain training."""
    h: int = Field(default=13, ge=1, le=256)
    """Tokens of context that decide (13: the n-gram length of contamination studies)."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the hash: another seed drops another set of tokens."""
    window: Literal["preceding", "inclusive"] = "preceding"
    """preceding: the h tokens before the target (the paper); inclusive: the target and the h-1 before it (its code)."""
    min_context: int | None = Field(default=None, ge=0)
    """Keep tokens with fewer than this many before them in their document. null: h (h-1 for inclusive)."""
    scheme: Literal["goldfish-v1", "table", "static", "random"] = "goldfish-v1"
    """goldfish-v1: this project's hash; table: the published code's masks bit for bit; static, random: baselines."""
    canonical: Literal["casefold"] | None = None
    """casefold: hash ids after folding case, leading space and Unicode forms, so that near-duplicates share masks."""

    @model_validator(mode="after")
    def _scheme_takes_them(self) -> GoldfishConfig:
        takes = {"table": ("h", "canonical"), "static": (), "random": ("seed",)}
        if self.scheme != "goldfish-v1":
            defaults = {"h": 13, "seed": 0, "window": "preceding", "min_context": None, "canonical": None}
            for name, default in defaults.items():
                if getattr(self, name) != default and name not in takes[self.scheme]:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no meaning for scheme={self.scheme}: leave it at "
                        f"{'null' if default is None else default}"
                    )
        return self


class LossConfig(Section):
    """Cross-entropy and its terms."""

    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of (log-sum-exp)^2 per supervised token (PaLM; 1e-4 is usual)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability spread over the vocabulary."""
    mile_gamma: float = Field(default=0.0, ge=0, le=10)
    """MiLe: weigh tokens by (mile_sigma + entropy of the prediction)^this (Su et al. 2024: 1). 0: all alike."""
    mile_sigma: float = Field(default=1.0, ge=0)
    """MiLe: what is added to the entropy [nats]."""
    logits_mib: int | None = Field(default=None, ge=1)
    """MiB that logits may take at one time. null: on a CPU 16 or what 256 tokens (bf16: 512) take, on CUDA 1024."""

    @model_validator(mode="after")
    def _sigma_is_miles(self) -> LossConfig:
        if not self.mile_gamma and self.mile_sigma != 1.0:
            raise ValueError(f"mile_sigma={self.mile_sigma:g} has no meaning with mile_gamma=0: leave it at 1")
        return self

    @property
    def entropy_weight(self) -> tuple[float, float] | None:
        """(sigma, gamma) of MiLe, None without it."""
        return (self.mile_sigma, self.mile_gamma) if self.mile_gamma else None


class PatchConfig(Section):
    """Patch-level training (Shao et al. 2024): a first stage reads and predicts patches of several tokens at a time."""

    size: int | None = Field(default=None, ge=2, le=64)
    """Tokens of a patch (the paper: 4). null: no patch stage."""
    fraction: float = Field(default=2 / 3, gt=0, le=1)
    """Share of the budget that is spent on patches, before the tokens."""
    restart: bool = True
    """Begin the token stage with a fresh optimizer and a schedule of its own. false: both go on."""

    @model_validator(mode="after")
    def _has_a_size(self) -> PatchConfig:
        if self.size is None and (self.fraction != 2 / 3 or not self.restart):
            raise ValueError("fraction and restart have no meaning with size=null: set patch.size")
        return self


class ContrastConfig(Section):
    """Self-contrastive training (Guan and Huang 2023): unlearn the repetitions that an earlier model predicts."""

    premature: AbsolutePath | None = None
    """Run or checkpoint of the earlier model, usually train.initial_weights as well. null: plain training."""
    strength: float = Field(default=4.0, gt=0)
    """What its logits are multiplied by where it wrongly predicts a repetition."""
    context: int = Field(default=64, ge=1)
    """Tokens back in which a predicted token counts as a repetition."""

    @model_validator(mode="after")
    def _has_a_model(self) -> ContrastConfig:
        if self.premature is None and (self.strength, self.context) != (4.0, 64):
            raise ValueError("strength and context have no meaning with premature=null: set contrast.premature")
        return self


# ------------------------------------------------------------------------------------------------------------- training


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay, or Muon."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalized momentum for the hidden matrices, AdamW for embedding, head, norms and biases."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW: decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the second moment."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon: decay of the momentum (Nesterov's)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the matrices; norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Decay the embedding and the output head too."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this. null: no clipping."""

    @model_validator(mode="after")
    def _momentum_is_muons(self) -> OptimizerConfig:
        if self.name != "muon" and self.momentum != 0.95:
            raise ValueError(f"momentum={self.momentum:g} has no meaning for name={self.name}: leave it at 0.95")
        return self


class ScheduleConfig(Section):
    """Learning rate over the budget (steps, tokens or supervised tokens, whichever the run is limited by)."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine or linear: decay from the end of the warmup; wsd: hold, then decay at the end; constant: hold."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warmup over this many steps. null: warmup_fraction."""
    warmup_fraction: float = Field(default=0.02, ge=0, le=1)
    """Linear warmup over this share of the budget."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate / peak learning rate."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the budget over which the rate decays at the end."""
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """wsd: 1 - sqrt(x) (Haegele et al. 2024) or 1 - x."""

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.name == "wsd" and self.warmup_steps is None and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction is above 1: nothing is left to hold the peak rate")
        return self


class TrainConfig(Section):
    """The budget, the batch and the numbers format."""

    steps: int | None = Field(default=None, ge=1)
    """Budget in optimizer steps. Set one of steps, tokens and supervised_tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """Budget in input tokens."""
    supervised_tokens: int | None = Field(default=None, ge=1)
    """Budget in tokens that enter the loss: the fair one for comparing goldfish with plain training."""
    global_batch_size: int = Field(default=32, ge=1)
    """Sequences in an optimizer step, over all processes."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences in one forward pass of one process."""
    seed: Seed = 0
    """Seed of the initial weights."""
    initial_weights: AbsolutePath | None = None
    """Start from the weights of this run, checkpoint or `megafish import`. null: from random ones."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: bf16 weights and activations with fp32 master weights and reductions."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU, otherwise the CPU."""

    @model_validator(mode="after")
    def _one_budget(self) -> TrainConfig:
        given = {k: v for k in ("steps", "tokens", "supervised_tokens") if (v := getattr(self, k)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"set exactly one of train.steps, train.tokens and train.supervised_tokens (given: "
                f"{', '.join(f'{name}={value}' for name, value in given.items()) or 'none'})"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        return self


class EngineConfig(Section):
    """How DeepSpeed holds the model."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: 0 replicates everything, 1 shards the optimizer's state, 2 the gradients too, 3 the weights too."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes that share each layer: every matrix is cut into as many parts (Megatron). Best within a node."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Processes that share each sequence, for long ones: all-to-all around attention (DeepSpeed-Ulysses)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: keep the optimizer's state and the fp32 weights in the host's memory and step there (ZeRO 1 to 3)."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """cpu: keep the weights in the host's memory until a layer needs them (ZeRO 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Keys of DeepSpeed's own configuration, merged over the ones made here."""

    @field_validator("deepspeed")
    @classmethod
    def _neither_twice_nor_idle(cls, keys: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        places = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
        if {"zero_stage", *places.values()} <= info.data.keys():
            offload = {section: f"engine.{name}={info.data[name]}" for section, name in places.items()}
            if found := complaints(keys, info.data["zero_stage"], offload):
                raise ValueError("; ".join(found))
        return keys

    @model_validator(mode="after")
    def _groups_fit_the_mesh(self) -> EngineConfig:
        zero = self.deepspeed.get("zero_optimization")
        wrong = [key for key in _GROUPS_OF_NEIGHBOURS if isinstance(zero, dict) and zero.get(key)]
        if wrong and self.tensor_parallel > 1:
            raise ValueError(
                f"zero_optimization.{wrong[0]} with tensor_parallel={self.tensor_parallel}: DeepSpeed would take "
                "neighbouring processes for holders of the same weights; leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _stage_takes_them(self) -> EngineConfig:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer={self.offload_optimizer} needs zero_stage=1, 2 or 3: at 0 DeepSpeed leaves the "
                "optimizer alone (on one process 1 costs nothing)"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters={self.offload_parameters} needs zero_stage=3: below it every process computes "
                "with whole weights"
            )
        return self


# DeepSpeed's keys that form groups of neighbouring ranks, whatever the mesh.
_GROUPS_OF_NEIGHBOURS = ("zero_hpz_partition_size", "zero_quantized_gradients", "mics_shard_size")


class EvalConfig(Section):
    """Validation, never masked."""

    interval: int | None = Field(default=250, ge=1)
    """Steps between validations. null: only at the end."""
    sequences: int = Field(default=64, ge=1)
    """Sequences read at each validation (at most the whole split)."""
    dropped_sequences: int = Field(default=8, ge=0)
    """Training sequences on which the loss of dropped and kept tokens is compared at each validation. 0: never."""
    canaries: int = Field(default=8, ge=0)
    """Canaries of each number of copies that are read at each validation: loss, would they be recited? 0: none."""
    canary_interval: int | None = Field(default=None, ge=1)
    """Steps between readings of the canaries. null: at each validation."""
    recited_limit: float | None = Field(default=None, ge=0, lt=1)
    """Share of the canaries of any number of copies (1 or more) that may be recited. null: no limit."""
    recited_action: Literal["warn", "stop"] = "stop"
    """Above that limit: a warning, or the run saves a checkpoint and ends."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    interval: int | None = Field(default=500, ge=1)
    """Steps between checkpoints. null: only at the end."""
    keep: int | None = Field(default=3, ge=1)
    """Keep the newest n checkpoints. null: all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep those of every n-th step as well. null: none for this reason."""
    keep_best: bool = False
    """Keep the one with the lowest validation loss as well."""
    asynchronous: bool = True
    """Write while the training goes on; costs the size of a process's optimizer state in host memory."""


class GuardConfig(Section):
    """What is done about bad steps, stalls and corrupted weights."""

    sigma: float | None = Field(default=6.0, gt=0)
    """Refuse a step whose loss or gradient norm is this many deviations above the last. null: only non-finite ones."""
    window: int = Field(default=128, ge=2)
    """Steps that a step is compared with."""
    min_history: int = Field(default=64, ge=2)
    """Steps before spikes are looked for, at most `window`."""
    max_skips: int = Field(default=3, ge=0)
    """Refused steps among the last `window` that are put up with. One more: back to the last checkpoint."""
    max_rollbacks: int = Field(default=2, ge=0)
    """Times to go back without reaching the next checkpoint. Then the run stops."""
    stall_seconds: float | None = Field(default=600.0, gt=0)
    """End a run that has not moved on for so long within a step, and name the late process. null: no watchdog."""
    slow_stall_seconds: float = Field(default=3600.0, gt=0)
    """The same for start-up, the first step, evaluation and checkpoints."""
    replica_check_interval: int | None = Field(default=100, ge=1)
    """Steps between checks, and before every checkpoint, that all processes hold the same weights. null: never."""

    @model_validator(mode="after")
    def _consistent(self) -> GuardConfig:
        if self.min_history > self.window:
            raise ValueError(f"min_history={self.min_history} is above window={self.window}: the window never fills")
        if self.stall_seconds is not None and self.stall_seconds > self.slow_stall_seconds:
            raise ValueError(
                f"stall_seconds={self.stall_seconds:g} is above slow_stall_seconds={self.slow_stall_seconds:g}: raise "
                "the latter too"
            )
        return self


class WandbConfig(Section):
    """Weights & Biases. Needs `pip install megafish[wandb]`."""

    enabled: bool = False
    """Log to wandb."""
    mode: Literal["online", "offline"] = "online"
    """offline writes below the run directory and needs no account; `wandb sync` uploads it later."""
    project: Text = "megafish"
    """Project."""
    entity: Text | None = None
    """Team or user. null: wandb's default."""
    group: Text | None = None
    """Group of runs."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""


class TrackConfig(Section):
    """What is reported, and where. metrics.jsonl in the run directory is always written."""

    log_interval: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl (and TensorBoard's and wandb's points)."""
    tensorboard: bool = False
    """Write TensorBoard events below the run directory."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""


class ProfileConfig(Section):
    """Where the time and the memory of a step go. Off unless asked for, and then without a cost."""

    phases: bool = False
    """Time data, forward, backward, optimizer and communication of every step (metrics.jsonl, a table at the end)."""
    trace_step: int | None = Field(default=None, ge=1)
    """First step that torch's profiler records, as a Chrome trace below the run's profile/. null: none."""
    memory_step: int | None = Field(default=None, ge=1)
    """First step whose allocations are recorded, for pytorch.org/memory_viz (CUDA). null: none."""
    steps: int = Field(default=2, ge=1, le=100)
    """Steps that a trace or a memory record holds."""
    ranks: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """Processes that record."""
