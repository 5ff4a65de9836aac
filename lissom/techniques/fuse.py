"""fuse: batch normalisation folded into the layer before it, and re-parameterised branches merged.

At inference y = gamma (Wx + b - mean) / sqrt(var + eps) + beta is one affine layer: W' = s W, b' = s (b - mean) + beta
with s = gamma / sqrt(var + eps). (Jacob et al. 2018, arXiv 1712.05877, section 3.2; RepVGG, arXiv 2101.03697, for
branches.) Which layer stands before which is read from the exported graph, not guessed from the order of attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import capture, clone, module_paths, run_eager
from lissom.export.plan import Plan
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique

__all__ = ["Fuse", "fold_batch_norm"]

_CONV = {"aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default"}
_TRANSPOSED = {"aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"}


@register("technique", "fuse")
@dataclass(frozen=True)
class Fuse(Technique):
    """Fold BatchNorm into convolutions and linear layers; call ``fuse()`` where a network's modules offer it.

    The answers stay the same up to rounding. Raises LissomError where they do not.
    """

    name: ClassVar[str] = "fuse"
    stage: ClassVar[str] = "fuse"

    def check(self, plan: Plan, target: Target) -> None:
        if not any(_is_norm(m) or _merges(m) for stage in plan.stages for m in stage.modules()):
            raise NotApplicable(
                "the model has no batch normalisation and no branches to merge, so there is nothing to fuse"
            )

    def apply(self, plan: Plan, task: Task) -> Plan:
        from timm.utils.model import reparameterize_model

        before = plan.model
        model = reparameterize_model(clone(before))
        folded = fold_batch_norm(model, task.shape)
        left = sum(_is_norm(m) for m in model.modules())
        probe = torch.randn(2, *task.shape, generator=torch.Generator().manual_seed(0))
        want, got = run_eager(before, probe), run_eager(model, probe)
        error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()
        if not error < 1e-3:
            raise LissomError(
                f"folding changed the model's answers by {error:.2%}: it normalises in a way fuse does not know"
            )
        stay = f"; {left} stay, since no layer alone feeds them" if left else ""
        return plan.with_model(model, f"fuse folded {folded} normalisations{stay}")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)


def _merges(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("fuse", "reparameterize", "switch_to_deploy"))


def fold_batch_norm(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Fold, in place, every BatchNorm whose only input is a convolution or linear layer used nowhere else.

    Returns how many were folded. The norm is replaced by the activation it carries (timm's BatchNormAct2d), or by
    nothing.
    """
    program = capture(model, shape)
    paths = module_paths(program)
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and _kind(node) in _CONV | _TRANSPOSED | {"aten.linear.default", _NORM}:
            calls[paths[node.name]] = calls.get(paths[node.name], 0) + 1
    folded = 0
    for node in program.graph.nodes:
        if node.op != "call_function" or _kind(node) != _NORM:
            continue
        norm, source = modules.get(paths[node.name]), node.args[0]
        if source.op != "call_function" or len(source.users) != 1 or not isinstance(norm, nn.Module):
            continue
        layer = modules.get(paths[source.name])
        shared = calls[paths[node.name]] > 1 or calls.get(paths[source.name], 0) > 1
        rest = _without_norm(norm)
        if shared or rest is None or not _fits(source, layer):
            continue
        assert isinstance(layer, nn.Module)
        _fold(layer, norm, transposed=_kind(source) in _TRANSPOSED)
        parent, _, child = paths[node.name].rpartition(".")
        setattr(modules[parent], child, rest)
        folded += 1
    return folded


_NORM = "aten.batch_norm.default"


def _kind(node: torch.fx.Node) -> str:
    return str(node.target)


def _without_norm(norm: nn.Module) -> nn.Module | None:
    """What remains of a norm module once its affine map is gone; None where that is not known."""
    if not _is_norm(norm) or norm.running_mean is None:
        return None
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    if hasattr(norm, "drop") and hasattr(norm, "act"):  # timm's BatchNormAct2d
        return nn.Sequential(norm.drop, norm.act)
    return None


def _fits(source: torch.fx.Node, layer: nn.Module | None) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    kind = _kind(source)
    if kind == "aten.linear.default":  # BatchNorm1d reads (B, C); over (B, N, C) its channels would be the tokens
        return isinstance(layer, nn.Linear) and source.meta["val"].ndim == 2
    # A subclass may compute its weight anew in forward (weight standardisation): folding would be undone there.
    if kind in _CONV:
        return type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) and layer.groups == 1


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module, transposed: bool) -> None:
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(scale)
    bias = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    axis = 1 if transposed else 0
    shape = [1] * layer.weight.ndim
    shape[axis] = -1
    layer.weight.copy_((layer.weight.double() * scale.view(shape)).to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
