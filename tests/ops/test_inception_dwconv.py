"""Inception depthwise convolution: its branches, its dense form, its gradients, the published answer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional as F

from lissom.ops.inception_dwconv import InceptionDWConv2d
from tests.models.families import check_operator, images, needs_parity


def drawn(*sizes: int, **more: float) -> InceptionDWConv2d:
    torch.manual_seed(0)
    return InceptionDWConv2d(*sizes, **more)


def test_the_first_channels_pass_and_the_rest_meet_their_kernels_in_order() -> None:
    module = drawn(20, ratio=0.2)
    x = images(2, 20, 5, 9)
    found = module(x)
    assert found.shape == x.shape
    assert torch.equal(found[:, :8], x[:, :8])
    for start, layer, size in (
        (8, module.dwconv_hw, (3, 3)),
        (12, module.dwconv_w, (1, 11)),
        (16, module.dwconv_h, (11, 1)),
    ):
        assert layer.kernel_size == size
        assert torch.equal(found[:, start : start + 4], layer(x[:, start : start + 4]))


def test_the_published_count() -> None:
    assert sum(p.numel() for p in InceptionDWConv2d(96).parameters()) == 12 * (9 + 11 + 11 + 3)
    assert InceptionDWConv2d(20).split == [14, 2, 2, 2]  # cut, not rounded; the identity takes the rest


@pytest.mark.parametrize(("square", "band", "dilation"), [(3, 11, 1), (5, 3, 1), (3, 5, 2)])
def test_one_dense_kernel_answers_the_same(square: int, band: int, dilation: int) -> None:
    module = drawn(16, square, band, 0.25, dilation)
    weight, bias = module.to_dense_kernel()
    x = images(2, 16, 7, 12)
    padding = dilation * (weight.shape[-1] // 2)
    dense = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=16)
    torch.testing.assert_close(module(x), dense, rtol=1e-5, atol=1e-5)


def test_gradients() -> None:
    module = drawn(5, 3, 5, ratio=0.2).double()
    assert torch.autograd.gradcheck(module, (images(1, 5, 3, 5).double().requires_grad_(),))


@pytest.mark.parametrize(
    ("sizes", "match"), [((7,), "shares of 0"), ((8, 3, 11, 0.5), "shares of 4"), ((16, 2), "odd"), ((16, 3, 4), "odd")]
)
def test_sizes_that_cannot_be(sizes: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        InceptionDWConv2d(*sizes)


@needs_parity
def test_the_published_answer() -> None:
    def build(state: Mapping[str, torch.Tensor]) -> InceptionDWConv2d:
        module = InceptionDWConv2d(40)
        module.load_state_dict(dict(state))
        return module

    check_operator("inceptionnext", "op_inception_dwconv", build)
