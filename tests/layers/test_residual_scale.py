"""Scaled residuals: the formula, folding, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.layers.residual_scale import ResidualScale
from tests.models.families import check_fuse, images


def test_the_formula_and_its_folding() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 4, 1)))
    layer, x = ResidualScale(block, 0.3, nn.ReLU()), images(2, 4, 5, 7)
    want = (x + 0.3 * block(x)).relu()
    torch.testing.assert_close(layer(x), want)
    fused = check_fuse(nn.Sequential(layer), x)
    assert fused[0].scale == 1
    torch.testing.assert_close(fused(x), want)
    torch.testing.assert_close(layer.fold_scale_().fold_scale_()(x), want)


def test_blocks_that_end_in_something_else_stay_as_they_are() -> None:
    layer, x = ResidualScale(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 0.5), images(2, 3)
    assert layer.fuse() is layer
    torch.testing.assert_close(layer(x), x + 0.5 * layer.block(x))
    with pytest.raises(ValueError, match="does not end in"):
        layer.fold_scale_()
    for scale in (0.0, -0.1):
        with pytest.raises(ValueError, match="above 0"):
            ResidualScale(nn.Identity(), scale)


def test_gradients() -> None:
    layer = ResidualScale(nn.Linear(3, 3), 0.2, nn.Tanh()).double()
    assert torch.autograd.gradcheck(layer, images(2, 3).double().requires_grad_())
