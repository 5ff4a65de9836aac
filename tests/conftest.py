"""Cheap failures first: tests marked ``last`` come after all others; ``--resume`` goes on with a run cut off."""

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("NNCF_CI", "1")

# A shell starts background jobs, and so perhaps these tests, with Ctrl-C ignored, and processes that they start would
# ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
SOURCES = ("lissom/**/*", "tests/**/*", "docs/**/*.py", "docs/systems/*.md", "pyproject.toml", "requirements.lock")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", action="store_true", help="leave out what passed since a file of the project changed")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--resume"):
        config.pluginmanager.register(Resume(config), "lissom-resume")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Whatever number of threads a test gives to torch, those after it have what they began with."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


class Resume:
    """Keeps the names of tests that passed, in a folder of their sources' hash, so that any change begins anew."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = config.cache.mkdir("resume") / state_of_sources()
        self.passed, self.begun = self.folder / "passed", self.folder / "begun"
        self.controls = not hasattr(config, "workerinput")  # of several processes one writes
        if self.controls:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.passed.touch()
            self.begun.write_bytes(self.passed.read_bytes())  # what all processes leave out, though ``passed`` grows

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = set(self.begun.read_text().splitlines())
        left_out = [item for item in items if item.nodeid in known]
        items[:] = [item for item in items if item.nodeid not in known]
        if left_out:
            config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.controls and report.when == "call" and report.passed:
            with self.passed.open("a") as file:
                file.write(f"{report.nodeid}\n")


def state_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern) if p.is_file() and p.suffix != ".pyc"):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
