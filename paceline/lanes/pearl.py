"""PEARL (2408.11850): draft and target run at the same time, and a draft may grow longer than one round.

A round is one target forward beside `length` draft tokens. What was drafted and not tested yet is *pending*:

    pending empty (pre-verify)    target: the law after what is committed.  It tests the first new token only.
    pending p1..pk (post-verify)  target: laws after it and after p1..pk.   They test p1..pk and the first new token.

    all pass        tested tokens are committed, the other new tokens become pending
    one fails       those before it are committed, then the recovered token; what else was drafted is dropped

Tests always end with the first new token, whose law is the last one the target gave, so there is no bonus token, and
the token that was tested in round i is no longer pending in round i + 1. The length is right when drafting it takes
as long as a target forward.

Lossless under every rule: each position is tested once, in order, by the rule itself.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from paceline.engine.sampling import Law
from paceline.lanes.plain import DRAFT, TARGET, drafted
from paceline.lanes.tokens import Guess, Text, tokens_of
from paceline.lanes.work import Job, Lanes, Process


@dataclass(frozen=True)
class Pearl:
    """The schedule.

    Args:
        length: draft tokens a round.
        pre: verify while the first tokens after a failure are drafted; without, the target waits for them.
        post: draft while pending tokens are verified; without, the draft waits.
    """

    length: int
    pre: bool = True
    post: bool = True

    def run(self, lanes: Lanes, text: Text) -> Process:
        """Write the text. If the lane that drafts dies, what is pending is verified and the rest is plain."""
        pending: list[Guess] = []
        while not text.finished:
            pending = yield from self.round(lanes, text, pending)

    def round(self, lanes: Lanes, text: Text, pending: Sequence[Guess]) -> Generator[Sequence[Job], None, list[Guess]]:
        """One target forward with whatever is drafted beside it.

        Returns:
            What is pending after it.
        """
        if not self.pre and not pending and text.has_draft:
            pending = yield from drafted(lanes, text, self.length, DRAFT)
        path, known = text.path, tokens_of(pending)
        drafts = text.has_draft and (self.post or not pending)
        jobs = [lanes.start(TARGET, 1 + len(known), lambda: text.target.laws(path, known))]
        if drafts:
            jobs.append(lanes.start(DRAFT, self.length, lambda: text.guesses((*path, *known), self.length)))
        yield jobs
        new: list[Guess] = []
        if drafts and jobs[1].error is not None:
            text.lose_draft(jobs[1].error)
        elif drafts:
            new = jobs[1].value
        return self.settle(text, pending, new, jobs[0].result(), lanes.now)

    def settle(
        self, text: Text, pending: Sequence[Guess], new: Sequence[Guess], laws: Sequence[Law], now: float
    ) -> list[Guess]:
        """Test what can be tested, commit, and say what is pending now."""
        tested = [*pending, *new[:1]]
        verdict = text.judge(tested, laws)
        text.commit(tested, verdict, now)
        return list(new[1:]) if verdict.token is None else []
