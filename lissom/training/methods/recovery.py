"""Recovery: one training after techniques have changed a model; the sum of what each of them asked for.

A technique adds ``Term`` objects to its plan (``Plan.recovery``). One forward pass of the changed model and one of the
original serve all of them: terms read the answers, and the outputs of the modules they name. A technique whose parts
must be trained one after the other adds ``Phase`` objects instead; ``lissom.training.phases`` trains them in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.exits import exits_of, first_tensor, own_answer, own_exits
from lissom.tasks.task import Task
from lissom.training.methods.base import Method, unwrapped
from lissom.training.speed import whole

__all__ = ["Afterwards", "Answers", "Phase", "Recovery", "Seen", "Term"]


@dataclass(frozen=True)
class Seen:
    """What a model made of one batch. ``answers``: logits (B, classes) of every exit, the model's own last; a model
    without exits has one. ``features``: module path -> that module's output."""

    answers: tuple[torch.Tensor, ...]
    features: Mapping[str, torch.Tensor]

    @property
    def answer(self) -> torch.Tensor:
        return self.answers[-1]


@dataclass(frozen=True)
class Term:
    """One part of the loss of a recovery: a frozen dataclass whose fields are its settings.

    ``student`` and ``teacher`` name the modules whose outputs ``loss`` reads, by path. A term that must look at the
    models to know them overrides ``reads``. ``own_answer``: the loss teaches the model's own answer too, so that no
    other term need do it.
    """

    own_answer: ClassVar[bool] = False

    def student(self) -> Sequence[str]:
        return ()

    def teacher(self) -> Sequence[str]:
        return ()

    def reads(self, model: nn.Module, original: nn.Module) -> tuple[Sequence[str], Sequence[str]]:
        """The paths read of the changed model and of the original. Raises LissomError where they cannot be told."""
        return self.student(), self.teacher()

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        """Called once before training. Raises LissomError where the term cannot work."""

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters that this term wants trained."""
        return model.parameters()

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        """A scalar. ``teacher`` is without gradient; ``targets`` is None where the data have no labels."""
        raise NotImplementedError


@dataclass(frozen=True)
class Answers(Term):
    """The model's own answer, distilled from the original's: alpha T^2 KL + (1 - alpha) task loss (arXiv 1503.02531).

    Without labels alpha counts as 1. For segmentation the answers are maps (B, classes, H, W), softmax over classes.
    ``part`` is the path of the module whose parameters are trained, "" the model's own: all of them.
    """

    own_answer: ClassVar[bool] = True

    temperature: float = 2.0
    alpha: float = 0.7
    part: str = ""

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        return model.get_submodule(self.part).parameters()

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        t = self.temperature
        soft = t * t * kl(teacher.answer / t, student.answer / t)
        if targets is None or self.alpha == 1:
            return soft
        return self.alpha * soft + (1 - self.alpha) * task.loss(student.answer, targets)


@dataclass(frozen=True)
class Afterwards(Term):
    """A ``term`` for exits' heads that waits for a second training: when the first is done, the heads alone are trained
    by such terms, on detached features, with the trained model as the teacher."""

    term: Term = field(default_factory=Term)


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL divergence of softmax over dimension 1, summed there, the mean over everything else: logits of one shape."""
    own, given = functional.log_softmax(student, 1), functional.log_softmax(teacher, 1)
    return functional.kl_div(own, given, reduction="none", log_target=True).sum(1).mean()


@dataclass(frozen=True)
class Phase:
    """One of several trainings that follow each other: the ``terms`` of one are minimised together.

    ``of`` is the path of the module that is trained as a model of its own, "" the whole changed model: it takes the
    same inputs and gives the same kind of answers, and terms know it by its own paths. ``heads``: nothing but the heads
    of its exits is trained, on detached features, with the model itself as the teacher. ``length`` is in units of a
    recovery without phases: how many times as many epochs and steps this phase lasts. What a phase needs of the phases
    before it (labels that a part gives, say) its terms find in ``prepare``, which is called when those are trained.
    """

    terms: tuple[Term, ...]
    of: str = ""
    length: float = 1.0
    heads: bool = False

    def __post_init__(self) -> None:
        if not self.terms or not self.length > 0:
            raise LissomError(f"a phase has terms and a length above 0, not {len(self.terms)} and {self.length}")


