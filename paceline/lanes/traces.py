"""Texts whose two models are recordings: what the target said, and where the draft agreed.

Of a draft that reads tokens, all that acceptance depends on is whether its token after every prefix of the target's own
text is the one that follows. A trace holds that bit and the draft's confidence by position: recorded from real
models (`paceline.bench.lane_traces`), or made from a law of a given acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.arrays import BoolArray, FloatArray
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law
from paceline.lanes.tokens import Guess, Path, Text
from paceline.verify.coupled import CoupledRule

_WRONG = 1 << 40
"""Token ids from here on are in no vocabulary."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One recorded text."""

    output: Path
    agrees: BoolArray  # [len(output)], the draft's token at this position is the output's
    confidence: FloatArray  # [len(output)], what the draft gave to its likeliest token there
    prompt: int = 1
    """Tokens of the prompt."""

    @property
    def acceptance(self) -> float:
        """Share of positions at which the draft is right."""
        return float(self.agrees.mean())

    def text(self, *, reads_prompt: bool = False) -> Text:
        """The text, to be written again: one end, the recorded length."""
        source = Recording(self)
        return Text(
            source,
            source,
            CoupledRule(),
            Noise(0),
            start=self.prompt,
            vocab_size=_WRONG,
            limit=len(self.output),
            unread=self.prompt if reads_prompt else 0,
        )


class Recording:
    """Target and draft of a trace. Off the recorded text the draft goes on, wrong, as confident as it was there."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def laws(self, path: Path, tokens: Path) -> Sequence[Law]:
        """Points: the recorded token, after every prefix of the output."""
        whole = (*path, *tokens)
        return [Law.point(self._next(whole[:end])) for end in range(len(path), len(whole) + 1)]

    def guess(self, path: Path, round_id: int) -> Guess | None:  # noqa: ARG002
        """What the draft said there; nothing behind the end."""
        at = len(path)
        if at >= len(self._trace.output):
            return None
        right = self._trace.agrees[at] and self._on_track(path)
        return Guess(self._trace.output[at] if right else _WRONG + at, float(self._trace.confidence[at]))

    def _next(self, path: Path) -> int:
        on_track = len(path) < len(self._trace.output) and self._on_track(path)
        return self._trace.output[len(path)] if on_track else 2 * _WRONG

    def _on_track(self, path: Path) -> bool:
        return path == self._trace.output[: len(path)]


def made(acceptance: float, length: int, seed: int, *, spread: float = 2.0, prompt: int = 1) -> Trace:
    """A trace of independent positions.

    At each position the chance that the draft is right is drawn from a beta law with mean `acceptance` (the smaller
    `spread`, the more chances lie near 0 and 1); the draft's confidence is that chance, so it is calibrated.

    Args:
        acceptance: between 0 and 1, exclusive.
        length: output tokens.
        seed: of the draws.
        spread: the sum of the beta law's parameters.
        prompt: tokens of the prompt.
    """
    random = np.random.default_rng([seed, length])
    chance = random.beta(acceptance * spread, (1.0 - acceptance) * spread, length)
    agrees = random.random(length) < chance
    return Trace(tuple(range(length)), agrees, chance, prompt)
