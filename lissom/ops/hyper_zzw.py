"""HyperZ·Z·W: a map multiplied with a kernel as large as itself, and the result with the map (arXiv 2401.17948).

Z is the activation, W a kernel that a slow network generated (``lissom.layers.slow_nets``). The global operator puts
the product Z W, the context, into a matrix product with Z; the local one is a depthwise convolution with generated
kernels, which may be each image's own; the elementwise one is Z W Z.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["hyper_zzw_2e", "hyper_zzw_global", "hyper_zzw_local"]


def hyper_zzw_global(x: torch.Tensor, kernel: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, K), kernel (1 or B, C, H, K), y (B, C, K, W) -> (B, C, H, W).

    out[b, c, i, j] = sum over k of x[b, c, i, k] kernel[b, c, i, k] y[b, c, k, j]: row i of the context meets column j
    of y, so that every pixel sees a whole row and a whole column. In a network K = H, and several y of one context
    stand side by side in W. B C H K W multiplications: for square maps C H^3, the power 1.5 of the number of pixels.

    Raises ValueError where the shapes do not fit.
    """
    if x.ndim != 4 or y.ndim != 4 or kernel.ndim != 4 or x.shape[:2] != y.shape[:2] or x.shape[3] != y.shape[2]:
        raise ValueError(
            "x (B, C, H, K), kernel (1, C, H, K) and y (B, C, K, W) are wanted, not "
            f"{_shape(x)}, {_shape(kernel)} and {_shape(y)}"
        )
    if kernel.shape[0] not in (1, x.shape[0]) or kernel.shape[1:] != x.shape[1:]:
        raise ValueError(f"the kernel {_shape(kernel)} is not as large as the map {_shape(x)}")
    return (x * kernel) @ y


def hyper_zzw_local(kernel: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y (B, C, H, W) or (B, C, L), each channel convolved with its kernel; zeros outside; the same shape.

    ``kernel`` is (C, 1, k, k) or (C, 1, k), one for all images, or (B, C, k, k) or (B, C, k), each image's own; k is
    odd. As in every convolution of networks, the kernel is not mirrored. B C H W k^2 multiplications.

    Raises ValueError where the shapes do not fit.
    """
    dim = y.ndim - 2
    if dim not in (1, 2) or kernel.ndim != y.ndim or kernel.shape[:2] not in (y.shape[:2], (y.shape[1], 1)):
        raise ValueError(
            f"kernels (C, 1, k, k) or (B, C, k, k) are wanted for maps (B, C, H, W), with one axis less for sequences, "
            f"not {_shape(kernel)} for {_shape(y)}"
        )
    if any(side % 2 == 0 for side in kernel.shape[2:]):
        raise ValueError(f"a kernel of {' x '.join(map(str, kernel.shape[2:]))} has no middle; its size must be odd")
    convolution = F.conv2d if dim == 2 else F.conv1d
    padding = [side // 2 for side in kernel.shape[2:]]
    batch, channels = y.shape[:2]
    if kernel.shape[:2] == (channels, 1):
        return convolution(y, kernel, padding=padding, groups=channels)
    # Each image's own kernels: images are channels of one image.
    flat = y.reshape(1, batch * channels, *y.shape[2:])
    weight = kernel.reshape(batch * channels, 1, *kernel.shape[2:])
    return convolution(flat, weight, padding=padding, groups=batch * channels).reshape(y.shape)


def hyper_zzw_2e(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """x kernel x, element by element: any shape of x, and a kernel that broadcasts to it; the shape of x.

    Raises ValueError where the kernel does not broadcast to x.
    """
    try:
        shape = torch.broadcast_shapes(x.shape, kernel.shape)
    except RuntimeError:
        shape = None
    if shape != x.shape:
        raise ValueError(f"the kernel {_shape(kernel)} does not broadcast to {_shape(x)}")
    return x * kernel * x


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
