"""HorNet (arXiv 2207.14284): products of how many features gnConv makes, and what it brings on images.

Two parts, each beside its own baselines in the same run:

1. A generated task that is nothing but a product of three features at three places, so a polynomial of degree 3:
   maps of -1 and 1 in four channels, and x0(i, j) x1(i - 1, j) x2(i, j + 1) to tell at every place where all three
   exist. A network of a 1 x 1 convolution, a mixer and another 1 x 1 convolution, without any other non-linearity. The
   mixers: gnConv of order 1, 2 and 3, whose degrees are 2, 3 and 4, and a 7 x 7 depthwise convolution with a GELU
   feed-forward layer, which has more parameters than any of them.
2. Images: a small HorNet beside the same network with a plain 7 x 7 depthwise convolution in gnConv's place and a
   feed-forward layer wider by as many parameters as that saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional

from lissom.models.hornet import HorNet, HorNetBlock
from lissom.ops.gnconv import GnConv
from lissom.proofs.arms import (
    Budget,
    accuracy_rows,
    better,
    data_set,
    image_task,
    run_arms,
    run_stream,
    spread,
    together,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register

__all__ = ["network", "products", "small_hornet"]

CHANNELS, WIDTH = 4, 16
MIXERS = ("order 1", "order 2", "order 3", "7 x 7 and GELU")
SOLVED, CHANCE = 0.05, 0.9  # squared error of the answers, whose own variance is 1: below, above
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
HELD_OUT = 256  # maps of the generated task


@dataclass(frozen=True)
class _Scale:
    """``side`` and ``product`` of the generated task; the small network's ``dim`` and ``depths``, the ``pixels`` of its
    images, how many train and judge, and the ``images`` budget."""

    side: int
    product: Budget
    dim: int
    depths: tuple[int, ...]
    pixels: int
    train: int
    held_out: int | None
    images: Budget


QUICK = _Scale(
    8, Budget(400, 12, 5e-3, weight_decay=0.0), 16, (1, 1), 16, 600, 600, Budget(60, 32, 3e-3, augment=True)
)  # fmt: skip
FULL = _Scale(
    12, Budget(1500, 32, 5e-3, weight_decay=0.0), 32, (1, 1, 2), 32, 10_000, 2000,
    Budget(5 * 156, 64, 2e-3, augment=True, flip=True),
)  # fmt: skip
DIGITS = _Scale(12, FULL.product, 32, (1, 1, 2), 32, 1200, None, Budget(5 * 18, 64, 2e-3, augment=True))


@register("proof", "hornet")
def hornet(settings: Settings) -> ProofResult:
    """Both parts. Quick: smaller maps and fewer steps, and the digits; full: CIFAR-10 where LISSOM_DATA has it."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else FULL if data.name == "cifar10" else DIGITS

    def sample(count: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return products(count, scale.side, numbers)

    learnt = run_stream(
        settings, {name: partial(network, name) for name in MIXERS}, sample, functional.mse_loss, _error, scale.product,
        judged=HELD_OUT, part="products",
    )  # fmt: skip
    errors = {name: [arm.accuracy for arm in trained] for name, trained in learnt.items()}
    arms = {
        "gnConv": partial(small_hornet, scale.dim, scale.depths, len(data.classes)),
        "7 x 7 depthwise": partial(small_hornet, scale.dim, scale.depths, len(data.classes), plain=True),
    }
    found = run_arms(
        settings, arms, lambda seed: image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out),
        scale.images,
    )  # fmt: skip
    rows = [
        Row(
            name, "squared error", tuple(errors[name]), "",
            {"parameters": trained[0].parameters, "10^6 MACs": trained[0].macs / 1e6, "steps": trained[0].steps},
        )
        for name, trained in learnt.items()
    ]  # fmt: skip
    claims = (
        *_orders(errors),
        better(
            f"On images ({data.name}) gnConv is better than a 7 x 7 depthwise convolution, with as many parameters.",
            found["gnConv"], found["7 x 7 depthwise"], matters=MATTERS,
        ),
    )  # fmt: skip
    notes = (
        "The wider feed-forward layer of the depthwise network stands for the parameters of gnConv's projections.",
    )
    title = "products of three features, and images, beside depthwise convolutions"
    return ProofResult("hornet", title, claims, (*rows, *accuracy_rows(found, data.name)), notes)


# The generated task


