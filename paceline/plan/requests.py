"""What a policy keeps of every request: its limits, and a row of numbers in a table that grows with the batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.config import RequestSpeculation
from paceline.engine.request import Request

_NO_CAP = 1 << 20


class KnownRequest(NamedTuple):
    """A running request."""

    row: int
    """In `RequestTable.records`."""
    longest: int
    """Draft nodes may not reach beyond so many tokens of the sequence."""
    cap: int
    """Most draft nodes of a step that the request allows."""
    weight: float
    deadline: float
    """On the monotonic clock; infinite without one."""

    @property
    def special(self) -> bool:
        """Whether it asks for another treatment than the rest."""
        return self.weight != 1.0 or self.deadline != np.inf


class Batch(NamedTuple):
    """The requests that commit tokens in a step, as arrays."""

    requests: tuple[Request, ...]
    rows: IntArray  # [len(requests)]
    longest: IntArray  # [len(requests)], see `KnownRequest`
    caps: IntArray  # [len(requests)]


_NO_NUMBERS = np.empty(0, dtype=np.int64)


class RequestTable:
    """The requests that are running.

    Args:
        columns: numbers kept for each, 0 at first.
    """

    def __init__(self, columns: int) -> None:
        self.records: FloatArray = np.zeros((64, columns))  # [capacity, columns]
        self.num_special = 0
        """Running requests with a weight or a deadline."""
        self._known: dict[Request, KnownRequest] = {}
        self._free = list(range(len(self.records) - 1, -1, -1))
        self._last = Batch((), _NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS)

    def rows(self, requests: tuple[Request, ...]) -> IntArray:
        """Row numbers; -1 for a request that nothing is kept of.  # [len(requests)]"""
        if requests != self._last.requests:
            known = self._known
            return np.array([known[r].row if r in known else -1 for r in requests], dtype=np.int64)
        return self._last.rows

    def batch(self, requests: tuple[Request, ...], max_model_len: int) -> Batch:
        """What is kept of a step's requests. The same batch mostly runs again, so the last one is remembered."""
        if requests != self._last.requests:
            known = [self._known.get(request) or self._add(request, max_model_len) for request in requests]
            self._last = Batch(
                requests,
                np.array([k.row for k in known], dtype=np.int64),
                np.array([k.longest for k in known], dtype=np.int64),
                np.array([k.cap for k in known], dtype=np.int64),
            )
        return self._last

    def of(self, request: Request) -> KnownRequest:
        """What is kept of a request of the last batch."""
        return self._known[request]

    def forget(self, request: Request) -> None:
        """Free the request's row."""
        found = self._known.pop(request, None)
        if found is not None:
            self._last = Batch((), _NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS)
            self._free.append(found.row)
            self.num_special -= found.special

    def _add(self, request: Request, max_model_len: int) -> KnownRequest:
        if not self._free:
            size = len(self.records)
            self.records = np.concatenate([self.records, np.zeros_like(self.records)])
            self._free = list(range(2 * size - 1, size - 1, -1))
        wish = request.params.speculation or RequestSpeculation()
        made = KnownRequest(
            row=self._free.pop(),
            longest=min(request.prompt_len + request.params.max_tokens, max_model_len) - 1,
            cap=0 if wish.off else _NO_CAP if wish.cap is None else wish.cap,
            weight=wish.weight,
            deadline=np.inf if wish.deadline is None else request.stats.arrival + wish.deadline,
        )
        self.records[made.row] = 0.0
        self.num_special += made.special
        self._known[request] = made
        return made
