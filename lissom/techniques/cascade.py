"""cascade: a first network answers, a second one where the first is not sure, and the surer answer stands (2412.01039).

Two small networks that fail on different samples take the place of one large one (Kinnas et al. 2025, "Dual
Complementary CNNs"). Here a member is a recipe applied to the model, or to another network that the recipe names; so
the pair may be the model in two forms, or two networks of a pool (``lissom.search.pairing`` chooses by what each got
right). Each member is trained by itself, once for all recipes that have it.

In the graph both stand in one module, cut once: what the second stage gets is the image and, for post-check, the
first's answer. The threshold is fitted like an exit's, with its promise (``lissom.export.calibration``), where the
paper takes the most accurate one (``lissom.export.cascades.find_threshold``). Post-check compares how sure two networks
are, so the temperature of each is fitted first, which the paper does not do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.calibration import never_tested
from lissom.export.capture import clone, run_eager
from lissom.export.cascades import fit_temperature
from lissom.export.plan import Exit, Plan, Precision
from lissom.layers.cascade import SCORES, Member, Renormalise
from lissom.layers.cascade import Cascade as Both
from lissom.models.factory import PRETRAINED, Loaded, load_model
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import STAGES, Probe, Subset, Technique
from lissom.techniques.early_exit import operations
from lissom.techniques.low_rank import LowRank
from lissom.techniques.recipe import Recipe, was_given
from lissom.techniques.token_clustering import ClusterTokens

__all__ = ["Cascade"]

PLACES = ("first", "second")
AS_IT_IS = Recipe()
RULES = {"confidence": "confidence", "difference": "difference", "entropy": "normalised_entropy"}
BATCH = 256  # images that are in memory at once
FEWEST = 50  # images on which a temperature is fitted; with fewer it stays 1
_OUTSIDE = "what changes a network stands in the members: cascade(first=({name}()), second=({name}()))"


@register("technique", "cascade")
@dataclass(frozen=True)
class Cascade(Technique):
    """Let a first network answer what it is sure of, and a second one the rest.

    ``first`` and ``second`` are the members' recipes, of which ``()`` is the model as it is. ``first`` left out:
    ``low_rank(ratio=3.0)``, or ``()`` for another network. ``first_model`` and ``second_model`` put another network in
    a member's place: a network's name with its weight file in ``first_weights`` or ``second_weights``, a weight file
    alone where ``lissom convert`` noted the network in it, or ``file.py:function``, which is run only where you give
    the recipe yourself. It answers for the same classes and takes inputs of the same size; where its images are
    normalised otherwise, that is made up for.

    ``score`` says how sure an answer is: "difference" of the two largest shares of the softmax, "confidence" (the
    largest), or "entropy". ``postcheck``: the second's answer stands only where its score is strictly higher; without
    it, wherever it is asked. ``calibrated``: for that comparison each member's temperature is fitted on a tenth of the
    images that decide, on which the promise is not tested. ``risk``: points of quality that leaving with the first's
    answer may cost, kept with a probability of 95 %.
    """

    name: ClassVar[str] = "cascade"
    stage: ClassVar[str] = "cascade"
    refuses: ClassVar[Mapping[str, str]] = {
        "early_exit": "a member answers once, and either exits or a second network save the time",
        **{kind.name: _OUTSIDE.format(name=kind.name) for kind in (LowRank, ClusterTokens)},
    }

    first: Recipe | None = None
    second: Recipe = AS_IT_IS
    first_model: str = ""
    first_weights: str = ""
    second_model: str = ""
    second_weights: str = ""
    score: str = "difference"
    postcheck: bool = True
    calibrated: bool = True
    risk: float = 0.5

    def __post_init__(self) -> None:
        for place in PLACES:
            recipe, model, weights = (getattr(self, f"{place}{part}") for part in ("", "_model", "_weights"))
            if not isinstance(recipe, Recipe) and not (place == "first" and recipe is None):
                raise ValueError(f"{place} is a recipe, as in {place}=(low_rank() + int8()), not {recipe!r}")
            if not isinstance(model, str) or not isinstance(weights, str):
                raise ValueError(f"{place}_model names a network and {place}_weights a file, as text")
            if weights and not model:
                raise ValueError(f"{place}_weights are those of a {place}_model, and there is none")
        if self.score not in SCORES:
            raise ValueError(f"score is {' or '.join(map(repr, SCORES))}, not {self.score!r}")
        if not isinstance(self.risk, int | float) or not 0 < self.risk < 100:
            raise ValueError(f"risk is in points of quality, between 0 and 100, not {self.risk!r}")

    def recipe(self, place: str) -> Recipe:
        """The recipe of the member at ``place``, "first" or "second"."""
        given = getattr(self, place)
        if given is None:
            return Recipe() if self.first_model else Recipe((LowRank(ratio=3.0),))
        return given

    def members(self) -> Mapping[str, Recipe]:
        return {f"{place}.network": self.recipe(place) for place in PLACES}

    def source(self, path: str) -> str:
        """What names the network of the member at ``path`` (of ``members``); "" where it is the model itself."""
        place = path.partition(".")[0]
        return " ".join(filter(None, (getattr(self, f"{place}_model"), getattr(self, f"{place}_weights"))))

    def named_code(self) -> tuple[str, ...]:
        sources = (self.source(path) for path in self.members())
        return tuple(s for s in sources if ".py:" in s or s.endswith(f" {PRETRAINED}"))

    def original(self, path: str, plan: Plan) -> Plan:
        """The network of the member at ``path``, as the member's recipe gets it: ``plan`` where it is the model itself.

        Raises LissomError where another network cannot be read, or its code may not be run.
        """
        source = self.source(path)
        if not source:
            return plan
        if source in self.named_code() and not was_given(source):
            raise LissomError(
                f"the recipe names {source!r}, which would be run or fetched, and it comes from a file; "
                "give the recipe's text yourself if that is what you want"
            )
        return Plan.of(self._loaded(path).model, plan.shape)

    def _loaded(self, path: str) -> Loaded:
        place = path.partition(".")[0]
        return _network(getattr(self, f"{place}_model"), getattr(self, f"{place}_weights"))

    def check(self, plan: Plan, target: Target) -> None:
        if plan.decisions or len(plan.stages) != 1:
            raise NotApplicable("a cascade is of networks that answer once, and the plan has exits already")
        (first, one), (second, other) = self.members().items()
        if one == other and self.source(first) == self.source(second):
            raise NotApplicable("the two members are the same network, so the second has nothing to add")
        for path, member in self.members().items():
            for technique in member.techniques:
                if STAGES.index(technique.stage) >= STAGES.index("exits") and technique.stage != "precision":
                    raise NotApplicable(f"{technique.name} cannot stand in a member of a cascade, which answers once")
                if technique.name == "bf16":
                    raise NotApplicable("bf16 is for the whole graph: cascade(...) + bf16()")
            member.check(self.original(path, plan), target)

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with both members in one model, cut between them.

        Raises NotApplicable where the plan or the task has several answers an image, where a member answers for other
        classes or takes other inputs, and where the members ask for precisions that one graph cannot have.
        """
        if task.kind != "classification":
            raise NotApplicable("a cascade answers for a whole image: it is for classification")
        if plan.decisions:
            raise NotApplicable("a cascade is of networks that answer once, and the plan has exits already")
        if plan.recovery:
            raise NotApplicable("a technique before the cascade asks for a training; let it stand in the members")
        plans: dict[str, Plan] = {}
        for path, member in self.members().items():
            changed = self.original(path, plan)
            for technique in member.techniques:
                changed = technique.apply(changed, task)
            plans[path] = changed
        outputs = {path: _outputs(changed.model, task.shape, path) for path, changed in plans.items()}
        own = _outputs(plan.model, task.shape, "model")
        for path, count in outputs.items():
            if count != own:
                raise NotApplicable(
                    f"the {path.partition('.')[0]} network has {count} outputs, and the model has {own}"
                )
        if own < 2:
            raise NotApplicable("a cascade needs two classes or more: with one output nothing is unsure")
        first, second = (Member(clone(changed.model), self._prepare(path, task)) for path, changed in plans.items())
        model = Both(first, second, self.score if self.postcheck else None).eval()
        spent = [
            operations(changed.model, task.shape) / operations(plan.model, task.shape) for changed in plans.values()
        ]
        leaving = Exit(
            "first", RULES[self.score], self.risk, cost=spent[0], heads=sum(spent) - 1, carries=model.carries
        )
        texts = [f"{self.source(path) or 'the model'} {member}".strip() for path, member in self.members().items()]
        joint = plan.with_model(model, f"cascade of {texts[0]} and {texts[1]}", *_notes(plan, plans.values()))
        return replace(
            joint,
            decisions=(leaving,),
            precision=_precision(plan.precision, plans),
            members=tuple(plans),
            recovery=tuple(term for changed in plans.values() for term in changed.recovery),
        )

    def _prepare(self, path: str, task: Task) -> nn.Module | None:
        """What makes the task's inputs those of another network; None where they are so already."""
        given = task.preprocessing
        if not self.source(path) or given is None:
            return None
        wanted = self._loaded(path).preprocessing((given.height, given.width))
        if wanted.channels != given.channels:
            raise NotApplicable(
                f"{self.source(path)} takes {wanted.channels} channels, and the inputs have {given.channels}"
            )
        if (wanted.mean, wanted.std) == (given.mean, given.std):
            return None
        return Renormalise(given.mean, given.std, wanted.mean, wanted.std)

    def tempered(self, plan: Plan, task: Task, seed: int) -> Plan:
        """``plan``, whose members are trained, with their temperatures fitted on the rows of ``choose`` that no promise
        is tested on (``seed`` is that of the calibration); as it is where post-check has no use for them."""
        if not (self.calibrated and self.postcheck):
            return plan
        labels, rows = task.choose.labels, never_tested(len(task.choose), seed)
        if labels is None or len(rows) < FEWEST:
            why = "there are no labels" if labels is None else f"only {len(rows)} images may be looked at for them"
            return replace(plan, notes=(*plan.notes, f"cascade leaves the temperatures at 1: {why}"))
        model = clone(plan.model)
        members = []
        for place in PLACES:
            member = model.get_submodule(place)
            assert isinstance(member, Member)
            member.temperature.value = 1.0
            members.append(member)
        parts = []
        for start in range(0, len(rows), BATCH):
            inputs = torch.from_numpy(task.choose.inputs(rows[start : start + BATCH]))
            parts.append([run_eager(member, inputs).numpy() for member in members])
        for member, logits in zip(members, zip(*parts, strict=True), strict=True):
            member.temperature.value = fit_temperature(np.concatenate(logits), labels[rows])
        values = " and ".join(f"{model.get_submodule(f'{place}.temperature').value:.2f}" for place in PLACES)
        return plan.with_model(model, f"cascade's temperatures are {values}, fitted on {len(rows)} images of choose")

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any] | Subset]:
        """First members that apply to the plan, each in a training of its own (of ``low_rank``), and risks."""
        candidates: list[Technique] = [*(LowRank(ratio=ratio) for ratio in (3.0, 2.0, 4.0)), ClusterTokens()]
        fitting: list[Recipe | None] = []
        for technique in candidates:
            try:
                technique.check(plan, target)
            except NotApplicable:
                continue
            # The default is left out of a recipe's text, so that it is one recipe however it came about.
            fitting.append(None if technique == LowRank(ratio=3.0) else Recipe((technique,)))
        return {"first": tuple(fitting) or (None,), "risk": (0.25, 0.5, 1.0, 2.0)}

    def variants(self, plan: Plan, target: Target) -> tuple[Self, ...]:
        """What the members' undecided knobs stand for; of a technique that both have, both get the same."""
        settings: list[list[Recipe]] = []
        for path, member in self.members().items():
            own = self.original(path, plan)
            choices = [technique.variants(own, target) for technique in member.techniques]
            settings.append([Recipe(tuple(chosen)) for chosen in itertools.product(*choices)])
        pairs = [
            self._with(first, second)
            for first in settings[0]
            for second in settings[1]
            if _alike(self.recipe("first"), first, self.recipe("second"), second)
        ]
        return tuple(dict.fromkeys(pairs)) or (self,)

    def settle(self, plan: Plan, task: Task, probe: Probe) -> Self:
        """The members' techniques settled, each on its own network."""
        settled = [
            Recipe(tuple(t.settle(self.original(path, plan), task, probe) for t in member.techniques))
            for path, member in self.members().items()
        ]
        return self._with(*settled)

    def _with(self, first: Recipe, second: Recipe) -> Self:
        # Where nothing was decided, the text of the recipe stays as it was given.
        return replace(self, first=self.first if first == self.recipe("first") else first, second=second)


