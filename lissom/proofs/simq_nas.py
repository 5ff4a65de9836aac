"""SimQ-NAS (arXiv 2312.13301): architecture and precision of each layer searched together, with LINAS, in small.

A vision transformer is trained as a super-network, whose blocks, heads and hidden units can be left out; each linear
layer of what remains gets 4, 8 or 32 bits. Beside each other, at the same number of measured candidates: LINAS, NSGA-II
on measurements and random search over both together; and with LINAS the architecture alone under uniform int8 (the
paper's baseline) and the precision alone on the largest network.

Weights are rounded symmetrically for each output channel, inputs to 2^bits steps between the smallest and the largest
value seen in calibration, which every sub-network does for itself, as static quantisation does; rounding is simulated
in float32, so what is measured is accuracy and bytes, not time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from lissom.data.sources import DataSet, read, stratified
from lissom.images import Preprocessing
from lissom.models.factory import create_model
from lissom.proofs.base import (
    INCONCLUSIVE,
    NOT_SHOWN,
    SHOWS,
    Claim,
    KeptFigures,
    ProofResult,
    Row,
    Settings,
    mean_interval,
    verdict_by_interval,
)
from lissom.registry import register
from lissom.search.encoding import SearchSpace
from lissom.search.linas import Found, Record, linas, measured_nsga2, random_search
from lissom.search.nsga2 import hypervolume, non_dominated
from lissom.search.predictors import transformer_features
from lissom.tasks.classification import make_task
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit
from lissom.training.methods.base import Method

__all__ = ["Elastic", "Quantiser", "Sandwich", "Shape", "subnetwork"]

BITS = (4, 8, 32)
MARGIN = 1.0  # points of accuracy: a loss below this counts as none in the last claim
MATTERS = 0.005  # share of the box: the smallest gain of hypervolume worth having
BLOCKS, HEADS, DEPTHS = 4, (2, 3, 4), (2, 3, 4)
LINEARS = 4  # linear layers a block: q, k and v together, the attention's output, two of the MLP
PER_BLOCK = {"num_attention_heads": 1, "intermediate_size": 1, "q_bits": LINEARS}
OBJECTIVES = ("error", "bytes")


@dataclass(frozen=True)
class Scale:
    """How large the proof is: the network's width and patches, training, and the searches."""

    width: int
    patch: int
    epochs: int
    batch: int
    lr: float
    learners: int  # random sub-networks in a training step, beside the largest and the smallest
    budget: int  # measured candidates of a search
    population: int
    inner: int  # evaluations of the predictors for a batch
    coarse: bool  # whether the predictors' grid is the short one


FULL = Scale(
    width=96, patch=4, epochs=10, batch=32, lr=1e-3, learners=2, budget=60, population=12, inner=10_000, coarse=False
)
QUICK = Scale(
    width=32, patch=16, epochs=7, batch=64, lr=4e-3, learners=1, budget=15, population=5, inner=300, coarse=True
)


@dataclass(frozen=True)
class Shape:
    """A sub-network: heads and hidden units of each block that is kept, the first ones."""

    heads: tuple[int, ...]
    hidden: tuple[int, ...]


class Elastic(nn.Module):
    """timm's vision transformer computing with its first blocks, and each block with its first heads and hidden units.

    Heads keep their size and tokens their width, as in SimQ-NAS's elastic transformers; norms are whole. ``forward``
    takes images (B, 3, H, W) and a ``Shape`` (default: everything).
    """

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.network = network

    @property
    def largest(self) -> Shape:
        blocks = list(self.network.blocks)
        return Shape(tuple(b.attn.num_heads for b in blocks), tuple(b.mlp.fc1.out_features for b in blocks))

    def forward(self, x: torch.Tensor, shape: Shape | None = None) -> torch.Tensor:
        network, shape = self.network, shape or self.largest
        x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
        for block, heads, hidden in zip(network.blocks, shape.heads, shape.hidden, strict=False):
            x = x + _attention(block.attn, block.norm1(x), heads)
            x = x + _mlp(block.mlp, block.norm2(x), hidden)
        return network.forward_head(network.norm(x))


def _attention(layer: nn.Module, x_BNC: torch.Tensor, heads: int) -> torch.Tensor:
    B, N, C = x_BNC.shape
    size = layer.head_dim
    weight = layer.qkv.weight.view(3, -1, C)[:, : heads * size].flatten(0, 1)
    bias = layer.qkv.bias.view(3, -1)[:, : heads * size].flatten()
    q, k, v = functional.linear(x_BNC, weight, bias).view(B, N, 3, heads, size).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return functional.linear(mixed, layer.proj.weight[:, : heads * size], layer.proj.bias)


