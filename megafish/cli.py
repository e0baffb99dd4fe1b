"""The command line. Each command imports what it runs when it runs, so that `megafish --help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

# Threads of a parallel region spin while they wait for each other, 300,000 rounds by default: as soon as another
# program wants a core, each of the thousands of regions a second costs a time slice. Set before torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from megafish import __version__
from megafish.data import duplicates_cli
from megafish.decode import cli as decode_cli
from megafish.errors import InputError, Stopped
from megafish.evaluate import cli as evaluate_cli
from megafish.jobs import cli as jobs_cli
from megafish.launcher import is_first, leave
from megafish.sweep.cli import sweep
from megafish.unlearn.cli import unlearn

app = typer.Typer(
    help="Pretrain language models that cannot recite their training data, and prove it.",
    epilog="First time here? Run: megafish demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings on top of the file, e.g. optimizer.lr=3e-4 goldfish.k=null")
]
TextKey = Annotated[str, typer.Option(help="Field that holds the text in .jsonl and .parquet")]
TextSuffix = Annotated[
    list[str] | None,
    typer.Option(help="Read files with this suffix as text too, e.g. .py (may be given several times)"),
]
Step = Annotated[int | None, typer.Option(help="Checkpoint step (default: the latest)", min=0)]


class TokenizerKind(str, Enum):
    """Sentencepiece's models."""

    bpe = "bpe"
    unigram = "unigram"


class DocumentUnit(str, Enum):
    """What a document is in a text file."""

    file = "file"
    line = "line"
    blank_line = "blank-line"


# The machine's state and what the user named, not defects of the program: one line, no traceback.
_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def main() -> None:
    """Entry point: `run`, and the end of the process."""
    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, int | None):
            leave(end.code or 0)
        raise
    leave(0)


def run() -> None:
    """The command line: a user's mistake is one line and exit code 2, Ctrl-C is 130, a defect keeps its traceback."""
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        _fail(f"{error.filename or 'output'}: {(error.strerror or str(error)).lower()}")
    except SystemExit as end:
        if end.code == 130 and not isinstance(end, Stopped):  # what typer makes of Ctrl-C, without a word
            print("interrupted", file=sys.stderr)
        raise


def _fail(message: str) -> None:
    # Processes of one run fail together and with one message (train/engine.py); the first one prints it.
    if is_first():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"megafish {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: megafish doctor --no-test")
def doctor(
    test: Annotated[bool, typer.Option("--test/--no-test", help="Run the self-test, 10 to 40 seconds")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """What is installed here, what of it is used, what is missing, and whether it works."""
    from megafish.doctor.report import examine

    if not examine(test=test, as_json=as_json):
        raise typer.Exit(1)


@app.command(epilog="Example: megafish tokenizer corpus/ --output tokenizer.model --vocab-size 32000")
def tokenizer(
    inputs: Annotated[
        list[Path], typer.Argument(help="Text files or folders: .txt .jsonl .jsonl.gz .jsonl.zst .parquet")
    ],
    output: Annotated[Path, typer.Option(help="File to write, e.g. tokenizer.model")],
    vocab_size: Annotated[int, typer.Option(help="Number of token ids", min=300)] = 32000,
    kind: Annotated[TokenizerKind, typer.Option(help="Model of the pieces")] = TokenizerKind.bpe,
    text_key: TextKey = "text",
    text_suffix: TextSuffix = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample it is trained on")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists")] = False,
) -> None:
    """Train a sentencepiece tokenizer that reproduces any text exactly."""
    from megafish.data.readers import ReadOptions
    from megafish.data.tokenizer import train_tokenizer

    trained = train_tokenizer(
        inputs,
        output,
        vocab_size,
        kind.value,
        options=ReadOptions(text_key=text_key, text_suffixes=_suffixes(text_suffix)),
        seed=seed,
        overwrite=overwrite,
    )
    print(f"{output}: {trained.vocab_size:,} ids")
    suffixes = "".join(f" --text-suffix {suffix}" for suffix in text_suffix or ())
    key = "" if text_key == "text" else f" --text-key {text_key}"
    print(f"next: megafish prepare {' '.join(map(str, inputs))}{suffixes}{key} --tokenizer {output} --output corpus")


