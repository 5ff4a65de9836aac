"""Roofline and waterline: the least time that a machine needs for a kernel, and for kernels one after another.

Lavin, "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617). With operations = 2 x
multiply-accumulates, peak P operations a second and bandwidth W bytes a second:

    ideal latency = ops / P          efficiency E = ideal / measured latency       intensity I = ops / bytes
    roofline:  E_max = min(1, I / ridge),  ridge = P / W
    waterline: t_i = max(ops_i / P, bytes_i / W),  bound T = sum t_i,  E_max = (sum ops_i / P) / T

The waterline is never above the roofline of the sums, min(1, (sum ops / sum bytes) / ridge): averaging lets
compute-bound kernels hide the memory-bound ones, which cannot happen where kernels run one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

__all__ = [
    "Block",
    "Kernel",
    "Machine",
    "Waterline",
    "convfirst_block",
    "convolution",
    "efficiency",
    "mbconv_block",
    "roofline",
    "waterline",
]


class Work(Protocol):
    """Anything with operations and bytes: a Kernel, a LayerCost."""

    @property
    def ops(self) -> float: ...

    @property
    def bytes(self) -> float: ...


@dataclass(frozen=True)
class Kernel:
    """One kernel: operations (2 x multiply-accumulates) and bytes moved to and from memory."""

    name: str
    ops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.ops / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True)
class Machine:
    """``peak`` operations a second at ``bits``, and memory ``bandwidth`` in bytes a second; ``notes``: how measured."""

    peak: float
    bandwidth: float
    bits: int = 32
    threads: int = 1
    notes: tuple[str, ...] = ()

    @property
    def ridge(self) -> float:
        """The intensity, operations a byte, from which on arithmetic is the limit."""
        return self.peak / self.bandwidth

    def seconds(self, kernel: Work) -> float:
        """The least time of one kernel."""
        return max(kernel.ops / self.peak, kernel.bytes / self.bandwidth)

    def memory_bound(self, kernel: Work) -> bool:
        return kernel.bytes / self.bandwidth > kernel.ops / self.peak

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes), "ridge": self.ridge}


@dataclass(frozen=True)
class Waterline:
    """The bound for kernels one after another. Times in seconds, efficiencies in [0, 1].

    ``ideal_s``: all operations at the peak. ``roofline_s``: the bound if operations and bytes of all kernels could
    overlap freely; ``bound_s``: the waterline, kernel by kernel. ``ideal_s <= roofline_s <= bound_s``.
    """

    ideal_s: float
    roofline_s: float
    bound_s: float
    memory_bound: tuple[bool, ...]

    @property
    def max_efficiency(self) -> float:
        return self.ideal_s / self.bound_s if self.bound_s else 1.0

    @property
    def roofline_of_sums(self) -> float:
        """The maximum efficiency that the sums of operations and bytes suggest: never below ``max_efficiency``."""
        return self.ideal_s / self.roofline_s if self.roofline_s else 1.0


def roofline(kernel: Work, machine: Machine) -> float:
    """The highest efficiency one kernel can reach: min(1, intensity / ridge)."""
    seconds = machine.seconds(kernel)
    return kernel.ops / machine.peak / seconds if seconds else 1.0


def waterline(kernels: Iterable[Work], machine: Machine | Sequence[Machine]) -> Waterline:
    """The waterline of ``kernels``; one machine for all, or one each where their precisions differ.

    Raises ValueError where there are not as many machines as kernels.
    """
    kernels = list(kernels)
    machines = [machine] * len(kernels) if isinstance(machine, Machine) else list(machine)
    pairs = list(zip(kernels, machines, strict=True))
    ideal = sum(k.ops / m.peak for k, m in pairs)
    moving = sum(k.bytes / m.bandwidth for k, m in pairs)
    bound = sum(m.seconds(k) for k, m in pairs)
    return Waterline(ideal, max(ideal, moving), bound, tuple(m.memory_bound(k) for k, m in pairs))


def efficiency(ops: float, seconds: float, machine: Machine) -> float:
    """Computational efficiency: ideal over measured latency. Above 1 says: wrong peak, precision or count."""
    return ops / machine.peak / seconds


def convolution(
    batch: int, height: int, width: int, channels: int, filters: int, kernel: tuple[int, int],
    stride: int = 1, groups: int = 1, element_bytes: float = 4,
) -> Kernel:  # fmt: skip
    """A convolution with "same" padding: input and output (batch, channels, height, width), each moved once."""
    rows, columns = -(-height // stride), -(-width // stride)
    weights = filters * (channels // groups) * kernel[0] * kernel[1]
    ops = 2 * batch * rows * columns * weights
    elements = batch * (height * width * channels + rows * columns * filters) + weights
    return Kernel(f"{kernel[0]}x{kernel[1]} {channels}->{filters} groups {groups}", ops, elements * element_bytes)


@dataclass(frozen=True)
class Block:
    """A block's convolutions one after another (``layers``), and all of them in one kernel (``fused``).

    The fused kernel moves block input, block output and all weights; what lies between stays on the chip.
    """

    layers: tuple[Kernel, ...]
    fused: Kernel

    @property
    def unfused(self) -> Kernel:
        """The sums of the layers."""
        return Kernel("layer by layer", sum(k.ops for k in self.layers), sum(k.bytes for k in self.layers))


def _block(name: str, batch: int, side: int, element_bytes: float, specs: Sequence[tuple[int, int, int, int]]) -> Block:
    """``specs``: (channels, filters, kernel, groups) of each convolution, stride 1."""
    layers = tuple(
        convolution(batch, side, side, c, k, (r, r), groups=g, element_bytes=element_bytes) for c, k, r, g in specs
    )
    weights = sum(k * (c // g) * r * r for c, k, r, g in specs)
    ends = batch * side * side * (specs[0][0] + specs[-1][1])
    return Block(layers, Kernel(name, sum(k.ops for k in layers), (ends + weights) * element_bytes))


def convfirst_block(
    batch: int, side: int, channels: int, expansion: int = 4, group_width: int = 8, kernel: int = 3,
    element_bytes: float = 4,
) -> Block:  # fmt: skip
    """Costs of a ConvFirst block, stride 1: grouped convolution on C channels, then 1x1 C -> eC -> C."""
    c, e = channels, expansion
    specs = [(c, c, kernel, c // group_width), (c, e * c, 1, 1), (e * c, c, 1, 1)]
    return _block("convfirst", batch, side, element_bytes, specs)


def mbconv_block(
    batch: int, side: int, channels: int, expansion: int = 4, group_width: int = 8, kernel: int = 3,
    element_bytes: float = 4,
) -> Block:  # fmt: skip
    """Costs of an MBConv block, stride 1: 1x1 C -> eC, grouped convolution on eC channels, 1x1 eC -> C."""
    c, e = channels, expansion
    specs = [(c, e * c, 1, 1), (e * c, e * c, kernel, e * c // group_width), (e * c, c, 1, 1)]
    return _block("mbconv", batch, side, element_bytes, specs)
