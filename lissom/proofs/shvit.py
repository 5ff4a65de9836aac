"""SHViT (arXiv 2401.16456): one attention head over a part of the channels, beside many over all, and beside none.

Four experiments. The operator alone is timed beside 14-head attention on the same map. Networks of SHViT's blocks that
differ in their mixer alone are trained: on scikit-learn's digits, on CIFAR-10 where the folder in LISSOM_DATA has it,
and on a generated task that needs a far place (``lissom.proofs.svit``). Last, the macro design is timed: the published
smallest network, whose stem goes to stride 16 at once, beside the same three stages behind a stem of stride 4 and a
stage of its own, as pyramids have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.models.shvit import StageBlock
from torch import nn
from torch.nn import functional as F

from lissom.data.sources import DataSet
from lissom.layers.conv_norm import ConvNorm, NormLinear
from lissom.layers.shsa import SHSA
from lissom.meters.costs import total
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    data_set,
    faster,
    forward_call,
    image_task,
    interleaved,
    no_worse,
    pooled,
    run_arms,
    run_stream,
    step_call,
    time_rows,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings
from lissom.proofs.svit import CHANNELS, COLOURS, FarColour, retrieval_accuracy, retrieval_loss
from lissom.registry import register

__all__ = ["MultiHead", "network"]

QK_DIM = 16  # channels of a query and of a key, in every head
MARGIN = 0.5  # points of accuracy that many heads may have more
ONE, MANY, NONE = "one head on a part", "many heads on all", "no mixer"
Mixer = Callable[[int], nn.Module]


class MultiHead(nn.Module):
    """What ``SHSA`` replaces, in the same surroundings: ``num_heads`` heads over all channels of (B, dim, H, W).

    Queries and keys have ``QK_DIM`` channels a head, values dim / ``num_heads``. ``fused`` takes torch's fused kernel
    in place of the table of all pairs. Raises ValueError where ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, fused: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.num_heads, self.fused, self.scale = num_heads, fused, QK_DIM**-0.5
        self.widths = [QK_DIM * num_heads, QK_DIM * num_heads, dim]
        self.pre_norm = nn.GroupNorm(1, dim)
        self.qkv = ConvNorm(dim, sum(self.widths))
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, scale=0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joint = self.qkv(self.pre_norm(x)).flatten(2)
        q, k, v = (part.unflatten(1, (self.num_heads, -1)) for part in joint.split(self.widths, 1))  # (B, heads, d, N)
        if self.fused:
            q, k, v = (part.transpose(2, 3).contiguous() for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(2, 3)
        else:
            weights = (self.scale * q.transpose(2, 3) @ k).softmax(-1)
            y = v @ weights.transpose(2, 3)
        return self.proj(y.reshape(x.shape))


@dataclass(frozen=True)
class _Images:
    """Networks of ``dims`` and ``depths``, ``partial`` channels attending, on a data set of ``side`` pixels."""

    side: int
    channels: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    partial: tuple[int, ...]
    heads: tuple[int, ...]
    train: int | None
    held_out: int | None
    budget: Budget


@dataclass(frozen=True)
class _Scale:
    """Batch of the timed operator, pixels and batch of the timed networks, rounds; the three trainings."""

    batch: int
    pixels: int
    images: int
    rounds: int
    far: Budget
    judged: int
    digits: _Images
    cifar: _Images | None


DIGITS = _Images(16, 1, (56,), (3,), (12,), (4,), 300, None, Budget(steps=200, batch=64, lr=2e-3))
CIFAR = _Images(32, 3, (64, 96), (2, 2), (14, 20), (4, 6), None, None, Budget(steps=1170, batch=128, lr=2e-3))
FULL = _Scale(16, 128, 16, 20, Budget(steps=600, batch=24, lr=2e-3), 1000, DIGITS, CIFAR)
QUICK = _Scale(
    4, 64, 2, 5, Budget(steps=15, batch=8, lr=2e-3), 100,
    replace(DIGITS, depths=(1,), held_out=300, budget=Budget(steps=10, batch=32, lr=2e-3)), None,
)  # fmt: skip


@register("proof", "shvit")
def shvit(settings: Settings) -> ProofResult:
    """All four experiments. Quick: fewer and smaller steps, no CIFAR-10."""
    scale = QUICK if settings.quick else FULL
    operator, operator_macs = _operator(scale, settings)
    far = run_stream(
        settings, {name: partial(_far_network, name) for name in (ONE, MANY, NONE)}, FarColour(16), retrieval_loss,
        retrieval_accuracy, scale.far, judged=scale.judged,
    )  # fmt: skip
    trained = {"digits": _trained(settings, pooled(data_set(quick=True)), scale.digits)}
    data = data_set("cifar10", quick=settings.quick)
    if scale.cifar is not None and data.name == "cifar10":
        trained["cifar10"] = _trained(settings, data, scale.cifar)
    macro, macro_cost = _macro(scale, settings)
    return _judged(scale, (operator, operator_macs), far, trained, (macro, macro_cost), len(settings.seeds))


# The networks


def network(
    stem: nn.Module, dims: Sequence[int], depths: Sequence[int], mixers: Sequence[Mixer | None], classes: int
) -> nn.Module:
    """A SHViT of any number of stages behind ``stem``, which gives maps of dims[0] channels.

    ``mixers[i](dim)`` builds what mixes in the blocks of stage i; None: nothing does. Between stages stand the
    published downsamplings. With one stage and ``classes`` 0 it keeps its maps: no pooling, no head.
    """
    stages = []
    before = dims[0]
    for dim, depth, mixer in zip(dims, depths, mixers, strict=True):
        stage = StageBlock(before, dim, QK_DIM, max(1, dim // 4), "i", depth)
        for block in stage.blocks:
            block.mixer = nn.Identity() if mixer is None else _Residual(mixer(dim))
        stages.append(stage)
        before = dim
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormLinear(before, classes)] if classes else []
    return nn.Sequential(stem, *stages, *head)


class _Residual(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(x)


def _stem(in_chans: int, dim: int, halvings: int) -> nn.Module:
    """The published stem, of as many convolutions of stride 2 as the sides are to be halved."""
    layers: list[nn.Module] = []
    before = in_chans
    for left in reversed(range(halvings)):
        layers += [ConvNorm(before, dim >> left, 3, 2), nn.ReLU()]
        before = dim >> left
    return nn.Sequential(*layers[:-1])


def _mixer(name: str, partial_dim: int, heads: int) -> Mixer | None:
    if name == NONE:
        return None
    return partial(SHSA, qk_dim=QK_DIM, partial_dim=partial_dim) if name == ONE else partial(MultiHead, num_heads=heads)


def _far_network(name: str) -> nn.Module:
    """Two blocks at full resolution, 48 channels wide, of which 12 attend (or 4 heads over all)."""
    body = network(nn.Conv2d(CHANNELS, 48, 1), (48,), (2,), (_mixer(name, 12, 4),), 0)
    return nn.Sequential(body, nn.Conv2d(48, COLOURS, 1))


def _image_network(name: str, images: _Images, classes: int) -> nn.Module:
    if images.side == 16:  # to 8 x 8 tokens by one convolution
        stem: nn.Module = nn.Conv2d(images.channels, images.dims[0], 2, 2)
    else:
        stem = _stem(images.channels, images.dims[0], 2)
    mixers = [_mixer(name, part, heads) for part, heads in zip(images.partial, images.heads, strict=True)]
    return network(stem, images.dims, images.depths, mixers, classes)


# The experiments


def _operator(scale: _Scale, settings: Settings) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Times of the operator and of 14 heads, in both forms, on 224 channels and 14 x 14 places; multiplications."""
    operators = {
        ONE: SHSA(224, QK_DIM, 48),
        MANY: MultiHead(224, 14),
        f"{MANY}, fused": MultiHead(224, 14, fused=True),
    }
    x = torch.randn(scale.batch, 224, 14, 14)
    times = interleaved(
        {name: forward_call(operator, x) for name, operator in operators.items()}, len(settings.seeds), scale.rounds
    )
    settings.progress("operators timed")
    return times, {name: total(operator, (224, 14, 14))[1] for name, operator in operators.items()}


@dataclass(frozen=True)
class _Set:
    """The arms of one data set, and the times of their training steps side by side."""

    found: Mapping[str, list[Trained]]
    steps: Mapping[str, list[float]]


def _trained(settings: Settings, data: DataSet, images: _Images) -> _Set:
    makes = {name: partial(_image_network, name, images, len(data.classes)) for name in (ONE, MANY, NONE)}
    found = run_arms(
        settings, makes,
        lambda seed: image_task(
            data, images.side, seed, train=images.train, held_out=images.held_out, channels=images.channels
        ),
        images.budget, part=data.name,
    )  # fmt: skip
    x = torch.randn(images.budget.batch, images.channels, images.side, images.side)
    calls = {name: step_call(make(), x) for name, make in makes.items()}
    return _Set(found, interleaved(calls, len(settings.seeds), 5))


STRIDE_4, STRIDE_16 = "stem of stride 4, four stages", "stem of stride 16, three stages"
MACRO_DIMS, MACRO_DEPTHS, MACRO_PARTIAL = (128, 224, 320), (2, 4, 5), (32, 48, 68)  # the published smallest network


def _macro(scale: _Scale, settings: Settings) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Times of a batch of images in both designs, and their parameters and multiplications."""
    mixers = [_mixer(ONE, part, 1) for part in MACRO_PARTIAL]
    body = (None, *mixers[1:])
    networks = {
        STRIDE_16: network(_stem(3, 128, 4), MACRO_DIMS, MACRO_DEPTHS, body, 1000),
        STRIDE_4: network(_stem(3, 64, 2), (64, *MACRO_DIMS), (1, *MACRO_DEPTHS), (None, *body), 1000),
    }
    shape = (3, scale.pixels, scale.pixels)
    x = torch.randn(scale.images, *shape)
    calls = {name: forward_call(model, x) for name, model in networks.items()}
    times = interleaved(calls, len(settings.seeds), max(3, scale.rounds // 2))
    settings.progress("macro designs timed")
    costs = {}
    for name, model in networks.items():
        parameters, macs = total(model, shape)
        costs[name] = {"parameters": parameters, "10^6 MACs": macs / 1e6}
    return times, costs


# The verdicts


def _judged(
    scale: _Scale,
    operator: tuple[dict[str, list[float]], dict[str, int]],
    far: dict[str, list[Trained]],
    trained: dict[str, _Set],
    macro: tuple[dict[str, list[float]], dict[str, dict[str, float]]],
    repetitions: int,
) -> ProofResult:
    times, macs = operator
    rival = min((MANY, f"{MANY}, fused"), key=lambda name: sum(times[name]))
    saved = f"{macs[MANY] / macs[ONE]:.2f} times fewer multiplications"
    claims: list[Claim] = [
        faster(
            f"The operator is at least three times as fast as 14 heads in the faster of two forms (224 channels, "
            f"14 x 14, batch {scale.batch}).",
            times, rival, ONE, at_least=3.0, more=saved,
        ),
    ]  # fmt: skip
    for name, part in trained.items():
        claims += [
            no_worse(
                f"On {name}, one head on a part of the channels loses less than {MARGIN:g} points against many on all.",
                part.found[ONE], part.found[MANY], margin=MARGIN,
            ),
            faster(f"On {name}, a training step takes less time.", part.steps, MANY, ONE),
            better(
                f"On {name}, attention gains accuracy over no mixer.", part.found[ONE], part.found[NONE], matters=MARGIN
            ),
        ]  # fmt: skip
    claims += [
        better(
            "Where the answer lies far away, one head on a quarter of the channels finds it, and no mixer does not.",
            far[ONE], far[NONE], matters=5.0,
        ),
        no_worse("One head finds it as well as many do.", far[ONE], far[MANY], margin=2.0),
        faster(
            f"The macro design: a stem of stride 16 and three stages are at least twice as fast as a stem of stride 4 "
            f"and four ({scale.pixels} x {scale.pixels}, batch {scale.images}).",
            macro[0], STRIDE_4, STRIDE_16, at_least=2.0,
        ),
    ]  # fmt: skip
    rows = time_rows(times, "time of the operator", {name: {"10^6 MACs": macs[name] / 1e6} for name in times})
    for name, part in trained.items():
        rows += accuracy_rows(part.found, name)
        rows += [Row(f"{name}, {arm}", "training step", tuple(values), "ms") for arm, values in part.steps.items()]
    rows += accuracy_rows(far, "far colour") + time_rows(macro[0], "time of a batch, forward", macro[1])
    notes = (
        "many heads: the same norm, projection and activation around them, queries and keys of 16 channels a head",
        "far colour: chance is 25 %; blocks without a mixer reach two pixels",
        "the accuracy of the two macro designs is not compared: that needs data of ImageNet's size",
    )
    title = f"one head on a part of the channels, {' and '.join(trained)}, and the stem of stride 16"
    return ProofResult("shvit", title, tuple(claims), tuple(rows), notes)
