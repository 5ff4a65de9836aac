"""OpenVINO back end: compiled for latency on one stream, in float32 unless the artifact says otherwise."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.registry import register
from lissom.runtime.backends import Answer, Inspection, LayerTime, Shape, beside, missing

__all__ = ["OpenVinoGraph", "import_openvino"]

PRECISIONS = ("f32", "f16", "bf16")


def import_openvino() -> Any:
    """The module ``openvino``, with its telemetry out of action. Raises LissomError where it is not installed."""
    os.environ.setdefault("NNCF_CI", "1")
    # OpenVINO's converter reports over the network by openvino_telemetry; where that is absent it has a stub instead.
    # It is hidden only while the converter looks for it, on OpenVINO's first import.
    hide = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if hide:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino

        return openvino
    except ImportError as error:
        raise missing("openvino") from error
    finally:
        if hide:
            del sys.modules["openvino_telemetry"]


@register("backend", "openvino")
class OpenVinoGraph:
    """A graph file (``.xml``, also ``.onnx``) compiled by OpenVINO for the processor.

    Options: ``precision`` (``f32``, ``bf16``, ``f16``): what the processor computes in, f32 by default, because
    OpenVINO itself would choose bf16 where the processor has it; ``count``: keep the time of every node; ``weights``:
    the file beside it that holds its weights, where that is not its own.
    """

    gpu = None

    def __init__(self, path: Path | None, options: dict[str, Any], threads: int) -> None:
        openvino = import_openvino()
        precision = options.get("precision", "f32")
        if precision not in PRECISIONS:
            raise LissomError(f"OpenVINO computes in {', '.join(PRECISIONS)}, not in {precision!r}")
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "PERF_COUNT": bool(options.get("count")),
        }
        # Other formats have files of weights of their own beside them, which nobody would look at.
        if path is not None and path.suffix not in (".xml", ".onnx"):
            raise LissomError(f"OpenVINO opens .xml and .onnx files here, not {path}")
        try:
            core = openvino.Core()
            model = _empty(openvino) if path is None else str(path)
            if "weights" in options:
                model = core.read_model(model, str(beside(path, options["weights"])))
            self.compiled = core.compile_model(model, "CPU", config)
            self.request = self.compiled.create_infer_request()
            self.takes = [_shape(given.partial_shape) for given in self.compiled.inputs]
            self.gives = [_shape(given.partial_shape) for given in self.compiled.outputs]
        except RuntimeError as error:
            # The last line is the reason; what precedes it is where in OpenVINO's source.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1].split(" Please check")[0] if lines else "no reason given"
            raise LissomError(f"OpenVINO cannot open {path}: {reason}") from error

    def run(self, x: np.ndarray | list[np.ndarray]) -> Answer:
        inputs = dict(enumerate(x)) if isinstance(x, list) else {0: x}
        result = self.request.infer(inputs, share_inputs=True, share_outputs=True)
        answers = [np.array(result[i]) for i in range(len(result))]  # copies: the next run reuses the buffers
        return answers[0] if len(answers) == 1 else answers

    def inspect(self) -> Inspection:
        """Reference implementations and conversions in the compiled graph."""
        reference, conversions = [], []
        precisions: dict[str, str] = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = _info(node)
            name = node.get_friendly_name()
            precisions[name] = info["outputPrecisions"].split(",")[0]
            # A conversion says "ref" whatever runs: it counts as a conversion, inserted or the model's own.
            if info["layerType"] in ("Reorder", "Convert"):
                source = precisions.get(node.input_value(0).get_node().get_friendly_name(), "?")
                target = precisions[name]
                change = "layout" if source == target else f"{source} to {target}"
                conversions.append(f"{info['originalLayersNames'] or name} ({change})")
            elif info["primitiveType"].startswith("ref") or info["layerType"] == "Reference":
                reference.append(info["originalLayersNames"] or name)
        return Inspection(reference, conversions)

    def layer_times(self, runs: int) -> list[LayerTime]:
        """Mean times over ``runs`` runs after a warm-up; needs the option ``count``."""
        rng = np.random.default_rng(0)
        x = [rng.standard_normal(tuple(given.shape), dtype=np.float32) for given in self.compiled.inputs]
        warm = max(3, runs // 5)
        # OpenVINO reports means over all the runs so far, cut to whole microseconds (half of one is lost on average):
        # the warm-up is taken out again by subtraction.
        before = self._means(x, warm)
        after = self._means(x, runs)
        times = []
        for name, (names, kind, implementation, mean) in after.items():
            # A node too quick for the counter in the warm-up has no time there yet.
            total = mean * (warm + runs) - (before[name][3] * warm if name in before else 0.0)
            times.append(LayerTime(names, kind, implementation, max(0.0, total / runs)))
        return times

    def _means(self, x: list[np.ndarray], runs: int) -> dict[str, tuple[tuple[str, ...], str, str, float]]:
        """Run, then read the mean time of every node that ran since the graph was opened, by the node's name."""
        for _ in range(runs):
            self.run(x)
        rows = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = _info(node)
            counted = info["execTimeMcs"].isdigit()
            # A mean below one microsecond reads "not_executed", as a constant's does; only what ran has a kernel.
            if counted or not info["primitiveType"].startswith(("unknown", "undef")):
                names = tuple(name for name in info["originalLayersNames"].split(",") if name)
                mean = (int(info["execTimeMcs"]) if counted else 0) + 0.5
                row = (names, info["layerType"], info["primitiveType"], mean)
                rows[node.get_friendly_name()] = row
        return rows


def _shape(shape: Any) -> Shape:
    return tuple(shape.to_shape()) if shape.is_static else None


def _info(node: Any) -> dict[str, str]:
    return {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}


def _empty(openvino: Any) -> Any:
    from openvino import opset13

    x = opset13.parameter([1, 1], np.float32)
    return openvino.Model([opset13.relu(x)], [x], "empty")
