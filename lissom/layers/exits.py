"""Early exits on a model as it stands: heads that read the outputs of some of its modules, attached by hooks.

The model keeps its class, its modules and their paths; the heads are registered under ``exits``. Its answer becomes a
tuple: one answer an exit in order of execution, then its own. In training a head reads a detached copy of its module's
output, so that heads learn and the rest does not feel them; ``detached=False`` trains both through each other.

A network may have exits of its own, with classifiers that were trained with it. It declares them by a method
``own_exits() -> Sequence[OwnExit]``, in order of execution; ``attach_own_exits`` makes its answer such a tuple too, out
of what those classifiers answer. The network's forward pass must then run them all, which it can tell by ``exits_of``.
A module that hooks made part of a network, as a child of the model, declares the model's exits by ``host_exits()``.

A model may also arrive with exits attached, trained with it (LGViT's published networks do). ``put_away_exits`` takes
them off and keeps them for whoever attaches them again; meanwhile the model answers with one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lissom.errors import LissomError

__all__ = [
    "ExitHook",
    "Exits",
    "OwnExit",
    "attach_exits",
    "attach_own_exits",
    "exits_of",
    "exits_put_away",
    "first_tensor",
    "own_answer",
    "own_exits",
    "put_away_exits",
    "remove_exits",
]

NAME = "exits"
AWAY = "exits_away"


@dataclass(frozen=True)
class OwnExit:
    """An exit that a network has by itself.

    ``at``: the path of the module that gives its answer, logits (B, classes). ``carries``: the paths of modules whose
    outputs, one tensor each, are together all that the network's later answers need of what came before.
    """

    at: str
    carries: tuple[str, ...]


class Exits(nn.Module):
    """The heads of a model with exits; ``positions`` are the paths of the modules they read, in order of execution.

    A head takes what its module answers (a tensor) and returns logits (B, classes). ``steps`` counts training steps
    for methods that alternate by step; it is a buffer, so that a resumed training goes on counting.
    """

    steps: torch.Tensor

    def __init__(self, positions: Sequence[str], heads: Sequence[nn.Module], detached: bool = True) -> None:
        super().__init__()
        if len(positions) != len(heads) or len(set(positions)) != len(positions):
            raise ValueError(f"{len(heads)} heads for {len(positions)} positions, each of which is named once")
        self.positions = tuple(positions)
        self.heads = nn.ModuleList(heads)
        self.detached = detached
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.seen: dict[int, torch.Tensor] = {}  # exit -> what its module answered in the forward pass under way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is: a model that calls all its children in turn (nn.Sequential) calls this one too."""
        return x

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which take nothing of a forward pass along."""
        return {**self.__dict__, "seen": {}}

    def select(self, positions: Sequence[str]) -> Exits:
        """The same heads at some of the positions only."""
        chosen = [p for p in self.positions if p in set(positions)]
        return Exits(chosen, [self.heads[self.positions.index(p)] for p in chosen], self.detached)


class ExitHook:
    """What exits register on modules of a model; ``remove_exits`` takes all of it off again. Hooks are classes, so that
    a copy of the model has hooks of its own."""


class _Start(ExitHook):
    """Hook before the model's forward pass: what is left of a pass that failed, or of a module run alone, is gone."""

    def __init__(self, exits: Exits) -> None:
        self.exits = exits

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.exits.seen.clear()


class _Look(ExitHook):
    """Forward hook of a module that an exit reads."""

    def __init__(self, exits: Exits, index: int) -> None:
        self.exits, self.index = exits, index

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = first_tensor(output)
        if found is None:
            raise TypeError(f"an exit reads one tensor, and {self.exits.positions[self.index]} answers {type(output)}")
        self.exits.seen[self.index] = found


class _Answer(ExitHook):
    """Forward hook of the model: its answer becomes that of every exit and its own."""

    def __init__(self, exits: Exits) -> None:
        self.exits = exits

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> tuple[torch.Tensor, ...]:
        exits = self.exits
        answers = []
        for index, head in enumerate(exits.heads):
            seen = exits.seen.pop(index, None)
            if seen is None:
                raise LissomError(f"an exit reads {exits.positions[index]!r}, which this forward pass did not run")
            answers.append(head(seen.detach() if exits.detached and seen.requires_grad else seen))
        return (*answers, own_answer(module, output))