def _mlp(layer: nn.Module, x: torch.Tensor, hidden: int) -> torch.Tensor:
    x = layer.act(functional.linear(x, layer.fc1.weight[:hidden], layer.fc1.bias[:hidden]))
    return functional.linear(x, layer.fc2.weight[:, :hidden], layer.fc2.bias)


def subnetwork(network: VisionTransformer, shape: Shape) -> VisionTransformer:
    """The network that computes what ``Elastic`` does under ``shape``: linear layers cut to what is left of them, and
    the rest shared with ``network``. Its layers have the paths that they have in the whole network."""
    own = _shallow(network)
    own.blocks = nn.Sequential(*(_shallow(block) for block in network.blocks[: len(shape.heads)]))
    everything = slice(None)
    for block, heads, hidden in zip(own.blocks, shape.heads, shape.hidden, strict=True):
        block.attn, block.mlp = attention, mlp = _shallow(block.attn), _shallow(block.mlp)
        width = heads * attention.head_dim
        rows = torch.arange(3 * attention.attn_dim).view(3, -1)[:, :width].flatten()  # of q, of k and of v
        attention.qkv = _part(attention.qkv, rows, everything)
        attention.proj = _part(attention.proj, everything, slice(width))
        attention.num_heads, attention.attn_dim = heads, width
        mlp.fc1 = _part(mlp.fc1, slice(hidden), everything)
        mlp.fc2 = _part(mlp.fc2, everything, slice(hidden))
    return own


def _shallow(module: Any) -> Any:
    """A module whose children can be replaced without those of ``module``; a deep copy takes longer than measuring."""
    own = copy.copy(module)
    own._modules = dict(module._modules)
    return own


def _part(layer: nn.Linear, rows: torch.Tensor | slice, columns: slice) -> nn.Linear:
    part = nn.Linear(1, 1)
    part.weight = nn.Parameter(layer.weight.detach()[rows][:, columns].clone())
    part.bias = nn.Parameter(layer.bias.detach()[rows].clone())
    part.out_features, part.in_features = part.weight.shape
    return part


@dataclass(frozen=True)
class Sandwich(Method):
    """Trains an ``Elastic``: each step runs its largest sub-network, the smallest and ``count`` random ones (the
    sandwich rule of Yu and Huang 2019, arXiv 1903.05134).

    The largest learns the labels; the others half the labels, half the largest's answers. From the answers alone they
    learn nothing while the largest knows nothing: on the digits, 12 epochs left the largest at 80 % where it reaches
    97 % when trained alone. ``heads`` and ``hidden`` hold a block's choices, ascending, ``depths`` the network's.
    """

    depths: tuple[int, ...]
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    count: int = 2

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        assert targets is not None
        answers = model(inputs)
        total = task.loss(answers, targets)
        taught = answers.detach().log_softmax(-1)
        smallest = Shape(self.heads[:1] * self.depths[0], self.hidden[:1] * self.depths[0])
        for shape in (smallest, *(self.drawn() for _ in range(self.count))):
            outputs = model(inputs, shape)
            imitated = functional.kl_div(outputs.log_softmax(-1), taught, reduction="batchmean", log_target=True)
            total = total + 0.5 * task.loss(outputs, targets) + 0.5 * imitated
        return total / (2 + self.count)

    def drawn(self) -> Shape:
        """A random sub-network, from torch's own generator."""

        def one(values: tuple[int, ...]) -> int:
            return values[int(torch.randint(len(values), ()))]

        depth = one(self.depths)
        return Shape(tuple(one(self.heads) for _ in range(depth)), tuple(one(self.hidden) for _ in range(depth)))


