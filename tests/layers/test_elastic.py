"""Elastic layers: slices, the chain of kernels, static forms that answer the same, statistics left alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticDepthwiseConv2d,
    ElasticLinear,
    ElasticSqueezeExcite,
    make_divisible,
    without_statistics,
)
from tests.models.families import PARITY, check_operator, images, needs_parity


def test_widths_are_rounded_to_eights() -> None:
    assert [make_divisible(v) for v in (4, 12, 20, 28.8, 240, 36.5, 92, 19.2)] == [8, 16, 24, 32, 240, 40, 96, 24]


@needs_parity
def test_published_rounding() -> None:
    assert PARITY is not None
    cases = json.loads((PARITY / "deps" / "cases.json").read_text())
    assert all(make_divisible(value) == rounded for value, rounded in cases["make_divisible"])


def test_static_forms_answer_the_same() -> None:
    torch.manual_seed(0)
    x = images(2, 6, 9, 7)
    convolution = ElasticConv2d(8, 16, 3, 2, 1)
    convolution.active_out = 10
    norm = ElasticBatchNorm2d(16).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    excite = ElasticSqueezeExcite(64)
    wide = images(2, 40, 5, 5)
    linear, row = ElasticLinear(12, 3), images(2, 7)
    with torch.no_grad():
        y = convolution(x)
        assert y.shape == (2, 10, 5, 4)
        assert torch.equal(y, convolution.static(6)(x))
        assert torch.equal(norm(y), norm.static(10).eval()(y))
        assert torch.equal(excite(wide), excite.static(40)(wide))
        assert torch.equal(linear(row), linear.static(7)(row))


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_kernels(kernel: int) -> None:
    torch.manual_seed(0)
    layer = ElasticDepthwiseConv2d(8, (3, 5, 7), 2)
    layer.active_kernel = kernel
    x = images(2, 6, 11, 8)
    edge = (7 - kernel) // 2
    with torch.no_grad():
        centre = layer.weight[:6, :, edge : 7 - edge, edge : 7 - edge]
        plain = nn.functional.conv2d(x, centre, None, 2, kernel // 2, groups=6)
        torch.testing.assert_close(layer(x), plain)  # identities
        for matrix in (layer.matrix_3, layer.matrix_5):
            nn.init.normal_(matrix, std=0.1)
        assert torch.equal(layer(x), layer.static(6)(x))
        assert torch.allclose(layer(x), plain) == (kernel == 7)


def test_the_smallest_kernel_goes_through_the_middle_one() -> None:
    layer = ElasticDepthwiseConv2d(4, (3, 5, 7))
    layer.active_kernel = 3
    layer.filters(4).sum().backward()
    assert layer.matrix_5.grad is not None
    assert layer.matrix_5.grad.abs().sum() > 0


@needs_parity
@pytest.mark.parametrize("kernel", [3])
def test_published_kernels(kernel: int) -> None:
    def build(state):
        layer = ElasticDepthwiseConv2d(16, (3, 5, 7))
        names = {"5to3_matrix": "matrix_3", "7to5_matrix": "matrix_5", "conv.weight": "weight"}
        layer.load_state_dict({names[key]: value for key, value in state.items()})
        layer.active_kernel = kernel
        return layer

    check_operator("deps", f"op_kernel_transform_k{kernel}", build)


def test_statistics_are_left_alone_and_gradients_are_not() -> None:
    x = images(4, 6, 3, 3)
    for norm in (ElasticBatchNorm2d(8), nn.BatchNorm2d(6)):
        before = {name: value.clone() for name, value in norm.state_dict().items()}
        with without_statistics(norm):
            y = norm(x)
        y.square().sum().backward()
        assert norm.weight.grad is not None
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)  # of the batch
        assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
        norm(x)
        assert norm.num_batches_tracked == 1
        assert not torch.equal(norm.running_mean, before["running_mean"])


def test_a_sliced_norm_updates_its_slice() -> None:
    norm, x = ElasticBatchNorm2d(8), images(4, 6, 3, 3)
    plain = nn.BatchNorm2d(6)
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm.running_mean[:6], plain.running_mean)
    assert norm.running_mean[6:].tolist() == [0, 0]
    norm.momentum = plain.momentum = None
    norm.reset_running_stats()
    plain.reset_running_stats()
    for _ in range(2):
        norm(x)
        plain(x)
    torch.testing.assert_close(norm.running_var[:6], plain.running_var)


def test_what_cannot_be() -> None:
    with pytest.raises(LissomError, match="odd"):
        ElasticDepthwiseConv2d(4, (3, 4))
    with pytest.raises(LissomError, match="no groups"):
        ElasticConv2d(4, 4, 3, groups=2)
