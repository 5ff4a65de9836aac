"""Gated positional self-attention: heads that begin as the taps of a convolution and may learn to attend to content.

ConViT (arXiv 2103.10697). Each head mixes, by one learned gate, a map of what tokens contain with a map of where they
stand. The positional scores are a sum of one part of rows and one of columns, so their softmax is a product: it is
applied as two small matrices, H x H and W x W, and its N x N map is never made. Grids need not be square.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["GPSA", "positional_attention"]


def positional_attention(weight: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The positional maps of all heads, as rows (heads, H, H) and columns (heads, W, W), each row of them summing to 1.

    ``weight`` (heads, 3) scores key j for query i as w0 dx + w1 dy + w2 (dx^2 + dy^2), dx and dy being the columns and
    rows from i to j, on a ``grid`` (H, W) of tokens. Token (r, c) then attends to token (r', c') with
    rows[r, r'] columns[c, c']. In float32 or finer: squares of distances are not exact in half precision.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    maps = []
    for side, slope in ((grid[0], weight[:, 1]), (grid[1], weight[:, 0])):
        places = torch.arange(side, device=weight.device, dtype=weight.dtype)
        offset = places[None, :] - places[:, None]  # (queries, keys)
        scores = slope[:, None, None] * offset + weight[:, 2, None, None] * offset.square()
        maps.append(scores.softmax(-1))
    return maps[0], maps[1]


class GPSA(nn.Module):
    """Tokens (B, H W, dim) of a grid, row by row, to the same shape; no class token among them.

    Of each head A = (1 - g) softmax(q k^T / sqrt(D)) + g P, g = sigmoid(``gating_param``), P the positional map of
    ``pos_proj`` (see ``positional_attention``); the heads' A v, joined, pass ``proj``. ``grid`` (H, W), or None: the
    tokens' square. With ``local_init`` the values start as the tokens themselves, and the first s^2 heads, s^2 being
    the greatest square within ``num_heads``, each look at one tap of an s x s kernel, the more sharply the greater
    ``locality_strength``; the gates start at 0.73 for positions. Parameters bear the published names. The bias of
    ``pos_proj`` is the publisher's too: the softmax takes it away, so it has no effect and gets no gradient.

    Raises ValueError where heads do not divide channels, or the tokens do not fill the grid.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, locality_strength: float = 1.0, local_init: bool = True,
        grid: tuple[int, int] | None = None, qkv_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.dim, self.num_heads, self.grid = dim, num_heads, grid
        self.locality_strength = locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        for linear in (self.qk, self.v, self.proj, self.pos_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if local_init:
            self.local_init()

    @torch.no_grad()
    def local_init(self) -> None:
        """Heads as the taps of a kernel: head r + s c looks r - (s - 1) / 2 rows down, c - (s - 1) / 2 columns right.

        Its score is then -locality_strength times the squared distance from that place, and a constant.
        """
        nn.init.eye_(self.v.weight)
        side = math.isqrt(self.num_heads)
        for row in range(side):
            for column in range(side):
                down, right = (2 * (place - (side - 1) / 2) for place in (row, column))
                taps = torch.tensor([right, down, -1.0]) * self.locality_strength
                self.pos_proj.weight[row + side * column] = taps.to(self.pos_proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        height, width = self._grid(count)
        q, k, v = self._split(x)
        content = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D)
        rows, columns = (m.to(v.dtype) for m in positional_attention(self.pos_proj.weight, (height, width)))
        down = rows @ v.reshape(batch, self.num_heads, height, -1)
        place = columns[:, None] @ down.reshape(batch, self.num_heads, height, width, -1)
        gate = self.gating_param.sigmoid()[:, None, None]
        y = (1 - gate) * content + gate * place.flatten(2, 3)
        return self.proj(y.transpose(1, 2).reshape(batch, count, -1))

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """A itself, (B, heads, N, N), for looking at: each row sums to 1."""
        height, width = self._grid(x.shape[1])
        q, k, _ = self._split(x)
        content = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        rows, columns = positional_attention(self.pos_proj.weight, (height, width))
        place = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3).flatten(1, 2)
        gate = self.gating_param.sigmoid()[:, None, None]
        return (1 - gate) * content + gate * place.to(content.dtype)

    def attention_distance(self, x: torch.Tensor) -> torch.Tensor:
        """How far each head looks, in tokens, the mean over images and queries: (heads,)."""
        height, width = self._grid(x.shape[1])
        places = torch.stack(
            torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1
        ).flatten(0, 1)  # fmt: skip
        places = places.to(x)
        apart = (places[:, None] - places[None]).square().sum(-1).sqrt()
        return (self.attention_map(x) * apart).sum(-1).mean((0, 2))

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, (B, heads, N, D) each."""
        q, k = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _grid(self, count: int) -> tuple[int, int]:
        height, width = self.grid or (math.isqrt(count),) * 2
        if height * width != count:
            raise ValueError(f"{count} tokens do not fill a grid of {height} x {width}; name it, grid=(H, W)")
        return height, width
