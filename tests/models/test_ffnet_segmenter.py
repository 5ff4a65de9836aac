"""FFNet's head for segmentation: its sum, odd sizes, any network before it, the deploy form, real road scenes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F

from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.models.factory import create_model
from lissom.models.ffnet_segmenter import FFNetHead
from lissom.tasks.segmentation import make_segmentation_task
from tests.models.families import check_export, check_fuse, check_trains, images, settle, small

NARROW: dict[str, Any] = {
    "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "stem_dim": 8, "head_dim": 8, "head_depth": 1, "num_classes": 5,
}  # fmt: skip


def test_the_head_by_its_parts() -> None:
    head = FFNetHead((4, 6, 8), 3, 16, 2)
    maps = [images(2, c, *size) for c, size in ((4, (9, 7)), (6, (5, 4)), (8, (3, 2)))]
    settle(head, maps)
    y = torch.cat([maps[0], *(F.interpolate(x, size=(9, 7), mode="bicubic") for x in maps[1:])], 1)
    y = head.squeeze(y)
    for block in head.blocks:
        y = F.gelu(y + block.token_mixer[0].main(y))
        y = F.gelu(y + block.channel_mixer.main(y))
    torch.testing.assert_close(head(maps), head.classifier(head.widen(y)))
    assert head.widen(y).shape == (2, 64, 9, 7)
    with pytest.raises(ValueError, match="channels are wanted"):
        head(maps[:2])


def test_one_network_through_everything() -> None:
    model = small("ffnet_segmenter", **NARROW, in_chans=1, drop_rate=0.1)
    x = images(2, 1, 45, 70)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    assert model.eval()(x).shape == (2, 5, 45, 70)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3, 45, 70)
    assert model.get_classifier().out_channels == 3
    for wrong in ((0, None), (3, "avg")):
        with pytest.raises(ValueError, match="map of classes"):
            model.reset_classifier(*wrong)
    with pytest.raises(LissomError, match="0 classes"):
        small("ffnet_segmenter", **{**NARROW, "num_classes": 0})
    assert model.default_cfg["input_size"] == (3, 512, 512)


def test_the_deploy_form_and_export() -> None:
    x = images(4, 3, 45, 70)
    fused = check_fuse(small("ffnet_segmenter", **NARROW), x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    check_export(reparameterize_model(fused), x[:1])


def test_the_head_behind_another_network() -> None:
    backbone = create_model("resnet10t", features_only=True, out_indices=(2, 3, 4)).eval()
    head = FFNetHead(backbone.feature_info.channels(), 3, 8, 1)
    assert head(backbone(images(2, 3, 67, 91))).shape == (2, 3, 9, 12)


@pytest.mark.full
@pytest.mark.skipif("LISSOM_DATA" not in os.environ, reason="LISSOM_DATA names no folder with camvid")
def test_real_road_scenes_are_segmented() -> None:
    """Eighty steps: far above naming the commonest class everywhere."""
    data = read(Path(os.environ["LISSOM_DATA"]) / "camvid")
    preprocessing = Preprocessing(96, 128, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "squash")
    task = make_segmentation_task(data, preprocessing=preprocessing, trained_here=True)
    torch.manual_seed(0)
    model = small("ffnet_segmenter", **{**NARROW, "dims": (16, 32, 32, 64), "head_dim": 32, "num_classes": 11})
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        rows = torch.randint(len(task.fit), (8,), generator=generator).numpy()
        x, y = torch.from_numpy(task.fit.inputs(rows)), torch.from_numpy(task.fit.labels[rows])
        loss = task.loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    rows = torch.arange(32).numpy()
    x, y = torch.from_numpy(task.choose.inputs(rows)), torch.from_numpy(task.choose.labels[rows])
    with torch.no_grad():
        answer = model.eval()(x).argmax(1)
    counted = y != 11
    right = (answer == y)[counted].float().mean()
    commonest = torch.bincount(y[counted]).max() / counted.sum()
    assert right > commonest + 0.15, f"{right:.1%} against {commonest:.1%}"
