"""Checkpoints of a training: written whole or not at all, read without running code, compared setting by setting."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lissom.errors import LissomError

__all__ = ["CHECKPOINT", "check_settings", "load_checkpoint", "save_checkpoint"]

CHECKPOINT = "last.ckpt"
FORMAT = 1


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists, dicts) to the folder. Raises LissomError where it has no room."""
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{CHECKPOINT}.")
        with os.fdopen(handle, "wb") as file:
            torch.save({"lissom": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / CHECKPOINT)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        # torch's writer reports a full disk as RuntimeError, a folder that cannot be written as OSError.
        if isinstance(error, OSError | RuntimeError):
            reason = str(error).splitlines()[0]
            raise LissomError(f"the checkpoint cannot be written to {folder}: {reason}") from error
        raise


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
