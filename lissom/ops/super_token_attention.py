"""Super token attention: pixels assigned softly to a grid of super tokens, among which alone attention runs.

"Vision Transformer with Super Token Sampling" (arXiv 2211.11167). One super token a cell of the map; a
pixel belongs to the nine of its own and the neighbouring cells. A map of N pixels in cells of P costs 27 N C
multiplications and attention among N / P tokens; no table of all pixels' pairs, nor of pixels and tokens, is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MapAttention", "SuperTokenAttention", "super_token_assign", "super_token_gather", "super_token_upsample"]


def super_token_assign(
    x: torch.Tensor, cell: tuple[int, int], n_iter: int = 1, through_assignment: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The soft assignment of a map's pixels to its super tokens, and these.

    x (B, C, H, W) -> Q (B, M, P, 9) and S (B, C, H', W'): cells of P = h w pixels, M = H' W' of them, H' and W' being
    H / h and W / w rounded up, the map padded with zeros below and on the right. Q[b, m, p, 3 i + j] is the share that
    pixel p (row by row) of cell m has in the token of the cell i - 1 rows down and j - 1 columns right. Beyond the
    grid the tokens are zeros, whose shares are lost, as published. Every iteration computes Q from the tokens' products
    with the pixels over sqrt(C), and the tokens as means of the pixels, weighted with Q; at first they are means over
    cells. Gradients reach S by its pixels only, not by Q, as published; by both where ``through_assignment``.

    Raises ValueError for cells or a number of iterations below 1, and for an input that is no map.
    """
    if x.ndim != 4:
        raise ValueError(f"a map (batch, channels, height, width) is wanted, not {tuple(x.shape)}")
    if min(cell) < 1 or n_iter < 1:
        raise ValueError(f"cells of {cell} pixels and {n_iter} iterations: both are at least 1")
    pixels, grid = _cells(x, cell)
    source = pixels if through_assignment else pixels.detach()
    tokens = source.mean(2).transpose(1, 2).unflatten(2, grid)
    for step in range(n_iter):
        neighbours = _neighbours(tokens).flatten(1, 2)  # (B, M, 9, C)
        shares = (source @ neighbours.transpose(2, 3) * x.shape[1] ** -0.5).softmax(-1)
        tokens = super_token_gather(pixels if step == n_iter - 1 else source, shares, grid)
    return shares, tokens


def super_token_gather(pixels: torch.Tensor, shares: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Super tokens as means of their pixels: pixels (B, M, P, C) and shares (B, M, P, 9) -> (B, C, H', W').

    Shares that lead beyond the ``grid`` (H', W') are lost.
    """
    sums = _folded(shares.transpose(2, 3) @ pixels, grid)
    mass = _folded(shares.sum(2).unsqueeze(3), grid)
    return (sums / (mass + 1e-12)).permute(0, 3, 1, 2)


def super_token_upsample(tokens: torch.Tensor, shares: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Each pixel as the mean of its nine super tokens, weighted with its shares.

    tokens (B, C, H', W') and shares (B, H' W', h w, 9) -> (B, C, H' h, W' w).
    """
    (rows, columns), (height, width) = tokens.shape[2:], cell
    pixels = shares @ _neighbours(tokens).flatten(1, 2)  # (B, M, P, C)
    laid = pixels.reshape(len(tokens), rows, columns, height, width, -1).permute(0, 5, 1, 3, 2, 4)
    return laid.reshape(len(tokens), -1, rows * height, columns * width)


class MapAttention(nn.Module):
    """Softmax attention among all positions of a map, (B, dim, H, W) to the same shape.

    Parameters are the published ones: ``qkv`` (queries, keys and values inside each head) and ``proj``, 1 x 1
    convolutions. Raises ValueError where the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, self.num_heads, -1, height * width).transpose(2, 3).chunk(3, dim=3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, -1, height, width)
        return self.drop(self.proj(y))


class SuperTokenAttention(nn.Module):
    """Attention among a map's super tokens, spread back to its pixels: (B, dim, H, W) to the same shape, of any sides.

    ``cell`` (h, w) pixels a super token; (1, 1): plain attention among all pixels. ``n_iter`` and
    ``through_assignment``: see ``super_token_assign``. There is no residual inside. Published names of parameters:
    ``stoken_refine.qkv`` and ``stoken_refine.proj``. Raises ValueError where the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, cell: tuple[int, int] = (8, 8), n_iter: int = 1, num_heads: int = 8, qkv_bias: bool = True,
        drop: float = 0.0, through_assignment: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cell, self.n_iter, self.through_assignment = cell, n_iter, through_assignment
        self.stoken_refine = MapAttention(dim, num_heads, qkv_bias, drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if max(self.cell) == 1:
            return self.stoken_refine(x)
        shares, tokens = super_token_assign(x, self.cell, self.n_iter, self.through_assignment)
        y = super_token_upsample(self.stoken_refine(tokens), shares, self.cell)
        return y[:, :, : x.shape[2], : x.shape[3]]

    def extra_repr(self) -> str:
        return f"cell={self.cell}, n_iter={self.n_iter}"


def _cells(x: torch.Tensor, cell: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """A map (B, C, H, W) by cells, (B, M, P, C), padded to whole ones; and how many these are, down and across."""
    height, width = cell
    rows, columns = -(-x.shape[2] // height), -(-x.shape[3] // width)
    below, right = rows * height - x.shape[2], columns * width - x.shape[3]
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    split = x.reshape(len(x), -1, rows, height, columns, width).permute(0, 2, 4, 3, 5, 1)
    return split.reshape(len(x), rows * columns, height * width, -1), (rows, columns)


def _neighbours(tokens: torch.Tensor) -> torch.Tensor:
    """(B, C, H', W') -> (B, H', W', 9, C): each cell's own and the eight around it, row by row, zeros outside."""
    rows, columns = tokens.shape[2:]
    padded = F.pad(tokens.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return torch.stack([padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], dim=3)


def _folded(parts: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What cells send to their nine neighbours, (B, M, 9, C), summed where it arrives: (B, H', W', C).

    The adjoint of ``_neighbours``; what leaves the grid is lost.
    """
    parts = parts.unflatten(1, grid)
    arrived = [
        F.pad(parts[:, :, :, 3 * i + j], (0, 0, j, 2 - j, i, 2 - i)) for i in range(3) for j in range(3)
    ]  # fmt: skip
    return torch.stack(arrived).sum(0)[:, 1:-1, 1:-1]
