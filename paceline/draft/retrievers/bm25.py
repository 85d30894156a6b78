"""BM25 over the words of the chunks (Robertson et al. 1994), by bm25s (2407.03618)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import bm25s
import numpy as np

from paceline.arrays import FloatArray

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets its own to say what it builds


class BM25Retriever:
    """Words of two letters and more, in lower case; no stop words are left out, so no language is assumed."""

    def scores(self, query: str, chunks: Sequence[str]) -> FloatArray:
        """The BM25 score of each chunk; 0 where it shares no word with the query.  # [len(chunks)]"""
        wanted, *words = _words([query, *chunks])
        if not wanted or not any(words):
            return np.zeros(len(chunks))
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        return np.asarray(index.get_scores(wanted), dtype=np.float64)


def _words(texts: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)
    return found
