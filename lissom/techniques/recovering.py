"""One recovery training for what a recipe changed, kept on disk and shared by recipes that train alike."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.plan import Plan
from lissom.layers.exits import exits_of
from lissom.runtime.artifact import write_atomic
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import STAGES
from lissom.techniques.cascade import Cascade
from lissom.techniques.recipe import Recipe
from lissom.techniques.subnet import Subnet
from lissom.training.loop import FitEvent, FitResult, fit
from lissom.training.methods.recovery import Afterwards, Answers, Phase
from lissom.training.methods.shared_recovery import SharedRecovery
from lissom.training.phases import fit_phases
from lissom.training.recalibration import recalibrate

__all__ = ["Recoverer", "Training"]

BATCH = 128
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Training:
    """How long one training of a recovery, or one of its phases, was: the optimizer's steps, how often it saw each
    image, and seconds."""

    steps: int
    passes: float
    seconds: float


class Recoverer:
    """Trains plans that ask for it; ``folder`` keeps the weights, so that a resumed run trains nothing twice.

    A training lasts at most ``epochs`` epochs, ``steps`` steps and ``seconds`` (None: no limit; with a limit
    in seconds, results depend on the machine's speed). Where it has phases, epochs and steps are multiplied by each
    one's length, and they share the seconds. Its seed is a hash of ``seed``, the recipe and the data's name.
    ``trainings`` are those that the plan recovered last rests on, in their order, kept ones among them.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        target: Target,
        folder: Path,
        *,
        epochs: int,
        steps: int | None = None,
        seconds: float | None,
        seed: int,
        progress: Callable[[FitEvent], None] | None = None,
        threads: int | None = None,
    ) -> None:
        self.plan, self.task, self.target, self.folder = plan, task, target, folder
        self.epochs, self.steps, self.seconds, self.seed = epochs, steps, seconds, seed
        self.progress, self.threads = progress, threads
        # The sub-network taken out last, what it was, and its trainings.
        self._last: tuple[str, Plan, list[Training]] | None = None
        self.trainings: list[Training] = []

    def recover(self, recipe: Recipe, plan: Plan) -> Plan:
        """``plan``, which ``recipe`` made, with trained weights; as it is where no technique asks for training.

        Raises NotApplicable where there is nothing to train on.
        """
        self.trainings.clear()
        return self._recovered(recipe, plan)

    def _recovered(self, recipe: Recipe, plan: Plan) -> Plan:
        cascade = next((t for t in recipe.techniques if isinstance(t, Cascade)), None)
        if cascade is not None:
            return self._members(recipe, cascade, plan)
        if not plan.recovery:
            return plan
        if self.task.fit is None or len(self.task.fit) == 0:
            raise NotApplicable("this recipe needs a training, and the data have nothing to train on: give a train/")
        shared = next((t for t in recipe.techniques if isinstance(t, Subnet) and t.shared), None)
        if shared is not None:
            return self._taken_out(recipe, shared)
        form = training_form(recipe)
        trained = form.apply(self.plan, self.task, self.target)
        own, given = exits_of(plan.model), exits_of(trained.model)
        if own is not None and given is not None and not set(own.positions) <= set(given.positions):
            form = training_form(recipe, tuple(p for p in own.positions if p not in given.positions))
            trained = form.apply(self.plan, self.task, self.target)
        self._trained(trained, self._name(form))
        return plan.with_model(adopt(plan.model, trained.model))

    def _name(self, form: Recipe) -> str:
        return hashlib.sha256(f"{self.seed} {form} {self.task.name}".encode()).hexdigest()[:16]

    def _taken_out(self, recipe: Recipe, subnet: Subnet) -> Plan:
        """The recipe on its sub-network of the trained super-network: with BatchNorm statistics of its own, and trained
        on where it is ``tuned``.

        To what follows in the recipe that sub-network is the original: exits learn from it, and what changes its
        structure is trained with it as the teacher, in a folder of its own. ``fuse`` comes then too, since statistics
        that are folded cannot be taken anew.
        """
        place = next(i for i, t in enumerate(recipe.techniques) if t is subnet)
        front = [t for t in recipe.techniques[:place] if t.stage != "fuse"]
        rest = Recipe(tuple(t for t in recipe.techniques if t is not subnet and not any(t is f for f in front)))
        start = self.plan
        for technique in front:
            start = technique.apply(start, self.task)
        name = self._name(Recipe((*(t.training_form() or t for t in front), subnet.training_form())))
        text = f"{name} {subnet.as_searched(start)}"
        before = len(self.trainings)
        # Recipes that differ in precision alone come one after the other, and share the conversion of one model.
        if self._last is None or self._last[0] != f"{self.folder} {text}":
            network = subnet.super_network(start, self.task)
            shared = SharedRecovery(original=self.plan.model)
            self._once(network, name, partial(fit, network, self.task, method=shared, resume=True))
            own = subnet.taken(start, network, self.task)
            assert self.task.fit is not None
            recalibrate(own.model, self.task.fit)
            if subnet.tuned:
                self._trained(own, hashlib.sha256(f"tuned {text}".encode()).hexdigest()[:16])
            own = replace(own, recovery=())
            self._last = f"{self.folder} {text}", own, self.trainings[before:]
        else:
            self.trainings += self._last[2]
        own = self._last[1]
        plan = own
        for technique in rest.techniques:
            plan = technique.apply(plan, self.task)
        if not plan.recovery:
            return plan
        other = copy.copy(self)
        other.plan = own
        other.folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        return other._recovered(rest, plan)

    def _once(self, model: nn.Module, name: str, train: Callable[..., FitResult | Sequence[FitResult]]) -> None:
        """Give ``model`` its trained weights: those in the folder, or what ``train``, given the settings of a fit,
        makes of it."""
        path = self.folder / f"{name}.safetensors"
        said = path.with_suffix(".json")
        if path.exists():
            model.load_state_dict(load_file(path))
            if said.exists():  # runs of before 2026-11-28 have none
                self.trainings += [Training(**each) for each in json.loads(said.read_text(encoding="utf-8"))]
            return
        results = train(
            epochs=self.epochs,
            max_steps=self.steps,
            time_limit=self.seconds,
            batch=BATCH,
            lr=LEARNING_RATE,
            seed=int(name[:7], 16),
            folder=self.folder / name,
            progress=self.progress,
            threads=self.threads,
            precision="auto",
        )
        every = [results] if isinstance(results, FitResult) else results
        own = [Training(r.steps, r.passes, r.seconds) for r in every]
        self.trainings += own
        write_atomic(said, json.dumps([asdict(each) for each in own]))
        _keep(model, path, self.folder / name)

    def _members(self, recipe: Recipe, cascade: Cascade, plan: Plan) -> Plan:
        """Each member as its own recipe is trained, once for all recipes that have it; then their temperatures."""
        model = copy.deepcopy(plan.model)
        before = [t for t in recipe.techniques if STAGES.index(t.stage) < STAGES.index(cascade.stage)]
        for path, member in cascade.members().items():
            source = cascade.source(path)
            original = cascade.original(path, self.plan)
            own = member if source else Recipe((*before, *member.techniques))
            trained = self._of(original, source)._recovered(own, own.apply(original, self.task, self.target))
            model.get_submodule(path).load_state_dict(trained.model.state_dict())
        return cascade.tempered(plan.with_model(model.eval()), self.task, self.seed)

    def _of(self, original: Plan, source: str) -> Recoverer:
        """This one, or one for another network, whose weights lie in a folder of their own."""
        if not source:
            return self
        other = copy.copy(self)
        other.plan = original
        other.folder = self.folder / hashlib.sha256(source.encode()).hexdigest()[:16]
        return other

    def _trained(self, plan: Plan, name: str) -> None:
        """Give the plan's model its trained weights, by what the plan asks for."""

        def train(**settings: Any) -> Sequence[FitResult]:
            return fit_phases(plan.model, self.task, self._phases(plan), original=self.plan.model, **settings)

        self._once(plan.model, name, train)

    def _phases(self, plan: Plan) -> list[Phase]:
        """What the plan asks for, as trainings that follow each other."""
        own = [asked for asked in plan.recovery if isinstance(asked, Phase)]
        if own:
            if len(own) < len(plan.recovery):
                raise NotApplicable(
                    "one technique of this recipe trains in phases and another all at once; leave one of the two out"
                )
            return own
        model = plan.model
        exits = exits_of(model)
        heads = {id(p) for p in exits.parameters()} if exits is not None else set()
        later = tuple(asked.term for asked in plan.recovery if isinstance(asked, Afterwards))
        terms = [asked for asked in plan.recovery if not isinstance(asked, Afterwards | Phase)]
        phases = []
        if terms:
            rest = {id(p) for term in terms for p in term.parameters(model)} - heads
            if rest and not any(term.own_answer for term in terms):
                terms.insert(0, Answers())
            # Heads alone learn from the model they stand on: a second forward pass of the same weights is saved.
            other = exits is not None and plan.model is not self.plan.model
            alone = not rest and other and _same_backbone(model, self.plan.model)
            phases.append(Phase(tuple(terms), heads=alone))
        return [*phases, Phase(later, heads=True)] if later else phases


