"""Under `rejection`, no word of noise takes part in two decisions, however many rounds pass over a position.

A rejected draft's later tokens were drawn from noise of later positions. If the next round drew from the same noise
again, anything that looked at the rejected tokens in between (Token Recycling's matrix does, and it decides which
drafter proposes next) would tie the new draft to its own selection, and the law would be biased.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lossless.loop import PROMPT, make_tiny

from paceline import SamplingParams
from paceline.engine.rng import Noise, Stream


def _reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each place was read while 32 samples ran; a place is everything that decides the words."""
    reads: Counter[Any] = Counter()
    original = Noise.words

    def words(self: Noise, position: int, stream: Stream, count: int, *more: Any, **named: Any) -> Any:
        reads[self, position, stream, more, tuple(named.items())] += 1
        return original(self, position, stream, count, *more, **named)

    llm = make_tiny(tmp_path).llm("draft:k=3,model=DRAFT", rule="rejection")
    monkeypatch.setattr(Noise, "words", words)
    llm.generate(PROMPT, SamplingParams(seed=1, n=32, max_tokens=16, ignore_eos=True))
    return reads


def test_decisions_read_their_own_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = _reads(tmp_path, monkeypatch)
    streams = Counter(place[2] for place in reads)
    assert set(streams) == {Stream.TARGET, Stream.ACCEPT, Stream.RESIDUAL, Stream.DRAFT}
    assert [place for place, times in reads.items() if times > 1 and place[2] is not Stream.DRAFT] == []


def test_every_round_draws_its_draft_from_fresh_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = _reads(tmp_path, monkeypatch)
    assert [place for place, times in reads.items() if times > 1] == []
