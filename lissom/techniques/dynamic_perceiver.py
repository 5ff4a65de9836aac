"""dynamic_perceiver: easy inputs leave a CNN through tokens beside it, which alone early exits look at.

Dynamic Perceiver for Efficient Visual Recognition (Han et al. 2023, arXiv 2306.11248). The user's CNN keeps its
weights; a new branch of a few learned tokens meets its map in front of each of four stages, by hooks
(``lissom.layers.latent_branch``). It has three exits: of the tokens in front of stage 3's run and of stage 4's, and the
CNN's own classifier; the answer at the end is of both together. All are trained in the recovery, by the paper's losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone
from lissom.export.cuts import CutPoint, check_cut, cut_points
from lissom.export.plan import Plan
from lissom.layers.exits import own_exits
from lissom.layers.latent_branch import DEPTHS, STAGES, attach_latent_branch, check_sizes
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique
from lissom.techniques.early_exit import EarlyExit, operations
from lissom.training.methods.multi_exit_kd import OwnExits

__all__ = ["DynamicPerceiver", "stage_ends"]

HEAD = 3  # what shrinks a map so many times is the mean over it, and a classifier follows
WEIGHTS = (0.5, 0.5, 1.0)  # of the exits' own losses
ALPHA, TEMPERATURE = 0.5, 1.0  # of what the last answer teaches them


@register("technique", "dynamic_perceiver")
@dataclass(frozen=True)
class DynamicPerceiver(Technique):
    """Put latent tokens with three exits beside a CNN.

    ``latents`` tokens enter (a multiple of 8) and half of them go on at each stage; ``depths`` are layers of
    self-attention in front of each stage, ``widening`` that of their hidden layers. ``risk``: points of quality that
    the exits may cost, kept with a probability of 95 %. ``stages``: the paths of five modules, the one that gives the
    first stage's input and the last one of each of the four stages; () finds them. ``at`` (1 to 3, or paths) chooses
    among the exits, ``rule`` and ``patience`` say when an input leaves, as in early_exit.
    """

    name: ClassVar[str] = "dynamic_perceiver"
    stage: ClassVar[str] = "exits"
    refuses: ClassVar[Mapping[str, str]] = {
        "early_exit": "both say where inputs leave, and dynamic_perceiver has exits of its own; one of them would do"
    }

    latents: int = 128
    depths: tuple[int, ...] = DEPTHS
    widening: float = 4.0
    risk: float = 0.5
    stages: tuple[str, ...] = ()
    at: tuple[str | int, ...] | None = None
    rule: str = "confidence"
    patience: int = 2

    def __post_init__(self) -> None:
        if not _whole(self.latents):
            raise ValueError(f"latents is a whole number, not {self.latents!r}")
        if not isinstance(self.depths, tuple) or not all(map(_whole, self.depths)):
            raise ValueError(f"depths is four whole numbers, as in depths=(1, 1, 2, 1), not {self.depths!r}")
        check_sizes(self.latents, self.depths)
        if not isinstance(self.widening, int | float) or not self.widening > 0:
            raise ValueError(f"widening is a number above 0, not {self.widening!r}")
        if isinstance(self.stages, str) or len(self.stages) not in (0, STAGES + 1):
            raise ValueError(
                "stages names five modules: the one that gives the first stage's input, and the last one of each stage"
            )
        self._exits()

    def check(self, plan: Plan, target: Target) -> None:
        self._exits().check(plan, target)
        if own_exits(plan.model):
            raise NotApplicable("the network has exits of its own; early_exit() leaves through those")

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with a copy of the model and the branch beside it, its exits open.

        Raises NotApplicable where the model cannot be cut into four stages of maps.
        """
        if task.kind != "classification":
            raise NotApplicable("dynamic_perceiver answers for a whole image: it is for classification")
        if own_exits(plan.model):
            raise NotApplicable("the network has exits of its own; early_exit() leaves through those")
        points = stage_ends(plan.model, task.shape, self.stages)
        model = clone(plan.model)
        classes = _classes(model, task.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                attach_latent_branch(
                    model, [p.path for p in points], [p.shape for p in points], classes, latents=self.latents,
                    depths=self.depths, ratio=self.widening,
                )  # fmt: skip
            except ValueError as error:
                raise NotApplicable(f"dynamic_perceiver: {error}") from error
        beside = " > ".join(p.path for p in points)
        branched = plan.with_model(model.eval(), f"dynamic_perceiver: {self.latents} latents beside {beside}")
        own = own_exits(model)
        opened = self._exits().opened(branched, task, own)
        # Costs are shares of what the CNN does alone; the branch comes on top of it.
        ratio = operations(model, task.shape) / operations(plan.model, task.shape)
        decisions = tuple(
            replace(exit, cost=ratio * exit.cost, heads=ratio * (1 + exit.heads) - 1) for exit in opened.decisions
        )
        opened = replace(opened, decisions=decisions)
        weights = dict(zip((exit.at for exit in own), WEIGHTS, strict=True))
        return opened.with_recovery(
            OwnExits(weights=tuple(weights[exit.at] for exit in opened.decisions), alpha=ALPHA,
                     temperature=TEMPERATURE, taught_by="last")
        )  # fmt: skip

    def _exits(self) -> EarlyExit:
        """The same exits as that technique opens them."""
        return EarlyExit(at=self.at, rule=self.rule, risk=self.risk, patience=self.patience)

    def only(self, places: tuple[str, ...]) -> Self:
        return replace(self, at=self._exits().only(places).at)

    def training_form(self, places: tuple[str, ...] = ()) -> Self:
        """With all exits: they are trained once for every choice among them."""
        return replace(self, at=None, rule="confidence", risk=0.5, patience=2)

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        """Three sizes of the branch, each of which is trained, and the risks."""
        try:
            if own_exits(plan.model) or not plan.shape:
                return {}
            stage_ends(plan.model, plan.shape)
        except NotApplicable:
            return {}
        return {"latents": (16, 64, 128), "depths": ((1, 1, 2, 1), DEPTHS), "risk": (0.25, 0.5, 1.0, 2.0)}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@torch.no_grad()
def _classes(model: nn.Module, shape: tuple[int, ...]) -> int:
    answer = model(torch.zeros(1, *shape))
    if not isinstance(answer, torch.Tensor) or answer.ndim != 2:
        raise NotApplicable("dynamic_perceiver needs a model that answers with one tensor of logits (B, classes)")
    return int(answer.shape[1])


def stage_ends(model: nn.Module, shape: tuple[int, ...], stages: Sequence[str] = ()) -> list[CutPoint]:
    """Where a CNN falls into four stages: the place that gives the first its input, and the end of each, five.

    Given by ``stages``, or what timm says of its network's features (the last four), or found: a stage is what runs at
    one size of the maps; of more than four the last four count, and of fewer the ones with the most operations are
    halved. Raises NotApplicable where the model cannot be cut there, or has no maps (C, H, W) to cut it at.
    """
    if stages:
        points = [check_cut(model, shape, path) for path in stages]
        for point in points:
            if not _is_map(point, shape):
                raise NotApplicable(
                    f"dynamic_perceiver reads maps (C, H, W), and {point.path!r} answers with {point.shape}"
                )
        if any(a.done >= b.done for a, b in pairwise(points)):
            raise NotApplicable(f"stages are five places in order of execution, not {', '.join(stages)}")
        return points
    maps = [point for point in cut_points(model, shape) if _is_map(point, shape)]
    told = _by_features(model, shape, maps)
    return told if told is not None else _by_resolution(model, maps)


def _is_map(point: CutPoint, shape: tuple[int, ...]) -> bool:
    """Whether the output is a map (C, H, W) of the image's proportions, and not one with its channels last."""
    if len(point.shape) != 3 or len(shape) != 3:
        return False
    _, height, width = point.shape
    return abs(height * shape[2] - width * shape[1]) < max(shape[1:]) * 1.5


def _by_features(model: nn.Module, shape: tuple[int, ...], maps: Sequence[CutPoint]) -> list[CutPoint] | None:
    """The ends that timm names; None where it names fewer than four, other modules than this model has, or places
    that it cannot be cut at."""
    told = getattr(model, "feature_info", None)
    if not isinstance(told, list):
        return None
    names = [str(entry.get("module")) for entry in told if isinstance(entry, Mapping)]
    known = dict(model.named_modules())
    if len(names) < STAGES or not all(name in known for name in names):
        return None
    *before, first, second, third, fourth = names
    try:
        ends = [check_cut(model, shape, name) for name in (first, second, third, fourth)]
        behind = [check_cut(model, shape, name) for name in before[-1:]]
    except NotApplicable:
        return None
    if not all(_is_map(end, shape) for end in ends):
        return None
    # In front of the first stage: behind the map before it, and what stands between the two without operations.
    ahead = [p for p in maps if p.done < ends[0].done and not f"{p.path}.".startswith(f"{first}.")]
    if behind:
        ahead = [p for p in ahead if p.done <= behind[0].done] or behind
    found = [*ahead[-1:], *ends]
    whole = len(found) == STAGES + 1 and all(a.done < b.done for a, b in pairwise(found))
    return found if whole else None  # VGG's last map is only pooled


def _by_resolution(model: nn.Module, maps: Sequence[CutPoint]) -> list[CutPoint]:
    """Stages by the size of the maps."""
    groups: list[list[CutPoint]] = []
    for point in maps:
        if groups and groups[-1][-1].shape[1:] == point.shape[1:]:
            groups[-1].append(point)
        elif groups and groups[-1][-1].shape[1] >= HEAD * point.shape[1]:
            break
        else:
            groups.append([point])
    # What only pools belongs to no stage of its own.
    worked = [group for i, group in enumerate(groups) if i == 0 or group[-1].done > groups[i - 1][-1].done]
    refusal = NotApplicable(
        f"dynamic_perceiver stands on a CNN that can be cut into four stages of maps (C, H, W), and "
        f"{type(model).__name__} can be cut at {len(maps)} maps of {len(worked)} sizes; stages= names five modules of "
        "your choice"
    )
    if not worked:
        raise refusal
    # What the first of the four reads: the last map without operations of the stage's own, or the first one at all.
    if len(worked) > STAGES:
        before, worked = worked[-STAGES - 1], worked[-STAGES:]
        start = [p for p in worked[0] if p.done <= before[-1].done] or before
    else:
        start = [p for p in worked[0] if p.done <= worked[0][0].done]
    stages = [[p for p in worked[0] if p.done > start[-1].done], *worked[1:]]
    floor = start[-1].done
    while len(stages) < STAGES:
        halved = _halved([stage for stage in stages if stage], floor)
        if halved is None:
            raise refusal
        stages = halved
    if not all(stages):
        raise refusal
    return [start[-1], *(stage[-1] for stage in stages)]


def _halved(stages: list[list[CutPoint]], floor: float) -> list[list[CutPoint]] | None:
    """The same stages, the one with the most operations that can be halved in two; None where none can."""
    begins = [floor, *(stage[-1].done for stage in stages[:-1])]
    for i in sorted(range(len(stages)), key=lambda i: begins[i] - stages[i][-1].done):
        begin, end = begins[i], stages[i][-1].done
        inside = [p for p in stages[i] if begin < p.done < end]
        if inside:
            middle = min(inside, key=lambda p: abs(p.done - (begin + end) / 2)).done
            first = [p for p in stages[i] if p.done <= middle]
            return [*stages[:i], first, [p for p in stages[i] if p.done > middle], *stages[i + 1 :]]
    return None
