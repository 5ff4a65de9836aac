"""PreCrop: an untrained network made narrower (or reconfigured) before it is trained (arXiv 2203.02549).

Layer-wise densities (``lissom.training.densities``) become widths. In a chain, interface j between the layers j - 1 and
j keeps

    c_j = round(C_j (p_{j-1} p_j)^(1/4)),    at least 1,                                       (1)

the geometric mean of what its two sides ask for, C sqrt(p) each; where every layer at an interface has its other side
fixed, as inside the blocks of a residual network whose stream stays, densities are linear in the width and c = round(C
p) with the mean density p, weighed by the layers' weights. A stream that is cropped is one interface with the weighed
mean of all its layers. Then all free widths are multiplied by one factor, so that the budget holds, and rounded.

What comes out is a dense, smaller network with weights drawn anew: no mask, no weight of the old one.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.layers.channel_importance import best_units
from lissom.layers.channels import Axis, Channels, Group, Layer, find_channels, narrow
from lissom.training.densities import (
    Loss,
    closed_form,
    erk,
    grasp_scores,
    kept_masks,
    masks_densities,
    snip_scores,
    synflow_masks,
    uniform,
)

__all__ = [
    "FROM_A_BATCH",
    "SOURCES",
    "chain_widths",
    "draw_anew",
    "fitted_widths",
    "inner_groups",
    "layer_densities",
    "preconfig",
    "precrop",
    "width_factors",
]

SOURCES = ("synflow", "closed_form", "erk", "uniform")
FROM_A_BATCH = ("snip", "grasp")
STEPS = 100  # of SynFlow


# Widths


def chain_widths(
    channels: Sequence[int], densities: Sequence[float], fixed: Sequence[int] = (), factor: float = 1.0
) -> list[int]:
    """(1) for a chain: ``channels`` are those of its L + 1 interfaces, ``densities`` those of its L layers.

    The first and the last interface stay, and those whose places are in ``fixed``. ``factor`` multiplies the others.
    Raises LissomError where the lengths do not fit.
    """
    if len(channels) != len(densities) + 1:
        raise LissomError(f"{len(densities)} layers have {len(densities) + 1} interfaces, not {len(channels)}")
    widths = list(channels)
    for j in range(1, len(densities)):
        if j not in fixed:
            share = factor * (densities[j - 1] * densities[j]) ** 0.25
            widths[j] = min(channels[j], max(1, _rounded(channels[j] * share)))
    return widths


def inner_groups(channels: Channels) -> list[str]:
    """Names of the groups inside blocks: all but the streams that several layers add to."""
    return [name for name, group in channels.groups.items() if not group.stream]


def width_factors(
    channels: Channels, densities: Mapping[str, float], groups: Sequence[str] | None = None
) -> dict[str, float]:
    """Group -> what its width is multiplied by for these ``densities`` of layers (those not named: 1).

    ``groups`` (all) are those that may change; the others are interfaces that stay.
    """
    free = list(channels.groups if groups is None else groups)
    moving = {axis for name in free for axis in channels.groups[name].places}
    factors = {}
    for name in free:
        group = channels.groups[name]
        writers = [channels.layers[path] for path in channels.writers(group)]
        readers = [channels.layers[path] for path in channels.readers(group)]
        if group.stream:
            factors[name] = math.sqrt(_mean([*writers, *readers], densities))
        elif all(Axis(x.path, "in") not in moving for x in writers) and all(
            Axis(x.path, "out") not in moving for x in readers
        ):
            factors[name] = _mean([*writers, *readers, *_between(channels, group)], densities)
        else:
            sides = (_mean(side, densities, 0.5) for side in (writers, readers) if side)
            factors[name] = math.sqrt(math.prod(sides))
    return factors


def _between(channels: Channels, group: Group) -> list[Layer]:
    """The grouped and depthwise convolutions of a group."""
    return [channels.layers[a.path] for a in group.places if a.side == "out" and _grouped(channels, a.path)]


def _grouped(channels: Channels, path: str) -> bool:
    return path in channels.layers and channels.layers[path].grouped


def _mean(layers: Sequence[Layer], densities: Mapping[str, float], power: float = 1.0) -> float:
    """The mean of the densities to a power, weighed by the layers' weights."""
    whole = sum(layer.weights for layer in layers)
    return sum(layer.weights * densities.get(layer.path, 1.0) ** power for layer in layers) / whole


