"""FFNified attention: attention's frame of queries, keys and values with convolutions as learned keys and values.

"MetaMixer Is All You Need" (arXiv 2406.02021): a feed-forward layer is a memory, value(gelu(key(query))),
attention the same frame with softmax and with keys and values made of the input. ``MetaMixer`` is the frame, with
attention, the feed-forward layer and FFNified attention as three of its settings; ``FFNifiedAttention`` and
``RepDepthwise`` are what the FFNet networks are built of, with their checkpoints' own names of parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lissom.layers.conv_norm import ConvNorm

__all__ = ["FFNifiedAttention", "MetaMixer", "RepDepthwise"]


class RepDepthwise(nn.Module):
    """A large and a small depthwise convolution, each with its BatchNorm, summed: (B, in, H, W) -> (B, out, H', W').

    There is no identity branch. ``out_channels`` is a multiple of ``in_channels``: output o reads input
    o // (out / in). ``fuse()`` gives one convolution. Raises ValueError where the channels do not divide, or the
    kernels are not odd with the small one below the large.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 7, stride: int = 1, small_kernel: int = 3
    ) -> None:
        super().__init__()
        if out_channels % in_channels:
            raise ValueError(f"{out_channels} channels are no multiple of {in_channels}")
        if kernel_size % 2 == 0 or small_kernel % 2 == 0 or not small_kernel < kernel_size:
            raise ValueError(f"kernels of {small_kernel} in {kernel_size} have no common centre; odd sizes are wanted")
        self.conv = ConvNorm(in_channels, out_channels, kernel_size, stride, groups=in_channels)
        self.conv1 = ConvNorm(in_channels, out_channels, small_kernel, stride, groups=in_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.conv1(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One convolution with a bias, of the same answers in eval mode."""
        large, small = self.conv.fuse(), self.conv1.fuse()
        rim = (large.kernel_size[0] - small.kernel_size[0]) // 2
        assert large.bias is not None
        assert small.bias is not None
        large.weight.add_(F.pad(small.weight, [rim] * 4))
        large.bias.add_(small.bias)
        return large


class FFNifiedAttention(nn.Module):
    """y = dw2(act(dw1(q))), q = BN(W x): (B, dim, H, W) to the same shape.

    The kernels of ``dw1`` (``k1`` x ``k1``, depthwise) are the keys a query is compared with, those of ``dw2`` the
    values. After the projection every channel stands alone. Kernels above 5 are ``RepDepthwise`` where ``reparam``,
    others plain convolutions with a bias, as published. There is no norm in front and no projection behind. Costs
    dim^2 + (k1^2 + k2^2) dim multiplications a position. Raises ValueError for even kernels.
    """

    def __init__(
        self, dim: int, k1: int = 7, k2: int = 7, act: Callable[[], nn.Module] = nn.GELU, reparam: bool = True
    ) -> None:
        super().__init__()
        self.fc = ConvNorm(dim, dim)
        self.conv1 = _depthwise(dim, k1, reparam)
        self.act = act()
        self.conv2 = _depthwise(dim, k2, reparam)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.act(self.conv1(self.fc(x))))


class MetaMixer(nn.Module):
    """value(coefficient(key(query(x), x)), x): the frame that feed-forward layers and attention share.

    ``query`` and ``coefficient`` take one tensor; ``key`` and ``value`` take what comes before and x itself, which
    learned memories ignore (``MetaMixer.learned`` makes such of any module). ``attention``, ``feed_forward`` and
    ``ffnified`` build the paper's three settings.
    """

    def __init__(self, query: nn.Module, key: nn.Module, coefficient: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.coefficient, self.value = query, key, coefficient, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value(self.coefficient(self.key(self.query(x), x)), x)

    @staticmethod
    def learned(memory: nn.Module) -> nn.Module:
        """Keys or values that do not depend on the input: ``memory`` alone is asked."""
        return _Learned(memory)

    @classmethod
    def feed_forward(cls, dim: int, ratio: int = 4) -> MetaMixer:
        """Tokens (B, N, dim) to the same shape: dim ``ratio`` learned keys and as many values, GELU between."""
        keys, values = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        return cls(nn.Identity(), _Learned(keys), nn.GELU(), _Learned(values))

    @classmethod
    def attention(cls, dim: int, num_heads: int = 8) -> MetaMixer:
        """Tokens (B, N, dim) to the same shape: softmax attention. Raises ValueError where heads do not divide dim."""
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        return cls(nn.Linear(dim, dim), _Similarity(dim, num_heads), nn.Softmax(-1), _Weighted(dim, num_heads))

    @classmethod
    def ffnified(cls, dim: int, k1: int = 7, k2: int = 7) -> MetaMixer:
        """Maps (B, dim, H, W) to the same shape: ``FFNifiedAttention`` in the frame's names."""
        keys, values = _depthwise(dim, k1, True), _depthwise(dim, k2, True)
        return cls(ConvNorm(dim, dim), _Learned(keys), nn.GELU(), _Learned(values))


class _Learned(nn.Module):
    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.memory(y)


class _Similarity(nn.Module):
    """Queries (B, N, C) and tokens (B, N, C) to scaled products (B, heads, N, N) with keys made of the tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, self.proj(x)))
        return q @ k.transpose(2, 3) * q.shape[-1] ** -0.5


class _Weighted(nn.Module):
    """Weights (B, heads, N, N) and tokens (B, N, C) to the projected sums of the values, (B, N, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        values = self.v(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return self.proj((weights @ values).transpose(1, 2).flatten(2))


def _depthwise(dim: int, size: int, reparam: bool) -> nn.Module:
    if size % 2 == 0:
        raise ValueError(f"a kernel of {size} has no centre; an odd size is wanted")
    if size > 5 and reparam:
        return RepDepthwise(dim, dim, size)
    return nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)
