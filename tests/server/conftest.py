"""Fixtures of the server tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("xgrammar")

from server_tools import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the tests of a module."""
    with serving() as running:
        yield running
