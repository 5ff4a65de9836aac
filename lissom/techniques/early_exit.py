"""early_exit: easy inputs leave through a head in the middle of the network, hard ones run on.

Heads and their training are LGViT's for transformers (Xu et al. 2023, arXiv 2308.00255) and plain convolutional ones
for convolutional networks; the backbone stays frozen. Thresholds are fitted after quantisation with a promise
(Learn-then-Test, arXiv 2110.01052), and the exported graph is cut behind the modules that exits read.

A network with exits of its own (``lissom.layers.exits``; Dyn-Perceiver is one) leaves through those, as they were
trained: it gets no new heads, and no training where nothing else changes it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone
from lissom.export.cuts import CutPoint, check_cut, cut_points, own_exit_costs
from lissom.export.plan import Exit, Plan
from lissom.layers.exit_heads import build_head, head_kinds
from lissom.layers.exits import Exits, OwnExit, attach_exits, attach_own_exits, own_exits
from lissom.layers.token_clustering import find_token_blocks, remove_token_clusters, token_clusters_of, token_grid
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique
from lissom.training.methods.lgvit import ExitDistillation
from lissom.training.methods.multi_exit_kd import OwnExits

__all__ = ["EarlyExit", "positions"]

EVERYWHERE = ("*",)
MOST = 8  # exits: as many as LGViT has
TOKENS_FROM, MAPS_FROM, UNTIL = 0.3, 0.15, 0.93  # shares of the operations between which exits make sense

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], tuple[str, ...]]] = weakref.WeakKeyDictionary()


@register("technique", "early_exit")
@dataclass(frozen=True)
class EarlyExit(Technique):
    """Let inputs leave early.

    ``at``: paths of the modules behind which exits stand, any that the model can be cut behind; a number n stands for
    ``blocks.n``, ("*",) for every place that makes sense. None: three of these, evenly spread. In a network with exits
    of its own, a number n stands for the n-th of them, from 1, and a path for the module that answers there; None is
    all of them. ``rule``: "confidence" or "entropy". ``risk``: points of quality that the exits may cost, kept with a
    probability of 95 %.
    """

    name: ClassVar[str] = "early_exit"
    stage: ClassVar[str] = "exits"

    at: tuple[str | int, ...] | None = None
    rule: str = "confidence"
    risk: float = 0.5

    def __post_init__(self) -> None:
        if self.at is not None and (isinstance(self.at, str | int) or not self.at):
            raise ValueError("at is a tuple of module paths or block numbers, as in at=(4, 8) or at=('layer2',)")
        if self.rule not in ("confidence", "entropy"):
            raise ValueError(f"rule is 'confidence' or 'entropy', not {self.rule!r}")
        if not 0 < self.risk < 100:
            raise ValueError(f"risk is in points of quality, between 0 and 100, not {self.risk!r}")

    def check(self, plan: Plan, target: Target) -> None:
        if plan.decisions:
            raise NotApplicable("the plan has exits already")

    def apply(self, plan: Plan, task: Task) -> Plan:
        if task.kind != "classification":
            raise NotApplicable("early exits answer for a whole image: they are for classification")
        if declared := own_exits(plan.model):
            return self._open(plan, task, declared)
        # Places, and with them the kinds of heads, are those of the model with all its tokens: a clustering changes
        # neither weights nor what heads are trained on.
        whole = plan.model if token_clusters_of(plan.model) is None else remove_token_clusters(clone(plan.model))
        known = positions(whole, task.shape)
        if not known:
            raise NotApplicable("the model has no place in its middle that all of its computation goes through")
        wanted = self._paths(known)
        points = sorted((check_cut(plan.model, task.shape, path) for path in wanted), key=lambda p: p.done)
        model = clone(plan.model)
        samples = _outputs(model, task.shape, [*known, *(p.path for p in points if p.path not in known)])
        classes = int(samples[""].shape[1])
        prefix = int(getattr(model, "num_prefix_tokens", 1 if getattr(model, "cls_token", None) is not None else 0))
        heads = []
        for number, point in enumerate(points):
            # A head's kind goes with its place among all places of its sort (tokens or maps), so that heads trained
            # once serve every choice of places.
            sample = samples[point.path]
            alike = [path for path in known if samples[path].ndim == sample.ndim]
            kinds = head_kinds(max(1, len(alike)), maps=sample.ndim == 4)
            earlier = list(samples)[: list(samples).index(point.path)]  # in order of execution
            kind = kinds[min(sum(path in alike for path in earlier), len(kinds) - 1)]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(known.index(point.path) if point.path in known else number)
                heads.append(build_head(sample, classes, kind, prefix=prefix,
                                        grid=token_grid(model, point.path)).eval())  # fmt: skip
        own = _operations(model, task.shape)
        spent, exits = 0.0, []
        for point, head in zip(points, heads, strict=True):
            spent += _operations(head, tuple(samples[point.path].shape[1:])) / own
            exits.append(Exit(point.path, self.rule, self.risk, cost=point.done + spent, heads=spent))
        attach_exits(model, Exits([p.path for p in points], heads))
        changed = plan.with_model(model.eval(), f"early_exit at {', '.join(p.path for p in points)}")
        return replace(changed, decisions=tuple(exits)).with_recovery(ExitDistillation())

    def _open(self, plan: Plan, task: Task, own: Sequence[OwnExit]) -> Plan:
        """The plan with the network's own exits open."""
        chosen = [own[i] for i in self._chosen([exit.at for exit in own])]
        model = attach_own_exits(clone(plan.model), [exit.at for exit in chosen])
        costs = own_exit_costs(model, task.shape, chosen)
        exits = [
            Exit(exit.at, self.rule, self.risk, cost=cost, heads=heads, carries=exit.carries)
            for exit, (cost, heads) in zip(chosen, costs, strict=True)
        ]
        names = ", ".join(exit.at for exit in chosen)
        changed = replace(plan.with_model(model.eval(), f"early_exit at its own {names}"), decisions=tuple(exits))
        # Where the model is trained anyway, its exits are too; else they stay as they came.
        return changed.with_recovery(OwnExits()) if plan.recovery else changed

    def _chosen(self, known: Sequence[str]) -> list[int]:
        """Which of the network's own exits, as places among them."""
        if self.at is None or self.at == EVERYWHERE:
            return list(range(len(known)))
        places = set()
        for place in self.at:
            name = known[place - 1] if isinstance(place, int) and 1 <= place <= len(known) else place
            if name not in known:
                listed = ", ".join(f"{i + 1} ({at})" for i, at in enumerate(known))
                raise NotApplicable(f"the network has no exit of its own {place!r}; it has {listed}")
            places.add(known.index(str(name)))
        return sorted(places)

    def _paths(self, known: Sequence[str]) -> list[str]:
        if self.at is None:
            return _spread(known, 3)
        paths: list[str] = []
        for place in self.at:
            paths += known if place in EVERYWHERE else [f"blocks.{place}" if isinstance(place, int) else place]
        return list(dict.fromkeys(paths))

    def only(self, places: tuple[str, ...]) -> Self:
        return replace(self, at=places)

    def training_form(self, places: tuple[str, ...] = ()) -> Self:
        """Heads at every place that a search would try, and at ``places``, trained once for all recipes that differ
        only in where and when samples leave."""
        return replace(self, at=(*EVERYWHERE, *places), rule="confidence", risk=0.5)

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        own = [exit.at for exit in own_exits(plan.model)][:MOST]
        if own:
            some = [c for n in range(1, len(own) + 1) for c in combinations(own, n)]
            return {"at": some if len(own) <= 3 else [c for c in some if len(c) <= 2] + [tuple(own)],
                    "risk": (0.25, 0.5, 1.0, 2.0)}  # fmt: skip
        known = positions(plan.model, plan.shape) if plan.shape else ()
        choices = [(p,) for p in known] + [tuple(_spread(known, n)) for n in (2, 3, 4, MOST) if n <= len(known)]
        if len(known) > 3:
            choices += [(known[0], known[-1]), (known[0], known[len(known) // 2]), tuple(known[:2])]
        return {"at": list(dict.fromkeys(choices)), "risk": (0.25, 0.5, 1.0, 2.0)}


def positions(model: nn.Module, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Paths of at most eight modules of ``model`` behind which an exit makes sense, in order of execution.

    Cut points between a third (tokens) or a seventh (feature maps) and nine tenths of the operations; of a
    transformer's tokens those behind a block. Of neighbours the one that hands on the fewest numbers, then the
    outermost.
    """
    cache = _known.setdefault(model, {})
    if shape not in cache:
        points = [p for p in cut_points(model, shape) if len(p.shape) in (2, 3)]
        usable = [p for p in points if (TOKENS_FROM if len(p.shape) == 2 else MAPS_FROM) <= p.done <= UNTIL]
        if find_token_blocks(model) is not None:  # patches that no block has seen yet know nothing of each other
            usable = [p for p in usable if len(p.shape) == 3 or token_grid(model, p.path) is not None]
        cache[shape] = tuple(p.path for p in _best_of_bins(usable))
    return cache[shape]


def _best_of_bins(points: Sequence[CutPoint]) -> list[CutPoint]:
    if not points:
        return []
    low, high = points[0].done, points[-1].done
    width = max(high - low, 1e-9) / MOST
    bins: dict[int, list[CutPoint]] = {}
    for point in points:
        bins.setdefault(min(MOST - 1, int((point.done - low) / width)), []).append(point)
    return [min(group, key=lambda p: (math.prod(p.shape), p.path.count("."), -p.done)) for group in bins.values()]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """``count`` of the items, evenly spread, the ends left out where there are more than enough."""
    if count >= len(items):
        return list(items)
    places = [round((i + 0.5) * len(items) / count - 0.5) for i in range(count)]
    return [items[i] for i in dict.fromkeys(places)]


@torch.no_grad()
def _outputs(model: nn.Module, shape: tuple[int, ...], paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the modules answer to two zero inputs; the model's own answer under ""."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for path in paths:

        def keep(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            found[path] = output

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        found[""] = model(torch.zeros(2, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _operations(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one input."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    return max(1, counter.get_total_flops() // 2)
