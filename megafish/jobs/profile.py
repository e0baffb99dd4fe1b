"""A cluster profile: what a Slurm job asks for, and what its script has to set up.

configs/slurm/*.yaml are profiles; `slurm.key=value` on the command line lies on top.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from megafish.config import Section, config_folder
from megafish.config_errors import allowed, explain, field_help
from megafish.config_yaml import overlay, parse_overrides, read_tree
from megafish.errors import InputError

_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED")
# Fields that become directives of the script as they are.
_DIRECTIVES = ("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "memory", "gpu_type")


class Container(Section):
    """What the processes run in."""

    runtime: Literal["none", "apptainer", "pyxis"] = "none"
    """none; `apptainer exec --nv` around each process; srun's --container-image (NVIDIA's Pyxis and Enroot)."""
    image: str | None = None
    """Image: an .sif file, or what the runtime takes (docker://..., nvcr.io#...)."""
    mounts: list[str] = Field(default_factory=list)
    """Folders to mount as well, HOST:CONTAINER. The working directory and the run directory always are."""
    options: list[str] = Field(default_factory=list)
    """More options of `apptainer exec`, or of srun."""

    @model_validator(mode="after")
    def _has_an_image(self) -> Container:
        if (self.image is None) != (self.runtime == "none"):
            raise ValueError("runtime and image belong together: set both, or neither")
        return self


class Profile(Section):
    """A Slurm job. null leaves the choice to the cluster."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of the job."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs of each node, one process each. 0: a job without GPUs."""
    gpu_type: str | None = None
    """Type to ask for, as the cluster names it: h100."""
    gpus_by: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Option that asks for them: --gpus-per-node=h100:8, or the older --gres=gpu:h100:8."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """Processes of each node. null: one for each GPU (or 1 without)."""
    cpus_per_process: int | None = Field(default=None, ge=1)
    """Cores of each process."""
    memory: str | None = None
    """Main memory of each node: 500G; 0 for all of it."""
    exclusive: bool = False
    """Whether to share the nodes with no other job."""
    partition: str | None = None
    """Partition, or several: a,b."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit: minutes, H:MM:SS or D-HH:MM:SS."""
    constraint: str | None = None
    """Features that the nodes must have."""
    reservation: str | None = None
    """Reservation."""
    nodelist: str | None = None
    """Nodes to use: n[1-4]."""
    exclude: str | None = None
    """Nodes to leave out."""
    signal: Literal["USR1", "USR2", "TERM"] | None = "USR1"
    """What the processes get ahead of the time limit: they save, and the job goes back to the queue. null: nothing."""
    signal_seconds: int = Field(default=180, ge=1, le=65535)
    """How long ahead: a checkpoint has to fit in."""
    requeue: bool = True
    """Back to the queue after the time limit, a preemption, a failed node or a crash. The run continues there."""
    max_tries: int = Field(default=3, ge=1)
    """Starts without a new checkpoint in between, after which the job stops for good."""
    wait_seconds: int = Field(default=60, ge=1)
    """Once one process has ended: how long srun waits for the others."""
    master_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port at which the processes meet, on the first node. null: one made of the job's number."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules to load, after `module purge`."""
    setup: str | None = None
    """Lines of bash before the processes start: conda activate, source .venv/bin/activate, ulimit."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables to export: NCCL_DEBUG, WANDB_MODE."""
    container: Container = Field(default_factory=Container)
    """What the processes run in."""
    python: str | None = None
    """Interpreter of the processes. null: the one that submits, or `python` in a container."""
    sbatch_options: list[str] = Field(default_factory=list)
    """More options of sbatch, as they stand on its command line: --licenses=scratch."""
    srun_options: list[str] = Field(default_factory=list)
    """More options of srun: --cpu-bind=cores."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not _TIME.fullmatch(value):
            raise ValueError("must be minutes, H:MM:SS or D-HH:MM:SS")
        return value

    @field_validator(*_DIRECTIVES)
    @classmethod
    def _is_one_word(cls, value: str | None) -> str | None:
        # A directive ends at a blank: what follows would be another option.
        if value is not None and not re.fullmatch(r"\S+", value):
            raise ValueError("must be one word")
        return value

    @field_validator("environment")
    @classmethod
    def _are_names(cls, variables: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in variables if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"environment: {wrong[0]!r} is no name of a variable")
        return variables

    @model_validator(mode="after")
    def _leaves_time_before_the_signal(self) -> Profile:
        if self.time is not None and self.signal is not None and 60 * minutes(self.time) <= self.signal_seconds:
            raise ValueError(
                f"time={self.time} with signal_seconds={self.signal_seconds}: the signal would come at the start: "
                "raise the first, or lower the second"
            )
        return self

    @property
    def tasks(self) -> int:
        """Processes of each node."""
        return self.processes_per_node or max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks

    @property
    def size(self) -> str:
        """Nodes and processes in words."""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} x {self.tasks} {'process' if self.tasks == 1 else 'processes'}"


def minutes(time: str) -> float:
    """A time limit in Slurm's form: M, M:SS, H:MM:SS, D-H, D-HH:MM, D-HH:MM:SS."""
    if time == "UNLIMITED":
        return float("inf")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minute, second = (*parts, 0, 0)[:3]
        return 1440 * int(days) + 60 * hours + minute + second / 60
    if len(parts) == 3:
        return 60 * parts[0] + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)


def profile_names() -> list[str]:
    """Profiles that ship with megafish."""
    return sorted(path.stem for path in (config_folder() / "slurm").glob("*.yaml"))


def load_profile(source: str | None, overrides: list[str]) -> Profile:
    """A profile by name or file, with `slurm.key=value` settings on top; without a name what Slurm would do by itself.

    InputError, one line with all faults.
    """
    tree = read_tree(_profile_file(source)) if source is not None else {}
    given = parse_overrides(overrides, frozenset(key for key, field in field_help(_Words).items() if _is_text(field)))
    try:
        return Profile.model_validate(overlay(tree, given.get("slurm", {})))
    except ValidationError as error:
        raise InputError(f"{source or 'slurm'}: {explain(error, Profile)}") from None


def _profile_file(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    names = profile_names()
    if source not in names:
        near = difflib.get_close_matches(source, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"no profile {source!r}{hint}: give a YAML file that exists, or one of {', '.join(names)}")
    return config_folder() / "slurm" / f"{source}.yaml"


class _Words(BaseModel):
    """The command line's view of a profile."""

    slurm: Profile


def _is_text(field: FieldInfo) -> bool:
    return allowed(field.annotation).startswith("text")
