"""Technique: a change that makes a model cheaper; its fields are its knobs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from lissom.errors import LissomError
from lissom.export.plan import Plan
from lissom.runtime.target import Target
from lissom.tasks.task import Task

__all__ = ["STAGES", "Choices", "Probe", "Subset", "Technique"]

_ALWAYS = 0.25  # share of the draws of Choices

STAGES = ("fuse", "structure", "tokens", "exits", "cascade", "precision")


@dataclass(frozen=True)
class Subset:
    """A knob's space: any subset of ``items``, as a tuple in their order."""

    items: tuple[str, ...]

    def draw(self, rng: random.Random) -> tuple[str, ...]:
        """A random subset: mostly few items, at most a third of them; a policy that spares most saves nothing."""
        most = max(1, len(self.items) // 3)
        count = min(len(self.items), 1 + int(most * rng.random() ** 2))
        return tuple(sorted(rng.sample(self.items, count), key=self.items.index))


@dataclass(frozen=True)
class Choices:
    """A knob's space: of each named item one of a few values; ``items`` holds (name, values), the default first.

    A recipe writes such a knob as a tuple of (name, value), in the order of the items, for those that are not at their
    default; so () leaves everything as it is. ``always`` holds such tuples that are tried wherever only some can be:
    settings that give all items of a kind alike, say. Raises LissomError for an item that stands twice, has no value,
    or has one twice.
    """

    items: tuple[tuple[str, tuple[Any, ...]], ...]
    always: tuple[tuple[tuple[str, Any], ...], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.items]
        for name, values in self.items:
            if names.count(name) > 1 or not values or any(value in values[:i] for i, value in enumerate(values)):
                raise LissomError(
                    f"{name!r} stands twice among the items of a knob, or its values are none or repeated"
                )

    def draw(self, rng: random.Random) -> tuple[tuple[str, Any], ...]:
        """A random choice: one time in four one of ``always``; else of 1 to all items, their number drawn evenly, each
        with another value than its default."""
        if self.always and rng.random() < _ALWAYS:
            return rng.choice(self.always)
        free = [(name, values[1:]) for name, values in self.items if len(values) > 1]
        if not free:
            return ()
        moved = set(rng.sample(range(len(free)), rng.randint(1, len(free))))
        return tuple((name, rng.choice(values)) for i, (name, values) in enumerate(free) if i in moved)

    @staticmethod
    def check(knob: str, value: Any) -> None:
        """For constructors: raise ValueError where ``value`` is not written as a choice among items is."""
        pairs = isinstance(value, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
        )
        if not pairs:
            raise ValueError(f"{knob} is a tuple of (name, value), as in {knob}=(('blocks.0', 0.5),), not {value!r}")
        names = [name for name, _ in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{knob} names {twice[0]!r} twice")


# Of each (module, replacement, shape of an input without the batch): the module's time over the replacement's.
Probe = Callable[[Sequence[tuple[nn.Module, nn.Module, tuple[int, ...]]]], list[float]]


@dataclass(frozen=True)
class Technique:
    """Base of all techniques: a frozen dataclass whose fields are its knobs, with the paper's defaults.

    A technique changes structure only: ``apply`` trains nothing, reads no data and leaves its input untouched.
    """

    name: ClassVar[str]
    stage: ClassVar[str]  # one of STAGES: the place in the canonical order
    turn: ClassVar[int] = 0  # of two in one stage the lower comes first
    refuses: ClassVar[Mapping[str, str]] = {}  # other techniques that cannot stand in one recipe, and why

    def check(self, plan: Plan, target: Target) -> None:
        """Raise NotApplicable, with what would do, where this cannot work on the plan or the target. Milliseconds."""

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The changed plan."""
        raise NotImplementedError

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset | Choices]:
        """Knob name -> values worth searching on this plan. Empty: only the default."""
        return {}

    def variants(self, plan: Plan, target: Target) -> tuple[Self, ...]:
        """The settings an undecided knob (None) stands for; all are measured and the winner is kept."""
        return (self,)

    @classmethod
    def opening(cls, plan: Plan, target: Target) -> Self:
        """The setting that a search tries first, alone and with others: the defaults."""
        return cls()

    @classmethod
    def rungs(cls, plan: Plan, target: Target) -> tuple[Self, ...]:
        """Further settings that a search tries before it begins, with the others' openings: those from which it learns
        most, and which need no training of their own after the opening's."""
        return ()

    def as_searched(self, plan: Plan) -> Self:
        """The same setting with its knobs written as ``space`` writes them, where they can be written in two ways."""
        return self

    def left_out(self, plan: Plan) -> tuple[str, ...]:
        """Paths of the modules of ``plan`` that this technique leaves out: what a knob says of them, or of anything
        inside them, says nothing."""
        return ()

    def settle(self, plan: Plan, task: Task, probe: Probe) -> Self:
        """This technique with what the device decides written into its knobs: which layers gain from it. Called once
        before ``apply`` by those who can measure; ``probe`` compares modules on the device."""
        return self

    def finished(self) -> Self | None:
        """This technique with the training that is worth having for what is handed over, where a search ranks by a
        cheaper one; None where there is no other."""
        return None

    def only(self, places: tuple[str, ...]) -> Self:
        """This technique at some of its places alone: for those that stand at several, as exits do."""
        raise NotImplementedError(f"{self.name} has no places to choose from")

    def members(self) -> Mapping[str, Any]:
        """The recipes (``Recipe``) of the networks that this technique puts into one model, by the paths at which they
        stand there; none for most."""
        return {}

    def named_code(self) -> tuple[str, ...]:
        """What of its knobs names a user's own code, or something to be fetched: done only where the user said so."""
        return ()

    def training_form(self, places: tuple[str, ...] = ()) -> Self | None:
        """This technique as its recovery is trained: recipes that differ only in knobs that training does not feel
        share one training. None: others are trained without it, and the weights fit with it. ``places``: paths of exits
        that a recipe has and this form without them has not."""
        return self

    def knobs(self) -> dict[str, Any]:
        """The knobs that differ from their defaults, in the order of the fields."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (f.default if f.default is not dataclasses.MISSING else None)
        }

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.knobs().items())})"
