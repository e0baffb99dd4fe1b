"""A plan in words and tables, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from megafish.config import Config
from megafish.model.flops import parameter_count
from megafish.plan.calibration import EFFICIENCY, LEFT_OUT, RUNS, Row, errors
from megafish.plan.hardware import GIB, Cluster
from megafish.plan.layout import Layout
from megafish.plan.memory import MemoryPlan, kept_share
from megafish.plan.search import Candidate, evaluate, overrides, reasons, search
from megafish.plan.throughput import StepTime

DAY = 86400.0


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that line up: the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def budget_tokens(config: Config) -> float:
    """Input tokens of the whole run; supervised tokens are counted up by what goldfish.k leaves."""
    train = config.train
    if train.steps is not None:
        return float(train.steps * train.global_batch_size * config.data.sequence_length)
    if train.tokens is not None:
        return float(train.tokens)
    assert train.supervised_tokens is not None
    return train.supervised_tokens / kept_share(config)


def plan_report(
    config: Config, vocab_size: int, layout: Layout, cluster: Cluster, *, price: float | None = None, best: int = 5
) -> str:
    """The configuration's own layout in full, and the best layouts that a search finds. `price`: of a GPU and hour."""
    own = evaluate(config, vocab_size, layout, cluster, EFFICIENCY)
    candidates = search(config, vocab_size, cluster, EFFICIENCY)
    fp32 = "" if layout.bf16 else "Times and MFU are those of bf16: train.precision=fp32 takes several times as long."
    parts = [
        _heading(config, vocab_size, cluster),
        f"As configured: {_name(layout)}",
        memory_table(own.memory, cluster),
        time_table(own.step),
        traffic_table(own.step, cluster),
        _run_line(config, own.step, cluster, price),
        fp32,
        _verdict(own),
        _search_section(config, candidates, cluster, best),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(config: Config, vocab_size: int, cluster: Cluster) -> str:
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    network = "" if cluster.nodes == 1 else f", {cluster.network * 8 / 1e9:.0f} Gb/s a GPU between nodes"
    return (
        f"{config.name}: {parameter_count(config.model, vocab_size) / 1e9:.3f}B parameters, vocabulary {vocab_size:,}, "
        f"{config.train.global_batch_size:,} sequences of {config.data.sequence_length:,} tokens a step\n"
        f"{cluster.gpus} x {cluster.gpu.name} in {nodes}{network}"
    )


def _name(layout: Layout) -> str:
    return f"{layout.name}, {layout.micro_batches} x {layout.micro_batch} sequences a process"


def memory_table(memory: MemoryPlan, cluster: Cluster) -> str:
    """Parts of the peak."""
    rows = [[name, f"{size / GIB:.2f}"] for name, size in memory.parts.items() if size >= 0.005 * GIB]
    rows.append(["peak", f"{memory.total / GIB:.2f}"])
    rows.append(["of the GPU", f"{cluster.gpu.memory / GIB:.2f}"])
    if memory.host:
        rows.append(["in main memory", f"{memory.host / GIB:.2f}"])
    return table([f"memory of a process (at the {memory.moment})", "GiB"], rows)


def time_table(step: StepTime) -> str:
    """Parts of a step."""
    names = {
        "products": "matrix products",
        "attention": "attention",
        "elementwise": "element-wise",
        "optimizer": "gradients and optimizer",
        "exchange": "communication not hidden",
        "waiting": "waiting for other nodes",
    }
    rows = [[words, f"{getattr(step, name):.3f}"] for name, words in names.items() if getattr(step, name) >= 5e-4]
    rows.append(["step", f"{step.seconds:.3f}"])
    return table(["time of a step", "s"], rows)


def traffic_table(step: StepTime, cluster: Cluster) -> str:
    """What a process sends in a step."""
    rows = [
        [
            traffic.name,
            f"{traffic.sent / GIB:.2f}",
            str(traffic.members),
            f"{traffic.seconds(cluster, EFFICIENCY.links):.3f}",
            "behind computation" if traffic.overlaps else "alone",
        ]
        for traffic in step.traffic
    ]
    return table(["sent by a process in a step", "GiB", "processes", "s", "when"], rows) if rows else ""


def _run_line(config: Config, step: StepTime, cluster: Cluster, price: float | None) -> str:
    tokens = budget_tokens(config)
    seconds = tokens / step.tokens * step.seconds
    cost = "" if price is None else f", cost {_gpu_hours(seconds, cluster) * price:,.0f}"
    return (
        f"{step.tokens / step.seconds:,.0f} tokens/s ({step.tokens / step.seconds / cluster.gpus:,.0f} a GPU), "
        f"MFU {100 * step.mfu(cluster):.1f} %; {tokens:.3g} tokens take {seconds / DAY:.1f} days, "
        f"{_gpu_hours(seconds, cluster):,.0f} GPU hours{cost}"
    )


def _gpu_hours(seconds: float, cluster: Cluster) -> float:
    return seconds / 3600 * cluster.gpus


def _verdict(own: Candidate) -> str:
    return "It fits." if own.fits else f"It does not fit: {own.fault}."


def _search_section(config: Config, candidates: list[Candidate], cluster: Cluster, best: int) -> str:
    if not candidates:
        return (
            f"No layout divides train.global_batch_size={config.train.global_batch_size} over {cluster.gpus} GPUs: "
            "choose a multiple"
        )
    fitting = [candidate for candidate in candidates if candidate.fits]
    shown = fitting[:best]
    ahead = candidates[: candidates.index(fitting[0])] if fitting else candidates
    refused = ahead[: 3 if fitting else best]
    header = ["layout", "micro-batch", "GiB", "s a step", "tokens/s", "MFU", "days", "fits"]
    rows = [_search_row(config, candidate, cluster) for candidate in [*shown, *refused]]
    lines = [f"Best of {len(candidates):,} layouts:", table(header, rows)]
    lines += [f"- {reason}" for reason in reasons(candidates)]
    if fitting:
        changes = overrides(config, fitting[0].layout)
        lines.append(f"To get the best: {' '.join(changes)}" if changes else "The configuration is the best one.")
    return "\n".join(lines)


def _search_row(config: Config, candidate: Candidate, cluster: Cluster) -> list[str]:
    step = candidate.step
    return [
        candidate.layout.name,
        f"{candidate.layout.micro_batches} x {candidate.layout.micro_batch}",
        f"{candidate.memory.total / GIB:.1f}",
        f"{step.seconds:.2f}",
        f"{step.tokens / step.seconds:,.0f}",
        f"{100 * step.mfu(cluster):.1f} %",
        f"{budget_tokens(config) / step.tokens * step.seconds / DAY:.1f}",
        "yes" if candidate.fits else "no",
    ]


def calibration_report() -> str:
    """The model of time beside published runs."""
    rows = errors()
    header = ["published run", "GPUs", "tokens/s a GPU", "predicted", "error", "left out"]
    lines = [
        "Predicted against published throughput. Four numbers are fitted to these runs: "
        f"products reach {EFFICIENCY.ampere:.2f} (A100) and {EFFICIENCY.hopper:.2f} (H100) of the peak, half of that "
        f"where the smallest dimension is {EFFICIENCY.half:.0f}, and each doubling of the nodes costs "
        f"{100 * EFFICIENCY.scale:.1f} %. The last column is the error where the run is left out of the fit.",
        table(header, [_calibration_row(row) for row in rows]),
        f"median error {100 * median(abs(row.error) for row in rows):.1f} %, "
        f"left out {100 * median(abs(row.left_out_error) for row in rows):.1f} %, "
        f"largest {100 * max(abs(row.error) for row in rows):.1f} % ({len(RUNS)} runs)",
        "Not predicted:",
        *(f"- {name}: {why}" for name, why in LEFT_OUT),
        "Sources: " + "; ".join(dict.fromkeys(run.source for run in RUNS)),
    ]
    return "\n".join(lines)


def _calibration_row(row: Row) -> list[str]:
    run = row.run
    name = f"{run.name}, {run.length:,} tokens" + (", ckpt" if run.checkpointing else "")
    return [
        name,
        f"{run.gpus} x {run.gpu}",
        f"{run.tokens_per_s:,.0f}",
        f"{row.predicted:,.0f}",
        f"{100 * row.error:+.1f} %",
        f"{100 * row.left_out_error:+.1f} %",
    ]