def fitted_widths(
    channels: Channels,
    factors: Mapping[str, float],
    *,
    parameters: float | None = None,
    macs: float | None = None,
    multiple: int = 1,
    least: float = 0.0,
    most: float = 1.0,
) -> dict[str, int]:
    """Widths of the groups in ``factors``, all multiplied by one number, the largest that keeps the budgets.

    ``parameters`` and ``macs`` are shares of the whole network's; at least one is given. A width is a multiple of
    ``multiple``, in narrow groups of the largest power of two below it that is no more than a quarter of the width;
    it lies between the shares ``least`` and ``most`` of the group's own width, and is at least 1. What rounding leaves
    of the budget is given back to the groups it took most from.

    Raises NotApplicable where even the narrowest network is above a budget, with what it would be.
    """
    given = [limit for limit in (parameters, macs) if limit is not None]
    if not given or not all(limit > 0 for limit in given):
        raise LissomError("a budget is a share of the parameters or of the multiplications, above 0")
    if multiple < 1:
        raise LissomError(f"multiple is {multiple}; it is at least 1")
    whole = channels.cost()
    limits = [math.inf if m is None else m * w * (1 + 1e-12) for m, w in zip((parameters, macs), whole, strict=True)]
    steps = {name: _step(channels.groups[name].size, multiple) for name in factors}

    def at(number: float) -> dict[str, int]:
        widths = {}
        for name, factor in factors.items():
            size = channels.groups[name].size
            low, high = max(1, math.ceil(least * size)), max(1, math.floor(most * size))
            width = _rounded(size * factor * number / steps[name]) * steps[name]
            widths[name] = min(max(width, low, min(steps[name], high)), high)
        return widths

    def fits(widths: Mapping[str, int]) -> bool:
        return all(cost <= limit for cost, limit in zip(channels.cost(widths), limits, strict=True))

    if not factors or not fits(at(0.0)):
        smallest = channels.cost(at(0.0))
        shares = [cost / w for cost, w, m in zip(smallest, whole, (parameters, macs), strict=True) if m is not None]
        raise NotApplicable(
            f"what can be cropped leaves at least {max(shares):.1%} of the network, which is above the budget of "
            f"{given[shares.index(max(shares))]:.1%}; a larger one would do"
        )
    low, high = 0.0, 2 * most / min(factors.values())
    if fits(at(high)):
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    widths = at(low)
    wanted = {name: channels.groups[name].size * factor * high for name, factor in factors.items()}
    for name in sorted(widths, key=lambda n: widths[n] / wanted[n]):
        wider = {**widths, name: widths[name] + steps[name]}
        if wider[name] <= most * channels.groups[name].size and widths[name] < wanted[name] and fits(wider):
            widths = wider
    return widths


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def _step(size: int, multiple: int) -> int:
    while multiple > 1 and multiple > size // 4:
        multiple //= 2
    return multiple


# Densities of a network's layers


def layer_densities(
    model: nn.Module,
    shape: tuple[int, ...],
    channels: Channels,
    *,
    source: str = "closed_form",
    parameters: float | None = None,
    macs: float | None = None,
    fixed: Sequence[str] | None = None,
    steps: int = STEPS,
    batch: tuple[torch.Tensor, torch.Tensor, Loss] | None = None,
) -> dict[str, float]:
    """Densities of the convolutions and linear layers of ``model`` by path, from one of ``SOURCES``, which read nothing
    but weights (SynFlow, in ``steps`` iterations) or shapes, or ``FROM_A_BATCH``: (inputs, targets, loss).

    ``parameters`` and ``macs`` are shares of those of all these layers; both together are for "closed_form" alone. What
    prunes single weights (SynFlow, SNIP, GraSP) takes a share of the multiplications for one of the weights; the widths
    are corrected to it. ``fixed`` layers keep density 1 and count for the budget: by default the first and the last
    that run, the stem and the classifier. Raises LissomError for another source, for none where a batch is needed, for
    no budget, and for one that the fixed layers spend.
    """
    if source not in (*SOURCES, *FROM_A_BATCH):
        raise LissomError(f"there is no source of densities {source!r}; known: {', '.join((*SOURCES, *FROM_A_BATCH))}")
    if source in FROM_A_BATCH and batch is None:
        raise LissomError(f"densities by {source} come from the loss on a batch: give batch=(inputs, targets, loss)")
    if parameters is None and macs is None:
        raise LissomError("densities need a budget: a share of the parameters or of the multiplications")
    if parameters is not None and macs is not None and source != "closed_form":
        raise LissomError(f"two budgets at once are for closed_form, not for {source}")
    paths = list(channels.layers)
    stay = {paths[0], paths[-1]} if fixed is None else set(fixed)
    free = [path for path in paths if path not in stay] or paths
    by_macs = parameters is None
    costs = [float(channels.layers[p].macs if by_macs else channels.layers[p].weights) for p in free]
    held = sum(channels.layers[p].macs if by_macs else channels.layers[p].weights for p in paths if p not in free)
    share = macs if parameters is None else parameters
    assert share is not None
    budget = share * (sum(costs) + held) - held
    if not budget > 0:
        raise LissomError(f"the layers that stay ({', '.join(sorted(stay))}) take the whole budget; give a larger one")
    if source == "closed_form" and parameters is not None and macs is not None:
        work = [float(channels.layers[p].macs) for p in free]
        other = sum(channels.layers[p].macs for p in paths if p not in free)
        found = closed_form(costs, budget, work, macs * (sum(work) + other) - other)
    elif source == "closed_form":
        found = closed_form(costs, budget)
    elif source == "uniform":
        found = uniform(costs, budget)
    elif source == "erk":
        sizes = [channels.layers[p].weights for p in free]
        found = erk([model.get_parameter(f"{p}.weight").shape for p in free], budget / sum(costs) * sum(sizes))
    else:
        density = min(1.0, budget / sum(costs))
        if source == "synflow":
            masks = synflow_masks(model, shape, density, steps=steps, layers=free)
        else:
            assert batch is not None
            scores = (snip_scores if source == "snip" else grasp_scores)(model, *batch)
            some = {path: scores[path] for path in free}
            masks = kept_masks(some, density, "highest" if source == "snip" else "lowest")
        kept = masks_densities(masks)
        # A layer without any weight would have no channel; it keeps one weight's share.
        found = np.array([max(kept[p], 1 / channels.layers[p].weights) for p in free])
    return {**dict.fromkeys(paths, 1.0), **{p: float(d) for p, d in zip(free, found, strict=True)}}


