"""Recipe: an ordered composition of techniques, written as text and saved as JSON.

``low_rank(keep=0.5) + early_exit(at=(4, 8)) + int8()``. The text is read with Python's own parser, as a sum of calls
with literal arguments; nothing is executed. An argument may itself be a recipe, where a technique has members:
``cascade(first=(low_rank() + int8()), second=(int8()))``; ``()`` is the empty one.

A recipe may name code of the user's (a network as ``file.py:function``). That is run where the user gave the recipe
themselves, to ``Recipe.of``, and not where it stood in a file.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lissom.errors import LissomError, NotApplicable
from lissom.export.plan import Plan
from lissom.registry import load_part
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import STAGES, Technique

__all__ = ["Recipe", "was_given"]

_given: set[str] = set()  # code that the user's own recipes name


@dataclass(frozen=True)
class Recipe:
    """Techniques in the canonical order. ``Recipe()`` is the baseline: nothing is changed.

    Example::

        recipe = Recipe.parse("fuse() + int8(keep=('head',))")
        plan = recipe.apply(Plan.of(model), task, target)
    """

    techniques: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.techniques, key=lambda t: (STAGES.index(t.stage), t.turn)))
        object.__setattr__(self, "techniques", ordered)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """A recipe from its text. Raises LissomError that names the part which is wrong."""
        if not text.strip():
            return cls()
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError as error:
            raise LissomError(f"the recipe {text!r} cannot be read at character {error.offset}") from error
        return cls(tuple(_sum(tree.body)))

    @classmethod
    def of(cls, value: Recipe | str | Path) -> Recipe:
        """A recipe from a recipe, its text, or a JSON file (``{"recipe": text}``, as in result.json and plan.json)."""
        if isinstance(value, Recipe):
            return value._as_given()
        path = Path(value)
        if path.suffix == ".json":
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise LissomError(f"the recipe file {value} cannot be read: {error}") from error
            fields = fields.get("best", fields) if isinstance(fields, dict) else fields
            if not isinstance(fields, dict) or not isinstance(fields.get("recipe"), str):
                raise LissomError(f"{value} holds no field 'recipe' with a recipe's text")
            return cls.parse(fields["recipe"])
        return cls.parse(str(value))._as_given()

    def _as_given(self) -> Recipe:
        for technique in self.techniques:
            _given.update(technique.named_code())
        return self

    def __str__(self) -> str:
        return " + ".join(str(t) for t in self.techniques)

    def __repr__(self) -> str:
        """As a member's recipe stands in another's text."""
        return f"({self})"

    def __len__(self) -> int:
        return len(self.techniques)

    def without(self, technique: Technique) -> Recipe:
        """The same recipe less one technique."""
        return Recipe(tuple(t for t in self.techniques if t is not technique))

    def replace(self, old: Technique, new: Technique) -> Recipe:
        return Recipe(tuple(new if t is old else t for t in self.techniques))

    def finished(self) -> Recipe | None:
        """The same recipe with the training that a search saves; None where it saves none."""
        done = tuple(t.finished() or t for t in self.techniques)
        return None if done == self.techniques else Recipe(done)

    def check(self, plan: Plan, target: Target) -> None:
        """Raise NotApplicable where a technique does not fit the plan or the target, or two do not fit together."""
        names = [t.name for t in self.techniques]
        for technique in self.techniques:
            if names.count(technique.name) > 1:
                raise NotApplicable(f"{technique.name} stands twice in the recipe; once is enough")
            for other in names:
                if other in technique.refuses:
                    raise NotApplicable(f"{technique.name} with {other}: {technique.refuses[other]}")
            for member in technique.members().values():
                later = STAGES[STAGES.index(technique.stage) + 1 :]
                around = [t.name for t in self.techniques if t.stage in later]
                for inner in member.techniques:
                    if inner.name in around:
                        raise NotApplicable(
                            f"{inner.name} stands in a member of {technique.name} and around it; once is enough"
                        )
            technique.check(plan, target)

    def apply(self, plan: Plan, task: Task, target: Target) -> Plan:
        """Check, then apply every technique in order; the input plan stays as it is."""
        self.check(plan, target)
        for technique in self.techniques:
            plan = technique.apply(plan, task)
        return plan


def _sum(node: ast.expr) -> list[Technique]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sum(node.left) + _sum(node.right)
    return [_technique(node)]


def _technique(node: ast.expr) -> Technique:
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise LissomError(f"{ast.unparse(node)!r} in the recipe is not of the form name(knob=value)")
    name = node.func.id
    kind: type[Technique] = load_part("technique", name)
    fields = [f.name for f in dataclasses.fields(kind)]
    recipes = {f.name for f in dataclasses.fields(kind) if "Recipe" in str(f.type)}
    if node.args:
        raise LissomError(f"{name} takes its knobs by name: {', '.join(f'{f}=...' for f in fields) or 'it has none'}")
    knobs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg not in fields:
            raise LissomError(f"{name} has no knob {keyword.arg!r}; it has: {', '.join(fields) or 'none'}")
        knobs[keyword.arg] = _member(keyword.value) if keyword.arg in recipes else _value(name, keyword)
    try:
        return kind(**knobs)
    except (TypeError, ValueError) as error:
        raise LissomError(f"{name}: {error}") from error


def _member(node: ast.expr) -> Recipe:
    empty = isinstance(node, ast.Tuple) and not node.elts
    return Recipe() if empty else Recipe(tuple(_sum(node)))


def _value(name: str, keyword: ast.keyword) -> Any:
    try:
        found = ast.literal_eval(keyword.value)
    except ValueError as error:
        raise LissomError(f"{name}({keyword.arg}={ast.unparse(keyword.value)}) is not a literal value") from error
    return tuple(found) if isinstance(found, list) else found


def was_given(code: str) -> bool:
    """Whether a recipe that the user gave themselves names this code (``Technique.code``)."""
    return code in _given
