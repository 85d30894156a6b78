"""What is said while native code is compiled for the first time on a machine."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

logger = logging.getLogger(__name__)
_PATIENCE = 1.5
"""Seconds after which one should know what takes so long."""
_said = threading.Event()


@contextlib.contextmanager
def announced(seconds: int) -> Iterator[None]:
    """Say what takes so long, and about how long, if it does: once in a process."""
    timer = threading.Timer(_PATIENCE, _say, (seconds,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(seconds: int) -> None:
    if not _said.is_set():
        _said.set()
        logger.warning("compiling native code for this CPU, once: about %d seconds", seconds)
