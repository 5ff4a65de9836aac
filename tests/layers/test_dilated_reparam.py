"""The Dilated Reparam Block: kernels expanded and merged, gradients, the merged form's answers, published figures."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from lissom.layers.dilated_reparam import BRANCHES, DilatedReparamBlock, dense_kernel, merge_kernels
from tests.models.families import check_operator, fixture, images, needs_parity, parity, settle


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (3, 5), (5, 3), (2, 3)])
def test_a_dilated_kernel_is_a_dense_one_with_zeros(size: int, dilation: int) -> None:
    x, kernel = images(2, 3, 17, 19).double(), images(4, 3, size, size, seed=1).double()
    dense = dense_kernel(kernel, dilation)
    assert dense.shape[-1] == dilation * (size - 1) + 1
    assert torch.allclose(F.conv2d(x, kernel, dilation=dilation), F.conv2d(x, dense))
    with pytest.raises(ValueError, match="under 1"):
        dense_kernel(kernel, 0)


def test_kernels_merge_on_one_centre() -> None:
    x, large, small = images(1, 2, 9, 8).double(), images(2, 1, 7, 7).double(), images(2, 1, 3, 3, seed=1).double()
    want = F.conv2d(x, large, padding=3, groups=2) + F.conv2d(x, small, padding=2, dilation=2, groups=2)
    assert torch.allclose(F.conv2d(x, merge_kernels(large, small, 2), padding=3, groups=2), want)
    for size, dilation in ((3, 4), (2, 1)):
        with pytest.raises(ValueError, match="no place in the middle"):
            merge_kernels(large, images(2, 1, size, size).double(), dilation)
    large.requires_grad_()
    small.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: merge_kernels(a, b, 3), (large, small))


@pytest.mark.parametrize("size", BRANCHES)
def test_the_merged_block_answers_alike(size: int) -> None:
    block = DilatedReparamBlock(3, size)
    assert all(dilation * (k - 1) + 1 <= size for k, dilation in block.branches)
    x = images(4, 3, 10, 7)
    settle(block, x)
    merged = copy.deepcopy(block)
    merged.reparameterize()
    merged.reparameterize()  # nothing more happens
    with torch.no_grad():
        want = block(x)
        assert (merged(x) - want).norm() <= 1e-5 * want.norm()
    built = DilatedReparamBlock(3, size, deploy=True)
    built.load_state_dict(merged.state_dict())
    assert torch.equal(built.merge()[0], merged.merge()[0])


def test_own_branches_and_gradients() -> None:
    block = DilatedReparamBlock(2, 7, branches=[(3, 3)]).double()
    x = images(2, 2, 5, 3).double().requires_grad_()
    # The norms' running statistics change with every call in training; the batch's own do not depend on them.
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradcheck(block.eval(), x)
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(
    ("size", "branches", "reason"),
    [
        (6, None, "no branches are known"),
        (19, None, "no branches are known"),
        (6, [(3, 1)], "no centre"),
        (7, [(3, 4)], "does not fit"),
        (7, [(4, 1)], "does not fit"),
    ],
)
def test_refusals(size: int, branches: list[tuple[int, int]] | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DilatedReparamBlock(2, size, branches)


@needs_parity
@pytest.mark.parametrize(("size", "channels"), [(7, 6), (13, 8)])
def test_published_figures(size: int, channels: int) -> None:
    def build(state: dict[str, torch.Tensor]) -> DilatedReparamBlock:
        block = DilatedReparamBlock(channels, size)
        block.load_state_dict(state)
        return block

    def merged(state: dict[str, torch.Tensor]) -> DilatedReparamBlock:
        block = build(state).eval()
        block.reparameterize()
        return block

    check_operator("unireplknet", f"op_dilated_reparam_k{size}", build)
    check_operator("unireplknet", f"op_dilated_reparam_k{size}", merged)


@needs_parity
def test_published_kernels() -> None:
    own = parity()
    for case in fixture("unireplknet", "cases")["cases"]:
        kernel, large = own.make_input((2, 1, 3, 3), "kernel"), own.make_input((2, 1, 13, 13), "large")
        assert own.close(own.digest(dense_kernel(kernel, case["rate"])), case["dilated"])
        assert own.close(own.digest(merge_kernels(large, kernel, case["rate"])), case["merged"])
