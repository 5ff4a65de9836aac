"""TVConv: its definition, what it is where its kernels are plain, its gradients, folding, the published answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.tvconv import (
    SpatiallyVariantDepthwise,
    TVConv2d,
    fold_tvconv_,
    spatially_variant_depthwise,
    to_tvconv,
)
from tests.models.families import check_export, check_operator, images, needs_parity, settle


def definition(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """By patches of the whole input."""
    channels, k, _, h, w = weight.shape
    patches = functional.unfold(x, k, padding=k // 2, stride=stride).reshape(len(x), channels, k * k, h, w)
    return (patches * weight.reshape(channels, k * k, h, w)).sum(2)


@pytest.mark.parametrize(
    ("shape", "k", "stride", "grid"),
    [
        ((2, 3, 9, 7), 3, 1, (9, 7)),
        ((2, 3, 9, 8), 3, 2, (5, 4)),
        ((1, 4, 6, 11), 5, 1, (6, 11)),
        ((3, 2, 7, 7), 5, 3, (3, 3)),
    ],
)
def test_definition(shape: tuple[int, ...], k: int, stride: int, grid: tuple[int, int]) -> None:
    x, weight = images(*shape), images(shape[1], k, k, *grid, seed=1)
    want = definition(x, weight, stride)
    torch.testing.assert_close(spatially_variant_depthwise(x, weight, None, stride), want)
    bias = images(shape[1], *grid, seed=2)
    torch.testing.assert_close(spatially_variant_depthwise(x, weight, bias, stride), want + bias)


def test_one_kernel_everywhere_is_a_depthwise_convolution() -> None:
    x, kernel = images(2, 3, 8, 6), images(3, 1, 3, 3, seed=1)
    weight = kernel[:, 0, :, :, None, None].expand(3, 3, 3, 8, 6)
    want = functional.conv2d(x, kernel, padding=1, groups=3)
    torch.testing.assert_close(spatially_variant_depthwise(x, weight), want)
    centre = torch.zeros(3, 3, 3, 8, 6)
    centre[:, 1, 1] = 1
    assert torch.equal(spatially_variant_depthwise(x, centre), x)


def test_gradients() -> None:
    x = images(2, 2, 5, 4).double().requires_grad_()
    weight, bias = (images(*s, seed=1).double().requires_grad_() for s in ((2, 3, 3, 3, 2), (2, 3, 2)))
    assert torch.autograd.gradcheck(lambda *a: spatially_variant_depthwise(*a, 2), (x, weight, bias))
    layer = TVConv2d(2, (3, 4), affinity=2, hidden=3, layers=1, bias=True).double()
    nn.init.normal_(layer.posi_map)

    def answer(maps: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"posi_map": maps}, (x,))

    maps = layer.posi_map.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(answer, (maps, images(1, 2, 3, 4).double().requires_grad_()))


def test_places_matter_and_images_do_not() -> None:
    torch.manual_seed(0)
    layer = TVConv2d(4, (8, 8), hidden=8, layers=1)
    nn.init.normal_(layer.posi_map)
    x = images(2, 4, 8, 8)
    with torch.no_grad():
        moved = layer(x.roll(1, -1)).roll(-1, -1)
        assert not torch.allclose(moved[..., 2:-2, 2:-2], layer(x)[..., 2:-2, 2:-2])
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_parameters() -> None:
    c, m, a, k, h, w, depth = 6, 8, 4, 3, 5, 7, 2
    layer = TVConv2d(c, (h, w), k, affinity=a, hidden=m, layers=depth)
    count = a * h * w + 9 * a * m + 9 * depth * m * m + (depth + 1) * 2 * m * h * w + 9 * m * k * k * c
    assert sum(p.numel() for p in layer.parameters()) == count


@pytest.mark.parametrize("bias", [False, True])
def test_folded_it_answers_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    layer = TVConv2d(3, (5, 4), stride=2, hidden=8, layers=1, bias=bias)
    nn.init.normal_(layer.posi_map)
    net = nn.Sequential(layer, nn.ReLU())
    x = images(2, 3, 10, 7)
    with torch.no_grad():
        want = net(x)
        folded = fold_tvconv_(net)
        assert isinstance(folded[0], SpatiallyVariantDepthwise)
        torch.testing.assert_close(folded(x), want)
        assert isinstance(fold_tvconv_(layer), SpatiallyVariantDepthwise)
    assert not list(folded.parameters())


def test_the_folded_form_is_exported() -> None:
    torch.manual_seed(0)
    layer = TVConv2d(3, (6, 5), hidden=8, layers=1, bias=True)
    check_export(nn.Sequential(layer.fold(), nn.ReLU()), images(1, 3, 6, 5))


def test_sizes_that_do_not_fit() -> None:
    layer = TVConv2d(3, (5, 5), stride=2, hidden=4)
    with pytest.raises(ValueError, match=r"5 x 5 do not fit an input of 12 x 9, whose output at stride 2 is 6 x 5"):
        layer(images(1, 3, 12, 9))
    with pytest.raises(ValueError, match="odd"):
        TVConv2d(3, (5, 5), 4)


def test_a_users_network_gets_it() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 1, 1),
        nn.Conv2d(6, 6, 5, 1, 2, groups=6), nn.Conv2d(6, 12, 3, 1, 1, groups=6),
    )  # fmt: skip
    changed = to_tvconv(net, images(1, 3, 11, 8), hidden=4, layers=0)
    kinds = [type(m) for m in changed]
    assert kinds == [nn.Conv2d, TVConv2d, nn.BatchNorm2d, nn.Conv2d, TVConv2d, nn.Conv2d]
    assert (changed[1].size, changed[4].size) == ((6, 4), (6, 4))
    assert changed[4].bias_layers is not None
    assert changed.training
    assert type(net[1]) is nn.Conv2d
    x = images(2, 3, 11, 8)
    assert changed(x).shape == net(x).shape
    settle(changed, x)
    changed.eval()
    with torch.no_grad():
        want = changed(x)
        torch.testing.assert_close(fold_tvconv_(changed)(x), want)


def test_networks_that_cannot_get_it() -> None:
    with pytest.raises(LissomError, match="no depthwise"):
        to_tvconv(nn.Sequential(nn.Conv2d(3, 3, 3)), images(1, 3, 8, 8))
    shared = nn.Conv2d(3, 3, 3, 1, 1, groups=3)
    with pytest.raises(LissomError, match="several sizes"):
        to_tvconv(nn.Sequential(shared, nn.MaxPool2d(2), shared), images(1, 3, 8, 8))


@needs_parity
def test_published_answer() -> None:
    def build(state: dict[str, torch.Tensor]) -> nn.Module:
        layer = TVConv2d(6, (5, 7), 3, 2, affinity=4, hidden=16, layers=1, bias=True)
        layer.load_state_dict(state)
        return layer

    check_operator("tvconv", "op_tvconv", build)
