"""similarity_exit: inputs leave where a block hardly turns them any more, by the model's own head; MuE (2211.11152).

MuE (CVPR 2023) leaves a stack of residual blocks where a block's output and its input point the same way: their cosine
is above a threshold. Here that is done to image encoders. An exit behind block l has no head: its score is the cosine
of block l's output and input, its answer the model's own norm and classifier on that output. So nothing is trained,
and the weights stay as they came; what it costs is that early blocks never learnt to be read by that head.

The rest is what all exits here share: thresholds are fitted after quantisation on the exported graph's own scores, one
a block, with a promise (the paper sweeps one threshold for all layers by hand), and the joint graph is cut behind the
blocks. The paper's layer-wise loss, which teaches every depth to feed the head, is an option (``train``).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone
from lissom.export.cuts import check_cut, evenly
from lissom.export.plan import Exit, Plan
from lissom.layers.own_end import BlockStack, attach_own_ends, block_stacks, own_end_error
from lissom.layers.token_clustering import remove_token_clusters, token_clusters_of
from lissom.meters.costs import layer_costs
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique
from lissom.training.methods.layerwise_loss import LayerwiseAnswers

__all__ = ["SimilarityExit", "places"]

EVERYWHERE = ("*",)
FROM, UNTIL = 0.3, 0.95  # shares of the operations between which an exit without a head of its own makes sense
SAME = 1e-4  # relative difference of two computations of one answer


@dataclass(frozen=True)
class _Found:
    """A model's stack of blocks, and the share of its operations that are done behind each."""

    stack: BlockStack
    done: tuple[float, ...]

    @property
    def end(self) -> float:
        """The share of the operations behind the last block."""
        return 1 - self.done[-1]

    @property
    def sensible(self) -> list[str]:
        """The blocks behind which a search looks: those where leaving saves more than running the end again costs,
        of these the ones between the two shares, or all where there is none."""
        ahead = zip(self.stack.paths[:-1], self.done, strict=False)
        saving = {path: done for path, done in ahead if self.done[-1] - done > self.end}
        return [path for path, done in saving.items() if FROM <= done <= UNTIL] or list(saving)


_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], _Found | None]] = weakref.WeakKeyDictionary()


@register("technique", "similarity_exit")
@dataclass(frozen=True)
class SimilarityExit(Technique):
    """Let inputs leave behind blocks that hardly turn them, through the model's own norm and head.

    ``at``: blocks, by path or by their number in their list (from 0); ("*",) is every block but the last from a third
    of the model's operations on; None: three of these, evenly spread. The blocks are of one kind, keep the shape of
    what they hand on, and have nothing but the model's end behind them. ``risk``: points of quality that the exits may
    cost, kept with a probability of 95 %. ``train``: train the whole model on the layer-wise loss behind those blocks
    (else nothing is trained for this).
    """

    name: ClassVar[str] = "similarity_exit"
    stage: ClassVar[str] = "exits"
    refuses: ClassVar[Mapping[str, str]] = {
        "early_exit": "both say where inputs leave; keep early_exit, which trains heads, or similarity_exit, which "
        "needs none"
    }

    at: tuple[str | int, ...] | None = None
    risk: float = 0.5
    train: bool = False

    def __post_init__(self) -> None:
        wanted = self.at if isinstance(self.at, tuple) else ()
        wrong = not wanted or any(not isinstance(p, str | int) or isinstance(p, bool) for p in wanted)
        if self.at is not None and wrong:
            raise ValueError("at is a tuple of block numbers or paths, as in at=(4, 8) or at=('blocks.4',)")
        if not isinstance(self.risk, int | float) or not 0 < self.risk < 100:
            raise ValueError(f"risk is in points of quality, between 0 and 100, not {self.risk!r}")
        if not isinstance(self.train, bool):
            raise ValueError(f"train is True or False, not {self.train!r}")

    def check(self, plan: Plan, target: Target) -> None:
        if plan.decisions:
            raise NotApplicable("the plan has exits already")
        if len(plan.stages) != 1:
            raise NotApplicable("similarity_exit comes before cascades: it changes one whole model")

    def apply(self, plan: Plan, task: Task) -> Plan:
        if task.kind != "classification":
            raise NotApplicable("similarity exits answer for a whole image: they are for classification")
        # Blocks and places are those of the model with all its tokens, whose shape changes where they are clustered.
        whole = plan.model if token_clusters_of(plan.model) is None else remove_token_clusters(clone(plan.model))
        found = _stack(whole, task.shape)
        points = [check_cut(plan.model, task.shape, path) for path in self._paths(found)]
        model = clone(plan.model)
        _check_end(model, found.stack, task.shape)
        attach_own_ends(model, found.stack, [p.path for p in points])
        costs = layer_costs(model, task.shape)
        own = max(1, sum(c.macs for c in costs if not c.path.startswith("exits.")))
        ends = [sum(c.macs for c in costs if c.path == f"exits.heads.{i}") for i in range(len(points))]
        spent, exits = 0.0, []
        for point, end in zip(points, ends, strict=True):
            spent += (end + 3 * math.prod(point.shape)) / own  # a cosine is three products
            exits.append(Exit(point.path, "similarity", self.risk, cost=point.done + spent, heads=spent))
        changed = plan.with_model(model, f"similarity_exit behind {', '.join(p.path for p in points)}")
        changed = replace(changed, decisions=tuple(exits))
        # Classes, not words: no smoothing, as published for its classification task.
        return changed.with_recovery(LayerwiseAnswers(label_smoothing=0.0)) if self.train else changed

    def _paths(self, found: _Found) -> list[str]:
        """The blocks that are asked for, in order of execution."""
        if self.at is None:
            return evenly(found.sensible, 3)
        paths, first = found.stack.paths, found.stack.first
        wanted: set[str] = set()
        for place in self.at:
            if place in EVERYWHERE:
                wanted |= set(found.sensible)
                continue
            number = place - first if isinstance(place, int) else -1
            name = paths[number] if 0 <= number < len(paths) else place
            if name not in paths[:-1]:
                raise NotApplicable(
                    f"no similarity exit can stand behind {place!r}: the blocks that keep their shape up to the "
                    f"model's end are {paths[0]} to {paths[-1]}, and behind the last the model answers anyway"
                )
            wanted.add(str(name))
        return [path for path in paths if path in wanted]

    def only(self, places: tuple[str, ...]) -> Self:
        return replace(self, at=places)

    def training_form(self, places: tuple[str, ...] = ()) -> Self | None:
        """Without ``train`` none: the exits stand on whatever weights the rest of a recipe leaves. With it all blocks
        that a search would try, and ``places``, trained once for all recipes."""
        return replace(self, at=(*EVERYWHERE, *places), risk=0.5) if self.train else None

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        known = places(plan.model, plan.shape) if plan.shape else ()
        choices = [(p,) for p in known] + [tuple(evenly(known, n)) for n in (2, 3, 4) if n <= len(known)]
        choices += [tuple(known[-n:]) for n in (2, 3) if n <= len(known)]
        return {"at": list(dict.fromkeys(choices)), "risk": (0.25, 0.5, 1.0, 2.0)} if choices else {}


