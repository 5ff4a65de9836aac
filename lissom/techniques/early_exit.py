"""early_exit: easy inputs leave through a head in the middle of the network, hard ones run on.

Heads and their training are LGViT's for transformers (Xu et al. 2023, arXiv 2308.00255) and plain convolutional ones
for convolutional networks; the backbone stays frozen, unless its training is asked for. Thresholds are fitted after
quantisation with a promise (Learn-then-Test, arXiv 2110.01052), and the exported graph is cut behind the modules that
exits read.

Transformers are timm's, transformers' and torchvision's ViT and DeiT, and those of several stages whose blocks stand
in lists called ``blocks``: timm's Swin and PVT, transformers' Swin. Their tokens have no class token, as a rule, and
are a map.

A network with exits of its own (``lissom.layers.exits``; Dyn-Perceiver is one) leaves through those, as they were
trained: it gets no new heads, and no training where nothing else changes it. So does a model that arrived with exits
attached, as LGViT's published ones do. Trained beside another technique, a network's own exits learn from labels, each
with the weight 0.5, and from the original's answer (``OwnExits``); Dyn-Perceiver's own training weighs the third with 1
and lets the merged answer teach them, as the technique dynamic_perceiver does.
"""

from __future__ import annotations

import copy
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
from lissom.export.cuts import CutPoint, check_cut, cut_points, evenly, own_exit_costs
from lissom.export.plan import Exit, Plan
from lissom.layers.exit_heads import TokenExit, build_head, channels_come_last, head_kinds
from lissom.layers.exits import (
    NAME,
    Exits,
    OwnExit,
    attach_exits,
    attach_own_exits,
    exits_of,
    exits_put_away,
    first_tensor,
    own_exits,
)
from lissom.layers.token_clustering import find_token_blocks, remove_token_clusters, token_clusters_of, token_grid
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique
from lissom.training.methods.lgvit import AlternatingExits, ExitDistillation
from lissom.training.methods.multi_exit_kd import OwnExits
from lissom.training.methods.recovery import Afterwards, Term

__all__ = ["EarlyExit", "operations", "positions"]

EVERYWHERE = ("*",)
MOST = 8  # exits: as many as LGViT has
TOKENS_FROM, MAPS_FROM, UNTIL = 0.3, 0.15, 0.93  # shares of the operations between which exits make sense
RULES = ("confidence", "entropy", "patience", "patient_and_confident")
HEADS = ("auto", "published", "linear")
TRAININGS = ("heads", "both", "all")

Places = tuple[str | int, ...]

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], tuple[str, ...]]] = weakref.WeakKeyDictionary()


