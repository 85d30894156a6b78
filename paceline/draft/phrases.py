"""The phrase pool of Ouroboros (2402.13720): after each token, phrases of a fixed length that were written there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Phrase = tuple[int, ...]
_PER_TOKEN = 20
"""Phrases kept per token; a new one takes the oldest one's place."""
_MAX_TOKENS = 4096
"""Tokens with phrases; those not used longest go first. At 20 phrases of 6 tokens a full pool has about 10 MB."""


class PhrasePool:
    """`pool[token]`: phrases that may follow it, the newest last.

    Args:
        length: tokens of a phrase.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._phrases: OrderedDict[int, OrderedDict[Phrase, None]] = OrderedDict()

    def add(self, key: int, phrase: Phrase) -> None:
        """Make it the newest phrase after `key`."""
        assert len(phrase) == self.length
        known = self._phrases.setdefault(key, OrderedDict())
        self._phrases.move_to_end(key)
        known[phrase] = None
        known.move_to_end(phrase)
        if len(known) > _PER_TOKEN:
            known.popitem(last=False)
        if len(self._phrases) > _MAX_TOKENS:
            self._phrases.popitem(last=False)

    def add_text(self, text: Sequence[int], first: int) -> None:
        """Every phrase of a text that ends at its index `first` or later."""
        for end in range(max(first, self.length), len(text)):
            start = end - self.length
            self.add(text[start], tuple(text[start + 1 : end + 1]))

    def replace(self, key: int, old: Phrase, new: Phrase) -> None:
        """Write `new` over `old`, which need not be there any more."""
        self._phrases.get(key, OrderedDict()).pop(old, None)
        self.add(key, new)

    def newest(self, key: int, count: int) -> list[Phrase]:
        """The newest phrases, newest first."""
        known = self._phrases.get(key)
        if known is None:
            return []
        return [phrase for phrase, _ in zip(reversed(known), range(count), strict=False)]

    def __len__(self) -> int:
        return sum(map(len, self._phrases.values()))
