"""What a step costs: seconds of a target forward by its size, and what surrounds it.

    T(N, S, C) = products(N) + per_sequence * (S - 1) + per_context_token * C + per_step

N tokens pass through the network in S sequences while C context tokens are read. `products` is a measured table,
linear in between, or a step function where forwards are padded up to fixed sizes (CUDA graphs). Beyond the largest
size it goes on as steeply as over the table's upper half.

Online, the table is multiplied by what steps really take over what it says. That ratio has a level, which follows a
busy machine quickly, and a shape by number of draft nodes, which changes slowly: host time and attention that the
table does not know (`paceline.plan.pace`). The shape decides how far to look ahead, so neither a pause nor another
pace of the machine may look like the cost of a size.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.types import StepStats
from paceline.errors import InputError
from paceline.plan.pace import Pace
from paceline.plan.tracker import Tracker

FORMAT = "paceline-cost/1"
_FOREVER = 1e9
_DRAFT_NOISE = 0.2
"""Relative scatter of the time of a draft."""
_DRAFT_DRIFT = 0.025
"""Drift of its parts in a step, in units of the noise."""
_LIKELY = np.array([0.2, 0.1, 1.0, 0.1])
"""How ready its parts (in the order of `DraftCost`) are to explain what was measured: mostly, depth is what costs."""


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Seconds that one draft of a batch takes."""

    per_step: float = 0.0
    """Whatever is drafted."""
    per_request: float = 0.0
    """For every request that is drafted for."""
    per_depth: float = 0.0
    """For every depth: a draft model's forward."""
    per_node: float = 0.0
    """For every depth and request: a token in those forwards."""

    def __post_init__(self) -> None:
        for value in (self.per_step, self.per_request, self.per_depth, self.per_node):
            _require(_is_seconds(value), "holds a draft cost that is not a number of seconds")

    def seconds(self, depth: float, requests: float) -> float:
        """Time to draft `depth` tokens for each of `requests`."""
        return self.per_step + self.per_depth * depth + (self.per_request + self.per_node * depth) * requests


@dataclass(frozen=True, slots=True)
class CostTable:
    """A measured machine and model.

    As JSON it has the fields of this class (those with a default may be left out) and `"format": "paceline-cost/1"`:

        {"format": "paceline-cost/1", "tokens": [1, 64, 256], "seconds": [0.004, 0.0041, 0.0067],
         "per_context_token": 3.8e-8, "draft": {"eagle": {"per_depth": 0.00025}}, "about": {"model": "8B"}}

    Raises:
        InputError: a number is missing, not positive where it must be, or out of order.
    """

    tokens: tuple[int, ...]
    """Tokens in the forward, ascending; at least two sizes."""
    seconds: tuple[float, ...]
    """Seconds of a forward of that size with one sequence and no context."""
    per_sequence: float = 0.0
    """Seconds for every further sequence of the forward."""
    per_context_token: float = 0.0
    """Seconds for every context token read, over all sequences."""
    per_step: float = 0.0
    """Seconds of host work around a forward."""
    padded: bool = False
    """Whether forwards are padded up to the next of `tokens` (CUDA graphs)."""
    draft: Mapping[str, DraftCost] = field(default_factory=dict)
    """Cost of drafters whose tokens take forwards of their own."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, where and how."""

    def __post_init__(self) -> None:
        numbers = (*self.seconds, self.per_sequence, self.per_context_token, self.per_step)
        _require(all(map(_is_seconds, numbers)), "holds a time that is not a number of seconds")
        _require(len(self.tokens) == len(self.seconds) >= 2, "needs two sizes at least, and a time for each")
        _require(all(map(_is_size, self.tokens)), "holds a size that is not a whole number")
        _require(list(self.tokens) == sorted(set(self.tokens)), "holds sizes that are not ascending")
        _require(min(self.seconds) > 0, "holds a forward that takes no time")
        _require(isinstance(self.padded, bool), "needs true or false for padded")
        _require(isinstance(self.about, Mapping), "needs an object for about")

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {"format": FORMAT, **asdict(self), "tokens": list(self.tokens), "seconds": list(self.seconds)}

    @classmethod
    def from_json(cls, value: object, name: str = "cost") -> CostTable:
        """Read the documented form.

        Raises:
            InputError: it is not that; the message says what is wrong.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f'is no cost table ("format" must be "{FORMAT}").', field=name)
        fields = {key: item for key, item in value.items() if key != "format"}
        try:
            _require(isinstance(fields.get("draft", {}), dict), "needs an object for draft")
            fields["draft"] = {key: DraftCost(**cost) for key, cost in fields.get("draft", {}).items()}
            for key in ("tokens", "seconds"):
                _require(isinstance(fields.get(key), list), f"needs a list of {key}")
                fields[key] = tuple(fields[key])
            return cls(**fields)
        except InputError as error:
            raise InputError(error.message, field=name) from error
        except TypeError as error:  # an unknown key, or a drafter's cost that is no object
            reason = str(error).rpartition("__init__() ")[2].removeprefix("paceline.")
            raise InputError(f"is no cost table ({reason}).", field=name) from error

    @classmethod
    def load(cls, path: str | Path, name: str = "cost") -> CostTable:
        """Read a file in the documented form.

        Raises:
            InputError: it cannot be read or is not that.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read {path} ({error}).", field=name) from error
        return cls.from_json(value, name)


