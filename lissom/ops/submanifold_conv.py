"""Submanifold sparse convolution in three dimensions: only occupied cells are computed, and only they are read.

Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks" (arXiv 1711.10275). An ordinary
convolution makes empty cells beside occupied ones occupied, and layer by layer a cloud of points fills its volume.
Here the answer lives where the input lives. Which cells neighbour which is found once for all layers of one size:
``neighbours``; ``submanifold_conv`` then is one matrix product for each tap of the kernel.
"""

from __future__ import annotations

import itertools

import torch

__all__ = ["Pairs", "neighbours", "submanifold_conv", "voxelise"]

# For each tap, rows of the answer and the rows of the input that it reads there.
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def voxelise(points: torch.Tensor, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (B, N, 3) to the cells of side ``size`` that hold any: cells (V, 4), and the cell of each point (B, N).

    A cell is (cloud, x, y, z) in whole numbers, in ascending order. Raises ValueError for another shape or size.
    """
    if points.ndim != 3 or points.shape[2] != 3 or not size > 0:
        raise ValueError(f"points (B, N, 3) and a size above 0 are wanted, not {tuple(points.shape)} and {size}")
    cells = (points / size).floor().long()
    clouds = torch.arange(len(points), device=points.device)[:, None, None].expand(*points.shape[:2], 1)
    found, place = torch.cat([clouds, cells], 2).flatten(0, 1).unique(dim=0, return_inverse=True)
    return found, place.view(points.shape[:2])


def neighbours(cells: torch.Tensor, kernel_size: int = 3) -> Pairs:
    """The pairs of cells (V, 4) = (cloud, x, y, z) that each of kernel_size^3 taps joins, x slowest, z fastest.

    Costs a sort of the cells and a search in it for each tap; nothing depends on how large the space is. Raises
    ValueError for an even kernel, cells of another form or in double, and coordinates too far apart to be numbered.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"a kernel of {kernel_size} has no centre; an odd size is wanted")
    if cells.ndim != 2 or cells.shape[1] != 4 or cells.is_floating_point():
        raise ValueError(f"cells (V, 4) of whole numbers are wanted, not {tuple(cells.shape)} of {cells.dtype}")
    if len(cells) == 0:
        return [(cells.new_empty(0), cells.new_empty(0)) for _ in range(kernel_size**3)]
    pad = kernel_size // 2
    cells = cells.long()
    low = cells.amin(0)
    # A rim of pad empty cells keeps a step across a border from landing in another row.
    extent = [int(n) for n in cells.amax(0) - low + 1 + 2 * pad]
    if extent[0] * extent[1] * extent[2] * extent[3] > torch.iinfo(torch.int64).max:
        raise ValueError(f"cells of {extent} places cannot be numbered; choose a larger size of cells")
    strides = [extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1]
    shifted = cells - low + pad
    key = sum((shifted[:, i] * strides[i] for i in range(1, 4)), shifted[:, 0] * strides[0])
    ordered, order = key.sort()
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError("a cell stands in the list twice; take each once, as voxelise does")
    pairs = []
    for x, y, z in itertools.product(range(-pad, pad + 1), repeat=3):
        wanted = key + (x * strides[1] + y * strides[2] + z)
        place = torch.searchsorted(ordered, wanted).clamp_max(len(ordered) - 1)
        rows = torch.nonzero(ordered[place] == wanted).squeeze(1)
        pairs.append((rows, order[place[rows]]))
    return pairs


def submanifold_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pairs: Pairs
) -> torch.Tensor:  # fmt: skip
    """Features x (V, C) of occupied cells -> (V, C'), weight (taps, C, C'), bias (C',), ``pairs`` from ``neighbours``.

    The same as a dense three-dimensional convolution of the volume, zero where no cell is, read at the occupied cells:
    cross-correlation, no flip. Raises ValueError where the shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or weight.shape[1] != x.shape[1] or len(weight) != len(pairs):
        raise ValueError(
            f"x (V, C), weights (taps, C, C') and pairs of {len(pairs)} taps do not fit: {tuple(x.shape)}, "
            f"{tuple(weight.shape)}"
        )
    y = x.new_zeros(len(x), weight.shape[2])
    for tap, (rows, sources) in zip(weight, pairs, strict=True):
        if len(rows):
            y.index_add_(0, rows, x[sources] @ tap)
    return y if bias is None else y + bias
