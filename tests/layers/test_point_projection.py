"""Clouds of points as images: views, the raster against its definition, gradients, refusals, the published figures."""

from __future__ import annotations

import pytest
import torch

from lissom.layers.point_projection import PointProjection, raster_cells, rotated_views
from tests.models.families import fixture, images, needs_parity, parity


def clouds(*shape: int, seed: int = 0) -> torch.Tensor:
    points = images(*shape, seed=seed)
    points = points - points.mean(1, keepdim=True)
    return points / points.norm(dim=2).amax(1)[:, None, None]


def test_views_turn_the_cloud() -> None:
    points = clouds(2, 9, 3).double()
    seen = rotated_views(points, 10) - torch.tensor([0, 0, 1.4]).double()
    assert torch.allclose(torch.cdist(seen, seen), torch.cdist(points, points)[:, None].expand(-1, 10, -1, -1))
    for count in (0, 11):
        with pytest.raises(ValueError, match="from 1 to 10"):
            rotated_views(points, count)
        with pytest.raises(ValueError, match="from 1 to 10"):
            PointProjection(4, num_views=count)


@pytest.mark.parametrize("stretch", [1.0, 0.3])
def test_cells_of_the_raster(stretch: float) -> None:
    """Against the published steps: floor, one cell aside, the middle of all nine cells a point at size / 2 - 1."""
    points = clouds(2, 50, 3)
    points[..., 1] *= stretch
    size = 16
    low, reach = points[..., :2].amin(1, True), (points.amax(1) - points.amin(1))[:, :2].amax(1)
    index = ((points[..., :2] - low) / (reach / (size - 3))[:, None, None]).floor()
    offsets = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    nine = index[:, :, None] + offsets + 1
    middle = ((nine.amax((1, 2)) + nine.amin((1, 2))) / 2).floor()
    nine = nine + (size / 2 - middle - 1)[:, None, None]
    assert nine.min() >= 0
    assert nine.max() < size
    centre = nine[:, :, 4].long()
    assert torch.equal(raster_cells(points, size), centre[..., 0] * size + centre[..., 1])
    assert raster_cells(torch.ones(1, 3, 3), size).unique().numel() == 1  # all points in one place
    for odd in (15, 2):
        with pytest.raises(ValueError, match="has no middle"):
            raster_cells(points, odd)


@pytest.mark.parametrize("fusion", [False, True])
def test_every_parameter_gets_a_gradient(fusion: bool) -> None:
    torch.manual_seed(0)
    layer = PointProjection(4, 4, 8, 14, 2, fusion)
    found = layer(clouds(2, 20, 3))
    assert found.shape == (4, 3, 14, 14)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    shift = torch.randperm(20)
    layer.eval()
    points = clouds(1, 20, 3)
    assert torch.allclose(layer(points), layer(points[:, shift]), atol=1e-5)  # the order of points does not count


def test_gradients_of_the_features() -> None:
    torch.manual_seed(0)
    layer = PointProjection(3, 2, 4, 8, 1, False).double().eval()
    assert torch.autograd.gradcheck(layer.features, clouds(1, 7, 3).double().requires_grad_())


def test_refusals() -> None:
    for wrong in ({"graph_dim": 6}, {"size": 15}, {"size": 4}):
        with pytest.raises(ValueError, match=r"groups|even size"):
            PointProjection(4, **wrong)
    with pytest.raises(ValueError, match="4 points or more"):
        PointProjection(4, size=8)(clouds(1, 3, 3))


@needs_parity
@pytest.mark.parametrize(
    ("name", "size", "views", "fusion", "stream"),
    [("op_point_projection", 32, 2, False, "points1"), ("op_point_projection_fused", 28, 4, True, "points3")],
)
def test_published_figures(name: str, size: int, views: int, fusion: bool, stream: str) -> None:
    own, figures = parity(), fixture("unireplknet", name)
    layer = PointProjection(8, 4, 16, size, views, fusion)
    state = own.fill_({key: torch.zeros(shape) for key, shape in figures["keys"].items()})
    layer.load_state_dict(state)
    assert sum(p.numel() for p in layer.parameters()) == figures["params"]
    points = own.make_input((2, 64, 3), stream)
    points = points - points.mean(1, keepdim=True)
    points = points / points.norm(dim=2).amax(1)[:, None, None]
    assert own.close(own.digest(rotated_views(points, views).flatten(0, 1)), figures["transformed"])
    with torch.no_grad():
        assert own.close(own.digest(layer.eval()(points)), figures["output"])
