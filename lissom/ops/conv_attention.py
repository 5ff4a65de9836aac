"""Convolutional attention: queries, keys and values pass a depthwise convolution first (CvT, arXiv 2103.15808).

The convolution knows where a token stands, so that no position embeddings are needed, and its stride makes keys and
values fewer than queries.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["ConvAttention", "DepthwiseProjection"]

METHODS = ("dw_bn", "avg", "linear")


class DepthwiseProjection(nn.Sequential):
    """A depthwise convolution without bias, ``conv``, and its BatchNorm, ``bn``: one convolution for inference."""

    def __init__(self, dim: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.add_module(
            "conv", nn.Conv2d(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=False)
        )  # fmt: skip
        self.add_module("bn", nn.BatchNorm2d(dim))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The convolution with a bias, of the same answers in eval mode."""
        conv, bn = self.conv, self.bn
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        return conv


class ConvAttention(nn.Module):
    """Tokens (B, N, dim) -> (B, N, dim), of a map (height, width) row by row; a class token, if any, stands first.

    Queries, keys and values each pass ``method`` as a map, then a linear layer: "dw_bn" a depthwise convolution with
    a BatchNorm; "avg" a mean over the kernel, for keys and values alone; "linear" nothing, which is plain attention.
    Keys and values have the stride ``stride_kv``: with 2, a quarter of the tokens. The class token skips it. Logits
    are scaled by dim^-1/2, dim being the whole width as published, not a head's.

    Raises ValueError for an unknown method, an even kernel, and where ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: int = 3,
        stride_kv: int = 2,
        stride_q: int = 1,
        method: str = "dw_bn",
        cls_token: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"{method!r} is no way to make queries, keys and values; known: {', '.join(METHODS)}")
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of {kernel_size} has no centre; its size must be odd")
        self.num_heads, self.cls_token, self.scale = num_heads, cls_token, dim**-0.5

        def spatial(stride: int, pools: bool) -> nn.Module:
            if method == "dw_bn":
                return DepthwiseProjection(dim, kernel_size, stride)
            if method == "avg" and pools:
                return nn.AvgPool2d(kernel_size, stride, kernel_size // 2, ceil_mode=True)
            return nn.Identity()

        self.conv_proj_q = spatial(stride_q, False)
        self.conv_proj_k = spatial(stride_kv, True)
        self.conv_proj_v = spatial(stride_kv, True)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        batch, _, dim = x.shape
        apart = int(self.cls_token)
        first, tokens = x[:, :apart], x[:, apart:]
        maps = tokens.transpose(1, 2).unflatten(2, (height, width))

        def projected(spatial: nn.Module, linear: nn.Module) -> torch.Tensor:
            y = tokens if isinstance(spatial, nn.Identity) else spatial(maps).flatten(2).transpose(1, 2)
            y = torch.cat([first, y], 1) if apart else y
            return linear(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            projected(self.conv_proj_q, self.proj_q),
            projected(self.conv_proj_k, self.proj_k),
            projected(self.conv_proj_v, self.proj_v),
            scale=self.scale,
        )
        return self.proj(y.transpose(1, 2).reshape(batch, -1, dim))
