"""Threads of the native forward: all run, meet, and hand errors on."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from numba import njit

from paceline.model.native.team import Team, meet


@njit(nogil=True)
def _relay(thread: int, threads: int, place: int, rounds: int, cells: np.ndarray) -> None:
    """In every round each thread adds what its neighbour had after the round before."""
    met = 0
    for i in range(rounds):
        before = cells[i % 2, (thread + 1) % threads]
        cells[(i + 1) % 2, thread] = before + thread
        met = meet(place, threads, met)


@pytest.fixture(params=["openmp", "pool"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Team:
    if request.param == "pool":
        monkeypatch.setattr("paceline.model.native.team._openmp", lambda: None)
    return Team(3)


def test_every_thread_runs_once(team: Team) -> None:
    for _ in range(20):
        seen: list[tuple[int, int]] = []
        team.run(lambda thread, threads, _, seen=seen: seen.append((thread, threads)))
        threads = seen[0][1]
        assert sorted(seen) == [(i, threads) for i in range(threads)]


def test_nobody_leaves_a_barrier_early(team: Team) -> None:
    """A thread that ran ahead would read its neighbour's cell before it is written."""
    rounds = 2000
    cells = np.zeros((2, 3), dtype=np.int64)
    counts: list[int] = []
    team.run(lambda i, n, place: (counts.append(n), _relay(i, n, place, rounds, cells)))
    n = counts[0]
    expected = [0] * n
    for _ in range(rounds):
        expected = [expected[(i + 1) % n] + i for i in range(n)]
    assert cells[rounds % 2, :n].tolist() == expected


def test_an_error_reaches_the_caller_and_the_team_goes_on(team: Team) -> None:
    def fail(thread: int, threads: int, _: int) -> None:
        if thread == threads - 1:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        team.run(fail)
    test_every_thread_runs_once(team)


def test_nobody_waits_for_one_that_failed(team: Team) -> None:
    cells = np.zeros((2, 3), dtype=np.int64)

    def fail(thread: int, threads: int, place: int) -> None:
        if thread == 0:
            raise KeyboardInterrupt
        _relay(thread, threads, place, 50, cells)

    with pytest.raises(KeyboardInterrupt):
        team.run(fail)
    test_nobody_leaves_a_barrier_early(team)


def test_callers_take_turns(team: Team) -> None:
    inside, most = [0], [0]

    def work(thread: int, _: int, __: int) -> None:
        if thread == 0:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.001)  # long enough for another caller to come in, were there no lock
            inside[0] -= 1

    callers = [threading.Thread(target=lambda: [team.run(work) for _ in range(20)]) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most[0] == 1
