"""The section `unlearn`: which method, on which data."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from megafish.config_sections import AbsolutePath, Section, Seed, Text

Method = Literal[
    "ga", "graddiff", "ga_kl", "idk", "dpo", "npo", "simnpo", "llmu", "relearn",
    "undial", "wga", "satimp", "ceu", "rmu", "adaptive_rmu", "task_vector",
    "memflex",
]  # fmt: skip
RetainLoss = Literal["none", "ce", "kl", "ce+kl"]

# What a method takes beside the settings that all take, with its default. None: has to be given.
OPTIONS: dict[str, dict[str, Any]] = {
    "ga": {},
    "graddiff": {},
    "ga_kl": {},
    "idk": {"refusals": None},
    "dpo": {"beta": 0.1, "refusals": None},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "margin": 0.0},
    "llmu": {"mismatch_answers": 5, "mismatch_weight": 1.0},
    "relearn": {"substitutes": None},
    "undial": {"beta": 10.0},
    "wga": {"beta": 1.0},
    "satimp": {"beta": 5.0, "beta2": 1.0},
    "ceu": {"skip_tokens": 1},
    "rmu": {"layer": None, "steering": 6.5},
    "adaptive_rmu": {"layer": None, "steering": 2.0},
    "task_vector": {"negation": 1.0},
    "memflex": {"similarity": 0.92, "magnitude": 6e-4},
}
# (forget_weight, retain_loss, retain_weight) of a method.
WEIGHTS: dict[str, tuple[float, RetainLoss, float]] = {
    "ga": (1.0, "none", 1.0),
    "graddiff": (1.0, "ce", 1.0),
    "ga_kl": (1.0, "kl", 1.0),
    "idk": (1.0, "ce", 1.0),
    "dpo": (1.0, "ce", 1.0),
    "npo": (1.0, "ce", 1.0),
    "simnpo": (0.125, "ce", 1.0),
    "llmu": (0.5, "kl", 1.0),
    "relearn": (1.0, "ce+kl", 1.0),
    "undial": (1.0, "none", 1.0),
    "wga": (1.0, "ce", 1.0),
    "satimp": (1.0, "ce", 0.1),
    "ceu": (1.0, "none", 1.0),
    "rmu": (1.0, "none", 1200.0),
    "adaptive_rmu": (1.0, "none", 1200.0),
    "task_vector": (1.0, "none", 1.0),
    "memflex": (0.4, "ce", 2.0),
}
RMU = ("rmu", "adaptive_rmu")
KEEPING = (*RMU, "memflex")
"""Methods that leave some weights as they are, bit for bit."""


class UnlearnConfig(Section):
    """Removal of what a trained model has memorized. Options that are null take the method's own default."""

    model: AbsolutePath
    """Run or checkpoint to start from; also the reference of methods that have one."""
    method: Method = "npo"
    """How (docs/unlearn.md)."""
    forget: list[AbsolutePath] = Field(min_length=1)
    """What to remove: files of questions and answers or of text (.jsonl .json .csv .parquet .txt)."""
    retain: list[AbsolutePath] = Field(default_factory=list)
    """What to keep, likewise. May be empty for a method without a retain term."""
    choices: list[AbsolutePath] = Field(default_factory=list)
    """Questions with choices (WMDP, MMLU) whose accuracy is measured with both sets. Nothing is learned of them."""
    template: Text = "Question: {question}\nAnswer: {answer}"
    """Text of a question with its answer, as the model was trained on; what stands before {answer} is given."""
    epochs: float = Field(default=5.0, gt=0)
    """Passes over the forget set (relearn: over its substitutes), unless train.steps is given."""
    seed: Seed = 0
    """Seed of the order and of every random choice."""
    forget_weight: float | None = Field(default=None, gt=0)
    """What the forget term is multiplied by."""
    retain_loss: RetainLoss | None = None
    """ce: cross-entropy; kl: divergence from the starting model; ce+kl: both. RMU has a retain term of its own."""
    retain_weight: float | None = Field(default=None, gt=0)
    """What the retain term is multiplied by."""
    beta: float | None = Field(default=None, gt=0)
    """dpo, npo, simnpo: inverse temperature; undial: how far the logit is lowered; wga, satimp: exponent of p."""
    beta2: float | None = Field(default=None, ge=0)
    """satimp: exponent of 1 - p."""
    margin: float | None = Field(default=None, ge=0)
    """simnpo: loss of a token [nats] from which on the pressure fades."""
    mismatch_answers: int | None = Field(default=None, ge=1)
    """llmu: answers of the retain set that each question to forget is joined with, at every step."""
    mismatch_weight: float | None = Field(default=None, gt=0)
    """llmu: what their loss is multiplied by."""
    skip_tokens: int | None = Field(default=None, ge=0)
    """ceu: first tokens of an answer that are left alone."""
    layer: int | None = Field(default=None, ge=1)
    """rmu: block, from 1, that is steered; it and the two before it are trained. null: at 7/32 of the depth, or 3."""
    steering: float | None = Field(default=None, gt=0)
    """rmu: length of the steering vector; adaptive_rmu: the same in lengths of the starting model's output."""
    negation: float | None = Field(default=None, gt=0)
    """task_vector: how many times the change that learns the forget set is taken off the starting weights."""
    similarity: float | None = Field(default=None, ge=-1, le=1)
    """memflex: cosine of the two sets' gradients below which a tensor is trained."""
    magnitude: float | None = Field(default=None, ge=0)
    """memflex: mean size of the entries of the forget set's gradient above which a tensor is trained."""
    sure_percentile: float | None = Field(default=None, gt=0, lt=100)
    """SURE: only rows whose forget gradient's norm is at or above this percentile in their tensor are trained (99)."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Rank of adapters that are trained instead of the weights. null: all weights are trained."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """What the adapters are multiplied by, times the rank. null: twice the rank."""
    refusals: AbsolutePath | None = None
    """idk, dpo: file with one refusal a line. null: a list that ships with megafish."""
    substitutes: AbsolutePath | None = None
    """relearn: file of questions and vague answers to learn in the place of the forget set's."""

    @field_validator("forget", "retain", "choices", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _method_takes_them(self) -> UnlearnConfig:
        takes = OPTIONS[self.method]
        for name in sorted({name for options in OPTIONS.values() for name in options}):
            if getattr(self, name) is not None and name not in takes:
                users = ", ".join(method for method in get_args(Method) if name in OPTIONS[method])
                raise ValueError(f"{name} has no meaning for method={self.method}: leave it null (it is of {users})")
        if self.method == "relearn" and self.substitutes is None:
            raise ValueError("method=relearn needs substitutes: a file of questions with vague answers to learn")
        if self.method in RMU and self.retain_loss not in (None, "none"):
            raise ValueError(f"retain_loss={self.retain_loss} has no meaning for method={self.method}: leave it null")
        if self.method == "task_vector" and self.retain_loss not in (None, "none"):
            raise ValueError(
                f"retain_loss={self.retain_loss} has no meaning for method=task_vector: it would be taken off as well"
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(f"lora_alpha={self.lora_alpha} has no meaning without lora_rank: set both")
        if self.method == "task_vector" and self.lora_rank is not None:
            raise ValueError("method=task_vector takes a change of the weights off: leave lora_rank out")
        if self.method == "memflex" and self.lora_rank is not None:
            raise ValueError("method=memflex compares whole gradients before the first step: leave lora_rank out")
        if self.method == "memflex" and self.weights[1] == "none":
            raise ValueError("method=memflex compares the gradients of both sets: it needs a retain_loss")
        if self.method == "ceu" and "kl" in (self.retain_loss or ""):
            raise ValueError(
                f"method=ceu with retain_loss={self.retain_loss}: CE-U's teacher is the model itself, a retain term's "
                "is the starting model, and one pass has one teacher: take retain_loss=ce"
            )
        if self.retain_weight is not None and not self.reads_retain:
            raise ValueError("retain_weight has no meaning with retain_loss=none: set retain_loss, or leave it null")
        if self.reads_retain and not self.retain:
            raise ValueError(f"method={self.method} needs retain: name a file of what the model is to keep")
        if "{answer}" not in self.template or "{question}" not in self.template.partition("{answer}")[0]:
            raise ValueError(f"template={self.template!r}: must have {{question}} and behind it {{answer}}")
        return self

    def option(self, name: str) -> Any:
        """A setting of the method, or its default."""
        given = getattr(self, name)
        return OPTIONS[self.method][name] if given is None else given

    @property
    def weights(self) -> tuple[float, RetainLoss, float]:
        """(forget_weight, retain_loss, retain_weight) as they are meant."""
        forget, kind, retain = WEIGHTS[self.method]
        return (
            forget if self.forget_weight is None else self.forget_weight,
            kind if self.retain_loss is None else self.retain_loss,
            retain if self.retain_weight is None else self.retain_weight,
        )

    def identity(self) -> dict[str, Any]:
        """What a continuation must share with its run: all but the names of files, whose texts have digests of their
        own, and the questions that are only asked."""
        files = {"model", "forget", "retain", "refusals", "substitutes", "choices"}
        return self.model_dump(mode="json", exclude=files)

    @property
    def keeps_weights(self) -> bool:
        """Whether some of the trained tensors, or rows of them, are to stay as they are."""
        return self.method in KEEPING or self.sure_percentile is not None

    @property
    def reads_retain(self) -> bool:
        """Whether the retain set takes part in the loss."""
        return self.weights[1] != "none" or self.method in (*RMU, "llmu")
