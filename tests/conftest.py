"""Cheap failures first: tests marked ``last`` come after all others."""

import os

import pytest

os.environ.setdefault("NNCF_CI", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
