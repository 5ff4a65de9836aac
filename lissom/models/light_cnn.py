"""Light CNN: a classifier of under 20,000 parameters, made of two that were trained apart (arXiv 2501.15547).

The paper's table of layers is not at hand. This design has its number of parameters, 14,862 for grey images of 28 x 28,
and is not claimed to be its network. Train two submodels at once (``dual_light_cnn``, method ``dual_input``), join them
(``DualModel.merge``), and fine-tune from the head backwards (``fit_unfreezing`` with ``light_cnn_groups``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from lissom.layers.dual import DualModel, MergedTrunks

__all__ = ["LightCNN", "LightTrunk", "dual_light_cnn", "light_cnn_groups"]

WIDTHS, DENSE = (12, 18, 28), 20


class LightTrunk(nn.Module):
    """Three 3 x 3 convolutions with ReLU and 2 x 2 maximum pooling, their mean, a linear layer with ReLU.

    (B, in_chans, H, W) -> (B, dense); at least 8 pixels a side.
    """

    def __init__(self, in_chans: int = 1, widths: Sequence[int] = WIDTHS, dense: int = DENSE) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_chans, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.dense = nn.Linear(third, dense)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = self.pool(torch.relu(convolution(x)))
        return torch.relu(self.dense(x.mean((2, 3))))


class LightCNN(MergedTrunks):
    """Two trunks under one head: (B, in_chans, H, W) -> logits (B, num_classes)."""

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, widths: Sequence[int] = WIDTHS, dense: int = DENSE
    ) -> None:
        trunks = nn.ModuleList(LightTrunk(in_chans, widths, dense) for _ in range(2))
        super().__init__(trunks, dense, num_classes)


def dual_light_cnn(num_classes: int = 10, in_chans: int = 1) -> DualModel:
    """The two submodels with a classifier each, as the first stage trains them; 14,872 parameters with one channel."""
    return DualModel(lambda: LightTrunk(in_chans), DENSE, num_classes)


def light_cnn_groups() -> tuple[str, ...]:
    """Groups of layers in the order in which the second stage lets them train, as patterns of parameters' names."""
    return (r"^head\.", *(rf"^trunks\.\d+\.{layer}\." for layer in ("dense", "conv3", "conv2", "conv1")))


def _cfg(channels: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (channels, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "first_conv": ("trunks.0.conv1", "trunks.1.conv1"),
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "light_cnn": _cfg(1, 28, (0.1307,), (0.3081,)),
        "light_cnn_cifar": _cfg(3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    }
)


@register_model
def light_cnn(pretrained: bool = False, **kwargs: Any) -> LightCNN:
    """14,862 parameters for inputs (B, 1, 28, 28)."""
    return _built("light_cnn", pretrained, kwargs)


@register_model
def light_cnn_cifar(pretrained: bool = False, **kwargs: Any) -> LightCNN:
    """15,294 parameters for inputs (B, 3, 32, 32)."""
    return _built("light_cnn_cifar", pretrained, {"in_chans": 3, **kwargs})


def _built(name: str, pretrained: bool, arguments: dict[str, Any]) -> LightCNN:
    return build_model_with_cfg(LightCNN, name, pretrained, **arguments)  # type: ignore[no-any-return]
