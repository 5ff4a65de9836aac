"""Single-head self-attention over a part of the channels (SHSA), SHViT's mixer (arXiv 2401.16456).

One head attends over the first channels of a map, the rest pass by it, and a projection mixes both. Its checkpoints'
own names are kept: ``pre_norm``, ``qkv.{c,bn}``, ``proj.1.{c,bn}``.
"""

from __future__ import annotations

import torch
from torch import nn

from lissom.layers.conv_norm import ConvNorm

__all__ = ["SHSA"]

SHARE = 4.68  # dim / SHARE, rounded, is the attending width of every published stage


class SHSA(nn.Module):
    """x (B, dim, H, W) -> (B, dim, H, W), to be added to x: proj(relu([softmax(q^T k / sqrt(qk_dim)) v, x2])).

    q, k (``qk_dim`` channels each) and v (``partial_dim``) come from the first ``partial_dim`` channels behind a norm
    over all of them and all positions; x2 is the rest, not normalised. There is no positional term: permuted positions
    permute the answer. ``partial_dim`` None is dim / 4.68, rounded, the published share. The projection's norm starts
    at zero, and so the answer.

    Cost in multiplications, N = H W: N partial_dim (2 qk_dim + partial_dim) + N^2 (qk_dim + partial_dim) + N dim^2.
    Raises ValueError where ``partial_dim`` is not between 1 and ``dim``, or ``qk_dim`` is below 1.
    """

    def __init__(self, dim: int, qk_dim: int = 16, partial_dim: int | None = None) -> None:
        super().__init__()
        partial = max(1, round(dim / SHARE)) if partial_dim is None else partial_dim
        if not 1 <= partial <= dim:
            raise ValueError(f"{partial} of {dim} channels cannot attend; partial_dim is between 1 and dim")
        if qk_dim < 1:
            raise ValueError(f"queries and keys of {qk_dim} channels cannot be compared; qk_dim is at least 1")
        self.dim, self.qk_dim, self.partial_dim = dim, qk_dim, partial
        self.scale = qk_dim**-0.5
        self.pre_norm = nn.GroupNorm(1, partial)
        self.qkv = ConvNorm(partial, 2 * qk_dim + partial)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, scale=0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attending, passing = x.split([self.partial_dim, self.dim - self.partial_dim], 1)
        q, k, v = self.qkv(self.pre_norm(attending)).flatten(2).split([self.qk_dim, self.qk_dim, self.partial_dim], 1)
        weights = (self.scale * q.transpose(1, 2) @ k).softmax(-1)  # (B, N, N): each position's weights of all others
        mixed = (v @ weights.transpose(1, 2)).reshape(attending.shape)
        return self.proj(torch.cat([mixed, passing], 1))
