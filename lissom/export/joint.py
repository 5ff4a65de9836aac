"""The joint graph of a model with early exits: one forward pass, every answer, every score, every boundary.

It is exported and quantised once, then cut at the boundaries; so all the stages share one set of ranges. A boundary may
be several tensors, of which a later one may repeat some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.export.plan import Exit, Plan
from lissom.layers.own_end import first_argument
from lissom.layers.saturation import Similarity

__all__ = ["Joint", "JointOutputs", "joint_of"]

OF_LOGITS = ("confidence", "entropy", "difference", "normalised_entropy")  # rules whose score reads the answer alone


@dataclass(frozen=True)
class JointOutputs:
    """Where what stands among the joint graph's outputs, each tensor once.

    ``boundaries``: of each exit, the places of the tensors that are all that the stages behind it need; ``paths``: the
    modules whose outputs stand behind answers and scores, in order.
    """

    boundaries: tuple[tuple[int, ...], ...] = ()
    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, exits: Sequence[Exit]) -> JointOutputs:
        # A network's own exit answers with what its module says, which a boundary may carry too.
        places = {exit.at: i for i, exit in enumerate(exits) if exit.carries}
        paths: list[str] = []
        for path in (path for exit in exits for path in exit.boundary):
            if path not in places:
                places[path] = 2 * len(exits) + 1 + len(paths)
                paths.append(path)
        return cls(tuple(tuple(places[path] for path in exit.boundary) for exit in exits), tuple(paths))

    @property
    def exits(self) -> int:
        return len(self.boundaries)

    def answer(self, stage: int) -> int:
        """The answer of stage 0 to K, the number of exits; K is the model's own."""
        return stage

    def score(self, exit: int) -> int:
        return self.exits + 1 + exit

    def boundary(self, exit: int) -> tuple[int, ...]:
        return self.boundaries[exit]

    @property
    def count(self) -> int:
        return 2 * self.exits + 1 + len(self.paths)


class Joint(nn.Module):
    """``model`` (with exits attached) as one function of the input: K + 1 answers, K scores (B,), and what else K
    boundaries hold (``JointOutputs``).

    Modules of the model have the prefix ``model.`` here; the scores are computed under ``score``, of an exit's answer,
    or, by similarity, of what its module takes and gives.
    """

    def __init__(self, model: nn.Module, exits: Sequence[Exit]) -> None:
        super().__init__()
        self.model = model
        self.outputs = JointOutputs.of(exits)
        self.score = nn.ModuleList(Similarity() if e.rule == "similarity" else Score(e.rule) for e in exits)
        self.compared = tuple(e.at if e.rule == "similarity" else "" for e in exits)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        carried: dict[str, torch.Tensor] = {}
        handles = []
        for path in self.outputs.paths:

            def keep(module: nn.Module, inputs: object, output: torch.Tensor, path: str = path) -> None:
                carried[path] = output

            handles.append(self.model.get_submodule(path).register_forward_hook(keep))
        turned: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for path in filter(None, self.compared):

            def compare(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor, path: str = path) -> None:
                turned[path] = first_argument(args, kwargs), output

            handles.append(self.model.get_submodule(path).register_forward_hook(compare, with_kwargs=True))
        try:
            answers = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        read = [turned[path] if path else (answer,) for path, answer in zip(self.compared, answers, strict=False)]
        scores = [score(*tensors) for score, tensors in zip(self.score, read, strict=True)]
        return (*answers, *scores, *(carried[path] for path in self.outputs.paths))


class Score(nn.Module):
    """Logits (B, classes) -> (B,), higher where the answer is surer: the largest softmax share (confidence), that less
    the second largest (difference), or minus the softmax's entropy, in nats or over ln(classes). The score of
    ``similarity`` reads no logits (``lissom.layers.saturation``)."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        if rule not in OF_LOGITS:
            raise LissomError(f"a score of logits is by {', '.join(OF_LOGITS)}, not {rule!r}")
        self.rule = rule

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        shares = functional.softmax(logits, -1)
        if self.rule == "confidence":
            return shares.amax(-1)
        if self.rule == "difference":
            best = shares.topk(2, -1).values
            return best[..., 0] - best[..., 1]
        unit = math.log(logits.shape[-1]) if self.rule == "normalised_entropy" else 1.0
        return (shares * functional.log_softmax(logits, -1)).sum(-1) / unit


def joint_of(plan: Plan) -> nn.Module:
    """What is exported of a plan: its model, or the joint one where there are decisions."""
    return Joint(plan.model, plan.decisions) if plan.decisions else plan.model
