"""Clouds of points as images from several sides, by learnt features: a front end for networks that read images.

Multi-view projection after P2P (arXiv 2208.02812), as UniRepLKNet uses it (arXiv 2311.15599): each point gets features
from its nearest neighbours, each view rotates the cloud and adds the features up in the cells of a raster, and a small
network paints three colours. Names of parameters are the published ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import nn

__all__ = ["PointProjection", "raster_cells", "rotated_views"]

# The published views, turns about x, y and z in units of pi / 4; four are used for classification.
VIEWS = (
    (0, 0, 2),
    (2, 0, 2),
    (4, 0, 2),
    (6, 0, 2),
    (5, -1, 2),
    (5, 1, 2),
    (7, -1, 2),
    (7, 1, 2),
    (0, -2, 2),
    (0, 2, 2),
)
DISTANCE = 1.4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rotated_views(points: torch.Tensor, count: int = 4) -> torch.Tensor:
    """Clouds (B, N, 3) as the first ``count`` published views see them, (B, count, N, 3), 1.4 before the camera.

    Raises ValueError for a number of views that is not between 1 and 10.
    """
    if not 1 <= count <= len(VIEWS):
        raise ValueError(f"{count} views; there are from 1 to {len(VIEWS)}")
    matrices = torch.stack([_turn([turn * math.pi / 4 for turn in view]) for view in VIEWS[:count]]).to(points)
    away = torch.tensor([0, 0, DISTANCE]).to(points)
    return points[:, None] @ matrices + away


def _turn(angles: list[float]) -> torch.Tensor:
    """(Rx Ry Rz)^T of the angles about the axes, for rows of coordinates; float64 (3, 3)."""
    whole = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3, dtype=torch.float64)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[j, i] = math.sin(angle)
        turn[i, j] = -turn[j, i]
        whole = whole @ turn
    return whole.T


def raster_cells(points: torch.Tensor, size: int) -> torch.Tensor:
    """The cell of each point in a ``size`` x ``size`` raster, as row * size + column: (B, N, 2 or more) -> (B, N).

    x gives the row, y the column. The longer side of the cloud fills the raster but for a cell at each border, and the
    cloud stands in the middle. Raises ValueError for an odd size, which has no middle, and one under 4.
    """
    if size % 2 or size < 4:
        raise ValueError(f"a raster of {size} cells a side has no middle, or no room; an even size from 4 on is wanted")
    plane = points[..., :2]
    corner = plane.amin(1, keepdim=True)
    reach = (plane.amax(1, keepdim=True) - corner).amax(2, keepdim=True)
    side = (reach / (size - 3)).clamp_min(torch.finfo(points.dtype).tiny)
    index = ((plane - corner) / side).floor().long().clamp(0, size - 3)
    middle = (index.amax(1, keepdim=True) + 2) // 2
    row, column = (index + size // 2 - middle).unbind(2)
    return row * size + column


class PointProjection(nn.Module):
    """Clouds (B, N, 3), centred, within the unit sphere -> images (B * num_views, 3, size, size), views fastest.

    ``local_size`` neighbours describe a point, itself among them, by ``graph_dim`` features made of ``trans_dim``.
    With ``fusion`` the views' maps see each other through a transformer layer. The images are normalised as
    ImageNet's, for a network trained there. The features are found once a cloud, not once a view, and each point is
    added into one cell, whose neighbours a 3 x 3 sum reaches. Raises ValueError where the settings do not fit, and for
    fewer points than ``local_size``.
    """

    def __init__(
        self, local_size: int = 32, trans_dim: int = 8, graph_dim: int = 64, size: int = 224, num_views: int = 4,
        fusion: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if graph_dim % 4:
            raise ValueError(f"{graph_dim} features do not divide into 4 groups")
        if size % 2 or size < 4 or (fusion and size < _Fusion.CELL):
            raise ValueError(f"images of {size} pixels a side: an even size is wanted, of 8 or more with fusion")
        if not 1 <= num_views <= len(VIEWS):
            raise ValueError(f"{num_views} views; there are from 1 to {len(VIEWS)}")
        self.local_size, self.size, self.num_views = local_size, size, num_views
        self.input_trans = nn.Conv1d(3, trans_dim, 1)
        self.graph_layer = nn.Sequential(
            nn.Conv2d(2 * trans_dim, graph_dim, 1, bias=False), nn.GroupNorm(4, graph_dim), nn.LeakyReLU(0.2)
        )
        self.proj_layer = nn.Conv1d(graph_dim, graph_dim, 1)
        self.img_block = nn.Sequential(BasicBlock(graph_dim, graph_dim), nn.Conv2d(graph_dim, graph_dim, 1))
        self.fusion = _Fusion(graph_dim, num_views) if fusion else nn.Identity()
        self.img_layer = nn.Conv2d(graph_dim, 3, 1)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        features = self.features(points)
        cells = raster_cells(rotated_views(points, self.num_views).flatten(0, 1), self.size)
        repeated = features.repeat_interleave(self.num_views, 0)  # (B V, C, N)
        flat = repeated.new_zeros(*repeated.shape[:2], self.size**2)
        flat = flat.scatter_add(2, cells[:, None].expand_as(repeated), repeated)
        x = 9 * F.avg_pool2d(flat.unflatten(2, (self.size, self.size)), 3, 1, 1)
        x = self.img_layer(self.fusion(self.img_block(x)))
        return (x.sigmoid() - self.mean) / self.std

    def features(self, points: torch.Tensor) -> torch.Tensor:
        """Of each point, from its neighbours: (B, N, 3) -> (B, graph_dim, N)."""
        if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] < self.local_size:
            raise ValueError(f"clouds (B, N, 3) of {self.local_size} points or more are wanted, not {points.shape}")
        with torch.no_grad():
            squares = points.square().sum(2)
            apart = squares[:, :, None] + squares[:, None] - 2 * points @ points.transpose(1, 2)
            near = apart.topk(self.local_size, dim=2, largest=False, sorted=False).indices  # (B, N, k)
        f = self.input_trans(points.transpose(1, 2))
        convolution, norm, act = self.graph_layer
        # W [neighbour - own, own] = W1 neighbour + (W2 - W1) own: two products a point in place of one an edge.
        difference, own = convolution.weight.squeeze(3).squeeze(2).chunk(2, 1)
        of_neighbour, of_own = difference @ f, (own - difference) @ f
        index = near.flatten(1)[:, None].expand(-1, of_neighbour.shape[1], -1)
        edges = of_neighbour.gather(2, index).unflatten(2, near.shape[1:]) + of_own[..., None]
        return self.proj_layer(act(norm(edges)).amax(3))


class _Fusion(nn.Module):
    """Maps of all views (B V, C, S, S), to the same shape: each 7 x 7 cell a token, one layer of attention."""

    CELL = 7

    def __init__(self, dim: int, num_views: int, width: int = 128) -> None:
        super().__init__()
        self.num_views = num_views
        self.conv1 = nn.Conv2d(dim, width, self.CELL, self.CELL, bias=False)
        self.transformer = _Transformer(width, 8, 128, 256)
        self.conv2 = nn.Sequential(nn.Conv2d(width, dim, 3, padding=1), nn.GELU())
        self.conv3 = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        shape = y.shape
        tokens = y.flatten(2).transpose(1, 2).reshape(-1, self.num_views * shape[2] * shape[3], shape[1])
        tokens = self.transformer(tokens)
        y = tokens.reshape(len(x), -1, shape[1]).transpose(1, 2).reshape(shape)
        y = self.conv2(F.interpolate(y, size=x.shape[2:]))
        return self.conv3(torch.cat((y, x), 1))


class _Transformer(nn.Module):
    """One layer, norms in front; the publisher's nesting of names."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        attention = _PreNorm(width, _Attention(width, heads, head_width))
        self.layers = nn.ModuleList([nn.ModuleList([attention, _PreNorm(width, _FeedForward(width, hidden))])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


class _PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self.norm(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The published layer has a dropout of rate 0 in the third place.
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)
