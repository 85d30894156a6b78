"""S3D's draft path (2405.20314), untrained: one pass through the bottom and the top layers drafts several tokens.

Behind the root stand mask tokens, one for each further token, and the row of each proposes one. The paper trains the
masks' embedding and small changes of the weights for this pass; here nothing is trained, so that the first token is as
good as that of a draft with skipped layers, and the others are hardly better than chance. It is the base on which a
trained one goes.

A row is known before any token of the draft is drawn, so every slot is independent of the others given the context,
which is what makes it exact under every rule.

Options: `ends` (layers at the bottom, and as many at the top) and `mask` (the token whose embedding stands for a mask;
the end token if it is not given).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from paceline.draft.draft_model import Wanted
from paceline.draft.growing import GrowingTree
from paceline.draft.self_drafter import SelfDrafter
from paceline.draft.self_model import Target, WholeContext
from paceline.errors import SpeculationSpecError
from paceline.model.path import ForwardPath, check_family

logger = logging.getLogger(__name__)
_ENDS = 6


class S3dDrafter(SelfDrafter):
    """The drafter.

    Args:
        target: the model.
        ends: layers at the bottom, and at the top.
        mask: the token in the place of those to come.
        options: see `SelfDrafter`.

    Raises:
        SpeculationSpecError: a token that the model does not have, or no layer.
        ConfigError: a model whose layers cannot be skipped.
    """

    name = "s3d"

    def __init__(
        self,
        target: Target,
        *,
        ends: int = _ENDS,
        mask: int | None = None,
        **options: Any,
    ) -> None:
        check_family(target.model_type, self.name)
        if ends < 1:
            raise SpeculationSpecError(f"s3d:ends={ends} leaves no layer.", field="speculation", fix="Give 1 or more.")
        if 2 * ends >= target.num_layers:
            logger.warning("s3d:ends=%d skips none of %d layers, which gains nothing", ends, target.num_layers)
        self._mask = mask if mask is not None else next(iter(options["stop_ids"]), 0)
        if not 0 <= self._mask < options["vocab_size"]:
            raise SpeculationSpecError(
                f"s3d:mask={mask} is no token of the model.",
                field="speculation",
                fix=f"Give one below {options['vocab_size']}.",
            )
        super().__init__(
            target,
            view=WholeContext(),
            path=ForwardPath.without(target.num_layers, range(ends, target.num_layers - ends)),
            **options,
        )

    def _score(self, trees: Sequence[GrowingTree], *, hidden: bool) -> None:
        """All levels in the first forward: the root, and a chain of masks."""
        wanted = [
            Wanted(tree.scratch, [(i - 1, self._mask) for i in range(tree.levels - 1)])
            for tree in trees
            if tree.scratch.root_row is None
        ]
        if wanted:
            self.model.score(wanted, hidden=hidden)
        for tree in trees:
            for node in tree.pending:
                if node >= 0:
                    tree.fed[node] = len(tree.paths[node]) - 1
