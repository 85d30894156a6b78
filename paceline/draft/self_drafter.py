"""Drafts with the target itself, without a second copy of it: the base of the self-speculative drafters."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.cache.block_manager import BlockManager
from paceline.draft.model_drafter import ModelDrafter
from paceline.draft.self_model import KvView, SelfModel, Target
from paceline.draft.shapes.base import TreeShape
from paceline.model.path import ForwardPath


class SelfDrafter(ModelDrafter):
    """Drafts along a path, over a view of the context.

    Args:
        target: the model.
        vocab_size: of the target.
        coupled: see `ModelDrafter`.
        shape: how trees grow.
        stop_ids: the target's end tokens.
        view: what drafts read.
        path: the layers that they run; None: all.
    """

    def __init__(
        self,
        target: Target,
        *,
        vocab_size: int,
        coupled: bool,
        shape: TreeShape,
        stop_ids: Sequence[int],
        view: KvView,
        path: ForwardPath | None = None,
    ) -> None:
        super().__init__(
            target.runner, target.blocks, vocab_size=vocab_size, coupled=coupled, shape=shape, stop_ids=stop_ids
        )
        self.model: SelfModel = SelfModel(target, vocab_size=vocab_size, view=view, path=path)

    @property
    def blocks(self) -> BlockManager | None:
        """None: it has no cache of its own."""
        return None