@functools.lru_cache(maxsize=8)
def _network(model: str, weights: str) -> Loaded:
    """Another network, read once; it is copied before it is changed."""
    loaded = load_model(model, weights=weights or None)
    if not loaded.trained:
        raise LissomError(
            f"the network {model} comes without trained weights; name their file too, as in "
            f"cascade(second_model={model!r}, second_weights='FILE')"
        )
    return loaded


def _alike(asked_first: Recipe, first: Recipe, asked_second: Recipe, second: Recipe) -> bool:
    """Whether techniques of one name and the same undecided knobs got the same setting in both members."""
    chosen = {str(asked): made for asked, made in zip(asked_first.techniques, first.techniques, strict=True)}
    pairs = zip(asked_second.techniques, second.techniques, strict=True)
    return all(chosen.get(str(asked), made) == made for asked, made in pairs)


def _outputs(model: nn.Module, shape: tuple[int, ...], what: str) -> int:
    """How many outputs the network has: one forward pass on zeros of the task's shape."""
    name = what.partition(".")[0]
    try:
        answer = run_eager(model, torch.zeros(1, *shape))
    except Exception as error:  # a user's network raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotApplicable(f"the {name} network does not take inputs of shape {tuple(shape)}: {reason}") from error
    if not isinstance(answer, torch.Tensor) or answer.ndim != 2:
        raise NotApplicable(f"the {name} network does not answer with one number a class, as a cascade needs")
    return answer.shape[1]


