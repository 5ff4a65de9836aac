"""How many weights every layer of an untrained network is given: layer-wise densities (PreCrop, arXiv 2203.02549).

Pruning at initialisation picks single weights; PreCrop's claim is that only the share p_l that each layer keeps
matters. A proxy shows why: with the weights of layer l independent, of mean magnitude m_l, under any random mask of
density p_l, the expectation of SynFlow's sum R over all paths is

    E[R] = C prod_l p_l,    C = prod of fans and m_l,                                        (1)

whatever the mask's shape. So the best densities under a budget B of weights a_l solve

    maximise sum_l log p_l   subject to   sum_l a_l p_l <= B,  0 < p_l <= u,                 (2)

whose solution is p_l = min(u, 1 / (lambda a_l)): every layer that is not full keeps as many weights as the others. With
a second budget sum_l b_l p_l <= F it is p_l = min(u, 1 / (lambda a_l + mu b_l)).                                    (3)

The other sources are those of pruning at initialisation: SynFlow (Tanaka et al. 2020, arXiv 2006.05467), SNIP (Lee et
al. 2019, arXiv 1810.02340), GraSP (Wang et al. 2020, arXiv 2002.07376), ERK (Evci et al. 2020, arXiv 1911.11134). Their
masks are kept for comparison (``masked``); the densities are what is wanted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lissom.errors import LissomError

__all__ = [
    "closed_form",
    "erk",
    "filter_masks",
    "grasp_scores",
    "kept_masks",
    "magnitude_masks",
    "masked",
    "masks_densities",
    "residual_form",
    "shuffled_masks",
    "snip_scores",
    "synflow_masks",
    "synflow_scores",
    "uniform",
    "weighted_layers",
]

Masks = dict[str, torch.Tensor]  # layer's path -> bool, of its weight's shape
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of (outputs, targets)

# What a linearised network leaves out. Gates (sigmoids) stay: without them a squeeze-and-excitation would square.
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus,
)  # fmt: skip


# From numbers alone


def closed_form(
    weights: Sequence[float],
    budget: float,
    macs: Sequence[float] | None = None,
    macs_budget: float | None = None,
    *,
    upper: float = 1.0,
    fixed: Sequence[int] = (),
) -> np.ndarray:
    """Densities that solve (2), or (3) where ``macs`` (b_l, their cost at density 1) and ``macs_budget`` are given.

    ``weights`` are a_l, numbers of any positive unit, ``budget`` in the same unit. ``upper`` is u: 1, or above it for
    layers that may become wider (PreConfig). ``fixed``: places of layers that keep density 1. Returns float64
    (layers,). A budget that binds is met to rounding.

    Raises LissomError for numbers that are not positive, lengths that differ, and a budget below what fixed layers
    take.
    """
    a = _positive(weights, "weights")
    b = a if macs is None else _positive(macs, "macs")
    if len(a) != len(b):
        raise LissomError(f"{len(a)} layers have weights and {len(b)} have macs; give one number of each a layer")
    if (macs is None) != (macs_budget is None):
        raise LissomError("macs and macs_budget go together; give both or none")
    if not upper > 0:
        raise LissomError(f"upper is {upper}; a density's bound is above 0")
    free = np.array([i for i in range(len(a)) if i not in set(fixed)], np.int64)
    p = np.ones(len(a))
    if not len(free):
        return p
    stay = [i for i in range(len(a)) if i in set(fixed)]
    left = float(budget) - a[stay].sum()
    more = math.inf if macs_budget is None else float(macs_budget) - b[stay].sum()
    if not left > 0 or not more > 0:
        raise LissomError("the budget is spent by the layers that are fixed; give a larger one, or fix fewer")
    p[free] = _two_budgets(a[free], left, b[free], more, upper)
    return p


def _positive(values: Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not (np.isfinite(array) & (array > 0)).all():
        raise LissomError(f"{what} are one positive number a layer, not {values!r}")
    return array


def _check_budget(budget: float) -> None:
    if not budget > 0:
        raise LissomError(f"the budget is {budget}; it is above 0")


def _two_budgets(a: np.ndarray, budget: float, b: np.ndarray, other: float, upper: float) -> np.ndarray:
    """(3) by bisection over the proportion of the two prices; (2) where one of the budgets is slack."""
    tolerance = 1 + 1e-12
    for price, limit, by in ((a, budget, a), (b, other, b)):
        p = _at_price(price, by, limit, upper)
        if (a * p).sum() <= budget * tolerance and (b * p).sum() <= other * tolerance:
            return p
    # Both bind. In each proportion t the first is met exactly; the second falls as its price's share t rises.
    low, high = 0.0, 1.0
    scale = a.sum() / b.sum()
    for _ in range(200):
        t = (low + high) / 2
        p = _at_price((1 - t) * a + t * scale * b, a, budget, upper)
        low, high = (t, high) if (b * p).sum() > other else (low, t)
    return _at_price((1 - high) * a + high * scale * b, a, budget, upper)


def _at_price(price: np.ndarray, cost: np.ndarray, budget: float, upper: float) -> np.ndarray:
    """min(u, 1 / (s price)) with s such that sum cost p = budget; u everywhere where that is less. Exact, not bisected:
    with the k lowest prices full, 1 / s = (budget - u sum of their costs) / sum of the others' cost / price."""
    if (cost * upper).sum() <= budget:
        return np.full(len(price), upper)
    order = np.argsort(price, kind="stable")
    full = np.concatenate([[0.0], np.cumsum(upper * cost[order])])
    rest = np.concatenate([np.cumsum((cost / price)[order][::-1])[::-1], [0.0]])
    for k in range(len(price)):
        inverse = (budget - full[k]) / rest[k]
        if inverse <= upper * price[order[k]]:  # the next layer is not full either
            break
    return np.minimum(upper, inverse / price)


