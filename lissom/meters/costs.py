"""What every layer of a network computes and moves: multiply-accumulates, parameters, bytes; for any nn.Module.

One forward pass runs under a dispatch mode, which sees every tensor operation exactly once, whether it came from a
layer or from a function call in some ``forward``. Forward hooks say which module is running, so each operation counts
for the innermost module around it, and nothing counts twice.

Bytes are the least that must move to and from memory: each input, output and weight once. Inside a module that
multiplies (convolution, linear, attention), elementwise work counts no bytes of its own: it can be fused into it.
Views move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lissom.errors import LissomError

__all__ = ["KINDS", "LayerCost", "layer_costs", "total"]

KINDS = ("conv", "pointwise", "grouped", "depthwise", "linear", "attention", "norm", "activation", "other")

_NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
          "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_fused_rms_norm"}  # fmt: skip
_ACTIVATIONS = {"relu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu",
                "mish", "_prelu_kernel", "softplus", "_softmax", "_log_softmax", "glu", "relu6"}  # fmt: skip
_ATTENTION = ("_scaled_dot_product_", "_efficient_attention_forward", "_flash_attention_forward")
_FREE = {"_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "_local_scalar_dense"}


@dataclass(frozen=True)
class LayerCost:
    """What one layer (module path) computes and moves in one forward pass of a batch.

    ``macs``: multiply-accumulates; an operation count is twice that. ``params``: parameters first used here.
    Bytes, at ``bits`` an element: activations read and written, and weights (parameters and buffers) read.
    """

    path: str
    kind: str
    macs: int
    params: int
    read_bytes: int
    write_bytes: int
    weight_bytes: int
    bits: int = 32
    batch: int = 1

    @property
    def ops(self) -> int:
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes + self.weight_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.ops / self.bytes if self.bytes else 0.0

    def at(self, bits: int | None = None, batch: int | None = None) -> LayerCost:
        """The same layer with elements of ``bits`` bits, on a batch of ``batch``: weights are read once a batch."""
        bits, batch = bits or self.bits, batch or self.batch

        def scaled(amount: int) -> int:
            return amount * batch // self.batch

        return replace(
            self,
            macs=scaled(self.macs),
            read_bytes=scaled(self.read_bytes) * bits // self.bits,
            write_bytes=scaled(self.write_bytes) * bits // self.bits,
            weight_bytes=self.weight_bytes * bits // self.bits,
            bits=bits,
            batch=batch,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LayerCost:
        return cls(**fields)


def layer_costs(model: nn.Module, shape: tuple[int, ...], batch: int = 1, bits: int = 32) -> list[LayerCost]:
    """The cost of every layer of ``model`` on ``batch`` inputs of ``shape`` (C, H, W), in order of execution.

    A row is a module path; the root's own operations have the path "". A module that runs several times is one row
    with their sum. ``bits`` is the size of an element, for bytes only. The model is left as it was.

    Raises LissomError where the model does not run on such an input.
    """
    meter = _Meter(model)
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, *shape), generator=generator).to(reference.device, reference.dtype)
    try:
        with torch.no_grad(), _in_eval(model), _plain_attention(), meter.hooks(model), meter:
            model(x)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LissomError(f"the model does not run on an input of shape {(batch, *shape)}: {first}") from error
    return [tally.cost(path, bits, batch) for path, tally in meter.tallies.items()]


def total(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, multiply-accumulates) of ``model`` on one input of ``shape`` (C, H, W)."""
    return sum(p.numel() for p in model.parameters()), sum(cost.macs for cost in layer_costs(model, shape))


