"""The joint graph of a model with early exits: one forward pass, every answer, every score, every boundary.

It is exported and quantised once, then cut at the boundaries; so all the stages share one set of ranges. A boundary may
be several tensors, of which a later one may repeat some.

Rules of patience look at several exits. What a score must know of those before it is one small tensor, which a boundary
carries beside the others; so a decision stays one comparison of a stage's own score.
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
from lissom.layers.exits import first_tensor
from lissom.layers.own_end import first_argument
from lissom.layers.saturation import Similarity
from lissom.runtime.decisions import RULES

__all__ = ["Joint", "JointOutputs", "joint_of"]

OF_LOGITS = ("confidence", "entropy", "difference", "normalised_entropy")  # rules whose score reads the answer alone


@dataclass(frozen=True)
class JointOutputs:
    """Where what stands among the joint graph's outputs, each tensor once.

    ``boundaries``: of each exit, the places of the tensors that are all that the stages behind it need; ``paths``: the
    modules whose outputs stand behind answers and scores, in order; ``runs``: how many exits hand a state on to the
    next one's score, each behind those.
    """

    boundaries: tuple[tuple[int, ...], ...] = ()
    paths: tuple[str, ...] = ()
    runs: int = 0

    @classmethod
    def of(cls, exits: Sequence[Exit]) -> JointOutputs:
        # A network's own exit answers with what its module says, which a boundary may carry too.
        places = {exit.at: i for i, exit in enumerate(exits) if exit.carries}
        paths: list[str] = []
        for path in (path for exit in exits for path in exit.boundary):
            if path not in places:
                places[path] = 2 * len(exits) + 1 + len(paths)
                paths.append(path)
        boundaries = [[places[path] for path in exit.boundary] for exit in exits]
        handing_on = [i for i, exit in enumerate(exits[:-1]) if exit.rule in RUNS]
        for number, i in enumerate(handing_on):
            boundaries[i].append(2 * len(exits) + 1 + len(paths) + number)
        return cls(tuple(map(tuple, boundaries)), tuple(paths), len(handing_on))

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
        return 2 * self.exits + 1 + len(self.paths) + self.runs


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
        rules = {e.rule for e in exits}
        if len(rules) > 1 and rules & set(RUNS):
            raise LissomError("a rule of patience is one of all exits, since it looks at those before")
        self.score = nn.ModuleList(_score(e) for e in exits)
        self.compared = tuple(e.at if e.rule == "similarity" else "" for e in exits)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        carried: dict[str, torch.Tensor] = {}
        handles = []
        for path in self.outputs.paths:

            def keep(module: nn.Module, inputs: object, output: object, path: str = path) -> None:
                found = first_tensor(output)
                if found is None:
                    raise LissomError(f"the model cannot be cut behind {path!r}, which answers with several tensors")
                carried[path] = found

            handles.append(self.model.get_submodule(path).register_forward_hook(keep))
        turned: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for path in filter(None, self.compared):

            def compare(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                found = first_tensor(output)
                assert found is not None  # a block of a stack
                turned[path] = first_argument(args, kwargs), found

            handles.append(self.model.get_submodule(path).register_forward_hook(compare, with_kwargs=True))
        try:
            answers = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        scores: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        for score, answer, path in zip(self.score, answers, self.compared, strict=False):
            if isinstance(score, AgreementRun | SureRun):
                own, state = score(answer, states[-1] if states else None)
                scores.append(own)
                states.append(state)
            else:
                scores.append(score(*(turned[path] if path else (answer,))))
        carried_on = (carried[path] for path in self.outputs.paths)
        return (*answers, *scores, *carried_on, *states[: self.outputs.runs])


def _score(exit: Exit) -> nn.Module:
    if exit.rule not in RULES:
        raise LissomError(f"an exit's rule is one of {', '.join(RULES)}, not {exit.rule!r}")
    if exit.rule == "similarity":
        return Similarity()
    return RUNS[exit.rule](exit.patience) if exit.rule in RUNS else Score(exit.rule)


class Score(nn.Module):
    """Logits (B, classes) -> (B,), higher where the answer is surer: the largest softmax share (confidence), that less
    the second largest (difference), or minus the softmax's entropy, in nats or over ln(classes). The score of
    ``similarity`` reads no logits (``lissom.layers.saturation``)."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        if rule not in OF_LOGITS:
            raise LissomError(f"a score of one answer's logits is by {', '.join(OF_LOGITS)}, not {rule!r}")
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


class AgreementRun(nn.Module):
    """The score of "patience" (arXiv 2006.04152): how many exits in a row, this one the last, say the same class.

    Logits (B, classes), and the state behind the exit before or None at the first, to the score (B,) and the state here
    (B, 2): the class and the score. Whole numbers, which float32 holds exactly.
    """

    def __init__(self, patience: int = 1) -> None:
        super().__init__()

    def forward(self, logits: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        best = logits.argmax(-1).to(logits.dtype)
        if before is None:
            run = torch.ones_like(best)
        else:
            run = before[:, 1] * (best == before[:, 0]).to(logits.dtype) + 1
        return run, torch.stack((best, run), 1)


class SureRun(nn.Module):
    """The score of "patient_and_confident": minus the largest entropy, in nats, of the last ``patience`` exits.

    It is above -t where each of them has an entropy below t. Logits (B, classes), and the state behind the exit before
    or None at the first, to the score (B,) and the state here, their entropies (B, patience), the latest first. Exits
    that were not there count with more than any entropy, ln(classes) + 1, so that the first ``patience`` - 1 exits
    have the same score for every sample.
    """

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience = patience

    def forward(self, logits: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        own = -(functional.softmax(logits, -1) * functional.log_softmax(logits, -1)).sum(-1, keepdim=True)
        if before is None:
            before = torch.zeros_like(own).expand(-1, self.patience) + (math.log(logits.shape[-1]) + 1)
        state = torch.cat((own, before[:, : self.patience - 1]), 1)
        return -state.amax(-1), state


# Rules whose score needs the answers of earlier exits.
RUNS: dict[str, type[AgreementRun] | type[SureRun]] = {"patience": AgreementRun, "patient_and_confident": SureRun}


def joint_of(plan: Plan) -> nn.Module:
    """What is exported of a plan: its model, or the joint one where there are decisions."""
    return Joint(plan.model, plan.decisions) if plan.decisions else plan.model
