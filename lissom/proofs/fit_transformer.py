"""FIT (arXiv 2305.12689): groups of tokens with a few latents each, beside full attention and none between groups.

Three parts, each beside its own baselines in the same run. Full attention is the same code with one group of all tokens
and without latent layers, so that arms differ in nothing but who attends to whom.

1. Cost. Time of a forward pass, and tensors held at the peak of a training step, of FIT "(1)2(1)" with groups of about
   L^(1/3) tokens and one latent each, and of four layers of full attention of the same width, for L tokens.
2. Reach. A key in one group holds a symbol, and queries, one in every other group, have to tell it; every other token
   is a distraction.
   FIT, attention inside groups alone, and full attention, four layers each.
3. Pixels one after another, row by row: bits a byte of ``FITAR``, a row a group, and of a causal transformer whose
   layers see a window as long as a row, of as many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lissom.data.splits import PixelSplit
from lissom.models.fit_transformer import FIT, FITAR, parse_layers
from lissom.proofs.arms import (
    Budget,
    accuracy_rows,
    better,
    built,
    data_set,
    faster,
    forward_call,
    generator,
    image_task,
    interleaved,
    peak_memory,
    run_stream,
    spread,
    step_call,
    time_rows,
    together,
    train_on_stream,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.proofs.pela import thin_width
from lissom.registry import register

__all__ = ["attention_macs", "exponent", "group_size", "recall"]

LAYERS, CHANNELS, SYMBOLS = "(1)2(1)", 16, 8
REACH = {"FIT": LAYERS, "inside groups": "(4)", "full attention": "(4)"}
BYTES = 256
SOLVED, CHANCE = 90.0, 100 / SYMBOLS + 5  # % right: above, below
GROWTH = 4 / 3  # the exponent of the tokens' number that the paper gives attention's cost
WORTH = 0.01  # bits a byte below which an advantage is not worth having
HELD_OUT = 64  # sequences of the generated task
NOTHING = -1  # where a token is no query


@dataclass(frozen=True)
class _Scale:
    """Tokens at which both are timed, and FIT alone (``further``), and at which memory is counted; the ``width``.

    ``groups`` of ``size`` tokens, ``narrow`` channels wide, in the generated task. Images of ``pixels`` a side, how
    many train and judge, in the third part.
    """

    lengths: tuple[int, ...]
    further: tuple[int, ...]
    counted: tuple[int, ...]
    rounds: int
    groups: int
    size: int
    reach: Budget
    pixels: int
    train: int
    held_out: int
    pixel_by_pixel: Budget
    width: int = 64
    narrow: int = 32


QUICK = _Scale(
    (256, 512, 1024), (), (256, 512), 3, 8, 8, Budget(150, 16, 3e-3, weight_decay=0.0), 8, 1000, 200,
    Budget(60, 32, 3e-3, weight_decay=0.0),
)  # fmt: skip
FULL = _Scale(
    (1024, 2048, 4096, 8192), (16384,), (1024, 2048, 4096), 1, 32, 32, Budget(400, 8, 2e-3, weight_decay=0.0), 16, 5000,
    500, Budget(600, 16, 2e-3, weight_decay=0.0),
)  # fmt: skip
DIGITS_SIDE, DIGITS_TRAIN = 8, 1400


@register("proof", "fit")
def fit(settings: Settings) -> ProofResult:
    """All parts. Quick: up to 1,024 tokens, 64 in the task, and the digits' pixels; full: MNIST's where they are."""
    scale = QUICK if settings.quick else FULL
    cost_rows, cost_claims = _cost(scale, settings)
    reach_rows, reach_claims = _reach(scale, settings)
    pixel_rows, pixel_claim = _pixels(scale, settings)
    notes = (
        "Attention is torch's fused one, which never holds all products of L tokens: memory grows with L in both.",
        "The counted exponent is that of attention's products alone; in time, layers that grow with L count as well.",
    )
    title = "attention inside groups and among latents, beside full attention"
    return ProofResult(
        "fit", title, (*cost_claims, *reach_claims, pixel_claim), (*cost_rows, *reach_rows, *pixel_rows), notes
    )


# Cost


def group_size(tokens: int) -> int:
    """The power of 2 nearest to the cube root of ``tokens``, by ratio."""
    return int(2 ** round(math.log2(tokens) / 3))


def exponent(lengths: Sequence[int], figures: Sequence[float]) -> float:
    """The slope of the figures' logarithm over the lengths', by least squares."""
    return float(np.polyfit(np.log(lengths), np.log(figures), 1)[0])


def attention_macs(layers: str, groups: int, size: int, latents: int, dim: int, latent_dim: int) -> int:
    """Multiplications of queries with keys, and of weights with values, in a ``FIT`` for one sequence.

    Per local layer L n 2 dim for L tokens in groups of n, per latent layer (groups latents)^2 2 latent_dim, and for
    each of the cross-attentions L latents 2 min(dim, latent_dim).
    """
    stages, tokens, count = parse_layers(layers), groups * size, groups * latents
    local = sum(a for a, _ in stages) * tokens * size * 2 * dim
    latent = sum(b for _, b in stages) * count**2 * 2 * latent_dim
    crossings = sum(b > 0 for _, b in stages) + len(stages) - 1
    return local + latent + crossings * tokens * latents * 2 * min(dim, latent_dim)


def _pair(tokens: int, width: int) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """The two networks for ``tokens`` tokens, each with its input."""
    size = group_size(tokens)
    x = torch.randn(1, tokens, CHANNELS, generator=generator(tokens))
    return {
        "FIT": (built(partial(_Reader, LAYERS, tokens // size, size, width), 0), x),
        "full attention": (built(partial(_Reader, "(4)", 1, tokens, width), 0), x),
    }


def _cost(scale: _Scale, settings: Settings) -> tuple[list[Row], list[Claim]]:
    repetitions = len(settings.seeds)
    times: dict[str, list[float]] = {}
    for tokens in (*scale.lengths, *scale.further):
        pair = _pair(tokens, scale.width)
        names = ("FIT",) if tokens in scale.further else tuple(pair)
        calls = {f"{name}, {tokens} tokens": forward_call(*pair[name]) for name in names}
        times |= interleaved(calls, repetitions, scale.rounds)
        settings.progress(f"timed {tokens} tokens")
    memory = {
        (name, tokens): peak_memory(step_call(*pair)) / 2**20
        for tokens in scale.counted
        for name, pair in _pair(tokens, scale.width).items()
    }

    def grown(name: str, lengths: Sequence[int]) -> list[float]:
        return [exponent(lengths, [times[f"{name}, {n} tokens"][i] for n in lengths]) for i in range(repetitions)]

    slopes = {
        "FIT": grown("FIT", (*scale.lengths, *scale.further)),
        "full attention": grown("full attention", scale.lengths),
    }
    width = scale.width
    counts = {
        "FIT": [attention_macs(LAYERS, n // group_size(n), group_size(n), 1, width, width) for n in scale.lengths],
        "full attention": [attention_macs("(4)", 1, n, 1, width, width) for n in scale.lengths],
    }
    rows = time_rows(times, "forward pass")
    for name, values in slopes.items():
        counted: dict[str, Any] = {"exponent counted": exponent(scale.lengths, counts[name])}
        rows.append(Row(name, "exponent of time", tuple(values), "", counted))
    rows += [Row(f"{name}, {n} tokens", "peak of a step", (mib,), "MiB") for (name, n), mib in memory.items()]
    longest = scale.lengths[-1]
    growth = Claim(
        "FIT's time grows with tokens as L^(4/3) at most, and slower than full attention's.",
        together(
            (
                verdict_by_interval([GROWTH - value for value in slopes["FIT"]]),
                verdict_by_interval([a - b for a, b in zip(slopes["full attention"], slopes["FIT"], strict=True)]),
            )
        ),
        f"exponents: FIT {spread(slopes['FIT'])}, full attention {spread(slopes['full attention'])} "
        f"({scale.lengths[0]} to {longest} tokens)",
    )
    sooner = faster(
        f"FIT is faster than full attention on {longest} tokens.", times, f"full attention, {longest} tokens",
        f"FIT, {longest} tokens",
    )  # fmt: skip
    return rows, [growth, sooner]


# Reach


def recall(count: int, groups: int, size: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (count, groups * size, 16), and what to tell at each: a symbol's number at queries, ``NOTHING`` elsewhere.

    A token is one of eight symbols; two further numbers mark the one key, whose symbol is asked for, and queries, which
    have none of their own: one in every group but the key's. The other channels are 0.
    """
    every = torch.arange(count)
    symbols = torch.randint(SYMBOLS, (count, groups, size), generator=numbers)
    x = functional.pad(functional.one_hot(symbols, SYMBOLS).float(), (0, CHANNELS - SYMBOLS))
    targets = torch.full((count, groups, size), NOTHING)
    key_group = torch.randint(groups, (count,), generator=numbers)
    key = torch.randint(size, (count,), generator=numbers)
    asked = symbols[every, key_group, key]
    query = torch.randint(size, (count, groups), generator=numbers)
    query_row, query_group = every[:, None].expand(-1, groups), torch.arange(groups).expand(count, -1)
    others = query_group != key_group[:, None]
    places = query_row[others], query_group[others], query[others]
    x[places] = 0
    x[(*places, torch.tensor(SYMBOLS + 1))] = 1
    x[every, key_group, key, SYMBOLS] = 1
    targets[places] = asked[places[0]]
    return x.flatten(1, 2), targets.flatten(1)