def products(count: int, side: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (count, 4, side, side) of -1 and 1, and products (count, side - 1, side - 1) of three of their values.

    The product at (i, j) is x0(i, j) x1(i - 1, j) x2(i, j + 1), for rows i from 1 and columns j up to side - 2: where
    all three exist. Nothing of it is seen in any two of the values.
    """
    x = torch.randint(2, (count, CHANNELS, side, side), generator=numbers).float() * 2 - 1
    return x, x[:, 0, 1:, :-1] * x[:, 1, :-1, :-1] * x[:, 2, 1:, 1:]


def network(mixer: str) -> nn.Module:
    """(B, 4, H, W) -> (B, H - 1, W - 1): the answers at the places of ``products``, with one of ``MIXERS`` inside."""
    middle: nn.Module
    if mixer.startswith("order"):
        middle = GnConv(WIDTH, int(mixer.removeprefix("order")))
    else:
        middle = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH),
            nn.Conv2d(WIDTH, 4 * WIDTH, 1),
            nn.GELU(),
            nn.Conv2d(4 * WIDTH, WIDTH, 1),
        )
    return nn.Sequential(nn.Conv2d(CHANNELS, WIDTH, 1), middle, nn.Conv2d(WIDTH, 1, 1), _Inner())


class _Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 1:, :-1]


def _error(answers: torch.Tensor, products: torch.Tensor) -> float:
    return float(functional.mse_loss(answers, products))


def _orders(errors: dict[str, list[float]]) -> tuple[Claim, Claim]:
    """What should be learnt is learnt, and what should not is not: each by the interval of its error."""

    def verdicts(solved: tuple[str, ...], unsolved: tuple[str, ...]) -> str:
        below = [verdict_by_interval([SOLVED - e for e in errors[name]]) for name in solved]
        above = [verdict_by_interval([e - CHANCE for e in errors[name]]) for name in unsolved]
        return together([*below, *above])

    def evidence(*names: str) -> str:
        left = "; ".join(f"{name}: {spread(errors[name], 4)}" for name in names)
        return f"squared error, of a variance of 1: {left} (learnt: below {SOLVED}; not learnt: above {CHANCE})"

    return (
        Claim(
            "gnConv of order n makes products of n + 1 features: orders 2 and 3 learn a product of three, order 1 does "
            "not.",
            verdicts(("order 2", "order 3"), ("order 1",)), evidence("order 1", "order 2", "order 3"),
        ),
        Claim(
            "A 7 x 7 depthwise convolution and a GELU layer, of more parameters, do not learn it in as many steps.",
            verdicts(("order 2",), ("7 x 7 and GELU",)), evidence("7 x 7 and GELU", "order 2"),
        ),
    )  # fmt: skip


# The small network


class _Plain(nn.Module):
    """A HorNet block with a depthwise convolution in gnConv's place: x + dw(LN x), then x + MLP(LN x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-6), LayerNorm2d(dim, eps=1e-6)
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dwconv(self.norm1(x))
        return x + self.pwconv2(self.act(self.pwconv1(self.norm2(x))))


def small_hornet(dim: int, depths: tuple[int, ...], classes: int, plain: bool = False) -> nn.Module:
    """HorNet ``dim`` wide in its first stage, on half the images' sides there, without layer scales.

    ``plain``: each gnConv is a 7 x 7 depthwise convolution, and the feed-forward layer behind it is wider, so that the
    block's number of parameters comes nearest to what it was.
    """
    model = HorNet(num_classes=classes, dim=dim, depths=depths, filter_sizes=(None,) * len(depths), layer_scale=0.0)
    model.downsample_layers[0][0] = nn.Conv2d(3, dim, 2, 2)  # type: ignore[index]
    if plain:
        for stage in model.stages:
            assert isinstance(stage, nn.Sequential)
            for number, block in enumerate(stage):
                assert isinstance(block, HorNetBlock)
                stage[number] = _plain(block)
    return model


def _plain(block: HorNetBlock) -> nn.Module:
    dim = block.pwconv1.in_features
    given = sum(p.numel() for p in block.parameters())
    a_unit = 2 * dim + 1  # parameters
    least = sum(p.numel() for p in _Plain(dim, 1).parameters()) - a_unit
    plain = _Plain(dim, round((given - least) / a_unit))
    for layer in (plain.dwconv, plain.pwconv1, plain.pwconv2):  # as HorNet starts its own
        nn.init.trunc_normal_(layer.weight, std=0.02)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return plain
