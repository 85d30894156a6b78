"""A loaded model is left out of garbage collections while it is used, and goes when nobody uses it any more."""

from __future__ import annotations

import gc
import weakref

import pytest
from engine_tools import greedy, llm, prompt_of

from paceline import LLM
from paceline.engine import garbage


def forget_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that other tests loaded in this process."""
    monkeypatch.setattr(garbage, "_loaded", set())
    gc.unfreeze()


def run_once() -> weakref.ref[LLM]:
    """An LLM that has gone when this returns."""
    used = llm()
    assert gc.get_freeze_count() > 10_000
    used.generate([prompt_of(5)], greedy(3))
    return weakref.ref(used)


def test_what_is_loaded_is_left_out_until_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_others(monkeypatch)
    used = run_once()
    assert gc.get_freeze_count() == 0
    assert used() is None


def test_closing_ends_it_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_others(monkeypatch)
    with llm():
        with llm():
            assert gc.get_freeze_count()
        assert gc.get_freeze_count(), "another one is open"
    assert gc.get_freeze_count() == 0
