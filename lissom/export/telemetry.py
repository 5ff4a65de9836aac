"""OpenVINO's converter and NNCF report their use over the network unless told not to. They are told not to."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

__all__ = ["quiet"]

# NNCF reads this once, on import.
os.environ.setdefault("NNCF_CI", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No telemetry and no progress chatter from OpenVINO's converter and NNCF inside the block."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"  # the one switch OpenVINO's telemetry has besides a consent file in the user's home
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
