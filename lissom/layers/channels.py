"""Channels of a network: which belong together, what each costs, and the same network with fewer or more of them.

A channel is written by one layer and read by others. Shortcuts, depthwise and grouped convolutions, and layers that are
called twice tie channels of several layers together: they go together or not at all. torch-pruning's dependency graph
(DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900) tells which; here its groups become plain tables of indices, and
whether a removal is exact is found by doing it: on drawn weights, in double precision, the narrower network must answer
as the whole one does when what the next layers read of the removed channels is zero. Channels for which it does not
(an operator that mixes them, a number of channels written down in ``forward``) are left alone, with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lissom.errors import NotApplicable

__all__ = ["Axis", "Channels", "Group", "Layer", "find_channels", "mask_channels", "narrow"]

LOOSE, TIGHT = 1e-3, 1e-8  # relative difference of two computations of one answer, in single and double precision
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.RNNBase, nn.Embedding)
_NORMS = (_BatchNorm, _InstanceNorm)


class Axis(NamedTuple):
    """One side of one layer: the ``path`` of a module or a parameter, and "in" or "out". Norms have "out" alone."""

    path: str
    side: str


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: ``weights`` (without its bias), and ``macs``, multiply-accumulates on one input.

    ``grouped``: a convolution in groups (depthwise among them), whose cost is linear in its width. Of transposed
    convolutions the first dimension of the weight is the input's.
    """

    path: str
    weights: int
    macs: int
    grouped: bool
    transposed: bool = False


@dataclass(frozen=True)
class Group:
    """Channels of one width: ``size`` units, each a channel of every axis in ``places`` (of a flattened map several).

    ``places``: axis -> for each unit its indices there. ``stream``: several layers add to these channels, as to the
    stream of a residual network. ``name`` is the path of the first layer that writes them.
    """

    name: str
    size: int
    places: Mapping[Axis, tuple[tuple[int, ...], ...]] = field(repr=False)
    stream: bool = False


@dataclass(frozen=True)
class Channels:
    """What ``find_channels`` knows of a network.

    ``groups`` by name, in the order of the network; ``left``: path of a layer whose outputs stay -> why. ``layers`` by
    path. ``sizes``: width of every axis.
    """

    groups: Mapping[str, Group]
    left: Mapping[str, str]
    layers: Mapping[str, Layer]
    sizes: Mapping[Axis, int] = field(repr=False)
    extra: Mapping[Axis, int] = field(repr=False)  # parameters beside the layers' weights, by the axis they go with
    fixed: int = 0  # parameters that go with no axis

    @property
    def widths(self) -> dict[str, int]:
        """The network's own widths, by the groups' names."""
        return {name: group.size for name, group in self.groups.items()}

    def shares(self, widths: Mapping[str, float]) -> dict[Axis, float]:
        """Of each axis the share that is left at ``widths`` (groups that are not named keep theirs)."""
        left = dict.fromkeys(self.sizes, 1.0)
        for name, group in self.groups.items():
            gone = 1 - widths.get(name, group.size) / group.size
            if gone:
                for axis, units in group.places.items():
                    left[axis] -= gone * sum(map(len, units)) / self.sizes[axis]
        return left

    def cost(self, widths: Mapping[str, float] | None = None) -> tuple[float, float]:
        """(parameters, multiply-accumulates of convolutions and linear layers on one input) at ``widths``.

        Exact for whole widths: the parameters of the network that ``narrow`` makes.
        """
        share = self.shares(widths or {})
        parameters, macs = float(self.fixed), 0.0
        for layer in self.layers.values():
            rest = self.layer_share(layer, share)
            parameters += layer.weights * rest
            macs += layer.macs * rest
        return parameters + sum(count * share[axis] for axis, count in self.extra.items()), macs

    def layer_share(self, layer: Layer, share: Mapping[Axis, float]) -> float:
        """The share of its weights that a layer keeps, where its axes keep ``share``."""
        out = share[Axis(layer.path, "out")]
        return out if layer.grouped else out * share[Axis(layer.path, "in")]

    def densities(self, widths: Mapping[str, float]) -> dict[str, float]:
        """Layer -> share of its weights that is left at ``widths``."""
        share = self.shares(widths)
        return {path: self.layer_share(layer, share) for path, layer in self.layers.items()}

    def writers(self, group: Group) -> list[str]:
        """Paths of the layers that write the group's channels from others: grouped ones are not among them."""
        return [a.path for a in group.places if a.side == "out" and self._dense(a.path)]

    def readers(self, group: Group) -> list[str]:
        """Paths of the layers that read the group's channels and make others of them."""
        return [a.path for a in group.places if a.side == "in" and self._dense(a.path)]

    def _dense(self, path: str) -> bool:
        return path in self.layers and not self.layers[path].grouped


