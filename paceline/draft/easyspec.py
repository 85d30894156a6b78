"""EasySpec (2502.02493): a draft model whose layers attend side by side, in groups, to draft faster.

First and last layer run as they are. The layers of a group all attend from the group's entry, so that on several
devices they run at the same time. On one, their projections are one product where the model runs through
`transformers` modules; the native forward and our CUDA kernels compute the same layer by layer, which saves no time.
That is not the draft model's own law, but drafts only have to be likely: verification uses the law that drew them.

Keys and values of such a forward are off, too, and would be read again in every later round. So they are discarded
after the round, and the next one begins with an exact forward over what was committed since (the paper's bonus
calibration), which also yields its first token.

Options: `model` (the draft model), `group` (layers of a group; 1 is the plain draft model, bit for bit) and `calibrate`
(0: keep what the groups computed; for comparison only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.cache.block_manager import BlockManager
from paceline.draft.draft_model import DraftModel, Scratch, Wanted
from paceline.draft.model_drafter import MAX_TOKENS, ModelDrafter
from paceline.errors import SpeculationSpecError
from paceline.model.path import ForwardPath, check_family
from paceline.model.runner import ModelRunner

GROUP = 4


class EasySpecModel(DraftModel):
    """A draft model that is exact in the first forward of a round only.

    Args:
        runner: the draft model.
        blocks: its block manager.
        group: layers of a group.
        calibrate: discard what groups computed.
        options: see `DraftModel`.
    """

    def __init__(
        self, runner: ModelRunner, blocks: BlockManager, *, group: int, calibrate: bool, **options: Any
    ) -> None:
        super().__init__(runner, blocks, **options)
        self._grouped = ForwardPath.in_groups(runner.kv.shape.num_layers, group)
        self._calibrate = calibrate

    def score(self, wanted: Sequence[Wanted], *, hidden: bool = False) -> None:
        """Exact where anybody's round begins."""
        begins = any(want.scratch.root_row is None for want in wanted)
        self.path = None if begins and self._calibrate else self._grouped
        super().score(wanted, hidden=hidden)

    def close(self, scratch: Scratch, path: Sequence[int]) -> None:
        """End the round and forget its nodes."""
        super().close(scratch, () if self._calibrate else path)


class EasySpecDrafter(ModelDrafter):
    """The drafter.

    Args:
        runner: the draft model.
        blocks: its block manager.
        group: layers of a group.
        calibrate: discard what groups computed.
        options: see `ModelDrafter`.

    Raises:
        SpeculationSpecError: a group of no layers.
        ConfigError: a draft model whose layers cannot be grouped.
    """

    name = "easyspec"

    def __init__(
        self, runner: ModelRunner, blocks: BlockManager, *, group: int = GROUP, calibrate: int = 1, **options: Any
    ) -> None:
        if group < 1:
            raise SpeculationSpecError(
                f"easyspec:group={group} is no group.", field="speculation", fix="Give 1 or more layers."
            )
        config: Any = runner.model.config
        check_family(getattr(config, "model_type", None), self.name)
        super().__init__(runner, blocks, **options)
        self.model: DraftModel = EasySpecModel(
            runner,
            blocks,
            group=group,
            calibrate=bool(calibrate),
            vocab_size=options["vocab_size"],
            max_model_len=options["max_model_len"],
            max_tokens=options.get("max_tokens", MAX_TOKENS),
        )
