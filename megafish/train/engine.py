"""DeepSpeed, and nothing else: processes, the sharded model, one optimizer step, and what the engine stores.

The only file that imports deepspeed. Everything it needs from DeepSpeed is asked for explicitly, because defaults have
changed between releases (gradient clipping, skipping of non-finite steps, process-group time-out).
"""

from __future__ import annotations

import atexit
import io
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megafish.config import Config
from megafish.config_deepspeed import REDUCE_BUCKET
from megafish.errors import InputError
from megafish.launcher import adopt_slurm
from megafish.model.mesh import Mesh, ModelParallelUnit, check_degrees, make_mesh
from megafish.model.parallel import gradient_norm
from megafish.model.transformer import Transformer
from megafish.plan.check import local_processes
from megafish.processes import together
from megafish.train.host import available_memory, keep_freed_memory
from megafish.train.muon import Muon
from megafish.train.optim import build_optimizer
from megafish.train.partition import (
    extrapolate,
    fill_buffers,
    flat_buffers,
    full_shape,
    owned_pieces,
    refresh_weights,
    reset_state,
    scale_gradients,
)
from megafish.train.state import Piece, StateReader, Weights, trained

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: Mesh

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that exist once."""
        return self.rank == 0


def start_processes(device: str, tensor_parallel: int = 1, sequence_parallel: int = 1) -> Processes:
    """Join the process group: torchrun, the deepspeed launcher, srun, or a run of one process.

    `device` is auto, cpu or cuda; the degrees are those of the mesh. Calling it again in the same process
    returns the group that is there. InputError where the degrees do not divide the number of processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "train.device=cuda, but torch sees no GPU: use train.device=cpu, or install a CUDA build of torch"
        )
    _fill_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    check_degrees(world_size, tensor_parallel, sequence_parallel)
    # DeepSpeed probes for an accelerator when it is imported; the choice made here must be the one it makes.
    os.environ["DS_ACCELERATOR"] = device
    place = torch.device("cpu")
    if device == "cpu":
        keep_freed_memory()
    else:
        place = torch.device("cuda", _gpu_of(local_rank))
        torch.cuda.set_device(place)
    timeout = timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", 30)))
    if not dist.is_initialized():
        deepspeed = _deepspeed()
        deepspeed.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timeout,
        )
        # Left when the process ends, however it ends: DeepSpeed keeps groups of its own and cannot join a second time.
        atexit.register(_stop_processes)
    mesh = make_mesh(rank, world_size, tensor_parallel, sequence_parallel, timeout)
    return Processes(rank, local_rank, world_size, place, mesh)


def _gpu_of(local_rank: int) -> int:
    """The GPU of a process on its node; the only one it sees where Slurm gives each task its own."""
    count = torch.cuda.device_count()
    index = 0 if count == 1 and "SLURM_STEP_ID" in os.environ else local_rank
    if index >= count:
        raise InputError(
            f"process {local_rank} of this node finds {count} GPUs: start at most {count} processes a node"
        )
    return index


def _stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(action: Callable[[], T], processes: Processes) -> T:
    """What `action` gives in the main process, in every process; its InputError likewise. Collective.

    For what all must know alike: another node's view of a shared file system may be older.
    """
    found = [together(lambda: action() if processes.is_main else None)]
    dist.broadcast_object_list(found, device=processes.device)
    return cast(T, found[0])


