"""What the benchmarks of exits share: a model as ``lissom slim`` takes it, and plans made of it by recipes, their heads
trained once and kept."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.export.exits import fit_exits
from lissom.export.exporting import export_plan, run_stages
from lissom.export.plan import Plan
from lissom.models.factory import load_model
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target, default_threads
from lissom.slimming import CALIBRATION, RECOVERY_EPOCHS, RECOVERY_STEPS
from lissom.tasks.of_data import task_of
from lissom.tasks.task import batches
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a model, its data and its recipe are named."""
    parser.add_argument("model", help="as in lissom slim")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--arch", help="the timm name of a weight file's network")
    parser.add_argument("--recipe", default="early_exit()", help="with exits in it")
    parser.add_argument("--recover", type=float, help="minutes at most for each training that a recipe needs")
    work = "where trained heads are kept; the folder of a lissom slim run has them already"
    parser.add_argument("--work", type=Path, default=Path("runs/exits"), help=work)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--name", help="the section's title; default: the model's name and the recipe")


class Maker:
    """Plans and artifacts of one model by recipes."""

    def __init__(self, options: argparse.Namespace, steps: int | None = None) -> None:
        self.options, self.steps = options, steps or RECOVERY_STEPS
        loaded = load_model(options.model, weights=options.weights, arch=options.arch)
        if not loaded.trained:
            raise LissomError(f"{loaded.name} comes without trained weights: give --weights FILE")
        data = read(options.data)
        self.name = loaded.name
        self.task = task_of(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=False)
        self.base = Plan.of(loaded.model.eval(), self.task.shape)
        few = (self.task.fit or self.task.choose).sample(CALIBRATION, 0)
        self.calibration = few.inputs(slice(0, len(few)))

    def target(self, runtime: str = "openvino", batch: int = 1) -> Target:
        return Target(runtime, threads=self.options.threads, batch=batch)

    def plan(self, recipe: Recipe, target: Target, seed: int = 0) -> Plan:
        """The recipe's plan, trained where it asks for it."""
        recoverer = Recoverer(
            self.base,
            self.task,
            self.target(),
            self.options.work / "recovery",
            epochs=RECOVERY_EPOCHS,
            steps=self.steps,
            seconds=None if self.options.recover is None else 60 * self.options.recover,
            seed=seed,
            threads=default_threads(),
        )
        return recoverer.recover(recipe, recipe.apply(self.base, self.task, target))

    def export(self, recipe: Recipe, plan: Plan, target: Target, path: Path) -> Artifact:
        return export_plan(
            plan, target, path, shape=self.task.shape, calibration=self.calibration, recipe=str(recipe),
            classes=self.task.classes, preprocessing=self.task.preprocessing,
        )  # fmt: skip

    def fitted(self, artifact: Artifact, plan: Plan) -> Artifact:
        """The artifact with thresholds fitted on ``choose``. Raises LissomError where nobody may leave."""
        answers, scores = run_stages(artifact, batches(self.task.choose, 256), self.options.threads)
        targets = self.task.targets(self.task.choose, answers[-1])
        quality = (lambda a: self.task.scores(a, targets)) if self.task.labelled else None
        artifact, _, _ = fit_exits(artifact, plan.decisions, answers, scores, quality)
        if all(decision["threshold"] is None for decision in artifact.plan["decisions"]):
            raise LissomError("no exit can be taken within the promised risk: name other exits, or a larger risk")
        return artifact

    def inputs(self, count: int) -> np.ndarray:
        """``count`` inputs, float32: those of ``report``, and where they are too few those of ``choose`` too."""
        report, choose = self.task.report, self.task.choose
        found = report.inputs(slice(0, min(count, len(report))))
        return found if count <= len(report) else np.concatenate([found, choose.inputs(slice(0, count - len(report)))])

    def labels(self, count: int) -> np.ndarray | None:
        """The labels of ``inputs``; None where there are none."""
        if self.task.report.labels is None or self.task.choose.labels is None:
            return None
        return np.concatenate([self.task.report.labels, self.task.choose.labels])[:count]


def split_recipe(text: str, leave: Sequence[str]) -> tuple[Recipe, Recipe]:
    """A recipe, and the same without the techniques of the stages ``leave``."""
    recipe = Recipe.parse(text)
    if not any(t.stage == "exits" for t in recipe.techniques):
        raise LissomError(f"the recipe {text!r} has no exits")
    return recipe, replace(recipe, techniques=tuple(t for t in recipe.techniques if t.stage not in leave))


def write_section(page: Path, head: str, name: str, section: str) -> None:
    """Put a section in its place on a page; the other sections stay."""
    text = page.read_text(encoding="utf-8") if page.exists() else head
    block = f"\n## {name}\n\n{section}\n"
    pattern = re.compile(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", re.S)
    text = pattern.sub(lambda _: block, text) if pattern.search(text) else text + block
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
