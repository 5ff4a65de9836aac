"""Depthwise convolution along time, fast where kernels are about as long as the series.

Convolution libraries for processors have no good kernel for one channel a group with dozens of taps. The same sums are
products with one banded (Toeplitz) matrix a channel; where the series is no longer than about two kernels, that matrix
is mostly full, and a batched product runs at several times the speed (4 x forwards, 3 x backwards for 448 channels of
48 steps and kernels of 51 on one thread).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["depthwise_conv1d"]

REACH = 2  # kernels: up to a series as long as this many, the matrix is used


def depthwise_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (B, C, N), weight (C, 1, K) of an odd K, bias (C,) -> (B, C, N), zeros around the series.

    The definition is ``conv1d(x, weight, bias, padding=K // 2, groups=C)``, and where a graph is exported or compiled
    it is that. The matrices take C N^2 numbers. Raises ValueError for an even K or shapes that do not fit.
    """
    if x.ndim != 3 or weight.ndim != 3 or weight.shape[:2] != (x.shape[1], 1) or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"x (B, C, N) and weights (C, 1, K), K odd, are wanted, not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    channels, taps = len(weight), weight.shape[2]
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu"
    if plain or x.shape[2] > REACH * taps:
        return F.conv1d(x, weight, bias, padding=taps // 2, groups=channels)
    steps = torch.arange(x.shape[2], device=x.device)
    tap = steps[:, None] - steps + taps // 2  # (N from, N to): which tap takes a value there
    inside = (tap >= 0) & (tap < taps)
    matrices = weight[:, 0, tap.clamp(0, taps - 1)] * inside  # (C, N, N)
    y = torch.bmm(x.transpose(0, 1), matrices).transpose(0, 1)
    return y if bias is None else y + bias[:, None]
