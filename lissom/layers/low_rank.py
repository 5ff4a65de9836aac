"""Low-rank layers: a linear layer or a 1x1 convolution as two thin ones, from a truncated SVD (PELA, arXiv 2310.10700).

W (out, in) of rank r costs out * in multiplications a token, its two factors r * (in + out). With W = A S B^T, the r
largest singular values and the balanced split,

    first.weight = sqrt(S_r) B_r^T  (r, in),    second.weight = A_r sqrt(S_r)  (out, r),    second.bias = b,

second(first(x)) is the best approximation of W x + b by two layers this thin, in the sum of squares (Eckart-Young), and
both factors have the same Frobenius norm. A replaced layer is a ``LowRankLayer``, an ``nn.Sequential`` of the two, so
that its keys are those of the published code: ``<path>.0.weight``, ``<path>.1.weight``, ``<path>.1.bias``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from lissom.errors import LissomError

__all__ = [
    "LowRankLayer",
    "factorisable",
    "factorise",
    "load_low_rank",
    "merge_low_rank",
    "obstacles",
    "published_ranks",
    "rank_of_ratio",
    "spread_ratios",
    "thin_layers",
]

INITS = ("svd", "random")
FACTORS = (0.75, 1.0, 1.5, 2.0)  # of the ratio, that a layer may have where it is spread
PARTS = 20_000  # of a budget of weights


class LowRankLayer(nn.Sequential):
    """Two linear layers (in -> r -> out), or two 1x1 convolutions, in the place of one; only the second has a bias.

    ``weight`` and ``bias`` are those of the one layer that the two amount to, for code that reads a layer's weight
    instead of calling it: right, but computed anew at each reading, and dense.
    """

    @property
    def rank(self) -> int:
        return self[0].weight.shape[0]

    @property
    def in_features(self) -> int:
        return self[0].weight.shape[1]

    @property
    def out_features(self) -> int:
        return self[1].weight.shape[0]

    in_channels, out_channels = in_features, out_features

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), for convolutions (out, in, 1, 1); with gradient to both factors."""
        first, second = self[0].weight, self[1].weight
        return (second.flatten(1) @ first.flatten(1)).reshape(len(second), *first.shape[1:])

    @property
    def bias(self) -> torch.Tensor | None:
        return self[1].bias


