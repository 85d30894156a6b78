"""Drafters for vLLM's `custom_class`: rows are recognised, drafts continue known text, the scheduler's word holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paceline.errors import ConfigError
from paceline.integrations.vllm.asking import BOARD
from paceline.integrations.vllm.drafters import RecyclingProposer, SuffixProposer
from paceline.integrations.vllm.rows import Rows


@pytest.fixture(autouse=True)
def _clean_board() -> Iterator[None]:
    yield
    BOARD.drafter, BOARD.length, BOARD.seconds = False, None, 0.0


def config(most: int = 4, options: dict[str, Any] | None = None) -> Any:
    """The part of a `VllmConfig` that is read."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=most),
        model_config=SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 100),
        additional_config={"paceline": options or {}},
    )


class Batch:
    """vLLM's batch: rows of token ids that move."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def arrays(self) -> tuple[Any, Any]:
        tokens = np.zeros((8, 64), dtype=np.int32)
        for i, row in enumerate(self.rows):
            tokens[i, : len(row)] = row
        return np.array([len(r) for r in self.rows] + [0] * 4, dtype=np.int32), tokens

    def step(self, proposer: Any, *new: list[int]) -> list[list[int]]:
        for row, tokens in zip(self.rows, new, strict=True):
            row += tokens
        counts, tokens = self.arrays()
        drafts: list[list[int]] = proposer.propose(list(new), counts, tokens, slot_mappings=None)
        return drafts


def test_rows_keep_their_request_when_they_move() -> None:
    rows, batch = Rows(), Batch()
    a, b, c = [*range(20)], [*range(30, 55)], [7] * 12
    batch.rows = [[*a, 1], [*b, 2], [*c, 3]]
    (first, second, third), _ = rows.read([[1], [2], [3]], *batch.arrays())
    batch.rows = [[*c, 3, 4, 5], [*a, 1, 9]]  # the middle one has ended, the others changed places
    (one, two), _ = rows.read([[4, 5], [9]], *batch.arrays())
    assert (one, two) == (third, first)
    assert first is not None
    assert third is not None
    assert first.tokens == [*a, 1, 9]
    assert third.tokens == [*c, 3, 4, 5]
    assert first.request.prompt_len == 20
    for _ in range(80):
        _, ended = rows.read([[], []], *batch.arrays())
        if ended:
            break
    assert second is not None
    assert second.request in ended


def test_a_row_that_was_left_out_for_some_steps_is_found_again() -> None:
    rows, batch = Rows(), Batch()
    batch.rows = [[*range(20), 1]]
    (before,), _ = rows.read([[1]], *batch.arrays())
    batch.rows[0] += [5, 6, 7, 8]  # steps in which nobody asked
    (after,), _ = rows.read([[8]], *batch.arrays())
    assert after is before
    assert after is not None
    assert after.tokens == batch.rows[0]


@pytest.mark.parametrize("proposer", [SuffixProposer, RecyclingProposer])
def test_drafts_go_on_as_the_text_did(proposer: Any) -> None:
    made, batch = proposer(config(most=3)), Batch()
    batch.rows = [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [50, 51, 52]]
    drafts = batch.step(made, [4], [])
    assert drafts[0] == [5, 6, 7]
    assert drafts[1] == [], "its prompt is not read yet"


def test_the_suffix_drafter_learns_from_other_requests_unless_told_not_to() -> None:
    for kept, expected in ((500_000, [22, 23]), (0, [])):
        made, batch = SuffixProposer(config(most=2, options={"suffix_tokens": kept})), Batch()
        batch.rows = [[1, 2, 3], [9, 8]]
        batch.step(made, [20], [])
        batch.step(made, [21, 22, 23, 24], [])
        assert batch.step(made, [25], [20, 21])[1] == expected


@pytest.mark.parametrize("proposer", [SuffixProposer, RecyclingProposer])
def test_the_schedulers_word_and_the_models_length_hold(proposer: Any) -> None:
    made, batch = proposer(config(most=3)), Batch()
    assert BOARD.drafter
    batch.rows = [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3]]
    BOARD.length = 1
    assert batch.step(made, [4]) == [[5]]
    BOARD.length, BOARD.seconds = 0, 0.0
    assert batch.step(made, [5]) == [[]]
    assert BOARD.seconds == 0.0, "asked for nothing, it does nothing"
    BOARD.length = 3
    batch.rows = [([1, 2, 3, 4] * 16)[:62]]
    assert len(batch.step(made, [3])[0]) == 0, "one more token fills the model's 64"


def test_an_exception_is_logged_once_and_nobody_gets_drafts(caplog: pytest.LogCaptureFixture) -> None:
    made, batch = SuffixProposer(config()), Batch()
    made._rows.read = lambda *_: 1 / 0
    batch.rows = [[1, 2], [3]]
    with caplog.at_level(logging.ERROR, logger="vllm.paceline"):
        assert batch.step(made, [4], [5]) == [[], []]
        assert batch.step(made, [4], [5]) == [[], []]
    assert len(caplog.records) == 1


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="suffix_tokens: must be a whole number"):
        SuffixProposer(config(options={"suffix_tokens": -1}))
