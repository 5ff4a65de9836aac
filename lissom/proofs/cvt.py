"""CvT (arXiv 2103.15808): convolutional projections in place of position embeddings, and fewer keys and values.

One small network of two CvT stages is trained in four forms: (a) linear projections and learned positions; (b) linear
projections and no positions; (c) convolutional projections, no positions, keys and values of a quarter of the places,
as published; (d) the same with keys and values of all places. What (c) saves against (d) is counted and timed, on the
attention layer alone.

The data are CIFAR-10 where the folder in LISSOM_DATA has it, else scikit-learn's digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lissom.meters.costs import total
from lissom.models.cvt import CvTStage
from lissom.ops.conv_attention import ConvAttention
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
    run_arms,
    step_call,
    time_rows,
    together,
)
from lissom.proofs.base import Claim, ProofResult, Settings
from lissom.registry import register

__all__ = ["SmallCvT"]

POSITIONS, BARE, CONV, DENSE = (
    "(a) linear, positions", "(b) linear, no positions", "(c) convolutional", "(d) convolutional, all keys"
)  # fmt: skip
ARMS = (POSITIONS, BARE, CONV, DENSE)
MARGIN = 1.0  # points of accuracy that may be lost without counting as a loss
MATTERS = 0.5
HEADS = (1, 2)


@dataclass(frozen=True)
class _Scale:
    """Pixels, dims and depths of the stages, images to learn from and to judge by, the budget; rounds of timing."""

    side: int
    dims: tuple[int, int]
    depths: tuple[int, int]
    train: int | None
    held_out: int
    budget: Budget
    rounds: int


QUICK = _Scale(16, (16, 32), (1, 1), 300, 200, Budget(steps=10, batch=32, lr=1e-3), rounds=3)
DIGITS = _Scale(16, (48, 96), (1, 3), None, 359, Budget(steps=500, batch=64, lr=1e-3), rounds=20)
CIFAR = _Scale(32, (48, 96), (1, 3), 10_000, 2000, Budget(steps=1248, batch=64, lr=1e-3), rounds=20)


@register("proof", "cvt")
def cvt(settings: Settings) -> ProofResult:
    """All arms, and the times of the layer. Quick: the digits, narrow networks, few steps."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    makes = {name: partial(SmallCvT, name, scale.side, scale.dims, scale.depths, len(data.classes)) for name in ARMS}
    found = run_arms(
        settings, makes,
        lambda seed: image_task(data, scale.side, seed, train=scale.train, held_out=scale.held_out), scale.budget,
    )  # fmt: skip
    return _judged(data.name, scale, found, *_timed(scale, settings))


class _Positions(nn.Module):
    """Learned positions, added to tokens (B, N, dim)."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


class SmallCvT(nn.Module):
    """Images (B, 3, side, side) to logits: stages at a half and a quarter of the sides, a class token in the last.

    ``arm`` is one of ``ARMS``; positions, where it has them, are added behind the first embedding.
    """

    def __init__(self, arm: str, side: int, dims: tuple[int, int], depths: tuple[int, int], classes: int) -> None:
        super().__init__()
        method = "linear" if arm in (POSITIONS, BARE) else "dw_bn"
        stages = []
        before = 3
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, HEADS, strict=True)):
            stages.append(CvTStage(before, dim, depth, heads, (3, 2, 1), method, cls_token=i == 1))
            before = dim
        self.stages = nn.ModuleList(stages)
        if arm == DENSE:
            for stage, heads in zip(stages, HEADS, strict=True):
                for block in stage.blocks:
                    old = block.attn
                    block.attn = ConvAttention(old.proj.in_features, heads, stride_kv=1, cls_token=old.cls_token)
        self.norm, self.head = nn.LayerNorm(before), nn.Linear(before, classes)
        self.apply(_start)
        nn.init.trunc_normal_(stages[1].cls_token, std=0.02)
        if arm == POSITIONS:
            stages[0].pos_drop = _Positions((side // 2) ** 2, dims[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            tokens, size = stage(x)
            x = stage.maps(tokens, size)  # type: ignore[operator]
        return self.head(self.norm(tokens[:, 0]))


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class _OnMaps(nn.Module):
    """The attention layer of a map (B, dim, H, W), as a module of one input."""

    def __init__(self, attention: ConvAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3])


def _timed(scale: _Scale, settings: Settings) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Times of the first stage's attention layer in forms (c) and (d), forward and in training; multiplications."""
    side, dim = scale.side // 2, scale.dims[0]
    layers = {CONV: _OnMaps(ConvAttention(dim, HEADS[0])), DENSE: _OnMaps(ConvAttention(dim, HEADS[0], stride_kv=1))}
    x = torch.randn(16, dim, side, side)
    times = {
        what: interleaved({n: call(layer, x) for n, layer in layers.items()}, len(settings.seeds), scale.rounds)
        for what, call in (("attention, forward", forward_call), ("attention, training step", step_call))
    }
    settings.progress("attention timed")
    return times, {name: total(layer, (dim, side, side))[1] for name, layer in layers.items()}


def _judged(
    data: str,
    scale: _Scale,
    found: dict[str, list[Trained]],
    times: dict[str, dict[str, list[float]]],
    macs: dict[str, int],
) -> ProofResult:
    parts = [faster("", timed, DENSE, CONV, more=what) for what, timed in times.items()]
    saved = f"{macs[DENSE] / macs[CONV]:.2f} times fewer multiplications"
    tokens = (scale.side // 2) ** 2
    claims = (
        no_worse(
            "Convolutional projections without positions are as accurate as linear ones with learned positions.",
            found[CONV], found[POSITIONS], margin=MARGIN,
        ),
        better(
            "Without positions, convolutional projections gain much over linear ones.", found[CONV], found[BARE],
            matters=MATTERS,
        ),
        better("Linear projections lose without positions.", found[POSITIONS], found[BARE], matters=MATTERS),
        no_worse(
            "Keys and values of a quarter of the places lose nothing against those of all.", found[CONV], found[DENSE],
            margin=MARGIN,
        ),
        Claim(
            f"They make the attention layer faster ({tokens} tokens, {scale.dims[0]} channels, batch 16).",
            together([part.verdict for part in parts]),
            "; ".join([saved, *(f"{part.evidence}: {part.verdict}" for part in parts)]),
        ),
    )  # fmt: skip
    rows = accuracy_rows(found)
    for what, timed in times.items():
        rows += time_rows(timed, what, {name: {"10^6 MACs": macs[name] / 1e6} for name in timed})
    notes = (
        "the embedding is a strided 3 x 3 convolution in all arms; the zeros around its maps tell (b) something of "
        "where the border is",
        "positions are added once, behind the first embedding",
    )
    title = f"four kinds of attention on {data}, {tokens} and {tokens // 4} tokens"
    return ProofResult("cvt", title, claims, tuple(rows), notes)
