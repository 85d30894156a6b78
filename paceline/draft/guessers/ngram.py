"""A Katz-backoff trigram model of what the draft model writes (Staged 2308.04623).

It learns online, per tenant salt, the token that the draft model liked best after every two and every single token
before it; a request's own text is counted beside that, for this request alone. What trigrams leave of the probability
is spread over the bigrams, as Katz does it, with absolute discounts; words seen after neither are not guessed. Guesses
are the likeliest nodes under this model, so they form a tree.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from paceline.draft.tenants import Tenants
from paceline.engine.request import Request

_MAX_TENANTS = 16
_MAX_CONTEXTS = 1 << 14
"""Per order and tenant; about 10 MB for both orders."""
_MAX_WORDS = 4
"""Kept per context. A fifth takes the place of the rarest."""
_MAX_COUNT = 64
"""Where a count reaches it, those of its context are halved, so that new habits can win."""
_DISCOUNT = 0.5
_LEAST = 0.08
"""A guess that is less likely is not worth its row in a forward."""

Counts = Mapping[int, int]


class NgramCounts:
    """How often which token came after one token and after two.

    Args:
        max_contexts: of each kind; those not touched longest go first.
    """

    def __init__(self, max_contexts: int) -> None:
        self._max = max_contexts
        self._tables: tuple[OrderedDict[tuple[int, ...], dict[int, int]], ...] = (OrderedDict(), OrderedDict())
        """By the length of the context, less one."""

    def add(self, before: Sequence[int], token: int) -> None:
        """`token` came after the end of `before`."""
        for table, length in zip(self._tables, (1, 2), strict=True):
            if len(before) >= length:
                self._count(table, tuple(before[-length:]), token)

    def after(self, context: tuple[int, ...]) -> Counts:
        """Counts after one or two tokens."""
        return self._tables[len(context) - 1].get(context, {})

    def __len__(self) -> int:
        return sum(map(len, self._tables))

    def _count(self, table: OrderedDict[tuple[int, ...], dict[int, int]], context: tuple[int, ...], token: int) -> None:
        words = table.setdefault(context, {})
        table.move_to_end(context)
        if token not in words and len(words) == _MAX_WORDS:
            del words[min(words, key=words.__getitem__)]
        words[token] = words.get(token, 0) + 1
        if words[token] >= _MAX_COUNT:
            table[context] = {word: count // 2 for word, count in words.items() if count > 1}
        if len(table) > self._max:
            table.popitem(last=False)


def katz(trigrams: Counts, bigrams: Counts) -> dict[int, float]:
    """Probabilities of the tokens seen after two tokens, or at least after the last of them."""
    left, found = 1.0, dict[int, float]()
    for counts in (trigrams, bigrams):
        new = {token: count for token, count in counts.items() if token not in found}
        total = sum(new.values())
        if total:
            found |= {token: left * (count - _DISCOUNT) / total for token, count in new.items()}
            left *= _DISCOUNT * len(new) / total
    return found


class NgramGuesser:
    """Guesses by that model.

    Args:
        most: tokens guessed in one forward of the draft model.
    """

    def __init__(self, most: int = 6) -> None:
        self.most = most
        self._drafts = Tenants(lambda: NgramCounts(_MAX_CONTEXTS), _MAX_TENANTS)
        self._texts: dict[Request, _Text] = {}

    def guess(self, request: Request, path: Sequence[int], most: int, depth: int) -> Iterator[Sequence[int]]:
        """The likeliest continuations, each one token longer than one before it."""
        known = (self._drafts.of(request), self._text(request).counts)
        start = (*request.token_ids[-2:], *path)[-2:]
        waiting: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
        while waiting and most:
            chance, chain = heapq.heappop(waiting)
            if chain:
                most -= 1
                yield chain
            if len(chain) < depth:
                for token, p in _next(known, (*start, *chain)[-2:]).items():
                    if -chance * p >= _LEAST:
                        heapq.heappush(waiting, (chance * p, (*chain, token)))

    def learn(self, request: Request, path: Sequence[int], likeliest: Sequence[int]) -> None:
        """Count what the draft model liked best along the path."""
        counts = self._drafts.of(request)
        text = (*request.token_ids[-2:], *path)
        first = len(text) - len(path)
        for i, token in enumerate(likeliest):
            counts.add(text[max(0, first + i - 2) : first + i], token)

    def forget(self, request: Request) -> None:
        """Drop the counts of the request's own text."""
        self._texts.pop(request, None)
        self._drafts.forget(request)

    def _text(self, request: Request) -> _Text:
        text = self._texts.setdefault(request, _Text())
        text.follow(request.token_ids)
        return text


class _Text:
    """Counts of a growing text."""

    def __init__(self) -> None:
        self.counts = NgramCounts(1 << 62)  # bounded by the text
        self._length = 0

    def follow(self, tokens: Sequence[int]) -> None:
        for i in range(self._length, len(tokens)):
            self.counts.add(tokens[max(0, i - 2) : i], tokens[i])
        self._length = len(tokens)


def _next(known: Sequence[NgramCounts], ending: tuple[int, ...]) -> dict[int, float]:
    trigrams = _sum([counts.after(ending) for counts in known]) if len(ending) == 2 else {}
    return katz(trigrams, _sum([counts.after(ending[-1:]) for counts in known]))


def _sum(counts: Sequence[Counts]) -> Counts:
    found = dict[int, int]()
    for one in counts:
        for token, count in one.items():
            found[token] = found.get(token, 0) + count
    return found
