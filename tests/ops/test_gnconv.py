"""gnConv and its filters: the recursion, its order, Fourier's identities, gradients, the published answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import nn

from lissom.ops.global_filter import GlobalLocalFilter, resized_filter, spectral_filter
from lissom.ops.gnconv import GnConv
from tests.models.families import check_fuse, check_operator, images, needs_parity


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_order_is_a_degree(order: int) -> None:
    """Without biases, an input twice as large gives an answer 2^(order + 1) times as large."""
    torch.manual_seed(0)
    module = GnConv(8, order).double()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    x = images(2, 8, 5, 7).double()
    torch.testing.assert_close(module(2 * x), 2 ** (order + 1) * module(x))


def test_the_recursion() -> None:
    torch.manual_seed(0)
    module = GnConv(8, 3, 0.5)
    assert module.dims == [2, 4, 8]
    x = images(2, 8, 5, 7)
    u = module.proj_in(x)
    f = 0.5 * module.dwconv(u[:, 2:])
    y = u[:, :2] * f[:, :2]
    y = module.pws[0](y) * f[:, 2:6]
    y = module.pws[1](y) * f[:, 6:]
    torch.testing.assert_close(module(x), module.proj_out(y))


def test_the_scale_folds() -> None:
    torch.manual_seed(0)
    fused = check_fuse(nn.Sequential(GnConv(8, 3)), images(2, 8, 5, 7), 1e-6)
    assert fused[0].scale == 1


@pytest.mark.parametrize(("dim", "order"), [(6, 3), (8, 0), (8, 5)])
def test_widths_that_cannot_be_halved(dim: int, order: int) -> None:
    with pytest.raises(ValueError, match="halves its width"):
        GnConv(dim, order)


def test_gradients() -> None:
    torch.manual_seed(0)
    module = GnConv(4, 2, spatial=partial(GlobalLocalFilter, h=3, w=2)).double()
    nn.init.normal_(module.dwconv.complex_weight)
    assert torch.autograd.gradcheck(module, (images(1, 4, 3, 5).double().requires_grad_(),))
    module = GnConv(4, 3).double()
    assert torch.autograd.gradcheck(module, (images(1, 4, 3, 5).double().requires_grad_(),))
    weight = images(2, 3, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: spectral_filter(images(1, 2, 3, 5).double(), w), (weight,))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 3)])
def test_a_kernels_transform_convolves_with_it(height: int, width: int) -> None:
    x, kernel = images(2, 3, height, width).double(), images(3, height, width, seed=1).double()
    found = spectral_filter(x, torch.view_as_real(torch.fft.rfft2(kernel)))
    want = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            want += kernel[:, i, j, None, None] * x.roll((i, j), (2, 3))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 1)])
def test_an_exported_filter_answers_the_same(height: int, width: int) -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(images(3, 3, 4, 2, seed=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return spectral_filter(x, self.weight)

    module, x = Filter(), images(2, 3, height, width)
    program = torch.export.export(module, (x,), strict=False)
    assert not any("fft" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_filters_are_resized_with_their_corners_kept() -> None:
    weight = images(2, 4, 3, 2)
    found = resized_filter(weight, 7, 5)
    assert found.shape == (2, 7, 5, 2)
    torch.testing.assert_close(found[:, ::6, ::4], weight[:, ::3, ::2])
    torch.testing.assert_close(found[:, ::2, ::2], weight)


def test_halves_are_joined_alternately() -> None:
    torch.manual_seed(0)
    module = GlobalLocalFilter(6, 5, 4)
    module.post_norm = nn.Identity()
    x = images(2, 6, 5, 7)
    near, far = module.pre_norm(x).chunk(2, 1)
    found = module(x)
    torch.testing.assert_close(found[:, ::2], module.dw(near))
    torch.testing.assert_close(found[:, 1::2], spectral_filter(far, module.complex_weight))


def test_short_numbers_are_transformed_in_float32() -> None:
    x, weight = images(1, 2, 4, 5).bfloat16(), images(2, 4, 3, 2, seed=1)
    found = spectral_filter(x, weight)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, spectral_filter(x.float(), weight).bfloat16())


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no halves"):
        GlobalLocalFilter(5)
    with pytest.raises(ValueError, match="are wanted"):
        spectral_filter(images(1, 3, 4, 4), images(2, 4, 3, 2))


@needs_parity
@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("op_global_local_filter", lambda: GlobalLocalFilter(12, 8, 5)),
        ("op_global_local_filter_resized", lambda: GlobalLocalFilter(12, 8, 5)),
        ("op_gnconv_o3", lambda: GnConv(32, 3)),
        ("op_gnconv_o4_gf", lambda: GnConv(32, 4, spatial=GlobalLocalFilter)),
    ],
)
def test_the_published_answers(name: str, empty: type[nn.Module]) -> None:
    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        module = empty()
        module.load_state_dict(dict(state))
        return module

    check_operator("hornet", name, build)