# Networks


def precrop(
    model: nn.Module,
    shape: tuple[int, ...],
    densities: Mapping[str, float],
    *,
    parameters: float | None = None,
    macs: float | None = None,
    fixed: Sequence[str] = (),
    streams: bool | None = None,
    multiple: int = 1,
    seed: int = 0,
    channels: Channels | None = None,
) -> nn.Module:
    """A new network with the widths that ``densities`` (layer -> share of its weights) ask for, its weights drawn anew.

    ``parameters`` and ``macs`` are shares of the whole network's that the widths are corrected to; without either, the
    parameters keep the share that the densities keep of the layers' weights. ``fixed``: groups whose width stays.
    ``streams``: whether the streams of a residual network are cropped too; None: where the budget is below what the
    blocks' inner widths reach. ``channels`` are those of ``find_channels(model, shape)``, where they are known.

    Raises NotApplicable where no channels can be removed, or the budget cannot be reached.
    """
    found = channels or find_channels(model, shape)
    if parameters is None and macs is None:
        whole = sum(layer.weights for layer in found.layers.values())
        parameters = sum(x.weights * densities.get(x.path, 1.0) for x in found.layers.values()) / whole
    widths = _cropped(found, densities, parameters, macs, fixed, streams, multiple)
    return _built(model, found, widths, shape, seed)


def _cropped(
    channels: Channels, densities: Mapping[str, float], parameters: float | None, macs: float | None,
    fixed: Sequence[str], streams: bool | None, multiple: int,
) -> dict[str, int]:  # fmt: skip
    every = [name for name in channels.groups if name not in fixed]
    inner = [name for name in inner_groups(channels) if name not in fixed]
    if not streams and inner:
        try:
            factors = width_factors(channels, densities, inner)
            return fitted_widths(channels, factors, parameters=parameters, macs=macs, multiple=multiple)
        except NotApplicable:
            if streams is False or inner == every:
                raise
    factors = width_factors(channels, densities, inner if streams is False else every)
    return fitted_widths(channels, factors, parameters=parameters, macs=macs, multiple=multiple)


def preconfig(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    parameters: float = 0.8,
    macs: float = 1.0,
    most: float = 4.0,
    multiple: int = 1,
    seed: int = 0,
    channels: Channels | None = None,
) -> nn.Module:
    """A reconfigured network: densities up to ``most`` under both budgets, so that cheap layers may become wider.

    ``parameters`` and ``macs`` are shares of the network's. Weights are drawn anew. A width grows to sqrt(``most``)
    times its own at the most. Raises NotApplicable as ``precrop`` does.
    """
    found = channels or find_channels(model, shape)
    paths = list(found.layers)
    layers = [found.layers[path] for path in paths]
    ends = [0, len(paths) - 1]
    weights, work = [float(x.weights) for x in layers], [float(x.macs) for x in layers]
    densities = closed_form(
        weights, parameters * sum(weights), work, macs * sum(work), upper=most, fixed=ends if len(paths) > 2 else ()
    )
    inner = inner_groups(found) or list(found.groups)
    factors = width_factors(found, dict(zip(paths, densities.tolist(), strict=True)), inner)
    widths = fitted_widths(
        found, factors, parameters=parameters, macs=macs, multiple=multiple, most=math.sqrt(most)
    )  # fmt: skip
    return _built(model, found, widths, shape, seed)


def _built(
    model: nn.Module, channels: Channels, widths: Mapping[str, int], shape: tuple[int, ...], seed: int
) -> nn.Module:
    # Which channels stay is all the same: their weights are drawn anew.
    order = {name: -torch.arange(group.size, dtype=torch.float64) for name, group in channels.groups.items()}
    built = narrow(copy.deepcopy(model), channels, best_units(order, widths))
    draw_anew(built, seed)
    try:
        with torch.no_grad():
            training = built.training
            parameter = next(built.parameters())
            built.eval()(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
            built.train(training)
    except Exception as error:  # a number of channels that the user's forward holds
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotApplicable(f"{type(model).__name__} does not run with other widths: {line}") from error
    return built


def draw_anew(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew, in place, as torch's layers do, then as the network's own ``init_weights`` does.

    Parameters that belong to neither keep their values. The caller's random numbers are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        own = getattr(model, "init_weights", None)
        if callable(own):
            with contextlib.suppress(TypeError):  # one that needs arguments only its constructor knows
                own()
    return model
