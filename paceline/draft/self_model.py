"""The target as its own draft model: part of its layers, or part of its context, over its own cache.

Nothing is kept between rounds. Draft tokens take the cache places behind the committed ones, those that the target's
own forward over them writes anew in the same step, so a draft leaves no trace whatever it computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.cache.block_manager import BlockManager
from paceline.draft.draft_model import CachedSequence, DraftModel, Scratch
from paceline.engine.request import Request
from paceline.model.path import ForwardPath
from paceline.model.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Target:
    """The target as the engine hands it to drafters that draft with it."""

    runner: ModelRunner
    blocks: BlockManager
    max_model_len: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.runner.kv.shape.num_layers

    @property
    def model_type(self) -> str | None:
        """The family, as `transformers` calls it."""
        config: Any = self.runner.model.config
        return getattr(config, "model_type", None)

    @property
    def has_windows(self) -> bool:
        """Whether any layer sees a window of its context only."""
        config: Any = self.runner.model.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            return any(kind != "full_attention" for kind in kinds)
        return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


class KvView(Protocol):
    """Chooses which part of a request's context its drafts read."""

    def chosen(self, request: Request, full: int) -> Sequence[int] | None:
        """Which of the request's `full` first blocks are read, ascending; None: all of them.

        What is computed behind them, in a block that is not full, is always read.
        """
        ...

    def forget(self, request: Request) -> None:
        """Drop the request's state."""
        ...


class WholeContext:
    """Reads everything."""

    def chosen(self, request: Request, full: int) -> Sequence[int] | None:  # noqa: ARG002
        """All blocks."""
        return None

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


class SelfModel(DraftModel):
    """The target behind the interface of a draft model.

    Args:
        target: the model.
        vocab_size: of the target.
        view: what drafts read.
        path: the layers that they run; None: all.
    """

    def __init__(self, target: Target, *, vocab_size: int, view: KvView, path: ForwardPath | None = None) -> None:
        super().__init__(
            target.runner, target.blocks, vocab_size=vocab_size, max_model_len=target.max_model_len, max_tokens=0
        )
        self.view = view
        self.path = path

    def open(self, request: Request, nodes: int) -> Scratch | None:
        """Begin a round; None where the prompt is not computed yet or the cache has no room."""
        computed, size = request.num_computed, self.blocks.block_size
        committed = len(request.token_ids)
        if computed != committed - 1 or committed + nodes > self.max_model_len:
            return None
        if not self.blocks.grow(request.blocks, committed + nodes):
            return None
        full = computed // size
        chosen = self.view.chosen(request, full)
        if chosen is None:
            chosen = range(full)
        table = [request.blocks[i] for i in chosen] + request.blocks[full:]
        tokens = request.token_ids[:computed]
        unseen = (full - len(chosen)) * size
        return Scratch(request, request.token_ids, CachedSequence(table, tokens, computed, unseen), nodes)

    def make_room(self, scratch: Scratch, nodes: int) -> bool:
        """Room for that many nodes more; False where there is none."""
        blocks = scratch.request.blocks
        before = len(blocks)
        if not self.blocks.grow(blocks, len(scratch.request.token_ids) + scratch.room + nodes):
            return False
        scratch.sequence.table.extend(blocks[before:])
        return True

    def catch_up(self, rounds: Sequence[Scratch]) -> list[Scratch]:
        """Everyone: the target's cache lacks the root only."""
        return list(rounds)

    def close(self, scratch: Scratch, path: Sequence[int]) -> None:
        """Nothing to keep: the target computes the nodes itself, and commit gives back what they do not need."""

    def forget(self, request: Request) -> None:
        """Drop what the view knows."""
        self.view.forget(request)
