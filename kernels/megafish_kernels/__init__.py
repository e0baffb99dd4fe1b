"""The goldfish mask, the fused linear cross-entropy and a Llama's element-wise operators, for any PyTorch training
loop. Imports nothing of megafish."""

from megafish_kernels.distillation import linear_kl_divergence
from megafish_kernels.goldfish import goldfish_coefficients, goldfish_drop
from megafish_kernels.head import LinearCrossEntropyHead
from megafish_kernels.loss import LossStats, linear_cross_entropy
from megafish_kernels.norm import rms_norm
from megafish_kernels.patch import PatchLoss, patch_cross_entropy
from megafish_kernels.rope import rotary, rotary_qkv
from megafish_kernels.rows import KeptRows, compact_rows, goldfish_keep
from megafish_kernels.swiglu import swiglu

__all__ = [
    "KeptRows",
    "LinearCrossEntropyHead",
    "LossStats",
    "PatchLoss",
    "compact_rows",
    "goldfish_coefficients",
    "goldfish_drop",
    "goldfish_keep",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "patch_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "swiglu",
]