@app.command(
    epilog="Example: megafish prepare wiki.jsonl.zst --tokenizer tokenizer.model --output corpus --canaries 16"
)
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="Text files or folders: .txt .jsonl .jsonl.gz .jsonl.zst .parquet")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.model (sentencepiece) or tokenizer.json")],
    eos: Annotated[
        str | None, typer.Option(help="Token that ends a document (default: the tokenizer's own, or a usual name)")
    ] = None,
    text_key: TextKey = "text",
    text_suffix: TextSuffix = None,
    goldfish_k_key: Annotated[
        str | None, typer.Option(help="Field that holds a document's own goldfish k (0: never drop)")
    ] = None,
    documents: Annotated[DocumentUnit, typer.Option(help="What a document is in a text file")] = DocumentUnit.file,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of the documents kept for validation", min=0, max=0.5)
    ] = 0.01,
    split_seed: Annotated[int, typer.Option(help="Seed of the split by document hash")] = 0,
    canaries: Annotated[int, typer.Option(help="Canaries per exposure level (0: none)", min=0)] = 0,
    canary_exposures: Annotated[
        str, typer.Option(help="Times a canary stands in the corpus; 0 is the control group")
    ] = "0,1,2,4,8,16,32,64,128",
    canary_tokens: Annotated[int, typer.Option(help="Tokens of a canary", min=2)] = 128,
    canary_file: Annotated[
        Path | None, typer.Option(help="Take them from this text file (parted by blank lines), not from the corpus")
    ] = None,
    canary_seed: Annotated[int, typer.Option(help="Seed of their choice and places")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core)", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder")] = False,
) -> None:
    """Turn text into Megatron .bin/.idx files with a manifest. Interrupted, it continues where it was."""
    from megafish.data.canary import CanaryConfig
    from megafish.data.prepare import prepare as run_prepare
    from megafish.run import read_json

    chosen = None
    if canaries:
        chosen = CanaryConfig(
            count=canaries,
            tokens=canary_tokens,
            exposures=_integers(canary_exposures),
            seed=canary_seed,
            file=None if canary_file is None else str(canary_file),
        )
    manifest_file = run_prepare(
        inputs,
        output,
        tokenizer,
        eos=eos,
        text_key=text_key,
        goldfish_k_key=goldfish_k_key,
        documents=documents.value,
        text_suffixes=_suffixes(text_suffix),
        valid_fraction=valid_fraction,
        split_seed=split_seed,
        canaries=chosen,
        workers=workers,
        overwrite=overwrite,
    )
    for split, entry in read_json(manifest_file)["splits"].items():
        print(f"{output}/{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")
        if split == "valid" and entry["documents"] == 0:
            print("no document fell into the validation split: a larger --valid-fraction or more text would fill it")
    print(f"next: megafish train tiny data.train={output}")


def _suffixes(given: list[str] | None) -> tuple[str, ...]:
    return (".txt", *(suffix if suffix.startswith(".") else f".{suffix}" for suffix in given or ()))


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--canary-exposures {text!r}: expected whole numbers separated by commas, e.g. 0,1,8,64"
        ) from None


