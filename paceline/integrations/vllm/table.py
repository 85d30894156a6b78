"""vLLM's own `num_speculative_tokens_per_batch_size`, from measured rates, for those who stay on its scheduler."""

from __future__ import annotations

from collections.abc import Mapping

from paceline.errors import InputError

MARGIN = 0.02
"""What a longer length must win over a shorter one, so that noise does not choose it."""


def best_lengths(rates: Mapping[int, Mapping[int, float]]) -> dict[int, int]:
    """The best length for every batch size: the shortest that nothing longer beats by `MARGIN`.

    Args:
        rates: tokens per second by batch size and length.

    Raises:
        InputError: a batch size was measured without length 0, which all others are compared with.
    """
    best: dict[int, int] = {}
    for size, of_size in rates.items():
        if 0 not in of_size:
            raise InputError("must have 0 among them.", field="--lengths")
        chosen = 0
        for length in sorted(of_size):
            if of_size[length] > (1.0 + MARGIN) * of_size[chosen]:
                chosen = length
        best[size] = chosen
    return best


def batch_table(best: Mapping[int, int]) -> list[list[int]]:
    """Ranges `[first, last, length]`. Between two measured sizes the larger one's length holds: it was measured at a
    load that is at least as high. The last range is open in vLLM: its length goes on."""
    table: list[list[int]] = []
    first = 1
    for size in sorted(best):
        if table and table[-1][2] == best[size]:
            table[-1][1] = size
        else:
            table.append([first, size, best[size]])
        first = size + 1
    return table
