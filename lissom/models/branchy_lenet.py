"""BranchyLeNet: a small network for grey images of 28 x 28 with an exit behind its first stage; teacher of CBNet.

After BranchyNet's LeNet (arXiv 1709.01686), which CBNet (arXiv 2403.07036) takes its light classifier from. Neither
paper's table of layers was at hand: the layers are lissom's own. With the defaults the light network takes 191,100
multiply-accumulates, and what only the last answer needs takes 2,207,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from lissom.layers.exits import OwnExit, exits_of

__all__ = ["BranchyLeNet", "LightLeNet"]


class LightLeNet(nn.Module):
    """The stem and the branch, a classifier by themselves: images (B, in_chans, H, W) to logits (B, num_classes).

    ``stem``: 5 x 5 convolution to ``stem`` channels, ReLU, pooling by 2. ``branch``: 3 x 3 convolution to ``branch``
    channels, ReLU, pooling by 2, linear. ``img_size`` is one side's, or (H, W); at least 4 pixels.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        stem: int = 5,
        branch: int = 10,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < 4:
            raise ValueError(f"images of {height} x {width} are pooled twice by 2; 4 x 4 is the smallest")
        self.places = (height // 4) * (width // 4)  # of the pooled maps
        self.num_classes, self.num_features = num_classes, branch * self.places
        self.stem = nn.Sequential(nn.Conv2d(in_chans, stem, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.branch = nn.Sequential(
            nn.Conv2d(stem, branch, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            _classifier(self.num_features, num_classes),
        )  # fmt: skip

    def get_classifier(self) -> nn.Module:
        return self.branch[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; none for 0 classes. Nothing is pooled globally."""
        self.num_classes = num_classes
        self.branch[-1] = _classifier(self.num_features, num_classes).to(self.stem[0].weight)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_features): what the classifier reads."""
        return self.branch[:-1](self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else self.branch[-1](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(self.stem(x))


class BranchyLeNet(LightLeNet):
    """Images (B, in_chans, H, W) to logits (B, num_classes); in training to a pair, the exit's logits first.

    Behind the light network's stem: 5 x 5 convolution to ``rest[0]`` channels, ReLU, pooling by 2, 5 x 5 convolution to
    ``rest[1]``, ReLU, linear to ``rest[2]``, ReLU, linear. The branch is an exit of the network's own
    (``lissom.layers.exits``). BranchyNet weighs the losses of exit and end by 1 and 0.3: the method
    ``MultiExitKD(weights=(1.0, 0.3), alpha=0)``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        stem: int = 5,
        branch: int = 10,
        rest: Sequence[int] = (20, 50, 200),
    ) -> None:
        super().__init__(num_classes, in_chans, img_size, stem, branch)
        first, second, dense = rest
        self.num_features = dense
        self.rest = nn.Sequential(
            nn.Conv2d(stem, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(second * self.places, dense), nn.ReLU(),
        )  # fmt: skip
        self.head = _classifier(dense, num_classes)

    def own_exits(self) -> list[OwnExit]:
        return [OwnExit("branch", carries=("stem",))]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, untrained classifiers of the exit and of the end; none for 0 classes."""
        self.num_classes = num_classes
        weight = self.stem[0].weight
        branch = self.branch[0].out_channels * self.places
        self.branch[-1] = _classifier(branch, num_classes).to(weight)
        self.head = _classifier(self.num_features, num_classes).to(weight)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = self.stem(x)
        early = self.branch(x) if self.training or exits_of(self) is not None else None
        answer = self.head(self.rest(x))
        return (early, answer) if self.training and early is not None else answer


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes else nn.Identity()


def _cfg(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (1, 28, 28),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "first_conv": "stem.0",
        "classifier": ("branch.4", "head"),
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "branchy_lenet": _cfg((0.1307,), (0.3081,)),
        "light_lenet": _cfg((0.1307,), (0.3081,)) | {"classifier": "branch.4"},
    }
)


@register_model
def branchy_lenet(pretrained: bool = False, **kwargs: Any) -> BranchyLeNet:
    """525,280 parameters for inputs (B, 1, 28, 28)."""
    return build_model_with_cfg(BranchyLeNet, "branchy_lenet", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def light_lenet(pretrained: bool = False, **kwargs: Any) -> LightLeNet:
    """Stem and branch of ``branchy_lenet`` alone: 5,500 parameters for inputs (B, 1, 28, 28)."""
    return build_model_with_cfg(LightLeNet, "light_lenet", pretrained, **kwargs)  # type: ignore[no-any-return]
