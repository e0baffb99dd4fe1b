"""The goldfish mask and the fused linear cross-entropy, for any PyTorch training loop. Imports nothing of megafish."""

from megafish_kernels.goldfish import goldfish_coefficients, goldfish_drop
from megafish_kernels.loss import LossStats, linear_cross_entropy
from megafish_kernels.rows import KeptRows, compact_rows, goldfish_keep

__all__ = [
    "KeptRows",
    "LossStats",
    "compact_rows",
    "goldfish_coefficients",
    "goldfish_drop",
    "goldfish_keep",
    "linear_cross_entropy",
]
