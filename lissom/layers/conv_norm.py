"""Convolution and linear layers with their BatchNorm, which fold into one layer for inference.

LeViT's building blocks (arXiv 2104.01136), shared by SHViT, LSNet, FFNet and others, in their checkpoints' own names:
``c`` and ``bn``, ``bn`` and ``l``. ``fuse()`` returns the folded layer: y = gamma (W x - mean) / sqrt(var + eps) + beta
is one affine map. ``lissom.techniques.fuse`` and timm's ``reparameterize_model`` call it.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ConvNorm", "NormLinear", "ResidualConvNorm"]


class ConvNorm(nn.Sequential):
    """A 2-D convolution without bias, and its BatchNorm: (B, in, H, W) -> (B, out, H', W').

    ``padding`` None means half the kernel. ``scale`` is what the norm's weight starts at: 0 makes a residual branch
    silent at first.
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, padding: int | None = None,
        dilation: int = 1, groups: int = 1, scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        padding = dilation * (kernel_size // 2) if padding is None else padding
        convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        )  # fmt: skip
        self.add_module("c", convolution)
        self.add_module("bn", nn.BatchNorm2d(out_channels))
        nn.init.constant_(self.bn.weight, scale)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One convolution with a bias, of the same answers in eval mode; in float64 in between."""
        c, scale, shift = self.c, *_affine(self.bn)
        fused = nn.Conv2d(
            c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups
        ).to(c.weight)  # fmt: skip
        fused.weight.copy_(c.weight.double() * scale[:, None, None, None])
        assert fused.bias is not None
        fused.bias.copy_(shift)
        return fused.train(self.training)


class ResidualConvNorm(nn.Module):
    """x + m(x) of a depthwise ``ConvNorm`` that keeps its shape: one depthwise convolution for inference, the input
    added to the centre tap of its kernels. Raises ValueError where the branch is not depthwise or changes the shape."""

    def __init__(self, branch: ConvNorm) -> None:
        super().__init__()
        c = branch.c
        if c.groups != c.in_channels or c.in_channels != c.out_channels or c.stride != (1, 1):
            raise ValueError("the input of a residual convolution is added to its kernels: it must be depthwise")
        self.m = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.m(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        fused = self.m.fuse()
        height, width = fused.kernel_size
        fused.weight[:, 0, height // 2, width // 2] += 1
        return fused


class NormLinear(nn.Sequential):
    """A BatchNorm and a linear layer behind it: (B, in) -> (B, out). The weight starts normal, of deviation ``std``."""

    bn: nn.BatchNorm1d
    l: nn.Linear  # noqa: E741  the published name

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(in_features))
        self.add_module("l", nn.Linear(in_features, out_features, bias))
        nn.init.trunc_normal_(self.l.weight, std=std)
        if bias:
            nn.init.zeros_(self.l.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """One linear layer of the same answers in eval mode."""
        scale, shift = _affine(self.bn)
        weight = self.l.weight.double()
        fused = nn.Linear(self.l.in_features, self.l.out_features).to(self.l.weight)
        fused.weight.copy_(weight * scale)
        fused.bias.copy_(weight @ shift + (0 if self.l.bias is None else self.l.bias.double()))
        return fused.train(self.training)


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What a BatchNorm does in eval mode, as y = scale x + shift, float64 (channels,)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale
