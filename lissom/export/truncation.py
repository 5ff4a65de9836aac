"""The part of a model up to one of its modules, as a model of its own.

``lissom.export.cuts`` says where a model can be cut; the runtime cuts exported graphs there. Where the part behind the
cut is never run, it need not be in the model: this takes the part before it out of the torch module. Layers keep their
paths, weights their names; what only the rest needs is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone

__all__ = ["truncate"]


def truncate(model: nn.Module, shape: tuple[int, ...], path: str) -> nn.Module:
    """A module that computes what ``model`` does up to the module at ``path``, and answers with that module's output.

    It shares nothing with ``model``, and is in evaluation mode. Layers follow ``train()`` and ``eval()``; what
    ``forward`` itself decides by ``self.training`` is as in evaluation. Raises NotApplicable where the model's forward
    cannot be followed symbolically (torch.fx), and where the part found this way answers otherwise than the module.
    """
    model = clone(model)
    modules = dict(model.named_modules())
    if not path or path not in modules:
        raise NotApplicable(f"the model has no module {path!r} to take it apart behind")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward on stand-ins, which raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotApplicable(
            f"the model cannot be taken apart behind {path!r}, as its forward cannot be followed symbolically: {reason}"
        ) from error
    last = next((node for node in reversed(graph.nodes) if _inside(node, path)), None)
    if last is None:
        raise NotApplicable(f"the model cannot be taken apart behind {path!r}, which is never called")
    behind = True
    for node in reversed(list(graph.nodes)):
        behind = behind and node is not last
        if behind or (node is not last and not node.users and not _changes_something(node)):
            graph.erase_node(node)
    graph.output(last)
    part = fx.GraphModule(model, graph, f"{type(model).__name__}Part").eval()
    _check(model, part, shape, path)
    return part


class _Tracer(fx.Tracer):
    """Follows a forward down to torch's own layers, and what timm says cannot be followed."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(get_notrace_modules())) or super().is_leaf_module(m, module_qualified_name)


def _inside(node: fx.Node, path: str) -> bool:
    """Whether the module at ``path`` computes a node."""
    if node.op == "call_module":
        return node.target == path or str(node.target).startswith(f"{path}.")
    stack = node.meta.get("nn_module_stack") or {}
    return node.op in ("call_function", "call_method") and any(entry[0] == path for entry in stack.values())


def _changes_something(node: fx.Node) -> bool:
    """Whether a node is there for more than its answer: the input, and what writes into a tensor."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = node.op in ("call_method", "call_function") and (name == "setitem" or name.endswith("_"))
    return node.op == "placeholder" or writes


@torch.no_grad()
def _check(model: nn.Module, part: nn.Module, shape: tuple[int, ...], path: str) -> None:
    found: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: found.append(output))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        model(x)
        handle.remove()  # the part has the same modules
        own = part(x)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotApplicable(f"the part of the model up to {path!r} does not run by itself: {reason}") from error
    finally:
        handle.remove()
    same = len(found) == 1 and all(isinstance(y, torch.Tensor) for y in (own, *found))
    if not same or own.shape != found[0].shape or not torch.allclose(own, found[0], rtol=1e-4, atol=1e-5):
        raise NotApplicable(
            f"the model cannot be taken apart behind {path!r}: the part before it, by itself, does not answer as that "
            "module does in the model"
        )
