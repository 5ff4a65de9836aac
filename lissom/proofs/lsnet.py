"""LSNet (arXiv 2503.23135): small kernels predicted from a wide context, beside static kernels and a narrow context.

A generated task: at every pixel a value is to be copied from the right-hand neighbour where the mean of a sparse cue in
the 7 x 7 pixels around it is positive, else from the left-hand one. One mixer between two 1 x 1 convolutions learns it:
LS convolution, which looks at 7 x 7 and aggregates 3 x 3; the same looking at 3 x 3; a static 7 x 7 depthwise
convolution; and this one with a multi-layer perceptron behind it: of about as many parameters, without and with a skip
around it, and of many more.

Where the folder in LISSOM_DATA has CIFAR-10, networks of LSNet's blocks are trained on it: every other mixer an LS
convolution, and none, the latter as much wider as makes the parameters equal. Last, the dynamic convolution (``ska``)
is timed beside the same by unfolding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.conv_norm import ConvNorm, NormLinear
from lissom.layers.lsconv import LSConv
from lissom.models.lsnet import Block, RepVGGDW
from lissom.ops.ska import ska
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    data_set,
    faster,
    image_task,
    interleaved,
    no_worse,
    peak_memory,
    run_arms,
    run_stream,
    time_rows,
    together,
)
from lissom.proofs.base import NOT_SHOWN, SHOWS, Claim, ProofResult, Settings
from lissom.proofs.pela import thin_width
from lissom.registry import register

__all__ = ["cued_neighbours", "unfolded_ska"]

WIDTH = 16
LARGE, NARROW, STATIC = "LS convolution, 7 and 3", "LS convolution, 3 and 3", "static 7 x 7"
SMALL_MLP, SKIPPED_MLP = "static 7 x 7, MLP of 4", "static 7 x 7, MLP of 4 with a skip"
LARGE_MLP = "static 7 x 7, MLP of 64"
LS, DEPTHWISE = "every other LS convolution", "depthwise alone, as many parameters"
SPARSE = 0.1  # share of pixels with a cue
CUE = 7
MATTERS = 0.05  # of the error, where guessing has about 0.5


@dataclass(frozen=True)
class _Scale:
    """Side of the generated maps and budget; steps on CIFAR-10 (None: none); batch of the timed maps, and rounds."""

    side: int
    cued: Budget
    judged: int
    images: Budget | None
    batch: int
    rounds: int


QUICK = _Scale(14, Budget(steps=20, batch=8, lr=5e-3, weight_decay=0.0), 100, None, 1, 3)
FULL = _Scale(
    14, Budget(steps=1500, batch=16, lr=5e-3, weight_decay=0.0), 1000, Budget(steps=1950, batch=128, lr=2e-3), 8, 20
)  # fmt: skip


@register("proof", "lsnet")
def lsnet(settings: Settings) -> ProofResult:
    """The generated task, CIFAR-10, and times. Quick: few steps, too few to learn the task; no CIFAR-10."""
    scale = QUICK if settings.quick else FULL
    makes = {name: partial(_cued_network, name) for name in MIXERS}
    cued = run_stream(settings, makes, CuedNeighbours(scale.side), F.mse_loss, _error, scale.cued, judged=scale.judged)
    images: dict[str, list[Trained]] = {}
    data = data_set("cifar10", quick=settings.quick)
    if scale.images is not None and data.name == "cifar10":
        arms = image_arms(len(data.classes))
        images = run_arms(settings, arms, lambda seed: image_task(data, 32, seed), scale.images, part="cifar10")
    return _judged(scale, cued, images, _timed(scale, settings))


# The generated task


def cued_neighbours(batch: int, side: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (batch, 2, side, side) of a normal value and a cue of -1, 0 or 1; the wanted values (batch, 1, side, side).

    Wanted is the value one pixel to the right where the cues in the 7 x 7 pixels around have a positive mean, else one
    to the left; beyond the edge values and cues are 0. The wanted values' variance is about 1.
    """
    value = torch.randn(batch, 1, side, side, generator=numbers)
    drawn = torch.rand(batch, 1, side, side, generator=numbers)
    cue = (drawn < SPARSE / 2).float() - (drawn > 1 - SPARSE / 2).float()
    # Sums of whole numbers, so that a tie is exactly 0.
    positive = F.avg_pool2d(cue, CUE, 1, CUE // 2, divisor_override=1) > 0
    padded = F.pad(value, (1, 1))
    return torch.cat([value, cue], 1), torch.where(positive, padded[..., 2:], padded[..., :-2])


class CuedNeighbours:
    """``cued_neighbours`` on maps of one size, as ``run_stream`` wants it."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.__qualname__ = f"cued_neighbours({side})"

    def __call__(self, batch: int, numbers: torch.Generator, /) -> tuple[torch.Tensor, torch.Tensor]:
        return cued_neighbours(batch, self.side, numbers)


def _error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return F.mse_loss(outputs, targets).item()


class _Static(nn.Module):
    """x + norm(7 x 7 depthwise convolution of x); behind it, where ``hidden``, a perceptron of every pixel, a skip
    around it where ``skip``."""

    def __init__(self, dim: int, hidden: int = 0, skip: bool = False) -> None:
        super().__init__()
        self.mixer = ConvNorm(dim, dim, CUE, groups=dim)
        self.mlp = (
            nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1)) if hidden else None
        )  # fmt: skip
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(x)
        if self.mlp is None:
            return x
        return x + self.mlp(x) if self.skip else self.mlp(x)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    LARGE: partial(LSConv, WIDTH),
    NARROW: partial(LSConv, WIDTH, large_kernel=3),
    STATIC: partial(_Static, WIDTH),
    SMALL_MLP: partial(_Static, WIDTH, 4),
    SKIPPED_MLP: partial(_Static, WIDTH, 4, skip=True),
    LARGE_MLP: partial(_Static, WIDTH, 64),
}


def _cued_network(name: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, WIDTH, 1), MIXERS[name](), nn.Conv2d(WIDTH, 1, 1))


# Images


def image_arms(classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The two networks for CIFAR-10, of nearly the same parameters."""
    ls = partial(_image_network, 32, True, classes)
    parameters = _size(ls())
    width = thin_width(parameters, lambda w: _size(_image_network(w, False, classes)))
    return {LS: ls, DEPTHWISE: partial(_image_network, width, False, classes)}


def _image_network(width: int, dynamic: bool, classes: int) -> nn.Module:
    """Three stages of two of LSNet's blocks, ``width`` channels and twice as many each, on a half to an eighth of the
    sides: the second mixer of a stage is an LS convolution, or as the first."""
    layers: list[nn.Module] = [ConvNorm(3, width, 3, 2)]
    for stage in range(3):
        dim = width << stage
        if stage:
            layers += [ConvNorm(dim // 2, dim // 2, 3, 2, groups=dim // 2), ConvNorm(dim // 2, dim)]
        layers += [Block(dim, RepVGGDW(dim)), Block(dim, LSConv(dim) if dynamic else RepVGGDW(dim))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormLinear(4 * width, classes))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Time


def unfolded_ska(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What ``ska`` computes, by unfolding x: (N, C, H, W) and w (N, G, K^2, H, W) -> (N, C, H, W)."""
    batch, channels, height, width = x.shape
    groups, taps = w.shape[1:3]
    size = round(taps**0.5)
    columns = F.unfold(x, size, padding=size // 2).reshape(batch, channels // groups, groups, taps, height, width)
    return (columns * w[:, None]).sum(3).flatten(1, 2)


SHIFTED, UNFOLDED = "ska", "by unfolding"


def _timed(scale: _Scale, settings: Settings) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Times of both forms, forward alone and with the backward pass, on 128 channels and 28 x 28 pixels; peak bytes
    of the forward pass."""
    x = torch.randn(scale.batch, 128, 28, 28)
    w = torch.randn(scale.batch, 16, 9, 28, 28)
    forms = {SHIFTED: ska, UNFOLDED: unfolded_ska}

    def forward(form: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: form(x, w)

    def step(form: Callable[..., torch.Tensor]) -> Callable[[], object]:
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        return lambda: torch.autograd.grad(form(*leaves).sum(), leaves)

    times = {
        what: interleaved({name: call(form) for name, form in forms.items()}, len(settings.seeds), scale.rounds)
        for what, call in (("forward", forward), ("forward and backward", step))
    }
    settings.progress("both forms of the dynamic convolution timed")
    return times, {name: peak_memory(forward(form)) for name, form in forms.items()}


# The verdicts


def _judged(
    scale: _Scale,
    cued: dict[str, list[Trained]],
    images: dict[str, list[Trained]],
    timed: tuple[dict[str, dict[str, list[float]]], dict[str, int]],
) -> ProofResult:
    def below(text: str, worse: str) -> Claim:
        return better(text, cued[LARGE], cued[worse], matters=MATTERS, unit="of the squared error", sign=-1)

    sizes = {name: found[0].parameters for name, found in cued.items()}
    claims = [
        below("Kernels predicted from the context solve what a static kernel cannot.", STATIC),
        below("The context has to be wide: the same with 3 x 3 perception does worse.", NARROW),
        below(
            f"At about as many parameters ({sizes[LARGE]} and {sizes[SMALL_MLP]}) predicted kernels beat a static one "
            "with a perceptron behind it.",
            SMALL_MLP,
        ),
        below("They beat it with a skip around the perceptron as well.", SKIPPED_MLP),
        no_worse(
            f"With three times the parameters ({sizes[LARGE_MLP]}) a perceptron emulates the choice of kernels.",
            cued[LARGE_MLP], cued[LARGE], margin=MATTERS, unit="of the squared error", sign=-1,
        ),
    ]  # fmt: skip
    if images:
        claims.append(
            better(
                "On CIFAR-10, LS convolutions gain accuracy over depthwise ones at equal parameters.",
                images[LS], images[DEPTHWISE], matters=0.5,
            )
        )  # fmt: skip
    times, memory = timed
    parts = [faster("", found, UNFOLDED, SHIFTED, more=what) for what, found in times.items()]
    claims += [
        Claim(
            f"The dynamic convolution by shifted views is faster than by unfolding (128 channels, 28 x 28, batch "
            f"{scale.batch}, one thread of a processor).",
            together([part.verdict for part in parts]),
            "; ".join(f"{part.evidence}: {part.verdict}" for part in parts),
        ),
        Claim(
            "Its forward pass needs less than a fifth of the memory.",
            SHOWS if 5 * memory[SHIFTED] < memory[UNFOLDED] else NOT_SHOWN,
            f"{memory[SHIFTED] / 1e6:.1f} and {memory[UNFOLDED] / 1e6:.1f} MB of tensors, counted",
        ),
    ]
    rows = accuracy_rows(cued, "cued neighbours", "squared error", "")
    rows += accuracy_rows(images, "cifar10")
    for what, found in times.items():
        rows += time_rows(found, what)
    notes = (
        "cued neighbours: the wanted values' variance is about 1, the error of both neighbours' mean about 0.5; "
        f"{SPARSE:.0%} of the pixels have a cue, and a tie counts as left",
        "all arms of the generated task have the same steps and batches; their parameters are in the table",
    )
    return ProofResult(
        "lsnet",
        "kernels predicted from a wide context, beside static and narrow ones",
        tuple(claims),
        tuple(rows),
        notes,
    )
