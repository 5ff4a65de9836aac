"""SViT (arXiv 2211.11167): super token attention beside full and window attention, on a task of far places and in cost.

A generated map holds a marker somewhere in one corner and a coloured one in the corner opposite; wanted at the first is
the second's colour. Three networks of two STViT blocks, alike but for what attends: super tokens of 4 x 4 pixels, all
pixels, or the pixels of each window of 4 x 4. Convolutions and windows together reach at most 8 pixels from the first
marker's corner, and the second is further away; what they cannot know they can only guess.

Then the time, multiplications and memory of the operator alone, on maps of growing size with the channels and cells of
the published networks' first stage, beside full attention in two forms: with the table of all pairs of pixels, and by
torch's fused kernel, which keeps no such table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lissom.meters.costs import total
from lissom.models.svit import SuperTokenBlock
from lissom.ops.super_token_attention import MapAttention, SuperTokenAttention
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    faster,
    forward_call,
    interleaved,
    no_worse,
    peak_memory,
    run_stream,
    time_rows,
    together,
)
from lissom.proofs.base import NOT_SHOWN, SHOWS, Claim, ProofResult, Row, Settings
from lissom.registry import register

__all__ = ["CHANNELS", "COLOURS", "FarColour", "retrieval", "retrieval_accuracy", "retrieval_loss"]

COLOURS = 4
CHANNELS = 1 + COLOURS + 2  # the first marker, the second by its colour, and two of noise
REGION = 3  # pixels of a corner's side
NOISE = 0.1  # deviation in the last two channels: full attention learns the task in the budget, and it is the baseline
CELL = 4
FULL_ATTENTION, WINDOWS, SUPER_TOKENS = "full attention", "window attention", "super token attention"
TABLE = "full attention, table of pairs"


@dataclass(frozen=True)
class _Scale:
    """Side of the generated maps, width and budget of the networks; sides of the timed maps, and rounds of timing."""

    side: int
    width: int
    budget: Budget
    judged: int
    sides: tuple[int, ...]
    rounds: int


QUICK = _Scale(16, 24, Budget(steps=20, batch=8, lr=2e-3), 200, sides=(16, 32), rounds=3)
FULL = _Scale(16, 24, Budget(steps=400, batch=24, lr=2e-3), 1000, sides=(32, 56, 96), rounds=20)


@register("proof", "svit")
def svit(settings: Settings) -> ProofResult:
    """The retrieval task and the costs. Quick: few steps, too few to learn the task, and smaller maps."""
    scale = QUICK if settings.quick else FULL
    makes = {name: partial(_network, scale.width, name) for name in (SUPER_TOKENS, FULL_ATTENTION, WINDOWS)}
    sample = FarColour(scale.side)
    found = run_stream(
        settings, makes, sample, retrieval_loss, retrieval_accuracy, scale.budget, judged=scale.judged
    )  # fmt: skip
    x = torch.randn(scale.budget.batch, CHANNELS, scale.side, scale.side)
    whole = interleaved(
        {name: forward_call(make(), x) for name, make in makes.items()}, len(settings.seeds), scale.rounds
    )
    costs = _operators(scale, settings)
    return _judged(scale, found, whole, costs)


# The task


def retrieval(batch: int, side: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (batch, CHANNELS, side, side), and (batch, 2): the second marker's colour, the first marker's pixel.

    The first marker stands in one of four corners of ``REGION`` x ``REGION`` pixels (channel 0), the second in the
    corner opposite (a channel of 1 to 4, its colour). The last two channels are normal noise of deviation ``NOISE``.
    """
    maps = torch.zeros(batch, CHANNELS, side, side)
    maps[:, 1 + COLOURS :] = NOISE * torch.randn(batch, 2, side, side, generator=numbers)
    corners = torch.randint(2, (batch, 2), generator=numbers)
    near, far = torch.randint(REGION, (2, batch, 2), generator=numbers)
    first = corners * (side - REGION) + near
    second = (1 - corners) * (side - REGION) + far
    colours = torch.randint(COLOURS, (batch,), generator=numbers)
    which = torch.arange(batch)
    maps[which, 0, first[:, 0], first[:, 1]] = 1
    maps[which, 1 + colours, second[:, 0], second[:, 1]] = 1
    return maps, torch.stack([colours, first[:, 0] * side + first[:, 1]], 1)


