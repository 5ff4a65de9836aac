"""``file.py:function``: the one way in which a user's own code is run, because the user named it as code."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lissom.errors import LissomError

__all__ = ["is_reference", "load_function"]


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form ``file.py:function``."""
    path, colon, name = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def load_function(reference: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` names. The file is executed, its folder is importable meanwhile.

    Raises LissomError where the file or the function is missing, or the file itself fails on import.
    """
    if not is_reference(reference):
        raise LissomError(f"{reference!r} is not of the form file.py:function")
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise LissomError(f"there is no file {file}")
    # A name of its own, so that two users' files called models.py do not meet in sys.modules.
    module_name = f"lissom_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise LissomError(f"{file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise LissomError(f"{file} fails when it is imported: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(str(path.parent))
    function = getattr(module, name, None)
    if not callable(function):
        raise LissomError(f"{file} has no function {name!r}")
    return function
