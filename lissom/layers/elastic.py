"""Elastic layers: one set of weights for many sizes of a layer, of which a sub-network uses slices (Once-for-All).

Once-for-All (arXiv 1908.09791), as its published code computes it. Every layer owns the weights of its largest form:

- Width: the first ``active_out`` outputs, and as many inputs as come in: ``weight[:out, :in]``. A BatchNorm uses the
  first entries of its weight, bias and running statistics.
- Kernel, of depthwise convolutions: the 5 x 5 filter is the centre of the 7 x 7, flattened (f, 25 numbers) and
  multiplied by a learned matrix, M f; the 3 x 3 filter is the centre of that *transformed* 5 x 5, multiplied likewise.
  The matrices start as identities and are shared by all channels of a layer.
- Squeeze and excitation: slices in both of its convolutions; the hidden width follows from the channels.

``static(...)`` of each layer makes the plain torch layer that computes what the elastic one does as it is set. A whole
network of such layers speaks the protocol ``ElasticNetwork``, which training and search know it by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError

__all__ = [
    "Dimension",
    "ElasticBatchNorm2d",
    "ElasticConv2d",
    "ElasticDepthwiseConv2d",
    "ElasticLinear",
    "ElasticNetwork",
    "ElasticSqueezeExcite",
    "Setting",
    "SqueezeExcite",
    "check_setting",
    "draw_setting",
    "is_elastic",
    "largest",
    "make_divisible",
    "smallest",
    "without_statistics",
]

Setting = Mapping[str, Any]  # name of a dimension -> the value chosen


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least ``divisor`` and not below 0.9 of the value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


# What can be chosen


@dataclass(frozen=True)
class Dimension:
    """One choice of a super-network: ``values`` from the smallest to the largest, of a ``kind`` ("kernel", "expand",
    "width", "depth", "heads", "stem")."""

    name: str
    kind: str
    values: tuple[Any, ...]


@runtime_checkable
class ElasticNetwork(Protocol):
    """A network whose size can be set: what methods and searches need to know of it.

    ``active`` is the setting in use. ``extract`` returns the sub-network as a plain module with weights of its own,
    which gives the same answers.
    """

    active: Setting

    def dimensions(self) -> tuple[Dimension, ...]: ...

    def set_active(self, setting: Setting) -> None: ...

    def extract(self, setting: Setting | None = None) -> nn.Module: ...


def is_elastic(model: Any) -> bool:
    """Whether the model is a super-network."""
    return isinstance(model, ElasticNetwork)


def largest(network: ElasticNetwork) -> dict[str, Any]:
    """The setting of the whole network."""
    return {d.name: d.values[-1] for d in network.dimensions()}


def smallest(network: ElasticNetwork) -> dict[str, Any]:
    """The setting of the smallest sub-network."""
    return {d.name: d.values[0] for d in network.dimensions()}


def draw_setting(network: ElasticNetwork, opened: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Any]:
    """A random setting, every dimension by itself and uniformly, from torch's global generator.

    ``opened``: kind -> the values that its dimensions may take; dimensions of other kinds stay at their largest. None
    opens all. A value that a dimension does not have is left out of its draw.
    """
    setting = {}
    for d in network.dimensions():
        values = d.values if opened is None else [v for v in d.values if v in opened.get(d.kind, d.values[-1:])]
        values = values or d.values[-1:]
        setting[d.name] = values[int(torch.randint(len(values), ()))]
    return setting


def check_setting(network: ElasticNetwork, setting: Setting) -> dict[str, Any]:
    """The whole setting, dimensions that are not named at their largest. Raises LissomError for an unknown name and a
    value that the dimension does not have."""
    known = {d.name: d for d in network.dimensions()}
    for name, value in setting.items():
        if name not in known:
            few = ", ".join(list(known)[:4])
            raise LissomError(f"the super-network has no dimension {name!r}; it has {few}, ... ({len(known)} in all)")
        if value not in known[name].values:
            raise LissomError(f"{name} is {value!r}; it may be {', '.join(map(str, known[name].values))}")
    return {d.name: setting.get(d.name, d.values[-1]) for d in known.values()}


class without_statistics:  # noqa: N801 - a context manager, read as a word
    """BatchNorms inside train on their batches' statistics and leave their running ones as they are: those of the whole
    network are not spoilt by its sub-networks."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._momenta = [m.momentum for m in self._norms]
        self._counts = [m.num_batches_tracked for m in self._norms]

    def __enter__(self) -> None:
        for norm in self._norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None

    def __exit__(self, *error: object) -> None:
        for norm, momentum, count in zip(self._norms, self._momenta, self._counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


# Layers


class ElasticConv2d(nn.Conv2d):
    """A convolution without groups of which the first ``active_out`` outputs and as many inputs as come in are used.

    (B, in, H, W) with in <= in_channels -> (B, active_out, H', W').
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.groups != 1:
            raise LissomError("an elastic convolution has no groups; for depthwise ones take ElasticDepthwiseConv2d")
        self.active_out = self.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight[: self.active_out, : x.shape[1]]
        bias = self.bias[: self.active_out] if self.bias is not None else None
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    @torch.no_grad()
    def static(self, inputs: int) -> nn.Conv2d:
        """The plain convolution for ``inputs`` channels."""
        layer = nn.utils.skip_init(
            nn.Conv2d, inputs, self.active_out, self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation, bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        layer.weight.copy_(self.weight[: self.active_out, :inputs])
        if self.bias is not None:
            layer.bias.copy_(self.bias[: self.active_out])
        return layer  # type: ignore[no-any-return]


class ElasticDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with several kernel sizes: (B, C, H, W) with C <= channels -> (B, C, H', W').

    ``kernels``: odd sizes; ``active_kernel`` is the one in use, padded by half of it. ``matrix_5`` is the matrix that
    makes 5 x 5 filters of the centres of the next larger ones.
    """

    def __init__(self, channels: int, kernels: Sequence[int] = (3, 5, 7), stride: int = 1) -> None:
        sizes = sorted(set(kernels))
        if not sizes or any(size % 2 == 0 or size < 1 for size in sizes):
            raise LissomError(f"kernel sizes are odd and at least 1, not {', '.join(map(str, kernels))}")
        super().__init__(channels, channels, sizes[-1], stride, sizes[-1] // 2, groups=channels, bias=False)
        self.kernels = tuple(sizes)
        self.active_kernel = sizes[-1]
        for size in sizes[:-1]:
            self.register_parameter(f"matrix_{size}", nn.Parameter(torch.eye(size * size)))

    def filters(self, channels: int) -> torch.Tensor:
        """(channels, 1, k, k): the first channels' filters of the active size."""
        filters = self.weight[:channels]
        for larger, size in pairwise(reversed(self.kernels)):
            if size < self.active_kernel:
                break
            edge = (larger - size) // 2
            centre = filters[:, :, edge : edge + size, edge : edge + size].reshape(channels, 1, size * size)
            matrix: torch.Tensor = getattr(self, f"matrix_{size}")
            filters = functional.linear(centre, matrix).reshape(channels, 1, size, size)
        return filters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        return functional.conv2d(x, self.filters(channels), None, self.stride, self.active_kernel // 2, groups=channels)

    @torch.no_grad()
    def static(self, channels: int) -> nn.Conv2d:
        """The plain depthwise convolution for the first ``channels`` channels, with the transformed filters."""
        layer = nn.utils.skip_init(
            nn.Conv2d, channels, channels, self.active_kernel, stride=self.stride, padding=self.active_kernel // 2,
            groups=channels, bias=False, device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        layer.weight.copy_(self.filters(channels))
        return layer  # type: ignore[no-any-return]


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm of which as many of the first channels are used as come in; running statistics are sliced too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        if channels == self.num_features:
            return super().forward(x)
        mean, var = self.running_mean, self.running_var
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return functional.batch_norm(
            x, mean[:channels] if mean is not None else None, var[:channels] if var is not None else None,
            self.weight[:channels], self.bias[:channels], self.training or mean is None, momentum, self.eps,
        )  # fmt: skip

    @torch.no_grad()
    def static(self, channels: int) -> nn.BatchNorm2d:
        """The plain BatchNorm of the first ``channels`` channels."""
        norm = nn.BatchNorm2d(
            channels, self.eps, self.momentum, device=self.weight.device, dtype=self.weight.dtype
        ).train(self.training)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(self, name)[:channels])
        assert norm.num_batches_tracked is not None
        if self.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(self.num_batches_tracked)
        return norm


class ElasticLinear(nn.Linear):
    """A linear layer of which as many inputs are used as come in: (B, in) with in <= in_features -> (B, out)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight[:, : x.shape[-1]], self.bias)

    @torch.no_grad()
    def static(self, inputs: int) -> nn.Linear:
        layer = nn.utils.skip_init(
            nn.Linear, inputs, self.out_features, self.bias is not None,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        layer.weight.copy_(self.weight[:, :inputs])
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """x times hard_sigmoid(expand(relu(reduce(mean of x)))), with 1 x 1 convolutions that have biases.

    The hidden width is ``make_divisible(channels // 4)``; the hard sigmoid is relu6(x + 3) / 6.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = make_divisible(channels // 4)
        self.reduce: nn.Conv2d = nn.Conv2d(channels, hidden, 1)
        self.expand: nn.Conv2d = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * functional.hardsigmoid(gates)


class ElasticSqueezeExcite(SqueezeExcite):
    """Squeeze and excitation of as many channels as come in, its hidden width with them."""

    reduce: ElasticConv2d
    expand: ElasticConv2d

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        hidden = make_divisible(channels // 4)
        self.reduce = ElasticConv2d(channels, hidden, 1)
        self.expand = ElasticConv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._follow(x.shape[1])
        return super().forward(x)

    def _follow(self, channels: int) -> None:
        self.reduce.active_out, self.expand.active_out = make_divisible(channels // 4), channels

    def static(self, channels: int) -> SqueezeExcite:
        """The plain module for the first ``channels`` channels."""
        self._follow(channels)
        made = SqueezeExcite.__new__(SqueezeExcite)
        nn.Module.__init__(made)
        made.reduce = self.reduce.static(channels)
        made.expand = self.expand.static(self.reduce.active_out)
        return made
