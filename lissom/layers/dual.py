"""Two submodels, one trained on images and one on augmented ones, that become one model of both (arXiv 2501.15547).

``DualModel`` holds the two with a classifier each; ``lissom.training.methods.dual_input`` trains it. ``merge`` joins
the trunks under one head, and ``lissom.training.unfreezing`` fine-tunes that, from the head backwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["DualModel", "MergedTrunks"]


class DualModel(nn.Module):
    """Two trunks of the same layers and weights of their own, each with a linear classifier of its own.

    ``trunk()`` makes a module (B, ...) -> (B, features). In training the model is called by ``both``; as a classifier
    it answers the mean of both logits, which is what ``merge`` with "average" answers.
    """

    def __init__(self, trunk: Callable[[], nn.Module], features: int, classes: int) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(trunk() for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(2))

    def both(self, x: torch.Tensor, augmented: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits (B, classes) of the first submodel for ``x``, and of the second for ``augmented``."""
        first, second = (head(trunk(i)) for trunk, head, i in zip(self.trunks, self.heads, (x, augmented), strict=True))
        return first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.both(x, x)
        return (first + second) / 2

    @torch.no_grad()
    def merge(self, init: str = "average") -> MergedTrunks:
        """One model of both trunks (copies), with a new head over their concatenated features.

        ``init`` "average": the head is half of either classifier, side by side, so that the answers are the mean of
        both logits; "random": untrained. Raises ValueError for another ``init``.
        """
        if init not in ("average", "random"):
            raise ValueError(f"a merged head starts as 'average' or 'random', not as {init!r}")
        first, second = self.heads
        merged = MergedTrunks(self.trunks, first.in_features, first.out_features)
        if init == "average":
            merged.head.weight.copy_(torch.cat([first.weight, second.weight], 1) / 2)
            merged.head.bias.copy_((first.bias + second.bias) / 2)
        return merged.to(first.weight)


class MergedTrunks(nn.Module):
    """Trunks beside each other under one linear head: (B, ...) -> logits (B, classes). The trunks given are copied."""

    def __init__(self, trunks: nn.ModuleList, features: int, classes: int) -> None:
        super().__init__()
        self.trunks = copy.deepcopy(trunks)
        self.num_classes, self.num_features = classes, len(trunks) * features
        self.head: nn.Module = nn.Linear(self.num_features, classes) if classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; none for 0 classes. ``global_pool`` is of the trunks and ignored."""
        self.num_classes = num_classes
        weight = next(self.trunks.parameters())
        self.head = nn.Linear(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_features): the trunks' features, one after another."""
        return torch.cat([trunk(x) for trunk in self.trunks], 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
