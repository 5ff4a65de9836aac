"""Probes: single layers measured on the device in two forms, for techniques that settle a knob by measurement.

A layer's multiplications do not tell its time. A probe exports the layer and what may take its place as tiny artifacts
of the runtime, and runs all of them in turn on the device, each in a process of its own; a pair's ratio stands on times
from the same minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from lissom.errors import LissomError
from lissom.export.exporting import export_plan
from lissom.export.plan import Plan, Precision
from lissom.meters.measurement import Measurement, Meter
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target
from lissom.techniques.base import Probe

__all__ = ["layer_probe"]

SECONDS = 0.4  # of running, for each form of each layer
CALIBRATION = 8  # batches of random inputs, where the precision is calibrated


def layer_probe(target: Target, meter: Meter, precision: Precision | None = None, *, seconds: float = SECONDS) -> Probe:
    """A function that measures (layer, replacement, shape) and returns, for each, layer's time / replacement's time.

    ``shape`` is one input's, without the batch: (N, C) for tokens, (C, H, W) for images; the batch is the target's.
    ``precision`` is that of the whole candidate (float32): what it says of the model itself, the path "", holds for
    both forms, with its options; 8 bits are calibrated on random normal inputs, which is enough for times. The layers
    stay as they are. A number above 1 means that the replacement is faster.

    The function raises LissomError where a form cannot be exported or does not run on the device.
    """
    given = precision or Precision()
    policy = Precision({"": given.at("")}, given.options)

    def export(module: nn.Module, shape: tuple[int, ...], path: Path) -> Artifact:
        calibration = None
        if policy.at("") == 8:
            size = (CALIBRATION * target.batch, *shape)
            calibration = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
        return export_plan(
            Plan((module,), precision=policy), target, path, shape=shape, calibration=calibration, recipe="a probe"
        )

    def probe(pairs: Sequence[tuple[nn.Module, nn.Module, tuple[int, ...]]]) -> list[float]:
        if not pairs:
            return []
        with tempfile.TemporaryDirectory(prefix="lissom-probe-") as folder:
            artifacts = [
                export(module, shape, Path(folder) / f"{number}-{form}")
                for number, (layer, replacement, shape) in enumerate(pairs)
                for form, module in (("own", layer), ("replacement", replacement))
            ]
            measured = meter.measure(artifacts, threads=target.threads, seconds=seconds, memory=False)
        return [_ratio(own, other) for own, other in zip(measured[::2], measured[1::2], strict=True)]

    return probe


def _ratio(own: Measurement, other: Measurement) -> float:
    """How many times as long ``own`` takes. Both speedups are against one reference, round by round."""
    if own.speedup and other.speedup:
        return other.speedup / own.speedup
    if not (own.latency_ms > 0 and other.latency_ms > 0):
        raise LissomError("the meter told no time for a layer's probe; measure with one that does")
    return own.latency_ms / other.latency_ms
