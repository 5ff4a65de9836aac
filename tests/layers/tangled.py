"""A user's CNN whose channels are tied in every way: a concatenation, a depthwise convolution, a module called twice.

Nothing of lissom, nothing of timm's classes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Tangled(nn.Module):
    """Images (B, 3, 16, 16) -> logits (B, classes)."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.left = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.right = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(3 * width, 3 * width, 3, 2, 1, groups=3 * width)
        self.mix = nn.Conv2d(3 * width, 2 * width, 1, bias=False)
        self.mixed = nn.BatchNorm2d(2 * width)
        self.shared = nn.Conv2d(2 * width, 2 * width, 3, padding=1)  # called twice
        self.squeeze = nn.Linear(2 * width, width // 2)
        self.excite = nn.Linear(width // 2, 2 * width)
        self.hidden = nn.Linear(2 * width * 4, 24)
        self.head = nn.Linear(24, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.cat([functional.gelu(self.left(x)), torch.tanh(self.right(x))], dim=1)
        x = torch.relu(self.mixed(self.mix(self.depthwise(x))))
        x = x + torch.relu(self.shared(torch.relu(self.shared(x))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        x = functional.adaptive_avg_pool2d(x * gate[:, :, None, None], 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))