@dataclass
class _Tally:
    """What one module path has done so far; elements, not bytes. Index 0: work without multiplications, 1: with."""

    macs: dict[str, int] = field(default_factory=dict)  # by kind
    moved: dict[str, int] = field(default_factory=dict)  # by kind
    params: int = 0
    read: list[int] = field(default_factory=lambda: [0, 0])
    written: list[int] = field(default_factory=lambda: [0, 0])
    weights: list[int] = field(default_factory=lambda: [0, 0])

    def cost(self, path: str, bits: int, batch: int) -> LayerCost:
        multiplies = int(sum(self.macs.values()) > 0)
        main = self.macs if multiplies else self.moved
        kind = max(main, key=lambda name: main[name])
        sizes = (self.read[multiplies], self.written[multiplies], self.weights[multiplies])
        read, written, weights = (elements * bits // 8 for elements in sizes)
        return LayerCost(path, kind, sum(self.macs.values()), self.params, read, written, weights, bits, batch)


class _Meter(TorchDispatchMode):
    """Counts every operation for the module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tallies: dict[str, _Tally] = {}
        self._running: list[str] = [""]
        # Weights are known by their storage, so that a transposed or sliced parameter is still one.
        self._weights = {_storage(t) for t in (*model.parameters(), *model.buffers()) if t.numel()}
        self._uncounted: dict[int, int] = {}
        for parameter in model.parameters():
            if parameter.numel():
                key = _storage(parameter)
                self._uncounted[key] = self._uncounted.get(key, 0) + parameter.numel()

    @contextmanager
    def hooks(self, model: nn.Module) -> Any:
        """Keep ``_running`` the stack of module paths in execution."""

        def enter(path: str) -> Callable[..., None]:
            return lambda module, inputs: self._running.append(path)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._running.pop()

        with ExitStack() as handles:
            for path, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.callback(module.register_forward_pre_hook(enter(path)).remove)
                    handles.callback(module.register_forward_hook(leave).remove)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        if not func.is_view and name not in _FREE and outputs:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self._count(name, args, inputs, outputs)
        return output

    def _count(self, name: str, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        tally = self.tallies.setdefault(self._running[-1], _Tally())
        weights = [t for t in inputs if _storage(t) in self._weights]
        kind, macs = _work(name, args, outputs, bool(weights))
        # Later outputs are statistics for a backward pass, except where an operation splits its input.
        written = sum(t.numel() for t in (outputs if name.startswith(("split", "unbind")) else outputs[:1]))
        read = sum(map(_stored, inputs)) - sum(map(_stored, weights))
        tally.macs[kind] = tally.macs.get(kind, 0) + macs
        tally.moved[kind] = tally.moved.get(kind, 0) + read + written
        for weight in weights:
            tally.params += self._uncounted.pop(_storage(weight), 0)
        multiplies = int(macs > 0)
        tally.read[multiplies] += read
        tally.written[multiplies] += written
        tally.weights[multiplies] += sum(map(_stored, weights))


def _work(name: str, args: Any, outputs: list[torch.Tensor], weighted: bool) -> tuple[str, int]:
    """(kind, multiply-accumulates) of one operation."""
    if name in ("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"):
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        # Every output (of a transposed one: input) element meets one filter.
        macs = (x if transposed else outputs[0]).numel() * prod(weight.shape[1:])
        if groups > 1:
            return ("depthwise" if groups == x.shape[1] else "grouped"), macs
        return ("pointwise" if prod(weight.shape[2:]) == 1 else "conv"), macs
    if name in ("mm", "bmm", "mv", "dot"):
        return _matmul_kind(name, weighted), args[0].numel() * prod(args[1].shape[args[0].ndim - 1 :])
    if name in ("addmm", "baddbmm", "addmv"):
        return _matmul_kind(name, weighted), args[1].numel() * prod(args[2].shape[args[1].ndim - 1 :])
    if name.startswith(_ATTENTION):
        q, k, v = args[:3]  # (..., queries, D), (..., keys, D), (..., keys, DV)
        return "attention", q.numel() * k.shape[-2] + prod(q.shape[:-1]) * k.shape[-2] * v.shape[-1]
    if name == "mkldnn_rnn_layer":
        x, input_weight, hidden_weight = args[:3]  # (T, B, C), (gates * H, C), (gates * H, H)
        return "linear", prod(x.shape[:2]) * (input_weight.numel() + hidden_weight.numel())
    if name in _NORMS:
        return "norm", 0
    return ("activation" if name in _ACTIVATIONS else "other"), 0


def _matmul_kind(name: str, weighted: bool) -> str:
    """A batched product of two activations is attention's; every other product applies weights."""
    return "attention" if "bmm" in name and not weighted else "linear"


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _stored(tensor: torch.Tensor) -> int:
    """Elements that lie in memory: an expanded dimension counts once."""
    sizes: Iterable[tuple[int, int]] = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(1 if stride == 0 else size for size, stride in sizes)


@contextmanager
def _in_eval(model: nn.Module) -> Any:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _plain_attention() -> Any:
    """torch's one-call form of nn.MultiheadAttention hides its products from the dispatch mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
