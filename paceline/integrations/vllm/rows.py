"""Which request a row of vLLM's batch is.

A `custom_class` drafter is shown rows of token ids and no request ids, and rows move when requests come and go. So a
row is recognised by what stands in it: a request that was seen before is one whose tokens are the row's beginning,
checked at its first and its newest tokens. Two requests that look the same there may be taken for one another; the
drafts are then worse, and never wrong. A request that was not seen for long is taken to have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.config import SamplingParams
from paceline.engine.request import Request

_CHECKED = 16
"""Tokens compared at either end."""
_UNSEEN = 64
"""Calls after which a request that was in none of them has ended."""


@dataclass(eq=False, slots=True)
class Row:
    """A request, as far as it was seen."""

    request: Request
    tokens: list[int]
    """The request's own list, which grows as the row does."""
    seen: int
    """Number of the call that it was last in."""
    fresh: int = 0
    """Tokens of the list that came in that call (all, in the first)."""


class Rows:
    """The requests of one worker."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        """Where each was last."""
        self._lost: list[Row] = []
        """Those whose place was taken by another."""
        self._call = 0
        self._number = 0

    def read(
        self, sampled: Sequence[Sequence[int]], counts: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> tuple[list[Row | None], list[Request]]:
        """Recognise the rows that sampled something.

        Args:
            sampled: new tokens of every row; none while its prompt is read.  # [num_rows]
            counts: tokens of every row, the new ones among them.  # [>= num_rows]
            tokens: the rows.  # [>= num_rows, longest]

        Returns:
            For every row its request, or None; and the requests that have ended.
        """
        self._call += 1
        found: list[Row | None] = []
        before, self._rows = self._rows, {}
        pool = {id(row): row for row in (*before.values(), *self._lost)}
        for i, new in enumerate(sampled):
            row = None
            if len(new):
                count = int(counts[i])
                near = before.get(i)
                if near is not None and id(near) in pool and _begins(tokens[i], count, near.tokens):
                    row = near
                else:
                    row = self._search(pool, tokens[i], count)
                if row is None:
                    row = self._start(count - len(new))
                else:
                    del pool[id(row)]
                more = tokens[i, len(row.tokens) : count].tolist()
                row.tokens.extend(more)
                row.seen, row.fresh = self._call, len(more)
                self._rows[i] = row
            found.append(row)
        ended = [row.request for row in pool.values() if self._call - row.seen >= _UNSEEN]
        self._lost = [row for row in pool.values() if self._call - row.seen < _UNSEEN]
        return found, ended

    def _search(self, pool: dict[int, Row], row: NDArray[np.int32], count: int) -> Row | None:
        """The longest request that the row goes on."""
        fits = [known for known in pool.values() if _begins(row, count, known.tokens)]
        return max(fits, key=_length, default=None)

    def _start(self, prompt_len: int) -> Row:
        self._number += 1
        tokens: list[int] = []
        request = Request(f"row-{self._number}", tokens, prompt_len, SamplingParams(), 0)
        return Row(request, tokens, self._call)


def _begins(row: NDArray[np.int32], count: int, tokens: list[int]) -> bool:
    """Whether a row of `count` tokens goes on after these."""
    size = len(tokens)
    if size > count:
        return False
    start = max(size - _CHECKED, 0)
    newest, first = row[start:size].tolist(), row[: min(size, _CHECKED)].tolist()
    return bool(tokens[start:] == newest and tokens[:_CHECKED] == first)


def _length(row: Row) -> int:
    return len(row.tokens)
