"""How a training step is computed on this machine: its precision, the form of attention, the layout of maps.

None of it changes what is computed, but for rounding. What is chosen depends on the model and the kind of processor
alone, never on a measurement, so that a run repeated on one machine gives the same result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.overrides import TorchFunctionMode

from lissom.errors import LissomError
from lissom.runtime.target import cpu_flags

__all__ = ["channels_last", "fast_precision", "gains", "plain_attention", "taught_in", "whole"]


def fast_precision(model: nn.Module, accelerator: str) -> str:
    """bf16-mixed where it makes a step of ``model`` faster than float32, else 32-true."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    # Measured on both, docs/benchmarks/training_steps.md: products of avx512_bf16 pay for the casts as those of AMX do.
    able = accelerator in ("auto", "cpu") and not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})
    return "bf16-mixed" if able and not _depthwise(model) else "32-true"


def _depthwise(model: nn.Module) -> bool:
    """Whether most of the model's spatial convolutions are depthwise: torch computes these slowly in bfloat16."""
    spatial = _spatial(model)
    return 2 * sum(m.groups == m.in_channels > 1 for m in spatial) > len(spatial)


def _spatial(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]


@contextmanager
def channels_last(models: Iterable[nn.Module], inputs: torch.Tensor) -> Iterator[None]:
    """Lay the maps of convolutional networks out with the channels last while a processor trains with them.

    A model whose code takes a map for contiguous (``x.view(len(x), -1)``) cannot be laid out so: a step of a copy on
    ``inputs``, a few images (N, C, H, W), tells, and it is left as it is. Weights keep their values, and are contiguous
    again afterwards.
    """
    changed = [m for m in models if gains(m) and _can(m, inputs)]
    try:
        for model in changed:
            convert_conv2d_weight_memory_format(model, torch.channels_last)
        yield
    finally:
        for model in changed:
            convert_conv2d_weight_memory_format(model, torch.contiguous_format)


def gains(model: nn.Module) -> bool:
    """Whether the model is a convolutional network: with the channels last its step is faster, or with LayerNorm
    between the layers (ConvNeXt) no slower. A transformer's patches are a single convolution."""
    return len(_spatial(model)) > 1


def _can(model: nn.Module, inputs: torch.Tensor) -> bool:
    tried = copy.deepcopy(model).train()
    convert_conv2d_weight_memory_format(tried, torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        try:
            total = sum((answer.float().sum() for answer in _tensors(tried(inputs))), torch.zeros(()))
            if total.requires_grad:  # a teacher's weights may be frozen
                total.backward()
        except (RuntimeError, ValueError, LissomError):  # not the layout: the training says it too
            return False
    return True


def _tensors(answers: Any) -> Iterator[torch.Tensor]:
    if isinstance(answers, torch.Tensor):
        yield answers
    elif isinstance(answers, list | tuple | dict):
        for answer in answers.values() if isinstance(answers, dict) else answers:
            yield from _tensors(answer)


@contextmanager
def plain_attention(device: torch.device, precision: str) -> Iterator[None]:
    """Below float32 on a processor, attention that is trained through is made of plain matrix products.

    There the backward pass of torch's fused attention is slow (2.15, AMX, 65 tokens of 4 heads: 3 times slower). Its
    forward pass is not, so that frozen layers and teachers keep it.
    """
    if device.type != "cpu" or precision == "32-true":
        yield
        return
    cuda = torch.backends.cuda  # where torch keeps the switch; the processor's products heed it too
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with _PlainAttention():
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)


@contextmanager
def taught_in(precision: str, teacher: object, device: torch.device) -> Iterator[None]:
    """Let a frozen teacher compute in the precision of the training: mixed, its answers float32 again.

    Fabric gives a training's own model its precision; beside it a teacher in float32 took a third of a ViT's step.
    What is no module, or a script that cannot be changed, is left as it is.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if dtype is None or not isinstance(teacher, nn.Module) or isinstance(teacher, torch.jit.ScriptModule):
        yield
        return
    forward, own = teacher.forward, "forward" in vars(teacher)

    def mixed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            found = forward(*args, **kwargs)
        return whole(found)

    teacher.forward = mixed
    try:
        yield
    finally:
        if own:
            teacher.forward = forward
        else:
            del teacher.forward


def whole(answers: Any) -> Any:
    """The same with its floating point tensors in float32, those in lists, tuples and dicts too."""
    if isinstance(answers, torch.Tensor):
        return answers.float() if answers.is_floating_point() else answers
    if type(answers) is dict:
        return {name: whole(answer) for name, answer in answers.items()}
    if type(answers) in (list, tuple):
        return type(answers)(whole(answer) for answer in answers)
    return answers


class _PlainAttention(TorchFunctionMode):
    """``scaled_dot_product_attention`` in its plain form wherever a gradient will flow back through it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and torch.is_grad_enabled():
            given = (*args[:3], *(kwargs.get(name) for name in ("query", "key", "value")))
            if any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in given):
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
