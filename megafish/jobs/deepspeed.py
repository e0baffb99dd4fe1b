"""DeepSpeed's own launcher, with megafish's words for its options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megafish.errors import InputError
from megafish.jobs.prepare import Prepared

# Its log names are TIME_rankN.log, in this folder below the run's logs/.
RANK_LOGS = "deepspeed"


@dataclass(frozen=True)
class DeepSpeedOptions:
    """What `deepspeed --help` explains. None leaves the choice to the launcher."""

    hostfile: Path | None = None
    include: str | None = None
    exclude: str | None = None
    nodes: int | None = None
    processes_per_node: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str | None = None
    """pdsh (its default), openmpi, mpich, impi, mvapich or slurm: how it reaches the other nodes."""
    node_rank: int | None = None
    """Number of this node, where every node starts its own processes (no ssh)."""
    rank_logs: bool = False


def deepspeed_command(prepared: Prepared, options: DeepSpeedOptions) -> list[str]:
    """The command line that starts a run. InputError for options that cannot go together."""
    hosts = _hosts(options.hostfile) if options.hostfile is not None else []
    if options.node_rank is not None:
        if options.hostfile is None or options.master_addr is None:
            raise InputError(
                "--node-rank: every node starts its own processes then, and must know the others: give --hostfile and "
                "--master-addr (the first node's name) too, the same on every node"
            )
        if options.node_rank >= len(hosts):
            raise InputError(f"--node-rank {options.node_rank}: {options.hostfile} has nodes 0 to {len(hosts) - 1}")
    if (options.include or options.exclude) and (options.nodes or options.processes_per_node):
        raise InputError("--include and --exclude choose the processes: leave out --nodes and --processes-per-node")
    if options.nodes is not None and options.nodes > max(len(hosts), 1):
        there = f"{options.hostfile} has {len(hosts)}" if hosts else "without --hostfile there is this machine alone"
        raise InputError(f"--nodes {options.nodes}: {there}")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--module"]
    for name, value in (
        ("hostfile", options.hostfile),
        ("include", options.include),
        ("exclude", options.exclude),
        ("num_nodes", options.nodes),
        ("num_gpus", options.processes_per_node),
        ("master_addr", options.master_addr),
        ("master_port", options.master_port),
        ("launcher", options.launcher),
        ("node_rank", options.node_rank),
        ("enable_each_rank_log", prepared.run.logs.absolute() / RANK_LOGS if options.rank_logs else None),
    ):
        if value is not None:
            command.append(f"--{name}={value}")
    if options.node_rank is not None:
        command.append("--no_ssh")
    return [*command, "megafish", "train", str(prepared.run.path.absolute()), *prepared.overrides]


def deepspeed_environment(prepared: Prepared) -> dict[str, str]:
    """Variables that the launcher needs besides those that are there: it has to count the right kind of device."""
    device = prepared.config.train.device
    return {} if device == "auto" else {"DS_ACCELERATOR": device}


def _hosts(hostfile: Path) -> list[str]:
    """Names in a hostfile (`name slots=8` lines). InputError where there are none."""
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{hostfile}: cannot be read: {error.strerror}") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdigit():
            raise InputError(f"{hostfile}, line {number}: {line.strip()!r}: expected `name slots=8`")
        hosts.append(words[0])
    if not hosts:
        raise InputError(f"{hostfile}: names no host: one line a node, `name slots=8`")
    return hosts
