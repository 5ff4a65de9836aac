"""Depthwise convolution along time: the definition, both forms, gradients, export, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lissom.ops import depthwise_conv1d as module
from lissom.ops.depthwise_conv1d import depthwise_conv1d
from tests.models.families import images


@pytest.mark.parametrize(("length", "taps"), [(1, 3), (7, 5), (9, 9), (5, 11), (10, 5), (11, 5)])
@pytest.mark.parametrize("reach", [0, 2, 100])
def test_both_forms_are_the_definition(length: int, taps: int, reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REACH", reach)
    x, weight, bias = (
        t.double().requires_grad_() for t in (images(2, 3, length), images(3, 1, taps, seed=1), images(3, seed=2))
    )
    want = F.conv1d(x, weight, bias, padding=taps // 2, groups=3)
    found = depthwise_conv1d(x, weight, bias)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(depthwise_conv1d(x, weight), want - bias[:, None])
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), (x, weight, bias)),
        torch.autograd.grad(want.square().sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradients() -> None:
    x, weight, bias = (
        t.double().requires_grad_() for t in (images(2, 2, 5), images(2, 1, 3, seed=1), images(2, seed=2))
    )
    assert torch.autograd.gradcheck(depthwise_conv1d, (x, weight, bias))


def test_an_exported_graph_holds_a_convolution() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return depthwise_conv1d(x, images(3, 1, 5, seed=1))

    x = images(2, 3, 6)
    program = torch.export.export(Layer(), (x,))
    assert any("conv1d" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), Layer()(x))


def test_refusals() -> None:
    for x, weight in (((2, 3, 6), (3, 1, 4)), ((2, 3, 6), (2, 1, 3)), ((2, 3), (3, 1, 3)), ((2, 3, 6), (3, 3, 3))):
        with pytest.raises(ValueError, match="K odd"):
            depthwise_conv1d(images(*x), images(*weight))