class Quantiser:
    """Simulates precision policies on the linear layers of ``model``; the model itself stays as it is.

    ``samples`` float32 (N, C, H, W) calibrate: the range of every layer's input in the float32 network is kept, as
    static quantisation does. A policy is one of 4, 8 and 32 for each of ``paths``, in the model's own order.
    """

    def __init__(self, model: nn.Module, samples: np.ndarray) -> None:
        self.model = model
        self._layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.paths = tuple(self._layers)
        self._ranges: dict[str, tuple[float, float]] = {}
        self._weights = {
            (path, bits): rounded_weight(layer.weight.detach(), bits)
            for path, layer in self._layers.items()
            for bits in BITS
            if bits < 32
        }
        handles = [layer.register_forward_pre_hook(self._see(path)) for path, layer in self._layers.items()]
        try:
            model.eval()
            with torch.no_grad():
                model(torch.from_numpy(samples))
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, path: str):
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            # The range holds 0, so that 0 stays exact.
            self._ranges[path] = (min(float(inputs[0].min()), 0.0), max(float(inputs[0].max()), 0.0))

        return hook

    @contextmanager
    def applied(self, policy: Sequence[int]) -> Iterator[nn.Module]:
        """The model, computing under ``policy`` inside the block."""
        changed, handles = [], []
        try:
            for path, bits in zip(self.paths, policy, strict=True):
                if bits == 32:
                    continue
                layer = self._layers[path]
                changed.append((layer, layer.weight.data))
                layer.weight.data = self._weights[path, bits]
                handles.append(layer.register_forward_pre_hook(_rounding(bits, *self._ranges[path])))
            yield self.model
        finally:
            for layer, weight in changed:
                layer.weight.data = weight
            for handle in handles:
                handle.remove()

    def bytes(self, policy: Sequence[int]) -> int:
        """Bytes of the model under ``policy``: packed weights, a float32 scale an output channel, scale and zero point
        of the input; everything else in float32."""
        total = 4 * sum(p.numel() for p in self.model.parameters())
        for path, bits in zip(self.paths, policy, strict=True):
            weight = self._layers[path].weight
            if bits < 32:
                total += weight.numel() * bits // 8 + 4 * weight.shape[0] + 8 - 4 * weight.numel()
        return total


def rounded_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """weight (out, in) rounded to integers in +-(2^(bits-1) - 1) times a scale for each output channel."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    return (weight / scale).round().clamp(-largest, largest) * scale


def _rounding(bits: int, low: float, high: float):
    """A hook that rounds a layer's input to 2^bits steps of [low, high], 0 being one of them."""
    steps = 2**bits - 1
    scale = max(high - low, 1e-12) / steps
    zero = round(-low / scale)

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (((inputs[0] / scale).round() + zero).clamp(0, steps).sub(zero) * scale, *inputs[1:])

    return hook


@dataclass(frozen=True)
class Candidate:
    """A sub-network, and the bits of each of its linear layers in the model's order."""

    shape: Shape
    policy: tuple[int, ...]


class Bench:
    """Measures the candidates of one super-network. What was measured once is known, whichever search asks."""

    def __init__(self, task: Task, elastic: Elastic, samples: np.ndarray) -> None:
        self.task, self.elastic, self.samples = task, elastic, samples
        self._largest = elastic.largest
        self._chosen: dict[Candidate, dict[str, float]] = {}
        self._reported: dict[Candidate, float] = {}

    def candidate(self, config: Mapping[str, Sequence[int]]) -> Candidate:
        """The live part of the choices; what they do not name is as large as it gets, and precision int8."""
        largest = self._largest
        (depth,) = config.get("num_layers", (BLOCKS,))
        heads = tuple(config.get("num_attention_heads", largest.heads))[:depth]
        hidden = tuple(config.get("intermediate_size", largest.hidden))[:depth]
        bits = tuple(config.get("q_bits", (8,) * (LINEARS * BLOCKS + 1)))
        return Candidate(Shape(heads, hidden), (*bits[: LINEARS * depth], bits[-1]))  # the last is the head's

    def uniform(self, bits: int) -> Candidate:
        """The largest network, every layer in as many bits."""
        return Candidate(self._largest, (bits,) * (LINEARS * BLOCKS + 1))

    def measure(self, config: Mapping[str, Sequence[int]]) -> dict[str, float]:
        return self.chosen(self.candidate(config))

    def chosen(self, candidate: Candidate) -> dict[str, float]:
        """``error`` on the split that chooses, in [0, 1], and ``bytes``."""
        if candidate not in self._chosen:
            with self._quantised(candidate) as (model, size):
                quality = evaluate(model, self.task, self.task.choose, 256)
            self._chosen[candidate] = {"error": 1 - quality.value / 100, "bytes": float(size)}
        return self._chosen[candidate]

    def reported(self, candidate: Candidate) -> float:
        """Error on the held-out images, in [0, 1]."""
        if candidate not in self._reported:
            with self._quantised(candidate) as (model, _):
                quality = evaluate(model, self.task, self.task.report, 256)
            self._reported[candidate] = 1 - quality.value / 100
        return self._reported[candidate]

    @contextmanager
    def _quantised(self, candidate: Candidate) -> Iterator[tuple[nn.Module, int]]:
        quantiser = Quantiser(subnetwork(self.elastic.network, candidate.shape), self.samples)
        with quantiser.applied(candidate.policy) as model:
            yield model, quantiser.bytes(candidate.policy)