class FarColour:
    """``retrieval`` on maps of one size, as ``run_stream`` wants it."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.__qualname__ = f"retrieval({side})"

    def __call__(self, batch: int, numbers: torch.Generator, /) -> tuple[torch.Tensor, torch.Tensor]:
        return retrieval(batch, self.side, numbers)


def _asked(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits at the first marker: maps (B, COLOURS, H, W) -> (B, COLOURS)."""
    return outputs.flatten(2)[torch.arange(len(outputs)), :, targets[:, 1]]


def retrieval_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the colour at the first marker: maps (B, COLOURS, H, W), targets as of ``retrieval``."""
    return F.cross_entropy(_asked(outputs, targets), targets[:, 0])


def retrieval_accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """How many colours are right, in %; chance is 25."""
    return 100 * (_asked(outputs, targets).argmax(1) == targets[:, 0]).float().mean().item()


# The arms


class _Windows(nn.Module):
    """``attention`` in each window of ``CELL`` x ``CELL`` pixels: (B, C, H, W) to the same, sides multiples of it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, dim, height, width = x.shape
        rows, columns = height // CELL, width // CELL
        parts = x.reshape(batch, dim, rows, CELL, columns, CELL).permute(0, 2, 4, 1, 3, 5)
        mixed = self.attention(parts.flatten(0, 2)).reshape(batch, rows, columns, dim, CELL, CELL)
        return mixed.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _network(width: int, mixer: str) -> nn.Module:
    """A 1 x 1 convolution, two blocks, a 1 x 1 convolution; parameters are the same for every mixer."""
    blocks = [SuperTokenBlock(width, (CELL, CELL), num_heads=2, mlp_ratio=2.0) for _ in range(2)]
    for block in blocks:
        if mixer == WINDOWS:
            block.attn = _Windows(block.attn.stoken_refine)  # type: ignore[assignment]
        elif mixer == FULL_ATTENTION:
            block.attn = _FusedAttention(width, num_heads=2)  # type: ignore[assignment]
    return nn.Sequential(nn.Conv2d(CHANNELS, width, 1), *blocks, nn.Conv2d(width, COLOURS, 1))


