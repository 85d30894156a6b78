"""Progress bars on stderr while a model is fetched or converted; one line if stderr is not a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Stage:
    """One bar. `total` is in bytes."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int) -> None:
        """Show that `done` bytes of the total are finished."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)


class Reporter:
    """Makes the bars of one job; without a terminal it makes silent ones."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def stage(self, title: str, total: int) -> Stage:
        """Start the next bar, `total` bytes long."""
        if self._progress is None:
            return Stage(None, None)
        return Stage(self._progress, self._progress.add_task(title, total=total))


@contextlib.contextmanager
def reporting(headline: str) -> Iterator[Reporter]:
    """Announce a job and yield the maker of its bars."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(headline, highlight=False, soft_wrap=True)
        yield Reporter()
        return
    console.print(headline, highlight=False)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield Reporter(progress)