def _keep(model: nn.Module, path: Path, folder: Path) -> None:
    """Write the trained weights, whole or not at all, and remove the training's checkpoints."""
    fresh = path.with_name(f".{path.name}")
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, fresh)
    os.replace(fresh, path)
    shutil.rmtree(folder, ignore_errors=True)


def training_form(recipe: Recipe, places: tuple[str, ...] = ()) -> Recipe:
    """What of a recipe a training feels: its techniques before precision, in the form they are trained in, with exits
    at ``places`` too."""
    precision = STAGES.index("precision")
    forms = (t.training_form(places) for t in recipe.techniques if STAGES.index(t.stage) < precision)
    return Recipe(tuple(form for form in forms if form is not None))


@torch.no_grad()
def adopt(model: nn.Module, trained: nn.Module) -> nn.Module:
    """A copy of ``model`` with the weights of ``trained``, which may have exits at more places."""
    model = copy.deepcopy(model)
    own, given = exits_of(model), exits_of(trained)
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("exits.heads.") or given is None}
    if own is not None and given is None:  # exits without anything to train stand on weights trained without them
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("exits.")}
    if own is not None and given is not None:
        for i, position in enumerate(own.positions):
            head = given.heads[given.positions.index(position)]
            state |= {f"exits.heads.{i}.{k}": v for k, v in head.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def _same_backbone(model: nn.Module, original: nn.Module) -> bool:
    """Whether the model without its exits has the original's weights, all of them, and computes with them alone."""
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("exits.")}
    other = original.state_dict()
    modules = sum(1 for name, _ in model.named_modules() if name.partition(".")[0] != "exits")
    return (
        own.keys() == other.keys()
        and modules == sum(1 for _ in original.modules())
        and all(torch.equal(own[k], other[k]) for k in own)
    )
