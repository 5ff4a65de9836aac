"""Linear layers as 1x1 convolutions in an OpenVINO graph.

Where a processor has no integer dot product (AVX2 without VNNI), OpenVINO runs int8 matrix products by a generic
routine that is slower than float32, but int8 convolutions by a tuned kernel. Tokens (B, N, C) are the image (B, C, N,
1) in channels-last memory, so the change of form moves no data: the plugin drops the transposes. A bias and an
activation behind the layer move into the convolution's layout too, so that they are computed in its epilogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["linear_as_conv"]

# Activations that are computed value by value, and so in any layout; by their name in OpenVINO's opset.
_ACTIVATIONS = {
    "Gelu": "gelu",
    "HSigmoid": "hsigmoid",
    "HSwish": "hswish",
    "Mish": "mish",
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Swish": "swish",
    "Tanh": "tanh",
}


def linear_as_conv(graph: Any, wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Rewrite, in place, every MatMul of tokens (B, N, C) or (B, H, W, C) with constant weights; return how many.

    A MatMul of one token (a classifier head on a pooled vector) stays: there is nothing to gain. So does one whose
    friendly name is not ``wanted``.
    """
    from openvino import opset13 as op

    as_image: dict[tuple[str, int], Any] = {}  # token tensor -> the same values as an image
    count = 0
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not wanted(node.get_friendly_name()):
            continue
        weight = _weights(node)
        tokens = node.input_value(0)
        shape = tokens.get_partial_shape()
        if weight is None or shape.is_dynamic or len(shape) not in (3, 4):
            continue
        dims = [d.get_length() for d in shape]
        if int(np.prod(dims[1:-1])) < 2:
            continue
        name = node.get_friendly_name()
        image = as_image.get(_key(tokens)) or _image(op, tokens, dims, name)
        value = op.convolution(
            image, op.constant(weight[:, :, None, None]), [1, 1], [0, 0], [0, 0], [1, 1], name=f"{name}/conv"
        ).output(0)
        end = node.output(0)
        while (follower := _only_consumer(end)) is not None:
            kind = follower.get_type_name()
            if kind == "Add" and (bias := _bias(follower, end, len(weight))) is not None:
                value = op.add(value, op.constant(bias.reshape(1, -1, 1, 1)), name=follower.get_friendly_name())
            elif kind in _ACTIVATIONS and len(follower.inputs()) == 1:
                settings = [follower.get_attributes()["approximation_mode"]] if kind == "Gelu" else []
                value = getattr(op, _ACTIVATIONS[kind])(value, *settings, name=follower.get_friendly_name())
            else:
                break
            value = value.output(0)
            end = follower.output(0)
        back = _tokens(op, value, [*dims[:-1], len(weight)], name)
        for consumer in end.get_target_inputs():
            consumer.replace_source_output(back)
        as_image[_key(back)] = value
        count += 1
    if count:
        graph.validate_nodes_and_infer_types()
    return count


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _constant(output: Any) -> np.ndarray | None:
    """The array behind an output that is a constant, perhaps converted."""
    node = output.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return np.asarray(node.data, dtype=np.float32) if node.get_type_name() == "Constant" else None


def _weights(node: Any) -> np.ndarray | None:
    """A MatMul's constant weights as (out, in), or None where it multiplies two activations."""
    weight = _constant(node.input_value(1))
    if weight is None or weight.ndim != 2 or node.get_attributes()["transpose_a"]:
        return None
    return np.ascontiguousarray(weight if node.get_attributes()["transpose_b"] else weight.T)


def _only_consumer(output: Any) -> Any:
    consumers = output.get_target_inputs()
    return next(iter(consumers)).get_node() if len(consumers) == 1 else None


def _bias(add: Any, value: Any, width: int) -> np.ndarray | None:
    """The constant of an Add that adds one number a channel to ``value``."""
    for i in (0, 1):
        if add.input_value(i) == value:
            bias = _constant(add.input_value(1 - i))
            if bias is not None and bias.size == width and (bias.ndim == 0 or bias.shape[-1] == width):
                return bias
    return None


def _image(op: Any, tokens: Any, dims: list[int], name: str) -> Any:
    if len(dims) == 3:
        b, n, c = dims
        tokens = op.reshape(tokens, [b, n, 1, c], special_zero=False, name=f"{name}/rows").output(0)
    return op.transpose(tokens, [0, 3, 1, 2], name=f"{name}/image").output(0)


def _tokens(op: Any, image: Any, dims: list[int], name: str) -> Any:
    tokens = op.transpose(image, [0, 2, 3, 1], name=f"{name}/last").output(0)
    if len(dims) == 3:
        tokens = op.reshape(tokens, dims, special_zero=False, name=f"{name}/tokens").output(0)
    return tokens