@register("technique", "early_exit")
@dataclass(frozen=True)
class EarlyExit(Technique):
    """Let inputs leave early.

    ``at``: paths of the modules behind which exits stand, any that the model can be cut behind; a number n stands for
    ``blocks.n``, in other transformers for block n, from 0, through all stages; ("*",) for every place that makes
    sense. None: three of these, evenly spread (all of them with published heads). In a network with exits of its own, a
    number n stands for the n-th of them, from 1, and a path for the module that answers there; None is all of them, and
    all of those that a model arrived with.

    ``rule``: when an input leaves. "confidence" (the largest softmax share), "entropy" (of the softmax), "patience"
    (so many exits in a row say the same class), "patient_and_confident" (``patience`` exits in a row have a low
    entropy); what is high or low enough is fitted. ``risk``: points of quality that the exits may cost, kept with a
    probability of 95 %.

    ``heads``: "auto", LGViT's kinds by a place's depth among all places that make sense, so that heads trained once
    serve every choice of places; "published", its kinds for this number of exits (for that of ``among`` where ``at`` is
    some of those); "linear", the baseline: a linear layer on the class token, or on the mean of a map. ``train``:
    "heads", the heads alone learn, from labels, the model's answer and its features (LGViT's stage 2); "both", first
    everything learns by the paper's alternating loss (stage 1), then the heads do; "all", stage 1 alone.
    """

    name: ClassVar[str] = "early_exit"
    stage: ClassVar[str] = "exits"

    at: Places | None = None
    rule: str = "confidence"
    risk: float = 0.5
    patience: int = 2
    heads: str = "auto"
    train: str = "heads"
    among: Places = ()

    def __post_init__(self) -> None:
        if self.at is not None and (isinstance(self.at, str | int) or not self.at):
            raise ValueError("at is a tuple of module paths or block numbers, as in at=(4, 8) or at=('layer2',)")
        for knob, value, known in (("rule", self.rule, RULES), ("heads", self.heads, HEADS),
                                   ("train", self.train, TRAININGS)):  # fmt: skip
            if value not in known:
                raise ValueError(f"{knob} is one of {', '.join(map(repr, known))}, not {value!r}")
        if not isinstance(self.risk, int | float) or not 0 < self.risk < 100:
            raise ValueError(f"risk is in points of quality, between 0 and 100, not {self.risk!r}")
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            raise ValueError(f"patience is a number of exits, at least 1, not {self.patience!r}")
        if isinstance(self.among, str | int) or (self.among and (self.heads != "published" or self.at is None)):
            raise ValueError("among is a tuple of places as at is, beside at and for heads='published' alone")

    def check(self, plan: Plan, target: Target) -> None:
        if plan.decisions:
            raise NotApplicable("the plan has exits already")
        _check_name(plan.model)

    def apply(self, plan: Plan, task: Task) -> Plan:
        if task.kind != "classification":
            raise NotApplicable("early exits answer for a whole image: they are for classification")
        if declared := own_exits(plan.model):
            return self._open(plan, task, declared)
        _check_name(plan.model)
        # Places, and with them the kinds of heads, are those of the model with all its tokens: a clustering changes
        # neither weights nor what heads are trained on.
        whole = plan.model if token_clusters_of(plan.model) is None else remove_token_clusters(clone(plan.model))
        trained = self._trained(whole)
        known = positions(whole, task.shape) if trained is None else trained.positions
        if not known:
            raise NotApplicable("the model has no place in its middle that all of its computation goes through")
        model = clone(plan.model)
        wanted = self._paths(known, model, self.at) if trained is None or self.at is not None else list(known)
        counted = list(dict.fromkeys([*wanted, *self._paths(known, model, self.among)])) if self.among else wanted
        every = sorted((check_cut(plan.model, task.shape, path) for path in counted), key=lambda p: p.done)
        points = [point for point in every if point.path in wanted]
        self._check_patience(len(points))
        layout = _Layout.of(whole, task.shape)
        read = dict.fromkeys([*known, *(p.path for p in every), *layout.blocks[-1:]])
        samples = _outputs(model, task.shape, list(read))
        for point in points:
            _check_read(point, samples[point.path])
        if trained is None:
            heads = self._heads(model, known, points, every, samples, layout)
        else:
            heads = _heads_at(model, trained, points)
        own = operations(model, task.shape)
        spent, exits = 0.0, []
        for point, head in zip(points, heads, strict=True):
            spent += operations(head, tuple(samples[point.path].shape[1:])) / own
            cost = point.done + spent
            exits.append(Exit(point.path, self.rule, self.risk, cost=cost, heads=spent, patience=self.patience))
        attach_exits(model, Exits([p.path for p in points], heads, detached=self.train == "heads"))
        changed = plan.with_model(model.eval(), f"early_exit at {', '.join(p.path for p in points)}")
        changed = replace(changed, decisions=tuple(exits))
        # Heads that arrive trained are trained where the model is, or where it is asked for; else they stay.
        if trained is not None and self.train == "heads" and not plan.recovery:
            return changed
        return changed.with_recovery(*self._terms(model, points, layout, samples))

    def _trained(self, model: nn.Module) -> Exits | None:
        """The exits that the model arrived with, where other heads are not asked for."""
        return exits_put_away(model) if self.heads == "auto" else None

    def _heads(
        self,
        model: nn.Module,
        known: Sequence[str],
        points: Sequence[CutPoint],
        every: Sequence[CutPoint],
        samples: Mapping[str, torch.Tensor],
        layout: _Layout,
    ) -> list[nn.Module]:
        """Untrained heads at the ``points``, which are some of ``every`` place that counts for published kinds."""
        classes = int(samples[""].shape[1])
        published = head_kinds(len(every), maps=layout.stages)
        heads = []
        for number, point in enumerate(points):
            sample = samples[point.path]
            kind = self._kind(point.path, known, samples, layout, published[every.index(point)])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(known.index(point.path) if point.path in known else number)
                heads.append(layout.head(model, point.path, sample, classes, kind).eval())
        return heads

    def _check_patience(self, count: int) -> None:
        if self.rule == "patient_and_confident" and count < self.patience:
            raise NotApplicable(
                f"{count} exits cannot be sure {self.patience} times in a row; at= with more places or a smaller "
                "patience would do"
            )

    def _kind(
        self, path: str, known: Sequence[str], samples: Mapping[str, torch.Tensor], layout: _Layout, published: str
    ) -> str:
        """The kind of the head at ``path``; ``samples`` are in order of execution."""
        if self.heads != "auto":
            return "linear" if self.heads == "linear" else published
        # A head's kind goes with its place among all places of its sort (tokens or maps), so that heads trained
        # once serve every choice of places.
        sort = layout.sort(samples[path])
        alike = [other for other in known if layout.sort(samples[other]) == sort]
        kinds = head_kinds(max(1, len(alike)), maps=layout.stages or samples[path].ndim == 4)
        earlier = list(samples)[: list(samples).index(path)]
        return kinds[min(sum(other in alike for other in earlier), len(kinds) - 1)]

    def _terms(
        self, model: nn.Module, points: Sequence[CutPoint], layout: _Layout, samples: Mapping[str, Any]
    ) -> list[Term]:
        """What of the recovery trains the exits."""
        second = ExitDistillation()
        if layout.joins_late(model, [point.path for point in points], samples):
            second = replace(second, beta_het=0.0)  # it compares an exit's tokens with the last block's, one by one
        if self.train == "heads":
            return [second]
        kinds = {type(model.get_submodule(point.path)) for point in points}
        # Depth is counted in blocks; where exits stand behind modules of several kinds, in operations.
        counted = len(kinds) == 1 and not kinds & {nn.Sequential, nn.ModuleList}
        first = AlternatingExits() if counted else AlternatingExits(tuple(point.done for point in points), 1.0)
        numbers = [layout.number(point.path) for point in points]
        if counted and layout.stages and all(numbers):  # of blocks, also where the modules of one kind are stages
            first = AlternatingExits(tuple(numbers), len(layout.blocks))
        return [first, Afterwards(second)] if self.train == "both" else [first]

    def _open(self, plan: Plan, task: Task, own: Sequence[OwnExit]) -> Plan:
        """The plan with the network's own exits open."""
        if self.heads != "auto" or self.train != "heads":
            raise NotApplicable("the network has trained exits of its own, which get no other heads: leave out heads= "
                                "and train=")  # fmt: skip
        changed = self.opened(plan, task, own)
        # Where the model is trained anyway, its exits are too; else they stay as they came.
        return changed.with_recovery(OwnExits()) if plan.recovery else changed

    def opened(self, plan: Plan, task: Task, own: Sequence[OwnExit]) -> Plan:
        """The plan with those of the network's ``own`` exits open that ``at`` chooses, none of them trained."""
        _check_name(plan.model)
        chosen = [own[i] for i in self._chosen([exit.at for exit in own])]
        self._check_patience(len(chosen))
        model = attach_own_exits(clone(plan.model), [exit.at for exit in chosen])
        costs = own_exit_costs(model, task.shape, chosen)
        exits = [
            Exit(exit.at, self.rule, self.risk, cost=cost, heads=heads, carries=exit.carries, patience=self.patience)
            for exit, (cost, heads) in zip(chosen, costs, strict=True)
        ]
        names = ", ".join(exit.at for exit in chosen)
        return replace(plan.with_model(model.eval(), f"early_exit at its own {names}"), decisions=tuple(exits))

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

    def _paths(self, known: Sequence[str], model: nn.Module, places: Places | None) -> list[str]:
        if places is None:
            return list(known) if self.heads == "published" else evenly(known, 3)
        paths: list[str] = []
        for place in places:
            paths += known if place in EVERYWHERE else [_block(model, place) if isinstance(place, int) else place]
        return list(dict.fromkeys(paths))

    def only(self, places: tuple[str, ...]) -> Self:
        if self.rule in ("patience", "patient_and_confident"):
            return self  # an exit where nobody leaves counts for those behind it
        if self.heads == "published" and not self.among:
            return replace(self, at=places, among=EVERYWHERE if self.at is None else self.at)
        return replace(self, at=places)

    def training_form(self, places: tuple[str, ...] = ()) -> Self:
        """Heads at every place that a search would try, and at ``places``, trained once for all recipes that differ
        only in where and when samples leave. Published kinds go with the places, which then stay."""
        if self.heads == "published":
            at = (*self.among, *(self.at or ())) if self.among else self.at
            return replace(self, at=at, among=(), rule="confidence", risk=0.5, patience=2)
        return replace(self, at=(*EVERYWHERE, *places), rule="confidence", risk=0.5, patience=2)

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        own = [exit.at for exit in own_exits(plan.model)][:MOST]
        if own:
            some = [c for n in range(1, len(own) + 1) for c in combinations(own, n)]
            return {"at": some if len(own) <= 3 else [c for c in some if len(c) <= 2] + [tuple(own)],
                    "risk": (0.25, 0.5, 1.0, 2.0)}  # fmt: skip
        trained = exits_put_away(plan.model)
        known = trained.positions if trained is not None else positions(plan.model, plan.shape) if plan.shape else ()
        choices = [(p,) for p in known] + [tuple(evenly(known, n)) for n in (2, 3, 4, MOST) if n <= len(known)]
        if len(known) > 3:
            choices += [(known[0], known[-1]), (known[0], known[len(known) // 2]), tuple(known[:2])]
        return {"at": list(dict.fromkeys(choices)), "risk": (0.25, 0.5, 1.0, 2.0)}


def positions(model: nn.Module, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Paths of at most eight modules of ``model`` behind which an exit makes sense, in order of execution.

    Cut points between a third (tokens) or a seventh (feature maps, and transformers of several stages) and nine tenths
    of the operations; of a transformer's tokens those behind a block. Of neighbours the one that hands on the fewest
    numbers, then the outermost.
    """
    cache = _known.setdefault(model, {})
    if shape not in cache:
        points = [p for p in cut_points(model, shape) if len(p.shape) in (2, 3)]
        layout = _Layout.of(model, shape)
        start = TOKENS_FROM if not layout.stages else MAPS_FROM
        usable = [p for p in points if (start if len(p.shape) == 2 else MAPS_FROM) <= p.done <= UNTIL]
        if layout.stages:  # behind a block, and in front of the merging, where a stage ends with one
            usable = [p for p in usable if layout.ends_with_a_block(p.path, {q.path for q in points})]
        elif layout.blocks:  # patches that no block has seen yet know nothing of each other
            usable = [p for p in usable if len(p.shape) == 3 or token_grid(model, p.path) is not None]
        answers = _outputs(model, shape, [p.path for p in usable])
        usable = [p for p in usable if isinstance(answers[p.path], torch.Tensor)]  # a head reads one tensor
        cache[shape] = tuple(p.path for p in _best_of_bins(usable))
    return cache[shape]


@dataclass(frozen=True)
class _Layout:
    """How a network lays out what exits read. ``blocks``: the paths of a transformer's blocks, in order of execution;
    () for other networks. ``stages``: they stand in several stages, and their tokens are a map. ``prefix`` special
    tokens stand before the patches, the first of them a ``class_token``; ``distilled``: the second is for distillation;
    they may join the patches behind some block. ``grids`` are those that the patches may be of: the one that the model
    was built for, and those of this image; () where nothing says so. ``channels_last`` of maps, None where nothing says
    so. ``aspect``: height over width of the image."""

    blocks: tuple[str, ...] = ()
    stages: bool = False
    prefix: int = 0
    class_token: bool = False
    distilled: bool = False
    channels_last: bool | None = None
    aspect: float = 1.0
    grids: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, ...]) -> _Layout:
        known = {"NHWC": True, "NCHW": False}.get(str(getattr(model, "output_fmt", "")))
        aspect = shape[1] / shape[2] if len(shape) == 3 else 1.0
        found = find_token_blocks(model)
        if found is None:
            lists = _block_lists(model)
            points = {p.path: p.shape for p in cut_points(model, shape)} if len(lists) > 1 else {}
            blocks = tuple(path for paths in lists for path in paths)
            # The last block of a stage may share its output, and then its place, with the stage.
            shapes = [s for path, s in points.items() if any(f"{block}.".startswith(f"{path}.") for block in blocks)]
            if any(_of_tokens(s, known, aspect) for s in shapes):
                return cls(blocks, True, channels_last=known, aspect=aspect)
            prefix = int(getattr(model, "num_prefix_tokens", _token(model, "cls_token")))
            return cls((), False, prefix, bool(prefix), channels_last=known, aspect=aspect)
        owner = model.get_submodule(found.owner)
        inside = getattr(owner, "embeddings", None)
        class_token = any(_token(m, n) for m in (owner, inside) for n in ("cls_token", "class_token"))
        distilled = _token(owner, "dist_token") or _token(inside, "distillation_token")
        grids = [found.grid]
        if len(shape) == 3:  # a patch that stands over the edge may be left out or filled up
            down, across = (side / patch for side, patch in zip(shape[1:], found.patch, strict=True))
            grids += [(int(down), int(across)), (math.ceil(down), math.ceil(across))]
        return cls(tuple(found.paths(model)), False, found.prefix, class_token, distilled and found.prefix > 1, known,
                   aspect, tuple(dict.fromkeys(grids)))  # fmt: skip

    def ends_with_a_block(self, path: str, known: set[str]) -> bool:
        """Whether the module at ``path`` is a block, or answers with what its last block does. Of the ``known`` cut
        points that block is then none: where modules end with the same tensor, the outermost stands for them."""
        inside = [block for block in self.blocks if f"{block}.".startswith(f"{path}.")]
        return bool(inside) and (inside[-1] == path or inside[-1] not in known)

    def number(self, path: str) -> int:
        """How many blocks have run when the module at ``path`` has, which is one or ends with one; 0 for another."""
        return max((i + 1 for i, block in enumerate(self.blocks) if f"{block}.".startswith(f"{path}.")), default=0)

    def sort(self, sample: torch.Tensor) -> str:
        """What a module answers: tokens or a map of them, or a convolutional network's map."""
        if sample.ndim != 4:
            return "tokens"
        return "map of tokens" if self._last(sample) or self.stages else "map"

    def _last(self, sample: torch.Tensor) -> bool:
        """Whether a map's channels are the last of its sizes."""
        return channels_come_last(sample.shape[1:], self.aspect) if self.channels_last is None else self.channels_last

    def head(self, model: nn.Module, path: str, sample: torch.Tensor, classes: int, kind: str) -> nn.Module:
        """An untrained head of the ``kind`` for what the module at ``path`` answers."""
        grid, prefix = token_grid(model, path), self.prefix
        if not self.stages and sample.ndim == 3:
            found = self._tokens(model, path, sample.shape[1])
            if found is None and grid is not None:
                raise NotApplicable(
                    f"{path!r} answers with {sample.shape[1]} tokens, which are neither {grid[0]} x {grid[1]} patches "
                    f"nor these behind {prefix} special tokens; a block that hands on all patches would do"
                )
            grid, prefix = found or (grid, prefix)
        if self.stages and sample.ndim == 3:  # a stage, or the network, may have a class token (CvT, PiT)
            parts = path.split(".")
            around = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
            prefix = int(any(_token(module, "cls_token") for module in around))
            tokens = sample.shape[1] - prefix
            rows = max(1, round((tokens * self.aspect) ** 0.5))
            grid = (rows, tokens // rows)
        return build_head(
            sample, classes, kind, prefix=prefix, grid=grid, distilled=self.distilled and prefix > 1,
            channels_last=self._last(sample) if sample.ndim == 4 else None,
            class_token=self.class_token or self.stages, stages=self.stages,
        )  # fmt: skip

    def _tokens(self, model: nn.Module, path: str, count: int) -> tuple[tuple[int, int], int] | None:
        """The grid of the patches among ``count`` tokens behind ``path``, and how many special ones stand before them:
        all of them or, where they join behind, none. None where neither makes up the count."""
        own = token_grid(model, path)  # of the clusters, where the patches are clustered
        known = (*([own] if own else []), *self.grids)
        for prefix in (self.prefix, 0):
            patches = max(0, count - prefix)
            likely = round((patches * self.aspect) ** 0.5), round((patches / self.aspect) ** 0.5)
            for grid in known or (likely,):
                if patches and patches == grid[0] * grid[1]:
                    return grid, prefix
        return None

    def joins_late(self, model: nn.Module, paths: Sequence[str], samples: Mapping[str, Any]) -> bool:
        """Whether the last block has special tokens that join the patches behind one of ``paths``."""
        if not self.blocks or self.stages:
            return False
        read = [self._tokens(model, path, samples[path].shape[1]) for path in paths if samples[path].ndim == 3]
        last = samples.get(self.blocks[-1])
        end = self._tokens(model, self.blocks[-1], last.shape[1]) if isinstance(last, torch.Tensor) else None
        return end is not None and any(found is not None and found[1] != end[1] for found in read)


def _of_tokens(shape: tuple[int, ...], channels_last: bool | None, aspect: float) -> bool:
    """Whether a block's output, without the batch, is tokens (N, C) or a map of them (h, w, C), and no (C, h, w)."""
    if len(shape) == 3 and channels_last is None:
        channels_last = channels_come_last(shape, aspect)
    return len(shape) == 2 or (len(shape) == 3 and bool(channels_last))


def _token(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), torch.Tensor)


def _block_lists(model: nn.Module) -> list[list[str]]:
    """The paths of what stands in each list called ``blocks``, in order; lists inside such a list are left out."""
    lists: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        named = path.rpartition(".")[2] == "blocks" and not any(path.startswith(f"{other}.") for other in lists)
        if named and isinstance(module, nn.ModuleList | nn.Sequential) and len(module):
            lists[path] = [f"{path}.{name}" for name, _ in module.named_children()]
    return list(lists.values())


def _block(model: nn.Module, number: int) -> str:
    """The path of a transformer's block by its number, from 0; ``blocks.n`` where the model is none that is known."""
    found = find_token_blocks(model)
    paths = found.paths(model) if found is not None else [path for paths in _block_lists(model) for path in paths]
    root = isinstance(getattr(model, "blocks", None), nn.Module)
    return paths[number] if 0 <= number < len(paths) and not root else f"blocks.{number}"


def _heads_at(model: nn.Module, trained: Exits, points: Sequence[CutPoint]) -> list[nn.Module]:
    """Copies of the heads at these places of ``model``, whose tokens may be clustered. Raises NotApplicable where
    there is none."""
    for point in points:
        if point.path not in trained.positions:
            raise NotApplicable(
                f"the model arrives with trained exits behind {', '.join(trained.positions)}, and none behind "
                f"{point.path!r}; heads='published' or 'linear' gives it new ones anywhere"
            )
    heads = [copy.deepcopy(trained.heads[trained.positions.index(point.path)]).eval() for point in points]
    for point, head in zip(points, heads, strict=True):
        if isinstance(head, TokenExit) and token_clusters_of(model) is not None:
            head.grid = token_grid(model, point.path) or head.grid
    return heads


def _check_name(model: nn.Module) -> None:
    """Raise NotApplicable where no exits can be attached, since the model has something else of their name."""
    if hasattr(model, NAME) and exits_of(model) is None:
        raise NotApplicable(
            f"{type(model).__name__} has something else called {NAME!r}, the name that exits go by; rename it"
        )


def _check_read(point: CutPoint, sample: Any) -> None:
    """Raise NotApplicable where a module answers with more than the tensor that the model is cut at."""
    if not isinstance(sample, torch.Tensor) or tuple(sample.shape[1:]) != point.shape:
        raise NotApplicable(
            f"the module {point.path!r} answers with several tensors, and an exit reads one; take a module inside it, "
            "its last block for a stage"
        )


def _best_of_bins(points: Sequence[CutPoint]) -> list[CutPoint]:
    if not points:
        return []
    low, high = points[0].done, points[-1].done
    width = max(high - low, 1e-9) / MOST
    bins: dict[int, list[CutPoint]] = {}
    for point in points:
        bins.setdefault(min(MOST - 1, int((point.done - low) / width)), []).append(point)
    return [min(group, key=lambda p: (math.prod(p.shape), p.path.count("."), -p.done)) for group in bins.values()]


@torch.no_grad()
def _outputs(model: nn.Module, shape: tuple[int, ...], paths: Sequence[str]) -> dict[str, Any]:
    """What the modules answer to two zero inputs, as an exit reads it; the model's own answer under ""."""
    found: dict[str, Any] = {}
    handles = []
    for path in paths:

        def keep(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            found[path] = first_tensor(output)

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        found[""] = model(torch.zeros(2, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return found


def operations(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one input."""
    from torch.utils.flop_counter import FlopCounterMode

    # The counter hooks whatever asks for gradients, also where none are computed, and fails on a view of a parameter.
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *shape))
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
    return max(1, counter.get_total_flops() // 2)
