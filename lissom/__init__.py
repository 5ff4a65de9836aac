"""lissom makes a vision or long-sequence model cheaper, and proves it.

The names below are the public interface. They resolve on first use, so that ``import lissom`` imports neither torch
nor timm, and an artifact loads where only the runtime and NumPy are installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "slim": "lissom.slimming",
    "Result": "lissom.slimming",
    "measure": "lissom.meters.comparing",
    "scale": "lissom.techniques.scaling",
    "profile": "lissom.meters.profiling",
    "fit": "lissom.training.loop",
    "load": "lissom.runtime.predictor",
    "Recipe": "lissom.techniques.recipe",
    "Task": "lissom.tasks.task",
    "is_model": "lissom.models.factory",
    "create_model": "lissom.models.factory",
    "from_published": "lissom.models.factory",
    "LissomError": "lissom.errors",
    "NotApplicable": "lissom.errors",
}

__all__ = [
    "LissomError",
    "NotApplicable",
    "Recipe",
    "Result",
    "Task",
    "__version__",
    "create_model",
    "fit",
    "from_published",
    "is_model",
    "load",
    "measure",
    "profile",
    "scale",
    "slim",
]

if TYPE_CHECKING:
    from lissom.errors import LissomError, NotApplicable
    from lissom.meters.comparing import measure
    from lissom.meters.profiling import profile
    from lissom.models.factory import create_model, from_published, is_model
    from lissom.runtime.predictor import load
    from lissom.slimming import Result, slim
    from lissom.tasks.task import Task
    from lissom.techniques.recipe import Recipe
    from lissom.techniques.scaling import scale
    from lissom.training.loop import fit


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lissom' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
