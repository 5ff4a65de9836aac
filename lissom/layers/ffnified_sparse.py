"""FFNified attention for clouds of points: keys and values are sparse three-dimensional convolutions (2406.02021).

The form of ``lissom.layers.ffnified_attention`` for occupied cells instead of images: submanifold convolutions, dense
over the channels, stand in for the depthwise ones, a layer norm in front and a BatchNorm behind. The publisher's kernel
sizes are not stated; 3 is this library's.
"""

from __future__ import annotations

import torch
from torch import nn

from lissom.layers.conv_norm import _affine
from lissom.ops.submanifold_conv import Pairs, submanifold_conv

__all__ = ["SparseBlock", "SubmanifoldConv3d"]


class SubmanifoldConv3d(nn.Module):
    """Features (V, in_channels) of occupied cells -> (V, out_channels); see ``lissom.ops.submanifold_conv``.

    Called with the pairs that ``neighbours(cells, kernel_size)`` gives. Raises ValueError for an even kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of {kernel_size} has no centre; an odd size is wanted")
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(kernel_size**3, in_channels, out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.trunc_normal_(self.weight, std=(kernel_size**3 * in_channels) ** -0.5)

    def forward(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        return submanifold_conv(x, self.weight, self.bias, pairs)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[2]}, kernel_size={self.kernel_size}"


class SparseBlock(nn.Module):
    """Features (V, dim) of occupied cells to the same shape: x + tokens(x), then x + channels(x).

    - tokens: layer norm, query (a linear layer), key (a submanifold convolution), GELU, value (another), BatchNorm;
    - channels: layer norm, a submanifold convolution, a feed-forward layer ``ratio`` times as wide, BatchNorm.

    Called with the pairs that ``neighbours(cells, kernel_size)`` gives, found once for all blocks of one level. Two
    convolutions reach kernel_size - 1 cells far, as long as occupied ones lie between.
    """

    def __init__(self, dim: int, kernel_size: int = 3, ratio: float = 3.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key, self.value = (SubmanifoldConv3d(dim, dim, kernel_size) for _ in range(2))
        self.bn1: nn.Module = nn.BatchNorm1d(dim)
        self.bn2: nn.Module = nn.BatchNorm1d(dim)
        self.conv = SubmanifoldConv3d(dim, dim, kernel_size)
        self.fc1, self.fc2 = nn.Linear(dim, int(ratio * dim)), nn.Linear(int(ratio * dim), dim)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        x = x + self.bn1(self.value(self.act(self.key(self.query(self.norm1(x)), pairs)), pairs))
        return x + self.bn2(self.fc2(self.act(self.fc1(self.conv(self.norm2(x), pairs)))))

    @torch.no_grad()
    def fuse(self) -> SparseBlock:
        """The same block in place, its BatchNorms in the layers before them."""
        if isinstance(self.bn1, nn.BatchNorm1d) and isinstance(self.bn2, nn.BatchNorm1d):
            scale, shift = _affine(self.bn1)
            self.value.weight.copy_(self.value.weight.double() * scale)
            self.value.bias.copy_(self.value.bias.double() * scale + shift)
            scale, shift = _affine(self.bn2)
            self.fc2.weight.copy_(self.fc2.weight.double() * scale[:, None])
            self.fc2.bias.copy_(self.fc2.bias.double() * scale + shift)
            self.bn1 = self.bn2 = nn.Identity()
        return self
