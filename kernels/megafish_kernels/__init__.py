"""The goldfish mask and the fused linear cross-entropy, for any PyTorch training loop. Imports nothing of megafish."""

from megafish_kernels.goldfish import goldfish_coefficients, goldfish_drop
from megafish_kernels.loss import LossStats, linear_cross_entropy

__all__ = ["LossStats", "goldfish_coefficients", "goldfish_drop", "linear_cross_entropy"]
