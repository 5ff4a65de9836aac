"""HorFPN: its sums and order, any network before it, odd sizes, gradients, the deploy form, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.layers.horfpn import HorFPN
from lissom.models.factory import create_model
from lissom.ops.global_filter import GlobalLocalFilter
from lissom.ops.gnconv import GnConv
from tests.models.families import check_trains, images, settle

SIZES = [(13, 10), (7, 5), (3, 2)]
GLOBAL = partial(GlobalLocalFilter, h=5, w=3)


def pyramid(*channels: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [images(2, c, *size, seed=i).to(dtype) for i, (c, size) in enumerate(zip(channels, SIZES, strict=True))]


class Neck(nn.Module):
    """Three maps out of one tensor, so that what is asked of networks can be asked of the neck."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, c, 3, 2 << i, 1) for i, c in enumerate((4, 6, 8)))
        self.neck = HorFPN((4, 6, 8), 8, **arguments)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.neck([conv(x) for conv in self.convs])


@pytest.mark.parametrize("spatial", [None, GLOBAL])
def test_sums_come_down_and_are_smoothed(spatial: Any) -> None:
    torch.manual_seed(0)
    neck, maps = HorFPN((4, 6, 8), 8, spatial), pyramid(4, 6, 8)
    found = neck(maps)
    assert [tuple(x.shape) for x in found] == [(2, 8, *size) for size in SIZES]
    sums = [lateral(x) for lateral, x in zip(neck.lateral_convs, maps, strict=True)]
    rows = [[[int(i * (small / side)) for i in range(side)] for small, side in zip(SIZES[k + 1], SIZES[k], strict=True)]
            for k in (0, 1)]  # fmt: skip
    sums[1] = sums[1] + sums[2][:, :, rows[1][0]][..., rows[1][1]]
    sums[0] = sums[0] + sums[1][:, :, rows[0][0]][..., rows[0][1]]
    for smooth, x, y in zip(neck.fpn_convs, sums, found, strict=True):
        assert smooth[0].scale == 1
        assert smooth[0].dims == [4, 8]
        torch.testing.assert_close(smooth(x), y)


def test_what_stands_behind_and_coarser_maps() -> None:
    neck = HorFPN((4, 6, 8), 8, norm=nn.BatchNorm2d, act=nn.ReLU, extra_levels=2, project=False)
    found = neck(pyramid(4, 6, 8))
    assert [tuple(x.shape[2:]) for x in found] == [*SIZES, (2, 1), (1, 1)]
    assert torch.equal(found[3], found[2][..., ::2, ::2])
    assert min(x.min() for x in found) == 0
    assert isinstance(neck.fpn_convs[0][0].proj_out, nn.Identity)


def test_a_gated_convolution_may_change_its_width() -> None:
    torch.manual_seed(0)
    module = GnConv(6, 3, 1.0, out_dim=8)
    assert (module.proj_in.weight.shape[:2], module.dims) == ((16, 6), [2, 4, 8])
    x = images(1, 6, 5, 7)
    assert module(x).shape == (1, 8, 5, 7)
    plain = GnConv(6, 3, 1.0, out_dim=8, project=False)
    plain.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(module.proj_out(plain(x)), module(x))
    with pytest.raises(ValueError, match="6 channels do not allow"):
        GnConv(8, 3, out_dim=6)


@pytest.mark.parametrize("spatial", [None, GLOBAL])
def test_gradients(spatial: Any) -> None:
    torch.manual_seed(0)
    neck = HorFPN((2, 4), 4, spatial).double()
    maps = [images(1, 2, 5, 4).double().requires_grad_(), images(1, 4, 3, 2).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: tuple(neck(x)), maps)
    check_trains(Neck(spatial=spatial, norm=nn.BatchNorm2d), images(2, 4, 17, 23))


def test_the_deploy_form_and_export() -> None:
    from lissom.techniques.fuse import fold_batch_norm

    torch.manual_seed(0)
    model, x = Neck(norm=nn.BatchNorm2d, act=nn.GELU, scale=0.5), images(2, 4, 17, 23)
    settle(model, x)
    with torch.no_grad():
        want = model(x)
        fused = reparameterize_model(model)
        assert fold_batch_norm(fused, tuple(x.shape[1:])) == 3
        got = fused(x)
        exported = torch.export.export(fused, (x,)).module()(x)
    for a, b, c in zip(want, got, exported, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize(
    ("name", "arguments", "channels_last"),
    [
        ("resnet10t", {}, False),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2),
                                          "img_size": 64, "window_size": 2}, True),
        ("hornet_tiny_gf", {"dim": 8, "depths": (1, 1, 1, 1)}, False),
    ],
)  # fmt: skip
def test_behind_any_network(name: str, arguments: dict[str, Any], channels_last: bool) -> None:
    build = create_model if name.startswith("hornet") else timm.create_model
    backbone = build(name, features_only=True, **arguments).eval()
    neck = HorFPN(backbone.feature_info.channels(), 8, channels_last=channels_last)
    x = images(1, 3, 64, 64) if channels_last else images(1, 3, 67, 91)
    maps = backbone(x)
    found = neck(maps)
    assert len(found) == len(maps)
    sides = slice(1, 3) if channels_last else slice(2, 4)
    assert [y.shape[2:] for y in found] == [m.shape[sides] for m in maps]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="make no pyramid"):
        HorFPN(())
    with pytest.raises(ValueError, match="halves its width"):
        HorFPN((4,), 7)
    neck = HorFPN((4, 6, 8), 8)
    for maps in (pyramid(4, 6, 7), pyramid(4, 6, 8)[:2], [x.permute(0, 2, 3, 1) for x in pyramid(4, 6, 8)]):
        with pytest.raises(ValueError, match="channels_last=True"):
            neck(maps)