class _Reader(nn.Module):
    """Tokens (B, L, 16) to the logits of a symbol at every place, (B, L, 8)."""

    def __init__(self, layers: str, groups: int, size: int, width: int) -> None:
        super().__init__()
        self.form = groups, size
        self.encoder = FIT(layers, groups, size, 1, width, width, 4, 4, CHANNELS)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, _ = self.encoder(x.unflatten(1, self.form))
        return self.head(tokens.flatten(1, 2))  # type: ignore[no-any-return]


def _asked_loss(answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(answers.flatten(0, 1), targets.flatten(), ignore_index=NOTHING)


def _told(answers: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of queries with the right answer, in %."""
    asked = targets != NOTHING
    return 100 * float((answers.argmax(-1) == targets)[asked].float().mean())


def _reader(name: str, scale: _Scale) -> _Reader:
    whole = name == "full attention"
    groups, size = (1, scale.groups * scale.size) if whole else (scale.groups, scale.size)
    return _Reader(REACH[name], groups, size, scale.narrow)


def _reach(scale: _Scale, settings: Settings) -> tuple[list[Row], list[Claim]]:
    def sample(count: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return recall(count, scale.groups, scale.size, numbers)

    tokens = scale.groups * scale.size
    found = run_stream(
        settings, {name: partial(_reader, name, scale) for name in REACH}, sample, _asked_loss, _told, scale.reach,
        judged=HELD_OUT, part=f"{tokens} tokens",
    )  # fmt: skip
    right = {name: [arm.accuracy for arm in trained] for name, trained in found.items()}
    x, _ = sample(scale.reach.batch, generator(0, 2))
    calls = {f"{name}, a step": step_call(built(partial(_reader, name, scale), 0), x) for name in REACH}
    times = interleaved(calls, len(settings.seeds), 5)
    verdicts = [verdict_by_interval([value - SOLVED for value in right[name]]) for name in ("FIT", "full attention")]
    verdicts.append(verdict_by_interval([CHANCE - value for value in right["inside groups"]]))
    told = "; ".join(f"{name}: {spread(values, 1)} %" for name, values in right.items())
    claims = [
        Claim(
            "Latents carry what a group holds to every other: FIT tells a key's symbol in other groups as full "
            "attention does, and attention inside groups cannot.",
            together(verdicts),
            f"{told} (solved: above {SOLVED:g}; chance: below {CHANCE:g}), {tokens} tokens in {scale.groups} groups",
        ),
        faster(
            "FIT does it with cheaper steps than full attention.", times, "full attention, a step", "FIT, a step",
            more=f"forward and backward, {tokens} tokens, batches of {scale.reach.batch}",
        ),
    ]  # fmt: skip
    return [*accuracy_rows(found, f"{tokens} tokens"), *time_rows(times, "a training step")], claims


# Pixels


def _windowed(side: int, dim: int) -> FITAR:
    """Four causal layers over all side^2 pixels, each seeing the last ``side`` of them."""
    model = FITAR(BYTES, "(4)", 1, side * side, 1, dim, dim, 2, 2)
    place = torch.arange(side * side)
    back = place[:, None] - place[None]
    model.local_mask = (back >= 0) & (back < side)
    return model


def _rows_as_groups(side: int, dim: int) -> FITAR:
    return FITAR(BYTES, "(1)2(1)", side, side, 2, dim, dim, 2, 2)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _shifted(pixels: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, L): what was there one before, a 0 at the start."""
    return functional.pad(pixels[:, :-1], (1, 0))


def _bits(logits: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Bits a byte: logits (B, t, n, 256), pixels (B, t n)."""
    return functional.cross_entropy(logits.flatten(0, 2), pixels.flatten()) / math.log(2)


def _pixels(scale: _Scale, settings: Settings) -> tuple[list[Row], Claim]:
    data = data_set("mnist", quick=settings.quick)
    digits = data.name == "digits"
    side, train = (DIGITS_SIDE, min(scale.train, DIGITS_TRAIN)) if digits else (scale.pixels, scale.train)
    makes = {"FITAR": partial(_rows_as_groups, side, scale.narrow)}
    parameters = _size(makes["FITAR"]())
    width = thin_width(parameters, lambda dim: _size(_windowed(side, dim)))
    makes["windowed"] = partial(_windowed, side, width)
    bits: dict[str, list[float]] = {name: [] for name in makes}
    for seed in settings.seeds:
        task = image_task(data, side, seed, train=train, held_out=scale.held_out, channels=1)
        images, judged = (torch.from_numpy(_flat(part)) for part in (task.fit, task.report))
        for name, make in makes.items():
            model = built(make, seed)
            form = (side, side) if name == "FITAR" else (1, side * side)

            def drawn(
                count: int, numbers: torch.Generator, images: torch.Tensor = images, form: tuple[int, int] = form
            ) -> tuple[torch.Tensor, torch.Tensor]:
                pixels = images[torch.randint(len(images), (count,), generator=numbers)]
                return _shifted(pixels).unflatten(1, form), pixels

            train_on_stream(model, drawn, _bits, scale.pixel_by_pixel, seed)
            with torch.no_grad():
                parts = [_bits(model(_shifted(p).unflatten(1, form)), p) * len(p) for p in judged.split(100)]
            bits[name].append(float(sum(parts)) / len(judged))
            settings.progress(f"seed {seed}: {name} needs {bits[name][-1]:.3f} bits a byte")
    costs = {name: {"parameters": _size(make()), "steps": scale.pixel_by_pixel.steps} for name, make in makes.items()}
    rows = [Row(f"{name}, {data.name}", "bits a byte", tuple(v), "", costs[name]) for name, v in bits.items()]
    claim = better(
        f"Latents of earlier rows help to predict pixels: FITAR needs fewer bits than windows of a row ({data.name}, "
        f"{side} x {side}).",
        bits["FITAR"], bits["windowed"], matters=WORTH, unit="bits a byte", sign=-1,
    )  # fmt: skip
    return rows, claim


def _flat(split: Any) -> np.ndarray:
    """The pixels of a split's images one after another: int64 (N, side^2)."""
    assert isinstance(split, PixelSplit)
    return split.pixels.reshape(len(split), -1).astype(np.int64)
