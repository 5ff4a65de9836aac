"""What this machine reaches at most: operations a second in a runtime at a precision, and memory bandwidth.

The peak is the best of a few large graphs in the runtime that is profiled, at the precision that is profiled: chains
of convolutions and of matrix products. No processor's data sheet is consulted. On processors without an instruction
for 8-bit products, the 8-bit convolution is several times as fast as the 8-bit matrix product: the best counts.

The bandwidth is that of a copy between buffers several times the last-level cache; bytes read and written both count.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.meters.waterline import Machine
from lissom.runtime.openvino_graph import import_openvino
from lissom.runtime.target import default_threads

__all__ = ["kernel_bits", "measure_bandwidth", "measure_machine"]

SECONDS = 0.25  # a graph, and the copy
LAYERS = 4  # in a chain, so that what happens at its ends matters little
MULTIPLIES = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "u8": 8}


def measure_machine(runtime: str = "openvino", bits: int = 32, threads: int | None = None) -> Machine:
    """The machine's peak in ``runtime`` at ``bits`` (32, 16: bfloat16, or 8) and its bandwidth; about three seconds.

    ``threads`` None takes every processor this process may use. Raises LissomError where the runtime computes in
    another precision than asked for, or its peak cannot be measured.
    """
    if runtime != "openvino":
        raise LissomError(f"the peak of {runtime!r} cannot be measured; use the runtime 'openvino'")
    if bits not in (32, 16, 8):
        raise LissomError(f"there are no kernels of {bits} bits to measure; give 32, 16 or 8")
    threads = threads or default_threads()
    rates = _rates(bits, threads)
    if not rates:
        raise LissomError(f"{runtime} has no kernels of {bits} bits on this processor")
    best = max(rates, key=lambda name: rates[name])
    bandwidth, size = measure_bandwidth(threads)
    found = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    notes = (
        f"peak: {best} in {runtime}, {bits} bits, {threads} threads (10^9 operations a second: {found})",
        f"bandwidth: copy of {size / 2**20:.0f} MiB, bytes read and written",
    )
    return Machine(rates[best], bandwidth, bits, threads, notes)


def measure_bandwidth(threads: int, seconds: float = SECONDS) -> tuple[float, int]:
    """(bytes a second, bytes of one buffer): the best of repeated copies, read and written bytes both counted."""
    size = min(max(64 * 2**20, 4 * _last_level_cache()), 512 * 2**20)
    source, copy = np.ones(size // 8), np.zeros(size // 8)  # written, so that their pages exist
    parts = list(zip(np.array_split(source, threads), np.array_split(copy, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # NumPy copies outside the interpreter's lock
        copying = {"copy": lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))}
        best = _best(copying, seconds)["copy"]
    return 2 * source.nbytes / best, source.nbytes


def kernel_bits(kernel: str) -> int | None:
    """The bits that an OpenVINO kernel computes in, from its name (``jit_avx2_I8``: 8); None where it does not say."""
    match = re.search(r"_(b?f16|f32|[iu]8)$", kernel.lower())
    return _BITS[match[1]] if match else None


def _best(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The shortest time of each run, in turns for ``seconds`` in all, at least three times: a peak is a maximum."""
    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


def _rates(bits: int, threads: int) -> dict[str, float]:
    """Operations a second of each graph that the runtime runs in ``bits``."""
    core = import_openvino().Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bits == 16 else "f32",
    }
    runs, ops = {}, {}
    for name, build in _GRAPHS.items():
        model, ops[name] = build(threads, bits)
        compiled = core.compile_model(model, "CPU", options)
        infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        kernels = [info["primitiveType"].astype(str) for info in infos if info["layerType"].astype(str) in MULTIPLIES]
        if kernels and all(kernel_bits(kernel) == bits for kernel in kernels):
            x = np.random.default_rng(0).random(tuple(model.inputs[0].shape), np.float32)
            runs[name] = functools.partial(compiled.create_infer_request().infer, [x], share_inputs=True)
    return {name: ops[name] / seconds for name, seconds in _best(runs, SECONDS * len(runs)).items()}


def _chain(x: Any, weight_shape: tuple[int, ...], layer: Callable[[Any, Any], Any], bits: int) -> Any:
    """``LAYERS`` times the layer and a ReLU; for 8 bits with the fake quantisation that makes the runtime use them."""
    import openvino as ov
    from openvino import opset13 as op

    def quantised(value: Any, low: float, high: float, levels: int) -> Any:
        ends = (np.float32(low), np.float32(high))
        return op.fake_quantize(value, *ends, *ends, levels) if bits == 8 else value

    generator = np.random.default_rng(0)
    y = x
    for _ in range(LAYERS):
        weight = op.constant(0.02 * generator.random(weight_shape, np.float32) - 0.01)
        y = layer(quantised(y, 0, 2.55, 256), quantised(weight, -0.0254, 0.0254, 255))
        y = op.relu(y)
    return ov.Model([y], [x], "peak")


def _convolutions(side: int, channels: int, kernel: int) -> Callable[[int, int], tuple[Any, float]]:
    def build(batch: int, bits: int) -> tuple[Any, float]:
        from openvino import opset13 as op

        x = op.parameter([batch, channels, side, side], np.float32)
        pad = [kernel // 2] * 2
        shape = (channels, channels, kernel, kernel)
        model = _chain(x, shape, lambda y, w: op.convolution(y, w, [1, 1], pad, pad, [1, 1]), bits)
        return model, LAYERS * 2.0 * batch * side**2 * channels**2 * kernel**2

    return build


def _products(rows: int, width: int) -> Callable[[int, int], tuple[Any, float]]:
    def build(batch: int, bits: int) -> tuple[Any, float]:
        from openvino import opset13 as op

        x = op.parameter([batch * rows, width], np.float32)
        model = _chain(x, (width, width), lambda y, w: op.matmul(y, w, False, True), bits)
        return model, LAYERS * 2.0 * batch * rows * width**2

    return build


# Enough work for every thread: the batch grows with their number. Short graphs too, because one that takes a few
# milliseconds finds an undisturbed moment on a busy machine, and long ones, because wide units need them.
_GRAPHS = {
    "3x3 convolution, 64 channels, 28x28": _convolutions(28, 64, 3),
    "3x3 convolution, 64 channels, 56x56": _convolutions(56, 64, 3),
    "3x3 convolution, 128 channels, 28x28": _convolutions(28, 128, 3),
    "1x1 convolution, 256 channels, 14x14": _convolutions(14, 256, 1),
    "1x1 convolution, 256 channels, 28x28": _convolutions(28, 256, 1),
    "matrix product, 128 x 512 x 512": _products(128, 512),
    "matrix product, 256 x 1024 x 1024": _products(256, 1024),
}


def _last_level_cache() -> int:
    """Bytes of the largest cache that the system reports; 32 MiB where it reports none."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if match:
            sizes.append(int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]])
    return max(sizes, default=32 * 2**20)
