"""Which channels of a network matter: scores of every unit of every group, from its weights, from data, or by chance.

Magnitude is the group norm of DepGraph (Fang et al., CVPR 2023, arXiv 2301.12900): all weights that a channel has, in
the layers that write it, in the norms behind them and in the layers that read it. Activation is what the readers lose:
with input x and weight column W_c, removing channel c changes their output by W_c x_c, in the mean of squares
|W_c|^2 E[x_c^2] (the squares of Wanda's |W| |x|, Sun et al., arXiv 2306.11695, summed over a channel's weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.channels import Axis, Channels, Group

__all__ = ["activation_scores", "best_units", "magnitude_scores", "random_scores"]

Scores = dict[str, torch.Tensor]  # group's name -> float64 (units,)


@torch.no_grad()
def magnitude_scores(model: nn.Module, channels: Channels) -> Scores:
    """The root of the mean, over all the weights' tensors a unit has a part in, of its squared norm there.

    Each tensor's squares are divided by their mean over the units, so that layers of large and small weights count
    alike. A norm's tensor is its scale. Needs no data.
    """
    modules = dict(model.named_modules())
    scores = {}
    for name, group in channels.groups.items():
        parts = []
        for axis in group.places:
            weight = getattr(modules.get(axis.path), "weight", None)
            if not isinstance(weight, torch.Tensor):
                continue
            layer = channels.layers.get(axis.path)
            if layer is not None and layer.grouped and axis.side == "in":
                continue  # its other side has all there is
            squares = _by_unit(_squares(weight, axis, channels), group, axis)
            if squares.mean() > 0:
                parts.append(squares / squares.mean())
        scores[name] = torch.stack(parts).mean(0).sqrt() if parts else torch.ones(group.size, dtype=torch.float64)
    return scores


@torch.no_grad()
def activation_scores(model: nn.Module, channels: Channels, inputs: Iterable[torch.Tensor]) -> Scores:
    """sum over the layers that read a unit of |W_c|^2 E[x_c^2], the mean over ``inputs`` and places.

    ``inputs`` are batches (B, C, H, W) as the model takes them; it runs in evaluation mode, on its own device, and is
    left as it was. Raises LissomError where there is none.
    """
    readers = {path for group in channels.groups.values() for path in channels.readers(group)}
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for path in readers:

        def look(module: nn.Module, given: tuple[Any, ...], path: str = path) -> None:
            x = given[0].detach().double()
            x = x.flatten(0, -2) if isinstance(module, nn.Linear) else x.transpose(0, 1).flatten(1).T  # (n, C)
            sums[path] = sums.get(path, torch.zeros(())).to(x) + x.square().sum(0)
            counts[path] = counts.get(path, 0) + len(x)

        handles.append(model.get_submodule(path).register_forward_pre_hook(look))
    training = {name: module.training for name, module in model.named_modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        for batch in inputs:
            model(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = training[name]
    if readers and not counts:
        raise LissomError("activations need inputs to look at, and there are none")
    scores = {}
    for name, group in channels.groups.items():
        total = torch.zeros(group.size, dtype=torch.float64)
        for path in channels.readers(group):
            axis = Axis(path, "in")
            weight = getattr(model.get_submodule(path), "weight")  # noqa: B009 - a module's attributes are of any type
            columns = _squares(weight, axis, channels)
            total += _by_unit(columns * (sums[path] / counts[path]).cpu(), group, axis)
        scores[name] = total
    return scores


def random_scores(channels: Channels, seed: int = 0) -> Scores:
    """Uniform random numbers: the control."""
    numbers = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(group.size, generator=numbers, dtype=torch.float64) for name, group in channels.groups.items()
    }


def best_units(scores: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Of every group in ``widths`` its highest units, so many as its width, ascending; of equal ones the first.

    A width above the group's size repeats the highest, which ``narrow`` takes as a wider layer.
    """
    kept = {}
    for name, width in widths.items():
        order = torch.argsort(scores[name], descending=True, stable=True).tolist()
        kept[name] = sorted(order[:width])
        while len(kept[name]) < width:
            kept[name] += order[: width - len(kept[name])]
    return kept


def _squares(weight: torch.Tensor, axis: Axis, channels: Channels) -> torch.Tensor:
    """float64 (width,): the squared norm of what belongs to each index of an axis."""
    layer = channels.layers.get(axis.path)
    first = "in" if layer is not None and layer.transposed else "out"
    weight = weight.detach().double().cpu()
    dimension = 0 if axis.side == first or weight.ndim == 1 else 1
    if layer is not None and layer.grouped:
        dimension = 0
    return weight.transpose(0, dimension).flatten(1).square().sum(1) if weight.ndim > 1 else weight.square()


def _by_unit(values: torch.Tensor, group: Group, axis: Axis) -> torch.Tensor:
    return torch.stack([values[list(indices)].sum() for indices in group.places[axis]])
