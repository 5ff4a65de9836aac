"""MetaMixer (arXiv 2406.02021): FFNified attention beside attention, its own parts, and no mixing at all.

Three parts, each beside its own baselines in the same run:

1. One small network of alternating token and channel mixers, trained with six token mixers: none, 3 x 3 average
   pooling, one 7 x 7 depthwise convolution, FFNified attention without its GELU (so one linear map), FFNified
   attention, and softmax attention of four heads without positions. Channel mixers have no spatial convolution, so that
   positions meet in the token mixer alone. On 300 of scikit-learn's digits, and in the full run on CIFAR-10 where the
   folder in LISSOM_DATA has it.
2. The time of FFNified attention, its branches merged, and of attention (torch's fused one) on maps of 256 and 1,024
   places.
3. ``FFNetSR``: images of twice the side, beside bicubic interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import Attention
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional

from lissom.data.sources import DataSet, read
from lissom.layers.ffnified_attention import FFNifiedAttention, RepDepthwise
from lissom.models.metamixer import FFNetSR
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    built,
    data_set,
    faster,
    forward_call,
    image_task,
    interleaved,
    no_worse,
    pooled,
    run_arms,
    spread,
    time_rows,
    train_on_stream,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register

__all__ = ["MixerNet", "psnr"]

HEADS = 4
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
GAIN = 2.0  # decibels over bicubic interpolation


class _Attention(nn.Module):
    """Softmax attention on maps (B, dim, H, W), behind a BatchNorm, as it has none of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.BatchNorm2d(dim), Attention(dim, num_heads=HEADS, qkv_bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


MIXERS: Mapping[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "3 x 3 pooling": lambda dim: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "one 7 x 7 depthwise": lambda dim: RepDepthwise(dim, dim, 7),
    "FFNified, linear": lambda dim: FFNifiedAttention(dim, act=nn.Identity),
    "FFNified": FFNifiedAttention,
    "attention": _Attention,
}


@dataclass(frozen=True)
class _Scale:
    """Networks of ``dims`` and ``depths`` on images of ``pixels`` (a first map of half the side), how many train and
    judge, and their ``budget``."""

    pixels: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    train: int
    held_out: int | None
    budget: Budget


@dataclass(frozen=True)
class _Enlarging:
    """Images of ``pixels`` a side, to be had from half of them; width, depth and steps of ``FFNetSR``."""

    pixels: int
    train: int
    held_out: int | None
    budget: Budget
    dim: int = 16
    depth: int = 4


SMALL = _Scale(16, (32,), (2,), 300, None, Budget(300, 64, 3e-3))
QUICK = _Scale(16, (32,), (2,), 300, 600, Budget(40, 32, 3e-3))
CIFAR = _Scale(32, (48, 96), (2, 2), 10_000, 2000, Budget(5 * 78, 128, 2e-3, augment=True, flip=True))
QUICK_ENLARGING = _Enlarging(8, 1000, 300, Budget(150, 32, 2e-3, weight_decay=0.0))
ENLARGING = _Enlarging(28, 5000, 500, Budget(600, 16, 2e-3, weight_decay=0.0))
DIGITS_ENLARGING = _Enlarging(8, 1200, None, Budget(1000, 32, 2e-3, weight_decay=0.0))
SIDES, TIMED_DIM, ROUNDS = (16, 32), 96, 15


@register("proof", "metamixer")
def metamixer(settings: Settings) -> ProofResult:
    """All parts. Quick: fewer steps, the digits alone, and these to enlarge; full: MNIST to enlarge where it is."""
    digits = pooled(read("digits"))
    scale = QUICK if settings.quick else SMALL
    found = _trained(settings, digits, scale)
    rows, claims = accuracy_rows(found, "digits"), list(_mixers(found, "digits"))
    natural = data_set("cifar10", quick=settings.quick)
    if natural.name == "cifar10":
        larger = _trained(settings, natural, CIFAR)
        rows += accuracy_rows(larger, natural.name)
        claims += _mixers(larger, natural.name)
    times = _times(len(settings.seeds))
    rows += time_rows(times)
    claims += [
        faster(
            f"FFNified attention takes less time than attention on a map of {side * side} places.", times,
            f"attention, {side * side} places", f"FFNified, {side * side} places",
        )
        for side in SIDES
    ]  # fmt: skip
    enlarged, claim = _enlarged(settings)
    notes = (
        "Parameters differ as the mixers do: every arm has the same width, depth, channel mixers and steps.",
        "Attention has no positions here; the convolutions have them in their kernels.",
    )
    title = "token mixers in one network, their time, and images enlarged"
    return ProofResult("metamixer", title, (*claims, claim), (*rows, *enlarged), notes)


# Mixers in a network


class _Block(nn.Module):
    """x + token mixer(x), then x + channel mixer(x): BatchNorm, 1 x 1 to twice the width, GELU, 1 x 1."""

    def __init__(self, dim: int, mixer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.token_mixer = mixer(dim)
        self.channel_mixer = nn.Sequential(
            nn.BatchNorm2d(dim), nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.token_mixer(x)
        return x + self.channel_mixer(x)


class MixerNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes): stages of blocks, each behind a 2 x 2 convolution of stride 2.

    ``mixer`` is one of ``MIXERS``; ``dims`` and ``depths`` are those of the stages.
    """

    def __init__(self, mixer: str, dims: tuple[int, ...], depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for dim, depth in zip(dims, depths, strict=True):
            layers += [nn.Conv2d(before, dim, 2, 2), *(_Block(dim, MIXERS[mixer]) for _ in range(depth))]
            before = dim
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.BatchNorm2d(before), nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(x)).mean((2, 3)))


def _trained(settings: Settings, data: DataSet, scale: _Scale) -> dict[str, list[Trained]]:
    arms = {name: partial(MixerNet, name, scale.dims, scale.depths, len(data.classes)) for name in MIXERS}
    return run_arms(
        settings, arms, lambda seed: image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out),
        scale.budget, part=data.name,
    )  # fmt: skip


def _mixers(found: Mapping[str, list[Trained]], data: str) -> tuple[Claim, ...]:
    """The order that the paper's frame lets one expect, pair by pair."""
    return (
        better(
            f"Two depthwise convolutions with GELU between, keys and values, are better than one ({data}).",
            found["FFNified"], found["one 7 x 7 depthwise"], matters=MATTERS,
        ),
        better(
            f"The GELU is what makes it a memory: without it FFNified attention loses ({data}).",
            found["FFNified"], found["FFNified, linear"], matters=MATTERS,
        ),
        better(
            f"Even the linear pair, with its projection, is better than one depthwise convolution ({data}).",
            found["FFNified, linear"], found["one 7 x 7 depthwise"], matters=MATTERS,
        ),
        no_worse(
            f"The frame carries the performance, not self-attention: FFNified attention does not lose to it ({data}).",
            found["FFNified"], found["attention"], margin=MATTERS,
        ),
        better(
            f"One depthwise convolution is better than pooling ({data}).",
            found["one 7 x 7 depthwise"], found["3 x 3 pooling"], matters=MATTERS,
        ),
        better(
            f"Pooling is better than no mixing of positions ({data}).",
            found["3 x 3 pooling"], found["none"], matters=MATTERS,
        ),
    )  # fmt: skip


def _times(repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of one image through each of the two mixers, on maps of both sizes."""
    merged = reparameterize_model(built(partial(FFNifiedAttention, TIMED_DIM), 0).eval())
    attention = built(partial(_Attention, TIMED_DIM), 0).eval()
    times: dict[str, list[float]] = {}
    for side in SIDES:
        x = torch.randn(1, TIMED_DIM, side, side, generator=torch.Generator().manual_seed(side))
        calls = {
            f"FFNified, {side * side} places": forward_call(merged, x),
            f"attention, {side * side} places": forward_call(attention, x),
        }
        times |= interleaved(calls, repetitions, ROUNDS)
    return times


# Images of twice the side


def psnr(answer: torch.Tensor, truth: torch.Tensor) -> float:
    """Decibels over all images together, whose values run from 0 to 1; answers are cut to that."""
    return float(-10 * functional.mse_loss(answer.clamp(0, 1), truth).log10())


def _smaller(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2), bicubic with the low-pass filter that halving wants."""
    return functional.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def _enlarged(settings: Settings) -> tuple[list[Row], Claim]:
    data = data_set("mnist", quick=settings.quick)
    scale = QUICK_ENLARGING if settings.quick else ENLARGING if data.name == "mnist" else DIGITS_ENLARGING
    learnt, bicubic = [], []
    for seed in settings.seeds:
        task = image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out)
        assert task.fit is not None
        images, held_out = (torch.from_numpy(s.inputs(slice(None))) / 2 + 0.5 for s in (task.fit, task.report))

        def drawn(
            count: int, numbers: torch.Generator, images: torch.Tensor = images
        ) -> tuple[torch.Tensor, torch.Tensor]:
            large = images[torch.randint(len(images), (count,), generator=numbers)]
            return _smaller(large), large

        model = built(partial(FFNetSR, 2, scale.dim, scale.depth), seed)
        train_on_stream(model, drawn, functional.l1_loss, scale.budget, seed)
        small = _smaller(held_out)
        with torch.no_grad():
            learnt.append(psnr(model(small), held_out))
        bicubic.append(psnr(functional.interpolate(small, scale_factor=2, mode="bicubic"), held_out))
        settings.progress(f"seed {seed}: FFNetSR {learnt[-1]:.2f} dB, bicubic {bicubic[-1]:.2f} dB")
    gained = [a - b for a, b in zip(learnt, bicubic, strict=True)]
    cost = {"parameters": sum(p.numel() for p in model.parameters()), "steps": scale.budget.steps}
    where = f"{data.name}, {scale.pixels // 2} to {scale.pixels} pixels"
    claim = Claim(
        f"FFNetSR enlarges images better than bicubic interpolation, by {GAIN:g} dB or more.",
        verdict_by_interval([g - GAIN for g in gained]),
        f"better by {spread(gained)} dB ({where}, {len(gained)} seeds)",
    )
    return [
        Row(f"{where}, FFNetSR", "PSNR", tuple(learnt), "dB", cost),
        Row(f"{where}, bicubic", "PSNR", tuple(bicubic), "dB"),
    ], claim
