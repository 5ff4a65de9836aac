"""Checkpoints of a training: written whole or not at all, read without running code, compared setting by setting."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lissom.errors import LissomError

__all__ = ["CHECKPOINT", "check_settings", "load_checkpoint", "save_checkpoint", "write_file"]

CHECKPOINT = "last.ckpt"
FORMAT = 1


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all, and to the disk. Raises LissomError where there is no room or no right."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        # torch's writer reports a full disk as RuntimeError, a folder that cannot be written as OSError.
        if isinstance(error, OSError | RuntimeError):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LissomError(f"{path} cannot be written: {reason}") from error
        raise


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists, dicts) to the folder."""
    write_file(folder / CHECKPOINT, lambda file: torch.save({"lissom": FORMAT, **state}, file))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What was saved last, on the processor; None where there is nothing. Raises LissomError for a damaged file."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises anything from EOFError to UnpicklingError
        raise LissomError(f"{path} is damaged or no checkpoint; remove it to start anew") from error
    if not isinstance(state, dict) or state.get("lissom") != FORMAT:
        raise LissomError(f"{path} is no checkpoint of this version of lissom; remove it to start anew")
    return state


def check_settings(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise LissomError that names the first setting in which a resumed run differs from the saved one."""
    for name in wanted:
        if saved.get(name) != wanted[name]:
            raise LissomError(
                f"{path} was trained with {name} {saved.get(name)} and not {wanted[name]}; "
                "resume with the same settings, or train into another folder"
            )