def own_answer(model: nn.Module, output: Any) -> Any:
    """The model's own answer in its ``output``, of which it may give several at once, as some do in training.

    Of a named tuple the field ``logits``: torchvision's GoogLeNet and Inception v3 name the answers of their auxiliary
    heads behind it. Of a network that declares exits of its own the last. Raises LissomError for other tuples, which
    begin with the own answer or end with it, as their authors chose.
    """
    if not isinstance(output, tuple):
        return output
    if isinstance(named := getattr(output, "logits", None), torch.Tensor):
        return named
    if callable(getattr(model, "own_exits", None)):
        return output[-1]
    if (only := first_tensor(output)) is not None:
        return only
    raise LissomError(
        f"{type(model).__name__} gives {len(output)} answers at once, and which of them is its own cannot be told; let "
        "it answer with one tensor in training too, or with a named tuple whose field logits is its own answer"
    )


def first_tensor(output: Any) -> torch.Tensor | None:
    """What an exit reads of a module's answer: the tensor that it is, or that a tuple begins with and holds no other
    of (blocks of the transformers package answer so); None where it is neither."""
    if isinstance(output, tuple) and output and not any(isinstance(rest, torch.Tensor) for rest in output[1:]):
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def attach_exits(model: nn.Module, exits: Exits) -> nn.Module:
    """Attach ``exits`` to ``model``, in place, and return it; exits it had are removed first.

    Raises ValueError where the model has no module of a position's path, or something else called ``exits``.
    """
    remove_exits(model)
    if hasattr(model, NAME):
        raise ValueError(
            f"{type(model).__name__} has something else called {NAME!r}, the name that exits go by; rename it"
        )
    modules = dict(model.named_modules())
    for position in exits.positions:
        if position not in modules:
            raise ValueError(f"the model has no module {position!r} for an exit to read")
    for index, position in enumerate(exits.positions):
        modules[position].register_forward_hook(_Look(exits, index))
    model.add_module(NAME, exits)
    model.register_forward_pre_hook(_Start(exits))
    model.register_forward_hook(_Answer(exits))
    return model


def own_exits(model: nn.Module) -> tuple[OwnExit, ...]:
    """The exits that the network declares to have by itself, or that a child declares for it; none where none does."""
    declared = [getattr(model, "own_exits", None), *(getattr(child, "host_exits", None) for child in model.children())]
    return next((tuple(declare()) for declare in declared if callable(declare)), ())


def attach_own_exits(model: nn.Module, places: Sequence[str] | None = None) -> nn.Module:
    """Make the model answer at its own exits too, or at those of ``places`` (the ``at`` of each), in place.

    They keep their gradients: nothing is detached. Raises ValueError for a place that is none of its own exits, and
    where the network calls something ``exits``, its own exits' classifiers for one: that name is taken.
    """
    known = [exit.at for exit in own_exits(model)]
    chosen = known if places is None else [at for at in known if at in set(places)]
    if places is not None and (unknown := [at for at in places if at not in known]):
        raise ValueError(f"the model has no exit of its own at {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return attach_exits(model, Exits(chosen, [nn.Identity() for _ in chosen], detached=False))


def exits_of(model: nn.Module) -> Exits | None:
    """The exits attached to the model, or None."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Exits) else None


def remove_exits(model: nn.Module) -> nn.Module:
    """Take the exits off again, in place: the model answers with one tensor."""
    if exits_of(model) is None:
        return model
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, ExitHook):
                    del hooks[key]
    delattr(model, NAME)
    return model


def put_away_exits(model: nn.Module) -> nn.Module:
    """Take the exits off, in place, and keep them beside the model: copied with it, but no part of it."""
    exits = exits_of(model)
    if exits is not None:
        remove_exits(model)
        vars(model)[AWAY] = exits  # as a plain attribute: neither counted nor trained nor saved with the model
    return model


def exits_put_away(model: nn.Module) -> Exits | None:
    """The exits that ``put_away_exits`` keeps, or None."""
    found = vars(model).get(AWAY)
    return found if isinstance(found, Exits) else None
