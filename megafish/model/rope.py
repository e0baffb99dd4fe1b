"""Rotary position embeddings (Su et al. 2021), half-split convention of Hugging Face's Llama, with context
extension."""

from __future__ import annotations

import math

import torch

from megafish.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Rotation per token of each pair of dimensions, float64 [head_dim / 2] in radians, and the attention factor.

    The attention factor multiplies cos and sin (YaRN's temperature, arXiv 2309.00071 section 3.4; 1.0 otherwise).
    """
    dim = config.resolved_head_dim
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
    frequencies = config.rope_theta ** (-pairs / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return _yarn(frequencies, scaling, config.rope_theta), factor


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: keep short wavelengths, divide long ones by the factor, interpolate between."""
    rotations = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """YaRN: interpolate dimensions that turn fewer than beta_slow times, keep those that turn more than beta_fast."""
    half = frequencies.numel()

    def dimension(rotations: float) -> float:
        """Index of the pair that turns this often over the original context."""
        return half * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    return ramp * frequencies / scaling.factor + (1 - ramp) * frequencies


class RotaryTable:
    """cos and sin of every position, fp32 [length, head_dim], grown on demand and kept per device.

    Laid out for `megafish_kernels.rotary`: cos repeats its half, the first half of sin is negated. Not a module
    buffer: a buffer would be rounded when the model is cast to bf16.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies, self._factor = inverse_frequencies(config)
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions 0 to length - 1, fp32 [length, head_dim]."""
        table = self._tables.get(device)
        if table is None or table[0].shape[0] < length:
            # The table outlives the call: made under decoding's inference mode, it could not serve training afterwards.
            with torch.inference_mode(False):
                table = self._tables[device] = self._build(max(256, 1 << (length - 1).bit_length()), device)
        return table[0][:length], table[1][:length]

    def _build(self, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(rows, dtype=torch.float64, device="cpu"), self._frequencies)
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        cos, sin = torch.cat((cos, cos), -1).float(), torch.cat((-sin, sin), -1).float()
        return cos.to(device), sin.to(device)
