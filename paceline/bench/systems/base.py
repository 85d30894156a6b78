"""What a published system is here: its paper, and tests that measure what the paper says on a real model.

A test is a function from a `Context` to rows. `suite` puts a system's tests together: one that raises becomes a failed
row, and the others go on. Nothing here knows a particular system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.bench.systems.context import Context

NOT_YET = "not yet"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure against its bound."""

    test: str
    figure: float | str | None
    """The measured value; None where there is none (a system that is not in, a test that raised)."""
    threshold: str
    """The bound as it is read: `>= 0.7`."""
    passed: bool | None
    """None: there is no test yet, or what was measured does not decide."""
    note: str = ""
    """What else was measured, on how much, and the reason of a threshold that is not the catalogue's."""
    system: str = ""
    """Filled in by whoever runs the system."""

    def as_json(self) -> Mapping[str, Any]:
        """Plain values; a figure that is no finite number becomes text, which JSON can hold."""
        found = {"system": self.system, **asdict(self)}
        if isinstance(self.figure, float) and not math.isfinite(self.figure):
            found["figure"] = str(self.figure)
        return found


Test = Callable[["Context"], Iterable[Row]]
Run = Callable[["Context"], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class System:
    """A paper of the catalogue."""

    number: int
    """Its place in the list of titles."""
    name: str
    """What it is called on the command line."""
    title: str
    arxiv: str
    group: str
    run: str | None = None
    """Where its tests are, as `module:function`; None while they are not in."""

    def load(self) -> Run | None:
        """Its tests."""
        if self.run is None:
            return None
        module, _, attribute = self.run.partition(":")
        found: Run = getattr(import_module(module), attribute)
        return found


def at_least(test: str, figure: float, bound: float, note: str = "") -> Row:
    """A row that passes if the figure reaches the bound. What is not a number never passes."""
    return Row(test, float(figure), f">= {bound:g}", bool(figure >= bound), note)


def at_most(test: str, figure: float, bound: float, note: str = "") -> Row:
    """A row that passes if the figure does not exceed the bound."""
    return Row(test, float(figure), f"<= {bound:g}", bool(figure <= bound), note)


def above(test: str, figure: float, bound: float, note: str = "") -> Row:
    """A row that passes if the figure is larger than the bound."""
    return Row(test, float(figure), f"> {bound:g}", bool(figure > bound), note)


def exactly(test: str, figure: float | str, wanted: float | str, note: str = "") -> Row:
    """A row that passes if the figure is the wanted one and nothing else."""
    if isinstance(figure, str) or isinstance(wanted, str):
        return Row(test, str(figure), f"= {wanted}", str(figure) == str(wanted), note)
    return Row(test, float(figure), f"= {wanted:g}", float(figure) == float(wanted), note)


def suite(*tests: Test) -> Run:
    """The tests of a system, one after the other; one that raises is a failed row."""

    def run(context: Context) -> Iterator[Row]:
        for test in tests:
            context.say((test.__doc__ or test.__name__).strip().split("\n")[0].rstrip("."))
            yield from _guarded(test, context, test.__name__.strip("_").replace("_", " "))

    return run


def rows_of(system: System, context: Context) -> Iterator[Row]:
    """The rows of a system, as they become ready."""
    try:
        run = system.load()
    except Exception as error:
        yield replace(_failed("loading", error), system=system.name)
        return
    if run is None:
        yield Row("", None, "", None, NOT_YET, system.name)
        return
    for row in _guarded(run, context, "all tests"):
        yield replace(row, system=system.name)


def _guarded(test: Test, context: Context, name: str) -> Iterator[Row]:
    count = 0
    try:
        for row in test(context):
            count += 1
            yield row
        if not count:
            yield Row(name, None, "at least one row", False, "measured nothing")
    except Exception as error:
        yield _failed(name, error)


def _failed(test: str, error: Exception) -> Row:
    return Row(test, None, "no error", False, f"{type(error).__name__}: {error}")