def find_channels(model: nn.Module, shape: tuple[int, ...]) -> Channels:
    """The channels of ``model`` that can be removed exactly, for inputs of ``shape`` (C, H, W); the model stays.

    Takes some seconds for a deep network. Raises NotApplicable where it has no convolution and no linear layer, where
    it does not run on the shape or cannot be followed, and where no channels can be removed.
    """
    copied = _copy(model)
    layers = {path: m for path, m in copied.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
    if not layers:
        raise NotApplicable("the network has no convolution and no linear layer, so there are no channels to remove")
    for path, layer in layers.items():
        if not isinstance(layer.weight, nn.Parameter):
            raise NotApplicable(
                f"the weight of {path!r} is computed anew at every call (a parametrization), so that no channel can be "
                "taken out of it; make it a plain one first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    traced = _Traced(copied, shape)
    found = traced.channels()
    trial = _Trial(copied, found, shape)
    reasons = trial.reasons(list(found.groups))
    good = {name: group for name, group in found.groups.items() if not reasons[name]}
    left = {**found.left, **{name: reason for name, reason in reasons.items() if reason}}
    if len(good) < len(found.groups) and good and (wrong := trial.difference(list(good))):
        raise NotApplicable(f"channels of {type(model).__name__} cannot be removed together: {wrong}")
    return _some(Channels(good, left, found.layers, found.sizes, found.extra, found.fixed), model)


def narrow(model: nn.Module, channels: Channels, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Keep, in place, only the units ``kept`` (group's name -> indices, ascending) and return the model.

    The answers are those of the model with what the next layers read of the others set to zero. An index that comes
    again behind the ascending ones repeats that channel, which makes a group wider; the answers are then others, for
    weights that are to be drawn anew. Groups that are not named keep all. The channels are those of this network or of
    one of the same structure.

    Raises NotApplicable for unknown groups, indices that are not there, and a group that would keep nothing.
    """
    for name, units in kept.items():
        group = channels.groups.get(name)
        if group is None:
            raise NotApplicable(f"the network has no channels of their own at {name!r} that could be removed")
        if not len(units) or not all(0 <= unit < group.size for unit in units):
            raise NotApplicable(f"of the {group.size} channels at {name!r} at least one stays, with numbers from 0 on")
    modules = dict(model.named_modules())
    for axis, index in _selections(channels, kept).items():
        if axis.path in modules:
            _select(modules[axis.path], axis.side, index)
        else:
            _select_parameter(model, axis.path, index)
    return model


@torch.no_grad()
def mask_channels(model: nn.Module, channels: Channels, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Set to zero, in place, what layers would read of all but the units ``kept``; the widths stay. Returns the model.

    What ``narrow`` is compared with: both answer alike.
    """
    for name, units in kept.items():
        group = channels.groups[name]
        gone = sorted(set(range(group.size)) - set(units))
        for path in channels.readers(group):
            index = [i for unit in gone for i in group.places[Axis(path, "in")][unit]]
            layer = model.get_submodule(path)
            assert isinstance(layer.weight, torch.Tensor)
            layer.weight.index_fill_(0 if channels.layers[path].transposed else 1, torch.tensor(index).long(), 0.0)
    return model


# Changing modules


def _selections(channels: Channels, kept: Mapping[str, Sequence[int]]) -> dict[Axis, torch.Tensor]:
    """Axis -> the indices that it keeps, in order; repeated ones stand behind the last of their group."""
    gone: dict[Axis, set[int]] = {}
    more: dict[Axis, dict[int, list[int]]] = {}  # index -> what is put in behind it
    for name, units in kept.items():
        group = channels.groups[name]
        whole = set(units)
        repeated = (
            [unit for place, unit in enumerate(units) if unit in units[:place]] if len(whole) < len(units) else []
        )
        for axis, indices in group.places.items():
            gone.setdefault(axis, set()).update(i for u in range(group.size) if u not in whole for i in indices[u])
            if repeated:
                last = max(i for unit in indices for i in unit)
                more.setdefault(axis, {})[last] = [i for unit in repeated for i in indices[unit]]
    selections = {}
    for axis in gone:
        index: list[int] = []
        for i in range(channels.sizes[axis]):
            index += [] if i in gone[axis] else [i]
            index += more.get(axis, {}).get(i, [])
        if index != list(range(channels.sizes[axis])):
            selections[axis] = torch.tensor(index, dtype=torch.long)
    return selections


def _select(module: nn.Module, side: str, index: torch.Tensor) -> None:
    count = len(index)
    if isinstance(module, _ConvNd):
        per_group = module.in_channels // module.groups
        # A grouped convolution's weight knows one side's channels alone: the other's are those of one group.
        if side == ("in" if module.transposed else "out"):
            _take(module, "weight", 0, index)
        elif module.groups == 1:
            _take(module, "weight", 1, index)
        if side == "out":
            _take(module, "bias", 0, index)
            module.out_channels = count
        else:
            module.groups = module.groups if module.groups == 1 else count // per_group
            module.in_channels = count
    elif isinstance(module, nn.Linear):
        _take(module, "weight", 0 if side == "out" else 1, index)
        if side == "out":
            _take(module, "bias", 0, index)
            module.out_features = count
        else:
            module.in_features = count
    elif isinstance(module, _NORMS):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(module, name, 0, index)
        module.num_features = count
    elif isinstance(module, nn.PReLU):
        _take(module, "weight", 0, index)
        module.num_parameters = count


def _take(module: nn.Module, name: str, dimension: int, index: torch.Tensor) -> None:
    """The parameter or buffer ``name`` with some of its values, where the module has it."""
    value = getattr(module, name)
    if not isinstance(value, torch.Tensor):
        return
    some = value.detach().index_select(dimension, index.to(value.device))
    setattr(module, name, nn.Parameter(some, value.requires_grad) if isinstance(value, nn.Parameter) else some)


def _select_parameter(model: nn.Module, path: str, index: torch.Tensor) -> None:
    owner, _, name = path.rpartition(".")
    value = model.get_parameter(path)
    _take(model.get_submodule(owner), name, _dimension(value), index)


def _dimension(parameter: torch.Tensor) -> int:
    """Where a parameter that belongs to no layer has its channels: the last dimension of more than one."""
    return max((i for i, n in enumerate(parameter.shape) if n > 1), default=0)


# Following a network


def _copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).cpu().float().eval()
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return copied


@contextlib.contextmanager
def _pairs_remembered() -> Iterator[None]:
    """torch-pruning follows indices to an operator again unless the very list of them was there before, and finds that
    out by going through all lists; where shifted slices of a map are added up, that takes minutes. Inside the block it
    looks up which indices were there: they are mapped one by one, so that those that were lead nowhere new."""
    from torch_pruning.dependency import graph, group

    class Remembering(group.Group):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._pairs: dict[tuple[Any, Any], set[Any]] = {}

        def add_dep(self, dep: Any, idxs: Any) -> None:
            self._pairs.setdefault((dep.target, dep.handler), set()).update(idxs)
            super().add_dep(dep, idxs)

        def has_pruning_op(self, dep: Any, idxs: Any) -> bool:
            return self._pairs.get((dep.target, dep.handler), set()).issuperset(idxs)

    before = graph.Group
    graph.Group = Remembering
    try:
        yield
    finally:
        graph.Group = before


class _Traced:
    """torch-pruning's graph of a network, as sets of places that belong together."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        import torch_pruning

        self.model, self.shape = model, shape
        self.paths: dict[Any, str] = {module: path for path, module in reversed(list(model.named_modules()))}
        self.parameters = {id(p): path for path, p in model.named_parameters()}
        self.graph = torch_pruning.DependencyGraph()
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # The layers' work first: a model that does not run is told in its own words.
                self.layers = self._work()
                self.graph.build_dependency(model, (torch.randn(1, *shape),), verbose=False)
        except Exception as error:  # a user's forward raises anything, and so does the tracing of it
            raise NotApplicable(
                f"the channels of {type(model).__name__} cannot be followed on inputs of shape {tuple(shape)}: "
                f"{_line(error)}"
            ) from error
        self.sizes: dict[Axis, int] = {}
        self._start: dict[Axis, int] = {}
        self._parent: list[int] = []
        self.reasons: dict[int, str] = {}  # place -> why it stays
        for module in [*self.graph.module2node, *(model.get_submodule(path) for path in self.layers)]:
            self._enter(module)

    def _work(self) -> dict[str, Layer]:
        """The layers that run, by path, in the order of their first calls."""
        macs: dict[str, int] = {}
        handles = []
        for path, module in self.model.named_modules():
            if isinstance(module, _ConvNd | nn.Linear):

                def count(module: nn.Module, inputs: Any, output: torch.Tensor, path: str = path) -> None:
                    layer: Any = module
                    across = inputs[0] if getattr(layer, "transposed", False) else output
                    width = layer.weight.shape[0]  # of what ``across`` is a map
                    macs[path] = macs.get(path, 0) + across[:1].numel() // width * layer.weight.numel()

                handles.append(module.register_forward_hook(count))
        try:
            with torch.no_grad():
                self.model(torch.randn(1, *self.shape))
        finally:
            for handle in handles:
                handle.remove()
        layers = {}
        for path, number in macs.items():
            found: Any = self.model.get_submodule(path)
            grouped, transposed = getattr(found, "groups", 1) > 1, getattr(found, "transposed", False)
            layers[path] = Layer(path, found.weight.numel(), number, grouped, transposed)
        return layers

    def channels(self) -> Channels:
        self._tie()
        self._hold()
        added = self._added()
        groups, left = self._groups(added)
        counted = {id(p) for path in self.layers for p in [self.model.get_parameter(f"{path}.weight")]}
        extra: dict[Axis, int] = {}
        fixed = 0
        for path, parameter in self.model.named_parameters():
            if id(parameter) in counted:
                continue
            owner = Axis(path.rpartition(".")[0], "out")
            axis = owner if owner in self.sizes else Axis(path, "out")
            if axis in self.sizes:
                extra[axis] = extra.get(axis, 0) + parameter.numel()
            else:
                fixed += parameter.numel()
        return Channels(groups, left, self.layers, self.sizes, extra, fixed)

    # Places: every index of every axis is one number; ``_parent`` is a forest of those that belong together.

    def _enter(self, module: Any) -> None:
        path = self._path(module)
        if path is None or Axis(path, "out") in self.sizes:
            return
        if isinstance(module, nn.Parameter):
            widths = {"out": module.shape[_dimension(module)]}
        elif isinstance(module, _ConvNd):
            widths = {"in": module.in_channels, "out": module.out_channels}
        elif isinstance(module, nn.Linear):
            widths = {"in": module.in_features, "out": module.out_features}
        elif isinstance(module, _NORMS):
            widths = {"out": module.num_features}
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            widths = {"out": module.num_parameters}
        else:
            return
        for side, width in widths.items():
            axis = Axis(path, side)
            self.sizes[axis], self._start[axis] = width, len(self._parent)
            self._parent += range(len(self._parent), len(self._parent) + width)

    def _path(self, module: Any) -> str | None:
        if isinstance(module, nn.Parameter):
            return self.parameters.get(id(module))
        return self.paths.get(module)

    def _root(self, place: int) -> int:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def _join(self, one: int, other: int) -> None:
        a, b = self._root(one), self._root(other)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def _stay(self, places: Iterable[int], reason: str) -> None:
        for place in places:
            self.reasons.setdefault(place, reason)

    def _all(self, axis: Axis) -> range:
        return range(self._start[axis], self._start[axis] + self.sizes[axis])

    def _tie(self) -> None:
        """What torch-pruning would remove together, asked once for each layer that no earlier answer holds whole."""
        seen: set[int] = set()
        for module in list(self.graph.module2node):
            path = self._path(module)
            if not isinstance(module, _ConvNd | nn.Linear) or path is None:
                continue
            axis = Axis(path, "out")
            if seen.issuperset(self._all(axis)):
                continue
            remove = self.graph.get_pruner_of_module(module).prune_out_channels
            try:
                with warnings.catch_warnings(), _pairs_remembered():
                    warnings.simplefilter("ignore")
                    group = self.graph.get_pruning_group(module, remove, list(range(self.sizes[axis])))
            except Exception as error:  # what it does not know ends in any error
                self._stay(self._all(axis), f"the operators behind it cannot be followed ({_line(error)})")
                continue
            for item in group.items:
                seen.update(self._item(axis, item))

    def _item(self, root: Axis, item: Any) -> list[int]:
        """Join one member of torch-pruning's group with its root; returns the places of outputs it names."""
        node, start = item.dep.target, self._start[root]
        module, path = node.module, self._path(node.module)
        if item.root_idxs is None or len(item.root_idxs) != len(item.idxs):
            self._stay(self._all(root), "the operators behind it cannot be followed")
            return []
        roots = [start + r if r is not None else -1 for r in item.root_idxs]
        # Of norms, depthwise convolutions and what is no layer both sides are one.
        side = "out" if self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if not node.outputs and side == "out":
            self._stay([r for r in roots if r >= 0], "it is the network's answer")
        if isinstance(module, _MIXING):
            self._stay([r for r in roots if r >= 0], f"a {type(module).__name__} mixes its channels")
        axis = Axis(path or "", side)
        if path is None or axis not in self.sizes:
            return []
        named = []
        for index, place in zip(item.idxs, roots, strict=True):
            if not 0 <= index < self.sizes[axis] or place < 0:
                self._stay(self._all(root), "the operators behind it cannot be followed")
                continue
            self._join(self._start[axis] + index, place)
            named.append(self._start[axis] + index)
        return named if side == "out" else []

    def _hold(self) -> None:
        """What belongs together within grouped convolutions, and what stays for reasons of its own."""
        weights = [self.model.get_parameter(f"{path}.weight") for path in self.layers]
        shared = {id(w) for i, w in enumerate(weights) if any(w is other for other in weights[:i])}
        for module, node in self.graph.module2node.items():
            path = self._path(module)
            if isinstance(module, _ConvNd | nn.Linear) and path is not None:
                sides = [self._all(Axis(path, side)) for side in ("in", "out")]
                if id(module.weight) in shared:
                    for places in sides:
                        self._stay(places, "several layers share its weights")
                if isinstance(module, _ConvNd) and module.groups > 1:
                    for places in sides:
                        per_group = len(places) // module.groups
                        for i, place in enumerate(places):
                            self._join(place, sides[0][i // per_group * (len(sides[0]) // module.groups)])
                    if not node.inputs:
                        self._stay(sides[0], "it reads the network's input")

    def _added(self) -> set[str]:
        """Paths of the layers whose outputs an addition joins with another layer's, or with an earlier map."""
        nodes = self.graph.module2node.values()
        sources: dict[int, frozenset[str]] = {}

        def behind(start: Any) -> frozenset[str]:
            """The layers that write what ``start`` gives: the nearest in front of it."""
            if id(start) in sources:
                return sources[id(start)]
            found, stack, seen = set(), [start], set()
            while stack:
                node = stack.pop()
                if id(node) in seen:
                    continue
                seen.add(id(node))
                path = self._path(node.module)
                if path in self.layers and not self._depthwise(node.module):
                    found.add(path)
                else:
                    stack += node.inputs
            sources[id(start)] = frozenset(str(p) for p in found)
            return sources[id(start)]

        joined: set[str] = set()
        for node in nodes:
            name = str(getattr(node.module, "_grad_fn", "")).lower()
            if "add" in name and "addmm" not in name and len(node.inputs) > 1:
                sides = [behind(other) for other in node.inputs]
                if sum(map(bool, sides)) > 1:
                    joined |= set().union(*sides)
        return joined

    @staticmethod
    def _depthwise(module: Any) -> bool:
        return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels

    def _groups(self, added: set[str]) -> tuple[dict[str, Group], dict[str, str]]:
        units: dict[int, dict[Axis, list[int]]] = {}
        reasons: dict[int, str] = {}
        for place, reason in self.reasons.items():
            reasons.setdefault(self._root(place), reason)
        for axis in self.sizes:
            for index, place in enumerate(self._all(axis)):
                units.setdefault(self._root(place), {}).setdefault(axis, []).append(index)
        order = {path: number for number, path in enumerate(self.layers)}
        alike: dict[frozenset[tuple[Axis, int]], list[dict[Axis, list[int]]]] = {}
        left: dict[str, str] = {}
        for root, places in units.items():
            writers = sorted((a.path for a in places if self._dense(a, "out")), key=lambda p: order[p])
            if not writers:
                continue  # the network's input
            if not any(self._dense(a, "in") for a in places):
                reasons.setdefault(root, "no layer is found to read its channels")
            if root in reasons:
                left.setdefault(writers[0], reasons[root])
                continue
            alike.setdefault(frozenset((a, len(i)) for a, i in places.items()), []).append(places)
        groups: dict[str, Group] = {}
        several: dict[tuple[int, str], list[frozenset[tuple[Axis, int]]]] = {}
        for key in alike:
            first = min((order[a.path], a.path) for a, _ in key if self._dense(a, "out"))
            several.setdefault(first, []).append(key)
        for (_, path), keys in sorted(several.items()):
            for number, key in enumerate(keys):
                members = alike[key]
                if len(members) < 2:  # a single channel cannot be removed
                    left.setdefault(path, "it has one channel")
                    continue
                axes = sorted((a for a, _ in key), key=lambda a: (order.get(a.path, len(order)), a))
                writing = [a.path for a in axes if self._dense(a, "out")]
                name = path if not number else f"{path}:{number + 1}"
                groups[name] = Group(
                    name, len(members), {a: tuple(tuple(m[a]) for m in members) for a in axes},
                    stream=len(writing) > 1 and any(p in added for p in writing),
                )  # fmt: skip
        return groups, {path: reason for path, reason in left.items() if path not in groups}

    def _dense(self, axis: Axis, side: str) -> bool:
        return axis.side == side and axis.path in self.layers and not self.layers[axis.path].grouped


# Doing it, to see whether it is exact


class _Trial:
    """A network with drawn weights, from which groups are removed to see what comes of it."""

    def __init__(self, model: nn.Module, channels: Channels, shape: tuple[int, ...]) -> None:
        self.channels = channels
        self.kept = {name: _trial(group.size, i) for i, (name, group) in enumerate(channels.groups.items())}
        with torch.no_grad():
            self.model = _drawn(copy.deepcopy(model))
            self.x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
            self.tolerance = TIGHT
            try:
                self.model, self.x = self.model.double(), self.x.double()
                self.model(self.x)
            except Exception:  # a model that makes single precision itself
                self.model, self.x, self.tolerance = self.model.float(), self.x.float(), LOOSE

    def reasons(self, names: Sequence[str]) -> dict[str, str]:
        """Group -> "", or why it cannot be removed: halved again and again where all together fail."""
        wrong = self.difference(names)
        if not wrong or len(names) == 1:
            return dict.fromkeys(names, wrong)
        half = len(names) // 2
        return {**self.reasons(names[:half]), **self.reasons(names[half:])}

    @torch.no_grad()
    def difference(self, names: Sequence[str]) -> str:
        """ "" where removing some channels of the groups ``names`` is exact; else why not, in a few words."""
        if not names:
            return ""
        kept = {name: self.kept[name] for name in names}
        try:
            wanted = _tensors(mask_channels(copy.deepcopy(self.model), self.channels, kept)(self.x))
            found = _tensors(narrow(copy.deepcopy(self.model), self.channels, kept)(self.x))
        except Exception as error:
            return f"without some of them the network does not run ({_line(error)})"
        for one, other in zip(wanted, found, strict=False):
            if one.shape != other.shape:
                return f"without some of them the answer is {tuple(other.shape)} and not {tuple(one.shape)}"
            if not torch.isfinite(one).all():
                return "its answers are not finite on drawn weights"
            if (one - other).abs().max() > self.tolerance * one.abs().max().clamp_min(1e-12):
                return "an operator mixes its channels"
        return "" if len(wanted) == len(found) else "the network answers with fewer tensors"


def _trial(size: int, number: int) -> list[int]:
    """What is kept of the group of that number where a removal is tried: each loses other channels, and another number
    of them, so that two groups that belong together without anybody knowing do not agree by chance."""
    gone = random.Random(number).sample(range(size), 1 + number % min(size - 1, 5))
    return [unit for unit in range(size) if unit not in gone]


def _drawn(model: nn.Module) -> nn.Module:
    """The model with weights from random numbers, at which no branch is silent (norms that begin at zero are)."""
    numbers = torch.Generator().manual_seed(0)
    for module in model.modules():
        normed = isinstance(module, _NORMS)
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not value.is_floating_point():
                continue
            buffer = not isinstance(value, nn.Parameter)
            if buffer and not normed:
                continue  # tables and fixed filters
            if normed and name in ("weight", "running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=numbers))
            elif value.ndim > 1:
                fan = math.prod(value.shape[1:])
                value.copy_(torch.randn(value.shape, generator=numbers) / fan**0.5)
            else:
                value.copy_(
                    0.5 * torch.randn(value.shape, generator=numbers) + (0.0 if name == "bias" or buffer else 1)
                )
    return model


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _some(found: Channels, model: nn.Module) -> Channels:
    if found.groups:
        return found
    reasons = list(dict.fromkeys(found.left.values()))
    why = f": {reasons[0]}" if len(reasons) == 1 else f", for {len(reasons)} reasons ({'; '.join(reasons[:3])})"
    raise NotApplicable(f"no channels of {type(model).__name__} can be removed{why if reasons else ''}")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
