"""low_rank: large linear layers and 1x1 convolutions as two thin ones each, from a truncated SVD (PELA, 2310.10700).

A layer in -> out becomes in -> r -> out with r = floor(in out / (ratio (in + out))), which divides its weights and its
multiplications by ``ratio`` (``lissom.layers.low_rank``). The training that follows learns from the original, and also
draws the outputs of the blocks to the original's (``lissom.training.methods.pela``); the paper does this on the data of
pre-training, before the model is fine-tuned like any other.

Not every layer bears the same rank. ``ratios`` gives kinds of layers, or single ones, ratios of their own, which a
search tries; ``spread="energy"`` finds them by the layers' singular values.

Fewer multiplications are not less time everywhere: two thin layers read and write more values, and a narrow one leaves
vector units idle. So, where ``skip`` is left open, every distinct kind of layer is measured on the device in both forms
(``settle``), and only what gets faster is replaced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Plan
from lissom.layers.low_rank import factorisable, factorise, obstacles, rank_of_ratio, spread_ratios, thin_layers
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Choices, Probe, Subset, Technique
from lissom.training.methods.narrowed import Narrowed
from lissom.training.methods.pela import FeatureMSE, Perturbation, Retrained, block_paths
from lissom.training.methods.recovery import Term

__all__ = ["LowRank"]

NAMES = ("norm", "head", "patch_embed", "downsample")  # the paper's list for DeiT
LEAST_OUTPUTS = 10  # the paper leaves narrower layers alone
FASTER = 1.02  # a layer in its own form takes this many times as long as two thin ones, or more: else it stays
FEATURES = ("all", "last", "none")
SPREADS = ("even", "energy")
RATIOS = (1.5, 2.0, 3.0, 4.0)  # that a search tries
PROBED = 8  # layers that are probed at once: each is held by two processes of the runtime
NAMED = 4  # how many layers a note names


@register("technique", "low_rank")
@dataclass(frozen=True)
class LowRank(Technique):
    """Replace linear layers and 1x1 convolutions by two thin ones of low rank.

    ``ratio``: how many times fewer weights a layer has afterwards (1 or more). ``spread``: "even" gives every layer
    that ratio; "energy" gives no more weights in all, so that the layers lose least of their singular values' energy
    (ratios 0.75 to 2 times as large, or 1, which leaves a layer whole; ``lissom.layers.low_rank.spread_ratios``).
    ``ratios``: (entry, ratio) for layers of another ratio, 1 for those that stay whole; of several entries that mean a
    layer the last counts. ``ranks``: (path, rank) for layers that are replaced at a rank of their own, whatever the
    other knobs say. ``skip``: what is left alone. An entry of ``ratios`` or ``skip`` that is a module's path means that
    module and all it holds, any other every layer whose path contains it ("attn.proj"). Layers of fewer than 10
    outputs, and those that would not shrink, are left alone as well.

    ``skip`` left out is undecided: names that contain norm, head, patch_embed or downsample, the classifier, and, where
    the device is asked (``settle``), what does not get faster there. A given ``skip`` takes the place of all that.

    For the training that follows: ``features`` draws the outputs of "all" blocks, of the "last" or of "none" to the
    original's, with ``feature_weight``; ``perturbation_weight`` (0: off, as in the paper's scripts for DeiT; 1.0 for
    Swin) holds each product of two thin layers near the weight it replaces, at a distance ``eps``.
    """

    name: ClassVar[str] = "low_rank"
    stage: ClassVar[str] = "structure"

    ratio: float = 2.0
    spread: str = "even"
    ratios: tuple[tuple[str, float], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    skip: tuple[str, ...] | None = None
    features: str = "all"
    feature_weight: float = 1.0
    perturbation_weight: float = 0.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        for wrong, sentence in (
            (not _number(self.ratio) or not self.ratio >= 1, f"ratio is {self.ratio!r}; it is a number, at least 1"),
            (self.spread not in SPREADS, f"spread is {' or '.join(map(repr, SPREADS))}, not {self.spread!r}"),
            (
                not isinstance(self.ratios, tuple) or not all(map(_entry_and_ratio, self.ratios)),
                "ratios is a tuple of (module path or a part of one, ratio of at least 1), as in ratios=(('qkv', 3),)",
            ),
            (
                not isinstance(self.ranks, tuple) or not all(map(_path_and_rank, self.ranks)),
                "ranks is a tuple of (path, rank), as in ranks=(('blocks.0.attn.qkv', 32),)",
            ),
            (
                self.skip is not None
                and not (isinstance(self.skip, tuple) and all(s and isinstance(s, str) for s in self.skip)),
                "skip is a tuple of module paths or parts of them, as in skip=('head', 'attn.proj')",
            ),
            (self.features not in FEATURES, f"features is {' or '.join(map(repr, FEATURES))}, not {self.features!r}"),
            *(
                (not _number(value) or not value >= 0, f"{name} is {value!r}; it is a number, at least 0")
                for name, value in vars(self).items()
                if name in ("feature_weight", "perturbation_weight", "eps")
            ),
        ):
            if wrong:
                raise ValueError(sentence)
        for name, pairs in (("ranks", self.ranks), ("ratios", self.ratios)):
            if len(dict(pairs)) < len(pairs):
                raise ValueError(f"a layer stands twice in {name}; once is enough")

    def check(self, plan: Plan, target: Target) -> None:
        # Singular values take longer than a check may; which layers can be replaced does not hang on them.
        ranks, left, _ = replace(self, spread="even")._chosen(plan.model)
        if not ranks:
            raise _nothing(left)

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with a model of thin layers, a note on what was left alone, and what recovery should minimise.

        Raises NotApplicable where nothing can be replaced, LissomError where the model does not run on the task's
        shape: one forward pass on zeros tells which layers are called, and which have their weights read instead.
        """
        model = clone(plan.model)
        ranks, left, spread = self._chosen(model)
        seen = _called(model, task.shape, [*ranks, *block_paths(model)])
        for path in [path for path in ranks if path not in seen]:
            if path in dict(self.ranks):
                raise NotApplicable(f"low_rank is to replace {path!r}, which the model never calls; leave it out")
            del ranks[path]
            left[path] = "not called"
        if not ranks:
            raise _nothing(left)
        layers = factorisable(model)
        originals = {path: layers[path].weight.detach() for path in ranks}
        factorise(model, ranks)
        narrowed = {path for term in plan.recovery if isinstance(term, Narrowed) for path in term.paths}
        comparable = set(block_paths(plan.model)) - narrowed
        blocks = [path for path in seen if path in comparable]  # in the order of execution
        terms: list[Term] = []
        notes = [
            f"low_rank put two thin layers in the place of {len(ranks)} of {len(ranks) + len(left)} linear layers and "
            f"1x1 convolutions{_in_words(left)}"
        ]
        if spread:
            counts = Counter(spread.values())
            of = ", ".join(f"{counts[own]} at {own:g}" for own in sorted(counts))
            notes.append(f"low_rank spread the ratio {self.ratio:g} over layers by their singular values: {of}")
        if self.features != "none" and self.feature_weight:
            if blocks:
                terms.append(FeatureMSE(tuple(blocks[-1:] if self.features == "last" else blocks), self.feature_weight))
            else:
                notes.append("low_rank finds no repeated blocks whose features could be compared")
        if self.perturbation_weight:
            terms.append(Perturbation(originals, self.perturbation_weight, self.eps))
        return plan.with_model(model, *notes).with_recovery(*(terms or [Retrained()]))

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset | Choices]:
        ranks, _, _ = cls()._chosen(plan.model)
        kinds = tuple((kind, (None, 1.0, *RATIOS)) for kind in _entries(ranks, plan.model))
        return {"ratio": RATIOS, "spread": SPREADS, "ratios": Choices(kinds)}

    def settle(self, plan: Plan, task: Task, probe: Probe) -> Self:
        """The same technique with ``skip`` decided by measurement, and with the ratios of ``spread`` written into
        ``ratios``, layer by layer; itself where ``skip`` is decided already.

        ``probe`` measures (layer, two thin ones, shape of one input) on the device and returns how many times as long
        the layer takes in its own form. One of each kind is measured (class, widths, stride, rank, input's shape), on
        the largest input it gets in a forward pass on zeros of the task's shape. What takes less than 1.02 times as
        long goes to ``skip``, by its path, behind what stays by its name. Layers in ``ranks`` are decided, and not
        measured. Raises NotApplicable where no layer gets faster.
        """
        if self.skip is not None:
            return self
        model = clone(plan.model)
        ranks, left, spread = self._chosen(model)
        seen = _called(model, task.shape, ranks)
        if not any(path in seen for path in ranks):
            raise _nothing(left | dict.fromkeys(ranks, "not called"))
        layers = factorisable(model)
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for path, rank in ranks.items():
            if path in seen and path not in dict(self.ranks):
                kinds.setdefault(_kind(layers[path], rank, seen[path]), []).append(path)
        pairs = [
            (layers[first], thin_layers(layers[first], ranks[first], "random"), shape)
            for (*_, shape), (first, *_) in kinds.items()
        ]
        ratios = [ratio for i in range(0, len(pairs), PROBED) for ratio in probe(pairs[i : i + PROBED])]
        slow = {
            path for paths, ratio in zip(kinds.values(), ratios, strict=True) if not ratio > FASTER for path in paths
        }
        if not set(seen) & set(ranks) - slow:
            best = f", at best {max(ratios):.2f}x as fast" if ratios else ""
            raise NotApplicable(
                f"no layer is faster on this device as two thin ones at ratio {self.ratio:g}{best}; "
                "a larger ratio may be, and skip=() replaces all regardless"
            )
        stays = {path for path, reason in left.items() if reason in (BY_NAME, CLASSIFIER)} | slow
        if not spread:
            return replace(self, skip=tuple(path for path in layers if path in stays))
        # Ratios, and not ranks: a technique in front of this one may make layers narrower.
        stays |= {path for path, own in spread.items() if own == 1}
        own = tuple((path, ratio) for path, ratio in spread.items() if path not in stays)
        return replace(self, skip=tuple(path for path in layers if path in stays), ratios=(*self.ratios, *own))

    def _chosen(self, model: nn.Module) -> tuple[dict[str, int], dict[str, str], dict[str, float]]:
        """Path -> rank of what is replaced, path -> reason of all other linear layers and 1x1 convolutions, and path ->
        ratio of those whose ratio their singular values gave."""
        layers = factorisable(model)
        left = {path: reason for path, reason in obstacles(model).items() if reason}
        modules = {path for path, _ in model.named_modules()}
        own = dict(self.ranks)
        for path, rank in own.items():
            if path not in layers:
                reason = left.get(path, "the model has no linear layer and no 1x1 convolution of that path")
                raise NotApplicable(f"low_rank cannot replace {path!r}: {reason}")
            most = min(layers[path].weight.shape[:2])
            if rank > most:
                raise NotApplicable(f"low_rank is to give {path!r} the rank {rank}; it has at most {most}")
        for entry in self.skip or ():
            if not any(entry in path for path in modules):
                raise NotApplicable(f"low_rank is to leave {entry!r} alone, but no module's path contains it")
        given: dict[str, float] = {}
        for entry, ratio in self.ratios:
            if not any(entry in path for path in modules):
                raise NotApplicable(f"low_rank has a ratio for {entry!r}, but no module's path contains it")
            given |= {path: ratio for path in layers if _means(entry, path, modules)}
        classifiers = _classifiers(model) if self.skip is None else set()
        free: dict[str, nn.Linear | nn.Conv2d] = {}  # those that may be replaced, at a ratio
        for path, layer in layers.items():
            if path in own:
                continue
            if path in classifiers:
                left[path] = CLASSIFIER
            elif self.skip is None and any(name in path for name in NAMES):
                left[path] = BY_NAME
            elif any(_means(entry, path, modules) for entry in self.skip or ()):
                left[path] = "in skip"
            elif len(layer.weight) < LEAST_OUTPUTS:
                left[path] = f"fewer than {LEAST_OUTPUTS} outputs"
            else:
                free[path] = layer
        spread: dict[str, float] = {}
        if self.spread == "energy":
            spread = spread_ratios({path: layer for path, layer in free.items() if path not in given}, self.ratio)
        ranks: dict[str, int] = {}
        for path, layer in layers.items():
            outputs, inputs = layer.weight.shape[:2]
            ratio = spread.get(path, given.get(path, self.ratio))
            rank = own.get(path) or rank_of_ratio(inputs, outputs, ratio)
            if path in own:
                ranks[path] = rank
            elif path not in free:
                continue
            elif path in given and ratio == 1:
                left[path] = "in ratios"
            elif path in spread and ratio == 1:
                left[path] = "its singular values"
            elif rank * (inputs + outputs) >= inputs * outputs:
                left[path] = "would not shrink"
            else:
                ranks[path] = rank
        return ranks, left, spread