def spaces(width: int) -> dict[str, SearchSpace]:
    """What is searched: architecture and precision together, and each alone."""
    architecture: dict[str, tuple[int, tuple[int, ...]]] = {
        "num_layers": (1, DEPTHS),
        "num_attention_heads": (BLOCKS, HEADS),
        "intermediate_size": (BLOCKS, (width, 2 * width, 4 * width)),
    }
    precision: dict[str, tuple[int, tuple[int, ...]]] = {"q_bits": (LINEARS * BLOCKS + 1, BITS)}
    return {
        "joint": SearchSpace({**architecture, **precision}),
        "architecture": SearchSpace(architecture),
        "policy": SearchSpace(precision),
    }


def features_of(space: SearchSpace) -> Callable[[np.ndarray], np.ndarray]:
    """Vectors (n, entries) to the table of their live choices."""
    blocks = {name: count for name, count in PER_BLOCK.items() if name in space.variables}
    if "num_layers" not in space.variables:  # always all blocks: nothing is dead
        return lambda vectors: vectors
    return lambda vectors: transformer_features(space, vectors, blocks)


@register("proof", "simq_nas")
def simq_nas(settings: Settings) -> ProofResult:
    """Three searches over architecture and precision together, and LINAS over each alone, seed by seed.

    Finished seeds are kept in the proof's folder: a run that was killed goes on with the next.
    """
    data = _data(settings.quick)
    scale = QUICK if settings.quick else FULL
    figures: dict[str, list[float]] = {}
    kept = KeptFigures(settings, "seeds.jsonl", f"{data.name} {scale}")
    for seed in settings.seeds:

        def compared(seed: int = seed) -> dict[str, float]:
            task, elastic = _trained(data, seed, scale, settings)
            return _compare(task, elastic, seed, scale, settings)

        for name, value in kept.get("all", seed, compared).items():
            figures.setdefault(name, []).append(value)
    return _judged(data, figures, scale, settings)


def _data(quick: bool) -> DataSet:
    folder = os.environ.get("LISSOM_DATA")
    if folder and not quick and (Path(folder) / "cifar10").is_dir():
        return read(Path(folder) / "cifar10")
    return read("digits")


