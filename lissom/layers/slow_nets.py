"""Slow networks: coordinates in, hyper-kernels out; the generators of the Terminator (arXiv 2401.17948).

A MAGNet is a product of sine waves of the coordinates, layer upon layer. ``SlowNetG`` gives kernels as large as the
image, the same for every input; ``SlowNetGC`` one weight a channel; ``SlowNetL`` small kernels that depend on what is
in the image (``ContextMAGNet``). One or two dimensions. Names are the publisher's own.

As published, the small kernels are averages over the batch, at test time too, so that an answer depends on the other
images; and the constants of the renormalisation stand in plain lists, where nothing trains or saves them. Here every
image has its own kernels, and the constants are parameters; ``kernels="batch"`` and ``trainable_extras=False`` give the
published behaviour, ``kernels="running"`` kernels that are averages in training and constants at test time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["ContextMAGNet", "MAGNet", "SlowNetG", "SlowNetGC", "SlowNetL", "s_renormalised"]

KERNELS = ("image", "running", "batch")
RESCALE = ("constructor", "first_forward")
MOMENTUM = 0.1  # of running averages, as in torch's BatchNorm


def pointwise(dim: int, in_channels: int, out_channels: int, bias: float, init: str = "kaiming_uniform") -> Any:
    """A 1 x 1 convolution of ``dim`` dimensions, its weight by torch's ``init`` ("kaiming_uniform" at the gain of a
    linear layer, "kaiming_normal" at that of a ReLU), its bias a number."""
    layer = (nn.Conv1d if dim == 1 else nn.Conv2d)(in_channels, out_channels, 1)
    if init == "kaiming_normal":
        nn.init.kaiming_normal_(layer.weight)
    else:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.constant_(layer.bias, bias)
    return layer


class SineFilter(nn.Module):
    """sin(A p + a) of positions p (1, dim, k[, k]): (1, width, k[, k]).

    A starts as a linear layer's weight times 2 pi omega gamma, with gamma drawn from Gamma(6 / (level + 1), 1): deeper
    levels start with slower waves. a starts at 0.
    """

    def __init__(self, dim: int, width: int, level: int, omega: float) -> None:
        super().__init__()
        self.linear = (nn.Conv1d if dim == 1 else nn.Conv2d)(dim, width, 1)
        shape = torch.full((width, dim), 6 / (level + 1), device=self.linear.weight.device)
        gamma = torch.distributions.Gamma(shape, 1.0, validate_args=False).sample()
        with torch.no_grad():
            self.linear.weight.mul_(2 * math.pi * omega * gamma.view(self.linear.weight.shape))
            nn.init.zeros_(self.linear.bias)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return self.linear(p).sin()


class MAGNet(nn.Module):
    """A kernel from coordinates: nothing in, (1, out, size[, size]) out.

    With waves f_l(p) = sin(A_l p + a_l): z = f_0(p); z = f_l(p) (B_l z + b_l) + bias_p for l = 1 to ``layers``; last a
    linear layer from ``width`` to ``out``. Positions p reach from -1 to 1 on each of ``dim`` axes, rows first. The map
    bias_p is learned, one for all channels and levels. The last layer is scaled down once by size^(-dim / 2), so that
    what the kernel multiplies and sums keeps its variance.

    ``omega`` is the base frequency of the waves; its published value is not known. ``rescale`` "first_forward" does the
    scaling as published, in the first forward pass, also of a network whose weights were loaded (which then were
    scaled already). Raises ValueError for another ``dim`` or ``rescale``, and sizes below 1.
    """

    MAP = "bias_p"
    positions: torch.Tensor

    def __init__(
        self, dim: int, width: int, layers: int, out: int, size: int, omega: float = 1.0, rescale: str = RESCALE[0]
    ) -> None:  # fmt: skip
        super().__init__()
        if dim not in (1, 2):
            raise ValueError(f"kernels have 1 or 2 dimensions, not {dim}")
        if min(width, layers, out, size) < 1:
            raise ValueError(f"width {width}, layers {layers}, out {out} and size {size} must all be at least 1")
        if rescale not in RESCALE:
            raise ValueError(f"rescale {rescale!r} is none of {', '.join(RESCALE)}")
        self.dim, self.size = dim, size
        self.register_parameter(self.MAP, nn.Parameter(torch.zeros(1, 1, *(size,) * dim)))
        self.filters = nn.ModuleList(SineFilter(dim, width, level, omega) for level in range(layers + 1))
        self.linears = nn.ModuleList(pointwise(dim, width, width, 1.0) for _ in range(layers))
        self.output_linear = pointwise(dim, width, out, 0.0)
        axis = torch.linspace(-1, 1, size)
        grid = torch.stack(torch.meshgrid(*(axis,) * dim, indexing="ij")).unsqueeze(0)
        self.register_buffer("positions", grid, persistent=False)
        self.rescaled = False
        if rescale == "constructor":
            self._rescale()

    @torch.no_grad()
    def _rescale(self) -> None:
        self.output_linear.weight.mul_(self.size ** (-self.dim / 2))
        self.rescaled = True

    def forward(self) -> torch.Tensor:
        return self._kernel(None)

    def _kernel(self, context: torch.Tensor | None) -> torch.Tensor:
        if not self.rescaled:
            self._rescale()
        bias = getattr(self, self.MAP)
        z = self.filters[0](self.positions)
        for level, linear in enumerate(self.linears):
            z = self.filters[level + 1](self.positions) * linear(z) + bias
            if context is not None:
                z = self._modulated(z, context, level)
        return self.output_linear(z)

    def _modulated(self, z: torch.Tensor, context: torch.Tensor, level: int) -> torch.Tensor:
        raise NotImplementedError


def s_renormalised(z: torch.Tensor, alpha: torch.Tensor | float, beta: torch.Tensor | float) -> torch.Tensor:
    """alpha z + beta z / |z|, with the L2 norm of each channel over its positions; z (B, C, ...), the same shape.

    The first term passes no gradient to z: what is learnt through z is its direction alone, at beta's scale.
    """
    return alpha * z.detach() + beta * F.normalize(z.flatten(2), dim=2).view(z.shape)


class ContextMAGNet(MAGNet):
    """Kernels from coordinates and a map x (B, context, H[, W]): (B or 1, out, size[, size]).

    g is x averaged over a grid of the kernel's size, and two linear layers with a GELU behind. What each level of the
    MAGNet gives is renormalised (``s_renormalised``) and multiplied with F_l g, a linear layer's answer. ``kernels``
    says whose context g is: "image" each image's own; "batch" the batch's mean, as published; "running" the batch's
    mean in training and a running average of it in eval mode. Only "image" gives a batch of kernels.
    ``trainable_extras`` makes parameters of the alphas and betas, which are else 1 and 0.1.

    Raises ValueError for other ``kernels``, and as ``MAGNet``.
    """

    MAP = "bias_pk"
    running_context: torch.Tensor
    contexts: torch.Tensor

    def __init__(
        self, dim: int, width: int, layers: int, out: int, size: int, context: int, omega: float = 1.0,
        rescale: str = RESCALE[0], kernels: str = KERNELS[0], trainable_extras: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(dim, width, layers, out, size, omega, rescale)
        if kernels not in KERNELS:
            raise ValueError(f"kernels {kernels!r} is none of {', '.join(KERNELS)}")
        self.kernels = kernels
        self.fast_reduce = pointwise(dim, context, width, 0.0)
        self.fast_fc1 = pointwise(dim, width, width, 0.0)
        self.fast_linears_x = nn.ModuleList(pointwise(dim, width, width, 1.0) for _ in range(layers))
        self.alphas, self.betas = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.full((layers,), 0.1))
        if not trainable_extras:
            self._freeze_extras()
        if kernels == "running":
            self.register_buffer("running_context", torch.zeros(1, width, *(size,) * dim))
            self.register_buffer("contexts", torch.zeros((), dtype=torch.long))

    def _freeze_extras(self) -> None:
        for name in ("alphas", "betas"):
            value = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, value, persistent=False)

    def use_published_(self) -> None:
        """Kernels of the whole batch, and constants that do not train, in place."""
        if self.kernels == "running":
            del self.running_context, self.contexts
        self.kernels = "batch"
        if isinstance(self.alphas, nn.Parameter):
            self._freeze_extras()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        pool = F.adaptive_avg_pool1d if self.dim == 1 else F.adaptive_avg_pool2d
        if self.kernels == "running" and not self.training:
            return self._kernel(F.gelu(self.fast_fc1(self.running_context)))
        g = self.fast_reduce(pool(x, self.size))
        if self.kernels != "image":
            g = g.mean(0, keepdim=True)
        if self.kernels == "running":
            self._follow(g.detach())
        return self._kernel(F.gelu(self.fast_fc1(g)))

    @torch.no_grad()
    def _follow(self, g: torch.Tensor) -> None:
        """The mean of the first contexts, then an exponential one."""
        self.contexts += 1
        self.running_context.lerp_(g.to(self.running_context), (1 / self.contexts).clamp_min(MOMENTUM))

    def _modulated(self, z: torch.Tensor, context: torch.Tensor, level: int) -> torch.Tensor:
        return s_renormalised(z, self.alphas[level], self.betas[level]) * self.fast_linears_x[level](context)


class SlowNetG(nn.Module):
    """A kernel (1, channels, size[, size]) as large as the map, the same for every input; called without one, or with
    one that is not looked at. Arguments as ``MAGNet``'s."""

    def __init__(
        self, channels: int, size: int, width: int = 64, layers: int = 2, dim: int = 2, omega: float = 1.0,
        rescale: str = RESCALE[0],
    ) -> None:  # fmt: skip
        super().__init__()
        self.Kernel = MAGNet(dim, width, layers, channels, size, omega, rescale)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.Kernel()


class SlowNetGC(SlowNetG):
    """One weight a channel, (1, 1, channels), from the channel's place among them: a kernel along the channels."""

    def __init__(
        self, channels: int, width: int = 32, layers: int = 2, omega: float = 1.0, rescale: str = RESCALE[0]
    ) -> None:  # fmt: skip
        super().__init__(1, channels, width, layers, 1, omega, rescale)


class SlowNetL(nn.Module):
    """Depthwise kernels from a map x (B, channels, H[, W]), for ``lissom.ops.hyper_zzw.hyper_zzw_local``.

    (B, channels, size[, size]) where ``kernels`` is "image", else (channels, 1, size[, size]). Arguments and errors are
    those of ``ContextMAGNet``; ValueError for an even size.
    """

    def __init__(
        self, channels: int, size: int, width: int = 32, layers: int = 2, dim: int = 2, omega: float = 1.0,
        rescale: str = RESCALE[0], kernels: str = KERNELS[0], trainable_extras: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"a kernel of {size} has no middle; its size must be odd")
        self.Kernel = ContextMAGNet(
            dim, width, layers, channels, size, channels, omega, rescale, kernels, trainable_extras
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.Kernel(x)
        return kernel if self.Kernel.kernels == "image" else kernel.transpose(0, 1)
