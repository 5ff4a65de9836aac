"""Sparse convolution: the dense one at occupied cells, empty space costs nothing, gradients, the block of FFNet."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.ffnified_sparse import SparseBlock, SubmanifoldConv3d
from lissom.ops.submanifold_conv import neighbours, submanifold_conv, voxelise
from tests.models.families import images


def cloud(sides: tuple[int, int, int] = (4, 5, 3), clouds: int = 2) -> torch.Tensor:
    """Half of the cells of each cloud, in no order."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.nonzero(torch.rand(clouds, *sides, generator=generator) < 0.5)
    return cells[torch.randperm(len(cells), generator=generator)]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_it_is_the_dense_convolution_at_occupied_cells(size: int) -> None:
    cells = cloud()
    x, weight, bias = images(len(cells), 3).double(), images(size**3, 3, 4, seed=1).double(), images(4, seed=2).double()
    volume = torch.zeros(2, 4, 5, 3, 3, dtype=torch.float64)
    volume[tuple(cells.T)] = x
    kernel = weight.view(size, size, size, 3, 4).permute(4, 3, 0, 1, 2)
    dense = F.conv3d(volume.permute(0, 4, 1, 2, 3), kernel, bias, padding=size // 2)
    found = submanifold_conv(x, weight, bias, neighbours(cells, size))
    torch.testing.assert_close(found, dense.permute(0, 2, 3, 4, 1)[tuple(cells.T)])
    torch.testing.assert_close(submanifold_conv(x, weight, None, neighbours(cells, size)), found - bias)


def test_far_cells_cost_nothing_and_do_not_meet() -> None:
    cells = torch.tensor([[0, 0, 0, 0], [0, 10**5, -(10**5), 10**5], [0, 0, 0, 1], [1, 0, 0, 1]])
    pairs = neighbours(cells)
    assert len(pairs) == 27
    assert [(r.tolist(), s.tolist()) for r, s in pairs if len(r) and len(r) < 4] == [([2], [0]), ([0], [2])]
    assert pairs[13][0].tolist() == pairs[13][1].tolist() == [0, 1, 2, 3]
    assert all(len(rows) == 0 for rows, _ in neighbours(cells[:0]))
    assert submanifold_conv(images(0, 3), images(27, 3, 2), images(2), neighbours(cells[:0])).shape == (0, 2)


def test_points_become_cells() -> None:
    points = torch.tensor([[[0.1, 0.2, 0.3], [-0.1, 0.0, 0.0], [0.4, 0.4, 0.4]], [[0.1, 0.2, 0.3]] * 3])
    cells, place = voxelise(points, 0.5)
    assert cells.tolist() == [[0, -1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert place.tolist() == [[1, 0, 1], [2, 2, 2]]


def test_gradients() -> None:
    cells = cloud((2, 3, 2), 1)
    pairs = neighbours(cells)
    x, weight, bias = (
        t.double().requires_grad_() for t in (images(len(cells), 2), images(27, 2, 2, seed=1), images(2, seed=2))
    )
    assert torch.autograd.gradcheck(lambda *a: submanifold_conv(*a, pairs), (x, weight, bias))
    block = SparseBlock(4)
    block(images(len(cells), 4), pairs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_the_block_and_its_reach() -> None:
    torch.manual_seed(0)
    block = SparseBlock(4).eval()
    line = torch.tensor([[0, i, 0, 0] for i in range(12)])
    pairs, x = neighbours(line), images(12, 4)
    z = block.norm1(x)
    q = F.gelu(block.key(block.query(z), pairs))
    y = x + block.bn1(block.value(q, pairs))
    want = y + block.bn2(block.fc2(F.gelu(block.fc1(block.conv(block.norm2(y), pairs)))))
    torch.testing.assert_close(block(x, pairs), want)
    other = x.clone()
    other[0, 0] += 1
    changed = (block(other, pairs) - block(x, pairs)).abs().sum(1) > 0
    assert changed.tolist() == [True] * 4 + [False] * 8  # three convolutions
    broken = line[line[:, 1] != 2]  # a gap of one cell
    pairs, kept = neighbours(broken), line[:, 1] != 2
    changed = (block(other[kept], pairs) - block(x[kept], pairs)).abs().sum(1) > 0
    assert changed.tolist() == [True] * 2 + [False] * 9
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x[order], neighbours(line[order])), want[order])


def test_the_deploy_form_of_the_block() -> None:
    torch.manual_seed(0)
    block, pairs = SparseBlock(4), neighbours(cloud())
    x = images(len(cloud()), 4)
    block.train()
    for _ in range(3):
        block(x, pairs)
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        want = block.eval()(x, pairs)
        torch.testing.assert_close(block.fuse()(x, pairs), want, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in block.fuse().modules())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no centre"):
        neighbours(cloud(), 2)
    with pytest.raises(ValueError, match="no centre"):
        SubmanifoldConv3d(2, 2, 4)
    with pytest.raises(ValueError, match="of whole numbers"):
        neighbours(cloud().float())
    with pytest.raises(ValueError, match="twice"):
        neighbours(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="cannot be numbered"):
        neighbours(torch.tensor([[0, 0, 0, 0], [0, 2**31, 2**31, 2**31]]))
    with pytest.raises(ValueError, match="do not fit"):
        submanifold_conv(images(3, 2), images(27, 3, 2), None, neighbours(cloud()[:3]))
    with pytest.raises(ValueError, match="above 0"):
        voxelise(images(1, 3, 3), 0)
