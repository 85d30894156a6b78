"""Threads of the native forward: all run, meet, and take turns with other callers'."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from numba import carray, cfunc

from paceline.model.native.team import PART, Team, meet

MOST = 8
"""Threads there is room for below."""


def _relay(thread: int, threads: int, place: int, words: Any) -> None:
    """In every round each thread adds what its neighbour had after the round before.

    Words: rounds, how many threads there were, how often each came, then their cells of even and of odd rounds.
    """
    words = carray(words, (2 + 3 * MOST,), np.int64)
    cells = words[2 + MOST :].reshape(2, MOST)
    words[1] = threads
    words[2 + thread] += 1
    met = 0
    for i in range(words[0]):
        before = cells[i % 2, (thread + 1) % threads]
        cells[(i + 1) % 2, thread] = before + thread
        met = meet(place, threads, met)


RELAY = cfunc(PART, error_model="numpy")(_relay).address


def _relayed(team: Team, rounds: int) -> None:
    """Run it and look at what came of it."""
    words = np.zeros(2 + 3 * MOST, dtype=np.int64)
    words[0] = rounds
    team.run(RELAY, words)
    n = int(words[1])
    assert 1 <= n <= team.threads
    assert words[2 : 2 + MOST].tolist() == [1] * n + [0] * (MOST - n)
    expected = [0] * n
    for _ in range(rounds):
        expected = [expected[(i + 1) % n] + i for i in range(n)]
    assert words[2 + MOST :].reshape(2, MOST)[rounds % 2, :n].tolist() == expected


@pytest.fixture(params=["openmp", "pool"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Team:
    if request.param == "pool":
        monkeypatch.setattr("paceline.model.native.team._openmp", lambda: None)
    return Team(3)


def test_every_thread_runs_once_and_nobody_leaves_a_barrier_early(team: Team) -> None:
    """A thread that ran ahead would read its neighbour's cell before it is written."""
    for rounds in (0, 1, 2000):
        for _ in range(5):
            _relayed(team, rounds)


@pytest.mark.parametrize("threads", [1, 3])
def test_callers_do_not_disturb_each_other(team: Team, threads: int) -> None:
    """Several threads share one counter and one row of numbers, and take turns; teams of one run side by side."""
    team = team if threads == 3 else Team(1)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            for _ in range(50):
                _relayed(team, 20)
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors


def test_a_team_of_one() -> None:
    _relayed(Team(1), 100)
