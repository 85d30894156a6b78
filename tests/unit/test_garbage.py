"""A loaded model is left out of garbage collections while it is used, and goes when nobody uses it any more."""

from __future__ import annotations

import gc
import weakref

from engine_tools import greedy, llm, prompt_of

from paceline import LLM


def run_once() -> weakref.ref[LLM]:
    """An LLM that has gone when this returns."""
    used = llm()
    assert gc.get_freeze_count() > 10_000
    used.generate([prompt_of(5)], greedy(3))
    return weakref.ref(used)


def test_what_is_loaded_is_left_out_until_it_goes() -> None:
    gc.unfreeze()
    used = run_once()
    assert gc.get_freeze_count() == 0
    assert used() is None


def test_closing_ends_it_too() -> None:
    with llm():
        assert gc.get_freeze_count()
    assert gc.get_freeze_count() == 0
