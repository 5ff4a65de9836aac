"""subnet: a smaller network cut out of the model, in hidden width, heads and depth (Once-for-All, arXiv 1908.09791).

The model becomes a super-network (``lissom.training.supernet``), of which this technique takes one sub-network: of
every layer's hidden channels, and of the heads, the most important by the norm of their weights; of the blocks that may
be left out, those that change a drawn input most. What follows is one of two trainings, both with the original as the
teacher. By default the sub-network is trained by itself. With ``shared`` the super-network is, once for all recipes:
each takes its sub-network out of the trained one and gives it BatchNorm statistics of its own. A search offers shared
ones alone, so that many sub-networks cost one training. With ``tuned`` too it is then trained on by itself, as
Once-for-All's are that are told apart by their epochs of fine-tuning: what a search does to the few it may hand over.

A model that is a super-network already, as the published Once-for-All networks are, gives a sub-network by its own
choices.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Plan
from lissom.layers.elastic import ElasticNetwork, is_elastic, largest
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Choices, Subset, Technique
from lissom.training.methods.narrowed import Narrowed
from lissom.training.supernet import SHARE_OF_BLOCKS, WIDTHS, supernet_of

__all__ = ["Subnet"]

KINDS = {
    "expand": "hidden layers narrower",
    "width": "streams narrower",
    "heads": "attentions with fewer heads",
    "kernel": "kernels smaller",
}
NAMED = 3  # how many reasons a note tells
DEPTHS = (SHARE_OF_BLOCKS, 0.5, 0.75, 1.0)  # of uniform sub-networks in a search

# Of a model, by the shape of its input: its weights' marks and a super-network of a copy, which takes seconds to find.
_Opened = tuple[tuple[Any, ...], ElasticNetwork]
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], _Opened]] = weakref.WeakKeyDictionary()
_without: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[str, ...]]] = weakref.WeakKeyDictionary()


@register("technique", "subnet")
@dataclass(frozen=True)
class Subnet(Technique):
    """Keep a share of the hidden channels, the heads and the blocks.

    ``width``: of the hidden channels of every layer (widths from 32 on stay multiples of 8). ``heads``: of attention's
    heads, where it is written as timm's; None: as ``width``. ``stream``: of channels that several layers add to, as in
    a residual network's stages; dearer in accuracy, so left whole. ``depth``: of the blocks that take and give tensors
    of one shape. 1 keeps all.

    ``sizes`` says it for each dimension of the super-network by itself, in place of these shares: a tuple of (name,
    value) for those that are not whole, as in (("blocks.0.mlp.fc1.width", 0.5), ("blocks.depth", -2)), of one that has
    the widths and heads 0.5, 0.75 and 1 and keeps at least a quarter of each row of blocks. ``shared``: take the
    sub-network out of that super-network when it has been trained, once for all recipes that say so; its shares are
    then those. ``tuned``: train the one that was taken out on, by itself, for as long as a recovery lasts.
    """

    name: ClassVar[str] = "subnet"
    stage: ClassVar[str] = "structure"
    turn: ClassVar[int] = -1  # in front of low_rank: ranks are those of the layers that are left
    refuses: ClassVar[Mapping[str, str]] = {
        "cascade": "what changes a network stands in the members: cascade(first=(subnet()), second=(subnet()))",
        "converting": "converting labels images by the network as it is, and subnet changes it; slim with subnet "
        "first, and convert what comes of it",
    }

    width: float = 0.5
    heads: float | None = None
    stream: float = 1.0
    depth: float = 1.0
    shared: bool = False
    sizes: tuple[tuple[str, Any], ...] | None = None
    tuned: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "heads", "stream", "depth"):
            value = getattr(self, name)
            wrong = not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1
            if wrong and not (name == "heads" and value is None):
                raise ValueError(f"{name} is {value!r}; it is a share above 0 and at most 1")
        if not isinstance(self.shared, bool):
            raise ValueError(f"shared is True or False, not {self.shared!r}")
        if not isinstance(self.tuned, bool):
            raise ValueError(f"tuned is True or False, not {self.tuned!r}")
        if self.tuned and not self.shared:
            raise ValueError("tuned goes on after the shared training, and without shared there is none; give both")
        if self.sizes is not None:
            Choices.check("sizes", self.sizes)
            if (self.width, self.heads, self.stream, self.depth) != (0.5, None, 1.0, 1.0):
                raise ValueError("sizes say what stays; leave out width, heads, stream and depth beside them")
            if not self.sizes:
                raise ValueError("sizes name no dimension, which keeps the whole network; leave subnet out")
        elif (self.width, self._heads, self.stream, self.depth) == (1, 1, 1, 1):
            raise ValueError("all shares are 1, which keeps the whole network; give width or depth below 1")

    @property
    def _heads(self) -> float:
        return self.width if self.heads is None else self.heads

    def check(self, plan: Plan, target: Target) -> None:
        if len(plan.stages) != 1 or plan.decisions:
            raise NotApplicable("subnet comes before exits and cascades: it changes one whole model")
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        if sum(isinstance(m, kinds) for m in plan.model.modules()) < 2:
            raise NotApplicable("subnet narrows hidden layers, and the model has none; int8 works on single layers")

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with the sub-network, a note on what it keeps, and the wish to be trained.

        Raises NotApplicable where nothing would get smaller, where the super-network lacks what ``sizes`` names, and
        where a shared one lacks a share; LissomError where the model does not run on the task's shape.
        """
        if self.shared or self.sizes is not None:
            return self.taken(plan, self.super_network(plan, task), task)
        network: Any = clone(plan.model)
        if not is_elastic(network):
            network = supernet_of(
                network, task.shape, widths=(self.width,), heads=(self._heads,), streams=(self.stream,),
                blocks=self.depth,
            )  # fmt: skip
        return self.taken(plan, network, task)

    def taken(self, plan: Plan, network: ElasticNetwork, task: Task) -> Plan:
        """``plan`` with the sub-network of ``network``, a super-network of its model; as ``apply`` otherwise."""
        setting = self._setting(network)
        if setting == largest(network):
            raise NotApplicable("subnet finds no size of this super-network nearer to the shares than the whole")
        made = network.extract(setting)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (plan.model, made))
        note = f"subnet kept {_in_words(network, setting)}: {after / before:.0%} of the parameters{_left(network)}"
        own, others = _shapes(plan.model, task.shape), _shapes(made.eval(), task.shape)
        narrowed = tuple(path for path, shape in others.items() if own.get(path) != shape)
        return plan.with_model(made, note).with_recovery(Narrowed(narrowed))

    def super_network(self, plan: Plan, task: Task) -> Any:
        """What ``shared`` ones are taken out of, made of a copy of the plan's model: to be trained, or to be given
        trained weights. Raises NotApplicable where nothing can be made elastic."""
        return clone(_opened(plan.model, tuple(task.shape)))

    def _setting(self, network: Any) -> dict[str, Any]:
        if self.sizes is not None:
            known = {d.name: d for d in network.dimensions()}
            for name, value in self.sizes:
                if name not in known:
                    few = ", ".join(list(known)[:NAMED])
                    raise NotApplicable(
                        f"subnet is to set {name!r}, which the super-network has not; it has {few}, ... "
                        f"({len(known)} in all)"
                    )
                if value not in known[name].values:
                    raise NotApplicable(
                        f"subnet is to set {name} to {value!r}; it may be {', '.join(map(str, known[name].values))}"
                    )
            return largest(network) | dict(self.sizes)
        if self.shared and hasattr(network, "left"):  # made of a plain model: its shares are known
            for what, value, values in (
                ("width", self.width, WIDTHS),
                ("heads", self._heads, WIDTHS),
                ("stream", self.stream, (1.0,)),
            ):
                if value not in values:
                    raise NotApplicable(
                        f"the shared super-network has {what} {' or '.join(f'{v:g}' for v in values)}, not {value:g}; "
                        "subnet without shared=True takes any share, in a training of its own"
                    )
            if self.depth < SHARE_OF_BLOCKS:
                raise NotApplicable(
                    f"the shared super-network keeps at least {SHARE_OF_BLOCKS:g} of the blocks, not {self.depth:g}; "
                    "subnet without shared=True takes any share, in a training of its own"
                )
        found: dict[str, Any] = network.uniform(
            expand=self.width, heads=self._heads, width=self.stream, depth=self.depth
        )
        return found

    def training_form(self, places: tuple[str, ...] = ()) -> Self:
        """Of a shared one the super-network, which is the same for all."""
        return type(self)(shared=True) if self.shared else self

    def finished(self) -> Self | None:
        return replace(self, tuned=True) if self.shared and not self.tuned else None

    @classmethod
    def opening(cls, plan: Plan, target: Target) -> Self:
        return cls(shared=True)

    @classmethod
    def rungs(cls, plan: Plan, target: Target) -> tuple[Self, ...]:
        """Half and a quarter of the blocks: the opening says what widths are worth, these what depth is worth."""
        if not plan.shape:
            return ()
        try:
            network: Any = _opened(plan.model, plan.shape)
        except LissomError:  # the opening's trial says so
            return ()
        if not any(d.kind == "depth" for d in network.dimensions()):
            return ()
        asked = [cls(shared=True, width=1.0, depth=depth) for depth in reversed(DEPTHS[:2])]
        # Of a short row both may be the same number of blocks.
        return tuple({made.as_searched(plan): made for made in reversed(asked)}.values())[::-1]

    def as_searched(self, plan: Plan) -> Self:
        if not self.shared or self.sizes is not None or not plan.shape:
            return self
        try:
            network = _opened(plan.model, plan.shape)
            return type(self)(shared=True, sizes=_pairs(network, self._setting(network)), tuned=self.tuned)
        except (LissomError, ValueError):  # nothing elastic, no such share, or the whole network
            return self

    def left_out(self, plan: Plan) -> tuple[str, ...]:
        """The blocks, and the dimensions that lie in them. Shared ones and those with ``sizes`` alone: others are made
        of other super-networks."""
        if not plan.shape or not (self.shared or self.sizes is not None):
            return ()
        try:
            network: Any = _opened(plan.model, plan.shape)
            setting = self._setting(network)
        except LissomError:  # ``apply`` says so
            return ()
        dead = network.dead(setting) if callable(getattr(network, "dead", None)) else ()
        return (*_missing(network, setting), *sorted(dead))

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset | Choices]:
        """Sub-networks of one super-network, the uniform ones among them; their shares alone where the plan does not
        know the shape of an input."""
        if not plan.shape:
            return {"shared": (True,), "width": WIDTHS[:-1], "depth": DEPTHS}
        try:
            network: Any = _opened(plan.model, plan.shape)
        except LissomError:
            return {}
        uniform = [
            _pairs(network, network.uniform(expand=width, heads=width, depth=depth))
            for width in reversed(WIDTHS)
            for depth in reversed(DEPTHS)
        ]
        items = tuple((d.name, tuple(reversed(d.values))) for d in network.dimensions())
        return {"shared": (True,), "sizes": Choices(items, tuple(dict.fromkeys(pairs for pairs in uniform if pairs)))}


