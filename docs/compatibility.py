"""Write docs/compatibility.md: which technique works on which family, and which two stand in one recipe.

``python docs/compatibility.py`` writes; ``--check`` writes nothing and ends with 1 where the page is stale. Every cell
is found by doing it: the recipe is checked and applied to a small network of the family, and the changed model answers
an input. What is refused is told in the technique's own words. Weights are random: nothing is said of quality here.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.plan import Plan
from lissom.registry import load_part, parts
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.recipe import Recipe

PAGE = Path(__file__).parent / "compatibility.md"
TARGET = Target("openvino", "cpu", 1, 1, frozenset({"fp32", "int8", "bf16"}))
# Small members of each family, as timm builds them: name, arguments, side of the input.
FAMILIES = {
    "ViT": ("vit_tiny_patch16_224", {"depth": 6, "img_size": 96}, 96),
    "DeiT (distilled)": ("deit_tiny_distilled_patch16_224", {"depth": 6, "img_size": 96}, 96),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 56}, 56),
    "ConvNeXt": ("convnext_atto", {}, 64),
    "ResNet": ("resnet18", {}, 64),
    "MobileNetV3": ("mobilenetv3_small_100", {}, 64),
    "RegNetY": ("regnety_002", {}, 64),
    "HRNet": ("hrnet_w18_small", {}, 64),
    "ResNet (grey)": ("resnet18", {"in_chans": 1}, 32),
}
# Two techniques are tried on these, one after the other, until one of them takes both.
PAIRED = ("ViT", "MobileNetV3", "ResNet (grey)")


def task(side: int, channels: int = 3) -> Task:
    """Noise with labels: only shapes matter."""
    images = np.zeros((2, channels, side, side), np.float32)
    split = ArraySplit("noise", images, np.array([0, 1]))
    return Task(choose=split, report=split, fit=split, shape=images.shape[1:], classes=tuple("0123456789"))


def models() -> dict[str, tuple[nn.Module, Task]]:
    """A network of each family with its task."""
    made = {}
    for family, (name, arguments, side) in FAMILIES.items():
        torch.manual_seed(0)
        made[family] = (
            timm.create_model(name, num_classes=10, **arguments).eval(),
            task(side, arguments.get("in_chans", 3)),
        )
    return made


def outcome(recipe: Recipe, model: nn.Module, of: Task) -> str:
    """ "yes", or why not: the technique's sentence. The changed model must answer (1, 10) at every exit."""
    plan = Plan.of(model, of.shape)
    try:
        changed = recipe.apply(plan, of, TARGET)
    except NotApplicable as error:
        return str(error)
    except LissomError as error:
        return f"failed: {error}"
    with torch.no_grad():
        answers = changed.model(torch.zeros(1, *of.shape))
    answers = answers if isinstance(answers, tuple) else (answers,)
    assert len(answers) == len(changed.decisions) + 1
    assert all(a.shape == (1, 10) for a in answers)
    return "yes"


def pair(first: str, second: str, known: dict[str, tuple[nn.Module, Task]], works: set[tuple[str, str]]) -> str:
    """What becomes of two techniques in one recipe: "yes", or the sentence of the network on which both work alone.

    ``works`` holds the techniques and families of which that is so."""
    said = []
    for family in PAIRED:
        model, of = known[family]
        found = outcome(Recipe((load_part("technique", first)(), load_part("technique", second)())), model, of)
        if found == "yes":
            return found
        said.append((sum((name, family) in works for name in (first, second)), found))
    return max(said, key=lambda each: each[0])[1]


def page() -> str:
    """The page's text."""
    names = [part.name for part in parts("technique")]
    known = models()
    notes: list[str] = []

    def cell(text: str) -> str:
        if text == "yes":
            return "yes"
        if text not in notes:
            notes.append(text)
        return f"no [{notes.index(text) + 1}]"

    lines = [
        "# Compatibility", "", "Written by `python docs/compatibility.py`, which tries every cell; edit that.", "",
        "## Techniques on families", "", "| technique | " + " | ".join(known) + " |", "| --- " * (len(known) + 1) + "|",
    ]  # fmt: skip
    works: set[tuple[str, str]] = set()
    for name in names:
        recipe = Recipe((load_part("technique", name)(),))
        found = {family: outcome(recipe, model, of) for family, (model, of) in known.items()}
        works |= {(name, family) for family, text in found.items() if text == "yes"}
        lines.append(f"| {name} | " + " | ".join(map(cell, found.values())) + " |")
    lines += ["", "## Two techniques in one recipe", "",
              "On the ViT, or where one of the two has nothing to do there on MobileNetV3 or a grey ResNet. The order",
              "in a recipe's text does not matter: techniques are applied in the order fuse, structure, tokens, exits,",
              "cascade, precision.", ""]  # fmt: skip
    both = {(a, b): pair(a, b, known, works) for a, b in itertools.combinations(sorted(names), 2)}
    lines += ["| | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for first in names:
        cells = []
        for second in names:
            cells.append("·" if first == second else cell(both[min(first, second), max(first, second)]))
        lines.append(f"| {first} | " + " | ".join(cells) + " |")
    if notes:
        lines += ["", *(f"{n}. {_clean(note)}" for n, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale:
        print("docs/compatibility.md is stale: run python docs/compatibility.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
