"""Drafts with some of the target's layers skipped (Draft & Verify 2309.08168; the base of S3D 2405.20314).

The layers that run read the target's own keys and values of the context, which are exact. Which layers to skip is an
option, `skip=10-17` or `skip="10-13,16"`; without it they are searched for once per model and remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from paceline.draft.self_drafter import SelfDrafter
from paceline.draft.self_model import Target, WholeContext
from paceline.model.path import ForwardPath, check_family

logger = logging.getLogger(__name__)


class LayerSkipDrafter(SelfDrafter):
    """The drafter.

    Args:
        target: the model.
        best_layers: finds the layers to skip.
        skip: the layers to skip; None: what is found.
        options: see `SelfDrafter`.

    Raises:
        ConfigError: a model whose layers cannot be skipped, or layers that it does not have.
    """

    name = "layerskip"

    def __init__(
        self,
        target: Target,
        *,
        best_layers: Callable[[], Sequence[int]],
        skip: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        check_family(target.model_type, self.name)
        self.skipped = tuple(sorted(set(best_layers() if skip is None else skip)))
        if not self.skipped:
            logger.warning("layerskip skips no layer: it drafts with the whole model, which gains nothing")
        super().__init__(
            target,
            view=WholeContext(),
            path=ForwardPath.without(target.num_layers, self.skipped),
            **options,
        )
