"""Where a model can be cut in two, read from its exported graph.

A module is a cut point when every way from the model's input to its answer leads through that module's output: what
comes after it needs nothing that comes before. Then the rest can be a graph of its own, run only when it is needed.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import capture
from lissom.layers.exits import OwnExit, exits_of

__all__ = ["CutPoint", "check_cut", "cut_points", "evenly", "own_exit_costs"]


# An export takes seconds, and one model is asked for many places.
_flows: weakref.WeakKeyDictionary[nn.Module, dict[tuple[tuple[int, ...], int], _Flow]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class CutPoint:
    """A module by its path, the shape of its output without the batch, and the share of the model's operations
    (convolutions and matrix products) that are done when it has answered."""

    path: str
    shape: tuple[int, ...]
    done: float


def evenly(paths: Sequence[str], count: int) -> list[str]:
    """``count`` of the places, evenly spread, the ends left out where there are more than enough."""
    if count >= len(paths):
        return list(paths)
    places = [round((i + 0.5) * len(paths) / count - 0.5) for i in range(count)]
    return [paths[i] for i in dict.fromkeys(places)]


def cut_points(model: nn.Module, shape: tuple[int, ...]) -> list[CutPoint]:
    """All cut points of a model for inputs of ``shape`` (C, H, W), in order of execution; its own answer is none.

    Where several modules end with the same tensor, the outermost stands for them. Raises LissomError where the model
    cannot be exported.
    """
    flow = _flow(model, shape)
    points: list[CutPoint] = []
    for node in flow.bottlenecks():
        path = flow.outermost(node)
        value = node.meta.get("val")
        if path and isinstance(value, torch.Tensor) and value.ndim > 1 and all(p.path != path for p in points):
            points.append(CutPoint(path, tuple(value.shape[1:]), flow.done(node)))
    return points


def check_cut(model: nn.Module, shape: tuple[int, ...], path: str) -> CutPoint:
    """The cut point behind the module ``path``.

    Raises NotApplicable where there is no such module, where it answers with no tensor or not exactly once, and where
    something after it still needs what comes before: then it names the modules on that way.
    """
    if path not in dict(model.named_modules()) or not path:
        raise NotApplicable(f"the model has no module {path!r} to cut behind")
    flow = _flow(model, shape)
    ends = flow.ends_of(path)
    if len(ends) != 1:
        what = "is never called" if not ends else f"hands on {len(ends)} tensors"
        raise NotApplicable(f"the model cannot be cut behind {path!r}, which {what}")
    (node,) = ends
    around = flow.way_around({node}, {flow.end})
    if around is not None:
        raise NotApplicable(
            f"the model cannot be cut behind {path!r}: its answer is reached from the input past it, through "
            + flow.named(around, flow.place[node])
        )
    return CutPoint(path, tuple(node.meta["val"].shape[1:]), flow.done(node))


def own_exit_costs(model: nn.Module, shape: tuple[int, ...], exits: Sequence[OwnExit]) -> list[tuple[float, float]]:
    """What each of a model's own ``exits`` costs: the share of the operations done when it has answered, and the part
    of it that only exits need. The model answers at all of them, and at no others (``attach_own_exits``).

    Shares are of what the model's own answer takes. Raises NotApplicable where a later answer is reached past what an
    exit says that it carries: then it names the modules on that way.
    """
    attached = exits_of(model)
    if attached is None or list(attached.positions) != [exit.at for exit in exits]:
        raise ValueError("the model answers at other exits than those; attach_own_exits first")
    flow = _flow(model, shape)
    answers = list(flow.end.args[0])  # type: ignore[call-overload]  # the nodes of the tuple that it answers with
    own = flow.needed([answers[-1]])
    total = max(1, flow.operations(own))
    costs, wanted = [], []
    for number, exit in enumerate(exits):
        boundary = []
        for path in exit.carries or (exit.at,):
            ends = flow.ends_of(path)
            if len(ends) != 1:
                raise NotApplicable(f"exit {exit.at!r} carries {path!r}, which hands on {len(ends)} tensors, not one")
            boundary += ends
        around = flow.way_around(set(boundary), set(answers[number + 1 :]))
        if around is not None:
            place = max(flow.place[node] for node in boundary)
            raise NotApplicable(
                f"the model cannot be cut at its exit {exit.at!r}: a later answer is reached from the input past what "
                f"the exit carries, through {flow.named(around, place)}"
            )
        wanted += [answers[number], *boundary]
        done = flow.needed(wanted)
        costs.append((flow.operations(done) / total, flow.operations(done - own) / total))
    return costs


def _flow(model: nn.Module, shape: tuple[int, ...]) -> _Flow:
    key = (tuple(shape), sum(1 for _ in model.modules()))  # a model that got other modules is another model
    known = _flows.setdefault(model, {})
    if key not in known:
        known[key] = _Flow(model, shape)
    return known[key]


class _Flow:
    """The exported graph of a model: which nodes depend on the input, and what leads from there to the answer."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        program = capture(model, shape)
        inputs = set(program.graph_signature.user_inputs)
        self.start = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs)
        (self.end,) = (n for n in program.graph.nodes if n.op == "output")
        self.nodes = list(program.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        behind = self._reach([self.start], lambda n: n.users)
        ahead = self._reach([self.end], lambda n: n.all_input_nodes)
        self.flow = [n for n in self.nodes if n in behind and n in ahead]  # in order of execution
        self.inside = set(self.flow)
        self._work = {node: _operations(node) for node in self.nodes}
        total = max(1, sum(self._work.values()))
        sums, self._done = 0, []
        for operations in self._work.values():
            sums += operations
            self._done.append(sums / total)

    @staticmethod
    def _reach(start: Iterable[torch.fx.Node], following: object) -> set[torch.fx.Node]:
        found, todo = set(start), list(start)
        while todo:
            for node in following(todo.pop()):  # type: ignore[operator]
                if node not in found:
                    found.add(node)
                    todo.append(node)
        return found

    def bottlenecks(self) -> list[torch.fx.Node]:
        """The nodes that every way from input to answer leads through, in order, input and answer left out."""
        # A node is one when, at its place, no edge leads from a node before it to one behind it.
        furthest, found = 0, []
        index = {node: i for i, node in enumerate(self.flow)}
        for i, node in enumerate(self.flow[:-1]):
            if i and furthest <= i:
                found.append(node)
            furthest = max([furthest, *(index[user] for user in node.users if user in index)])
        # The last one whose only way on is the answer is the answer itself.
        return [n for n in found if any(user.op != "output" for user in n.users)]

    def path(self, node: torch.fx.Node) -> str:
        """The innermost module that computes a node."""
        stack = self._stack(node)
        return stack[-1] if stack else ""

    @staticmethod
    def _stack(node: torch.fx.Node) -> list[str]:
        return [entry[0].partition("@")[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]

    def outermost(self, node: torch.fx.Node) -> str:
        """The outermost module whose output the node is: all that use it lie outside; "" where there is none."""
        for path in self._stack(node):
            if path and all(path not in self._stack(user) for user in node.users):
                return path
        return ""

    def ends_of(self, path: str) -> list[torch.fx.Node]:
        """The nodes of the flow that the module at ``path`` hands to others."""
        own = [n for n in self.flow if path in self._stack(n)]
        return [n for n in own if any(path not in self._stack(user) for user in n.users if user in self.inside)]

    def way_around(self, cut: set[torch.fx.Node], targets: set[torch.fx.Node]) -> list[torch.fx.Node] | None:
        """A shortest way from the input to one of ``targets`` that touches no node of ``cut``; None where there is
        none. Input and target are left out of it."""
        before: dict[torch.fx.Node, torch.fx.Node] = {}
        todo, seen = [self.start], {self.start, *cut}
        while todo:
            following = []
            for here in todo:
                for user in here.users:
                    if user in seen or user not in self.inside:
                        continue
                    seen.add(user)
                    before[user] = here
                    if user in targets:
                        way = [here]
                        while way[-1] in before:
                            way.append(before[way[-1]])
                        return way[-2::-1]  # from the first operation on; the input has no module
                    following.append(user)
            todo = following
        return None

    def named(self, way: list[torch.fx.Node], place: int) -> str:
        """The modules on a way past a cut at ``place``, those next to it."""
        names = list(dict.fromkeys(self.path(n) or "the model's own forward" for n in way))
        # What counts is where the way passes the cut; the rest of it may be hundreds of modules.
        passed = next((n for n in way if self.place[n] > place), way[-1] if way else None)
        if passed is None:
            return "the model's own forward"
        middle = names.index(self.path(passed) or "the model's own forward")
        low, high = max(0, middle - 3), min(len(names), middle + 3)
        return " > ".join(["..."] * (low > 0) + names[low:high] + ["..."] * (high < len(names)))

    def needed(self, nodes: Sequence[torch.fx.Node]) -> set[torch.fx.Node]:
        """These nodes and all that they are computed from."""
        return self._reach(nodes, lambda n: n.all_input_nodes)

    def operations(self, nodes: Iterable[torch.fx.Node]) -> int:
        """Multiply-accumulates of these nodes, roughly."""
        return sum(self._work[node] for node in nodes)

    def done(self, node: torch.fx.Node) -> float:
        return self._done[self.place[node]]


def _operations(node: torch.fx.Node) -> int:
    """Multiply-accumulates of a convolution or a product with weights, roughly; 0 for other nodes."""
    kind, value = str(node.target), node.meta.get("val")
    place = 2 if "addmm" in kind else 1
    if not isinstance(value, torch.Tensor) or not re.search(r"aten\.(conv\d|convolution|linear|addmm)", kind):
        return 0
    weight = node.args[place] if len(node.args) > place else None
    tensor = weight.meta.get("val") if isinstance(weight, torch.fx.Node) else None
    if not isinstance(tensor, torch.Tensor):
        return 0
    return value.numel() * tensor.numel() // max(1, value.shape[1] if "conv" in kind else value.shape[-1])
