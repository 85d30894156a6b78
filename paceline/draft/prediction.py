"""A user-given prediction: text the caller expects back (OpenAI's `prediction`), a free draft.

A cursor starts at the prediction's beginning and moves with the output. After a divergence it first assumes that one
token was replaced by one, and jumps as soon as the last two or more output tokens are found in the prediction. The
confidence class is the number of predicted tokens confirmed in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.draft.ngram import LENGTH_CLASSES, NgramIndex, length_class
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap

_LOOKUP = (2, 6)


class _State:
    def __init__(self, request: Request) -> None:
        self.index = NgramIndex(*_LOOKUP)
        self.index.extend(request.prediction_ids)
        self.cursor = 0  # index in the prediction of the token expected next
        self.run = 7  # predicted tokens confirmed in a row
        self.prompt_len = self.read = request.prompt_len

    def follow(self, tokens: Sequence[int]) -> None:
        """Move the cursor over newly committed tokens."""
        predicted = self.index.tokens
        for i in range(self.read, len(tokens)):
            if self.cursor < len(predicted) and predicted[self.cursor] == tokens[i]:
                self.cursor += 1
                self.run += 1
            else:
                match = self.index.find(tokens[max(self.prompt_len, i + 1 - _LOOKUP[1]) : i + 1])
                self.cursor, self.run = (match.at, match.length) if match.length else (self.cursor + 1, 0)
        self.read = len(tokens)


class PredictionDrafter:
    """Drafts from each request's own `prediction`; proposes nothing for requests without one."""

    name = "prediction"
    taps: frozenset[Tap] = frozenset()
    cost_per_token = False
    blocks = None

    def __init__(self) -> None:
        self._states: dict[Request, _State] = {}
        self.prior = np.linspace(0.4, 0.98, LENGTH_CLASSES)

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """The next predicted tokens of every request that has a prediction."""
        return [self._propose(c) if c.request.prediction_ids else NOTHING for c in contexts]

    def _propose(self, context: DraftContext) -> Proposal:
        request = context.request
        if request not in self._states:
            self._states[request] = _State(request)
        state = self._states[request]
        state.follow(request.token_ids)
        drafted = state.index.tokens[state.cursor : state.cursor + max(context.budget, 0)]
        run = max(state.run, 1)
        return chain(drafted, [length_class(run + depth) for depth in range(len(drafted))]) if drafted else NOTHING

    def observe(self, observation: Observation) -> None:
        """Nothing to learn: the committed tokens are read at the next proposal."""

    def forget(self, request: Request) -> None:
        """Drop the request's place in its prediction."""
        self._states.pop(request, None)
