"""Inception depthwise convolution: most channels pass, the rest meet a square and two bands (arXiv 2303.16900).

A large depthwise kernel costs little arithmetic and much memory traffic; three eighths of the channels mixed, each by
a small or a thin kernel, do as well in InceptionNeXt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["InceptionDWConv2d"]


class InceptionDWConv2d(nn.Module):
    """x (B, channels, H, W) -> (B, channels, H, W), in place of a depthwise convolution.

    With g = int(channels ratio), in this order: the first channels - 3 g are left as they are, g are convolved by
    ``square_kernel`` x ``square_kernel``, g by 1 x ``band_kernel`` and g by ``band_kernel`` x 1, all depthwise with
    biases and zeros around. ``dilation`` spreads every kernel. Raises ValueError where a kernel's size is even, or
    three shares of the channels are none or more than there are.
    """

    def __init__(
        self,
        channels: int,
        square_kernel: int = 3,
        band_kernel: int = 11,
        ratio: float = 0.125,
        dilation: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        share = int(channels * ratio)
        if not 0 < 3 * share <= channels:
            raise ValueError(f"three shares of {share} channels cannot be taken of {channels}")
        if square_kernel % 2 == 0 or band_kernel % 2 == 0:
            raise ValueError(f"kernels of {square_kernel} and {band_kernel} have no centre; their sizes must be odd")
        self.channels, self.dilation = channels, dilation
        self.split = [channels - 3 * share, share, share, share]

        def depthwise(height: int, width: int) -> nn.Conv2d:
            padding = dilation * (height // 2), dilation * (width // 2)
            return nn.Conv2d(
                share, share, (height, width), 1, padding, dilation, share, device=device, dtype=dtype
            )  # fmt: skip

        self.dwconv_hw = depthwise(square_kernel, square_kernel)
        self.dwconv_w = depthwise(1, band_kernel)
        self.dwconv_h = depthwise(band_kernel, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same, square, row, column = x.split(self.split, 1)
        return torch.cat([same, self.dwconv_hw(square), self.dwconv_w(row), self.dwconv_h(column)], 1)

    def to_dense_kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (channels, 1, K, K) and bias (channels,) of the one depthwise convolution of the same answers.

        K is the largest kernel, 11 by default; it has this module's dilation, and zeros around to keep the size. It
        costs K^2 multiplications for each element, and serves to check and to export.
        """
        convolutions = (self.dwconv_hw, self.dwconv_w, self.dwconv_h)
        size = max(side for layer in convolutions for side in layer.kernel_size)
        weight = self.dwconv_hw.weight.new_zeros(self.channels, 1, size, size)
        bias = self.dwconv_hw.weight.new_zeros(self.channels)
        first = self.split[0]
        weight[:first, :, size // 2, size // 2] = 1
        for layer in convolutions:
            height, width = layer.kernel_size
            top, left = (size - height) // 2, (size - width) // 2
            last = first + layer.out_channels
            weight[first:last, :, top : top + height, left : left + width] = layer.weight
            assert layer.bias is not None
            bias[first:last] = layer.bias
            first = last
        return weight, bias
