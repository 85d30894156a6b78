"""RAPID (2502.20330): a draft model that reads retrieved parts of a long prompt, with a short KV cache of its own.

The draft model may be any, or the target itself (`model=self`: the same weights, a second cache), whose forward over a
short text costs less than over the whole one. What it reads is chosen in `retrieved.py`.

With `transfer` above 0 the *target* is another one, by the paper's knowledge transfer; it is made and sampled exactly
by `transfer.py`. At 0 this is a draft model like others, and nothing of the target changes.
"""

from __future__ import annotations

from typing import Any

from paceline.cache.block_manager import BlockManager
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.retrieved import ReadingLimits, RetrievedText
from paceline.draft.retrievers.registry import create_retriever
from paceline.draft.transfer import KnowledgeTransfer
from paceline.engine.request import Request
from paceline.errors import SpeculationSpecError
from paceline.model.runner import ModelRunner


class RapidDrafter(ModelDrafter):
    """Drafts with a model that reads a short text.

    Args:
        runner: the draft model.
        blocks: its block manager.
        tokenizer: the target's.
        start: tokens of the prompt's beginning that are always read.
        chunk: tokens of a chunk of the prompt.
        budget: most tokens of all retrieved chunks.
        question: tokens of the prompt's end that are always read; the query is found there.
        retriever: its name.
        embedder: the model of retriever `embeddings`.
        transfer: strength of the knowledge transfer; 0: none.
        **model: what `ModelDrafter` takes beside these.

    Raises:
        SpeculationSpecError: a number is out of range, or the retriever cannot run here.
    """

    name = "rapid"

    def __init__(
        self,
        runner: ModelRunner,
        blocks: BlockManager,
        *,
        tokenizer: Any,
        start: int = 32,
        chunk: int = 128,
        budget: int = 1024,
        question: int = 128,
        retriever: str = "bm25",
        embedder: str | None = None,
        transfer: float = 0.0,
        **model: Any,
    ) -> None:
        _check(start, chunk, budget, question, transfer)
        if embedder is not None and retriever != "embeddings":
            raise SpeculationSpecError(
                f"rapid has an embedder, and retriever {retriever} has no use for it.",
                field="speculation",
                fix="Write retriever=embeddings, or leave embedder out.",
            )
        options = {} if embedder is None else {"embedder": embedder}
        limits = ReadingLimits(start, chunk, budget, question)
        self.reading = RetrievedText(create_retriever(retriever, **options), tokenizer, limits)
        super().__init__(runner, blocks, reading=self.reading, **model)
        self.target_transform = KnowledgeTransfer(self.model, self.reading, transfer) if transfer else None

    def forget(self, request: Request) -> None:
        """Release the request's draft blocks and its short text."""
        super().forget(request)
        self.reading.forget(request)


def _check(start: int, chunk: int, budget: int, question: int, transfer: float) -> None:
    for name, value in (("start", start), ("chunk", chunk), ("question", question)):
        if value < 1:
            raise SpeculationSpecError(f"rapid:{name}={value} is no number of tokens.", field="speculation")
    if budget < chunk:
        raise SpeculationSpecError(
            f"rapid:budget={budget} holds no chunk of {chunk} tokens.",
            field="speculation",
            fix="Give a budget of at least one chunk.",
        )
    if not 0.0 <= transfer <= 1000.0:
        raise SpeculationSpecError(
            f"rapid:transfer={transfer} is no strength.", field="speculation", fix="Give a number from 0 to 1000."
        )