@app.command(
    epilog="Examples: megafish train tiny data.train=corpus goldfish.k=4 | megafish train runs/tiny (continues) | "
    "torchrun --nproc-per-node 8 --no-python megafish train 1b data.train=corpus"
)
def train(
    config: Annotated[str, typer.Argument(help="Preset, YAML file, or a run directory to continue")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run directory if it holds this run already, else start it")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and stop")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check a run of any size without its memory, and stop (--world N)")
    ] = False,
    world: Annotated[
        int | None, typer.Option(help="Processes of a dry run; world=N among the settings means the same", min=1)
    ] = None,
) -> None:
    """Train a model, or continue a run. Works under torchrun, the deepspeed launcher and srun."""
    from megafish.train.guard import EXIT_CORRUPT, EXIT_DIVERGED, EXIT_RECITES, StopRequest

    # Before all that is slow, so that a signal is answered in the same way from the first moment on.
    with StopRequest() as stop:
        from megafish.config import dump_config, load_config, preset_names
        from megafish.run import RunDir

        overrides = overrides or []
        if dry_run:
            overrides, world = _dry_world(overrides, world)
        elif world is not None:
            raise InputError("--world belongs to --dry-run: a run has as many processes as its launcher starts")
        if Path(config).is_dir() and (config not in preset_names() or (Path(config) / "config.yaml").is_file()):
            run = RunDir.existing(config)
            settings, resume = run.load_config([*overrides, f"run_dir={config}"]), True
        else:
            settings = load_config(config, overrides)
        if settings.unlearn is not None:
            raise InputError(f"{config}: has a section unlearn: `megafish unlearn {config}` runs it")
        if print_config:
            print(dump_config(settings, with_help=True), end="")
            return
        if dry_run:
            from megafish.train.dry_run import dry_run as run_dry

            report = run_dry(settings, world, resume=resume)
            if is_first():
                print(f"{report}\nnext: the same command without --dry-run, started by the launcher")
            return

        from megafish.train.loop import train as run_train
        from megafish.train.probes import Recites
        from megafish.train.recovery import Diverged
        from megafish.train.replicas import ReplicasDiffer

        try:
            outcome = run_train(settings, resume=resume, stop=stop)
        except (Diverged, Recites, ReplicasDiffer) as error:
            if os.environ["RANK"] == "0":
                print(f"error: {error}", file=sys.stderr)
            codes = {Diverged: EXIT_DIVERGED, Recites: EXIT_RECITES, ReplicasDiffer: EXIT_CORRUPT}
            raise SystemExit(codes[type(error)]) from None
    if os.environ.get("RANK", "0") == "0":
        where = f"{outcome.run.path}: step {outcome.spent.steps}, {outcome.spent.supervised_tokens:,} supervised tokens"
        if outcome.signal is None:
            print(f"{where}\nnext: megafish audit {outcome.run.path}")
        else:
            # Stopped before it wrote its configuration there is no run yet that could be named.
            again = f"megafish train {outcome.run.path}" if outcome.run.config_file.is_file() else "the same command"
            # Before the first step nothing is counted, also of a run that has checkpoints.
            early = f"{outcome.run.path}: stopped by {outcome.signal.name} before the first step of this start"
            print(f"{where}; stopped by {outcome.signal.name}" if outcome.spent.steps else early)
            print(f"next: {again}")
    if outcome.signal is not None:
        raise Stopped(128 + outcome.signal)


@app.command(epilog="Example: megafish verify runs/tiny")
def verify(run: Annotated[Path, typer.Argument(help="Run directory")]) -> None:
    """Read every checkpoint of a run and compare it with its checksums. Exit code 1 when one is damaged."""
    from megafish.run import RunDir
    from megafish.train.checkpoint import verify_run

    good, damaged = verify_run(RunDir.existing(run))
    if not good:
        print("next: start a new run, there is none to continue from")
    else:
        print(f"next: {RunDir.existing(run).command}" + (" (passes over the damaged ones)" if damaged else ""))
    if damaged:
        raise SystemExit(1)