def places(model: nn.Module, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Paths of the blocks of ``model`` behind which a similarity exit makes sense for inputs of ``shape`` (C, H, W), in
    order of execution; none where the model has no stack of blocks that keep their shape up to its end."""
    try:
        return tuple(_stack(model, shape).sensible)
    except NotApplicable:
        return ()


def _stack(model: nn.Module, shape: tuple[int, ...]) -> _Found:
    """The last stack of blocks that all computation goes through. Raises NotApplicable where there is none."""
    cache = _known.setdefault(model, {})
    if shape not in cache:
        cache[shape] = max(_candidates(model, shape), key=lambda f: (f.done[-1], len(f.done)), default=None)
    found = cache[shape]
    if found is None:
        raise NotApplicable(
            "similarity_exit needs two or more blocks of one kind in a list, which keep the shape of what they hand on "
            f"and which everything goes through, as a vision transformer's; {type(model).__name__} has none"
        )
    if not found.sensible:
        first, last = found.stack.paths[0], found.stack.paths[-1]
        raise NotApplicable(
            f"behind the last blocks that keep their shape, {first} to {last}, lie {found.end:.0%} of the model's "
            "operations: to run that once more for an exit costs more than the blocks left out would save"
        )
    return found


def _candidates(model: nn.Module, shape: tuple[int, ...]) -> list[_Found]:
    found = []
    device = next((p.device for p in model.parameters()), None)
    for stack in block_stacks(model, torch.zeros(1, *shape, device=device)):
        try:
            found.append(_Found(stack, tuple(check_cut(model, shape, path).done for path in stack.paths)))
        except NotApplicable:
            continue
    return found


def _check_end(model: nn.Module, stack: BlockStack, shape: tuple[int, ...]) -> None:
    """Raise NotApplicable where the model's end, run again on its own last block's output, answers otherwise."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        error = own_end_error(model, stack, x)
    except Exception as failure:  # somebody's forward, run in a way that it was not written for
        line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise NotApplicable(f"the model's end cannot be run by itself behind {stack.paths[-1]}: {line}") from failure
    if not error <= SAME:
        raise NotApplicable(
            f"the model's end, run by itself behind {stack.paths[-1]}, answers otherwise than the model (by "
            f"{error:.1%} of its largest answer): more than that block's output reaches it"
        )
