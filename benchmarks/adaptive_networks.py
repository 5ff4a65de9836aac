"""Smaller networks of the two references' own kinds, trained alike: what adaptive inference has to beat.

The CNN is the class of the user's file ``models.py``, in the folder that LISSOM_MODELS names (../shared/models beside
this repository where it names none); the vision transformer is ``cifar_vit`` with fewer blocks.
"""

import importlib.util
import os
import sys
from pathlib import Path

from torch import nn

from lissom.models.factory import create_model

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _cnn(depth: int, width: int) -> nn.Module:
    folder = os.environ.get("LISSOM_MODELS") or Path(__file__).resolve().parents[2] / "shared" / "models"
    spec = importlib.util.spec_from_file_location("reference_models", Path(folder) / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CNN(depth, width)


def cnn_1x16() -> nn.Module:
    """Eight weight layers."""
    return _cnn(1, 16)


def cnn_2x16() -> nn.Module:
    """Fourteen weight layers."""
    return _cnn(2, 16)


def vit_1() -> nn.Module:
    """One of the twelve blocks."""
    return create_model("cifar_vit", depth=1)


def vit_2() -> nn.Module:
    """Two of the twelve blocks."""
    return create_model("cifar_vit", depth=2)