def _dry_world(overrides: list[str], world: int | None) -> tuple[list[str], int | None]:
    """The settings without world=N, and N: of a dry run it may stand among them."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("world=")]
    if not given:
        return overrides, world
    if world is not None or len(given) > 1:
        raise InputError("the processes of a dry run are given twice: leave one of --world and world= away")
    if not given[0].isdigit() or int(given[0]) < 1:
        raise InputError(f"world={given[0]}: must be a whole number of processes, at least 1")
    return [word for word in overrides if not word.startswith("world=")], int(given[0])


jobs_cli.add_to(app)
app.add_typer(sweep, name="sweep")
app.add_typer(unlearn, name="unlearn")


@app.command(epilog="Examples: megafish plan 7b --gpu h100 --gpus 64 | megafish plan --calibration")
def plan(
    config: Annotated[str | None, typer.Argument(help="Preset or YAML file")] = None,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100, l40s, h100-pcie, h100, h200, b200 or mi300x")] = "h100",
    gpus: Annotated[int, typer.Option(help="GPUs of the run", min=1)] = 8,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of a node (default: 8, or all if fewer)", min=1)
    ] = None,
    network_gbps: Annotated[
        float | None, typer.Option(help="Gigabits a second between nodes, for each GPU (default: the GPU's usual)")
    ] = None,
    host_memory_gib: Annotated[
        float | None, typer.Option(help="Main memory of a node, for offload (default: unknown, no offload)", min=0)
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of a GPU and hour, in any currency", min=0)] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Token ids (default: the corpus's tokenizer, or model.vocab_size)", min=2)
    ] = None,
    best: Annotated[int, typer.Option(help="Layouts to show", min=1)] = 5,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Show how far predicted throughput is from published runs, and stop")
    ] = False,
) -> None:
    """Say what a run would take on a cluster: memory, time, communication, cost, and the best way to lay it out."""
    from megafish.plan.report import calibration_report, plan_report

    if calibration:
        print(calibration_report())
        return
    if config is None:
        raise InputError("name a preset or a YAML file: megafish plan 7b --gpu h100 --gpus 64")
    from megafish.config import load_config
    from megafish.plan.hardware import make_cluster
    from megafish.plan.layout import layout_of
    from megafish.plan.vocabulary import planned_vocab_size

    settings = load_config(config, overrides or [])
    cluster = make_cluster(
        gpu, gpus, gpus_per_node=gpus_per_node, network_gbps=network_gbps, host_memory_gib=host_memory_gib
    )
    ids = planned_vocab_size(settings, vocab_size)
    print(plan_report(settings, ids, layout_of(settings, gpus, "cuda"), cluster, price=price, best=best))


@app.command(epilog="Example: megafish generate runs/tiny --prompt 'def main(' --max-new-tokens 100")
def generate(
    run: Annotated[Path, typer.Argument(help="Run directory")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue (may be given several times)")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with one prompt a line")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy", min=0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens", min=1)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this total probability", min=0, max=1)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a continuation (may be given several times)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling")] = 0,
    memfree: Annotated[
        Path | None, typer.Option(help="Filter of n-grams (megafish filter), none of which is ever completed")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts continued at one time", min=1)] = 32,
    step: Step = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each prompt: prompt and continuation")
    ] = False,
) -> None:
    """Continue prompts with a trained model."""
    for option, value in (("--top-k", top_k), ("--top-p", top_p)):
        if value is not None and temperature == 0:
            raise InputError(f"{option} {value}: nothing is sampled at temperature 0: give --temperature 1 too")
    prompts = list(prompt or [])
    if prompt_file is not None:
        try:
            lines = prompt_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{prompt_file}: byte {error.start}: not UTF-8") from None
        if "" in lines:
            raise InputError(f"{prompt_file}: line {lines.index('') + 1} is empty: every line is a prompt")
        prompts += lines
    if not prompts:
        raise InputError("no prompt: give --prompt TEXT or --prompt-file FILE")

    from megafish.decode.generate import generate_text
    from megafish.decode.memfree import MemFree
    from megafish.decode.ngram_filter import NgramFilter
    from megafish.decode.packed import for_decoding
    from megafish.model.load import load_run

    free = None if memfree is None else MemFree(NgramFilter.open(memfree))
    loaded = load_run(run, step=step)
    if free is not None:
        free.filter.check_tokenizer(loaded.tokenizer)
    loaded = replace(loaded, model=for_decoding(loaded.model))
    texts = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
        memfree=free,
    )
    for text, continuation in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": text, "continuation": continuation}) if as_json else text + continuation)
    if free is not None:
        print(
            f"{memfree}: the likeliest token was blocked {free.rejected} times in {free.tokens} tokens", file=sys.stderr
        )
    print(f"next: megafish audit {run}", file=sys.stderr)


class WeightsDtype(str, Enum):
    """Of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command(epilog="Example: megafish export runs/tiny --to tiny-hf")
