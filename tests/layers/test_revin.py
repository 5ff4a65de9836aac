"""Reversible instance normalisation: its statistics, what undoes it, gradients."""

from __future__ import annotations

import torch

from lissom.layers.revin import RevIN
from tests.models.families import images


def test_each_series_loses_its_level_and_scale_and_gets_them_back() -> None:
    x = 5 * images(2, 9, 3) + torch.tensor([1.0, -20.0, 300.0])
    plain = RevIN(3, affine=False)
    y, (mean, deviation) = plain(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean[:, 0], x.mean(1))
    torch.testing.assert_close(plain.restore(y, (mean, deviation)), x)

    layer = RevIN(3)
    torch.nn.init.normal_(layer.affine_weight, 1, 0.2)
    torch.nn.init.normal_(layer.affine_bias)
    z, statistics = layer(x)
    torch.testing.assert_close(z, y * layer.affine_weight + layer.affine_bias)
    torch.testing.assert_close(layer.restore(z[:, :4], statistics), x[:, :4], rtol=1e-4, atol=1e-3)
    assert list(plain.parameters()) == []


def test_a_constant_series_is_a_series_of_zeros() -> None:
    y, statistics = RevIN(1)(torch.full((1, 4, 1), 7.0))
    assert torch.equal(y, torch.zeros(1, 4, 1))
    torch.testing.assert_close(RevIN(1).restore(torch.zeros(1, 2, 1), statistics), torch.full((1, 2, 1), 7.0))


def test_statistics_are_constants_to_the_gradient() -> None:
    layer = RevIN(2).double()
    x = images(2, 5, 2).double().requires_grad_()
    y, (_, deviation) = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (1 / deviation).expand_as(x))

    statistics = (images(2, 1, 2).double(), images(2, 1, 2, seed=1).double().abs() + 1)
    assert torch.autograd.gradcheck(lambda y: layer.restore(y, statistics), images(2, 3, 2).double().requires_grad_())
