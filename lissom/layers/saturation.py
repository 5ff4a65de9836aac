"""Saturation: a stack of residual layers is left where a layer hardly turns its input any more; MuE (arXiv 2211.11152).

With h_0 the input and h_l the output of layer l, s_l = cos(vec h_l, vec h_{l-1}) is computed behind every layer. Where
s_l > tau, the layers behind l are left out and h_l is what the stack answers. No parameter is added, and no output is
looked at: it works where there is no confidence, as in an encoder. Levels of s depend on the width of the network and
on how its residual stream grows, so that no threshold carries over from one network to another.

Published code flattens a whole batch to one vector; it is meant for batches of one. Here a decision is one sample's by
default, so that a sample leaves where it would leave alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Saturation", "Similarity", "saturation_exit", "similarity", "threshold_schedule"]

OVER = ("sample", "token", "batch")


def similarity(
    before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None = None, over: str = "sample"
) -> torch.Tensor:
    """Cosine of two tensors of one shape (B, ...): (B,), within [-1, 1]; equal tensors have 1 exactly.

    ``over`` says what one cosine is of: "sample", all of a sample's numbers as one vector, (B,); "token", the last
    dimension alone, (B, N) of tokens (B, N, C); "batch", all numbers, a scalar, as published. ``mask``, bool (B, N),
    is true for real tokens of (B, N, C): the others do not count. A vector of zeros has the cosine 0. Numbers below
    float32 are summed up in float32. Raises ValueError where shapes do not fit or ``over`` is none of the three.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"a similarity is of two tensors of one shape, not {tuple(before.shape)}, {tuple(after.shape)}"
        )
    if over not in OVER:
        raise ValueError(f"over is one of {', '.join(OVER)}, not {over!r}")
    if before.dtype in (torch.float16, torch.bfloat16):
        before, after = before.float(), after.float()
    if mask is not None:
        if before.ndim != 3 or mask.shape != before.shape[:2]:
            raise ValueError(f"a mask (B, N) goes with tokens (B, N, C); it is {tuple(mask.shape)}, they are "
                             f"{tuple(before.shape)}")  # fmt: skip
        before, after = before * mask.unsqueeze(-1), after * mask.unsqueeze(-1)
    dims = {"sample": tuple(range(1, before.ndim)), "token": (-1,), "batch": tuple(range(before.ndim))}[over]
    product = (before * after).sum(dims)
    # One square root of both: of equal tensors it is their squared norm exactly, of which two roots would fall short.
    norms = before.square().sum(dims) * after.square().sum(dims)
    return (product / norms.clamp_min(torch.finfo(norms.dtype).tiny).sqrt()).clamp(-1, 1)


class Similarity(nn.Module):
    """``similarity`` of two tensors (B, ...) a sample, (B,), as a module for graphs that are exported."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return similarity(before, after)


@dataclass(frozen=True)
class Saturation:
    """What a stack answered, ``output``, and how many layers each decision's part ran, ``executed``: int64 of shape
    (B,) by sample, (B, N) by token, () for the whole batch."""

    output: torch.Tensor
    executed: torch.Tensor


def saturation_exit(
    layers: Iterable[Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    tau: float | torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    over: str = "sample",
) -> Saturation:
    """Run residual ``layers`` on ``x`` (B, ...) until their outputs saturate: each is left where s_l > ``tau``.

    A layer takes the tensor and returns one of its shape. What left keeps its state (the output of the layer at which
    it left) and is handed on as it is, so that others still see it; when all have left, no further layer runs.
    ``over`` is "sample" (default), "batch" as published, or "token": each position of (B, N, C) leaves by itself, as a
    decoder's do, and those behind it attend to its frozen state at every deeper layer.

    ``tau`` is a number, or a tensor that broadcasts to one decision each ((B,), or (N,) by token); from 1 on nothing
    leaves. ``mask``, bool (B, N), is true for real tokens; padding counts in no cosine, and by token it never leaves
    and keeps nobody. The loop looks at data, and so cannot be exported: ``lissom.techniques.mue`` cuts graphs instead.

    Raises ValueError where a layer changes the shape, and for what ``similarity`` refuses.
    """
    shape = {"sample": x.shape[:1], "token": x.shape[:-1], "batch": x.shape[:0]}.get(over)
    if shape is None:
        raise ValueError(f"over is one of {', '.join(OVER)}, not {over!r}")
    running = torch.ones(shape, dtype=torch.bool, device=x.device)
    waited_for = mask if over == "token" and mask is not None else running
    executed = torch.zeros(shape, dtype=torch.int64, device=x.device)
    for number, layer in enumerate(layers):
        if not bool((running & waited_for).any()):
            break
        y = layer(x)
        if y.shape != x.shape:
            raise ValueError(
                f"layer {number} makes {tuple(y.shape)} of {tuple(x.shape)}; the layers of a stack keep the shape"
            )
        score = similarity(x, y, mask, over)
        x = torch.where(running.reshape(*shape, *[1] * (x.ndim - len(shape))), y, x)
        executed += running
        running = running & ~(score > tau)
    return Saturation(x, executed)


def threshold_schedule(tau: float, max_len: int) -> tuple[float, ...]:
    """The published thresholds of a decoder's steps 0 to ``max_len``, S = ``max_len`` + 1 of them.

    Step t < S / 3 never leaves (1); later ones have 0.9 ``tau`` + 0.1 exp(-(t + 1) / S). It is a small change of the
    paper's decay that stands in its code. Raises ValueError for a negative ``max_len``.
    """
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}; it is at least 0")
    steps = max_len + 1
    return tuple(1.0 if step < steps / 3 else 0.9 * tau + 0.1 * math.exp(-(step + 1) / steps) for step in range(steps))
