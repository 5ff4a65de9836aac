"""docs/compatibility.md says what is: every cell is found again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.full
def test_the_page_is_what_the_techniques_do() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "compatibility.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]
