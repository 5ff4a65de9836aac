"""Cut points found in exported graphs, and the sentence for a place where no cut is possible."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.cuts import check_cut, cut_points


class Bypassed(nn.Module):
    """The second layer's output is added to the input again, past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.third = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x))
        return self.third(y + x).mean((2, 3))


def test_a_chain_can_be_cut_everywhere_but_at_its_end() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))
    points = cut_points(model, (3, 8, 8))
    assert [p.path for p in points] == ["0", "1", "2", "3"]
    assert [p.shape for p in points] == [(4, 6, 6), (4, 6, 6), (4, 4, 4), (64,)]
    # 36 * 108, 16 * 144 and 128 multiplications.
    assert [p.done for p in points] == pytest.approx([3888 / 6320, 3888 / 6320, 6192 / 6320, 6192 / 6320])


def test_a_residual_block_is_cut_behind_and_not_inside() -> None:
    model = timm.create_model("resnet18").eval()
    paths = [p.path for p in cut_points(model, (3, 64, 64))]
    assert {"layer1.0", "layer1", "layer2", "layer3", "layer4"} <= set(paths)
    assert not any("conv1" in p for p in paths if p.startswith("layer"))
    done = [p.done for p in cut_points(model, (3, 64, 64))]
    assert done == sorted(done)


def test_what_leads_past_a_cut_is_named() -> None:
    model = Bypassed()
    assert [p.path for p in cut_points(model, (3, 8, 8))] == ["third"]
    with pytest.raises(NotApplicable, match=r"cannot be cut behind 'second': .* the model's own forward > third"):
        check_cut(model, (3, 8, 8), "second")
    assert check_cut(model, (3, 8, 8), "third").path == "third"


def test_places_that_are_none() -> None:
    model = Bypassed()
    for path in ("fourth", ""):
        with pytest.raises(NotApplicable, match="no module"):
            check_cut(model, (3, 8, 8), path)
    model.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(NotApplicable, match="never called"):
        check_cut(model, (3, 8, 8), "unused")


def test_hrnet_is_refused_with_the_way_around() -> None:
    model = timm.create_model("hrnet_w18_small").eval()
    with pytest.raises(NotApplicable, match="hands on 2 tensors"):
        check_cut(model, (3, 64, 64), "stage2.0")
    # The second resolution's branch alone: the first goes on beside it.
    with pytest.raises(NotApplicable, match=r"cannot be cut behind 'stage2.0.branches.1': .* stage2\.0\.fuse"):
        check_cut(model, (3, 64, 64), "stage2.0.branches.1")
