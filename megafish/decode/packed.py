"""The matrices of a model that only decodes, as oneDNN wants them on a CPU.

A step of decoding multiplies one row a prompt by each matrix: 32 rows, say, by 1408 x 256. For so few rows MKL, which
torch calls for fp32, takes two to three times as long as oneDNN with a matrix that was laid out in blocks once and for
all; in bf16, where torch calls oneDNN with the plain matrix, it takes 1.5 to 1.9 times (benchmarks/audit.py; two cores
of an AMD EPYC with AVX-512). torch's compiler does the same to the weights of frozen models, with the same operators.
"""

from __future__ import annotations

import copy
import platform

import torch
from torch import nn

from megafish.model.parallel import ColumnParallelLinear, RowParallelLinear
from megafish.model.transformer import Transformer


class PackedLinear(nn.Module):
    """y = x W^T + b, forward only: [..., in] -> [..., out]. The values of W are kept bit for bit."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = None if bias is None else bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in], unpacked: a copy."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a model laid out for decoding has no gradients: use torch.no_grad()")
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def can_pack(weight: torch.Tensor) -> bool:
    """Is there such a layout for this matrix: on an x86 CPU, in a dtype that its instructions know?"""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


@torch.no_grad()
def for_decoding(model: Transformer) -> Transformer:
    """The same model for decoding alone, with its matrices laid out in the order that makes that fast; on a GPU, and
    where `can_pack` says no, the given one.

    It shares embedding, head and norms with the given model, which stays as it is; the matrices of the blocks are no
    parameters of it, and the head's stands beside the plain one, which losses read. Whoever needs the given model no
    more lets go of it, so that they are in memory once.
    """
    if model.head.packed is not None or not can_pack(model.head.weight):
        return model
    found = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, module in list(found.named_modules()):
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            parent, _, own = name.rpartition(".")
            setattr(found.get_submodule(parent), own, PackedLinear(module.weight, module.bias))
    found.head.packed = PackedLinear(found.head.weight, None)
    return found
