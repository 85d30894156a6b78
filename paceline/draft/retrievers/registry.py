"""Retrievers by name: they find the parts of a long prompt that its question is about.

A new one is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from paceline.errors import SpeculationSpecError

if TYPE_CHECKING:  # `--help` lists the drafters, and NumPy would hold it up
    from paceline.arrays import FloatArray


class Retriever(Protocol):
    """Judges chunks of a text by a question. The same arguments give the same scores, on every call."""

    def scores(self, query: str, chunks: Sequence[str]) -> FloatArray:
        """How well each chunk fits; one that does not fit at all has at most 0.  # [len(chunks)]"""
        ...


@dataclass(frozen=True, slots=True)
class RetrieverEntry:
    """Where a retriever lives, and the package it cannot do without."""

    path: str
    module: str
    package: str


RETRIEVERS = {
    "bm25": RetrieverEntry("paceline.draft.retrievers.bm25:BM25Retriever", "bm25s", "bm25s"),
    "embeddings": RetrieverEntry(
        "paceline.draft.retrievers.embeddings:EmbeddingRetriever", "sentence_transformers", "sentence-transformers"
    ),
}


def check_retriever(name: str) -> str:
    """The name, if that retriever can run here.

    Raises:
        SpeculationSpecError: there is none of that name, or its package is not installed.
    """
    if name not in RETRIEVERS:
        raise SpeculationSpecError(
            f"nothing called {name!r} can retrieve.",
            field="speculation",
            fix=f"Write retriever={' or retriever='.join(RETRIEVERS)}, or leave retriever out.",
        )
    needed = RETRIEVERS[name]
    if find_spec(needed.module) is None:
        raise SpeculationSpecError(
            f"retriever {name} needs the package {needed.package}, which is not installed.",
            field="speculation",
            fix=f"pip install {needed.package}, or choose another retriever.",
        )
    return name


def create_retriever(name: str, **options: str) -> Retriever:
    """A new retriever.

    Args:
        name: of the retriever.
        **options: those of its class.

    Raises:
        SpeculationSpecError: it cannot run here.
    """
    module, _, attribute = RETRIEVERS[check_retriever(name)].path.partition(":")
    made: Retriever = getattr(import_module(module), attribute)(**options)
    return made
