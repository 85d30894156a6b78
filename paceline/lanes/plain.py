"""What lanes are compared with: no look-ahead, and speculation in which draft and target wait for each other.

The target is one lane or the stages of a pipeline, which a forward passes one after the other.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from paceline.lanes.tokens import Guess, Text, tokens_of
from paceline.lanes.work import Job, Lanes, Process, through

DRAFT, TARGET = "draft", "target"


def plain(lanes: Lanes, text: Text, stages: Sequence[str] = (TARGET,)) -> Process:
    """One target forward for each token."""
    while not text.finished:
        yield from _verify(lanes, text, [], stages)


def speculation(
    lanes: Lanes, text: Text, length: int, *, draft: str = DRAFT, stages: Sequence[str] = (TARGET,)
) -> Process:
    """Draft `length` tokens, verify them, again (2211.17192, 2302.01318). A prompt is read without drafting.

    Args:
        lanes: where it runs.
        text: what is written.
        length: draft tokens a round.
        draft: the lane that drafts.
        stages: the target.
    """
    while not text.finished:
        guesses: list[Guess] = []
        if text.has_draft and not text.unread:
            guesses = yield from drafted(lanes, text, length, draft)
        yield from _verify(lanes, text, guesses, stages)


def serial(lanes: Lanes, texts: Sequence[Text], length: int) -> Process:
    """Speculation for one text after the other."""
    for text in texts:
        yield from speculation(lanes, text, length)


def batched(lanes: Lanes, texts: Sequence[Text], length: int) -> Process:
    """Speculation for all texts in step: one draft forward a depth and one target forward a round serve them all."""
    while left := [text for text in texts if not text.finished]:
        draft = lanes.start(DRAFT, length, lambda left=left: [t.guesses(t.path, length) for t in left])  # type: ignore[misc]
        yield (draft,)
        chains: list[list[Guess]] = draft.result()
        size = sum(1 + len(chain) for chain in chains)
        pairs = list(zip(left, chains, strict=True))
        verify = lanes.start(TARGET, size, lambda p=pairs: [t.target.laws(t.path, tokens_of(c)) for t, c in p])  # type: ignore[misc]
        yield (verify,)
        for (text, chain), laws in zip(pairs, verify.result(), strict=True):
            text.commit(chain, text.judge(chain, laws), lanes.now)


def drafted(lanes: Lanes, text: Text, length: int, draft: str) -> Generator[Sequence[Job], None, list[Guess]]:
    """Draft behind what is committed; nothing, and no draft ever after, if the lane has died."""
    path = text.path
    job = lanes.start(draft, length, lambda: text.guesses(path, length))
    yield (job,)
    if job.error is not None:
        text.lose_draft(job.error)
        return []
    found: list[Guess] = job.value
    return found


def _verify(lanes: Lanes, text: Text, guesses: list[Guess], stages: Sequence[str]) -> Process:
    path = text.path
    size, text.unread = max(text.unread, 1) + len(guesses), 0
    job = yield from through(lanes, stages, size, lambda: text.target.laws(path, tokens_of(guesses)))
    text.commit(guesses, text.judge(guesses, job.result()), lanes.now)
