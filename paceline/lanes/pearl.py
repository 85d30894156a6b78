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

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.lanes.plain import DRAFT, TARGET, drafted
from paceline.lanes.tokens import Guess, Text, tokens_of
from paceline.lanes.work import Lanes, Process


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
            if not self.pre and not pending and text.has_draft:
                pending = yield from drafted(lanes, text, self.length, DRAFT)
            path, known = text.path, tokens_of(pending)
            drafts = text.has_draft and (self.post or not pending)
            verify = lanes.start(TARGET, 1 + len(known), lambda p=path, k=known: text.target.laws(p, k))  # type: ignore[misc]
            jobs = [verify]
            if drafts:
                behind = (*path, *known)
                jobs.append(lanes.start(DRAFT, self.length, lambda b=behind: text.guesses(b, self.length)))  # type: ignore[misc]
            yield jobs
            new: list[Guess] = []
            if drafts and jobs[1].error is not None:
                text.lose_draft()
            elif drafts:
                new = jobs[1].value
            pending = self.settle(text, pending, new, verify.result(), lanes.now)

    def settle(
        self, text: Text, pending: Sequence[Guess], new: Sequence[Guess], laws: Sequence[object], now: float
    ) -> list[Guess]:
        """Test what can be tested, commit, and say what is pending now."""
        tested = [*pending, *new[:1]]
        verdict = text.judge(tested, laws)  # type: ignore[arg-type]
        text.commit(tested, verdict, now)
        return list(new[1:]) if verdict.token is None else []