@dataclass(frozen=True)
class Recovery(Method):
    """Trains a changed model on the sum of ``terms``, with the ``original`` (never trained) as the teacher.

    Without an original the model's own answers teach, detached: for terms that train nothing but exits, while ``fit``
    keeps all else in eval mode.
    """

    original: nn.Module | None = None
    terms: tuple[Term, ...] = field(default_factory=lambda: (Answers(),))

    @property
    def teacher(self) -> nn.Module | None:
        return self.original

    def prepare(self, model: nn.Module, task: Task) -> None:
        if self.original is model:
            raise LissomError("a recovery learns from the original model: give original=, another than the model")
        if not self.terms:
            raise LissomError("a recovery without terms has nothing to learn")
        if any(isinstance(term, Afterwards) for term in self.terms):
            raise LissomError("a recovery is one training; what comes afterwards takes a second one")
        original = model if self.original is None else self.original
        if self.original is None:
            heads = getattr(model, "exits", None)
            inside = {id(p) for p in heads.parameters()} if isinstance(heads, nn.Module) else set()
            if any(id(p) not in inside for p in self.parameters(model)):
                raise LissomError("only exits can learn from the model they stand on; give the original= for the rest")
        else:
            original.eval()
        for term in self.terms:
            for where, module, paths in zip(
                ("changed", "original"), (model, original), term.reads(model, original), strict=True
            ):
                known = dict(module.named_modules())
                missing = [path for path in paths if path not in known]
                if missing:
                    raise LissomError(f"{type(term).__name__} reads {missing[0]!r}, which the {where} model lacks")
        for term in self.terms:
            term.prepare(model, original, task)

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        wanted = {id(p) for term in self.terms for p in term.parameters(model)}
        return [p for p in model.parameters() if id(p) in wanted]

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        inner = unwrapped(model)  # paths and parameters are the wrapped model's
        if self.original is None:
            reads = [term.reads(inner, inner) for term in self.terms]
            student = _look(model, inputs, [path for pair in reads for paths in pair for path in paths])
            seen = {p: f.detach() if isinstance(f, torch.Tensor) else f for p, f in student.features.items()}
            teacher = Seen(tuple(answer.detach() for answer in student.answers), seen)
        else:
            original = self.original.to(inputs.device).eval()
            reads = [term.reads(inner, original) for term in self.terms]
            with torch.no_grad():
                teacher = _look(original, inputs, [path for _, paths in reads for path in paths])
            # In mixed precision a teacher's answers are float32, what its layers gave is not yet.
            teacher = replace(teacher, features=whole(dict(teacher.features)))
            student = _look(model, inputs, [path for paths, _ in reads for path in paths])
        losses = [term.loss(inner, student, teacher, targets, task) for term in self.terms]
        return torch.stack(losses).sum()


def _look(model: nn.Module, inputs: torch.Tensor, paths: Iterable[str]) -> Seen:
    """One forward pass, with the outputs of the named modules."""
    inner = unwrapped(model)
    features: dict[str, torch.Tensor] = {}
    handles = []
    for path in dict.fromkeys(paths):

        def keep(module: nn.Module, arguments: Any, output: Any, path: str = path) -> None:
            found = first_tensor(output)
            features[path] = output if found is None else found

        handles.append(inner.get_submodule(path).register_forward_hook(keep))
    try:
        output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if exits_of(inner) is None and not own_exits(inner):
        output = own_answer(inner, output)  # what auxiliary heads answer besides is no exit's answer
    return Seen(output if isinstance(output, tuple) else (output,), features)