def largest(number: int, processes: Processes) -> int:
    """The largest of the numbers that the processes give. Collective."""
    found = torch.tensor(number, device=processes.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _fill_environment() -> None:
    """Give torch.distributed the variables it reads, from Slurm's or for a run of one process."""
    adopt_slurm()
    env = os.environ
    if "RANK" not in env:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _deepspeed() -> Any:
    """deepspeed, imported on first use and kept quiet: its progress notes would drown the run's own display."""
    # torch 2.13 renames collectives that DeepSpeed still calls by their old names, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce at start-up: half a minute, and a compiler that the
    # user may not have. gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def compiled_operators() -> dict[str, str]:
    """DeepSpeed's optimizers in compiled form, which megafish does not use: name -> built, buildable or not buildable
    on this machine. One of which this cannot be told is left out."""
    _deepspeed()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    found = {}
    for name in ("CPUAdamBuilder", "FusedAdamBuilder"):
        operator = get_accelerator().create_op_builder(name)
        if operator is not None:
            built = installed_ops.get(operator.NAME, False)
            found[operator.NAME] = "built" if built else "buildable" if operator.is_compatible() else "not buildable"
    return found


class Engine:
    """A model in DeepSpeed's hands: `backward` for each micro-batch of a step, then `step`."""

    def __init__(self, config: Config, model: Transformer, processes: Processes):
        """`model`: made inside `building`."""
        self.processes = processes
        self.grad_clip = config.optimizer.grad_clip
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        trained_ones = (parameter for parameter in model.parameters() if parameter.requires_grad)
        optimized = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained_ones)
        together(lambda: _check_offload(config, parameters, optimized, processes))
        optimizer = build_optimizer(model, config.optimizer)
        deepspeed = _deepspeed()
        mpu = _mpu(processes)
        with redirect_stdout(io.StringIO()):  # it prints its memory use
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=_checked_settings(config, processes, mpu, parameters),
                mpu=mpu,
                dist_init_required=False,
            )
        # Without ZeRO and in fp32 DeepSpeed clips but does not report the norm; it is done here instead, once.
        self._clips_here = config.engine.zero_stage == 0 and config.train.precision == "fp32"
        # Else its step takes the norm from here: an object and the name of its function.
        self._combine_norms = deepspeed.runtime.utils.combine_grad_norm_groups
        if hasattr(self.optimizer, "_get_norm_groups"):  # ZeRO 3
            self._norm_source = self.optimizer, "_get_norm_groups"
        elif hasattr(self.optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
            self._norm_source = self.optimizer, "scaled_global_norm"
        else:  # ZeRO 1 with bf16 weights and fp32 gradients
            self._norm_source = deepspeed.runtime.bf16_optimizer, "get_global_norm_of_tensors"
        self._buffers = flat_buffers(self.optimizer)
        if isinstance(optimizer, Muon):
            optimizer.place(self._buffers, self.engine.seq_data_parallel_group, processes.device)
        self._names = {parameter: name for name, parameter in self.module.named_parameters()}
        self.weights = Weights(self.shapes, trained)
        """What a checkpoint's weights are made of: the trained parameters, until somebody sets it otherwise."""

    @property
    def module(self) -> nn.Module:
        """The model. Call the engine, not this, where weights may be sharded."""
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        self.engine.train(mode)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Gradients of one micro-batch.

        `loss` is this process's share of the global mean: sum over its kept tokens / kept tokens of the global batch.
        DeepSpeed divides summed gradients by the number of processes that it sums over, which is undone here, and must
        not divide by the number of micro-batches.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.processes.mesh.replicas.size, scale_wrt_gas=False)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of the step, after its last `backward`: for a mean whose denominator is known then."""
        scale_gradients(self.optimizer, factor)

    def reset_optimizer(self) -> None:
        """Forget the moments and the count of steps: the next step is the optimizer's first."""
        reset_state(self._buffers)

    def step(self, learning_rate: float, accept: Callable[[float], bool] = math.isfinite) -> tuple[float, bool]:
        """Clip, update the weights and clear the gradients.

        `accept` is shown the global gradient norm before clipping and must answer the same in every process. Where it
        refuses, the gradients are cleared and nothing else changes: weights, moments and the optimizer's count of steps
        stay as they were, bit for bit. Returns the norm and whether the step was taken.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._clips_here:
            limit = self.grad_clip if self.grad_clip is not None else float("inf")
            parameters = list(self.engine.module.parameters())
            norm_here = gradient_norm(parameters, self.processes.mesh.tensor)
            accepted = accept(float(norm_here))
            if accepted:
                nn.utils.clip_grads_with_norm_(parameters, limit, norm_here)
            else:
                self.engine.zero_grad()  # the optimizer passes over parameters without a gradient
            self.engine.step()
            return float(norm_here), accepted
        norm = math.inf  # where DeepSpeed finds the gradients out of range before it comes to their norm
        place, name = self._norm_source
        norm_of = getattr(place, name)

        def judged(*args: Any, **kwargs: Any) -> Any:
            nonlocal norm
            found = norm_of(*args, **kwargs)
            # ZeRO 3 gives the norms of its groups of parameters, all others the norm.
            total = self._combine_norms(found) if isinstance(found, list) else found
            norm = float(total) if total >= 0 else math.inf  # -1 stands for one that is not finite
            if accept(norm):
                return found
            # DeepSpeed discards a step by itself when its norm is not finite, as with fp16 after an overflow.
            refused = torch.full_like(total, math.inf)
            return [refused] if isinstance(found, list) else refused

        setattr(place, name, judged)
        try:
            self.engine.step()
        finally:
            setattr(place, name, norm_of)
        if self.optimizer.overflow and hasattr(self.optimizer, "scaled_global_norm"):
            # With offloading DeepSpeed 0.19 leaves the discarded gradient here at ZeRO 1 and 2 (bf16), and would add
            # that of the next step to it: a spike would be taken after all, and a NaN would never go away.
            self.optimizer.averaged_gradients.update(dict.fromkeys(self.optimizer.averaged_gradients))
        return norm, not self.optimizer.overflow

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer whose state a checkpoint holds."""
        return type(self.engine.basic_optimizer).__name__

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter that is trained, whatever of it is held here."""
        return {name: full_shape(parameter) for parameter, name in self._names.items() if parameter.requires_grad}

    def pieces(self) -> list[Piece]:
        """Weights and optimizer state that this process is to store, as views of its memory."""
        mesh = self.processes.mesh
        return owned_pieces(self._buffers, self._names, mesh.tensor.rank, (mesh.replicas.rank, mesh.replicas.size))

    def extrapolate(self, start: Callable[[str], torch.Tensor], factor: float) -> None:
        """Replace the weights w by start - factor * (w - start). start: the full tensor of a name. Collective."""
        together(lambda: extrapolate(self._buffers, self._names, start, factor))
        refresh_weights(self.optimizer)

    def load(self, folder: Path) -> None:
        """Read weights and optimizer state of a checkpoint, written by any number of processes at any ZeRO stage.

        Collective. Raises the same InputError in all processes for what does not fit.
        """

        def read() -> None:
            reader = StateReader(folder)
            reader.check(self.shapes)
            fill_buffers(self._buffers, self._names, reader)

        together(read)
        refresh_weights(self.optimizer)


@contextmanager
def building(config: Config, processes: Processes) -> Iterator[None]:
    """Parameters made inside take their final form as soon as a module gets them: precision, device, and under ZeRO-3
    this process's share.

    So no process ever holds more of a ZeRO-3 model than its share and one whole parameter. The values are those of a
    model that is made whole, since each parameter depends on the seed and its name alone.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    partition = _partitioner(config, processes) if config.engine.zero_stage == 3 else None

    def finish(_module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        if hasattr(parameter, "ds_id"):
            return  # tied: registered a second time
        parameter.data = parameter.data.to(processes.device, dtype)
        if partition is not None:
            partition(parameter)

    hook = register_module_parameter_registration_hook(finish)
    try:
        yield
    finally:
        hook.remove()


def _partitioner(config: Config, processes: Processes) -> Callable[[nn.Parameter], None]:
    """Keeps of a parameter what ZeRO-3 gives this process. Collective, also what it returns."""
    deepspeed, mpu = _deepspeed(), _mpu(processes)
    with redirect_stdout(io.StringIO()):
        # Not used as a context: that would also round every tensor made inside, the rotary table's too. The empty
        # module is for the linear function that ZeRO-3 needs, one that does not keep gathered weights alive; without
        # a module it would not be put in place.
        init = deepspeed.zero.Init(
            module=nn.Module(),
            data_parallel_group=None if mpu is None else mpu.get_data_parallel_group(),
            config_dict_or_path=_checked_settings(config, processes, mpu),
            mpu=mpu,
        )
    return lambda parameter: init._convert_to_zero_parameters([parameter])


def _mpu(processes: Processes) -> ModelParallelUnit | None:
    """The mesh as DeepSpeed wants it; None where it makes up its own from all processes."""
    mpu = ModelParallelUnit(processes.mesh) if processes.mesh.tensor.size > 1 else None
    # DeepSpeed would go on with the one of an engine made before in this process.
    _deepspeed().utils.groups.mpu = mpu
    return mpu


def _check_offload(config: Config, parameters: int, optimized: int, processes: Processes) -> None:
    """Refuse to offload what the node's memory cannot hold. Counted is what is sure to be there, nothing else.

    parameters: of the model, or of this process's tensor-parallel part. optimized: those of them that are trained.
    """
    engine, wanted = config.engine, 0
    if engine.offload_optimizer == "cpu":
        # fp32 weights and gradients, and the moments: two, of which Muon keeps one for its matrices.
        wanted += optimized * (4 + 4 + (8 if config.optimizer.name == "adamw" else 4))
    if engine.offload_parameters == "cpu":
        wanted += parameters * (2 if config.train.precision == "bf16" else 4)
    on_node = local_processes(processes.world_size)
    needed = wanted * on_node // processes.mesh.replicas.size
    free = available_memory() if wanted else 0
    if needed > free:
        raise InputError(
            f"engine.offload_optimizer={engine.offload_optimizer}, engine.offload_parameters="
            f"{engine.offload_parameters}: {needed / 1e9:.1f} GB of this node's memory are needed, {free / 1e9:.1f} GB "
            "are free: use more nodes, a smaller model, or none"
        )


def _checked_settings(
    config: Config, processes: Processes, mpu: ModelParallelUnit | None, parameters: int | None = None
) -> dict[str, Any]:
    """`deepspeed_config`, found good by DeepSpeed itself; InputError names what it refuses in `engine.deepspeed`."""
    replicas = processes.mesh.replicas.size
    settings = deepspeed_config(config, replicas, processes.device.type, parameters)
    zero = settings["zero_optimization"]
    if processes.device.type == "cpu":
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
            if zero.get(key):
                raise InputError(f"engine.deepspeed.zero_optimization.{key}=true: DeepSpeed's quantizer needs a GPU")
    share = zero.get("zero_hpz_partition_size", 1)
    if isinstance(share, int) and (share < 1 or replicas % share):
        raise InputError(
            f"engine.deepspeed.zero_optimization.zero_hpz_partition_size={share} does not divide the "
            f"{replicas} data-parallel processes: take the GPUs of a node"
        )
    check_deepspeed_keys(config, settings, mpu)
    return settings


def check_deepspeed_keys(config: Config, settings: dict[str, Any], mpu: ModelParallelUnit | None = None) -> None:
    """InputError with what DeepSpeed itself refuses of `settings`, if the user gave keys of its own. Without a process
    group DeepSpeed takes itself for the only process."""
    if not config.engine.deepspeed:
        return
    read, deepspeed = _ReadKeys(settings), _deepspeed()
    refusals = ValueError, AssertionError, KeyError, TypeError, deepspeed.runtime.config.DeepSpeedConfigError
    try:
        with redirect_stdout(io.StringIO()):
            deepspeed.DeepSpeedConfig(read, mpu)
    except refusals as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise InputError(f"engine.deepspeed: refused by DeepSpeed: {reason[:300]}") from None
    # Inside its sections DeepSpeed refuses what it does not know; a whole section it passes over.
    if unknown := sorted(set(config.engine.deepspeed) - read.asked):
        raise InputError(f"engine.deepspeed: DeepSpeed has no key {', '.join(unknown)}: remove it, or mend its name")


class _ReadKeys(dict[str, Any]):
    """DeepSpeed's settings, which remember for which keys they were asked (copies remember with the original)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def deepspeed_config(
    config: Config, world_size: int, device: str = "cpu", parameters: int | None = None
) -> dict[str, Any]:
    """DeepSpeed's JSON for a run: our own settings, with `engine.deepspeed` merged on top.

    world_size: processes with the same weights, data and sequence parallelism together. DeepSpeed takes each for a
    data-parallel one, and so a part of a sequence for a sample. With the number of parameters the buckets are no larger
    than the model.
    """
    train = config.train
    bf16 = train.precision == "bf16"
    stage = config.engine.zero_stage
    parts = config.engine.sequence_parallel
    made: dict[str, Any] = {
        "train_batch_size": train.global_batch_size * parts,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size * parts // (train.micro_batch_size * world_size),
        # 0 means none; said always, because DeepSpeed's default became 1.0.
        "gradient_clipping": config.optimizer.grad_clip or 0.0,
        "steps_per_print": 10**9,
        # A step with a gradient that is not finite leaves the weights alone, as one does that the guard refuses.
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        "zero_optimization": _zero_settings(config, device, parameters),
        # Offloaded states are stepped by torch's own fused kernel for CPUs: DeepSpeed's is compiled at run time.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": config.optimizer.name == "muon",
    }
    if stage == 0 and not bf16:
        made["gradient_clipping"] = 0.0
    if bf16:
        # DeepSpeed would accumulate and send gradients in bf16.
        made["data_types"] = {"grad_accum_dtype": "fp32"}
        made["communication_data_type"] = "fp32"
    return _merge(made, config.engine.deepspeed)


def _zero_settings(config: Config, device: str, parameters: int | None) -> dict[str, Any]:
    """The section zero_optimization."""
    engine = config.engine
    made: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage and parameters is not None:
        made["reduce_bucket_size"] = min(parameters, REDUCE_BUCKET)
    for name, place in (("offload_optimizer", engine.offload_optimizer), ("offload_param", engine.offload_parameters)):
        if place != "none":
            made[name] = {"device": place, "pin_memory": device == "cuda"}
    return made


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
