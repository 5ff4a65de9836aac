"""Recursive gated convolution (gnConv): products of features of any order, by convolutions (HorNet, arXiv 2207.14284).

Attention multiplies features twice. Here a map is cut in groups of growing width, and each is multiplied with what the
narrower ones before it gave: order n is a polynomial of degree n + 1 in the input.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

__all__ = ["GnConv"]


class GnConv(nn.Module):
    """x (B, dim, H, W) -> (B, out_dim, H, W), any H and W; ``out_dim`` None is ``dim``.

    With widths d_i = out_dim / 2^(order - 1 - i): a 1 x 1 convolution gives a gate p of width d_0 and maps of all
    widths, f = scale spatial(maps); then x = p f_0, x = pw_i(x) f_(i+1) for i = 0 to order - 2, and a last 1 x 1
    convolution.
    ``spatial`` builds, from the number of channels, what mixes positions: None is a depthwise 7 x 7 convolution;
    ``functools.partial(GlobalLocalFilter, h=14, w=8)`` reaches over the whole map. ``scale`` keeps the products from
    growing: 1 / 3 in every published network, 1 in the published neck (``lissom.layers.horfpn``). ``project`` False
    leaves the last 1 x 1 convolution out. Train it behind a norm, with gradients clipped by norm.

    Cost of the 1 x 1 convolutions: less than 11 dim^2 / 3 multiplications a pixel, whatever the order.
    Raises ValueError where ``order`` is below 1 or ``out_dim`` cannot be halved order - 1 times.
    """

    def __init__(
        self,
        dim: int,
        order: int = 3,
        scale: float = 1 / 3,
        spatial: Callable[[int], nn.Module] | None = None,
        out_dim: int | None = None,
        project: bool = True,
    ) -> None:
        super().__init__()
        width = dim if out_dim is None else out_dim
        if order < 1 or width % (1 << max(order - 1, 0)):
            raise ValueError(
                f"gnConv of order {order} halves its width {order - 1} times; {width} channels do not allow"
            )
        self.order, self.scale = order, scale
        self.dims = [width >> (order - 1 - i) for i in range(order)]
        mixed = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * width, 1)
        self.dwconv = nn.Conv2d(mixed, mixed, 7, padding=3, groups=mixed) if spatial is None else spatial(mixed)
        self.proj_out: nn.Module = nn.Conv2d(width, width, 1) if project else nn.Identity()
        self.pws = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in pairwise(self.dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, maps = self.proj_in(x).split([self.dims[0], sum(self.dims)], 1)
        maps = self.dwconv(maps)
        if self.scale != 1:
            maps = maps * self.scale
        first, *others = maps.split(self.dims, 1)
        x = gate * first
        for widen, factor in zip(self.pws, others, strict=True):
            x = widen(x) * factor
        return self.proj_out(x)

    @torch.no_grad()
    def fuse(self) -> GnConv:
        """The same module, its scale in the weights of the depthwise convolution where there is one."""
        if type(self.dwconv) is nn.Conv2d and self.scale != 1:
            self.dwconv.weight.mul_(self.scale)
            if self.dwconv.bias is not None:
                self.dwconv.bias.mul_(self.scale)
            self.scale = 1.0
        return self