def residual_form(
    weights: Sequence[float], budget: float, blocks: Sequence[Sequence[int]], strengths: Sequence[float]
) -> np.ndarray:
    """Densities for a residual network's own expectation, solved numerically (SLSQP in log p).

    Identity shortcuts make R a sum over paths: log E[R] = sum over blocks i of log(1 + c_i prod of its p_l), plus
    log p_l for layers in no block. ``blocks`` are the places of each block's layers, ``strengths`` the c_i, what the
    block's branch adds at density 1 as a share of its shortcut. That objective is convex in log p, not concave, so
    what is found is a local optimum: the best reached from the chain's solution (2) and from uniform densities.
    """
    from scipy.optimize import minimize

    a = _positive(weights, "weights")
    c = _positive(strengths, "strengths")
    inside = [np.asarray(block, np.int64) for block in blocks]
    if len(inside) != len(c):
        raise LissomError(f"{len(inside)} blocks have {len(c)} strengths; give one a block")
    alone = np.array([i for i in range(len(a)) if not any(i in block for block in inside)], np.int64)
    if budget >= a.sum():
        return np.ones(len(a))

    def negative(q: np.ndarray) -> float:
        branches = sum(np.logaddexp(0.0, math.log(s) + q[block].sum()) for s, block in zip(c, inside, strict=True))
        return -float(q[alone].sum() + branches)

    def gradient(q: np.ndarray) -> np.ndarray:
        found = np.zeros(len(q))
        found[alone] = 1.0
        for s, block in zip(c, inside, strict=True):
            found[block] += 1 / (1 + math.exp(-min(700.0, math.log(s) + q[block].sum())))
        return -found

    limit = {
        "type": "ineq", "fun": lambda q: (budget - (a * np.exp(q)).sum()) / budget,
        "jac": lambda q: -a * np.exp(q) / budget,
    }  # fmt: skip
    best, lowest = closed_form(weights, budget), math.inf
    for start in (best, np.full(len(a), budget / a.sum())):
        found = minimize(
            negative, np.log(start), jac=gradient, bounds=[(-30.0, 0.0)] * len(a), constraints=[limit], method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )  # fmt: skip
        p = np.exp(np.clip(found.x, -30.0, 0.0))
        p *= min(1.0, budget / (a * p).sum())  # what the solver left over the budget, of the order of rounding
        if negative(np.log(p)) < lowest:
            best, lowest = p, negative(np.log(p))
    return best


