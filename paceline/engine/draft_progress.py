"""What a plan may look at while a draft model drafts: the dynamic half of a length policy.

A drafter that takes forwards of its own asks `KeepDrafting` after each one who goes on. Everything in `DraftProgress`
is about tokens that are kept whatever the answer is, so stopping by it changes no law (dropping a drawn token would).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.arrays import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class DraftProgress:
    """The drafts that could go on after forward number `depth` (1: the first)."""

    depth: int
    rows: IntArray  # [n], number of each request in the step
    nodes: IntArray  # [n], drafted so far
    survival: FloatArray  # [n], estimated survival of all nodes that the next forward would extend, summed
    chain_survival: FloatArray  # [n], product of the probabilities its own law gave to the likeliest path
    entropy: FloatArray  # [n], nats, of the raw draft distribution the newest tokens come from (largest of its nodes)
    confidence: FloatArray  # [n], largest probability in that distribution
    hidden: torch.Tensor | None = None  # [n, hidden_size], where the plan wants it: the newest likeliest node's
    top_probabilities: FloatArray | None = None  # [n, 10], likewise: the largest probabilities, descending


class KeepDrafting(Protocol):
    """A policy's answer to every draft forward: who takes another one."""

    wants_hidden: bool
    """Whether it reads `DraftProgress.hidden`."""
    wants_top_probabilities: bool
    """Whether it reads `DraftProgress.top_probabilities`."""

    def keep(self, progress: DraftProgress) -> BoolArray:
        """Who goes on.  # [n]"""
        ...
