"""Cosine similarity of text embeddings (the paper's retriever, with BGE-M3), by sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sentence_transformers import SentenceTransformer

from paceline.arrays import FloatArray
from paceline.errors import SpeculationSpecError

_LEAST_COSINE = 0.3
"""A chunk below it is not about the question; the paper's bound."""


class EmbeddingRetriever:
    """Embeds on the CPU, where it takes nothing from the target.

    Args:
        embedder: any model that sentence-transformers loads.

    Raises:
        SpeculationSpecError: it cannot be loaded.
    """

    def __init__(self, embedder: str = "BAAI/bge-m3") -> None:
        try:
            self._model = SentenceTransformer(embedder, device="cpu")
        except Exception as error:
            raise SpeculationSpecError(
                f"embedding model {embedder} cannot be loaded: {error}",
                field="speculation",
                fix="Give a folder or hub id that sentence-transformers can load, or write retriever=bm25.",
            ) from error

    def scores(self, query: str, chunks: Sequence[str]) -> FloatArray:
        """Cosine of each chunk with the query, above the least.  # [len(chunks)]"""
        options = {"normalize_embeddings": True, "show_progress_bar": False, "convert_to_numpy": True}
        asked, found = self._model.encode([query], **options), self._model.encode(list(chunks), **options)
        return np.asarray(found @ asked[0], dtype=np.float64) - _LEAST_COSINE
