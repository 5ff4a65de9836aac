"""ConvFirst and MBConv residual blocks, "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617).

ConvFirst puts the spatial convolution before the expansion, on C channels instead of eC, so that one kernel can
compute the whole block tile by tile with a cheap halo (``FusedConvFirst``). MBConv, with the convolution in the middle,
is its comparison; the MLP block is ConvFirst without its convolution. Convolutions are grouped with a fixed group
width, and names are those of the published block definitions (``layers.0.weight``, ...).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["ConvFirst", "FusedConvFirst", "MBConv", "MLPBlock"]


class _Residual(nn.Module):
    """``layers``, and the input added where the block keeps its shape."""

    def __init__(self, layers: list[nn.Module], shortcut: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        y = self.layers(x)
        return y + x if self.shortcut else y


class ConvFirst(_Residual):
    """Grouped kxk convolution, 1x1 expansion to ``expansion`` x C, SiLU, 1x1 projection; each with its BatchNorm.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); the input is added where channels
    and size agree. No activation follows the first convolution, nor the block.

    Raises ValueError where ``group_width`` does not divide ``in_channels``, or ``kernel_size`` is even.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, group_width: int = 8,
        expansion: int = 4, activation: type[nn.Module] = nn.SiLU,
    ) -> None:  # fmt: skip
        hidden = expansion * in_channels
        super().__init__(
            [
                _spatial(in_channels, kernel_size, stride, group_width),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                activation(),
                nn.Conv2d(hidden, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ],
            shortcut=stride == 1 and in_channels == out_channels,
        )


class MBConv(_Residual):
    """1x1 expansion to ``expansion`` x C, grouped kxk convolution, 1x1 projection; no squeeze-and-excitation.

    Shapes, shortcut and errors as ConvFirst's; SiLU follows the expansion and the convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, group_width: int = 8,
        expansion: int = 4, activation: type[nn.Module] = nn.SiLU,
    ) -> None:  # fmt: skip
        hidden = expansion * in_channels
        super().__init__(
            [
                nn.Conv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                activation(),
                _spatial(hidden, kernel_size, stride, group_width),
                nn.BatchNorm2d(hidden),
                activation(),
                nn.Conv2d(hidden, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ],
            shortcut=stride == 1 and in_channels == out_channels,
        )


class MLPBlock(_Residual):
    """1x1 expansion to ``expansion`` x C, SiLU, 1x1 projection, each convolution with its BatchNorm.

    Shapes and shortcut as ConvFirst's at stride 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int = 4, activation: type[nn.Module] = nn.SiLU
    ) -> None:
        hidden = expansion * in_channels
        super().__init__(
            [
                nn.Conv2d(in_channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                activation(),
                nn.Conv2d(hidden, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ],
            shortcut=in_channels == out_channels,
        )


class FusedConvFirst(nn.Module):
    """A ConvFirst block for inference, computed tile by tile: the expanded map is never stored whole.

    Answers as the block in eval mode, up to rounding; its BatchNorms are folded. ``tile`` rows of the output are made
    at a time (their input has a halo of half the kernel), and ``chunk`` channels of the expansion: beside input and
    output there are tile x W' x (C + 2 chunk + 2 C') numbers at most, where the block layer by layer has
    expansion x C x H' x W'.
    A loop in Python: it saves memory, and time only where the tiles fit a cache and the loop is short.

    Make one by ``from_block``. Raises ValueError where tile or chunk is below 1.
    """

    def __init__(self, block: ConvFirst, tile: int = 8, chunk: int = 128) -> None:
        super().__init__()
        if tile < 1 or chunk < 1:
            raise ValueError(f"tile and chunk are at least 1, not {tile} and {chunk}")
        conv, conv_norm, expand, expand_norm, self.activation, project, project_norm = block.layers
        self.tile, self.chunk, self.shortcut = tile, chunk, block.shortcut
        self.stride, self.reach, self.groups = conv.stride[0], conv.kernel_size[0] // 2, conv.groups
        for name, layer, norm in (
            ("conv", conv, conv_norm), ("expand", expand, expand_norm), ("project", project, project_norm),
        ):  # fmt: skip
            weight, bias = _folded(layer, norm)
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_bias", bias)

    @classmethod
    def from_block(cls, block: ConvFirst, tile: int = 8, chunk: int = 128) -> FusedConvFirst:
        """The fused form of a trained block, which stays as it is."""
        return cls(block, tile, chunk).train(block.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C', H', W')
        height, width = ((side - 1) // self.stride + 1 for side in x.shape[-2:])
        out = x.new_empty(x.shape[0], self.project_bias.numel(), height, width)
        for top in range(0, height, self.tile):
            bottom = min(top + self.tile, height)
            out[:, :, top:bottom] = self._rows(x, top, bottom)
        return out

    def _rows(self, x: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
        """Rows ``top`` to ``bottom`` of the output."""
        first, last = top * self.stride - self.reach, (bottom - 1) * self.stride + self.reach + 1
        inside = x[:, :, max(first, 0) : last]
        edges = (self.reach, self.reach, max(-first, 0), max(last - x.shape[2], 0))
        y = functional.conv2d(
            functional.pad(inside, edges), self.conv_weight, self.conv_bias, self.stride, groups=self.groups
        )
        total = self.project_bias.view(1, -1, 1, 1)
        for start in range(0, self.expand_bias.numel(), self.chunk):
            own = slice(start, start + self.chunk)
            hidden = self.activation(functional.conv2d(y, self.expand_weight[own], self.expand_bias[own]))
            total = total + functional.conv2d(hidden, self.project_weight[:, own])
        return total + x[:, :, top:bottom] if self.shortcut else total


@torch.no_grad()
def _folded(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution with its BatchNorm of eval mode inside."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    weight = layer.weight.double() * scale[:, None, None, None]
    return weight.to(layer.weight), (norm.bias.double() - norm.running_mean.double() * scale).to(layer.weight)


def _spatial(channels: int, kernel_size: int, stride: int, group_width: int) -> nn.Conv2d:
    if channels % group_width:
        raise ValueError(f"{channels} channels are not divisible into groups of {group_width}")
    if kernel_size % 2 == 0:
        raise ValueError(f"a kernel of {kernel_size} has no middle; give an odd one")
    return nn.Conv2d(
        channels, channels, kernel_size, stride, kernel_size // 2, groups=channels // group_width, bias=False
    )