BY_NAME, CLASSIFIER = "by name", "the classifier"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _path_and_rank(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], int)
        and item[1] >= 1
    )


def _entry_and_ratio(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and bool(item[0])
        and _number(item[1])
        and 1 <= item[1] < math.inf
    )


def _entries(paths: Iterable[str], model: nn.Module) -> list[str]:
    """Entries of ``ratios`` that mean all of ``paths``, a kind of layer each: what stands behind the last number in
    their paths ("attn.qkv" of blocks.0.attn.qkv), or each path where that would mean other layers too."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        start = max((i + 1 for i, part in enumerate(parts) if part.isdigit()), default=len(parts))
        kinds.setdefault(".".join(parts[start:]) or path, []).append(path)
    layers, modules = factorisable(model), {path for path, _ in model.named_modules()}
    found: list[str] = []
    for kind, own in kinds.items():
        # With a dot in front it cannot be a module's path, such as that of a stem.
        entries = [e for e in (kind, f".{kind}") if {path for path in layers if _means(e, path, modules)} == set(own)]
        found += entries[:1] or own
    return found


def _means(entry: str, path: str, modules: set[str]) -> bool:
    """Whether an entry of ``skip`` or ``ratios`` means the layer at ``path``."""
    return path == entry or path.startswith(f"{entry}.") if entry in modules else entry in path


def _classifiers(model: nn.Module) -> set[str]:
    """Paths of the layers that classify: what timm's ``get_classifier`` says, else the last layer with weights."""
    told = getattr(model, "get_classifier", None)
    if callable(told):
        found = told()
        heads = [m for m in (found if isinstance(found, tuple | list) else [found]) if isinstance(m, nn.Module)]
        inside = {id(m) for head in heads for m in head.modules()}
        return {path for path, m in model.named_modules() if id(m) in inside}
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return set([path for path, m in model.named_modules() if isinstance(m, kinds)][-1:])


