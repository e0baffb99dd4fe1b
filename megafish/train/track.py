"""What a run reports: metrics.jsonl always, a live line on the terminal, TensorBoard and wandb where asked for.

The only file that imports wandb.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from megafish.config import Config, dump_config
from megafish.errors import InputError
from megafish.run import RunDir, write_atomic

# Seconds between progress lines where there is no terminal.
PLAIN_INTERVAL = 10.0

# Groups of the wandb and TensorBoard pages.
_GROUPS = {
    "train": "train",
    "valid": "valid",
    "dropped": "goldfish",
    "canaries": "memorization",
    "checkpoint": "checkpoint",
    "skipped": "guard",
    "unlearned": "unlearning",
}
# Of a step's numbers, those that are not about what it has learned.
_PLACES = {
    "lr": "optimizer",
    "forget_loss": "unlearning",
    "retain_loss": "unlearning",
    "grad_norm": "optimizer",
    "kept_tokens": "goldfish",
    "dropped_tokens": "goldfish",
    "drop_rate": "goldfish",
    "corrected_tokens": "goldfish",
    "tokens": "budget",
    "supervised_tokens": "budget",
    "flops": "budget",
    "progress": "budget",
    "epoch": "budget",
    "patch_size": "budget",
    "tokens_per_s": "speed",
    "model_flops_per_s": "speed",
    "mfu": "speed",
    "memory_bytes": "speed",
}


class Recited(NamedTuple):
    """A line of the table of an audit."""

    copies: int
    exact: bool
    tokens: int
    """Tokens reproduced before the first difference."""
    prompt: str
    continuation: str
    truth: str


class Tracker:
    """Receives one record at a time and hands it to every place that wants it. Main process only."""

    def __init__(self, run: RunDir, config: Config, *, resume_step: int, console: Console):
        self.run = run
        self.config = config
        self.console = console
        self.tensorboard: Any = None
        self.wandb: Any = None
        self._open(resume_step)
        if config.track.wandb.enabled:
            self.wandb = _start_wandb(run, config)
        self._bar = _Display(console)

    def _open(self, step: int) -> None:
        """The files, to be continued after `step`."""
        _forget_after(self.run, step)
        self._file = open(self.run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115  # closed in _close
        if self.config.track.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=step + 1)
            lines = dump_config(self.config).splitlines()
            self.tensorboard.add_text("config", "\n".join(f"    {line}" for line in lines), step)

    def _close(self) -> None:
        self._file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def go_back(self, step: int) -> None:
        """Forget what came after `step`: the run does these steps again."""
        self._close()
        self._open(step)

    def __enter__(self) -> Tracker:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        self._close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if error is None else 1)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record: {"kind": ..., "step": ..., then numbers}."""
        # One write a line: a kill leaves whole lines and at most one cut off, which readers skip.
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {
            f"{_page(record['kind'], key)}/{key}": value
            for key, value in record.items()
            if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, record["step"])
        if self.wandb is not None:
            self.wandb.log({**numbers, "step": record["step"]})

    def show(self, progress: float, record: dict[str, Any]) -> None:
        """Move the live line on: `progress` is the share of the budget that is spent."""
        self._bar.update(progress, record)

    def note(self, text: str) -> None:
        """A line of its own above the live one."""
        self._bar.print(text)


def _page(kind: str, key: str) -> str:
    """The group under which wandb and TensorBoard show a number."""
    if kind == "train":
        return "speed" if key.startswith("seconds_") else _PLACES.get(key, "train")
    return _GROUPS[kind]


def publish_audit(run: RunDir, config: Config, step: int, numbers: dict[str, float], rows: list[Recited]) -> None:
    """Show an audit on the run's own wandb and TensorBoard pages: its numbers, and a table of what was recited."""
    numbers = {f"memorization/{key}": value for key, value in numbers.items()}
    if config.track.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run.path / "tensorboard")) as writer:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.add_text("memorization/recited", _as_markdown(rows), step)
    if config.track.wandb.enabled:
        import wandb

        handle = _start_wandb(run, config)
        cells = [list(row) for row in rows]
        handle.log({**numbers, "memorization/recited": wandb.Table(list(Recited._fields), cells), "step": step})
        handle.finish()


def _as_markdown(rows: list[Recited]) -> str:
    """A table; what would end a cell or a line is escaped."""
    lines = [" | ".join(Recited._fields), " | ".join(["---"] * len(Recited._fields))]
    for row in rows:
        cells = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "⏎") for cell in row)
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def _forget_after(run: RunDir, step: int) -> None:
    """Cut records of steps that a resumed run is about to do again, and a line that a kill cut off."""
    if not run.metrics_file.is_file():
        return
    kept = []
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    write_atomic(run.metrics_file, "".join(kept))


def _start_wandb(run: RunDir, config: Config) -> Any:
    """A wandb run whose id is kept in the run directory, so that a resume continues it."""
    try:
        import wandb
    except ImportError:
        raise InputError(
            "track.wandb.enabled is set, but wandb is not installed: pip install 'megafish[wandb]'"
        ) from None
    settings = config.track.wandb
    id_file = run.path / "wandb_id"
    if not id_file.is_file():
        # An agent of a wandb sweep, or the user, has chosen one already.
        write_atomic(id_file, (os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:16]) + "\n")
    handle = wandb.init(
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        mode=settings.mode,
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=settings.tags,
        name=config.name,
        dir=str(run.path),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off"),
    )
    handle.define_metric("step")
    handle.define_metric("*", step_metric="step")
    return handle


class _Rate(ProgressColumn):
    """Tokens per second of the last reported step."""

    def render(self, task: Task) -> Text:
        rate = task.fields["rate"]
        return Text("" if rate is None else f"{rate:,.0f} tok/s", style="cyan")


class _Display:
    """A rich bar on a terminal, otherwise a plain line now and then."""

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[numbers]}"),
                _Rate(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.progress.add_task("train", total=1.0, numbers="", rate=None)
        self.started = time.monotonic()
        self.first_progress: float | None = None
        self.last_line = -math.inf

    def __enter__(self) -> None:
        if self.progress is not None:
            self.progress.start()

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def update(self, progress: float, record: dict[str, Any]) -> None:
        numbers = f"step {record['step']} loss {record['loss']:.3f}"
        if record["drop_rate"] > 0:
            numbers += f" drop {record['drop_rate']:.1%}"
        if self.progress is not None:
            self.progress.update(self.task, completed=progress, numbers=numbers, rate=record["tokens_per_s"])
            return
        now = time.monotonic()
        if self.first_progress is None:
            self.first_progress, self.started = progress, now
        if now - self.last_line < PLAIN_INTERVAL and progress < 1:
            return
        self.last_line = now
        done = progress - self.first_progress
        left = f", {(now - self.started) / done * (1 - progress):.0f} s left" if done > 0 else ""
        self.console.print(
            f"{progress:4.0%}  {numbers}  lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tokens/s{left}",
            highlight=False,
        )

    def print(self, text: str) -> None:
        # A line stays one line in a log.
        self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)
