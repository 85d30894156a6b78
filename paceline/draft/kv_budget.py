"""Which part of the context to draft from: the choice that brings most tokens per second (MagicDec 2408.11049).

With acceptance `a`, seconds `d` of a draft forward and `t` of the target's, drafts of length n bring

    (1 - a^(n + 1)) / (1 - a)  tokens in  n * d + t  seconds

and a choice is worth the best of it over n. All four are measured; what is chosen is a pure function of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_FADE = 0.98
_SECONDS_RATE = 0.1
_PRIOR = 2.0
"""Tested tokens that the first guess of the acceptance counts for."""
_FIRST_GUESS = 0.75
_TRIAL = 24
"""Tested tokens before a choice is compared with the others."""
_LOOK_EVERY = 64
"""Rounds between looks at a choice that is not the best."""


@dataclass(slots=True)
class Choice:
    """What is known of one view."""

    name: str
    accepted: float = 0.0
    tested: float = 0.0
    seconds: float | None = None
    """Of a draft forward; None before the first."""
    rounds: int = 0
    """Whose times were taken in."""

    @property
    def acceptance(self) -> float:
        """Share of tested draft tokens that were accepted."""
        return (self.accepted + _PRIOR * _FIRST_GUESS) / (self.tested + _PRIOR)

    def learn_outcome(self, accepted: int, tested: int) -> None:
        """Take in a request's round."""
        self.accepted = _FADE * self.accepted + accepted
        self.tested = _FADE * self.tested + tested

    def learn_seconds(self, seconds: float) -> None:
        """Take in the mean time of a round's forwards."""
        before = seconds if self.seconds is None else self.seconds
        self.rounds += 1
        self.seconds = before + max(1.0 / self.rounds, _SECONDS_RATE) * (min(seconds, 4.0 * before) - before)

    @property
    def is_tried(self) -> bool:
        """Whether enough was seen of it."""
        return self.seconds is not None and self.tested >= _TRIAL * _FADE**_TRIAL


def worth(choice: Choice, target_seconds: float, most: int) -> float:
    """Tokens per second of the best length up to `most`."""
    a = min(choice.acceptance, 1.0 - 1e-9)
    draft = choice.seconds or 0.0
    return max((1.0 - a ** (n + 1)) / (1.0 - a) / (n * draft + target_seconds) for n in range(1, most + 1))


class Budgets:
    """Chooses among views, round by round.

    Args:
        names: of the views; the first is tried first.
        like: what is known of the same views at another size of context, to begin with.
    """

    def __init__(self, names: tuple[str, ...], like: Budgets | None = None) -> None:
        before = [Choice(name) for name in names] if like is None else like.choices
        self.choices: list[Choice] = [replace(choice) for choice in before]
        self._round = 0

    def choose(self, usable: list[int], target_seconds: float, most: int) -> int:
        """The view of the next round.

        Args:
            usable: numbers of the views that leave anything out.
            target_seconds: of the target's forward.
            most: longest draft.
        """
        self._round += 1
        untried = [i for i in usable if not self.choices[i].is_tried]
        if untried:
            return untried[0]
        best = max(usable, key=lambda i: worth(self.choices[i], target_seconds, most))
        if self._round % _LOOK_EVERY == 0 and len(usable) > 1:
            others = [i for i in usable if i != best]
            return others[self._round // _LOOK_EVERY % len(others)]
        return best