def _notes(plan: Plan, plans: Any) -> list[str]:
    """What the members' techniques have to say."""
    return [note for changed in plans for note in changed.notes if note not in plan.notes]


def _precision(given: Precision, plans: Mapping[str, Plan]) -> Precision:
    """The members' policies as one, by the paths at which they stand; what decides stays in float.

    Quantisation is of the whole graph, at once: two members in 8 bits share its settings.
    """
    bits = {"": given.at(""), "check": 32, "first.temperature": 32, "second.temperature": 32}
    options = dict(given.options)
    eight = [path for path, plan in plans.items() if 8 in plan.precision.bits.values()]
    for path, plan in plans.items():
        bits |= {
            f"{path}.{inner}" if inner else path: n for inner, n in plan.precision.bits.items() if inner or n != 32
        }
    asked = [dict(plans[path].precision.options) for path in eight]
    if len(asked) == 2 and asked[0] != asked[1]:
        differing = sorted(key for key in {*asked[0], *asked[1]} if asked[0].get(key) != asked[1].get(key))
        raise NotApplicable(
            f"both members are quantised at once, and differ in {', '.join(differing)}; give them the same settings"
        )
    if asked:
        options |= asked[0]
    if len(eight) == 1 and options.get("linear") == "conv":
        options["linear_in"] = [f"{eight[0]}."]
    return Precision(bits, options)