@torch.no_grad()
def _called(model: nn.Module, shape: tuple[int, ...], paths: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Which of the modules at ``paths`` a forward pass on zeros calls, in the order of their first calls -> the shape
    of the largest input each gets there, without the batch of one.

    A model may fold windows or images into the batch; then that number stands first in the shape.
    """
    seen: dict[str, tuple[int, ...]] = {}
    handles = []
    for path in paths:

        def look(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any, path: str = path) -> None:
            size = next((tuple(x.shape) for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)), ())
            size = size[1:] if size[:1] == (1,) else size
            if path not in seen or torch.Size(size).numel() > torch.Size(seen[path]).numel():
                seen[path] = size

        handles.append(model.get_submodule(path).register_forward_hook(look, with_kwargs=True))
    try:
        model(torch.zeros(1, *shape))
    except Exception as error:  # a model of the user's raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LissomError(f"the model does not take inputs of shape {tuple(shape)}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _kind(layer: nn.Linear | nn.Conv2d, rank: int, size: tuple[int, ...]) -> tuple[Any, ...]:
    """What decides a layer's time: equal for layers that need measuring once. The shape of one input is last."""
    if isinstance(layer, nn.Conv2d):
        size = (size[1], size[0] * size[2], size[3]) if len(size) == 4 else size  # images in the batch: one high image
        return ("conv", *layer.weight.shape[:2], layer.bias is None, tuple(layer.stride), rank, size)
    return ("linear", *layer.weight.shape, layer.bias is None, rank, size)


def _nothing(left: Mapping[str, str]) -> NotApplicable:
    if not left:
        return NotApplicable(
            "low_rank replaces linear layers and 1x1 convolutions, and the model has none; int8 works on other layers"
        )
    return NotApplicable(
        f"low_rank replaces linear layers and 1x1 convolutions, and finds none that it may{_in_words(left)}; "
        "skip= and ranks= decide otherwise"
    )


def _in_words(left: Mapping[str, str]) -> str:
    """What was left alone and why, by reason: how many, and the first few of them."""
    reasons: dict[str, list[str]] = {}
    for path, reason in left.items():
        reasons.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in reasons.items():
        more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
        parts.append(f"{', '.join(paths[:NAMED])}{more} ({reason})")
    return f"; left alone: {'; '.join(parts)}" if parts else ""
