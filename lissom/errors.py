"""Errors that a user can act on. Each carries one clear sentence; the command line prints it without a traceback."""

from __future__ import annotations

__all__ = ["LissomError", "NotApplicable"]


class LissomError(Exception):
    """Bad input: one sentence that says what was wrong and what would do. The command line exits with code 2."""


class NotApplicable(LissomError):
    """A technique does not fit this model, runtime or device: the trial becomes a row with this reason."""