def _trained(data: DataSet, seed: int, scale: Scale, settings: Settings) -> tuple[Task, Elastic]:
    """A task with enough held-out rows to choose on, and the super-network trained for it."""
    digits = data.name == "digits"
    assert data.train is not None
    labels = data.train.labels
    chosen, rest = stratified(labels, len(data.train), 300 / len(data.train) if digits else 0.1, seed)
    judged = data.test if data.test is not None else data.val
    divided = DataSet(data.name, data.classes, train=data.train.take(rest), val=data.train.take(chosen), test=judged)
    preprocessing = Preprocessing(32, 32, mean=(0.5,) * 3, std=(0.5,) * 3)
    task = make_task(divided, preprocessing=preprocessing, trained_here=False, seed=seed)
    assert task.fit is not None
    if not digits:
        task = task.with_splits(
            fit=task.fit.sample(5000, seed), choose=task.choose.sample(1000, seed), report=task.report.sample(2000, 0)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = create_model(
            "digits_vit",
            embed_dim=scale.width,
            depth=BLOCKS,
            num_heads=max(HEADS),
            patch_size=scale.patch,
            num_classes=len(data.classes),
        )
    elastic = Elastic(network)
    hidden = spaces(scale.width)["architecture"].variables["intermediate_size"][1]
    method = Sandwich(DEPTHS, HEADS, tuple(hidden), scale.learners)
    fit(
        elastic,
        task,
        method=method,
        epochs=scale.epochs,
        batch=scale.batch,
        lr=scale.lr,
        seed=seed,
        augment=not digits,
        flip=not digits,
    )
    settings.progress(f"seed {seed}: trained, {evaluate(elastic, task, task.choose).value:.1f} % on choose")
    return task, elastic


def _compare(task: Task, elastic: Elastic, seed: int, scale: Scale, settings: Settings) -> dict[str, float]:
    """All figures of one seed. Candidates are chosen on ``choose``; what is said of fronts is read on ``report``."""
    assert task.fit is not None
    bench = Bench(task, elastic, task.fit.sample(128, seed).inputs(slice(None)))
    uniform = {bits: bench.uniform(bits) for bits in BITS}
    searched: dict[str, Found] = {}
    known = spaces(scale.width)
    for name in ("random", "nsga2", "linas", "architecture", "policy"):
        space = known.get(name, known["joint"])
        common: dict[str, Any] = {
            "budget": scale.budget,
            "population": scale.population,
            "seed": seed,
            "key": lambda vector, space=space: bench.candidate(space.decode(vector)),
        }
        if name == "random":
            found = random_search(space, bench.measure, OBJECTIVES, **common)
        elif name == "nsga2":
            found = measured_nsga2(space, bench.measure, OBJECTIVES, **common)
        else:
            common |= {"inner": scale.inner, "coarse": scale.coarse, "features": features_of(space)}
            found = linas(space, bench.measure, OBJECTIVES, **common)
        searched[name] = found
        settings.progress(f"seed {seed}: {name}, {len(found.records)} candidates measured")

    box = (1 - 1 / len(task.classes), bench.chosen(uniform[32])["bytes"])  # chance, and the largest in float32

    def area(points: Sequence[tuple[float, float]]) -> float:
        return hypervolume(points, box) / (box[0] * box[1])

    def on_choose(records: Sequence[Record]) -> float:
        return area([(r.measured["error"], r.measured["bytes"]) for r in records if r.measured is not None])

    def on_report(candidates: Sequence[Candidate]) -> float:
        return area([(bench.reported(c), bench.chosen(c)["bytes"]) for c in candidates])

    fronts = {
        name: [bench.candidate(known.get(name, known["joint"]).decode(r.vector)) for r in found.front]
        for name, found in searched.items()
    }
    kept = non_dominated([tuple(bench.chosen(c).values()) for c in uniform.values()])
    fronts["uniform"] = [list(uniform.values())[i] for i in kept]

    # The smallest that loses nothing against the largest in int8 on `choose`; that itself where there is none.
    int8 = bench.chosen(uniform[8])
    good = [c for c in fronts["linas"] if bench.chosen(c)["error"] <= int8["error"]]
    best = min([*good, uniform[8]], key=lambda c: bench.chosen(c)["bytes"])
    return {
        **{f"found {name}": on_choose(searched[name].records) for name in ("random", "nsga2", "linas")},
        **{f"front {name}": on_report(front) for name, front in fronts.items()},
        "needed": _needed(searched["linas"].records, on_choose, on_choose(searched["random"].records)),
        **{f"tau {name}": _mean_tau(searched["linas"], i) for i, name in enumerate(OBJECTIVES)},
        **{f"accuracy {bits}": 100 * (1 - bench.reported(uniform[bits])) for bits in BITS},
        **{f"bytes {bits}": bench.chosen(uniform[bits])["bytes"] / 1e3 for bits in BITS},
        "accuracy best": 100 * (1 - bench.reported(best)),
        "bytes best": bench.chosen(best)["bytes"] / 1e3,
        "high layers": float(sum(bits > 4 for bits in best.policy)),
        "layers": float(len(best.policy)),
    }


def _needed(records: Sequence[Record], area: Callable[[Sequence[Record]], float], aim: float) -> float:
    """The share of the records after which their hypervolume first reaches ``aim``; 1 where it never does."""
    counts = (count for count in range(1, len(records) + 1) if area(records[:count]) >= aim)
    return next(counts, len(records)) / len(records)


def _mean_tau(found: Found, objective: int) -> float:
    """Mean over the batches of Kendall's tau; 0 where no batch had an order to compare."""
    taus = [tau for batch in found.kendall if (tau := batch[objective]) is not None]
    return float(np.mean(taus)) if taus else 0.0


def _judged(data: DataSet, figures: Mapping[str, list[float]], scale: Scale, settings: Settings) -> ProofResult:
    searches = {"random": "random search", "nsga2": "NSGA-II on measurements", "linas": "LINAS"}
    fronts = {
        "linas": "architecture and precision together",
        "architecture": "architecture alone, uniform int8",
        "policy": "precision alone, largest network",
        "uniform": "largest network in 4, 8 and 32 bits",
    }

    def row(name: str, metric: str, key: str, unit: str = "", measured: int = scale.budget) -> Row:
        return Row(name, metric, tuple(figures[key]), unit, {"measured": measured})

    def gain(better: str, worse: str) -> list[float]:
        return [a - b for a, b in zip(figures[better], figures[worse], strict=True)]

    rows = [row(text, "hypervolume, images that choose", f"found {name}") for name, text in searches.items()]
    rows += [
        row(
            text,
            "hypervolume, held-out images",
            f"front {name}",
            measured=len(BITS) if name == "uniform" else scale.budget,
        )
        for name, text in fronts.items()
    ]
    rows.append(row("LINAS", "share of its candidates until random search's hypervolume", "needed"))
    rows += [
        row("LINAS", f"Kendall's tau of the predicted {name} on the next batch", f"tau {name}") for name in OBJECTIVES
    ]
    for name, key, measured in (
        *((f"largest network, {bits} bits", str(bits), 1) for bits in BITS),
        ("smallest found as good as its int8", "best", scale.budget),
    ):
        rows.append(row(name, "accuracy, held-out images", f"accuracy {key}", "%", measured))
        rows.append(row(name, "model size", f"bytes {key}", "kB", measured))

    text = f"{data.name}, {len(settings.seeds)} seeds, {scale.budget} candidates a search"

    def more(sentence: str, gains: Sequence[float]) -> Claim:
        evidence = f"hypervolume gained: {_interval(gains)}, of the box between the largest float32 network and chance"
        return Claim(sentence, verdict_by_interval(gains, matters=MATTERS), f"{evidence} ({text})")

    needed = figures["needed"]
    smaller = [1 - b / a for a, b in zip(figures["bytes 8"], figures["bytes best"], strict=True)]
    change = gain("accuracy best", "accuracy 8")
    layers = f"{np.mean(figures['high layers']):.1f} of {np.mean(figures['layers']):.1f} layers"
    claims = (
        more("LINAS finds a larger hypervolume than random search.", gain("found linas", "found random")),
        more("LINAS finds a larger hypervolume than NSGA-II on measurements.", gain("found linas", "found nsga2")),
        Claim(
            "LINAS reaches random search's hypervolume with at most half as many measured candidates.",
            verdict_by_interval([0.5 - share for share in needed]),
            f"share needed: {_interval(needed)}; 1 where it never does ({text})",
        ),
        more(
            "Architecture and precision searched together dominate more of the (error, bytes) plane than the "
            "architecture under uniform int8 (the paper's baseline).",
            gain("front linas", "front architecture"),
        ),
        more(
            "Architecture and precision searched together dominate more than the precision of the largest network.",
            gain("front linas", "front policy"),
        ),
        more(
            "A precision for every layer of the largest network dominates more than 4, 8 and 32 bits for all.",
            gain("front policy", "front uniform"),
        ),
        Claim(
            "Against the largest network in int8, a candidate is smaller without loss of accuracy (the paper: up to "
            "3.44 times).",
            smaller_without_loss(smaller, change),
            f"bytes saved: {_interval([100 * s for s in smaller])} %; change of accuracy: {_interval(change)} points "
            f"on held-out images, chosen on others; {layers} keep more than 4 bits ({text})",
        ),
    )
    notes = (
        "Searches are compared on the images they choose by, which is what they are to optimise; fronts on others.",
        "Bytes are counted from the policy (packed weights, scales, float32 rest); arithmetic is simulated in float32, "
        "so nothing is said of latency.",
        "The first batch is random and the same for all three searches over both together.",
    )
    return ProofResult(
        "simq_nas", "architecture and precision of every layer, searched together", claims, tuple(rows), notes
    )


def smaller_without_loss(saved: Sequence[float], change: Sequence[float]) -> str:
    """Verdict on "smaller at no loss": ``saved`` is a share of bytes, ``change`` the accuracy's, in points, by seed.

    Shown where the saving's interval lies above 0 and the change's above -MARGIN. Not shown where the saving is not,
    or the change's interval lies below -MARGIN. Inconclusive otherwise.
    """
    saving = verdict_by_interval(saved, matters=0.02)
    kept = verdict_by_interval([c + MARGIN for c in change])
    if saving == kept == SHOWS:
        return SHOWS
    return NOT_SHOWN if NOT_SHOWN in (saving, kept) else INCONCLUSIVE


def _interval(values: Sequence[float]) -> str:
    mean, interval = mean_interval(values)
    return f"{mean:.3g} ({interval[0]:.3g} to {interval[1]:.3g})" if interval else f"{mean:.3g} (one seed)"