def rank_of_ratio(in_features: int, out_features: int, ratio: float) -> int:
    """The rank at which two thin layers hold 1 / ``ratio`` of one's weights: floor(in out / (ratio (in + out))).

    At least 1, and at most min(in, out), which is exact. Raises LissomError where ``ratio`` is not positive.
    """
    if not ratio > 0:
        raise LissomError(f"the ratio of a low-rank layer is {ratio}; it is greater than 0, 2 halves the weights")
    rank = int(in_features * out_features // (ratio * (in_features + out_features)))  # floor after a float division
    return min(max(1, rank), in_features, out_features)


@torch.no_grad()
def spread_ratios(
    layers: Mapping[str, nn.Linear | nn.Conv2d], ratio: float, factors: Sequence[float] = FACTORS
) -> dict[str, float]:
    """Path -> each layer's ratio by its singular values: all together hold no more weights than at ``ratio`` each.

    Of a weight with singular values s_i, rank r keeps the share sum_{i <= r} s_i^2 / sum_i s_i^2 of its energy (the
    rest is the relative square of the error, Eckart-Young); a whole layer, of ratio 1, keeps all. Of all ways to give
    every layer the ratio 1 or ``ratio`` times one of ``factors`` the one is taken in which the product of the shares is
    largest, since layers stand behind each other: a knapsack with one choice a layer, solved by dynamic programming to
    a twenty-thousandth of the budget. Few ratios mean few kinds of layers to measure. Raises LissomError where
    ``ratio`` is below 1.
    """
    if not ratio >= 1:
        raise LissomError(f"the ratio that is spread over low-rank layers is {ratio}; it is at least 1")
    rungs: dict[str, list[tuple[int, float, float]]] = {}  # choices: (weights, -log of the share, ratio)
    evenly: dict[str, tuple[int, float, float]] = {}
    for path, layer in layers.items():
        outputs, inputs = layer.weight.shape[:2]
        kept = _kept_energy(layer.weight.flatten(1))
        rungs[path] = [(outputs * inputs, 0.0, 1.0)]
        for own in sorted({ratio, *(ratio * factor for factor in factors)}):
            rank = rank_of_ratio(inputs, outputs, own)
            if own > 1 and rank * (inputs + outputs) < outputs * inputs:
                rungs[path].append((rank * (inputs + outputs), -math.log(kept[rank]), own))
        evenly[path] = next((rung for rung in rungs[path] if rung[2] == ratio), rungs[path][0])
    budget = sum(weights for weights, _, _ in evenly.values())
    found = _least_loss(list(rungs.values()), budget)
    # Rounding to parts of the budget may hide the best; even layers are always within it.
    if found is None or sum(loss for _, loss, _ in evenly.values()) <= sum(loss for _, loss, _ in found):
        found = list(evenly.values())
    return {path: own for path, (_, _, own) in zip(rungs, found, strict=True)}


def _least_loss(
    rungs: Sequence[Sequence[tuple[int, float, float]]], budget: int
) -> list[tuple[int, float, float]] | None:
    """One rung of every layer, the losses' sum the least whose weights are within ``budget``; None: none are."""
    best = torch.zeros(PARTS + 1, dtype=torch.float64)  # by parts of the budget spent at most: the least loss
    taken = []
    costs = [[-(-weights * PARTS // max(budget, 1)) for weights, _, _ in choices] for choices in rungs]  # rounded up
    for choices, parts in zip(rungs, costs, strict=True):
        ways = torch.full((len(choices), PARTS + 1), float("inf"), dtype=torch.float64)
        for way, part, (_, loss, _) in zip(ways, parts, choices, strict=True):
            if part <= PARTS:
                way[part:] = best[: PARTS + 1 - part] + loss
        best, chosen = ways.min(0)
        taken.append(chosen)
    if not torch.isfinite(best[PARTS]):
        return None
    left, found = PARTS, []
    for choices, parts, chosen in zip(reversed(rungs), reversed(costs), reversed(taken), strict=True):
        number = int(chosen[left])
        found.append(choices[number])
        left -= parts[number]
    return found[::-1]


def _kept_energy(weight: torch.Tensor) -> list[float]:
    """For each rank from 0 to min(in, out) the share of the energy that is kept, above 0; all of a weight of zeros."""
    wide = weight.detach().double().cpu()
    wide = wide if len(wide) <= wide.shape[1] else wide.T
    energy = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).flip(0)  # the largest first
    sums = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    if not sums[-1] > 0:
        return [1.0] * len(sums)
    return (sums / sums[-1]).clamp_min(torch.finfo(sums.dtype).tiny).tolist()


# Which layers can be replaced


def obstacles(model: nn.Module) -> dict[str, str]:
    """Path of every linear layer and 1x1 convolution -> why it cannot be replaced, "" where it can.

    A module that is used under several paths has its first. Layers of a ``LowRankLayer`` are not listed.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    attention = {
        id(inner) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for inner in m.modules()
    }  # it multiplies by its children's weights and never calls them
    thin = {id(inner) for m in model.modules() if isinstance(m, LowRankLayer) for inner in m}
    found = {}
    for path, module in model.named_modules():
        if id(module) in thin or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if isinstance(module, nn.Conv2d) and tuple(module.kernel_size) != (1, 1):
            continue
        weight = module._parameters.get("weight")  # a parametrised layer computes its weight, and has none here
        if weight is None or not weight.is_floating_point():
            found[path] = "its weight is computed or not of floats"
        elif not path:
            found[path] = "it is the whole model"
        elif id(module) in attention:
            found[path] = "nn.MultiheadAttention reads its weight without calling it"
        elif owners[id(weight)] > 1:
            found[path] = "it shares its weight with another layer"
        elif "forward" in vars(module) or not _is_plain(module):
            found[path] = "its class has a forward of its own"
        elif isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding not in ((0, 0), "valid", "same")):
            found[path] = "it is grouped or padded"
        elif module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            found[path] = "it has hooks, which would be lost"
        else:
            found[path] = ""
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer's class, perhaps one derived from torch's, computes what torch's own does."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]


def factorisable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that ``factorise`` can replace, by path, in the model's own order.

    Linear layers and 1x1 convolutions without groups and padding, whatever their stride. ``obstacles`` says why others
    cannot. Whether the model calls a layer, or reads its weight, only a run of the model tells.
    """
    replaceable = [path for path, obstacle in obstacles(model).items() if not obstacle]
    return {path: cast("nn.Linear | nn.Conv2d", model.get_submodule(path)) for path in replaceable}


# One layer, and a model's


def thin_layers(layer: nn.Linear | nn.Conv2d, rank: int, init: str = "svd") -> LowRankLayer:
    """The layer as two thin ones of ``rank``, on its device, in its type and mode; the layer itself stays as it is.

    ``init``: "svd", or "random" (torch's own initial weights, for a checkpoint to fill). Raises LissomError for a rank
    that is not between 1 and min(in, out), and another ``init``.
    """
    if init not in INITS:
        raise LissomError(f"a low-rank layer starts from {' or '.join(map(repr, INITS))}, not {init!r}")
    outputs, inputs = layer.weight.shape[:2]
    if not 1 <= rank <= min(inputs, outputs):
        raise LissomError(f"the rank of a layer {inputs} -> {outputs} is 1 to {min(inputs, outputs)}, not {rank}")
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    has_bias = layer.bias is not None
    first: Any
    second: Any
    # The first layer makes fewer values of the input where there is a stride; the second then works on those alone.
    if isinstance(layer, nn.Conv2d):
        first = nn.utils.skip_init(nn.Conv2d, inputs, rank, 1, stride=layer.stride, bias=False, **place)
        second = nn.utils.skip_init(nn.Conv2d, rank, outputs, 1, bias=has_bias, **place)
    else:
        first = nn.utils.skip_init(nn.Linear, inputs, rank, bias=False, **place)
        second = nn.utils.skip_init(nn.Linear, rank, outputs, bias=has_bias, **place)
    if init == "random":
        first.reset_parameters()
        second.reset_parameters()
    else:
        with torch.no_grad():
            for thin, factor in zip((first, second), _factors(layer.weight.flatten(1), rank), strict=True):
                thin.weight.copy_(factor.reshape(thin.weight.shape))
            if layer.bias is not None:
                second.bias.copy_(layer.bias)
    pair = LowRankLayer(first, second).requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        second.bias.requires_grad_(layer.bias.requires_grad)
    return pair.train(layer.training)


def _factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced factors (rank, in) and (out, rank) of the best approximation of ``weight`` (out, in), in float64.

    The singular vectors of the shorter side are eigenvectors of W W^T (or W^T W), several times cheaper than an SVD.
    Squaring costs half of float64's digits in the smallest singular values, which still leaves more than float32 has;
    and the approximation is a projection of W itself, so that no error of a singular value enters it.
    """
    wide = weight.detach().double()
    wide = wide if len(weight) <= weight.shape[1] else wide.T  # (short, long)
    vectors = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]  # A_r (short, r), the largest value first
    rest = vectors.T @ wide  # S_r B_r^T (r, long)
    values = rest.norm(dim=1)  # the singular values
    root = values.sqrt()
    # A component of value 0 has no direction of its own: both of its factors are 0.
    inverse = torch.where(values > 0, root.clamp_min(torch.finfo(root.dtype).tiny).reciprocal(), 0.0)
    short, long = vectors * root, rest * inverse[:, None]
    return (long, short) if len(weight) <= weight.shape[1] else (short.T, long.T)


def factorise(model: nn.Module, ranks: Mapping[str, int], init: str = "svd") -> nn.Module:
    """Replace the layers named in ``ranks`` (path -> rank) by two thin ones each, in place, and return the model.

    Everything is checked before anything is replaced. A layer that is used under several paths is replaced under all.
    Raises LissomError for a path that names no layer to replace, with the reason, and what ``thin_layers`` refuses.
    """
    reasons = obstacles(model)
    for path in ranks:
        if path not in reasons:
            raise LissomError(f"{path!r} is no linear layer and no 1x1 convolution of the model")
        if reasons[path]:
            raise LissomError(f"{path!r} cannot be made of two thin layers: {reasons[path]}")
    layers = factorisable(model)
    fresh = {id(layers[path]): thin_layers(layers[path], rank, init) for path, rank in ranks.items()}
    return _replaced(model, fresh)


def merge_low_rank(model: nn.Module) -> nn.Module:
    """Make every ``LowRankLayer`` one dense layer again, in place, and return the model; the answers stay the same."""
    pairs = {id(m): m for m in model.modules() if isinstance(m, LowRankLayer)}
    if id(model) in pairs:
        raise LissomError("the model is a single low-rank layer and cannot be replaced in place; give what holds it")
    return _replaced(model, {key: _dense(pair) for key, pair in pairs.items()})


@torch.no_grad()
def _dense(pair: LowRankLayer) -> nn.Module:
    first, second = pair[0], pair[1]
    place = {"device": first.weight.device, "dtype": first.weight.dtype}
    has_bias = pair.bias is not None
    layer: Any
    if isinstance(first, nn.Conv2d):
        arguments = {"kernel_size": 1, "stride": first.stride, "bias": has_bias, **place}
        layer = nn.utils.skip_init(nn.Conv2d, pair.in_features, pair.out_features, **arguments)
    else:
        layer = nn.utils.skip_init(nn.Linear, pair.in_features, pair.out_features, bias=has_bias, **place)
    product = second.weight.flatten(1).double() @ first.weight.flatten(1).double()
    layer.weight.copy_(product.reshape(layer.weight.shape))
    layer.weight.requires_grad_(first.weight.requires_grad or second.weight.requires_grad)
    if pair.bias is not None:
        layer.bias.copy_(pair.bias).requires_grad_(pair.bias.requires_grad)
    return layer.train(pair.training)


def _replaced(model: nn.Module, fresh: Mapping[int, nn.Module]) -> nn.Module:
    """Put the fresh modules (by the id of the old ones) in their places, all of which are collected before."""
    places = [
        (parent, name, fresh[id(child)])
        for parent in list(model.modules())
        for name, child in list(parent._modules.items())
        if child is not None and id(child) in fresh
    ]
    for parent, name, module in places:
        setattr(parent, name, module)
    return model


# Published weights


def published_ranks(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Path -> rank of the layers that are dense in ``model`` and two thin ones in ``state``."""
    return {
        path: len(state[f"{path}.0.weight"])
        for path in factorisable(model)
        if f"{path}.weight" not in state and f"{path}.0.weight" in state and f"{path}.1.weight" in state
    }


def load_low_rank(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Load a low-rank checkpoint into a model of dense layers, in place: its layers get the ranks found in ``state``.

    Layers that are dense in ``state`` stay so. Raises LissomError where a key is missing, unknown or of another shape.
    """
    factorise(model, published_ranks(model, state), "random")
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise LissomError(
            f"the low-rank weights do not fit {type(model).__name__}: {' '.join(faults)[:400]}"
        ) from error
    return model
