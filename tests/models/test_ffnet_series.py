"""FFNet for series: its mixers by their definition, the deploy form, export, a forecast of real temperatures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F

from lissom.data.series import ETT, read_series
from lissom.errors import LissomError
from lissom.models.ffnet_series import FFNetSeries, PatchStem, RepDepthwise1d, SeriesBlock
from tests.models.families import check_trains, count, images, settle, small

NARROW: dict[str, Any] = {"variables": 3, "lookback": 24, "horizon": 7, "dim": 4, "kernel_size": 9, "small_kernel": 3}
DATA = Path(os.environ["LISSOM_DATA"]) / "ett" / "ETTh1.csv" if "LISSOM_DATA" in os.environ else None
needs_data = pytest.mark.skipif(DATA is None, reason="LISSOM_DATA names no folder with ett")


def test_the_published_size() -> None:
    variables, dim, patches = 7, 64, 48
    whole = variables * dim
    tokens = dim * (2 * variables) * (variables + 1) + whole * (2 * dim + 1) + 2 * dim + 2 * whole * 52
    channels = whole * (51 + 5 + 4) + 2 * dim + variables * 2 * dim * (dim + 1) + whole * (2 * variables + 1)
    assert count("ffnet_series") == 2 * 7 + (4 * dim + dim) + 2 * dim + tokens + channels + (dim * patches + 1) * 96


def test_mixers_are_sums_over_variables_and_features() -> None:
    torch.manual_seed(0)
    block = SeriesBlock(3, 4, 9, 3, ratio=2)
    settle(block, images(8, 3, 4, 11))
    x = images(2, 3, 4, 11)
    # Each feature mixes the variables; mixture 2 m + j is copy j of variable m.
    y = torch.einsum("bmdn,dum->bdun", x, block.across.weight.view(4, 6, 3)) + block.across.bias.view(4, 6, 1)
    y = F.gelu(y).view(2, 4, 3, 2, 11).permute(0, 2, 1, 3, 4).reshape(2, 3, 8, 11)
    y = torch.einsum("bmkn,mdk->bmdn", y, block.within.weight.view(3, 4, 8)) + block.within.bias.view(3, 4, 1)
    y = block.norm1(y.flatten(0, 1)).view(2, 12, 11)
    y = F.conv1d(y, block.key.weight, block.key.bias, padding=4, groups=12)
    y = F.conv1d(F.gelu(y), block.value.weight, block.value.bias, padding=4, groups=12).view(2, 3, 4, 11)
    torch.testing.assert_close(block.tokens(x), y)

    y = block.norm2(block.conv(x.flatten(1, 2)).view(6, 4, 11)).view(2, 3, 4, 11)
    y = torch.einsum("bmdn,mkd->bmkn", y, block.fc1.weight.view(3, 8, 4)) + block.fc1.bias.view(3, 8, 1)
    y = F.gelu(y).view(2, 3, 4, 2, 11).permute(0, 2, 1, 3, 4).reshape(2, 4, 6, 11)
    y = torch.einsum("bdkn,dmk->bmdn", y, block.fc2.weight.view(4, 3, 6)) + block.fc2.bias.view(4, 3).T[..., None]
    torch.testing.assert_close(block.channels(x), y)
    torch.testing.assert_close(block(x), x + block.tokens(x) + block.channels(x + block.tokens(x)))


def test_patches_overlap_and_the_last_value_is_repeated() -> None:
    stem = PatchStem(4).eval()
    x = images(2, 3, 10)
    found = stem(x)
    assert found.shape == (2, 3, 4, 5)
    last = torch.cat([x[..., 8:], x[..., 9:], x[..., 9:]], 2)
    want = stem.bn(
        torch.einsum("bmk,dk->bmd", last, stem.conv.weight[:, 0]).add(stem.conv.bias).flatten(0, 1)[..., None]
    )
    torch.testing.assert_close(found[..., 4].flatten(0, 1), want[..., 0])
    assert PatchStem(4, 4, 3)(images(1, 1, 11)).shape[-1] == 3


@pytest.mark.parametrize(("lookback", "stride"), [(24, 2), (25, 2), (23, 3)])
def test_one_network_through_everything(lookback: int, stride: int) -> None:
    model = small("ffnet_series", **{**NARROW, "lookback": lookback, "stride": stride}, depth=2)
    x = images(4, lookback, 3)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    settle(model, x)
    with torch.no_grad():
        want = model(x)
        assert want.shape == (4, 7, 3)
        # Level and scale of every series pass through.
        level, scale = torch.tensor([3.0, -2.0, 5.0]), torch.tensor([2.0, 0.5, 4.0])
        torch.testing.assert_close(model(x * scale + level), want * scale + level, rtol=1e-3, atol=1e-3)
        fused = reparameterize_model(model)
        got = fused(x)
        assert (got - want).norm() <= 1e-4 * want.norm()
        assert not any(isinstance(m, nn.BatchNorm1d) for m in fused.modules())
        exported = torch.export.export(fused, (x,)).module()(x)
    torch.testing.assert_close(exported, got, rtol=1e-4, atol=1e-4)


def test_the_fused_network_runs_in_openvino() -> None:
    from tests.models.families import check_export

    model = small("ffnet_series", **NARROW)
    settle(model, images(8, 24, 3))
    check_export(reparameterize_model(model), images(1, 24, 3))


def test_two_branches_become_one_convolution() -> None:
    branches = RepDepthwise1d(3, 7, 3)
    settle(branches, images(4, 3, 12))
    x = images(2, 3, 12, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(branches.fuse()(x), branches(x))


def test_gradients() -> None:
    block = SeriesBlock(2, 2, 5, 3).double().eval()
    assert torch.autograd.gradcheck(block, images(1, 2, 2, 3).double().requires_grad_())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"series \(B, 24, 3\) are wanted"):
        small("ffnet_series", **NARROW)(images(2, 24, 4))
    for wrong, reason in (
        ({"kernel_size": 8}, "no centre"), ({"small_kernel": 9}, "no common centre"),
        ({"stride": 5}, "leave steps out"),
        ({"lookback": 1}, "cannot be forecast"), ({"horizon": 0}, "cannot be forecast"),
    ):  # fmt: skip
        with pytest.raises(LissomError, match=reason):
            small("ffnet_series", **{**NARROW, **wrong})


@pytest.mark.full
@needs_data
def test_real_temperatures_are_forecast() -> None:
    """A hundred steps on half a year, a network much smaller than the published one: better than keeping the last
    value, or the mean, of what was seen."""
    assert DATA is not None
    series = read_series(DATA).standardised(ETT.train)
    parts = series.divided(ETT, 48)
    seen, follows = (torch.from_numpy(part.copy()) for part in parts["train"].windows(48, 12))
    torch.manual_seed(0)
    model = FFNetSeries(7, 48, 12, dim=8, kernel_size=25, dropout=(0.0, 0.0))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(100):
        rows = torch.randint(len(seen), (32,))
        loss = F.mse_loss(model(seen[rows]), follows[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    seen, follows = (torch.from_numpy(part[::7].copy()) for part in parts["test"].windows(48, 12))
    model.eval()
    with torch.no_grad():
        error = F.mse_loss(model(seen), follows)
    kept, mean = (F.mse_loss(y.expand_as(follows), follows) for y in (seen[:, -1:], seen.mean(1, keepdim=True)))
    assert error < 0.8 * min(kept, mean)