class _FusedAttention(MapAttention):
    """Full attention with queries, keys and values laid out as torch's fused kernel for processors wants them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        joint = self.qkv(x).reshape(batch, self.num_heads, -1, height * width).transpose(2, 3).contiguous()
        y = F.scaled_dot_product_attention(*(part.contiguous() for part in joint.chunk(3, dim=3)))
        return self.proj(y.transpose(2, 3).reshape(x.shape))


class _TableAttention(MapAttention):
    """Full attention that makes its table of all pairs of pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, dim, height, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, self.num_heads, -1, height * width).chunk(3, dim=2)
        weights = ((dim // self.num_heads) ** -0.5 * q.transpose(2, 3) @ k).softmax(3)
        return self.proj((v @ weights.transpose(2, 3)).reshape(x.shape))


# What it costs


DIM, CELL_1 = 64, 8  # the first stage of the published stvit_small: one head


@dataclass(frozen=True)
class _Cost:
    """Of one operator on one map: milliseconds, one a repetition; multiplications; bytes its tensors hold at most."""

    times: tuple[float, ...]
    macs: int
    memory: int


def _operators(scale: _Scale, settings: Settings) -> dict[tuple[str, int], _Cost]:
    """Costs by operator and side of the map, batch 1, forward, one thread."""
    operators: dict[str, nn.Module] = {
        SUPER_TOKENS: SuperTokenAttention(DIM, (CELL_1, CELL_1), num_heads=1),
        FULL_ATTENTION: _FusedAttention(DIM, 1),
        TABLE: _TableAttention(DIM, 1),
    }
    costs = {}
    for side in scale.sides:
        x = torch.randn(1, DIM, side, side)
        calls = {name: forward_call(operator, x) for name, operator in operators.items()}
        times = interleaved(calls, len(settings.seeds), max(3, scale.rounds * 32 // side))
        for name, operator in operators.items():
            macs = total(operator, (DIM, side, side))[1]
            costs[name, side] = _Cost(tuple(times[name]), macs, peak_memory(calls[name]))
        settings.progress(f"operators timed on {side} x {side} pixels")
    return costs


def _growth(small: float, large: float, sides: tuple[int, ...]) -> float:
    """The exponent e of a cost that grows as pixels^e, from the smallest to the largest map."""
    return math.log(large / small) / (2 * math.log(sides[-1] / sides[0]))


# The verdicts


def _judged(
    scale: _Scale, found: dict[str, list[Trained]], whole: dict[str, list[float]], costs: dict[tuple[str, int], _Cost]
) -> ProofResult:
    sides, repetitions = scale.sides, range(len(whole[SUPER_TOKENS]))
    exponents = {
        name: [
            _growth(costs[name, sides[0]].times[i], costs[name, sides[-1]].times[i], sides) for i in repetitions
        ]
        for name in (SUPER_TOKENS, FULL_ATTENTION, TABLE)
    }  # fmt: skip
    claims = (
        better(
            "Super token attention learns what stands beyond the reach of windows and convolutions.",
            found[SUPER_TOKENS], found[WINDOWS], matters=5.0,
        ),
        no_worse("It does so as well as full attention.", found[SUPER_TOKENS], found[FULL_ATTENTION], margin=2.0),
        faster(
            f"At {scale.side} x {scale.side} pixels the whole network is faster with super tokens than with full "
            "attention.",
            whole, FULL_ATTENTION, SUPER_TOKENS,
        ),
        _faster_alone(costs, sides),
        better(
            "Its time grows more slowly with the number of pixels than full attention's.",
            exponents[SUPER_TOKENS], exponents[FULL_ATTENTION], matters=0.1, unit="in the exponent of pixels", sign=-1,
        ),
        _memory(costs, sides),
    )  # fmt: skip
    rows = accuracy_rows(found)
    rows += time_rows(whole, "time of a batch, forward")
    for (name, side), cost in costs.items():
        spent = {"10^6 MACs": cost.macs / 1e6, "MB": cost.memory / 1e6}
        rows.append(Row(f"{name}, {side} x {side}", "time of the operator", cost.times, "ms", spent))
    rows += [Row(name, "exponent of pixels", tuple(values)) for name, values in exponents.items()]
    notes = (
        "chance is 25 %; the window network cannot know the colour, and is there to show that the task needs reach",
        "MB are tensors made in one forward pass; what the fused kernel keeps inside is not seen",
        "all networks have the same parameters, and two heads",
    )
    title = f"a far marker's colour on {scale.side} x {scale.side} pixels, and costs up to {sides[-1]} x {sides[-1]}"
    return ProofResult("svit", title, claims, tuple(rows), notes)


def _faster_alone(costs: dict[tuple[str, int], _Cost], sides: tuple[int, ...]) -> Claim:
    """On every size of map, against the faster form of full attention there."""
    parts = []
    for side in sides:
        rival = min((FULL_ATTENTION, TABLE), key=lambda name: sum(costs[name, side].times))
        times = {"full attention": costs[rival, side].times, SUPER_TOKENS: costs[SUPER_TOKENS, side].times}
        parts.append(faster("", times, "full attention", SUPER_TOKENS, more=f"{side} x {side}, {_form(rival)}"))
    return Claim(
        "The operator alone is faster than full attention, in the faster of its two forms, on every size of map.",
        together([part.verdict for part in parts]),
        "; ".join(f"{part.evidence}: {part.verdict}" for part in parts),
    )


def _form(name: str) -> str:
    return "by the table" if name == TABLE else "fused"


def _memory(costs: dict[tuple[str, int], _Cost], sides: tuple[int, ...]) -> Claim:
    """Memory is counted, not sampled: it is the same in every repetition, and has no interval."""
    first, last = sides[0], sides[-1]
    names = (SUPER_TOKENS, TABLE, FULL_ATTENTION)
    exponents = {name: _growth(costs[name, first].memory, costs[name, last].memory, sides) for name in names}
    shown = exponents[SUPER_TOKENS] < 1.2 and exponents[TABLE] > 1.8
    parts = [
        f"{name} {exponents[name]:.2f} ({costs[name, last].memory / 1e6:.1f} MB at {last} x {last})" for name in names
    ]
    return Claim(
        "Its memory grows nearly linearly (exponent below 1.2), that of the table of pairs as the square (above 1.8).",
        SHOWS if shown else NOT_SHOWN,
        f"exponents of pixels: {'; '.join(parts)}",
    )
