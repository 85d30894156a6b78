"""What a policy keeps of every request, in arrays: a row number per request, a column per quantity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.config import RequestSpeculation
from paceline.engine.request import Request

LENGTH_LIMIT, CAP, WEIGHT, DEADLINE, FIRST_OFFSET = range(5)
_NO_CAP = 1 << 20


class RequestTable:
    """Rows of the requests that are running.

    Args:
        offsets: columns for the records that the survival estimates keep.
    """

    def __init__(self, offsets: int) -> None:
        self.data: FloatArray = np.zeros((64, FIRST_OFFSET + offsets))  # [capacity, columns]
        self._row: dict[Request, int] = {}
        self._free = list(range(len(self.data) - 1, -1, -1))

    def rows(self, requests: Sequence[Request], max_model_len: int) -> IntArray:
        """Row numbers; requests seen for the first time get a fresh row.  # [len(requests)]"""
        known = self._row
        found = [known[r] if r in known else self._add(r, max_model_len) for r in requests]
        return np.array(found, dtype=np.int64)

    def known(self, requests: Sequence[Request]) -> IntArray:
        """Row numbers of requests that have been planned for; -1 where one has not.  # [len(requests)]"""
        return np.array([self._row.get(r, -1) for r in requests], dtype=np.int64)

    def room(self, rows: IntArray, lengths: IntArray, cap: int) -> IntArray:
        """Most draft nodes per request: at most `cap` and what the request itself allows, and no path longer than
        `max_tokens` and the context leave.  # [len(rows)]"""
        limit, own = self.data[rows, LENGTH_LIMIT], self.data[rows, CAP]
        room: IntArray = np.clip(np.minimum(limit - lengths, own), 0, cap).astype(np.int64)
        return room

    def forget(self, request: Request) -> None:
        """Free the request's row."""
        row = self._row.pop(request, None)
        if row is not None:
            self._free.append(row)

    def _add(self, request: Request, max_model_len: int) -> int:
        if not self._free:
            size = len(self.data)
            self.data = np.concatenate([self.data, np.zeros_like(self.data)])
            self._free = list(range(2 * size - 1, size - 1, -1))
        row = self._row[request] = self._free.pop()
        wish = request.params.speculation or RequestSpeculation()
        self.data[row] = 0.0
        self.data[row, LENGTH_LIMIT] = min(request.prompt_len + request.params.max_tokens, max_model_len) - 1
        self.data[row, CAP] = 0 if wish.off else _NO_CAP if wish.cap is None else wish.cap
        self.data[row, WEIGHT] = wish.weight
        deadline = np.inf if wish.deadline is None else request.stats.arrival + wish.deadline
        self.data[row, DEADLINE] = deadline
        return row
