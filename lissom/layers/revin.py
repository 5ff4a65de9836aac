"""Reversible instance normalisation of time series (RevIN, Kim et al., ICLR 2022).

Each series loses its own mean and deviation over the time looked back on, and the forecast gets them back, so that a
model need not know at which level a series stands. FFNet's and UniRepLKNet's forecasters are built between the two.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["RevIN"]


class RevIN(nn.Module):
    """Series (B, T, channels) to normalised ones and back; each of the B channels by its own mean and deviation.

    ``forward`` gives (x - mean) / sqrt(var + eps), times ``affine_weight`` plus ``affine_bias`` where ``affine``, and
    the statistics (mean and deviation, (B, 1, channels) each); ``restore`` takes them and a series (B, T', channels)
    of any length, and undoes it. The variance is the biased one; both statistics are constants to the gradient, as
    published.
    """

    def __init__(self, channels: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.register_parameter("affine_weight", nn.Parameter(torch.ones(channels)) if affine else None)
        self.register_parameter("affine_bias", nn.Parameter(torch.zeros(channels)) if affine else None)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        mean = x.mean(1, keepdim=True).detach()
        deviation = (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt().detach()
        x = (x - mean) / deviation
        if self.affine_weight is not None:
            x = x * self.affine_weight + self.affine_bias
        return x, (mean, deviation)

    def restore(self, x: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """A normalised series, as long as may be, on the scale that ``statistics`` tell."""
        mean, deviation = statistics
        if self.affine_weight is not None:
            # eps^2, as published: a weight that training brought to 0 does not divide by it.
            x = (x - self.affine_bias) / (self.affine_weight + self.eps**2)
        return x * deviation + mean

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, affine={self.affine_weight is not None}"
