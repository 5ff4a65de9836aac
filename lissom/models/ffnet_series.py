"""FFNet that forecasts time series: FFNified attention along time, mixing of variables around it (arXiv 2406.02021).

Variables are cut into overlapping patches, each variable on its own; a block mixes variables, then time by two long
depthwise convolutions with GELU between (keys and values that are learnt, as in the networks for images), then
channels. Every series loses its own level and scale first and gets them back last (``lissom.layers.revin``). Shapes of
parameters depend on the number of variables: a network belongs to one set of them. The networks for images stand in
``lissom.models.metamixer``.

Shapes: B series of M variables, L steps looked back on, H forecast, D features, N patches.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import nn
from torch.nn import functional as F

from lissom.layers.conv_norm import _affine
from lissom.layers.revin import RevIN
from lissom.models.fit_transformer import _own
from lissom.ops.depthwise_conv1d import depthwise_conv1d

__all__ = ["FFNetSeries", "RepDepthwise1d", "SeriesBlock", "ffnet_series"]


class RepDepthwise1d(nn.Module):
    """A long and a short depthwise convolution, each with its BatchNorm, summed: (B, channels, N) to the same shape.

    ``fuse()`` gives one convolution. Raises ValueError where the kernels are not odd with the short one the smaller.
    """

    def __init__(self, channels: int, kernel_size: int = 51, small_kernel: int = 5) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or small_kernel % 2 == 0 or not small_kernel < kernel_size:
            raise ValueError(f"kernels of {small_kernel} in {kernel_size} have no common centre; odd sizes are wanted")
        self.large, self.small = _Depthwise(channels, kernel_size, False), _Depthwise(channels, small_kernel, False)
        self.large_bn, self.small_bn = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large_bn(self.large(x)) + self.small_bn(self.small(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv1d:
        """One convolution with a bias, of the same answers in eval mode; in float64 in between."""
        large, small = self.large.weight.double(), self.small.weight.double()
        scale, shift = _affine(self.large_bn)
        small_scale, small_shift = _affine(self.small_bn)
        rim = (large.shape[2] - small.shape[2]) // 2
        fused = _Depthwise(len(large), large.shape[2], True).to(self.large.weight)
        fused.weight.copy_(large * scale[:, None, None] + F.pad(small * small_scale[:, None, None], (rim, rim)))
        assert fused.bias is not None
        fused.bias.copy_(shift + small_shift)
        return fused.train(self.training)


class _Depthwise(nn.Conv1d):
    """A depthwise convolution of an odd size that keeps the length."""

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__(channels, channels, size, padding=size // 2, groups=channels, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv1d(x, self.weight, self.bias)


class SeriesBlock(nn.Module):
    """(B, M, D, N) to the same shape: x + tokens(x), then x + channels(x).

    - tokens: each feature mixes the variables (M to 2 M), GELU, each variable mixes its two copies of all features
      (2 D to D), a BatchNorm of the D features; then FFNified attention along time, two depthwise convolutions of
      ``kernel_size`` with GELU between. ``dropout`` stands behind either mixing;
    - channels: ``RepDepthwise1d`` along time, a BatchNorm, each variable mixes its features (D to ``ratio`` D), GELU,
      each feature mixes the variables' ``ratio`` copies back (``ratio`` M to M).

    Which of the 2 M (or ``ratio`` M) mixtures counts as whose copy does not matter, as they are learnt.
    """

    def __init__(
        self, variables: int, dim: int, kernel_size: int = 51, small_kernel: int = 5, ratio: int = 2,
        dropout: tuple[float, float] = (0.3, 0.15),
    ) -> None:  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of {kernel_size} has no centre; an odd size is wanted")
        self.variables, self.dim = variables, dim
        whole = variables * dim
        self.across = nn.Conv1d(whole, 2 * whole, 1, groups=dim)
        self.within = nn.Conv1d(2 * whole, whole, 1, groups=variables)
        self.dropout = nn.ModuleList(nn.Dropout(rate) for rate in dropout)
        self.norm1: nn.Module = nn.BatchNorm1d(dim)
        self.key, self.value = _Depthwise(whole, kernel_size, True), _Depthwise(whole, kernel_size, True)
        self.conv: nn.Module = RepDepthwise1d(whole, kernel_size, small_kernel)
        self.norm2: nn.Module = nn.BatchNorm1d(dim)
        self.fc1 = nn.Conv1d(whole, ratio * whole, 1, groups=variables)
        self.fc2 = nn.Conv1d(ratio * whole, whole, 1, groups=dim)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(x)
        return x + self.channels(x)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The token mixer alone, without the input added."""
        y = self.dropout[0](self.across(x.transpose(1, 2).flatten(1, 2)))
        y = self.act(y).unflatten(1, (self.dim, self.variables, -1)).transpose(1, 2).flatten(1, 3)
        y = _normalised(self.norm1, self.dropout[1](self.within(y)), self.variables)
        return self.value(self.act(self.key(y))).unflatten(1, (self.variables, self.dim))

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        """The channel mixer alone, without the input added."""
        y = _normalised(self.norm2, self.conv(x.flatten(1, 2)), self.variables)
        y = self.act(self.fc1(y)).unflatten(1, (self.variables, self.dim, -1)).transpose(1, 2).flatten(1, 3)
        return self.fc2(y).unflatten(1, (self.dim, self.variables)).transpose(1, 2)

    @torch.no_grad()
    def fuse(self) -> SeriesBlock:
        """The same block in place without a norm: each is folded into the convolution before it."""
        if isinstance(self.conv, RepDepthwise1d):
            self.conv = self.conv.fuse()
        for name, before in (("norm1", self.within), ("norm2", self.conv)):
            norm = getattr(self, name)
            if isinstance(norm, nn.BatchNorm1d):
                assert isinstance(before, nn.Conv1d)
                _fold(before, norm, self.variables)
                setattr(self, name, nn.Identity())
        return self


