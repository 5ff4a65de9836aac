"""Global response normalisation: channels that answer strongly anywhere in the image are raised against the others.

ConvNeXt V2 (arXiv 2301.00808) and UniRepLKNet (arXiv 2311.15599, inside its feed-forward layers).
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["GRN"]


class GRN(nn.Module):
    """y = (gamma N(x) + 1) x + beta with N_c = |x_c| / (mean over c of |x_c| + eps), |x_c| the L2 norm over the image.

    Maps (B, H, W, C), or (B, C, H, W) where not ``channels_last``, to the same shape. ``gamma`` and ``beta``
    (1, 1, 1, C) start at 0: the layer starts as the identity. ``bias`` False leaves ``beta`` out, which a linear layer
    behind can carry. Raises ValueError for an input of another rank or number of channels.
    """

    beta: nn.Parameter | None

    def __init__(self, channels: int, bias: bool = True, channels_last: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.channels, self.channels_last, self.eps = channels, channels_last, eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.register_parameter("beta", nn.Parameter(torch.zeros(1, 1, 1, channels)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channel = 3 if self.channels_last else 1
        if x.ndim != 4 or x.shape[channel] != self.channels:
            raise ValueError(f"maps of {self.channels} channels on axis {channel} are wanted, not {tuple(x.shape)}")
        norm = torch.linalg.vector_norm(x, dim=(1, 2) if self.channels_last else (2, 3), keepdim=True)
        relative = norm / (norm.mean(channel, keepdim=True) + self.eps)
        y = (self._laid(self.gamma) * relative + 1) * x
        return y if self.beta is None else y + self._laid(self.beta)

    def _laid(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter if self.channels_last else parameter.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.channels}, bias={self.beta is not None}, channels_last={self.channels_last}"
