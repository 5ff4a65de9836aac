"""MuE (arXiv 2211.11152): leaving encoder and decoder where layers saturate, with and without the layer-wise loss.

A transformer reads images of four handwritten digits, in patches, and names them one after the other: an encoder, and a
decoder with causal self-attention and attention to the encoder's output. Two arms differ in their training alone:

- the loss on the last decoder layer, as anybody trains;
- the layer-wise task loss: the same loss behind every decoder layer, through the shared norm and head.

Then nothing is trained. Each position of the decoder leaves at the first layer whose output is more like its input than
a threshold, each image leaves the encoder likewise, and thresholds are swept. What left stays as it is for those who
attend to it, at every deeper layer: that is generation in which skipped layers get keys and values of their own from
the state that left, and not copies of another layer's. Beside it, decoder positions that leave where the largest share
of the softmax is above a threshold, and greedy generation with the published schedule of thresholds.

A second pair of arms gets a question as well, one word: with which digit to begin. One encodes image and word together,
the other runs the same layers on each by itself, as MuE does ("decomposition"); both have the layer-wise loss.

Digits are scikit-learn's; a part of the images is never trained on and makes the images that judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lissom.layers.saturation import saturation_exit, threshold_schedule
from lissom.proofs.arms import built, generator, no_worse, spread, together
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.training.methods.layerwise_loss import layerwise_losses

__all__ = ["Reader", "confident_exit", "curve"]

BEGIN = 10  # the word before the first digit
HEADS = 4
TAUS = (*np.linspace(-1, 0.5, 7), *np.linspace(0.55, 0.95, 17), *np.linspace(0.96, 0.995, 8), 1.0)
SHARES = (*np.linspace(0, 0.9, 19), 0.95, 0.98, 0.99, 1.0)  # thresholds of the softmax's largest share
SHOWN = (0.97, 0.9, 0.8)  # thresholds in the table
NOTES = (
    "Accuracy counts single digits; but for generation, the digits before each are given, as in training.",
    "Layers are counted, as the paper counts its expected time; a decision at every layer costs time of its own.",
    "The first third of a generation's steps never leaves under the published schedule, and four steps are few.",
)
LAST, EACH = "loss on the last layer", "layer-wise loss"
JOINT, APART = "question, encoded together", "question, encoded apart"
# Of each arm: whether it has the layer-wise loss, whether it is asked a question, whether that is encoded apart.
ARMS = {
    LAST: (False, False, True), EACH: (True, False, True), JOINT: (True, True, False), APART: (True, True, True),
}  # fmt: skip


@dataclass(frozen=True)
class _Scale:
    """An image has ``digits`` digits in two columns. ``equal``: decoder layers at which the arms are compared;
    ``encoder_equal`` those of the encoder at which its exits are judged."""

    digits: int
    encoder: int
    decoder: int
    dim: int
    steps: int
    batch: int
    lr: float
    judged: int
    equal: float
    encoder_equal: float
    arms: tuple[str, ...] = tuple(ARMS)


QUICK = _Scale(2, 2, 4, 32, 150, 48, 4e-3, 300, 2.0, 1.5, (LAST, EACH))
FULL = _Scale(4, 4, 6, 64, 700, 48, 2e-3, 1000, 3.0, 3.0)


# The network


class Attention(nn.Module):
    """Attention of x (B, N, C) to ``memory`` (B, M, C), or to itself; causal where asked."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, causal: bool = False) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(memory).chunk(2, -1)))
        return self.proj(functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm layer: self-attention, in a decoder attention to the encoder's output, and two linear layers."""

    def __init__(self, dim: int, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim)
        self.norm2 = nn.LayerNorm(dim) if decoder else None
        self.cross = Attention(dim) if decoder else None
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, causal=memory is not None)
        if self.cross is not None and self.norm2 is not None and memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class Reader(nn.Module):
    """Names the digits of an image (B, H, W) of ``digits`` digits; with ``question``, beginning with the one asked for.

    ``apart``: image and question run through the encoder's layers by themselves, and meet in the decoder.
    """

    def __init__(
        self, digits: int, encoder: int, decoder: int, dim: int, question: bool = False, apart: bool = True
    ) -> None:
        super().__init__()
        self.digits, self.question, self.apart = digits, question, apart
        self.patch = nn.Linear(16, dim)
        self.place = nn.Parameter(torch.randn(4 * digits, dim) * 0.02)
        self.word = nn.Embedding(digits, dim) if question else None
        self.encoder = nn.ModuleList(Layer(dim, decoder=False) for _ in range(encoder))
        self.encoded = nn.LayerNorm(dim)
        self.name = nn.Embedding(BEGIN + 1, dim)
        self.turn = nn.Parameter(torch.randn(digits, dim) * 0.02)
        self.decoder = nn.ModuleList(Layer(dim, decoder=True) for _ in range(decoder))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, BEGIN)

    def encode(
        self, images: torch.Tensor, asked: torch.Tensor, tau: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The encoder's output (B, M, C), and the layers that each image ran, by stream: int64 (B,)."""
        patches = images.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2)  # (B, 4 digits, 16)
        streams = {"image": self.patch(patches) + self.place}
        if self.word is not None:
            streams["word"] = self.word(asked).unsqueeze(1)
            if not self.apart:
                streams = {"image": torch.cat([streams["image"], streams["word"]], 1)}
        found = {name: saturation_exit(self.encoder, x, tau) for name, x in streams.items()}
        memory = self.encoded(torch.cat([s.output for s in found.values()], 1))
        return memory, {name: s.executed for name, s in found.items()}

    def begin(self, named: torch.Tensor) -> torch.Tensor:
        """The decoder's input (B, n, C) before digit number n - 1, from the digits named so far, int64 (B, n - 1)."""
        first = torch.full((len(named), 1), BEGIN, dtype=torch.int64)
        words = torch.cat([first, named], 1)
        return self.name(words) + self.turn[: words.shape[1]]

    def layers(self, memory: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """The decoder's layers on an encoder's output."""
        return [lambda x, layer=layer: layer(x, memory) for layer in self.decoder]  # type: ignore[misc]

    def answer(self, h: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(h))

    def forward(self, images: torch.Tensor, asked: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, digits, 10) behind every decoder layer, the digits before each being given."""
        memory, _ = self.encode(images, asked)
        h, answers = self.begin(targets[:, :-1]), []
        for layer in self.layers(memory):
            h = layer(h)
            answers.append(self.answer(h))
        return answers

    @torch.no_grad()
    def generate(
        self, images: torch.Tensor, asked: torch.Tensor, tau: float | Sequence[float] = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedily: the digits named, and the decoder layers that each step ran, both int64 (B, digits). ``tau``: one
        threshold, or one a step.

        Positions before a step are run again with it. They see nothing of it, so they leave where they left, and what
        they hand to deeper layers is the state that left: the same as keeping keys and values made from it.
        """
        memory, _ = self.encode(images, asked)
        taus = torch.as_tensor(tau, dtype=torch.float32).expand(self.digits)
        named = torch.zeros(len(images), 0, dtype=torch.int64)
        for step in range(self.digits):
            done = saturation_exit(self.layers(memory), self.begin(named), taus[: step + 1], over="token")
            named = torch.cat([named, self.answer(done.output[:, -1:]).argmax(-1)], 1)
        return named, done.executed


def confident_exit(
    layers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    answer: Callable[[torch.Tensor], torch.Tensor],
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``saturation_exit`` by token, for the usual rule: a position leaves where the softmax of ``answer`` of its
    state has a share above ``threshold``. The states (B, N, C), and how many layers each ran, (B, N)."""
    running = torch.ones(x.shape[:2], dtype=torch.bool)
    executed = torch.zeros(x.shape[:2], dtype=torch.int64)
    for layer in layers:
        if not bool(running.any()):
            break
        x = torch.where(running.unsqueeze(-1), layer(x), x)
        executed += running
        running = running & ~(answer(x).softmax(-1).amax(-1) > threshold)
    return x, executed


# Data, training, looking


def _digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1,400 digits (N, 8, 8) from -1 to 1 with their labels to train on, and 397 to judge by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, labels = (data.images[order] / 8 - 1).astype(np.float32), data.target[order].astype(np.int64)
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def _sample(
    source: tuple[np.ndarray, np.ndarray], count: int, digits: int, numbers: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (count, 4 digits, 16) of ``digits`` digits in two columns; their names in reading order; the digit that
    is asked for; and the names beginning with it, which a question's answer is."""
    images, labels = source
    chosen = torch.randint(len(labels), (count, digits), generator=numbers)
    tiles = torch.from_numpy(images)[chosen].reshape(count, digits // 2, 2, 8, 8)
    names = torch.from_numpy(labels)[chosen]
    asked = torch.randint(digits, (count,), generator=numbers)
    turned = names.gather(1, (asked.unsqueeze(1) + torch.arange(digits)) % digits)
    return tiles.transpose(2, 3).reshape(count, 4 * digits, 16), names, asked, turned


def _train(model: Reader, each: bool, source: Any, scale: _Scale, seed: int) -> None:
    """AdamW over the scale's steps, the rate rising for a tenth of them and falling as half a cosine; in place."""
    numbers = generator(seed, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=scale.lr, weight_decay=0.01)

    def rate(step: int) -> float:
        warm = max(1, scale.steps // 10)
        rest = max(1, scale.steps - warm)
        return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / rest)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in range(scale.steps):
        images, names, asked, turned = _sample(source, scale.batch, scale.digits, numbers)
        targets = turned if model.question else names
        losses = layerwise_losses(model(images, asked, targets), targets, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        (losses.sum() if each else losses[-1]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@dataclass(frozen=True)
class _Curve:
    """A figure a threshold: accuracy in points, and layers run on average."""

    thresholds: np.ndarray
    accuracy: np.ndarray
    layers: np.ndarray

    def at(self, threshold: float) -> tuple[float, float]:
        """Accuracy and layers at the threshold that is next to this one."""
        place = int(np.abs(self.thresholds - threshold).argmin())
        return float(self.accuracy[place]), float(self.layers[place])

    def when(self, layers: float) -> float:
        """Accuracy at a number of executed layers, interpolated between thresholds that were tried."""
        order = np.argsort(self.layers, kind="stable")
        return float(np.interp(layers, self.layers[order], self.accuracy[order]))


def curve(thresholds: Sequence[float], look: Callable[[float], tuple[float, float]]) -> _Curve:
    """``look``: a threshold to (accuracy, layers)."""
    found = np.array([look(t) for t in thresholds])
    return _Curve(np.array(thresholds), found[:, 0], found[:, 1])


@torch.no_grad()
def _look(model: Reader, sample: tuple[torch.Tensor, ...], scale: _Scale) -> dict[str, Any]:
    """All curves of a trained model on images that it was not trained on."""
    images, names, asked, turned = sample
    targets = turned if model.question else names
    memory, _ = model.encode(images, asked)
    start = model.begin(targets[:, :-1])

    def right(h: torch.Tensor) -> float:
        return 100 * float((model.answer(h).argmax(-1) == targets).double().mean())

    def decoder(tau: float) -> tuple[float, float]:
        done = saturation_exit(model.layers(memory), start, tau, over="token")
        return right(done.output), float(done.executed.double().mean())

    def confidence(threshold: float) -> tuple[float, float]:
        h, executed = confident_exit(model.layers(memory), start, model.answer, threshold)
        return right(h), float(executed.double().mean())

    def both(tau: float, decoder_tau: float) -> tuple[float, float, float]:
        found, ran = model.encode(images, asked, tau)
        done = saturation_exit(model.layers(found), start, decoder_tau, over="token")
        encoder = float(ran["image"].double().mean())
        return right(done.output), encoder, float(done.executed.double().mean())

    def generated(tau: float | Sequence[float]) -> tuple[float, float]:
        named, executed = model.generate(images, asked, tau)
        return 100 * float((named == targets).double().mean()), float(executed.double().mean())

    return {
        "decoder": curve(TAUS, decoder),
        "confidence": curve(SHARES, confidence),
        "encoder": curve(TAUS, lambda tau: both(tau, 1.0)[:2]),
        "both": both(0.9, 0.8),
        "full": right(saturation_exit(model.layers(memory), start, 1.0, over="token").output),
        "generated": generated(1.0),
        "scheduled": generated(threshold_schedule(0.8, scale.digits - 1)),
    }


@register("proof", "mue")
def mue(settings: Settings) -> ProofResult:
    """All arms, seed by seed. Quick: two digits, smaller networks, fewer steps, and nobody is asked a question."""
    scale = QUICK if settings.quick else FULL
    source, held_out = _digits()
    found: dict[str, list[dict[str, Any]]] = {}
    sizes: dict[str, int] = {}
    for seed in settings.seeds:
        sample = _sample(held_out, scale.judged, scale.digits, generator(seed, 1))
        for name in scale.arms:
            each, question, apart = ARMS[name]

            def make(question: bool = question, apart: bool = apart) -> Reader:
                return Reader(scale.digits, scale.encoder, scale.decoder, scale.dim, question, apart)

            model = built(make, seed)
            assert isinstance(model, Reader)
            _train(model, each, source, scale, seed)
            looked = _look(model, sample, scale)
            found.setdefault(name, []).append(looked)
            sizes[name] = sum(p.numel() for p in model.parameters())
            settings.progress(f"seed {seed}: {name} trained, {looked['full']:.1f} % of the digits at full depth")
    return _judged(scale, found, sizes)


# What came of it


def _judged(scale: _Scale, found: Mapping[str, Sequence[Mapping[str, Any]]], sizes: Mapping[str, int]) -> ProofResult:
    def full(arm: str) -> list[float]:
        return [float(f["full"]) for f in found[arm]]

    def when(arm: str, what: str, layers: float) -> list[float]:
        return [f[what].when(layers) for f in found[arm]]

    depth, at = scale.decoder, scale.equal
    plain, each = when(LAST, "decoder", at), when(EACH, "decoder", at)
    ahead = [a - b for a, b in zip(each, plain, strict=True)]
    claims = [
        Claim(
            f"At {at:g} of {depth} executed decoder layers, a decoder trained with the layer-wise loss is 10 points or "
            "more above one trained with the loss on its last layer.",
            verdict_by_interval([gain - 10 for gain in ahead]),
            f"{spread(each, 1)} against {spread(plain, 1)} %: above by {spread(ahead, 1)} points, paired over "
            f"{len(ahead)} seeds",
        ),
        no_worse(
            f"With the layer-wise loss, decoder exits at {at:g} of {depth} layers cost less than 1 point (the paper: "
            "99 % of the accuracy at half of the time).",
            each, full(EACH), margin=1.0,
        ),
        no_worse(
            "The layer-wise loss costs less than 2 points at full depth.", full(EACH), full(LAST), margin=2.0
        ),
        Claim(
            f"Encoder exits at {scale.encoder_equal:g} of {scale.encoder} layers cost less than 1 point, whichever the "
            "loss.",
            *_encoder(found, scale.encoder_equal),
        ),
        no_worse(
            f"Decoder exits by similarity are as accurate at {at:g} layers as by confidence, within 1 point, with the "
            "layer-wise loss.",
            each, when(EACH, "confidence", at), margin=1.0,
        ),
        Claim(
            "Greedy generation with the published schedule runs fewer decoder layers than without exits and costs less "
            "than 1 point, with the layer-wise loss.",
            *_generation(found[EACH]),
        ),
    ]  # fmt: skip
    if APART in found:
        text = "Encoding image and question apart costs less than 1 point, where the network is trained so."
        claims.append(no_worse(text, full(APART), full(JOINT), margin=1.0))
    title = "exits by similarity in an encoder and a decoder"
    return ProofResult("mue", title, tuple(claims), _rows(scale, found, sizes), NOTES)


def _encoder(found: Mapping[str, Sequence[Mapping[str, Any]]], layers: float) -> tuple[str, str]:
    verdicts, told = [], []
    for arm in (LAST, EACH):
        lost = [float(f["full"]) - f["encoder"].when(layers) for f in found[arm]]
        verdicts.append(verdict_by_interval([1.0 - loss for loss in lost]))
        told.append(f"{arm}: {spread(lost, 1)} points lost")
    return together(verdicts), "; ".join(told)


def _generation(looked: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    saved = [float(f["generated"][1] - f["scheduled"][1]) for f in looked]
    lost = [float(f["generated"][0] - f["scheduled"][0]) for f in looked]
    verdict = together([verdict_by_interval(saved, matters=0.1), verdict_by_interval([1.0 - loss for loss in lost])])
    return verdict, f"{spread(saved)} layers a digit fewer, {spread(lost, 1)} points lost"


def _rows(scale: _Scale, found: Mapping[str, Sequence[Mapping[str, Any]]], sizes: Mapping[str, int]) -> tuple[Row, ...]:
    rows = []

    def row(arm: str, what: str, values: Sequence[tuple[float, ...]], **cost: float | int) -> None:
        """``values``: accuracy first, a seed each."""
        rows.append(Row(f"{arm}, {what}", "accuracy", tuple(v[0] for v in values), "%", cost))

    for arm, looked in found.items():
        row(arm, "full depth", [(f["full"],) for f in looked],
            **{"encoder layers": scale.encoder, "decoder layers": scale.decoder, "parameters": sizes[arm]})  # fmt: skip
        for what, name in (("decoder", "decoder layers"), ("encoder", "encoder layers")):
            for tau in SHOWN:
                values = [f[what].at(tau) for f in looked]
                row(arm, f"{what} threshold {tau:g}", values, **{name: _mean(v[1] for v in values)})
        values = [f["both"] for f in looked]
        ran = {f"{part} layers": _mean(v[i] for v in values) for i, part in ((1, "encoder"), (2, "decoder"))}
        row(arm, "encoder .9, decoder .8", values, **ran)
        values = [(f["confidence"].when(scale.equal),) for f in looked]
        row(arm, "confidence", values, **{"decoder layers": scale.equal})
        for what in ("generated", "scheduled"):
            name = "generation at full depth" if what == "generated" else "generation with the schedule of .8"
            row(arm, name, [f[what] for f in looked], **{"decoder layers": _mean(f[what][1] for f in looked)})
    return tuple(rows)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
