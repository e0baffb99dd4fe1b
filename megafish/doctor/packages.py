"""The packages that megafish imports somewhere: which are here, whether they work, and what installs them.

Nothing optional is imported here: a package is looked up by its metadata, and imported in a process of its own, so that
a broken one is told instead of taking the doctor with it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import megafish
from megafish.doctor.child import ask
from megafish.doctor.part import Part, State
from megafish.doctor.probe import Torch

_IMPORT_SECONDS = 60


@dataclass(frozen=True)
class Package:
    """A package that megafish imports somewhere."""

    name: str
    module: str
    purpose: str
    extra: str | None = None
    """The extra of setup.py that brings it; None: megafish requires it."""
    gpu: bool = False
    """Of no use without an NVIDIA GPU."""
    peer: bool = False
    """Only benchmarks compare with it: not imported, and not missed."""

    @property
    def required(self) -> bool:
        return self.extra is None and not self.peer


PACKAGES = (
    Package("torch", "torch", "everything"),
    Package("deepspeed", "deepspeed", "training (ZeRO, offloading)"),
    Package("numpy", "numpy", "data"),
    Package("pydantic", "pydantic", "configuration"),
    Package("pyyaml", "yaml", "configuration"),
    Package("sentencepiece", "sentencepiece", "tokenizers"),
    Package("tokenizers", "tokenizers", "tokenizer.json"),
    Package("safetensors", "safetensors", "checkpoints"),
    Package("pyarrow", "pyarrow", "parquet files"),
    Package("zstandard", "zstandard", ".zst files"),
    Package("rouge-score", "rouge_score", "audit: ROUGE-L"),
    Package("rapidfuzz", "rapidfuzz", "audit: edit distances"),
    Package("scipy", "scipy", "audit: log-linear laws"),
    Package("matplotlib", "matplotlib", "plots"),
    Package("jinja2", "jinja2", "reports and Slurm scripts"),
    Package("psutil", "psutil", "status of runs"),
    Package("tensorboard", "tensorboard", "track.tensorboard"),
    Package("triton", "triton", "the loss, mask and element-wise kernels on a GPU", extra="dev"),
    Package("flash-attn", "flash_attn", "attention on a GPU (else torch's varlen_attn)", extra="cuda", gpu=True),
    Package("wandb", "wandb", "track.wandb", extra="wandb"),
    Package("transformers", "transformers", "using an export, and the tests", extra="hf"),
    Package("lm-eval", "lm_eval", "megafish eval", extra="eval"),
    Package("sentence-transformers", "sentence_transformers", "unlearn score: --nli, --embeddings", extra="judges"),
    Package("tokengrams", "tokengrams", "megafish duplicates", extra="duplicates"),
    Package("megatron-core", "megatron", "a benchmark alone: its corpora are read without it", peer=True),
)

# What DeepSpeed's import is asked for as well, of the one file that knows DeepSpeed.
_OPERATORS = """
import json
try:
    from megafish.train.engine import compiled_operators
    found = compiled_operators()
except Exception:
    found = {}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Found:
    """What was found of a package."""

    state: State
    version: str = ""
    error: str = ""
    operators: tuple[tuple[str, str], ...] = ()
    """DeepSpeed's compiled operators: (name, built, buildable or not buildable)."""


def look_at(package: Package) -> Found:
    """Look a package up and import it elsewhere."""
    try:
        version = distribution(package.name).version
    except PackageNotFoundError:
        spec = find_spec(package.module)
        # A folder without __init__.py, such as the wandb/ that wandb leaves where it ran, is no package.
        if spec is None or spec.origin is None:
            return Found("missing")
        version = "unknown version"
    if package.name == "torch" or package.peer:  # torch is asked more than that, by megafish.doctor.probe
        return Found("ok", version)
    answer = ask(f"import {package.module}\n{_OPERATORS if package.name == 'deepspeed' else ''}", _IMPORT_SECONDS)
    if answer.failure is not None:
        return Found("broken", version, answer.failure)
    if package.name != "deepspeed":
        return Found("ok", version)
    return Found("ok", version, operators=tuple(json.loads(answer.output.splitlines()[-1]).items()))


def package_part(package: Package, found: Found, torch: Torch) -> Part:
    """The line of a package on a machine of which torch says `torch`."""
    state, detail = found.state, found.version
    if package.name == "torch" and state == "ok":
        if torch.version:
            detail = f"{torch.version}, " + (f"built for CUDA {torch.cuda}" if torch.cuda else "without CUDA")
        else:
            state, detail = "broken", f"{found.version}: {torch.error}"
    elif state == "broken":
        detail = f"{found.version}: {found.error}"
    remedy = None
    if state == "missing":
        if package.peer or (package.gpu and not torch.gpus):
            return Part("packages", package.name, "unused", "not needed here", package.purpose)
        if package.name == "triton" and not torch.gpus:
            detail = "not needed without an NVIDIA GPU: torch's own operators serve"
            return Part("packages", package.name, "unused", detail, package.purpose)
        remedy = install(package)
    elif state == "broken":
        lacks = re.search(r"No module named '(\w+)", found.error)
        # What it lacks comes with its requirements, which pip looks through; to reinstall it alone would not help.
        lacking = lacks is not None and lacks[1] != package.module
        remedy = install(package) if lacking else reinstall(package, found.version)
    elif package.name == "triton":
        state, detail, remedy = _triton_use(detail, torch)
    return Part("packages", package.name, state, detail, package.purpose, package.required, remedy)


def _triton_use(version: str, torch: Torch) -> tuple[State, str, str | None]:
    if torch.kernels == "triton":
        return "ok", f"{version}, in use on the GPU", None
    if not torch.gpus:
        return "ok", f"{version}, idle without a GPU", None
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return (
            "broken",
            f"{version}, turned off by TRITON_INTERPRET=1: torch's operators serve",
            "unset TRITON_INTERPRET",
        )
    return "unused", f"{version}, its kernels are made for NVIDIA GPUs: torch's operators serve", None


def install(package: Package) -> str:
    """Command that installs a package, with the versions that the tests ran with where their list is there."""
    words = ["pip", "install"]
    if package.name == "flash-attn":  # is compiled against the torch that is there
        words.append("--no-build-isolation")
    return shlex.join([*words, *_pins(), "megafish" if package.extra is None else f"megafish[{package.extra}]"])


def reinstall(package: Package, version: str) -> str:
    """Command that puts a broken package back."""
    exact = package.name if version == "unknown version" else f"{package.name}=={version.partition('+')[0]}"
    return shlex.join(["pip", "install", "--force-reinstall", "--no-deps", exact])


def _pins() -> list[str]:
    file = Path(megafish.__file__).resolve().parents[1] / "constraints.txt"
    if not file.is_file():  # installed from a wheel
        return []
    return ["-c", file.name if file.parent == Path.cwd() else str(file)]
