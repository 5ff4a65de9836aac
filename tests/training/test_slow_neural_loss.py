"""The slow neural loss as a method: its terms by hand, a network that it trains, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lissom.errors import LissomError
from lissom.layers.slow_fast import SlowWidths
from lissom.models.factory import create_model
from lissom.registry import parts
from lissom.training.loop import fit
from lissom.training.methods.base import method_of
from lissom.training.methods.slow_neural_loss import SlowNeuralLoss, norm_penalty


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(
        "terminator_cifar", img_size=8, in_chans=1, num_classes=3, widths=(12, 12), global_layers=(1, 1),
        local_kernels=(3, 5, 3, 3), slow_widths=SlowWidths(8, 4, 4, 4, 8),
    )  # fmt: skip


def test_it_is_found_by_name() -> None:
    assert "slow_neural_loss" in {p.name for p in parts("method")}
    assert method_of("slow_neural_loss") == SlowNeuralLoss()


def test_the_terms(task) -> None:
    model = small().double().eval()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        logs = model(x).log_softmax(1)
        smooth = torch.full((6, 3), 0.09 / 3, dtype=torch.float64)
        smooth[torch.arange(6), y] += 1 - 0.09
        labels = float(-(smooth * logs).sum(1).mean())
        slow = float(model.slow_loss())
        fast, kernels = 0.0, 0.0
        for name, p in model.named_parameters():
            if "fast" in name and ".Kernel." not in name:
                fast += float(p.square().sum().sqrt())
            elif ".Kernel." in name and p.ndim == 4 and name.endswith("weight"):
                kernels += float(p.square().sum().sqrt())
        found = float(SlowNeuralLoss().loss(model, x, y, task))
        assert found == pytest.approx(labels + slow + 5e-5 * (fast + 1e-6 * kernels))
        other = SlowNeuralLoss(weight=0.5, smoothing=0.0, penalty=2.0, kernel_penalty=3.0).loss(model, x, y, task)
        plain = float(task.loss(model(x), y))
        assert float(other) == pytest.approx(plain + 0.5 * slow + 2 * (fast + 3 * kernels))
        assert float(SlowNeuralLoss(0.0, 0.0, 0.0, 0.0).loss(model, x, y, task)) == pytest.approx(plain)
        assert fast > 1
        assert kernels > 1
    assert float(norm_penalty(torch.nn.Linear(2, 2))) == 0  # nothing there is fast or slow
    model.requires_grad_(False)
    assert float(norm_penalty(model)) == 0


def test_it_trains(task) -> None:
    model = small()
    before = float(model.slow_loss().detach())
    # The published rate; AdamW's decay has no place beside the penalty.
    result = fit(model, task, method="slow_neural_loss", optimizer="kar3", epochs=3, batch=32, weight_decay=0.0)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert float(model.slow_loss().detach()) < before


def test_what_is_refused(task, network) -> None:
    with pytest.raises(LissomError, match="slow_loss"):
        fit(network(), task, method="slow_neural_loss", epochs=1)
    blind = task.with_splits(**{s: replace(getattr(task, s), labels=None) for s in ("fit", "choose", "report")})
    with pytest.raises(LissomError, match="the data have none"):
        fit(small(), blind, method="slow_neural_loss", epochs=1)
    with pytest.raises(LissomError, match="segmentation"):
        SlowNeuralLoss().prepare(small(), replace(task, kind="segmentation"))
    for settings in ({"weight": -1.0}, {"smoothing": 1.0}, {"penalty": -1.0}, {"kernel_penalty": float("nan")}):
        with pytest.raises(LissomError, match=next(iter(settings))):
            SlowNeuralLoss(**settings)
