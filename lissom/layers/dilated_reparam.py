"""Dilated Reparam Block: a large depthwise convolution, trained beside small dilated ones that merge into it.

UniRepLKNet (arXiv 2311.15599): a k x k convolution of dilation r is a dense one of size r (k - 1) + 1 with
zeros between its taps, and so a part of the large kernel. Training sees the parallel branches, each with its own
BatchNorm; inference sees one convolution. Names of parameters are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lissom.layers.conv_norm import _affine

__all__ = ["BRANCHES", "DilatedReparamBlock", "dense_kernel", "merge_kernels"]

# The published branches (size, dilation) beside a kernel of each size.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def dense_kernel(kernel: torch.Tensor, dilation: int) -> torch.Tensor:
    """The kernel without dilation that does what ``kernel`` (out, in, k, k) does with it: (out, in, s, s).

    s = dilation (k - 1) + 1, zeros between the taps. Raises ValueError for a dilation under 1.
    """
    if dilation < 1:
        raise ValueError(f"a dilation of {dilation} is under 1")
    if dilation == 1:
        return kernel
    height, width = (dilation * (side - 1) + 1 for side in kernel.shape[2:])
    dense = kernel.new_zeros(*kernel.shape[:2], height, width)
    dense[:, :, ::dilation, ::dilation] = kernel
    return dense


def merge_kernels(large: torch.Tensor, small: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """``large`` (out, in, K, K) plus ``small`` (out, in, k, k) of ``dilation``, on one centre.

    Their convolutions, padded so that the map keeps its size, add up to that of the answer. Raises ValueError where
    the small kernel does not fit into the large one, or their centres differ (one side odd and one even).
    """
    dense = dense_kernel(small, dilation)
    rim = large.shape[-1] - dense.shape[-1]
    if rim < 0 or rim % 2:
        raise ValueError(
            f"a kernel of {small.shape[-1]} with dilation {dilation} spans {dense.shape[-1]} and has no place in the "
            f"middle of {large.shape[-1]}"
        )
    return large + F.pad(dense, [rim // 2] * 4)


class DilatedReparamBlock(nn.Module):
    """A depthwise K x K convolution with its branches, (B, C, H, W) to the same shape.

    ``branches`` are (size, dilation) each; None takes the published ones, which are known of the odd sizes from 5 to
    17. ``deploy`` builds the merged form: ``lk_origin`` alone, with a bias. ``merge`` tells that convolution's
    numbers, ``reparameterize`` (which timm's ``reparameterize_model`` calls) turns into it in place. Merging uses the
    norms' running statistics. Raises ValueError for an unknown size, even sizes, and branches that do not fit.
    """

    lk_origin: nn.Conv2d
    origin_bn: nn.BatchNorm2d

    def __init__(
        self, channels: int, kernel_size: int, branches: Sequence[tuple[int, int]] | None = None, deploy: bool = False
    ) -> None:
        super().__init__()
        if branches is None:
            if kernel_size not in BRANCHES:
                known = ", ".join(map(str, sorted(BRANCHES)))
                raise ValueError(f"no branches are known for a kernel of {kernel_size} (known: {known}); name them")
            branches = BRANCHES[kernel_size]
        for size, dilation in branches:
            if size % 2 == 0 or dilation < 1 or dilation * (size - 1) + 1 > kernel_size:
                raise ValueError(f"a branch of size {size} and dilation {dilation} does not fit into {kernel_size}")
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of {kernel_size} has no centre; an odd size is wanted")
        self.channels, self.kernel_size, self.deploy = channels, kernel_size, deploy
        self.branches = () if deploy else tuple((size, dilation) for size, dilation in branches)
        self.lk_origin = _depthwise(channels, kernel_size, bias=deploy)
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for size, dilation in self.branches:
            self.add_module(f"dil_conv_k{size}_{dilation}", _depthwise(channels, size, dilation))
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.deploy:
            return self.lk_origin(x)
        y = self.origin_bn(self.lk_origin(x))
        for size, dilation in self.branches:
            branch = self.get_submodule(f"dil_conv_k{size}_{dilation}")
            y = y + self.get_submodule(f"dil_bn_k{size}_{dilation}")(branch(x))
        return y

    @torch.no_grad()
    def merge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel (C, 1, K, K) and bias (C,) of the one convolution, float64."""
        if self.deploy:
            assert self.lk_origin.bias is not None
            return self.lk_origin.weight.double(), self.lk_origin.bias.double()
        scale, bias = _affine(self.origin_bn)
        kernel = self.lk_origin.weight.double() * scale[:, None, None, None]
        for size, dilation in self.branches:
            scale, shift = _affine(getattr(self, f"dil_bn_k{size}_{dilation}"))
            small = getattr(self, f"dil_conv_k{size}_{dilation}").weight.double() * scale[:, None, None, None]
            kernel = merge_kernels(kernel, small, dilation)
            bias = bias + shift
        return kernel, bias

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become the merged form, in place; nothing happens where it is that already."""
        if self.deploy:
            return
        kernel, bias = self.merge()
        merged = _depthwise(self.channels, self.kernel_size, bias=True).to(self.lk_origin.weight)
        merged.weight.copy_(kernel)
        assert merged.bias is not None
        merged.bias.copy_(bias)
        self.lk_origin = merged.train(self.training)
        del self.origin_bn
        for size, dilation in self.branches:
            delattr(self, f"dil_conv_k{size}_{dilation}")
            delattr(self, f"dil_bn_k{size}_{dilation}")
        self.branches, self.deploy = (), True

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, branches={self.branches}, deploy={self.deploy}"


def _depthwise(channels: int, size: int, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    padding = dilation * (size - 1) // 2
    return nn.Conv2d(channels, channels, size, 1, padding, dilation, groups=channels, bias=bias)