def uniform(weights: Sequence[float], budget: float) -> np.ndarray:
    """The same density in every layer."""
    a = _positive(weights, "weights")
    _check_budget(budget)
    return np.full(len(a), min(1.0, budget / a.sum()))


def erk(shapes: Sequence[Sequence[int]], budget: float) -> np.ndarray:
    """Erdos-Renyi-Kernel: p_l in proportion to (sum of the weight's dimensions) / (their product), at most 1.

    ``shapes`` are the weights', (out, in / groups, ...). What full layers do not take goes to the others.
    """
    a = np.array([math.prod(shape) for shape in shapes], np.float64)
    want = np.array([sum(shape) for shape in shapes], np.float64) / a
    _check_budget(budget)
    return _at_price(1 / want, a, budget, 1.0)


# From a network


def weighted_layers(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Path -> weight of the convolutions and linear layers, all or those named, in the order of the modules."""
    known: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and isinstance(module.weight, nn.Parameter):
            known[path] = module.weight
    if layers is None:
        return known
    missing = [path for path in layers if path not in known]
    if missing:
        raise LissomError(f"the network has no convolution and no linear layer {missing[0]!r}")
    return {path: weight for path, weight in known.items() if path in set(layers)}


def synflow_scores(
    model: nn.Module, shape: tuple[int, ...], masks: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """SynFlow's scores of every weight, |w dR/dw| >= 0 in float64, and R.

    R is the sum of the outputs of the network made linear, on an input of ones of ``shape``: absolute weights (under
    ``masks``, where given), no biases, activation modules and BatchNorm left out. In a network without further
    nonlinearities the scores of every layer that all paths go through sum to R. The model stays as it is.

    Raises LissomError where R overflows, or is 0 or negative.
    """
    linear = copy.deepcopy(model).cpu().double().eval()
    weights = weighted_layers(linear)
    own = {id(weight) for weight in weights.values()}
    for module in linear.modules():
        if isinstance(module, _BatchNorm) or type(module) in _ACTIVATIONS:
            module.forward = _as_it_comes
    with torch.no_grad():
        for path, weight in weights.items():
            weight.abs_()
            if masks is not None and path in masks:
                weight.mul_(masks[path])
        for name, parameter in linear.named_parameters():
            if name.rpartition(".")[2] == "bias" and not parameter.ndim > 1:
                parameter.zero_()
            elif id(parameter) not in own:
                parameter.abs_()
        linear.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
    with torch.enable_grad():
        total = _sum(linear(torch.ones(1, *shape, dtype=torch.float64)))
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    value = float(total.detach())
    if not math.isfinite(value) or not value > 0:
        raise LissomError(
            f"SynFlow's sum over all paths is {value:g}: nothing reaches the output, or the network is too deep for "
            "it; closed_form needs no such sum"
        )
    scores = {}
    for (path, weight), gradient in zip(weights.items(), gradients, strict=True):
        found = torch.zeros_like(weight) if gradient is None else weight.detach() * gradient
        scores[path] = found.detach().abs()
    return scores, value


def _as_it_comes(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The forward of what is left out of a linearised network."""
    return x


def _sum(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output.sum()
    values = output.values() if isinstance(output, Mapping) else output
    return torch.stack([_sum(value) for value in values]).sum()


def synflow_masks(
    model: nn.Module, shape: tuple[int, ...], density: float, *, steps: int = 100, layers: Sequence[str] | None = None
) -> Masks:
    """SynFlow's masks: for t = 1 .. ``steps`` keep the highest share density^(t / steps) of all scores, each time anew.

    ``layers`` (all) are those that are pruned; the others keep their weights. ``density`` is of the pruned layers'
    weights together. Raises LissomError for a density outside (0, 1] and steps below 1.
    """
    if not 0 < density <= 1 or steps < 1:
        raise LissomError(f"density is above 0 and at most 1, and steps at least 1, not {density} and {steps}")
    masks = {path: torch.ones_like(w, dtype=torch.bool) for path, w in weighted_layers(model, layers).items()}
    for step in range(1, steps + 1):
        scores, _ = synflow_scores(model, shape, masks)
        # A weight that is out stays out, also where whole layers have scores of 0.
        ranked = {path: scores[path].masked_fill(~mask, -1.0) for path, mask in masks.items()}
        masks = kept_masks(ranked, density ** (step / steps))
    return masks


def kept_masks(
    scores: Mapping[str, torch.Tensor], density: float, which: Literal["highest", "lowest"] = "highest"
) -> Masks:
    """The global best share ``density`` of all scores, at least one weight; of equal ones the first."""
    flat = torch.cat([score.detach().flatten().double().cpu() for score in scores.values()])
    count = max(1, round(density * len(flat)))
    order = torch.argsort(flat, descending=which == "highest", stable=True)[:count]
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {path: part.view(score.shape) for (path, score), part in zip(scores.items(), parts, strict=True)}


def snip_scores(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss: Loss) -> dict[str, torch.Tensor]:
    """SNIP's scores |w dL/dw| on one batch of the true loss, in training mode; one shot. The model stays as it is."""
    trained = copy.deepcopy(model).train()
    weights = weighted_layers(trained)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(trained(inputs), targets), list(weights.values()), allow_unused=True)
    pairs = zip(weights.items(), gradients, strict=True)
    return {path: torch.zeros_like(w) if g is None else (w.detach() * g).abs() for (path, w), g in pairs}


def grasp_scores(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss: Loss) -> dict[str, torch.Tensor]:
    """GraSP's scores -w (H g) on one batch; weights of the LOWEST scores are kept (``kept_masks(..., "lowest")``).

    A weight of a high score is one whose removal does not make the gradient smaller. The model stays as it is.
    """
    trained = copy.deepcopy(model).train()
    weights = weighted_layers(trained)
    with torch.enable_grad():
        value = loss(trained(inputs), targets)
        first = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
        product = torch.stack([(g.detach() * g).sum() for g in first if g is not None]).sum()
        second = torch.autograd.grad(product, list(weights.values()), allow_unused=True)
    pairs = zip(weights.items(), second, strict=True)
    return {path: torch.zeros_like(w) if h is None else -(w.detach() * h) for (path, w), h in pairs}


def magnitude_masks(model: nn.Module, density: float, layers: Sequence[str] | None = None) -> Masks:
    """The global largest weights: the control of pruning at initialisation."""
    return kept_masks({p: w.detach().abs() for p, w in weighted_layers(model, layers).items()}, density)


def masks_densities(masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Layer -> share of its weights that its mask keeps."""
    return {path: float(mask.double().mean()) for path, mask in masks.items()}


def shuffled_masks(masks: Mapping[str, torch.Tensor], seed: int = 0) -> Masks:
    """Every layer's mask with its entries in random order: the same densities, other weights."""
    numbers = torch.Generator().manual_seed(seed)
    return {
        path: mask.flatten()[torch.randperm(mask.numel(), generator=numbers)].view(mask.shape)
        for path, mask in masks.items()
    }


def filter_masks(masks: Mapping[str, torch.Tensor], seed: int = 0) -> Masks:
    """Masks of whole filters (the first dimension) of about the same densities, drawn at random; one at least stays."""
    numbers = torch.Generator().manual_seed(seed)
    drawn = {}
    for path, mask in masks.items():
        count = max(1, round(float(mask.double().mean()) * len(mask)))
        chosen = torch.zeros(len(mask), dtype=torch.bool)
        chosen[torch.randperm(len(mask), generator=numbers)[:count]] = True
        drawn[path] = chosen.view(-1, *[1] * (mask.ndim - 1)).expand(mask.shape).clone()
    return drawn


class _Masked(nn.Module):
    """A weight times a mask that does not change."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        mask = self.mask
        assert isinstance(mask, torch.Tensor)
        return weight * mask


def masked(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """Put the masks, in place, on the layers at their paths, also while they train; the model is returned."""
    for path, mask in masks.items():
        layer = model.get_submodule(path)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        parametrize.register_parametrization(layer, "weight", _Masked(mask.to(weight)))
    return model