def export(
    run: Annotated[Path, typer.Argument(help="Run directory")],
    to: Annotated[Path, typer.Option(help="Folder to write, new or empty")],
    step: Step = None,
    dtype: Annotated[WeightsDtype | None, typer.Option(help="Of the weights (default: as they are stored)")] = None,
    shard_gib: Annotated[float, typer.Option(help="Most GiB of one file of weights", min=0.001)] = 4.0,
) -> None:
    """Write a model as a folder that transformers, vLLM and lm-eval load: Llama, Mistral, Qwen2 or Qwen3."""
    import torch

    from megafish.huggingface.export import export as run_export

    chosen = None if dtype is None else getattr(torch, dtype.value)
    done = run_export(run, to, step=step, dtype=chosen, shard_bytes=int(shard_gib * 2**30))
    files = f"{done.files} file{'s' if done.files > 1 else ''}"
    print(f"{to}: {done.architecture}, {done.parameters / 1e6:.1f}M parameters in {files}")
    for note in done.notes:
        print(note)
    print(f"next: python -c \"from transformers import pipeline; print(pipeline('text-generation', '{to}')('The'))\"")


@app.command("import", epilog="Example: megafish import Qwen3-0.6B --to runs/qwen3")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder with config.json, safetensors and a tokenizer")],
    to: Annotated[Path, typer.Option(help="Run directory to make, new or empty")],
    shard_gib: Annotated[float, typer.Option(help="Most GiB of one file of weights", min=0.001)] = 4.0,
) -> None:
    """Make a run of a Hugging Face model (Llama, Mistral, Qwen2 or Qwen3), to audit it or to train on from it."""
    from megafish.huggingface.importer import import_model

    done = import_model(source, to, shard_bytes=int(shard_gib * 2**30))
    print(f"{to}: {done.model_type}, {done.parameters / 1e6:.1f}M parameters")
    if done.padding:
        print(f"{done.padding} rows of the embedding have no token: they are never predicted")
    print(f"next: megafish generate {to} --prompt 'Once upon a time'")
    print(f"or:   megafish train {to}/config.yaml name=NAME data.train=CORPUS train.tokens=1e9")


@app.command(
    epilog="Examples: megafish audit runs/tiny --full | megafish audit Llama-3.2-1B data.train=corpus | "
    "megafish audit runs/tiny audit.probes=letters.jsonl audit.prompt_tokens=50 audit.suffix_tokens=50"
)
def audit(
    model: Annotated[Path, typer.Argument(help="Run directory, or a folder with a Hugging Face model")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the audit, e.g. audit.prompt_tokens=32; of a Hugging Face model also data, eval, goldfish"
        ),
    ] = None,
    step: Step = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Sweep prompt lengths, and offsets where passages have room, draw 16 samples, search with 30 beams",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the audit of a Hugging Face model (default: audit/NAME)")
    ] = None,
) -> None:
    """Measure what a model has memorized: extraction, membership inference, loss on dropped and kept tokens."""
    from megafish.audit.audit import audit_run

    result = audit_run(model, step=step, overrides=overrides or [], output=output, full=full)
    if is_first():
        print(f"next: megafish report {result.folder.parent.parent}")


evaluate_cli.add_to(app)
duplicates_cli.add_to(app)
decode_cli.add_to(app)


@app.command(epilog="Example: megafish report runs/plain runs/goldfish --output comparison")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html and its PNGs (default: the run, or ./report)")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Show the audit of this step (default: of each run the latest step)", min=0)
    ] = None,
) -> None:
    """Write a page with plots for one run, or for several side by side."""
    from megafish.audit.report import report as write_report

    page = write_report(runs, output, step=step)
    print(f"next: open {page} in a browser")


@app.command(epilog="Example: megafish demo --output runs/demo --seed 1")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for corpus, runs and report")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of weights, data order, canaries and mask")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Start over when the folder has a demo already")] = False,
) -> None:
    """Train the same small model twice, plainly and with the goldfish loss, and see which one recites its data."""
    from megafish.demo import run_demo

    run_demo(output, seed=seed, overwrite=overwrite)


@app.command(epilog="Example: megafish schema > megafish.schema.json")
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from megafish.config import json_schema

    print(json_schema())


if __name__ == "__main__":
    main()
