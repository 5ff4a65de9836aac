"""subnet: a smaller network cut out of the model, in hidden width, heads and depth (Once-for-All, arXiv 1908.09791).

The model becomes a super-network (``lissom.training.supernet``), of which this technique takes one sub-network: of
every layer's hidden channels, and of the heads, the most important by the norm of their weights; of the blocks that may
be left out, those that change a drawn input most. The training that follows learns from the original. To choose among
many sub-networks of one training, train the super-network itself (``lissom fit --method delayed_shrinking`` for a
network of that kind, ``supernet_of`` for any) and extract what is wanted. A model that is a super-network already, as
the published Once-for-All networks are, gives a sub-network by its own choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Plan
from lissom.layers.elastic import ElasticNetwork, is_elastic, largest
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Subset, Technique
from lissom.training.methods.narrowed import Narrowed
from lissom.training.supernet import supernet_of

__all__ = ["Subnet"]

KINDS = {"expand": "hidden layers narrower", "width": "streams narrower", "heads": "attentions with fewer heads"}
NAMED = 3  # how many reasons a note tells


@register("technique", "subnet")
@dataclass(frozen=True)
class Subnet(Technique):
    """Keep a share of the hidden channels, the heads and the blocks.

    ``width``: of the hidden channels of every layer (widths from 32 on stay multiples of 8). ``heads``: of attention's
    heads, where it is written as timm's; None: as ``width``. ``stream``: of channels that several layers add to, as in
    a residual network's stages; dearer in accuracy, so left whole. ``depth``: of the blocks that take and give tensors
    of one shape. 1 keeps all.
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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            wrong = not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1
            if wrong and not (name == "heads" and value is None):
                raise ValueError(f"{name} is {value!r}; it is a share above 0 and at most 1")
        if (self.width, self._heads, self.stream, self.depth) == (1, 1, 1, 1):
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

        Raises NotApplicable where nothing would get smaller, LissomError where the model does not run on the task's
        shape.
        """
        network: Any = clone(plan.model)
        if not is_elastic(network):
            network = supernet_of(
                network, task.shape, widths=(self.width,), heads=(self._heads,), streams=(self.stream,),
                blocks=self.depth,
            )  # fmt: skip
        setting = network.uniform(expand=self.width, heads=self._heads, width=self.stream, depth=self.depth)
        if setting == largest(network):
            raise NotApplicable("subnet finds no size of this super-network nearer to the shares than the whole")
        made = network.extract(setting)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (plan.model, made))
        note = f"subnet kept {_in_words(network, setting)}: {after / before:.0%} of the parameters{_left(network)}"
        own, others = _shapes(plan.model, task.shape), _shapes(made.eval(), task.shape)
        narrowed = tuple(path for path, shape in others.items() if own.get(path) != shape)
        return plan.with_model(made, note).with_recovery(Narrowed(narrowed))

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset]:
        return {"width": (0.35, 0.5, 0.7), "depth": (0.75, 1.0)}


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
