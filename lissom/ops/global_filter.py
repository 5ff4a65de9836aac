"""Global filters: convolution with kernels as large as the map, in the frequency domain, and HorNet's local half.

``spectral_filter`` is the global filter of GFNet (arXiv 2107.00645), ``GlobalLocalFilter`` HorNet's (arXiv 2207.14284).
"""

from __future__ import annotations

import math

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F

__all__ = ["GlobalLocalFilter", "resized_filter", "spectral_filter"]


def spectral_filter(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W), each channel's frequencies multiplied by its own complex weights: (B, C, H, W).

    ``weight`` (C, h, w, 2) holds real and imaginary parts for frequencies 0 to w - 1 along the width, and all along
    the height; for maps of another size than its own, (H, W // 2 + 1) frequencies, it is resized. The same as circular
    convolution with the kernel whose unnormalised transform it is. Computed in float32 at least, the answer in x's
    type. Where a graph is exported, the transform is written as products with its matrices, which every runtime knows.

    Raises ValueError where the shapes do not fit.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[3] != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"x (B, C, H, W) and weights (C, h, w, 2) are wanted, not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    height, width = x.shape[2:]
    kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    weight = resized_filter(weight.to(kind), height, width // 2 + 1)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return _by_matrices(x.to(kind), weight).to(x.dtype)
    frequencies = torch.fft.rfft2(x.to(kind), norm="ortho") * torch.view_as_complex(weight.contiguous())
    # The size is named because a half spectrum does not tell an odd width from an even one.
    return torch.fft.irfft2(frequencies, s=(height, width), norm="ortho").to(x.dtype)


def resized_filter(weight: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Weights (C, h, w, 2) for another number of frequencies, (C, height, width, 2): bilinear, corners upon corners."""
    if weight.shape[1:3] == (height, width):
        return weight
    planes = F.interpolate(weight.permute(3, 0, 1, 2), size=(height, width), mode="bilinear", align_corners=True)
    return planes.permute(1, 2, 3, 0)


def _by_matrices(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``spectral_filter`` without Fourier operators: cost H + W multiplications for each element and frequency."""
    height, width = x.shape[2:]
    cos_h, sin_h = _waves(height, height, x)
    cos_w, sin_w = _waves(width, width // 2 + 1, x)
    # Along the width, then along the height: exp(-i a) = cos a - i sin a.
    real, imaginary = x @ cos_w, -(x @ sin_w)
    real, imaginary = cos_h @ real + sin_h @ imaginary, cos_h @ imaginary - sin_h @ real
    a, b = weight.unbind(3)
    real, imaginary = real * a - imaginary * b, real * b + imaginary * a
    # Back: along the height, then along the width, where every frequency but the ends stands for two.
    real, imaginary = cos_h @ real - sin_h @ imaginary, cos_h @ imaginary + sin_h @ real
    k = torch.arange(width // 2 + 1, device=x.device)
    twice = torch.where((k == 0) | (2 * k == width), 1.0, 2.0).to(x.dtype) / (height * width)
    return (real * twice) @ cos_w.T - (imaginary * twice) @ sin_w.T


def _waves(length: int, frequencies: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (length, frequencies) of 2 pi j k / length."""
    j, k = torch.arange(length, device=like.device), torch.arange(frequencies, device=like.device)
    angles = (2 * math.pi / length) * (j[:, None] * k % length).double()
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class GlobalLocalFilter(nn.Module):
    """x (B, dim, H, W) -> (B, dim, H, W): one half of the channels meets 3 x 3, the other a filter as large as the map.

    Norms over the channels stand before and behind. The halves are joined alternately: channels 0, 2, ... are the
    local ones. The filter has (h, w) frequencies, those of maps of h x 2 (w - 1) or h x (2 w - 1), and is resized for
    others. Raises ValueError where ``dim`` is odd.
    """

    def __init__(self, dim: int, h: int = 14, w: int = 8) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"{dim} channels have no halves; dim must be even")
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, h, w, 2))
        nn.init.trunc_normal_(self.complex_weight, std=0.02)
        self.pre_norm = LayerNorm2d(dim, eps=1e-6)
        self.post_norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near, far = self.pre_norm(x).chunk(2, 1)
        joined = torch.stack([self.dw(near), spectral_filter(far, self.complex_weight)], 2)
        return self.post_norm(joined.flatten(1, 2))
