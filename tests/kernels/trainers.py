"""Worker of test_integration: a step of a small model in other people's wrappers, on the processes of a launcher.

    torchrun --nproc-per-node 2 trainers.py FILE

writes to FILE what became of every case: the loss of the global batch and the gradients by name, or the errors' texts.
Every process takes its half of the rows. What is summed over the processes must be what one process with torch's own
cross-entropy gets (`reference`).
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from megafish_kernels import LinearCrossEntropyHead, linear_cross_entropy

VOCAB, WIDTH, ROWS, LENGTH = 50, 12, 4, 9  # numbers that two processes cannot share evenly, but for the rows


class Model(nn.Module):
    """An embedding, a layer, the head; forward gives what the head gives."""

    def __init__(self, tied: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = LinearCrossEntropyHead(WIDTH, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        hidden = self.body(self.embedding(tokens))
        if self.checkpointed:
            return checkpoint(self.head, hidden, targets, use_reentrant=False, **options)
        return self.head(hidden, targets, **options)


class Batch(NamedTuple):
    tokens: Tensor
    targets: Tensor

    def rows(self, first: int, last: int) -> Batch:
        return Batch(self.tokens[first:last], self.targets[first:last])

    @property
    def kept(self) -> Tensor:
        return (self.targets != -100).sum()


def global_batch(idle: bool = False) -> Batch:
    """Most tokens of the first rows are left out, few of the last ones; idle: all of the last half."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    drop = torch.rand(ROWS, LENGTH, generator=generator) < torch.tensor([[0.9], [0.6], [0.3], [0.0]])
    if idle:
        drop[ROWS // 2 :] = True
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].masked_fill(drop, -100))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters by name, DTensors put together; those of a wrapper without its prefix."""
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad: Any = parameter.grad
        grads[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return grads


def reference(tied: bool = False, idle: bool = False) -> dict[str, Any]:
    """The whole batch in one process, by torch's own loss on all logits."""
    model, batch = Model(tied), global_batch(idle)
    loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


# ------------------------------------------------------------------------------------------ in one of the processes


def own_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """This process's rows, and the kept tokens of the global batch."""
    each, rank = ROWS // dist.get_world_size(), dist.get_rank()
    mine = batch.rows(rank * each, (rank + 1) * each)
    kept = mine.kept
    dist.all_reduce(kept)
    return mine, kept


def summed(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total


def share_of_mean(model: Callable[..., Any], mine: Batch, kept: Tensor, per_token: bool = False) -> Tensor:
    """This process's share of the mean over the kept tokens of the global batch."""
    if per_token:
        return model(mine.tokens, mine.targets, reduction="none").sum() / kept
    return model(mine.tokens, mine.targets, denominator=kept)


def stepped(model: nn.Module, idle: bool = False, per_token: bool = False) -> dict[str, Any]:
    """Loss and gradients of a wrapped model. The wrappers average over the processes, hence the factor."""
    loss = share_of_mean(model, *own_rows(global_batch(idle)), per_token)
    (loss * dist.get_world_size()).backward()
    return {"loss": summed(loss), "gradients": gradients(model)}


def ddp(tied: bool = False, idle: bool = False) -> dict[str, Any]:
    return stepped(DistributedDataParallel(Model(tied)), idle)


def ddp_accumulated() -> dict[str, Any]:
    """A micro-batch for each row, of which only the last is reduced over the processes."""
    model = DistributedDataParallel(Model())
    mine, kept = own_rows(global_batch())
    with model.no_sync():
        first = share_of_mean(model, mine.rows(0, 1), kept)
        (first * dist.get_world_size()).backward()
    last = share_of_mean(model, mine.rows(1, 2), kept)
    (last * dist.get_world_size()).backward()
    return {"loss": summed(first) + summed(last), "gradients": gradients(model)}


def sharded(tied: bool = False, checkpointed: bool = False, policy: MixedPrecisionPolicy | None = None) -> Model:
    """FSDP2, with the head as a unit of its own, given back to its shards after the forward. A tied weight belongs to
    the root: two units cannot both own it."""
    policy = policy or MixedPrecisionPolicy()
    model = Model(tied, checkpointed)
    if not tied:
        fully_shard(model.head, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def fsdp(tied: bool = False, per_token: bool = False, checkpointed: bool = False) -> dict[str, Any]:
    return stepped(sharded(tied, checkpointed), per_token=per_token)


def fsdp_bf16() -> dict[str, Any]:
    """bf16 products, gradients reduced in fp32, fp32 master weights."""
    return stepped(sharded(policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)))


def error_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> str:
    try:
        linear_cross_entropy(hidden, weight, targets)
    except ValueError as error:
        return str(error)
    return "no error"


def fsdp_from_outside() -> dict[str, Any]:
    model, batch = sharded(), global_batch()
    hidden = torch.randn(ROWS, LENGTH, WIDTH)
    return {"error": error_of(hidden, model.head.weight, batch.targets)}


def zero3(tied: bool = False) -> Any:
    """DeepSpeed's engine around the model, with every parameter in parts, however small; no step is taken."""
    # torch 2.13 renames collectives that DeepSpeed still calls by their old names, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed

    # gloo instead of a shared-memory all-reduce that would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Model(tied)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert model.head.weight.shape == (0,), "the weight is not in parts"
    return engine


def zero3_stepped(tied: bool = False, per_token: bool = False) -> dict[str, Any]:
    """Two micro-batches of one row each, reduced at the second."""
    engine = zero3(tied)
    from deepspeed.utils import safe_get_full_grad

    mine, kept = own_rows(global_batch())
    total = torch.zeros(())
    for row in (0, 1):
        engine.set_gradient_accumulation_boundary(row == 1)
        loss = share_of_mean(engine, mine.rows(row, row + 1), kept, per_token)
        engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        total += summed(loss)
    grads = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    return {"loss": total, "gradients": grads}


def zero3_from_outside() -> dict[str, Any]:
    engine, batch = zero3(), global_batch()
    hidden = torch.randn(ROWS, LENGTH, WIDTH)
    return {"error": error_of(hidden, engine.module.head.weight, batch.targets)}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": ddp,
    "ddp, a process without kept tokens": lambda: ddp(idle=True),
    "ddp, tied": lambda: ddp(tied=True),
    "ddp, accumulated": ddp_accumulated,
    "fsdp": fsdp,
    "fsdp, tied": lambda: fsdp(tied=True),
    "fsdp, per token": lambda: fsdp(per_token=True),
    "fsdp, checkpointed": lambda: fsdp(checkpointed=True),
    "fsdp, bf16": fsdp_bf16,
    "fsdp, from outside": fsdp_from_outside,
    "zero3": zero3_stepped,
    "zero3, tied": lambda: zero3_stepped(tied=True),
    "zero3, per token": lambda: zero3_stepped(per_token=True),
    "zero3, from outside": zero3_from_outside,
}

if __name__ == "__main__":
    # All of it on the CPU, also where there is a GPU: FSDP would take that one by itself.
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcome: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        try:
            outcome[name] = case()
        except Exception:
            outcome[name] = {"failed": traceback.format_exc()}
    if dist.get_rank() == 0:
        torch.save(outcome, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's end may abort: see vocab_parallel.py