def _normalised(norm: nn.Module, y: torch.Tensor, variables: int) -> torch.Tensor:
    """(B, M D, N) through a norm of D features, the variables being samples to it."""
    if isinstance(norm, nn.Identity):
        return y
    return norm(y.unflatten(1, (variables, -1)).flatten(0, 1)).unflatten(0, (-1, variables)).flatten(1, 2)


def _fold(convolution: nn.Conv1d, norm: nn.BatchNorm1d, repeats: int = 1) -> None:
    """The convolution, in place, with what the BatchNorm behind it does to every ``repeats``-th part of its maps."""
    scale, shift = (part.repeat(repeats) for part in _affine(norm))
    assert convolution.bias is not None
    convolution.weight.copy_(convolution.weight.double() * scale[:, None, None])
    convolution.bias.copy_(convolution.bias.double() * scale + shift)


class PatchStem(nn.Module):
    """Series (B, M, L) to patches (B, M, dim, N): one convolution for all variables, then a BatchNorm.

    Patches of ``patch`` steps begin every ``stride``; the last value is repeated behind the series patch - stride
    times, so that N = (L - stride) // stride + 1.
    """

    def __init__(self, dim: int, patch: int = 4, stride: int = 2) -> None:
        super().__init__()
        if not 1 <= stride <= patch:
            raise ValueError(f"patches of {patch} steps that begin every {stride} leave steps out")
        self.extra = patch - stride
        self.conv = nn.Conv1d(1, dim, patch, stride)
        self.bn: nn.Module = nn.BatchNorm1d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([x, x[..., -1:].expand(*x.shape[:2], self.extra)], 2).flatten(0, 1).unsqueeze(1)
        return self.bn(self.conv(y)).unflatten(0, x.shape[:2])

    @torch.no_grad()
    def fuse(self) -> PatchStem:
        """The same stem in place, its norm folded into the convolution."""
        if isinstance(self.bn, nn.BatchNorm1d):
            _fold(self.conv, self.bn)
            self.bn = nn.Identity()
        return self


class FFNetSeries(nn.Module):
    """What was seen, (B, lookback, variables), to what follows, (B, horizon, variables), on the same scale.

    RevIN, ``PatchStem``, ``depth`` blocks (published: one), one linear layer from all features of a variable to its
    forecast, RevIN undone. Other arguments are those of ``SeriesBlock`` and ``PatchStem``. Raises ValueError for
    input of another shape.
    """

    def __init__(
        self,
        variables: int = 7,
        lookback: int = 96,
        horizon: int = 96,
        dim: int = 64,
        depth: int = 1,
        patch: int = 4,
        stride: int = 2,
        kernel_size: int = 51,
        small_kernel: int = 5,
        ratio: int = 2,
        dropout: tuple[float, float] = (0.3, 0.15),
    ) -> None:
        super().__init__()
        if lookback < stride or horizon < 1:
            raise ValueError(f"{horizon} steps cannot be forecast from {lookback} in patches every {stride}")
        self.variables, self.lookback, self.horizon = variables, lookback, horizon
        self.grad_checkpointing = False
        self.revin = RevIN(variables)
        self.stem = PatchStem(dim, patch, stride)
        self.blocks = nn.Sequential(
            *(SeriesBlock(variables, dim, kernel_size, small_kernel, ratio, dropout) for _ in range(depth))
        )
        self.head = nn.Linear(dim * ((lookback - stride) // stride + 1), horizon)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass instead of keeping their intermediate maps."""
        self.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised series (B, lookback, variables) to features (B, variables, D, N)."""
        x = self.stem(x.transpose(1, 2))
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3 or x.shape[1:] != (self.lookback, self.variables):
            raise ValueError(f"series (B, {self.lookback}, {self.variables}) are wanted, not {tuple(x.shape)}")
        x, statistics = self.revin(x)
        y = self.head(self.forward_features(x).flatten(2))
        return self.revin.restore(y.transpose(1, 2), statistics)


@register_model
def ffnet_series(pretrained: bool = False, **kwargs: Any) -> FFNetSeries:
    """A forecaster of 7 variables, 96 steps from 96 by default: (B, 96, 7) to (B, 96, 7)."""
    return FFNetSeries(**_own(kwargs))
