"""Guessers of draft models by name. A new one is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from paceline.errors import SpeculationSpecError

if TYPE_CHECKING:
    from paceline.draft.guess import Guesser

GUESSERS = {"ngram": "paceline.draft.guessers.ngram:NgramGuesser"}


def create_guesser(name: str) -> Guesser:
    """A new guesser.

    Raises:
        SpeculationSpecError: there is none of that name.
    """
    if name not in GUESSERS:
        raise SpeculationSpecError(
            f"nothing called {name!r} can guess for a draft model.",
            field="speculation",
            fix=f"Write guess={' or guess='.join(GUESSERS)}, or leave guess out.",
        )
    module, _, attribute = GUESSERS[name].partition(":")
    made: Guesser = getattr(import_module(module), attribute)()
    return made
