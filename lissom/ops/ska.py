"""Small-kernel aggregation (SKA), LSNet's dynamic convolution: every pixel has kernels of its own (arXiv 2503.23135).

``ska`` is the operator, without parameters; ``lissom.layers.lsconv`` predicts its kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["ska"]


def ska(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (N, C, H, W) convolved at every pixel with that pixel's own kernels w (N, G, K^2, H, W): (N, C, H, W).

    Channel c uses kernel c mod G:
    y[n, c, i, j] = sum over u, v of x[n, c, i + u - p, j + v - p] w[n, c mod G, u K + v, i, j], p = (K - 1) / 2, with x
    taken as 0 outside. It costs K^2 multiplications for each element of x, and no memory beyond x padded: the shifted
    maps are views of it. float16 and bfloat16 are summed in float32; the answer has x's type, whatever w's is.
    Second derivatives are not defined.

    Raises ValueError where the shapes do not fit: K is odd, G divides C, N, H and W are the same.
    """
    if x.ndim != 4 or w.ndim != 5:
        raise ValueError(f"x (N, C, H, W) and w (N, G, K^2, H, W) are wanted, not {_shape(x)} and {_shape(w)}")
    size = math.isqrt(w.shape[2])
    if size * size != w.shape[2] or size % 2 == 0:
        raise ValueError(f"{w.shape[2]} weights are no square kernel of an odd size")
    if w.shape[1] == 0 or x.shape[1] % w.shape[1]:
        raise ValueError(f"{w.shape[1]} kernels do not divide {x.shape[1]} channels evenly")
    if (x.shape[0], *x.shape[2:]) != (w.shape[0], *w.shape[3:]):
        raise ValueError(f"x {_shape(x)} and w {_shape(w)} differ in batch or pixels")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # Plain operations: a compiler fuses them, and every runtime knows them.
        padded, weights = _operands(x, w, size)
        terms = [shifted * weight for shifted, weight in _taps(padded, weights, size)]
        return sum(terms[1:], terms[0]).flatten(1, 2).to(x.dtype)
    return _Aggregation.apply(x, w, size)


class _Aggregation(torch.autograd.Function):
    """The sum accumulated in place, forwards and backwards. Autograd's own backward of a shifted view would fill a
    whole map with zeros for each of the K^2 taps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.size = size
        padded, weights = _operands(x, w, size)
        pairs = _taps(padded, weights, size)
        total = pairs[0][0] * pairs[0][1]
        for shifted, weight in pairs[1:]:
            total.addcmul_(shifted, weight)
        return total.flatten(1, 2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, w = ctx.saved_tensors
        size, pad = ctx.size, ctx.size // 2
        padded, weights = _operands(x, w, size)
        grad = grad.to(padded.dtype).unflatten(1, padded.shape[1:3])
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            total = torch.zeros_like(padded)
            for place, weight in _taps(total, weights, size):
                place.addcmul_(grad, weight)
            height, width = x.shape[2:]
            grad_x = total[..., pad : pad + height, pad : pad + width].flatten(1, 2).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_w = torch.stack([(grad * shifted).sum(1) for shifted, _ in _taps(padded, weights, size)], 2).to(
                w.dtype
            )
        return grad_x, grad_w, None


def _operands(x: torch.Tensor, w: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x padded (N, C / G, G, H + 2 p, W + 2 p) and w (N, 1, G, K^2, H, W), both in the type of the sum."""
    kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    padded = F.pad(x.to(kind), (size // 2,) * 4)
    groups = w.shape[1]
    return padded.unflatten(1, (x.shape[1] // groups, groups)), w.to(kind).unsqueeze(1)


def _taps(padded: torch.Tensor, weights: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each tap the shifted map (N, C / G, G, H, W) and its weight (N, 1, G, H, W), both views."""
    height, width = weights.shape[-2:]
    return [
        (padded[..., u : u + height, v : v + width], weight)
        for (u, v), weight in zip(
            ((u, v) for u in range(size) for v in range(size)), weights.unbind(3), strict=True
        )
    ]  # fmt: skip


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