class CostModel:
    """A cost table and its corrections.

    Args:
        table: what was measured.
        adapt: whether to follow measured steps.
        overlaps: whether plain steps are launched one behind the other, and host work hides behind them. Then what a
            step takes in which drafters were asked in vain says nothing about plain ones.
    """

    def __init__(self, table: CostTable, *, adapt: bool = True, overlaps: bool = False) -> None:
        self.table = table
        self.overlaps = overlaps
        self._adapt = adapt
        self._sizes = np.array(table.tokens, dtype=np.float64)
        # Times err upward, and no size is dearer than a larger one that could take its place.
        self._seconds = np.minimum.accumulate(np.array(table.seconds, dtype=np.float64)[::-1])[::-1]
        middle = min(int(np.searchsorted(self._sizes, self._sizes[-1] / 2)), len(self._sizes) - 2)
        slope = (self._seconds[-1] - self._seconds[middle]) / (self._sizes[-1] - self._sizes[middle])
        self._slope = max(float(slope), 1e-9)
        self._pace = Pace()
        self._draft = dict(table.draft)
        self._drafters: dict[str, Tracker] = {}

    def table_seconds(self, num_tokens: FloatArray, num_sequences: int, num_context: float) -> FloatArray:
        """Expected seconds of steps with `num_tokens` tokens (ascending), without corrections."""
        if self.table.padded:
            at = np.minimum(np.searchsorted(self._sizes, num_tokens), len(self._sizes) - 1)
            products: FloatArray = self._seconds[at]
        else:
            products = np.interp(num_tokens, self._sizes, self._seconds)
        around = (
            self.table.per_step
            + self.table.per_sequence * (num_sequences - 1)
            + self.table.per_context_token * num_context
        )
        products += around
        if num_tokens[-1] > self._sizes[-1]:
            products += np.maximum(num_tokens - self._sizes[-1], 0.0) * self._slope
        return products

    def step_seconds(self, num_committed: int, most: int, num_requests: int, num_context: float) -> FloatArray:
        """Expected seconds of steps over 0 .. `most` draft nodes, drafting itself not counted.  # [most + 1]

        Args:
            num_committed: committed tokens in the forward (roots and prompt chunks).
            most: most draft nodes.
            num_requests: sequences of the step.
            num_context: tokens of all of them.
        """
        sizes = np.arange(num_committed, num_committed + most + 1, dtype=np.float64)
        seconds = self.table_seconds(sizes, num_requests, num_context)
        if self._adapt:
            seconds *= self._pace.factors(most, num_requests)
        return seconds

    def draft_seconds(self, name: str, depth: float, requests: int) -> float:
        """Expected seconds of one draft; 0 for a drafter not measured yet."""
        return self._draft.get(name, _NO_COST).seconds(depth, requests)

    def learn(self, stats: StepStats, drafters: Collection[str] | None = None) -> None:
        """Take in a step; the time of its drafters goes to them. Of one with prompt chunks only that is learned.

        Args:
            stats: what was measured.
            drafters: those whose own costs matter; None: all that were asked.
        """
        if not self._adapt:
            return
        for name, depth in stats.draft_depths.items():
            if drafters is None or name in drafters:
                self._learn_draft(name, depth, stats.num_sampling, stats.draft_seconds[name])
        if stats.num_prompt_tokens or not stats.num_sampling:
            return
        nodes = stats.num_draft_nodes
        if self.overlaps and not nodes and stats.draft_seconds:
            return
        size = np.array([float(stats.num_sampling + nodes)])
        expected = float(self.table_seconds(size, stats.num_sequences, stats.num_context_tokens)[0])
        taken = stats.step_seconds - sum(stats.draft_seconds.values())
        self._pace.learn(stats.num_sequences, nodes, max(taken, 1e-9) / expected)

    def _learn_draft(self, name: str, depth: int, requests: int, seconds: float) -> None:
        """Split a draft's time by what it grows with; where that never varies, `_LIKELY` decides."""
        known = self._draft.get(name, _NO_COST)
        row = np.array([1.0, requests, depth, requests * depth])
        unit = _LIKELY / np.square(np.maximum(row, 1.0))
        expected = max(known.seconds(depth, requests) or seconds, 1e-9)
        tracker = self._drafters.get(name)
        if tracker is None:
            values = np.array([known.per_step, known.per_request, known.per_depth, known.per_node])
            tracker = self._drafters[name] = Tracker(values, np.diag(expected**2 * unit))
        tracker.learn(row, seconds, (_DRAFT_NOISE * expected) ** 2, _DRAFT_DRIFT * unit)
        tracker.keep_positive()
        self._draft[name] = DraftCost(*tracker.values.tolist())


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _FOREVER


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _FOREVER


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(f"{message}.", field="cost")


_NO_COST = DraftCost()
