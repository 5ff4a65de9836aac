"""Slow-fast neural encoding: about ten branches, global and local, on kernels that slow networks generate.

The parts of the Terminator's block (arXiv 2401.17948), which has no residual paths: ``RGU``, ``HyperChannelInteract``,
``HyperInteract``, ``LocalConv``, ``GIBS``, and the two operators with their slow networks, for one or two dimensions;
``SFNELayer`` and ``SFNEBlock`` for square maps, since the global operator is a product of matrices. Names are the
publisher's own.

As published, standardisation over the batch uses the batch's statistics at test time too. Here it has running
statistics, as a BatchNorm; ``statistics="batch"`` gives the published behaviour. For kernels of the batch and constants
outside of training see ``lissom.layers.slow_nets``; ``use_published_`` turns all of it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.slow_nets import KERNELS, RESCALE, ContextMAGNet, SlowNetG, SlowNetGC, SlowNetL, pointwise
from lissom.ops.hyper_zzw import hyper_zzw_2e, hyper_zzw_global, hyper_zzw_local

__all__ = [
    "GIBS",
    "RGU",
    "HyperChannelInteract",
    "HyperInteract",
    "HyperZZWGlobal",
    "HyperZZWLocal",
    "LocalConv",
    "SFNEBlock",
    "SFNELayer",
    "SlowWidths",
    "Switches",
    "tiled",
    "use_published_",
]

STATISTICS = ("running", "batch")


@dataclass(frozen=True)
class SlowWidths:
    """Widths of the slow networks, as published: of the global and local kernels, of the channels' weights, and of the
    two kernels of ``HyperInteract``, by channel and by position. All but the global one have two layers."""

    global_kernel: int = 64
    local_kernel: int = 32
    channel: int = 32
    interact_channel: int = 16
    interact_position: int = 64


@dataclass(frozen=True)
class Switches:
    """How a block differs from the published one; ``PUBLISHED`` is that.

    ``kernels`` of the local slow networks: "image", "running" or "batch" (``ContextMAGNet``). ``statistics`` of the
    standardisation over the batch: "running" or "batch". ``trainable_extras``: whether the constants of the
    renormalisation train. ``rescale`` and ``omega``: as in ``MAGNet``. Raises ValueError for another word.
    """

    kernels: str = KERNELS[0]
    statistics: str = STATISTICS[0]
    trainable_extras: bool = True
    rescale: str = RESCALE[0]
    omega: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("kernels", KERNELS), ("statistics", STATISTICS), ("rescale", RESCALE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")


PUBLISHED = Switches(kernels="batch", statistics="batch", trainable_extras=False)


def use_published_(module: nn.Module) -> None:
    """The published behaviour, in place: kernels and statistics of the batch, constants that do not train.

    Running averages are dropped. Weights keep their scale: those of a checkpoint were rescaled when it was trained.
    """
    for part in module.modules():
        if isinstance(part, ContextMAGNet):
            part.use_published_()
        elif isinstance(part, nn.modules.batchnorm._BatchNorm) and not part.affine:
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None


def standardised(x: torch.Tensor) -> torch.Tensor:
    """Each channel of each image to mean 0 and variance 1 over its positions: InstanceNorm without weights."""
    return F.instance_norm(x, eps=1e-5)


def batch_norm(channels: int, dim: int, statistics: str) -> nn.Module:
    """A BatchNorm without weights; with running statistics or those of the batch in every mode."""
    if statistics not in STATISTICS:
        raise ValueError(f"statistics {statistics!r} is none of {', '.join(STATISTICS)}")
    norm = nn.BatchNorm1d if dim == 1 else nn.BatchNorm2d
    return norm(channels, affine=False, track_running_stats=statistics == "running")


def tiled(x: torch.Tensor, channels: int) -> torch.Tensor:
    """x (B, C, ...) repeated along the channels, and cut, to ``channels``: channel c is x's c mod C."""
    count = x.shape[1]
    repeated = x.repeat(1, -(-channels // count), *(1,) * (x.ndim - 2))
    return repeated if channels % count == 0 else repeated[:, :channels]


class RGU(nn.Module):
    """Recursive gated unit: x (B, C, S[, S]) -> the same shape.

    With k = W_k x, v = W_v x: q = GELU(standardised(k W_q v)) + P, and W_y q. P (1, 1, S[, S]) is a learned map, so
    the size is fixed.
    """

    def __init__(self, channels: int, size: int, dim: int = 2) -> None:
        super().__init__()
        self.fast_bias_p = nn.Parameter(torch.zeros(1, 1, *(size,) * dim))
        for name in "kvqy":
            self.add_module(f"fast_linear_{name}", pointwise(dim, channels, channels, 0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.fast_linear_k(x) * self.fast_linear_q(self.fast_linear_v(x))
        return self.fast_linear_y(F.gelu(standardised(q)) + self.fast_bias_p)


class HyperChannelInteract(nn.Module):
    """x sigmoid(y K y) with y the mean of each channel and K a slow network's weight of it; x (B, C, ...), same shape.

    Gates of 1/2 where K is 0. Keyword arguments are those of ``SlowNetGC``.
    """

    def __init__(self, channels: int, width: int = 32, layers: int = 2, **slow: Any) -> None:
        super().__init__()
        self.slow_net_gc = SlowNetGC(channels, width, layers, **slow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).mean(2).unsqueeze(1)  # (B, 1, C)
        gate = hyper_zzw_2e(y, self.slow_net_gc()).sigmoid()
        return x * gate.view(*x.shape[:2], *(1,) * (x.ndim - 2))


class HyperInteract(nn.Module):
    """x gated by channels and positions of y: x sigmoid(s_s s_c), all (B, C, S[, S]); x is y where it is not given.

    s_c = y_c K_c y_c with y_c the mean of a channel, s_s = y_s K_s y_s with y_s the mean at a position over channels;
    both kernels come from slow networks of the given widths, with ``layers`` layers.
    """

    def __init__(
        self, channels: int, size: int, channel_width: int = 16, position_width: int = 64, layers: int = 2,
        dim: int = 2, **slow: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.slow_net_gc = SlowNetGC(channels, channel_width, layers, **slow)
        self.slow_net_gs = SlowNetG(1, size, position_width, layers, dim, **slow)

    def forward(self, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        of_channel = hyper_zzw_2e(y.flatten(2).mean(2).unsqueeze(1), self.slow_net_gc())
        of_position = hyper_zzw_2e(y.mean(1, keepdim=True), self.slow_net_gs())
        gate = (of_position * of_channel.view(*y.shape[:2], *(1,) * (y.ndim - 2))).sigmoid()
        return (y if x is None else x) * gate


class LocalConv(nn.Module):
    """GELU(standardised over the batch (1 x 1 convolution (depthwise convolution of x with ``kernel``))), same shape.

    ``kernel`` as ``hyper_zzw_local`` takes it, x (B, C, H, W) or (B, C, L); ``statistics`` "running" or "batch".
    """

    def __init__(self, channels: int, dim: int = 2, statistics: str = STATISTICS[0]) -> None:
        super().__init__()
        self.channel_mixer = pointwise(dim, channels, channels, 0.0, "kaiming_normal")
        self.norm = batch_norm(channels, dim, statistics)

    def forward(self, kernel: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.norm(self.channel_mixer(hyper_zzw_local(kernel, x))))


class GIBS(nn.Module):
    """Alternating standardisation: of ``groups`` equal groups of channels, those of even number (from 0) over the
    batch, the others over each image alone; no weights; x (B, C, H, W) or (B, C, L), same shape.

    Raises ValueError where ``groups`` is odd or does not divide ``channels``.
    """

    def __init__(self, channels: int, groups: int = 12, dim: int = 2, statistics: str = STATISTICS[0]) -> None:
        super().__init__()
        if groups % 2 or channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into pairs of equal groups, {groups} in all")
        self.pairs = groups // 2
        self.norm = batch_norm(channels // 2, dim, statistics)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        even, odd = x.unflatten(1, (self.pairs, 2, -1)).unbind(2)  # (B, pairs, width, ...)
        even = self.norm(even.flatten(1, 2)).view(even.shape)
        odd = standardised(odd.flatten(1, 2)).view(odd.shape)
        return torch.stack([even, odd], 2).flatten(1, 3)


class HyperZZWGlobal(nn.Module):
    """The global operator with its slow network: (x K) y as matrices, x and y (B, C, S, S); y is x where not given.

    Other arguments are those of ``SlowNetG``.
    """

    def __init__(self, channels: int, size: int, width: int = 64, layers: int = 2, **slow: Any) -> None:
        super().__init__()
        self.slow_net_g = SlowNetG(channels, size, width, layers, **slow)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return hyper_zzw_global(x, self.slow_net_g(), x if y is None else y)


class HyperZZWLocal(nn.Module):
    """The local operator with its slow network: y (x where not given) convolved with kernels of ``size`` made from x.

    Maps (B, C, H, W), or sequences (B, C, L) with ``dim`` 1. Other arguments are those of ``SlowNetL``.
    """

    def __init__(self, channels: int, size: int, width: int = 32, layers: int = 2, **slow: Any) -> None:
        super().__init__()
        self.slow_net_l = SlowNetL(channels, size, width, layers, **slow)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return hyper_zzw_local(self.slow_net_l(x), x if y is None else y)


class SFNELayer(nn.Module):
    """x (B, C, S, S) -> (B, out_channels, S, S): the branches side by side, and a 1 x 1 convolution over them.

    The global kernel gives a context, x K_g, which is multiplied as a matrix with three maps: the recurrent fast one,
    a mixture of channels, and gated channels. Beside these stand gates of the first of them and four convolutions with
    generated kernels of ``local_kernels``. ``pre`` and ``pre_pre`` are outputs of earlier blocks, of any number of
    channels; they are tiled to C. ``earlier`` says how many of them there will be. Cost: three products of C S^3
    multiplications; 1 x 1 convolutions of (13 C + (10 + earlier) out_channels) C S^2 are most of the rest.
    """

    def __init__(
        self, channels: int, out_channels: int, size: int, earlier: int = 0, global_layers: int = 2,
        local_kernels: Sequence[int] = (3, 9, 5, 7), widths: SlowWidths = SlowWidths(), switches: Switches = Switches(),
    ) -> None:  # fmt: skip
        super().__init__()
        if len(local_kernels) != 4 or earlier not in (0, 1, 2):
            raise ValueError(f"four local kernels and at most two earlier maps, not {local_kernels} and {earlier}")
        slow: dict[str, Any] = {"omega": switches.omega, "rescale": switches.rescale}
        # The first convolution here is that of the input's channels, which whoever loads a network looks for.
        self.channel_mixer_mlp = pointwise(2, channels, channels, 0.0, "kaiming_normal")
        self.channels = channels
        self.slow_net_g = SlowNetG(channels, size, widths.global_kernel, global_layers, **slow)
        for number, kernel in enumerate(local_kernels, 1):
            generator = SlowNetL(
                channels, kernel, widths.local_kernel, kernels=switches.kernels,
                trainable_extras=switches.trainable_extras, **slow,
            )  # fmt: skip
            self.add_module(f"slow_net_l{number}", generator)
            self.add_module(f"local_interact_conv_{number}", LocalConv(channels, 2, switches.statistics))
            self.register_parameter(f"bias{number}", nn.Parameter(torch.zeros(1)))
        self.Fast_Kernel_rgu = RGU(channels, size)
        self.Fast_Kernel_rgu_2 = RGU(channels, size)
        self.channel_mixer_hci = HyperChannelInteract(channels, widths.channel, **slow)
        self.hyper_interact = HyperInteract(
            channels, size, widths.interact_channel, widths.interact_position, **slow
        )  # fmt: skip
        self.bottleneck_layer = pointwise(2, (10 + earlier) * channels, out_channels, 0.0, "kaiming_normal")

    def forward(
        self, x: torch.Tensor, pre: torch.Tensor | None = None, pre_pre: torch.Tensor | None = None
    ) -> torch.Tensor:
        kernel = self.slow_net_g()
        if x.shape[1:] != kernel.shape[1:]:
            raise ValueError(
                f"maps of {kernel.shape[1]} x {kernel.shape[2]} x {kernel.shape[3]} are wanted, not "
                f"{' x '.join(map(str, x.shape[1:]))}: the kernel is as large as the map; build for its size (img_size)"
            )
        fast = standardised(self.Fast_Kernel_rgu_2(x * kernel) + self.Fast_Kernel_rgu(x))
        mix = standardised(self.channel_mixer_mlp(x))
        hci = standardised(self.channel_mixer_hci(x))
        out, out_x, out_hci = hyper_zzw_global(x, kernel, torch.cat([fast, mix, hci], 3)).chunk(3, 3)
        f1, f2 = self._local(1, x, hci), self._local(2, hci, x)
        f3, f4 = self._local(3, mix, x), self._local(4, x, mix)
        branches = [out, f2, pre, fast, out_x, f1, out.sigmoid() * out, f3, out_hci, f4, pre_pre,
                    self.hyper_interact(out, x)]  # fmt: skip
        present = [tiled(branch, self.channels) for branch in branches if branch is not None]
        return self.bottleneck_layer(torch.cat(present, 1))

    def _local(self, number: int, source: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kernel = getattr(self, f"slow_net_l{number}")(source)
        return getattr(self, f"local_interact_conv_{number}")(kernel, y) + getattr(self, f"bias{number}")


class SFNEBlock(nn.Module):
    """Dropout2d(GELU(GIBS(layer)) + bias): x (B, C, S, S) -> (B, out_channels, S, S). Arguments as ``SFNELayer``'s.

    ``out_channels`` must be a multiple of ``groups``, the groups of the standardisation.
    """

    def __init__(
        self, channels: int, out_channels: int, size: int, earlier: int = 0, groups: int = 12, drop: float = 0.0,
        switches: Switches = Switches(), **layer: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fast_multi_branch = SFNELayer(channels, out_channels, size, earlier, switches=switches, **layer)
        self.norm = GIBS(out_channels, groups, 2, switches.statistics)
        self.bias = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout2d(drop)

    def forward(
        self, x: torch.Tensor, pre: torch.Tensor | None = None, pre_pre: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.drop(F.gelu(self.norm(self.fast_multi_branch(x, pre, pre_pre))) + self.bias)