def _opened(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """The super-network of a copy of ``model`` with the shares that shared ones have; not to be changed.

    Raises NotApplicable where nothing can be made elastic.
    """
    tensors = (*model.parameters(), *model.buffers())
    marks = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    cache = _known.setdefault(model, {})
    if shape not in cache or cache[shape][0] != marks:
        network: Any = clone(model)
        cache[shape] = marks, network if is_elastic(network) else supernet_of(network, shape)
    return cache[shape][1]


def _pairs(network: ElasticNetwork, setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A setting as ``sizes``: the dimensions that are not whole."""
    return tuple((d.name, setting[d.name]) for d in network.dimensions() if setting[d.name] != d.values[-1])


def _missing(network: Any, setting: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of the network's modules that a sub-network lacks."""
    if callable(getattr(network, "left_out", None)):
        return tuple(network.left_out(setting))
    # A network made elastic by its author: what its depths leave out is seen in what is extracted.
    depths = {d.name: setting[d.name] for d in network.dimensions() if d.kind == "depth"}
    cache: dict[tuple[Any, ...], tuple[str, ...]] = _without.setdefault(network, {})
    key = tuple(depths.values())
    if key not in cache:
        there = {path for path, _ in network.extract(depths).named_modules()}
        cache[key] = tuple(path for path, _ in network.named_modules() if path not in there)
    return cache[key]


@torch.no_grad()
def _shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what each module gives, on zeros, where that is one tensor."""
    found: dict[str, tuple[int, ...]] = {}
    handles = []
    for path, module in model.named_modules():

        def look(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            if isinstance(output, torch.Tensor):
                found[path] = tuple(output.shape)

        handles.append(module.register_forward_hook(look))
    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()(torch.zeros(1, *shape).to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = training[name]
    return found


def _in_words(network: ElasticNetwork, setting: Mapping[str, Any]) -> str:
    """What of how many dimensions is smaller."""
    counts: dict[str, int] = {}
    fewer = 0
    for dimension in network.dimensions():
        most = dimension.values[-1]
        if dimension.kind == "depth":
            fewer += most - setting[dimension.name]
        elif setting[dimension.name] != most and dimension.kind in KINDS:
            counts[dimension.kind] = counts.get(dimension.kind, 0) + 1
    found = [f"{count} {KINDS[kind]}" for kind, count in counts.items()]
    return ", ".join([*found, *([f"{fewer} blocks fewer"] if fewer else [])])


def _left(network: ElasticNetwork) -> str:
    reasons: dict[str, int] = {}
    left: Mapping[str, str] = getattr(network, "left", {})
    for reason in left.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    told = [f"{count} ({reason})" for reason, count in list(reasons.items())[:NAMED]]
    return f"; layers left alone: {', '.join(told)}" if told else ""
