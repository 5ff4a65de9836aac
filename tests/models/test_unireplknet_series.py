"""UniRepLKNet for series: published sizes, tokens, classes and forecasts, the merged form, real series and sounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F

from lissom.data.series import ETT, read_series
from lissom.data.sounds import Sounds, read_sounds
from lissom.errors import LissomError
from lissom.models.factory import create_model
from lissom.ops.as_images import audio_to_image
from tests.models.families import check_export, check_trains, count, images, settle, small

SIZES: dict[str, Any] = {"dims": (8, 8, 16), "depths": (1, 1, 1), "kernel_sizes": (3, 7, 7), "ls_init_value": 0.1}
NARROW: dict[str, Any] = {"channels": 3, "lookback": 24, "dim": 24, **SIZES}
FOLDER = Path(os.environ["LISSOM_DATA"]) if "LISSOM_DATA" in os.environ else None
needs_data = pytest.mark.skipif(FOLDER is None, reason="LISSOM_DATA names no folder with ett and spoken_digits")


def test_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.models.unireplknet.trunc_normal_", lambda *a, **k: None)  # slow, and not needed here
    with torch.device("meta"):
        model = create_model("unireplknet_series", time_features=4, place_features=33, published=True)
    assert model.image(torch.zeros(1, 48, 11, device="meta"), torch.zeros(1, 48, 4, device="meta"),
                       torch.zeros(1, 33, device="meta")).shape == (1, 1, 192, 192)  # fmt: skip
    assert [block.dwconv.kernel_size for block in model.network.stages[3]] == [11] * 3
    tokens = model(torch.zeros(1, 48, 11, device="meta"), torch.zeros(1, 48, 4, device="meta"),
                   torch.zeros(1, 33, device="meta"))  # fmt: skip
    assert tokens.shape == (1, 36, 768)
    # The stem reads one channel, the last stage has kernels of 11 with as many branches; neither norm nor head.
    stages = count("unireplknet_s", in_chans=1, kernel_sizes=(3, 13, (13, 3, 3), 11), num_classes=0) - 2 * 768
    assert sum(p.numel() for p in model.parameters()) == stages + 2 * 11 + 3 * 11 * 768 + 4 * 768 + 34 * 768


def test_tokens_are_positions_or_the_published_scramble() -> None:
    plain, published = (small("unireplknet_series", **NARROW, published=flag).eval() for flag in (False, True))
    x = images(2, 24, 3)
    with torch.no_grad():
        tokens, scrambled = plain(x), published(x)
    assert tokens.shape == scrambled.shape == (2, 4, 16)
    assert torch.equal(scrambled.flatten(1), tokens.transpose(1, 2).flatten(1))


def test_a_forecast_is_on_the_series_own_scale() -> None:
    model = small("unireplknet_series", **NARROW, horizon=5)
    x = images(4, 24, 3)
    check_trains(model, x)
    model.set_grad_checkpointing()
    check_trains(model, x)
    settle(model, x)
    level, scale = torch.tensor([3.0, -2.0, 5.0]), torch.tensor([2.0, 0.5, 4.0])
    with torch.no_grad():
        want = model(x)
        assert want.shape == (4, 5, 3)
        torch.testing.assert_close(model(x * scale + level), want * scale + level, rtol=1e-3, atol=1e-2)
        merged = reparameterize_model(model)
        assert (merged(x) - want).norm() <= 1e-4 * want.norm()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert merged.get_classifier().out_features == 15
    check_export(merged, x[:1])
    with pytest.raises(ValueError, match="has no classes"):
        model.reset_classifier(3)


def test_classes_of_series() -> None:
    model = small("unireplknet_series", **NARROW, num_classes=4)
    x = images(3, 24, 3)
    check_trains(model, x)
    assert model.eval()(x).shape == (3, 4)
    model.reset_classifier(7)
    assert model(x).shape == (3, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(x).shape == (3, 16)


def test_refusals() -> None:
    with pytest.raises(LissomError, match="6 times a square number"):
        small("unireplknet_series", **{**NARROW, "dim": 25})
    with pytest.raises(LissomError, match="not both"):
        small("unireplknet_series", **NARROW, horizon=5, num_classes=2)
    with pytest.raises(ValueError, match=r"series \(B, 24, 3\) are wanted"):
        small("unireplknet_series", **NARROW)(images(1, 3, 24))


# Real series and sounds


def steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor, count: int, rate: float, batch: int = 32) -> None:
    """``count`` steps of Adam with one cycle of its rate; cross-entropy of classes, squared error of forecasts."""
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, count)
    model.train()
    for _ in range(count):
        rows = torch.randint(len(x), (batch,))
        loss = (F.cross_entropy if y.ndim == 1 else F.mse_loss)(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


def digits() -> tuple[Sounds, np.ndarray, np.ndarray]:
    """The sounds, the rows of training and those of the test (takes 0 to 4)."""
    assert FOLDER is not None
    sounds = read_sounds(FOLDER / "spoken_digits" / "all.parquet")
    held = sounds.labels["take"] < 5
    return sounds, np.flatnonzero(~held), np.flatnonzero(held)


def energies(sounds: Sounds, rows: np.ndarray) -> torch.Tensor:
    """40 mel bins of 48 frames: half a second at 8 kHz, (B, 1, 40, 48)."""
    return audio_to_image(torch.from_numpy(sounds.padded(rows, 3960)), 48, (-7.0, 4.0), sounds.rate, 40)


@pytest.mark.full
@needs_data
def test_real_temperatures_are_forecast() -> None:
    """Eighty steps: better than keeping the last value, or the mean, of what was seen."""
    assert FOLDER is not None
    series = read_series(FOLDER / "ett" / "ETTh1.csv").standardised(ETT.train)
    parts = series.divided(ETT, 48)
    seen, follows = (torch.from_numpy(part.copy()) for part in parts["train"].windows(48, 12))
    torch.manual_seed(0)
    model = create_model("unireplknet_series", **{**NARROW, "channels": 7, "lookback": 48, "dim": 12}, horizon=12)
    steps(model, seen, follows, 80, 5e-3, 16)
    seen, follows = (torch.from_numpy(part[::7].copy()) for part in parts["test"].windows(48, 12))
    with torch.no_grad():
        error = F.mse_loss(model(seen), follows)
    kept, mean = (F.mse_loss(y.expand_as(follows), follows) for y in (seen[:, -1:], seen.mean(1, keepdim=True)))
    assert error < 0.8 * min(kept, mean)


@needs_data
def test_real_sounds_have_the_networks_shapes() -> None:
    sounds, fit, held = digits()
    assert (sounds.rate, len(fit), len(held)) == (8000, 2700, 300)
    images_ = energies(sounds, held[:4])
    assert images_.shape == (4, 1, 40, 48)
    assert images_.std() > 0.1
    model = create_model("unireplknet_a", in_chans=1, num_classes=10, **SIZES)
    assert model(images_).shape == (4, 10)
    series = create_model("unireplknet_series", **{**NARROW, "channels": 40, "lookback": 48, "dim": 48}, num_classes=10)
    assert series(images_[:, 0].transpose(1, 2)).shape == (4, 10)


@needs_data
@pytest.mark.full
@pytest.mark.parametrize("front", ["audio", "series"])
def test_spoken_digits_are_told_apart(front: str) -> None:
    """Both front ends, other takes of the same six speakers; chance is 10 %."""
    sounds, fit, held = digits()
    x, test = energies(sounds, fit), energies(sounds, held)
    y, wanted = (torch.from_numpy(sounds.labels["digit"][rows]) for rows in (fit, held))
    torch.manual_seed(0)
    if front == "audio":
        model = create_model("unireplknet_a", in_chans=1, num_classes=10, **SIZES)
    else:
        model = create_model(
            "unireplknet_series", **{**NARROW, "channels": 40, "lookback": 48, "dim": 48}, num_classes=10
        )
        x, test = (part[:, 0].transpose(1, 2) for part in (x, test))
    steps(model, x, y, 200, 1e-2)
    with torch.no_grad():
        right = (model(test).argmax(1) == wanted).float().mean()
    assert right > (0.8 if front == "audio" else 0.5), f"{right:.1%}"
